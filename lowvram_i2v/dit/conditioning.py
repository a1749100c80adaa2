"""What a step's time decides, computed for all steps before the loop.

27 % of the blocks' weights (the AdaLN linear layers) and the whole token refiner see only time, guidance and prompt,
never the video. Their results for a whole run are small (0.3 GB for 50 steps of the 13B model in bf16), so they are
computed once, each weight read once for all steps, and the weights are gone before the loop begins. The embedders
(time, guidance, pooled prompt, token refiner, final layer) are small enough to be loaded as a whole; the blocks'
modulation layers are not, and come block by block.

Invariants: exact, up to the rounding of a batched product; a step's modulation is one packed tensor, of which blocks
see views. Differentiable.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.kernels.compute import scratch

EMBEDDERS = ("time_in.", "vector_in.", "guidance_in.", "txt_in.", "final_layer.adaLN_modulation.")
MODULATION = ("img_mod", "txt_mod", "modulation")
IMG_PARTS, TXT_PARTS, SINGLE_PARTS, FINAL_PARTS = 6, 6, 3, 2
FLOAT32 = 4  # bytes
REFINER_ROWS = 6
"""Values of [text tokens, hidden] that a refiner block holds beside its MLP's two: what entered, after attention, q, k,
v, the normed rows."""


def is_conditioning(name: str) -> bool:
    """Whether a weight of the transformer is used before the loop only; all others are used in the loop only."""
    return is_embedder(name) or is_modulation(name)


def is_embedder(name: str) -> bool:
    """Whether a weight is used before the loop and lies outside the blocks."""
    return name.startswith(EMBEDDERS)


def is_modulation(name: str) -> bool:
    """Whether a weight belongs to a block's modulation layers."""
    return any(part in MODULATION for part in name.split("."))


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


def modulation_rows(config: TransformerConfig) -> int:
    """Rows of a step's packed modulation."""
    vectors = 2 if config.replaces_first_frame else 1
    double, single = IMG_PARTS * vectors + TXT_PARTS, SINGLE_PARTS * vectors
    return config.double_blocks * double + config.single_blocks * single + FINAL_PARTS


def step_bytes(config: TransformerConfig, text_tokens: int, element: int) -> int:
    """Of one `StepConditioning`; element: bytes of a value."""
    return (text_tokens + modulation_rows(config)) * config.hidden_size * element


def conditioning_bytes(
    config: TransformerConfig,
    steps: int,
    text_tokens: int,
    cfg: bool,
    largest_slab: int,
    element: int,
    scheme: str | None,
) -> int:
    """Peak bytes on the device while `HunyuanVideoTransformer.condition` runs with streamed blocks, beside the
    embedders' weights: two slots, the inputs, temporaries, and the results of all steps.

    text_tokens: of the longest prompt. cfg: a negative prompt follows when the prompt's results have left the device,
    so it takes no more. largest_slab: of a block's modulation layers. element: bytes of a value. scheme: of these
    layers, None if they are not quantized. They are multiplied as w8a16.
    """
    hidden, first = config.hidden_size, int(config.replaces_first_frame)
    vectors = (steps + first) * hidden * element
    results, peak = 0, 0
    layers = [(IMG_PARTS, first, scheme), (TXT_PARTS, 0, scheme)] * config.double_blocks
    layers += [(SINGLE_PARTS, first, scheme)] * config.single_blocks + [(FINAL_PARTS, 0, None)]
    for parts, extra, stored in layers:
        product = scratch(stored, "w8a16", (parts * hidden, hidden), steps + extra, element)
        out = parts * (steps + extra) * hidden * element
        packed = parts * steps * (1 + extra) * hidden * element
        multiplying = results + vectors + product.held + product.call + out
        packing = results + 2 * out + packed * extra
        peak = max(peak, multiplying, packing)
        results += packed
    joining = 2 * results  # the pieces become one tensor

    prompt = text_tokens * hidden * element
    refiner = int((REFINER_ROWS + 2 * config.mlp_hidden / hidden) * prompt)
    refining = results + (steps - 1) * prompt + refiner  # which has the last step's result among its own
    inputs = (text_tokens * config.text_dim + config.pooled_dim) * (FLOAT32 + element)
    return 2 * largest_slab + inputs + vectors + max(peak, joining, refining)
