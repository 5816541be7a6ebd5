"""The negative evidence lower bound (NELBO) of rows under any denoiser, as one function."""

from jaxtyping import Array, Float, Key

from nanodlm.diffusion.kinds import Estimator, KindName, Times
from nanodlm.diffusion.noise import Denoise, Tokens
from nanodlm.diffusion.objective import Objective
from nanodlm.diffusion.schedules import Schedule


def nelbo(
    denoise: Denoise,
    x_0: Tokens,
    key: Key[Array, ""],
    *,
    schedule: Schedule,
    mask_id: int,
    estimator: Estimator = "continuous",
    num_timesteps: int = 1000,
    objective: KindName = "absorbing",
    times: Times = "systematic",
    block_size: int = 1,
    uniform_share: float = 0.1,
    segment_ids: Tokens | None = None,
) -> Float[Array, "B"]:
    """Return one unbiased estimate per row of the bound on -log p(x_0), in nats per sequence.

    For `autoregressive` it is -log p(x_0) itself. `plain.plain_nelbo` is the idea in its plainest form.

    Args:
        denoise: Maps x_t (B, L) and t (B,) to logits (B, L, V), V > mask_id. For `block` it is called with t (B, K) and
            `context=x_0`, of which logits in a block may depend on earlier blocks only. For `autoregressive`, x_t is
            x_0 shifted right behind `mask_id` as begin token, and logits at i may depend on x_t up to i only.
        x_0: Token ids; those from `mask_id` on are padding, which is never scored.
        key: Randomness.
        schedule: The noise schedule.
        mask_id: The id of a masked token; it and larger ids are never predicted.
        estimator: `continuous`, `discrete`, `count` or `constant_count`; uniform and hybrid noise have first and third.
        num_timesteps: T of the discrete estimator.
        objective: `absorbing`, `uniform`, `hybrid`, `block` or `autoregressive`.
        times: `systematic`, `stratified` or `independent`.
        block_size: Tokens per block, of `block`.
        uniform_share: Share of uniform noise at m = 1/2, of `hybrid`.
        segment_ids: Which document of its row each position belongs to, passed on to `denoise`. It should read no
            other document, nor padding, which is best given a segment of its own. The bound is then that of a row of
            which the edges are known.

    Returns:
        Nats per sequence, (B,). Divide the mean by L for nats per token.

    Raises:
        ValueError: For an unknown name, or a combination that has no bound.

    >>> import jax, jax.numpy as jnp
    >>> from nanodlm.diffusion.schedules import make_schedule
    >>> uniform = lambda x_t, t: jnp.zeros((*x_t.shape, 3))
    >>> nats = nelbo(uniform, jnp.zeros((4, 8), int), jax.random.key(0), schedule=make_schedule("linear"),
    ...              mask_id=2, estimator="count")
    >>> [round(float(v), 3) for v in nats]  # 8 log 2
    [5.545, 5.545, 5.545, 5.545]
    """
    chosen = Objective(schedule, mask_id, objective, estimator, num_timesteps, times, block_size, uniform_share)
    noised = chosen.corrupt(x_0, key, segment_ids)
    return chosen.row_nats(chosen.logits(denoise, x_0, noised, segment_ids), x_0, noised).bound
