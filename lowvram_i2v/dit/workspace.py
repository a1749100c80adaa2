"""The memory that denoising works in: allocated once, the same for every step and prompt, and known beforehand.

At 1280x720, 129 frames, the output of a single block's first layer would be 5 GB. Here only what attention needs is as
long as the video:

    x           [tokens, hidden]              residual, image tokens then text tokens, changed in place
    q, k, v     [tokens, heads, head_dim]     attention's result takes the place of q

Everything else is as long as a chunk of tokens and gone after it. `activation_bytes` states the peak of all of it,
point by point in the order of `dit/chunked.py`: whoever changes what lives there changes it here. It counts plain
torch. Fused kernels make no float32 copies: of a chunk they allocate results only (in w8a8 the codes of normed rows, a
product, the codes of its GELU, 4 bytes a row), each of which is counted here too. Torch is imported when a workspace
is made, never before. Left out: weights, slots, the step's inputs, what attention allocates beside its result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.kernels import chunks
from lowvram_i2v.kernels.compute import codes_bytes, gated_bytes, is_8_bit, product_bytes, scratch

if TYPE_CHECKING:
    import torch

    from lowvram_i2v.kernels.ops import Ops

FLOAT32 = 4


@dataclass(frozen=True)
class Chunking:
    """rows: tokens of a chunk. heads: heads that one attention call computes; divides the model's."""

    rows: int
    heads: int


class Workspace:
    """The buffers above. image_tokens and text_tokens are the most that a prediction may have; fewer fit too."""

    def __init__(
        self,
        config: TransformerConfig,
        image_tokens: int,
        text_tokens: int,
        chunking: Chunking,
        device: torch.device,
        dtype: torch.dtype,
        ops: Ops | None = None,
    ) -> None:
        """dtype: of the activations, that of the transformer's unquantized weights. ops: None for the plain ones."""
        import torch

        from lowvram_i2v.kernels.ops import PLAIN

        if chunking.rows < 1 or chunking.heads < 1 or config.heads % chunking.heads:
            raise ValueError(f"{chunking} does not fit {config.heads} heads")
        self.chunking, self.dtype, self.ops = chunking, dtype, ops or PLAIN
        tokens, hidden = image_tokens + text_tokens, config.hidden_size
        with torch.inference_mode(False):  # so that it can be written inside inference mode and outside
            self.x = torch.empty(tokens, hidden, device=device, dtype=dtype)
            self.q, self.k, self.v = (
                torch.empty(tokens, config.heads, config.head_dim, device=device, dtype=dtype) for _ in range(3)
            )


def activation_bytes(
    config: TransformerConfig,
    image_tokens: int,
    text_tokens: int,
    chunking: Chunking,
    *,
    scheme: str | None,
    compute: str,
    element: int,
    attention: int = 0,
    attention_writes: bool = False,
) -> int:
    """Peak bytes that a prediction has allocated beside weights, slots and inputs, its workspace among them.

    scheme, compute: how the blocks' linear layers are stored (None: unquantized) and multiplied, all alike. element:
    bytes of a value of the activations, 2 or 4. attention: what one call of the backend allocates beside its result.
    attention_writes: the result goes over q, see `attention.WRITING`.
    """
    hidden, inner, tokens = config.hidden_size, config.mlp_hidden, image_tokens + text_tokens
    rows, double_rows = (min(chunking.rows, longest) for longest in (tokens, max(image_tokens, text_tokens)))
    up, down, square = (inner, hidden), (hidden, inner), (hidden, hidden)
    qkv, joined = (3 * hidden, hidden), (hidden, hidden + inner)
    wide = _Wide(config, element)
    eight = compute == "w8a8" and all(is_8_bit(scheme, compute, shape) for shape in (qkv, up, down, square, joined))
    chunk = _Codes(config, element, scheme or "") if eight else wide

    def sweep(work: int, *shapes: tuple[int, int]) -> int:
        """Opening layers, or working with all of them open."""
        needs = [scratch(scheme, compute, shape, 0, element) for shape in shapes]
        return sum(need.held for need in needs) + max(work, *(need.call for need in needs))

    rotation = FLOAT32 * (rows * 2 * (hidden + config.heads) + min(rows, image_tokens) * config.head_dim)
    placing = rows * 3 * hidden * element + rotation  # copies, factors, angles
    project = sweep(max(chunk.norm(rows), chunk.qkv(rows), placing), qkv)
    attend = attention + (0 if attention_writes else tokens * chunking.heads * config.head_dim * element)
    double = sweep(max(chunk.norm(double_rows), chunk.double(double_rows)), square, up, down)
    single = sweep(max(chunk.norm(rows), chunk.single(rows)), up, joined)

    patch = config.out_channels * math.prod(config.patch_size)
    velocity = image_tokens * patch * FLOAT32
    final = velocity + max(wide.norm(double_rows), double_rows * (hidden + patch) * element, velocity)

    workspace = element * 4 * tokens * hidden
    modulation = _modulation_rows(config) * hidden * FLOAT32 if element < FLOAT32 else 0
    return workspace + modulation + max(project, attend, double, single, final)


@dataclass(frozen=True)
class _Wide:
    """Bytes of a chunk whose rows are in the activations' dtype."""

    config: TransformerConfig
    element: int

    def norm(self, rows: int) -> int:
        """The result; in float32 the same, a copy of 16-bit input, mean and deviation of each row, and 1 + scale."""
        hidden, copies = self.config.hidden_size, 2 if self.element < FLOAT32 else 1
        return rows * hidden * self.element + FLOAT32 * (rows * hidden * copies + 2 * rows + hidden)

    def qkv(self, rows: int) -> int:
        """Normed rows and the product."""
        return rows * 4 * self.config.hidden_size * self.element

    def double(self, rows: int) -> int:
        """A layer's input and result: fc1's, fc2's."""
        return rows * (self.config.hidden_size + self.config.mlp_hidden) * self.element

    def single(self, rows: int) -> int:
        """Normed rows, the product, and the joint rows."""
        return rows * 2 * (self.config.hidden_size + self.config.mlp_hidden) * self.element


@dataclass(frozen=True)
class _Codes:
    """Bytes of a chunk whose rows are 8-bit codes, made from float32 values some rows at a time."""

    config: TransformerConfig
    element: int
    scheme: str

    def norm(self, rows: int) -> int:
        """Codes; the piece in float32, normed; and as in `_Wide` what makes it."""
        hidden, copies = self.config.hidden_size, 3 if self.element < FLOAT32 else 2
        piece = chunks.piece(rows, hidden)
        return codes_bytes(rows, hidden) + FLOAT32 * (piece * copies + 2 * piece // hidden + hidden)

    def qkv(self, rows: int) -> int:
        hidden = self.config.hidden_size
        return codes_bytes(rows, hidden) + self._product(rows, 3 * hidden, hidden)

    def double(self, rows: int) -> int:
        hidden, inner = self.config.hidden_size, self.config.mlp_hidden
        quotients = FLOAT32 * chunks.piece(rows, hidden)
        projected = codes_bytes(rows, hidden) + max(quotients, self._gated(rows, hidden, hidden))
        return max(projected, self._activated(rows, inner), codes_bytes(rows, inner) + self._gated(rows, hidden, inner))

    def single(self, rows: int) -> int:
        hidden, joint = self.config.hidden_size, self.config.hidden_size + self.config.mlp_hidden
        return max(self._activated(rows, joint), codes_bytes(rows, joint) + self._gated(rows, hidden, joint))

    def _activated(self, rows: int, width: int) -> int:
        """Codes of the normed rows and the product of `hidden -> mlp_hidden`; then the codes of its GELU [rows, width],
        made of pieces of values and quotients."""
        hidden, inner = self.config.hidden_size, self.config.mlp_hidden
        pieces = 2 * FLOAT32 * chunks.piece(rows, inner)
        activated = rows * inner * self.element + codes_bytes(rows, width) + pieces
        return codes_bytes(rows, hidden) + max(self._product(rows, inner, hidden), activated)

    def _product(self, rows: int, out: int, into: int) -> int:
        return rows * out * self.element + product_bytes(self.scheme, (out, into), rows)

    def _gated(self, rows: int, out: int, into: int) -> int:
        return gated_bytes(self.scheme, (out, into), rows, self.element)


def _modulation_rows(config: TransformerConfig) -> int:
    """Of `StepConditioning.modulation`."""
    vectors = 2 if config.replaces_first_frame else 1
    return config.double_blocks * 6 * (vectors + 1) + config.single_blocks * 3 * vectors + 2
