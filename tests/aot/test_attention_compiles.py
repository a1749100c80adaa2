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
    assert len(mine) == (3 if card == "sm_86" else 5)  # attention, keys; values where they have 8 bits
    assert [row for row in mine if row[-1]] == []


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_lost_codes_are_seen() -> None:
    """In machine code: two conversions merged, as it should be; one merged with a shifted register; one read back."""
    sys.path.insert(0, str(Path(__file__).parent))
    from compile import stale_codes

    pack = "F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C"
    right = f"/*0010*/ {pack} R7, R2, R3, RZ ;\n/*0020*/ {pack} R7, R5.reuse, R6, R7 ;\n"
    assert stale_codes(right) == 0
    assert stale_codes(f"/*0008*/ SHF.R.U32.HI R8, RZ, 0x8, R1 ;\n/*0010*/ {pack} R7, R2, R3, R8 ;\n") == 1
    assert stale_codes(right + "/*0030*/ F2FP.F16.E4M3.UNPACK_B R9, R7 ;\n") == 1
    assert stale_codes("/*0030*/ F2FP.F16.E4M3.UNPACK_B R9, R7 ;\n") == 0
