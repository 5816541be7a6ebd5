"""The cross-entropy of tokens, plain and fused with the output layer."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nanodlm.diffusion.noise import Logits, Tokens


def predictable(logits: Float[Array, "... V"], *, mask_id: int) -> Float[Array, "... V"]:
    """Set the logits of ids that are never predicted (mask and padding) to minus infinity, in float32 at least.

    Fewer logits than real tokens are a ValueError.

    >>> predictable(jnp.zeros((1, 4)), mask_id=2).tolist()
    [[0.0, 0.0, -inf, -inf]]
    """
    if logits.shape[-1] < mask_id:
        raise ValueError(f"a network that scores {logits.shape[-1]} ids cannot have {mask_id} as its mask")
    real: Bool[Array, V] = jnp.arange(logits.shape[-1]) < mask_id
    return jnp.where(real, logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), -jnp.inf)


def cross_entropy(logits: Logits, x_0: Tokens, scored: Bool[Array, "B L"], *, mask_id: int) -> Float[Array, "B L"]:
    """Return -log p(x_0 | x_t) in nats at the scored positions and 0 at others, from a softmax in at least float32.

    Ids from `mask_id` on have probability 0 (zero masking probabilities, MDLM, arXiv:2406.07524, section 3.2.3).

    >>> ce = cross_entropy(jnp.zeros((1, 2, 3)), jnp.array([[0, 1]]), jnp.array([[True, False]]), mask_id=2)
    >>> [round(float(v), 4) for v in ce[0]]  # two possible tokens: log 2
    [0.6931, 0.0]
    """
    logits = predictable(logits, mask_id=mask_id)
    target = jnp.where(scored, x_0, 0)
    true_logit = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return jnp.where(scored, jax.nn.logsumexp(logits, axis=-1) - true_logit, 0.0)


def linear_cross_entropy(
    features: Float[Array, "G C D"],
    table: Float[Array, "V D"],
    target: Int[Array, "G C"],
    weight: Float[Array, "G C"],
    *,
    mask_id: int,
    chunks: int = 1,
) -> tuple[Float[Array, ""], Float[Array, "G C"]]:
    """Return the weighted sum of -log softmax(features table^T)[target], and these nats, which have no gradient.

    Positions are taken in chunks along C. The gradient of the sum is made together with it, from each chunk's
    exponentials e and their sum s while they are there: with w the weights,

        d features = w/s (e table) - w table[target],    d table = e^T (w/s features), less w features at its target.

    So no logits are kept, none is computed twice, and no softmax is written out. Matrix products are done in the
    features' precision and summed in float32; maximum, sum and logarithm are float32. Equal in value to `cross_entropy`
    of the logits; compare Liger kernels, arXiv:2410.10989, section 3.2, and Cut Cross-Entropy, arXiv:2411.09009.

    The G groups of C positions may lie on different devices. The table is the output layer, in float32 at least.
    Targets are below `mask_id` wherever the weight is not 0; where it is 0 so are the nats.
    """
    size = -(-target.shape[1] // chunks)
    chunks = -(-target.shape[1] // size)  # short groups would be filled up by more than a chunk
    fill = size * chunks - target.shape[1]

    def cut(value: Array) -> Array:
        """Cut (G, C, ...) into (chunks, G * C / chunks, ...): XLA multiplies in two dimensions faster."""
        padded = jnp.pad(value, ((0, 0), (0, fill)) + ((0, 0),) * (value.ndim - 2))
        parts = jnp.moveaxis(padded.reshape(len(value), chunks, size, *value.shape[2:]), 1, 0)
        return parts.reshape(chunks, -1, *value.shape[2:])

    loss, nats = _chunked_cross_entropy(mask_id, table, cut(features), cut(target), cut(weight))  # type: ignore[misc]
    nats = jnp.moveaxis(nats.reshape(chunks, -1, size), 0, 1).reshape(len(target), -1)[:, : target.shape[1]]
    return loss, jax.lax.stop_gradient(nats)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_cross_entropy(
    mask_id: int, table: Array, features: Array, target: Array, weight: Array
) -> tuple[Array, Array]:
    """Return the sum and the nats (K, N) of K chunks: features (K, N, D), targets and weights (K, N)."""
    return _chunked_forward(mask_id, table, features, target, weight)[0]  # compiled, it makes no gradient here


def _chunked_forward(mask_id: int, table: Array, features: Array, target: Array, weight: Array) -> Any:
    compute = table.astype(features.dtype)
    columns = jax.lax.optimization_barrier(compute.T)
    product = partial(jnp.einsum, preferred_element_type=table.dtype)

    def chunk(total: tuple[Array, Array], inputs: tuple[Array, Array, Array]) -> tuple[Any, Any]:
        loss, d_table = total
        x, target, weight = inputs
        logits = product("vd,nd->vn", compute, x)
        logits = logits.at[mask_id:].set(-jnp.inf)
        highest = logits.max(axis=0)
        e = jnp.exp(logits - highest)
        s = e.sum(axis=0)
        true_logit = logits[target, jnp.arange(len(target))]
        nats = jnp.where(weight > 0, highest + jnp.log(s) - true_logit, 0.0)
        e, scale = e.astype(x.dtype), (weight / s)[..., None]
        at_target = compute[target].astype(table.dtype)  # rounded like the other rows, so that they can cancel
        d_x = scale * jax.lax.optimization_barrier(product("dv,vn->dn", columns, e)).T - weight[..., None] * at_target
        d_table += product("vn,nd->vd", e, (scale * x).astype(x.dtype))
        d_table = d_table.at[target].add(-weight[..., None] * x)
        return (loss + (weight * nats).sum(), d_table), (nats, d_x.astype(x.dtype))

    zero = (jnp.zeros((), table.dtype), jnp.zeros_like(table))
    (loss, d_table), (nats, d_features) = jax.lax.scan(chunk, zero, (features, target, weight))
    return (loss, nats), (d_table, d_features, nats)


def _chunked_backward(mask_id: int, saved: tuple[Array, Array, Array], gradient: Any) -> Any:
    d_table, d_features, nats = saved
    return gradient[0] * d_table, (gradient[0] * d_features).astype(d_features.dtype), None, gradient[0] * nats


_chunked_cross_entropy.defvjp(_chunked_forward, _chunked_backward)
