"""The quantization schemes: errors, edge values, independence of how weights are cut, and the libraries as judges."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from goldens import relative_l2
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.kernels import chunks
from lowvram_i2v.kernels.scheme import MARKERS, SCHEMES, QuantScheme, is_marker, scheme_of_dtype

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ALL = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def gaussian(*shape: int, seed: int = 0, sigma: float = 0.02) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * sigma


def restored(scheme: QuantScheme, weight: Tensor) -> Tensor:
    """After quantizing and back, in float32."""
    return scheme.dequantize(scheme.quantize(weight), torch.float32, tuple(weight.shape))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


@pytest.mark.parametrize("sigma", [1.0, 0.02, 1e-5])
@pytest.mark.parametrize(("name", "error", "margin"), [("int8", 0.9, 0.1), ("fp8", 2.65, 0.1), ("nf4", 9.2, 0.3)])
def test_error_on_gaussian_weights(name: str, error: float, margin: float, sigma: float) -> None:
    weight = gaussian(1024, 3072, sigma=sigma)
    assert 100 * relative_l2(restored(SCHEMES[name], weight), weight) == pytest.approx(error, abs=margin)


@ALL
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 64), (64, 33), (1, 130), (130, 1), (48, 256)])
def test_parts_are_as_announced(scheme: QuantScheme, shape: tuple[int, int]) -> None:
    parts = scheme.quantize(gaussian(*shape))
    assert {suffix: (tuple(part.shape), part.dtype) for suffix, part in parts.items()} == scheme.parts(*shape)
    for dtype in FLOATS:
        weight = scheme.dequantize(parts, dtype, shape)
        assert weight.dtype == dtype
        assert tuple(weight.shape) == shape
        assert torch.equal(weight, restored(scheme, gaussian(*shape)).to(dtype)), "rounded once, from float32"


def test_the_weights_dtype_names_its_scheme() -> None:
    assert {scheme_of_dtype(scheme.weight_dtype) for scheme in SCHEMES.values()} == set(SCHEMES.values())
    assert all(scheme_of_dtype(dtype) is None for dtype in FLOATS)
    assert all(name == scheme.name for name, scheme in SCHEMES.items())


@given(
    st.sampled_from(list(SCHEMES)),
    st.sampled_from(FLOATS),
    st.integers(1, 70),
    st.integers(1, 150),
    st.integers(1, 3000),
    st.integers(0, 2**32),
)
def test_pieces_do_not_change_results(
    name: str, dtype: torch.dtype, rows: int, columns: int, elements: int, seed: int
) -> None:
    scheme, weight = SCHEMES[name], gaussian(rows, columns, seed=seed).to(dtype)
    whole = scheme.quantize(weight)
    back = scheme.dequantize(whole, torch.float32, (rows, columns))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "ELEMENTS", elements)
        pieces = scheme.quantize(weight)
        assert all(same_bits(pieces[suffix], part) for suffix, part in whole.items())
        assert torch.equal(scheme.dequantize(pieces, torch.float32, (rows, columns)), back)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 1000))
def test_row_chunks_cover_the_rows_once(rows: int, columns: int, elements: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "ELEMENTS", elements)
        pieces = list(chunks.row_chunks(rows, columns))
    assert [row for piece in pieces for row in range(piece.start, piece.stop)] == list(range(rows))
    assert all(piece.stop - piece.start == 1 or (piece.stop - piece.start) * columns <= elements for piece in pieces)


@given(st.sampled_from(list(SCHEMES)), st.integers(1, 40), st.integers(1, 140), st.integers(0, 2**32))
def test_quantizing_again_changes_nothing(name: str, rows: int, columns: int, seed: int) -> None:
    """What a scheme can hold, it holds; so converting a converted model twice loses nothing more."""
    once = restored(SCHEMES[name], gaussian(rows, columns, seed=seed))
    assert relative_l2(restored(SCHEMES[name], once), once) < 3e-7


@given(
    st.sampled_from(list(SCHEMES)),
    st.sampled_from(FLOATS),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    st.data(),
)
def test_values_that_are_no_numbers_are_refused_by_name(
    name: str, dtype: torch.dtype, value: float, data: st.DataObject
) -> None:
    weight = gaussian(9, 75).to(dtype)
    weight[data.draw(st.integers(0, 8)), data.draw(st.integers(0, 74))] = value
    with pytest.raises(CheckpointError, match=r"double_blocks\.3\.img_mod\.linear\.weight has values"):
        SCHEMES[name].quantize(weight, "double_blocks.3.img_mod.linear.weight")


@ALL
@pytest.mark.parametrize("dtype", FLOATS)
def test_zeros_stay_zero(scheme: QuantScheme, dtype: torch.dtype) -> None:
    weight = torch.zeros(7, 65, dtype=dtype)
    for suffix, part in scheme.quantize(weight).items():
        if suffix in ("weight_scale", "scale_weight"):
            assert (part == torch.finfo(torch.float32).tiny).all(), "no division by zero, nowhere"
        elif scheme.name != "nf4":
            assert (part.float() == 0).all()
    assert torch.equal(restored(scheme, weight), weight.float())
    weight[2:] = gaussian(5, 65)
    assert torch.equal(restored(scheme, weight)[0], weight.float()[0])


@ALL
def test_rows_of_subnormal_numbers_cost_no_more_than_themselves(scheme: QuantScheme) -> None:
    """Nothing divides by zero or overflows where a whole weight is below the smallest normal number."""
    for magnitude in (1e-45, 3e-44, 1e-40, 1e-38, 2e-38, 1e-36):
        weight = gaussian(4, 64, sigma=1) * magnitude
        weight[1] = 0
        error = (restored(scheme, weight) - weight).abs().max()
        assert error <= weight.abs().max()
        mixed = torch.cat([weight, gaussian(2, 64)])
        back = restored(scheme, mixed)
        assert back.isfinite().all()
        assert relative_l2(back, mixed) < 0.15


@ALL
def test_the_largest_numbers_survive(scheme: QuantScheme) -> None:
    largest = torch.finfo(torch.float32).max / 2
    weight = gaussian(3, 64, sigma=1) * (largest / 8)
    weight[0, 0], weight[1, 1] = largest, -largest
    back = restored(scheme, weight)
    assert relative_l2(back.double() / largest, weight.double() / largest) < 0.15


def test_int8_codes_are_symmetric_and_reach_the_end() -> None:
    parts = SCHEMES["int8"].quantize(gaussian(500, 300))
    assert torch.equal(parts["weight"].abs().amax(1), torch.full((500,), 127, dtype=torch.int8))
    assert parts["weight"].min() >= -127


def test_fp8_values_are_clamped() -> None:
    weight = gaussian(64, 64)
    weight[3, 5] = -3.0
    parts = SCHEMES["fp8"].quantize(weight)
    values = parts["weight"].float()
    assert values.isfinite().all()
    assert values.abs().max() == 448 == -values[3, 5]
    assert parts["scale_weight"] == torch.tensor(3.0) / 448


def test_markers_are_known_and_as_comfyui_wants_them() -> None:
    fp8, int8, nf4 = (SCHEMES[name] for name in ("fp8", "int8", "nf4"))
    assert [fp8.file_markers(name)["scaled_fp8"].numel() for name in ("transformer", "text_encoder")] == [2, 0]
    assert fp8.file_markers("transformer")["scaled_fp8"].dtype == torch.float8_e4m3fn
    assert bytes(int8.layer_markers()["comfy_quant"].tolist()) == b'{"format":"int8_tensorwise"}'
    assert not {**nf4.file_markers("transformer"), **nf4.layer_markers(), **int8.file_markers("transformer")}
    names = {name for scheme in SCHEMES.values() for name in (*scheme.file_markers("x"), *scheme.layer_markers())}
    assert names == set(MARKERS)
    assert is_marker("scaled_fp8")
    assert is_marker("a.b.comfy_quant")
    assert not is_marker("scaled_fp8.weight")


@ALL
@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_and_its_derivative(scheme: QuantScheme, dtype: torch.dtype) -> None:
    weight, bias = gaussian(24, 40, sigma=0.2), gaussian(24, seed=1).to(dtype)
    x = gaussian(3, 5, 40, seed=2, sigma=1).to(dtype).requires_grad_()
    parts = scheme.quantize(weight)
    y = scheme.linear(x, parts, bias, (24, 40))
    dequantized = scheme.dequantize(parts, dtype, (24, 40))
    assert torch.equal(y, torch.nn.functional.linear(x, dequantized, bias))
    direction = gaussian(3, 5, 24, seed=3, sigma=1).to(dtype)
    (gradient,) = torch.autograd.grad(y, x, direction)
    assert torch.equal(gradient, direction @ dequantized)


@ALL
@pytest.mark.gpu
def test_a_gpu_makes_the_same_bits(scheme: QuantScheme) -> None:
    weight = gaussian(2050, 3073).to(torch.bfloat16)
    here, there = scheme.quantize(weight), scheme.quantize(weight.cuda())
    assert all(same_bits(here[suffix], part.cpu()) for suffix, part in there.items())
    for dtype in FLOATS:
        back = scheme.dequantize(there, dtype, tuple(weight.shape))
        assert torch.equal(back.cpu(), scheme.dequantize(here, dtype, tuple(weight.shape)))


MEASURE = """
import os, resource, torch
from lowvram_i2v.kernels.scheme import SCHEMES
torch.set_num_threads(1)
def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, scheme in SCHEMES.items():
    if os.fork() == 0:
        torch.set_num_threads(2)
        weight = torch.full((21504, 3072), 0.5, dtype=torch.bfloat16)
        scheme.quantize(weight[:64])
        before = most()
        scheme.quantize(weight)
        print(name, most() - before, flush=True)
        os._exit(0)
    _, status = os.wait()
    assert status == 0
"""


@pytest.fixture(scope="module")
def growth() -> dict[str, int]:
    """By how many bytes each scheme's quantization of the largest weight makes a process larger."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=root, capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    return {name: int(grown) * unit for name, grown in map(str.split, done.stdout.splitlines())}


@ALL
def test_the_largest_weight_needs_little_memory(scheme: QuantScheme, growth: dict[str, int]) -> None:
    """Result included: 64 MiB of 8-bit codes, or half."""
    assert 0 <= growth[scheme.name] < 192 * 2**20
