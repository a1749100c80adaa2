"""The order of events of a conversion: look at everything, refuse what cannot work, then write.

Invariants: nothing is written before every component asked for was found, understood and compared with the
model, and the disk is known to suffice; `model.json` names a component only while its file is complete.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowvram_i2v.checkpoint import (
    COMPONENTS,
    FORMAT_VERSION,
    TOKENIZERS,
    ComponentRecord,
    ModelRecords,
    component_file,
    mismatches,
    raise_listed,
    read_records,
)
from lowvram_i2v.convert.infer import infer_transformer, infer_variant
from lowvram_i2v.convert.policy import DTYPES, READABLE, stored
from lowvram_i2v.convert.shapes import Shapes, clip_shapes, llava_shapes, transformer_shapes, vae_shapes
from lowvram_i2v.convert.sources import ComponentSource, LazyTensor, open_source
from lowvram_i2v.convert.writer import (
    header_bytes,
    replacing,
    require_space,
    require_writable,
    write_safetensors,
)
from lowvram_i2v.errors import RequestError
from lowvram_i2v.events import Listener, PhaseAdvanced, PhaseFinished, PhaseStarted, ignore
from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.variant import VARIANTS


@dataclass(frozen=True)
class Planned:
    """One component, ready to be written."""

    component: str
    source: ComponentSource
    tensors: dict[str, LazyTensor]
    config: dict[str, Any]
    variant: str | None
    scheme: str

    @property
    def metadata(self) -> dict[str, str]:
        facts = {"format_version": FORMAT_VERSION, "component": self.component, "scheme": self.scheme}
        return {"format": "pt", "lowvram_i2v": json.dumps(facts | {"variant": self.variant})}

    @property
    def data_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        return len(header_bytes(self.tensors, self.metadata)) + self.data_bytes


def convert(
    source: Path,
    destination: Path,
    scheme: str = "bf16",
    components: Iterable[str] = COMPONENTS,
    variant: str | None = None,
    listen: Listener = ignore,
) -> None:
    """Reads downloaded weights in `source` and writes, or completes, the model folder `destination`.

    scheme: a row of `policy.DTYPES`. components: those to convert, the others of `destination` stay.
    variant: needed only where the weights leave it open. Raises RequestError, CheckpointError or
    ResourceError before writing.
    """
    components = tuple(components)
    _check_request(source, destination, scheme, components, variant)
    sources = open_source(source, components)
    planned = [_plan(component, sources[component], scheme, variant) for component in components]
    _check_tensors(planned)
    require_space(destination, sum(plan.file_bytes for plan in planned))
    destination.mkdir(parents=True, exist_ok=True)
    for plan in planned:
        _write(plan, destination, listen)


def _check_request(
    source: Path, destination: Path, scheme: str, components: tuple[str, ...], variant: str | None
) -> None:
    if scheme not in DTYPES:
        raise RequestError(f"there is no scheme {scheme!r}", f"Choose one of {', '.join(DTYPES)}.")
    if not components or not set(components) <= set(COMPONENTS):
        raise RequestError(f"components {list(components)} are not known", f"Choose from {', '.join(COMPONENTS)}.")
    if variant is not None and variant not in VARIANTS:
        raise RequestError(f"there is no variant {variant!r}", f"Choose one of {', '.join(VARIANTS)}.")
    if source.resolve() == destination.resolve():
        raise RequestError(f"source and destination are the same folder, {source}", "Choose another destination.")
    require_writable(destination)
    read_records(destination)


def _plan(component: str, source: ComponentSource, scheme: str, variant: str | None) -> Planned:
    """What the component is and how it will be stored."""
    config = source.config
    if component == "transformer":
        transformer = infer_transformer({name: tensor.shape for name, tensor in source.tensors.items()})
        variant = infer_variant(transformer, variant, source.path)
        config = transformer.to_dict()
    elif component == "vae":
        config = VaeConfig.from_official(config).to_dict()
    return Planned(
        component=component,
        source=source,
        tensors=stored(component, scheme, source.tensors),
        config=config,
        variant=variant if component == "transformer" else None,
        scheme=scheme,
    )


def _expected(plan: Planned) -> Shapes:
    builders: dict[str, Callable[[], Shapes]] = {
        "transformer": lambda: transformer_shapes(infer_transformer(_shapes(plan))),
        "vae": lambda: vae_shapes(VaeConfig.from_dict(plan.config)),
        "text_encoder": lambda: llava_shapes(plan.config),
        "text_encoder_2": lambda: clip_shapes(plan.config),
    }
    return builders[plan.component]()


def _shapes(plan: Planned) -> Shapes:
    return {name: tensor.shape for name, tensor in plan.tensors.items()}


def _check_tensors(planned: list[Planned]) -> None:
    """Raises one CheckpointError with every missing, wrong-shaped, unexpected or unreadable tensor of all
    components."""
    faults = []
    for plan in planned:
        lines = mismatches(_shapes(plan), _expected(plan))
        lines += [
            f"stored as {tensor.dtype}: {name}; only float32, float16 and bfloat16 are read"
            for name, tensor in plan.source.tensors.items()
            if tensor.dtype not in READABLE
        ]
        faults += [f"{plan.source.path.name} ({plan.component}): {line}" for line in lines]
    raise_listed("the source does not hold the tensors of this model", faults, "Download the weights again.")


def _write(plan: Planned, destination: Path, listen: Listener) -> None:
    """Tokenizer, weights, then the record: a killed conversion leaves the component unnamed in
    `model.json`."""
    start, phase = time.perf_counter(), f"convert {plan.component}"
    listen(PhaseStarted(phase, plan.data_bytes, "bytes"))
    if plan.source.tokenizer:
        folder = destination / TOKENIZERS[plan.component]
        folder.mkdir(exist_ok=True)
        for file in plan.source.tokenizer:
            with replacing(folder / file.name) as part:
                shutil.copyfile(file, part)
    path = destination / component_file(plan.component)
    with replacing(path) as part:
        write_safetensors(part, plan.tensors, plan.metadata, lambda done: listen(PhaseAdvanced(phase, done)))
        _record(destination, plan, None)
    facts = {"file": plan.source.path.name, "bytes": plan.source.bytes}
    _record(destination, plan, ComponentRecord(plan.config, plan.scheme, path.stat().st_size, facts))
    listen(PhaseFinished(phase, time.perf_counter() - start, 0, 0))


def _record(destination: Path, plan: Planned, record: ComponentRecord | None) -> None:
    """Replaces, or with None removes, the component's record in `model.json`."""
    records = read_records(destination)
    components = {name: old for name, old in records.components.items() if name != plan.component}
    if record is not None:
        components[plan.component] = record
        records = replace(records, variant=plan.variant or records.variant)
    with replacing(destination / "model.json") as part:
        part.write_text(ModelRecords(records.variant, components).to_json(), encoding="utf-8")
