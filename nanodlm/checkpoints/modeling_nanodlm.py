"""The network of an exported folder in PyTorch, for `transformers`; it stands by itself and imports nothing of nanodlm.

    model = transformers.AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    logits = model(x_t, t).logits    # (B, L) ids, (B,) times in [0, 1] -> (B, L, V) of x_0

Ids from `config.mask_token_id` on, the mask and padding, are no tokens of texts: leave them out of the softmax. What
positions read depends on `config.block_size`: with 0 the whole row, with b the blocks of b positions up to their own.
With 1 that is autoregression, whose logits are of the next token. Block diffusion is `model(x_t, t, context=x_0)`.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

Norm = partial(nn.RMSNorm, eps=1e-6)
Linear = partial(nn.Linear, bias=False)


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


def rope(x: Tensor, places: Tensor) -> Tensor:
    """Rotate pairs of channels of (B, S, H, E) by angles proportional to the place. Source: arXiv:2104.09864."""
    a, b = x.float().chunk(2, dim=-1)
    angles = places[:, None, None] / 10_000 ** (torch.arange(a.shape[-1], device=x.device) / a.shape[-1])
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class ShortConvolution(nn.Module):
    """A depthwise convolution over neighbouring places, of those that a position reads, in each stream."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, width))

    def forward(self, x: Tensor, reads: Tensor, places: Tensor) -> Tensor:
        """Sum weight[:, o] * x[place + o] over offsets o and streams."""
        out, rows, length = torch.zeros_like(x), torch.arange(len(places), device=x.device), int(places.max()) + 1
        for offset, weight in enumerate(self.weight.T):
            beside = places + offset - self.weight.shape[1] // 2
            inside, beside = (beside >= 0) & (beside < length), beside.clamp(0, length - 1)
            for start in range(0, len(places), length):
                near = inside & reads[:, rows, start + beside]
                out = out + x[:, start + beside] * weight * near[..., None]
        return out


class Block(nn.Module):
    """Optional convolution, attention and feed-forward layer, each added to the residual stream."""

    def __init__(self, config: NanodlmConfig):
        super().__init__()
        d, self.n_heads = config.d_model, config.n_heads
        self.conv = ShortConvolution(config.conv_width, d) if config.conv_width else None
        self.conv_norm = Norm(d) if config.conv_width else None
        self.attention_norm, self.mlp_norm = Norm(d), Norm(d)
        self.qkv, self.attention_out = Linear(d, 3 * d), Linear(d, d)
        self.query_norm = Norm(d // config.n_heads) if config.qk_norm else None
        self.key_norm = Norm(d // config.n_heads) if config.qk_norm else None
        self.mlp_in, self.mlp_out = Linear(d, config.d_ff), Linear(config.d_ff, d)
        self.modulation = Linear(d, 6 * d) if config.time_conditioning else None

    def forward(self, x: Tensor, condition: Tensor | None, reads: Tensor, places: Tensor) -> Tensor:
        """Run one block over (B, S, D), in which each position reads what (1 or B, S, S) says."""
        zeros = [torch.zeros((), device=x.device, dtype=x.dtype)] * 6
        modulation = zeros if self.modulation is None else self.modulation(condition).chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        if self.conv is not None and self.conv_norm is not None:
            x = x + self.conv(self.conv_norm(x), reads, places)
        h = self.attention_norm(x) * (1 + scale_a) + shift_a
        q, k, v = self.qkv(h).unflatten(-1, (self.n_heads, 3, -1)).unbind(dim=3)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (each.transpose(1, 2) for each in (rope(q, places), rope(k, places), v))
        h = F.scaled_dot_product_attention(q, k, v, reads[:, None]).transpose(1, 2).flatten(2)
        x = x + self.attention_out(h) * (1 + gate_a)
        h = self.mlp_norm(x) * (1 + scale_m) + shift_m
        return x + self.mlp_out(F.relu(self.mlp_in(h)).square()) * (1 + gate_m)


class NanodlmModel(PreTrainedModel):
    """Predict every token of a row from a noised one."""

    config_class = NanodlmConfig
    config: NanodlmConfig

    def __init__(self, config: NanodlmConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.time_in = nn.Linear(config.d_model, config.d_model) if config.time_conditioning else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = Norm(config.d_model)
        self.head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,  # (B, L)
        t: Tensor | None = None,  # (B,), or (B, K) of each row's blocks; None is 0
        segment_ids: Tensor | None = None,  # (B, L), the documents in each row, which do not read each other
        context: Tensor | None = None,  # (B, L) clean tokens, of which each block reads those of the blocks before it
        **others: Any,
    ) -> MaskedLMOutput:
        """Return the logits of x_0 at every position."""
        if unknown := [name for name, value in others.items() if value is not None]:
            raise ValueError(f"this network takes input_ids, t, segment_ids and context, not {', '.join(unknown)}")
        if context is not None and not self.config.block_size:
            raise ValueError("a context needs a network with a block_size above 0")
        (rows, length), device = input_ids.shape, input_ids.device
        size, t = self.config.block_size or length, torch.zeros(rows, device=device) if t is None else t
        t = t[:, None].expand(-1, length) if t.ndim == 1 else t.repeat_interleave(size, dim=1)[:, :length]
        if context is not None:  # one stream behind the other
            input_ids, t = torch.cat([context, input_ids], dim=1), torch.cat([torch.zeros_like(t), t], dim=1)
        order = torch.arange(input_ids.shape[1], device=device)
        places, noisy = order % length, order >= length
        back = places[:, None] // size - places // size
        reads = torch.where(noisy, noisy[:, None] & (back == 0), back >= noisy[:, None].int())[None]
        if segment_ids is not None:
            documents = segment_ids.repeat(1, len(order) // length)
            reads = reads & (documents[:, :, None] == documents[:, None, :])
        x, condition = self.embedding(input_ids), None
        if self.time_in is not None:
            rates = torch.exp(-math.log(10_000) * torch.arange(x.shape[-1] // 2, device=device) / (x.shape[-1] // 2))
            angles = 1000 * t[..., None].float() * rates
            condition = F.silu(self.time_in(torch.cat([angles.sin(), angles.cos()], dim=-1).to(x.dtype)))
        for block in self.blocks:
            x = block(x, condition, reads, places)
        table = self.embedding.weight if self.head is None else self.head.weight
        return MaskedLMOutput(logits=F.linear(self.norm(x[:, -length:]), table).float())
