"""FLOPs of updates by formula, and the peak that a device could reach."""

import re

import jax
import tiktoken

from nanodlm.build import make_objective
from nanodlm.config import Config
from nanodlm.data.tokenizer import make_encoding
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.diffusion.kinds import KINDS

# Peak FLOP/s of dense products by the makers' data sheets: bfloat16 with float32 sums, TF32, float32. V100 has no TF32
# and float16 in place of bfloat16; TPUs multiply float32 in passes of bfloat16.
PEAKS: dict[str, tuple[float, float | None, float | None]] = {
    r"H100 80GB HBM3|H100 SXM|H200$|GH200": (989.4e12, 494.7e12, 66.9e12),
    r"A100": (312e12, 156e12, 19.5e12),
    r"V100-SXM": (125e12, 15.7e12, 15.7e12),
    r"L4$": (121e12, 60.5e12, 30.3e12),
    r"RTX 4090$": (165.2e12, 82.6e12, 82.6e12),
    r"TPU v4$": (275e12, None, None),
    r"TPU v5 lite|TPU v5e": (197e12, None, None),
    r"TPU v5p?$": (459e12, None, None),
    r"TPU v6 lite|TPU v6e": (918e12, None, None),
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Return the peak FLOP/s of a device by its `device_kind`; None for what is not known, such as parts of a GPU.

    >>> peak_flops("NVIDIA H100 80GB HBM3", "bfloat16")
    989400000000000.0
    """
    column = ("bfloat16", "tensorfloat32", "float32").index(dtype)
    if "MIG" in device_kind:
        return None
    return next((peaks[column] for name, peaks in PEAKS.items() if re.search(rf"\b({name})", device_kind)), None)


def precision(config: Config) -> str:
    """Return the precision of matrix products: unless it is set otherwise, JAX multiplies float32 in TF32 on a GPU."""
    if config.model.dtype == "bfloat16":
        return "bfloat16"
    by_default = {"gpu": "tensorfloat32", "tpu": "bfloat16"}
    chosen = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return by_default.get(jax.default_backend(), "float32") if chosen in (None, "default", "fastest") else "float32"


def flops_per_token(config: Config, vocab_size: int, *, output_share: float = 1.0) -> float:
    """Count the FLOPs of training for each token: 6 for each element of a matrix, and 12 n_layers d_model seq_len.

    That is three times a forward pass, for the backward pass has two products for each of the forward one. It is the
    count of PaLM (arXiv:2204.02311, appendix B) and of nanoGPT's `estimate_mfu`, but for what is not needed: embeddings
    are looked up, and half of the row is hidden from an autoregressive network. A block network reads the clean row as
    well, of which the last layer gives keys and values alone. `output_share` of the positions have logits. Time
    conditioning is left out.

    >>> config = Config().replace(model={"n_layers": 1, "d_model": 8, "d_ff": 16, "n_heads": 2, "seq_len": 32})
    >>> flops_per_token(config, 128), flops_per_token(config, 128, output_share=0.5)
    (12288.0, 9216.0)
    """
    model, length, reads = config.model, config.model.seq_len, KINDS[config.objective.kind].reads
    keys = {"block": (length + config.objective.block_size) / 2, "before": (length + 1) / 2}.get(reads, length)
    layer = 2 * (4 * model.d_model**2 + 2 * model.d_model * model.d_ff) + 4 * model.d_model * keys
    forward = model.n_layers * layer + 2 * model.d_model * vocab_size * output_share
    clean = (model.n_layers - 1) * layer + 4 * model.d_model**2 if reads == "block" else 0
    return 3.0 * (forward + clean)


def synthetic_encoding(config: Config) -> tiktoken.Encoding:
    """Make an encoding with as many entries as the configuration's tokenizer; beyond bytes they stand for nothing.

    >>> encoding = synthetic_encoding(Config())
    >>> encoding.n_vocab, encoding.encode_ordinary("Hi")
    (4095, [72, 105])
    """
    # Characters are those of tiny Shakespeare: all alphabets of letters fit into as many ids, when they are filled up.
    sizes = {"gpt2": 50257, "bytes": 257, "bpe": config.data.vocab_size, "chars": 66}
    entries = sizes[config.data.tokenizer] - 1
    ranks = {bytes([i]) if i < 256 else i.to_bytes(4, "big"): i for i in range(entries)}
    return make_encoding("synthetic", ranks)


def flops_per_update(config: Config) -> float:
    """Count the FLOPs of one update over all devices, with logits where the objective may score, and only there.

    >>> config = Config().replace(train={"batch_size": 2, "grad_acc_steps": 4})
    >>> flops_per_update(config) == 8 * 64 * flops_per_token(config, 4096, output_share=65 / 128)
    True
    """
    size, length = config.train, config.model.seq_len
    vocabulary = Vocabulary.of(synthetic_encoding(config))
    most = make_objective(config, vocabulary).most_scored(size.batch_size, length)
    per_token = flops_per_token(config, vocabulary.padded_size, output_share=most / (2 * length))
    return size.grad_acc_steps * size.batch_size * length * per_token
