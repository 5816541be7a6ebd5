"""Noise that replaces tokens by random ones, alone (uniform) or beside masks (hybrid), and its bound.

Source: GIDD, arXiv:2503.04482, section 3; UDLM, arXiv:2412.10193, section 3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from nanodlm.diffusion.cross_entropy import predictable
from nanodlm.diffusion.noise import Logits, Tokens, _subset


class Shares(NamedTuple):
    """q(x_t | x_0) of a mixed process: the shares of the token itself, of the mask, and of uniform noise; sum 1."""

    kept: Float[Array, "..."]
    masked: Float[Array, "..."]
    uniform: Float[Array, "..."]


def shares(mask_rate: Float[Array, "..."], uniform_share: float) -> Shares:
    """Return how much of a token is left, masked, or uniformly random when m = 1 - alpha(t) of it is noise.

    Uniform share p = 1 is the uniform process: (1 - m, 0, m), ending in random tokens. Below it is the interpolation
    (1 - m, m, c) / (1 + c) with c = 2p/(1-p) sqrt(m (1 - m)), where uniform noise is p of all at m = 1/2 and both ends
    are those of masking; p = 0 is masking alone. Sources: UDLM, section 3; GIDD, section 4, for m = t.

    >>> [round(float(v), 3) for v in shares(jnp.float32(0.5), 0.2)]
    [0.4, 0.4, 0.2]
    """
    m = mask_rate
    if uniform_share == 1:
        return Shares(1 - m, jnp.zeros_like(m), m)
    c = 2 * uniform_share / (1 - uniform_share) * jnp.sqrt(m * (1 - m))
    return Shares((1 - m) / (1 + c), m / (1 + c), c / (1 + c))


def mask_rate_of(noise: Float[Array, "..."], uniform_share: float) -> Float[Array, "..."]:
    """Return the m at which a share `noise` < 1 of the tokens is noise of either sort, the inverse of 1 - shares.kept.

    With T = sqrt(m / (1 - m)) that equation is T^2 + c T = noise / (1 - noise), c = 2p/(1-p).

    >>> round(float(mask_rate_of(jnp.float32(0.6), 0.2)), 4)
    0.5
    """
    if uniform_share == 1:
        return noise
    c, odds = 2 * uniform_share / (1 - uniform_share), noise / (1 - noise)
    root = 2 * odds / (c + jnp.sqrt(c**2 + 4 * odds))
    return root**2 / (1 + root**2)


def q_sample_mixed(
    x_0: Tokens, at: Shares, key: Key[Array, ""], *, mask_id: int, count: Int[Array, "B"] | None = None
) -> Tokens:
    """Sample x_t from a mixed q(x_t | x_0), given each row's shares (B,); padding stays as it is.

    With a `count`, exactly so many positions of each row become noise, a uniformly random subset.
    """
    where_key, which_key, token_key = jax.random.split(key, 3)
    share = at.masked + at.uniform
    real = x_0 < mask_id
    if count is None:
        is_noise = real & (jax.random.uniform(where_key, x_0.shape) < share[:, None])
    else:
        is_noise = _subset(real, count, where_key)
    is_mask = jax.random.uniform(which_key, x_0.shape) < (at.masked / jnp.maximum(share, 1e-30))[:, None]
    random = jax.random.randint(token_key, x_0.shape, 0, mask_id, x_0.dtype)
    return jnp.where(is_noise, jnp.where(is_mask, mask_id, random), x_0)


def mixed_divergence(
    logits: Logits, x_0: Tokens, x_t: Tokens, mask_rate: Float[Array, "B"], *, mask_id: int, uniform_share: float
) -> tuple[Float[Array, "B"], Float[Array, "B L"]]:
    """Return each row's weight and each position's nats; their product, integrated over the mask rate m, is the bound.

    With q the law of x_t given x_0, q^ its mean over the model's x_0, z the token at hand and g_z the rate, per unit
    of m, at which noise turns other tokens into z, the product is g_z / q_z times

        KL(q || q^) + q_z / q^_z - log(q_z / q^_z) - 1 = sum_j q_j (x_j - 1 - log x_j),

    where x_j = (q^_j q_z) / (q_j q^_z). The right-hand side is what is computed: its terms are not negative, and do
    not cancel where little of x_0 is left. For uniform noise it is UDLM's bound, for masks alone that of MDLM. It is
    tight for a model that predicts x_0 at a position from the *other* positions of x_t: what x_t says there enters
    through q. Source: GIDD, arXiv:2503.04482, section 3 (continuous-time ELBO); UDLM, arXiv:2412.10193, section 3.

    The weight is the part that only m decides, kept * sum(g) over the share of noise: 1 / m for masks or uniform
    noise alone. A loss may scale it and still be least for the same model; scaling by z or x_0 would move that.

    >>> weight, nats = mixed_divergence(jnp.zeros((1, 1, 3)), jnp.array([[0]]), jnp.array([[1]]), jnp.array([0.5]),
    ...                                 mask_id=2, uniform_share=1.0)
    >>> float(weight[0]), round(float(nats[0, 0]), 4)  # q = (3/4, 1/4), q^ = (1/2, 1/2): g/q_z (0.1308 + 0.1931) / 2
    (2.0, 0.6479)
    """
    m = jnp.clip(mask_rate, 1e-30, 1 - 2**-20)[:, None]  # at the very ends the product's limit is 0
    at, slope = jax.jvp(lambda m: shares(m, uniform_share), (m,), (jnp.ones_like(m),))
    decay = slope.kept / at.kept
    to_mask = slope.masked - decay * at.masked
    to_token = (slope.uniform - decay * at.uniform) / mask_id
    weight = at.kept * (to_mask + mask_id * to_token) / (at.masked + at.uniform)
    noise = (at.uniform / mask_id)[..., None]
    q = at.kept[..., None] * jax.nn.one_hot(x_0, mask_id, dtype=m.dtype) + noise
    p = at.kept[..., None] * jax.nn.softmax(predictable(logits, mask_id=mask_id), axis=-1)[..., :mask_id] + noise
    is_mask = x_t == mask_id
    token = jnp.minimum(x_t, mask_id - 1)[..., None]
    q_z, p_z = (jnp.where(is_mask, at.masked, jnp.take_along_axis(of, token, axis=-1)[..., 0]) for of in (q, p))
    ratio = p / q * (q_z / p_z)[..., None]
    ratio_mask = q_z / p_z  # of the mask, which the model cannot be wrong about
    divergence = (q * (ratio - 1 - jnp.log(ratio))).sum(axis=-1)
    divergence += at.masked * (ratio_mask - 1 - jnp.log(ratio_mask))
    return weight[:, 0], jnp.where(is_mask, to_mask, to_token) / (weight * q_z) * divergence
