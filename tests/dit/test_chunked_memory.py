"""The stated peak of a prediction's memory against what torch's profiler saw allocated, and at full size."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from step_inputs import random_inputs
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lowvram_i2v.attention import AttentionBackend
from lowvram_i2v.dit.conditioning import is_conditioning
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer, is_in_block
from lowvram_i2v.dit.workspace import Chunking, Workspace, activation_bytes
from lowvram_i2v.kernels import chunks, w8a8
from lowvram_i2v.kernels import compute as ways
from lowvram_i2v.kernels.compute import PRODUCTS
from lowvram_i2v.kernels.quant_linear import QuantLinear, set_compute, swap_linears
from lowvram_i2v.kernels.scheme import SCHEMES

CPU = torch.device("cpu")
CONFIG = TransformerConfig(hidden_size=256, heads=2, double_blocks=1, single_blocks=1, text_dim=20, pooled_dim=12)
GIB = 2**30


@cache
def model(scheme: str | None) -> HunyuanVideoTransformer:
    """With zeros for weights: only sizes count here."""
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer(CONFIG, attend_with_nothing_else).eval().requires_grad_(False)
    if scheme is not None:
        swap_linears(
            transformer, lambda name: SCHEMES[scheme] if is_in_block(name) and not is_conditioning(name) else None
        )
        for layer in transformer.modules():
            if isinstance(layer, QuantLinear):
                layer.to_empty(device=CPU)
                for part in layer.buffers():
                    part.zero_()
                nn.init.zeros_(layer.bias)
    return transformer


def attend_with_nothing_else(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Allocates its result only, as attention kernels on a GPU do."""
    return torch.zeros(q.shape, dtype=q.dtype)


def peak_of(work: Callable[[], object]) -> int:
    """Most bytes that were allocated at a time, of those that `work` allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results = profiler.profiler.kineto_results
    now = most = 0
    for event in results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


SCHEMES_AND_WAYS = pytest.mark.parametrize(
    ("scheme", "compute"),
    [(None, "w8a16"), ("int8", "w8a16"), ("int8", "w8a8"), ("fp8", "w8a16"), ("fp8", "w8a8"), ("nf4", "w8a16")],
)


@SCHEMES_AND_WAYS
@pytest.mark.parametrize(
    ("size", "frames", "text_tokens", "chunking"),
    [
        ((96, 64), 9, 20, Chunking(16, 1)),
        ((96, 64), 9, 20, Chunking(1000, 2)),
        ((64, 48), 5, 90, Chunking(64, 1)),
        ((192, 128), 13, 33, Chunking(256, 1)),
    ],
    ids=str,
)
def test_the_peak_is_as_stated(
    size: tuple[int, int],
    frames: int,
    text_tokens: int,
    chunking: Chunking,
    scheme: str | None,
    compute: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stated, measured = peaks(size, frames, text_tokens, chunking, scheme, compute, monkeypatch)
    assert stated == pytest.approx(measured, rel=0.005)


@pytest.mark.parametrize("scheme", PRODUCTS)
@pytest.mark.parametrize("text_tokens", [33, 100])
def test_in_pieces_as_at_full_size(scheme: str, text_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 copies and integer products of a few rows of the chunk at a time."""
    monkeypatch.setattr(chunks, "ELEMENTS", 2**14)
    monkeypatch.setattr(ways, "PRODUCT", 2**14)
    stated, measured = peaks((96, 64), 9, text_tokens, Chunking(64, 1), scheme, "w8a8", monkeypatch)
    assert stated == pytest.approx(measured, rel=0.01)


def test_a_backend_that_writes_over_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    def there(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        return q.zero_()

    arguments = (128, 96), 9, 33, Chunking(8, 2), None, "w8a16", monkeypatch
    stated, measured = peaks(*arguments, there)
    assert stated == pytest.approx(measured, rel=0.005)
    assert stated < 0.9 * peaks(*arguments)[0]


@torch.inference_mode()
def peaks(
    size: tuple[int, int],
    frames: int,
    text_tokens: int,
    chunking: Chunking,
    scheme: str | None,
    compute: str,
    monkeypatch: pytest.MonkeyPatch,
    attend: AttentionBackend | None = None,
) -> tuple[int, int]:
    """Bytes stated, and measured with a CPU's product of fp8 replaced by one that makes no copies, as on a GPU."""
    monkeypatch.setattr(w8a8, "_fp8_in_float32", lambda x, weight, dtype: torch.zeros(len(x.codes), len(weight.codes)))
    transformer = model(scheme)
    set_compute(transformer, compute)
    inputs = random_inputs(
        CONFIG, size=size, frames=frames, steps=1, device=CPU, dtype=torch.float32, text_tokens=text_tokens
    )
    tokens = len(inputs.rope[0]), text_tokens

    def predict() -> None:
        work = Workspace(CONFIG, *tokens, chunking, CPU, torch.float32)
        transformer.predict(inputs.latents, inputs.steps[0], inputs.rope, work=work, attend=attend)

    transformer.double_blocks[0].img_attn_proj(torch.zeros(1, CONFIG.hidden_size))  # makes tables that are kept
    settings = {"scheme": scheme, "compute": compute, "element": 4, "attention_writes": attend is not None}
    stated = activation_bytes(CONFIG, *tokens, chunking, **settings)
    return stated, peak_of(predict)


@pytest.mark.parametrize("changes", [{}, {"in_channels": 33, "guidance_embed": False}])
def test_half_precision_counts_the_float32_copies_that_it_needs(changes: dict[str, object]) -> None:
    """What 16 bits add beside half of everything: the modulation table in float32."""
    config = TransformerConfig(**{**CONFIG.to_dict(), **changes})
    step = random_inputs(config, size=(32, 32), frames=5, steps=1, device=CPU, dtype=torch.bfloat16).steps[0]
    arguments = config, 10_000, 100, Chunking(16, 2)  # attention is the peak
    single, half = (activation_bytes(*arguments, scheme=None, compute="w8a16", element=size) for size in (4, 2))
    assert half == single // 2 + 4 * step.modulation.numel()


def test_the_released_model_at_720p() -> None:
    config, tokens = TransformerConfig(), (33 * 45 * 80, 144 + 256)
    for scheme, compute in (("int8", "w8a16"), ("int8", "w8a8"), ("fp8", "w8a8"), ("nf4", "w8a16"), (None, "w8a16")):
        stated = activation_bytes(config, *tokens, Chunking(4096, 8), scheme=scheme, compute=compute, element=2)
        assert 2.73 * GIB < stated < 3.2 * GIB, scheme
    least = activation_bytes(config, *tokens, Chunking(1024, 2), scheme="int8", compute="w8a8", element=2)
    assert least < 2.9 * GIB
