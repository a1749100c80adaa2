"""What is quantized, what it becomes, and where it lies in the file."""

from __future__ import annotations

import re
from functools import partial
from itertools import pairwise

import pytest
import torch
from allocations import peak_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lowvram_i2v.checkpoint import ALIGNMENT, BLOCKS, COMPONENTS, MODULATION
from lowvram_i2v.convert.policy import (
    SCHEME_NAMES,
    Layout,
    StoredTensor,
    cast,
    check_keep,
    component_scheme,
    layout,
    quantizable,
)
from lowvram_i2v.convert.shapes import Shapes, clip_shapes, llava_shapes, transformer_shapes, vae_shapes
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer
from lowvram_i2v.errors import CheckpointError, RequestError
from lowvram_i2v.kernels import chunks
from lowvram_i2v.kernels.scheme import SCHEMES, is_marker
from lowvram_i2v.synth.sizes import SIZES, clip_json, llava_json

QUANTIZING = pytest.mark.parametrize("scheme", SCHEMES)
IDS = dict.fromkeys(("begin", "end", "image", "pad"), 0)


def component_shapes(component: str, size: str) -> Shapes:
    sizes = SIZES[size]
    return {
        "transformer": lambda: transformer_shapes(sizes.transformer),
        "text_encoder": lambda: llava_shapes(llava_json(sizes, IDS)),
        "text_encoder_2": lambda: clip_shapes(clip_json(sizes)["text_config"]),
        "vae": lambda: vae_shapes(sizes.vae),
    }[component]()


def unread() -> Tensor:
    raise AssertionError("a weight was read")


def lazy(shapes: Shapes, dtype: torch.dtype = torch.bfloat16) -> dict[str, LazyTensor]:
    """Tensors that must not be read."""
    return {name: LazyTensor(shape, dtype, unread) for name, shape in shapes.items()}


def random(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, LazyTensor]:
    generator = torch.Generator().manual_seed(0)
    values = {name: (torch.randn(shape, generator=generator) * 0.1).to(dtype) for name, shape in shapes.items()}
    return {
        name: LazyTensor(tuple(value.shape), dtype, lambda value=value: value)  # type: ignore[misc]
        for name, value in values.items()
    }


def test_the_320_block_linears_of_the_full_transformer() -> None:
    with torch.device("meta"):
        model = HunyuanVideoTransformer(TransformerConfig())
    linears = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith(("double_blocks", "single_blocks"))
    ]
    shapes = component_shapes("transformer", "full")
    assert len(linears) == 320
    assert sorted(quantizable("transformer", shapes)) == sorted(linears)
    parameters = sum(torch.Size(shapes[f"{name}.weight"]).numel() for name in linears)
    assert round(parameters / 1e9, 3) == 12.457


def test_the_224_projections_of_the_full_text_encoder() -> None:
    layers = quantizable("text_encoder", component_shapes("text_encoder", "full"))
    assert len(layers) == 224
    kinds = {layer.rpartition(".")[2] for layer in layers}
    assert kinds == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert all(layer.startswith("model.layers.") for layer in layers), "the vision tower stays as it is"


@pytest.mark.parametrize("component", ["text_encoder_2", "vae"])
def test_clip_and_vae_are_never_quantized(component: str) -> None:
    assert quantizable(component, component_shapes(component, "full")) == []
    made = layout(component, "int8", lazy(component_shapes(component, "tiny")))
    assert {tensor.dtype for tensor in made.tensors} == {torch.float16}


@pytest.mark.parametrize(
    ("component", "scheme", "gigabytes"),
    [
        ("transformer", "bf16", 25.642),
        ("transformer", "fp8", 13.185),
        ("transformer", "int8", 13.189),
        ("transformer", "nf4", 7.736),
        ("text_encoder", "fp8", 8.68),
    ],
)
def test_full_sizes_are_those_that_peers_publish(component: str, scheme: str, gigabytes: float) -> None:
    made = layout(component, scheme, lazy(component_shapes(component, "full")))
    assert sum(tensor.bytes for tensor in made.tensors) / 1e9 == pytest.approx(gigabytes, abs=0.01)


def test_each_component_has_its_scheme() -> None:
    assert [component_scheme(name, "int8") for name in COMPONENTS] == ["int8", "fp8", "bf16", "bf16"]
    assert [component_scheme(name, "nf4", "nf4") for name in COMPONENTS] == ["nf4", "nf4", "bf16", "bf16"]
    assert [component_scheme(name, "bf16", "int8") for name in COMPONENTS] == ["bf16", "int8", "bf16", "bf16"]
    assert [component_scheme(name, "fp32") for name in COMPONENTS] == ["fp32"] * 4


def blocks_in(component: str, tensors: tuple[StoredTensor, ...]) -> list[tuple[str, ...]]:
    """For each tensor its group: outside, modulation, or the block's name."""
    groups: list[tuple[str, ...]] = []
    for tensor in tensors:
        prefix = next((p for p in BLOCKS[component] if tensor.name.startswith(f"{p}.")), None)
        if prefix is None:
            groups.append(("outside",))
            continue
        number, part, *_ = tensor.name.removeprefix(f"{prefix}.").split(".")
        groups.append(("modulation",) if component == "transformer" and part in MODULATION else (prefix, number))
    return groups


def assert_well_ordered(component: str, made: Layout) -> None:
    """Groups in their order, each one range; aligned tensors of a group first; jobs cover the file."""
    groups = blocks_in(component, made.tensors)
    ranges = [groups[0], *(b for a, b in pairwise(groups) if a != b)]
    assert len(set(ranges)) == len(ranges), "a group is in two places"
    numbers = {prefix: sorted(int(group[1]) for group in ranges if group[0] == prefix) for prefix in BLOCKS[component]}
    expected = [("outside",), ("modulation",)] if component == "transformer" else [("outside",)]
    expected += [(prefix, str(n)) for prefix in BLOCKS[component] for n in numbers[prefix]]
    assert ranges == [group for group in expected if group in ranges]

    for group in ranges:
        offset, uneven = 0, False
        for tensor in (t for t, g in zip(made.tensors, groups, strict=True) if g == group):
            uneven = uneven or tensor.bytes % ALIGNMENT != 0
            assert uneven or offset % ALIGNMENT == 0
            assert not (uneven and tensor.bytes % ALIGNMENT == 0), f"{tensor.name} is behind an uneven one"
            offset += tensor.bytes

    names = [tensor.name for tensor in made.tensors]
    assert len(set(names)) == len(names)
    assert sorted(names) == sorted(name for job in made.jobs for name in job.names)
    first = [min(names.index(name) for name in job.names) for job in made.jobs]
    assert first == sorted(first), "jobs are in the order of the file"


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
@pytest.mark.parametrize("component", COMPONENTS)
def test_the_full_models_file_is_in_order(component: str, scheme: str) -> None:
    assert_well_ordered(component, layout(component, scheme, lazy(component_shapes(component, "full"))))


@QUANTIZING
def test_every_weight_of_a_full_size_block_is_aligned(scheme: str) -> None:
    """With its block at a multiple of 16: scales and markers, whatever their length, come after it."""
    made = layout("transformer", scheme, lazy(component_shapes("transformer", "full")))
    groups, starts = blocks_in("transformer", made.tensors), {}
    offset = 0
    for tensor, group in zip(made.tensors, groups, strict=True):
        start = starts.setdefault(group, offset)
        if tensor.name.endswith((".weight", ".bias", ".absmax", ".weight_scale")):
            assert (offset - start) % ALIGNMENT == 0, tensor.name
        offset += tensor.bytes


@given(
    st.sampled_from(SCHEME_NAMES),
    st.lists(
        st.tuples(
            st.sampled_from(["double_blocks", "single_blocks", "img_in", "double_blocks_in"]),
            st.integers(0, 12),
            st.sampled_from(["img_mod.linear", "txt_mod.linear", "modulation.linear", "a", "b.c", "q_norm"]),
            st.sampled_from(["weight", "bias"]),
        ),
        unique=True,
        min_size=1,
    ),
    st.data(),
)
def test_any_file_is_in_order(scheme: str, names: list[tuple[str, int, str, str]], data: st.DataObject) -> None:
    """Blocks may come in any order and with any sizes, odd ones included."""
    sizes = st.integers(1, 40)
    shapes = {
        f"{prefix}.{number}.{part}.{kind}": data.draw(
            st.tuples(sizes) if kind == "bias" or part == "q_norm" else st.tuples(sizes, sizes)
        )
        for prefix, number, part, kind in names
    }
    assert_well_ordered("transformer", layout("transformer", scheme, lazy(shapes)))


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_jobs_make_what_was_announced(component: str, scheme: str) -> None:
    tensors = random(component_shapes(component, "tiny"))
    made = layout(component, scheme, tensors)
    announced = {tensor.name: (tensor.shape, tensor.dtype) for tensor in made.tensors}
    produced = {name: value for job in made.jobs for name, value in job.produce().items()}
    assert {name: (tuple(value.shape), value.dtype) for name, value in produced.items()} == announced
    quantized = quantizable(component, {name: tensor.shape for name, tensor in tensors.items()})
    for layer in quantized if scheme in SCHEMES else ():
        for suffix, part in SCHEMES[scheme].quantize(tensors[f"{layer}.weight"].read()).items():
            assert torch.equal(produced[f"{layer}.{suffix}"].float(), part.float())
    parts = {f"{layer}.{suffix}" for layer in quantized for suffix in SCHEMES.get(scheme, SCHEMES["int8"]).parts(1, 1)}
    for name, value in produced.items():
        if scheme not in SCHEMES or (name not in parts and not is_marker(name)):
            assert torch.equal(value, tensors[name].read().to(value.dtype))


def test_kept_layers_stay_unquantized() -> None:
    shapes = component_shapes("transformer", "tiny")
    keep = ("single_blocks.1.*", "*.img_mod.linear")
    made = {t.name: t.dtype for t in layout("transformer", "int8", lazy(shapes), keep).tensors}
    kept = {name for name in made if name.startswith("single_blocks.1.") or ".img_mod." in name}
    assert {made[name] for name in kept} == {torch.bfloat16}
    assert not [name for name in kept if name.endswith(("weight_scale", "comfy_quant"))]
    assert made["single_blocks.0.linear1.weight"] == made["double_blocks.1.txt_mod.linear.weight"] == torch.int8
    everything = layout("transformer", "fp8", lazy(shapes), ("*",))
    assert {tensor.dtype for tensor in everything.tensors} == {torch.bfloat16}, "nothing to mark, no marker"


def test_patterns_that_match_nothing_are_refused() -> None:
    layers = quantizable("transformer", component_shapes("transformer", "tiny"))
    check_keep(("double_blocks.*", "*.linear2"), layers)
    with pytest.raises(RequestError, match=r"--keep img_in\* matches no layer") as caught:
        check_keep(("double_blocks.*", "img_in*"), layers)
    assert layers[0] in str(caught.value)
    with pytest.raises(RequestError):
        check_keep(("*",), [])


@QUANTIZING
def test_a_source_in_the_same_scheme_is_copied(scheme: str) -> None:
    name = "double_blocks.0.img_mlp.fc1.weight"
    parts = SCHEMES[scheme].quantize(torch.randn(8, 64))
    held = {suffix: LazyTensor(tuple(part.shape), part.dtype, lambda part=part: part) for suffix, part in parts.items()}
    made = layout("transformer", scheme, {name: LazyTensor((8, 64), torch.float32, unread, held, scheme)})
    produced = {key: value for job in made.jobs for key, value in job.produce().items()}
    for suffix, part in parts.items():
        assert produced[f"double_blocks.0.img_mlp.fc1.{suffix}"] is part
    other = next(other for other in SCHEMES if other != scheme)
    with pytest.raises(AssertionError, match="a weight was read"):
        [
            job.produce()
            for job in layout(
                "transformer", other, {name: LazyTensor((8, 64), torch.float32, unread, held, scheme)}
            ).jobs
        ]


def test_parts_of_another_shape_are_not_copied() -> None:
    name = "double_blocks.0.img_mlp.fc1.weight"
    parts = SCHEMES["fp8"].quantize(torch.randn(8, 64))
    held = {
        suffix: LazyTensor((*part.shape, 1), part.dtype, lambda part=part: part[..., None])
        for suffix, part in parts.items()
    }
    made = layout("transformer", "fp8", {name: LazyTensor((8, 64), torch.float32, unread, held, "fp8")})
    with pytest.raises(AssertionError, match="a weight was read"):
        [job.produce() for job in made.jobs]


@QUANTIZING
def test_damaged_weights_are_refused_by_name(scheme: str) -> None:
    tensors = random({"single_blocks.7.linear1.weight": (4, 4), "final_layer.linear.bias": (3,)})
    tensors["single_blocks.7.linear1.weight"].read()[1, 2] = float("nan")
    with pytest.raises(CheckpointError, match=r"single_blocks\.7\.linear1\.weight has values"):
        [job.produce() for job in layout("transformer", scheme, tensors).jobs]


@pytest.mark.parametrize("suffix", ["weight", "scale_weight"])
def test_damaged_parts_are_not_copied(suffix: str) -> None:
    parts = SCHEMES["fp8"].quantize(torch.randn(8, 64))
    parts[suffix].reshape(-1)[-1:] = float("nan")
    held = {key: LazyTensor(tuple(part.shape), part.dtype, lambda part=part: part) for key, part in parts.items()}
    tensors = {"double_blocks.0.a.weight": LazyTensor((8, 64), torch.float32, unread, held, "fp8")}
    with pytest.raises(CheckpointError, match=rf"double_blocks\.0\.a\.{suffix} has values"):
        [job.produce() for job in layout("transformer", "fp8", tensors).jobs]


def test_values_beyond_float16_are_refused_by_name() -> None:
    tensors = random({"model.layers.0.input_layernorm.weight": (4,)})
    tensors["model.layers.0.input_layernorm.weight"].read()[2] = 1e5
    with pytest.raises(CheckpointError, match=r"input_layernorm\.weight has values up to 1e\+05"):
        [job.produce() for job in layout("text_encoder", "fp8", tensors).jobs]


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_damaged_values_are_refused_wherever_they_are(scheme: str, value: float) -> None:
    """Also in what is only cast, and in what stays as it is."""
    for name, dtype in (
        ("final_layer.linear.bias", torch.float32),
        ("img_in.proj.weight", torch.bfloat16),
        ("img_in.proj.bias", torch.float16),
    ):
        tensors = random({name: (9, 3)}, dtype)
        tensors[name].read()[8, 2] = value
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)} has values that are infinite or not a number"):
            [job.produce() for job in layout("transformer", scheme, tensors).jobs]


def test_values_beyond_bfloat16_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"a has values up to 3\.4e\+38, bfloat16 holds up to 3\.3895e\+38"):
        cast("a", torch.tensor([1.0, -3.4e38]), torch.bfloat16)
    assert cast("a", torch.tensor([65519.0]), torch.float16) == 65504
    with pytest.raises(CheckpointError, match="float16 holds up to 65504"):
        cast("a", torch.tensor([65520.0]), torch.float16)


def test_memory_of_a_cast_is_its_result_and_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of a copy a piece alone."""
    monkeypatch.setattr(chunks, "ELEMENTS", 2**10)
    values = torch.ones(2**14, 4)
    work, beside = [], []
    for stored, wanted in (
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.float16),
        (torch.float16, torch.float16),
        (torch.float8_e4m3fn, torch.float8_e4m3fn),
    ):
        source = values.to(stored)
        work.append(partial(cast, "a", source, wanted))
        beside.append(0 if stored == wanted else values.numel() * wanted.itemsize)
    piece = 4 * chunks.ELEMENTS
    for cast_one, result in zip(work, beside, strict=True):
        assert result <= peak_of(cast_one) <= result + piece + 1024
