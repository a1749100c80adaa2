# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Dense attention in 16 bits, as a Triton kernel: one packed sequence, no mask, any number of tokens.

A program owns `rows` queries of one head and walks over all keys, a tile at a time, with the running maximum and sum of
the softmax (flash attention). Only the last, ragged tile of keys is masked; the loop before it has no branch. Scores,
softmax and the sum of P V are float32; P is rounded to the inputs' dtype.

Invariants: a program reads its own queries before it writes, and nobody else reads them, so `out` may be q itself;
token offsets are 64-bit; token counts are run-time values, so a new prompt length compiles nothing.

Left out: masks, batches, derivatives. The definition is `attention_reference.attention`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowvram_i2v.kernels.attention_launch import LOG2_E, check_inputs, launch_options, on_device
from lowvram_i2v.kernels.attention_tiles import Tile


@triton.jit
def softmax_step(s, m, l, scale):
    """Scores s of one tile -> P, the factor of all that was summed before, and the new row maximum and row sum.

    Works in powers of two: exp(x) is exp2(x * log2 e), and `scale` holds that factor.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.math.exp2(s * scale - m_new[:, None])
    alpha = tl.math.exp2(m - m_new)
    return p, alpha, m_new, l * alpha + tl.sum(p, 1)


@triton.jit
def attend_tile(q, k, v, m, l, acc, scale):
    s = tl.dot(q, tl.trans(k))
    p, alpha, m, l = softmax_step(s, m, l, scale)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    return m, l, acc


@triton.jit
def attend_last_tile(q, k, v, m, l, acc, scale, left, KEYS: tl.constexpr):
    """As `attend_tile`, of which only the first `left` keys exist; k and v are zero beyond them."""
    s = tl.dot(q, tl.trans(k))
    s = tl.where(tl.arange(0, KEYS)[None, :] < left, s, -float("inf"))
    p, alpha, m, l = softmax_step(s, m, l, scale)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    return m, l, acc


@triton.jit
def store_rows(out, acc, l, rows, head, n_q, out_stride, out_head_stride, DIM: tl.constexpr):
    channels = tl.arange(0, DIM)
    offsets = rows.to(tl.int64)[:, None] * out_stride + channels[None, :]
    values = (acc / l[:, None]).to(out.dtype.element_ty)
    tl.store(out + head * out_head_stride + offsets, values, mask=rows[:, None] < n_q)


@triton.jit(do_not_specialize=["n_q", "n_kv"])
def dense_kernel(
    q, k, v, out,
    q_stride, k_stride, v_stride, out_stride, q_head_stride, k_head_stride, v_head_stride, out_head_stride,
    n_q, n_kv, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    keys = tl.arange(0, KEYS)
    channels = tl.arange(0, DIM)
    q_tile = tl.load(
        q + head * q_head_stride + rows.to(tl.int64)[:, None] * q_stride + channels[None, :],
        mask=rows[:, None] < n_q, other=0.0,
    )  # fmt: skip
    k_at = k + head * k_head_stride + keys.to(tl.int64)[:, None] * k_stride + channels[None, :]
    v_at = v + head * v_head_stride + keys.to(tl.int64)[:, None] * v_stride + channels[None, :]
    k_step = k_stride.to(tl.int64) * KEYS
    v_step = v_stride.to(tl.int64) * KEYS
    m = tl.full([ROWS], -float("inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    full = n_kv // KEYS * KEYS
    for _ in tl.range(0, full, KEYS):
        m, l, acc = attend_tile(q_tile, tl.load(k_at), tl.load(v_at), m, l, acc, scale)
        k_at += k_step
        v_at += v_step
    if full < n_kv:
        exists = (full + keys)[:, None] < n_kv
        k_tile = tl.load(k_at, mask=exists, other=0.0)
        v_tile = tl.load(v_at, mask=exists, other=0.0)
        m, l, acc = attend_last_tile(q_tile, k_tile, v_tile, m, l, acc, scale, n_kv - full, KEYS)
    store_rows(out, acc, l, rows, head, n_q, out_stride, out_head_stride, DIM)


def attend(q: Tensor, k: Tensor, v: Tensor, tile: Tile, out: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(dim)) v: q [queries, heads, dim], k, v [keys, heads, dim] -> [queries, heads, dim].

    Channels are contiguous, other strides are free. `out` may be q.
    """
    check_inputs(q, k, v)
    tokens, heads, dim = q.shape
    out = q.new_empty(q.shape) if out is None else out
    token_strides, head_strides = ([x.stride(axis) for x in (q, k, v, out)] for axis in (0, 1))
    with on_device(q):
        dense_kernel[(triton.cdiv(tokens, tile.rows), heads)](
            q, k, v, out, *token_strides, *head_strides, tokens, len(k), LOG2_E * dim**-0.5,
            ROWS=tile.rows, KEYS=tile.keys, DIM=dim, **launch_options(tile),
        )  # fmt: skip
    return out
