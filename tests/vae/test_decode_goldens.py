"""The streamed decoder against the reference implementation: plain by global moments, tiled by those of the tiles."""

import pytest
import torch

from goldens import golden, names, relative_l2, weights
from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.engine import decode_frames
from lowvram_i2v.vae.policy import POLICIES, DecodeChunking


@pytest.mark.golden
@pytest.mark.parametrize("name", names("E_vae_plain"))
def test_plain_golden(name):
    case = golden(name)
    decoder = golden_decoder(case)
    pieces = decode_frames(decoder, case["in.latent"][0], POLICIES["seamless"], DecodeChunking(2**27, 2**28))
    assert relative_l2(torch.cat(list(pieces), 1)[None], case["out.decoded"]) < 1e-5


@pytest.mark.golden
@pytest.mark.parametrize("out", ["out.decoded", "out.decoded_spatial_only", "out.decoded_temporal_only"])
@pytest.mark.parametrize("name", names("E_vae_tiled"))
def test_tiled_golden(name, out):
    case = golden(name)
    decoder = golden_decoder(case)
    frames, height, width = case.shape(out)[2:]
    latent = case["in.latent"][0][:, : (frames - 1) // decoder.config.time_ratio + 1]
    latent = latent[:, :, : height // decoder.config.spatial_ratio, : width // decoder.config.spatial_ratio]
    pieces = list(decode_frames(decoder, latent, POLICIES["reference"], DecodeChunking(2**28)))
    assert relative_l2(torch.cat(pieces, 1)[None], case[out]) < 1e-5


def golden_decoder(case):
    config = VaeConfig.from_official(case.info["config"])
    state = weights(case.info["weights"]["file"])
    decoder = VaeDecoder(config).requires_grad_(False)
    decoder.load_state_dict({name: state[name] for name in decoder.state_dict()})
    return decoder
