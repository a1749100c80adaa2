"""What a file of weights is, found from its header: layout, component, variant, quantization, and what is wrong.

Invariants: no weight is read; a file that is of no use is described all the same, with the reason. `convert` decides
by the same functions (sources/transformer.py and its neighbours), so what `inspect` says is what happens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from lowvram_i2v.checkpoint import mismatches
from lowvram_i2v.convert.infer import infer_transformer
from lowvram_i2v.convert.names import to_official
from lowvram_i2v.convert.shapes import Shapes, transformer_shapes
from lowvram_i2v.convert.sources.clip import detect_clip
from lowvram_i2v.convert.sources.component_files import Match, open_weights
from lowvram_i2v.convert.sources.containers import SUFFIXES, Container, shards, stripped
from lowvram_i2v.convert.sources.quantization import UNQUANTIZED, decode, quantization
from lowvram_i2v.convert.sources.text_encoder import detect_text_encoder
from lowvram_i2v.convert.sources.transformer import (
    TransformerMatch,
    described,
    detect_transformer,
    find_variant,
    under_official_names,
)
from lowvram_i2v.convert.sources.vae import detect_vae
from lowvram_i2v.errors import CheckpointError, PlatformError

DETECTORS = (detect_transformer, detect_vae, detect_clip, detect_text_encoder)
MOST_FILES = 200  # of one folder that are looked at


@dataclass(frozen=True)
class Detected:
    """A file of weights, or the shards of one index, described.

    container: "safetensors", "torch pickle" or "GGUF". layout: in words. component: a key of the model folder's
    components, None if it is none of them. dtypes: stored dtype -> number of tensors.
    problems: what convert would report, a line each. notices: what it would say and go on.
    refusal: why this is of no use, None if it is of use. variant: of a transformer, None where the user must say.
    """

    path: Path
    container: str
    component: str | None = None
    layout: str = "unknown"
    prefix: str = ""
    quantization: str = UNQUANTIZED
    variant: str | None = None
    tensors: int = 0
    bytes: int = 0
    dtypes: dict[str, int] | None = None
    problems: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    refusal: str | None = None


def detect(path: Path, variant: str | None = None) -> Detected:
    """Describes a file, an index of shards, or a folder with one of them. variant: what the user says it is.

    Raises CheckpointError only for what is no file of tensors, or a damaged one.
    """
    container = open_weights(path)
    shapes = {name: tensor.shape for name, tensor in container.tensors.items()}
    match = next((found for find in DETECTORS if (found := find(shapes, container.metadata))), None)
    detected = Detected(
        container.path,
        container.kind,
        component=match.component if match else None,
        layout=match.layout if match else "unknown",
        quantization=quantization(container),
        tensors=len(container.tensors),
        bytes=container.bytes,
        dtypes=container.dtypes,
        refusal=_refusal(match, shapes),
    )
    if not isinstance(match, TransformerMatch):
        return detected
    detected = replace(detected, prefix=match.prefix)
    return _with_transformer(detected, container, match, variant) if detected.refusal is None else detected


def detect_folder(folder: Path) -> list[Detected]:
    """Every file of weights in a folder and the folders in it; those that cannot be read say why as refusal."""
    found = []
    for path in weight_files(folder)[:MOST_FILES]:
        try:
            found.append(detect(path))
        except CheckpointError as error:
            size = path.stat().st_size if path.is_file() else 0
            found.append(Detected(path, "damaged", bytes=size, refusal=str(error)))
    return found


def weight_files(folder: Path) -> list[Path]:
    """Indexes of shards, and the files of weights that no index names. Hidden folders are left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path, folder))
    indexes = [path for path in files if path.name.endswith(".index.json")]
    named = {shard for index in indexes for shard in _shards_of(index)}
    single = [path for path in files if path.name.endswith(SUFFIXES) and path not in named]
    return sorted([*indexes, *(path for path in single if not path.name.endswith("_map.pt"))])


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _shards_of(index: Path) -> tuple[Path, ...]:
    try:
        return shards(index)
    except CheckpointError:
        return ()  # described as damaged when its own turn comes


def _refusal(match: Match | None, shapes: Shapes) -> str | None:
    if match is None:
        return f"it is no component of HunyuanVideo-I2V{described(shapes)}"
    return f"it is {match.refusal}" if match.refusal else None


def _with_transformer(detected: Detected, container: Container, match: TransformerMatch, asked: str | None) -> Detected:
    """Adds variant, problems and notices, or the refusal that a closer look gives."""
    inside, outside = stripped(container, match.prefix)
    notices = (f"{len(outside)} tensors outside {match.prefix}*, such as {outside[0]}",) if outside else ()
    try:
        variant = find_variant(container, match, asked)
        decoded = decode(inside)
    except (CheckpointError, PlatformError) as error:
        return replace(detected, refusal=str(error), notices=notices)
    tensors, faults = under_official_names(decoded.tensors, match.naming)
    faults += _against_the_model({name: tensor.shape for name, tensor in tensors.items()})
    told = {word for fault in faults for word in re.split(r"[\s,:]+", fault)}
    unknown = [name for name in decoded.tensors if to_official(match.naming, name) is None]
    faults += [f"unknown: {name}" for name in unknown if name not in told]
    return replace(detected, variant=variant, problems=tuple(faults), notices=(*notices, *decoded.notices))


def _against_the_model(shapes: Shapes) -> list[str]:
    try:
        return mismatches(shapes, transformer_shapes(infer_transformer(shapes)))
    except CheckpointError as error:
        return [error.what]
