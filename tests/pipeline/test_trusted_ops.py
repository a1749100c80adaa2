"""A fused kernel that fails its self-test on a card is not used there, and the user is told."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowvram_i2v import pipeline
from lowvram_i2v.dit import chunked
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.events import Event, Notice
from lowvram_i2v.kernels.ops import PLAIN, Ops

BROKEN = replace(PLAIN, gelu=lambda x, out: out.fill_(1))


def job(said: list[Event]) -> Any:
    header = SimpleNamespace(transformer=TransformerConfig(hidden_size=256, heads=2))
    return SimpleNamespace(model=SimpleNamespace(header=header), device=torch.device("cpu"), listen=said.append)


def test_a_broken_kernel_is_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(device: torch.device, refused: Any = ()) -> Ops:
        return replace(BROKEN, **{name: getattr(PLAIN, name) for name in refused})

    monkeypatch.setattr(pipeline, "choose", choose)
    said: list[Event] = []
    ops = pipeline._trusted_ops(job(said), torch.float32)
    assert ops == PLAIN
    assert len(said) == 1
    assert isinstance(said[0], Notice)
    assert "gelu" in said[0].text
    assert "self-test" in said[0].text


def test_without_kernels_there_is_nothing_to_test() -> None:
    said: list[Event] = []
    assert pipeline._trusted_ops(job(said), torch.float32) is PLAIN
    assert not said


def test_all_ops_in_use_are_tested() -> None:
    source = Path(chunked.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r"\bops\.([a-z]\w+)\(", source)) == set(chunked.OPS)
