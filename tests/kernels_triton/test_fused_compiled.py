"""The fused kernels compiled for cards that are not here: they fit, spill nothing, and use the matrix units.

A selection; `python tests/aot/table.py` shows all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
SHARED = {"sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448, "sm_120": 101_376}
CHOSEN = [
    ("norm, modulate, i8: modulate_kernel", "sm_86", ""),
    ("q k norm, rotate: qkv_kernel", "sm_120", ""),
    ("attended and gelu, i8: rows_kernel", "sm_86", ""),
    ("product, gated, i8: product_kernel", "sm_86", "IMMA"),
    ("product, i8: product_kernel", "sm_89", "IMMA"),
    ("product, gated, fp8e4nv: product_kernel", "sm_90", "QGMMA"),
    ("product, gated, i8: product_kernel", "sm_90", "IGMMA"),
    ("product, fp8e4nv: product_kernel", "sm_120", "QMMA.SF"),
]
PROGRAM = """
import sys
from compile import report
from fused_variants import variants
chosen = sys.argv[1].split("|")
for card, variant in variants():
    if f"{variant.name}@{card}" in chosen:
        made = report(variant)
        print(variant.name, card, made.shared, made.spilled, " ".join(made.matrix) or "-", sep="@", flush=True)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[int, int, str]]:
    """(kernel, card) -> shared bytes, spilled bytes, matrix instructions of the hot loop."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "aot")]),
    }
    chosen = "|".join(f"{name}@{card}" for name, card, _ in CHOSEN)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, chosen], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [line.split("@") for line in done.stdout.splitlines()]
    return {(name, card): (int(shared), int(spilled), matrix) for name, card, shared, spilled, matrix in rows}


@pytest.mark.parametrize(("name", "card", "matrix"), CHOSEN, ids=lambda value: value)
def test_a_kernel_fits_its_card(
    name: str, card: str, matrix: str, compiled: dict[tuple[str, str], tuple[int, int, str]]
) -> None:
    shared, spilled, instructions = compiled[name, card]
    assert shared <= SHARED[card]
    assert spilled == 0
    assert matrix in instructions
