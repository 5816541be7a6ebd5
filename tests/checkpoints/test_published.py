"""MDLM's network, held to a writing of the published formulae in NumPy that shares nothing with ours."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import nanodlm
from nanodlm.checkpoints.published import mdlm
from nanodlm.errors import NanodlmError

D, HEADS, COND, FREQUENCIES, V, LAYERS = 12, 2, 6, 16, 11, 2
MASK = V - 1
SHAPES = {
    "vocab_embed.embedding": (V, D),
    "sigma_map.mlp.0.weight": (COND, FREQUENCIES), "sigma_map.mlp.0.bias": (COND,),
    "sigma_map.mlp.2.weight": (COND, COND), "sigma_map.mlp.2.bias": (COND,),
    "rotary_emb.inv_freq": (D // HEADS // 2,),
    "output_layer.norm_final.weight": (D,),
    "output_layer.linear.weight": (V, D), "output_layer.linear.bias": (V,),
    "output_layer.adaLN_modulation.weight": (2 * D, COND), "output_layer.adaLN_modulation.bias": (2 * D,),
}  # fmt: skip
for block in (f"blocks.{i}." for i in range(LAYERS)):
    SHAPES |= {f"{block}{name}.weight": (D,) for name in ("norm1", "norm2")}
    SHAPES |= {f"{block}attn_qkv.weight": (3 * D, D), f"{block}attn_out.weight": (D, D)}
    SHAPES |= {f"{block}mlp.0.weight": (4 * D, D), f"{block}mlp.0.bias": (4 * D,)}
    SHAPES |= {f"{block}mlp.2.weight": (D, 4 * D), f"{block}mlp.2.bias": (D,)}
    SHAPES |= {f"{block}adaLN_modulation.weight": (6 * D, COND), f"{block}adaLN_modulation.bias": (6 * D,)}


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.normal(0, 0.5, shape).astype(np.float32) for name, shape in SHAPES.items()}


def saved(weights: dict[str, np.ndarray], folder: Path) -> Path:
    save_file({f"backbone.{name}": array for name, array in weights.items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def by_the_formulae(w: dict[str, np.ndarray], row: np.ndarray, sigma: float) -> np.ndarray:
    """Logits (L, V) of one row, in double precision, position by position where the formulae are."""
    w = {name: array.astype(float) for name, array in w.items()}
    rates = 10_000.0 ** (-np.arange(FREQUENCIES // 2) / (FREQUENCIES // 2))
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
    c = w["sigma_map.mlp.0.weight"] @ np.r_[np.cos(sigma * rates), np.sin(sigma * rates)] + w["sigma_map.mlp.0.bias"]
    c = silu(w["sigma_map.mlp.2.weight"] @ silu(c) + w["sigma_map.mlp.2.bias"])
    modulation = lambda name: (w[f"{name}.weight"] @ c + w[f"{name}.bias"]).reshape(-1, D)  # noqa: E731

    def norm(x: np.ndarray, weight: np.ndarray, shift: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * weight * (1 + scale) + shift

    def turned(x: np.ndarray) -> np.ndarray:  # channels i and i + E/2 as one complex number, (L, E)
        half = x.shape[1] // 2
        angles = np.arange(len(x))[:, None] * 10_000.0 ** (-2 * np.arange(half) / x.shape[1])
        z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
        return np.concatenate([z.real, z.imag], axis=1)

    x, size = w["vocab_embed.embedding"][row], D // HEADS
    for i in range(LAYERS):
        p = {name.removeprefix(f"blocks.{i}."): array for name, array in w.items()}
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(f"blocks.{i}.adaLN_modulation")
        q, k, v = np.split(norm(x, p["norm1.weight"], shift_a, scale_a) @ p["attn_qkv.weight"].T, 3, axis=1)
        heads = []
        for at in (slice(h * size, (h + 1) * size) for h in range(HEADS)):
            scores = np.exp(turned(q[:, at]) @ turned(k[:, at]).T / np.sqrt(size))
            heads.append(scores / scores.sum(1, keepdims=True) @ v[:, at])
        x = x + gate_a * (np.concatenate(heads, axis=1) @ p["attn_out.weight"].T)
        h = norm(x, p["norm2.weight"], shift_m, scale_m) @ p["mlp.0.weight"].T + p["mlp.0.bias"]
        h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + gate_m * (h @ p["mlp.2.weight"].T + p["mlp.2.bias"])
    shift, scale = modulation("output_layer.adaLN_modulation")
    x = norm(x, w["output_layer.norm_final.weight"], shift, scale)
    return x @ w["output_layer.linear.weight"].T + w["output_layer.linear.bias"]


@pytest.mark.parametrize("time_conditioning", [False, True])
def test_logits_are_those_of_the_formulae(
    weights: dict[str, np.ndarray], tmp_path: Path, time_conditioning: bool
) -> None:
    denoise = mdlm(saved(weights, tmp_path), n_heads=HEADS, time_conditioning=time_conditioning)
    x_t, t = np.random.default_rng(1).integers(0, V, (3, 7)), np.array([0.1, 0.5, 1.0], np.float32)
    sigmas = -np.log(1 - 0.999 * t.astype(float)) if time_conditioning else np.zeros(3)
    expected = np.stack([by_the_formulae(weights, *each) for each in zip(x_t, sigmas, strict=True)])
    found = np.asarray(jax.jit(lambda denoise, *of: denoise(*of))(denoise, jnp.asarray(x_t), jnp.asarray(t)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_bound_and_the_samplers_take_it(weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    denoise = mdlm(saved(weights, tmp_path), n_heads=HEADS)
    of = {"mask_id": MASK, "schedule": "loglinear"}
    texts = jax.jit(lambda denoise: nanodlm.sample(denoise, 0, shape=(2, 6), num_steps=4, **of))(denoise)
    assert texts.shape == (2, 6)
    assert int(texts.max()) < MASK
    nats = jax.jit(lambda denoise: nanodlm.nelbo(denoise, texts, 0, **of))(denoise)
    assert nats.shape == (2,)
    assert bool(jnp.isfinite(nats).all())


def test_arrays_of_another_network_are_refused_by_name(weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    weights["blocks.1.attn_qkv.bias"] = weights.pop("output_layer.linear.bias")
    with pytest.raises(NanodlmError, match=r"differ in blocks\.1\.attn_qkv\.bias, output_layer\.linear\.bias"):
        mdlm(saved(weights, tmp_path))
