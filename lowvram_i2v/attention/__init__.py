"""Attention backends: one protocol, one table, one file a backend.

A backend attends over one packed sequence (image tokens, then valid text tokens): batch 1, no padding, so no mask.
`get` imports a backend's file when it is asked for, never before. `choice.choose` says which one runs on a machine.

Most backends need to know q, k and v. One that treats tokens by what they are, or steps differently, is chosen anew for
each prediction, by a `Layout`: `by_layout`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import TYPE_CHECKING, Protocol, TypeGuard

from lowvram_i2v.errors import PlatformError, RequestError

if TYPE_CHECKING:
    from torch import Tensor


class AttentionBackend(Protocol):
    """softmax(q k^T / sqrt(dim)) v: q, k, v and the result are [tokens, heads, dim]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class WritingBackend(Protocol):
    """One that can write its result where it is told: `out`, which may be q."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Layout:
    """What the tokens of a prediction are, and when it is made.

    image_tokens come first, those of the first frame (first_tokens) before the others, in space-filling order
    (`dit/token_order.py`); text_tokens follow. step of steps, counted from 0.
    """

    first_tokens: int
    image_tokens: int
    text_tokens: int
    step: int
    steps: int


ByLayout = Callable[[Layout], AttentionBackend]

AUTO = "auto"
"""In a profile: `choice.choose` takes one."""
BACKENDS = {
    "sdpa": "lowvram_i2v.attention.sdpa",
    "triton": "lowvram_i2v.attention.triton",
    "triton-int8": "lowvram_i2v.attention.triton_int8",
    "triton-sparse": "lowvram_i2v.attention.triton_sparse",
    "sage": "lowvram_i2v.attention.sage",
    "flash": "lowvram_i2v.attention.flash",
}
WRITING = ("triton", "triton-int8", "triton-sparse")
"""Backends that take `out`: they need no memory for their result where it goes over q."""
PACKAGES = {"triton": "triton", "triton-int8": "triton", "sage": "sageattention", "flash": "flash_attn"}
"""What a backend imports beside torch. triton-sparse needs Triton on CUDA only."""


def get(name: str) -> AttentionBackend:
    """The backend of that name: the function `attend` of its file.

    Raises RequestError for an unknown name, PlatformError if a package that the backend needs is missing.
    """
    if name not in BACKENDS:
        raise RequestError(f"attention backend {name!r} is not known", f"Use one of: {', '.join(BACKENDS)}.")
    if name in PACKAGES and find_spec(PACKAGES[name]) is None:
        raise PlatformError(
            f"attention backend {name!r} needs the package {PACKAGES[name]}, which is not installed",
            "Install it or use sdpa.",
        )
    backend: AttentionBackend = import_module(BACKENDS[name]).attend
    return backend


def writes(attend: AttentionBackend) -> TypeGuard[WritingBackend]:
    """Whether a backend takes `out`."""
    return "out" in signature(attend).parameters


def attend_over(attend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor) -> None:
    """attend(q, k, v) takes the place of q; without a copy where the backend takes `out`."""
    made = attend(q, k, v, out=q) if writes(attend) else attend(q, k, v)
    if made is not q:
        q.copy_(made)


def in_place(attend: AttentionBackend) -> AttentionBackend:
    """The backend as the transformer calls it, for trials: the result takes the place of q and is handed back."""

    def over(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend_over(attend, q, k, v)
        return q

    return over


def by_layout(name: str, sparse_density: float, sparse_after: float) -> ByLayout | None:
    """How the backend of that name is chosen for each prediction, or None if it is the same for all: `get`.

    sparse_density: share of the key blocks that a block of queries sees exactly. sparse_after: share of the steps that
    run dense before.
    """
    if name != "triton-sparse":
        return None
    from lowvram_i2v.attention.triton_sparse import Sparse

    return Sparse(sparse_density, sparse_after)
