"""The transformer's sizes and variant, read from tensor names and shapes.

Invariant: a wrong or foreign set of tensors gives a CheckpointError here or in the comparison of all shapes
that follows, never a wrong config. Left out: FramePack, HunyuanVideo-1.5 and other relatives, told apart by
their names.
"""

from __future__ import annotations

import re
from pathlib import Path

from lowvram_i2v.convert.shapes import Shapes
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.errors import CheckpointError, RequestError
from lowvram_i2v.variant import VARIANTS

HEAD_DIM = 128  # of every released model
REMEDY = "Only the transformer of HunyuanVideo-I2V can be converted."


def infer_transformer(shapes: Shapes) -> TransformerConfig:
    """Sizes from the few tensors that show them; the others are compared with the result by the caller.

    Raises CheckpointError if those tensors are missing or of another kind.
    """
    patch = _shape(shapes, "img_in.proj.weight", 5)
    hidden, in_channels = patch[:2]
    if hidden % HEAD_DIM:
        raise CheckpointError(f"hidden size {hidden} is not a multiple of {HEAD_DIM}", REMEDY)
    values = _shape(shapes, "final_layer.linear.weight", 2)[0]
    patch_values = patch[2] * patch[3] * patch[4]
    config = TransformerConfig(
        in_channels=in_channels,
        out_channels=values // max(patch_values, 1),
        hidden_size=hidden,
        heads=hidden // HEAD_DIM,
        double_blocks=_depth(shapes, "double_blocks"),
        single_blocks=_depth(shapes, "single_blocks"),
        refiner_blocks=_depth(shapes, "txt_in.individual_token_refiner.blocks"),
        mlp_ratio=_shape(shapes, "double_blocks.0.img_mlp.fc1.weight", 2)[0] / hidden,
        patch_size=(patch[2], patch[3], patch[4]),
        text_dim=_shape(shapes, "txt_in.input_embedder.weight", 2)[1],
        pooled_dim=_shape(shapes, "vector_in.in_layer.weight", 2)[1],
        guidance_embed=any(name.startswith("guidance_in.") for name in shapes),
    )
    return TransformerConfig.from_dict(config.to_dict())  # which refuses what cannot be built


def _shape(shapes: Shapes, name: str, dimensions: int) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None or len(shape) != dimensions or 0 in shape:
        found = "is missing" if shape is None else f"is {list(shape)}"
        raise CheckpointError(f"this is not the transformer: {name} {found}", REMEDY)
    return shape


def _depth(shapes: Shapes, prefix: str) -> int:
    """How many blocks there are, counted; a gap in the numbers is an error."""
    numbers = {int(found[1]) for name in shapes if (found := re.match(rf"{re.escape(prefix)}\.(\d{{1,6}})\.", name))}
    if gaps := sorted(set(range(max(numbers, default=0))) - numbers)[:10]:
        raise CheckpointError(
            f"{prefix} run up to number {max(numbers)}, but these are missing: {gaps}",
            "Download the weights again.",
        )
    return len(numbers)


def infer_variant(config: TransformerConfig, asked: str | None, path: Path) -> str:
    """The variant's name: from the input channels, and where they leave it open from the user or the path.

    The text-to-video model has the names and shapes of token_replace. Raises CheckpointError for other
    models, RequestError if `asked` contradicts the weights or the user must be asked.
    """
    fitting = [name for name, variant in VARIANTS.items() if variant.in_channels == config.in_channels]
    if not fitting:
        known = ", ".join(f"{variant.in_channels} ({name})" for name, variant in VARIANTS.items())
        kind = " (SkyReels has 32)" if config.in_channels == 32 else ""
        raise CheckpointError(f"{path} takes {config.in_channels} input channels{kind}, not {known}", REMEDY)
    if asked is not None:
        if asked not in fitting:
            raise RequestError(
                f"{path} has {config.in_channels} input channels and is {fitting[0]}, not {asked}",
                "Leave --variant out.",
            )
        return asked
    if VARIANTS[fitting[0]].replaces_first_frame and "i2v" not in str(path).lower():
        raise RequestError(
            f"{path} could be the image-to-video or the text-to-video model: their tensors are alike",
            f"If it is image-to-video, say --variant {fitting[0]}.",
        )
    return fitting[0]
