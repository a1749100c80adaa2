# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Block-sparse attention on the loop of `attention_int8`: blocks of keys that matter exactly, the others as one key.

`attention_route` is the same in plain torch and says what is computed, `attention_cut` which blocks are always seen and
what is allocated, `attention_lists` makes the lists. Blocks are good only if neighbouring tokens are alike: the model's
image tokens come in the order of `dit/token_order.py`.

Cost: `density` of dense attention, 1/64 for the means (blocks on every list have none), a pass over Q (that over V
dense attention has too), a matrix product of means. It is approximate, and the error depends on the video, so nothing
uses this by itself.

Invariants: those of `attention_int8`; every list has the same length and holds the last, ragged block; no list is made
on the host, and nothing waits for the device. Long lists (of text tokens, which see everything) start first, in all
heads: one that starts late is still running when the others have ended.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowvram_i2v.kernels.attention_cut import Cut
from lowvram_i2v.kernels.attention_int8 import multiply_values, quantize_rows, score_tile
from lowvram_i2v.kernels.attention_launch import LOG2_E, check_inputs, launch_options, on_device
from lowvram_i2v.kernels.attention_lists import Lists, choose, mean_blocks
from lowvram_i2v.kernels.attention_quantize import (
    PASSES,
    Centres,
    Pass,
    Passes,
    Quantized,
    encode,
    encode_keys,
    encode_values,
)
from lowvram_i2v.kernels.attention_tiles import Tile

NO_SCORE = tl.constexpr(-1e30)
"""Lower than any, and finite: the first scores may all be masked."""
OF_MEANS = Passes(keys=Pass(1, 4, 1), values=Pass(1, 4, 1))
"""Means are few: a program takes one tile of them."""
WITH_MEANS = PASSES.keys
"""The pass over K that also makes means."""
MEAN_STAGES = 3
"""Of the loop over means: with 2 a tile waits for its own loads."""


@triton.jit
def load_bits(words, places, SIZE: tl.constexpr):
    """The bits of words of 32 at places 0 .. SIZE, which come as a vector."""
    word = tl.load(words)
    for other in tl.static_range(1, SIZE // 32):
        word = tl.where(places < 32 * other, word, tl.load(words + other))
    return (word >> places % 32) & 1


@triton.jit(do_not_specialize=["n_q", "n_kv", "kept", "heads", "query_blocks", "text_from"])
def sparse_kernel(
    q, k, k_scale, v, mean_k, mean_k_scale, mean_v, v_scale, v_centre, out, blocks, skipped, every,
    q_stride, q_head_stride, out_stride, out_head_stride,
    n_q, n_kv, kept, heads, query_blocks, text_from, padded, mean_padded, factor,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, PV: tl.constexpr, LENGTH: tl.constexpr,
    MEAN_STAGES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `int8_kernel`; mean_k, mean_v hold one code row a block, LENGTH is log2 of a whole block's length, every is
    0, 1, 2, ... Rows of the grid: first one for each block of queries with a long list, a program for each head; then
    one for each head, a program for each other block. The grid is as wide as the wider of them needs."""
    EIGHT: tl.constexpr = PV == "fp8" or PV == "fp8_acc16" or PV == "fp8_scaled"
    SHIFT: tl.constexpr = 8.0 if EIGHT else 0.0
    later = query_blocks - text_from
    long = tl.program_id(1) < later
    if tl.program_id(0) >= tl.where(long, heads, text_from):
        return
    part = tl.where(long, text_from + tl.program_id(1), tl.program_id(0))
    head = tl.where(long, tl.program_id(0), tl.program_id(1) - later).to(tl.int64)
    start = part.to(tl.int64) * ROWS
    exists = start + tl.arange(0, ROWS) < n_q
    keys = tl.arange(0, KEYS)
    channels = tl.arange(0, DIM)
    q += head * q_head_stride + start * q_stride
    own = out + head * out_head_stride + start * out_stride
    q_codes, q_scale = quantize_rows(q, own, exists, q_stride, out_stride, factor, ROWS, DIM)
    k_at = keys[:, None] * DIM + channels[None, :]
    m = tl.full([ROWS], NO_SCORE, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    row = head * query_blocks + part
    whole = part >= text_from
    mean_k += head * mean_padded * DIM
    mean_v += head * mean_padded * DIM
    mean_k_scale += head * (mean_padded // KEYS)
    skipped += row * (mean_padded // 32)
    if EIGHT:
        v_at = channels[:, None] * mean_padded + keys[None, :]
        v_step = KEYS
    else:
        v_at = k_at
        v_step = KEYS * DIM
    for i in tl.range(0, tl.where(whole, 0, mean_padded // KEYS), num_stages=MEAN_STAGES):
        scale = q_scale * tl.load(mean_k_scale + i)
        bias = tl.where(load_bits(skipped + i * (KEYS // 32), keys, KEYS) == 1, LENGTH, -float("inf"))
        s = tl.dot(q_codes, tl.trans(tl.load(mean_k + i * (KEYS * DIM) + k_at)), out_dtype=tl.int32).to(tl.float32)
        s = s * scale[:, None] + bias[None, :]
        m_new = tl.maximum(m, tl.max(s, 1) - SHIFT)
        p = tl.math.exp2(s - m_new[:, None])
        alpha = tl.math.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        acc = multiply_values(p, tl.load(mean_v + i * v_step + v_at), acc * alpha[:, None], PV, ROWS, KEYS, DIM)
        m = m_new
    head += tl.program_id(
        2
    )  # it is 0, but the compiler does not know: it makes addresses anew, and keeps none in loops
    k += head * padded * DIM
    v += head * padded * DIM
    k_scale += head * (padded // KEYS)
    if EIGHT:
        v_at = channels[:, None] * padded + keys[None, :]
    listed = tl.where(whole, every, blocks + row * kept)
    for i in tl.range(0, tl.where(whole, tl.cdiv(n_kv, KEYS), kept), num_stages=STAGES):
        block = tl.load(listed + i)
        scale = q_scale * tl.load(k_scale + block)
        p, alpha, m, l = score_tile(q_codes, tl.load(k + block * (KEYS * DIM) + k_at), scale, m, l, SHIFT)
        acc = multiply_values(p, tl.load(v + block * v_step + v_at), acc * alpha[:, None], PV, ROWS, KEYS, DIM)
    l -= (tl.cdiv(n_kv, KEYS) * KEYS - n_kv) * tl.math.exp2(-m)
    scale = tl.load(v_scale + head * DIM + channels)
    centre = tl.load(v_centre + head * DIM + channels)
    values = (acc / l[:, None]) * scale[None, :] + centre[None, :]
    start = (part + tl.program_id(2)).to(tl.int64) * ROWS
    out += head * out_head_stride + start * out_stride
    at = out + tl.arange(0, ROWS).to(tl.int64)[:, None] * out_stride + channels[None, :]
    tl.store(at, values.to(out.dtype.element_ty), mask=(start + tl.arange(0, ROWS) < n_q)[:, None])


def attend_routed(
    q: Tensor, kv: Quantized, means: Quantized, chosen: Lists, cut: Cut, tile: Tile, out: Tensor | None = None
) -> Tensor:
    """Attention of q [tokens, heads, dim] over chosen blocks of `kv` and means of the others. `out` may be q."""
    dim = q.shape[2]
    out = q.new_empty(q.shape) if out is None else out
    heads, text_from = q.shape[1], min(cut.text_from, cut.query_blocks)
    stages = 2 * tile.stages - 1  # half of them load the list, and as many as in dense attention the tiles it names
    every = torch.arange(cut.key_blocks, dtype=torch.int32, device=q.device)
    with on_device(q):
        sparse_kernel[(max(text_from, heads), cut.query_blocks - text_from + heads)](
            q, kv.k, kv.k_scale, kv.v, means.k, means.k_scale, means.v, kv.v_scale, kv.v_centre, out,
            chosen.blocks, chosen.skipped, every, *q.stride()[:2], *out.stride()[:2],
            cut.tokens, kv.tokens, cut.kept, heads, cut.query_blocks, text_from,
            kv.k.shape[1], means.k.shape[1], LOG2_E * dim**-0.5,
            ROWS=tile.rows, KEYS=tile.keys, DIM=dim, PV=tile.pv, LENGTH=tile.keys.bit_length() - 1,
            MEAN_STAGES=MEAN_STAGES, STAGES=stages, **launch_options(tile),
        )  # fmt: skip
    return out


def encode_means(k_means: Tensor, v_means: Tensor, cut: Cut, tile: Tile, centres: Centres) -> Quantized:
    """The codes of those means [heads, blocks, dim] that may stand for their block."""
    keys, values = (x[:, cut.means.start : cut.means.stop].transpose(0, 1) for x in (k_means, v_means))
    return encode(keys, values, tile, centres, OF_MEANS)


def attend(q: Tensor, k: Tensor, v: Tensor, tile: Tile, cut: Cut, out: Tensor | None = None) -> Tensor:
    """q, k, v [tokens, heads, dim] -> [tokens, heads, dim], cut as `cut` says with the tile's rows and keys.

    The codes of V come last: where they will lie is free while the lists are made.
    """
    check_inputs(q, k, v)
    if (cut.tokens, cut.rows, cut.keys) != (len(k), tile.rows, tile.keys) or len(q) != len(k):
        raise ValueError(f"{cut} is not a cut of {len(q)} queries and {len(k)} keys for tiles of {tile}")
    q_means, v_means, centres = mean_blocks(q, k, v, cut)
    k_means = torch.empty_like(v_means)
    keys = encode_keys(k, tile, centres, WITH_MEANS, k_means)
    mean_codes = encode_means(k_means, v_means, cut, tile, centres)
    chosen = choose(q_means, k_means, cut, tile)
    del q_means, k_means, v_means
    kv = Quantized(*keys, *encode_values(v, tile, centres), len(k))
    return attend_routed(q, kv, mean_codes, chosen, cut, tile, out)
