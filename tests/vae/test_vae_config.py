"""VaeConfig: what it accepts, what it refuses; and the names and shapes of the modules it builds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from goldens import golden, names
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.encoder import VaeEncoder
from lowvram_i2v.vae.tiles import Tiling

OFFICIAL_NAMES = Path(__file__).parent.parent / "golden" / "names" / "official_vae_names.json"
RELEASED = {
    "_class_name": "AutoencoderKLCausal3D",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlockCausal3D"] * 4,
    "in_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "sample_tsize": 64,
    "scaling_factor": 0.476986,
    "time_compression_ratio": 4,
    "up_block_types": ["UpDecoderBlockCausal3D"] * 4,
}


def test_the_released_config_is_the_default():
    config = VaeConfig.from_official(RELEASED)
    assert config == VaeConfig()
    assert (config.spatial_ratio, config.time_ratio) == (8, 4)


@pytest.mark.golden
@pytest.mark.parametrize("name", names("E_vae"))
def test_round_trip_through_json(name):
    config = VaeConfig.from_official(golden(name).info["config"])
    assert VaeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"act_fn": "relu"}, "act_fn"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "up_block_types"),
        ({"down_block_types": ["DownEncoderBlockCausal3D"] * 3}, "down_block_types"),
        ({"time_compression_ratio": 8}, "time_compression_ratio"),
        ({"spatial_compression_ratio": 16}, "spatial_compression_ratio"),
        ({"block_out_channels": [128, 256, 512]}, "block_out_channels"),
        ({"block_out_channels": 128}, "block_out_channels"),
        ({"block_out_channels": [128, 256, 512, 0]}, r"block_out_channels\[3\]"),
        ({"norm_num_groups": 48}, "norm_num_groups 48"),
        ({"norm_num_groups": 0}, "norm_num_groups 0"),
        ({"layers_per_block": "2"}, "layers_per_block"),
        ({"latent_channels": True}, "latent_channels"),
        ({"scaling_factor": 0}, "scaling_factor"),
        ({"scaling_factor": None}, "scaling_factor"),
        ({"tile_overlap_factor": 1.0}, "tile_overlap_factor"),
    ],
)
def test_refused(change, named):
    with pytest.raises(CheckpointError, match=named):
        VaeConfig.from_official({**RELEASED, **change})


def test_another_models_config_is_refused():
    with pytest.raises(CheckpointError, match=r"latent_channels, block_out_channels.* missing"):
        VaeConfig.from_official({"model_type": "llava", "hidden_size": 4096})


def test_unknown_key_in_a_model_folder_is_refused():
    with pytest.raises(CheckpointError, match="quant_conv"):
        VaeConfig.from_dict({**VaeConfig().to_dict(), "quant_conv": True})


def test_default_tiles():
    assert Tiling.from_config(VaeConfig()) == Tiling(
        tile=32, stride=24, tile_frames=16, stride_frames=12, spatial_ratio=8, time_ratio=4
    )


@pytest.mark.parametrize(
    "change", [{"sample_size": 250}, {"sample_tsize": 20}, {"tile_overlap_factor": 0.99}, {"sample_size": 48}]
)
def test_tiles_that_do_not_meet_are_refused(change):
    with pytest.raises(CheckpointError, match="whole number of latents"):
        Tiling.from_config(VaeConfig(**change))


def test_names_and_shapes_are_the_released_ones():
    """Built on the meta device: no memory, and exactly the released file's tensors."""
    with torch.device("meta"):
        modules = VaeEncoder(VaeConfig()), VaeDecoder(VaeConfig())
    ours = {name: tensor for module in modules for name, tensor in module.state_dict().items()}
    assert all(tensor.is_meta for tensor in ours.values())
    assert sum(len(module.state_dict()) for module in modules) == 248
    official = json.loads(OFFICIAL_NAMES.read_text(encoding="utf-8"))
    assert {name: list(tensor.shape) for name, tensor in ours.items()} == official


def test_config_imports_no_torch():
    code = "import sys, lowvram_i2v.vae.config; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parent.parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
