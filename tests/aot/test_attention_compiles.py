"""The attention kernels that the backends use compile for every card within its limits (see `compile.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("card", ["sm_86", "sm_89", "sm_90", "sm_120"])
def test_tiles_in_use_pass_the_gate(card: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    table = Path(__file__).with_name("table.py")
    done = subprocess.run(
        [sys.executable, str(table), "--gate", card], capture_output=True, text=True, env=environment, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(card) == (2 if card == "sm_86" else 4), done.stdout
