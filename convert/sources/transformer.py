"""The transformer, from any file that holds it: recognized by names, decoded, brought under official names.

    naming         official (released, most single files) | ComfyUI's own | diffusers; under any of PREFIXES
    quantization   none, or what sources/quantization.py reads

Invariants: names and shapes decide; the file's name is asked only whether 16 input channels mean image-to-video or
text-to-video, which nothing else in a file tells. Names that the model does not have stay as they are: the comparison
with the model reports them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvram_i2v.checkpoint import raise_listed
from lowvram_i2v.convert.names import COMFY, DIFFUSERS, OFFICIAL, Place, to_official
from lowvram_i2v.convert.shapes import Shapes
from lowvram_i2v.convert.sources import ComponentSource, Hints, LazyTensor
from lowvram_i2v.convert.sources.component_files import Match, folder_of, open_weights
from lowvram_i2v.convert.sources.containers import DOWNLOAD, Container, read_json, stripped
from lowvram_i2v.convert.sources.other_models import other_model, relative
from lowvram_i2v.convert.sources.quantization import decode
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.variant import VARIANTS

PREFIXES = (
    "",
    "model.diffusion_model.",
    "model.model.",
    "diffusion_model.",
    "transformer.",
    "module.",
    "net.",
    "model.",
)
FRAMEPACK = "clean_x_embedder.proj.weight"
IN_DIFFUSERS = "context_embedder.token_refiner.refiner_blocks.0.norm1.weight"
IN_FAMILY = "txt_in.individual_token_refiner.blocks.0.norm1.weight"
FIRST_LAYERS = {"double_blocks.0.img_attn_qkv.": OFFICIAL, "double_blocks.0.img_attn.qkv.": COMFY}
INPUTS = ("img_in.proj.weight", "x_embedder.proj.weight")
CODED = ("", "._data")
CHANNELS = {variant.in_channels: name for name, variant in VARIANTS.items()}
SKYREELS_CHANNELS = 32
IMAGE_NAMES = re.compile(r"(?<!lowvram[-_])i2v|image.?(to|2).?vid|img.?(to|2).?vid")
TEXT_NAMES = re.compile(r"t2v|text.?(to|2).?vid|txt.?(to|2).?vid")
REMEDY = "Only the transformer of HunyuanVideo-I2V can be converted."


@dataclass(frozen=True)
class TransformerMatch(Match):
    """Which of the known namings a file has (a column of convert/names.py), and under which prefix."""

    naming: str = OFFICIAL
    prefix: str = ""


def detect_transformer(shapes: Shapes, metadata: Mapping[str, Any]) -> TransformerMatch | None:
    """What transformer of the HunyuanVideo family these tensors are; None if they are none."""
    for prefix in PREFIXES:
        anchor = next((name for name in (FRAMEPACK, IN_DIFFUSERS, IN_FAMILY) if prefix + name in shapes), None)
        if anchor is None:
            continue
        bare = {name.removeprefix(prefix) for name in shapes if name.startswith(prefix)}
        first = (naming for mark, naming in FIRST_LAYERS.items() if any(name.startswith(mark) for name in bare))
        naming = next(first, None) if anchor == IN_FAMILY else DIFFUSERS
        refusal, channels = relative(bare), input_channels(shapes, prefix)
        if naming is None and refusal is None:
            refusal = "a transformer of the HunyuanVideo family whose first block is named in no known way"
        if refusal is None and channels == SKYREELS_CHANNELS:
            refusal = f"SkyReels, another model trained from HunyuanVideo: it takes {channels} input channels"
        elif refusal is None and channels not in CHANNELS:
            known = " or ".join(f"{number} ({name})" for number, name in CHANNELS.items())
            refusal = f"no HunyuanVideo-I2V: it takes {channels or 'no'} input channels, not {known}"
        layout = f"{naming or 'unknown'} names" + (f", prefix {prefix}" if prefix else "")
        return TransformerMatch("transformer", layout, refusal, naming=naming or OFFICIAL, prefix=prefix)
    return None


def input_channels(shapes: Shapes, prefix: str) -> int | None:
    """Of the tensor that takes the latents; None if there is none of the right kind."""
    found = (shapes.get(f"{prefix}{name}{coded}", ()) for name in INPUTS for coded in CODED)
    return next((shape[1] for shape in found if len(shape) == 5), None)


def require_transformer(container: Container) -> TransformerMatch:
    """Raises CheckpointError saying what the file is, as far as that is known, if it is not this transformer."""
    shapes = {name: tensor.shape for name, tensor in container.tensors.items()}
    match = detect_transformer(shapes, container.metadata)
    if match is None:
        raise CheckpointError(f"{container.path} is not the transformer of HunyuanVideo-I2V{described(shapes)}", REMEDY)
    if match.refusal is not None:
        raise CheckpointError(f"{container.path} is {match.refusal}", REMEDY)
    return match


def described(shapes: Shapes) -> str:
    """What tensors of another model look like, as the end of a sentence."""
    if known := other_model(shapes, PREFIXES):
        return f", but looks like {known}"
    return f": its {len(shapes)} tensors are called {', '.join(list(shapes)[:3])}, ..."


def open_component(path: Path, hints: Hints) -> ComponentSource:
    """The transformer from a file, an index of shards, or a folder with either."""
    container = open_weights(path)
    match = require_transformer(container)
    variant = find_variant(container, match, hints.variant)
    inside, outside = stripped(container, match.prefix)
    decoded = decode(inside)
    tensors, faults = under_official_names(decoded.tensors, match.naming)
    raise_listed(f"{path} has tensors that do not fit together", faults, DOWNLOAD)
    notices = decoded.notices
    if outside:
        shown = ", ".join(outside[:3])
        notices += (f"{path.name}: {len(outside)} tensors outside {match.prefix}* are left behind ({shown}, ...)",)
    return ComponentSource(container.path, container.bytes, tensors, {}, notices=notices, variant=variant)


def under_official_names(tensors: Mapping[str, LazyTensor], naming: str) -> tuple[dict[str, LazyTensor], list[str]]:
    """(tensors under official names, faults). Rows that a naming keeps apart are joined.

    Faults: parts that are missing beside others, do not fit each other, or are there twice.
    """
    found: dict[str, dict[int, tuple[str, LazyTensor, Place]]] = {}
    faults = []
    for name, tensor in tensors.items():
        place = to_official(naming, name) or Place(name)
        parts = found.setdefault(place.name, {})
        if place.index in parts:
            faults.append(f"{name} and {parts[place.index][0]} are the same tensor")
        parts[place.index] = (name, tensor, place)
    result = {}
    for official, parts in found.items():
        ordered = [parts[index] for index in sorted(parts)]
        count = ordered[0][2].count
        if len(ordered) != count:
            there = ", ".join(name for name, _, _ in ordered)
            faults.append(
                f"{official} needs {count} tensors, there {'is' if len(ordered) == 1 else 'are'} only {there}"
            )
            continue
        pieces = [tensor for _, tensor, _ in ordered]
        if count > 1 and not _joinable(pieces):
            shapes = ", ".join(str(list(piece.shape)) for piece in pieces)
            faults.append(f"{official} cannot be joined from {shapes}")
            continue
        joined = pieces[0] if count == 1 else join_rows(pieces)
        result[official] = swap_halves(joined) if ordered[0][2].swapped else joined
    return result, faults


def _joinable(pieces: list[LazyTensor]) -> bool:
    """q, k and v have the same shape; what follows them may have other rows."""
    shapes = [piece.shape for piece in pieces]
    return len(set(shapes[:3])) == 1 and all(shape and shape[1:] == shapes[0][1:] for shape in shapes)


def join_rows(pieces: list[LazyTensor]) -> LazyTensor:
    """The pieces' rows one below the other; in float32 if their dtypes differ."""
    dtypes = {piece.dtype for piece in pieces}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    shape = (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])

    def read() -> Tensor:
        values, done = torch.empty(shape, dtype=dtype), 0
        for piece in pieces:
            values[done : done + piece.shape[0]] = piece.read()
            done += piece.shape[0]
        return values

    return LazyTensor(shape, dtype, read)


def swap_halves(tensor: LazyTensor) -> LazyTensor:
    """The lower half of the rows first."""

    def read() -> Tensor:
        values = tensor.read()
        return values.roll(values.shape[0] // 2, 0)

    return LazyTensor(tensor.shape, tensor.dtype, read)


def find_variant(container: Container, match: TransformerMatch, asked: str | None = None) -> str | None:
    """The variant's name, as far as the file, a config.json beside it, or its name tells; None if the user must say.

    asked: what the user said; only used where the file leaves it open. Raises CheckpointError for the text-to-video
    model.
    """
    shapes = {name: tensor.shape for name, tensor in container.tensors.items()}
    variant = CHANNELS[input_channels(shapes, match.prefix) or 0]
    if not VARIANTS[variant].replaces_first_frame or _own_metadata(container) == variant:
        return variant
    evidence = _said_by_config(container) if match.naming == DIFFUSERS else None
    evidence = evidence or _said_by_name(container.path)
    if evidence == "text" and asked is None:
        raise CheckpointError(
            f"{container.path} is the text-to-video model, by its config.json or its name",
            f"If it is image-to-video all the same, say --variant {variant}.",
        )
    return variant if evidence == "image" else asked


def _own_metadata(container: Container) -> str | None:
    """The variant that this program wrote into a file."""
    try:
        facts: Any = json.loads(container.metadata.get("lowvram_i2v", "{}"))
    except (ValueError, TypeError, RecursionError):
        facts = {}  # somebody else's: it says nothing
    variant = facts.get("variant") if isinstance(facts, dict) else None
    return variant if isinstance(variant, str) else None


def _said_by_config(container: Container) -> str | None:
    """ "image" or "text", from the config.json that diffusers saves beside the weights."""
    path = folder_of(container.path) / "config.json"
    config = read_json(path) if path.is_file() else {}
    if not str(config.get("_class_name", "")).startswith("HunyuanVideo"):
        return None
    return "text" if config.get("image_condition_type") is None else "image"


def _said_by_name(path: Path) -> str | None:
    """ "image" or "text", from the names of the file and the two folders around it, the nearest first."""
    for name in (path.name, path.parent.name, path.parent.parent.name):
        image, text = IMAGE_NAMES.search(name.lower()), TEXT_NAMES.search(name.lower())
        if bool(image) != bool(text):
            return "image" if image else "text"
    return None
