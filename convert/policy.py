"""What is stored how: which linear layers are quantized, the dtype of all else, and the order in the file.

Quantized are the layers that every peer quantizes, 97 % of the transformer's parameters: all linear layers of its
double and single blocks (320 in the released model), and the seven projections of each decoder layer of the LLaVA
(224). What feeds or reads the blocks, norms and biases stay 16-bit; CLIP and the VAE are never quantized.

Reading and writing are told apart, so that they can overlap: `Layout.tensors` is the file, tensor by tensor;
`Layout.jobs` is the work, one source tensor at a time, each of which yields one or more tensors of the file. The parts
of one weight may lie apart, so a job's results are written at their tensors' offsets, in any order.

To add a scheme, add it to `kernels.scheme`; nothing changes here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from lowvram_i2v.checkpoint import in_block_order
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.errors import CheckpointError, RequestError
from lowvram_i2v.kernels.chunks import row_chunks
from lowvram_i2v.kernels.scheme import SCHEMES, QuantScheme

DTYPES = {
    "bf16": {
        "transformer": torch.bfloat16,
        "text_encoder": torch.float16,
        "text_encoder_2": torch.float16,
        "vae": torch.float16,
    },
    "fp32": dict.fromkeys(("transformer", "text_encoder", "text_encoder_2", "vae"), torch.float32),
}
"""Schemes that quantize nothing. Beside quantized layers all else is stored as by bf16."""

QUANTIZED = {
    "transformer": r"(double|single)_blocks\.\d+\..+\.weight",
    "text_encoder": r"model\.layers\.\d+\..+_proj\.weight",
}
"""Component -> tensors that a scheme quantizes, if they are 2-D."""

SCHEME_NAMES = (*SCHEMES, *DTYPES)
DEFAULT_TEXT_SCHEME = "fp8"
READABLE = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Job:
    """One tensor read, one or more written.

    names: what `make` returns. make: runs where its argument is, on the CPU or a GPU; raises CheckpointError for values
    that cannot be stored. quantizes: the layer whose weight it is and the scheme, None if it is not quantized here.
    """

    names: tuple[str, ...]
    source: LazyTensor
    make: Callable[[Tensor], dict[str, Tensor]]
    quantizes: tuple[str, QuantScheme] | None = None

    def produce(self) -> dict[str, Tensor]:
        """Reads and makes, in one go."""
        return self.make(self.source.read())


@dataclass(frozen=True)
class Layout:
    """A component's file. tensors: in the order of the file. jobs: in the order of what comes first in the file."""

    tensors: tuple[StoredTensor, ...]
    jobs: tuple[Job, ...]


def component_scheme(component: str, scheme: str, text_scheme: str | None = None) -> str:
    """The scheme of one component of a model whose transformer has `scheme`: that of the text encoder can be chosen
    (else it is fp8 beside a quantized transformer), CLIP and VAE are never quantized."""
    if component == "transformer":
        return scheme
    if component == "text_encoder":
        return text_scheme or (DEFAULT_TEXT_SCHEME if scheme in SCHEMES else scheme)
    return "bf16" if scheme in SCHEMES else scheme


def quantizable(component: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The linear layers (names without `.weight`) of a component that a scheme quantizes, in the order given."""
    pattern = QUANTIZED.get(component, "(?!)")
    return [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if len(shape) == 2 and re.fullmatch(pattern, name)
    ]


def check_keep(keep: Iterable[str], layers: Iterable[str]) -> None:
    """Raises RequestError for a pattern that matches none of the layers that would be quantized."""
    layers = list(layers)
    for pattern in keep:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            example = f"such as {layers[0]} or *.{layers[0].rpartition('.')[2]}" if layers else "but none is"
            raise RequestError(f"--keep {pattern} matches no layer that is quantized", f"Name layers, {example}.")


def layout(component: str, scheme: str, tensors: Mapping[str, LazyTensor], keep: Sequence[str] = ()) -> Layout:
    """How a component is stored.

    scheme: one of SCHEME_NAMES, the component's own (`component_scheme`). tensors: the source's, under the names of the
    model folder's files. keep: fnmatch patterns of layers that stay unquantized. A source that is stored in the same
    scheme already is copied bit for bit.
    """
    quant = SCHEMES.get(scheme)
    dtype = DTYPES["bf16" if quant else scheme][component]
    layers = quantizable(component, {name: tensor.shape for name, tensor in tensors.items()}) if quant else ()
    chosen = {layer for layer in layers if not any(fnmatchcase(layer, pattern) for pattern in keep)}
    jobs: list[tuple[Job, list[StoredTensor]]] = []
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if quant and layer != name and layer in chosen:
            jobs += _quantized(layer, tensor, quant)
        else:
            jobs.append(_cast(name, tensor, dtype))
    if quant and chosen:
        jobs += [_constant(name, value) for name, value in quant.file_markers(component).items()]

    stored = {tensor.name: tensor for _, made in jobs for tensor in made}
    order = in_block_order(component, {name: tensor.bytes for name, tensor in stored.items()})
    place = {name: index for index, name in enumerate(order)}
    by_place = sorted((job for job, _ in jobs), key=lambda job: min(place[name] for name in job.names))
    return Layout(tuple(stored[name] for name in order), tuple(by_place))


def _quantized(layer: str, tensor: LazyTensor, scheme: QuantScheme) -> Iterator[tuple[Job, list[StoredTensor]]]:
    """A weight's parts, copied if the source has exactly these, and the layer's markers."""
    rows, columns = tensor.shape
    wanted = scheme.parts(rows, columns)
    given = tensor.parts or {}
    if tensor.scheme == scheme.name and {suffix: (part.shape, part.dtype) for suffix, part in given.items()} == wanted:
        for suffix, part in given.items():
            yield _cast(f"{layer}.{suffix}", part, part.dtype)
    else:
        parts = [StoredTensor(f"{layer}.{suffix}", shape, dtype) for suffix, (shape, dtype) in wanted.items()]

        def make(weight: Tensor) -> dict[str, Tensor]:
            return {f"{layer}.{suffix}": part for suffix, part in scheme.quantize(weight, f"{layer}.weight").items()}

        yield Job(tuple(part.name for part in parts), tensor, make, quantizes=(layer, scheme)), parts
    for suffix, value in scheme.layer_markers().items():
        yield _constant(f"{layer}.{suffix}", value)


def _cast(name: str, tensor: LazyTensor, dtype: torch.dtype) -> tuple[Job, list[StoredTensor]]:
    """The tensor in another floating-point dtype, or bit for bit as it is (`cast`)."""

    def make(values: Tensor) -> dict[str, Tensor]:
        return {name: cast(name, values, dtype)}

    return Job((name,), tensor, make), [StoredTensor(name, tensor.shape, dtype)]


def _constant(name: str, value: Tensor) -> tuple[Job, list[StoredTensor]]:
    """A tensor that no source has."""
    return _cast(name, LazyTensor(tuple(value.shape), value.dtype, lambda: value), value.dtype)


def cast(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in `dtype`, rounded once; the same tensor if that is theirs. Integers are not looked at.

    Some values at a time, so that beside `values` and the result there are 16 MiB at most. Raises CheckpointError if a
    value is infinite, not a number, or too large for `dtype`.
    """
    same = values.dtype == dtype
    if same and not dtype.is_floating_point:
        return values
    flat = values.reshape(-1)
    result = flat if same else torch.empty(flat.shape, dtype=dtype, device=values.device)
    for piece in row_chunks(len(flat), 1):
        largest = _largest(name, flat[piece])
        if same:
            continue
        if not largest.to(dtype).isfinite():
            raise CheckpointError(
                f"{name} has values up to {largest:.3g}, {str(dtype).removeprefix('torch.')} holds up to "
                f"{torch.finfo(dtype).max:.5g}",
                "These are not the released weights, or they are damaged: download them again.",
            )
        result[piece] = flat[piece]
    return values if same else result.reshape(values.shape)


def _largest(name: str, values: Tensor) -> Tensor:
    """The largest magnitude, float32. Raises CheckpointError if a value is infinite or not a number."""
    low, high = torch.aminmax(values if values.itemsize > 1 else values.half())
    largest = torch.maximum(-low, high).float()
    if not largest.isfinite():
        raise CheckpointError(
            f"{name} has values that are infinite or not a number", "The weights are damaged: download them again."
        )
    return largest
