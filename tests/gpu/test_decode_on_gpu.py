"""The streamed decoder on a CUDA device: memory on the host or the device, Triton kernels, float16 and float32."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from lowvram_i2v.vae.attention import by_products
from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.vae.convolution import trusted_convolution
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.engine import Engine, decode_frames
from lowvram_i2v.vae.layout import attention_layout
from lowvram_i2v.vae.planning import decode_bytes, follow, plan_route, weight_bytes
from lowvram_i2v.vae.policy import POLICIES, DecodeChunking
from lowvram_i2v.vae.route import Shape
from lowvram_i2v.vae.streamed import Room
from lowvram_i2v.vae.tiles import Tiling, decode_tiled

pytestmark = pytest.mark.gpu

CONFIG = VaeConfig(block_out_channels=(32, 64, 64, 64), norm_num_groups=8, sample_size=64, sample_tsize=16)
EXACT = replace(POLICIES["seamless"], measures=None)


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def decoder_of(dtype: torch.dtype) -> VaeDecoder:
    torch.manual_seed(0)
    decoder = VaeDecoder(CONFIG).requires_grad_(False)
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return decoder.to("cuda", dtype)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double().cpu() - expected.double().cpu()).norm() / expected.double().norm())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.float16, 0.02)])
@pytest.mark.parametrize(("mib", "host_mib"), [(24, 256), (26, 4), (200, 256)])
def test_seamless(dtype: torch.dtype, limit: float, mib: int, host_mib: int) -> None:
    """With little memory, tensors lie on the host; with little there too, the last stages run as a tail."""
    decoder, latent = decoder_of(dtype), torch.randn(16, 5, 9, 11)
    with torch.inference_mode():
        expected = decoder_of(torch.float32).decode(latent.cuda())
    frames = torch.cat(
        list(decode_frames(decoder, latent.cuda(), EXACT, DecodeChunking(mib * 2**20, host_mib * 2**20))), 1
    )
    assert error(frames, expected) < limit


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.float16, 0.02)])
def test_reference(dtype: torch.dtype, limit: float) -> None:
    decoder, latent = decoder_of(dtype), torch.randn(16, 7, 9, 11)
    with torch.inference_mode():
        expected = decode_tiled(decoder_of(torch.float32), latent.cuda(), Tiling.from_config(CONFIG))
    pieces = decode_frames(decoder, latent.cuda(), POLICIES["reference"], DecodeChunking(64 * 2**20))
    assert error(torch.cat(list(pieces), 1), expected) < limit


def test_host_and_device_memory_give_the_same_bits() -> None:
    decoder, latent = decoder_of(torch.float16), torch.randn(16, 5, 9, 11, device="cuda")
    shape = Shape(5, 9, 11)
    route = [step.segment for step in plan_route(CONFIG, shape, EXACT, DecodeChunking(2**28), 2)]
    moved = [replace(s, trunk=s.trunk and "host", branch=s.branch and "host") for s in route]
    results = []
    for way in (route, moved):
        engine = Engine(decoder)
        results.append(engine.run(latent, follow(CONFIG, shape, EXACT, way, 2)).settled().clone())
        engine.close()
    assert torch.equal(results[0].cpu(), results[1].cpu())


def test_this_machines_convolution() -> None:
    assert trusted_convolution(torch.device("cuda"), torch.float16).__name__ in ("cudnn_conv3d", "conv3d", "conv2d_sum")


def test_attention_by_products_is_the_fused_one() -> None:
    """With the release's width, more keys than one product takes, and scores far from each other."""
    shape, channels, device = Shape(3, 31, 40), 512, torch.device("cuda")
    at = attention_layout(shape, channels, 2, on_host=False)
    room = Room(torch.empty(at.size, dtype=torch.uint8, device=device), torch.float16)
    q, k, v = (torch.randn(n, channels, device=device).half() for n in (1240, 3720, 3720))
    k[2500] = q[7] / 4
    expected = torch.softmax(q.double() @ k.double().t() * channels**-0.5, 1) @ v.double()
    assert error(by_products(q, k, v, room, at), expected) < 2e-3


@pytest.mark.parametrize("policy", ["reference", "seamless"])
def test_reserved_memory_is_what_was_planned(policy: str) -> None:
    """Beside it: cuBLAS' and cuDNN's own memory, and the smallest pieces that torch's allocator takes."""
    decoder, latent = decoder_of(torch.float16), torch.randn(16, 9, 40, 40, device="cuda")
    chunking, shape = DecodeChunking(600 * 2**20, 256 * 2**20), Shape(9, 40, 40)
    for _ in decode_frames(decoder, latent, POLICIES[policy], chunking):
        pass
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    for _ in decode_frames(decoder, latent, POLICIES[policy], chunking):
        pass
    planned = decode_bytes(CONFIG, shape, POLICIES[policy], chunking, 2) - weight_bytes(CONFIG, 2)
    taken = torch.cuda.max_memory_reserved() - before
    assert taken < 1.02 * planned + 64 * 2**20
    assert taken > 0.95 * planned - 32 * 2**20
