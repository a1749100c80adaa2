"""Weights for other programs, in their layouts. Each layout is one file with `plan(component) -> list[OutputFile]`.

    quanto      the transformer as 8-bit integers, as optimum-quanto and Wan2GP read it
    diffusers   transformer/ and vae/ of a diffusers repository, in 16 bits
    official    the released tree's transformer and VAE, in 16 bits

Invariants: as for `convert`: everything is understood and the disk known to suffice before a byte is written; a file
appears under its name only when it is complete. Any source of `convert` will do, a model folder too; what was
quantized before keeps its error.

To add a layout, write `export/<name>.py` and add a line to FORMATS.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from lowvram_i2v.convert.convert import require_destination
from lowvram_i2v.convert.origin import Component, Origin, understand
from lowvram_i2v.convert.policy import Layout
from lowvram_i2v.convert.writer import (
    CPU,
    header_bytes,
    only_writer,
    replacing,
    write_layout,
)
from lowvram_i2v.errors import RequestError
from lowvram_i2v.events import Listener, Notice, PhaseAdvanced, PhaseFinished, PhaseStarted, ignore

FORMATS = {name: f"lowvram_i2v.convert.export.{name}" for name in ("quanto", "diffusers", "official")}
Advance = Callable[[int], None]


@dataclass(frozen=True)
class OutputFile:
    """A file to be written: tensors, or with `text` no tensors but that text.

    name: path below the destination. save: writes the layout to a path in another format than safetensors.
    """

    name: str
    layout: Layout = field(default_factory=lambda: Layout((), ()))
    metadata: dict[str, str] = field(default_factory=dict)
    text: str | None = None
    save: Callable[[Path, Layout, Advance], None] | None = None

    @property
    def bytes(self) -> int:
        if self.text is not None:
            return len(self.text.encode())
        tensors = {tensor.name: tensor for tensor in self.layout.tensors}
        return len(header_bytes(tensors, self.metadata)) + sum(tensor.bytes for tensor in self.layout.tensors)


def export(
    origin: Path | Origin,
    destination: Path,
    format_name: str,
    components: Iterable[str] | None = None,
    variant: str | None = None,
    listen: Listener = ignore,
) -> list[Path]:
    """Writes the components that a format knows, all of them or those asked for; returns the files.

    Raises RequestError, CheckpointError or ResourceError before writing.
    """
    if format_name not in FORMATS:
        raise RequestError(f"there is no format {format_name!r}", f"Choose one of {', '.join(FORMATS)}.")
    module = import_module(FORMATS[format_name])
    known: tuple[str, ...] = module.COMPONENTS
    asked = tuple(components) if components is not None else known
    if not asked or not set(asked) <= set(known):
        raise RequestError(f"{format_name} files hold {' and '.join(known)}, not {list(asked)}", "Use --component.")
    origin = Origin(origin) if isinstance(origin, Path) else origin
    require_destination(origin, destination)
    understood = understand(origin, _of_one_file(origin, asked, components), variant)
    planned: list[tuple[Component, list[OutputFile]]] = [(one, module.plan(one)) for one in understood]
    written = []
    with only_writer(destination, sum(file.bytes for _, files in planned for file in files)):
        for text in (text for one in understood for text in one.source.notices):
            listen(Notice(text))
        for one, files in planned:
            written += _write(one.name, files, destination, listen)
    return written


def _of_one_file(origin: Origin, asked: tuple[str, ...], components: Iterable[str] | None) -> tuple[str, ...] | None:
    """Without a wish, a single file or pieces decide what there is to export."""
    folder = origin.path is not None and origin.path.is_dir()
    return asked if folder or components is not None else None


def _write(component: str, files: list[OutputFile], destination: Path, listen: Listener) -> list[Path]:
    start, phase, done = time.perf_counter(), f"export {component}", 0
    listen(PhaseStarted(phase, sum(tensor.bytes for file in files for tensor in file.layout.tensors), "bytes"))

    def advance(more: int) -> None:
        listen(PhaseAdvanced(phase, done + more))

    for file in files:
        path = destination / file.name
        with replacing(path) as part:
            if file.text is not None:
                part.write_text(file.text, encoding="utf-8")
            elif file.save is not None:
                file.save(part, file.layout, advance)
            else:
                write_layout(part, file.layout, file.metadata, CPU, advance)
        done += sum(tensor.bytes for tensor in file.layout.tensors)
    listen(PhaseFinished(phase, time.perf_counter() - start, 0, 0))
    return [destination / file.name for file in files]
