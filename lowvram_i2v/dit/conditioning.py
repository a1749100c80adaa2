"""What a step's time decides, computed for all steps before the loop.

27 % of the blocks' weights (the AdaLN linear layers) and the whole token refiner see only time, guidance and prompt,
never the video. Their results for a whole run are small (0.3 GB for 50 steps of the 13B model in bf16), so they are
computed once, each weight read once for all steps, and the weights are gone before the loop begins.

Invariants: exact, up to the rounding of a batched product; a step's modulation is one packed tensor, of which blocks
see views. Differentiable.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CONDITIONING_WEIGHTS = ("time_in.", "vector_in.", "guidance_in.", "txt_in.", "final_layer.adaLN_modulation.")
CONDITIONING_PARTS = ("img_mod", "txt_mod", "modulation")
IMG_PARTS, TXT_PARTS, SINGLE_PARTS, FINAL_PARTS = 6, 6, 3, 2


def is_conditioning(name: str) -> bool:
    """Whether a weight of the transformer is used before the loop only; all others are used in the loop only."""
    return name.startswith(CONDITIONING_WEIGHTS) or any(part in CONDITIONING_PARTS for part in name.split("."))


@dataclass(frozen=True)
class StreamModulation:
    """shift, scale, gate before attention, then before the MLP; each [1 or 2, hidden]."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


@dataclass(frozen=True)
class StepConditioning:
    """One step of one prompt.

    txt: refined prompt [text tokens, hidden]. modulation: [rows, hidden], block after block: for a double block the
    image's six values and the text's six, for a single block three, at the end the final layer's shift and scale.
    vectors: rows that each value of image tokens has: 2 where the first frame's tokens are modulated as for time 0
    (row 1), else 1.
    """

    txt: Tensor
    modulation: Tensor
    vectors: int
    double_blocks: int
    single_blocks: int

    def to(self, device: torch.device) -> StepConditioning:
        """On the device. From `on_host(pin=True)` the copy is queued, and the host does not wait for it."""
        txt, modulation = (tensor.to(device, non_blocking=True) for tensor in (self.txt, self.modulation))
        return replace(self, txt=txt, modulation=modulation)

    def on_host(self, pin: bool) -> StepConditioning:
        """In host memory of its own, page-locked if `pin`."""
        txt, modulation = (tensor.to("cpu", copy=True) for tensor in (self.txt, self.modulation))
        if pin:
            txt, modulation = txt.pin_memory(), modulation.pin_memory()
        return replace(self, txt=txt, modulation=modulation)

    def double(self) -> Iterator[tuple[StreamModulation, StreamModulation]]:
        """Of each double block: the image's modulation and the text's."""
        for i in range(self.double_blocks):
            start = i * self._double_rows
            img = self._values(start, IMG_PARTS, self.vectors)
            txt = self._values(start + IMG_PARTS * self.vectors, TXT_PARTS, 1)
            yield StreamModulation(*img), StreamModulation(*txt)

    def single(self) -> Iterator[tuple[Tensor, ...]]:
        """Of each single block: shift, scale, gate."""
        for i in range(self.single_blocks):
            start = self.double_blocks * self._double_rows + i * SINGLE_PARTS * self.vectors
            yield self._values(start, SINGLE_PARTS, self.vectors)

    def final(self) -> tuple[Tensor, ...]:
        """Of the final layer: shift, scale, the same for all tokens."""
        return self._values(len(self.modulation) - FINAL_PARTS, FINAL_PARTS, 1)

    @property
    def _double_rows(self) -> int:
        return IMG_PARTS * self.vectors + TXT_PARTS

    def _values(self, start: int, parts: int, vectors: int) -> tuple[Tensor, ...]:
        rows = self.modulation[start : start + parts * vectors]
        return rows.view(parts, vectors, -1).unbind()


def pack(parts: tuple[Tensor, ...], steps: int) -> Tensor:
    """A modulation layer's results for all vectors, each [steps or steps + 1, hidden] -> [steps, rows, hidden].

    A last row beyond the steps belongs to the first frame and is the same for every step.
    """
    table = torch.stack(parts, dim=1)  # [vectors, parts, hidden]
    own, first = table[:steps, :, None], table[steps:, :, None]
    rows = torch.cat([own, first.expand(steps, -1, -1, -1)], dim=2) if len(table) > steps else own
    return rows.flatten(1, 2)
