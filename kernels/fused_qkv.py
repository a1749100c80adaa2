# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton kernel between a QKV projection and attention: one pass over its output.

Queries and keys are RMS-normalized over the head's channels and rotated, values are copied; each goes to its place in
the sequence's q, k and v. A program handles a few tokens of a few heads, all three parts: the cosines and sines are
loaded once for q and k.

Invariants: float32 inside, one rounding; rows of the input and of each output may be any distance apart; offsets are
64-bit. Rotary pairs are neighbouring channels, as in `qk_norm_rope.py`. Tokens beyond the table are rotated by zero,
which leaves every bit as it is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowvram_i2v.kernels.fused_rows import on_device

EPS = tl.constexpr(1e-6)


@triton.jit
def norm_rope(x, weight, cos, sin, TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr):
    """x [TOKENS, HEADS, DIM] float32, weight [DIM], cos and sin [TOKENS, DIM / 2]."""
    x = x * tl.rsqrt(tl.sum(x * x, 2) / DIM + EPS)[:, :, None] * weight[None, None, :]
    even, odd = tl.split(tl.reshape(x, [TOKENS, HEADS, DIM // 2, 2]))
    cos, sin = cos[:, None, :], sin[:, None, :]
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [TOKENS, HEADS, DIM])


@triton.jit(do_not_specialize=["rows", "rotated"])
def qkv_kernel(
    qkv, q_weight, k_weight, cos, sin, q, k, v, rows, rotated,
    qkv_stride, rope_stride, q_stride, k_stride, v_stride, q_head, k_head, v_head,
    TOTAL: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """TOTAL: channels of all heads."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    channel = tl.arange(0, DIM)
    pair = tl.arange(0, DIM // 2)
    live = (token < rows)[:, None, None]
    row = token.to(tl.int64)
    source = qkv + row[:, None, None] * qkv_stride + (head * DIM)[None, :, None] + channel[None, None, :]
    xq = tl.load(source, mask=live, other=0.0)
    xk = tl.load(source + TOTAL, mask=live, other=0.0)
    xv = tl.load(source + 2 * TOTAL, mask=live, other=0.0)
    turn = row[:, None] * rope_stride + pair[None, :]
    turned = (token < rotated)[:, None]
    c = tl.load(cos + turn, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + turn, mask=turned, other=0.0).to(tl.float32)
    yq = norm_rope(xq.to(tl.float32), tl.load(q_weight + channel).to(tl.float32), c, s, TOKENS, HEADS, DIM)
    yk = norm_rope(xk.to(tl.float32), tl.load(k_weight + channel).to(tl.float32), c, s, TOKENS, HEADS, DIM)
    row, head, channel = row[:, None, None], head[None, :, None], channel[None, None, :]
    tl.store(q + row * q_stride + head * q_head + channel, yq.to(q.dtype.element_ty), mask=live)
    tl.store(k + row * k_stride + head * k_head + channel, yk.to(k.dtype.element_ty), mask=live)
    tl.store(v + row * v_stride + head * v_head + channel, xv.to(v.dtype.element_ty), mask=live)


TOKENS, HEADS, WARPS = 2, 8, 4
"""Tokens and heads of a program at most: 2048 values each of q, k and v in 128 threads."""


def qkv_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> None:
    """As `qk_norm_rope.qkv_norm_rope_into`."""
    rows, heads, dim = q.shape
    assert q.shape == k.shape == v.shape
    assert qkv.shape == (rows, 3 * heads * dim)
    assert dim == triton.next_power_of_2(dim), "a head's channels are a power of two"
    assert all(tensor.stride(-1) == 1 for tensor in (qkv, q, k, v))
    cos, sin = rope
    assert cos.stride() == sin.stride() == (cos.stride(0), 1)
    together = next(count for count in (HEADS, 4, 2, 1) if heads % count == 0)
    with on_device(q):
        qkv_kernel[(triton.cdiv(rows, TOKENS), heads // together)](
            qkv, q_weight, k_weight, cos, sin, q, k, v, rows, min(len(cos), rows),
            qkv.stride(0), cos.stride(0), q.stride(0), k.stride(0), v.stride(0), q.stride(1), k.stride(1), v.stride(1),
            TOTAL=heads * dim, TOKENS=TOKENS, HEADS=together, DIM=dim, num_warps=WARPS,
        )  # fmt: skip
