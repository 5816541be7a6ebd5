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
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from nanodlm.diffusion.cross_entropy import predictable
from nanodlm.diffusion.kinds import SAMPLERS, ByScore, InOrder
from nanodlm.diffusion.noise import Denoise, Logits, Tokens
from nanodlm.diffusion.schedules import Schedule
from nanodlm.diffusion.steps import _denoise_mixed, _remask, _unmask_by_score, _unmask_in_order, _Walk
from nanodlm.diffusion.tokens import Prompt, _require, _start, limited


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
) -> Tokens:
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
        sampler: One of `kinds.SAMPLERS`; see the module's table.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Draw from the k most likely tokens only; 0 is off.
        top_p: Then from the smallest set of tokens with at least this probability; 1 is off.
        prompt: Token ids placed at the front of each row; `mask_id` in it marks positions to fill in, so a
            prompt as long as the row is an infilling pattern.
        grid: Times at which the schedule is read: `uniform`, t_i = 1 - i/n, or `cosine`, t_i = cos(pi/2 i/n), whose
            steps are shorter while little is known (MD4, arXiv:2406.04329; MaskGIT, arXiv:2202.04200).
        guidance: w in logits = (1 + w) cond - w uncond, where uncond is what the model predicts with the prompt's
            tokens masked (LLaDA, arXiv:2502.09992, appendix; arXiv:2410.18514). 0 makes no second call.
        uniform_share: That of the process the model was trained on (`mixed.shares`). Above 0, `ancestral` takes
            the reverse steps of that process; see `_denoise_mixed`.
        entropy_bound: For `entropy`, in nats: how dependent tokens that appear together may be.
        remask: For `remdm_cap`, `_rescale` and `_loop`: how often a token is masked again, in [0, 1].
        loop_time: For `remdm_loop`: where time stands still, in (0, 1).

    Returns:
        Token ids below `mask_id`, int32.

    Raises:
        ValueError: For an option that makes no sense, or a prompt that does not fit.

    >>> from nanodlm.diffusion.schedules import make_schedule
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

    def predict(x_t: Tokens, t: Float[Array, "B"]) -> Logits:
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
    if sampler in get_args(InOrder):
        return _unmask_in_order(walk, start_key, schedule, sampler)
    if sampler in get_args(ByScore):
        return _unmask_by_score(walk, schedule, sampler, entropy_bound)
    return _remask(walk, start_key, sampler, remask)


def _times(num_steps: int, grid: str, loop_time: float | None = None) -> Float[Array, "T"]:
    """Return the grid of times from exactly 1 to exactly 0; it stands still at `loop_time` for a third of its steps.

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
