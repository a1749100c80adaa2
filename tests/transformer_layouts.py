"""The transformer in every layout that people have, written from official tensors as the tools that ship them do.

Names come from the reference tables in tests/convert/names/, not from the code under test. A quantizing layout returns
the values that a reader must give, computed here from the codes that were written.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowvram_i2v.convert.shapes import transformer_shapes
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.synth.weights import random_tensors

State = dict[str, Tensor]
TINY = TransformerConfig(hidden_size=128, heads=1, double_blocks=2, single_blocks=2, text_dim=64, pooled_dim=64)
CONCAT = replace(TINY, in_channels=33, guidance_embed=False)
WIDE = replace(TINY, hidden_size=256, heads=2, double_blocks=1, single_blocks=1)
FP8 = torch.float8_e4m3fn


@cache
def tables() -> dict[str, Any]:
    path = Path(__file__).parent / "convert" / "names" / "transformer.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))


@cache
def official_state(config: TransformerConfig = TINY) -> State:
    made = random_tensors("transformer", transformer_shapes(config), torch.bfloat16, 3, torch.device("cpu"))
    return {name: tensor.read() for name, tensor in made.items()}


def in_blocks(name: str) -> bool:
    """The weights that peers quantize: every linear of the blocks."""
    return name.endswith(".weight") and name.startswith(("double_blocks.", "single_blocks.")) and "_norm" not in name


def clone(tensor: Tensor) -> Tensor:
    return tensor.clone().contiguous()


# ------------------------------------------------------------------------------------------------------------- names


def as_comfy(state: State, table: str = "official_to_comfy_new") -> State:
    return {tables()[table][name]: tensor for name, tensor in state.items()}


def as_diffusers(state: State) -> State:
    """Split and swapped as the table says; its row numbers are those of hidden 3072."""
    hidden = state["img_in.proj.weight"].shape[0]
    result = {}
    for name, tensor in state.items():
        for theirs, rows, operation in tables()["official_to_diffusers"][name]:
            part = tensor
            if operation == "rows":
                start, end = (number * hidden // 3072 for number in rows)
                part = tensor[start:end]
            elif operation == "swap_halves":
                shift, scale = tensor.chunk(2)
                part = torch.cat((scale, shift))
            result[theirs] = clone(part)
    return result


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


# ----------------------------------------------------------------------------------------------------------- values


def to_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight.float() / scale).clamp(-448, 448).to(FP8)


def fp8_scaled(state: State, suffix: str, shape: str = "scalar", marker: bool = False) -> tuple[State, State]:
    """(tensors, expected) with one scale for each weight, row, or block of 64 of a row."""
    tensors, expected = {}, {}
    for name, weight in state.items():
        if not in_blocks(name):
            tensors[name] = expected[name] = weight
            continue
        wide = weight.float()
        if shape == "block":
            groups = wide.reshape(wide.shape[0], -1, 64)
            scale = groups.abs().amax(2, keepdim=True) / 448
            codes = to_fp8(groups, scale)
            expected[name] = (codes.float() * scale).reshape(wide.shape)
            codes = codes.reshape(wide.shape)
        else:
            scale = wide.abs().amax(1, keepdim=True) / 448 if shape in ("row", "flat row") else wide.abs().max() / 448
            codes = to_fp8(wide, scale)
            expected[name] = codes.float() * scale
            scale = {"flat row": scale.reshape(-1), "one": scale.reshape(-1)[:1]}.get(shape, scale)
        tensors[name] = codes
        tensors[name.removesuffix("weight") + suffix] = scale.contiguous()
    if marker:
        tensors["scaled_fp8"] = torch.zeros(2).to(FP8)
    if suffix == "fp8_scale":
        tensors["fp8_scale"] = torch.zeros(1)  # Kijai's own marker, which belongs to no layer
    return tensors, expected


def int8_rows(state: State, suffix: str = "weight_scale", scalar: bool = False) -> tuple[State, State]:
    tensors, expected = {}, {}
    for name, weight in state.items():
        if not in_blocks(name):
            tensors[name] = expected[name] = weight
            continue
        wide = weight.float()
        scale = (wide.abs().max() if scalar else wide.abs().amax(1, keepdim=True)) / 127
        codes = (wide / scale).round().clamp(-127, 127).to(torch.int8)
        tensors[name], tensors[name.removesuffix("weight") + suffix] = codes, scale
        expected[name] = codes.float() * scale
    return tensors, expected


def quantized_layers(state: State) -> list[str]:
    return [name.removesuffix(".weight") for name in state if in_blocks(name)]


def with_comfy_quant(tensors: State, layers: list[str], config: dict[str, Any]) -> State:
    """Each layer's JSON as a tensor of bytes."""
    text = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
    return tensors | {f"{layer}.comfy_quant": text.clone() for layer in layers}


def comfy_metadata(layers: list[str], config: dict[str, Any]) -> dict[str, str]:
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": dict.fromkeys(layers, config)})}


def plain_fp8(state: State) -> tuple[State, State]:
    tensors = {name: weight.to(FP8) if in_blocks(name) else weight for name, weight in state.items()}
    return tensors, {name: weight.bfloat16() for name, weight in tensors.items()}


class Layers(torch.nn.Module):
    """Linear layers under the official names, for libraries that quantize modules."""

    def __init__(self, state: State, chosen: Callable[[str], bool] = in_blocks) -> None:
        super().__init__()
        for name, weight in state.items():
            if not chosen(name):
                continue
            parent: torch.nn.Module = self
            *path, last = name.removesuffix(".weight").split(".")
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, torch.nn.Module())
                parent = parent._modules[part]  # type: ignore[assignment]
            bias = state.get(name.removesuffix("weight") + "bias")
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            layer.weight = torch.nn.Parameter(weight.clone())
            if bias is not None:
                layer.bias = torch.nn.Parameter(bias.clone())
            parent.add_module(last, layer)


def quanto_int8(state: State) -> tuple[State, State, dict[str, str]]:
    """By the library itself: (tensors, expected, metadata)."""
    from optimum.quanto import freeze, qint8, quantization_map, quantize

    module = Layers(state)
    quantize(module, weights=qint8)
    freeze(module)
    tensors = {name: clone(tensor) for name, tensor in module.state_dict().items()}
    expected = dict(state)
    for layer in quantized_layers(state):
        codes, scale = tensors[f"{layer}.weight._data"], tensors[f"{layer}.weight._scale"]
        expected[f"{layer}.weight"] = codes.float() * scale.float()
        weight = module.get_submodule(layer).weight
        assert torch.equal(weight.dequantize(), (codes * scale))  # type: ignore[operator]
    rest = {name: tensor for name, tensor in state.items() if name not in tensors and not in_blocks(name)}
    text = base64.b64encode(json.dumps(quantization_map(module)).encode()).decode()
    return tensors | rest, expected, {"quantization_format": "quanto", "quantization_map_base64": text}


def write(tensors: State, path: Path, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: clone(tensor) for name, tensor in tensors.items()}, path, metadata)
    return path


def write_shards(tensors: State, folder: Path, stem: str = "diffusion_pytorch_model", count: int = 3) -> Path:
    """Returns the index."""
    names = list(tensors)
    weight_map = {}
    for number in range(count):
        file = f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"
        write({name: tensors[name] for name in names[number::count]}, folder / file)
        weight_map |= dict.fromkeys(names[number::count], file)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index
