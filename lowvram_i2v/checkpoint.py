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
- The dtype of a linear layer's `weight` in the file says how that layer is stored; a file may mix schemes.
- A loaded component lives as long as its `with`; leaving it frees the weights, whoever holds the module.

Left out: streamed blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.safetensors_file import TORCH_DTYPES, SafetensorsFile, open_safetensors
from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.variant import VARIANTS, Variant

if TYPE_CHECKING:
    import torch

    from lowvram_i2v.kernels.scheme import QuantScheme

FORMAT_VERSION = 1
LARGEST_RECORDS = 32 * 2**20  # bytes of model.json; the released model's has 0.3 MB
COMPONENTS = ("transformer", "text_encoder", "text_encoder_2", "vae")
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
BLOCKS = {
    "transformer": ("double_blocks", "single_blocks"),
    "text_encoder": ("model.layers", "vision_model.encoder.layers"),
    "text_encoder_2": ("text_model.encoder.layers",),
    "vae": (),
}
MODULATION = ("img_mod", "txt_mod", "modulation")
"""Parts of transformer blocks that see time and pooled prompt but no token: used before the loop, never streamed."""
ALIGNMENT = 16  # bytes; what vector loads and copies of a GPU want
FLOATS = ("F64", "F32", "F16", "BF16")

M = TypeVar("M", bound="torch.nn.Module")


def component_file(component: str) -> str:
    return f"{component}.safetensors"


def in_block_order(component: str, sizes: Mapping[str, int]) -> list[str]:
    """The order of tensors in a component's file: those outside blocks, the modulation of all blocks, then each block.

    sizes: tensor name -> bytes, in the order of the source. A group is one range of bytes; inside it, tensors whose
    length is a multiple of 16 come first, so that with the group's start they are all aligned to 16 bytes. Otherwise
    modulation keeps the order of blocks, and equals keep the order given.
    """

    def place(name: str) -> tuple[int, ...]:
        uneven = sizes[name] % ALIGNMENT != 0
        for kind, prefix in enumerate(BLOCKS[component]):
            if found := re.match(rf"{re.escape(prefix)}\.(\d+)\.(\w+)", name):
                number = int(found[1])
                if component == "transformer" and found[2] in MODULATION:
                    return 1, 0, 0, uneven, kind, number
                return 2, kind, number, uneven
        return 0, 0, 0, uneven

    return sorted(sizes, key=place)


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
    checksums: tensor name -> sha256 of its bytes, for `verify`; empty in folders of version 0.1.
    """

    config: dict[str, Any]
    scheme: str
    bytes: int
    source: dict[str, Any]
    checksums: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("config", "scheme", "bytes", "source", "checksums")}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ComponentRecord:
        record = cls(values["config"], values["scheme"], values["bytes"], values["source"], values.get("checksums", {}))
        kinds = {"config": dict, "scheme": str, "bytes": int, "source": dict, "checksums": dict}
        for name, kind in kinds.items():
            if not isinstance(getattr(record, name), kind):
                raise TypeError(f"{name} is {getattr(record, name)!r:.40}")
        if not all(isinstance(checksum, str) for checksum in record.checksums.values()):
            raise TypeError("checksums are not text")
        if type(length := record.source.get("bytes", 0)) is not int or not 0 <= length < 2**63:
            raise ValueError(f"source has {length!r:.40} bytes")
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
        if path.stat().st_size > LARGEST_RECORDS:
            raise ValueError(f"{path.stat().st_size} bytes")
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
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", "Are you allowed to read it?") from error


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
    """An open model folder: headers in memory, the weights on disk. files: of the components that were opened."""

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

    def scheme_of(self, component: str, layer: str) -> QuantScheme | None:
        """How the file stores a layer's weight; None for plain floats and for a layer without a weight."""
        import torch

        from lowvram_i2v.kernels.scheme import scheme_of_dtype

        entry = self.files[component].entries.get(f"{layer}.weight")
        if entry is None or entry.dtype not in TORCH_DTYPES:
            return None
        return scheme_of_dtype(getattr(torch, TORCH_DTYPES[entry.dtype]))

    def build(self, component: str, build: Callable[[], M], file_name: Callable[[str], str] = lambda name: name) -> M:
        """`build()` on the meta device, its linear layers quantized as the file stores them.

        A module whose buffers are computed when it is built opens `torch.device("cpu")` around them. file_name: from
        a tensor's name in the module to that in the file.
        """
        import torch

        from lowvram_i2v.kernels.quant_linear import swap_linears

        with torch.device("meta"):
            module = build()
        swap_linears(module, lambda layer: self.scheme_of(component, file_name(layer)))
        return module

    def check(
        self,
        expected: dict[str, dict[str, tuple[int, ...]]],
        extra_ok: Callable[[str, str], bool] = lambda component, name: False,
    ) -> None:
        """Compares component -> tensor name -> shape, as of modules that `build` made, with the files.

        Raises one CheckpointError that lists every missing, wrong-shaped, wrongly stored and unexpected tensor of
        all components; an unexpected one is allowed if `extra_ok(component, name)`.
        """
        from lowvram_i2v.kernels.scheme import is_marker

        def allowed(component: str, name: str) -> bool:
            return is_marker(name) or extra_ok(component, name)

        faults = [
            f"{component_file(component)}: {line}"
            for component, shapes in expected.items()
            for line in self._faults(component, shapes, partial(allowed, component))
        ]
        raise_listed(f"{self.path} does not hold the tensors of this model", faults, "Convert the weights again.")

    def _faults(
        self, component: str, expected: dict[str, tuple[int, ...]], extra_ok: Callable[[str], bool]
    ) -> list[str]:
        """`mismatches`, and a line for each tensor that is neither of floats nor a quantized layer's weight."""
        entries = self.files[component].entries
        faults = mismatches(self.shapes(component), expected, extra_ok)
        for name in expected:
            if name not in entries or entries[name].dtype in FLOATS:
                continue
            layer, _, suffix = name.rpartition(".")
            scheme = self.scheme_of(component, layer) if suffix == "weight" else None
            if scheme is None or not {f"{layer}.{part}" for part in scheme.parts(1, 1)} <= expected.keys():
                faults.append(f"stored as {entries[name].dtype}: {name}")
        return faults

    @contextmanager
    def load(
        self,
        component: str,
        build: Callable[[], M],
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        file_name: Callable[[str], str] = lambda name: name,
        only: Callable[[str], bool] = lambda name: True,
    ) -> Iterator[M]:
        """The module of `self.build` with its weights from the component's file, in evaluation mode, while a `with`
        lasts.

        Tensors are read one at a time. dtype: what floating-point weights become, None for as stored; quantized ones
        stay as they are, with their scales. Tensors that only the file has are not read; tensors of the module for
        whose names `only` says no are not read either and stay on the meta device. At exit the weights are gone, also
        for those who kept the module. Raises CheckpointError if the module needs other tensors.
        """
        from lowvram_i2v.kernels.quant_linear import quantized_parts

        module, file = self.build(component, build, file_name), self.files[component]
        expected = {file_name(name): tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        faults = self._faults(component, expected, extra_ok=lambda name: True)
        raise_listed(f"{file.path} does not fit the model", faults, "Convert the weights again.")
        fixed = quantized_parts(module)
        weights = {
            name: _place(file.read(file_name(name)), device, fixed.get(name, dtype))
            for name in module.state_dict()
            if only(name)
        }
        module.load_state_dict(weights, assign=True, strict=False)
        del weights
        _move_buffers(module, device)
        module.eval().requires_grad_(False)
        try:
            yield module
        finally:
            module.to("meta")


def _move_buffers(module: torch.nn.Module, device: torch.device) -> None:
    """Buffers outside the state dict, computed when the module was built, follow the weights."""
    for owner in module.modules():
        for name, buffer in list(owner.named_buffers(recurse=False)):
            if not buffer.is_meta:
                setattr(owner, name, buffer.to(device))


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


def open_model(folder: Path, components: Sequence[str] = COMPONENTS) -> ModelFolder:
    """Opens what `convert` wrote. Raises one CheckpointError that lists all that is missing or truncated.

    components: whose files are opened and must be whole; `model.json` must know all.
    """
    if not (folder / "model.json").is_file():
        raise CheckpointError(
            f"{folder} is not a model folder: it has no model.json",
            "Downloaded weights become a model folder with `lowvram-i2v convert`.",
        )
    records = read_records(folder)
    missing = [f"{component}: not converted yet" for component in COMPONENTS if component not in records.components]
    missing += [
        f"{component_file(component)}: no such file"
        for component in components
        if component in records.components and not (folder / component_file(component)).is_file()
    ]
    missing += [
        f"{name}/: neither tokenizer.json nor vocab.json and merges.txt"
        for component, name in TOKENIZERS.items()
        if component in components and component in records.components and not has_tokenizer(folder / name)
    ]
    for component, record in records.components.items():
        path = folder / component_file(component)
        if component in components and path.is_file() and path.stat().st_size != record.bytes:
            size = path.stat().st_size
            missing.append(f"{path.name}: {size} bytes, but {record.bytes} were written: a partial copy?")
    raise_listed(
        f"{folder} is not complete",
        missing,
        "Run `lowvram-i2v convert` for these components, or copy the files again.",
    )
    header = ModelHeader.from_records(records)
    files = {component: open_safetensors(folder / component_file(component)) for component in components}
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
        if component not in model.files:
            continue
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
