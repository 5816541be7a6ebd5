"""The network of an exported folder in PyTorch, for `transformers`; it stands by itself and imports nothing of nanodlm.

    model = transformers.AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    logits = model(x_t, t).logits    # (B, L) ids, (B,) times in [0, 1] -> (B, L, V) of x_0; V > config.mask_token_id

A mask is the id `mask_token_id`; ids from it on are never tokens of a text, so leave them out of the softmax. Times are
read only with `time_conditioning`. What positions read depends on `block_size`:

    0     the whole row
    b     the blocks of b positions up to their own: block diffusion takes `model(x_t, t, context=x_0)`, in which each
          block of x_t reads itself and the blocks of x_0 before it
    1     themselves and those before: autoregression, whose logits at a position are of the next token
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

Reads = Tensor | None  # (1 or B, L, L), whether each position reads each; None is everything
Kept = tuple[Tensor, Tensor, Tensor]  # keys, values and the convolution's inputs of a layer


class NanodlmConfig(PretrainedConfig):
    """The shape of the network; `nanodlm` holds all settings of its training."""

    model_type = "nanodlm"
    vocab_size: int = 384
    n_layers: int = 1
    n_heads: int = 1
    d_model: int = 2
    d_ff: int = 1
    conv_width: int = 0
    time_conditioning: bool = False
    tie_embeddings: bool = False
    qk_norm: bool = True
    block_size: int = 0
    mask_token_id: int = 257
    nanodlm: Any = None


def rope(x: Tensor) -> Tensor:
    """Rotate pairs of channels of (B, L, H, E) by angles proportional to the position. Source: arXiv:2104.09864."""
    half = x.shape[-1] // 2
    rates = 10_000 ** (torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[1], device=x.device)[:, None, None] / rates
    a, b = x.float().split(half, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class ShortConvolution(nn.Module):
    """A depthwise convolution over neighbouring positions."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, width))

    def forward(self, x: Tensor, reads: Reads) -> Tensor:
        """For each position i, sum over offsets o of weight[:, o] * x[i + o], of those that it reads."""
        places, out = torch.arange(x.shape[1], device=x.device), torch.zeros_like(x)
        for offset, weight in enumerate(self.weight.T):
            beside = places + offset - self.weight.shape[1] // 2
            inside, beside = (beside >= 0) & (beside < len(places)), beside.clamp(0, len(places) - 1)
            near = inside[None] if reads is None else inside & reads[:, places, beside]
            out = out + x[:, beside] * weight * near[..., None]
        return out


class Block(nn.Module):
    """Optional convolution, attention and feed-forward layer, each added to the residual stream."""

    def __init__(self, config: NanodlmConfig):
        super().__init__()
        d, head = config.d_model, config.d_model // config.n_heads
        self.n_heads = config.n_heads
        self.conv = ShortConvolution(config.conv_width, d) if config.conv_width else None
        self.conv_norm = nn.RMSNorm(d, eps=1e-6) if config.conv_width else None
        self.attention_norm, self.mlp_norm = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.query_norm = nn.RMSNorm(head, eps=1e-6) if config.qk_norm else None
        self.key_norm = nn.RMSNorm(head, eps=1e-6) if config.qk_norm else None
        self.attention_out = nn.Linear(d, d, bias=False)
        self.mlp_in, self.mlp_out = nn.Linear(d, config.d_ff, bias=False), nn.Linear(config.d_ff, d, bias=False)
        self.modulation = nn.Linear(d, 6 * d, bias=False) if config.time_conditioning else None

    def forward(self, x: Tensor, c: Tensor | None, own: Reads, past: Kept | None, before: Reads) -> tuple[Tensor, Kept]:
        """Return the stream, whose positions read `own` of it and `before` of the past, and what others may read."""
        inputs = x[..., :0]
        if self.conv is not None and self.conv_norm is not None:
            inputs = self.conv_norm(x)
            x = x + self.conv(inputs, own)
            x = x if past is None else x + self.conv(past[2], before)
        zeros = [torch.zeros((), device=x.device, dtype=x.dtype)] * 6
        shifts = zeros if self.modulation is None else self.modulation(c).chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = shifts
        h = self.attention_norm(x) * (1 + scale_a) + shift_a
        q, k, v = self.qkv(h).unflatten(-1, (self.n_heads, 3, -1)).unbind(dim=3)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rope(q), rope(k)
        kept, reads = (k, v, inputs), own
        if past is not None and own is not None and before is not None:
            k, v, reads = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1), torch.cat([before, own], 2)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        h = F.scaled_dot_product_attention(q, k, v, None if reads is None else reads[:, None]).transpose(1, 2)
        x = x + self.attention_out(h.flatten(2)) * (1 + gate_a)
        h = self.mlp_norm(x) * (1 + scale_m) + shift_m
        return x + self.mlp_out(F.relu(self.mlp_in(h)).square()) * (1 + gate_m), kept


class NanodlmModel(PreTrainedModel):
    """Predict every token of a row from a noised one."""

    config_class = NanodlmConfig
    config: NanodlmConfig

    def __init__(self, config: NanodlmConfig):
        super().__init__(config)
        d = config.d_model
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.time_in = nn.Linear(d, d) if config.time_conditioning else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(d, eps=1e-6)
        self.head = None if config.tie_embeddings else nn.Linear(d, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,  # (B, L)
        t: Tensor | None = None,  # (B,), or (B, K) of each row's blocks; None is 0
        segment_ids: Tensor | None = None,  # (B, L), the documents in each row, which do not read each other
        context: Tensor | None = None,  # (B, L), clean tokens: see the module
        **others: Any,
    ) -> MaskedLMOutput:
        """Return the logits of x_0 at every position."""
        if unknown := [name for name, value in others.items() if value is not None]:
            raise ValueError(f"this network takes input_ids, t, segment_ids and context, not {', '.join(unknown)}")
        size, length = self.config.block_size, input_ids.shape[1]
        if context is not None and not size:
            raise ValueError("a context needs a network with a block_size above 0")
        t = torch.zeros(len(input_ids), device=input_ids.device) if t is None else t
        reads, before, past = None, None, None
        if segment_ids is not None:
            reads = segment_ids[:, :, None] == segment_ids[:, None, :]
        if size:
            block = torch.arange(length, device=input_ids.device) // size
            back = (block[:, None] - block)[None]
            same = torch.ones_like(back, dtype=torch.bool) if reads is None else reads
            reads = same & (back >= 0)
            if context is not None:
                _, past = self._run(context, torch.zeros_like(t[:, :1] if t.ndim == 2 else t), reads)
                reads, before = same & (back == 0), same & (back >= 1)
        x, _ = self._run(input_ids, t, reads, past, before)
        table = self.embedding.weight if self.head is None else self.head.weight
        return MaskedLMOutput(logits=F.linear(self.norm(x), table).float())

    def _run(
        self, ids: Tensor, t: Tensor, own: Reads, past: list[Kept] | None = None, before: Reads = None
    ) -> tuple[Tensor, list[Kept]]:
        """Run all blocks over one stream; return it and what each keeps of it."""
        x, condition, kept = self.embedding(ids), None, []
        if self.time_in is not None:
            t = t.reshape(len(ids), -1)
            if t.shape[1] > 1:
                t = t.repeat_interleave(self.config.block_size or ids.shape[1], dim=1)[:, : ids.shape[1]]
            half = self.config.d_model // 2
            rates = torch.exp(-math.log(10_000) * torch.arange(half, device=ids.device) / half)
            angles = 1000 * t[..., None].float() * rates
            condition = F.silu(self.time_in(torch.cat([angles.sin(), angles.cos()], dim=-1).to(x.dtype)))
        for i, block in enumerate(self.blocks):
            x, layer = block(x, condition, own, past[i] if past else None, before)
            kept.append(layer)
        return x, kept
