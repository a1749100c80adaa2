"""Each layout of the transformer, written as its tools write it: read back exactly, or with the values that its codes
and scales mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformer_layouts import (
    CONCAT,
    WIDE,
    Layers,
    State,
    as_comfy,
    as_diffusers,
    clone,
    comfy_metadata,
    fp8_scaled,
    in_blocks,
    int8_rows,
    official_state,
    plain_fp8,
    prefixed,
    quantized_layers,
    quanto_int8,
    with_comfy_quant,
    write,
    write_shards,
)

from lowvram_i2v.convert.sources import ComponentSource, Hints, open_component, open_source
from lowvram_i2v.convert.sources.gguf_file import TYPES
from lowvram_i2v.errors import CheckpointError, PlatformError
from lowvram_i2v.kernels.scheme import SCHEMES

PREFIXES = [
    "",
    "model.diffusion_model.",
    "model.model.",
    "diffusion_model.",
    "transformer.",
    "module.",
    "net.",
    "model.",
]
NAME = "hunyuan_i2v.safetensors"


def read(path: Path, **hints: Any) -> ComponentSource:
    return open_component(path, "transformer", Hints(**hints))


def assert_same(source: ComponentSource, expected: State) -> None:
    """All names, announced shapes and dtypes, and every bit of every value."""
    assert set(source.tensors) == set(expected)
    for name, lazy in source.tensors.items():
        values = lazy.read()
        assert (tuple(values.shape), values.dtype) == (lazy.shape, lazy.dtype), name
        assert values.is_contiguous(), name
        assert torch.equal(values, expected[name].to(values.dtype)), name
        assert values.dtype in (expected[name].dtype, torch.float32), name


def assert_kept(source: ComponentSource, scheme: str, expected: State) -> None:
    """The codes are there to be copied, and mean the same in our own scheme."""
    for name, values in expected.items():
        tensor = source.tensors[name]
        if not in_blocks(name):
            assert tensor.parts is None, name
            continue
        assert tensor.scheme == scheme, name
        assert tensor.parts is not None
        announced = {suffix: (part.shape, part.dtype) for suffix, part in tensor.parts.items()}
        assert announced == SCHEMES[scheme].parts(*tensor.shape), name
        parts = {suffix: part.read() for suffix, part in tensor.parts.items()}
        assert torch.equal(SCHEMES[scheme].dequantize(parts, torch.float32, tensor.shape), values), name  # type: ignore[arg-type]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("naming", ["official", "official_to_comfy_old", "official_to_comfy_new", "diffusers"])
def test_names_and_prefixes(naming: str, prefix: str, tmp_path: Path) -> None:
    state = official_state()
    theirs = {"official": dict, "diffusers": as_diffusers}.get(naming, lambda s: as_comfy(s, naming))(state)
    source = read(write(prefixed(theirs, prefix), tmp_path / NAME))
    assert_same(source, state)
    assert source.variant == "token_replace"
    assert source.notices == ()
    assert source.bytes == (tmp_path / NAME).stat().st_size


@pytest.mark.parametrize("naming", ["official", "diffusers", "comfy"])
def test_latent_concat(naming: str, tmp_path: Path) -> None:
    state = official_state(CONCAT)
    theirs = {"official": dict, "diffusers": as_diffusers, "comfy": as_comfy}[naming](state)
    source = read(write(theirs, tmp_path / "x.safetensors"))
    assert_same(source, state)
    assert source.variant == "latent_concat"


@pytest.mark.parametrize("wrapper", [None, "module", "ema", "state_dict", "model"])
@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_pickles(wrapper: str | None, old_format: bool, prefix: str, tmp_path: Path) -> None:
    state = prefixed(official_state(), prefix)
    path = tmp_path / "i2v.pt"
    torch.save({wrapper: state, "step": 3} if wrapper else state, path, _use_new_zipfile_serialization=not old_format)
    assert_same(read(path), official_state())


def test_views_in_a_pickle(tmp_path: Path) -> None:
    """Transposed, offset and shared storages."""
    state = dict(official_state())
    name = "double_blocks.0.img_attn_proj.weight"
    state[name] = clone(state[name].T).T
    wide = torch.cat((state["img_in.proj.bias"], state["img_in.proj.bias"]))
    state["img_in.proj.bias"] = wide[wide.numel() // 2 :]
    torch.save({"module": state}, tmp_path / "i2v.pt")
    assert_same(read(tmp_path / "i2v.pt"), official_state())


@pytest.mark.parametrize("named", ["folder", "index"])
def test_a_diffusers_folder(named: str, tmp_path: Path) -> None:
    folder = tmp_path / "HunyuanVideo" / "transformer"
    index = write_shards(as_diffusers(official_state()), folder)
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "HunyuanVideoTransformer3DModel", "image_condition_type": "token_replace"})
    )
    source = read(folder if named == "folder" else index)
    assert_same(source, official_state())
    assert source.variant == "token_replace"
    (tmp_path / "HunyuanVideo" / "model_index.json").write_text("{}")
    assert_same(open_source(tmp_path / "HunyuanVideo", ["transformer"])["transformer"], official_state())
    with pytest.raises(CheckpointError, match="missing: vae/"):
        open_source(tmp_path / "HunyuanVideo", ["transformer", "vae"])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = write_shards(as_diffusers(official_state()), tmp_path)
    next(tmp_path.glob("*00002*")).unlink()
    with pytest.raises(CheckpointError, match="missing: diffusion_pytorch_model-00002-of-00003"):
        read(index)


@pytest.mark.parametrize(
    ("suffix", "shape", "marker"),
    [
        ("scale_weight", "scalar", True),
        ("scale_weight", "one", True),
        ("scale_weight", "one", False),
        ("scale_weight", "row", False),
        ("scale_weight", "block", False),
        ("weight_scale", "row", False),
        ("weight_scale", "flat row", False),
        ("weight_scale", "block", False),
        ("fp8_scale", "scalar", False),
        ("fp8_scale", "one", False),
    ],
)
def test_fp8_with_scales(suffix: str, shape: str, marker: bool, tmp_path: Path) -> None:
    tensors, expected = fp8_scaled(official_state(), suffix, shape, marker)
    source = read(write(tensors, tmp_path / NAME))
    assert_same(source, expected)
    if shape in ("scalar", "one"):
        assert_kept(source, "fp8", expected)
    else:
        assert all(tensor.parts is None for tensor in source.tensors.values())


def test_scales_of_activations_are_left_behind(tmp_path: Path) -> None:
    tensors, expected = fp8_scaled(official_state(), "scale_weight", marker=True)
    tensors |= {f"{layer}.scale_input": torch.ones(()) for layer in quantized_layers(official_state())}
    assert_same(read(write(tensors, tmp_path / NAME)), expected)


@pytest.mark.parametrize("how", ["tensors", "metadata"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_comfy_since_0_4_fp8(how: str, prefix: str, tmp_path: Path) -> None:
    tensors, expected = fp8_scaled(official_state(), "weight_scale")
    layers, config = quantized_layers(official_state()), {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    if how == "tensors":
        tensors = with_comfy_quant(tensors, layers, config)
    metadata = comfy_metadata([prefix + layer for layer in layers], config) if how == "metadata" else None
    source = read(write(prefixed(tensors, prefix), tmp_path / NAME, metadata))
    assert_same(source, expected)
    assert_kept(source, "fp8", expected)


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("how", ["comfy", "LightX2V"])
def test_int8(how: str, scalar: bool, tmp_path: Path) -> None:
    tensors, expected = int8_rows(official_state(), scalar=scalar)
    if how == "comfy":
        layers = quantized_layers(official_state())
        tensors = with_comfy_quant(tensors, layers, {"format": "int8_tensorwise"})
    source = read(write(tensors, tmp_path / NAME))
    assert_same(source, expected)
    assert_kept(source, "int8", expected)


def test_fp8_scaled_in_comfys_and_diffusers_names(tmp_path: Path) -> None:
    """Names and quantization are independent: scales follow their layers' new names; joined rows are float32."""
    tensors, expected = fp8_scaled(as_diffusers(official_state()), "scale_weight")
    del expected, tensors
    theirs = as_comfy(official_state())
    layers = [name for name in theirs if name.endswith(("mlp.0.weight", "modulation.lin.weight"))]
    quantized, values = dict(theirs), dict(official_state())
    for name in layers:
        scale = theirs[name].float().abs().max() / 448
        quantized[name] = (theirs[name].float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        quantized[name.removesuffix("weight") + "scale_weight"] = scale
    back = {comfy: official for official, comfy in zip(official_state(), theirs, strict=True)}
    for name in layers:
        values[back[name]] = quantized[name].float() * quantized[name.removesuffix("weight") + "scale_weight"]
    source = read(write(quantized | {"scaled_fp8": torch.zeros(2)}, tmp_path / NAME))
    assert_same(source, values)
    assert sum(tensor.scheme == "fp8" for tensor in source.tensors.values()) == len(layers)


def test_plain_fp8_is_read_with_a_notice(tmp_path: Path) -> None:
    tensors, expected = plain_fp8(official_state())
    source = read(write(tensors, tmp_path / NAME))
    assert_same(source, expected)
    (notice,) = source.notices
    assert "cast to fp8 without scales" in notice
    assert "11.3 %" in notice
    assert all(tensor.parts is None for tensor in source.tensors.values())


@pytest.mark.parametrize("values", ["tensors", "floats"])
def test_released_fp8_needs_its_map(values: str, tmp_path: Path) -> None:
    tensors, expected = fp8_scaled(official_state(), "scale_weight", "one")
    scales: dict[str, Any] = {
        name.removesuffix(".scale_weight"): tensors.pop(name)
        for name in list(tensors)
        if name.endswith(".scale_weight")
    }
    if values == "floats":
        scales = {layer: scale.item() for layer, scale in scales.items()}
    path = tmp_path / "i2v_fp8.pt"
    torch.save({"module": tensors}, path)
    with pytest.raises(CheckpointError, match=r"i2v_fp8_map\.pt, which holds their scales, is not beside it"):
        read(path)
    torch.save(scales, tmp_path / "i2v_fp8_map.pt")
    source = read(path)
    assert_same(source, expected)
    assert_kept(source, "fp8", expected)
    scales.pop("double_blocks.1.txt_mlp.fc1")
    torch.save(scales, tmp_path / "i2v_fp8_map.pt")
    with pytest.raises(CheckpointError, match=r"no scale for double_blocks\.1\.txt_mlp\.fc1\.weight"):
        read(path)


def test_quanto_int8(tmp_path: Path) -> None:
    tensors, expected, metadata = quanto_int8(official_state())
    source = read(write(tensors, tmp_path / NAME, metadata))
    assert_same(source, expected)
    assert_kept(source, "int8", expected)


def test_bitsandbytes_int8(tmp_path: Path) -> None:
    """In diffusers names; every linear layer, as diffusers does."""
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    tensors, state = {}, as_diffusers(official_state())
    expected = dict(state)
    for name, weight in state.items():
        tensors[name] = weight
        if weight.dim() == 2:
            codes, scales, _ = int8_vectorwise_quant(weight.half())
            layer = name.removesuffix("weight")
            tensors[name], tensors[layer + "SCB"] = codes, scales
            tensors[layer + "weight_format"] = torch.zeros((), dtype=torch.uint8)
            expected[name] = int8_vectorwise_dequant(codes, scales)
    source = read(write(tensors, tmp_path / NAME))
    values = as_diffusers({name: tensor.read() for name, tensor in source.tensors.items()})
    for name, value in expected.items():
        torch.testing.assert_close(values[name].float(), value.float(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes_four_bits_are_the_librarys_values(kind: str, nested: bool, tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    state = as_diffusers(official_state())
    tensors, expected = {}, dict(state)
    for name, weight in state.items():
        tensors[name] = weight
        if weight.dim() == 2:
            codes, how = quantize_4bit(weight.float(), quant_type=kind, compress_statistics=nested)
            tensors[name] = codes
            tensors |= {f"{name}.{key}": value for key, value in how.as_dict(packed=True).items()}
            expected[name] = dequantize_4bit(codes, how)
    source = read(write(tensors, tmp_path / NAME))
    values = as_diffusers({name: tensor.read() for name, tensor in source.tensors.items()})
    for name, value in expected.items():
        assert torch.equal(values[name].float(), value.float()), name


# ---------------------------------------------------------------------------------------------------------------- GGUF

BLOCK_TYPES = [name for name, per_block, _ in TYPES.values() if per_block > 1]
NOT_DEQUANTIZED = {"Q8_1", "Q8_K", "Q1_0"}


def write_gguf(state: State, path: Path, label: str, prefix: str = "", arch: str = "hyvid") -> dict[str, np.ndarray]:
    """As city96's tools do: block weights in `label`, 1-D and 5-D ones F32, the rest BF16. Returns true values."""
    kind, rng = GGMLQuantizationType[label], np.random.default_rng(5)
    writer, expected = GGUFWriter(str(path), arch), {}
    writer.add_quantization_version(2)
    writer.add_file_type(7)
    writer.add_array("tokens", ["a"] * 100)
    for name, tensor in state.items():
        values = tensor.float().numpy()
        own = kind if in_blocks(name) else GGMLQuantizationType.BF16
        own = GGMLQuantizationType.F32 if values.ndim != 2 else own
        try:
            data = quants.quantize(values, own)
        except NotImplementedError:  # a type that the package only reads: any bytes are a weight of it
            per_block, size = gguf.GGML_QUANT_SIZES[own]
            data = rng.integers(0, 256, (values.shape[0], values.shape[1] // per_block * size), dtype=np.uint8)
        writer.add_tensor(prefix + name, data, raw_dtype=own)
        if label not in NOT_DEQUANTIZED:
            expected[name] = quants.dequantize(data, own).reshape(values.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def test_the_table_of_types_is_the_packages() -> None:
    sizes = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert TYPES.items() <= sizes.items()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random bytes are also infinite scales
@pytest.mark.parametrize("label", [label for label in BLOCK_TYPES if label not in NOT_DEQUANTIZED])
def test_gguf_types(label: str, tmp_path: Path) -> None:
    keep = ("img_in.", "txt_in.individual_token_refiner.blocks.0.norm1", "double_blocks.0.img_attn_qkv")
    state = {name: tensor for name, tensor in official_state(WIDE).items() if name.startswith(keep)}
    expected = write_gguf(state, tmp_path / "i2v.gguf", label)
    source = read(tmp_path / "i2v.gguf")
    assert set(source.tensors) == set(expected)
    for name, tensor in source.tensors.items():
        np.testing.assert_array_equal(tensor.read().float().numpy(), expected[name])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("label", ["F16", "BF16", "Q8_0", "Q5_1"])
def test_gguf_models(label: str, prefix: str, tmp_path: Path) -> None:
    expected = write_gguf(official_state(), tmp_path / "i2v.gguf", label, prefix, arch="pig")
    source = read(tmp_path / "i2v.gguf")
    assert set(source.tensors) == set(official_state())
    for name, tensor in source.tensors.items():
        assert tuple(tensor.read().shape) == tensor.shape == tuple(official_state()[name].shape)
        np.testing.assert_array_equal(tensor.read().float().numpy(), expected[name])


def test_gguf_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(official_state(), tmp_path / "i2v.gguf", "Q8_0")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(PlatformError, match="pip install gguf"):
        read(tmp_path / "i2v.gguf")


def test_gguf_types_that_nothing_dequantizes_are_refused(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in official_state(WIDE).items() if "linear2" not in name}
    write_gguf(state, tmp_path / "i2v.gguf", "Q8_K")
    with pytest.raises(CheckpointError, match="type Q8_K, which the gguf package cannot dequantize"):
        read(tmp_path / "i2v.gguf")


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"double_blocks.0.img_mod.linear.scale_weight": torch.ones(3)}, "no known way to scale"),
        ({"double_blocks.0.img_mod.linear.scale_weight": torch.ones(768, 7, 1)}, "no known way to scale"),
        ({"double_blocks.0.img_mod.linear.scale_weight": torch.ones((), dtype=torch.int32)}, "no known way to scale"),
        ({"double_blocks.0.img_mod.linear.scale_weight": None}, "img_mod.linear.weight is F8_E4M3 and has no scale"),
        ({"double_blocks.0.img_mod.linear.weight": None}, "scale_weight belongs to no weight"),
    ],
)
def test_scales_that_do_not_fit(change: State, words: str, tmp_path: Path) -> None:
    tensors, _ = fp8_scaled(official_state(), "scale_weight", marker=True)
    merged = {name: value for name, value in (tensors | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=words):
        read(write(merged, tmp_path / NAME))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    tensors, _ = fp8_scaled(official_state(), "scale_weight", marker=True)
    name = "double_blocks.0.img_mod.linear.scale_weight"
    source = read(write(tensors | {name: torch.tensor(value)}, tmp_path / NAME))
    tensor = source.tensors["double_blocks.0.img_mod.linear.weight"]
    assert tensor.parts is not None
    for reading in (tensor.read, tensor.parts["scale_weight"].read):
        with pytest.raises(CheckpointError, match="not finite"):
            reading()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"format": "nvfp4"}, "'nvfp4'"),
        ({"format": "int8_tensorwise"}, "says int8_tensorwise, but is stored as F8_E4M3"),
        ({"format": "float8_e4m3fn", "convrot": True}, "with convrot"),
        ({}, "None"),
    ],
)
def test_comfy_formats_that_are_not_read(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    tensors, _ = fp8_scaled(official_state(), "weight_scale")
    layers = quantized_layers(official_state())
    with pytest.raises(CheckpointError, match=words):
        read(write(with_comfy_quant(tensors, layers, config), tmp_path / NAME))
    with pytest.raises(CheckpointError, match=words):
        read(write(tensors, tmp_path / NAME, comfy_metadata(layers, config)))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"layers": 3}', '{"layers": {"a": 1}}', "[" * 100_000])
def test_comfy_metadata_that_is_damaged(text: str, tmp_path: Path) -> None:
    tensors, _ = fp8_scaled(official_state(), "weight_scale")
    with pytest.raises(CheckpointError, match="quantization"):
        read(write(tensors, tmp_path / NAME, {"_quantization_metadata": text}))


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state"])
def test_bitsandbytes_parts_that_are_missing_or_cut(part: str, tmp_path: Path) -> None:
    from bitsandbytes.functional import quantize_4bit

    state, name = as_diffusers(official_state()), "proj_out.weight"
    codes, how = quantize_4bit(state[name].float(), quant_type="nf4", compress_statistics=True)
    beside = {f"{name}.{key}": value for key, value in how.as_dict(packed=True).items()}
    key = next(key for key in beside if f".{part}" in key)
    whole = state | {name: codes} | beside
    for broken in ({k: v for k, v in whole.items() if k != key}, whole | {key: clone(beside[key].reshape(-1)[:-1])}):
        with pytest.raises(CheckpointError):
            read(write(broken, tmp_path / NAME))
    assert read(write(whole, tmp_path / NAME))


@pytest.mark.parametrize(
    "change",
    [
        {"blocksize": 2**40},
        {"nested_blocksize": 2**40},
        {"blocksize": 0},
        {"shape": [2**40, 2**40]},
        {"shape": "x"},
        {"shape": [-1, -16384]},
        {"nested_offset": None},
    ],
)
def test_bitsandbytes_states_that_lie(change: dict[str, Any], tmp_path: Path) -> None:
    from bitsandbytes.functional import quantize_4bit

    state, name = as_diffusers(official_state()), "proj_out.weight"
    codes, how = quantize_4bit(state[name].float(), quant_type="nf4", compress_statistics=True)
    beside = {f"{name}.{key}": value for key, value in how.as_dict(packed=True).items()}
    key = next(key for key in beside if "quant_state" in key)
    text = json.dumps(json.loads(bytes(beside[key].tolist())) | change).encode()
    whole = state | {name: codes} | beside | {key: torch.tensor(list(text), dtype=torch.uint8)}
    with pytest.raises(CheckpointError):
        read(write(whole, tmp_path / NAME))


def test_a_layers_class_is_what_libraries_see() -> None:
    """The module that quanto quantizes has the block linears, all of them."""
    found = [name for name, part in Layers(official_state()).named_modules() if isinstance(part, torch.nn.Linear)]
    assert sorted(found) == sorted(quantized_layers(official_state()))
    assert len(found) == 10 * 2 + 3 * 2
