"""Encoded prompts and first frames on disk, so that a new seed does not load the encoders again.

An entry is a safetensors file named by the sha256 of everything that decides its content: the encoders' weights and
configuration, the tokenizers' files, the text, the picture's pixels, the dtype that is computed in. There is nothing
to invalidate: what changes has another name.

Invariants: what comes out has the bits that went in, or nothing comes out. The cache makes a run shorter and never
fails it: a damaged entry counts as missing and is written again, a folder that cannot be written to is a notice.
Files appear whole (temporary file, fsync, rename), so that runs may share a folder. Only files with names of this form
are ever removed, whatever folder the user names.

Left out: the card. Two cards round differently in the last bits, and so would their entries.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from torch import Tensor

from lowvram_i2v.checkpoint import ModelFolder
from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.events import Listener, Notice, ignore
from lowvram_i2v.safetensors_file import open_safetensors
from lowvram_i2v.text.embeds import PromptEmbeds
from lowvram_i2v.whole_file import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER_VARIABLE = "LOWVRAM_I2V_CACHE"
LIMIT = 512 * 2**20
"""Bytes of all entries. An encoded prompt of the released model takes up to 9 MB, a 720p first frame 0.9 MB."""

VERSION = "1"
"""Part of every key. Another number where an encoder's arithmetic changes: old entries then are no more found."""

_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_PART = re.compile(r"\.lowvram-i2v-\d+-[0-9a-f]+\.safetensors")  # what `replacing` writes to
_PART_SECONDS = 3600  # after which such a file is one that a killed run left behind
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")


def default_folder(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path | None:
    """$LOWVRAM_I2V_CACHE, or `lowvram-i2v` in the user's cache folder; None where the system knows no such folder."""
    if named := environment.get(FOLDER_VARIABLE):
        return Path(named)
    if platform == "win32":
        local = environment.get("LOCALAPPDATA")
        return Path(local) / "lowvram-i2v" / "cache" if local else None
    xdg = environment.get("XDG_CACHE_HOME", "")
    if Path(xdg).is_absolute():
        return Path(xdg) / "lowvram-i2v"
    home = environment.get("HOME")
    return Path(home) / ".cache" / "lowvram-i2v" if home else None


def prompt_key(model: ModelFolder, prompt: str, picture: Image, dtype: torch.dtype) -> str:
    """Key of one prompt, or negative prompt, with the whole picture that goes with it. dtype: what is computed in."""
    return _digest(
        "prompt",
        *(_weights(model, component) for component in ("text_encoder", "text_encoder_2")),
        *(_files(folder, _TOKENIZER_FILES) for folder in (model.tokenizer, model.tokenizer_2)),
        prompt,
        *_pixels(picture),
        str(model.header.variant.image_row_stride),
        str(dtype),
    )


def latent_key(model: ModelFolder, first_frame: Image, dtype: torch.dtype) -> str:
    """Key of the latent of a first frame, as scaled and cropped to the video's size."""
    return _digest("image latent", _weights(model, "vae"), *_pixels(first_frame), str(dtype))


class EmbedCache:
    """Tensors by key, in the files of one folder."""

    def __init__(self, folder: Path | None, listen: Listener = ignore, limit: int = LIMIT) -> None:
        """folder: None for a cache that stays empty; made when something is stored. limit: bytes of all entries; the
        ones that were not used for longest make room."""
        self._folder, self._listen, self._limit = folder, listen, limit

    def prompt_embeds(self, key: str) -> PromptEmbeds | None:
        found = self.load(key)
        return None if found is None else PromptEmbeds(**found)

    def keep_prompt_embeds(self, key: str, embeds: PromptEmbeds) -> None:
        self.store(key, vars(embeds))

    def latent(self, key: str) -> Tensor | None:
        return (self.load(key) or {}).get("latent")

    def keep_latent(self, key: str, latent: Tensor) -> None:
        self.store(key, {"latent": latent})

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The tensors stored under a key, on the CPU; None if there are none or they are damaged."""
        if self._folder is None:
            return None
        path = self._folder / f"{key}.safetensors"
        try:
            if not path.is_file():
                return None
            file = open_safetensors(path)
            tensors = {name: file.read(name) for name in file.entries}
        except (CheckpointError, OSError):
            return None
        if file.metadata.get("checksum") != _checksum(tensors):
            return None
        with suppress(OSError):  # a folder that may only be read
            os.utime(path)
        return tensors

    def store(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps a copy of the tensors. Where that fails there is a notice, and from then on nothing is stored."""
        if self._folder is None:
            return
        values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        data = save(values, {"checksum": _checksum(values)})
        if len(data) > self._limit:
            return
        path = self._folder / f"{key}.safetensors"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _make_room(self._folder, self._limit - len(data), path.name)
            with replacing(path) as part:
                part.write_bytes(data)
        except OSError as error:
            self._listen(
                Notice(f"encoded prompts and pictures are not kept for the next run: {self._folder}: {error}.")
            )
            self._folder = None


def _make_room(folder: Path, limit: int, replaced: str) -> None:
    """Removes entries, oldest use first, until the others than `replaced` have `limit` bytes at most, and what killed
    runs left behind."""
    entries, now = [], time.time()
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another run was faster
            if _PART.fullmatch(path.name) and now - path.stat().st_mtime > _PART_SECONDS:
                path.unlink()
            elif _ENTRY.fullmatch(path.name) and path.name != replaced:
                entries.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes. Names have no order: the file has its own."""
    parts: list[str | bytes] = []
    for name, tensor in sorted(tensors.items()):
        parts += [name, str(tensor.dtype), str(tuple(tensor.shape))]
        parts.append(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return _digest(*parts)


def _digest(*parts: str | bytes) -> str:
    """sha256 over parts, each with its length before it, so that no two lists of parts are the same bytes."""
    digest = hashlib.sha256()
    for part in (VERSION, *parts):
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _weights(model: ModelFolder, component: str) -> str:
    """What tells a component from all others: its configuration, and the checksum of each tensor as `convert` wrote
    it down. A folder of version 0.1 has none: there the file's length and time of change stand for it."""
    record, file = model.header.records[component], model.files[component]
    if file.entries.keys() <= record.checksums.keys():
        content: object = sorted((name, record.checksums[name]) for name in file.entries)
    else:
        about = file.path.stat()
        content = (about.st_size, about.st_mtime_ns)
    return _digest(json.dumps(record.config, sort_keys=True), json.dumps(content))


def _files(folder: Path, names: Iterable[str]) -> str:
    """The files of these names that a folder has."""
    parts: list[str | bytes] = []
    for name in names:
        if (folder / name).is_file():
            parts += [name, (folder / name).read_bytes()]
    return _digest(*parts)


def _pixels(picture: Image) -> tuple[str, bytes]:
    return f"{picture.width}x{picture.height}", picture.convert("RGB").tobytes()
