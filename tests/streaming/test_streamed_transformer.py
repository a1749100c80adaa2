"""Streamed equals resident, bit for bit: tiny models in every scheme, copies that land as late as they may."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from copy_queues import DelayedCopy
from step_inputs import Inputs, assert_same, random_inputs, walk
from tiny_models import Made
from tiny_models import model_once as model_once
from tiny_models import released_once as released_once
from torch import Tensor, nn

from lowvram_i2v import pipeline
from lowvram_i2v.checkpoint import ModelFolder, open_model
from lowvram_i2v.dit.conditioning import is_conditioning
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer, is_in_block
from lowvram_i2v.errors import CheckpointError, ResourceError
from lowvram_i2v.events import ignore
from lowvram_i2v.job import prepare
from lowvram_i2v.profile import load_profile
from lowvram_i2v.request import GenerateRequest
from lowvram_i2v.safetensors_file import SafetensorsFile
from lowvram_i2v.sample_photo import draw_sample_photo
from lowvram_i2v.sampling.conditioning import draw_noise
from lowvram_i2v.streaming import arena as arena_file
from lowvram_i2v.streaming.block_stream import BlockStream, streamed_places
from lowvram_i2v.streaming.load import host_bytes, slab_bytes, stream_blocks
from lowvram_i2v.text.embeds import PromptEmbeds

CPU = torch.device("cpu")
STEPS = 3
Streamed = tuple[HunyuanVideoTransformer, BlockStream[int], DelayedCopy]


def not_conditioning(name: str) -> bool:
    return not is_conditioning(name)


@contextmanager
def load(opened: ModelFolder, dtype: torch.dtype, only: Callable[[str], bool]) -> Iterator[HunyuanVideoTransformer]:
    def build() -> HunyuanVideoTransformer:
        return HunyuanVideoTransformer(opened.header.transformer)

    with opened.load("transformer", build, device=CPU, dtype=dtype, only=only) as transformer:
        yield transformer


@contextmanager
def streamed(
    opened: ModelFolder, dtype: torch.dtype, resident: int, slots: int, host: str = "pinned"
) -> Iterator[Streamed]:
    queue = DelayedCopy()
    with (
        load(opened, dtype, lambda name: not is_conditioning(name) and not is_in_block(name)) as transformer,
        stream_blocks(
            opened.files["transformer"],
            transformer.blocks(),
            device=CPU,
            dtype=dtype,
            resident=resident,
            slots=slots,
            host=host,
            only=not_conditioning,
            queue=queue,
        ) as stream,
    ):
        yield transformer, stream, queue


def inputs_of(opened: ModelFolder, dtype: torch.dtype) -> Inputs:
    return random_inputs(
        opened.header.transformer, size=(64, 48), frames=5, steps=STEPS, device=CPU, dtype=dtype, text_tokens=7
    )


@pytest.mark.parametrize("variant", ["token_replace", "latent_concat"])
@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        ("fp32", torch.float32),
        ("fp32", torch.bfloat16),
        ("bf16", torch.float32),
        ("bf16", torch.bfloat16),
        ("int8", torch.float32),
        ("fp8", torch.float32),
        ("nf4", torch.float32),
        ("nf4", torch.bfloat16),
    ],
)
def test_streamed_equals_resident(variant: str, scheme: str, dtype: torch.dtype, model_once: Made) -> None:
    opened = open_model(model_once(variant, scheme))
    inputs = inputs_of(opened, dtype)
    with load(opened, dtype, not_conditioning) as transformer:
        expected = walk(transformer, inputs, None)
    assert not torch.equal(expected[0], expected[1])
    for resident, slots, of_blocks, host in (
        (-1, 2, 0, "pinned"),
        (0, 2, 4, "pinned"),
        (1, 2, 3, "pinned"),
        (0, 3, 4, "pinned"),
        (-1, 2, 0, "mapped"),
        (0, 2, 4, "mapped"),
        (1, 2, 3, "mapped"),
    ):
        with streamed(opened, dtype, resident, slots, host) as (transformer, stream, queue):
            assert_same(walk(transformer, inputs, stream), expected)
            assert len(queue.copies) <= STEPS * of_blocks + slots
            assert len(queue.copies) >= STEPS * of_blocks + (slots if of_blocks and host == "pinned" else 0)
            assert len({address for address, _ in queue.copies}) == (slots if of_blocks else 0)


def test_copied_bytes_are_the_files_without_conditioning(model_once: Made) -> None:
    """What a step copies is as long as the streamed tensors of the file, but for the alignment of each."""
    opened = open_model(model_once("token_replace", "int8"))
    entries = opened.files["transformer"].entries
    in_file = sum(entry.bytes for name, entry in entries.items() if is_in_block(name) and not is_conditioning(name))
    with streamed(opened, torch.bfloat16, 0, 2) as (transformer, stream, queue):
        walk(transformer, inputs_of(opened, torch.bfloat16), stream)
    copied = sum(size for _, size in queue.copies[2:]) / STEPS
    assert in_file * 0.99 < copied < in_file + 256 * len(entries)


@pytest.mark.parametrize("host", ["pinned", "mapped"])
def test_a_step_abandoned_inside_a_block_leaves_no_trace(host: str, model_once: Made) -> None:
    opened = open_model(model_once("token_replace", "int8"))
    inputs = inputs_of(opened, torch.float32)
    with streamed(opened, torch.float32, 0, 2, host) as (transformer, stream, _):
        expected = walk(transformer, inputs, stream)
        for name in ("double_blocks.0", "double_blocks.1", "single_blocks.1"):

            def fail(*_: object) -> None:
                raise torch.OutOfMemoryError("as a card does")

            hook = transformer.get_submodule(name).register_forward_hook(fail)
            with pytest.raises(torch.OutOfMemoryError):
                walk(transformer, inputs, stream)
            hook.remove()
            assert_same(walk(transformer, inputs, stream), expected)


@pytest.mark.parametrize("host", ["pinned", "mapped"])
def test_weights_and_threads_are_gone_at_the_end(host: str, model_once: Made) -> None:
    opened, threads = open_model(model_once("token_replace", "bf16")), set(threading.enumerate())
    with streamed(opened, torch.float32, 1, 2, host) as (transformer, stream, queue):
        assert not any(parameter.requires_grad for parameter in transformer.parameters() if not parameter.is_meta)
        walk(transformer, inputs_of(opened, torch.float32), stream)
        weights = {name: tensor for name, tensor in transformer.state_dict().items() if not tensor.is_meta}
        assert set(weights) == {name for name in transformer.state_dict() if not is_conditioning(name)}
    assert all(tensor.is_meta for tensor in transformer.state_dict().values())
    assert not queue.under_way
    assert set(threading.enumerate()) == threads


def test_the_plain_path_still_has_gradients(model_once: Made) -> None:
    opened = open_model(model_once("token_replace", "fp32"))
    inputs = inputs_of(opened, torch.float32)
    with load(opened, torch.float32, not_conditioning) as transformer:
        weight = transformer.double_blocks[0].get_submodule("img_attn_proj").get_parameter("weight")
        weight.requires_grad_(True)
        transformer.predict(inputs.latents, inputs.steps[0], inputs.rope).square().mean().backward()
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0


def test_too_few_or_too_many_blocks_are_a_bug(model_once: Made) -> None:
    opened = open_model(model_once("token_replace", "fp32"))
    inputs = inputs_of(opened, torch.float32)
    with load(opened, torch.float32, not_conditioning) as transformer, torch.inference_mode():
        blocks: list[nn.Module] = list(transformer.blocks().values())
        for wrong in (blocks[:-1], [*blocks, blocks[-1]]):
            with pytest.raises(ValueError, match="zip"):
                transformer.predict(inputs.latents, inputs.steps[0], inputs.rope, wrong)


def test_a_missing_tensor_is_named_before_a_weight_is_read(model_once: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_model(model_once("token_replace", "bf16"))
    file = opened.files["transformer"]
    entries = dict(file.entries)
    block = [name for name in entries if name.startswith("single_blocks.0.") and not_conditioning(name)]
    inside = sorted(block, key=lambda name: entries[name].start)[1]
    entries["img_in.stray"] = entries.pop(inside)
    with torch.device("meta"):
        transformer = HunyuanVideoTransformer(opened.header.transformer)
    context = stream_blocks(
        SafetensorsFile(file.path, entries, {}),
        transformer.blocks(),
        device=CPU,
        dtype=torch.float32,
        resident=0,
        slots=2,
        only=not_conditioning,
    )
    monkeypatch.setattr(SafetensorsFile, "read", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(CheckpointError, match=f"no tensor {re.escape(inside)}"):
        context.__enter__()


@pytest.mark.parametrize(("variant", "cfg"), [("token_replace", 1.0), ("latent_concat", 2.0)])
def test_every_way_of_holding_blocks_gives_the_same_latents(
    variant: str, cfg: float, model_once: Made, tmp_path: Path
) -> None:
    model = model_once(variant, "int8")
    draw_sample_photo(96, 64).save(tmp_path / "photo.png")
    request = GenerateRequest(
        tmp_path / "photo.png", "a boat", tmp_path / "out.mp4", size=(64, 48), frames=5, steps=2, cfg=cfg
    )
    config = open_model(model).header.transformer
    embeds = PromptEmbeds(torch.randn(9, config.text_dim), torch.randn(config.pooled_dim))
    image_latent, made = torch.randn(16, 1, 6, 8), []
    for resident, host in ((-1, "auto"), (0, "pinned"), (1, "mapped")):
        profile = replace(load_profile("auto"), resident_blocks=resident, host=host)
        job = prepare(request, model, profile, CPU, ignore)
        steps = pipeline.condition_steps(job, (embeds, embeds if cfg > 1 else None))
        made.append(pipeline.sample(job, steps, image_latent, draw_noise(job.latent_shape, 0)))
    assert_same(made[1:], [made[0]] * 2)


def test_too_little_ram_ends_the_run_with_a_clear_error(
    model_once: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(model_once("token_replace", "bf16"))
    monkeypatch.setattr(arena_file, "available_ram", lambda: 1000)
    with pytest.raises(ResourceError, match="streamed blocks need"), streamed(opened, torch.float32, 0, 2):
        pass
    for host in ("pinned", "mapped"):
        with streamed(opened, torch.float32, -1, 2, host) as (transformer, stream, _):  # needs no arena
            walk(transformer, inputs_of(opened, torch.float32), stream)


@pytest.mark.parametrize("host", ["pinned", "mapped"])
@pytest.mark.parametrize("resident", [-1, 0, 1])
def test_the_bytes_that_are_allocated_are_those_that_were_told(
    host: str, resident: int, model_once: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, allocated = open_model(model_once("token_replace", "int8")), []
    plain = arena_file.page_aligned

    def page_aligned(size: int, tenant: arena_file.Tenant) -> Tensor:
        memory = plain(size, tenant)
        allocated.append(memory.untyped_storage().nbytes())
        return memory

    monkeypatch.setattr(arena_file, "page_aligned", page_aligned)
    transformer = opened.build("transformer", lambda: HunyuanVideoTransformer(opened.header.transformer))
    slabs = slab_bytes(transformer.blocks(), torch.float32, not_conditioning)
    places = streamed_places(len(slabs), resident, 2)
    with streamed(opened, torch.float32, resident, 2, host) as (_, _, queue):
        assert sum(allocated) == host_bytes(slabs, places, host)
        assert {size for _, size in queue.copies} <= {slabs[place] for place in places}


def test_a_file_that_was_cut_while_it_is_read_ends_the_step(model_once: Made, tmp_path: Path) -> None:
    opened = open_model(model_once("token_replace", "int8"))
    file = opened.files["transformer"]
    path = tmp_path / "transformer.safetensors"
    path.write_bytes(file.path.read_bytes())
    opened.files["transformer"] = SafetensorsFile(path, file.entries, file.metadata)
    threads = set(threading.enumerate())
    with streamed(opened, torch.float32, 0, 2, "mapped") as (transformer, stream, _):
        inputs = inputs_of(opened, torch.float32)
        walk(transformer, inputs, stream)
        os.truncate(path, path.stat().st_size // 4)
        with pytest.raises(CheckpointError, match=r"too early|before the end"):
            walk(transformer, inputs, stream)
    assert set(threading.enumerate()) == threads
