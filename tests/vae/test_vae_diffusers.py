"""Random weights give the same numbers in diffusers' class: plain and tiled, encode and decode."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo

from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.encoder import VaeEncoder
from lowvram_i2v.vae.engine import decode_frames
from lowvram_i2v.vae.policy import POLICIES, DecodeChunking
from lowvram_i2v.vae.tiles import Tiling, decode_tiled, encode_tiled

CONFIG = VaeConfig(
    block_out_channels=(16, 32, 32, 48),
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=32,
    sample_tsize=16,
)


def relative_l2(actual, expected):
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(scope="module")
def models():
    """diffusers' model with strong random weights, and ours with the same ones (the names are the same)."""
    torch.manual_seed(0)
    theirs = AutoencoderKLHunyuanVideo(
        latent_channels=CONFIG.latent_channels,
        block_out_channels=CONFIG.block_out_channels,
        layers_per_block=CONFIG.layers_per_block,
        norm_num_groups=CONFIG.norm_num_groups,
    ).requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.mul_(1.5).add_(torch.randn_like(parameter), alpha=0.05)
    state = theirs.state_dict()
    encoder, decoder = VaeEncoder(CONFIG).requires_grad_(False), VaeDecoder(CONFIG).requires_grad_(False)
    for module in (encoder, decoder):
        module.load_state_dict({name: state.pop(name) for name in module.state_dict()})
    assert not state
    return theirs, encoder, decoder


@pytest.mark.parametrize("frames", [1, 9])
def test_encode_plain(models, frames):
    theirs, encoder, _decoder = models
    theirs.use_framewise_encoding = False
    theirs.disable_tiling()
    video = torch.rand(3, frames, 48, 64) * 2 - 1
    expected = theirs.encode(video[None]).latent_dist
    mean, logvar = encoder.encode(video)
    assert relative_l2(mean, expected.mean[0]) < 1e-5
    assert relative_l2(logvar, expected.logvar[0]) < 1e-5


@pytest.mark.parametrize("frames", [1, 3])
def test_decode_plain(models, frames):
    theirs, _encoder, decoder = models
    theirs.use_framewise_decoding = False
    theirs.disable_tiling()
    latent = torch.randn(16, frames, 5, 6)
    assert relative_l2(decoder.decode(latent), theirs.decode(latent[None]).sample[0]) < 1e-5


def tile_like_ours(theirs):
    theirs.use_framewise_encoding = theirs.use_framewise_decoding = True
    keep, keep_frames = CONFIG.sample_size * 3 // 4, CONFIG.sample_tsize * 3 // 4
    size, frames = CONFIG.sample_size, CONFIG.sample_tsize
    theirs.enable_tiling(size, size, frames, keep, keep, keep_frames)


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 56, 40), (25, 32, 72), (29, 40, 24)])
def test_encode_tiled(models, frames, height, width):
    theirs, encoder, _decoder = models
    tile_like_ours(theirs)
    video = torch.rand(3, frames, height, width) * 2 - 1
    expected = theirs.encode(video[None]).latent_dist
    mean, logvar = encode_tiled(encoder, video, Tiling.from_config(CONFIG))
    assert relative_l2(mean, expected.mean[0]) < 1e-5
    assert relative_l2(logvar, expected.logvar[0]) < 1e-5


@pytest.mark.parametrize(("frames", "height", "width"), [(2, 7, 5), (7, 4, 9), (9, 5, 3)])
def test_decode_tiled(models, frames, height, width):
    theirs, _encoder, decoder = models
    tile_like_ours(theirs)
    latent = torch.randn(16, frames, height, width)
    actual = decode_tiled(decoder, latent, Tiling.from_config(CONFIG))
    assert relative_l2(actual, theirs.decode(latent[None]).sample[0]) < 1e-5


def test_streamed_decode_at_full_width():
    """The released widths: 146 M random weights, a latent of 2x2x3; everything kept, and with little memory."""
    config = VaeConfig()
    torch.manual_seed(0)
    theirs = AutoencoderKLHunyuanVideo(down_block_types=("HunyuanVideoDownBlock3D",) * 4).requires_grad_(False)
    with torch.device("meta"):
        decoder = VaeDecoder(config)
    state = theirs.state_dict()
    decoder.load_state_dict({name: state[name] for name in decoder.state_dict()}, assign=True)
    decoder.requires_grad_(False)
    theirs.use_framewise_decoding = False
    latent = torch.randn(16, 2, 2, 3)
    expected = theirs.decode(latent[None]).sample[0]
    seamless = replace(POLICIES["seamless"], measures=None)
    for mib in (1500, 740):
        chunking = DecodeChunking(mib * 2**20, 2**24)
        actual = torch.cat(list(decode_frames(decoder, latent, seamless, chunking)), 1)
        assert relative_l2(actual, expected) < 1e-5
