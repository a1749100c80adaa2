"""Streaming on a CUDA device: the same bits as resident, no waiting on the host, no allocation in the loop."""

from __future__ import annotations

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
from lowvram_i2v.dit.conditioning import is_conditioning
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer, is_in_block
from lowvram_i2v.streaming.arena import arena
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
    opened: ModelFolder, resident: int, queue: CudaCopyQueue | None = None
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
            only=lambda name: not is_conditioning(name),
            queue=queue,
        ) as stream,
    ):
        yield transformer, stream


def inputs_of(opened: ModelFolder) -> Inputs:
    return random_inputs(
        opened.header.transformer, size=(128, 96), frames=9, steps=STEPS, device=cuda(), dtype=torch.bfloat16
    )


SCHEMES = pytest.mark.parametrize("scheme", ["bf16", "int8", "fp8", "nf4"])


@SCHEMES
@pytest.mark.parametrize("variant", ["token_replace", "latent_concat"])
def test_streamed_equals_resident(variant: str, scheme: str, model_once: Made) -> None:
    opened = open_model(model_once(variant, scheme))
    inputs = inputs_of(opened)
    with streamed(opened, resident=-1) as (transformer, stream):
        expected = walk(transformer, inputs, stream)
    for resident in (0, 1):
        with streamed(opened, resident) as (transformer, stream):
            assert_same(walk(transformer, inputs, stream), expected)
        with streamed(opened, resident, SlowCopies(cuda())) as (transformer, stream):
            assert_same(walk(transformer, inputs, stream), expected)


@pytest.mark.parametrize("scheme", ["bf16", "int8"])
def test_slow_computing_is_not_overtaken_by_copies(scheme: str, model_once: Made) -> None:
    opened = open_model(model_once("token_replace", scheme))
    inputs = inputs_of(opened)
    with streamed(opened, resident=-1) as (transformer, stream):
        expected = walk(transformer, inputs, stream)
    with streamed(opened, resident=0) as (transformer, stream):
        for block in transformer.blocks().values():
            block.register_forward_pre_hook(lambda *_: torch.cuda._sleep(MILLISECOND))
        assert_same(walk(transformer, inputs, stream), expected)


@pytest.mark.parametrize("scheme", ["bf16", "int8"])
def test_nothing_waits_on_the_host_and_nothing_is_allocated_in_the_loop(scheme: str, model_once: Made) -> None:
    opened = open_model(model_once("token_replace", scheme))
    inputs = inputs_of(opened)
    with streamed(opened, resident=0) as (transformer, stream):
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


def test_a_step_abandoned_inside_a_block_leaves_no_trace(model_once: Made) -> None:
    opened = open_model(model_once("token_replace", "int8"))
    inputs = inputs_of(opened)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("as a full card does")

    with streamed(opened, 0, SlowCopies(cuda())) as (transformer, stream):
        expected = walk(transformer, inputs, stream)
        for block in transformer.blocks().values():
            hook = block.register_forward_hook(fail)
            with pytest.raises(torch.OutOfMemoryError):
                walk(transformer, inputs, stream)
            hook.remove()
            assert_same(walk(transformer, inputs, stream), expected)


def test_device_memory_is_given_back(model_once: Made) -> None:
    opened = open_model(model_once("token_replace", "bf16"))
    inputs = inputs_of(opened)
    with streamed(opened, resident=0) as (transformer, stream):
        walk(transformer, inputs, stream)  # libraries take their workspaces
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with streamed(opened, resident=1) as (transformer, stream):
        walk(transformer, inputs, stream)
        assert torch.cuda.memory_allocated() > before
    assert torch.cuda.memory_allocated() == before


def test_the_arena_is_page_locked_while_it_lasts() -> None:
    """By what it does: the host has queued a copy long before the copy is done. (`is_pinned` does not know of it on
    every version.)"""
    size = 2**29 + 3
    with arena(size, cuda()) as memory:
        assert memory.untyped_storage().nbytes() < size + 4096, "rounded up"
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
