"""Attention and its quantization as plain torch: what the Triton kernels must compute, and what they are measured by.

`attention` is the definition, in float32 and row chunks, so that it also runs where scores do not fit in memory.
`quantize_queries`, `quantize_keys` and `quantize_values` give the kernels' codes, up to the rounding of sums.
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


def rotation(dim: int) -> Tensor:
    """sqrt(dim) times an orthogonal matrix, [dim, dim] of 1 and -1; dim is a power of two. Hadamard's matrix, with the
    signs of a Golay-Rudin-Shapiro sequence on its rows: a single channel goes to all channels in equal parts, and a
    vector of equal channels to all of them or half of them."""
    row = torch.arange(dim)
    bits = (row[:, None] & row) ^ (row & (row >> 1))[:, None]
    for shift in (16, 8, 4, 2, 1):
        bits = bits ^ (bits >> shift)
    return 1.0 - 2.0 * (bits & 1)


def turn(x: Tensor) -> Tensor:
    """x [..., channels] rotated, sqrt(channels) times as long, float32."""
    return x.float() @ rotation(x.shape[-1]).to(x.device)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., channels] -> int8 codes and the scale of each row, halves rounded to even."""
    scale = (x.float().abs().amax(-1) / 127).clamp_min(2.0**-60)
    return torch.round(x.float() * (1 / scale)[..., None]).to(torch.int8), scale


def quantize_queries(q: Tensor) -> tuple[Tensor, Tensor]:
    """q [..., channels] -> codes of the turned rows and scales; their products with those of the keys are q k."""
    codes, scale = quantize_rows(turn(q))
    return codes, scale / q.shape[-1]


def sampled_tokens(tokens: int, every: int, run: int) -> Tensor:
    """One token in `every`: in each run of `run` tokens the next of them. The mean of K is theirs."""
    group = torch.arange(-(-tokens // every))
    found = group * every + group * every // run % every
    return found[found < tokens]


def quantize_keys(k: Tensor, centre: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """k [tokens, heads, dim] minus centre [heads, dim] in bf16, turned -> codes [heads, padded, dim] and scales [heads,
    tiles]."""
    x = (turn(k) - turn(centre.bfloat16())).transpose(0, 1)
    x = torch.nn.functional.pad(x, (0, 0, 0, -len(k) % keys))
    tiles = x.reshape(len(x), -1, keys * k.shape[2])
    codes, scales = quantize_rows(tiles)
    return codes.reshape(x.shape), scales


def quantize_values(v: Tensor, centre: Tensor, scale: Tensor, padded: int, transposed: bool) -> Tensor:
    """v [tokens, heads, dim] as (v - centre) / scale: fp16 [heads, padded, dim], or e4m3 [heads, dim, padded], whose
    groups of 16 tokens are in the order of `attention_int8.permute_columns`."""
    x = ((v.float() - centre) * (1 / scale)).transpose(0, 1)
    x = torch.nn.functional.pad(x, (0, 0, 0, padded - len(v)))
    if not transposed:
        return x.to(torch.float16)
    groups = x.transpose(1, 2).reshape(len(x), v.shape[2], -1, 2, 4, 2)
    return groups.transpose(3, 4).reshape(len(x), v.shape[2], padded).to(torch.float8_e4m3fn)


def relative_l2(result: Tensor, expected: Tensor) -> float:
    """|result - expected| / |expected|, in float32. Waits for the device."""
    return float((result.float() - expected.float()).norm() / expected.float().norm())
