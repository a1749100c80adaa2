"""How the attention kernels cut their work on each kind of card: numbers only, no torch and no Triton.

The first tile of a list is the one that is used; the others are what the bench tries beside it. Arithmetic per card:

    sm_86   RTX 30    no 8-bit floats: P and V in fp16, each tile's product summed in fp16 at twice the rate of fp32
    sm_89   RTX 40    P and V in e4m3; summed in fp32, or tile by tile in fp16 at twice the rate
    sm_90   Hopper    P and V in e4m3 or fp16, both at full rate
    sm_120  RTX 50    P and V in e4m3 with block scales of one: the only full-rate form that sums in fp32

Rows are 128 wherever a card has `mma.sync` (all but Hopper): with 64 the compiler shares a row among warps, and the
softmax goes through shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowvram_i2v.errors import PlatformError


@dataclass(frozen=True)
class Tile:
    """One way to cut attention.

    rows, keys: of one tile of scores. warps, stages: of the program. pv: how P and V are multiplied; "16" is the
    inputs' own dtype, the others belong to the 8-bit kernel: "fp16", "fp16_acc16", "fp8", "fp8_acc16", "fp8_scaled".
    """

    rows: int
    keys: int
    warps: int
    stages: int
    pv: str = "16"

    def __str__(self) -> str:
        parts = [f"{self.rows}x{self.keys}", f"{self.warps}w", f"{self.stages}s"]
        return " ".join(parts + ([] if self.pv == "16" else [self.pv]))


OLDEST = (8, 0)
"""Compute capability at which our kernels begin, and torch's attention that keeps no scores."""

SHARED_MEMORY = {"sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448, "sm_120": 101_376}
"""Bytes that one program may have."""

DENSE = {
    "sm_86": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
    "sm_89": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
    "sm_90": (Tile(128, 128, 8, 3), Tile(128, 128, 8, 2)),
    "sm_120": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
}

INT8 = {
    "sm_86": (Tile(128, 64, 8, 3, "fp16_acc16"), Tile(128, 64, 8, 3, "fp16")),
    "sm_89": (Tile(128, 64, 8, 3, "fp8_acc16"), Tile(128, 64, 8, 3, "fp8")),
    "sm_90": (Tile(128, 64, 4, 3, "fp8"), Tile(128, 128, 8, 3, "fp8"), Tile(128, 128, 8, 3, "fp16")),
    "sm_120": (Tile(128, 64, 8, 3, "fp8_scaled"), Tile(128, 64, 8, 2, "fp8_scaled")),
}


def family(capability: tuple[int, int]) -> str:
    """The table's name for a card of this compute capability; raises PlatformError below 8.0."""
    if capability < OLDEST:
        raise PlatformError(
            f"Triton attention needs compute capability 8.0 (RTX 30) or more, the card has {capability}",
            "Use the attention backend sdpa.",
        )
    if capability < (8, 9):
        return "sm_86"
    if capability < (9, 0):
        return "sm_89"
    return "sm_90" if capability < (10, 0) else "sm_120"
