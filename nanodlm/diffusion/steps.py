"""The steps of the samplers: how masks become tokens as time runs from 1 to 0."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from nanodlm.diffusion.checks import Rows, check_logits, require, require_whole
from nanodlm.diffusion.cross_entropy import predictable
from nanodlm.diffusion.kinds import SAMPLERS, ByScore, InOrder, Remasking
from nanodlm.diffusion.mixed import shares
from nanodlm.diffusion.noise import TINY, Denoise, Tokens, rank, remask_probability
from nanodlm.diffusion.schedules import Schedule
from nanodlm.diffusion.tokens import Scores, _categorical, _start, limited, probability
from nanodlm.diffusion.walks import State, Walk, any_sound, end_rows, start_of

Step = Int[Array, "..."]
Psi = Float[Array, "B L"]  # the confidence of each token
_Drawn = tuple[Tokens, Psi, Psi]  # x_t and psi with what was drawn, and how sure the model is there
_Move = Callable[[Step, Tokens, Psi], tuple[_Drawn, Tokens]]  # of step, x_t and psi, to what was drawn, and x_s
PARTS = 8  # in which tokens are drawn


class _Shared(NamedTuple):
    """Hold what the samplers share: the start, the grid of times, the model, the distribution to draw from, a key."""

    start: Tokens
    times: Float[Array, "T"]
    rates: Float[Array, "T"]
    mask_id: int
    read: Callable[[Tokens, Float[Array, "B"]], Any]  # x_t and t, to what `score` makes logits of at any places
    score: Callable[..., Scores]
    limit: Callable[[Scores, Int[Array, "N"]], Scores]  # and tokens of x_t, to the logits to draw from
    key: Key[Array, ""]
    sure: Callable[[Scores, Float[Array, "N"]], Float[Array, "N"]] = lambda logits, of_token: of_token

    def draw(self, x_t: Tokens, psi: Psi, t: Float[Array, "..."], step: Step, asked: Bool[Array, "B L"]) -> _Drawn:
        """Draw tokens where asked, a part of all places at a time: others have neither logits nor noise."""
        size, t = -(-x_t.size // PARTS), jnp.broadcast_to(t, len(x_t))
        places = jnp.flatnonzero(asked, size=size * PARTS, fill_value=x_t.size)
        steps = jnp.broadcast_to(step.reshape(-1, 1), x_t.shape)
        read = self.read(x_t, t)
        broken = ~jnp.isfinite(sum(of.max(axis=-1) for of in read)) & (asked | (x_t == self.mask_id))
        flat = jax.tree.map(lambda of: of.reshape(x_t.size, -1), (read, steps, x_t))

        def part(i: Int[Array, ""], drawn: tuple[Array, ...]) -> tuple[Array, ...]:
            place = jax.lax.dynamic_slice_in_dim(places, i * size, size)
            features, step, x = jax.tree.map(lambda of: jnp.take(of, place, axis=0, mode="clip"), flat)
            logits = self.score(*features)
            tokens = _categorical(self.key, step[:, 0], place, self.limit(logits, x[:, 0]))
            of_token = probability(logits, tokens)
            made = tokens, of_token, self.sure(logits, of_token)
            return tuple(old.at[place].set(new, mode="drop") for old, new in zip(drawn, made, strict=True))

        drawn = jax.lax.fori_loop(0, -(-asked.sum() // size), part, (x_t.ravel(), psi.ravel(), jnp.zeros(x_t.size)))
        tokens, *sure = (of.reshape(x_t.shape) for of in drawn)
        return jnp.where(broken, -1, tokens), *sure  # without waiting for a place of theirs to be asked for


def reverse_rows(
    denoise: Denoise,
    key: Key[Array, ""],
    *,
    shape: tuple[int, int],
    mask_id: int,
    schedule: Schedule,
    num_steps: int,
    prompt: Rows | None = None,
    sampler: str = "ancestral",
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    grid: str = "uniform",
    guidance: float = 0.0,
    uniform_share: float = 0.0,
    entropy_bound: float = 0.1,
    threshold: float = 0.9,
    remask: float = 0.02,
    loop_time: float = 0.1,
) -> Walk:
    """Return the walk that draws whole rows at a time, as `sampling.sample` says."""
    require(sampler in SAMPLERS, f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    require(grid in ("uniform", "cosine"), f"unknown grid {grid!r}: choose uniform or cosine")
    require_whole("num_steps", num_steps)
    require(0 <= guidance < math.inf, f"guidance must not be negative, not {guidance}: choose 0 for none")
    for name, share in {"uniform_share": uniform_share, "threshold": threshold, "remask": remask}.items():
        require(0 <= share <= 1, f"{name} must be between 0 and 1, not {share}")
    require(sampler == "ancestral" or uniform_share == 0, f"{sampler} is for masks alone: choose ancestral")
    require(guidance == 0 or uniform_share < 1, "uniform noise has no mask to hide a prompt with: choose guidance 0")
    require(entropy_bound >= 0, f"entropy_bound must not be negative, not {entropy_bound}")
    require(0 < loop_time < 1, f"loop_time must be above 0 and below 1, not {loop_time}")
    start = _start(prompt, shape, mask_id)
    guidance = guidance if prompt is not None and jnp.asarray(prompt).size > 0 else 0.0
    start_key, token_key = jax.random.split(key)
    times = _times(num_steps, grid, loop_time if sampler == "remdm_loop" else None)
    rates = schedule.mask_rate(times).at[0].set(1.0).at[-1].set(0.0)  # whatever the schedule does at its ends
    limit = lambda logits, _: limited(logits, temperature, top_k, top_p)  # noqa: E731
    shared = _Shared(start, times, rates, mask_id, *_reading(denoise, start, mask_id, guidance), limit, token_key)
    x_1, steps = start, shape[1] if sampler == "first_hitting" else num_steps
    if uniform_share > 0:
        move = _denoise_mixed(shared, uniform_share)
        random = jax.random.randint(start_key, shape, 0, mask_id, jnp.int32)
        x_1 = jnp.where(start == mask_id, random, start) if uniform_share == 1 else start
    elif sampler in get_args(InOrder):
        move = _unmask_in_order(shared, start_key, schedule, sampler)
    elif sampler in get_args(ByScore):
        move = _unmask_by_score(shared, schedule, sampler, entropy_bound, threshold)
    else:
        move = _remask(shared, start_key, sampler, remask)
    whole = sampler in ("ancestral", *get_args(Remasking))  # whether it takes all of its steps
    return _walk(start, mask_id, move, jnp.int32(steps), x_1, uniform_share > 0, whole, 1 + (guidance > 0))


def _reading(denoise: Any, start: Tokens, mask_id: int, guidance: float) -> tuple[Callable, Callable]:
    """Return what reads x_t at t, and what makes logits of any of its places, beside those without the prompt."""
    apart = hasattr(denoise, "features") and hasattr(denoise, "score")  # which makes logits of a place's features

    def read(x_t: Tokens, t: Float[Array, "B"]) -> list[Array]:
        rows = [x_t, jnp.where(start != mask_id, mask_id, x_t)][: 1 + (guidance > 0)]
        read = [denoise.features(x, t) if apart else check_logits(denoise(x, t), x) for x in rows]
        return read if apart else [predictable(of, mask_id=mask_id) for of in read]

    def score(*read: Array) -> Scores:
        logits = [predictable(denoise.score(of), mask_id=mask_id) if apart else of for of in read]
        guide = (1 + guidance) * logits[0] - guidance * logits[-1]
        return jnp.where(logits[0] == -jnp.inf, -jnp.inf, guide) if guidance else logits[0]

    return read, score


def _walk(
    start: Tokens, mask_id: int, move: _Move, steps: Step, x_1: Tokens, redraws: bool, whole: bool, calls: int
) -> Walk:
    given = start != mask_id

    def more(state: State) -> Bool[Array, ""]:
        left = (state.step < steps) & (whole | (state.tokens == mask_id).any())
        return ~given.all() & any_sound(state.tokens) & left

    def body(state: State) -> State:
        """Take a step, in which a row ends where nothing can be drawn from its logits."""
        x_t = state.tokens
        (tokens, confidence, _), x_s = move(state.step, x_t, state.confidence)
        bad = ((tokens < 0) | (x_t < 0)).any(axis=1, keepdims=True)
        x_s = jnp.where(given, x_t, jnp.where(bad, jnp.where(redraws | (x_t == mask_id), -1, x_t), x_s))
        confidence = jnp.where(x_s == mask_id, 0.0, confidence)
        return State(state.step + 1, x_s, confidence, state.calls + calls)

    return Walk(start_of(end_rows(x_1, mask_id), given), more, body)


def _times(num_steps: int, grid: str, loop_time: float | None = None) -> Float[Array, "T"]:
    """Return the grid of times from exactly 1 to exactly 0; it stands still at `loop_time` for a third of its steps.

    >>> [round(t, 2) for t in _times(6, "uniform", 0.1).tolist()]
    [1.0, 0.55, 0.1, 0.1, 0.1, 0.05, 0.0]
    """
    at = lambda i, n: (n - i) / n if grid == "uniform" else math.cos(math.pi / 2 * i / n)  # noqa: E731
    spaced = lambda n: [at(i, n) for i in range(n + 1)]  # noqa: E731
    times = spaced(num_steps)
    if loop_time is not None:
        first, still, last = ((num_steps + k) // 3 for k in (1, 0, 2))  # they add up to num_steps
        before = [loop_time + (1 - loop_time) * t for t in spaced(max(first, 1))[:first]]
        times = before + [loop_time] * still + [loop_time * t for t in spaced(last)]
    return jnp.array([1.0, *times[1:-1], 0.0], jnp.float32)


def _unmask_in_order(shared: _Shared, key: Key[Array, ""], schedule: Schedule, sampler: str) -> _Move:
    """Unmask each position in a step drawn for it beforehand, with a token drawn in that step.

    A position with u ~ U(0, 1] unmasks in step i where m_{i+1} < u <= m_i, m being the mask rate. A position that is
    masked at t = t_i thus unmasks by s = t_{i+1} with probability (m_t - m_s) / m_t = (alpha_s - alpha_t) / (1 -
    alpha_t): the law of coins flipped in each step (MDLM, arXiv:2406.07524, equation 7). `ancestral_skip` leaves out
    a row's steps in which none of its positions unmasks. `first_hitting` is the same for a grid without end, where
    each has a step of its own at the time with m(t) = u (arXiv:2409.02908, section 4). `spread` draws the u of one
    position, and goes on by the golden ratio (of 2^32): each u has the same law, but two in an interval of length w are
    more than 0.38 / w masks apart, and so hardly dependent (as by Halton's sequence, arXiv:2503.17076, section 4).
    """
    masked = shared.start == shared.mask_id
    u = 1.0 - jax.random.uniform(key, masked.shape)
    if sampler == "spread":
        u = 1.0 - (u[:, :1] + jnp.cumsum(masked, axis=1, dtype=jnp.uint32) * jnp.uint32(2654435769) / 2.0**32) % 1.0
    if sampler == "first_hitting":
        u = jnp.where(masked, u, 0.0)
        step = rank(-u)
        times = schedule.time_of(-jnp.sort(-u, axis=1))
    else:
        step = len(shared.rates) - 1 - jnp.searchsorted(shared.rates[::-1], u, side="left")
        times = jnp.broadcast_to(shared.times[:-1], (len(u), len(shared.times) - 1))
    n, skip = times.shape[1], sampler != "ancestral"

    def move(i: Step, x_t: Tokens, psi: Psi) -> tuple[_Drawn, Tokens]:
        masked = x_t == shared.mask_id
        now = jnp.where(masked, step, n).min(axis=1) if skip else jnp.full(len(x_t), i)
        t = jnp.take_along_axis(times, jnp.minimum(now, n - 1)[:, None], axis=1)[:, 0]
        drawn = shared.draw(x_t, psi, t, now, masked & (step == now[:, None]))
        return drawn, drawn[0]

    return move


def _unmask_by_score(shared: _Shared, schedule: Schedule, sampler: str, bound: float, threshold: float) -> _Move:
    """Draw a token for each masked position, keep those with the best score, mask the others again.

    The score is, of the model's distribution at temperature 1, the probability of the drawn token (`confidence`:
    MaskGIT, arXiv:2202.04200, section 3.2; LLaDA, arXiv:2502.09992, appendix), the lead of the best token (`margin`:
    arXiv:2502.06768), or minus the entropy H (`entropy`: EB-sampler, arXiv:2505.24857). The first two leave round(N
    m_{i+1}) of a row's N masks after step i. `entropy` keeps as many positions, from the least H on, as have sum(H) -
    max(H) <= bound, which bounds how dependent they are. `threshold` scores as `confidence` does, and keeps what is
    above the threshold, the best at least (Fast-dLLM, arXiv:2505.22618, section 3.3). These two tell the model the time
    at which as much is masked, and unmask what is left in their last step.
    """
    total = (shared.start == shared.mask_id).sum(axis=1)

    def sure(logits: Scores, of_token: Float[Array, "N"]) -> Float[Array, "N"]:
        p = jax.nn.softmax(logits, axis=-1)
        if sampler == "entropy":
            return -jax.scipy.special.entr(p).sum(axis=-1)
        best = p.argmax(axis=-1, keepdims=True)  # without sorting all
        others = jnp.where(jnp.arange(p.shape[-1]) == best, 0, p)
        return p.max(axis=-1) - others.max(axis=-1) if sampler == "margin" else of_token

    def move(i: Step, x_t: Tokens, psi: Psi) -> tuple[_Drawn, Tokens]:
        masked = x_t == shared.mask_id
        left, by_time = masked.sum(axis=1), sampler in ("confidence", "margin")
        t = shared.times[i] if by_time else schedule.time_of(left / jnp.maximum(total, 1))
        drawn = shared._replace(sure=sure).draw(x_t, psi, t, i, masked)
        score = jnp.where(masked, jnp.nan_to_num(drawn[2], nan=0.0), -jnp.inf)
        if by_time:
            count = left - jnp.round(total * shared.rates[i + 1]).astype(jnp.int32)
        elif sampler == "threshold":
            count = jnp.maximum(1, (score > threshold).sum(axis=1))
        else:
            entropies = jnp.sort(-score, axis=1)  # infinite where nothing is masked
            others = jnp.cumsum(jnp.pad(entropies[:, :-1], ((0, 0), (1, 0))), axis=1)
            count = (others <= bound).sum(axis=1)
        count = jnp.where(i == len(shared.rates) - 2, left, count)
        return drawn, jnp.where(rank(-score) < count[:, None], drawn[0], x_t)

    return move


def _remask(shared: _Shared, key: Key[Array, ""], sampler: str, remask: float) -> _Move:
    """Sample as ReMDM does: tokens are masked again on the way, to draw them anew when more is known.

    From t to s, a token is masked again with probability sigma, and a mask becomes a token with probability
    (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), which keeps the share of masks at 1 - alpha_s. `remdm_conf` has
    sigma = 0 at masks, as in the paper, and so keeps about sigma_max more masks per row. `remdm_loop` masks again in
    the middle third of its steps alone, where time stands still. Source: arXiv:2503.00307, equation 6, section 4.
    """
    given = shared.start != shared.mask_id

    def move(i: Step, x_t: Tokens, psi: Psi) -> tuple[_Drawn, Tokens]:
        masked = x_t == shared.mask_id
        m_t, m_s = shared.rates[i], shared.rates[i + 1]
        sigma = remask_probability(sampler, remask, (m_t, m_s), psi, ~masked & ~given)
        if sampler == "remdm_loop":
            sigma = jnp.where(shared.times[i] == shared.times[i + 1], sigma, 0.0)
        stays = jnp.where(m_t > 0, (m_s - sigma * (1 - m_t)) / jnp.maximum(m_t, TINY), 0.0)
        to_mask = jax.random.uniform(jax.random.fold_in(key, i), x_t.shape) < jnp.where(masked, stays, sigma)
        drawn = shared.draw(x_t, psi, shared.times[i], i, masked & ~to_mask)
        return drawn, jnp.where(to_mask, shared.mask_id, drawn[0])

    return move


def _denoise_mixed(shared: _Shared, uniform_share: float) -> _Move:
    """Take the reverse steps of the uniform process, or of one between it and masking; see `mixed.shares`.

    With z the token at t, p the model's distribution, N = mask_id, and, for j the mask or a token at s,

        q_s(j) = kept_s p_j + masked_s [j = mask] + uniform_s / N [j != mask],
        p(x_s = j | x_t) ~ q_s(j) q(z | x_s = j),    q(z | x_s = j) = a [j = z] + n_z,    a = kept_t / kept_s,
        n_mask = masked_t - a masked_s,    n_token = (uniform_t - a uniform_s) / N.

    q(z | j) is what z itself tells, so that p has to be the law of the token given all *other* positions; the bound
    has its optimum there. At s = 0, no mask is left. The prompt is set back in each step, the usual approximation.
    Sources: D3PM, arXiv:2107.03006, equations 3 and 4; UDLM, arXiv:2412.10193, section 3; GIDD, arXiv:2503.04482.
    """

    def move(i: Step, x_t: Tokens, psi: Psi) -> tuple[_Drawn, Tokens]:
        t, s = shares(shared.rates[i], uniform_share), shares(shared.rates[i + 1], uniform_share)
        a = t.kept / jnp.maximum(s.kept, TINY)

        def law(logits: Scores, z: Int[Array, "N"]) -> Float[Array, "N J"]:
            p = jax.nn.softmax(shared.limit(logits, z), axis=-1)[:, : shared.mask_id]
            q_s = jnp.pad(s.kept * p + s.uniform / shared.mask_id, ((0, 0), (0, 1)), constant_values=s.masked)
            noise = t.masked - a * s.masked, (t.uniform - a * s.uniform) / shared.mask_id
            noise = jnp.where(z == shared.mask_id, *noise)
            # Rounding must not make noise negative; a little of it leaves something to draw where rates underflow.
            back = jnp.maximum(noise, TINY)[:, None] + a * jax.nn.one_hot(z, shared.mask_id + 1)
            return jnp.log(q_s) + jnp.log(back)

        drawn = shared._replace(limit=law).draw(x_t, psi, shared.times[i], i, shared.start == shared.mask_id)
        return drawn, drawn[0]

    return move
