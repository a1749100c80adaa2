"""Opens a model folder and hands out one component at a time.

A model folder is what `convert` writes:

    model.json                    format version, variant, each component's config, scheme, bytes, source
    transformer.safetensors       official tensor names
    text_encoder.safetensors      `model.*` (LLaMA), `vision_model.*`, `multi_modal_projector.*`
    text_encoder_2.safetensors    `text_model.*` (CLIP)
    vae.safetensors               official tensor names
    tokenizer/  tokenizer_2/      tokenizer.json, or vocab.json and merges.txt

Invariants:
- Opening reads `model.json` and four file headers, never a weight, and reports all that is missing at once.
- A block is bytes: `in_block_order` is the order of tensors in a file, and it keeps each block contiguous.
- A loaded component lives as long as its `with`; leaving it frees the weights, whoever holds the module.

Left out: quantized tensors and streamed blocks. Checksums will be one more key of a component's record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.safetensors_file import SafetensorsFile, open_safetensors
from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.variant import VARIANTS, Variant

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
COMPONENTS = ("transformer", "text_encoder", "text_encoder_2", "vae")
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
BLOCKS = {
    "transformer": ("double_blocks", "single_blocks"),
    "text_encoder": ("model.layers", "vision_model.encoder.layers"),
    "text_encoder_2": ("text_model.encoder.layers",),
    "vae": (),
}

M = TypeVar("M", bound="torch.nn.Module")


def component_file(component: str) -> str:
    return f"{component}.safetensors"


def in_block_order(component: str, names: Iterable[str]) -> list[str]:
    """The order of tensors in a component's file: those outside blocks, then block after block.

    Within a group the order given is kept, so that it is the order of the source.
    """
    prefixes = BLOCKS[component]

    def place(name: str) -> tuple[int, int]:
        for kind, prefix in enumerate(prefixes):
            if found := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name):
                return kind + 1, int(found[1])
        return 0, 0

    return sorted(names, key=place)


def mismatches(
    actual: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
    extra_ok: Callable[[str], bool] = lambda name: False,
) -> list[str]:
    """One line for each tensor that is missing, has another shape, or is unexpected and not `extra_ok`."""
    lines = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in actual]
    lines += [
        f"wrong shape: {name} is {list(actual[name])}, must be {list(shape)}"
        for name, shape in expected.items()
        if name in actual and actual[name] != shape
    ]
    lines += [f"unexpected: {name}" for name in actual if name not in expected and not extra_ok(name)]
    return lines


@dataclass(frozen=True)
class ComponentRecord:
    """What `model.json` says of one component.

    config: the component's own configuration (TransformerConfig, VaeConfig, or the Hugging Face config.json).
    scheme: how its weights are stored.
    bytes: length of its file, to notice a partial copy.
    source: {"file": name, "bytes": n} of what it was converted from.
    """

    config: dict[str, Any]
    scheme: str
    bytes: int
    source: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"config": self.config, "scheme": self.scheme, "bytes": self.bytes, "source": self.source}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ComponentRecord:
        record = cls(values["config"], values["scheme"], values["bytes"], values["source"])
        kinds = {"config": dict, "scheme": str, "bytes": int, "source": dict}
        for name, kind in kinds.items():
            if not isinstance(getattr(record, name), kind):
                raise TypeError(f"{name} is {getattr(record, name)!r:.40}")
        return record


@dataclass(frozen=True)
class ModelRecords:
    """`model.json` as it stands, perhaps with components to come. The variant comes with the transformer."""

    variant: str | None
    components: dict[str, ComponentRecord]

    def to_json(self) -> str:
        components = {name: record.to_json() for name, record in self.components.items()}
        values = {"format_version": FORMAT_VERSION, "variant": self.variant, "components": components}
        return json.dumps(values, indent=1)


def read_records(folder: Path) -> ModelRecords:
    """`model.json` of a folder; empty records if there is none. Raises CheckpointError if it is damaged."""
    path = folder / "model.json"
    if not path.is_file():
        return ModelRecords(None, {})
    try:
        values = json.loads(path.read_bytes())
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version}; this program reads version {FORMAT_VERSION}",
                "Convert the weights again, or use the program's version that wrote them.",
            )
        if not set(values["components"]) <= set(COMPONENTS) or values["variant"] not in (None, *VARIANTS):
            raise KeyError("an unknown component or variant")
        components = {name: ComponentRecord.from_json(record) for name, record in values["components"].items()}
        return ModelRecords(values["variant"], components)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r:.200})", "Delete it and convert again.") from error


@dataclass(frozen=True)
class ModelHeader:
    """The complete `model.json`: all that is known of a model before a weight is read.

    text_encoder: the Hugging Face LLaVA config.json, text_encoder_2: the Hugging Face CLIPTextConfig.
    """

    variant: Variant
    transformer: TransformerConfig
    vae: VaeConfig
    text_encoder: dict[str, Any]
    text_encoder_2: dict[str, Any]
    records: dict[str, ComponentRecord]

    @property
    def scheme(self) -> str:
        """The transformer's. Other components may have another: `records[component].scheme`."""
        return self.records["transformer"].scheme

    @property
    def source(self) -> dict[str, dict[str, Any]]:
        return {name: record.source for name, record in self.records.items()}

    @classmethod
    def from_records(cls, records: ModelRecords) -> ModelHeader:
        """From records that hold all components. Raises CheckpointError for a config not understood."""
        configs = {name: record.config for name, record in records.components.items()}
        if records.variant is None:
            raise CheckpointError("model.json names no variant", "Convert the transformer again.")
        try:
            return cls(
                VARIANTS[records.variant],
                TransformerConfig.from_dict(configs["transformer"]),
                VaeConfig.from_dict(configs["vae"]),
                configs["text_encoder"],
                configs["text_encoder_2"],
                records.components,
            )
        except TypeError as error:
            raise CheckpointError(f"model.json has a config with other keys ({error})", "Convert again.") from error


@dataclass(frozen=True)
class ModelFolder:
    """An open model folder: four headers in memory, the weights on disk."""

    path: Path
    header: ModelHeader
    files: dict[str, SafetensorsFile]

    @property
    def tokenizer(self) -> Path:
        return self.path / TOKENIZERS["text_encoder"]

    @property
    def tokenizer_2(self) -> Path:
        return self.path / TOKENIZERS["text_encoder_2"]

    def shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.files[component].entries.items()}

    def check(
        self,
        expected: dict[str, dict[str, tuple[int, ...]]],
        extra_ok: Callable[[str, str], bool] = lambda component, name: False,
    ) -> None:
        """Compares component -> tensor name -> shape with the files.

        Raises one CheckpointError that lists every missing, wrong-shaped and unexpected tensor of all
        components; an unexpected one is allowed if `extra_ok(component, name)`.
        """
        faults = [
            f"{component_file(component)}: {line}"
            for component, shapes in expected.items()
            for line in mismatches(self.shapes(component), shapes, partial(extra_ok, component))
        ]
        raise_listed(f"{self.path} does not hold the tensors of this model", faults, "Convert the weights again.")

    @contextmanager
    def load(
        self,
        component: str,
        build: Callable[[], M],
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        file_name: Callable[[str], str] = lambda name: name,
    ) -> Iterator[M]:
        """`build()` with its weights from the component's file, in evaluation mode, while a `with` lasts.

        build runs under `torch.device("meta")`, so nothing is allocated twice; a module whose buffers are
        computed when it is built opens `torch.device("cpu")` around them. Tensors are read one at a time.
        dtype: what floating-point weights become, None for as stored. file_name: from a tensor's name in the
        module to that in the file. Tensors that only the file has are not read. At exit the weights are gone,
        also for those who kept the module. Raises CheckpointError if the module needs other tensors.
        """
        import torch

        with torch.device("meta"):
            module = build()
        faults = mismatches(
            self.shapes(component),
            {file_name(name): tuple(tensor.shape) for name, tensor in module.state_dict().items()},
            extra_ok=lambda name: True,
        )
        raise_listed(f"{self.files[component].path} does not fit the model", faults, "Convert the weights again.")
        weights = {
            name: _place(self.files[component].read(file_name(name)), device, dtype) for name in module.state_dict()
        }
        module.load_state_dict(weights, assign=True)
        del weights
        module.to(device).eval().requires_grad_(False)  # what is left to move: buffers outside the state dict
        try:
            yield module
        finally:
            module.to("meta")


def _place(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    placed = tensor.to(device)
    return placed.to(dtype) if dtype is not None and placed.is_floating_point() else placed


def raise_listed(what: str, faults: list[str], remedy: str) -> None:
    """One CheckpointError for all faults: each named, or the first 40 and a count. No faults, no error."""
    if not faults:
        return
    shown = "\n".join(f"  - {fault}" for fault in faults[:40])
    more = f"\n  - and {len(faults) - 40} more" if len(faults) > 40 else ""
    raise CheckpointError(f"{what}:\n{shown}{more}", remedy)


def open_model(folder: Path) -> ModelFolder:
    """Opens what `convert` wrote. Raises one CheckpointError that lists all that is missing or truncated."""
    if not (folder / "model.json").is_file():
        raise CheckpointError(
            f"{folder} is not a model folder: it has no model.json",
            "Downloaded weights become a model folder with `lowvram-i2v convert`.",
        )
    records = read_records(folder)
    missing = [f"{component}: not converted yet" for component in COMPONENTS if component not in records.components]
    missing += [
        f"{component_file(component)}: no such file"
        for component in records.components
        if not (folder / component_file(component)).is_file()
    ]
    missing += [
        f"{name}/: neither tokenizer.json nor vocab.json and merges.txt"
        for component, name in TOKENIZERS.items()
        if component in records.components and not has_tokenizer(folder / name)
    ]
    for component, record in records.components.items():
        path = folder / component_file(component)
        if path.is_file() and path.stat().st_size != record.bytes:
            size = path.stat().st_size
            missing.append(f"{path.name}: {size} bytes, but {record.bytes} were written: a partial copy?")
    raise_listed(
        f"{folder} is not complete",
        missing,
        "Run `lowvram-i2v convert` for these components, or copy the files again.",
    )
    header = ModelHeader.from_records(records)
    files = {component: open_safetensors(folder / component_file(component)) for component in COMPONENTS}
    model = ModelFolder(folder, header, files)
    raise_listed(f"the components of {folder} do not fit each other", _misfits(model), "Convert matching weights.")
    return model


def has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )


def _misfits(model: ModelFolder) -> list[str]:
    """Sizes that must agree between components, read from tensors where released configs leave them out."""
    widths = (
        ("text_encoder", "model.embed_tokens.weight", model.header.transformer.text_dim),
        (
            "text_encoder_2",
            "text_model.embeddings.token_embedding.weight",
            model.header.transformer.pooled_dim,
        ),
    )
    faults = []
    for component, name, width in widths:
        shape = model.shapes(component).get(name, ())
        if shape[1:] != (width,):
            faults.append(f"{component}: {name} is {list(shape)}, but the transformer expects width {width}")
    if model.header.vae.latent_channels != model.header.transformer.out_channels:
        faults.append(
            f"vae: {model.header.vae.latent_channels} latent channels, transformer: "
            f"{model.header.transformer.out_channels}"
        )
    if model.header.variant.in_channels != model.header.transformer.in_channels:
        faults.append(
            f"transformer: {model.header.transformer.in_channels} input channels, but the variant is "
            f"{model.header.variant.name} ({model.header.variant.in_channels})"
        )
    return faults
