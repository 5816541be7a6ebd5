"""FLOPs of an update by formula, and the peak that a device could reach."""

import re
from typing import Literal

import jax
import tiktoken

from nanodlm.build import make_objective
from nanodlm.config import Config, ModelConfig
from nanodlm.data.tokenizer import make_encoding
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.diffusion.kinds import KINDS
from nanodlm.generation.generate import cache_window

Precision = Literal["bfloat16", "tensorfloat32", "float32"]

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


def peak_flops(device_kind: str, dtype: Precision) -> float | None:
    """Peak FLOP/s of a device, None where it is not known: a part of a GPU, say, or a CPU.

    Args:
        device_kind: As `jax.Device.device_kind` has it.
        dtype: Precision of the products; see `precision`.

    >>> peak_flops("NVIDIA H100 80GB HBM3", "bfloat16")
    989400000000000.0
    >>> peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16") is None
    True
    """
    column = ("bfloat16", "tensorfloat32", "float32").index(dtype)
    if "MIG" in device_kind:
        return None
    return next((peaks[column] for name, peaks in PEAKS.items() if re.search(rf"\b({name})", device_kind)), None)


def precision(config: Config) -> Precision:
    """What products are computed in: unless it is told otherwise, JAX multiplies float32 in TF32 on a GPU.

    >>> precision(Config().replace(model={"dtype": "bfloat16"}))
    'bfloat16'
    """
    if config.model.dtype == "bfloat16":
        return "bfloat16"
    by_default: dict[str, Precision] = {"gpu": "tensorfloat32", "tpu": "bfloat16"}
    chosen = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return by_default.get(jax.default_backend(), "float32") if chosen in (None, "default", "fastest") else "float32"


def forward_flops(model: ModelConfig, vocab_size: int, *, keys: float, output_share: float = 1.0) -> float:
    """FLOPs at one position in one pass forward: 2 for each element of a matrix, and attention.

    A block has 4 d_model^2 + 2 d_model d_ff elements. Attention multiplies queries with keys and weights with values:
    4 d_model for each position that is read. Time conditioning, a few products per row, is left out.

    Args:
        model: The network's shape.
        vocab_size: Outputs; see `vocab_size`.
        keys: Positions that a position reads, on average.
        output_share: Share of positions at which the output layer is computed.

    >>> shape = ModelConfig(n_layers=1, d_model=8, d_ff=16, n_heads=2)
    >>> forward_flops(shape, 128, keys=32)  # 2 * 512 + 4 * 8 * 32 + 2 * 8 * 128
    4096.0
    """
    d = model.d_model
    block = 2 * (4 * d * d + 2 * d * model.d_ff) + 4 * d * keys
    return float(model.n_layers * block + 2 * d * vocab_size * output_share)


def flops_per_token(config: Config, vocab_size: int, *, output_share: float = 1.0) -> float:
    """FLOPs of training, per token of a row: 6 for each element of a matrix and 12 n_layers d_model seq_len.

    That is three times a forward pass, for the backward pass has two products for each of the forward one. It is the
    count of PaLM (arXiv:2204.02311, appendix B) and of nanoGPT's `estimate_mfu`, but for what is not needed: embeddings
    are looked up, not multiplied, and masks hide half of the row from an autoregressive network, whose attention PaLM
    counts in full. A block network reads the clean row as well, of which the last layer gives keys and values alone.

    There are two definitions, which differ in the output layer:

        output_share = 1    FLOPs of the model as it is defined, with logits at every position
        output_share < 1    FLOPs that were done, when logits are computed at a share of the positions alone

    An MFU must come from the second: with the first, skipping work would count as doing it. Speed has no such question,
    so compare tokens/s, or step times, between programs that skip different things.

    Args:
        config: Shape and objective.
        vocab_size: Outputs; see `vocab_size`.
        output_share: Share of positions at which the output layer is computed. The count estimators mask
            (seq_len + 1) / 2 positions of a row on average.

    >>> config = Config().replace(model={"n_layers": 1, "d_model": 8, "d_ff": 16, "n_heads": 2, "seq_len": 32})
    >>> flops_per_token(config, 128), flops_per_token(config, 128, output_share=0.5)
    (12288.0, 9216.0)
    """
    model, block_size, reads = config.model, config.objective.block_size, KINDS[config.objective.kind].reads
    if reads == "block":
        keys = (model.seq_len + block_size) / 2
        context = forward_flops(model, vocab_size, keys=keys, output_share=0)
        unused = forward_flops(model.model_copy(update={"n_layers": 1}), vocab_size, keys=keys, output_share=0)
        context += 2 * 2 * model.d_model**2 - unused
        return 3 * (context + forward_flops(model, vocab_size, keys=keys, output_share=output_share))
    keys = (model.seq_len + 1) / 2 if reads == "before" else model.seq_len
    return 3 * forward_flops(model, vocab_size, keys=keys, output_share=output_share)


def synthetic_encoding(config: Config) -> tiktoken.Encoding:
    """An encoding with as many entries as the configuration's tokenizer; beyond bytes they stand for nothing.

    >>> synthetic_encoding(Config()).n_vocab
    4095
    """
    entries = {"gpt2": 50257, "bytes": 257, "bpe": config.data.vocab_size}[config.data.tokenizer] - 1
    ranks = {bytes([i]) if i < 256 else i.to_bytes(4, "big"): i for i in range(entries)}
    return make_encoding("synthetic", ranks)


def vocab_size(config: Config) -> int:
    """Outputs of a configuration's network: the tokenizer's entries, the mask, and padding.

    >>> vocab_size(Config().replace(data={"tokenizer": "gpt2"}))
    50304
    """
    return Vocabulary.of(synthetic_encoding(config)).padded_size


def flops_per_update(config: Config) -> float:
    """FLOPs that one update does, over all devices: logits are computed where the objective may score, and only there.

    >>> config = Config().replace(train={"batch_size": 2, "grad_acc_steps": 4})
    >>> flops_per_update(config) == 8 * 64 * flops_per_token(config, vocab_size(config), output_share=65 / 128)
    True
    """
    size, length = config.train, config.model.seq_len
    most = make_objective(config, Vocabulary.of(synthetic_encoding(config))).most_scored(size.batch_size, length)
    per_token = flops_per_token(config, vocab_size(config), output_share=most / (2 * length))
    return size.grad_acc_steps * size.batch_size * length * per_token


def _sampling_work(config: Config, prompt: int) -> tuple[int, float] | tuple[None, None]:
    """Steps and FLOPs of drawing all texts behind a prompt of so many tokens, where they do not depend on the texts."""
    options, kind, outputs = config.sample, KINDS[config.objective.kind], vocab_size(config)
    length = options.length or config.model.seq_len
    size = kind.block_size(config.objective.block_size)
    if not (options.sampler in ("ancestral", "first_hitting") or options.sampler.startswith("remdm")):
        return None, None
    if not size:
        steps = length - prompt if options.sampler == "first_hitting" else options.num_steps
        calls = steps * (2 if options.guidance and prompt else 1)
        forward = forward_flops(config.model, outputs, keys=length)
        return steps, options.num_samples * length * calls * forward
    window = cache_window(config.model.seq_len, size)
    steps, flops = 0, 0.0
    for start in range(0, length, size):
        keys = min(start, window) + size
        if kind.reads == "before":
            steps, flops = steps + 1, flops + forward_flops(config.model, outputs, keys=keys)
            continue
        masked = min(size, start + size - prompt)
        calls = (masked if options.sampler == "first_hitting" else options.num_steps) if masked > 0 else 0
        noisy = calls * forward_flops(config.model, outputs, keys=keys)
        steps, flops = steps + calls, flops + noisy + forward_flops(config.model, outputs, keys=keys, output_share=0)
    return steps, options.num_samples * size * flops
