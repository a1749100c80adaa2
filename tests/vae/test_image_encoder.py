"""One picture through 2-D convolutions is the same as through the encoder of videos."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goldens import golden, names, relative_l2, weights
from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.vae.encoder import VaeEncoder
from lowvram_i2v.vae.image_encoder import ImageEncoder
from lowvram_i2v.vae.planning import encode_bytes, encoder_weight_bytes

CONFIG = VaeConfig(latent_channels=4, block_out_channels=(4, 8, 8, 8), layers_per_block=1, norm_num_groups=2)


def encoder_of(seed=0):
    torch.manual_seed(seed)
    return VaeEncoder(CONFIG).requires_grad_(False)


@settings(max_examples=10)
@given(st.integers(1, 6), st.integers(1, 6))
def test_equals_the_video_encoder(height, width):
    picture = torch.rand(3, 1, 8 * height, 8 * width) * 2 - 1
    expected, actual = (
        encoder_of().double().encode(picture.double()),
        ImageEncoder(encoder_of().double()).encode(picture),
    )
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert relative_l2(ours, theirs) < 1e-6


@pytest.mark.golden
@pytest.mark.parametrize("name", names("E_vae_plain"))
def test_golden(name):
    case = golden(name)
    encoder = VaeEncoder(VaeConfig.from_official(case.info["config"])).requires_grad_(False)
    state = weights(case.info["weights"]["file"])
    encoder.load_state_dict({key: state[key] for key in encoder.state_dict()})
    mean, logvar = ImageEncoder(encoder).encode(case["in.image"][0])
    assert relative_l2(mean[None], case["out.image_mean"]) < 1e-5
    assert relative_l2(logvar[None], case["out.image_logvar"]) < 1e-5


def test_its_weights_are_counted():
    encoder = encoder_of()
    ImageEncoder(encoder)
    held = sum(parameter.numel() for parameter in encoder.parameters())
    assert encoder_weight_bytes(CONFIG, 4) == 4 * held


def test_a_720p_picture_takes_less_than_one_and_a_half_gib():
    assert encode_bytes(VaeConfig(), 1280, 720, 2) < 1.5 * 2**30
