"""What ComfyUI looks for in a file: fp8 in its scaled layout for every version, int8 rows for 0.27 and later."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import TRANSFORMER, Made

from lowvram_i2v.checkpoint import COMPONENTS, component_file
from lowvram_i2v.cli import main
from lowvram_i2v.variant import VARIANTS

BLOCK_LINEAR = re.compile(r"(double|single)_blocks\.\d+\.(?!.*norm).*\.weight")


@pytest.mark.parametrize("variant", VARIANTS)
def test_scaled_fp8(variant: str, model_once: Made) -> None:
    path = model_once(variant, "fp8") / "transformer.safetensors"
    tensors = load_file(path)
    marker = tensors.pop("scaled_fp8")
    assert (marker.dtype, marker.numel()) == (torch.float8_e4m3fn, 2)
    layers = {name.removesuffix(".weight") for name in tensors if BLOCK_LINEAR.fullmatch(name)}
    assert len(layers) == 2 * 10 + 2 * 3
    for name, tensor in tensors.items():
        layer, _, suffix = name.rpartition(".")
        if layer in layers and suffix != "bias":
            expected = {"weight": (torch.float8_e4m3fn, 2), "scale_weight": (torch.float32, 0)}[suffix]
            assert (tensor.dtype, tensor.dim()) == expected
        else:
            assert tensor.dtype == torch.bfloat16, name
    with safe_open(path, "pt") as file:
        assert "_quantization_metadata" not in file.metadata()
    assert "txt_in.individual_token_refiner.blocks.0.norm1.weight" in tensors


def test_int8_rows(model_once: Made) -> None:
    tensors = load_file(model_once("token_replace", "int8") / "transformer.safetensors")
    layers = {name.removesuffix(".weight") for name in tensors if BLOCK_LINEAR.fullmatch(name)}
    assert {name.rpartition(".")[0] for name in tensors if name.endswith(".comfy_quant")} == layers
    assert "scaled_fp8" not in tensors
    for layer in layers:
        marker = tensors[f"{layer}.comfy_quant"]
        assert marker.dtype == torch.uint8
        assert json.loads(marker.numpy().tobytes()) == {"format": "int8_tensorwise"}
        weight, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"]
        assert weight.dtype == torch.int8
        assert scale.dtype == torch.float32
        assert scale.shape == (weight.shape[0], 1)


def test_the_text_encoder(model_once: Made) -> None:
    """Detected by its names; a marker without elements, or old versions refuse it."""
    tensors = load_file(model_once("token_replace", "fp8") / "text_encoder.safetensors")
    assert (tensors["scaled_fp8"].dtype, tensors["scaled_fp8"].numel()) == (torch.float8_e4m3fn, 0)
    assert "model.layers.0.post_attention_layernorm.weight" in tensors
    assert tensors["model.norm.weight"].dtype == torch.float16
    scaled = [name for name in tensors if name.endswith(".scale_weight")]
    assert len(scaled) == 4 * 7
    assert all(tensors[name].shape == () for name in scaled)
    assert all(name.endswith("_proj.scale_weight") for name in scaled)


@pytest.mark.parametrize("scheme", ["int8", "fp8", "nf4", "bf16", "fp32"])
def test_the_safetensors_library_opens_every_output(scheme: str, model_once: Made) -> None:
    for component in COMPONENTS:
        with safe_open(model_once("token_replace", scheme) / component_file(component), "pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert file.get_tensor(name).shape is not None


def test_flags(released_once: Made, model_once: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--keep leaves layers, --text-scheme is the text encoder's; pieces alone need no SOURCE."""
    tree = released_once("token_replace")
    out = tmp_path / "out"
    assert main(["convert", str(tree), str(out), "--text-scheme", "nf4", "--keep", "*.linear2", "--device", "cpu"]) == 0
    tensors = load_file(out / "transformer.safetensors")
    assert tensors["single_blocks.0.linear2.weight"].dtype == torch.bfloat16
    assert tensors["single_blocks.0.linear1.weight"].dtype == torch.int8
    records = json.loads((out / "model.json").read_text())["components"]
    assert {name: record["scheme"] for name, record in records.items()} == {
        "transformer": "int8",
        "text_encoder": "nf4",
        "text_encoder_2": "bf16",
        "vae": "bf16",
    }
    assert main(["verify", str(out), "--against", str(tree)]) == 0
    assert main(["convert", "--transformer", str(tree / TRANSFORMER), str(tmp_path / "one")]) == 0
    assert list(json.loads((tmp_path / "one/model.json").read_text())["components"]) == ["transformer"]
    capsys.readouterr()
    for wrong, words in (
        ([str(tmp_path / "x")], "only one path"),
        ([str(tree), str(tree), str(tmp_path / "x")], "2 sources"),
        (["--from-comfy", str(tree), str(tmp_path / "x")], "not ComfyUI's models folder"),
        ([str(tree), str(tmp_path / "x"), "--keep", "nothing"], "matches no layer"),
        (["--transformer", str(tree / TRANSFORMER), str(tree / TRANSFORMER), str(tmp_path / "x")], "are both"),
    ):
        assert main(["convert", *wrong]) == 1
        assert words in capsys.readouterr().err
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("scheme", ["int8", "fp8", "nf4"])
def test_a_model_folder_is_converted_again_bit_for_bit(scheme: str, model_once: Made, tmp_path: Path) -> None:
    folder = model_once("token_replace", scheme)
    assert main(["convert", str(folder), str(tmp_path / "again"), "--scheme", scheme]) == 0
    for component in COMPONENTS:
        name = component_file(component)
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
