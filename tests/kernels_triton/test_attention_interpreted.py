"""The attention kernels against their definitions, in Triton's interpreter on a CPU (on a GPU: as they are).

The interpreter's product of bfloat16 numbers is wrong, so inputs are float16. Its cast to e4m3 loses the carry into the
exponent, which makes 2 % of the numbers half as large as they are: errors of 7 % where the cards have 2.5 %. It runs a
tile in tens of milliseconds, so sequences are a few tiles long.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from lowvram_i2v.kernels import attention_reference as reference
from lowvram_i2v.kernels.attention_dense import attend
from lowvram_i2v.kernels.attention_int8 import attend_quantized
from lowvram_i2v.kernels.attention_quantize import (
    LARGEST_VALUE,
    SAMPLED,
    TURN,
    Quantized,
    quantize,
    round_e4m3,
    statistics,
)
from lowvram_i2v.kernels.attention_tiles import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = not torch.cuda.is_available()
DIM = 64
DENSE = Tile(32, 32, 4, 2)
INT8 = [Tile(32, 32, 4, 2, pv) for pv in ("fp16", "fp16_acc16", "fp8", "fp8_acc16")]


def inputs(
    tokens: int,
    heads: int = 2,
    *,
    peak: float = 1.0,
    outlier: float = 8.0,
    k_offset: float = 0.0,
    v_offset: float = 0.0,
):
    """q, k, v as views of one projection's output, as in the model; `peak` makes the softmax sharp."""
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(tokens, 3, heads, DIM, generator=generator)
    qkv[:, 0] *= peak
    qkv[:, 0, :, 5] *= outlier
    qkv[:, 1] += k_offset * torch.randn(heads, DIM, generator=generator)
    qkv[:, 2] += v_offset * torch.randn(heads, DIM, generator=generator)
    return qkv.half().to(DEVICE).unbind(1)


@triton.jit
def rounding_kernel(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, round_e4m3(tl.load(x + at)))


def test_rounding_is_that_of_e4m3() -> None:
    """All its numbers, the middles between neighbours (halves to even), and what lies just beside the middles."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    beside = [torch.nextafter(middles, torch.tensor(end)) for end in (0.0, 448.0)]
    some = torch.cat([codes, middles, *beside, torch.tensor([1e-30, 3e-5, 0.01563])])
    x = torch.zeros(1024)
    x[: 2 * len(some)] = torch.cat([some, -some])
    out = torch.full((1024,), torch.nan, device=DEVICE)
    rounding_kernel[(1,)](x.to(DEVICE), out, SIZE=1024)
    assert torch.equal(out.cpu(), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 100])
def test_dense(tokens: int) -> None:
    q, k, v = inputs(tokens, peak=2.0, k_offset=3.0, v_offset=2.0)
    assert reference.relative_l2(attend(q, k, v, DENSE), reference.attention(q, k, v)) < 1e-3


def test_dense_with_other_keys_than_queries_and_in_place() -> None:
    q, (_, k, v) = inputs(40)[0].clone(), inputs(75)
    expected = reference.attention(q, k, v)
    assert attend(q, k, v, DENSE, out=q) is q
    assert reference.relative_l2(q, expected) < 1e-3


def unpermuted(codes: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Codes of V as [padded, heads, dim] float32."""
    values = codes.float()
    if transposed:
        groups = values.reshape(*values.shape[:2], -1, 4, 2, 2).transpose(3, 4)
        values = groups.reshape(values.shape).transpose(1, 2)
    return values.transpose(0, 1)


def test_codes_are_those_of_the_definition() -> None:
    for tile in INT8:
        _, k, v = inputs(100, k_offset=3.0, v_offset=2.0)
        k_centre, v_centre, reach = statistics(k, v)
        torch.testing.assert_close(v_centre, v.float().mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(reach, (v.float() - v_centre).abs().amax(0))
        sampled = k[reference.sampled_tokens(len(k), SAMPLED, TURN)]
        torch.testing.assert_close(k_centre, sampled.float().mean(0), rtol=1e-5, atol=1e-5)
        kv = quantize(k, v, tile)
        padded, transposed = kv.k.shape[1], tile.pv.startswith("fp8")
        codes, scales = reference.quantize_keys(k, k_centre, tile.keys)
        assert (kv.k[:, : codes.shape[1]] != codes).float().mean() < 1e-3
        assert (kv.k[:, : codes.shape[1]].int() - codes).abs().max() < 2
        torch.testing.assert_close(kv.k_scale[:, : scales.shape[1]], scales, rtol=1e-5, atol=0.0)
        assert not kv.k[:, codes.shape[1] :].any()
        torch.testing.assert_close(kv.v_scale, reach / LARGEST_VALUE[tile.pv])
        values = reference.quantize_values(v, v_centre, kv.v_scale, padded, transposed)
        decoded = unpermuted(kv.v, transposed)[: len(v)] * kv.v_scale + kv.v_centre
        torch.testing.assert_close(decoded.mean(0), v_centre, rtol=1e-4, atol=1e-4)
        assert (kv.v.float() != values.float()).float().mean() < (INTERPRETED and transposed) * 0.03 + 1e-3


def from_codes(q: torch.Tensor, kv: Quantized, tile: Tile) -> torch.Tensor:
    """What the kernel would give if P were not rounded: attention of the dequantized queries, keys and values."""
    codes, scale = reference.quantize_queries(q)
    keys = kv.k.float() * kv.k_scale.repeat_interleave(tile.keys, 1)[..., None]
    values = unpermuted(kv.v, tile.pv.startswith("fp8")) * kv.v_scale + kv.v_centre
    keys = keys[:, : kv.tokens].transpose(0, 1)
    return reference.attention(codes.float() * scale[..., None], keys, values[: kv.tokens])


@pytest.mark.parametrize("tile", INT8, ids=str)
@pytest.mark.parametrize("tokens", [1, 70])
def test_int8_is_attention_of_its_codes(tile: Tile, tokens: int) -> None:
    limit = (0.1 if INTERPRETED else 0.03) if tile.pv.startswith("fp8") else 1e-3
    for peak in (0.3, 2.0):
        q, k, v = inputs(tokens, heads=1, peak=peak, k_offset=3.0)
        kv = quantize(k, v, tile)
        assert reference.relative_l2(attend_quantized(q, kv, tile), from_codes(q, kv, tile)) < limit


@pytest.mark.parametrize("tile", INT8, ids=str)
def test_int8_against_exact_attention(tile: Tile) -> None:
    """An offset of the keys changes nothing, one of the values makes the relative error small, not large."""
    limit = (0.15 if INTERPRETED else 0.06) if tile.pv.startswith("fp8") else 0.027
    for peak in (0.3, 2.0):
        for v_offset, allowed in ((0.0, limit), (20.0, limit / 10)):
            q, k, v = inputs(97, heads=1, peak=peak, outlier=2.0, k_offset=3.0, v_offset=v_offset)
            result = attend_quantized(q, quantize(k, v, tile), tile)
            assert reference.relative_l2(result, reference.attention(q, k, v)) < allowed


def test_a_channel_that_stands_out_costs_little() -> None:
    """Turned by an orthogonal matrix, it shares its size with the others; as it is, it takes the others' bits."""
    turning = reference.rotation(DIM)
    assert torch.equal(turning @ turning.T, DIM * torch.eye(DIM))
    assert turning.sum(0).abs().max() <= 8 * 2  # nor does a vector of equal channels go to a single one
    q, k, v = inputs(97, heads=1, peak=0.5, outlier=8.0, k_offset=3.0)
    k = k * torch.where(torch.arange(DIM, device=DEVICE) == 5, 8.0, 1.0).half()
    exact = reference.attention(q, k, v)
    (q_codes, q_scale), (k_codes, k_scale) = (
        reference.quantize_rows(x) for x in (q, (k.float() - k.float().mean(0)).reshape(1, -1))
    )
    keys = (k_codes.float() * k_scale[:, None]).reshape(k.shape)
    straight = reference.relative_l2(reference.attention(q_codes.float() * q_scale[..., None], keys, v), exact)
    assert reference.relative_l2(attend_quantized(q, quantize(k, v, INT8[0]), INT8[0]), exact) < straight / 2


@pytest.mark.parametrize("tile", [INT8[0], INT8[2]], ids=str)
def test_int8_in_place_with_other_keys_than_queries(tile: Tile) -> None:
    q, (_, k, v) = inputs(40)[0].clone(), inputs(75)
    kv = quantize(k, v, tile)
    expected = attend_quantized(q, kv, tile)
    assert attend_quantized(q, kv, tile, out=q) is q
    assert torch.equal(q, expected)


def test_rounding_errors_of_values_do_not_add_up() -> None:
    """Values on a coarse grid round to one side; a flat row, whose result is their mean, shall not feel it."""
    tile, tokens = INT8[2], 500
    v = (torch.randn(tokens, 1, DIM, generator=torch.Generator().manual_seed(0)) * 4).round().div(4).half().to(DEVICE)
    q = torch.zeros(1, 1, DIM, dtype=torch.float16, device=DEVICE)
    result = attend_quantized(q, quantize(v, v, tile), tile)
    assert (result.float() - v.float().mean(0)).abs().max() < 1e-3


def test_int8_of_zeros_and_of_equal_values() -> None:
    zeros = torch.zeros(40, 1, DIM, dtype=torch.float16, device=DEVICE)
    ones = torch.ones_like(zeros)
    for tile in INT8:
        assert torch.equal(attend_quantized(zeros, quantize(zeros, zeros, tile), tile), zeros)
        assert torch.equal(attend_quantized(ones, quantize(ones, ones, tile), tile), ones)


@pytest.mark.parametrize(
    ("q", "k"), [((8, 2, 64), (8, 3, 64)), ((8, 2, 48), (8, 2, 48)), ((8, 2, 64), (0, 2, 64))], ids=str
)
def test_what_the_kernels_cannot_do_is_refused(q: tuple[int, ...], k: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"heads|together"):
        attend(torch.zeros(q), torch.zeros(k), torch.zeros(k), DENSE)


@pytest.mark.parametrize("tile", [DENSE, INT8[2]], ids=str)
def test_offsets_are_64_bit(tile: Tile) -> None:
    """Rows as far apart as 37 tokens of 2^26 values: the last lies beyond 2^31. Memory is reserved, hardly touched."""
    rows, stride = 37, 2**26
    close = inputs(rows, heads=1)
    far = [torch.empty((rows - 1) * stride + DIM, dtype=torch.float16, device=DEVICE) for _ in close]
    wide = [x.as_strided((rows, 1, DIM), (stride, DIM, 1)) for x in far]
    for given, view in zip(close, wide, strict=True):
        view.copy_(given)
    if tile.pv == "16":
        assert torch.equal(attend(*wide, tile), attend(*close, tile))
        return
    result = attend_quantized(wide[0], quantize(*wide[1:], tile), tile)
    assert torch.equal(result, attend_quantized(close[0], quantize(*close[1:], tile), tile))
