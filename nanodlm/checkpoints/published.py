"""Published checkpoints of other projects, as functions that the bound and the samplers take.

denoise = mdlm("model.safetensors")    # of MDLM, 170M parameters on OpenWebText, in GPT-2's ids with a mask behind
nanodlm.nelbo(denoise, x_0, key, schedule="loglinear", mask_id=50257)
nanodlm.sample(denoise, key, shape=(1, 1024), schedule="loglinear", mask_id=50257)
"""

import math
from functools import partial
from itertools import count, takewhile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int
from safetensors.numpy import load_file

from nanodlm.errors import NanodlmError
from nanodlm.model.layers import rope

Weights = dict[str, Array]  # by the names of the published state dict

# The network's layers, by their names there: those with a weight alone, and those with a bias.
PLAIN = ("norm1", "attn_qkv", "attn_out", "norm2")
BIASED = ("mlp.0", "mlp.2", "adaLN_modulation")
OUTER = ("sigma_map.mlp.0", "sigma_map.mlp.2", "output_layer.linear", "output_layer.adaLN_modulation")


def mdlm(file: Path | str, *, n_heads: int = 12, time_conditioning: bool = False) -> Partial:
    """Return the denoiser of a checkpoint of MDLM: x_t (B, L) and t (B,) to logits (B, L, V), whose mask is V - 1.

    The file holds the state dict of its transformer, `DIT`, in safetensors; other arrays are an error that names them.
    The published ones have 12 heads and were trained without the time, under the `loglinear` schedule.
    Source: arXiv:2406.07524; the network is DiT's, arXiv:2212.09748, with rotary positions.
    """
    arrays = load_file(file)
    weights = {name.removeprefix("backbone."): jnp.asarray(array) for name, array in arrays.items()}
    weights.pop("rotary_emb.inv_freq", None)  # which follows from the width
    blocks = [f"blocks.{i}" for i in _layers(weights)]
    needed = {"vocab_embed.embedding", "output_layer.norm_final.weight"}
    needed |= {f"{name}.{part}" for name in OUTER for part in ("weight", "bias")}
    needed |= {f"{block}.{name}.weight" for block in blocks for name in (*PLAIN, *BIASED)}
    needed |= {f"{block}.{name}.bias" for block in blocks for name in BIASED}
    if differ := sorted(needed ^ weights.keys()):
        raise NanodlmError(f"{file} holds no network of MDLM: it and MDLM differ in {', '.join(differ[:5])}")
    return Partial(partial(_mdlm, n_heads=n_heads, time_conditioning=time_conditioning), weights)


def _layers(weights: Weights) -> list[int]:
    return [*takewhile(lambda i: f"blocks.{i}.norm1.weight" in weights, count())]


def _mdlm(
    weights: Weights, x_t: Int[Array, "B L"], t: Float[Array, "B"], *, n_heads: int, time_conditioning: bool
) -> Float[Array, "B L V"]:
    def linear(x: Array, name: str) -> Array:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def norm(x: Array, name: str, shift: Array, scale: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        x = centred / jnp.sqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-5) * weights[f"{name}.weight"]
        return x * (1 + scale) + shift

    # The network is told sigma = -log alpha; 0 is what it was trained with where it does not see the time.
    sigma = -jnp.log1p(-(1 - 1e-3) * t) if time_conditioning else jnp.zeros(len(x_t))
    half = weights["sigma_map.mlp.0.weight"].shape[1] // 2
    angles = sigma[:, None] * jnp.exp(-math.log(10_000) * jnp.arange(half) / half)
    embedded = linear(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1), "sigma_map.mlp.0")
    condition = jax.nn.silu(linear(jax.nn.silu(embedded), "sigma_map.mlp.2"))[:, None]
    x, positions = weights["vocab_embed.embedding"][x_t], jnp.arange(x_t.shape[1])
    for i in _layers(weights):
        of = f"blocks.{i}"
        modulation = jnp.split(linear(condition, f"{of}.adaLN_modulation"), 6, axis=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        qkv = linear(norm(x, f"{of}.norm1", shift_a, scale_a), f"{of}.attn_qkv")
        q, k, v = jnp.moveaxis(qkv.reshape(*x_t.shape, 3, n_heads, -1), 2, 0)
        h = jax.nn.dot_product_attention(rope(q, positions), rope(k, positions), v)
        x = x + gate_a * linear(h.reshape(x.shape), f"{of}.attn_out")
        h = jax.nn.gelu(linear(norm(x, f"{of}.norm2", shift_m, scale_m), f"{of}.mlp.0"), approximate=True)
        x = x + gate_m * linear(h, f"{of}.mlp.2")
    shift, scale = jnp.split(linear(condition, "output_layer.adaLN_modulation"), 2, axis=-1)
    return linear(norm(x, "output_layer.norm_final", shift, scale), "output_layer.linear")
