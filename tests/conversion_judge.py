"""How the program takes weights, said by another process: a crash, a hang or a large allocation is that one's.

Weights go through `inspect` and `convert`, and a model folder through `open_model` and `verify` too, in a process that
may take 2 GiB more than it has after it was warmed up.

This file is also the program of those processes. For each folder that it reads a line of, it forks, so that all begin
alike and imports are done once; the copy reads JSON requests there, and answers each with what is wrong ("" if nothing
is).
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open

from lowvram_i2v.checkpoint import component_file, open_model, read_records
from lowvram_i2v.convert.convert import convert
from lowvram_i2v.convert.inspect import inspect
from lowvram_i2v.convert.origin import EXPECTED, Component, Origin
from lowvram_i2v.convert.shapes import transformer_shapes
from lowvram_i2v.convert.sources import ComponentSource
from lowvram_i2v.convert.sources.pieces import Pieces
from lowvram_i2v.convert.verify import verify
from lowvram_i2v.convert.writer import PART
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.errors import LowVramError
from lowvram_i2v.kernels.scheme import SCHEMES, is_marker

SECONDS, MEMORY = 10.0, 2 * 2**30
REQUESTS, ANSWERS = "requests", "answers"
SCALES = tuple(f".{part}" for scheme in SCHEMES.values() for part in scheme.parts(2, 64) if part != "weight")


@dataclass(frozen=True)
class Subject:
    """Weights of one layout. sources: paths below `folder` that can be converted, each with the same weights, "" for
    the folder itself. damaged: files that mutations change. vision: the other piece of a text encoder."""

    component: str
    folder: Path
    sources: tuple[str, ...]
    damaged: tuple[str, ...]
    vision: Path | None = None


# ------------------------------------------------------------------------------------------------------ who is asked


def judge(request: dict[str, Any]) -> str:
    """What is wrong with how one mutation is taken; "" if nothing is."""
    source, destination, component = Path(request["source"]), Path(request["destination"]), request["component"]
    vision = Path(request["vision"]) if request["vision"] else None
    origin = Origin(source) if vision is None else Origin(pieces=Pieces(text_encoder=source, vision=vision))
    is_model = request["is_model"]
    actions: list[Callable[[], object]] = [lambda: "\n".join(inspect(source)).encode()]
    if is_model:
        against = source.parent / "released"
        actions += [lambda: open_model(source), lambda: verify(source), lambda: verify(source, against)]
    for action in actions:
        fault, _ = _attempt(action)
        if fault:
            return fault
    before = _snapshot(destination)
    fault, converted = _attempt(lambda: convert(origin, destination, request["scheme"], (component,)))
    if not fault and converted:
        fault, readable = _attempt(lambda: _check_file(destination, component))
        fault = fault or ("" if readable else "what was written cannot be read")
    if not fault and not converted and _snapshot(destination) != before:
        fault = f"refused, and left {_snapshot(destination)} where {before} was"
    return fault or "".join(f"left {path}" for path in destination.rglob(f"*{PART}"))


def _attempt(action: Callable[[], object]) -> tuple[str, bool]:
    """(what is wrong, whether it went through)."""
    try:
        action()
    except LowVramError as error:
        str(error).encode()
        return "", False
    except BaseException:  # noqa: BLE001  (reported to the test)
        return traceback.format_exc()[-4000:], False
    return "", True


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Of what a model folder is made of, but tokenizers, which come before the weights."""
    files = (*folder.glob("*.safetensors"), *folder.glob("model.json"))
    return {path.name: (path.stat().st_ino, path.stat().st_size) for path in files}


def _check_file(folder: Path, component: str) -> None:
    """safetensors' own reader opens it, and it has the names and shapes that the recorded config asks for."""
    record = read_records(folder).components[component]
    with safe_open(folder / component_file(component), "pt") as file:
        shapes = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
    source = ComponentSource(folder, 0, {}, record.config)
    if component == "transformer":
        expected = transformer_shapes(TransformerConfig.from_dict(record.config))
    else:
        expected = EXPECTED[component](Component(component, source, record.config, None))
    plain = {name: shape for name, shape in shapes.items() if not is_marker(name) and not name.endswith(SCALES)}
    assert plain == expected, f"other names or shapes than {record.config}"
    assert set(record.checksums) == set(shapes)


def _answer(requests: Iterable[str], answers: IO[str]) -> None:
    """Until the input ends. The first request, on good weights, brings all code and threads into memory; then the limit
    is set."""
    for number, line in enumerate(requests):
        print(json.dumps(judge(json.loads(line))), file=answers, flush=True)
        if number == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _serve() -> None:
    """For each folder: says which process answers there, and how it ended."""
    os.fsync = lambda descriptor: None  # the disk is no part of this
    torch.set_num_threads(1)
    gc.freeze()  # no look at what was imported, in any copy
    for folder in sys.stdin:
        child = os.fork()
        if child == 0:
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
            os.chdir(folder.removesuffix("\n"))
            with open(REQUESTS) as requests, open(ANSWERS, "w") as answers:
                _answer(requests, answers)
            return
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


# --------------------------------------------------------------------------------------------------------- who asks


class Program:
    """This file as a process, from which those that answer are forked."""

    def __init__(self) -> None:
        root = Path(__file__).parents[1]
        environment = os.environ | {"PYTHONPATH": str(root), "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def fork(self, folder: Path) -> int:
        assert self.process.stdin is not None
        print(folder, file=self.process.stdin, flush=True)
        return self.number()

    def number(self) -> int:
        """The next that it says."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


class Judge:
    """Asks about one subject. The process that answers is forked anew when it crashed or hung."""

    def __init__(self, program: Program, subject: Subject, folder: Path) -> None:
        self.program, self.subject, self.folder = program, subject, folder
        self.running: tuple[int, IO[str], IO[bytes]] | None = None
        for name in (REQUESTS, ANSWERS):
            os.mkfifo(folder / name)

    def be_ready(self) -> None:
        """With a process that was warmed up on good weights."""
        if self.running is not None:
            return
        child = self.program.fork(self.folder)
        self.running = child, (self.folder / REQUESTS).open("w"), (self.folder / ANSWERS).open("rb")
        for source in self.subject.sources:
            assert self.ask(source, fresh=True, seconds=120) == ""
            assert (self.folder / "destination" / component_file(self.subject.component)).is_file()

    def stop(self) -> None:
        if self.running is not None:
            os.kill(self.running[0], signal.SIGKILL)
            self._ended()

    def _ended(self) -> int:
        """How."""
        assert self.running is not None
        for pipe in self.running[1:]:
            pipe.close()
        self.running = None
        return self.program.number()

    def ask(self, source: str, fresh: bool, seconds: float = SECONDS) -> str:
        """What is wrong, "" if nothing is. fresh: where nothing is converted yet."""
        destination, is_model = self.folder / "destination", (self.subject.folder / "model.json").is_file()
        if fresh:
            shutil.rmtree(destination, ignore_errors=True)
        request = {
            "source": str(self.subject.folder / source),
            "vision": str(self.subject.vision or ""),
            "destination": str(destination),
            "component": self.subject.component,
            "is_model": is_model,
            "scheme": "bf16" if is_model else "int8",
        }
        assert self.running is not None
        _, requests, answers = self.running
        print(json.dumps(request), file=requests, flush=True)
        ready, _, _ = select.select([answers], [], [], seconds)
        if not ready:
            self.stop()
            return f"no answer in {seconds} s"
        line = answers.readline()
        if not line:
            return f"the process ended with {self._ended()}"
        said: str = json.loads(line)
        return said


if __name__ == "__main__":
    _serve()
