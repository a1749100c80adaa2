"""Attention backends: one protocol, one table, one file a backend.

A backend attends over one packed sequence (image tokens, then valid text tokens): batch 1, no padding, so no mask.
`get` imports a backend's file when it is asked for, never before.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from lowvram_i2v.errors import PlatformError, RequestError

if TYPE_CHECKING:
    from torch import Tensor


class AttentionBackend(Protocol):
    """softmax(q k^T / sqrt(dim)) v: q, k, v and the result are [tokens, heads, dim]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


BACKENDS = {
    "sdpa": "lowvram_i2v.attention.sdpa",
}


def get(name: str) -> AttentionBackend:
    """The backend of that name: the function `attend` of its file.

    Raises RequestError for an unknown name, PlatformError if a package that the backend needs is missing.
    """
    if name not in BACKENDS:
        raise RequestError(f"attention backend {name!r} is not known", f"Use one of: {', '.join(BACKENDS)}.")
    try:
        backend: AttentionBackend = import_module(BACKENDS[name]).attend
    except ImportError as error:
        raise PlatformError(
            f"attention backend {name!r} cannot be loaded: {error}", "Install it or use sdpa."
        ) from error
    return backend
