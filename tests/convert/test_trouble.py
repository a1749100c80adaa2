"""A full disk, files that cannot be read, what a killed run or another program has left."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from tiny_models import Made, rewrite

from lowvram_i2v.checkpoint import open_model, read_records
from lowvram_i2v.cli import main
from lowvram_i2v.convert import convert as convert_module
from lowvram_i2v.convert import verify as verify_module
from lowvram_i2v.convert.convert import convert
from lowvram_i2v.convert.export import export
from lowvram_i2v.convert.writer import PART, only_writer
from lowvram_i2v.errors import CheckpointError, ResourceError
from lowvram_i2v.safetensors_file import open_safetensors

TREE = "hunyuan-video-i2v-720p"


def unreadable(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Files of these names refuse to be opened; the tests' user may be allowed everything."""
    original = Path.open

    def refusing(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name in names:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_other_programs_unfinished_files_stay(tmp_path: Path) -> None:
    """Firefox ends a download's name in .part; our own leftovers go, as deep as an export writes."""
    folder = tmp_path / "models"
    others = [folder / "film.mkv.part", folder / "vae" / "vae.safetensors.part"]
    ours = [folder / f"model.json{PART}", folder / TREE / "transformers" / f"mp_rank_00_model_states.pt{PART}"]
    for path in (*others, *ours):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    (folder / "a.part").mkdir()
    (folder / f"b{PART}").mkdir()
    with only_writer(folder):
        assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in (*others, folder / "a.part", folder / f"b{PART}"))


@pytest.mark.parametrize("export_too", [False, True])
def test_leftovers_do_not_count_as_used_disk(
    export_too: bool, released_once: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = released_once("token_replace"), tmp_path / "model"
    usage = namedtuple("usage", "total used free")
    folder.mkdir()
    (folder / f"vae.safetensors{PART}").write_text("left by a killed run")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 0 if list(folder.iterdir()) else 2**40))
    if export_too:
        export(source, folder, "official", ["vae"])
    else:
        convert(source, folder, components=["vae"])


@pytest.mark.parametrize("name", ["a_i2v.pt", "a_i2v.safetensors", "a_i2v.gguf", "x.safetensors.index.json"])
def test_a_file_that_cannot_be_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("diffusion_models", "vae"):
        (tmp_path / folder).mkdir()
    path = tmp_path / "diffusion_models" / name
    path.write_bytes(b"GGUF" if name.endswith("gguf") else b"{}")
    monkeypatch.setattr(Path, "read_bytes", lambda path: path.open("rb").read())
    unreadable(monkeypatch, name)
    assert main(["inspect", str(path)]) == 1
    assert main(["inspect", str(path.parent)]) == 0
    assert main(["convert", "--from-comfy", str(tmp_path), str(tmp_path / "model"), "--device", "cpu"]) == 1
    shown = capsys.readouterr()
    assert "cannot be read: Permission denied" in shown.err
    assert "cannot be read: Permission denied" in shown.out


def test_folders_and_records_that_cannot_be_read(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert main(["inspect", str(model / "tokenizer")]) == 1
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CheckpointError, match=r"model\.json cannot be read: Permission denied"):
        read_records(model)


def test_a_full_disk(
    released_once: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = released_once("token_replace")
    monkeypatch.setattr(os, "fsync", full_disk)
    for component in ("vae", "text_encoder_2"):
        with pytest.raises(ResourceError, match=r"cannot be written: .*No space left"):
            convert(source, tmp_path / "model", components=[component])
    with pytest.raises(ResourceError, match=r"cannot be written: .*No space left"):
        export(source, tmp_path / "model", "official", ["vae"])
    assert not [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert main(["convert", str(source), str(tmp_path / "model"), "--component", "clip", "--device", "cpu"]) == 1
    assert "No space left" in capsys.readouterr().err


def test_a_file_where_a_folder_is_needed(released_once: Made, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_2").write_text("")
    with pytest.raises(ResourceError, match="tokenizer_2"):
        convert(released_once("token_replace"), tmp_path, components=["text_encoder_2"])
    assert not (tmp_path / "text_encoder_2.safetensors").exists()


def test_a_tokenizer_that_cannot_be_read(released_once: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = released_once("token_replace")
    unreadable(monkeypatch, "merges.txt")
    monkeypatch.setattr(Path, "read_bytes", lambda path: path.open("rb").read())
    with pytest.raises(CheckpointError, match=r"merges\.txt cannot be read: Permission denied"):
        convert(source, tmp_path / "model", components=["text_encoder_2"])


def test_a_disk_that_fails_while_checksums_are_compared(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_safetensors(model / "vae.safetensors")
    monkeypatch.setattr(verify_module, "open_safetensors", lambda path: opened)
    unreadable(monkeypatch, "vae.safetensors")
    assert main(["verify", str(model), "--component", "vae", "--device", "cpu"]) == 1
    assert "cannot be read: Permission denied" in capsys.readouterr().err


# A tokenizer and its weights


def changed_tokenizer(released: Path) -> None:
    path = released / "text_encoder_i2v" / "tokenizer.json"
    rewrite(path, path.read_bytes() + b"\n")


@pytest.mark.parametrize("stop", ["write_layout", "_write_tokenizer"])
def test_an_interrupt_leaves_no_new_tokenizer_beside_old_weights(
    stop: str, released: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (model / "tokenizer" / "tokenizer.json").read_bytes()
    changed_tokenizer(released)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, stop, interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(released, model, components=["text_encoder"])
    assert (model / "tokenizer" / "tokenizer.json").read_bytes() == before
    if stop == "write_layout":
        assert open_model(model)
    else:
        assert "text_encoder" not in read_records(model).components


def test_a_new_tokenizer_replaces_all_of_the_old_one(released: Path, model: Path) -> None:
    """CLIP's tokenizer.json would win over vocab.json and merges.txt."""
    assert not (released / "text_encoder_2" / "tokenizer.json").exists()
    (model / "tokenizer_2" / "tokenizer.json").write_text("of the old model")
    (model / "tokenizer_2" / "my notes.txt").write_text("mine")
    convert(released, model, components=["text_encoder_2"])
    assert not (model / "tokenizer_2" / "tokenizer.json").exists()
    assert (model / "tokenizer_2" / "my notes.txt").exists()
    assert (model / "tokenizer_2" / "vocab.json").exists()


@pytest.mark.parametrize(("content", "words"), [(b"{broken", "damaged"), (None, "has no token <image>")])
def test_the_released_trees_tokenizer_is_opened(
    content: bytes | None, words: str, released: Path, tmp_path: Path
) -> None:
    path = released / "text_encoder_i2v" / "tokenizer.json"
    rewrite(path, content or path.read_bytes().replace(b"<image>", b"<nothing>"))
    with pytest.raises(CheckpointError, match=words):
        convert(released, tmp_path / "model")
    assert not (tmp_path / "model").exists()
