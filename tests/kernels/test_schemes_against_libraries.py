"""bitsandbytes and optimum-quanto as judges of the formats that bear their names."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowvram_i2v.kernels.scheme import SCHEMES

bitsandbytes = pytest.importorskip("bitsandbytes.functional")
quanto = pytest.importorskip("optimum.quanto")

NF4, INT8 = SCHEMES["nf4"], SCHEMES["int8"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 2), (5, 7), (33, 64), (64, 33), (3, 21), (128, 96), (257, 129), (1, 63), (1, 65)]


@pytest.fixture(autouse=True)
def _without_compiling() -> object:
    """bitsandbytes compiles one of its functions for every shape: seconds each, the same result."""
    with torch.compiler.set_stance("force_eager"):
        yield


def weight(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def assert_equals_bitsandbytes(value: Tensor) -> None:
    """Dequantized as one run of values: in many rows of an even length that is no multiple of 64, the CPU kernel of
    bitsandbytes 0.50 multiplies by the wrong block's scale, so that its own round trip fails."""
    ours = NF4.quantize(value)
    codes, state = bitsandbytes.quantize_4bit(value, blocksize=64, quant_type="nf4", compress_statistics=False)
    assert ours["weight"].shape == codes.shape
    assert torch.equal(ours["weight"], codes)
    assert torch.equal(ours["absmax"], state.absmax)
    back = NF4.dequantize(ours, value.dtype, tuple(value.shape))
    if value.shape[1] % 64 == 0:
        assert torch.equal(back, bitsandbytes.dequantize_4bit(codes, state))
    state.shape = torch.Size((1, value.numel()))
    assert torch.equal(back, bitsandbytes.dequantize_4bit(codes, state).reshape(value.shape))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_bitsandbytes_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_equals_bitsandbytes(weight(*shape, dtype))


@given(st.integers(1, 40), st.integers(1, 200), st.sampled_from(FLOATS), st.integers(0, 2**32), st.data())
def test_nf4_is_bitsandbytes_on_odd_values_too(
    rows: int, columns: int, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    """Rows of zeros, of one value, of tiny and of large ones; ties between table values."""
    value = weight(rows, columns, dtype, seed)
    for _ in range(3):
        row = data.draw(st.integers(0, rows - 1))
        value[row] *= data.draw(st.sampled_from([0, 1e-30, 1e-42, 10]))
        value[row, data.draw(st.integers(0, columns - 1)) :] = data.draw(st.sampled_from([0.0, -0.01, 0.5, 1.0]))
    assert_equals_bitsandbytes(value)


@pytest.mark.parametrize("columns", [64, 46])
def test_nf4_is_bitsandbytes_at_the_edges_between_codes(columns: int) -> None:
    """Where a tie and the last bit decide: a whole block is multiplied by a reciprocal, a shorter one divided."""
    from lowvram_i2v.kernels.nf4 import TABLE

    table = torch.tensor(TABLE)
    edges = (table[1:] + table[:-1]) / 2
    for largest in [1.0, *torch.rand(60, generator=torch.Generator().manual_seed(0)).tolist()]:
        exact = edges * largest
        near = [exact, exact.nextafter(torch.tensor(9.0)), exact.nextafter(torch.tensor(-9.0))]
        value = torch.cat([torch.tensor([largest]), *near, torch.zeros(18)])[None, :columns]
        assert_equals_bitsandbytes(value)


def test_nf4_takes_and_gives_the_table() -> None:
    from bitsandbytes.functional import get_4bit_type

    from lowvram_i2v.kernels.nf4 import TABLE

    assert torch.equal(get_4bit_type("nf4", device="cpu"), torch.tensor(TABLE))
    assert torch.equal(
        NF4.dequantize(NF4.quantize(torch.tensor([TABLE])), torch.float32, (1, 16))[0], torch.tensor(TABLE)
    )


def quanto_parts(value: Tensor) -> tuple[Tensor, Tensor]:
    scale = quanto.AbsmaxOptimizer()(value, quanto.qint8, 0)
    quantized = quanto.quantize_weight(value, quanto.qint8, 0, scale, optimized=False)
    return quantized._data, quantized._scale


@pytest.mark.parametrize("shape", [(2, 1), (5, 7), (33, 64), (257, 129)])
def test_int8_is_quantos_bit_for_bit_in_float32(shape: tuple[int, int]) -> None:
    value = weight(*shape, torch.float32)
    ours = INT8.quantize(value)
    codes, scale = quanto_parts(value)
    assert torch.equal(ours["weight"], codes)
    assert torch.equal(ours["weight_scale"], scale)


def test_int8_of_bfloat16_differs_from_quantos_by_its_rounded_scale() -> None:
    """quanto computes in bfloat16: scales 0.2 % off, some codes one off. Ours is nearer to the weight."""
    value = weight(257, 512, torch.bfloat16)
    ours = INT8.quantize(value)
    codes, scale = quanto_parts(value)
    assert scale.dtype == torch.bfloat16
    assert ((scale.float() - ours["weight_scale"]) / ours["weight_scale"]).abs().max() <= 2**-8
    assert (codes.int() - ours["weight"].int()).abs().max() <= 1
    error = (INT8.dequantize(ours, torch.float32, (257, 512)) - value.float()).norm()
    assert error < (codes.float() * scale.float() - value.float()).norm()
