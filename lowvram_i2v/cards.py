"""How long a step takes on a card that is not there: an estimate from published rates, marked as one.

A step is arithmetic and copying side by side. Arithmetic: attention and matrix products at the card's rate for 16-bit
operands with float32 sums (8-bit products where the profile has them), times the share of it that libraries reach; and
the elementwise chains, which read and write the tokens. Copying: the streamed bytes over the bus, or from the disk.

Rates are the makers' (dense, GeForce with full-precision sums), bus rates what page-locked copies reach, about 80 %.
Measured here: an H100 only (docs/measurements.md). Everything else is a lead.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowvram_i2v.dit.config import TransformerConfig

ATTENTION_SHARE, PRODUCT_SHARE = 0.90, 0.85
"""Shares of the peak rate: torch's attention reaches 0.96 of it on GeForce, 0.6 on an H100; products 0.75 to 0.9."""
EIGHT_BIT_ATTENTION = 1 / 1.4
"""Time of 8-bit attention to torch's own. Measured on an H200; GeForce should gain more."""
SPARSE_OVERHEAD = 1.2
"""Of choosing blocks, on top of the share of blocks that is seen. Measured on an H200 at a fifth of the blocks."""
DISK = 1.8
"""GB/s of blocks that are read from the file. Measured on one machine's disk, around the page cache."""
PASSES = 30
"""Reads and writes of all tokens by a block's elementwise chains in plain torch."""


@dataclass(frozen=True)
class Card:
    """half, int8: dense TFLOP/s and TOP/s; bandwidth: GB/s of its memory; bus: GB/s from RAM. float8: as in
    `plan.Machine`."""

    name: str
    vram_gib: int
    half: float
    int8: float
    bandwidth: float
    bus: float
    float8: bool = True


CARDS = (
    Card("RTX 3060 12GB", 12, 25.5, 102, 360, 25, float8=False),
    Card("RTX 4060 8GB", 8, 30.2, 121, 272, 13),
    Card("RTX 3090", 24, 71.2, 285, 936, 25, float8=False),
    Card("RTX 4070", 12, 58, 233, 504, 25),
    Card("RTX 4090", 24, 165, 661, 1008, 25),
    Card("RTX 5090", 32, 209.5, 838, 1792, 50),
    Card("H100 SXM", 80, 640, 1979, 3000, 50),
)


@dataclass(frozen=True)
class Work:
    """Operations of one pass of the transformer, and the bytes of its tokens."""

    attention: float
    products: float
    tokens: int

    @classmethod
    def of(cls, config: TransformerConfig, image_tokens: int, text_tokens: int, element: int) -> Work:
        """A double block has a qkv, a projection and two MLP products a stream, a single block the same in two."""
        count, hidden = image_tokens + text_tokens, config.hidden_size
        blocks = config.double_blocks + config.single_blocks
        parameters = 4 * hidden * hidden + 2 * hidden * config.mlp_hidden
        return cls(
            attention=4.0 * blocks * count * count * hidden,
            products=2.0 * blocks * count * parameters,
            tokens=count * hidden * element * blocks,
        )


def attention_time(backend: str, density: float, after: float) -> float:
    """Mean time of attention over all steps, in units of torch's own. density, after: of "triton-sparse"."""
    if backend == "triton-sparse":
        return EIGHT_BIT_ATTENTION * (after + (1 - after) * min(1.0, density * SPARSE_OVERHEAD))
    return EIGHT_BIT_ATTENTION if backend == "triton-int8" else 1.0


def step_seconds(
    card: Card, work: Work, streamed: int, eight_bit: bool, attention: float = 1.0, *, from_file: bool = False
) -> float:
    """Estimated seconds of a pass. streamed: bytes copied to the card in it, from RAM or from the file; attention: from
    `attention_time`."""
    products = card.int8 if eight_bit else card.half
    attending = attention * work.attention / (card.half * ATTENTION_SHARE)
    arithmetic = attending + work.products / (products * PRODUCT_SHARE)
    elementwise = PASSES * work.tokens / (card.bandwidth * 1e9)
    rate = min(card.bus, DISK) if from_file else card.bus
    return max(arithmetic / 1e12 + elementwise, streamed / (rate * 1e9))
