# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Keys and values in 8 bits for `attention_int8`: two passes over K and V, as Triton kernels.

    pass 1  per head and channel, over the tokens: the mean of K, and of V the mean and the largest distance from it
    pass 2  K: minus its mean, one scale for each tile of keys, int8. V: minus its mean, one scale for each channel,
            e4m3 with tokens along rows in `attention_int8`'s order, or fp16

Any vector may be subtracted from all keys (the softmax of a row does not feel it) and from all values (it is added to
the result), so the means need not be exact: that of K is taken from 16 tokens in 64.

The mean of all rounding errors of V is added back with the mean of V. It is not zero: values in bf16 lie on a grid, and
where codes part, its points fall to one side, the same for every token. In a flat row all errors but this one cancel,
and so does nearly all of the signal: without it the mean of 119 200 values with no offset was off by 12 %.

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
UNIT = 256.0
"""Parts of a code in which errors of V are summed: at most 16 * UNIT a token, so half a million tokens fit 32 bits."""
WARPS = 8
"""Of the pass over V: 4 would hold twice the registers a thread."""
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


@triton.jit(do_not_specialize=["parts", "k_count", "tokens"])
def centres_kernel(
    k_sum, v_sum, v_low, v_high, k_centre, v_centre, reach, parts, k_count, tokens,
    STRIP: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Rows [parts, heads, DIM] of `statistics_kernel` -> the centres and the reach of a head."""
    head = tl.program_id(0)
    channels = tl.arange(0, DIM)
    k_sums = tl.zeros([STRIP, DIM], tl.float32)
    v_sums = tl.zeros([STRIP, DIM], tl.float32)
    low = tl.full([STRIP, DIM], float("inf"), tl.float32)
    high = tl.full([STRIP, DIM], -float("inf"), tl.float32)
    for start in tl.range(0, parts, STRIP):
        rows = start + tl.arange(0, STRIP)[:, None]
        at = (rows * tl.num_programs(0) + head) * DIM + channels[None, :]
        k_sums += tl.load(k_sum + at, mask=rows < parts, other=0.0)
        v_sums += tl.load(v_sum + at, mask=rows < parts, other=0.0)
        low = tl.minimum(low, tl.load(v_low + at, mask=rows < parts, other=float("inf")))
        high = tl.maximum(high, tl.load(v_high + at, mask=rows < parts, other=-float("inf")))
    mean = tl.sum(v_sums, 0) / tokens
    tl.store(k_centre + head * DIM + channels, tl.sum(k_sums, 0) / k_count)
    tl.store(v_centre + head * DIM + channels, mean)
    tl.store(reach + head * DIM + channels, tl.maximum(tl.max(high, 0) - mean, mean - tl.min(low, 0)))


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
    v, centre, reach, codes, errors, v_stride, v_head_stride, tokens, padded,
    BLOCK: tl.constexpr, DIM: tl.constexpr, EIGHT: tl.constexpr, LARGEST: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """To errors [heads, DIM] int32 it adds what 8-bit codes fall short of, in parts of 1 / UNIT: integers, so that the
    sum does not depend on who comes first."""
    head = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, DIM)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = places
    if EIGHT:  # place 4a + 2b + c of a group of 16 holds token 8b + 2a + c
        rows = places // 16 * 16 + places // 2 % 2 * 8 + places % 16 // 4 * 2 + places % 2
    exists = rows[:, None] < tokens
    at = v + head * v_head_stride + rows.to(tl.int64)[:, None] * v_stride + channels[None, :]
    x = tl.load(at, mask=exists, other=0.0).to(tl.float32) - tl.load(centre + head * DIM + channels)[None, :]
    scale = tl.maximum(tl.load(reach + head * DIM + channels) / LARGEST, SMALLEST_SCALE)
    x = tl.where(exists, x * (1.0 / scale)[None, :], 0.0)
    code = x.to(codes.dtype.element_ty)
    plane = codes + head * padded * DIM
    if EIGHT:
        error = tl.floor(tl.sum(x - code.to(tl.float32), 0) * UNIT + 0.5)
        tl.atomic_add(errors + head * DIM + channels, error.to(tl.int32), sem="relaxed")
        tl.store(plane + channels[:, None].to(tl.int64) * padded + places[None, :], tl.trans(code))
    else:
        tl.store(plane + places[:, None] * DIM + channels[None, :], code)


@triton.jit(do_not_specialize=["tokens"])
def shift_kernel(
    errors, centre, reach, v_scale, v_centre, tokens, DIM: tl.constexpr, LARGEST: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """The scale of a head's values, and their centre with the mean of all errors of `values_kernel` added."""
    at = tl.program_id(0) * DIM + tl.arange(0, DIM)
    scale = tl.maximum(tl.load(reach + at) / LARGEST, SMALLEST_SCALE)
    tl.store(v_scale + at, scale)
    tl.store(v_centre + at, tl.load(centre + at) + tl.load(errors + at).to(tl.float32) / UNIT / tokens * scale)


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
        sampled = whole * STRIP + min(rest, STRIP)
        k_centre, v_centre, reach = torch.empty(3, heads, dim, dtype=torch.float32, device=k.device).unbind()
        centres_kernel[(heads,)](
            k_sum, v_sum, low, high, k_centre, v_centre, reach, parts, sampled, tokens, STRIP=STRIP, DIM=dim
        )
    return k_centre, v_centre, reach


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
    largest = LARGEST_VALUE[tile.pv]
    k_codes = torch.empty(heads, padded, dim, dtype=torch.int8, device=k.device)
    k_scale = torch.empty(heads, padded // tile.keys, dtype=torch.float32, device=k.device)
    v_shape = (heads, dim, padded) if eight else (heads, padded, dim)
    v_codes = torch.empty(v_shape, dtype=torch.float8_e4m3fn if eight else torch.float16, device=k.device)
    errors = torch.zeros(heads, dim, dtype=torch.int32, device=k.device)
    v_scale, shifted = torch.empty(2, heads, dim, dtype=torch.float32, device=k.device).unbind()
    with on_device(k):
        keys_kernel[(padded // tile.keys, heads)](
            k, k_centre, k_codes, k_scale, *k.stride()[:2], tokens, padded, KEYS=tile.keys, DIM=dim
        )
        values_kernel[(padded // BLOCK, heads)](
            v, v_centre, reach, v_codes, errors, *v.stride()[:2], tokens, padded,
            BLOCK=BLOCK, DIM=dim, EIGHT=eight, LARGEST=largest, UNIT=UNIT, num_warps=WARPS,
        )  # fmt: skip
        shift_kernel[(heads,)](errors, v_centre, reach, v_scale, shifted, tokens, DIM=dim, LARGEST=largest, UNIT=UNIT)
    return Quantized(k_codes, k_scale, v_codes, v_scale, shifted, tokens)
