"""Damaged and hostile weights of every layout: always one of the program's errors or a correct file.

2000 mutations in all, an equal share for each subject: bytes of headers, sizes, dtypes, lengths of files, values of
JSON, pickles that run code. A process of the subject's own says how each is taken (`conversion_judge`). Left out: the
arithmetic, which other tests compare.
"""

from __future__ import annotations

import json
import pickletools
import shutil
import struct
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
from conversion_judge import Judge, Program, Subject
from gguf import GGMLQuantizationType, GGUFWriter, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from transformer_layouts import TINY, fp8_scaled, in_blocks, official_state, quanto_int8, write

from lowvram_i2v.checkpoint import component_file
from lowvram_i2v.convert.convert import convert
from lowvram_i2v.convert.shapes import vae_shapes
from lowvram_i2v.synth import synth
from lowvram_i2v.synth.weights import random_tensors
from lowvram_i2v.vae.config import VaeConfig

MUTATIONS = 2000
CANARY = "code_was_run"
CONFIG = replace(TINY, double_blocks=1, single_blocks=1, refiner_blocks=1, mlp_ratio=0.25)
VAE = VaeConfig(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1)
TREE_VAE = "hunyuan-video-i2v-720p/vae"


# ------------------------------------------------------------------------------------------------------------ subjects


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
        except (zipfile.BadZipFile, StopIteration, OSError, ValueError, RuntimeError, EOFError):
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


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    with Program() as started:
        yield started


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the limit of memory is set as Linux does it")
@pytest.mark.parametrize("kind", SUBJECTS)
def test_any_mutation_is_an_error_or_a_correct_file(kind: str, program: Program, tmp_path: Path) -> None:
    (tmp_path / "subject").mkdir()
    judge = Judge(program, SUBJECTS[kind](tmp_path / "subject"), tmp_path)
    good = {name: (judge.subject.folder / name).read_bytes() for name in judge.subject.damaged}
    number = st.integers(0, 2**10)

    @settings(max_examples=MUTATIONS // len(SUBJECTS))
    @given(file=number, source=number, fresh=st.booleans(), edits=EDITS)
    def mutate(file: int, source: int, fresh: bool, edits: list[Edit]) -> None:
        judge.be_ready()
        damaged, sources = judge.subject.damaged, judge.subject.sources
        name = damaged[file % len(damaged)]
        path = judge.subject.folder / name
        path.write_bytes(reduce(partial(edited, path.name), edits, good[name]))
        try:
            fault = judge.ask(sources[source % len(sources)], fresh)
        finally:
            path.write_bytes(good[name])
        assert fault == ""
        assert not list(tmp_path.rglob(CANARY))

    try:
        mutate()
    finally:
        judge.stop()
