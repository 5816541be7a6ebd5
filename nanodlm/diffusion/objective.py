"""The negative evidence lower bound (NELBO) on the log-likelihood, for every kind of objective, in nats.

The kinds are listed in `kinds`. Masking, of rows or blocks of L tokens, has three estimators of one number, and a
variant of the third:

    estimator       noise                                         weight of the summed cross-entropy
    continuous      t ~ U(0, 1], each token masked at 1-alpha_t   -alpha'_t / (1 - alpha_t)
    discrete        t ~ U{1/T .. 1}, likewise                     T (alpha_s - alpha_t) / (1 - alpha_t), s = t - 1/T
    count           n ~ U{1 .. L}, a uniform n-subset masked      L / n
    constant_count  the same in pairs of rows, n and L + 1 - n    L / n

The discrete bound is larger than the others and falls to them as T grows. The others are equal for a network that
does not see t; one that does is told, by counts, the time at which a share n / L is masked. Uniform and hybrid noise
have the first, and a count form of their own; see `corruption.mix_rows`. An `Objective` puts it together in three
steps, so that a trainer can draw the noise of all its micro-batches at once: `corrupt`, `logits`, `row_nats`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from nanodlm.diffusion.checks import check_logits, require, require_whole
from nanodlm.diffusion.corruption import Corruption, mask_blocks, mask_rows, mix_rows, shift_right
from nanodlm.diffusion.cross_entropy import cross_entropy, linear_cross_entropy
from nanodlm.diffusion.kinds import KINDS, Estimator, Kind, KindName, Times, Weighting
from nanodlm.diffusion.mixed import mixed_divergence
from nanodlm.diffusion.noise import Denoise, Logits, Tokens
from nanodlm.diffusion.schedules import Schedule, make_schedule

Features = Float[Array, "B L D"]
Table = Float[Array, "V D"]


class RowNats(NamedTuple):
    """Hold each row's `bound` in nats per sequence, and the `loss` that the weighting makes of it."""

    loss: Float[Array, "B *L"]
    bound: Float[Array, "B *L"]


@dataclass(frozen=True)
class Objective:
    """What is minimised, and the bound that is reported whatever is minimised; a ValueError where there is no bound.

    The weighting is of the loss: the `bound`'s weights (of rows or blocks), those `clipped` at `max_weight`, or
    `uniform` ones, 2 for all, which keeps the scale where half is noise on average. Masks then have plain
    cross-entropy.
    """

    schedule: Schedule  # counts use it only to tell the network the time
    mask_id: int  # it and larger ids (padding) are never predicted, masked or scored
    kind: KindName = "absorbing"
    estimator: Estimator = "continuous"  # autoregressive objectives have no noise and read none
    num_timesteps: int = 1000  # T of the discrete estimator
    times: Times = "systematic"  # how times or counts are spread over a batch's rows; see `noise.low_discrepancy`
    block_size: int = 1  # tokens per block, for `block`; the last one may be shorter
    group: int = 1  # tokens told at once, from all masked to none: counts are of masks before such a step
    uniform_share: float = 0.1  # share of uniform noise at m = 1/2, for `hybrid`; see `mixed.shares`
    weighting: Weighting = "bound"
    max_weight: float = 10.0

    def __post_init__(self) -> None:
        named = ((self.estimator, Estimator), (self.kind, KindName), (self.weighting, Weighting), (self.times, Times))
        for value, choices in named:
            names = get_args(choices)
            require(value in names, f"unknown name {value!r}: choose {', '.join(names[:-1])} or {names[-1]}")
        for name in ("mask_id", "num_timesteps", "block_size"):
            require_whole(name, getattr(self, name))
        if self.mixed and self.traits.masks and not 0 < self.uniform_share < 1:
            raise ValueError(f"the uniform share of hybrid noise must lie between 0 and 1, not at {self.uniform_share}")
        whole = (self.schedule.start, self.schedule.end) == (0, 1)
        if self.mixed and not (whole and self.estimator in self.traits.estimators):
            needs = f"the {' or '.join(sorted(self.traits.estimators))} estimator and a schedule from 0 to 1"
            raise ValueError(f"{self.kind} noise needs {needs}, not {self.estimator} with {self.schedule.kind}")

    @property
    def traits(self) -> Kind:
        """What its kind reads, has and allows."""
        return KINDS[self.kind]

    @property
    def mixed(self) -> bool:
        """Whether noise replaces tokens by random ones, so that the loss is no sum of cross-entropies."""
        return self.traits.random_tokens

    @property
    def noise_share(self) -> float:
        """The uniform share of the process: 1 for random tokens alone, 0 for masks alone."""
        return 0.0 if not self.mixed else self.uniform_share if self.traits.masks else 1.0

    def corrupt(self, x_0: Tokens, key: Key[Array, ""], segment_ids: Tokens | None = None) -> Corruption:
        """Draw noise for a whole batch, its times (or counts) spread evenly over all rows in random order.

        Constant counts add up to the same for every two rows (or blocks) of equal length without padding. Segments are
        read by `autoregressive` alone: the first token of each is predicted from the begin token.
        """
        if self.traits.reads == "before":
            ones = jnp.ones(len(x_0))
            return Corruption(shift_right(x_0, segment_ids, begin_id=self.mask_id), 0 * ones, ones, ones, ones)
        noise = {name: getattr(self, name) for name in ("schedule", "mask_id", "estimator", "times")}
        if self.mixed:
            return mix_rows(x_0, key, uniform_share=self.noise_share, **noise)
        noise |= {"num_timesteps": self.num_timesteps, "group": self.group}
        if self.traits.reads == "block":
            return mask_blocks(x_0, key, block_size=self.block_size, **noise)
        return mask_rows(x_0, key, **noise)

    def logits(self, denoise: Denoise, x_0: Tokens, noised: Corruption, segment_ids: Tokens | None = None) -> Logits:
        """Call the network on noised rows; only a block network is given x_0, of which it may read earlier blocks.

        One that says by its `block_size` that it reads other positions than it should is a ValueError.
        """
        network = getattr(denoise, "__self__", denoise)  # which may be given as one of its methods
        reads, wanted = getattr(network, "block_size", None), self.traits.block_size(self.block_size)
        fits = f"does not fit the {self.kind} objective, which needs {wanted}"
        require(reads in (None, wanted), f"a network with block_size {reads} {fits}")
        options = {"context": x_0} if self.traits.reads == "block" else {}
        if segment_ids is not None:
            options["segment_ids"] = segment_ids
        return check_logits(denoise(noised.x_t, noised.t, **options), x_0)

    def row_nats(self, logits: Logits, x_0: Tokens, noised: Corruption) -> RowNats:
        """Return loss and bound of each row from the network's logits, in nats per sequence."""
        if self.mixed:
            weight, nats = self.mixed_terms(logits, x_0, noised)
            nats = nats.sum(axis=1)
            return RowNats(self._reweigh(weight, noised.ratio) * nats, weight * nats)
        scored, weight = self._position_weights(x_0, noised)
        nats = cross_entropy(logits, x_0, scored, mask_id=self.mask_id)
        return RowNats((weight.loss * nats).sum(axis=1), (weight.bound * nats).sum(axis=1))

    def mixed_terms(
        self, logits: Logits, x_0: Tokens, noised: Corruption
    ) -> tuple[Float[Array, "B"], Float[Array, "B L"]]:
        """Return, for random tokens, each row's weight and each position's nats, whose products are the bound."""
        options = {"mask_id": self.mask_id, "uniform_share": self.noise_share}
        real = x_0 < self.mask_id
        tokens, noisy = (jnp.where(real, ids, 0) for ids in (x_0, noised.x_t))  # others have no finite gradient
        rate, nats = mixed_divergence(logits, tokens, noisy, noised.mask_rate, **options)
        return noised.weight * rate, jnp.where(real, nats, 0.0)

    def fused_nats(
        self, features: Features, table: Table, x_0: Tokens, noised: Corruption, *, chunks: int = 1
    ) -> tuple[Float[Array, ""], Float[Array, "G C"]]:
        """Return the loss of all rows, and the bound's terms (of rows, or pairs of rows), in nats, keeping no logits.

        The network gives features (`Transformer.features`) instead of logits, which are features times the transposed
        table, in float32. This output layer, often most of the work, is computed at no more positions than
        `most_scored` says, chunk by chunk: more chunks take less memory. Only the loss has gradients. It is for kinds
        whose loss is a sum of cross-entropies: all but `uniform` and `hybrid`.
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
        return loss, bound_weight * nats

    def most_scored(self, n_rows: int, length: int) -> int:
        """Return how many positions two neighbouring rows can have scored at most, told before any noise is drawn.

        Under `constant_count` it is K (b + 1) for an even number of rows of K blocks of b tokens, otherwise all.
        """
        if self.estimator not in self.traits.estimators or self.estimator != "constant_count" or n_rows % 2:
            return 2 * length
        size = self.block_size if self.traits.reads == "block" else length
        return min(2 * length, -(-length // size) * (size + 1))

    def _position_weights(self, x_0: Tokens, noised: Corruption) -> tuple[Bool[Array, "B L"], RowNats]:
        """Return which positions are scored, and what each one's cross-entropy weighs in the loss and in the bound."""
        scored = x_0 < self.mask_id
        if self.traits.masks:
            scored &= noised.x_t == self.mask_id
        weight = noised.weight.reshape(len(x_0), -1)
        if self.traits.reads == "block":
            weight = jnp.repeat(weight, self.block_size, axis=1)[:, : x_0.shape[1]]
        loss = self._reweigh(weight, jnp.ones_like(weight))
        return scored, RowNats(jnp.where(scored, loss, 0.0), jnp.where(scored, weight, 0.0))

    def _reweigh(self, weight: Float[Array, "..."], ratio: Float[Array, "..."]) -> Float[Array, "..."]:
        """Turn the bound's weights into the loss's."""
        if self.weighting == "bound" or not (self.traits.masks or self.mixed):  # without noise there are no weights
            return weight
        return jnp.minimum(weight, self.max_weight * ratio) if self.weighting == "clipped" else 2.0 * ratio


def own_objective(network: Any) -> Objective | None:
    """Return what a network, or the network of one of its methods, was trained on; None where it does not say."""
    return getattr(getattr(network, "__self__", network), "objective", None)


def settle(network: Any, *, schedule: Schedule | str | None, **passed: Any) -> dict[str, Any]:
    """Return what was passed, fields of an `Objective` by name, with what a loaded network carries in place of None.

    Another schedule is taken when the network does not see the time, for which it then means nothing. A ValueError says
    what contradicts the network, and what is missing where it carries nothing.
    """
    own = own_objective(network)
    schedule = make_schedule(schedule) if isinstance(schedule, str) else schedule
    if own is None:
        missing = [name for name, value in (("schedule", schedule), ("mask_id", passed["mask_id"])) if value is None]
        require(not missing, f"pass {' and '.join(missing)}: only a network of nanodlm.load carries its own")
        require_whole("mask_id", passed["mask_id"])
        return {"schedule": schedule, **passed}
    for name, value in passed.items():
        has = getattr(own, name)
        require(value in (None, has), f"{name} {value} contradicts the network, which was trained with {has}")
    if schedule is not None and getattr(network, "sees_time", True):
        contradiction = f"a {schedule.kind} schedule: the network is told the times of {own.schedule.kind}"
        require(schedule.agrees_with(own.schedule), contradiction)
    return {"schedule": schedule or own.schedule, **{name: getattr(own, name) for name in passed}}
