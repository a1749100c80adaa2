"""Transformer and VAE as they were released: torch pickles in the released tree, which the released program reads.

    hunyuan-video-i2v-720p/transformers/mp_rank_00_model_states.pt     {"module": tensors}, bfloat16
    hunyuan-video-i2v-720p/vae/pytorch_model.pt, config.json           tensors, float16

A pickle is written in two goes: torch saves it with holes where the tensors' bytes belong, and the holes are then
filled one tensor at a time, so memory stays small. The archive's own checksums of the holes are wrong, then; torch
does not look at them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lowvram_i2v.convert.export import Advance, OutputFile
from lowvram_i2v.convert.origin import Component
from lowvram_i2v.convert.policy import Layout, layout
from lowvram_i2v.convert.writer import CPU, Sink, run_jobs
from lowvram_i2v.vae.config import VaeConfig

COMPONENTS = ("transformer", "vae")
MODEL = "hunyuan-video-i2v-720p"


def plan(component: Component) -> list[OutputFile]:
    made = layout(component.name, "bf16", component.source.tensors)
    if component.name == "transformer":
        return [OutputFile(f"{MODEL}/transformers/mp_rank_00_model_states.pt", made, save=_save_wrapped)]
    config = json.dumps(VaeConfig.from_dict(component.config).to_official(), indent=2)
    return [
        OutputFile(f"{MODEL}/vae/pytorch_model.pt", made, save=save),
        OutputFile(f"{MODEL}/vae/config.json", text=config),
    ]


def _save_wrapped(path: Path, made: Layout, advance: Advance) -> None:
    save(path, made, advance, wrapper="module")


def save(path: Path, made: Layout, advance: Advance, wrapper: str | None = None) -> None:
    """Writes a torch pickle of the layout's tensors, by name, as `wrapper`'s value if given."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.serialization import skip_data

    with FakeTensorMode():
        state: dict[str, Any] = {tensor.name: torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in made.tensors}
    with skip_data(materialize_fake_tensors=True):
        torch.save({wrapper: state} if wrapper else state, path)
    holes = torch.load(path, map_location="meta", weights_only=True)
    holes = holes[wrapper] if wrapper else holes
    offsets = {name: getattr(tensor.untyped_storage(), "_checkpoint_offset") for name, tensor in holes.items()}  # noqa: B009
    tensors = {tensor.name: tensor for tensor in made.tensors}
    with path.open("rb+") as file:
        run_jobs(made, Sink(file.fileno(), offsets, tensors), CPU, advance)
