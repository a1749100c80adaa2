"""Streaming on a CUDA device: the same bits as resident, no waiting on the host, no allocation in the loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from step_inputs import Inputs, assert_same, random_inputs, walk
from tiny_models import Made
from tiny_models import model_once as model_once
from tiny_models import released_once as released_once
from torch import Tensor

from lowvram_i2v.checkpoint import ModelFolder, open_model
from lowvram_i2v.dit.conditioning import is_conditioning, is_embedder, is_modulation
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer, is_in_block
from lowvram_i2v.dit.workspace import Chunking, Workspace
from lowvram_i2v.sampling.conditioning import condition
from lowvram_i2v.sampling.denoise import GuidedVelocity, denoise
from lowvram_i2v.sampling.schedule import flow_sigmas
from lowvram_i2v.streaming.arena import PAGE, arena
from lowvram_i2v.streaming.block_stream import BlockStream
from lowvram_i2v.streaming.copy_queue import CudaCopyQueue
from lowvram_i2v.streaming.load import stream_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible here"),
]

STEPS = 3
MILLISECOND = 2_000_000  # clock cycles, about
Stream = BlockStream[torch.cuda.Event]


def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


class SlowCopies(CudaCopyQueue):
    """Every copy begins by overwriting its target, and lands a millisecond later: who does not wait sees 0xFF."""

    def copy(self, target: Tensor, source: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(after)
            target.fill_(0xFF)
            torch.cuda._sleep(MILLISECOND)
        return super().copy(target, source, after)


@contextmanager
def streamed(
    opened: ModelFolder, resident: int, queue: CudaCopyQueue | None = None, host: str = "pinned"
) -> Iterator[tuple[HunyuanVideoTransformer, Stream]]:
    def build() -> HunyuanVideoTransformer:
        return HunyuanVideoTransformer(opened.header.transformer)

    def outside(name: str) -> bool:
        return not is_conditioning(name) and not is_in_block(name)

    with (
        opened.load("transformer", build, device=cuda(), dtype=torch.bfloat16, only=outside) as transformer,
        stream_blocks(
            opened.files["transformer"],
            transformer.blocks(),
            device=cuda(),
            dtype=torch.bfloat16,
            resident=resident,
            slots=2,
            host=host,
            only=lambda name: not is_conditioning(name),
            queue=queue,
        ) as stream,
    ):
        yield transformer, stream


def inputs_of(opened: ModelFolder) -> Inputs:
    return random_inputs(
        opened.header.transformer, size=(128, 96), frames=9, steps=STEPS, device=cuda(), dtype=torch.bfloat16
    )


HOSTS = pytest.mark.parametrize("host", ["pinned", "mapped"])
SCHEMES = pytest.mark.parametrize("scheme", ["bf16", "int8", "fp8", "nf4"])


@SCHEMES
@pytest.mark.parametrize("variant", ["token_replace", "latent_concat"])
def test_streamed_equals_resident(variant: str, scheme: str, model_once: Made) -> None:
    opened = open_model(model_once(variant, scheme))
    inputs = inputs_of(opened)
    with streamed(opened, resident=-1) as (transformer, stream):
        expected = walk(transformer, inputs, stream)
    for resident, host in ((0, "pinned"), (1, "pinned"), (0, "mapped"), (1, "mapped")):
        with streamed(opened, resident, host=host) as (transformer, stream):
            assert_same(walk(transformer, inputs, stream), expected)
        with streamed(opened, resident, SlowCopies(cuda()), host) as (transformer, stream):
            assert_same(walk(transformer, inputs, stream), expected)


@HOSTS
@pytest.mark.parametrize("scheme", ["bf16", "int8"])
def test_slow_computing_is_not_overtaken_by_copies(scheme: str, host: str, model_once: Made) -> None:
    opened = open_model(model_once("token_replace", scheme))
    inputs = inputs_of(opened)
    with streamed(opened, resident=-1) as (transformer, stream):
        expected = walk(transformer, inputs, stream)
    with streamed(opened, resident=0, host=host) as (transformer, stream):
        for block in transformer.blocks().values():
            block.register_forward_pre_hook(lambda *_: torch.cuda._sleep(MILLISECOND))
        assert_same(walk(transformer, inputs, stream), expected)


@HOSTS
@pytest.mark.parametrize("scheme", ["bf16", "int8", "fp8", "nf4"])
def test_nothing_waits_on_the_host_and_nothing_is_allocated_in_the_loop(
    scheme: str, host: str, model_once: Made
) -> None:
    """In the mapped tier the reading thread waits for copies, which is not counted, and the loop for bytes."""
    opened = open_model(model_once("token_replace", scheme))
    inputs = inputs_of(opened)
    with streamed(opened, resident=0, host=host) as (transformer, stream):
        walk(transformer, inputs, stream)  # libraries load their kernels, the allocator finds its sizes
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["segment.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            walk(transformer, inputs, stream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert torch.cuda.memory_stats()["segment.all.allocated"] == before


@HOSTS
def test_a_step_abandoned_inside_a_block_leaves_no_trace(host: str, model_once: Made) -> None:
    opened = open_model(model_once("token_replace", "int8"))
    inputs = inputs_of(opened)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("as a full card does")

    with streamed(opened, 0, SlowCopies(cuda()), host) as (transformer, stream):
        expected = walk(transformer, inputs, stream)
        for block in transformer.blocks().values():
            hook = block.register_forward_hook(fail)
            with pytest.raises(torch.OutOfMemoryError):
                walk(transformer, inputs, stream)
            hook.remove()
            assert_same(walk(transformer, inputs, stream), expected)


@HOSTS
def test_device_memory_and_threads_are_given_back(host: str, model_once: Made) -> None:
    threads = set(threading.enumerate())
    opened = open_model(model_once("token_replace", "bf16"))
    inputs = inputs_of(opened)
    with streamed(opened, resident=0, host=host) as (transformer, stream):
        walk(transformer, inputs, stream)  # libraries take their workspaces
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with streamed(opened, resident=1, host=host) as (transformer, stream):
        walk(transformer, inputs, stream)
        assert torch.cuda.memory_allocated() > before
    assert torch.cuda.memory_allocated() == before
    assert set(threading.enumerate()) == threads


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize(("variant", "negative"), [("token_replace", False), ("latent_concat", True)])
def test_the_whole_loop_waits_for_nothing(
    variant: str, negative: bool, scheme: str, chunked: bool, model_once: Made
) -> None:
    """Denoising from first to last step, guided, with each step's conditioning copied from page-locked memory."""
    opened = open_model(model_once(variant, scheme))
    inputs = inputs_of(opened)
    latents = inputs.latents[: opened.header.transformer.out_channels].float()
    conditioning = condition(opened.header.variant, latents[:, :1].clone())
    sigmas = flow_sigmas(STEPS, 7.0)
    steps = [step.on_host(pin=True) for step in inputs.steps]
    config, sizes = opened.header.transformer, (len(inputs.rope[0]), len(steps[0].txt))
    work = Workspace(config, *sizes, Chunking(rows=40, heads=1), cuda(), torch.bfloat16) if chunked else None
    with streamed(opened, resident=1) as (transformer, stream):
        velocity = GuidedVelocity(transformer, steps, steps[::-1] if negative else None, 1.5, inputs.rope, stream, work)

        def run() -> Tensor:
            return denoise(velocity, conditioning, latents, sigmas, lambda *_: None)

        expected = run()  # libraries load their kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            actual = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert actual.isfinite().all()
        assert torch.equal(actual, expected)


@SCHEMES
@torch.inference_mode()
def test_conditioning_block_by_block_equals_loaded_as_a_whole(scheme: str, model_once: Made) -> None:
    opened = open_model(model_once("token_replace", scheme))
    config = opened.header.transformer

    def build() -> HunyuanVideoTransformer:
        return HunyuanVideoTransformer(config)

    prompt, pooled = torch.randn(9, config.text_dim, device=cuda()), torch.randn(config.pooled_dim, device=cuda())
    given = torch.linspace(1000, 100, STEPS, device=cuda()), prompt, pooled, torch.tensor([6.0], device=cuda())
    with opened.load("transformer", build, device=cuda(), dtype=torch.bfloat16, only=is_conditioning) as transformer:
        expected = transformer.condition(*given)
    with (
        opened.load("transformer", build, device=cuda(), dtype=torch.bfloat16, only=is_embedder) as transformer,
        stream_blocks(
            opened.files["transformer"],
            transformer.blocks(),
            device=cuda(),
            dtype=torch.bfloat16,
            resident=0,
            slots=2,
            host="mapped",
            only=is_modulation,
        ) as stream,
    ):
        for _ in range(2):
            for one, other in zip(transformer.condition(*given, stream), expected, strict=True):
                assert torch.equal(one.txt, other.txt)
                assert torch.equal(one.modulation, other.modulation)


def test_the_arena_is_page_locked_while_it_lasts() -> None:
    """By what it does: the host has queued a copy long before the copy is done. (`is_pinned` does not know of it on
    every version.)"""
    size = 2**29 + 3
    with arena(size, cuda()) as memory:
        allocated = memory.untyped_storage().nbytes()
        assert allocated <= size + 2 * PAGE, "rounded up"
        memory.fill_(9)
        target = torch.empty(size, dtype=torch.uint8, device="cuda")
        begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begun.record()
        start = time.perf_counter()
        target.copy_(memory, non_blocking=True)
        queued = time.perf_counter() - start
        done.record()
        torch.cuda.synchronize()
        assert queued < 0.5 * begun.elapsed_time(done) / 1e3
        assert target.eq(9).all()
