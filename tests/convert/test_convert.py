"""The released tree becomes a model folder: the same values, all faults at once, nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TRANSFORMER, VAE, Made, cut, rewrite, save
from torch import Tensor

from lowvram_i2v.checkpoint import COMPONENTS, component_file, open_model, read_records
from lowvram_i2v.convert import writer
from lowvram_i2v.convert.convert import convert
from lowvram_i2v.convert.policy import DTYPES
from lowvram_i2v.errors import CheckpointError, RequestError, ResourceError
from lowvram_i2v.events import Event, PhaseAdvanced, PhaseFinished, PhaseStarted
from lowvram_i2v.text.clip import official_clip_name
from lowvram_i2v.text.llava import official_llava_name
from lowvram_i2v.variant import VARIANTS


def source_tensors(tree: Path) -> dict[str, dict[str, Tensor]]:
    """Component -> our name -> tensor, read with the libraries' own readers."""
    llava: dict[str, Tensor] = {}
    for shard in sorted((tree / "text_encoder_i2v").glob("*.safetensors")):
        llava |= load_file(shard)
    clip = load_file(tree / "text_encoder_2" / "model.safetensors")
    return {
        "transformer": torch.load(tree / TRANSFORMER, weights_only=True)["module"],
        "vae": torch.load(tree / VAE, weights_only=True),
        "text_encoder": {name: llava[old] for old in llava if (name := official_llava_name(old))},
        "text_encoder_2": {name: clip[old] for old in clip if (name := official_clip_name(old))},
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(source: Path, destination: Path, *parts: str, **options: Any) -> str:
    """A CheckpointError that names all `parts`, and nothing written."""
    with pytest.raises(CheckpointError) as caught:
        convert(source, destination, **options)
    for part in parts:
        assert part in str(caught.value)
    assert not destination.exists()
    return str(caught.value)


@pytest.mark.parametrize("scheme", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_is_the_sources(variant: str, scheme: str, released_once: Made, model_once: Made) -> None:
    folder = model_once(variant, scheme)
    for component, expected in source_tensors(released_once(variant)).items():
        actual = load_file(folder / component_file(component))
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert actual[name].dtype == DTYPES[scheme][component], name
            assert torch.equal(actual[name], tensor.to(DTYPES[scheme][component])), name
    assert not list(folder.rglob("*.part"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_header_says_what_was_converted(variant: str, released_once: Made, model_once: Made) -> None:
    tree = released_once(variant)
    header = open_model(model_once(variant, "bf16")).header
    assert header.variant == VARIANTS[variant]
    assert header.scheme == "bf16"
    assert header.transformer.guidance_embed == (variant == "token_replace")
    assert header.transformer.in_channels == header.variant.in_channels
    assert header.source["transformer"] == {
        "file": "mp_rank_00_model_states.pt",
        "bytes": (tree / TRANSFORMER).stat().st_size,
    }
    assert header.text_encoder == json.loads((tree / "text_encoder_i2v" / "config.json").read_text())
    whole = json.loads((tree / "text_encoder_2" / "config.json").read_text())
    assert header.text_encoder_2 == whole["text_config"]


def test_tokenizer_files_are_copied(released_once: Made, model_once: Made) -> None:
    tree, folder = released_once("token_replace"), model_once("token_replace", "bf16")
    for source, copy in (("text_encoder_i2v", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        for name, data in contents(folder / copy).items():
            assert data == (tree / source / name).read_bytes()
    assert (folder / "tokenizer" / "tokenizer.json").is_file()
    assert (folder / "tokenizer_2" / "merges.txt").is_file()


def test_one_component_at_a_time_gives_the_same_folder(released_once: Made, model_once: Made, tmp_path: Path) -> None:
    for count, component in enumerate(reversed(COMPONENTS), start=1):
        convert(released_once("token_replace"), tmp_path / "model", "bf16", [component])
        if count < len(COMPONENTS):
            with pytest.raises(CheckpointError) as caught:
                open_model(tmp_path / "model")
            assert str(caught.value).count("not converted yet") == len(COMPONENTS) - count
    open_model(tmp_path / "model")
    ours, expected = contents(tmp_path / "model"), contents(model_once("token_replace", "bf16"))
    assert json.loads(ours.pop("model.json")) == json.loads(expected.pop("model.json"))
    assert ours == expected


def test_other_files_than_the_released_ones_are_found(released: Path, tmp_path: Path) -> None:
    """One file instead of shards, a text-only CLIP config, a pickled CLIP, a VAE inside `state_dict` with prefix."""
    expected = source_tensors(released)
    llava = released / "text_encoder_i2v"
    whole: dict[str, Tensor] = {}
    for shard in llava.glob("model*.safetensors*"):
        whole |= load_file(shard) if shard.suffix == ".safetensors" else {}
        shard.unlink()
    save_file(whole, llava / "model.safetensors")
    clip = released / "text_encoder_2"
    save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    config = json.loads((clip / "config.json").read_text())["text_config"]
    rewrite(clip / "config.json", json.dumps(config).encode())
    state = {f"vae.{name}": tensor for name, tensor in expected["vae"].items()}
    save({"state_dict": state, "epoch": 3}, released / VAE)
    convert(released, tmp_path / "model", "fp32")
    assert open_model(tmp_path / "model").header.text_encoder_2 == config
    for component, tensors in expected.items():
        actual = load_file(tmp_path / "model" / component_file(component))
        assert actual.keys() == tensors.keys()
        assert all(torch.equal(actual[name], tensor.float()) for name, tensor in tensors.items())


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("wrapper", [None, "module", "ema", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_pickle_wrappers_and_old_pickles(
    old_format: bool, wrapper: str | None, prefix: str, released: Path, tmp_path: Path
) -> None:
    expected = source_tensors(released)["vae"]
    state = {prefix + name: torch.nn.Parameter(tensor.float()) for name, tensor in expected.items()}
    values = {wrapper: state} if wrapper else state
    save(values, released / VAE, _use_new_zipfile_serialization=not old_format)
    convert(released, tmp_path / "model", "fp32", ["vae"])
    actual = load_file(tmp_path / "model" / "vae.safetensors")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor.float()) for name, tensor in expected.items())


def test_events_count_every_byte(released_once: Made, tmp_path: Path) -> None:
    events: list[Event] = []
    convert(released_once("token_replace"), tmp_path / "model", listen=events.append)
    for component in COMPONENTS:
        name = f"convert {component}"
        (started,) = [event for event in events if isinstance(event, PhaseStarted) and event.phase == name]
        done = [event.done for event in events if isinstance(event, PhaseAdvanced) and event.phase == name]
        assert done == sorted(done)
        assert done[-1] == started.total > 0
        assert any(isinstance(event, PhaseFinished) and event.phase == name for event in events)


# What is missing or wrong


def test_everything_missing_is_listed_at_once(released: Path, tmp_path: Path) -> None:
    gone = (
        TRANSFORMER,
        VAE,
        "hunyuan-video-i2v-720p/vae/config.json",
        "text_encoder_i2v/tokenizer.json",
        "text_encoder_i2v/model-00002-of-00002.safetensors",
        "text_encoder_2/config.json",
        "text_encoder_2/merges.txt",
    )
    for name in gone:
        (released / name).unlink()
    message = assert_refused(released, tmp_path / "model", *(Path(name).name for name in gone))
    assert message.count("missing: ") == len(gone)


def test_components_not_asked_for_may_be_missing(released: Path, tmp_path: Path) -> None:
    shutil.rmtree(released / "text_encoder_i2v")
    (released / TRANSFORMER).unlink()
    convert(released, tmp_path / "model", components=["vae", "text_encoder_2"])
    assert set(read_records(tmp_path / "model").components) == {"vae", "text_encoder_2"}


@pytest.mark.parametrize("content", [None, "empty", "inner"])
def test_a_folder_of_another_layout_is_refused(content: str | None, released: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    if content == "inner":
        folder = released / "hunyuan-video-i2v-720p"
    elif content == "empty":
        folder.mkdir()
    assert_refused(folder, tmp_path / "model", "" if content is None else "text_encoder_i2v/")


def test_all_tensors_that_do_not_fit_are_listed(released: Path, tmp_path: Path) -> None:
    state = torch.load(released / TRANSFORMER, weights_only=True)["module"]
    del state["double_blocks.1.img_mlp.fc2.bias"]
    state["single_blocks.0.linear1.weight"] = state["single_blocks.0.linear1.weight"][:-1]
    state["extra_in.fc1.weight"] = torch.zeros(3)
    save({"module": state}, released / TRANSFORMER)
    shard = released / "text_encoder_i2v" / "model-00002-of-00002.safetensors"
    llava = load_file(shard)
    llava["multi_modal_projector.linear_1.bias"] = torch.zeros(7)
    shard.unlink()
    save_file(llava, shard)
    vae = torch.load(released / VAE, weights_only=True)
    vae["encoder.conv_in.conv.weight"] = vae["encoder.conv_in.conv.weight"].to(torch.float8_e4m3fn)
    save(vae, released / VAE)
    assert_refused(
        released,
        tmp_path / "model",
        "missing: double_blocks.1.img_mlp.fc2.bias",
        "wrong shape: single_blocks.0.linear1.weight",
        "unexpected: extra_in.fc1.weight",
        "wrong shape: multi_modal_projector.linear_1.bias is [7], must be [64]",
        "stored as torch.float8_e4m3fn: encoder.conv_in.conv.weight",
    )


def test_names_of_another_text_encoder_are_refused(released: Path, tmp_path: Path) -> None:
    path = released / "text_encoder_2" / "model.safetensors"
    tensors = load_file(path) | {"bert.embeddings.weight": torch.zeros(2)}
    path.unlink()
    save_file(tensors, path)
    assert_refused(released, tmp_path / "model", "unexpected: bert.embeddings.weight")


def test_a_shard_without_a_tensor_of_the_index(released: Path, tmp_path: Path) -> None:
    path = released / "text_encoder_i2v" / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    tensors.pop("language_model.model.embed_tokens.weight")
    path.unlink()
    save_file(tensors, path)
    assert_refused(released, tmp_path / "model", "missing: language_model.model.embed_tokens.weight")


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": {"a": "../../secret"}}', '{"weight_map": 3}', "[" * 100_000]
)
def test_a_damaged_index(index: str, released: Path, tmp_path: Path) -> None:
    rewrite(released / "text_encoder_i2v" / "model.safetensors.index.json", index.encode())
    assert_refused(released, tmp_path / "model", "model.safetensors.index.json")


@pytest.mark.parametrize("off", [1, 1000, 9_000_000])
def test_truncated_files(off: int, released: Path, tmp_path: Path) -> None:
    cut(released / TRANSFORMER, off)
    assert_refused(released, tmp_path / "model", "mp_rank_00_model_states.pt", components=["transformer"])
    shard = released / "text_encoder_i2v" / "model-00001-of-00002.safetensors"
    cut(shard, min(off, shard.stat().st_size - 3))
    assert_refused(released, tmp_path / "model", shard.name, components=["text_encoder"])


@pytest.mark.parametrize("data", [b"", b"garbage" * 1000, b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00.", b"\x80"])
def test_garbage_for_a_pickle(data: bytes, released: Path, tmp_path: Path) -> None:
    rewrite(released / VAE, data)
    assert_refused(released, tmp_path / "model", "pytorch_model.pt", components=["vae"])


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("how", ["zip", "old", "plain pickle"])
def test_code_in_a_pickle_is_never_run(how: str, released: Path, tmp_path: Path) -> None:
    bomb = {"module": {"a": torch.zeros(2), "b": Malicious(f"touch {tmp_path / 'was_run'}")}}
    if how == "plain pickle":
        rewrite(released / VAE, pickle.dumps(bomb))
    else:
        save(bomb, released / VAE, _use_new_zipfile_serialization=how == "zip")
    assert_refused(released, tmp_path / "model", "never run", components=["vae"])
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    "values", [[1, 2], {}, {"module": {"a": 3}}, {"a": torch.zeros(2).to_sparse()}, torch.zeros(3)]
)
def test_pickles_of_other_things(values: Any, released: Path, tmp_path: Path) -> None:
    save(values, released / VAE)
    assert_refused(released, tmp_path / "model", "pytorch_model.pt", components=["vae"])


def test_values_that_do_not_fit_float16_are_refused(released: Path, tmp_path: Path) -> None:
    state = {name: tensor.float() for name, tensor in source_tensors(released)["vae"].items()}
    state["decoder.conv_in.conv.bias"][0] = 1e6
    save(state, released / VAE)
    with pytest.raises(CheckpointError, match=r"decoder\.conv_in\.conv\.bias has values up to 1e\+06"):
        convert(released, tmp_path / "model", components=["vae"])
    assert not list((tmp_path / "model").iterdir())


# The variant


def with_channels(tree: Path, channels: int) -> None:
    state = torch.load(tree / TRANSFORMER, weights_only=True)["module"]
    state["img_in.proj.weight"] = torch.zeros(256, channels, 1, 2, 2)
    save({"module": state}, tree / TRANSFORMER)


@pytest.mark.parametrize("channels", [32, 17])
def test_other_models_channels_are_refused(channels: int, released: Path, tmp_path: Path) -> None:
    with_channels(released, channels)
    assert_refused(released, tmp_path / "model", f"takes {channels} input channels", components=["transformer"])


def test_a_contradicted_variant_is_refused(released: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is token_replace, not latent_concat"):
        convert(released, tmp_path / "model", variant="latent_concat")
    with_channels(released, 33)  # 33 channels with a guidance embedder: not released, but described by the goldens
    convert(released, tmp_path / "model", components=["transformer"])
    assert read_records(tmp_path / "model").variant == "latent_concat"


# The destination


def test_destinations_that_cannot_be(released: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for destination, words in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "deeper" / "model", "is a file"),
        (released / ".." / released.name, "same folder"),
    ):
        with pytest.raises(RequestError, match=words):
            convert(released, destination)


def test_an_unwritable_destination(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(writer.tempfile, "TemporaryFile", refuse)
    with pytest.raises(RequestError, match="not writable: Permission denied"):
        convert(released, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "options", [{"scheme": "int3"}, {"components": []}, {"components": ["lora"]}, {"variant": "t2v"}]
)
def test_unknown_choices(options: dict[str, Any], released: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="Choose"):
        convert(released, tmp_path / "model", **options)


def test_a_small_disk_is_refused_before_writing(
    released_once: Made, model_once: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_once("token_replace", "bf16")
    needed = sum((folder / component_file(component)).stat().st_size for component in COMPONENTS)
    free = needed - 1
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free))
    with pytest.raises(ResourceError, match="GiB free"):
        convert(released_once("token_replace"), tmp_path / "model", "bf16")
    assert not (tmp_path / "model").exists()
    free = needed
    convert(released_once("token_replace"), tmp_path / "model", "bf16")


def test_converting_does_not_import_transformers(released_once: Made, tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from lowvram_i2v.convert.convert import convert
convert(Path({str(released_once("token_replace"))!r}), Path({str(tmp_path / "model")!r}))
assert not {{"transformers", "diffusers", "accelerate"}} & set(sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
