"""Whether a model folder is what `convert` wrote, and how far it is from the weights it was made of.

    checksums   every tensor's sha256 against `model.json`; tokenizers are opened
    errors      of every tensor against a source: relative L2 of the dequantized values
    a block     one forward pass of the first double block with the folder's weights and with the source's

Invariant: memory is a few tensors; the files are read once for the checksums and once for the errors.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from lowvram_i2v.attention.sdpa import attend
from lowvram_i2v.checkpoint import COMPONENTS, ComponentRecord, component_file, raise_listed, read_records
from lowvram_i2v.convert.origin import Component, Origin, layout_of, understand
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.convert.sources.containers import ACCESS
from lowvram_i2v.convert.sources.model_folder import dequantized
from lowvram_i2v.convert.writer import CPU, relative_error
from lowvram_i2v.dit.blocks import DoubleBlock
from lowvram_i2v.dit.conditioning import StreamModulation
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.errors import CheckpointError, RequestError
from lowvram_i2v.events import Listener, Notice, PhaseAdvanced, PhaseFinished, PhaseStarted, ignore
from lowvram_i2v.safetensors_file import SafetensorsFile, open_safetensors
from lowvram_i2v.text.tokenizers import ClipTokenizer, LlavaTokenizer

BLOCK = "double_blocks.0."
IMAGE_TOKENS, TEXT_TOKENS = 256, 32
PIECE = 16 * 2**20


@dataclass(frozen=True)
class Report:
    """What was found.

    checked: component -> tensors compared with their checksums. damaged: "component: tensor" of those that differ, and
    what is wrong with a tokenizer.
    errors: "component: tensor" -> relative error, of all tensors that differ from the source at all. equal: how many
    do not. block_error: relative error of a block's output, None if it was not run.
    """

    checked: dict[str, int]
    damaged: tuple[str, ...]
    errors: dict[str, float] = field(default_factory=dict)
    equal: int = 0
    block_error: float | None = None

    def lines(self, rows: int = 20) -> list[str]:
        """For a terminal; the table has the `rows` worst tensors."""
        lines = [f"{component}: {count} checksums compared" for component, count in self.checked.items()]
        lines += [f"DAMAGED {name}" for name in self.damaged]
        if self.errors:
            worst = sorted(self.errors.items(), key=lambda pair: -pair[1])
            lines.append(f"{len(worst)} tensors differ from the source, median {median(self.errors.values()):.3%}:")
            lines += [f"  {error:10.3%}  {name}" for name, error in worst[:rows]]
            lines += [f"  ... and {len(worst) - rows} more"] if len(worst) > rows else []
        if self.equal:
            lines.append(f"{self.equal} tensors are equal to the source")
        if self.block_error is not None:
            lines.append(f"output of {BLOCK[:-1]} on random activations: relative error {self.block_error:.3%}")
        return lines


def verify(
    folder: Path,
    against: Path | None = None,
    components: Iterable[str] | None = None,
    variant: str | None = None,
    device: torch.device = CPU,
    listen: Listener = ignore,
) -> Report:
    """Compares a model folder with its own checksums and, if given, with its source.

    components: None for all that the folder has; compared with the source are those of them that a source of one
    component holds. variant: of the source, where that leaves it open. Raises CheckpointError for a folder or source
    that cannot be read, before anything else is; what is merely different goes into the report.
    """
    records = read_records(folder).components
    if not records:
        raise CheckpointError(f"{folder} is not a model folder", "Name the folder that `lowvram-i2v convert` wrote.")
    asked = tuple(components or (component for component in COMPONENTS if component in records))
    absent = [f"{component}: not in the folder" for component in asked if component not in records]
    raise_listed(f"{folder} cannot be verified", absent, "Convert these components first.")
    files = {component: open_safetensors(folder / component_file(component)) for component in asked}
    sources = [] if against is None else _sources(folder, against, asked, variant, chosen=components is not None)
    checked, damaged = {}, []
    for component in asked:
        record = records[component]
        if not record.checksums:
            listen(Notice(f"{component}: converted before there were checksums; nothing to compare"))
        checked[component] = len(record.checksums)
        damaged += [f"{component}: {name}" for name in _damaged(component, files[component], record, listen)]
        damaged += _damaged_tokenizer(folder, component)
    errors: dict[str, float] = {}
    equal, block = 0, None
    for one in sources:
        ours = dequantized(one.name, files[one.name], records[one.name].config)
        found = _errors(one.name, ours, one.source.tensors, listen)
        equal += sum(error == 0 for error in found.values())
        errors |= {f"{one.name}: {name}": error for name, error in found.items() if error}
        if one.name == "transformer":
            block = block_error(TransformerConfig.from_dict(one.config), ours, one.source.tensors, device)
    return Report(checked, tuple(damaged), errors, equal, block)


def _sources(folder: Path, against: Path, asked: tuple[str, ...], variant: str | None, chosen: bool) -> list[Component]:
    """The source's components that are compared. chosen: the user has named the components, so all are wanted.

    Raises RequestError or CheckpointError if the source lacks them.
    """
    if against.resolve() == folder.resolve():
        raise RequestError("--against names the model folder itself", "Name what it was converted from.")
    if against.is_dir() and layout_of(against) is not None:
        return understand(Origin(against), asked, variant)
    found = understand(Origin(against), None, variant)
    held = [one.name for one in found]
    if (chosen and set(held) != set(asked)) or not set(held) & set(asked):
        raise CheckpointError(
            f"{against} holds {' and '.join(held)}, not {' and '.join(asked)}",
            "Name what these were converted from, or with --component what is to be compared.",
        )
    return found


def _damaged(component: str, file: SafetensorsFile, record: ComponentRecord, listen: Listener) -> list[str]:
    """Tensors whose bytes are not those that were written, and tensors that came or went since."""
    if not record.checksums:
        return []
    start, phase, done = time.perf_counter(), f"verify {component}", 0
    listen(PhaseStarted(phase, sum(entry.bytes for entry in file.entries.values()), "bytes"))
    wrong = [
        name for name in (*file.entries, *record.checksums) if (name in file.entries) != (name in record.checksums)
    ]
    names = [name for name in file.entries if name in record.checksums]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, checksum in zip(names, pool.map(lambda name: _checksum(file, name), names), strict=True):
            if checksum != record.checksums[name]:
                wrong.append(name)
            done += file.entries[name].bytes
            listen(PhaseAdvanced(phase, done))
    listen(PhaseFinished(phase, time.perf_counter() - start, 0, 0))
    return wrong


def _damaged_tokenizer(folder: Path, component: str) -> list[str]:
    """The fault of a text encoder's tokenizer, if it cannot be opened."""
    try:
        if component == "text_encoder":
            LlavaTokenizer(folder / "tokenizer")
        elif component == "text_encoder_2":
            ClipTokenizer(folder / "tokenizer_2")
    except CheckpointError as error:
        return [f"{component}: {error.what}"]
    return []


def _checksum(file: SafetensorsFile, name: str) -> str:
    """In pieces: however many threads run, memory is small. Raises CheckpointError if the disk does not give them."""
    entry, digest = file.entries[name], hashlib.sha256()
    try:
        with file.path.open("rb") as stream:
            stream.seek(entry.start)
            for done in range(0, entry.bytes, PIECE):
                digest.update(stream.read(min(PIECE, entry.bytes - done)))
    except OSError as error:
        raise CheckpointError(f"{file.path}: {name} cannot be read: {error.strerror}", ACCESS) from error
    return digest.hexdigest()


def _errors(
    component: str, ours: Mapping[str, LazyTensor], source: Mapping[str, LazyTensor], listen: Listener
) -> dict[str, float]:
    """Tensor name -> relative error. Raises CheckpointError if the two are not of one model."""
    faults = [f"not in the folder: {name}" for name in source if name not in ours]
    faults += [
        f"{name} is {list(ours[name].shape)}, in the source {list(tensor.shape)}"
        for name, tensor in source.items()
        if name in ours and ours[name].shape != tensor.shape
    ]
    raise_listed(f"the source's {component} is another model's", faults, "Name what the folder was converted from.")
    start, phase, done, errors = time.perf_counter(), f"compare {component}", 0, {}
    listen(PhaseStarted(phase, sum(tensor.bytes for tensor in source.values()), "bytes"))
    for name, tensor in source.items():
        errors[name] = relative_error(tensor.read(), ours[name].read())
        done += tensor.bytes
        listen(PhaseAdvanced(phase, done))
    listen(PhaseFinished(phase, time.perf_counter() - start, 0, 0))
    return errors


def block_error(
    config: TransformerConfig, ours: Mapping[str, LazyTensor], source: Mapping[str, LazyTensor], device: torch.device
) -> float:
    """Relative error of the first double block's output on seeded random activations, in float32."""
    outputs = []
    for tensors in (source, ours):
        with torch.device("meta"):
            block = DoubleBlock(config)
        state = {name: tensors[BLOCK + name].read().float().to(device) for name in block.state_dict()}
        block.load_state_dict(state, assign=True)
        outputs.append(_forward(block, config, device))
        del block, state
    return relative_error(*outputs)


@torch.no_grad()
def _forward(block: DoubleBlock, config: TransformerConfig, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, width: int = config.hidden_size) -> Tensor:
        return torch.randn(rows, width, generator=generator).to(device)

    angles = random(IMAGE_TOKENS, config.head_dim // 2)
    img, txt, vectors = random(IMAGE_TOKENS), random(TEXT_TOKENS), random(1)
    modulation = StreamModulation(*block.img_mod(vectors)), StreamModulation(*block.txt_mod(vectors))
    return torch.cat(block(img, txt, modulation, 0, (angles.cos(), angles.sin()), attend))
