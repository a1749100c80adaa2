"""Damaged and hostile weights of every layout: always one of the program's errors or a correct file.

2000 mutations in all, an equal share for each subject: bytes of headers, sizes, dtypes, lengths of files, values of
JSON, pickles that run code. Each goes through `inspect` and `convert`, and a model folder through `open_model` and
`verify` too, in a process of its own that may take 2 GiB more than it has after it was warmed up: a crash, a hang or a
large allocation is that process's, and seen here.

This file is also that process's program: it reads a JSON request a line, and answers each with what is wrong ("" if
nothing is). Left out: the arithmetic, which other tests compare.
"""

from __future__ import annotations

import json
import os
import pickletools
import resource
import select
import shutil
import struct
import subprocess
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, reduce
from io import BytesIO
from pathlib import Path
from typing import Any

import encoder_layouts
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformer_layouts import TINY, fp8_scaled, in_blocks, official_state, quanto_int8, write

from lowvram_i2v.checkpoint import component_file, open_model, read_records
from lowvram_i2v.convert.convert import convert
from lowvram_i2v.convert.inspect import inspect
from lowvram_i2v.convert.origin import EXPECTED, Component, Origin
from lowvram_i2v.convert.shapes import transformer_shapes, vae_shapes
from lowvram_i2v.convert.sources import ComponentSource
from lowvram_i2v.convert.sources.pieces import Pieces
from lowvram_i2v.convert.verify import verify
from lowvram_i2v.convert.writer import PART
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.errors import LowVramError
from lowvram_i2v.kernels.scheme import SCHEMES, is_marker
from lowvram_i2v.synth import synth
from lowvram_i2v.synth.weights import random_tensors
from lowvram_i2v.vae.config import VaeConfig

MUTATIONS = 2000
SECONDS, MEMORY = 10.0, 2 * 2**30
CANARY = "code_was_run"
CONFIG = replace(TINY, double_blocks=1, single_blocks=1, refiner_blocks=1, mlp_ratio=0.25)
VAE = VaeConfig(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1)
TREE_VAE = "hunyuan-video-i2v-720p/vae"
SCALES = tuple(f".{part}" for scheme in SCHEMES.values() for part in scheme.parts(2, 64) if part != "weight")


# ------------------------------------------------------------------------------------------------------------ subjects


@dataclass(frozen=True)
class Subject:
    """Weights of one layout. sources: paths below `folder` that can be converted, each with the same weights, "" for
    the folder itself. damaged: files that mutations change. vision: the other piece of a text encoder."""

    component: str
    folder: Path
    sources: tuple[str, ...]
    damaged: tuple[str, ...]
    vision: Path | None = None


def _transformer(folder: Path, name: str, save: Callable[[Path], object]) -> Subject:
    save(folder / name)
    return Subject("transformer", folder, (name,), (name,))


def _save_comfy_fp8(path: Path) -> None:
    write(fp8_scaled(official_state(CONFIG), "scale_weight", marker=True)[0], path)


def _save_quanto(path: Path) -> None:
    tensors, _, metadata = quanto_int8(official_state(CONFIG))
    write(tensors, path, metadata)


def _save_gguf(path: Path) -> None:
    writer, state = GGUFWriter(str(path), "hyvid"), official_state(CONFIG)
    writer.add_array("some.numbers", list(range(100)))
    writer.add_array("comfy.gguf.orig_shape.img_in.proj.weight", list(state["img_in.proj.weight"].shape))
    for name, tensor in state.items():
        kind = GGMLQuantizationType.Q8_0 if in_blocks(name) else GGMLQuantizationType.F32
        values = tensor.float().flatten(1).numpy() if tensor.dim() > 1 else tensor.float().numpy()
        kind = kind if values.shape[-1] % 32 == 0 else GGMLQuantizationType.F32
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _llama_gguf(folder: Path) -> Subject:
    tensors = encoder_layouts.llava()
    config = json.loads((encoder_layouts.LLAVA_FOLDER / "config.json").read_text())["text_config"]
    config = {"num_key_value_heads": config["num_attention_heads"], "rms_norm_eps": 1e-5, "rope_theta": 5e5} | config
    encoder_layouts.save_gguf(tensors, config, folder / "llama.gguf")
    shutil.copy(encoder_layouts.LLAVA_FOLDER / "config.json", folder)
    vision = encoder_layouts.save(encoder_layouts.vision(tensors), folder / "vision.safetensors")
    return Subject("text_encoder", folder, ("llama.gguf",), ("llama.gguf",), vision)


def _encoder(folder: Path, component: str, inside: str, weights: tuple[str, ...]) -> Subject:
    """One folder of the released tree."""
    synth(folder, "tiny", "token_replace", (component,))
    small = ("config.json", *(name for name in ("tokenizer.json",) if (folder / inside / name).is_file()))
    damaged = tuple(f"{inside}/{name}" for name in (*weights, *small))
    return Subject(component, folder, ("", inside), damaged)


def _vae(folder: Path) -> Subject:
    place = folder / TREE_VAE
    place.mkdir(parents=True)
    made = random_tensors("vae", vae_shapes(VAE), torch.float16, 3, torch.device("cpu"))
    torch.save({name: tensor.read() for name, tensor in made.items()}, place / "pytorch_model.pt")
    (place / "config.json").write_text(json.dumps(VAE.to_official()))
    names = (f"{TREE_VAE}/pytorch_model.pt", f"{TREE_VAE}/config.json")
    return Subject("vae", folder, ("", TREE_VAE), names)


def _model(folder: Path) -> Subject:
    """A model folder of this program, of another scheme than it is then converted to."""
    released, model = folder / "released", folder / "model"
    synth(released, "tiny", "token_replace", ("text_encoder", "text_encoder_2", "vae"))
    transformers = released / "hunyuan-video-i2v-720p/transformers"
    transformers.mkdir(parents=True)
    state = official_state(replace(CONFIG, text_dim=64, pooled_dim=48))
    torch.save({"module": state}, transformers / "mp_rank_00_model_states.pt")
    convert(released, model, "nf4")
    names = ("model.json", "model.json", component_file("transformer"), component_file("text_encoder"))
    return Subject("transformer", model, ("",), names)


NAME, SHARDS = "hunyuan_i2v", ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "released": partial(
        _transformer, name=f"{NAME}.pt", save=lambda path: torch.save({"module": official_state(CONFIG)}, path)
    ),
    "official names": partial(
        _transformer, name=f"{NAME}.safetensors", save=lambda path: write(official_state(CONFIG), path)
    ),
    "comfy fp8": partial(_transformer, name=f"{NAME}.safetensors", save=_save_comfy_fp8),
    "quanto": partial(_transformer, name=f"{NAME}.safetensors", save=_save_quanto),
    "gguf": partial(_transformer, name=f"{NAME}.gguf", save=_save_gguf),
    "llama gguf": _llama_gguf,
    "llava": partial(_encoder, component="text_encoder", inside="text_encoder_i2v", weights=SHARDS),
    "clip": partial(_encoder, component="text_encoder_2", inside="text_encoder_2", weights=("model.safetensors",)),
    "vae": _vae,
    "model folder": _model,
}


# ----------------------------------------------------------------------------------------------------------- mutations


@dataclass(frozen=True)
class Edit:
    """kind: of KINDS. place, choice: numbers that say where and what, by their remainders. data: bytes put there."""

    kind: str
    place: int
    choice: int
    data: bytes


DEEP = "@deep@"
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "BOOL", "I8", "U8", "I16", "U16", "I64"]
SIZES = [0, 1, 2, 3, 64, 129, 2**20, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
VALUES: list[Any] = [
    *(None, True, -1, -(2**63), 2**64, 10**400, 1.5, 1e308, float("inf"), float("nan"), [], {}, [[]], [1] * 70),
    *("", "a", "\0", "\ud800", "\udc80", "../x", ".", "..", "x" * 300, "y" * 5000, {"a": 1}, [None], [2**62, 2**62, 0]),
    *([2**63 - 1, 0], DEEP, *DTYPES, *SIZES),
]
EDITS = st.lists(
    st.builds(
        Edit,
        kind=st.sampled_from(["bytes", "value", "value", "number", "cut", "insert", "remove", "code", "opcode"]),
        place=st.integers(0, 2**20),
        choice=st.integers(0, 2**10),
        data=st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=3,
)


def edited(name: str, data: bytes, edit: Edit) -> bytes:
    """Where an edit's kind does not fit the file, other bytes of the header."""
    if edit.kind == "value" and (spliced := _with_value(name, data, edit)) is not None:
        return spliced
    if edit.kind in ("code", "opcode") and data[:4] == b"PK\x03\x04":
        try:
            return _with_pickle(data, edit)
        except (zipfile.BadZipFile, StopIteration, OSError, ValueError, NotImplementedError, EOFError):
            return data[: edit.place % len(data)]  # another edit has damaged the archive
    if edit.kind == "cut":
        return data[: edit.place % max(1, len(data))]
    start, end = _header(data, edit)
    at = start + edit.place % max(1, end - start)
    if edit.kind == "number":
        at, size = (at // 8 * 8 if edit.choice & 1 else at), SIZES[edit.choice // 2 % len(SIZES)]
        return data[:at] + struct.pack("<Q", size) + data[at + 8 :]
    new, old = b"" if edit.kind == "remove" else edit.data, 0 if edit.kind == "insert" else len(edit.data)
    return data[:at] + new + data[at + old :]


def _header(data: bytes, edit: Edit) -> tuple[int, int]:
    """Some range of bytes that describes, and is no weight; rarely all of the file."""
    if edit.choice % 16 == 0:
        return 0, len(data)
    if data[:4] == b"PK\x03\x04":
        return (0, 20_000) if edit.choice % 2 else (max(0, len(data) - 8000), len(data))
    if data[:4] == b"GGUF":
        return 0, (64, 512, 6000)[edit.choice % 3]
    if data[8:9] == b"{":
        return 0, min(len(data), 8 + int.from_bytes(data[:8], "little"))
    return 0, len(data)


def _with_value(name: str, data: bytes, edit: Edit) -> bytes | None:
    """JSON, a file of it or a safetensors header, with something changed in it. None if there is none."""
    size = int.from_bytes(data[:8], "little")
    is_json = name.endswith(".json")
    text = data if is_json else data[8 : 8 + size]
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    nodes = list(_nodes(values))
    if not nodes:
        return None
    parent, key = nodes[edit.place % len(nodes)]
    _change(parent, key, edit)
    changed = json.dumps(values).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000).encode()
    return changed if is_json else len(changed).to_bytes(8, "little") + changed + data[8 + size :]


def _nodes(values: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of every value in it."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in pairs:
        yield values, key
        yield from _nodes(value)


def _change(parent: Any, key: Any, edit: Edit) -> None:
    how, old, new = edit.choice % 8, parent[key], VALUES[edit.choice // 8 % len(VALUES)]
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, dict):
        parent[new if isinstance(new, str) and new != DEEP else edit.data.hex()] = parent.pop(key)
    elif how == 2 and type(old) is int:
        parent[key] = old * 2 if edit.choice & 8 else old + 1
    elif how == 3 and isinstance(old, list):
        parent[key] = old[::-1] if edit.choice & 8 else [*old, 1]
    else:
        parent[key] = new


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _call(module: str, name: str, *arguments: str) -> bytes:
    return b"c%b\n%b\n(%btR" % (module.encode(), name.encode(), b"".join(map(_text, arguments)))


def _doubling() -> bytes:
    """A kilobyte that becomes four gigabytes, if the codec of hexadecimal numbers is called."""
    steps = b"".join(b"h\xf0h%ch\xf1\x86Rq%c" % (n, n + 1) for n in range(200, 230))
    return (
        b"c_codecs\nencode\nq\xf0"
        + _call("_codecs", "encode", "aaaa", "latin1")
        + b"q\xc8"
        + _text("hex")
        + b"q\xf1"
        + steps
    )


TOUCH = f"touch {CANARY}"
CODE = (
    _call("os", "system", TOUCH),
    _call("posix", "system", TOUCH),
    _call("builtins", "eval", f"open('{CANARY}', 'w')"),
    _call("__builtin__", "exec", f"open('{CANARY}', 'w')"),
    b"(" + _text(TOUCH) + b"ios\nsystem\n",
    _text("os") + _text("system") + b"\x93(" + _text(TOUCH) + b"tR",
    b"ccollections\nOrderedDict\n)R}" + _text("__reduce__") + _call("os", "system", TOUCH) + b"sb",
    b"ctorch\nFloatStorage\n(J\xff\xff\xff\x7ftR",
    b"ctorch._utils\n_rebuild_tensor\n(K\0K\0(J\xff\xff\xff\x7ft(K\1ttR",
    _doubling(),
)


def _with_pickle(archive: bytes, edit: Edit) -> bytes:
    """A torch archive, with a call or other bytes put between two opcodes of its pickle."""
    with zipfile.ZipFile(BytesIO(archive)) as file:
        records = {info.filename: file.read(info) for info in file.infolist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    data = records[name]
    ends = [at for _, _, at in pickletools.genops(data) if at]
    at = ends[edit.place % len(ends)]
    if edit.kind == "code":
        records[name] = data[:at] + CODE[edit.choice % len(CODE)] + b"0" * (edit.choice // 64 % 2) + data[at:]
    else:
        records[name] = data[:at] + edit.data + data[at + (len(edit.data) if edit.choice & 1 else 0) :]
    result = BytesIO()
    with zipfile.ZipFile(result, "w") as file:
        for record, content in records.items():
            file.writestr(record, content)
    return result.getvalue()


# ------------------------------------------------------------------------------------------------- the other process


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


def _serve() -> None:
    """Answers requests until the input ends. The first one, on good weights, brings all code and threads into memory;
    then the limit is set."""
    os.fsync = lambda descriptor: None  # the disk is no part of this
    torch.set_num_threads(1)
    for number, line in enumerate(sys.stdin):
        print("\0" + json.dumps(judge(json.loads(line))), flush=True)
        if number == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class Judge:
    """The other process, started anew when it crashed or hung."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject, self.folder = subject, folder
        self.process: subprocess.Popen[bytes] | None = None
        self.good = {name: (subject.folder / name).read_bytes() for name in subject.damaged}

    def start(self) -> None:
        root = Path(__file__).parents[2]
        paths = os.pathsep.join((str(root), str(root / "tests")))
        environment = os.environ | {"PYTHONPATH": paths, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=self.folder, env=environment
        )
        for source in self.subject.sources:
            assert self.ask(source, fresh=True, seconds=120) == ""
            assert (self.folder / "destination" / component_file(self.subject.component)).is_file()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def ask(self, source: str, fresh: bool, seconds: float = SECONDS) -> str:
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
        assert self.process and self.process.stdin and self.process.stdout  # noqa: PT018
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        while True:
            ready, _, _ = select.select([self.process.stdout], [], [], seconds)
            if not ready:
                self.stop()
                return f"no answer in {seconds} s"
            line = self.process.stdout.readline()
            if not line:
                code = self.process.wait()
                self.stop()
                return f"the process ended with {code}"
            if line.startswith(b"\0"):
                answer: str = json.loads(line[1:])
                return answer

    def fault(self, file: str, source: str, fresh: bool, edits: list[Edit]) -> str:
        """Of one mutation; the good file is there again afterwards."""
        if self.process is None:
            self.start()
        path = self.subject.folder / file
        path.write_bytes(reduce(partial(edited, path.name), edits, self.good[file]))
        try:
            return self.ask(source, fresh)
        finally:
            path.write_bytes(self.good[file])


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the limit of memory is set as Linux does it")
@pytest.mark.parametrize("kind", SUBJECTS)
def test_any_mutation_is_an_error_or_a_correct_file(kind: str, tmp_path: Path) -> None:
    (tmp_path / "subject").mkdir()
    judge = Judge(SUBJECTS[kind](tmp_path / "subject"), tmp_path)
    number = st.integers(0, 2**10)

    @settings(max_examples=MUTATIONS // len(SUBJECTS))
    @given(file=number, source=number, fresh=st.booleans(), edits=EDITS)
    def mutate(file: int, source: int, fresh: bool, edits: list[Edit]) -> None:
        damaged, sources = judge.subject.damaged, judge.subject.sources
        fault = judge.fault(damaged[file % len(damaged)], sources[source % len(sources)], fresh, edits)
        assert fault == ""
        assert not list(tmp_path.rglob(CANARY))

    try:
        mutate()
    finally:
        judge.stop()


if __name__ == "__main__":
    _serve()
