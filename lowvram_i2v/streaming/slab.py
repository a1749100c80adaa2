"""A block is bytes: where its tensors lie in one flat uint8 buffer, and how views of it become a block's weights.

Invariants: tensors lie without overlap, each at a multiple of ALIGNMENT, in the order of the file where there is one
(so that most of a block is one read); a slab holds exactly what the kernels use (quantized parts as they are, all else
in the compute dtype), so copying a block is copying bytes. Only this file and the reading of the weights know dtypes;
the stream and the queue see uint8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowvram_i2v.kernels.quant_linear import quantized_parts

ALIGNMENT = 256
"""Bytes. Vector loads want 16; matrix libraries choose their kernel by the alignment of the operands, up to 256, and
another kernel rounds otherwise. At 256 a streamed weight looks like one with an allocation of its own."""


@dataclass(frozen=True)
class TensorPlace:
    """One tensor of a block: the first byte of it in the slab, counted from the slab's start."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class SlabLayout:
    """Tensor name (below the block) -> place, and the length of the slab, a multiple of ALIGNMENT."""

    places: dict[str, TensorPlace]
    bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> SlabLayout:
        """The places of tensors given as name -> (shape, dtype), one after the other."""
        places, end = {}, 0
        for name, (shape, dtype) in tensors.items():
            places[name] = TensorPlace(end, shape, dtype)
            end = aligned(end + places[name].bytes)
        return cls(places, end)

    def views(self, slab: Tensor) -> dict[str, Tensor]:
        """The tensors inside a slab [at least `bytes`] uint8, sharing its memory."""
        return {
            name: slab[place.offset : place.offset + place.bytes].view(place.dtype).view(place.shape)
            for name, place in self.places.items()
        }

    def fill(self, slab: Tensor, read: Callable[[str], Tensor]) -> None:
        """Writes `read(name)`, cast to the place's dtype, into every place of a slab on any device."""
        for name, view in self.views(slab).items():
            view.copy_(read(name))

    def bind(self, block: nn.Module, slab: Tensor) -> None:
        """Makes views of the slab the block's weights; none of them wants a gradient. Nothing is copied."""
        for name, view in self.views(slab).items():
            path, _, leaf = name.rpartition(".")
            owner = block.get_submodule(path)
            is_parameter = isinstance(getattr(owner, leaf), nn.Parameter)
            setattr(owner, leaf, nn.Parameter(view, requires_grad=False) if is_parameter else view)


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def layout_of(
    block: nn.Module,
    dtype: torch.dtype,
    only: Callable[[str], bool] = lambda name: True,
    order: Callable[[str], int] = lambda name: 0,
) -> SlabLayout:
    """The layout of a block's weights, as of a block on the meta device whose linear layers are already quantized.

    dtype: what floats become; quantized parts keep theirs. only: which names of the block's state dict. order: by which
    their tensors are sorted, equals as in the state dict; it does not change the length.
    """
    fixed, state = quantized_parts(block), block.state_dict()
    return SlabLayout.of(
        {
            name: (
                tuple(state[name].shape),
                fixed.get(name, dtype if state[name].is_floating_point() else state[name].dtype),
            )
            for name in sorted(filter(only, state), key=order)
        }
    )


def below(block: str, only: Callable[[str], bool]) -> Callable[[str], bool]:
    """What `only` says of full names, asked of names below a block."""
    return lambda name: only(f"{block}.{name}")
