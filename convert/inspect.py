"""What is at a path, in lines for a terminal: files of weights one by one, folders as a whole, model folders.

Invariant: only headers are read, and a file that cannot be used is described, with the reason, and not an error. What
is said comes from the functions that `convert` uses (`detect`, the layouts' own checks).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lowvram_i2v.checkpoint import COMPONENTS, component_file, open_model, read_records
from lowvram_i2v.convert.convert import DEFAULT_SCHEME
from lowvram_i2v.convert.detect import Detected, detect, detect_folder
from lowvram_i2v.convert.origin import Origin, layout_of, understand
from lowvram_i2v.convert.policy import component_scheme, quantizable
from lowvram_i2v.convert.sources import SOURCES, Hints, open_component
from lowvram_i2v.convert.sources.pieces import FLAGS
from lowvram_i2v.errors import CheckpointError, LowVramError
from lowvram_i2v.kernels.scheme import SCHEMES
from lowvram_i2v.safetensors_file import open_safetensors

MODEL_FOLDER = "lowvram_i2v.convert.sources.model_folder"
SHOWN = 10  # problems of one file


def inspect(path: Path) -> Iterator[str]:
    """Lines about a file, a folder of any layout, or a model folder. Raises CheckpointError if there is nothing."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", "Name a file or a folder of weights.")
    if path.is_file():
        yield from _file(detect(path))
        return
    layout = layout_of(path)
    if layout == MODEL_FOLDER:
        yield from _model(path)
        return
    found = detect_folder(path)
    if not found:
        raise CheckpointError(f"{path} holds no files of weights", "Name a file or a folder of weights.")
    for one in found:
        yield from _file(one)
    if layout is not None:
        name = next(name for name, module in SOURCES.items() if module == layout)
        yield from _whole(path, name)


def _file(one: Detected) -> Iterator[str]:
    yield f"{one.path}"
    yield f"  layout: {one.layout}, {one.container}" + (f", names start with {one.prefix}" if one.prefix else "")
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in (one.dtypes or {}).items())
    yield f"  {one.tensors} tensors, {one.bytes / 1e9:.2f} GB: {dtypes}"
    if one.component is not None:
        variant = f", variant: {one.variant or 'not told by the file'}" if one.component == "transformer" else ""
        yield f"  component: {one.component}, quantization: {one.quantization}{variant}"
    for notice in one.notices:
        yield f"  note: {notice}"
    for problem in one.problems[:SHOWN]:
        yield f"  problem: {problem}"
    if len(one.problems) > SHOWN:
        yield f"  and {len(one.problems) - SHOWN} more problems"
    yield f"  {_outcome(one)}"


def _outcome(one: Detected) -> str:
    """What convert would do with the file."""
    if one.refusal is not None or one.component is None:
        return f"convert refuses it: {one.refusal}"
    if one.problems:
        return "convert refuses it: see the problems"
    if one.component == "transformer" and one.variant is None:
        return "convert asks for --variant: the names of image-to-video and text-to-video models are alike"
    flag = FLAGS["vision" if one.layout == "LLaVA's vision tower" else one.component]
    scheme = component_scheme(one.component, DEFAULT_SCHEME)
    try:
        source = open_component(one.path, one.component, Hints(variant=one.variant))
    except LowVramError as error:
        return f"convert takes it as {flag}; it needs more: {error}"
    layers = quantizable(one.component, {name: tensor.shape for name, tensor in source.tensors.items()})
    if scheme in SCHEMES and layers:
        return f"convert takes it as {flag}: {len(layers)} layers become {scheme}, the rest 16-bit"
    return f"convert takes it as {flag}: 16-bit"


def _whole(folder: Path, layout: str) -> Iterator[str]:
    """Whether a folder has all that a model needs."""
    yield f"{folder}: {layout}"
    try:
        understood = understand(Origin(folder))
    except LowVramError as error:
        yield f"  convert refuses it: {error}"
        return
    for one in understood:
        source = one.source
        yield f"  {one.name}: {source.path.name}, {len(source.tensors)} tensors, {source.bytes / 1e9:.2f} GB"
    yield "  complete: `lowvram-i2v convert` makes a model folder of it"


def _model(folder: Path) -> Iterator[str]:
    """A model folder: what each component is, and whether all is there."""
    records = read_records(folder)
    yield f"{folder}: a model folder, variant: {records.variant or 'the transformer is missing'}"
    for component in COMPONENTS:
        record, path = records.components.get(component), folder / component_file(component)
        if record is None or not path.is_file():
            yield f"  {component}: missing"
            continue
        try:
            entries = open_safetensors(path).entries
        except CheckpointError as error:
            yield f"  {component}: {error}"
            continue
        dtypes = ", ".join(
            f"{count} {name}" for name, count in Counter(entry.dtype for entry in entries.values()).most_common()
        )
        yield f"  {component}: {record.scheme}, {len(entries)} tensors, {path.stat().st_size / 1e9:.2f} GB: {dtypes}"
        yield f"    from {record.source.get('file')} ({record.source.get('bytes', 0) / 1e9:.2f} GB)"
    try:
        open_model(folder)
    except CheckpointError as error:
        yield f"  not complete: {error}"
    else:
        yield "  complete: `lowvram-i2v generate --model` takes it; `lowvram-i2v verify` compares its checksums"
