"""The order of events of a conversion: look at everything, refuse what cannot work, then write.

Invariants: nothing is written before every component asked for was found, understood and compared with the
model, and the disk is known to suffice; `model.json` names a component only while its file is complete; one process at
a time writes into a folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from lowvram_i2v.checkpoint import (
    FORMAT_VERSION,
    TOKENIZERS,
    ComponentRecord,
    ModelRecords,
    component_file,
    read_records,
)
from lowvram_i2v.convert.origin import Component, Origin, understand
from lowvram_i2v.convert.policy import SCHEME_NAMES, Layout, check_keep, component_scheme, layout, quantizable
from lowvram_i2v.convert.sources import SmallFile
from lowvram_i2v.convert.sources.tokenizer_files import TOKENIZER_NAMES
from lowvram_i2v.convert.writer import (
    CPU,
    Written,
    header_bytes,
    only_writer,
    replacing,
    require_writable,
    write_layout,
)
from lowvram_i2v.errors import CheckpointError, RequestError
from lowvram_i2v.events import Listener, Notice, PhaseAdvanced, PhaseFinished, PhaseStarted, ignore
from lowvram_i2v.kernels.scheme import SCHEMES

DEFAULT_SCHEME = "int8"
OUT_OF_LINE = 1.5  # times the median error of the component's layers


@dataclass(frozen=True)
class Planned:
    """One component, ready to be written."""

    component: Component
    scheme: str
    layout: Layout

    @property
    def metadata(self) -> dict[str, str]:
        facts = {"format_version": FORMAT_VERSION, "component": self.component.name, "scheme": self.scheme}
        return {"format": "pt", "lowvram_i2v": json.dumps(facts | {"variant": self.component.variant})}

    @property
    def data_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.layout.tensors)

    @property
    def file_bytes(self) -> int:
        header = header_bytes({tensor.name: tensor for tensor in self.layout.tensors}, self.metadata)
        return len(header) + self.data_bytes


def convert(
    source: Path | Origin,
    destination: Path,
    scheme: str = DEFAULT_SCHEME,
    components: Iterable[str] | None = None,
    variant: str | None = None,
    listen: Listener = ignore,
    text_scheme: str | None = None,
    keep: Iterable[str] = (),
    device: torch.device = CPU,
) -> None:
    """Reads downloaded weights and writes, or completes, the model folder `destination`.

    scheme, text_scheme: of SCHEME_NAMES, for the transformer and for the text encoder (`policy.component_scheme`).
    components: those to convert, None for all that the source is to hold; the others of `destination` stay. variant:
    needed only where the weights leave it open. keep: fnmatch patterns of layers that are not quantized. device: where
    weights are quantized. Raises RequestError, CheckpointError or ResourceError before writing.
    """
    origin = Origin(source) if isinstance(source, Path) else source
    for name in (scheme, text_scheme or scheme):
        if name not in SCHEME_NAMES:
            raise RequestError(f"there is no scheme {name!r}", f"Choose one of {', '.join(SCHEME_NAMES)}.")
    require_destination(origin, destination)
    read_records(destination)
    understood = understand(origin, components, variant)
    planned = _plan(understood, scheme, text_scheme, tuple(keep))
    with only_writer(destination, sum(plan.file_bytes for plan in planned)):
        for text in (text for one in understood for text in one.source.notices):
            listen(Notice(text))
        for plan in planned:
            _write(plan, destination, device, listen)


def require_destination(origin: Origin, destination: Path) -> None:
    if origin.path is not None and origin.path.resolve() == destination.resolve():
        raise RequestError(f"source and destination are the same folder, {destination}", "Choose another destination.")
    require_writable(destination)


def _plan(understood: list[Component], scheme: str, text_scheme: str | None, keep: tuple[str, ...]) -> list[Planned]:
    """Raises RequestError for a pattern of `keep` that keeps nothing."""
    schemes = {one.name: component_scheme(one.name, scheme, text_scheme) for one in understood}
    layers = [
        layer for one in understood if schemes[one.name] in SCHEMES for layer in quantizable(one.name, one.shapes)
    ]
    check_keep(keep, layers)
    return [
        Planned(one, schemes[one.name], layout(one.name, schemes[one.name], one.source.tensors, keep))
        for one in understood
    ]


def _write(plan: Planned, destination: Path, device: torch.device, listen: Listener) -> None:
    """Weights, tokenizer, then the record: a conversion that is killed while either is replaced leaves the component
    unnamed in `model.json`."""
    component, source = plan.component.name, plan.component.source
    start, phase = time.perf_counter(), f"convert {component}"
    listen(PhaseStarted(phase, plan.data_bytes, "bytes"))
    tokenizer = _contents(source.tokenizer)
    path = destination / component_file(component)
    with replacing(path) as part:
        written = write_layout(
            part, plan.layout, plan.metadata, device, lambda done: listen(PhaseAdvanced(phase, done))
        )
        _record(destination, plan.component, None)
        if tokenizer:
            _write_tokenizer(destination / TOKENIZERS[component], tokenizer)
    facts = {"file": source.path.name, "bytes": source.bytes}
    record = ComponentRecord(plan.component.config, plan.scheme, path.stat().st_size, facts, written.checksums)
    _record(destination, plan.component, record)
    listen(PhaseFinished(phase, time.perf_counter() - start, 0, 0))
    for text in _outliers(component, plan.scheme, written):
        listen(Notice(text))


def _contents(files: Iterable[SmallFile]) -> dict[str, bytes]:
    """Name -> content. Raises CheckpointError for a file that cannot be read."""
    found = {}
    for file in files:
        try:
            found[file.name] = file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}", "Copy or download it again.") from error
    return found


def _write_tokenizer(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a tokenizer's files; another one's, which would win over these, are removed."""
    for name, data in files.items():
        with replacing(folder / name) as part:
            part.write_bytes(data)
    for name in TOKENIZER_NAMES - files.keys():
        (folder / name).unlink(missing_ok=True)


def _record(destination: Path, component: Component, record: ComponentRecord | None) -> None:
    """Replaces, or with None removes, the component's record in `model.json`."""
    records = read_records(destination)
    components = {name: old for name, old in records.components.items() if name != component.name}
    if record is not None:
        components[component.name] = record
        records = replace(records, variant=component.variant or records.variant)
    with replacing(destination / "model.json") as part:
        part.write_text(ModelRecords(records.variant, components).to_json(), encoding="utf-8")


def _outliers(component: str, scheme: str, written: Written) -> Iterator[str]:
    """What quantization cost, and the layers that it cost much more than others."""
    if not written.errors:
        return
    typical = median(written.errors.values())
    yield f"{component}: {len(written.errors)} layers as {scheme}, relative error {typical:.2%} (median)"
    if worst := worst_layers(written.errors, OUT_OF_LINE * typical):
        shown = ", ".join(f"{layer} {error:.2%}" for layer, error in worst[:3])
        yield (
            f"{len(worst)} of them lose more than {OUT_OF_LINE} times that: {shown}; --keep PATTERN leaves such layers "
            f"unquantized (--keep {worst[0][0]})"
        )


def worst_layers(errors: Mapping[str, float], above: float = 0.0) -> list[tuple[str, float]]:
    """(layer, error) of those above a threshold, the worst first."""
    return sorted(((name, error) for name, error in errors.items() if error > above), key=lambda pair: -pair[1])
