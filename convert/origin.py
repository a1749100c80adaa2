"""Where the weights come from: a folder, a file, or pieces named one by one; opened, understood, and compared with the
model.

Invariants: nothing is read but headers and small files; what is wrong with any component is reported before anything
else happens; a component that passes has exactly the tensors of the model, under our names, in 16 or 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from lowvram_i2v.checkpoint import COMPONENTS, mismatches, raise_listed
from lowvram_i2v.convert.detect import detect
from lowvram_i2v.convert.infer import infer_transformer, infer_variant
from lowvram_i2v.convert.policy import READABLE
from lowvram_i2v.convert.shapes import Shapes, clip_shapes, llava_shapes, transformer_shapes, vae_shapes
from lowvram_i2v.convert.sources import SOURCES, ComponentSource, Hints, open_source
from lowvram_i2v.convert.sources.comfy_set import open_comfy
from lowvram_i2v.convert.sources.containers import SUFFIXES
from lowvram_i2v.convert.sources.pieces import FLAGS, Pieces, open_pieces
from lowvram_i2v.errors import CheckpointError, RequestError
from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.variant import VARIANTS

COMFY = "lowvram_i2v.convert.sources.comfy_set"


@dataclass(frozen=True)
class Origin:
    """path: a folder in one of the layouts of SOURCES, or the folder or file of one component. pieces: win over what
    `path` holds."""

    path: Path | None = None
    pieces: Pieces = field(default_factory=Pieces)


@dataclass(frozen=True)
class Component:
    """One component, understood.

    config: as `model.json` records it. variant: the transformer's, else None.
    """

    name: str
    source: ComponentSource
    config: dict[str, Any]
    variant: str | None

    @property
    def shapes(self) -> Shapes:
        return {name: tensor.shape for name, tensor in self.source.tensors.items()}


def understand(origin: Origin, components: Iterable[str] | None = None, variant: str | None = None) -> list[Component]:
    """The components asked for, or without `components` all that the origin is to hold.

    variant: needed only where the weights leave it open. Raises RequestError or CheckpointError.
    """
    if variant is not None and variant not in VARIANTS:
        raise RequestError(f"there is no variant {variant!r}", f"Choose one of {', '.join(VARIANTS)}.")
    asked = None if components is None else tuple(components)
    if asked is not None and not (asked and set(asked) <= set(COMPONENTS)):
        raise RequestError(f"components {list(asked)} are not known", f"Choose from {', '.join(COMPONENTS)}.")
    opened = _open(origin, asked, Hints(variant=variant))
    understood = [_understood(name, source, variant) for name, source in opened.items()]
    faults = [f"{one.source.path.name} ({one.name}): {line}" for one in understood for line in _faults(one)]
    raise_listed("the source does not hold the tensors of this model", faults, "Download the weights again.")
    return understood


def _open(origin: Origin, asked: tuple[str, ...] | None, hints: Hints) -> dict[str, ComponentSource]:
    path, pieces = origin.path, origin.pieces
    if path is not None and not path.exists():
        raise CheckpointError(f"{path} does not exist", "Give the file or folder that holds the weights.")
    layout = layout_of(path) if path is not None and path.is_dir() else None
    if path is not None and layout is None:
        if path.is_dir() and not any(file.name.endswith(SUFFIXES) for file in path.iterdir()):
            open_source(path, ())  # says which layouts of folders there are
        pieces = _with_file(pieces, path, hints.variant)
    named = tuple(component for component in COMPONENTS if pieces.of(component) is not None)
    if path is None or layout is None:
        if not (asked or named):
            raise RequestError(
                "what is given is no component by itself",
                f"A vision tower and tokenizers complete a text encoder: name that with {FLAGS['text_encoder']}.",
            )
        return open_pieces(pieces, asked or named, hints)
    components = asked or COMPONENTS
    if layout == COMFY:
        return open_comfy(path, components, pieces, hints)
    given = open_pieces(pieces, [component for component in components if component in named], hints)
    rest = [component for component in components if component not in named]
    opened = given | (open_source(path, rest, hints) if rest else {})
    return {component: opened[component] for component in components}


def layout_of(folder: Path) -> str | None:
    """The module of SOURCES that reads a folder."""
    return next((module for module in SOURCES.values() if import_module(module).matches(folder)), None)


def _with_file(pieces: Pieces, path: Path, variant: str | None) -> Pieces:
    """`path`, which holds one component, becomes the piece that its content says it is."""
    found = detect(path, variant)
    if found.refusal is not None or found.component is None:
        raise CheckpointError(f"{path} cannot be converted: {found.refusal}", "See `lowvram-i2v inspect`.")
    piece = "vision" if found.layout == "LLaVA's vision tower" else found.component
    if pieces.of(piece) is not None:
        raise RequestError(f"{path} and {pieces.of(piece)} are both the {piece}", f"Leave one out ({FLAGS[piece]}).")
    return replace(pieces, **{piece: path})


def _understood(name: str, source: ComponentSource, variant: str | None) -> Component:
    if name == "transformer":
        config = infer_transformer({tensor: lazy.shape for tensor, lazy in source.tensors.items()})
        known = infer_variant(config, variant or source.variant, Path(source.path.name))
        return Component(name, source, config.to_dict(), known)
    if name == "vae":
        return Component(name, source, VaeConfig.from_official(source.config).to_dict(), None)
    return Component(name, source, source.config, None)


EXPECTED: dict[str, Callable[[Component], Shapes]] = {
    "transformer": lambda one: transformer_shapes(infer_transformer(one.shapes)),
    "vae": lambda one: vae_shapes(VaeConfig.from_dict(one.config)),
    "text_encoder": lambda one: llava_shapes(one.config),
    "text_encoder_2": lambda one: clip_shapes(one.config),
}


def _faults(one: Component) -> list[str]:
    """Every missing, wrong-shaped, unexpected or unreadable tensor."""
    return mismatches(one.shapes, EXPECTED[one.name](one)) + [
        f"stored as {tensor.dtype}: {name}; only float32, float16 and bfloat16 are read"
        for name, tensor in one.source.tensors.items()
        if tensor.dtype not in READABLE
    ]
