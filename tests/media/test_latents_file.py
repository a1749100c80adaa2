"""Saved latents: bit for bit, whole or not at all, and refused before a weight is read if anything is wrong."""

import errno
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowvram_i2v import latents_file
from lowvram_i2v.errors import CheckpointError, RequestError, ResourceError
from lowvram_i2v.latents_file import latents_path, open_latents, output_of, save_latents
from lowvram_i2v.request import GenerateRequest
from lowvram_i2v.whole_file import replacing

REQUEST = GenerateRequest(
    Path("photo.png"), "It moves.", Path("out.mp4"), frames=9, seed=5, fps=12, size=(64, 48), flow_shift=7.0
)


def made_settings(**about):
    return REQUEST.to_settings(**{"variant": "token_replace", "model": "/models/a", **about})


def latents(channels=16, time=3, height=6, width=8):
    return torch.randn(channels, time, height, width, generator=torch.manual_seed(0))


@settings(max_examples=30)
@given(frames=st.integers(1, 4), rows=st.integers(1, 5), columns=st.integers(1, 5), seed=st.integers(0, 99))
def test_latents_and_settings_come_back_bit_for_bit(tmp_path_factory, frames, rows, columns, seed):
    path = tmp_path_factory.mktemp("latents") / "out.mp4.latents.safetensors"
    request = GenerateRequest(
        Path("caf\udce9.png"), "ü\n猫 " * seed, Path("x.mp4"), frames=4 * frames + 1, size=(16 * columns, 16 * rows)
    )
    made = torch.randn(16, frames + 1, 2 * rows, 2 * columns, generator=torch.manual_seed(seed))
    save_latents(path, made, request.to_settings(variant="latent_concat", model="m"))
    opened = open_latents(path)
    assert torch.equal(opened.read(), made)
    assert opened.shape == tuple(made.shape)
    assert opened.settings == request.to_settings(variant="latent_concat", model="m")
    again = opened.request(Path("new.mp4"))
    assert (again.output, again.frames, again.size) == (Path("new.mp4"), request.frames, request.size)
    assert opened.variant.dropped_frames == 4
    assert opened.model == Path("m")
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_any_layout_and_dtype_is_stored_as_float32(tmp_path):
    made = latents().half().transpose(2, 3).contiguous().transpose(2, 3)
    save_latents(tmp_path / "a.safetensors", made, made_settings())
    assert torch.equal(open_latents(tmp_path / "a.safetensors").read(), made.float())
    assert load_file(tmp_path / "a.safetensors")["latents"].dtype == torch.float32  # and any program can read it


def test_names_are_each_other_s_inverse():
    assert latents_path(Path("a/out.mp4")) == Path("a/out.mp4.latents.safetensors")
    assert output_of(latents_path(Path("a/out.mp4"))) == Path("a/out.mp4")
    assert output_of(Path("a/other.safetensors")) is None
    assert output_of(Path(".latents.safetensors")) is None


def test_opening_reads_no_tensor_and_a_file_without_model_says_so(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_latents(path, latents(), made_settings(model=None))
    monkeypatch.setattr(latents_file.SafetensorsFile, "read", None)
    assert open_latents(path).model is None


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_latents(path, latents(), made_settings())
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ResourceError, match="No space left"):
        save_latents(path, latents() + 1, made_settings())
    with pytest.raises(ResourceError, match="cannot be written"):
        save_latents(tmp_path / "nowhere" / "a.safetensors", latents(), made_settings())
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def write_half(path):
    with replacing(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt


def test_a_body_that_raises_replaces_nothing(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_half(path)
    assert path.read_text() == "old"
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def written(path, tensors=None, **metadata):
    """A file by the library's own writer, so that every field can be wrong."""
    save_file(tensors or {"latents": latents()}, path, {"format": latents_file.FORMAT, **metadata})
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s | {"frames": 13}, "13 frames of size"),
        (lambda s: s | {"size": [64, 64]}, "ask for F32"),
        (lambda s: s | {"size": None}, "size None"),
        (lambda s: s | {"frames": 10}, "4n\\+1"),
        (lambda s: s | {"extra": 1}, "unknown: extra"),
        (lambda s: s | {"about": {"variant": "other"}}, "not a file of latents"),
        (lambda s: s | {"about": None}, "not a file of latents"),
        (lambda s: {}, "not a file of latents"),
        (lambda s: [], "not a file of latents"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, change, words):
    path = written(tmp_path / "a.safetensors", settings=json.dumps(change(made_settings())))
    with pytest.raises(RequestError, match=words) as error:
        open_latents(path)
    assert error.value.remedy


def test_other_files_are_refused(tmp_path):
    good = json.dumps(made_settings())
    path = tmp_path / "a.safetensors"
    for tensors in ({"other": latents()}, {"latents": latents()[0]}, {"latents": latents().half()}):
        with pytest.raises(RequestError, match="latents"):
            open_latents(written(path, tensors, settings=good))
    with pytest.raises(RequestError, match="not a file of latents"):
        open_latents(written(path, settings="{"))
    with pytest.raises(RequestError, match="it says 'lowvram-i2v latents 2'"):
        open_latents(written(path, format="lowvram-i2v latents 2"))
    save_file({"latents": latents()}, path)
    with pytest.raises(RequestError, match=r"OUTPUT\.mp4\.latents"):
        open_latents(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_latents(tmp_path / "nowhere.safetensors")


def test_cut_files_and_values_that_are_no_numbers_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_latents(path, latents(), made_settings())
    whole = path.read_bytes()
    opened = open_latents(path)
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_latents(path)
    with pytest.raises(CheckpointError, match="ends 1 bytes before"):
        opened.read()
    broken = latents()
    broken[3, 1, 2, 2] = torch.nan
    save_latents(path, broken, made_settings())
    with pytest.raises(CheckpointError, match="not numbers"):
        open_latents(path).read()
