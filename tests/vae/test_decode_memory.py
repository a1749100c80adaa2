"""What the planner says a decode takes, against what it allocates."""

import gc
from collections import deque
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from lowvram_i2v.errors import ResourceError
from lowvram_i2v.vae import engine as engine_module
from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.engine import Engine, decode_frames
from lowvram_i2v.vae.planning import (
    LANDING,
    blending_bytes,
    decode_bytes,
    fixed_bytes,
    host_bytes,
    plan_route,
    ram_bytes,
    walk,
    weight_bytes,
)
from lowvram_i2v.vae.policy import POLICIES, DecodeChunking
from lowvram_i2v.vae.route import Shape

CONFIG = VaeConfig(latent_channels=8, block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=4)
GIB = 2**30


def peaks_of(runs):
    """The most bytes allocated at a time while each runs: recorded all at once, because a recording takes seconds."""
    gc.collect()  # what earlier tests left and is freed meanwhile would count as less
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for run in runs:
            with record_function("run"):
                run()
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    peaks, held = [], 0
    for event in events:
        if event.name() == "run":
            peaks.append(0)
            held = 0
        elif event.name() == "[memory]" and peaks:
            held += event.nbytes()
            peaks[-1] = max(peaks[-1], held)
    return peaks


def only_the_result(x, weight, out):
    """A convolution without the copies that libraries for the CPU make."""
    out.zero_()


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 4, 12), (1, 16, 16)])
def test_predicted_against_allocated(shape, monkeypatch):
    """In float32 on the CPU, all kept on the "device"."""
    monkeypatch.setattr(engine_module, "trusted_convolution", lambda *_: only_the_result)
    decoder, latent = VaeDecoder(CONFIG).requires_grad_(False), torch.randn(8, *shape)
    runs, pieces = [], []
    for mib in (10, 13):
        steps = list(walk(CONFIG, Shape(*shape), POLICIES["reference"], DecodeChunking(mib * 2**20, 0), 4))
        pieces.append(max(step.piece for step in steps))
        assert fixed_bytes(CONFIG, Shape(*shape), 4) + pieces[-1] == max(step.device_bytes for step in steps)
        runs.append(partial(Engine(decoder).run, latent, steps))
    for piece, peak in zip(pieces, peaks_of(runs), strict=True):
        assert piece <= peak < 1.25 * piece  # of a few MB: moments and single frames count here


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("gib", [1.75, 2.75, 11])
@pytest.mark.parametrize("size", [(33, 90, 160), (33, 68, 120), (33, 64, 64), (17, 45, 80), (1, 90, 160)])
def test_the_budget_holds(policy, gib, size):
    chunking, shape = DecodeChunking(int(gib * GIB)), Shape(*size)
    assert decode_bytes(VaeConfig(), shape, policy, chunking, 2) <= chunking.device_bytes
    assert host_bytes(VaeConfig(), shape, policy, chunking, 2) <= chunking.host_bytes


@pytest.mark.parametrize("frames", [4, 9, 13])
def test_finished_frames_are_counted(frames, monkeypatch):
    """Tiles that cost nothing, and an encoder that lets as many frames wait as a tile of time gives."""
    config = replace(CONFIG, sample_size=64, sample_tsize=16)
    decoder, shape = VaeDecoder(config), Shape(frames, 40, 44)
    policy, pixels = POLICIES["reference"], torch.zeros(3, 17, 64, 64)

    def tile(part):
        _, time, height, width = part.shape
        return pixels[:, : 4 * time - 3, : 8 * height, : 8 * width]

    monkeypatch.setattr(Engine, "tiles", lambda *_: tile)

    def encode():
        waiting = deque(maxlen=12)
        for piece in decode_frames(decoder, torch.zeros(8, frames, 40, 44), policy):
            waiting.extend(piece.unbind(1))

    time = 4 * (min(frames, 5) - 1) + 1
    predicted = ram_bytes(config, shape, policy, DecodeChunking(), 4, waiting=12) - LANDING * 12 * time * 64 * 64
    (peak,) = peaks_of([encode])
    beside = blending_bytes(config, shape) + weight_bytes(config, 4)  # the device's
    assert 0.97 * predicted < peak < 1.03 * predicted + beside


def test_seamless_frames_wait_when_the_decoder_has_given_its_memory_back():
    shape, policy = Shape(33, 90, 160), POLICIES["seamless"]
    frame = 3 * 720 * 1280
    held = host_bytes(VaeConfig(), shape, policy, DecodeChunking(), 2)
    assert ram_bytes(VaeConfig(), shape, policy, DecodeChunking(), 2, waiting=48) == held > (2 * 129 + 4 * 48) * frame
    ample = DecodeChunking(device_bytes=60 * GIB)  # all is kept there, but the video
    assert ram_bytes(VaeConfig(), shape, policy, ample, 2, waiting=48) == (2 * 129 + 4 * 48) * frame


def test_too_little_memory_is_said_with_numbers():
    with pytest.raises(ResourceError, match=r"does not fit in 0\.25 GiB of video memory"):
        plan_route(VaeConfig(), Shape(33, 90, 160), POLICIES["seamless"], DecodeChunking(GIB // 4), 2)


def test_weights_are_counted():
    decoder = VaeDecoder(CONFIG)
    Engine(decoder)
    held = sum(parameter.numel() for parameter in decoder.parameters()) * 4
    assert 0 < weight_bytes(CONFIG, 4) - held < 0.5 * held
