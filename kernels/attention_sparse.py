# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Block-sparse attention on the loop of `attention_int8`: blocks of keys that matter exactly, the others as one key.

`attention_route` is the same in plain torch and says what is computed, `attention_cut` which blocks are always seen and
what is allocated. Blocks are good only if neighbouring tokens are alike: the model's image tokens come in the order of
`dit/token_order.py`.

Cost: `density` of dense attention, 1/64 for the means, a matrix product of means, one pass over their scores. It is
approximate, and the error depends on the video, so nothing uses this by itself.

Invariants: those of `attention_int8`; every list has the same length and holds the last, ragged block; no list is made
on the host, and nothing waits for the device. Long lists (of text tokens, which see everything) start first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowvram_i2v.kernels.attention_cut import HEADS_AT_ONCE, Cut
from lowvram_i2v.kernels.attention_int8 import multiply_values, quantize_rows, score_tile
from lowvram_i2v.kernels.attention_launch import LOG2_E, check_inputs, launch_options, on_device
from lowvram_i2v.kernels.attention_quantize import Quantized, encode, padded_length, statistics
from lowvram_i2v.kernels.attention_route import Route, block_means
from lowvram_i2v.kernels.attention_tiles import Tile

LOWEST, HIGHEST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["count", "kept", "first", "last"])
def route_kernel(
    scores, blocks, skipped, count, padded, kept, first, last,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One list: scores [heads, query blocks, count] -> the `kept` places with the highest ones, ascending.

    Floats in the order of integers of the same bits, and the kept-th highest by halving the range of integers: no sort.
    """
    OWN: tl.constexpr = (ROWS + KEYS - 1) // KEYS
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    place = tl.arange(0, SIZE)
    exists = place < count
    own = tl.program_id(0) * ROWS // KEYS
    always = (place < first) | (place >= count - last) | ((place >= own) & (place < own + OWN))
    score = tl.load(scores + row * count + place, mask=exists, other=0.0)
    bits = tl.where(always, float("inf"), score).to(tl.int32, bitcast=True)
    key = tl.where(exists, tl.where(bits < 0, bits ^ HIGHEST, bits), LOWEST)
    low = tl.full([], LOWEST, tl.int64)
    high = tl.full([], HIGHEST, tl.int64)
    for _ in tl.range(0, 32):
        middle = (low + high + 1) >> 1
        enough = tl.sum((key >= middle.to(tl.int32)).to(tl.int32), 0) >= kept
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    above = key > low.to(tl.int32)
    equal = exists & (key == low.to(tl.int32))
    room = kept - tl.sum(above.to(tl.int32), 0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    at = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(blocks + row * kept + at, place, mask=chosen)
    tl.store(skipped + row * padded + place, (exists & (chosen == 0)).to(tl.uint8), mask=place < padded)


@triton.jit(do_not_specialize=["n_q", "n_kv", "kept", "text_from"])
def sparse_kernel(
    q, k, k_scale, v, mean_k, mean_k_scale, mean_v, v_scale, v_centre, out, blocks, skipped, every,
    q_stride, q_head_stride, out_stride, out_head_stride, n_q, n_kv, kept, text_from, padded, mean_padded, factor,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, PV: tl.constexpr, LENGTH: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """As `int8_kernel`; mean_k, mean_v hold one code row a block, LENGTH is log2 of a whole block's length, every is
    0, 1, 2, ..."""
    EIGHT: tl.constexpr = PV == "fp8" or PV == "fp8_acc16" or PV == "fp8_scaled"
    SHIFT: tl.constexpr = 8.0 if EIGHT else 0.0
    AHEAD: tl.constexpr = 2 if EIGHT else 1  # of the means: with fp16 values there are no registers to load ahead
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    start = part.to(tl.int64) * ROWS
    head = tl.program_id(1).to(tl.int64)
    exists = start + tl.arange(0, ROWS) < n_q
    keys = tl.arange(0, KEYS)
    channels = tl.arange(0, DIM)
    q += head * q_head_stride + start * q_stride
    out += head * out_head_stride + start * out_stride
    q_codes, q_scale = quantize_rows(q, out, exists, q_stride, out_stride, factor, ROWS, DIM)
    k += head * padded * DIM
    v += head * padded * DIM
    k_scale += head * (padded // KEYS)
    k_at = keys[:, None] * DIM + channels[None, :]
    if EIGHT:
        v_at = channels[:, None] * padded + keys[None, :]
        v_step = KEYS
    else:
        v_at = k_at
        v_step = KEYS * DIM
    m = tl.full([ROWS], -float("inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    row = head * tl.num_programs(0) + part
    whole = part >= text_from
    listed = tl.where(whole, every, blocks + row * kept)
    for i in tl.range(0, tl.where(whole, tl.cdiv(n_kv, KEYS), kept), num_stages=STAGES):
        block = tl.load(listed + i)
        scale = q_scale * tl.load(k_scale + block)
        p, alpha, m, l = score_tile(q_codes, tl.load(k + block * (KEYS * DIM) + k_at), scale, m, l, SHIFT)
        acc = multiply_values(p, tl.load(v + block * v_step + v_at), acc * alpha[:, None], PV, ROWS, KEYS, DIM)
    l -= (tl.cdiv(n_kv, KEYS) * KEYS - n_kv) * tl.math.exp2(-m)
    mean_k += head * mean_padded * DIM
    mean_v += head * mean_padded * DIM
    if EIGHT:
        v_at = channels[:, None] * mean_padded + keys[None, :]
    for i in tl.range(0, tl.where(whole, 0, mean_padded // KEYS), num_stages=AHEAD):
        scale = q_scale * tl.load(mean_k_scale + head * (mean_padded // KEYS) + i)
        stands = tl.load(skipped + row * mean_padded + i * KEYS + keys)
        bias = tl.where(stands != 0, LENGTH, -float("inf"))
        s = tl.dot(q_codes, tl.trans(tl.load(mean_k + i * (KEYS * DIM) + k_at)), out_dtype=tl.int32).to(tl.float32)
        s = s * scale[:, None] + bias[None, :]
        m_new = tl.maximum(m, tl.max(s, 1) - SHIFT)
        p = tl.math.exp2(s - m_new[:, None])
        alpha = tl.math.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        acc = multiply_values(p, tl.load(mean_v + i * v_step + v_at), acc * alpha[:, None], PV, ROWS, KEYS, DIM)
        m = m_new
    scale = tl.load(v_scale + head * DIM + channels)
    centre = tl.load(v_centre + head * DIM + channels)
    values = (acc / l[:, None]) * scale[None, :] + centre[None, :]
    at = out + tl.arange(0, ROWS).to(tl.int64)[:, None] * out_stride + channels[None, :]
    tl.store(at, values.to(out.dtype.element_ty), mask=exists[:, None])


def route(q: Tensor, key_means: Tensor, cut: Cut, tile: Tile) -> Route:
    """As `attention_route.route`, a few heads at a time, `skipped` padded as `encode` pads the means' codes."""
    heads = q.shape[1]
    size = (heads, cut.query_blocks)
    blocks = torch.empty(*size, cut.kept, dtype=torch.int32, device=q.device)
    skipped = torch.empty(*size, padded_length(cut.key_blocks, tile), dtype=torch.uint8, device=q.device)
    query_means = block_means(q, cut.rows)
    for first in range(0, heads, HEADS_AT_ONCE):
        some = slice(first, first + HEADS_AT_ONCE)
        scores = torch.einsum("qhd,khd->hqk", query_means[:, some], key_means[:, some]).contiguous()
        with on_device(q):
            route_kernel[(cut.query_blocks, len(scores))](
                scores, blocks[some], skipped[some], cut.key_blocks, skipped.shape[2], cut.kept, cut.first, cut.last,
                ROWS=cut.rows, KEYS=cut.keys, SIZE=triton.next_power_of_2(skipped.shape[2]),
            )  # fmt: skip
    return Route(blocks, skipped)


def attend_routed(
    q: Tensor, kv: Quantized, means: Quantized, chosen: Route, cut: Cut, tile: Tile, out: Tensor | None = None
) -> Tensor:
    """Attention of q [tokens, heads, dim] over chosen blocks of `kv` and means of the others. `out` may be q."""
    dim = q.shape[2]
    out = q.new_empty(q.shape) if out is None else out
    stages = 2 * tile.stages - 1  # half of them load the list, and as many as in dense attention the tiles it names
    every = torch.arange(cut.key_blocks, dtype=torch.int32, device=q.device)
    with on_device(q):
        sparse_kernel[(cut.query_blocks, q.shape[1])](
            q, kv.k, kv.k_scale, kv.v, means.k, means.k_scale, means.v, kv.v_scale, kv.v_centre, out,
            chosen.blocks, chosen.skipped, every, *q.stride()[:2], *out.stride()[:2],
            cut.tokens, kv.tokens, cut.kept, cut.text_from, kv.k.shape[1], means.k.shape[1], LOG2_E * dim**-0.5,
            ROWS=tile.rows, KEYS=tile.keys, DIM=dim, PV=tile.pv, LENGTH=tile.keys.bit_length() - 1, STAGES=stages,
            **launch_options(tile),
        )  # fmt: skip
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, tile: Tile, cut: Cut, out: Tensor | None = None) -> Tensor:
    """q, k, v [tokens, heads, dim] -> [tokens, heads, dim], cut as `cut` says with the tile's rows and keys."""
    check_inputs(q, k, v)
    if (cut.tokens, cut.rows, cut.keys) != (len(k), tile.rows, tile.keys) or len(q) != len(k):
        raise ValueError(f"{cut} is not a cut of {len(q)} queries and {len(k)} keys for tiles of {tile}")
    centres = statistics(k, v)
    key_means = block_means(k, tile.keys)
    means = encode(key_means, block_means(v, tile.keys), tile, centres)
    chosen = route(q, key_means.sub_(centres[0]), cut, tile)
    del key_means
    return attend_routed(q, encode(k, v, tile, centres), means, chosen, cut, tile, out)
