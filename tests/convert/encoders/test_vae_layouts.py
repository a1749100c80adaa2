"""The VAE under both names it has, and all 248 names of the released one."""

from __future__ import annotations

import json
from pathlib import Path

import encoder_layouts as layouts
import pytest
import torch

from goldens import golden, names
from lowvram_i2v.convert.shapes import vae_shapes
from lowvram_i2v.convert.sources import Hints, open_component
from lowvram_i2v.convert.sources.vae import detect_vae, official_vae_name
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.vae.config import VaeConfig

CONFIG = golden(names("E_vae_plain")[0]).info["config"]
COMFY = json.loads((Path(__file__).parent / "comfy_vae_names.json").read_text())
"""Official name -> ComfyUI's, of the released VAE."""


@pytest.fixture(scope="module")
def tensors() -> layouts.Tensors:
    return layouts.vae()


def comfy(tensors: layouts.Tensors) -> layouts.Tensors:
    """ComfyUI's names, and its shape of the attention's layers."""
    return {
        COMFY[name]: value[..., None, None, None] if "attentions.0.to_" in name and value.dim() == 2 else value
        for name, value in tensors.items()
    }


def test_every_name_of_the_released_vae() -> None:
    assert len(COMFY) == 248
    assert {official_vae_name(theirs) for theirs in COMFY.values()} == set(COMFY)
    for ours, theirs in COMFY.items():
        assert official_vae_name(theirs) == ours
    assert set(vae_shapes(VaeConfig())) == set(COMFY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
@pytest.mark.parametrize("naming", ["official", "comfy"])
def test_single_files(naming: str, prefix: str, dtype: torch.dtype, tensors: layouts.Tensors, tmp_path: Path) -> None:
    stored = layouts.in_dtype(tensors, dtype)
    written = comfy(stored) if naming == "comfy" else stored
    path = tmp_path / "hunyuan_video_vae_bf16.safetensors"
    layouts.save({prefix + name: value for name, value in written.items()}, path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    source = open_component(path, "vae")
    assert {name: tensor.shape for name, tensor in source.tensors.items()} == vae_shapes(
        VaeConfig.from_official(source.config)
    )
    for name, value in stored.items():
        assert source.tensors[name].dtype == dtype
        assert torch.equal(source.tensors[name].read(), value), name
    assert source.config == CONFIG


@pytest.mark.parametrize("wrapper", [None, "state_dict"])
@pytest.mark.parametrize("prefix", ["", "vae."])
def test_the_released_pickle(wrapper: str | None, prefix: str, tensors: layouts.Tensors, tmp_path: Path) -> None:
    state = {prefix + name: value for name, value in tensors.items()}
    torch.save({wrapper: state} if wrapper else state, tmp_path / "pytorch_model.pt")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for path in (tmp_path, tmp_path / "pytorch_model.pt"):
        source = open_component(path, "vae")
        assert source.tensors.keys() == tensors.keys()
        assert all(torch.equal(source.tensors[name].read(), value) for name, value in tensors.items())


def test_diffusers_folder(tensors: layouts.Tensors, tmp_path: Path) -> None:
    """diffusers' own class says what its config.json is like."""
    from diffusers import AutoencoderKLHunyuanVideo

    config = {key: CONFIG[key] for key in ("latent_channels", "layers_per_block", "norm_num_groups", "scaling_factor")}
    model = AutoencoderKLHunyuanVideo(block_out_channels=CONFIG["block_out_channels"], **config)
    model.load_state_dict(tensors, strict=True)
    model.save_pretrained(tmp_path)
    source = open_component(tmp_path, "vae")
    assert all(torch.equal(source.tensors[name].read(), value) for name, value in tensors.items())
    made, expected = VaeConfig.from_official(source.config), VaeConfig.from_official(CONFIG)
    assert made == expected


def test_a_bare_file_has_the_released_config(tmp_path: Path) -> None:
    """Full widths need no config.json; other widths do, for their norm groups cannot be told."""
    shapes = vae_shapes(VaeConfig())
    path = tmp_path / "hunyuan_video_vae_bf16.safetensors"
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))  # of another VAE
    attention = {name: (*shape, 1, 1, 1) for name, shape in shapes.items() if ".to_" in name and len(shape) == 2}
    layouts.save_hollow({COMFY[name]: shape for name, shape in (shapes | attention).items()}, path)
    source = open_component(path, "vae")
    assert VaeConfig.from_official(source.config) == VaeConfig()
    assert {name: tensor.shape for name, tensor in source.tensors.items()} == shapes


def test_other_widths_without_config_are_refused(tensors: layouts.Tensors, tmp_path: Path) -> None:
    path = layouts.save(comfy(tensors), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_component(path, "vae")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text(json.dumps(CONFIG))
    assert open_component(path, "vae", Hints(config=tmp_path / "c")).config == CONFIG


def test_other_vaes_are_named(tensors: layouts.Tensors, tmp_path: Path) -> None:
    flux = {"encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3), "post_quant_conv.weight": (4, 4, 1, 1)}
    assert detect_vae(flux, {}) is None
    newer = {"encoder.down.0.block.0.conv1.conv.weight": (128, 128, 3, 3, 3)}
    match = detect_vae(newer, {})
    assert match is not None
    assert "1.5" in str(match.refusal)
    match = detect_vae({**newer, "post_quant_conv.weight": (32, 32, 1, 1, 1)}, {})
    assert match is not None
    assert "32 latent channels" in str(match.refusal)
    path = layouts.save({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="is not the VAE"):
        open_component(path, "vae")
    (tmp_path / "y.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        open_component(tmp_path / "y.safetensors", "vae")
    with pytest.raises(CheckpointError, match="several"):
        open_component(tmp_path, "vae")


def test_an_unknown_tensor_keeps_its_name_and_is_found_later(tensors: layouts.Tensors, tmp_path: Path) -> None:
    path = layouts.save(comfy(tensors) | {"encoder.extra.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    source = open_component(path, "vae")
    assert set(source.tensors) - set(tensors) == {"encoder.extra.weight"}
