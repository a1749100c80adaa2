"""What enters the transformer: scalars (time, guidance), the pooled prompt, patches, and the refined prompt.

Tensor names are those of the released checkpoint. Sequences have no batch axis and no padding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowvram_i2v.attention import AttentionBackend
from lowvram_i2v.dit.config import TransformerConfig

FREQUENCIES = 128
REFINER_EPS = 1e-6


def sinusoidal(value: Tensor) -> Tensor:
    """Scalar embedding, float32: value [n] -> [n, 256], 128 cosines then 128 sines, slowest period 2 pi 10000."""
    angles = value.float()[:, None] * scalar_frequencies().to(value.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def scalar_frequencies() -> Tensor:
    """exp(-ln(10000) i / 128) in float32 [128], the same bits on every machine.

    A guidance of 6 enters as 6000, so the last bit of a frequency moves the model's output by 1e-5; math libraries
    disagree on it. Here: the correctly rounded exponential of the float32 exponent, but for the one value of weight
    that the goldens' library rounds the other way.
    """
    exponents = -math.log(10000) * torch.arange(FREQUENCIES, dtype=torch.float32) / FREQUENCIES
    frequencies = torch.exp(exponents.double()).float()
    frequencies[12] = torch.nextafter(frequencies[12], torch.tensor(1.0))
    return frequencies


class ScalarEmbedder(nn.Module):
    """A scalar on the scale 0..1000 (time, guidance * 1000) -> [n, hidden]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, value: Tensor) -> Tensor:
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(sinusoidal(value).to(dtype))  # type: ignore[no-any-return]


class PooledEmbedder(nn.Module):
    """The pooled prompt [n, pooled_dim] -> [n, hidden]."""

    def __init__(self, pooled_dim: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(pooled_dim, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(pooled)))  # type: ignore[no-any-return]


class PatchEmbedder(nn.Module):
    """Latents [channels, T, H, W] -> tokens [T * H/2 * W/2, hidden], frame by frame, row by row."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        return self.proj(latents[None])[0].flatten(1).T  # type: ignore[no-any-return]


class TextProjection(nn.Module):
    """linear_1, SiLU, linear_2: the mean prompt row -> part of the refiner's conditioning."""

    def __init__(self, text_dim: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_dim, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, rows: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(rows)))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """fc1, activation, fc2."""

    def __init__(self, hidden: int, inner: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, inner)
        self.act = activation
        self.fc2 = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class RefinerBlock(nn.Module):
    """Plain transformer block over the prompt rows, with two gates from the conditioning and no shift or scale."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(hidden, eps=REFINER_EPS)
        self.self_attn_qkv = nn.Linear(hidden, 3 * hidden)
        self.self_attn_proj = nn.Linear(hidden, hidden)
        self.norm2 = nn.LayerNorm(hidden, eps=REFINER_EPS)
        self.mlp = Mlp(hidden, config.mlp_hidden, nn.SiLU())
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, conditioning: Tensor, attend: AttentionBackend) -> Tensor:
        attn_gate, mlp_gate = self.adaLN_modulation(conditioning).chunk(2, dim=-1)
        q, k, v = self.self_attn_qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        x = x + attn_gate * self.self_attn_proj(attend(q, k, v).flatten(-2))
        return x + mlp_gate * self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class TokenRefiner(nn.Module):
    """Prompt rows [tokens, text_dim] and the time -> txt tokens [tokens, hidden]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(config.text_dim, config.hidden_size)
        self.t_embedder = ScalarEmbedder(config.hidden_size)
        self.c_embedder = TextProjection(config.text_dim, config.hidden_size)
        self.individual_token_refiner = nn.Module()
        self.individual_token_refiner.blocks = nn.ModuleList(RefinerBlock(config) for _ in range(config.refiner_blocks))

    def forward(self, prompt_embeds: Tensor, timestep: Tensor, attend: AttentionBackend) -> Tensor:
        mean = prompt_embeds.float().mean(0, keepdim=True).to(prompt_embeds.dtype)
        conditioning = self.t_embedder(timestep) + self.c_embedder(mean)
        x: Tensor = self.input_embedder(prompt_embeds)
        for block in self.individual_token_refiner.blocks:  # type: ignore[union-attr]
            x = block(x, conditioning, attend)
        return x
