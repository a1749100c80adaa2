"""The components one by one, each from a path of its own: what the flags of `convert` name, or a layout has found.

Invariant: the faults of all components are reported at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from lowvram_i2v.checkpoint import raise_listed
from lowvram_i2v.convert.sources import ComponentSource, Hints, open_component
from lowvram_i2v.errors import CheckpointError

FLAGS = {
    "transformer": "--transformer",
    "text_encoder": "--text-encoder",
    "vision": "--vision",
    "text_encoder_2": "--text-encoder-2",
    "vae": "--vae",
    "tokenizer": "--tokenizer",
    "tokenizer_2": "--tokenizer-2",
}


@dataclass(frozen=True)
class Pieces:
    """Where each piece is, None where that is not known. A flag of `convert` each.

    vision: LLaVA's vision tower and projector, where `text_encoder` is the language model alone.
    tokenizer, tokenizer_2: folders with the files of the text encoders' tokenizers, where those come without.
    """

    transformer: Path | None = None
    text_encoder: Path | None = None
    vision: Path | None = None
    text_encoder_2: Path | None = None
    vae: Path | None = None
    tokenizer: Path | None = None
    tokenizer_2: Path | None = None

    def of(self, name: str) -> Path | None:
        path: Path | None = getattr(self, name)
        return path


def open_pieces(
    pieces: Pieces, components: Iterable[str], hints: Hints | None = None, faults: Iterable[str] = ()
) -> dict[str, ComponentSource]:
    """Opens the components asked for. faults: what the caller, who then knows of all missing pieces, has found.

    Raises one CheckpointError with these and with the faults of every component.
    """
    hints, listed = hints or Hints(), list(faults)
    found, explained = {}, bool(listed)
    for component in components:
        path = pieces.of(component)
        if path is None:
            if not explained:
                listed.append(f"{component}: not given; name it with {FLAGS[component]}")
            continue
        try:
            found[component] = _open(component, path, pieces, hints)
        except CheckpointError as error:
            listed.append(str(error).replace("\n", "\n    "))
    raise_listed("the pieces do not make a model", listed, "")
    return found


def _open(component: str, path: Path, pieces: Pieces, hints: Hints) -> ComponentSource:
    if component == "text_encoder":
        from lowvram_i2v.convert.sources.text_encoder import open_text_encoder

        if path.exists():  # else open_component says so
            return open_text_encoder(path, replace(hints, tokenizer=pieces.tokenizer or hints.tokenizer), pieces.vision)
    tokenizer = pieces.tokenizer_2 if component == "text_encoder_2" else None
    return open_component(path, component, replace(hints, tokenizer=tokenizer))
