"""The transformer's forward pass for a batch, with the modules of `lowvram_i2v.dit`: training only.

The runtime has no batch axis, and one clip of the demo's size does not fill a GPU. The order of operations is that of
`dit/transformer.py` and `dit/blocks.py`, with a leading axis; a test compares the two. Prompts are padded at the end
here, where the runtime has no padding: padding attends to padding alone, as a sequence of its own for flash attention
on a GPU, by a mask on a CPU. The residual stream stays float32 under autocast.

Compiled means: one block of each kind, which all blocks of the kind share, so that clips with as many tokens share too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lowvram_i2v.dit.blocks import Rope
from lowvram_i2v.dit.embedders import ScalarEmbedder, scalar_frequencies
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer
from lowvram_i2v.kernels.qk_norm_rope import EPS, rotate_pairs

FLASH = True  # on a GPU, under autocast


@dataclass(frozen=True)
class Prompts:
    """rows [n, longest, text_dim]; lengths [n]: valid rows; pooled [n, pooled_dim]."""

    rows: Tensor
    lengths: Tensor
    pooled: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows, self.lengths, self.pooled

    def keys(self, img_tokens: int, flash: bool) -> Tensor:
        """Which tokens see which, for image tokens followed by rows. flash: where sequences begin, int32 [2 n + 1],
        real tokens and padding by turns; else a mask [n, 1, 1, tokens] of what is real."""
        longest = self.rows.shape[1]
        if not flash:
            valid = torch.arange(longest, device=self.rows.device) < self.lengths[:, None]
            return F.pad(valid, (img_tokens, 0), value=True)[:, None, None]
        first = torch.arange(len(self.lengths), device=self.rows.device) * (img_tokens + longest)
        bounds = torch.stack([first, first + img_tokens + self.lengths], dim=1).flatten()
        return F.pad(bounds, (0, 1), value=len(self.lengths) * (img_tokens + longest)).int()


def velocity(
    model: HunyuanVideoTransformer,
    latents: Tensor,
    timesteps: Tensor,
    prompts: Prompts,
    guidance: float,
    rope: Rope,
    compiled: bool = False,
) -> Tensor:
    """latents [n, 16, T, H, W] with the picture's latent in frame 0, timesteps [n] on 0..1000 -> [n, 16, T, H, W]."""
    grid = [size // patch for size, patch in zip(latents.shape[2:], model.config.patch_size, strict=True)]
    first, flash = grid[1] * grid[2], FLASH and latents.is_cuda and torch.is_autocast_enabled("cuda")
    refined, double, single, last = _compiled() if compiled else (_refined, _double, _single, _last)
    vectors = _vectors(model, timesteps, prompts.pooled, guidance)
    time = _scalar(model.txt_in.t_embedder, timesteps)
    txt = refined(model.txt_in, prompts.rows, prompts.lengths, time, prompts.keys(0, flash))
    img = _patches(model, latents)
    keys = prompts.keys(img.shape[1], flash)
    for block in model.double_blocks:
        img, txt = double(block, img, txt, vectors, first, rope, keys)
    x = torch.cat([img, txt], dim=1)
    for block in model.single_blocks:
        x = single(block, x, vectors, first, rope, keys)
    tokens = last(model.final_layer, x[:, : img.shape[1]], vectors[:, 0])
    (t, h, w), (pt, ph, pw) = grid, model.config.patch_size
    pattern = "n (t h w) (c pt ph pw) -> n c (t pt) (h ph) (w pw)"
    made: Tensor = rearrange(tokens, pattern, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)
    return made


@cache
def _compiled() -> tuple[Any, ...]:
    return tuple(torch.compile(part, dynamic=False) for part in (_refined, _double, _single, _last))


def _patches(model: HunyuanVideoTransformer, latents: Tensor) -> Tensor:
    """[n, tokens, hidden] float32: the convolution of patches as the product that it is."""
    pt, ph, pw = model.config.patch_size
    pattern = "n c (t pt) (h ph) (w pw) -> n (t h w) (c pt ph pw)"
    proj = model.img_in.proj
    return F.linear(rearrange(latents, pattern, pt=pt, ph=ph, pw=pw), proj.weight.flatten(1), proj.bias).float()


def _vectors(model: HunyuanVideoTransformer, timesteps: Tensor, pooled: Tensor, guidance: float) -> Tensor:
    """[n, 2, hidden]: for all tokens, and for those of the first frame (time 0, no guidance)."""
    prompt = model.vector_in(pooled)
    time, guided = _scalar(model.time_in, timesteps), torch.full_like(timesteps, guidance * 1000)
    own = time + prompt + _scalar(model.guidance_in, guided)
    return torch.stack([own, _scalar(model.time_in, torch.zeros_like(timesteps)) + prompt], dim=1)


def _scalar(embedder: ScalarEmbedder, value: Tensor) -> Tensor:
    """As the embedder does it; its table is made once, not copied to the GPU in every step."""
    angles = value.float()[:, None] * _frequencies(value.device)
    return embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))  # type: ignore[no-any-return]


@cache
def _frequencies(device: torch.device) -> Tensor:
    return scalar_frequencies().to(device)


def _refined(refiner: Any, rows: Tensor, lengths: Tensor, time: Tensor, keys: Tensor) -> Tensor:
    """time: its time embedder's. [n, longest, hidden] float32."""
    mean = rows.sum(1) / lengths[:, None]  # rows beyond a prompt's own are zero
    conditioning = time + refiner.c_embedder(mean)
    x = refiner.input_embedder(rows).float()
    for block in refiner.individual_token_refiner.blocks:
        attn_gate, mlp_gate = block.adaLN_modulation(conditioning)[:, None].chunk(2, dim=-1)
        q, k, v = block.self_attn_qkv(block.norm1(x)).unflatten(-1, (3, block.heads, -1)).unbind(-3)
        x = x + attn_gate.float() * block.self_attn_proj(_attend(q, k, v, keys))
        x = x + mlp_gate.float() * block.mlp(block.norm2(x))
    return x  # type: ignore[no-any-return]


def _double(
    block: Any, img: Tensor, txt: Tensor, vectors: Tensor, first: int, rope: Rope, keys: Tensor
) -> tuple[Tensor, Tensor]:
    tokens = img.shape[1]
    img_mod = [_by_token(value, first, tokens) for value in block.img_mod(vectors)]
    txt_mod = block.txt_mod(vectors[:, :1])
    img_q, img_k, img_v = _heads(block.img_attn_qkv(_modulated(img, *img_mod[:2])), block.heads)
    txt_q, txt_k, txt_v = _heads(block.txt_attn_qkv(_modulated(txt, *txt_mod[:2])), block.heads)
    q = torch.cat([_normed(img_q, block.img_attn_q_norm, rope), _normed(txt_q, block.txt_attn_q_norm, None)], dim=1)
    k = torch.cat([_normed(img_k, block.img_attn_k_norm, rope), _normed(txt_k, block.txt_attn_k_norm, None)], dim=1)
    attended = _attend(q, k, torch.cat([img_v, txt_v], dim=1), keys)
    img = img + img_mod[2] * block.img_attn_proj(attended[:, :tokens])
    img = img + img_mod[5] * block.img_mlp(_modulated(img, *img_mod[3:5]))
    txt = txt + txt_mod[2].float() * block.txt_attn_proj(attended[:, tokens:])
    return img, txt + txt_mod[5].float() * block.txt_mlp(_modulated(txt, *txt_mod[3:5]))


def _single(block: Any, x: Tensor, vectors: Tensor, first: int, rope: Rope, keys: Tensor) -> Tensor:
    shift, scale, gate = (_by_token(value, first, x.shape[1]) for value in block.modulation(vectors))
    qkv, mlp = block.linear1(_modulated(x, shift, scale)).tensor_split([3 * block.hidden], dim=-1)
    q, k, v = _heads(qkv, block.heads)
    attended = _attend(_normed(q, block.q_norm, rope), _normed(k, block.k_norm, rope), v, keys)
    return x + gate * block.linear2(torch.cat([attended, F.gelu(mlp, approximate="tanh")], dim=-1))  # type: ignore[no-any-return]


def _last(layer: Any, x: Tensor, vectors: Tensor) -> Tensor:
    """vectors [n, hidden] -> the values of the patches, float32."""
    shift, scale = layer.modulation(vectors)
    return layer.linear(_modulated(x, shift[:, None], scale[:, None])).float()  # type: ignore[no-any-return]


def _by_token(values: Tensor, first: int, tokens: int) -> Tensor:
    """[n, 2, hidden] -> [n, tokens, hidden] float32: row 1 for the first tokens, row 0 for the others."""
    n, _, hidden = values.shape
    values = values.float()
    parts = [values[:, 1:].expand(n, first, hidden), values[:, :1].expand(n, tokens - first, hidden)]
    return torch.cat(parts, dim=1)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale.float()) + shift.float()


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """[n, tokens, 3 * hidden] -> q, k, v, each [n, tokens, heads, dim]."""
    return qkv.reshape(*qkv.shape[:2], 3, heads, -1).unbind(2)


def _normed(x: Tensor, norm: Any, rope: Rope | None) -> Tensor:
    """RMS norm over a head; the tokens that the table has are rotated."""
    normed = F.rms_norm(x.float(), x.shape[-1:], norm.weight, EPS)
    if rope is None:
        return normed.to(x.dtype)
    rotated = len(rope[0])
    return torch.cat([rotate_pairs(normed[:, :rotated], *rope), normed[:, rotated:]], dim=1).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """[n, tokens, heads, dim] -> [n, tokens, heads * dim]. keys: of `Prompts.keys`."""
    if keys.dtype == torch.bool:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).flatten(2)
    from torch.nn.attention.varlen import varlen_attn  # takes the compiler with it, which other processes do not need

    n, tokens, heads, dim = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    attended = varlen_attn(q, k, v, keys, keys, tokens, tokens)
    assert isinstance(attended, Tensor)
    return attended.reshape(n, tokens, heads * dim)
