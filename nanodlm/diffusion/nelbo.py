"""The negative evidence lower bound (NELBO) of rows under any denoiser, as one function."""

from inspect import signature

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from nanodlm.diffusion.checks import Rows, Seed, random_key, require, token_ids
from nanodlm.diffusion.kinds import Estimator, KindName, Times
from nanodlm.diffusion.noise import Denoise, Tokens
from nanodlm.diffusion.objective import Objective, settle
from nanodlm.diffusion.schedules import Schedule


def nelbo(
    denoise: Denoise,
    x_0: Rows,
    key: Seed,
    *,
    schedule: Schedule | str | None = None,
    mask_id: int | None = None,
    estimator: Estimator = "continuous",
    num_timesteps: int = 1000,
    objective: KindName | None = None,
    times: Times = "systematic",
    block_size: int | None = None,
    uniform_share: float | None = None,
    segment_ids: Tokens | None = None,
) -> Float[Array, "B"]:
    """Return one unbiased estimate per row of the bound on -log p(x_0), in nats per sequence.

    For `autoregressive` it is -log p(x_0) itself. `plain.plain_nelbo` is the idea in its plainest form.

    Args:
        denoise: Maps x_t (B, L) and t (B,) to logits (B, L, V), V > mask_id. For `block` it is called with t (B, K) and
            `context=x_0`, of which logits in a block may depend on earlier blocks only. For `autoregressive`, x_t is
            x_0 shifted right behind `mask_id` as begin token, and logits at i may depend on x_t up to i only.
        x_0: Token ids (B, L); `mask_id`, and one id above it, are padding, which is never scored.
        key: Randomness, or a seed.
        schedule: The noise schedule or its name. A loaded network carries its own, and its own `mask_id`, `objective`,
            `block_size` and `uniform_share`; what is passed must not contradict them.
        mask_id: The id of a masked token, at least 1; it and larger ids are never predicted.
        estimator: `continuous`, `discrete`, `count` or `constant_count`; uniform and hybrid noise have first and third.
        num_timesteps: T of the discrete estimator.
        objective: `absorbing`, the default, `uniform`, `hybrid`, `block` or `autoregressive`.
        times: `systematic`, `stratified` or `independent`.
        block_size: Tokens per block, of `block`; by default 1.
        uniform_share: Share of uniform noise at m = 1/2, of `hybrid`; by default 0.1.
        segment_ids: Which document of its row each position belongs to, passed on to `denoise`. It should read no
            other document; the bound is then that of a row of which the edges are known. By default padding has a
            segment of its own, for a `denoise` that takes them.

    Returns:
        Nats per sequence, (B,). Divide the mean by L for nats per token.

    Raises:
        ValueError: For an unknown name, a combination that has no bound, ids below 0 (NaN for their rows where they
            are not known, as under `jax.jit`), or logits of another shape.

    >>> import jax, jax.numpy as jnp
    >>> from nanodlm.diffusion.schedules import make_schedule
    >>> uniform = lambda x_t, t: jnp.zeros((*x_t.shape, 3))
    >>> nats = nelbo(uniform, jnp.zeros((4, 8), int), jax.random.key(0), schedule=make_schedule("linear"),
    ...              mask_id=2, estimator="count")
    >>> [round(float(v), 3) for v in nats]  # 8 log 2
    [5.545, 5.545, 5.545, 5.545]
    """
    named = {"kind": objective, "mask_id": mask_id, "block_size": block_size, "uniform_share": uniform_share}
    known = settle(denoise, schedule=schedule, **named)
    x_0 = token_ids("x_0", x_0, known["mask_id"], padding=True)
    require(x_0.ndim == 2 and x_0.size > 0, f"x_0 must be rows of tokens, (B, L), at least one, not {x_0.shape}")
    given = {name: value for name, value in known.items() if value is not None}
    chosen = Objective(estimator=estimator, num_timesteps=num_timesteps, times=times, **given)
    takes = signature(denoise).parameters.get("segment_ids")
    if segment_ids is None and takes is not None and takes.default is None:  # else they are bound already
        padding = x_0 >= chosen.mask_id
        if isinstance(x_0, Tracer) or padding.any():
            segment_ids = padding.astype(jnp.int32)  # or attention would read it
    noised = chosen.corrupt(x_0, random_key(key), segment_ids)
    nats = chosen.row_nats(chosen.logits(denoise, x_0, noised, segment_ids), x_0, noised).bound
    return jnp.where((x_0 < 0).any(axis=1), jnp.nan, nats)
