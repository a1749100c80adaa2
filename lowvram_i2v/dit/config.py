"""The transformer's sizes: read from a checkpoint's shapes or a model folder's `model.json`. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from lowvram_i2v.errors import CheckpointError

MOST_BLOCKS = 1000
LARGEST_SIZE = 2**20
REMEDY = "Convert the weights again."


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the released 13B model by default. `guidance_embed` is False for the released latent_concat weights."""

    in_channels: int = 16
    out_channels: int = 16
    hidden_size: int = 3072
    heads: int = 24
    double_blocks: int = 20
    single_blocks: int = 40
    refiner_blocks: int = 2
    mlp_ratio: float = 4.0
    patch_size: tuple[int, int, int] = (1, 2, 2)
    rope_dims: tuple[int, int, int] = (16, 56, 56)
    rope_theta: float = 256.0
    text_dim: int = 4096
    pooled_dim: int = 768
    guidance_embed: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def mlp_hidden(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def replaces_first_frame(self) -> bool:
        """True where the input is the latent alone, so that the image must be its first frame (token_replace);
        False where image latent and mask are further channels (latent_concat)."""
        return self.in_channels == self.out_channels

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TransformerConfig:
        """The inverse of `to_dict`. Raises CheckpointError for unknown keys and values that cannot be built."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if unknown := sorted(set(plain) - {field.name for field in fields(cls)}):
            raise CheckpointError(f"the transformer's config has other keys: {', '.join(unknown)}", REMEDY)
        config = cls(**plain)
        for name, default in asdict(cls()).items():
            if not _is_like(default, getattr(config, name)):
                raise CheckpointError(f"the transformer's config: {name} is {getattr(config, name)!r:.50}", REMEDY)
        depth = max(config.double_blocks, config.single_blocks, config.refiner_blocks)
        if depth > MOST_BLOCKS or config.hidden_size % config.heads or sum(config.rope_dims) != config.head_dim:
            raise CheckpointError(f"the transformer's config cannot be built: {config}", REMEDY)
        return config

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _is_like(default: Any, value: Any) -> bool:
    """Of the same type and length, and in 0..LARGEST_SIZE; a whole number may stand for a broken one."""
    if isinstance(default, tuple):
        return isinstance(value, tuple) and len(value) == len(default) and all(map(_is_like, default, value))
    if isinstance(default, bool):
        return isinstance(value, bool)
    kinds = (int, float) if isinstance(default, float) else (int,)
    return type(value) in kinds and 0 < value <= LARGEST_SIZE
