"""Encoder and decoder against the reference implementation: plain and tiled, float32 and bfloat16."""

import pytest
import torch
from torch import Tensor

from goldens import golden, names, relative_l2, weights
from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.encoder import VaeEncoder
from lowvram_i2v.vae.tiles import Tiling, decode_tiled, encode_tiled

pytestmark = pytest.mark.golden

DTYPES = pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=["fp32", "bf16"]
)


def vae_of(info, dtype):
    """Encoder, decoder and config of a golden, with its weights: every tensor of the file is used once."""
    config = VaeConfig.from_official(info["config"])
    state = dict(weights(info["weights"]["file"]))
    with torch.device("meta"):
        encoder, decoder = VaeEncoder(config), VaeDecoder(config)
    for module in (encoder, decoder):
        module.load_state_dict({name: state.pop(name) for name in module.state_dict()}, assign=True)
        module.requires_grad_(False)
    assert not state
    return encoder.to(dtype), decoder.to(dtype), config


def as_input(values: Tensor) -> Tensor:
    """A golden's input without its batch axis; 8-bit video as -1..1."""
    return values / 127.5 - 1 if values.dtype == torch.uint8 else values[0]


def catch(module, path: str) -> list[Tensor]:
    """Collects the outputs of the submodule `path` from now on."""
    caught: list[Tensor] = []
    module.get_submodule(path).register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    return caught


@DTYPES
@pytest.mark.parametrize("name", names("E_vae_plain"))
def test_plain(name, dtype, limit):
    expected = golden(name)
    encoder, decoder, _config = vae_of(expected.info, dtype)
    encoder_mid = catch(encoder, "encoder.mid_block")
    decoder_mid = catch(decoder, "decoder.mid_block")
    decoder_up = catch(decoder, "decoder.up_blocks.1")

    actual = {}
    actual["out.image_mean"], actual["out.image_logvar"] = encoder.encode(as_input(expected["in.image"]))
    actual["mid.encoder.mid_block_of_image"] = encoder_mid[0]
    actual["out.video_mean"], actual["out.video_logvar"] = encoder.encode(as_input(expected["in.video_u8"]))
    actual["out.decoded"] = decoder.decode(as_input(expected["in.latent"]))
    actual["mid.decoder.mid_block"] = decoder_mid[0]
    actual["mid.decoder.up_blocks.1_frame0_channels_0_8"] = decoder_up[0][:8, :1]
    compare(expected, actual, limit)


@DTYPES
@pytest.mark.parametrize("name", names("E_vae_tiled"))
def test_tiled(name, dtype, limit):
    expected = golden(name)
    encoder, decoder, config = vae_of(expected.info, dtype)
    tiling = Tiling.from_config(config)
    latent = as_input(expected["in.latent"])

    actual = {}
    actual["out.decoded"] = decode_tiled(decoder, latent, tiling)
    for case in ("out.decoded_spatial_only", "out.decoded_temporal_only"):
        frames, height, width = expected.shape(case)[2:]
        part = latent[:, : (frames - 1) // config.time_ratio + 1]
        part = part[:, :, : height // config.spatial_ratio, : width // config.spatial_ratio]
        actual[case] = decode_tiled(decoder, part, tiling)
    actual["out.image_mean"], _ = encode_tiled(encoder, as_input(expected["in.image"]), tiling)
    video = as_input(expected["in.video_u8"])
    actual["out.video_mean"], actual["out.video_logvar"] = encode_tiled(encoder, video, tiling)
    compare(expected, actual, limit)


@pytest.mark.parametrize("name", names("E_vae_tiled"))
def test_the_tile_settings_are_the_goldens(name):
    """The ranges that the golden lists are the ones that our tiles take."""
    info = golden(name).info
    config = VaeConfig.from_official(info["config"])
    tiling, settings = Tiling.from_config(config), info["tile_settings"]
    starts = [start for start, _end in settings["decode_tile_ranges"]["latent_h"]]
    assert tiling.tile == settings["tile_latent_min_size"]
    assert tiling.tile_frames == settings["tile_latent_min_tsize"]
    assert starts == list(range(0, len(starts) * tiling.stride, tiling.stride))
    assert settings["decode_blend"]["pixels"] == (tiling.tile - tiling.stride) * config.spatial_ratio
    blend_frames = (tiling.tile_frames - tiling.stride_frames) * config.time_ratio
    assert settings["decode_blend"]["frames"] == blend_frames


def compare(expected, actual: dict[str, Tensor], limit: float) -> None:
    """Every expected tensor of the golden is compared; all that are off are named at once."""
    wanted = {name for name in expected.tensors if name.startswith(("out", "mid."))}
    assert wanted == set(actual)
    errors = {name: relative_l2(value.float()[None], expected[name]) for name, value in actual.items()}
    assert {name: error for name, error in errors.items() if not error < limit} == {}
