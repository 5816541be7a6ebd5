"""Samplers: from an all-masked sequence to text, by unmasking tokens as time runs from 1 to 0."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from nanodlm.diffusion import predictable, unmask_probability
from nanodlm.losses import Denoise
from nanodlm.schedules import Schedule


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
    prompt: Int[Array, "B P"] | Int[Array, "P"] | None = None,
) -> Int[Array, "B L"]:
    """Draw sequences by ancestral sampling: a masked token unmasks from t to s with probability
    (alpha_s - alpha_t) / (1 - alpha_t), and then stays.

    Which positions unmask is drawn before what they become, so no decision depends on rounding of the
    token draw; the last step unmasks all that is left; tokens of the prompt are never touched.

    Args:
        denoise: Maps x_t (B, L) and t (B,) to logits (B, L, V).
        key: Randomness; the same key gives the same sequences.
        shape: (B, L) of the result.
        mask_id: The id of a masked token.
        schedule: The masking schedule, read on the grid t = 1, 1 - 1/num_steps, ...
        num_steps: Number of calls of `denoise`, at least 1.
        sampler: `ancestral`.
        temperature: Divides the logits; 0 takes the most likely token.
        prompt: Token ids placed at the front of each row; `mask_id` in it marks positions to fill in, so a
            prompt as long as the row is an infilling pattern.

    Returns:
        Token ids below `mask_id`, int32.

    Raises:
        ValueError: For an unknown sampler, a step count below 1, a negative temperature, or a prompt that
            does not fit.

    Source: MDLM, arXiv:2406.07524, equation 7; precision of the draw: arXiv:2409.02908, section 4.

    >>> from nanodlm.schedules import make_schedule
    >>> always_1 = lambda x_t, t: jax.nn.one_hot(jnp.ones_like(x_t), 3) * 50
    >>> sample(always_1, jax.random.key(0), shape=(1, 4), mask_id=2, schedule=make_schedule("linear"),
    ...        num_steps=2, prompt=jnp.array([0])).tolist()
    [[0, 1, 1, 1]]
    """
    if sampler != "ancestral":
        raise ValueError(f"unknown sampler {sampler!r}: choose ancestral")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, not {num_steps}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, not {temperature}")
    x_1 = jnp.full(shape, mask_id, jnp.int32)
    if prompt is not None:
        prompt = jnp.atleast_2d(jnp.asarray(prompt, jnp.int32))
        if prompt.shape[1] > shape[1] or prompt.shape[0] not in (1, shape[0]):
            raise ValueError(f"a prompt of shape {prompt.shape} does not fit sequences of shape {shape}")
        x_1 = x_1.at[:, : prompt.shape[1]].set(prompt)

    def step(i: Int[Array, ""], x_t: Int[Array, "B L"]) -> Int[Array, "B L"]:
        which_key, token_key = jax.random.split(jax.random.fold_in(key, i))
        t = (num_steps - i) / num_steps
        s = (num_steps - i - 1) / num_steps
        unmask = jax.random.uniform(which_key, shape) < unmask_probability(schedule, t, s)
        logits = predictable(denoise(x_t, jnp.full(shape[:1], t, jnp.float32)), mask_id=mask_id)
        if temperature == 0:
            tokens = jnp.argmax(logits, axis=-1)
        else:
            tokens = jax.random.categorical(token_key, logits / temperature, mode="high")
        return jnp.where((x_t == mask_id) & unmask, tokens.astype(jnp.int32), x_t)

    return jax.lax.fori_loop(0, num_steps, step, x_1)
