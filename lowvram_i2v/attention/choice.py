"""Which attention backend runs on this machine, and why: the profile's, or where that one cannot, another.

A backend's self-test runs it on a few hundred tokens of this card, both ways in which the model calls it, and compares
with the definition in float32 (`kernels.attention_cases`); one that fails is not used. Nothing approximate is chosen
unless it was asked for: `auto` stays exact without `eight_bit`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lowvram_i2v.attention import AUTO, BACKENDS, PACKAGES, get, in_place, writes
from lowvram_i2v.errors import LowVramError, RequestError
from lowvram_i2v.kernels.attention_tiles import OLDEST

if TYPE_CHECKING:
    import torch

    from lowvram_i2v.kernels.attention_cases import Kind

KINDS: dict[str, Kind] = {"triton-int8": "eight_bit", "triton-sparse": "eight_bit", "sage": "uncentred"}
"""Backends that quantize, which are held to the limits of 8 bits; the others are exact."""
INSTEAD = {"triton-sparse": ("triton-int8",)}
"""What is tried where a backend cannot run, before sdpa: what its dense steps use."""
HEAD_DIMS = (32, 64, 128, 256)
OVER_Q = ("peaked",)
"""The case on which a result is also written over q."""


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
    refused: list[str] = []
    for candidate in (wanted, *INSTEAD.get(wanted, ())):
        reason = obstacle(candidate, device, head_dim)
        if reason is not None:
            refused.append(f"{candidate} cannot run here: {reason}")
        elif refused:
            return Choice(candidate, "; ".join(refused))
        else:
            why = "asked for" if name != AUTO else "8 bits are allowed and this card runs them faster"
            return Choice(candidate, why)
    return Choice("sdpa", "; ".join(refused))


def obstacle(name: str, device: torch.device, head_dim: int) -> str | None:
    """Why a backend cannot be used with this device, or None."""
    return missing(name, device, head_dim) or self_test(name, device, head_dim)


def missing(name: str, device: torch.device, head_dim: int) -> str | None:
    """What a backend needs and has not: a card, a package, heads of a size that it knows, a card that is not too old.
    None: it can be tried."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return None if name == "triton-sparse" else "it needs a CUDA device"
    package = "triton" if name.startswith("triton") else PACKAGES.get(name)
    if package is not None and find_spec(package) is None:
        return f"the package {package} is not installed"
    if name.startswith("triton") and head_dim not in HEAD_DIMS:
        return f"heads have {head_dim} channels, its kernels know {HEAD_DIMS}"
    return too_old(device)


def too_old(device: torch.device) -> str | None:
    """Why a card is too old for fused attention, or None. Every backend but sdpa begins with OLDEST; below it
    torch's own writes all scores to memory."""
    import torch

    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= OLDEST:
        return None
    has, needs = (".".join(map(str, x)) for x in (torch.cuda.get_device_capability(device), OLDEST))
    return f"{torch.cuda.get_device_name(device)} has compute capability {has}, and attention needs {needs} (RTX 30)"


def kind(name: str) -> Kind:
    """Which limits a backend's errors are held to."""
    return KINDS.get(name, "exact")


def self_test(name: str, device: torch.device, head_dim: int = 128) -> str | None:
    """What is wrong with a backend on this device, or None. Waits for the device."""
    import torch

    from lowvram_i2v.kernels import attention_cases

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        with torch.inference_mode():
            attend, given = get(name), (kind(name), head_dim, device, dtype)
            wrong = attention_cases.fault(attend, *given)
            if wrong is None and writes(attend):
                wrong = attention_cases.fault(in_place(attend), *given, only=OVER_Q)
            if wrong is not None or name != "triton-sparse":
                return wrong
            from lowvram_i2v.attention import sparse_trial

            return sparse_trial.fault(device, head_dim, dtype)
    except LowVramError as refused:
        return refused.what
    except Exception as failed:  # noqa: BLE001 - whatever a driver, a compiler or a foreign package raises
        return f"{type(failed).__name__}: {str(failed).strip()[:200]}"
