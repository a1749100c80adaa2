"""The attention kernels that the backends use compile for every card within its limits (see `compile.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def rows() -> list[list[str]]:
    """Cells of the table's rows, one for each kernel and card, the last cell with what is wrong."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    table = Path(__file__).with_name("table.py")
    done = subprocess.run(
        [sys.executable, str(table), "--gate"], capture_output=True, text=True, env=environment, timeout=280
    )
    made = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "| sm_" in line]
    assert done.returncode == sum(bool(row[-1]) for row in made), done.stdout + done.stderr
    return made


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("card", ["sm_86", "sm_89", "sm_90", "sm_120"])
def test_tiles_in_use_pass_the_gate(card: str, rows: list[list[str]]) -> None:
    mine = [row for row in rows if row[1] == card]
    assert len(mine) == (2 if card == "sm_86" else 4)
    assert [row for row in mine if row[-1]] == []
