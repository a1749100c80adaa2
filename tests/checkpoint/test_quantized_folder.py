"""Model folders with quantized components: loaded as stored, checked before a weight is read, and a video made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import rewrite
from torch import Tensor, nn

from goldens import relative_l2
from lowvram_i2v import pipeline
from lowvram_i2v.checkpoint import ModelFolder, component_file, open_model
from lowvram_i2v.convert.policy import layout, quantizable
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.events import ignore
from lowvram_i2v.job import prepare
from lowvram_i2v.kernels.quant_linear import QuantLinear, quantized_parts
from lowvram_i2v.kernels.scheme import SCHEMES, is_marker
from lowvram_i2v.profile import load_profile
from lowvram_i2v.request import GenerateRequest
from lowvram_i2v.safetensors_file import TORCH_DTYPES
from lowvram_i2v.sample_photo import draw_sample_photo
from lowvram_i2v.sampling.conditioning import draw_noise
from lowvram_i2v.text.llava import build_llava, llava_tensor_name

CPU = torch.device("cpu")
QUANTIZING = pytest.mark.parametrize("scheme", SCHEMES)
DTYPE_NAMES = {getattr(torch, ours): theirs for theirs, ours in TORCH_DTYPES.items()}


def replace(folder: Path, component: str, tensors: dict[str, Tensor], scheme: str) -> None:
    """Another file for a component, its tensors in the order given, and its record."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        piece = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(piece)],
        }
        data += piece
    text = json.dumps(header).encode()
    rewrite(folder / component_file(component), len(text).to_bytes(8, "little") + text + data)
    values = json.loads((folder / "model.json").read_text())
    values["components"][component] |= {"scheme": scheme, "bytes": 8 + len(text) + len(data)}
    rewrite(folder / "model.json", json.dumps(values).encode())


def stored(folder: Path, component: str) -> dict[str, Tensor]:
    return dict(load_file(folder / component_file(component)))


def quantize(folder: Path, component: str, scheme: str, keep: tuple[str, ...] = ()) -> Path:
    tensors = {
        name: LazyTensor(tuple(value.shape), value.dtype, lambda value=value: value)  # type: ignore[misc]
        for name, value in stored(folder, component).items()
    }
    made = layout(component, scheme, tensors, keep)
    values = {name: value for job in made.jobs for name, value in job.produce().items()}
    replace(folder, component, {tensor.name: values[tensor.name] for tensor in made.tensors}, scheme)
    return folder


def transformer(opened: ModelFolder) -> HunyuanVideoTransformer:
    return HunyuanVideoTransformer(opened.header.transformer)


def request(folder: Path) -> GenerateRequest:
    draw_sample_photo(96, 64).save(folder / "photo.png")
    return GenerateRequest(folder / "photo.png", "a boat", folder / "out.mp4", size=(64, 48), frames=5, steps=2)


@QUANTIZING
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_quantized_parts_are_loaded_as_stored_and_all_else_is_cast(
    scheme: str, dtype: torch.dtype | None, model: Path
) -> None:
    opened = open_model(quantize(model, "transformer", scheme, keep=("double_blocks.1.*",)))
    file = stored(model, "transformer")
    with opened.load("transformer", lambda: transformer(opened), device=CPU, dtype=dtype) as module:
        fixed = quantized_parts(module)
        kept = [layer for layer in quantizable("transformer", opened.shapes("transformer")) if ".1." in layer[:16]]
        assert len({name.rpartition(".")[0] for name in fixed}) == 10 + 6
        assert all(type(module.get_submodule(layer)) is nn.Linear for layer in kept if layer.startswith("double"))
        for name, tensor in module.state_dict().items():
            expected = file[name] if name in fixed else file[name].to(dtype or file[name].dtype)
            assert tensor.dtype == expected.dtype, name
            assert torch.equal(tensor.float(), expected.float()), name
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert all(value.is_meta for value in module.state_dict().values())
    assert {name for name in file if name not in module.state_dict()} == {name for name in file if is_marker(name)}


@QUANTIZING
def test_the_text_encoder_is_quantized_and_its_vision_tower_is_not(scheme: str, model: Path) -> None:
    opened = open_model(quantize(model, "text_encoder", scheme))
    with opened.load(
        "text_encoder",
        lambda: build_llava(opened.header.text_encoder),
        device=CPU,
        dtype=torch.float32,
        file_name=llava_tensor_name,
    ) as module:
        changed = {name for name, layer in module.named_modules() if isinstance(layer, QuantLinear)}
        layers = module.config.text_config.num_hidden_layers
    assert len(changed) == 7 * layers
    assert all(name.startswith("language_model.layers.") for name in changed)


@QUANTIZING
def test_a_video_from_quantized_weights(scheme: str, model: Path, tmp_path: Path) -> None:
    plain = prepare(request(tmp_path), model, load_profile("auto"), CPU, ignore)
    noise = draw_noise(plain.latent_shape, 0)
    prompts, image = pipeline.encode_prompts(plain), pipeline.encode_image(plain)
    expected = pipeline.sample(plain, pipeline.condition_steps(plain, prompts), image, noise)
    for component in ("transformer", "text_encoder"):
        quantize(model, component, scheme)
    job = prepare(request(tmp_path), model, load_profile("auto"), CPU, ignore)
    assert job.model.header.scheme == scheme
    actual = pipeline.sample(job, pipeline.condition_steps(job, pipeline.encode_prompts(job)), image, noise)
    assert 0 < relative_l2(actual, expected) < {"int8": 0.03, "fp8": 0.1, "nf4": 0.3}[scheme]
    video = pipeline.generate(request(tmp_path), model, load_profile("auto"), CPU, ignore)
    assert video.stat().st_size > 0


def assert_refused(folder: Path, tmp_path: Path, *lines: str) -> None:
    """Before a weight is read, by both ways in."""
    opened = open_model(folder)
    with pytest.raises(CheckpointError) as checked:
        prepare(request(tmp_path), folder, load_profile("auto"), CPU, ignore)
    with pytest.raises(CheckpointError) as loaded:
        opened.load("transformer", lambda: transformer(opened), device=CPU, dtype=None).__enter__()
    for line in lines:
        assert line in str(checked.value)
        assert line in str(loaded.value)


@QUANTIZING
def test_missing_and_misshapen_parts_are_listed(scheme: str, model: Path, tmp_path: Path) -> None:
    tensors = stored(quantize(model, "transformer", scheme), "transformer")
    suffix = list(SCHEMES[scheme].parts(1, 1))[1]
    lost, bent = f"double_blocks.0.img_attn_qkv.{suffix}", f"single_blocks.1.linear1.{suffix}"
    shape = list(tensors[bent].shape)
    del tensors[lost]
    tensors[bent] = torch.zeros(3, 3)
    replace(model, "transformer", tensors, scheme)
    assert_refused(model, tmp_path, f"missing: {lost}", f"wrong shape: {bent} is [3, 3], must be {shape}")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32, torch.bool])
def test_integers_where_floats_belong_are_refused(dtype: torch.dtype, model: Path, tmp_path: Path) -> None:
    tensors = stored(model, "transformer")
    wrong = ("img_in.proj.weight", "double_blocks.0.img_attn_q_norm.weight", "single_blocks.0.linear2.bias")
    for name in wrong:
        tensors[name] = tensors[name].to(dtype)
    replace(model, "transformer", tensors, "bf16")
    assert_refused(model, tmp_path, *(f"stored as {DTYPE_NAMES[dtype]}: {name}" for name in wrong))


def test_a_plain_cast_is_refused(model: Path, tmp_path: Path) -> None:
    """fp8 without its scale, as some files on the net: convert reads it, the runtime does not."""
    tensors = stored(model, "transformer")
    name = "single_blocks.0.linear1.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    replace(model, "transformer", tensors, "bf16")
    assert_refused(model, tmp_path, "missing: single_blocks.0.linear1.scale_weight []")


def test_tensors_nobody_knows_are_still_unexpected(model: Path) -> None:
    tensors = stored(quantize(model, "transformer", "fp8"), "transformer")
    assert "scaled_fp8" in tensors
    tensors["img_in.proj.weight_scale"] = torch.ones(1)
    replace(model, "transformer", tensors, "fp8")
    opened = open_model(model)
    expected = opened.build("transformer", lambda: transformer(opened)).state_dict()
    with pytest.raises(CheckpointError) as caught:
        opened.check({"transformer": {name: tuple(value.shape) for name, value in expected.items()}})
    assert [line for line in str(caught.value).splitlines() if "unexpected" in line] == [
        "  - transformer.safetensors: unexpected: img_in.proj.weight_scale"
    ]


def test_a_scale_in_another_float_becomes_float32(model: Path) -> None:
    tensors = stored(quantize(model, "transformer", "int8"), "transformer")
    name = "single_blocks.0.linear1.weight_scale"
    tensors[name] = tensors[name].bfloat16()
    replace(model, "transformer", tensors, "int8")
    opened = open_model(model)
    with opened.load("transformer", lambda: transformer(opened), device=CPU, dtype=torch.bfloat16) as module:
        assert module.state_dict()[name].dtype == torch.float32
