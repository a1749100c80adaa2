"""The table of ops: what is chosen where, and what happens when a kernel is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowvram_i2v.errors import PlatformError
from lowvram_i2v.kernels import ops

ROOT = Path(__file__).resolve().parents[2]


def test_a_cpu_computes_plainly() -> None:
    assert ops.choose(torch.device("cpu")) is ops.PLAIN


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    with pytest.raises(PlatformError, match="Triton is not installed"):
        ops.fused()
    assert ops.choose(torch.device("cuda")) is ops.PLAIN


def test_a_refused_kernel_is_replaced_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    table = ops.choose(torch.device("cuda"), refused=("gelu",))
    assert table.gelu is ops.PLAIN.gelu
    assert table.gated_residual_ is ops.fused().gated_residual_
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert ops.choose(torch.device("cuda")) is ops.PLAIN
