"""Which attention backend runs on this machine, and why: the profile's, or sdpa where that one cannot.

A backend's self-test runs it once on a few hundred tokens of this card and compares with the definition in float32; one
that fails is not used. Nothing approximate is chosen unless it was asked for: `auto` stays exact without `eight_bit`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lowvram_i2v.attention import BACKENDS, PACKAGES, get
from lowvram_i2v.errors import LowVramError, RequestError

if TYPE_CHECKING:
    import torch

AUTO = "auto"
LIMITS = {"sdpa": 0.01, "flash": 0.01, "triton": 0.01, "triton-int8": 0.08, "sage": 0.08}
"""Largest relative error (L2) of the self-test; a wrong kernel is off by 1, not by these."""
HEAD_DIMS = (32, 64, 128, 256)
TOKENS, HEADS = 601, 2


@dataclass(frozen=True)
class Choice:
    """The name of a backend, and one sentence for the user."""

    name: str
    why: str


def choose(name: str, device: torch.device, head_dim: int, *, eight_bit: bool = False) -> Choice:
    """The backend to run where the profile says `name`. `eight_bit`: `auto` may take an approximate one.

    Runs the self-test of what it picks (on CUDA: compiles kernels, a few seconds the first time, and waits for the
    device). Raises RequestError for an unknown name.
    """
    if name != AUTO and name not in BACKENDS:
        raise RequestError(f"attention backend {name!r} is not known", f"Use one of: {', '.join([AUTO, *BACKENDS])}.")
    wanted = name if name != AUTO else "triton-int8" if eight_bit else "sdpa"
    if wanted == "sdpa":
        return Choice("sdpa", "asked for" if name != AUTO else "exact, and torch's own is the fastest exact one")
    if reason := obstacle(wanted, device, head_dim):
        return Choice("sdpa", f"{wanted} cannot run here: {reason}")
    return Choice(wanted, "asked for" if name != AUTO else "8 bits are allowed and this card runs them faster")


def obstacle(name: str, device: torch.device, head_dim: int) -> str | None:
    """Why a backend cannot be used with this device, or None."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    if name in PACKAGES and find_spec(PACKAGES[name]) is None:
        return f"the package {PACKAGES[name]} is not installed"
    if name.startswith("triton") and head_dim not in HEAD_DIMS:
        return f"heads have {head_dim} channels, its kernels know {HEAD_DIMS}"
    try:
        error = self_test(name, device, head_dim)
    except LowVramError as refused:
        return refused.what
    except (RuntimeError, ImportError) as failed:  # whatever a driver, a compiler or a foreign package says
        return f"{type(failed).__name__}: {str(failed).strip()[:200]}"
    if not error <= LIMITS[name]:
        return f"its self-test is off by {error:.1%}, {LIMITS[name]:.0%} are allowed"
    return None


def self_test(name: str, device: torch.device, head_dim: int = 128) -> float:
    """Relative L2 error of a backend on random inputs with offsets in K and V. Waits for the device."""
    import torch

    from lowvram_i2v.kernels.attention_reference import attention, relative_l2

    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, TOKENS, HEADS, head_dim, generator=generator).unbind()
    k, v = (
        k + torch.randn(HEADS, head_dim, generator=generator),
        v + 0.1 * torch.randn(HEADS, head_dim, generator=generator),
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (x.to(device, dtype) for x in (2 * q, k, v))
    with torch.inference_mode():
        return relative_l2(get(name)(q, k, v), attention(q, k, v))
