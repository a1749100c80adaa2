"""bitsandbytes, as diffusers saves it; read without the package.

int8     <layer>.weight  I8 [out, in]     <layer>.SCB  F32 [out]      value = code * SCB / 127
4 bits   <layer>.weight  U8, two codes a byte, the first in the high half; beside it
         .absmax  of each block           .quant_map   the 16 values, times absmax
         .quant_state.bitsandbytes__nf4   U8, JSON: shape, blocksize, ...
         .nested_absmax .nested_quant_map where absmax itself is coded in 8 bits
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowvram_i2v.checkpoint import raise_listed
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.convert.sources.comfy_quant import small_text
from lowvram_i2v.convert.sources.containers import DOWNLOAD, Container
from lowvram_i2v.convert.sources.quantization import Decoded
from lowvram_i2v.convert.sources.scaled import scaled
from lowvram_i2v.errors import CheckpointError

STATE = ".quant_state.bitsandbytes__"
BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
LARGEST_BLOCK = 4096
VALUES_AT_ONCE = 2**22


def label(container: Container) -> str | None:
    for name in container.tensors:
        if STATE in name:
            return f"bitsandbytes {name.rpartition('__')[2]:.10}"
        if name.endswith((".SCB", ".quant_map")):
            return "bitsandbytes int8" if name.endswith(".SCB") else "bitsandbytes, 4 bits"
    return None


def decode(container: Container) -> Decoded:
    """Raises CheckpointError listing codes whose scales are missing or do not fit."""
    tensors, result, faults = container.tensors, {}, []
    states = {name.partition(STATE)[0]: name for name in tensors if STATE in name}
    for name, tensor in tensors.items():
        layer, _, suffix = name.rpartition(".")
        if STATE in name or suffix == "SCB" or (f".{suffix}" in BESIDE and layer in states):
            continue
        if suffix == "weight_format":
            faults += [] if _is_row_major(tensor) else [f"{name}: not row by row"]
        elif name in states:
            result[name] = _four_bits(container, name, states[name])
        elif suffix == "weight" and f"{layer}.SCB" in tensors:
            result[name] = scaled(name, tensor, tensors[f"{layer}.SCB"], factor=1 / 127)
        elif tensor.dtype in (torch.uint8, torch.int8):
            faults.append(f"{name} is {container.labels[name]} and has no scales")
        else:
            result[name] = tensor
    raise_listed(f"{container.path} has quantized tensors that are not read", faults, DOWNLOAD)
    return Decoded(result, label(container) or "")


def _is_row_major(weight_format: LazyTensor) -> bool:
    return weight_format.bytes == 1 and not weight_format.read().any()


@dataclass(frozen=True)
class State:
    """What a 4-bit tensor's JSON says. nested: (values a block of absmax, offset), None if absmax is plain."""

    shape: tuple[int, ...]
    block: int
    nested: tuple[int, float] | None

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def _state(container: Container, name: str) -> State:
    try:
        values: dict[str, Any] = json.loads(small_text(container, name, container.tensors[name]))
        nested = None
        if "nested_blocksize" in values:
            nested = int(values["nested_blocksize"]), float(values["nested_offset"])
        state = State(tuple(int(size) for size in values["shape"]), int(values["blocksize"]), nested)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{container.path}: {name} is damaged ({error!r:.100})", DOWNLOAD) from error
    blocks = (state.block, nested[0] if nested else LARGEST_BLOCK)
    if min(state.shape, default=0) <= 0 or not 2 <= min(blocks) <= max(blocks) <= LARGEST_BLOCK or state.block % 2:
        raise CheckpointError(f"{container.path}: {name} describes nothing: {state}", DOWNLOAD)
    return state


def _four_bits(container: Container, name: str, state_name: str) -> LazyTensor:
    """One weight as float32. Raises CheckpointError if a tensor beside it is missing or of another size."""
    state, codes = _state(container, state_name), container.tensors[name]
    blocks = -(-state.count // state.block)
    expected = {name: (-(-state.count // 2), torch.uint8), f"{name}.quant_map": (16, torch.float32)}
    expected[f"{name}.absmax"] = blocks, torch.uint8 if state.nested else torch.float32
    if state.nested:
        expected[f"{name}.nested_absmax"] = -(-blocks // state.nested[0]), torch.float32
        expected[f"{name}.nested_quant_map"] = 256, torch.float32
    faults = []
    for key, (size, dtype) in expected.items():
        found = container.tensors.get(key)
        if found is None or math.prod(found.shape) != size or found.dtype != dtype:
            what = "missing" if found is None else f"{list(found.shape)} of {found.dtype}"
            faults.append(f"{key} is {what}, not {size} values of {dtype}")
    raise_listed(f"{container.path}: the parts of {name} do not fit", faults, DOWNLOAD)

    def beside(suffix: str) -> Tensor:
        return container.tensors[f"{name}.{suffix}"].read().reshape(-1)

    def read() -> Tensor:
        absmax, values = beside("absmax"), beside("quant_map")
        if state.nested:
            block, offset = state.nested
            scales = beside("nested_absmax").repeat_interleave(block)[: absmax.numel()]
            absmax = beside("nested_quant_map")[absmax.int()] * scales + offset
        if not (absmax.isfinite().all() and values.isfinite().all()):
            raise CheckpointError(f"the scales of {name} have values that are not finite", DOWNLOAD)
        return _unpacked(codes.read().reshape(-1), values, absmax, state)

    return LazyTensor(state.shape, torch.float32, read)


def _unpacked(codes: Tensor, values: Tensor, absmax: Tensor, state: State) -> Tensor:
    """values[code] * absmax of its block, some blocks at a time."""
    result = torch.empty(state.count)
    blocks = max(1, VALUES_AT_ONCE // state.block)
    for first in range(0, absmax.numel(), blocks):
        start, end = first * state.block, min((first + blocks) * state.block, state.count)
        pairs = codes[start // 2 : (end + 1) // 2].int()
        piece = values[torch.stack((pairs >> 4, pairs & 15), dim=1).reshape(-1)[: end - start]]
        scales = absmax[first : first + blocks].repeat_interleave(state.block)[: end - start]
        result[start:end] = piece * scales
    return result.reshape(state.shape)
