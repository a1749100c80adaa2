"""The training loop that all stages share: optimizer, moving average, learning rate, checkpoints, log.

Invariants: what step s sees depends on the state before it and on (seed, s) alone, never on how many runs it took to
get there: an interrupted training ends in the same bits on a CPU (a GPU adds up some gradients in any order). The state
is written whole or not at all, and never with numbers that are not finite. The result of a stage is the moving average
of its weights. A run ends within its minutes, everything included.

The learning rate follows the stage's progress from 0 to 1: its share of the steps. A run that finishes the stage by the
clock (`Run.finish`) goes from the progress that it finds to 1 in the time that it has, however many steps that makes.

Two kinds of file: `STAGE.pt`, everything, 12 to 16 bytes a parameter; and `STAGE.part-N.pt`, the moving average in half
precision in parts of at most PART_BYTES, for a link that carries little. A run that finds only the parts goes on from
them with fresh optimizer moments.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tools.train_demo.clips import save
from tools.train_demo.optimizer import optimizers
from tools.train_demo.sizes import Stage

PART_BYTES = 12 * 2**20
LARGEST_NORM = 1.0  # of the gradient
LOG_SECONDS, SAVE_SECONDS, EXAMINE_SECONDS = 10.0, 45.0, 60.0
CLOSING = 0.03  # of a run's time, for what comes after its last step
FALL = 0.4  # of the progress: while the learning rate falls
AGAIN = 100  # steps of a new ramp where the optimizer's moments are new

Losses = dict[str, Tensor]
"""Scalars; "loss" is what is minimized, the others are logged."""


@dataclass(frozen=True)
class Run:
    """What one command does. work: the folder of everything. minutes, stop_at: when to stop, by the clock and by the
    step. device: where to train. finish: whether the stage ends with this run. rewind: the progress to go back to at
    most, for a stage that is to be trained longer than was thought. begin: when it began."""

    work: Path
    seed: int
    minutes: float
    device: torch.device
    stop_at: int | None = None
    finish: bool = False
    rewind: float = 1.0
    begin: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.begin

    @property
    def last_step(self) -> float:
        """Seconds after the beginning when steps end."""
        return 60 * self.minutes * (1 - CLOSING)


class Training:
    """A model being trained: its parameters that take gradients. Makes or resumes the state in `run.work`."""

    def __init__(self, name: str, model: nn.Module, stage: Stage, run: Run) -> None:
        self.name, self.stage, self.run_ = name, stage, run
        run.work.mkdir(parents=True, exist_ok=True)
        self.model = model.to(run.device).train()
        self.step, self.progress, self.by_clock = 0, 0.0, run.finish
        trained = {key: value for key, value in self.model.named_parameters() if value.requires_grad}
        self.weights: list[Tensor] = list(trained.values())
        self.ema = {key: value.detach().clone() for key, value in trained.items()}
        self.optimizers = optimizers(trained, stage.learning_rate, stage.muon)
        self._ramp_from = -AGAIN
        self._resume()

    @property
    def done(self) -> bool:
        return self.progress >= 1

    @property
    def over(self) -> bool:
        """Whether this run has no more steps to do."""
        stop = self.run_.stop_at is not None and self.step >= self.run_.stop_at
        return self.done or stop or self.run_.seconds >= self.run_.last_step

    def run(self, losses_of: Callable[[int], Losses], examine: Callable[[], dict[str, float]] | None = None) -> None:
        """Steps until the stage is done or the time is up; then everything is on disk.

        losses_of: step number, from 0 -> the losses of that step, with a graph. examine: measures the model, which
        then has the averaged weights; its numbers are logged now and then and at the end.
        """
        begin, found, start = self.run_.seconds, self.progress, self.step
        logged = saved = examined = begin
        losses: Losses = {}
        while not self.over:
            losses = losses_of(self.step)
            self._update(losses["loss"])
            now = self.run_.seconds
            self.progress = self._progressed(found, begin, now)
            if now - logged > LOG_SECONDS or self.step == start + 1:
                line = self._numbers(losses, start, begin)
                if examine is not None and now - examined > EXAMINE_SECONDS:
                    line |= self._examined(examine)
                    examined = self.run_.seconds
                self._log(line)
                logged = self.run_.seconds
            if now - saved > SAVE_SECONDS:
                self.save()
                saved = self.run_.seconds
        if self.step > start:
            self.progress = self._progressed(found, begin, self.run_.seconds)
            self.save()
            self._save_parts()
            self._log(self._numbers(losses, start, begin) | self._examined(examine))
        state = "done" if self.done else f"{100 * self.progress:.0f} % of the stage"
        print(f"{self.name}: step {self.step}, {state}, {self.run_.seconds:.0f} s", flush=True)

    def _progressed(self, found: float, begin: float, now: float) -> float:
        """The share of the stage behind us."""
        if not self.run_.finish:
            return self.step / self.stage.steps if not self.by_clock else found
        return found + (1 - found) * min(1.0, (now - begin) / max(1e-9, self.run_.last_step - begin))

    def _update(self, loss: Tensor) -> None:
        rate = learning_rate(self.stage, self.step, self.progress)
        rate *= min(1.0, (self.step - self._ramp_from + 1) / AGAIN)
        self.forget_gradients()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.weights, LARGEST_NORM)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.step += 1
        decay = min(self.stage.decay, self.step / (self.step + 10))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.weights], 1 - decay)

    def forget_gradients(self) -> None:
        for weight in self.weights:
            weight.grad = None

    def _numbers(self, losses: Losses, start: int, begin: float) -> dict[str, float]:
        """What a line of the log says; waits for the GPU. Raises SystemExit if the loss is no number any more."""
        values = {key: float(value.detach()) for key, value in losses.items()}
        if not math.isfinite(values["loss"]):
            raise SystemExit(f"{self.name}: the loss of step {self.step} is {values['loss']}; the last state is kept")
        speed = (self.step - start) / max(1e-9, self.run_.seconds - begin)
        line = {"step": self.step, **values, "lr": self.optimizers[0].param_groups[0]["lr"], "steps/s": speed}
        if self.run_.device.type == "cuda":
            line["GiB"] = torch.cuda.max_memory_allocated(self.run_.device) / 2**30
        return line

    def _examined(self, examine: Callable[[], dict[str, float]] | None) -> dict[str, float]:
        if examine is None:
            return {}
        with self.averaged_weights(), torch.no_grad():
            self.model.eval()
            numbers = examine()
            self.model.train()
        return numbers

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model with the moving average as its weights."""
        own = [p.detach().clone() for p in self.weights]
        with torch.no_grad():
            torch._foreach_copy_(self.weights, list(self.ema.values()))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, own)

    def save(self) -> None:
        """The whole state. Raises SystemExit, and keeps the last state, if it is not finite."""
        if not all(bool(torch.isfinite(value).all()) for value in self.ema.values()):
            raise SystemExit(f"{self.name}: weights that are no numbers at step {self.step}; the last state is kept")
        moments = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"model": self.model.state_dict(), "ema": self.ema, "optimizers": moments}
        save(self._place() | state, self._path())

    def _save_parts(self) -> None:
        for number, part in enumerate(parts({key: value.half().cpu() for key, value in self.ema.items()})):
            save(self._place() | {"ema": part}, self._path(f".part-{number}"))

    def _place(self) -> dict[str, float]:
        return {"step": self.step, "progress": self.progress, "by_clock": self.by_clock}

    def _resume(self) -> None:
        if self._path().is_file():
            state = torch.load(self._path(), map_location=self.run_.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimizer, moments in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(moments)
            self.ema = state["ema"]
            self._go_on(state)
            self._forget_later_lines()
        elif pieces := sorted(self.run_.work.glob(f"{self.name}.part-*.pt")):
            loaded = [torch.load(path, map_location=self.run_.device, weights_only=True) for path in pieces]
            self.ema = {key: value.float() for part in loaded for key, value in part["ema"].items()}
            self.model.load_state_dict(self.ema, strict=False)
            self._go_on(loaded[0])
            self._ramp_from = self.step
        if self.step:
            print(f"{self.name}: goes on at step {self.step}, {100 * self.progress:.0f} % of the stage", flush=True)

    def _go_on(self, state: dict[str, Any]) -> None:
        """Where progress was counted in steps, it is again, with what the recipe now says."""
        self.step = state["step"]
        progress = state["progress"] if state["by_clock"] else self.step / self.stage.steps
        self.progress = min(progress, self.run_.rewind)
        self.by_clock |= state["by_clock"]

    def _forget_later_lines(self) -> None:
        """Lines of the log that a killed run wrote after its last checkpoint."""
        path = self._log_path()
        if path.is_file():
            lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= self.step]
            path.write_text("".join(f"{line}\n" for line in lines))

    def _log(self, numbers: dict[str, float]) -> None:
        line = {key: value if isinstance(value, int) else float(f"{value:.5g}") for key, value in numbers.items()}
        line["s"] = round(self.run_.seconds, 1)
        with self._log_path().open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(self.name, " ".join(f"{key} {value}" for key, value in line.items()), flush=True)

    def _path(self, suffix: str = "") -> Path:
        return self.run_.work / f"{self.name}{suffix}.pt"

    def _log_path(self) -> Path:
        return self.run_.work / f"{self.name}.jsonl"


def learning_rate(stage: Stage, step: int, progress: float) -> float:
    """Of the step: a ramp, a plateau, and a fall to a fiftieth at the end."""
    return stage.learning_rate * min(1.0, (step + 1) / stage.warmup, max(0.02, (1 - progress) / FALL))


def is_trained(work: Path, name: str) -> bool:
    """Whether a stage has left a result, finished or not."""
    return (work / f"{name}.pt").is_file() or any(work.glob(f"{name}.part-*.pt"))


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
