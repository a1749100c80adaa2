"""Conditioning with the blocks' modulation layers read one by one: the same bits, in as little memory as told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from allocations import peak_of
from tiny_models import Made
from tiny_models import model_once as model_once
from tiny_models import released_once as released_once
from torch import Tensor, nn

from lowvram_i2v.checkpoint import ModelFolder, open_model
from lowvram_i2v.dit.conditioning import (
    StepConditioning,
    conditioning_bytes,
    is_conditioning,
    is_embedder,
    is_modulation,
    step_bytes,
)
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer
from lowvram_i2v.kernels.quant_linear import swap_linears
from lowvram_i2v.kernels.scheme import SCHEMES
from lowvram_i2v.streaming.block_stream import BlockStream
from lowvram_i2v.streaming.copy_queue import SynchronousCopy
from lowvram_i2v.streaming.host_blocks import Pinned
from lowvram_i2v.streaming.load import slab_bytes, stream_blocks
from lowvram_i2v.streaming.slab import below, layout_of

CPU = torch.device("cpu")
STEPS = 3
Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None]


def arguments(config: TransformerConfig, steps: int, text_tokens: int) -> Arguments:
    guidance = torch.tensor([6.0]) if config.guidance_embed else None
    prompt, pooled = torch.randn(text_tokens, config.text_dim), torch.randn(config.pooled_dim)
    return torch.linspace(1000, 100, steps), prompt, pooled, guidance


@contextmanager
def block_by_block(
    opened: ModelFolder, dtype: torch.dtype
) -> Iterator[tuple[HunyuanVideoTransformer, BlockStream[None]]]:
    def build() -> HunyuanVideoTransformer:
        return HunyuanVideoTransformer(opened.header.transformer)

    with (
        opened.load("transformer", build, device=CPU, dtype=dtype, only=is_embedder) as transformer,
        stream_blocks(
            opened.files["transformer"],
            transformer.blocks(),
            device=CPU,
            dtype=dtype,
            resident=0,
            slots=2,
            host="mapped",
            only=is_modulation,
        ) as stream,
    ):
        yield transformer, stream


def assert_same(actual: list[StepConditioning], expected: list[StepConditioning]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.txt, other.txt)
        assert torch.equal(one.modulation, other.modulation)


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        ("bf16", torch.float32),
        ("bf16", torch.bfloat16),
        ("int8", torch.float32),
        ("fp8", torch.bfloat16),
        ("nf4", torch.float32),
    ],
)
@pytest.mark.parametrize("variant", ["token_replace", "latent_concat"])
@torch.inference_mode()
def test_block_by_block_equals_loaded_as_a_whole(
    variant: str, scheme: str, dtype: torch.dtype, model_once: Made
) -> None:
    opened, threads = open_model(model_once(variant, scheme)), set(threading.enumerate())
    inputs = arguments(opened.header.transformer, STEPS, 7)

    def build() -> HunyuanVideoTransformer:
        return HunyuanVideoTransformer(opened.header.transformer)

    with opened.load("transformer", build, device=CPU, dtype=dtype, only=is_conditioning) as transformer:
        expected = transformer.condition(*inputs)
    with block_by_block(opened, dtype) as (transformer, stream):
        for _ in range(2):  # as for a prompt and a negative prompt
            assert_same(transformer.condition(*inputs, stream), expected)
    assert all(tensor.is_meta for tensor in transformer.state_dict().values())
    assert set(threading.enumerate()) == threads


def test_embedders_and_modulation_are_all_that_runs_before_the_loop() -> None:
    with torch.device("meta"):
        transformer = HunyuanVideoTransformer(TransformerConfig())
    names = list(transformer.state_dict())
    assert not [name for name in names if is_embedder(name) and is_modulation(name)]
    assert [name for name in names if is_conditioning(name)] == [
        name for name in names if is_embedder(name) or is_modulation(name)
    ]
    assert all("_blocks." in name for name in names if is_modulation(name))


def random_model(
    config: TransformerConfig, scheme: str | None
) -> tuple[HunyuanVideoTransformer, BlockStream[None], int]:
    """Random embedders, a stream of the blocks' modulation layers, and the longest of these in bytes."""
    torch.manual_seed(0)
    with torch.device("meta"):
        transformer = HunyuanVideoTransformer(config, attend=only_the_result).eval().requires_grad_(False)
    swap_linears(transformer, lambda name: SCHEMES[scheme] if scheme and is_modulation(name) else None)
    state = {name: torch.randn(t.shape) * 0.02 for name, t in transformer.state_dict().items() if is_embedder(name)}
    transformer.load_state_dict(state, strict=False, assign=True)
    layouts, slabs = {}, {}
    for place, (name, block) in enumerate(transformer.blocks().items()):
        layouts[place] = layout_of(block, torch.float32, below(name, is_modulation))
        slabs[place] = torch.zeros(layouts[place].bytes, dtype=torch.uint8)
    stream = BlockStream(
        list[nn.Module](transformer.blocks().values()), layouts, Pinned(slabs), 2, CPU, SynchronousCopy()
    )
    return transformer, stream, max(slab_bytes(transformer.blocks(), torch.float32, is_modulation))


def only_the_result(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


CONCAT = {"in_channels": 33, "guidance_embed": False}


@pytest.mark.parametrize(
    ("changes", "scheme", "steps", "text_tokens"),
    [
        ({}, None, 20, 40),
        ({}, "int8", 20, 40),
        ({}, "fp8", 4, 40),
        ({}, "nf4", 7, 100),
        ({}, "int8", 1, 200),
        (CONCAT, "int8", 10, 60),
        (CONCAT, None, 1, 200),
    ],
)
@torch.inference_mode()
def test_the_peak_is_as_told(changes: dict[str, object], scheme: str | None, steps: int, text_tokens: int) -> None:
    sizes = {"hidden_size": 384, "heads": 3, "double_blocks": 2, "single_blocks": 4, "text_dim": 400}
    config = TransformerConfig(**sizes, **changes)  # type: ignore[arg-type]
    transformer, stream, slab = random_model(config, scheme)
    inputs = arguments(config, steps, text_tokens)
    measured = peak_of(lambda: transformer.condition(*inputs, stream))
    told = conditioning_bytes(config, steps, text_tokens, False, slab, 4, scheme)
    given = 4 * (inputs[1].numel() + inputs[2].numel())  # what the caller holds, in float32
    beside = 2 * slab + given * 2  # slots and inputs are there before; in float32 a cast is no copy
    assert told - beside == pytest.approx(measured, rel=0.03)


@torch.inference_mode()
def test_a_step_takes_as_many_bytes_as_told() -> None:
    for changes in ({}, CONCAT):
        config = TransformerConfig(hidden_size=256, heads=2, double_blocks=2, single_blocks=3, **changes)  # type: ignore[arg-type]
        transformer, stream, _ = random_model(config, None)
        (step,) = transformer.condition(*arguments(config, 1, 9), stream)
        assert step_bytes(config, 9, 4) == 4 * (step.txt.numel() + step.modulation.numel())
