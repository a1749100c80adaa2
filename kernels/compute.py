"""How quantized layers multiply, by name; what that needs of memory and of a card.

    w8a16   the weight is dequantized to 16 bits once for many calls, and the product is the ordinary one
    w8a8    activations are quantized too, a scale for each token, and the product is made of 8-bit numbers

Invariant: this file needs no torch, so that the planner can count before anything is loaded. What is counted here is
what torch's ways allocate, on a GPU in every dtype, on a CPU in float32 (operations on mixed dtypes make copies there),
but for fp8 products, which a CPU makes of float32 copies; our own kernels take less. Left out: what a matrix library
keeps for itself (cuBLAS up to 32 MiB).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowvram_i2v.errors import RequestError
from lowvram_i2v.kernels import chunks

if TYPE_CHECKING:
    import torch

COMPUTES = {
    "w8a16": "8-bit weights dequantized, 16-bit product: every scheme, every card",
    "w8a8": "8-bit activations and product, approximate: int8 from RTX 30 on, fp8 from RTX 40 on",
}

PRODUCT = 2**24
"""Values of an int8 product in 32-bit integers that exist at a time: 64 MiB, as few rows of the result as still keep
every multiprocessor of a large card busy."""

FEWEST_ROWS = 32
"""Rows of an int8 product at least; torch wants more than 16."""


@dataclass(frozen=True)
class Product:
    """What the 8-bit product of a scheme asks for. Sizes of the weight are multiples of `grain`."""

    grain: int
    capability: tuple[int, int]
    cards: str


PRODUCTS = {
    "int8": Product(8, (8, 0), "RTX 30, A100"),
    "fp8": Product(16, (8, 9), "RTX 40, H100"),
}


@dataclass(frozen=True)
class Scratch:
    """Bytes on the device that a layer needs beside its stored weight.

    held: from `opened` until the callable is dropped. call: the most at any moment beside `held`, while opening or in a
    call, less the call's result.
    """

    held: int
    call: int


def check(compute: str) -> None:
    """Raises RequestError if there is no such way to multiply."""
    if compute not in COMPUTES:
        raise RequestError(f"compute is {compute!r}", f"It is one of: {', '.join(COMPUTES)}.")


def is_8_bit(scheme: str | None, compute: str, shape: tuple[int, int]) -> bool:
    """Whether a weight [out, in] is multiplied in 8 bits. nf4, no scheme and odd sizes stay with w8a16."""
    check(compute)
    product = PRODUCTS.get(scheme or "") if compute == "w8a8" else None
    return product is not None and all(size and size % product.grain == 0 for size in shape)


def scratch(scheme: str | None, compute: str, shape: tuple[int, int], tokens: int, element: int) -> Scratch:
    """For a weight `shape` = (out, in), of a layer or of the rows of it that are opened, and calls on `tokens` rows.

    scheme: None for a layer that is not quantized, stored in the dtype in which it is used. element: bytes of a value
    of that dtype.
    """
    out, into = shape
    if is_8_bit(scheme, compute, shape):
        return _int8(shape, tokens, element) if scheme == "int8" else _fp8(shape, tokens, element)
    if scheme is None:
        return Scratch(0, 0)
    weight = out * into * element
    if scheme != "nf4":
        return Scratch(weight, 0)
    piece = chunks.piece(-(-out * into // 64), 64)
    return Scratch(weight, min(piece, out * into) * 4 + -(-piece // 2) * 4)  # values, and indices of pairs


def product_rows(tokens: int, out: int) -> int:
    """Rows of one int8 product: `tokens` in as few equal parts as PRODUCT allows."""
    parts = -(-tokens * out // PRODUCT)
    return -(-tokens // max(1, parts))


def _int8(shape: tuple[int, int], tokens: int, element: int) -> Scratch:
    """The bias in float32."""
    return Scratch(shape[0] * 4 if element != 4 else 0, _call("int8", shape, tokens, element))


def _fp8(shape: tuple[int, int], tokens: int, element: int) -> Scratch:
    """The scale once for each output."""
    return Scratch(shape[0] * 4, _call("fp8", shape, tokens, element))


def _call(scheme: str, shape: tuple[int, int], tokens: int, element: int) -> int:
    """The tokens' codes; beside them, before there is a result, the quotients that become codes, later the product."""
    out, into = shape
    quotients = chunks.piece(tokens, into) * 4 - tokens * out * element
    return codes_bytes(tokens, into) + max(0, quotients, product_bytes(scheme, shape, tokens))


def codes_bytes(rows: int, width: int) -> int:
    """Of rows as 8-bit codes, with their scales."""
    return rows * width + rows * 4


def product_bytes(scheme: str, shape: tuple[int, int], tokens: int) -> int:
    """Most that a product of codes takes beside its result: torch's of int8, for each part of the tokens, the integers
    and, of few rows, a copy with more. Others make their result at once; our own kernels all do."""
    if scheme != "int8" or not tokens:
        return 0
    out, into = shape
    rows = product_rows(tokens, out)
    return max(rows, FEWEST_ROWS) * out * 4 + (FEWEST_ROWS * into if rows < FEWEST_ROWS else 0)


def gated_bytes(scheme: str, shape: tuple[int, int], tokens: int, element: int) -> int:
    """Most that a product takes that is added to a residual, part by part: the integers, which become its floats, or
    the product. Our own kernels take nothing."""
    rows = product_rows(tokens, shape[0])
    return product_bytes(scheme, shape, tokens) if scheme == "int8" else rows * shape[0] * element


def refusal(compute: str, scheme: str | None, device: torch.device) -> str | None:
    """Why a device cannot multiply so, for a message to the user; None if it can. Tries a small product there."""
    check(compute)
    if compute != "w8a8" or scheme not in PRODUCTS or device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"there is no 8-bit product for a device of type {device.type}"
    import torch

    from lowvram_i2v.kernels import w8a8

    product, capability = PRODUCTS[scheme], torch.cuda.get_device_capability(device)
    if capability < product.capability:
        card = f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}"
        needed = ".".join(str(number) for number in product.capability)
        return f"{card}; {scheme} products need {needed} ({product.cards}, and later)"
    return w8a8.trial(scheme, device)
