"""Layers opened for many calls: the same numbers as the layer, the memory that was announced, and nothing kept."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lowvram_i2v.errors import RequestError
from lowvram_i2v.kernels import chunks, compute, w8a8
from lowvram_i2v.kernels.compute import COMPUTES, PRODUCTS, is_8_bit, refusal, scratch
from lowvram_i2v.kernels.quant_linear import QuantLinear, opened, set_compute
from lowvram_i2v.kernels.scheme import SCHEMES

ALL = pytest.mark.parametrize("scheme", SCHEMES)
BOTH = pytest.mark.parametrize("name", COMPUTES)
CPU = torch.device("cpu")


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(
    scheme: str,
    name: str,
    shape: tuple[int, int],
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> QuantLinear:
    """A layer of this shape (out, in) with Gaussian weights, as a loader makes it: only the bias has `dtype`."""
    layer = QuantLinear(SCHEMES[scheme], shape[1], shape[0], bias)
    state = SCHEMES[scheme].quantize(gaussian(*shape) / shape[1] ** 0.5)
    if bias:
        state["bias"] = gaussian(shape[0], seed=1).to(dtype)
    layer.load_state_dict({key: value.to(device) for key, value in state.items()}, assign=True)
    set_compute(layer, name)
    return layer.eval().requires_grad_(False)


@given(st.sampled_from(list(SCHEMES)), st.integers(1, 40), st.integers(1, 150), st.integers(1, 3000), st.data())
def test_rows_are_those_of_the_dequantized_weight(
    scheme: str, out: int, into: int, elements: int, data: st.DataObject
) -> None:
    """For nf4, rows begin and end anywhere inside blocks and bytes."""
    first = data.draw(st.integers(0, out - 1))
    end = data.draw(st.integers(first + 1, out))
    parts = SCHEMES[scheme].quantize(gaussian(out, into))
    whole = SCHEMES[scheme].dequantize(parts, torch.float32, (out, into))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "ELEMENTS", elements)
        rows = SCHEMES[scheme].dequantize(parts, torch.float32, (out, into), slice(first, end))
    assert torch.equal(rows, whole[first:end])
    assert rows.untyped_storage().nbytes() == rows.nbytes, "the rest of the weight is not kept"


@ALL
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_opened_rows_compute_their_part_of_the_layer(scheme: str, name: str, dtype: torch.dtype, bias: bool) -> None:
    layer = quantized(scheme, name, (160, 64), bias, dtype)
    x = gaussian(2, 19, 64, seed=5).to(dtype)
    whole = layer(x)
    assert (whole.shape, whole.dtype) == ((2, 19, 160), dtype)
    for rows in (slice(None), slice(0, 96), slice(96, 160), slice(96, None)):
        part = opened(layer, dtype, rows)(x.flatten(0, 1)).view(2, 19, -1)
        assert part.dtype == dtype
        torch.testing.assert_close(part, whole[..., rows], rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 0.01)


def test_an_ordinary_layer_is_used_where_it_is() -> None:
    layer = nn.Linear(6, 8)
    x = gaussian(5, 6).requires_grad_()
    assert torch.equal(opened(layer, torch.float32)(x), layer(x))
    part = opened(layer, torch.float32, slice(2, 5))(x)
    assert torch.equal(part, F.linear(x, layer.weight[2:5], layer.bias[2:5]))
    part.sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert opened(layer, torch.float64)(x.double()).dtype == torch.float64
    assert opened(nn.Linear(6, 8, bias=False), torch.float32, slice(0, 3))(x).shape == (5, 3)


@ALL
def test_derivative_with_respect_to_the_input(scheme: str) -> None:
    layer, direction = quantized(scheme, "w8a16", (48, 32)), gaussian(3, 48)
    weight = SCHEMES[scheme].dequantize(layer.parts(), torch.float32, (48, 32))
    for call in (layer, opened(layer, torch.float32)):
        x = gaussian(3, 32).requires_grad_()
        (gradient,) = torch.autograd.grad(call(x), x, direction)
        assert torch.equal(gradient, direction @ weight)
    set_compute(layer, "w8a8")
    if is_8_bit(scheme, "w8a8", (48, 32)):
        with pytest.raises(RuntimeError, match="no derivative"):
            layer(x)
    with torch.no_grad():
        assert not layer(x).requires_grad


@ALL
def test_weights_made_in_inference_mode_serve_outside_of_it(scheme: str) -> None:
    from lowvram_i2v.kernels import nf4

    nf4._pairs.cache_clear()
    with torch.inference_mode():
        inside = quantized(scheme, "w8a16", (48, 32))(gaussian(3, 32))
    x = gaussian(3, 32).requires_grad_()
    y = quantized(scheme, "w8a16", (48, 32))(x)
    y.sum().backward()
    assert torch.equal(y, inside)


def test_set_compute_reaches_quantized_layers_only() -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.Sequential(quantized("int8", "w8a16", (48, 32))))
    set_compute(model, "w8a8")
    assert model[1][0].compute == "w8a8"
    assert "w8a8" in repr(model)
    assert not hasattr(model[0], "compute")
    set_compute(model, "w8a16", only=lambda path: path != "1.0")
    with pytest.raises(RequestError, match="w4a4"):
        set_compute(model, "w4a4")
    assert model[1][0].compute == "w8a8"
    set_compute(model, "w8a16", only=lambda path: path == "1.0")
    assert model[1][0].compute == "w8a16"


@pytest.mark.parametrize(
    ("scheme", "shape"), [("int8", (36, 32)), ("int8", (32, 36)), ("fp8", (24, 32)), ("nf4", (32, 32))]
)
def test_layers_that_have_no_8_bit_product_keep_16(scheme: str, shape: tuple[int, int]) -> None:
    assert not is_8_bit(scheme, "w8a8", shape)
    x = gaussian(5, shape[1])
    assert torch.equal(quantized(scheme, "w8a8", shape)(x), quantized(scheme, "w8a16", shape)(x))
    assert scratch(scheme, "w8a8", shape, 5, 4) == scratch(scheme, "w8a16", shape, 5, 4)


def peaks(act: Callable[[], object]) -> tuple[int, int]:
    """Bytes allocated on the CPU while acting: the most at any moment, and what is left when the result is dropped."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        act()
    assert watched.profiler is not None
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, now


@ALL
@BOTH
@pytest.mark.parametrize(
    ("shape", "tokens"), [((768, 256), 101), ((256, 1024), 500), ((96, 2048), 7), ((1040, 80), 500)]
)
@pytest.mark.parametrize("small", [False, True])
def test_memory_is_what_was_announced(
    scheme: str, name: str, shape: tuple[int, int], tokens: int, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, and with a CPU's product of fp8 replaced by one that makes no copies, as on a GPU. `small`: weights
    and rows are cut into many pieces, as those of the full size are."""
    if small:
        monkeypatch.setattr(chunks, "ELEMENTS", 2**14)
        monkeypatch.setattr(compute, "PRODUCT", 2**15)
    as_on_a_gpu = w8a8.Way("fp8", codes_only, lambda codes, device: codes == w8a8.FP8)
    monkeypatch.setattr(w8a8, "WAYS", [as_on_a_gpu, *w8a8.WAYS])
    layer, x = quantized(scheme, name, shape), gaussian(tokens, shape[1])
    layer(x)
    announced = scratch(scheme, name, shape, tokens, 4)
    held, left = peaks(lambda: opened(layer, torch.float32))
    assert left == 0, "nothing is left of a dropped layer"
    linear = opened(layer, torch.float32)
    call, left = peaks(lambda: linear(x))
    assert left == 0
    need = max(held, announced.held + call - tokens * shape[0] * 4)
    assert need == pytest.approx(announced.held + announced.call, rel=0.02)


def codes_only(x: w8a8.Codes, weight: w8a8.OpenWeight, dtype: torch.dtype) -> Tensor:
    return torch.empty(len(x.codes), len(weight.codes), dtype=dtype)


def test_at_full_size_an_8_bit_product_needs_less_than_a_dequantized_weight() -> None:
    """The largest layers, chunks of 4096 tokens, bfloat16; fp8 holds all codes of a chunk, int8 parts of them."""
    for shape in [(9216, 3072), (3072, 12288), (12288, 3072), (3072, 15360)]:
        plain = scratch("int8", "w8a16", shape, 4096, 2)
        assert plain == compute.Scratch(shape[0] * shape[1] * 2, 0)
        for scheme in PRODUCTS:
            eight = scratch(scheme, "w8a8", shape, 4096, 2)
            assert eight.held == shape[0] * 4
            assert eight.call < 128 * 2**20
    assert scratch(None, "w8a8", (9216, 3072), 4096, 2) == compute.Scratch(0, 0)


def test_counting_needs_no_torch() -> None:
    code = "import sys; from lowvram_i2v.kernels.compute import scratch; scratch('nf4', 'w8a16', (8, 8), 4, 2)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


def test_what_a_card_cannot_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3060")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert refusal("w8a8", "fp8", card) == (
        "NVIDIA GeForce RTX 3060 has compute capability 8.6; fp8 products need 8.9 (RTX 40, H100, and later)"
    )
    monkeypatch.setattr(w8a8, "trial", lambda scheme, device: f"tried {scheme}")
    assert refusal("w8a8", "int8", card) == "tried int8"
    assert all(refusal("w8a16", scheme, card) is None for scheme in (*SCHEMES, None))
    assert all(refusal("w8a8", scheme, card) is None for scheme in ("nf4", None))
    assert all(refusal("w8a8", scheme, CPU) is None for scheme in SCHEMES)
    assert "type mps" in (refusal("w8a8", "int8", torch.device("mps")) or "")
    with pytest.raises(RequestError):
        refusal("w2a2", "int8", CPU)


@pytest.mark.parametrize("scheme", PRODUCTS)
def test_the_first_way_that_is_right_on_a_card_is_taken(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, card = w8a8.CODES[scheme], torch.device("cuda", 0)

    def unsupported(*given: object) -> Tensor:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling\nmore")

    linears = {"right": w8a8.torch_linear, "off": lambda *given: 1.05 * w8a8.torch_linear(*given), "none": unsupported}
    ways = {name: w8a8.Way(name, linear, lambda codes, device: True) for name, linear in linears.items()}
    found = {name: w8a8._fault(one, codes, CPU) for name, one in ways.items()}
    assert found["right"] is None
    assert "wrong by 0.05" in (found["off"] or "")
    assert (found["none"] or "").endswith("there: RuntimeError CUBLAS_STATUS_NOT_SUPPORTED when calling")
    monkeypatch.setattr(w8a8, "_fault", lambda one, codes, device: found[one.name])
    monkeypatch.setattr(w8a8, "WAYS", [ways["none"], ways["off"], ways["right"]])
    assert w8a8.way(codes, card) is ways["right"]
    assert w8a8.trial(scheme, card) is None
    monkeypatch.setattr(w8a8, "WAYS", [ways["none"], ways["off"]])
    assert w8a8.trial(scheme, card) == f"none {found['none']}; off {found['off']}"


@ALL
@BOTH
@pytest.mark.gpu
def test_a_gpu_is_never_waited_for_and_takes_the_announced_memory(scheme: str, name: str) -> None:
    """Beside what the matrix library keeps for itself."""
    device, shape, tokens = torch.device("cuda"), (9216, 3072), 4096
    assert refusal(name, scheme, device) is None
    layer = quantized(scheme, name, shape, dtype=torch.bfloat16, device=device)
    x = gaussian(tokens, shape[1]).to(device, torch.bfloat16)
    expected = layer(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear = opened(layer, torch.bfloat16)
        y = linear(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    need, announced = torch.cuda.max_memory_allocated() - before - y.nbytes, scratch(scheme, name, shape, tokens, 2)
    assert torch.equal(y, expected)
    assert need >= announced.held
    assert need <= 1.02 * (announced.held + announced.call) + 33 * 2**20
    print(f"\n{scheme} {name}: {need / 2**20:.1f} MiB, announced {(announced.held + announced.call) / 2**20:.1f}")
