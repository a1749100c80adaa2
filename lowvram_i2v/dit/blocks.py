"""The two kinds of block. Image tokens come first, text tokens after them; there is no batch axis and no mask.

A block gets its modulation from outside: the layers that make it (`img_mod`, `txt_mod`, `modulation`) bear the block's
name, but they run before the loop (`dit/conditioning.py`). The image-to-video rule "the first frame's tokens use the
second vector" lives in the ops (`first_tokens`), not here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowvram_i2v.attention import AttentionBackend
from lowvram_i2v.dit.conditioning import IMG_PARTS, SINGLE_PARTS, TXT_PARTS, StreamModulation
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.dit.embedders import Mlp
from lowvram_i2v.kernels.modulate import gated_residual, layer_norm_modulate
from lowvram_i2v.kernels.qk_norm_rope import qk_norm_rope

Rope = tuple[Tensor, Tensor]


class Modulation(nn.Module):
    """SiLU and a linear layer: vectors [n, hidden] -> `parts` shift, scale or gate tensors, each [n, hidden]."""

    def __init__(self, hidden: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(hidden, parts * hidden)

    def forward(self, vectors: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(vectors)).chunk(self.parts, dim=-1)  # type: ignore[no-any-return]


class HeadNorm(nn.Module):
    """The weight of the RMS norm over a head's channels; `qk_norm_rope` applies it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class DoubleBlock(nn.Module):
    """Image and text have their own weights and meet in one attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.head_dim
        self.heads = config.heads
        self.img_mod = Modulation(hidden, IMG_PARTS)
        self.img_attn_qkv = nn.Linear(hidden, 3 * hidden)
        self.img_attn_q_norm = HeadNorm(dim)
        self.img_attn_k_norm = HeadNorm(dim)
        self.img_attn_proj = nn.Linear(hidden, hidden)
        self.img_mlp = Mlp(hidden, config.mlp_hidden, nn.GELU(approximate="tanh"))
        self.txt_mod = Modulation(hidden, TXT_PARTS)
        self.txt_attn_qkv = nn.Linear(hidden, 3 * hidden)
        self.txt_attn_q_norm = HeadNorm(dim)
        self.txt_attn_k_norm = HeadNorm(dim)
        self.txt_attn_proj = nn.Linear(hidden, hidden)
        self.txt_mlp = Mlp(hidden, config.mlp_hidden, nn.GELU(approximate="tanh"))

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        modulation: tuple[StreamModulation, StreamModulation],
        first_tokens: int,
        rope: Rope,
        attend: AttentionBackend,
    ) -> tuple[Tensor, Tensor]:
        """img [image tokens, hidden], txt [text tokens, hidden] -> the same, one block later."""
        img_mod, txt_mod = modulation

        normed = layer_norm_modulate(img, img_mod.shift1, img_mod.scale1, first_tokens)
        img_q, img_k, img_v = split_heads(self.img_attn_qkv(normed), self.heads)
        img_q = qk_norm_rope(img_q, self.img_attn_q_norm.weight, rope)
        img_k = qk_norm_rope(img_k, self.img_attn_k_norm.weight, rope)

        normed = layer_norm_modulate(txt, txt_mod.shift1, txt_mod.scale1)
        txt_q, txt_k, txt_v = split_heads(self.txt_attn_qkv(normed), self.heads)
        txt_q = qk_norm_rope(txt_q, self.txt_attn_q_norm.weight, None)
        txt_k = qk_norm_rope(txt_k, self.txt_attn_k_norm.weight, None)

        attended = attend(torch.cat([img_q, txt_q]), torch.cat([img_k, txt_k]), torch.cat([img_v, txt_v])).flatten(1)

        img = gated_residual(img, self.img_attn_proj(attended[: len(img)]), img_mod.gate1, first_tokens)
        normed = layer_norm_modulate(img, img_mod.shift2, img_mod.scale2, first_tokens)
        img = gated_residual(img, self.img_mlp(normed), img_mod.gate2, first_tokens)

        txt = gated_residual(txt, self.txt_attn_proj(attended[len(img) :]), txt_mod.gate1)
        normed = layer_norm_modulate(txt, txt_mod.shift2, txt_mod.scale2)
        txt = gated_residual(txt, self.txt_mlp(normed), txt_mod.gate2)
        return img, txt


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the joint sequence, with one linear layer in and one out."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.heads, self.hidden = config.heads, hidden
        self.modulation = Modulation(hidden, SINGLE_PARTS)
        self.linear1 = nn.Linear(hidden, 3 * hidden + config.mlp_hidden)
        self.q_norm = HeadNorm(config.head_dim)
        self.k_norm = HeadNorm(config.head_dim)
        self.linear2 = nn.Linear(hidden + config.mlp_hidden, hidden)

    def forward(
        self,
        x: Tensor,
        modulation: tuple[Tensor, ...],
        first_tokens: int,
        rope: Rope,
        attend: AttentionBackend,
    ) -> Tensor:
        """x [image tokens + text tokens, hidden] -> the same, one block later."""
        shift, scale, gate = modulation
        normed = layer_norm_modulate(x, shift, scale, first_tokens)
        qkv, mlp = self.linear1(normed).tensor_split([3 * self.hidden], dim=-1)
        q, k, v = split_heads(qkv, self.heads)
        q = qk_norm_rope(q, self.q_norm.weight, rope)
        k = qk_norm_rope(k, self.k_norm.weight, rope)
        attended = attend(q, k, v).flatten(1)
        y = self.linear2(torch.cat([attended, F.gelu(mlp, approximate="tanh")], dim=-1))
        return gated_residual(x, y, gate, first_tokens)


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """[tokens, 3 * hidden] -> q, k, v, each [tokens, heads, dim]."""
    return qkv.reshape(len(qkv), 3, heads, -1).unbind(1)
