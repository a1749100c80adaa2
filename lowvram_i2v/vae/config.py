"""The VAE's sizes: read from a released `config.json` or a model folder's `model.json`. No torch here.

Invariant: a `VaeConfig` that exists can be built. Left out: other depths than four blocks and other
compression ratios than 8 in space and 4 in time, which no released weights have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Any

from lowvram_i2v.errors import CheckpointError

# (time, row, column) factors after blocks 0, 1, 2 of the encoder and, in the same order, of the decoder.
# Block 3 keeps its size.
BLOCK_STRIDES = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
BLOCKS = len(BLOCK_STRIDES) + 1
LARGEST_SIZE, MOST_LAYERS = 2**20, 100  # of what is built; the released VAE has 512 channels and 2 layers a block

_REQUIRED = ("latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups", "scaling_factor")
_SUPPORTED = {
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "down_block_types": ["DownEncoderBlockCausal3D"] * BLOCKS,
    "up_block_types": ["UpDecoderBlockCausal3D"] * BLOCKS,
    "spatial_compression_ratio": prod(stride[1] for stride in BLOCK_STRIDES),
    "time_compression_ratio": prod(stride[0] for stride in BLOCK_STRIDES),
}


@dataclass(frozen=True)
class VaeConfig:
    """Sizes of the released VAE (884-16c) by default.

    sample_size, sample_tsize, tile_overlap_factor: the reference's tiles, in pixels, in frames, a fraction.
    Raises CheckpointError for sizes that cannot be built.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.476986
    sample_size: int = 256
    sample_tsize: int = 64
    tile_overlap_factor: float = 0.25

    def __post_init__(self) -> None:
        channels = self.block_out_channels
        if not isinstance(channels, tuple) or len(channels) != BLOCKS:
            raise _refused(f"block_out_channels {channels!r} are not {BLOCKS} widths")
        sizes = {field.name: getattr(self, field.name) for field in fields(self) if field.type == "int"}
        sizes |= {f"block_out_channels[{index}]": width for index, width in enumerate(channels)}
        for name, size in sizes.items():
            if type(size) is not int or not 1 <= size <= LARGEST_SIZE:
                raise _refused(f"{name} {size!r:.50} is not a whole number in 1..{LARGEST_SIZE}")
        if self.layers_per_block > MOST_LAYERS:
            raise _refused(f"layers_per_block {self.layers_per_block} is above {MOST_LAYERS}")
        if uneven := [width for width in channels if width % self.norm_num_groups]:
            raise _refused(f"norm_num_groups {self.norm_num_groups} does not divide block_out_channels {uneven}")
        if not isinstance(self.scaling_factor, int | float) or not 0 < self.scaling_factor < float("inf"):
            raise _refused(f"scaling_factor {self.scaling_factor!r} is not a number above 0")
        if not isinstance(self.tile_overlap_factor, int | float) or not 0 <= self.tile_overlap_factor < 1:
            raise _refused(f"tile_overlap_factor {self.tile_overlap_factor!r} is not in 0..1")

    @property
    def spatial_ratio(self) -> int:
        """Pixels a latent, along rows and columns."""
        return prod(stride[1] for stride in BLOCK_STRIDES)

    @property
    def time_ratio(self) -> int:
        """Frames a latent frame; the first latent frame gives one frame."""
        return prod(stride[0] for stride in BLOCK_STRIDES)

    @classmethod
    def from_official(cls, values: Mapping[str, Any]) -> VaeConfig:
        """From the released `config.json`. Keys that say nothing about the arithmetic are ignored; a block
        type, activation or ratio that this code does not compute is a CheckpointError."""
        if missing := [key for key in _REQUIRED if key not in values]:
            raise _refused(f"{', '.join(missing)} missing")
        for key, supported in _SUPPORTED.items():
            value = values.get(key, supported)
            if (list(value) if isinstance(value, tuple) else value) != supported:
                raise _refused(f"{key} is {value!r}, only {supported!r} is supported")
        known = {field.name for field in fields(cls)}
        return cls.from_dict({key: value for key, value in values.items() if key in known})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VaeConfig:
        """The inverse of `to_dict`; unknown keys are a CheckpointError."""
        if unknown := sorted(set(values) - {field.name for field in fields(cls)}):
            raise _refused(f"unknown {', '.join(unknown)}")
        as_fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**as_fields)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_official(self) -> dict[str, Any]:
        """The released config.json: what `from_official` reads."""
        blocks = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKLCausal3D",
            "act_fn": "silu",
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": ["DownEncoderBlockCausal3D"] * blocks,
            "in_channels": self.in_channels,
            "latent_channels": self.latent_channels,
            "layers_per_block": self.layers_per_block,
            "mid_block_add_attention": True,
            "norm_num_groups": self.norm_num_groups,
            "out_channels": self.out_channels,
            "sample_size": self.sample_size,
            "sample_tsize": self.sample_tsize,
            "scaling_factor": self.scaling_factor,
            "time_compression_ratio": self.time_ratio,
            "up_block_types": ["UpDecoderBlockCausal3D"] * blocks,
        }


def _refused(what: str) -> CheckpointError:
    return CheckpointError(f"VAE config: {what}.", "Use the config.json that was released with the VAE weights.")
