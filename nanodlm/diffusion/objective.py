"""The negative evidence lower bound (NELBO) on the log-likelihood, for every objective, in nats.

    kind            what the network is given          the bound is a mean of weighted
    absorbing       masked rows                        cross-entropies at masked positions
    block           masked blocks, clean ones before   the same within each block, summed over blocks
    autoregressive  the tokens before                  cross-entropies at all positions: -log p itself
    uniform         rows with random tokens            divergences between the true and the model's reverse step
    hybrid          rows with both                     the same

Masking, of rows or blocks of L tokens, has three estimators of one number, and a variant of the third:

    estimator       noise                                         weight of the summed cross-entropy
    continuous      t ~ U(0, 1], each token masked at 1-alpha_t   -alpha'_t / (1 - alpha_t)
    discrete        t ~ U{1/T .. 1}, likewise                     T (alpha_s - alpha_t) / (1 - alpha_t), s = t - 1/T
    count           n ~ U{1 .. L}, a uniform n-subset masked      L / n
    constant_count  the same in pairs of rows, n and L + 1 - n    L / n

The discrete bound is larger than the others and falls to them as T grows. The others are equal for a network that
does not see t; one that does is told, by counts, the time at which a share n / L is masked. Uniform and hybrid noise
have the first, and a count form of their own; see `Objective.corrupt`. An `Objective` puts it together in three steps,
so that a trainer can draw the noise of all its micro-batches at once: `corrupt`, `logits`, `row_nats`.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from nanodlm.diffusion.corruption import Corruption, _continuous_noise, shift_right
from nanodlm.diffusion.cross_entropy import cross_entropy, linear_cross_entropy
from nanodlm.diffusion.mixed import mask_rate_of, mixed_divergence, q_sample_mixed, shares
from nanodlm.diffusion.noise import Denoise, Times, low_discrepancy, mask_subset, q_sample, unmask_probability
from nanodlm.diffusion.schedules import Schedule

Estimator = Literal["continuous", "discrete", "count", "constant_count"]
Kind = Literal["absorbing", "uniform", "hybrid", "block", "autoregressive"]
Weighting = Literal["bound", "clipped", "uniform"]


class RowNats(NamedTuple):
    """Of each row, in nats per sequence: the `bound`, and the `loss` that its weighting makes of it."""

    loss: Float[Array, "B *L"]
    bound: Float[Array, "B *L"]


@dataclass(frozen=True)
class Objective:
    """What is minimised, and the bound that is reported whatever is minimised.

    Attributes:
        schedule: The noise schedule; counts use it only to tell the network the time.
        mask_id: The id of a masked token; it and larger ids (padding) are never predicted, masked or scored.
        kind: See the module's first table.
        estimator: See its second table; uniform and hybrid noise have `continuous` and `count`.
        num_timesteps: T of the discrete estimator.
        times: How times or counts are spread over the rows of a batch; see `diffusion.low_discrepancy`.
        block_size: Tokens per block, for `block`; the last one may be shorter.
        uniform_share: Share of uniform noise at m = 1/2, for `hybrid`; see `diffusion.shares`.
        weighting: Of the loss: the `bound`'s weights (of rows or blocks), those `clipped` at `max_weight`, or `uniform`
            ones, 2 for all, which keeps the scale where half is noise on average. Masks then have plain cross-entropy.
        max_weight: Where `clipped` clips.

    Raises:
        ValueError: For a combination that has no bound.
    """

    schedule: Schedule
    mask_id: int
    kind: Kind = "absorbing"
    estimator: Estimator = "continuous"
    num_timesteps: int = 1000
    times: Times = "systematic"
    block_size: int = 1
    uniform_share: float = 0.1
    weighting: Weighting = "bound"
    max_weight: float = 10.0

    def __post_init__(self) -> None:
        named = ((self.estimator, Estimator), (self.kind, Kind), (self.weighting, Weighting), (self.times, Times))
        for value, choices in named:
            names = choices.__args__  # type: ignore[attr-defined]
            if value not in names:
                raise ValueError(f"unknown name {value!r}: choose {', '.join(names[:-1])} or {names[-1]}")
        for name in ("num_timesteps", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.kind == "hybrid" and not 0 < self.uniform_share < 1:
            raise ValueError(f"the uniform share of hybrid noise must lie between 0 and 1, not at {self.uniform_share}")
        whole = (self.schedule.start, self.schedule.end) == (0, 1)
        if self.mixed and not (whole and self.estimator in ("continuous", "count")):
            raise ValueError(
                f"{self.kind} noise needs the continuous or count estimator and a schedule from 0 to 1, "
                f"not {self.estimator} with {self.schedule.kind}"
            )

    @property
    def mixed(self) -> bool:
        """Whether noise replaces tokens by random ones."""
        return self.kind in ("uniform", "hybrid")

    @property
    def noise_share(self) -> float:
        """The uniform share of the process: 1 for uniform noise, 0 for masks alone."""
        return {"uniform": 1.0, "hybrid": self.uniform_share}.get(self.kind, 0.0)

    def corrupt(
        self, x_0: Int[Array, "B L"], key: Key[Array, ""], segment_ids: Int[Array, "B L"] | None = None
    ) -> Corruption:
        """Draw noise for a whole batch, its times (or counts) spread evenly over all rows in random order.

        Of uniform and hybrid noise with `count`, n of L positions are noise, n ~ U{0 .. L}, and the share b of noise is
        drawn given n, from Beta(max(n, 1), L + 1 - n). That is the joint law of b ~ U(0, 1) and n ~ Binomial(L, b), but
        in other proportions where n > 0, which the ratio (L + 1) b / n makes up for; the weight is that times dm / db.
        It has finite variance, which continuous times have not under a linear schedule.

        Constant counts add up to the same for every two rows (or blocks) of equal length without padding.

        Source: MD4, arXiv:2406.04329, equations 4 (continuous) and 6 (discrete); LLaDA, arXiv:2502.09992,
        equation 6, and RADD, arXiv:2406.03736, appendix C (count); BD3-LM, arXiv:2503.09573, equation 8 (blocks).

        Args:
            x_0: Token ids.
            key: Randomness.
            segment_ids: Which document of its row each token belongs to, for `autoregressive`: the first token of
                each is predicted from the begin token.

        Raises:
            ValueError: For an odd number of rows (or blocks) under `constant_count`.

        >>> from nanodlm.diffusion.schedules import make_schedule
        >>> objective = Objective(make_schedule("linear"), mask_id=1, estimator="constant_count")
        >>> int((objective.corrupt(jnp.zeros((4, 8), int), jax.random.key(0)).x_t == 1).sum())  # always 4 * 9 / 2
        18
        """
        n_rows, length = x_0.shape
        if self.kind == "autoregressive":
            ones = jnp.ones(n_rows)
            return Corruption(shift_right(x_0, segment_ids, begin_id=self.mask_id), 0 * ones, ones, ones, ones)
        if self.kind == "block":
            n_blocks = -(-length // self.block_size)
            # The last block is filled up with padding, which is never masked.
            filled = jnp.pad(x_0, ((0, 0), (0, n_blocks * self.block_size - length)), constant_values=self.mask_id)
            x_t, *of_blocks = self._mask(filled.reshape(-1, self.block_size), key)
            return Corruption(
                x_t.reshape(n_rows, -1)[:, :length], *(value.reshape(n_rows, n_blocks) for value in of_blocks)
            )
        return self._mix(x_0, key) if self.mixed else self._mask(x_0, key)

    def _mix(self, x_0: Int[Array, "B L"], key: Key[Array, ""]) -> Corruption:
        """Noise rows with masks and random tokens."""
        order_key, time_key, share_key, noise_key = jax.random.split(key, 4)
        u = jax.random.permutation(order_key, low_discrepancy(time_key, len(x_0), self.times))
        if self.estimator == "continuous":
            m, slope, count = self.schedule.mask_rate(u), self.schedule.dmask_rate(u), None
            t, ratio = u, jnp.ones_like(u)
        else:
            length = (x_0 < self.mask_id).sum(axis=1)
            count = jnp.clip(jnp.ceil(u * (length + 1)).astype(jnp.int32) - 1, 0, length)
            noise = jax.random.beta(share_key, jnp.maximum(count, 1), length + 1 - count)
            noise = jnp.clip(noise, 1e-30, 1 - 2**-20)
            m, slope = jax.jvp(lambda b: mask_rate_of(b, self.noise_share), (noise,), (jnp.ones_like(noise),))
            ratio = jnp.where(count > 0, (length + 1) * noise / jnp.maximum(count, 1), 1.0)
            t = self.schedule.time_of(m)
        x_t = q_sample_mixed(x_0, shares(m, self.noise_share), noise_key, mask_id=self.mask_id, count=count)
        return Corruption(x_t, t, m, slope * ratio, ratio)

    def _mask(self, x_0: Int[Array, "B L"], key: Key[Array, ""]) -> Corruption:
        """Mask rows, of which those that are all padding get weight 0."""
        n_rows = x_0.shape[0]
        order_key, time_key, mask_key = jax.random.split(key, 3)
        if self.estimator in ("count", "constant_count"):
            length = (x_0 < self.mask_id).sum(axis=1)
            if self.estimator == "count":
                u = jax.random.permutation(order_key, low_discrepancy(time_key, n_rows, self.times))
                count = jnp.ceil(u * length).astype(jnp.int32)
            else:
                count = self._paired_counts(length, order_key, time_key)
            count = jnp.clip(count, jnp.minimum(1, length), length)
            x_t = mask_subset(x_0, count, mask_key, mask_id=self.mask_id)
            share = count / jnp.maximum(length, 1)
            weight = jnp.where(count > 0, 1 / share, 0.0)
            return Corruption(x_t, self.schedule.time_of(share), share, weight, jnp.ones_like(weight))
        u = jax.random.permutation(order_key, low_discrepancy(time_key, n_rows, self.times))
        if self.estimator == "continuous":
            t, mask_rate, weight = _continuous_noise(u, self.schedule)
        else:
            step = jnp.clip(jnp.ceil(u * self.num_timesteps), 1, self.num_timesteps)
            t, s = step / self.num_timesteps, (step - 1) / self.num_timesteps
            mask_rate = jnp.where(t >= 1, 1.0, self.schedule.mask_rate(t))
            weight = self.num_timesteps * unmask_probability(self.schedule, t, s)
        x_t = q_sample(x_0, mask_rate, mask_key, mask_id=self.mask_id)
        return Corruption(x_t, t, mask_rate, weight, jnp.ones_like(weight))

    def _paired_counts(
        self, length: Int[Array, "B"], order_key: Key[Array, ""], time_key: Key[Array, ""]
    ) -> Int[Array, "B"]:
        """Counts n and L + 1 - n for each two neighbouring rows: each is uniform on 1..L, their sum is fixed.

        The last of an odd number of rows has no neighbour.
        """
        n_rows = len(length)
        half = low_discrepancy(time_key, -(-n_rows // 2), self.times) / 2  # in (0, 1/2]
        pair_key, swap_key = jax.random.split(order_key)
        u = jnp.repeat(jax.random.permutation(pair_key, half), 2)[:n_rows]
        swap = jnp.repeat(jax.random.bernoulli(swap_key, shape=half.shape), 2)[:n_rows]
        count = jnp.ceil(u * length).astype(jnp.int32)
        second = (jnp.arange(n_rows) % 2 == 1) != swap
        return jnp.where(second, length + 1 - count, count)

    def logits(
        self,
        denoise: Denoise,
        x_0: Int[Array, "B L"],
        noised: Corruption,
        segment_ids: Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B L V"]:
        """Call the network on noised rows; only a block network is given x_0, of which it may read earlier blocks.

        Raises:
            ValueError: For a network that says by its `block_size` that it reads other positions than it should.
        """
        network = getattr(denoise, "__self__", denoise)  # which may be given as one of its methods
        reads, wanted = getattr(network, "block_size", None), {"block": self.block_size, "autoregressive": 1}
        if reads is not None and reads != wanted.get(self.kind, 0):
            raise ValueError(
                f"a network with block_size {reads} does not fit the {self.kind} objective, "
                f"which needs {wanted.get(self.kind, 0)}"
            )
        options = {"context": x_0} if self.kind == "block" else {}
        if segment_ids is not None:
            options["segment_ids"] = segment_ids
        return denoise(noised.x_t, noised.t, **options)

    def row_nats(self, logits: Float[Array, "B L V"], x_0: Int[Array, "B L"], noised: Corruption) -> RowNats:
        """Loss and bound of each row from the network's logits, in nats per sequence."""
        if self.mixed:
            options = {"mask_id": self.mask_id, "uniform_share": self.noise_share}
            rate, nats = mixed_divergence(logits, x_0, noised.x_t, noised.mask_rate, **options)
            weight, nats = noised.weight * rate, jnp.where(x_0 < self.mask_id, nats, 0.0).sum(axis=1)
            return RowNats(self._reweigh(weight, noised.ratio) * nats, weight * nats)
        scored, weight = self._position_weights(x_0, noised)
        nats = cross_entropy(logits, x_0, scored, mask_id=self.mask_id)
        return RowNats((weight.loss * nats).sum(axis=1), (weight.bound * nats).sum(axis=1))

    def fused_nats(
        self,
        features: Float[Array, "B L D"],
        table: Float[Array, "V D"],
        x_0: Int[Array, "B L"],
        noised: Corruption,
        *,
        chunks: int = 1,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Loss and bound of all rows together, in nats, from what the output layer reads, without keeping any logits.

        The output layer, often most of the work, is computed at no more positions than `most_scored` says. Of the two
        results, only the loss has gradients.

        Args:
            features: What the network gives instead of logits: `Transformer.features`.
            table: The output layer, in float32; logits are features times its transpose.
            x_0: Token ids.
            noised: Of kinds whose loss is a sum of cross-entropies: all but `uniform` and `hybrid`.
            chunks: Parts to compute one after the other; more of them take less memory.
        """
        scored, weight = self._position_weights(x_0, noised)
        n_rows, length = x_0.shape
        values = (features, x_0, *weight)
        most = self.most_scored(n_rows, length)
        if most < 2 * length:
            pairs = [value.reshape(n_rows // 2, 2 * length, *value.shape[2:]) for value in values]
            places = jnp.argsort(~scored.reshape(n_rows // 2, -1), axis=1, stable=True)[:, :most]
            values = [jnp.take_along_axis(v, places[..., None] if v.ndim == 3 else places, axis=1) for v in pairs]
        features, target, loss_weight, bound_weight = values
        loss, nats = linear_cross_entropy(features, table, target, loss_weight, mask_id=self.mask_id, chunks=chunks)
        return loss, (bound_weight * nats).sum()

    def fused_bounds(
        self,
        features: Float[Array, "B L D"],
        table: Float[Array, "V D"],
        x_0: Int[Array, "B L"],
        noised: Corruption,
        *,
        chunks: int = 1,
    ) -> Float[Array, "B"]:
        """The bound of each row, as `row_nats` has it, without keeping any logits; see `fused_nats`."""
        _, weight = self._position_weights(x_0, noised)
        _, nats = linear_cross_entropy(features, table, x_0, weight.bound, mask_id=self.mask_id, chunks=chunks)
        return (weight.bound * nats).sum(axis=1)

    def most_scored(self, n_rows: int, length: int) -> int:
        """The largest number of scored positions in two neighbouring rows that can be told before any noise is drawn.

        Under `constant_count` it is K (b + 1) for an even number of rows of K blocks of b tokens, otherwise all.

        >>> from nanodlm.diffusion.schedules import make_schedule
        >>> Objective(make_schedule("linear"), 9, estimator="constant_count").most_scored(4, 64)
        65
        """
        if self.estimator != "constant_count" or self.kind not in ("absorbing", "block") or n_rows % 2:
            return 2 * length
        size = self.block_size if self.kind == "block" else length
        return min(2 * length, -(-length // size) * (size + 1))

    def _position_weights(self, x_0: Int[Array, "B L"], noised: Corruption) -> tuple[Bool[Array, "B L"], RowNats]:
        """Which positions are scored, and the weight of each one's cross-entropy in the loss and in the bound."""
        scored = x_0 < self.mask_id
        if self.kind != "autoregressive":
            scored &= noised.x_t == self.mask_id
        weight = noised.weight.reshape(len(x_0), -1)
        if self.kind == "block":
            weight = jnp.repeat(weight, self.block_size, axis=1)[:, : x_0.shape[1]]
        loss = self._reweigh(weight, jnp.ones_like(weight))
        return scored, RowNats(jnp.where(scored, loss, 0.0), jnp.where(scored, weight, 0.0))

    def _reweigh(self, weight: Float[Array, "..."], ratio: Float[Array, "..."]) -> Float[Array, "..."]:
        """The loss's weights from the bound's."""
        if self.weighting == "bound" or self.kind == "autoregressive":
            return weight
        return jnp.minimum(weight, self.max_weight * ratio) if self.weighting == "clipped" else 2.0 * ratio
