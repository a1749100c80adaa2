# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Keys and values in 8 bits for `attention_int8`: two passes over V and one over K, as Triton kernels.

    pass 1  per head and channel, over the tokens: of V the mean and the largest distance from it, of K a mean
    pass 2  K: turned, minus its mean, one scale for each tile of keys, int8; sparse attention also wants the mean of
            each tile, which is at hand here. V: minus its mean, one scale for each channel, e4m3 with tokens along rows
            in `attention_int8`'s order, or fp16

K and the queries are turned by the same rotation of their channels, which no product of theirs feels: it spreads a
channel that stands out, and takes the scale of a whole tile, over all channels. It is an orthogonal matrix of 1 and -1
times sqrt(DIM) (Hadamard's, with the signs of its rows changed so that a constant vector is spread too), and the values
it is multiplied with are the 16-bit inputs as they are, so nothing is rounded before the codes.

Any vector may be subtracted from all keys (the softmax of a row does not feel it), so the mean of K is that of one
token in 16. The mean of V, which is added to the result, is exact: a result is that mean plus a sum of rounded P times
the rest, and in flat rows, where all P are rounded the same way, a rest whose mean is not zero is off with them.

The mean of all rounding errors of V is added back with the mean of V. It is not zero: values in bf16 lie on a grid, and
where codes part, its points fall to one side, the same for every token. In a flat row all errors but this one cancel,
and so does nearly all of the signal: without it the mean of 119 200 values with no offset was off by 12 %.

Invariants: codes are padded with zeros to whole tiles; token offsets are 64-bit; nothing waits for the device; sums are
made in one order, so equal inputs give equal bits. The definitions are `attention_reference.quantize_keys` and
`quantize_values`, which give the same codes up to the rounding of sums.
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
"""Tokens that the codes of V are padded to."""
SAMPLED, TURN = 16, 64
"""One token of K in SAMPLED is looked at for its mean: in each run of TURN tokens the next of them, so that a sequence
whose rows are a multiple of SAMPLED long is not seen in the same columns only."""
LARGEST_VALUE = {"fp16": 1.0, "fp16_acc16": 1.0, "fp8": 448.0, "fp8_acc16": 2.25, "fp8_scaled": 448.0}
"""Of the codes of V. In fp8_acc16 a tile's sum stays below fp16's end: 64 keys * 256 * 2.25 = 36 864."""
SMALLEST_SCALE = tl.constexpr(2.0**-60)
ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it to a float32 below 2^22 rounds to the nearest integer."""
SMALLEST_NORMAL = tl.constexpr(2.0**-6)
SUBNORMAL_ROUNDER = tl.constexpr(1.5 * 2.0**14)
"""Of e4m3: below 2^-6 its numbers are 2^-9 apart."""


@dataclass(frozen=True)
class Pass:
    """How one kernel goes over the tokens: a program of `warps` takes `tiles` tiles one after the other, and loads come
    `stages` - 1 tiles ahead."""

    tiles: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.tiles} tiles {self.warps}w {self.stages}s"


@dataclass(frozen=True)
class Passes:
    statistics: Pass = Pass(16, 2, 1)
    keys: Pass = Pass(8, 4, 3)
    values: Pass = Pass(4, 4, 1)


PASSES = Passes()
Centres = tuple[Tensor, Tensor, Tensor]
"""[heads, dim] each, float32: what, rounded to bf16, is subtracted from K, what from V, and the largest distance of a
value from it."""


@dataclass(frozen=True)
class Quantized:
    """k [heads, padded, dim] int8 with k_scale [heads, padded / keys of a tile]: the turned keys; v [heads, dim,
    padded] e4m3 or [heads, padded, dim] fp16 with v_scale, v_centre [heads, dim] float32: v = code * scale + centre.
    `tokens` of `padded` exist.
    """

    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor
    v_centre: Tensor
    tokens: int


@triton.jit
def round_codes(x):
    """x within -127.5..127.5 -> the nearest int8, halves to even: the last bits of the sum are the integer."""
    return (x + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def round_e4m3(x):
    """x within -448..448 -> the nearest number of e4m3, halves to even, as float32.

    Sums of codes are made of these, and nothing reads codes back: where a result of `cvt.e4m3x2` is put beside another
    in one register and used a second time, ptxas 12.8 and 12.9 let the second use read a register of no meaning.
    """
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < SMALLEST_NORMAL, x + SUBNORMAL_ROUNDER - SUBNORMAL_ROUNDER, normal)


@triton.jit
def rotation(DIM: tl.constexpr, dtype: tl.constexpr):
    """`attention_reference.rotation` in 16 bits (fp16 for float32): a sign is the parity of the bits that row and
    column share and of the neighbouring pairs of bits of the row."""
    row = tl.arange(0, DIM)[:, None]
    bits = (row & tl.arange(0, DIM)[None, :]) ^ (row & (row >> 1))
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return tl.where((bits & 1) == 0, 1.0, -1.0).to(tl.float16 if dtype == tl.float32 else dtype)


@triton.jit
def turn(x, turning):
    """x [rows, DIM] in 16 bits times `turning` [DIM, DIM] -> float32, sqrt(DIM) times as long."""
    return tl.dot(x.to(turning.dtype), turning)


@triton.jit(do_not_specialize=["tokens"])
def statistics_kernel(
    k, v, k_sum, v_sum, v_low, v_high, k_stride, k_head_stride, v_stride, v_head_stride, tokens,
    TILES: tl.constexpr, TURN: tl.constexpr, DIM: tl.constexpr, SAMPLED: tl.constexpr, FOLD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sums, lowest and highest values of TILES * TURN tokens into row [program, head] of the results, each [parts,
    heads, DIM]. Where there are no more tokens it sees the last one again."""
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, DIM)
    at_k = k + head * k_head_stride + channels[None, :]
    at_v = v + head * v_head_stride + channels[None, :]
    k_sums = tl.zeros([TURN // SAMPLED, DIM], tl.float32)
    sums = tl.zeros([FOLD, DIM], tl.float32)
    low = tl.full([FOLD, DIM], float("inf"), tl.float32)
    high = tl.full([FOLD, DIM], -float("inf"), tl.float32)
    end = tl.minimum((part + 1) * TILES, tl.cdiv(tokens, TURN))
    for tile in tl.range(part * TILES, end, num_stages=STAGES):
        rows = tile * TURN + tl.arange(0, TURN // SAMPLED) * SAMPLED + tile % SAMPLED
        k_at = at_k + rows.to(tl.int64)[:, None] * k_stride
        k_sums += tl.load(k_at, mask=rows[:, None] < tokens, other=0.0).to(tl.float32)
        rows = tl.minimum(tile * TURN + tl.arange(0, TURN), tokens - 1)
        x = tl.load(at_v + rows.to(tl.int64)[:, None] * v_stride).to(tl.float32)
        x = tl.reshape(x, [TURN // FOLD, FOLD, DIM])
        sums += tl.sum(x, 0)
        low = tl.minimum(low, tl.min(x, 0))
        high = tl.maximum(high, tl.max(x, 0))
    last = tl.load(v + head * v_head_stride + (tokens - 1).to(tl.int64) * v_stride + channels).to(tl.float32)
    row = (part * tl.num_programs(1) + head) * DIM + channels
    tl.store(k_sum + row, tl.sum(k_sums, 0))
    tl.store(v_sum + row, tl.sum(sums, 0) - tl.maximum(end * TURN - tokens, 0) * last)
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
    at = head * DIM + channels
    tl.store(v_centre + at, mean)
    tl.store(reach + at, tl.maximum(tl.max(high, 0) - mean, mean - tl.min(low, 0)))
    tl.store(k_centre + at, tl.sum(k_sums, 0) / k_count)


@triton.jit(do_not_specialize=["tokens"])
def keys_kernel(
    k, centre, codes, scales, means, k_stride, k_head_stride, tokens, padded,
    TILES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows are turned before the centre is subtracted, and the centre as one of them. means is None, or [heads, tiles
    that hold tokens, DIM]: the mean of each tile's tokens, as they are in K."""
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, DIM)
    turning = rotation(DIM, k.dtype.element_ty)
    mean = tl.load(centre + head * DIM + channels).to(tl.int32, bitcast=True)
    mean = (mean + 0x7FFF + (mean >> 16 & 1)) & -0x10000  # bf16, which fp16 holds too
    mean = mean.to(tl.float32, bitcast=True).to(turning.dtype)
    mean = tl.max(turn(tl.broadcast_to(mean[None, :], [KEYS, DIM]), turning), 0)  # all rows are the same
    k += head * k_head_stride
    codes += head * padded * DIM
    scales += head * (padded // KEYS)
    for block in tl.range(part * TILES, tl.minimum((part + 1) * TILES, padded // KEYS), num_stages=STAGES):
        rows = block * KEYS + tl.arange(0, KEYS)
        exists = rows[:, None] < tokens
        at = k + rows.to(tl.int64)[:, None] * k_stride + channels[None, :]
        given = tl.load(at, mask=exists, other=0.0)
        x = turn(given, turning) - mean[None, :]
        if means is not None:  # after the product: before it, ptxas may spill
            sums = tl.sum(given.to(tl.float32), 0)
            to = means + (head * tl.cdiv(tokens, KEYS) + block) * DIM + channels
            some = tl.full([DIM], block * KEYS, tl.int32) < tokens  # codes may be padded by more than a tile
            tl.store(to, sums / tl.minimum(tokens - block * KEYS, KEYS), mask=some)
        x = tl.where(exists, x, 0.0)
        scale = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0) / 127.0, SMALLEST_SCALE)
        tl.store(codes + rows.to(tl.int64)[:, None] * DIM + channels[None, :], round_codes(x * (1.0 / scale)))
        tl.store(scales + block, scale)


@triton.jit
def scaled_values(v, rows, stride, tokens, inverse, shift, DIM: tl.constexpr):
    """Tokens `rows` as v * inverse - shift, zeros where there are none."""
    exists = rows[:, None] < tokens
    at = v + rows.to(tl.int64)[:, None] * stride + tl.arange(0, DIM)[None, :]
    return tl.where(exists, tl.load(at, mask=exists, other=0.0).to(tl.float32) * inverse - shift, 0.0)


@triton.jit(do_not_specialize=["tokens"])
def values_kernel(
    v, centre, reach, codes, sums, v_stride, v_head_stride, tokens, padded,
    TILES: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, EIGHT: tl.constexpr, LARGEST: tl.constexpr,
    FOLD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """sums [parts, heads, DIM]: of the codes of a program's TILES * BLOCK tokens."""
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, DIM)
    code: tl.constexpr = codes.dtype.element_ty
    inverse = (1.0 / tl.maximum(tl.load(reach + head * DIM + channels) / LARGEST, SMALLEST_SCALE))[None, :]
    shift = tl.load(centre + head * DIM + channels)[None, :] * inverse
    v += head * v_head_stride
    codes += head * padded * DIM
    made = tl.zeros([FOLD, DIM], tl.float32)
    for tile in tl.range(part * TILES, tl.minimum((part + 1) * TILES, padded // BLOCK), num_stages=STAGES):
        if EIGHT:  # in the order of `attention_int8.permute_columns`: a word is tokens 2a, 2a + 1, 2a + 8, 2a + 9
            words = tl.arange(0, BLOCK // 4)
            first = tile * BLOCK + words // 4 * 16 + words % 4 * 2
            low = tl.join(scaled_values(v, first, v_stride, tokens, inverse, shift, DIM),
                          scaled_values(v, first + 8, v_stride, tokens, inverse, shift, DIM))  # fmt: skip
            high = tl.join(scaled_values(v, first + 1, v_stride, tokens, inverse, shift, DIM),
                           scaled_values(v, first + 9, v_stride, tokens, inverse, shift, DIM))  # fmt: skip
            four = round_e4m3(tl.reshape(tl.join(low, high), [BLOCK // 4, DIM, 4]))
            made += tl.sum(tl.reshape(tl.sum(four, 2), [BLOCK // 4 // FOLD, FOLD, DIM]), 0)
            at = codes + channels[:, None].to(tl.int64) * padded + tile * BLOCK + tl.arange(0, BLOCK)[None, :]
            tl.store(at, tl.reshape(tl.permute(four.to(code), 1, 0, 2), [DIM, BLOCK]))
        else:
            rows = tile * BLOCK + tl.arange(0, BLOCK)
            one = scaled_values(v, rows, v_stride, tokens, inverse, shift, DIM).to(code)
            made += tl.sum(tl.reshape(one.to(tl.float32), [BLOCK // FOLD, FOLD, DIM]), 0)
            tl.store(codes + rows.to(tl.int64)[:, None] * DIM + channels[None, :], one)
    tl.store(sums + (part * tl.num_programs(1) + head) * DIM + channels, tl.sum(made, 0))


@triton.jit(do_not_specialize=["parts", "tokens"])
def shift_kernel(
    sums, centre, reach, v_scale, v_centre, parts, tokens,
    STRIP: tl.constexpr, DIM: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """The scale of a head's values, and what their codes lack to have the mean `centre`."""
    head = tl.program_id(0)
    channels = tl.arange(0, DIM)
    made = tl.zeros([STRIP, DIM], tl.float32)
    for start in tl.range(0, parts, STRIP):
        rows = start + tl.arange(0, STRIP)[:, None]
        at = (rows * tl.num_programs(0) + head) * DIM + channels[None, :]
        made += tl.load(sums + at, mask=rows < parts, other=0.0)
    at = head * DIM + channels
    scale = tl.maximum(tl.load(reach + at) / LARGEST, SMALLEST_SCALE)
    tl.store(v_scale + at, scale)
    tl.store(v_centre + at, tl.load(centre + at) - tl.sum(made, 0) / tokens * scale)


STRIP = 32
"""Rows of partial sums that are added up at once."""


def padded_length(tokens: int, tile: Tile) -> int:
    """Tokens for which codes are made: whole tiles of the kernels here and of attention."""
    step = max(BLOCK, tile.keys)
    return -(-tokens // step) * step


def sampled_count(tokens: int) -> int:
    """Tokens of K that its mean is taken from."""
    return tokens // SAMPLED + (tokens % SAMPLED > tokens // TURN % SAMPLED)


def fold(how: Pass, dim: int) -> int:
    """Rows of a tile of sums: as many as a program loads at once, 8 values a thread, so that each thread adds up its
    own."""
    return min(32, how.warps * 32 * 8 // dim)


def statistics(k: Tensor, v: Tensor, how: Pass = PASSES.statistics) -> Centres:
    """The first pass: k, v [tokens, heads, dim] -> the centres of K and V and the reach of V."""
    tokens, heads, dim = k.shape
    parts = triton.cdiv(tokens, TURN * how.tiles)
    sums = torch.empty(4, parts, heads, dim, dtype=torch.float32, device=k.device).unbind()
    k_centre, v_centre, reach = torch.empty(3, heads, dim, dtype=torch.float32, device=k.device).unbind()
    with on_device(k):
        statistics_kernel[(parts, heads)](
            k, v, *sums, *k.stride()[:2], *v.stride()[:2], tokens,
            TILES=how.tiles, TURN=TURN, DIM=dim, SAMPLED=SAMPLED, FOLD=fold(how, dim), STAGES=how.stages,
            num_warps=how.warps,
        )  # fmt: skip
        centres_kernel[(heads,)](
            *sums, k_centre, v_centre, reach, parts, sampled_count(tokens), tokens, STRIP=STRIP, DIM=dim, num_warps=8
        )
    return k_centre, v_centre, reach


def quantize(k: Tensor, v: Tensor, tile: Tile, centres: Centres | None = None, how: Passes = PASSES) -> Quantized:
    """k, v [tokens, heads, dim], channels contiguous -> their codes for `attend_quantized` with this tile."""
    check_inputs(k, k, v)
    return encode(k, v, tile, statistics(k, v, how.statistics) if centres is None else centres, how)


def encode(k: Tensor, v: Tensor, tile: Tile, centres: Centres, how: Passes = PASSES) -> Quantized:
    """The second pass; v lies within `reach` of its centre."""
    keys, values = encode_keys(k, tile, centres, how.keys), encode_values(v, tile, centres, how.values)
    return Quantized(*keys, *values, len(k))


def encode_keys(
    k: Tensor, tile: Tile, centres: Centres, how: Pass = PASSES.keys, means: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The codes of K and their scales; the means of its tiles go into means [heads, tiles that hold tokens, dim]
    float32, contiguous."""
    tokens, heads, dim = k.shape
    padded = padded_length(tokens, tile)
    blocks = padded // tile.keys
    codes = torch.empty(heads, padded, dim, dtype=torch.int8, device=k.device)
    scale = torch.empty(heads, blocks, dtype=torch.float32, device=k.device)
    with on_device(k):
        keys_kernel[(triton.cdiv(blocks, how.tiles), heads)](
            k, centres[0], codes, scale, means, *k.stride()[:2], tokens, padded,
            TILES=how.tiles, KEYS=tile.keys, DIM=dim, STAGES=how.stages, num_warps=how.warps,
        )  # fmt: skip
    return codes, scale


def encode_values(v: Tensor, tile: Tile, centres: Centres, how: Pass = PASSES.values) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of V, their scale and their centre."""
    tokens, heads, dim = v.shape
    padded = padded_length(tokens, tile)
    parts = triton.cdiv(padded, BLOCK * how.tiles)
    eight, largest = tile.pv.startswith("fp8"), LARGEST_VALUE[tile.pv]
    _, centre, reach = centres
    codes = torch.empty(
        (heads, dim, padded) if eight else (heads, padded, dim),
        dtype=torch.float8_e4m3fn if eight else torch.float16, device=v.device,
    )  # fmt: skip
    sums = torch.empty(parts, heads, dim, dtype=torch.float32, device=v.device)
    scale, shifted = torch.empty(2, heads, dim, dtype=torch.float32, device=v.device).unbind()
    with on_device(v):
        values_kernel[(parts, heads)](
            v, centre, reach, codes, sums, *v.stride()[:2], tokens, padded,
            TILES=how.tiles, BLOCK=BLOCK, DIM=dim, EIGHT=eight, LARGEST=largest, FOLD=fold(how, dim),
            STAGES=how.stages, num_warps=how.warps,
        )  # fmt: skip
        shift_kernel[(heads,)](
            sums, centre, reach, scale, shifted, parts, tokens, STRIP=STRIP, DIM=dim, LARGEST=largest, num_warps=8
        )
    return codes, scale, shifted
