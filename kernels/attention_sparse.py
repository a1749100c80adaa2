# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Block-sparse attention on the loop of `attention_int8`: blocks of keys that matter exactly, the others as one key.

Each block of queries has a list of key blocks, those whose mean key scores highest with its mean query, and `always`
(text, the first frame). A block that is not on the list is not dropped: its mean key, with log2 of its length added to
the score, and its mean value stand for it, so no part of a row's sum is lost. Blocks are good only if neighbouring
tokens are alike: `brick_order` walks through the video in bricks of 4x4x4 tokens.

Cost: `density` of dense attention, 1/64 for the means, and a matrix product of means. Approximate: the error depends on
the video, so nothing uses this by itself.

Invariants: those of `attention_int8`; every list has the same length and holds the last, ragged block; no list is made
on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowvram_i2v.kernels.attention_int8 import multiply_values, quantize_rows, score_tile
from lowvram_i2v.kernels.attention_launch import LOG2_E, launch_options, on_device
from lowvram_i2v.kernels.attention_quantize import Quantized, encode, padded_length, quantize, statistics
from lowvram_i2v.kernels.attention_tiles import Tile

BRICK = 4


@dataclass(frozen=True)
class Route:
    """blocks [heads, query blocks, kept] int32, ascending: which key blocks each query block sees exactly.
    skipped [heads, query blocks, padded key blocks] uint8: 1 where a block's mean stands for it."""

    blocks: Tensor
    skipped: Tensor


def brick_order(frames: int, height: int, width: int) -> Tensor:
    """Tokens of a video [frames, height, width] in the order of bricks of 4x4x4, walked to and fro: int64 indices."""
    t, y, x = torch.meshgrid(*(torch.arange(n) for n in (frames, height, width)), indexing="ij")
    key = torch.zeros_like(t)
    back = torch.zeros_like(t)
    for place, size in ((t, frames), (y, height), (x, width)):
        bricks = -(-size // BRICK)
        brick = place // BRICK
        brick = torch.where(back % 2 == 1, bricks - 1 - brick, brick)
        key, back = key * bricks + brick, back + brick
    for place in (t, y, x):
        key = key * BRICK + place % BRICK
    return torch.argsort(key.flatten(), stable=True)


def block_means(x: Tensor, size: int) -> Tensor:
    """x [tokens, heads, dim] -> means of blocks of `size` tokens, [blocks, heads, dim] float32."""
    whole = len(x) // size
    means = x[: whole * size].reshape(whole, size, *x.shape[1:]).mean(1, dtype=torch.float32)
    rest = x[whole * size :]
    return torch.cat([means, rest.mean(0, keepdim=True, dtype=torch.float32)]) if len(rest) else means


def route(q: Tensor, key_means: Tensor, always: Tensor, tile: Tile, density: float) -> Route:
    """Which key blocks each block of `tile.rows` queries sees: the share `density` with the highest scores of means.

    key_means [blocks, heads, dim], always [blocks] bool: blocks that everyone sees; the last one should be among them.
    """
    count = len(key_means)
    kept = min(count, max(1, round(density * count)))
    scores = torch.einsum("qhd,khd->hqk", block_means(q, tile.rows), key_means)
    scores = scores.masked_fill_(always, float("inf"))
    blocks = scores.topk(kept, dim=-1).indices.sort(-1).values
    skipped = torch.ones(*scores.shape[:2], padded_length(count, tile), dtype=torch.uint8, device=q.device)
    skipped[..., count:] = 0
    return Route(blocks.int(), skipped.scatter_(2, blocks, 0))


@triton.jit(do_not_specialize=["n_q", "n_kv", "kept"])
def sparse_kernel(
    q, k, k_scale, v, mean_k, mean_k_scale, mean_v, v_scale, v_centre, out, blocks, skipped,
    q_stride, q_head_stride, out_stride, out_head_stride, n_q, n_kv, kept, padded, mean_padded, factor,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, PV: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """As `int8_kernel`; mean_k, mean_v hold one code row a block, LENGTH is log2 of a whole block's length."""
    EIGHT: tl.constexpr = PV == "fp8" or PV == "fp8_acc16" or PV == "fp8_scaled"
    SHIFT: tl.constexpr = 8.0 if EIGHT else 0.0
    start = tl.program_id(0).to(tl.int64) * ROWS
    head = tl.program_id(1).to(tl.int64)
    exists = start + tl.arange(0, ROWS) < n_q
    keys = tl.arange(0, KEYS)
    channels = tl.arange(0, DIM)
    q += head * q_head_stride + start * q_stride
    out += head * out_head_stride + start * out_stride
    q_codes, q_scale = quantize_rows(q, out, exists, q_stride, out_stride, factor, ROWS, DIM)
    k_at = k + head * padded * DIM + keys[:, None] * DIM + channels[None, :]
    mean_k_at = mean_k + head * mean_padded * DIM + keys[:, None] * DIM + channels[None, :]
    if EIGHT:
        v_at = v + head * padded * DIM + channels[:, None].to(tl.int64) * padded + keys[None, :]
        mean_v_at = mean_v + head * mean_padded * DIM + channels[:, None] * mean_padded + keys[None, :]
        v_step = KEYS
    else:
        v_at = v + head * padded * DIM + keys[:, None] * DIM + channels[None, :]
        mean_v_at = mean_v + head * mean_padded * DIM + keys[:, None] * DIM + channels[None, :]
        v_step = KEYS * DIM
    m = tl.full([ROWS], -float("inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    row = head * tl.num_programs(0) + tl.program_id(0)
    for i in tl.range(0, kept):
        block = tl.load(blocks + row * kept + i)
        scale = q_scale * tl.load(k_scale + head * (padded // KEYS) + block)
        p, alpha, m, l = score_tile(q_codes, tl.load(k_at + block * (KEYS * DIM)), scale, m, l, SHIFT)
        acc = multiply_values(p, tl.load(v_at + block * v_step), acc * alpha[:, None], PV, ROWS, KEYS, DIM)
    l -= (tl.cdiv(n_kv, KEYS) * KEYS - n_kv) * tl.math.exp2(-m)
    for i in tl.range(0, mean_padded // KEYS):
        scale = q_scale * tl.load(mean_k_scale + head * (mean_padded // KEYS) + i)
        stands = tl.load(skipped + row * mean_padded + i * KEYS + keys)
        bias = tl.where(stands != 0, LENGTH, -float("inf"))
        s = tl.dot(q_codes, tl.trans(tl.load(mean_k_at + i * KEYS * DIM)), out_dtype=tl.int32).to(tl.float32)
        s = s * scale[:, None] + bias[None, :]
        m_new = tl.maximum(m, tl.max(s, 1) - SHIFT)
        p = tl.math.exp2(s - m_new[:, None])
        alpha = tl.math.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        acc = multiply_values(p, tl.load(mean_v_at + i * v_step), acc * alpha[:, None], PV, ROWS, KEYS, DIM)
        m = m_new
    scale = tl.load(v_scale + head * DIM + channels)
    centre = tl.load(v_centre + head * DIM + channels)
    values = (acc / l[:, None]) * scale[None, :] + centre[None, :]
    at = out + tl.arange(0, ROWS).to(tl.int64)[:, None] * out_stride + channels[None, :]
    tl.store(at, values.to(out.dtype.element_ty), mask=exists[:, None])


def attend_routed(
    q: Tensor, kv: Quantized, means: Quantized, chosen: Route, tile: Tile, out: Tensor | None = None
) -> Tensor:
    """Attention of q [queries, heads, dim] over chosen blocks of `kv` and means of the others. `out` may be q."""
    tokens, heads, dim = q.shape
    out = q.new_empty(q.shape) if out is None else out
    with on_device(q):
        sparse_kernel[(triton.cdiv(tokens, tile.rows), heads)](
            q, kv.k, kv.k_scale, kv.v, means.k, means.k_scale, means.v, kv.v_scale, kv.v_centre, out,
            chosen.blocks, chosen.skipped, *q.stride()[:2], *out.stride()[:2],
            tokens, kv.tokens, chosen.blocks.shape[2], kv.k.shape[1], means.k.shape[1], LOG2_E * dim**-0.5,
            ROWS=tile.rows, KEYS=tile.keys, DIM=dim, PV=tile.pv, LENGTH=tile.keys.bit_length() - 1,
            **launch_options(tile),
        )  # fmt: skip
    return out


def attend(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, density: float, always: Tensor, out: Tensor | None = None
) -> Tensor:
    """q, k, v [tokens, heads, dim] -> [tokens, heads, dim], with the share `density` of key blocks exact.

    always [key blocks of tile.keys tokens] bool, on q's device, true for the last. `density` must leave room for them.
    """
    centres = statistics(k, v)
    key_means, value_means = block_means(k, tile.keys), block_means(v, tile.keys)
    kv = quantize(k, v, tile, centres)
    means = encode(key_means, value_means, tile, centres)
    return attend_routed(q, kv, means, route(q, key_means - centres[0], always, tile, density), tile, out)
