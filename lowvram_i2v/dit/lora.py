"""LoRA files: which layer each pair of matrices belongs to, its scale, and merging it into plain weights.

Two families are read, told apart by the prefix of their names; what follows it is the official module name with dots
turned into underscores, looked up among the model's modules (no two of them flatten to the same name):

    Hunyuan_video_I2V_lora_   the released trainer: alpha is fixed at training time and ignored, as it means it
    lora_unet_                kohya and musubi: the update is scaled by alpha / rank

Left out: unmerged use (quantized weights), other families, text encoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.safetensors_file import open_safetensors

OFFICIAL_PREFIX = "Hunyuan_video_I2V_lora_"
KOHYA_PREFIX = "lora_unet_"
PARTS = ("lora_down.weight", "lora_up.weight", "alpha")


@dataclass(frozen=True)
class LoraPair:
    """The update of one layer's weight: scale * up @ down. down [rank, in], up [out, rank]."""

    down: Tensor
    up: Tensor
    scale: float

    def update(self) -> Tensor:
        """[out, in], float32."""
        return self.scale * (self.up.float() @ self.down.float())


def read_lora(path: Path, model: nn.Module) -> dict[str, LoraPair]:
    """Module name -> pair, for every layer that the file changes.

    Raises CheckpointError, listing all faults: names of no layer of this model, missing halves, shapes that do not fit.
    """
    file = open_safetensors(path)
    layers = {name.replace(".", "_"): name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    grouped: dict[str, dict[str, str]] = {}
    faults = []
    for name in file.entries:
        prefix = next((p for p in (OFFICIAL_PREFIX, KOHYA_PREFIX) if name.startswith(p)), None)
        flat, _, part = name.removeprefix(prefix or "").partition(".")
        if prefix is None or flat not in layers or part not in PARTS:
            faults.append(f"no layer for {name}")
        else:
            grouped.setdefault(layers[flat], {})[part] = name
    pairs = {}
    for layer_name, parts in grouped.items():
        weight = model.get_parameter(f"{layer_name}.weight")
        fault = _fault(parts, {part: file.entries[name].shape for part, name in parts.items()}, tuple(weight.shape))
        if fault:
            faults.append(f"{layer_name}: {fault}")
        else:
            pairs[layer_name] = _pair({part: file.read(name) for part, name in parts.items()}, parts["lora_up.weight"])
    if faults:
        shown = "; ".join(faults[:10]) + (f"; and {len(faults) - 10} more" if len(faults) > 10 else "")
        raise CheckpointError(f"{path} does not fit this model: {shown}", "Use a LoRA trained for HunyuanVideo-I2V.")
    return pairs


def merge_lora(model: nn.Module, pairs: Mapping[str, LoraPair], strength: float = 1.0) -> None:
    """Adds strength * update to the layers' weights, in float32, and keeps their dtype."""
    for name, pair in pairs.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            merged = weight.float() + strength * pair.update().to(weight.device)
        model.get_submodule(name).weight = nn.Parameter(merged.to(weight.dtype), requires_grad=weight.requires_grad)


def _pair(tensors: dict[str, Tensor], name: str) -> LoraPair:
    down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
    scale = 1.0
    if "alpha" in tensors and not name.startswith(OFFICIAL_PREFIX):
        scale = float(tensors["alpha"]) / len(down)
    return LoraPair(down, up, scale)


def _fault(parts: dict[str, str], shapes: dict[str, tuple[int, ...]], weight: tuple[int, ...]) -> str:
    if missing := [part for part in PARTS[:2] if part not in parts]:
        return f"{' and '.join(missing)} missing"
    down, up = shapes["lora_down.weight"], shapes["lora_up.weight"]
    if len(down) != 2 or len(up) != 2 or (up[0], down[1]) != weight or up[1] != down[0]:
        return f"up {list(up)} times down {list(down)} is not {list(weight)}"
    return ""
