"""Runs `test_fused_ops.py` in Triton's interpreter, which has to be chosen before Triton is imported; and the choice of
the table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowvram_i2v.errors import PlatformError
from lowvram_i2v.kernels import ops

ROOT = Path(__file__).resolve().parents[2]


def test_fused_ops_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/kernels_triton/test_fused_ops.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


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
