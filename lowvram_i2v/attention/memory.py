"""What attention backends allocate beside their result, for the planner: arithmetic only, no torch.

Torch's own and flash-attn's keep one float32 a row and head, and ours in 16 bits nothing; what SageAttention takes is
an estimate from how it works. On cards older than `attention_tiles.OLDEST` torch's own writes all scores to memory.
"""

from __future__ import annotations

from lowvram_i2v.attention import AUTO, BACKENDS
from lowvram_i2v.kernels.attention_cut import code_bytes, cut_sequence, means_bytes, sparse_bytes

FLOAT32, INDEX = 4, 8
SAGE_BYTES = 8
"""For each channel of a token, of SageAttention 2, by its version and card 7 or 8: queries and keys in 8 bits, our copy
of the keys, values in 16 bits with tokens along rows, and those in 8 bits. 1.0.6 takes 6."""


def extra_bytes(
    backend: str,
    first_tokens: int,
    image_tokens: int,
    text_tokens: int,
    heads: int,
    dim: int,
    *,
    density: float = 1.0,
    value: int = 1,
    scores: bool = False,
) -> int:
    """Peak bytes of one call over `heads` heads of `dim` channels, its result not counted.

    density: of "triton-sparse". value: bytes of an 8-bit backend's code of V: 2 on RTX 30, which has no 8-bit floats.
    scores: whether torch's own attention writes all of them to memory, as before RTX 30: in float32, before and after
    the softmax, of float32 copies of q, k and v (by torch's source, not measured).
    "auto" is not known before a card is: it counts as what it takes at most. Raises ValueError for an unknown backend.
    """
    tokens = image_tokens + text_tokens
    if backend == "sdpa" and scores:
        return FLOAT32 * heads * tokens * (2 * tokens + 3 * dim)
    if backend in ("sdpa", "flash"):
        return FLOAT32 * tokens * heads
    if backend == "sage":
        return SAGE_BYTES * tokens * heads * dim
    if backend in ("triton-int8", AUTO):
        return code_bytes(tokens, heads, dim, value)
    if backend == "triton-sparse":
        cut = cut_sequence(tokens, first_tokens, image_tokens, density)
        return max(sparse_bytes(cut, heads, dim, value), code_bytes(tokens, heads, dim, value))
    if backend != "triton":
        raise ValueError(f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}")
    return 0


def gap_bytes(
    first_tokens: int, image_tokens: int, text_tokens: int, heads: int, dim: int, *, density: float = 1.0
) -> int:
    """Bytes that a call of "triton-sparse" has given back when it allocates most, at places too small for what comes
    then: the allocator has reserved them beside `extra_bytes`, less where lists and codes of means lie in them."""
    cut = cut_sequence(image_tokens + text_tokens, first_tokens, image_tokens, density)
    return means_bytes(cut, heads, dim)


def order_bytes(image_tokens: int, patch: int, in_channels: int) -> int:
    """Device bytes of a `dit.token_order.TokenOrder` and of the latents that it arranges; patch: positions of one
    token's patch."""
    return INDEX * image_tokens * (1 + 2 * patch) + FLOAT32 * in_channels * image_tokens * patch
