"""The tokenizer of a text encoder, from wherever its weights' layout leaves it.

- files beside the weights, or in a folder that the user names;
- the whole tokenizer.json as a tensor of bytes (ComfyUI's fp8 text encoder);
- the vocabulary among a GGUF file's key-values, from which a tokenizer.json is made;
- ComfyUI's own program folder, beside its `models` folder.

Invariant: LLaVA's tokenizer is opened far enough to know that it has every mark of the video template and an id for
the picture; Llama 3's own has not, and would fail only when a video is made. Left out: SentencePiece models, which
no released file of these two encoders uses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram_i2v.checkpoint import raise_listed
from lowvram_i2v.convert.sources import SmallFile
from lowvram_i2v.convert.sources.containers import LARGEST_JSON
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.text.template import MARKS

PAD = "<pad>"
OPTIONAL = ("tokenizer_config.json", "special_tokens_map.json")
LLAVA_FILES = (("tokenizer.json",),)
CLIP_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
TOKENIZER_NAMES = frozenset((*OPTIONAL, *(name for group in CLIP_FILES for name in group)))
"""All files that a tokenizer is read from."""
FILES = {"text_encoder": LLAVA_FILES, "text_encoder_2": CLIP_FILES}
COMFY_FOLDERS = {  # from the folder that holds `models`
    "text_encoder": "comfy/text_encoders/llama_tokenizer",
    "text_encoder_2": "comfy/sd1_tokenizer",
}
NEEDED = {
    "text_encoder": "tokenizer.json of xtuner/llava-llama-3-8b-v1_1-transformers; give its folder with --tokenizer",
    "text_encoder_2": "tokenizer.json, or vocab.json and merges.txt, of openai/clip-vit-large-patch14; give its "
    "folder with --tokenizer-2",
}
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLITS = ("llama-bpe", "llama3", "default", None)  # older files name none
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # token types of GGUF


@dataclass(frozen=True)
class HeldFile:
    """A file that lies inside another one, or was made from it."""

    name: str
    data: bytes

    def read_bytes(self) -> bytes:
        return self.data


def tokenizer_files(folder: Path, alternatives: tuple[tuple[str, ...], ...]) -> tuple[Path, ...]:
    """The first group of files that `folder` has all of, with the optional ones; none if it has no group.

    folder: may also be one of the files.
    """
    folder = folder.parent if folder.is_file() else folder
    for group in alternatives:
        files = [folder / name for name in group]
        if all(file.is_file() for file in files):
            files += [folder / name for name in OPTIONAL if (folder / name).is_file()]
            require_small(files)
            return tuple(files)
    return ()


def require_small(files: Iterable[Path]) -> None:
    """Raises CheckpointError for a file that is too large to be a tokenizer's."""
    large = [f"{file}: {size} bytes" for file in files if (size := file.stat().st_size) > LARGEST_JSON]
    raise_listed("files too large for a tokenizer's", large, f"At most {LARGEST_JSON} bytes are read.")


def template_ids(files: tuple[SmallFile, ...], source: Path) -> dict[str, int]:
    """Ids of the template's marks and, if there is one, of the padding token.

    Raises CheckpointError if tokenizer.json is damaged or lacks a mark.
    """
    (data,) = (file.read_bytes() for file in files if file.name == "tokenizer.json")
    try:
        values = json.loads(data)
        ids: dict[str, Any] = dict(values["model"]["vocab"])
        ids |= {token["content"]: token["id"] for token in values["added_tokens"]}
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{source}: the tokenizer is damaged ({error!r:.100})", "Fetch it again.") from error
    found = {mark: ids[mark] for mark in (*MARKS, PAD) if type(ids.get(mark)) is int}
    if missing := [mark for mark in MARKS if mark not in found]:
        raise CheckpointError(
            f"{source}: the tokenizer has no token {', '.join(missing)}; it is not LLaVA's",
            f"Take {NEEDED['text_encoder']}.",
        )
    return found


def gguf_tokenizer(metadata: Mapping[str, Any], source: Path) -> HeldFile | None:
    """A tokenizer.json with the vocabulary of a GGUF file; None if the file has none.

    Raises CheckpointError if it is not of Llama 3's kind.
    """
    tokens, merges = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges"))
    if tokens is None:
        return None
    model, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    whole = _strings(tokens) and _strings(merges)
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens) if whole else None)
    if model != "gpt2" or split not in LLAMA3_SPLITS or not whole or not _fits(types, tokens):
        raise CheckpointError(
            f"{source}: its vocabulary ({model!r:.40}, {split!r:.40}) is not Llama 3's",
            f"Take {NEEDED['text_encoder']}.",
        )
    vocabulary = {token: number for number, token in enumerate(tokens) if types[number] != UNUSED}
    special = [token for token, number in vocabulary.items() if types[number] in (CONTROL, USER_DEFINED)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    split_words = {"type": "Split", "pattern": {"Regex": LLAMA3_WORDS}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocabulary[token], "content": token, **flags, "special": True} for token in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split_words, byte_level]},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocabulary, "merges": merges},
    }
    return HeldFile("tokenizer.json", json.dumps(values, ensure_ascii=False).encode())


def _strings(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(type(value) is str for value in values)


def _fits(types: Any, tokens: list[str]) -> bool:
    return isinstance(types, list) and len(types) == len(tokens)


def comfy_tokenizer(models: Path, component: str) -> Path | None:
    """The tokenizer that ComfyUI brings along, where `models` is inside its folder."""
    folder = models.resolve().parent / COMFY_FOLDERS[component]
    return folder if tokenizer_files(folder, FILES[component]) else None
