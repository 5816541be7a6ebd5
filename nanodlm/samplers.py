"""Samplers: from an all-masked (or random) sequence to text, as time runs from 1 to 0.

    sampler         which positions unmask                                         calls of the network
    ancestral       each in the grid step drawn for it                             num_steps
    ancestral_skip  the same, but no row waits for a step of its own               at most num_steps, and L
    first_hitting   each at a continuous time drawn for it, one by one             L
    confidence      where the drawn token is likeliest; as many as the schedule    at most num_steps
    margin          where the best token leads by most; as many                    at most num_steps
    entropy         as many as are nearly independent of each other                at most num_steps
    remdm_cap, ...  as in ancestral, and tokens are masked again; see `_remask`    num_steps

The first three have one law, that of the model's reverse process. The next three go where the model is sure, and the
`remdm` ones correct themselves. `sample_blocks` fills a row block by block, `sample_autoregressive` token by token.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from nanodlm.diffusion import predictable, shares
from nanodlm.losses import Denoise
from nanodlm.schedules import Schedule

IN_ORDER = ("ancestral", "ancestral_skip", "first_hitting")
BY_SCORE = ("confidence", "margin", "entropy")
REMASKING = ("remdm_cap", "remdm_rescale", "remdm_conf", "remdm_loop")
SAMPLERS = IN_ORDER + BY_SCORE + REMASKING
TINY = 1e-30
Prompt = Int[Array, "B P"] | Int[Array, "P"] | None


def sample(
    denoise: Denoise,
    key: Key[Array, ""],
    *,
    shape: tuple[int, int],
    mask_id: int,
    schedule: Schedule,
    num_steps: int,
    sampler: str = "ancestral",
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    prompt: Prompt = None,
    grid: str = "uniform",
    guidance: float = 0.0,
    uniform_share: float = 0.0,
    entropy_bound: float = 0.1,
    remask: float = 0.02,
    loop_time: float = 0.1,
) -> Int[Array, "B L"]:
    """Draw sequences. No mask is left, tokens of the prompt are never altered, and a key fixes the result.

    Called as it is, it is compiled anew each time. To compile once per shape, keep a jitted function:

        draw = jax.jit(partial(sample, model, shape=(8, 64), mask_id=m, schedule=schedule, num_steps=64))

    Args:
        denoise: Maps x_t (B, L) and t (B,) to logits (B, L, V).
        key: Randomness.
        shape: (B, L) of the result.
        mask_id: The id of a masked token; it and larger ids are never drawn.
        schedule: The noise schedule.
        num_steps: Number of steps, at least 1; `first_hitting` has its own.
        sampler: One of `SAMPLERS`; see the module's table.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Draw from the k most likely tokens only; 0 is off.
        top_p: Then from the smallest set of tokens with at least this probability; 1 is off.
        prompt: Token ids placed at the front of each row; `mask_id` in it marks positions to fill in, so a
            prompt as long as the row is an infilling pattern.
        grid: Times at which the schedule is read: `uniform`, t_i = 1 - i/n, or `cosine`, t_i = cos(pi/2 i/n), whose
            steps are shorter while little is known (MD4, arXiv:2406.04329; MaskGIT, arXiv:2202.04200).
        guidance: w in logits = (1 + w) cond - w uncond, where uncond is what the model predicts with the prompt's
            tokens masked (LLaDA, arXiv:2502.09992, appendix; arXiv:2410.18514). 0 makes no second call.
        uniform_share: That of the process the model was trained on (`diffusion.shares`). Above 0, `ancestral` takes
            the reverse steps of that process; see `_denoise_mixed`.
        entropy_bound: For `entropy`, in nats: how dependent tokens that appear together may be.
        remask: For `remdm_cap`, `_rescale` and `_loop`: how often a token is masked again, in [0, 1].
        loop_time: For `remdm_loop`: where time stands still, in (0, 1).

    Returns:
        Token ids below `mask_id`, int32.

    Raises:
        ValueError: For an option that makes no sense, or a prompt that does not fit.

    >>> from nanodlm.schedules import make_schedule
    >>> always_1 = lambda x_t, t: jax.nn.one_hot(jnp.ones_like(x_t), 3) * 50
    >>> sample(always_1, jax.random.key(0), shape=(1, 4), mask_id=2, schedule=make_schedule("linear"),
    ...        num_steps=2, prompt=jnp.array([0])).tolist()
    [[0, 1, 1, 1]]
    """
    _require(not getattr(denoise, "block_size", 0), "this network writes left to right: choose sample_blocks")
    _require(sampler in SAMPLERS, f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    _require(grid in ("uniform", "cosine"), f"unknown grid {grid!r}: choose uniform or cosine")
    _require(num_steps >= 1, f"num_steps must be at least 1, not {num_steps}")
    _require(guidance >= 0, f"guidance must not be negative, not {guidance}: choose 0 for none")
    _require(0 <= uniform_share <= 1, f"uniform_share must be between 0 and 1, not {uniform_share}")
    _require(sampler == "ancestral" or uniform_share == 0, f"{sampler} is for masks alone: choose ancestral")
    _require(guidance == 0 or uniform_share < 1, "uniform noise has no mask to hide a prompt with: choose guidance 0")
    _require(entropy_bound >= 0, f"entropy_bound must not be negative, not {entropy_bound}")
    _require(0 <= remask <= 1, f"remask must be between 0 and 1, not {remask}")
    _require(0 < loop_time < 1, f"loop_time must be above 0 and below 1, not {loop_time}")
    x_1 = _start(prompt, shape, mask_id)
    given = x_1 != mask_id
    start_key, token_key = jax.random.split(key)

    def predict(x_t: Int[Array, "B L"], t: Float[Array, "B"]) -> Float[Array, "B L V"]:
        logits = predictable(denoise(x_t, t), mask_id=mask_id)
        if guidance == 0 or prompt is None or jnp.size(prompt) == 0:
            return logits
        without = predictable(denoise(jnp.where(given, mask_id, x_t), t), mask_id=mask_id)
        return jnp.where(logits > -jnp.inf, (1 + guidance) * logits - guidance * without, -jnp.inf)

    times = _times(num_steps, grid, loop_time if sampler == "remdm_loop" else None)
    walk = _Walk(
        start=x_1,
        times=times,
        rates=schedule.mask_rate(times).at[0].set(1.0).at[-1].set(0.0),  # whatever the schedule does at its ends
        mask_id=mask_id,
        predict=predict,
        limit=partial(limited, temperature=temperature, top_k=top_k, top_p=top_p),
        key=token_key,
    )
    if uniform_share > 0:
        return _denoise_mixed(walk, start_key, uniform_share)
    if sampler in IN_ORDER:
        return _unmask_in_order(walk, start_key, schedule, sampler)
    if sampler in BY_SCORE:
        return _unmask_by_score(walk, schedule, sampler, entropy_bound)
    return _remask(walk, start_key, sampler, remask)


def _require(sound: bool, message: str) -> None:
    if not sound:
        raise ValueError(message)


def _start(prompt: Prompt, shape: tuple[int, int], mask_id: int) -> Int[Array, "B L"]:
    """The prompt, and masks behind it."""
    x_1 = jnp.full(shape, mask_id, jnp.int32)
    if prompt is None:
        return x_1
    given = jnp.asarray(prompt)
    whole = jnp.issubdtype(given.dtype, jnp.integer) or given.size == 0
    _require(whole and given.ndim in (1, 2), "a prompt is one row of token ids, or as many as there are sequences")
    prompt = jnp.atleast_2d(given.astype(jnp.int32))
    fits = prompt.shape[1] <= shape[1] and prompt.shape[0] in (1, shape[0])
    _require(fits, f"a prompt of shape {prompt.shape} does not fit sequences of shape {shape}")
    return x_1.at[:, : prompt.shape[1]].set(prompt)


def _times(num_steps: int, grid: str, loop_time: float | None = None) -> Float[Array, "T"]:
    """The grid of times from exactly 1 to exactly 0; it stands still at `loop_time` for a third of its steps.

    >>> [round(t, 2) for t in _times(6, "uniform", 0.1).tolist()]
    [1.0, 0.55, 0.1, 0.1, 0.1, 0.05, 0.0]
    """

    def spaced(n: int) -> list[float]:
        return [(n - i) / n if grid == "uniform" else math.cos(math.pi / 2 * i / n) for i in range(n + 1)]

    times = spaced(num_steps)
    if loop_time is not None:
        first, still, last = ((num_steps + k) // 3 for k in (1, 0, 2))  # they add up to num_steps
        before = [loop_time + (1 - loop_time) * t for t in spaced(max(first, 1))[:first]]
        times = before + [loop_time] * still + [loop_time * t for t in spaced(last)]
    return jnp.array([1.0, *times[1:-1], 0.0], jnp.float32)


def limited(logits: Float[Array, "B L V"], temperature: float, top_k: int, top_p: float) -> Float[Array, "B L V"]:
    """Logits of the distribution that tokens are drawn from: sharpened, then cut to the k best, then to the nucleus.

    Source of the nucleus: arXiv:1904.09751, section 3.1.

    >>> jax.nn.softmax(limited(jnp.log(jnp.array([[[0.2, 0.5, 0.3]]])), 1.0, 0, 0.6))[0, 0].tolist()  # 0.5 < 0.6
    [0.0, 0.625, 0.375]
    """
    _require(temperature >= 0, f"temperature must not be negative, not {temperature}")
    _require(top_k >= 0, f"top_k must not be negative, not {top_k}: choose 0 for all tokens")
    _require(0 < top_p <= 1, f"top_p must be above 0 and at most 1, not {top_p}: choose 1 for all tokens")
    if temperature == 0:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    if top_k == 0 and top_p == 1:
        return logits
    order = jnp.argsort(-logits, axis=-1)
    falling = jnp.take_along_axis(logits, order, axis=-1)
    if top_k > 0:
        falling = jnp.where(jnp.arange(logits.shape[-1]) < top_k, falling, -jnp.inf)
    if top_p < 1:
        p = jax.nn.softmax(falling, axis=-1)
        falling = jnp.where(jnp.cumsum(p, axis=-1) - p < top_p, falling, -jnp.inf)
    return jnp.put_along_axis(logits, order, falling, axis=-1, inplace=False)


def _categorical(
    key: Key[Array, ""], step: Int[Array, "B"] | Int[Array, ""], logits: Float[Array, "B L V"]
) -> Int[Array, "B L"]:
    """Draw by Gumbel-max, with noise of each row and its step, so that rows need not be at the same step.

    The noise is of high precision: that of one 32-bit number stops at 16, which starves rare tokens and acts as a
    lower temperature (arXiv:2409.02908, on inaccurate categorical sampling).
    """
    rows = jnp.arange(len(logits))
    keys = jax.vmap(partial(jax.random.fold_in, key))(step * len(rows) + rows)
    return jax.vmap(partial(jax.random.categorical, mode="high"))(keys, logits).astype(jnp.int32)


class _Walk(NamedTuple):
    """What the samplers share: the start, the grid, the model, the distribution to draw from, randomness."""

    start: Int[Array, "B L"]
    times: Float[Array, "T"]
    rates: Float[Array, "T"]
    mask_id: int
    predict: Denoise
    limit: Callable[[Float[Array, "B L V"]], Float[Array, "B L V"]]
    key: Key[Array, ""]

    def tokens(self, logits: Float[Array, "B L V"], step: Int[Array, "B"] | Int[Array, ""]) -> Int[Array, "B L"]:
        return _categorical(self.key, step, self.limit(logits))

    def everywhere(self, value: Float[Array, ""]) -> Float[Array, "B"]:
        return jnp.full(len(self.start), value)


def _unmask_in_order(walk: _Walk, key: Key[Array, ""], schedule: Schedule, sampler: str) -> Int[Array, "B L"]:
    """Unmask each position in a step drawn for it beforehand, with a token drawn in that step.

    A position with u ~ U(0, 1] unmasks in step i where m_{i+1} < u <= m_i, m being the mask rate. A position that is
    masked at t = t_i thus unmasks by s = t_{i+1} with probability (m_t - m_s) / m_t = (alpha_s - alpha_t) / (1 -
    alpha_t): the law of coins flipped in each step (MDLM, arXiv:2406.07524, equation 7). `ancestral_skip` leaves out
    a row's steps in which none of its positions unmasks. `first_hitting` is the same for a grid without end, where
    each has a step of its own at the time with m(t) = u (arXiv:2409.02908, section 4).
    """
    masked = walk.start == walk.mask_id
    u = 1.0 - jax.random.uniform(key, masked.shape)
    if sampler == "first_hitting":
        u = jnp.where(masked, u, 0.0)
        step = jnp.argsort(jnp.argsort(-u, axis=1), axis=1)
        times = schedule.time_of(-jnp.sort(-u, axis=1))
    else:
        step = len(walk.rates) - 1 - jnp.searchsorted(walk.rates[::-1], u, side="left")
        times = jnp.broadcast_to(walk.times[:-1], (len(u), len(walk.times) - 1))
    n, skip = times.shape[1], sampler != "ancestral"

    def more(state: tuple[Int[Array, ""], Int[Array, "B L"]]) -> Bool[Array, ""]:
        return (state[1] == walk.mask_id).any() if skip else state[0] < n

    def body(state: tuple[Int[Array, ""], Int[Array, "B L"]]) -> tuple[Int[Array, ""], Int[Array, "B L"]]:
        i, x_t = state
        masked = x_t == walk.mask_id
        now = jnp.where(masked, step, n).min(axis=1) if skip else jnp.full(len(x_t), i)
        t = jnp.take_along_axis(times, jnp.minimum(now, n - 1)[:, None], axis=1)[:, 0]
        tokens = walk.tokens(walk.predict(x_t, t), now)
        return i + 1, jnp.where(masked & (step == now[:, None]), tokens, x_t)

    return jax.lax.while_loop(more, body, (jnp.int32(0), walk.start))[1]


def _unmask_by_score(walk: _Walk, schedule: Schedule, sampler: str, entropy_bound: float) -> Int[Array, "B L"]:
    """Draw a token for each masked position, keep those with the best score, mask the others again.

    The score is, of the model's distribution at temperature 1, the probability of the drawn token (`confidence`:
    MaskGIT, arXiv:2202.04200, section 3.2; LLaDA, arXiv:2502.09992, appendix), the lead of the best token
    (`margin`: arXiv:2502.06768), or minus the entropy H (`entropy`: EB-sampler, arXiv:2505.24857). The first two
    leave round(N m_{i+1}) of a row's N masks after step i. `entropy` keeps as many positions, from the least H on,
    as have sum(H) - max(H) <= entropy_bound, which bounds how dependent they are; it tells the model the time at
    which as much is masked, and unmasks all that is left in its last step.
    """
    total = (walk.start == walk.mask_id).sum(axis=1)

    def body(state: tuple[Int[Array, ""], Int[Array, "B L"]]) -> tuple[Int[Array, ""], Int[Array, "B L"]]:
        i, x_t = state
        masked = x_t == walk.mask_id
        left = masked.sum(axis=1)
        by_time = sampler != "entropy"
        t = walk.everywhere(walk.times[i]) if by_time else schedule.time_of(left / jnp.maximum(total, 1))
        logits = walk.predict(x_t, t)
        tokens = walk.tokens(logits, i)
        log_p = jax.nn.log_softmax(logits, axis=-1)
        if sampler == "confidence":
            score = jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
        elif sampler == "margin":
            best = jax.lax.top_k(jnp.exp(log_p), 2)[0]
            score = best[..., 0] - best[..., 1]
        else:
            score = (jnp.exp(log_p) * jnp.maximum(log_p, -1e30)).sum(axis=-1)
        score = jnp.where(masked, score, -jnp.inf)
        if by_time:
            count = left - jnp.round(total * walk.rates[i + 1]).astype(jnp.int32)
        else:
            entropies = jnp.sort(-score, axis=1)  # infinite where nothing is masked
            others = jnp.cumsum(jnp.pad(entropies[:, :-1], ((0, 0), (1, 0))), axis=1)
            count = jnp.where(i == len(walk.rates) - 2, left, (others <= entropy_bound).sum(axis=1))
        rank = jnp.argsort(jnp.argsort(-score, axis=1), axis=1)
        return i + 1, jnp.where(masked & (rank < count[:, None]), tokens, x_t)

    more = lambda state: (state[1] == walk.mask_id).any()  # noqa: E731
    return jax.lax.while_loop(more, body, (jnp.int32(0), walk.start))[1]


def remask_probability(
    sampler: str,
    remask: float,
    rates: tuple[Float[Array, ""], Float[Array, ""]],
    psi: Float[Array, "B L"],
    tokens: Bool[Array, "B L"],
) -> Float[Array, "B L"]:
    """ReMDM's sigma: the probability that a token is masked again from t to s, given the mask rates at both.

    With sigma_max = min(1, (1 - alpha_s) / alpha_t), above which more than 1 - alpha_s would be masked at s:

        remdm_cap, remdm_loop   min(remask, sigma_max)
        remdm_rescale           remask sigma_max
        remdm_conf              sigma_max softmax(-psi) over `tokens`, psi their probabilities when they were drawn

    Source: arXiv:2503.00307, section 4.

    >>> rates, psi = (jnp.float32(0.5), jnp.float32(0.25)), jnp.array([[0.3, 0.3]])
    >>> remask_probability("remdm_conf", 0.0, rates, psi, psi > 0).tolist()
    [[0.25, 0.25]]
    """
    m_t, m_s = rates
    limit = jnp.where(m_s > 0, jnp.minimum(1.0, m_s / jnp.maximum(1 - m_t, TINY)), 0.0)
    if sampler == "remdm_conf":
        weight = jnp.where(tokens, jnp.exp(-psi), 0.0)
        return limit * weight / jnp.maximum(weight.sum(axis=1, keepdims=True), TINY)
    return jnp.full(psi.shape, remask * limit if sampler == "remdm_rescale" else jnp.minimum(remask, limit))


def _remask(walk: _Walk, key: Key[Array, ""], sampler: str, remask: float) -> Int[Array, "B L"]:
    """ReMDM: ancestral sampling that masks tokens again, to draw them anew when more is known.

    From t to s, a token is masked again with probability sigma, and a mask becomes a token with probability
    (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), which keeps the share of masks at 1 - alpha_s. `remdm_conf` has
    sigma = 0 at masks, as in the paper, and so keeps about sigma_max more masks per row. `remdm_loop` masks again in
    the middle third of its steps alone, where time stands still. Source: arXiv:2503.00307, equation 6, section 4.
    """
    given = walk.start != walk.mask_id

    def body(
        i: Int[Array, ""], state: tuple[Int[Array, "B L"], Float[Array, "B L"]]
    ) -> tuple[Int[Array, "B L"], Float[Array, "B L"]]:
        x_t, psi = state
        masked = x_t == walk.mask_id
        m_t, m_s = walk.rates[i], walk.rates[i + 1]
        sigma = remask_probability(sampler, remask, (m_t, m_s), psi, ~masked & ~given)
        if sampler == "remdm_loop":
            sigma = jnp.where(walk.times[i] == walk.times[i + 1], sigma, 0.0)
        stays = jnp.where(m_t > 0, (m_s - sigma * (1 - m_t)) / jnp.maximum(m_t, TINY), 0.0)
        to_mask = jax.random.uniform(jax.random.fold_in(key, i), x_t.shape) < jnp.where(masked, stays, sigma)
        logits = walk.predict(x_t, walk.everywhere(walk.times[i]))
        tokens = walk.tokens(logits, i)
        p = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), tokens[..., None], axis=-1)[..., 0]
        x_s = jnp.where(to_mask, walk.mask_id, jnp.where(masked, tokens, x_t))
        return jnp.where(given, x_t, x_s), jnp.where(masked, p, psi)

    return jax.lax.fori_loop(0, len(walk.rates) - 1, body, (walk.start, jnp.zeros(given.shape)))[0]


def _denoise_mixed(walk: _Walk, key: Key[Array, ""], uniform_share: float) -> Int[Array, "B L"]:
    """Ancestral sampling of the uniform process and of those between it and masking; see `diffusion.shares`.

    With z the token at t, p the model's distribution, N = mask_id, and, for j the mask or a token at s,

        q_s(j) = kept_s p_j + masked_s [j = mask] + uniform_s / N [j != mask],
        p(x_s = j | x_t) ~ q_s(j) q(z | x_s = j),    q(z | x_s = j) = a [j = z] + n_z,    a = kept_t / kept_s,
        n_mask = masked_t - a masked_s,    n_token = (uniform_t - a uniform_s) / N.

    q(z | j) is what z itself tells, so that p has to be the law of the token given all *other* positions; the bound
    has its optimum there. At s = 0, no mask is left. The prompt is set back in each step, the usual approximation.
    Sources: D3PM, arXiv:2107.03006, equations 3 and 4; UDLM, arXiv:2412.10193, section 3; GIDD, arXiv:2503.04482.
    """
    given = walk.start != walk.mask_id
    prior = walk.start
    if uniform_share == 1:
        prior = jnp.where(given, prior, jax.random.randint(key, given.shape, 0, walk.mask_id, jnp.int32))

    def body(i: Int[Array, ""], x_t: Int[Array, "B L"]) -> Int[Array, "B L"]:
        t, s = shares(walk.rates[i], uniform_share), shares(walk.rates[i + 1], uniform_share)
        logits = walk.limit(walk.predict(x_t, walk.everywhere(walk.times[i])))
        q_s = s.kept * jax.nn.softmax(logits, axis=-1)[..., : walk.mask_id] + s.uniform / walk.mask_id
        q_s = jnp.concatenate([q_s, jnp.full((*x_t.shape, 1), s.masked)], axis=-1)
        a = t.kept / jnp.maximum(s.kept, TINY)
        noise = jnp.where(x_t == walk.mask_id, t.masked - a * s.masked, (t.uniform - a * s.uniform) / walk.mask_id)
        # Rounding must not make noise negative; a little of it leaves something to draw where rates underflow.
        back = jnp.maximum(noise, TINY)[..., None] + a * jax.nn.one_hot(x_t, walk.mask_id + 1)
        return jnp.where(given, x_t, _categorical(walk.key, i, jnp.log(q_s) + jnp.log(back)))

    return jax.lax.fori_loop(0, len(walk.rates) - 1, body, prior)


class Decoder(NamedTuple):
    """Cached decoding with a network in which a block of tokens sees itself and what comes before it.

    Attributes:
        init: Number of rows -> an empty cache, a pytree.
        extend: A cache and n clean tokens, a multiple of the block size -> logits at their positions, and the cache
            with them in it.
        denoise: A cache, the noisy block that follows, and its time -> logits of the block.
    """

    init: Callable[[int], Any]
    extend: Callable[[Any, Int[Array, "B n"]], tuple[Float[Array, "B n V"], Any]]
    denoise: Callable[[Any, Int[Array, "B b"], Float[Array, "B"]], Float[Array, "B b V"]]


def sample_blocks(
    decoder: Decoder,
    key: Key[Array, ""],
    *,
    shape: tuple[int, int],
    block_size: int,
    mask_id: int,
    schedule: Schedule,
    num_steps: int,
    prompt: Prompt = None,
    **options: Any,
) -> Int[Array, "B L"]:
    """Draw sequences block by block, each by `sample` given the ones before; a block without masks costs no steps.

    Args:
        decoder: The network.
        key: Randomness.
        shape: (B, L) of the result, L a multiple of the block size.
        block_size: Tokens per block.
        mask_id: The id of a masked token.
        schedule: The noise schedule.
        num_steps: Steps per block.
        prompt: As for `sample`; what its blocks have masked is filled in without sight of later blocks.
        options: Those of `sample`, but for `guidance`: the cache has seen the prompt.

    Raises:
        ValueError: As `sample`, and for a length that is no multiple of the block size.

    Source: BD3-LM, arXiv:2503.09573, section 3.

    >>> from nanodlm.schedules import make_schedule
    >>> count = Decoder(lambda rows: 0, lambda n, x: (jnp.zeros((*x.shape, 9)), n + 1),
    ...                 lambda n, x, t: 50 * jax.nn.one_hot(jnp.full(x.shape, n), 9))
    >>> sample_blocks(count, jax.random.key(0), shape=(1, 6), block_size=2, mask_id=8,
    ...               schedule=make_schedule("linear"), num_steps=1, prompt=jnp.array([7])).tolist()
    [[7, 0, 1, 1, 2, 2]]
    """
    _require(not options.get("guidance"), "the cache of earlier blocks has seen the prompt: choose guidance 0")
    whole = block_size >= 1 and shape[1] % block_size == 0
    _require(whole, f"the length {shape[1]} is no multiple of the block size {block_size}: choose one that divides it")
    n_blocks = shape[1] // block_size
    options |= {"shape": (shape[0], block_size), "mask_id": mask_id, "schedule": schedule, "num_steps": num_steps}
    blocks = _start(prompt, shape, mask_id).reshape(shape[0], n_blocks, block_size).swapaxes(0, 1)

    def step(cache: Any, inputs: tuple[Int[Array, ""], Int[Array, "B b"]]) -> tuple[Any, Int[Array, "B b"]]:
        index, block = inputs
        options["prompt"] = block
        draw = partial(sample, partial(decoder.denoise, cache), jax.random.fold_in(key, index), **options)
        block = jax.lax.cond((block == mask_id).any(), draw, lambda: block)
        return decoder.extend(cache, block)[1], block

    _, blocks = jax.lax.scan(step, decoder.init(shape[0]), (jnp.arange(n_blocks), blocks))
    return blocks.swapaxes(0, 1).reshape(shape)


def sample_autoregressive(
    decoder: Decoder,
    key: Key[Array, ""],
    *,
    shape: tuple[int, int],
    mask_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    prompt: Prompt = None,
    document_end: int | None = None,
) -> Int[Array, "B L"]:
    """Draw sequences from left to right, one token per call of the network.

    The network reads `mask_id` as the begin token, then the tokens so far; its logits there are those of the next.
    Tokens of the prompt are kept, and what it has masked is drawn given what is left of it.

    Args:
        decoder: The network, with blocks of one token; `denoise` is not called.
        key: Randomness.
        shape: (B, L) of the result.
        mask_id: The begin token; it and larger ids are never drawn.
        temperature: As for `sample`.
        top_k: As for `sample`.
        top_p: As for `sample`.
        prompt: As for `sample`.
        document_end: A token behind which the network is given the begin token, as one that was trained on documents
            apart expects.

    Raises:
        ValueError: As `sample`.

    >>> after = Decoder(lambda rows: (), lambda c, x: (50 * jax.nn.one_hot((x + 1) % 9, 9), c), lambda c, x, t: x)
    >>> sample_autoregressive(after, jax.random.key(0), shape=(1, 5), mask_id=8, prompt=jnp.array([8, 8, 5])).tolist()
    [[0, 1, 5, 6, 7]]
    """

    def step(
        state: tuple[Any, Int[Array, "B"]], inputs: tuple[Int[Array, ""], Int[Array, "B"]]
    ) -> tuple[tuple[Any, Int[Array, "B"]], Int[Array, "B"]]:
        (cache, before), (i, given) = state, inputs
        logits, cache = decoder.extend(cache, before[:, None])
        logits = limited(predictable(logits, mask_id=mask_id), temperature, top_k, top_p)
        token = jnp.where(given == mask_id, _categorical(key, i, logits)[:, 0], given)
        return (cache, token if document_end is None else jnp.where(token == document_end, mask_id, token)), token

    begin = (decoder.init(shape[0]), jnp.full(shape[0], mask_id, jnp.int32))
    return jax.lax.scan(step, begin, (jnp.arange(shape[1]), _start(prompt, shape, mask_id).T))[1].T
