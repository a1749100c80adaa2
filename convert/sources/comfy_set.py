"""ComfyUI's models folder: the pieces of the image-to-video model found among whatever else lies there.

    diffusion_models/ or unet/     the transformer
    text_encoders/ or clip/        llava_llama3_*.safetensors (or GGUF) and clip_l.safetensors
    clip_vision/                   llava_llama3_vision.safetensors
    vae/                           hunyuan_video_vae_bf16.safetensors

Tokenizers are taken from ComfyUI's own program folder if `models` is inside it.

Invariants: files are told apart by their headers, never by their names; where several fit, the user chooses; a file
that cannot be read matters only if nothing else fits. Left out: pickles among them, which no guide puts there, and
other folders that extra_model_paths.yaml names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from lowvram_i2v.convert.shapes import Shapes
from lowvram_i2v.convert.sources import ComponentSource, Hints
from lowvram_i2v.convert.sources.clip import detect_clip
from lowvram_i2v.convert.sources.component_files import Match, folder_of, open_weights
from lowvram_i2v.convert.sources.containers import Container, open_container
from lowvram_i2v.convert.sources.pieces import FLAGS, Pieces, open_pieces
from lowvram_i2v.convert.sources.text_encoder import detect_text_encoder
from lowvram_i2v.convert.sources.tokenizer_files import FILES, comfy_tokenizer, tokenizer_files
from lowvram_i2v.convert.sources.transformer import detect_transformer, find_variant
from lowvram_i2v.convert.sources.vae import detect_vae
from lowvram_i2v.errors import CheckpointError

EXPECTED = "Or give ComfyUI's models folder, which contains diffusion_models/, text_encoders/, clip_vision/ and vae/."
SUFFIXES = (".safetensors", ".sft", ".gguf")
KINDS = ", ".join(SUFFIXES)
FOLDERS = {
    "transformer": ("diffusion_models", "unet"),
    "text_encoder": ("text_encoders", "clip"),
    "vision": ("clip_vision", "text_encoders", "clip"),
    "text_encoder_2": ("text_encoders", "clip"),
    "vae": ("vae",),
}
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
WANTED = {
    "transformer": "the transformer of HunyuanVideo-I2V",
    "text_encoder": "LLaVA's language model (llava_llama3_fp8_scaled.safetensors or another)",
    "vision": "LLaVA's vision tower (llava_llama3_vision.safetensors)",
    "text_encoder_2": "CLIP-L (clip_l.safetensors)",
    "vae": "the VAE of HunyuanVideo (hunyuan_video_vae_bf16.safetensors)",
}


@dataclass(frozen=True)
class Candidate:
    """A file whose header was read. bytes: of the file."""

    path: Path
    match: Match
    bytes: int


def matches(folder: Path) -> bool:
    """Whether a folder looks like ComfyUI's. A diffusers repository has `vae/` too, but none of these."""
    return any((folder / name).is_dir() for name in ("diffusion_models", "text_encoders", "clip_vision", "unet"))


def open_components(folder: Path, components: tuple[str, ...], hints: Hints) -> dict[str, ComponentSource]:
    return open_comfy(folder, components, Pieces(tokenizer=hints.tokenizer), hints)


def open_comfy(
    models: Path, components: Iterable[str], given: Pieces | None = None, hints: Hints | None = None
) -> dict[str, ComponentSource]:
    """Finds and opens the components asked for.

    given: pieces that the user has named; they are not looked for. Raises one CheckpointError with all that is
    missing or that the user must choose.
    """
    components = tuple(components)
    pieces, faults = find_pieces(models, components, given or Pieces())
    return open_pieces(pieces, components, hints, faults)


def find_pieces(models: Path, components: tuple[str, ...], given: Pieces) -> tuple[Pieces, list[str]]:
    """The pieces, and one line for each that is missing or cannot be chosen."""
    found: dict[str, Path] = {}
    faults: list[str] = []
    for name in components:
        if given.of(name) is None:
            found, faults = _with(found, faults, name, *_choose(models, name))
    language = given.text_encoder or found.get("text_encoder")
    if "text_encoder" in components and given.vision is None and language and _lacks_vision(language):
        found, faults = _with(found, faults, "vision", *_choose(models, "vision"))
    for component, name in TOKENIZERS.items():
        path, folder = given.of(component) or found.get(component), comfy_tokenizer(models, component)
        if path and folder and given.of(name) is None and not tokenizer_files(folder_of(path), FILES[component]):
            found[name] = folder
    return replace(given, **found), faults


def _with(
    found: dict[str, Path], faults: list[str], name: str, path: Path | None, fault: str | None
) -> tuple[dict[str, Path], list[str]]:
    return found | ({name: path} if path else {}), faults + ([fault] if fault else [])


def _lacks_vision(path: Path) -> bool:
    try:
        match = detect_text_encoder(_shapes(container := open_weights(path)), container.metadata)
    except CheckpointError:
        return False  # opening it says why
    return match is not None and "vision tower" in match.lacks


def _choose(models: Path, name: str) -> tuple[Path | None, str | None]:
    """The one file that fits, or why there is none."""
    usable, others = [], []
    files = _files(models, FOLDERS[name])
    for path in files:
        try:
            container = open_container(path)
            match = DETECTORS[name](container)
        except CheckpointError as error:
            others.append(error.what)
            continue
        if match is not None and match.refusal is not None:
            others.append(f"{_relative(path, models)} is {match.refusal}")
        elif match is not None:
            usable.append(Candidate(path, match, container.bytes))
    if len(usable) == 1:
        return usable[0].path, None
    if usable:
        lines = [f"{_relative(c.path, models)} ({c.bytes / 1e9:.2f} GB, {c.match.layout})" for c in usable]
        return None, f"{name}: {len(usable)} files fit; choose one with {FLAGS[name]} FILE:" + _lines(lines)
    places = " and ".join(f"{folder}/" for folder in FOLDERS[name])
    absent = f"{WANTED[name]} is not among the {len(files)} files in {places} ({KINDS})"
    return None, f"{name}: {absent}" + _lines(others[:5])


def _lines(texts: list[str]) -> str:
    return "".join(f"\n      {text}" for text in texts)


def _files(models: Path, folders: tuple[str, ...]) -> list[Path]:
    """In folders inside these, too, and in linked ones; ComfyUI lists them as well. Each folder is seen once, whatever
    links lead to it."""
    found, seen = [], set()
    for place in folders:
        for folder, inside, names in os.walk(models / place, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:
                inside.clear()  # not entered again: links may lead round in circles
                continue
            seen.add(real)
            found += [Path(folder, name) for name in names if name.endswith(SUFFIXES)]
    return sorted(path for path in found if path.is_file())


def _relative(path: Path, models: Path) -> str:
    return str(path.relative_to(models))


def _shapes(container: Container) -> Shapes:
    return {name: tensor.shape for name, tensor in container.tensors.items()}


def _transformer(container: Container) -> Match | None:
    """Raises CheckpointError for one that calls itself text-to-video."""
    match = detect_transformer(_shapes(container), container.metadata)
    if match is not None and match.refusal is None:
        find_variant(container, match)
    return match


def _language(container: Container) -> Match | None:
    match = detect_text_encoder(_shapes(container), container.metadata)
    return None if match and "language model" in match.lacks else match


def _vision(container: Container) -> Match | None:
    """A vision tower alone; a whole LLaVA is its own."""
    match = detect_text_encoder(_shapes(container), container.metadata)
    return match if match and "language model" in match.lacks else None


DETECTORS: dict[str, Callable[[Container], Match | None]] = {
    "transformer": _transformer,
    "text_encoder": _language,
    "vision": _vision,
    "text_encoder_2": lambda container: detect_clip(_shapes(container), container.metadata),
    "vae": lambda container: detect_vae(_shapes(container), container.metadata),
}
