"""Exports, judged by the libraries that they are made for."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import TRANSFORMER, VAE, Made

from lowvram_i2v.cli import main
from lowvram_i2v.convert.convert import convert
from lowvram_i2v.convert.export import FORMATS, diffusers, export
from lowvram_i2v.convert.origin import Origin
from lowvram_i2v.convert.sources.pieces import Pieces
from lowvram_i2v.convert.writer import relative_error
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer
from lowvram_i2v.errors import RequestError
from lowvram_i2v.variant import VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_quanto_requantizes_the_export(variant: str, released_once: Made, model_once: Made, tmp_path: Path) -> None:
    """optimum-quanto makes its own quantized model of the file, and its layers compute what the weights say."""
    quanto = pytest.importorskip("optimum.quanto")
    (path,) = export(released_once(variant), tmp_path, "quanto")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["quantization_format"] == "quanto"
    layers = json.loads(base64.b64decode(metadata["quantization_map_base64"]))
    config = json.loads(base64.b64decode(metadata["config_base64"]))
    assert config["guidance_embed"] == (variant == "token_replace")
    assert config["i2v_condition_type"] == variant

    record = json.loads((model_once(variant, "bf16") / "model.json").read_text())["components"]["transformer"]
    module = HunyuanVideoTransformer(TransformerConfig.from_dict(record["config"])).to(torch.bfloat16)
    quanto.requantize(module, load_file(path), layers, torch.device("cpu"))
    reference = torch.load(released_once(variant) / TRANSFORMER, weights_only=True)["module"]
    seen = 0
    for name, layer in module.named_modules():
        if name not in layers:
            continue
        assert isinstance(layer, quanto.QLinear)
        x = torch.randn(5, layer.in_features, dtype=torch.bfloat16)
        expected = torch.nn.functional.linear(
            x.float(), reference[f"{name}.weight"].float(), reference[f"{name}.bias"].float()
        )
        assert relative_error(expected, layer(x).float().detach()) < 0.02
        seen += 1
    assert seen == len(layers) == 26
    for name, tensor in load_file(path).items():
        if name in reference:
            assert torch.equal(tensor, reference[name])


def test_quanto_codes_lose_no_more_than_a_rounding(released_once: Made, tmp_path: Path) -> None:
    (path,) = export(released_once("token_replace"), tmp_path, "quanto")
    tensors, reference = load_file(path), torch.load(released_once("token_replace") / TRANSFORMER, weights_only=True)
    for name, codes in tensors.items():
        if name.endswith("._data"):
            scale = tensors[name.replace("._data", "._scale")].float()
            weight = reference["module"][name.removesuffix("._data")].float()
            assert ((codes.float() * scale - weight).abs() <= 0.505 * scale + 0.5 * scale * (codes.abs() == 127)).all()


@pytest.mark.parametrize("shard", [diffusers.SHARD, 3_000_000])
@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_loads_the_export(
    variant: str, shard: int, released_once: Made, model_once: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("diffusers")
    monkeypatch.setattr(diffusers, "SHARD", shard)
    files = export(released_once(variant), tmp_path / "out", "diffusers")
    assert ((tmp_path / "out/transformer" / f"{diffusers.STEM}.safetensors.index.json") in files) == (shard < 10**9)
    transformer, info = library.HunyuanVideoTransformer3DModel.from_pretrained(
        tmp_path / "out/transformer", output_loading_info=True, torch_dtype=torch.bfloat16
    )
    assert not any(info.values()), info
    assert transformer.config.image_condition_type == variant
    _, info = library.AutoencoderKLHunyuanVideo.from_pretrained(tmp_path / "out/vae", output_loading_info=True)
    assert not any(info.values()), info
    # and back: every bit
    convert(
        Origin(pieces=Pieces(transformer=tmp_path / "out/transformer", vae=tmp_path / "out/vae")),
        tmp_path / "model",
        "bf16",
    )
    for component in ("transformer", "vae"):
        name = f"{component}.safetensors"
        assert (tmp_path / "model" / name).read_bytes() == (model_once(variant, "bf16") / name).read_bytes()


def test_the_official_export_is_the_released_pickle(released_once: Made, tmp_path: Path) -> None:
    tree = released_once("token_replace")
    export(tree, tmp_path / "out", "official")
    ours = torch.load(tmp_path / "out" / TRANSFORMER, weights_only=True)
    theirs = torch.load(tree / TRANSFORMER, weights_only=True)
    assert list(ours) == ["module"]
    for mine, reference in (
        (ours["module"], theirs["module"]),
        (torch.load(tmp_path / "out" / VAE, weights_only=True, mmap=True), torch.load(tree / VAE, weights_only=True)),
    ):
        assert mine.keys() == reference.keys()
        assert all(torch.equal(mine[name], tensor) for name, tensor in reference.items())
    config = "hunyuan-video-i2v-720p/vae/config.json"
    assert json.loads((tmp_path / "out" / config).read_text()) == json.loads((tree / config).read_text())


def test_a_model_folder_is_exported_too(model_once: Made, tmp_path: Path) -> None:
    """And what was int8 comes back within int8's error."""
    export(model_once("token_replace", "int8"), tmp_path, "official", ["transformer"])
    exact = load_file(model_once("token_replace", "bf16") / "transformer.safetensors")
    back = torch.load(tmp_path / TRANSFORMER, weights_only=True)["module"]
    errors = {name: relative_error(tensor, back[name]) for name, tensor in exact.items()}
    assert 0.005 < max(errors.values()) < 0.012
    assert sum(error > 0 for error in errors.values()) == 26


def test_wrong_wishes(released_once: Made, tmp_path: Path) -> None:
    tree = released_once("token_replace")
    for options in ({"format_name": "onnx"}, {"format_name": "quanto", "components": ["vae"]}):
        with pytest.raises(RequestError):
            export(tree, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_the_command(name: str, released_once: Made, tmp_path: Path) -> None:
    file = released_once("token_replace") / TRANSFORMER
    assert main(["convert", "--format", name, "--variant", "token_replace", str(file), str(tmp_path / "out")]) == 0
    assert any(path.is_file() for path in (tmp_path / "out").rglob("*"))
