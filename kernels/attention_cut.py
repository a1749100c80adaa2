"""How block-sparse attention cuts a sequence, and what it allocates: arithmetic only, no torch and no Triton.

A sequence is image tokens, the first frame's before the others', then text tokens. Queries come in blocks of `rows`,
keys in blocks of `keys`. Every block of queries sees exactly

    the key blocks that hold a token of the first frame, `first` of them, and a text token, `last` of them,
    the key blocks of its own tokens,
    and those with the highest scores, until there are `kept`;

the mean of a block stands for each other one. Blocks of queries that hold a text token see all key blocks exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

SCORES = 32 * 2**20
"""Bytes of scores of means that may exist at the same time, or those of one head."""
CODE_BLOCK = 64
"""Codes are made for whole blocks of so many tokens, as in `attention_quantize`."""


@dataclass(frozen=True)
class Cut:
    """tokens: of the sequence. text_from: the first block of queries that sees everything. Others: see above."""

    tokens: int
    rows: int
    keys: int
    first: int
    last: int
    text_from: int
    kept: int

    @property
    def query_blocks(self) -> int:
        return -(-self.tokens // self.rows)

    @property
    def key_blocks(self) -> int:
        return -(-self.tokens // self.keys)

    @property
    def means(self) -> range:
        """Key blocks that a mean may stand for: all but the first and the last ones, or one if those are all."""
        lower = min(self.first, self.key_blocks - 1)
        return range(lower, max(lower + 1, self.key_blocks - self.last))

    @property
    def own(self) -> int:
        """Key blocks that a block of queries covers."""
        return -(-self.rows // self.keys)


def cut_sequence(
    tokens: int, first_tokens: int, image_tokens: int, density: float, rows: int = 128, keys: int = 64
) -> Cut:
    """density: share of key blocks that are seen exactly; more where those that must be seen are more.

    tokens: all of them; without text image_tokens equals it. One of rows and keys is a multiple of the other. The last
    key block, which may be ragged, is always seen.
    """
    blocks = -(-tokens // keys)
    first = min(blocks, -(-first_tokens // keys))
    last = max(1, blocks - image_tokens // keys)
    kept = max(round(density * blocks), first + last + -(-rows // keys))
    text_from = image_tokens // rows if image_tokens < tokens else -(-tokens // rows)
    return Cut(tokens, rows, keys, first, last, text_from, min(blocks, kept))


def code_bytes(tokens: int, heads: int, dim: int, value: int, keys: int = 64) -> int:
    """Of `attention_quantize.Quantized`: value is the bytes of a code of V, 2 where a card has no 8-bit floats, 0
    for K alone."""
    padded = -(-tokens // max(CODE_BLOCK, keys)) * max(CODE_BLOCK, keys)
    return heads * (padded * dim * (1 + value) + 4 * padded // keys + 2 * 4 * dim)


def heads_at_once(cut: Cut, heads: int) -> int:
    """Heads whose scores of means exist at the same time."""
    return max(1, min(heads, SCORES // (4 * cut.query_blocks * cut.key_blocks)))


def means_bytes(cut: Cut, heads: int, dim: int) -> int:
    """Of what the first pass leaves of each block, float32: means of queries and values, the lowest and highest values,
    sums of some keys."""
    return 4 * heads * dim * (cut.query_blocks + 4 * cut.key_blocks)


def sparse_bytes(cut: Cut, heads: int, dim: int, value: int) -> int:
    """Peak bytes that `attention_sparse.attend` allocates beside its result."""
    means = len(cut.means)
    padded = -(-means // max(CODE_BLOCK, cut.keys)) * max(CODE_BLOCK, cut.keys)
    mean_codes = code_bytes(means, heads, dim, value, cut.keys)
    lists = heads * cut.query_blocks * (4 * cut.kept + padded // 8)
    scores = 4 * heads_at_once(cut, heads) * cut.query_blocks * cut.key_blocks
    means_of_three = 4 * heads * dim * (cut.query_blocks + 2 * cut.key_blocks)
    choosing = code_bytes(cut.tokens, heads, dim, 0, cut.keys) + mean_codes + means_of_three + lists + scores
    attending = mean_codes + lists + 4 * cut.key_blocks + code_bytes(cut.tokens, heads, dim, value, cut.keys)
    return max(choosing, attending)
