"""Trained weights -> the released tree -> the model folder that ships, through the project's own `convert`.

Invariants: what is written is the moving average, in float32 (CLIP and VAE too), under the released names; `convert`
alone decides what is quantized. Left out: placing the folder inside the package.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowvram_i2v.convert.convert import convert
from lowvram_i2v.synth.released import MODEL
from lowvram_i2v.text.clip import clip_tensor_name
from lowvram_i2v.text.llava import llava_tensor_name
from tools.train_demo import text, vae
from tools.train_demo.loop import Run, averaged
from tools.train_demo.sizes import MOST_BYTES, SCHEME, Recipe

RELEASED, CONVERTED = "released", "model"
OFFICIAL = {"model.": "language_model.model.", "vision_model.": "vision_tower.vision_model."}


def export(recipe: Recipe, run: Run, scheme: str = SCHEME) -> Path:
    """Writes `released/` and the model folder `model-SCHEME/` into the work folder, and prints its sizes.

    Raises SystemExit if a stage is missing or the folder is too large to ship.
    """
    released = run.work / RELEASED
    shutil.rmtree(released, ignore_errors=True)
    write_released(released, recipe, run)
    folder = run.work / f"{CONVERTED}-{scheme}"
    shutil.rmtree(folder, ignore_errors=True)
    text_scheme = scheme if scheme == SCHEME else None
    convert(released, folder, scheme, variant=text.VARIANT.name, text_scheme=text_scheme)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        print(f"{path.relative_to(folder)!s:32} {path.stat().st_size / 2**20:6.2f} MiB")
    total = sum(path.stat().st_size for path in files)
    print(f"{'in all':32} {total / 2**20:6.2f} MiB, may be {MOST_BYTES / 2**20:.0f}")
    if scheme == SCHEME and total > MOST_BYTES:
        raise SystemExit("the model folder is too large to ship")
    return folder


def write_released(folder: Path, recipe: Recipe, run: Run) -> None:
    """The tree that `convert` reads as the released one."""
    transformer, vae_folder = folder / MODEL / "transformers", folder / MODEL / "vae"
    for each in (transformer, vae_folder):
        each.mkdir(parents=True)
    torch.save({"module": averaged(run.work, "flow")}, transformer / "mp_rank_00_model_states.pt")
    torch.save(vae.trained(run.work), vae_folder / "pytorch_model.pt")
    config = vae.trained_config(run.work)
    (vae_folder / "config.json").write_text(json.dumps(config.to_official(), indent=1))

    encoders = text.load(run)
    llava = text.llava_start(encoders.llava_config, run.seed)
    llava |= {llava_tensor_name(name): value for name, value in _state(encoders.llava).items()}
    clip = {clip_tensor_name(name): value for name, value in _state(encoders.clip).items()}
    tensors = {text.LLAVA_FOLDER: {_official(name): value for name, value in llava.items()}, text.CLIP_FOLDER: clip}
    for name, values in tensors.items():
        shutil.copytree(run.work / name, folder / name)
        values = {key: value.contiguous() for key, value in values.items()}
        save_file(values, folder / name / "model.safetensors", {"format": "pt"})


def _state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu() for name, parameter in module.named_parameters()}


def _official(name: str) -> str:
    """A name of the model folder's `text_encoder.safetensors` as LLaVA is published."""
    for ours, published in OFFICIAL.items():
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    return name
