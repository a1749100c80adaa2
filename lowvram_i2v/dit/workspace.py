"""The memory that denoising works in: allocated once, the same for every step and prompt, and known beforehand.

At 1280x720, 129 frames, the output of a single block's first layer would be 5 GB. Here only what attention needs is as
long as the video, and everything else is as long as a chunk of tokens:

    x           [tokens, hidden]              residual, image tokens then text tokens, changed in place
    q, k, v     [tokens, heads, head_dim]     attention's result takes the place of q
    normed      [rows, hidden]                what a chunk's first product reads
    joint       [rows, hidden + mlp_hidden]   what a single block's second linear layer reads

`activation_bytes` states the peak of this and of all temporaries of `dit/chunked.py`, point by point in the order of
that file: whoever changes what lives there changes it here. Torch is imported when a workspace is made, never before.
Left out: weights, slots, the step's inputs, what an attention backend allocates beside its result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.kernels.compute import is_8_bit, scratch

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
        rows = min(chunking.rows, tokens)
        with torch.inference_mode(False):  # so that it can be written inside inference mode and outside
            self.x = torch.empty(tokens, hidden, device=device, dtype=dtype)
            self.q, self.k, self.v = (
                torch.empty(tokens, config.heads, config.head_dim, device=device, dtype=dtype) for _ in range(3)
            )
            self.normed = torch.empty(rows, hidden, device=device, dtype=dtype)
            self.joint = torch.empty(rows, hidden + config.mlp_hidden, device=device, dtype=dtype)


def activation_bytes(
    config: TransformerConfig,
    image_tokens: int,
    text_tokens: int,
    chunking: Chunking,
    *,
    scheme: str | None,
    compute: str,
    element: int,
) -> int:
    """Peak bytes that a prediction has allocated beside weights, slots and inputs, its workspace among them.

    scheme, compute: how the blocks' linear layers are stored (None: unquantized) and multiplied. element: bytes of a
    value of the activations, 2 or 4.
    """
    hidden, inner, dim = config.hidden_size, config.mlp_hidden, config.head_dim
    tokens = image_tokens + text_tokens
    rows, double_rows = min(chunking.rows, tokens), min(chunking.rows, max(image_tokens, text_tokens))
    half = element < FLOAT32

    def norm(rows: int) -> int:
        """In float32: the result, a copy of 16-bit input, mean and deviation of each row, and 1 + scale."""
        return FLOAT32 * (rows * hidden * (2 if half else 1) + 2 * rows + hidden)

    def product(rows: int, out: int, into: int) -> int:
        """A call's result and temporaries."""
        call = (
            scratch(scheme, compute, (out, into), rows, element).call if is_8_bit(scheme, compute, (out, into)) else 0
        )
        return rows * out * element + call

    def opened(*shapes: tuple[int, int]) -> tuple[int, int]:
        """What layers opened together hold, and the most that opening one of them takes beside."""
        needs = [scratch(scheme, compute, shape, 0, element) for shape in shapes]
        return sum(need.held for need in needs), max(need.call for need in needs)

    held, opening = opened((3 * hidden, hidden))
    rotation = FLOAT32 * (rows * 2 * (hidden + config.heads) + min(rows, image_tokens) * dim)  # copies, factors, angles
    qkv = rows * 3 * hidden * element
    project = held + max(opening, norm(rows), product(rows, 3 * hidden, hidden), qkv + rotation)

    attend = tokens * chunking.heads * dim * element

    held, opening = opened((hidden, hidden), (inner, hidden), (hidden, inner))
    first = max(product(double_rows, hidden, hidden), norm(double_rows), product(double_rows, inner, hidden))
    second = double_rows * inner * element + product(double_rows, hidden, inner)
    double = held + max(opening, first, second)

    held, opening = opened((inner, hidden), (hidden, hidden + inner))
    first, second = product(rows, inner, hidden), product(rows, hidden, hidden + inner)
    single = held + max(opening, norm(rows), first, second)

    patch = config.out_channels * math.prod(config.patch_size)
    velocity = image_tokens * patch * FLOAT32
    final = velocity + max(norm(double_rows), rows * patch * element, velocity)

    workspace = element * (4 * tokens * hidden + rows * (2 * hidden + inner))
    modulation = _modulation_rows(config) * hidden * FLOAT32 if half else 0
    return workspace + modulation + max(project, attend, double, single, final)


def _modulation_rows(config: TransformerConfig) -> int:
    """Of `StepConditioning.modulation`."""
    vectors = 2 if config.replaces_first_frame else 1
    return config.double_blocks * 6 * (vectors + 1) + config.single_blocks * 3 * vectors + 2
