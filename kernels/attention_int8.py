# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Attention with 8-bit products: scores of int8 codes, then P V in e4m3 or fp16, as a Triton kernel.

Keys and values come quantized (`attention_quantize`); a program quantizes its own queries, one scale a row, so they
need no buffer. A score is the integer product times the row's scale times the key tile's scale, which is one fused
multiply-add a score, as in 16 bits. V comes centred on a vector of each head, which is added to the result: exact,
since a row of P sums to one, and it keeps the tensor cores' short sums from drowning in a common offset.

    P V           P            V                       sum of a tile   then
    fp16          fp16         fp16, largest 1         float32         stays in the tensor cores
    fp16_acc16    fp16         fp16, largest 1         fp16            added to float32
    fp8           e4m3 * 256   e4m3, largest 448       float32         stays in the tensor cores
    fp8_acc16     e4m3 * 256   e4m3, largest 2.25      fp16            added to float32
    fp8_scaled    e4m3 * 256   e4m3, largest 448       float32         as fp8; block scales of one (RTX 50)

P is at most one and is multiplied by 256 because e4m3 ends at 2^-9. Hopper's tensor cores keep few bits of a sum of
e4m3 products, yet the sum of all tiles may stay there: with float32 sums of single tiles the error over 119 200 keys
was the same.

Values in 8 bits lie with tokens along rows (V^T), in each group of 16 in the order that `permute_columns` tells.

No tile is masked. Keys and values are padded with zero codes, so a key that does not exist has score 0 and value 0, and
its part in the row sum, exp2(-m), is taken off in the end. That loses nothing: K is centred, so the mean of a row's
scores is about 0, and by Jensen's inequality n keys sum to n exp2(-m) or more, against at most KEYS - 1 such keys.

Invariants: as in `attention_dense`: `out` may be q, token offsets are 64-bit, any number of keys compiles nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowvram_i2v.kernels.attention_launch import LOG2_E, launch_options, on_device
from lowvram_i2v.kernels.attention_quantize import Quantized, rotation, round_codes, turn
from lowvram_i2v.kernels.attention_tiles import Tile

SMALLEST_SCALE = tl.constexpr(2.0**-60)
"""Of a row of zeros: 1 / scale stays finite."""


@triton.jit
def permute_columns(p, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """P with the columns of each group of 16 in the order of V^T, which is told here for all who make or read it:

        0 1 8 9  2 3 10 11  4 5 12 13  6 7 14 15        place 4a + 2b + c holds token 8b + 2a + c

    A thread's registers hold four columns of a row of scores in each 16, those that stand together here, and as an
    operand of 8-bit floats they are its four neighbours: P is the next product's operand as it stands, and nothing is
    exchanged between threads. A sum over tokens does not feel their order, if V's is the same.
    """
    p = tl.permute(tl.reshape(p, [ROWS, KEYS // 16, 2, 4, 2]), [0, 1, 3, 2, 4])
    return tl.reshape(p, [ROWS, KEYS])


@triton.jit
def multiply_values(p, v, acc, PV: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr):
    """acc + P V. v is [DIM, KEYS] in e4m3, [KEYS, DIM] in fp16."""
    if PV == "fp16":
        acc = tl.dot(p.to(tl.float16), v, acc)
    elif PV == "fp16_acc16":
        acc += tl.dot(p.to(tl.float16), v, out_dtype=tl.float16)
    else:
        p = permute_columns(p, ROWS, KEYS).to(tl.float8e4nv)
        if PV == "fp8_acc16":
            acc += tl.dot(p, tl.trans(v), out_dtype=tl.float16)
        elif PV == "fp8_scaled":
            p_ones = tl.full([ROWS, KEYS // 32], 127, tl.uint8)
            v_ones = tl.full([DIM, KEYS // 32], 127, tl.uint8)
            acc = tl.dot_scaled(p, p_ones, "e4m3", tl.trans(v), v_ones, "e4m3", acc)
        else:
            acc = tl.dot(p, tl.trans(v), acc)
    return acc


@triton.jit
def quantize_rows(q, out, exists, q_stride, out_stride, factor, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Rows of q -> int8 codes [ROWS, DIM] of the turned rows and their float32 scales.

    A scale holds the softmax's, in powers of two, and takes off the length that turning adds to q and k. Codes and
    scales go by way of the memory of this program's own result, at `out`: a row's codes, then its scale. What is loaded
    from there becomes an operand in shared memory; computed codes would take registers in the loop.
    """
    PART: tl.constexpr = 64 if ROWS > 64 else ROWS  # turning all rows at once would take registers
    SIZE: tl.constexpr = out.dtype.element_ty.primitive_bitwidth // 8
    rows = tl.arange(0, ROWS).to(tl.int64)
    channels = tl.arange(0, DIM)
    codes_at = out.to(tl.pointer_type(tl.int8))
    count = tl.sum(exists.to(tl.int32), 0)
    turning = rotation(DIM, q.dtype.element_ty)
    for part in tl.static_range(ROWS // PART):
        some = part * PART + tl.arange(0, PART).to(tl.int64)
        here = some < count
        x = turn(tl.load(q + some[:, None] * q_stride + channels[None, :], mask=here[:, None], other=0.0), turning)
        scale = tl.maximum(tl.max(tl.abs(x), 1) / 127.0, SMALLEST_SCALE)
        at = codes_at + some * out_stride * SIZE
        tl.debug_barrier()  # out may be q: every thread has read before one writes
        tl.store(at[:, None] + channels[None, :], round_codes(x * (1.0 / scale)[:, None]), mask=here[:, None])
        tl.store((at + DIM).to(tl.pointer_type(tl.float32)), scale * (factor / DIM), mask=here)
    tl.debug_barrier()
    codes_at += rows * out_stride * SIZE
    scale_at = (codes_at + DIM).to(tl.pointer_type(tl.float32))
    codes = tl.load(codes_at[:, None] + channels[None, :], mask=exists[:, None], other=0)
    return codes, tl.load(scale_at, mask=exists, other=1.0)


@triton.jit
def score_tile(q, k, scale, m, l, SHIFT: tl.constexpr):
    """P of a tile, and what `attention_dense.softmax_step` gives; the maximum is that of the integers, of which some
    cards take three at once."""
    s = tl.dot(q, tl.trans(k), out_dtype=tl.int32)
    m_new = tl.maximum(m, tl.max(s, 1).to(tl.float32) * scale - SHIFT)
    p = tl.math.exp2(s.to(tl.float32) * scale[:, None] - m_new[:, None])
    alpha = tl.math.exp2(m - m_new)
    return p, alpha, m_new, l * alpha + tl.sum(p, 1)


@triton.jit(do_not_specialize=["n_q", "n_kv"])
def int8_kernel(
    q, k, k_scale, v, v_scale, v_centre, out, q_stride, q_head_stride, out_stride, out_head_stride,
    n_q, n_kv, padded, factor,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, PV: tl.constexpr,
):  # fmt: skip
    """k [heads, padded, DIM] int8, k_scale [heads, padded / KEYS]; v as `PV` says: [heads, DIM, padded] e4m3 or
    [heads, padded, DIM] fp16; v_scale, v_centre [heads, DIM]."""
    EIGHT: tl.constexpr = PV == "fp8" or PV == "fp8_acc16" or PV == "fp8_scaled"
    SHIFT: tl.constexpr = 8.0 if EIGHT else 0.0
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    keys = tl.arange(0, KEYS)
    channels = tl.arange(0, DIM)
    start = tl.program_id(0).to(tl.int64) * ROWS
    q += head * q_head_stride + start * q_stride
    out += head * out_head_stride + start * out_stride
    q_codes, q_scale = quantize_rows(q, out, rows < n_q, q_stride, out_stride, factor, ROWS, DIM)
    plane = head * padded * DIM
    k_at = k + plane + keys[:, None] * DIM + channels[None, :]
    k_scale_at = k_scale + head * (padded // KEYS)
    if EIGHT:
        v_at = v + plane + channels[:, None].to(tl.int64) * padded + keys[None, :]
        v_step = KEYS
    else:
        v_at = v + plane + keys[:, None] * DIM + channels[None, :]
        v_step = KEYS * DIM
    blocks = tl.cdiv(n_kv, KEYS)
    m = tl.full([ROWS], -float("inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    for block in tl.range(0, blocks):
        scale = q_scale * tl.load(k_scale_at + block)
        p, alpha, m, l = score_tile(q_codes, tl.load(k_at + block * (KEYS * DIM)), scale, m, l, SHIFT)
        acc = multiply_values(p, tl.load(v_at + block * v_step), acc * alpha[:, None], PV, ROWS, KEYS, DIM)
    l -= (blocks * KEYS - n_kv) * tl.math.exp2(-m)
    scale = tl.load(v_scale + head * DIM + channels)
    centre = tl.load(v_centre + head * DIM + channels)
    values = (acc / l[:, None]) * scale[None, :] + centre[None, :]
    at = out + tl.arange(0, ROWS).to(tl.int64)[:, None] * out_stride + channels[None, :]
    tl.store(at, values.to(out.dtype.element_ty), mask=rows[:, None] < n_q)


def attend_quantized(q: Tensor, kv: Quantized, tile: Tile, out: Tensor | None = None) -> Tensor:
    """Attention of q [queries, heads, dim] over quantized keys and values -> [queries, heads, dim] in q's dtype.

    Only q's channels must be contiguous. `out` may be q. `kv` was made for this tile.
    """
    tokens, heads, dim = q.shape
    out = q.new_empty(q.shape) if out is None else out
    grid = (triton.cdiv(tokens, tile.rows), heads)
    with on_device(q):
        int8_kernel[grid](
            q, kv.k, kv.k_scale, kv.v, kv.v_scale, kv.v_centre, out, *q.stride()[:2], *out.stride()[:2],
            tokens, kv.tokens, kv.k.shape[1], LOG2_E * dim**-0.5,
            ROWS=tile.rows, KEYS=tile.keys, DIM=dim, PV=tile.pv, **launch_options(tile),
        )  # fmt: skip
    return out
