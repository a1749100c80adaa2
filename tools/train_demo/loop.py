"""The training loop that all stages share: optimizer, moving average, learning rate, checkpoints, log.

Invariants: what step s does depends on the state before it and on (seed, s) alone, never on how many runs it took to
get there: an interrupted training ends in the same bits (on one machine). The state is written whole or not at all. The
result of a stage is the moving average of its weights.

Two kinds of file: `STAGE.pt`, everything, 16 bytes a parameter; and `STAGE.part-N.pt`, the moving average in half
precision in parts of at most PART_BYTES, for a link that carries little. A run that finds only the parts goes on from
them with fresh optimizer moments.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tools.train_demo.clips import save
from tools.train_demo.sizes import Stage

PART_BYTES = 12 * 2**20
LARGEST_NORM = 1.0  # of the gradient
LOG_EVERY, SAVE_SECONDS = 50, 120.0
FALL = 0.25  # of the steps: while the learning rate falls

Losses = dict[str, Tensor]
"""Scalars; "loss" is what is minimized, the others are logged."""


@dataclass(frozen=True)
class Run:
    """What one command does. work: the folder of everything. minutes, stop_at: when to stop, by the clock and by the
    step. device: where to train."""

    work: Path
    seed: int
    minutes: float
    device: torch.device
    stop_at: int | None = None


class Training:
    """A model being trained. Makes or resumes the state in `run.work`."""

    def __init__(self, name: str, model: nn.Module, stage: Stage, run: Run) -> None:
        self.name, self.stage, self.run_ = name, stage, run
        run.work.mkdir(parents=True, exist_ok=True)
        self.model = model.to(run.device).train()
        self.step = 0
        self.ema = {key: value.detach().clone() for key, value in self.model.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self._resume()

    @property
    def done(self) -> bool:
        return self.step >= self.stage.steps

    def run(self, losses_of: Callable[[int], Losses]) -> None:
        """Steps until the stage is done or the time is up; then everything is on disk.

        losses_of: step number, from 0 -> the losses of that step, with a graph.
        """
        begin = saved = time.monotonic()
        end = begin + 60 * self.run_.minutes
        while not self.done and self.step != self.run_.stop_at and time.monotonic() < end:
            losses = losses_of(self.step)
            self._update(losses["loss"])
            if self.step % LOG_EVERY == 0 or self.done:
                self._log({key: float(value.detach()) for key, value in losses.items()}, time.monotonic() - begin)
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()
        self._save_parts()
        print(f"{self.name}: step {self.step} of {self.stage.steps}", flush=True)

    def _update(self, loss: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.stage, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_NORM)
        self.optimizer.step()
        self.step += 1
        decay = min(self.stage.decay, self.step / (self.step + 10))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.model.parameters()], 1 - decay)

    def save(self) -> None:
        """The whole state."""
        state = {"step": self.step, "model": self.model.state_dict(), "ema": self.ema}
        save(state | {"optimizer": self.optimizer.state_dict()}, self._path())

    def _save_parts(self) -> None:
        for number, part in enumerate(parts({key: value.half().cpu() for key, value in self.ema.items()})):
            save({"step": self.step, "ema": part}, self._path(f".part-{number}"))

    def _resume(self) -> None:
        if self._path().is_file():
            state = torch.load(self._path(), map_location=self.run_.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema, self.step = state["ema"], state["step"]
            self._forget_later_lines()
        elif pieces := sorted(self.run_.work.glob(f"{self.name}.part-*.pt")):
            loaded = [torch.load(path, map_location=self.run_.device, weights_only=True) for path in pieces]
            self.ema = {key: value.float() for part in loaded for key, value in part["ema"].items()}
            self.model.load_state_dict(self.ema, strict=False)
            self.step = loaded[0]["step"]
        if self.step:
            print(f"{self.name}: goes on at step {self.step}", flush=True)

    def _forget_later_lines(self) -> None:
        """Lines of the log that a killed run wrote after its last checkpoint."""
        path = self._log_path()
        if path.is_file():
            lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= self.step]
            path.write_text("".join(f"{line}\n" for line in lines))

    def _log(self, losses: dict[str, float], seconds: float) -> None:
        line = {"step": self.step, **{key: round(value, 6) for key, value in losses.items()}, "s": round(seconds, 1)}
        with self._log_path().open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(self.name, line, flush=True)

    def _path(self, suffix: str = "") -> Path:
        return self.run_.work / f"{self.name}{suffix}.pt"

    def _log_path(self) -> Path:
        return self.run_.work / f"{self.name}.jsonl"


def learning_rate(stage: Stage, step: int) -> float:
    """Of the step: a ramp, a plateau, and a fall to a fiftieth at the end."""
    left = (stage.steps - step) / max(1.0, FALL * stage.steps)
    return stage.learning_rate * min(1.0, (step + 1) / stage.warmup, max(0.02, left))


def averaged(work: Path, name: str) -> dict[str, Tensor]:
    """The result of a stage, float32 on the CPU: the moving average of its weights."""
    whole = work / f"{name}.pt"
    if whole.is_file():
        state = torch.load(whole, map_location="cpu", weights_only=True)
        return dict(state["ema"])
    pieces = sorted(work.glob(f"{name}.part-*.pt"))
    if not pieces:
        raise SystemExit(f"{work} has no {name}.pt: train that stage first")
    loaded = [torch.load(path, map_location="cpu", weights_only=True)["ema"] for path in pieces]
    return {key: value.float() for part in loaded for key, value in part.items()}


def parts(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors in groups of at most PART_BYTES each, in order."""
    part: dict[str, Tensor] = {}
    size = 0
    for key, value in tensors.items():
        if part and size + value.nbytes > PART_BYTES:
            yield part
            part, size = {}, 0
        part[key] = value
        size += value.nbytes
    yield part


def generators(run: Run, step: int) -> tuple[torch.Generator, torch.Generator]:
    """Random numbers of a step: on the CPU for choices, on the training device for tensors."""
    value = run.seed * 1_000_003 + step
    return torch.Generator().manual_seed(value), torch.Generator(run.device).manual_seed(value)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; on a CPU everything stays float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
