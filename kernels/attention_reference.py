"""Attention and its quantization as plain torch: what the Triton kernels must compute, and what they are measured by.

`attention` is the definition, in float32 and row chunks, so that it also runs where scores do not fit in memory.
`quantize_keys` and `quantize_values` give the kernels' codes bit for bit, up to the rounding of the means.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROWS = 1024
"""Queries of one chunk."""


def attention(q: Tensor, k: Tensor, v: Tensor, rows: slice = slice(None)) -> Tensor:
    """softmax(q k^T / sqrt(dim)) v in float32: [tokens, heads, dim] each; `rows` picks queries."""
    queries, keys, values = (x.float().transpose(0, 1) for x in (q[rows], k, v))
    scale = q.shape[2] ** -0.5
    chunks = [
        torch.softmax(part @ keys.transpose(1, 2) * scale, -1) @ values for part in torch.split(queries, ROWS, dim=1)
    ]
    return torch.cat(chunks, dim=1).transpose(0, 1)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, rows: int, keys: int) -> Tensor:
    """Attention where block i of `rows` queries sees the key blocks blocks[head, i] and the means of all others, each
    with log(its length) added to its score. Float32; builds every query block's own list of keys."""
    q, k, v = (x.float().transpose(0, 1) for x in (q, k, v))
    result = torch.empty_like(q)
    pieces = list(zip(torch.split(k, keys, 1), torch.split(v, keys, 1), strict=True))
    for head, part in ((head, part) for head in range(len(q)) for part in range(blocks.shape[1])):
        kept = set(blocks[head, part].tolist())
        scores, values = [], []
        mine = slice(part * rows, (part + 1) * rows)
        for index, (k_piece, v_piece) in enumerate(pieces):
            length, exact = k_piece.shape[1], index in kept
            seen = k_piece[head] if exact else k_piece[head].mean(0, keepdim=True)
            scores.append(q[head, mine] @ seen.T * q.shape[2] ** -0.5 + (0 if exact else math.log(length)))
            values.append(v_piece[head] if exact else v_piece[head].mean(0, keepdim=True))
        result[head, mine] = torch.softmax(torch.cat(scores, 1), 1) @ torch.cat(values)
    return result.transpose(0, 1)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., channels] -> int8 codes and the scale of each row, halves rounded upwards."""
    scale = (x.float().abs().amax(-1) / 127).clamp_min(2.0**-60)
    return torch.floor(x.float() * (1 / scale)[..., None] + 0.5).to(torch.int8), scale


def quantize_keys(k: Tensor, centre: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """k [tokens, heads, dim] minus centre [heads, dim] -> codes [heads, padded, dim] and scales [heads, tiles]."""
    x = (k.float() - centre).transpose(0, 1)
    x = torch.nn.functional.pad(x, (0, 0, 0, -len(k) % keys))
    tiles = x.reshape(len(x), -1, keys * k.shape[2])
    codes, scales = quantize_rows(tiles)
    return codes.reshape(x.shape), scales


def quantize_values(v: Tensor, centre: Tensor, scale: Tensor, padded: int, transposed: bool) -> Tensor:
    """v [tokens, heads, dim] as (v - centre) / scale: fp16 [heads, padded, dim], or e4m3 [heads, dim, padded], whose
    groups of 16 tokens are ordered 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15."""
    x = ((v.float() - centre) * (1 / scale)).transpose(0, 1)
    x = torch.nn.functional.pad(x, (0, 0, 0, padded - len(v)))
    if not transposed:
        return x.to(torch.float16)
    groups = x.transpose(1, 2).reshape(len(x), v.shape[2], -1, 2, 4, 2)
    return groups.transpose(3, 4).reshape(len(x), v.shape[2], padded).to(torch.float8_e4m3fn)


def relative_l2(result: Tensor, expected: Tensor) -> float:
    """|result - expected| / |expected|, in float32. Waits for the device."""
    return float((result.float() - expected.float()).norm() / expected.float().norm())
