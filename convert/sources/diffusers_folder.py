"""A repository as diffusers saves it: a folder for each component.

transformer/    config.json, diffusion_pytorch_model*.safetensors (.index.json)
vae/            config.json, diffusion_pytorch_model.safetensors
text_encoder/   tokenizer/   text_encoder_2/   tokenizer_2/
"""

from __future__ import annotations

from pathlib import Path

from lowvram_i2v.convert.sources import ComponentSource, Hints
from lowvram_i2v.convert.sources.pieces import Pieces, open_pieces

EXPECTED = "Or a diffusers repository: a folder with transformer/, vae/, text_encoder/, text_encoder_2/ and tokenizers."
FOLDERS = ("transformer", "text_encoder", "text_encoder_2", "vae", "tokenizer", "tokenizer_2")


def matches(folder: Path) -> bool:
    """Whether a folder says that it is a pipeline, or has the transformer as one has it."""
    return any((folder / name).is_file() for name in ("model_index.json", "transformer/config.json"))


def open_components(folder: Path, components: tuple[str, ...], hints: Hints) -> dict[str, ComponentSource]:
    """Opens them all, or raises one CheckpointError with the faults of every component."""
    there = {name: folder / name for name in FOLDERS if (folder / name).is_dir()}
    faults = [f"missing: {name}/" for name in components if name not in there]
    return open_pieces(Pieces(**there), components, hints, faults)
