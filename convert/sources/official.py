"""The tree that the model's own download instructions give.

    hunyuan-video-i2v-720p/transformers/mp_rank_00_model_states.pt     key "module"
    hunyuan-video-i2v-720p/vae/config.json, pytorch_model.pt
    text_encoder_i2v/      llava-llama-3-8b as Hugging Face publishes it, in shards or whole
    text_encoder_2/        clip-vit-large-patch14, whole or its text side

Tensor names of transformer and VAE are ours already; those of the two text encoders lose a prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lowvram_i2v.checkpoint import raise_listed
from lowvram_i2v.convert.sources import ComponentSource, Hints, open_component
from lowvram_i2v.convert.sources.containers import file_tensors, read_json, renamed, shards
from lowvram_i2v.convert.sources.encoder_configs import clip_text_config
from lowvram_i2v.convert.sources.tokenizer_files import require_small, template_ids

MODEL = "hunyuan-video-i2v-720p"
EXPECTED = (
    f"Give the folder that contains {MODEL}/, text_encoder_i2v/ and text_encoder_2/, as the model's download "
    "instructions leave it (usually called ckpts)."
)
WEIGHTS = (
    ("model.safetensors.index.json",),
    ("model.safetensors",),
    ("pytorch_model.bin.index.json",),
    ("pytorch_model.bin",),
)
Alternatives = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Place:
    """Where a component lies. Each of `weights` and `tokenizer` is a choice of file groups, the first
    present wins.

    optional: further tokenizer files, copied if there. rename: a released tensor name -> ours, None: not
    stored.
    """

    folder: str
    weights: Alternatives
    has_config: bool = True
    tokenizer: Alternatives = ()
    optional: tuple[str, ...] = ()
    rename: Callable[[str], str | None] = lambda name: name


def _llava_name(name: str) -> str | None:
    from lowvram_i2v.text.llava import official_llava_name

    return official_llava_name(name)


def _clip_name(name: str) -> str | None:
    from lowvram_i2v.text.clip import official_clip_name

    return official_clip_name(name)


def _vae_name(name: str) -> str | None:
    return name.removeprefix("vae.")


PLACES = {
    "transformer": Place(
        f"{MODEL}/transformers",
        (("mp_rank_00_model_states.pt",), ("pytorch_model_module.pt",), ("mp_rank_00_model_states_fp8.pt",)),
        has_config=False,
    ),
    "text_encoder": Place(
        "text_encoder_i2v",
        WEIGHTS,
        tokenizer=(("tokenizer.json",),),
        optional=("tokenizer_config.json", "special_tokens_map.json"),
        rename=_llava_name,
    ),
    "text_encoder_2": Place(
        "text_encoder_2",
        WEIGHTS,
        tokenizer=(("tokenizer.json",), ("vocab.json", "merges.txt")),
        optional=("tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
        rename=_clip_name,
    ),
    "vae": Place(f"{MODEL}/vae", (("pytorch_model.pt",),), rename=_vae_name),
}


def matches(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in (MODEL, "text_encoder_i2v", "text_encoder_2"))


def open_components(
    folder: Path, components: tuple[str, ...], hints: Hints | None = None
) -> dict[str, ComponentSource]:
    """Opens them all, or raises one CheckpointError that lists every missing file of every component asked
    for."""
    missing = [line for component in components for line in _missing(folder, PLACES[component])]
    raise_listed(f"{folder} is not complete", [f"missing: {line}" for line in missing], EXPECTED)
    return {component: _open(folder, component, hints or Hints()) for component in components}


def _present(folder: Path, alternatives: Alternatives) -> tuple[Path, ...] | None:
    """The first group of files that is all there."""
    for group in alternatives:
        paths = tuple(folder / name for name in group)
        if all(path.is_file() for path in paths):
            return paths
    return None


def _missing(root: Path, place: Place) -> list[str]:
    folder = root / place.folder
    lines = []
    for alternatives in (place.weights, (("config.json",),) if place.has_config else (), place.tokenizer):
        if alternatives and _present(folder, alternatives) is None:
            names = " or ".join(" and ".join(group) for group in alternatives)
            lines.append(f"{place.folder}/{names}")
    weights = _present(folder, place.weights)
    if weights and weights[0].name.endswith(".index.json"):
        lines += [f"{place.folder}/{path.name}" for path in shards(weights[0]) if not path.is_file()]
    return lines


def _open(root: Path, component: str, hints: Hints) -> ComponentSource:
    place = PLACES[component]
    folder = root / place.folder
    (weights,) = _present(folder, place.weights) or ()
    if component == "transformer":
        return open_component(weights, component, hints)
    files = shards(weights) if weights.name.endswith(".index.json") else (weights,)
    config = read_json(folder / "config.json") if place.has_config else {}
    tokenizer = [*(_present(folder, place.tokenizer) or ())]
    tokenizer += [
        folder / name for name in place.optional if (folder / name).is_file() and folder / name not in tokenizer
    ]
    require_small(tokenizer)
    if component == "text_encoder":
        template_ids(tuple(tokenizer), folder)
    return ComponentSource(
        path=weights,
        bytes=sum(path.stat().st_size for path in files),
        tensors=renamed(file_tensors(weights), place.rename, weights, EXPECTED),
        config=clip_text_config(config) if component == "text_encoder_2" else config,
        tokenizer=tuple(tokenizer),
    )
