"""Shapes for every size, tiles that cover everything, one time tile at a time, gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowvram_i2v.vae.causal import FrameCausalAttention
from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.encoder import VaeEncoder
from lowvram_i2v.vae.tiles import Tiling, decode_segments, decode_tiled, encode_tiled

CONFIG = VaeConfig(
    latent_channels=2,
    block_out_channels=(4, 4, 4, 4),
    layers_per_block=1,
    norm_num_groups=2,
    sample_size=32,
    sample_tsize=16,
)
TILING = Tiling.from_config(CONFIG)


class Repeater:
    """A decoder that only looks at one latent: whatever the tiles, its result is the untiled one."""

    def __init__(self) -> None:
        self.frames: list[int] = []

    def decode(self, latent: Tensor) -> Tensor:
        self.frames.append(latent.shape[1])
        frames = latent.repeat_interleave(4, dim=1)[:, 3:]
        return frames.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


class Picker:
    """An encoder that takes one pixel a latent: the mirror image of `Repeater`."""

    def moments(self, video: Tensor) -> Tensor:
        return video[:, ::4, ::8, ::8]


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return VaeEncoder(CONFIG).requires_grad_(False), VaeDecoder(CONFIG).requires_grad_(False)


@st.composite
def tilings(draw):
    """Every tile size with every overlap, also of a half and more."""
    tile, frames = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    return Tiling(tile, draw(st.integers(1, tile)), frames, draw(st.integers(1, frames)), 8, 4)


@settings(deadline=None, max_examples=150)
@given(tilings(), st.integers(1, 14), st.integers(1, 11), st.integers(1, 11))
def test_tiles_cover_everything_once(tiling, frames, height, width):
    latent = torch.randn(2, frames, height, width)
    expected = Repeater().decode(latent)
    torch.testing.assert_close(decode_tiled(Repeater(), latent, tiling), expected)
    mean, _logvar = encode_tiled(Picker(), expected, tiling)
    torch.testing.assert_close(mean, latent[:1])


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7))
def test_shapes(vae, frames, height, width):
    encoder, decoder = vae
    shape = (3, 4 * (frames - 1) + 1, 8 * height, 8 * width)
    latent = torch.randn(2, frames, height, width)
    assert decoder.decode(latent).shape == shape
    assert decode_tiled(decoder, latent, TILING).shape == shape
    for mean, logvar in (encoder.encode(torch.rand(shape)), encode_tiled(encoder, torch.rand(shape), TILING)):
        assert mean.shape == logvar.shape == latent.shape


def test_what_fits_in_one_tile_is_not_tiled(vae):
    encoder, decoder = vae
    latent = torch.randn(2, TILING.tile_frames, TILING.tile, TILING.tile)
    assert torch.equal(decode_tiled(decoder, latent, TILING), decoder.decode(latent))
    video = torch.rand(3, 13, CONFIG.sample_size, CONFIG.sample_size)
    assert torch.equal(encode_tiled(encoder, video, TILING)[0], encoder.encode(video)[0])


def test_a_last_tile_of_one_latent_gives_no_frames():
    """7 latents, tiles at 0, 3 and 6: the third would only give the frame that is dropped."""
    decoder, latent = Repeater(), torch.randn(2, 7, 2, 2)
    segments = list(decode_segments(decoder, latent, TILING))
    assert [segment.shape[1] for segment in segments] == [13, 12]
    assert decoder.frames == [5, 4]
    torch.testing.assert_close(torch.cat(segments, 1), Repeater().decode(latent))


def test_segments_come_one_by_one():
    decoder, latent = Repeater(), torch.randn(2, 9, 2, 2)
    segments = decode_segments(decoder, latent, TILING)
    assert decoder.frames == []
    assert next(segments).shape[1] == 13
    assert decoder.frames == [5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_float32_whatever_the_weights(dtype):
    encoder, decoder = VaeEncoder(CONFIG).to(dtype), VaeDecoder(CONFIG).to(dtype)
    assert decoder.decode(torch.randn(2, 2, 3, 3)).dtype == torch.float32
    assert {part.dtype for part in encoder.encode(torch.rand(3, 1, 16, 16))} == {torch.float32}


def test_log_variance_is_clamped():
    encoder = VaeEncoder(CONFIG).requires_grad_(False)
    encoder.quant_conv.bias[2:] = torch.tensor([-1000.0, 1000.0])
    _mean, logvar = encoder.encode(torch.rand(3, 1, 16, 16))
    assert (logvar[0] == -30).all()
    assert (logvar[1] == 20).all()


def test_attention_sees_no_later_frame():
    """With the norm out of the way: a changed frame changes itself and what follows, nothing before."""
    torch.manual_seed(0)
    attention = FrameCausalAttention(8, 2).requires_grad_(False)
    attention.group_norm = torch.nn.Identity()
    x = torch.randn(8, 4, 3, 2)
    changed = x.clone()
    changed[:, 2] += 1
    difference = (attention(x) - attention(changed)).abs().amax(dim=(0, 2, 3))
    assert (difference[:2] == 0).all()
    assert (difference[2:] > 1e-4).all()


def test_gradients_are_the_same_as_the_slope():
    """Training uses the same code: the slope of tiled encode and decode, against two evaluations."""
    torch.manual_seed(0)
    encoder, decoder = VaeEncoder(CONFIG), VaeDecoder(CONFIG)

    def loss(video: Tensor) -> Tensor:
        mean, logvar = encode_tiled(encoder, video, TILING)
        return (decode_tiled(decoder, mean + logvar, TILING).double() ** 2).sum()

    video, direction = torch.rand(3, 21, 40, 16), torch.randn(3, 21, 40, 16)
    leaf = video.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    slope = float((leaf.grad * direction).sum())
    step = 1e-3
    with torch.no_grad():
        measured = float(loss(video + step * direction) - loss(video - step * direction)) / (2 * step)
    assert slope == pytest.approx(measured, rel=0.02)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in parameters)
