"""The layout of a block's bytes: aligned, without overlap, and back to tensors without a change."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowvram_i2v.kernels.quant_linear import swap_linears
from lowvram_i2v.kernels.scheme import SCHEMES
from lowvram_i2v.streaming.slab import ALIGNMENT, SlabLayout, layout_of

DTYPES = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.float64)
TENSORS = st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=3).map(tuple), st.sampled_from(DTYPES)), max_size=12)


@given(TENSORS)
def test_places_are_aligned_and_do_not_overlap(tensors: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
    layout = SlabLayout.of({f"t{n}": tensor for n, tensor in enumerate(tensors)})
    end = 0
    for place, (shape, dtype) in zip(layout.places.values(), tensors, strict=True):
        assert place.offset % ALIGNMENT == 0
        assert end <= place.offset < end + ALIGNMENT
        end = place.offset + math.prod(shape) * dtype.itemsize
    assert end <= layout.bytes < end + ALIGNMENT
    assert layout.bytes % ALIGNMENT == 0


@given(TENSORS)
def test_what_is_filled_in_comes_out(tensors: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
    layout = SlabLayout.of({f"t{n}": tensor for n, tensor in enumerate(tensors)})
    values = {
        f"t{n}": torch.randint(0, 100, shape).to(torch.float32).to(dtype) for n, (shape, dtype) in enumerate(tensors)
    }
    slab = torch.full((layout.bytes + 64,), 7, dtype=torch.uint8)
    layout.fill(slab, values.__getitem__)
    moved = slab.clone()  # as a copy to a slot does it
    for name, view in layout.views(moved).items():
        assert (view.dtype, view.shape) == (values[name].dtype, values[name].shape)
        assert torch.equal(view.float(), values[name].float())
        assert view.untyped_storage().data_ptr() == moved.untyped_storage().data_ptr()
    assert (slab[layout.bytes :] == 7).all()


def tiny_block(scheme: str | None) -> nn.Module:
    with torch.device("meta"):
        block = nn.Sequential(nn.Linear(48, 40), nn.LayerNorm(40), nn.Linear(40, 16, bias=False))
    swap_linears(block, lambda name: SCHEMES[scheme] if scheme and name == "0" else None)
    return block


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floats_take_the_compute_dtype_and_quantized_parts_keep_theirs(scheme: str | None, dtype: torch.dtype) -> None:
    block = tiny_block(scheme)
    layout = layout_of(block, dtype)
    parts = {f"0.{suffix}": kind for suffix, (_, kind) in SCHEMES[scheme].parts(40, 48).items()} if scheme else {}
    assert set(parts) <= set(layout.places)
    assert {name: place.dtype for name, place in layout.places.items()} == {
        name: parts.get(name, dtype) for name in block.state_dict()
    }


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_a_bound_block_computes_as_one_with_weights_of_its_own(scheme: str | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 48)
    values = {"0.bias": torch.randn(40), "1.weight": torch.randn(40), "1.bias": torch.randn(40)}
    values |= {"2.weight": torch.randn(16, 40)}
    parts = SCHEMES[scheme].quantize(weight) if scheme else {"weight": weight}
    values |= {f"0.{suffix}": part for suffix, part in parts.items()}
    own, bound = tiny_block(scheme), tiny_block(scheme)
    own.load_state_dict(values, assign=True)
    layout = layout_of(bound, torch.float32)
    slab = torch.empty(layout.bytes, dtype=torch.uint8)
    layout.fill(slab, values.__getitem__)
    kinds = {name: type(tensor) for name, tensor in bound.state_dict(keep_vars=True).items()}
    layout.bind(bound, slab)
    assert {name: type(tensor) for name, tensor in bound.state_dict(keep_vars=True).items()} == kinds
    assert not any(parameter.requires_grad for parameter in bound.parameters())
    x = torch.randn(5, 48)
    assert torch.equal(bound(x), own(x))
    slab.fill_(0xFF)
    assert bound(x).isnan().all(), "the weights are copies, not views"


def test_unwanted_weights_stay_on_the_meta_device() -> None:
    block = tiny_block(None)
    layout = layout_of(block, torch.float32, lambda name: not name.startswith("2."))
    layout.bind(block, torch.zeros(layout.bytes, dtype=torch.uint8))
    assert {name for name, tensor in block.state_dict().items() if tensor.is_meta} == {"2.weight"}
