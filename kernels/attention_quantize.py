# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Keys and values in 8 bits for `attention_int8`: two passes over K and V, as Triton kernels.

    pass 1  per head and channel, over the tokens: the mean of K, and of V the mean and the largest distance from it
    pass 2  K: minus its mean, one scale for each tile of keys, int8. V: minus its mean, one scale for each channel,
            e4m3 with tokens along rows in `attention_int8`'s order, or fp16

Any vector may be subtracted from all keys (the softmax of a row does not feel it) and from all values (it is added to
the result), so the means need not be exact: that of K is taken from 16 tokens in 64.

Invariants: codes are padded with zeros to whole tiles; token offsets are 64-bit; nothing waits for the device.
The definitions are `attention_reference.quantize_keys` and `quantize_values`, which give the same codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowvram_i2v.kernels.attention_launch import check_inputs, on_device
from lowvram_i2v.kernels.attention_tiles import Tile

BLOCK = 64
"""Tokens of one tile of the passes here."""
STRIP, SAMPLED = 16, 4
"""Tokens of one tile of pass 1, whose four running figures a value must fit in registers; and one strip in so many is
looked at for the mean of K."""
LARGEST_VALUE = {"fp16": 1.0, "fp16_acc16": 1.0, "fp8": 448.0, "fp8_acc16": 2.25, "fp8_scaled": 448.0}
"""Of the codes of V. In fp8_acc16 a tile's sum stays below fp16's end: 64 keys * 256 * 2.25 = 36 864."""
SMALLEST_SCALE = tl.constexpr(2.0**-60)


Centres = tuple[Tensor, Tensor, Tensor]
"""[heads, dim] each, float32: what is subtracted from K, what from V, and the largest distance of a value from it."""


@dataclass(frozen=True)
class Quantized:
    """k [heads, padded, dim] int8 with k_scale [heads, padded / keys of a tile]; v [heads, dim, padded] e4m3 or [heads,
    padded, dim] fp16 with v_scale, v_centre [heads, dim] float32: v = code * scale + centre. `tokens` of `padded`
    exist.
    """

    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor
    v_centre: Tensor
    tokens: int


@triton.jit
def round_codes(x):
    """x within -127.5..127.5 -> the nearest int8, halves upwards."""
    return tl.floor(x + 0.5).to(tl.int8)


@triton.jit(do_not_specialize=["tokens", "chunk"])
def statistics_kernel(
    k, v, k_sum, v_sum, v_low, v_high, k_stride, k_head_stride, v_stride, v_head_stride, tokens, chunk,
    STRIP: tl.constexpr, DIM: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """Sums, lowest and highest values of the tokens chunk * program .. chunk * (program + 1), a multiple of SAMPLED
    strips, into row [program, head] of the results, each [chunks, heads, DIM]."""
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, DIM)
    at_k = k + head * k_head_stride + channels[None, :]
    at_v = v + head * v_head_stride + channels[None, :]
    k_sums = tl.zeros([STRIP, DIM], tl.float32)
    v_sums = tl.zeros([STRIP, DIM], tl.float32)
    low = tl.full([STRIP, DIM], float("inf"), tl.float32)
    high = tl.full([STRIP, DIM], -float("inf"), tl.float32)
    for start in tl.range(part * chunk, tl.minimum((part + 1) * chunk, tokens), STRIP * SAMPLED):
        rows = start + tl.arange(0, STRIP)
        offsets = rows.to(tl.int64)[:, None] * k_stride
        k_sums += tl.load(at_k + offsets, mask=rows[:, None] < tokens, other=0.0).to(tl.float32)
        for strip in tl.static_range(SAMPLED):
            rows = start + strip * STRIP + tl.arange(0, STRIP)
            exists = rows[:, None] < tokens
            values = tl.load(at_v + rows.to(tl.int64)[:, None] * v_stride, mask=exists, other=0.0).to(tl.float32)
            v_sums += values
            low = tl.minimum(low, tl.where(exists, values, float("inf")))
            high = tl.maximum(high, tl.where(exists, values, -float("inf")))
    row = (part * tl.num_programs(1) + head) * DIM + channels
    tl.store(k_sum + row, tl.sum(k_sums, 0))
    tl.store(v_sum + row, tl.sum(v_sums, 0))
    tl.store(v_low + row, tl.min(low, 0))
    tl.store(v_high + row, tl.max(high, 0))


@triton.jit(do_not_specialize=["tokens"])
def keys_kernel(
    k, centre, codes, scales, k_stride, k_head_stride, tokens, padded, KEYS: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, DIM)
    rows = block * KEYS + tl.arange(0, KEYS)
    exists = rows[:, None] < tokens
    at = k + head * k_head_stride + rows.to(tl.int64)[:, None] * k_stride + channels[None, :]
    x = tl.load(at, mask=exists, other=0.0).to(tl.float32) - tl.load(centre + head * DIM + channels)[None, :]
    x = tl.where(exists, x, 0.0)
    scale = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0) / 127.0, SMALLEST_SCALE)
    tl.store(codes + (head * padded + rows[:, None]) * DIM + channels[None, :], round_codes(x * (1.0 / scale)))
    tl.store(scales + head * (padded // KEYS) + block, scale)


@triton.jit(do_not_specialize=["tokens"])
def values_kernel(
    v, centre, inverse, codes, v_stride, v_head_stride, tokens, padded,
    BLOCK: tl.constexpr, DIM: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, DIM)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = places
    if EIGHT:  # place 4a + 2b + c of a group of 16 holds token 8b + 2a + c
        rows = places // 16 * 16 + places // 2 % 2 * 8 + places % 16 // 4 * 2 + places % 2
    exists = rows[:, None] < tokens
    at = v + head * v_head_stride + rows.to(tl.int64)[:, None] * v_stride + channels[None, :]
    x = tl.load(at, mask=exists, other=0.0).to(tl.float32) - tl.load(centre + head * DIM + channels)[None, :]
    x = tl.where(exists, x * tl.load(inverse + head * DIM + channels)[None, :], 0.0).to(codes.dtype.element_ty)
    plane = codes + head * padded * DIM
    if EIGHT:
        tl.store(plane + channels[:, None].to(tl.int64) * padded + places[None, :], tl.trans(x))
    else:
        tl.store(plane + places[:, None] * DIM + channels[None, :], x)


def padded_length(tokens: int, tile: Tile) -> int:
    """Tokens for which codes are made: whole tiles of the kernels here and of attention."""
    step = max(BLOCK, tile.keys)
    return -(-tokens // step) * step


def statistics(k: Tensor, v: Tensor) -> Centres:
    """The first pass: k, v [tokens, heads, dim] -> the centres of K and V and the reach of V."""
    tokens, heads, dim = k.shape
    step = STRIP * SAMPLED
    chunk = triton.cdiv(triton.cdiv(tokens, step), max(1, 512 // heads)) * step
    parts = triton.cdiv(tokens, chunk)
    k_sum, v_sum, low, high = torch.empty(4, parts, heads, dim, dtype=torch.float32, device=k.device).unbind()
    with on_device(k):
        statistics_kernel[(parts, heads)](
            k, v, k_sum, v_sum, low, high, *k.stride()[:2], *v.stride()[:2], tokens, chunk,
            STRIP=STRIP, DIM=dim, SAMPLED=SAMPLED,
        )  # fmt: skip
    whole, rest = divmod(tokens, step)
    v_centre = v_sum.sum(0) / tokens
    reach = torch.maximum(high.amax(0) - v_centre, v_centre - low.amin(0))
    return k_sum.sum(0) / (whole * STRIP + min(rest, STRIP)), v_centre, reach


def quantize(k: Tensor, v: Tensor, tile: Tile, centres: Centres | None = None) -> Quantized:
    """k, v [tokens, heads, dim], channels contiguous -> their codes for `attend_quantized` with this tile."""
    check_inputs(k, k, v)
    return encode(k, v, tile, statistics(k, v) if centres is None else centres)


def encode(k: Tensor, v: Tensor, tile: Tile, centres: Centres) -> Quantized:
    """The second pass; v lies within `reach` of its centre."""
    tokens, heads, dim = k.shape
    padded = padded_length(tokens, tile)
    eight = tile.pv.startswith("fp8")
    k_centre, v_centre, reach = centres
    v_scale = (reach / LARGEST_VALUE[tile.pv]).clamp_min_(2.0**-60)
    k_codes = torch.empty(heads, padded, dim, dtype=torch.int8, device=k.device)
    k_scale = torch.empty(heads, padded // tile.keys, dtype=torch.float32, device=k.device)
    v_shape = (heads, dim, padded) if eight else (heads, padded, dim)
    v_codes = torch.empty(v_shape, dtype=torch.float8_e4m3fn if eight else torch.float16, device=k.device)
    with on_device(k):
        keys_kernel[(padded // tile.keys, heads)](
            k, k_centre, k_codes, k_scale, *k.stride()[:2], tokens, padded, KEYS=tile.keys, DIM=dim
        )
        values_kernel[(padded // BLOCK, heads)](
            v, v_centre, 1.0 / v_scale, v_codes, *v.stride()[:2], tokens, padded, BLOCK=BLOCK, DIM=dim, EIGHT=eight
        )
    return Quantized(k_codes, k_scale, v_codes, v_scale, v_centre, tokens)
