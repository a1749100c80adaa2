"""Reads the goldens: inputs, weights and outputs of the reference implementation.

`tests/golden/` holds a copy that is small enough for the repository: long outputs keep every n-th value (tensor
`NAME::every13`, true shape in the header). The environment variable LOWVRAM_GOLDENS names another folder, with other
sizes and settings or with whole outputs; the same tests must pass there, so they read every shape and setting from
the files. `tests/golden/README.md` says how the copy was made.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lowvram_i2v.dit.config import TransformerConfig

FOLDER = Path(os.environ.get("LOWVRAM_GOLDENS") or Path(__file__).parent / "golden")


@dataclass(frozen=True)
class Sampled:
    """An expected tensor of which only every `stride`-th value (flattened) is stored."""

    values: Tensor
    stride: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Golden:
    """One golden: `tensors` by name (float tensors as stored), and its settings `info`."""

    name: str
    info: dict[str, Any]
    tensors: dict[str, Tensor | Sampled]

    def __getitem__(self, name: str) -> Any:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)


def header_metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)).get("__metadata__") or {}


def names(*prefixes: str) -> list[str]:
    """The names of all goldens that start with one of the prefixes, for `pytest.mark.parametrize`."""
    return sorted(p.stem for p in FOLDER.glob("*.json") if p.stem.startswith(prefixes))


def golden(name: str) -> Golden:
    """Loads `NAME.json` and `NAME.safetensors` of the golden folder; skips the test if the folder has no such pair."""
    path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"no golden {name} in {FOLDER}")
    shapes = json.loads(header_metadata(path).get("shapes", "{}"))
    tensors: dict[str, Tensor | Sampled] = {}
    for key, value in load_file(path).items():
        base, mark, stride = key.partition("::every")
        tensors[base] = Sampled(value, int(stride), tuple(shapes[base])) if mark else value
    return Golden(name, json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")), tensors)


@cache
def weights(file: str) -> dict[str, Tensor]:
    """All tensors of a golden weight file, float32, under official names. Large ones are 4-bit integers on disk:
    two values a byte, low nibble first, value = (nibble - 8) * 2**exp."""
    path = FOLDER / file
    packed = json.loads(header_metadata(path).get("q4", "{}"))
    result = {}
    for key, value in load_file(path).items():
        if not key.endswith("::q4"):
            result[key] = value
            continue
        name = key.removesuffix("::q4")
        shape, exponent = packed[name]["shape"], packed[name]["exp"]
        nibbles = np.empty(value.numel() * 2, dtype=np.float32)
        nibbles[0::2] = (value.numpy() & 15).astype(np.float32) - 8
        nibbles[1::2] = (value.numpy() >> 4).astype(np.float32) - 8
        flat = nibbles[: int(np.prod(shape))] * np.float32(2.0**exponent)
        result[name] = torch.from_numpy(flat.reshape(shape))
    return result


def transformer_weights(info: dict[str, Any]) -> dict[str, Tensor]:
    """The transformer weights a golden names, with its override ("tensor 'NAME' of GOLDEN") and drop applied."""
    description = info["weights"]
    state = dict(weights(description.get("file") or description["transformer"]))
    for name, text in description.get("override", {}).items():
        key, owner = text.split("'")[1], text.rsplit(" of ", 1)[1]
        owner = info["golden"] if "this file" in owner else names(owner.removeprefix("golden ").split("_")[0] + "_")[0]
        state[name] = golden(owner)[key]
    if drop := description.get("drop", ""):
        prefix = drop.split()[-1].rstrip("*")
        state = {name: value for name, value in state.items() if not name.startswith(prefix)}
    return state


def transformer_config(info: dict[str, Any], state: dict[str, Tensor]) -> TransformerConfig:
    """The project's config for a golden's settings; the refiner's depth is counted in the weights."""
    c = info["config"]
    return TransformerConfig(
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        hidden_size=c["hidden_size"],
        heads=c["heads_num"],
        double_blocks=c["mm_double_blocks_depth"],
        single_blocks=c["mm_single_blocks_depth"],
        refiner_blocks=len({name.split(".")[3] for name in state if "refiner.blocks." in name}),
        mlp_ratio=c["mlp_width_ratio"],
        patch_size=tuple(c["patch_size"]),
        rope_dims=tuple(c["rope_dim_list"]),
        rope_theta=c["rope_theta"],
        text_dim=c["text_states_dim"],
        pooled_dim=c["text_states_dim_2"],
        guidance_embed=c["guidance_embed"],
    )


def relative_l2(actual: Tensor, expected: Tensor | Sampled, keep: Tensor | None = None) -> float:
    """||actual - expected|| / ||expected|| in float64, over the stored values; shapes must agree.

    `keep`, a boolean tensor of the same shape, leaves out what nobody sees (rows of padded text).
    """
    keep = torch.ones(actual.shape, dtype=torch.bool) if keep is None else keep
    if isinstance(expected, Sampled):
        assert tuple(actual.shape) == expected.shape, (tuple(actual.shape), expected.shape)
        actual, keep = actual.reshape(-1)[:: expected.stride], keep.reshape(-1)[:: expected.stride]
        expected = expected.values
    assert actual.shape == expected.shape, (tuple(actual.shape), tuple(expected.shape))
    difference = actual[keep].double() - expected[keep].double()
    return float(difference.norm() / expected[keep].double().norm().clamp_min(1e-30))
