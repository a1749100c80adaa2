"""What the flow stage sees of a clip: scaled latents and prompt rows, made once and kept on disk.

Clips are rendered and encoded by MAKERS processes, each with renderers of its own, on the last GPU there is. In the
training process itself, their threads would take turns with the thread that launches the training's kernels, and the
transport of frames from other processes alone (2 MB a clip) is more than it can carry beside that.

Invariants: a chunk depends on its number and the encoders alone; the folder's name is the encoders' state, so no stale
latent is read; a file is whole or absent.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.util import Finalize
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.train_demo import text, vae
from tools.train_demo.batched import Prompts
from tools.train_demo.batched_vae import picture_latents, plain_way
from tools.train_demo.clips import Chunk, Clips, save
from tools.train_demo.loop import Run, averaged
from tools.train_demo.sizes import Recipe

MAKERS = 2
AHEAD = 4  # chunks being made
AT_ONCE = 16  # clips that are encoded
ROWS_STEP = 48  # padded prompts come in one length, so that a recorded or compiled step does too


@dataclass(frozen=True)
class Encoders:
    """The frozen results of the first two stages. nothing: the negative prompt."""

    vae: vae.Vae
    scaling_factor: float
    text: text.TextEncoders
    nothing: Prompts


def load_encoders(recipe: Recipe, run: Run) -> Encoders:
    """Raises SystemExit if a stage before this one has not been trained."""
    config = vae.trained_config(run.work)
    encoders = text.load(run)
    black = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    encoded = encoders.encode([""], black)
    nothing = Prompts(encoded.rows, encoded.lengths, encoded.pooled)
    return Encoders(vae.load(recipe.size.vae, run), config.scaling_factor, encoders, nothing)


@torch.no_grad()
def encode(chunk: Chunk, encoders: Encoders, run: Run) -> dict[str, Tensor]:
    """A chunk's scaled latents (half precision, CPU) and its prompts."""
    way = plain_way(run.device)
    latents = [
        picture_latents(encoders.vae, vae.as_floats(few.to(run.device)), way)
        for few in torch.split(chunk.frames, AT_ONCE)
    ]
    prompts = encoders.text.encode(chunk.prompts, chunk.frames[:, 0])
    longest = prompts.rows.shape[1]
    rows = F.pad(prompts.rows, (0, 0, 0, -longest % ROWS_STEP))
    return {
        "latents": (torch.cat(latents) * encoders.scaling_factor).half().cpu(),
        "rows": rows.cpu(),
        "lengths": prompts.lengths.cpu(),
        "pooled": prompts.pooled.cpu(),
    }


class Latents:
    """Encoded chunks by number. Use it in a `with`: leaving it stops the makers."""

    def __init__(self, recipe: Recipe, clips: Clips, run: Run, encoders: Encoders) -> None:
        self._clips, self._run, self._encoders = clips, run, encoders
        self._folder = latents_folder(run.work)
        self._pool: ProcessPoolExecutor | None = None
        self._pending: dict[int, Future[None]] = {}
        if clips.in_background:
            device = run.device
            if device.type == "cuda":
                device = torch.device("cuda", torch.cuda.device_count() - 1)
            share = clips.with_workers(max(1, clips.workers // MAKERS))
            begin = recipe, share, replace(run, device=device), self._folder
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(MAKERS, spawn, _begin, begin)

    def __enter__(self) -> Latents:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    @property
    def in_background(self) -> bool:
        """Whether other processes make them."""
        return self._pool is not None

    def kept(self, number: int) -> bool:
        """Whether a chunk is on disk."""
        return _file(self._folder, number).is_file()

    def ahead(self, number: int) -> None:
        """Begins with a chunk, and those after it, that will be wanted soon."""
        if self._pool is not None:
            for each in range(number, number + AHEAD):
                if each not in self._pending and not self.kept(each):
                    self._pending[each] = self._pool.submit(_make, each)

    def get(self, number: int) -> dict[str, Tensor]:
        """On the training device, as soon as it is made."""
        self.ahead(number)
        if number in self._pending:
            self._pending[number].result()
        elif not self.kept(number):
            save(encode(self._clips.get(number), self._encoders, self._run), _file(self._folder, number))
        tensors: dict[str, Tensor] = torch.load(_file(self._folder, number), weights_only=True)
        return {key: value.to(self._run.device) for key, value in tensors.items()}


def latents_folder(work: Path) -> Path:
    """Its name changes with the weights of VAE and text encoders, so that no stale latent is read."""
    digest = hashlib.sha256()
    for name in ("vae", "text"):
        for key, value in averaged(work, name).items():
            digest.update(key.encode() + value.contiguous().numpy().tobytes())
    folder = work / f"latents-{digest.hexdigest()[:12]}"
    folder.mkdir(exist_ok=True)
    return folder


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.pt"


@dataclass(frozen=True)
class _Maker:
    """What a maker process works with."""

    clips: Clips
    encoders: Encoders
    run: Run
    folder: Path


_makers: list[_Maker] = []  # of this process: one at most


def _begin(recipe: Recipe, clips: Clips, run: Run, folder: Path) -> None:
    if run.device.type == "cuda":
        torch.cuda.set_device(run.device)
    else:
        torch.set_num_threads(1)
    Finalize(clips, clips.__exit__, exitpriority=100)  # before queues to the renderers are closed, which is at 10
    _makers.append(_Maker(clips, load_encoders(recipe, run), run, folder))


def _make(number: int) -> None:
    maker = _makers[0]
    save(encode(maker.clips.get(number), maker.encoders, maker.run), _file(maker.folder, number))
