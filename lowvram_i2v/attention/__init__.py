"""Attention backends: one protocol, one table, one file a backend.

A backend attends over one packed sequence (image tokens, then valid text tokens): batch 1, no padding, so no mask.
`get` imports a backend's file when it is asked for, never before. `choice.choose` says which one runs on a machine.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from lowvram_i2v.errors import PlatformError, RequestError

if TYPE_CHECKING:
    from torch import Tensor


class AttentionBackend(Protocol):
    """softmax(q k^T / sqrt(dim)) v: q, k, v and the result are [tokens, heads, dim]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


BACKENDS = {
    "sdpa": "lowvram_i2v.attention.sdpa",
    "triton": "lowvram_i2v.attention.triton",
    "triton-int8": "lowvram_i2v.attention.triton_int8",
    "sage": "lowvram_i2v.attention.sage",
    "flash": "lowvram_i2v.attention.flash",
}
PACKAGES = {"triton": "triton", "triton-int8": "triton", "sage": "sageattention", "flash": "flash_attn"}
"""What a backend imports beside torch."""


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
