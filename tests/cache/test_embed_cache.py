"""The cache of encoded prompts: the same bits back, a key for all that decides them, and never an error."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import rewrite
from torch import Tensor

from lowvram_i2v import embed_cache
from lowvram_i2v.checkpoint import ModelFolder, open_model
from lowvram_i2v.embed_cache import EmbedCache, default_folder, latent_key, prompt_key
from lowvram_i2v.events import Event, Notice
from lowvram_i2v.text.embeds import PromptEmbeds

KEY, OTHER, THIRD = "0" * 64, "f" * 64, "a" * 64
PICTURE = Image.radial_gradient("L").resize((40, 30)).convert("RGB")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64]


def same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return a.reshape(-1).view(torch.uint8).tolist() == b.reshape(-1).view(torch.uint8).tolist()


def entry(folder: Path, key: str = KEY) -> Path:
    return folder / f"{key}.safetensors"


@given(seed=st.integers(0, 2**31), shape=st.lists(st.integers(0, 5), max_size=3), dtype=st.sampled_from(DTYPES))
def test_the_same_bits_come_back(
    tmp_path_factory: pytest.TempPathFactory, seed: int, shape: list[int], dtype: torch.dtype
) -> None:
    """Whatever the bits are: also those of infinities, of NaNs with a payload, of -0."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    tensors = {"b": bits.view(dtype)[..., 0], "a": torch.tensor([float("nan"), -0.0])}
    cache = EmbedCache(tmp_path_factory.mktemp("cache"))
    cache.store(KEY, tensors)
    found = cache.load(KEY)
    assert found is not None
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensors[name]) for name in tensors)


def test_embeds_and_latents(tmp_path: Path) -> None:
    cache = EmbedCache(tmp_path / "new" / "folder")
    assert cache.prompt_embeds(KEY) is None
    assert cache.latent(OTHER) is None
    with torch.inference_mode():
        rows = torch.randn(8, 5).T[::2]  # neither contiguous nor an ordinary tensor
    cache.keep_prompt_embeds(KEY, PromptEmbeds(rows, torch.randn(4)))
    cache.keep_latent(OTHER, rows)
    again = EmbedCache(tmp_path / "new" / "folder")
    found, latent = again.prompt_embeds(KEY), again.latent(OTHER)
    assert found is not None
    assert latent is not None
    assert torch.equal(found.prompt_embeds, rows)
    assert torch.equal(latent, rows)


def test_a_cache_without_a_folder_stays_empty() -> None:
    cache = EmbedCache(None)
    cache.keep_latent(KEY, torch.ones(1))
    assert cache.latent(KEY) is None


def test_damaged_entries_are_ignored_and_written_again(tmp_path: Path) -> None:
    cache, latent = EmbedCache(tmp_path), torch.randn(16, 1, 4, 4)
    cache.keep_latent(KEY, latent)
    whole = entry(tmp_path).read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    renamed = whole.replace(b'"latent"', b'"tnetal"')
    for damaged in (b"", b"{}", whole[:7], whole[:-1], whole + b"0", flipped, renamed, bytes(len(whole))):
        entry(tmp_path).write_bytes(damaged)
        assert cache.load(KEY) is None
        cache.keep_latent(KEY, latent)
        found = cache.latent(KEY)
        assert found is not None
        assert torch.equal(found, latent)


def test_the_entries_used_longest_ago_make_room(tmp_path: Path) -> None:
    one = torch.zeros(1000)
    size = EmbedCache(tmp_path / "size")
    size.keep_latent(KEY, one)
    length = entry(tmp_path / "size").stat().st_size
    folder = tmp_path / "cache"
    cache = EmbedCache(folder, limit=2 * length)
    for age, key in ((300, KEY), (200, OTHER)):
        cache.keep_latent(key, one)
        os.utime(entry(folder, key), (time.time() - age,) * 2)
    assert cache.latent(KEY) is not None  # used: now the younger one
    cache.keep_latent(THIRD, one)
    assert {path.name for path in folder.iterdir()} == {entry(folder, key).name for key in (KEY, THIRD)}
    cache.keep_latent(THIRD, one + 1)  # takes its own place
    assert cache.latent(KEY) is not None
    cache.keep_latent(OTHER, torch.zeros(4000))  # larger than the whole cache
    assert cache.latent(OTHER) is None
    assert cache.latent(KEY) is not None


def test_only_files_of_the_cache_are_removed(tmp_path: Path) -> None:
    """The variable may name any folder, even that of a model."""
    for name in ("transformer.safetensors", "model.json", "x.part", f"{KEY}.txt", "0" * 63 + ".safetensors"):
        (tmp_path / name).write_bytes(bytes(5000))
    old, young = (tmp_path / f".lowvram-i2v-17-{name}.safetensors" for name in ("00", "11"))
    old.write_bytes(b"0")
    young.write_bytes(b"0")
    for path in tmp_path.iterdir():
        if path != young:
            os.utime(path, (0, 0))
    cache = EmbedCache(tmp_path, limit=1000)
    cache.keep_latent(KEY, torch.zeros(100))
    cache.keep_latent(OTHER, torch.zeros(100))
    left = {path.name for path in tmp_path.iterdir()}
    assert left >= {"transformer.safetensors", "model.json", "x.part", f"{KEY}.txt", young.name}
    assert old.name not in left
    assert not entry(tmp_path).exists()


def test_a_folder_that_cannot_be_written_to_is_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    in_the_way = tmp_path / "file"
    in_the_way.write_bytes(b"")
    cache = EmbedCache(in_the_way / "cache", events.append)
    for _ in range(2):
        assert cache.load(KEY) is None
        cache.keep_latent(KEY, torch.ones(2))
    assert len(events) == 1
    assert isinstance(events[0], Notice)
    assert "not kept" in events[0].text

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    cache = EmbedCache(tmp_path / "cache", events.append)
    cache.keep_latent(KEY, torch.ones(2))
    assert len(events) == 2
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_that_may_only_be_read_still_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EmbedCache(tmp_path).keep_latent(KEY, torch.ones(2))

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", refuse)
    assert EmbedCache(tmp_path).latent(KEY) is not None


def test_runs_share_a_folder(tmp_path: Path) -> None:
    """Readers see a whole entry or none while others write and make room."""
    events: list[Event] = []
    wrong: list[Tensor] = []

    def work(number: int) -> None:
        cache = EmbedCache(tmp_path, events.append, limit=12_000)
        for i in range(40):
            key = f"{(number + i) % 4:064x}"
            cache.keep_latent(key, torch.full((1000,), float((number + i) % 4)))
            found = cache.latent(f"{i % 4:064x}")
            if found is not None and not found.eq(i % 4).all():
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert events == []
    assert wrong == []
    assert all(len(path.stem) == 64 for path in tmp_path.iterdir())


def test_default_folder() -> None:
    home = {"HOME": "/home/me"}
    assert default_folder({"LOWVRAM_I2V_CACHE": "/a/b", **home}, "linux") == Path("/a/b")
    assert default_folder({"XDG_CACHE_HOME": "/x", **home}, "linux") == Path("/x/lowvram-i2v")
    for odd in ({}, {"XDG_CACHE_HOME": "relative"}, {"XDG_CACHE_HOME": "", "LOWVRAM_I2V_CACHE": ""}):
        assert default_folder({**odd, **home}, "darwin") == Path("/home/me/.cache/lowvram-i2v")
    assert default_folder({}, "linux") is None
    assert default_folder({"LOCALAPPDATA": "/local", **home}, "win32") == Path("/local/lowvram-i2v/cache")
    assert default_folder(home, "win32") is None


def keys(model: ModelFolder, prompt: str = "a boat", picture: Image.Image = PICTURE) -> tuple[str, str]:
    return prompt_key(model, prompt, picture, torch.float16), latent_key(model, picture, torch.float16)


def change_record(folder: Path, component: str, **values: object) -> ModelFolder:
    records = json.loads((folder / "model.json").read_text())
    records["components"][component] |= values
    rewrite(folder / "model.json", json.dumps(records).encode())
    return open_model(folder)


def test_keys_hold_all_that_decides_the_result(model: Path) -> None:
    opened = open_model(model)
    text, latent = keys(opened)
    assert (text, latent) == keys(open_model(model), "a boat", PICTURE.copy())
    assert text != latent
    brighter = PICTURE.copy()
    brighter.putpixel((0, 0), tuple(value ^ 1 for value in PICTURE.getpixel((0, 0))))  # type: ignore[union-attr]
    turned = Image.frombytes("RGB", PICTURE.size[::-1], PICTURE.tobytes())
    for picture in (brighter, turned):
        assert keys(opened, picture=picture)[0] != text
        assert keys(opened, picture=picture)[1] != latent
    assert len({keys(opened, prompt)[0] for prompt in ("", " ", "a boat", "a boat ", "A boat", "\ud800")}) == 6
    assert prompt_key(opened, "a boat", PICTURE, torch.float32) != text
    assert latent_key(opened, PICTURE, torch.float32) != latent
    stride = dataclasses.replace(opened.header.variant, image_row_stride=opened.header.variant.image_row_stride + 1)
    other = dataclasses.replace(opened, header=dataclasses.replace(opened.header, variant=stride))
    assert keys(other)[0] != text


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "vae"])
def test_keys_hold_the_weights_and_their_configuration(model: Path, component: str) -> None:
    of_vae = component == "vae"
    record = open_model(model).header.records[component]
    seen = {keys(open_model(model))[of_vae]}
    unchanged = keys(open_model(model))[not of_vae]
    name = next(iter(record.checksums))
    made = (
        change_record(model, component, checksums={**record.checksums, name: "0" * 64}),
        change_record(model, component, checksums=record.checksums, config={**record.config, "sample_size": 17}),
        change_record(model, component, checksums={}, config=record.config),
    )
    seen |= {keys(opened)[of_vae] for opened in made}
    assert len(seen) == 4
    path = made[-1].files[component].path
    rewrite(path, path.read_bytes())
    os.utime(path, (0, 0))
    assert keys(open_model(model))[of_vae] not in seen
    assert keys(open_model(model))[not of_vae] == unchanged


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_2"])
def test_keys_hold_the_tokenizers(model: Path, folder: str) -> None:
    before = keys(open_model(model))
    path = next(path for path in sorted((model / folder).iterdir()) if path.name in embed_cache._TOKENIZER_FILES)
    rewrite(path, path.read_bytes() + b"\n")
    after = keys(open_model(model))
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_a_copy_of_a_folder_has_the_same_keys(model: Path, tmp_path: Path) -> None:
    before = keys(open_model(model))
    for path in model.glob("*.safetensors"):
        os.utime(path, (1, 1))
    assert keys(open_model(model.rename(tmp_path / "elsewhere"))) == before
