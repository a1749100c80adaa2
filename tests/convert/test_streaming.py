"""The overlapped writer: bounded memory, errors that come through, kills that leave nothing half-written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import Made

from lowvram_i2v.checkpoint import COMPONENTS, component_file, open_model, read_records
from lowvram_i2v.convert import writer
from lowvram_i2v.convert.convert import convert
from lowvram_i2v.convert.policy import Job, Layout, StoredTensor, layout
from lowvram_i2v.convert.sources import LazyTensor
from lowvram_i2v.convert.writer import CPU, only_writer, relative_error, write_layout
from lowvram_i2v.errors import CheckpointError, RequestError, ResourceError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def block_linears(count: int, rows: int, columns: int, read: object = None) -> dict[str, LazyTensor]:
    def zeros() -> torch.Tensor:
        return torch.zeros(rows, columns, dtype=torch.bfloat16)

    names = [f"single_blocks.{n}.linear1.weight" for n in range(count)]
    return {name: LazyTensor((rows, columns), torch.bfloat16, read or zeros) for name in names}  # type: ignore[arg-type]


def test_checksums_and_errors_are_those_of_the_file(tmp_path: Path) -> None:
    weight = torch.randn(48, 64).bfloat16()
    made = layout("transformer", "int8", block_linears(3, 48, 64, lambda: weight))
    done: list[int] = []
    written = write_layout(tmp_path / "x", made, {}, CPU, done.append)
    tensors = load_file(tmp_path / "x")
    assert list(written.checksums) == [tensor.name for tensor in made.tensors]
    for name, tensor in tensors.items():
        assert written.checksums[name] == hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert done == sorted(done)
    assert done[-1] == sum(tensor.bytes for tensor in made.tensors)
    back = tensors["single_blocks.0.linear1.weight"].float() * tensors["single_blocks.0.linear1.weight_scale"]
    exact = float((back - weight.float()).norm() / weight.float().norm())
    assert written.errors["single_blocks.0.linear1"] == pytest.approx(exact, rel=1e-2)


def test_relative_error() -> None:
    a = torch.randn(7, 5)
    assert relative_error(a, a) == 0
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_error(torch.zeros(3), torch.ones(3)) == float("inf")
    assert relative_error(a, 1.01 * a) == pytest.approx(0.01, rel=1e-3)
    assert relative_error(torch.tensor(2.0), torch.tensor(1.0)) == 0.5
    assert relative_error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0


def test_what_is_in_flight_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "IN_FLIGHT", 10_000)
    lock, held, most = threading.Lock(), 0, 0

    def job(number: int) -> tuple[Job, StoredTensor]:
        size = (1_000, 4_000, 30_000)[number % 3]

        def read() -> torch.Tensor:
            nonlocal held, most
            with lock:
                held += 2 * size
                most = max(most, held - 2 * size if size == 30_000 else held)
            time.sleep(0.002)
            return torch.zeros(size, dtype=torch.uint8)

        def make(values: torch.Tensor) -> dict[str, torch.Tensor]:
            nonlocal held
            with lock:
                held -= 2 * size
            return {str(number): values}

        return Job((str(number),), LazyTensor((size,), torch.uint8, read), make), StoredTensor(
            str(number), (size,), torch.uint8
        )

    jobs = [job(number) for number in range(60)]
    write_layout(
        tmp_path / "x", Layout(tuple(s for _, s in jobs), tuple(j for j, _ in jobs)), {}, CPU, lambda done: None
    )
    assert 0 < most <= 10_000
    assert len(load_file(tmp_path / "x")) == 60


def test_memory_stays_small_however_large_the_file() -> None:
    """24 weights of 64 MB, 1.6 GB read and 0.8 GB written, in under 1.5 GiB beside the interpreter's own memory."""
    script = """
import re, sys, threading, time
from pathlib import Path
from test_streaming import block_linears
from lowvram_i2v.convert import writer
from lowvram_i2v.convert.policy import layout
def rss():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
peak, before, running = 0, rss(), True
def watch():
    global peak
    while running:
        peak = max(peak, rss())
        time.sleep(0.005)
thread = threading.Thread(target=watch, daemon=True)
thread.start()
made = layout("transformer", "fp8", block_linears(24, 8192, 4096))
tensors = {tensor.name: tensor for tensor in made.tensors}
file = open("/dev/null", "wb")
sink = writer.Sink(file.fileno(), dict.fromkeys(tensors, 0), tensors)
writer.run_jobs(made, sink, writer.CPU, lambda done: None)
running = False
thread.join()
print(peak - before)
"""
    environment = ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}:{Path(__file__).parents[1]}"}
    shown = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=200
    )
    assert int(shown.stdout.split()[-1]) < 1.5 * 2**30


@pytest.mark.parametrize("error", [CheckpointError("damaged"), OSError(28, "No space left on device")])
def test_an_error_in_a_thread_ends_the_conversion(error: Exception, tmp_path: Path) -> None:
    reads = 0

    def read() -> torch.Tensor:
        nonlocal reads
        reads += 1
        if reads == 20:
            raise error
        return torch.zeros(64, 64, dtype=torch.bfloat16)

    made = layout("transformer", "int8", block_linears(2000, 64, 64, read))
    with pytest.raises(CheckpointError if isinstance(error, CheckpointError) else ResourceError):
        write_layout(tmp_path / "x", made, {}, CPU, lambda done: None)


def test_threads_of_torch_are_as_before(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    write_layout(tmp_path / "x", layout("transformer", "fp8", block_linears(2, 8, 64)), {}, CPU, lambda done: None)
    assert torch.get_num_threads() == before


def test_one_writer_at_a_time(released_once: Made, tmp_path: Path) -> None:
    with only_writer(tmp_path / "model"), pytest.raises(RequestError, match="another process"):
        convert(released_once("token_replace"), tmp_path / "model", components=["vae"])
    convert(released_once("token_replace"), tmp_path / "model", components=["vae"])


@pytest.mark.parametrize("stop_at", [1, 20, 200])
def test_an_interrupted_conversion_leaves_the_old_model_whole(
    stop_at: int, released_once: Made, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {component: (model / component_file(component)).read_bytes() for component in COMPONENTS}
    count, original = 0, writer.Sink.write

    def failing(self: writer.Sink, name: str, values: torch.Tensor) -> str:
        nonlocal count
        count += 1
        if count >= stop_at:
            raise OSError(5, "the disk is gone")
        return original(self, name, values)

    monkeypatch.setattr(writer.Sink, "write", failing)
    with pytest.raises(ResourceError, match="the disk is gone"):
        convert(released_once("token_replace"), model, "fp32")
    opened = open_model(model)
    for component in COMPONENTS:
        if opened.header.records[component].scheme == "bf16":
            assert (model / component_file(component)).read_bytes() == before[component]
    assert not list(model.rglob("*.part"))


def test_twenty_kills(released_once: Made, model_once: Made, tmp_path: Path) -> None:
    """kill -9 at random moments of a conversion that a disk slows down, each within the time that an undisturbed one
    takes on this machine now: what has a final name is complete, and the next run, after all kills, gives what an
    undisturbed one gives."""
    source, destination = released_once("token_replace"), tmp_path / "model"
    expected = model_once("token_replace", "int8")
    script = """
import os, random, signal, sys, time
from pathlib import Path
from lowvram_i2v.convert.convert import convert
import lowvram_i2v.convert.sources.official, lowvram_i2v.text.llava, lowvram_i2v.text.clip
original = os.pwrite
def slow(*arguments):
    time.sleep(0.003)
    return original(*arguments)
os.pwrite = slow
def begin(folder):
    if (child := os.fork()) == 0:
        convert(Path(sys.argv[1]), Path(folder))
        os._exit(0)
    return child
start = time.monotonic()
os.waitpid(begin(sys.argv[3]), 0)
whole = time.monotonic() - start
generator = random.Random(0)
for _ in range(20):
    child = begin(sys.argv[2])
    time.sleep(generator.uniform(0.02, 1.0) * whole)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", flush=True)
    sys.stdin.readline()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(source), str(destination), str(tmp_path / "undisturbed")],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    files, unfinished = set(), 0
    for _ in range(20):
        assert process.stdout.readline() == "killed\n"
        records = read_records(destination).components if destination.exists() else {}
        for path in destination.rglob("*.safetensors") if destination.exists() else ():
            assert path.read_bytes() == (expected / path.name).read_bytes(), path.name
            files.add(path.name)
        for component in records:
            assert (destination / component_file(component)).is_file()
        unfinished += len(records) < len(COMPONENTS) or bool(list(destination.rglob("*.part")))
        process.stdin.write("\n")
        process.stdin.flush()
    assert process.wait(60) == 0
    assert unfinished > 3
    assert files  # some kills came late enough
    convert(source, destination)
    left = {str(path.relative_to(destination)) for path in destination.rglob("*") if path.is_file()}
    assert left == {str(path.relative_to(expected)) for path in expected.rglob("*") if path.is_file()}
    for name in left - {"model.json"}:
        assert (destination / name).read_bytes() == (expected / name).read_bytes()
    ours, theirs = (json.loads((folder / "model.json").read_text()) for folder in (destination, expected))
    assert ours == theirs
    assert not re.search(r"\.part", " ".join(left))
