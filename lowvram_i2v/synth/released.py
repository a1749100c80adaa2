"""Writes a checkpoint of random weights, file by file as the model's download instructions leave it.

Invariants: values depend on the seed and the kind of device alone; a file appears under its name only when
complete. Safetensors files are written one tensor at a time. Left out: a streamed `.pt`. torch's pickle
format is written in one go, so the full transformer takes 26 GB of memory while it is saved.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowvram_i2v.checkpoint import COMPONENTS
from lowvram_i2v.convert.shapes import Shapes, clip_shapes, llava_shapes, transformer_shapes, vae_shapes
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.convert.writer import replacing, require_space, require_writable, write_safetensors
from lowvram_i2v.errors import RequestError
from lowvram_i2v.events import Listener, Notice, PhaseAdvanced, PhaseFinished, PhaseStarted, ignore
from lowvram_i2v.synth.sizes import SIZES, Size, clip_json, llava_json, transformer_config
from lowvram_i2v.synth.tokenizers import write_clip_tokenizer, write_llava_tokenizer
from lowvram_i2v.synth.weights import random_tensors
from lowvram_i2v.variant import VARIANTS, Variant

MODEL = "hunyuan-video-i2v-720p"
LARGE = 4 * 2**30  # bytes of a pickle above which the user is told about memory


@dataclass(frozen=True)
class Part:
    """One file of tensors to be written."""

    component: str
    path: Path
    tensors: dict[str, LazyTensor]
    wrapper: str | None = None

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors.values())


def synth(
    folder: Path,
    size: str,
    variant: str,
    components: Iterable[str] = COMPONENTS,
    seed: int = 0,
    device: torch.device | None = None,
    listen: Listener = ignore,
) -> None:
    """Writes the components into `folder`, in the released tree's layout.

    size: a row of SIZES. device: where values are drawn, None for the CPU; values differ between kinds of
    device. Raises RequestError or ResourceError before anything is written.
    """
    components = tuple(components)
    choices: list[tuple[str, Collection[str]]] = [(size, SIZES), (variant, VARIANTS)]
    choices += [(component, COMPONENTS) for component in components]
    for value, known in choices:
        if value not in known:
            raise RequestError(f"there is no {value!r}", f"Choose from {', '.join(known)}.")
    require_writable(folder)
    make = partial(random_tensors, seed=seed, device=device or torch.device("cpu"))
    planned = [
        part for component in components for part in PARTS[component](folder, SIZES[size], VARIANTS[variant], make)
    ]
    require_space(folder, sum(part.bytes for part in planned))
    for component in components:
        _write_component(component, [part for part in planned if part.component == component], SIZES[size], listen)


def _write_component(component: str, parts: list[Part], size: Size, listen: Listener) -> None:
    """Small files first, then the weights, then the index that names them."""
    start, phase = time.perf_counter(), f"synth {component}"
    listen(PhaseStarted(phase, sum(part.bytes for part in parts), "bytes"))
    folder = parts[0].path.parent
    folder.mkdir(parents=True, exist_ok=True)
    CONFIGS[component](folder, size)
    done = 0

    def advance(more: int) -> None:
        listen(PhaseAdvanced(phase, done + more))

    for part in parts:
        _write(part, advance, listen)
        done += part.bytes
    if len(parts) > 1:
        _write_index(parts)
    listen(PhaseFinished(phase, time.perf_counter() - start, 0, 0))


Make = Callable[[str, Shapes, torch.dtype], dict[str, LazyTensor]]


def _transformer(folder: Path, size: Size, variant: Variant, make: Make) -> list[Part]:
    shapes = transformer_shapes(transformer_config(size, variant))
    path = folder / MODEL / "transformers" / "mp_rank_00_model_states.pt"
    return [Part("transformer", path, make("transformer", shapes, torch.bfloat16), wrapper="module")]


def _vae(folder: Path, size: Size, variant: Variant, make: Make) -> list[Part]:
    path = folder / MODEL / "vae" / "pytorch_model.pt"
    return [Part("vae", path, make("vae", vae_shapes(size.vae), torch.float16))]


def _llava(folder: Path, size: Size, variant: Variant, make: Make) -> list[Part]:
    """In shards of about equal size."""
    config = llava_json(size, dict.fromkeys(("begin", "end", "image", "pad"), 0))
    shapes = {_released(name): shape for name, shape in llava_shapes(config).items()}
    shapes["language_model.lm_head.weight"] = shapes["language_model.model.embed_tokens.weight"]
    tensors = make("text_encoder", shapes, torch.float16)
    total, done = sum(tensor.bytes for tensor in tensors.values()), 0
    shards: list[dict[str, LazyTensor]] = [{} for _ in range(size.llava_shards)]
    for name, tensor in tensors.items():
        shards[done * size.llava_shards // total][name] = tensor
        done += tensor.bytes
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    return [
        Part("text_encoder", folder / "text_encoder_i2v" / name, shard)
        for name, shard in zip(names, shards, strict=True)
    ]


def _released(name: str) -> str:
    """A name of `text_encoder.safetensors` as it is published."""
    if name.startswith("model."):
        return f"language_model.{name}"
    return f"vision_tower.{name}" if name.startswith("vision_model.") else name


def _clip(folder: Path, size: Size, variant: Variant, make: Make) -> list[Part]:
    """The text side, with the tensors beside it that are not needed."""
    shapes = clip_shapes(size.clip)
    width = size.clip["hidden_size"]
    shapes |= {"text_projection.weight": (size.clip["projection_dim"], width), "logit_scale": ()}
    tensors = make("text_encoder_2", shapes, torch.float32)
    positions = LazyTensor((1, 77), torch.int64, lambda: torch.arange(77)[None])
    tensors["text_model.embeddings.position_ids"] = positions
    return [Part("text_encoder_2", folder / "text_encoder_2" / "model.safetensors", tensors)]


PARTS: dict[str, Callable[[Path, Size, Variant, Make], list[Part]]] = {
    "transformer": _transformer,
    "text_encoder": _llava,
    "text_encoder_2": _clip,
    "vae": _vae,
}


def _llava_files(folder: Path, size: Size) -> None:
    _write_json(folder / "config.json", llava_json(size, write_llava_tokenizer(folder)))


def _clip_files(folder: Path, size: Size) -> None:
    write_clip_tokenizer(folder)
    _write_json(folder / "config.json", clip_json(size))


def _vae_files(folder: Path, size: Size) -> None:
    _write_json(folder / "config.json", size.vae.to_official())


CONFIGS: dict[str, Callable[[Path, Size], None]] = {
    "transformer": lambda folder, size: None,
    "text_encoder": _llava_files,
    "text_encoder_2": _clip_files,
    "vae": _vae_files,
}


def _write_index(shards: list[Part]) -> None:
    """The file that says which shard holds which tensor."""
    weight_map = {name: shard.path.name for shard in shards for name in shard.tensors}
    total = sum(shard.bytes for shard in shards)
    values = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(shards[0].path.parent / "model.safetensors.index.json", values)


def _write_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")


def _write(part: Part, advance: Callable[[int], None], listen: Listener) -> None:
    with replacing(part.path) as path:
        if part.path.suffix == ".safetensors":
            write_safetensors(path, part.tensors, {"format": "pt"}, advance)
        else:
            if part.bytes > LARGE:
                listen(Notice(f"{part.path.name} is built in memory first: {part.bytes / 1e9:.1f} GB of RAM"))
            state = _read_all(part, advance)
            torch.save({part.wrapper: state} if part.wrapper else state, path)


def _read_all(part: Part, advance: Callable[[int], None]) -> dict[str, Tensor]:
    state, done = {}, 0
    for name, tensor in part.tensors.items():
        state[name] = tensor.read()
        done += tensor.bytes
        advance(done)
    return state
