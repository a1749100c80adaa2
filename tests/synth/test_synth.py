"""Synthetic checkpoints: the same bytes for the same seed, the released layout, sane activations."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import TRANSFORMER, Made
from tokenizers import Tokenizer

from lowvram_i2v.checkpoint import COMPONENTS, open_model
from lowvram_i2v.convert.shapes import Shapes, transformer_shapes, vae_shapes
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.dit.rope import rope_table
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer
from lowvram_i2v.errors import RequestError, ResourceError
from lowvram_i2v.events import Event, PhaseAdvanced, PhaseFinished, PhaseStarted
from lowvram_i2v.synth import synth
from lowvram_i2v.synth.sizes import SIZES, transformer_config
from lowvram_i2v.synth.tokenizers import SENTENCES, write_clip_tokenizer, write_llava_tokenizer
from lowvram_i2v.synth.weights import random_tensors
from lowvram_i2v.text.clip import build_clip, clip_tensor_name
from lowvram_i2v.text.encode import pooled_vector, prompt_rows
from lowvram_i2v.text.llava import build_llava, llava_tensor_name
from lowvram_i2v.text.tokenizers import ClipTokenizer, LlavaTokenizer
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.encoder import VaeEncoder
from lowvram_i2v.variant import VARIANTS

CPU = torch.device("cpu")


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_same_bytes_in_any_order(released_once: Made, tmp_path: Path) -> None:
    expected = digests(released_once("token_replace"))
    for component in reversed(COMPONENTS):
        synth(tmp_path / "again", "tiny", "token_replace", [component])
    assert digests(tmp_path / "again") == expected
    assert not [name for name in expected if name.endswith(".part")]


def test_another_seed_gives_other_weights_and_the_same_small_files(released_once: Made, tmp_path: Path) -> None:
    synth(tmp_path / "other", "tiny", "token_replace", seed=1)
    ours, theirs = digests(released_once("token_replace")), digests(tmp_path / "other")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] == theirs[name]) == (Path(name).suffix in (".json", ".txt")), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pickle_has_the_official_names(variant: str, released_once: Made) -> None:
    state = torch.load(released_once(variant) / TRANSFORMER, weights_only=True)["module"]
    config = transformer_config(SIZES["tiny"], VARIANTS[variant])
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == transformer_shapes(config)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert state["img_in.proj.weight"].shape[1] == VARIANTS[variant].in_channels
    assert any(name.startswith("guidance_in.") for name in state) == (variant == "token_replace")


def test_tokenizers_have_the_released_template_length(released_once: Made) -> None:
    folder = released_once("token_replace")
    llava = LlavaTokenizer(folder / "text_encoder_i2v")
    assert llava.prefix_length == 103  # as with the released vocabulary
    plain = llava._tokenizer
    assert len(plain.encode("\n\n", add_special_tokens=False).ids) == 1
    config = json.loads((folder / "text_encoder_i2v" / "config.json").read_text())
    assert config["image_token_index"] == llava.image_id
    clip = ClipTokenizer(folder / "text_encoder_2")
    text = "A Cat, ünï 漢字 🙂 \n\n <image>"
    for size in SIZES.values():
        assert max(llava.encode(text).ids) < plain.get_vocab_size() <= size.llava_text["vocab_size"]
        assert max(clip.encode(text)[0]) == clip.end_id < size.clip["vocab_size"]


def test_tokenizer_files_are_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_llava_tokenizer(tmp_path / name)
        write_clip_tokenizer(tmp_path / name)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_words_of_the_sentences_are_one_token(tmp_path: Path) -> None:
    write_llava_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in SENTENCES:
        words = tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert len(tokenizer.encode(text, add_special_tokens=False).ids) == len(words)
    strange = "Zürich 漢字 🙂\t\x00"
    assert tokenizer.decode(tokenizer.encode(strange).ids) == strange


def random_module(component: str, shapes: Shapes, module: torch.nn.Module) -> torch.nn.Module:
    tensors = random_tensors(component, shapes, torch.float32, 0, CPU)
    module.load_state_dict({name: tensors[name].read() for name in module.state_dict()}, assign=True)
    return module.requires_grad_(False)


def transformer_output(config: TransformerConfig) -> torch.Tensor:
    with torch.device("meta"):
        module = HunyuanVideoTransformer(config)
    random_module("transformer", transformer_shapes(config), module)
    noise = torch.Generator().manual_seed(1)
    return module(
        torch.randn(config.in_channels, 2, 8, 8, generator=noise),
        torch.tensor([500.0]),
        torch.randn(12, config.text_dim, generator=noise),
        torch.randn(config.pooled_dim, generator=noise),
        torch.tensor([6.0]) if config.guidance_embed else None,
        rope_table((2, 4, 4), config.rope_dims, config.rope_theta, 5),
    )


def test_activations_stay_sane_through_all_blocks_of_the_released_depth() -> None:
    full = SIZES["full"].transformer
    config = replace(
        transformer_config(SIZES["tiny"], VARIANTS["token_replace"]),
        double_blocks=full.double_blocks,
        single_blocks=full.single_blocks,
    )
    output = transformer_output(config)
    assert output.isfinite().all()
    assert 0.5 < float(output.std()) < 2


def test_vae_activations_are_sane() -> None:
    config = SIZES["tiny"].vae
    with torch.device("meta"):
        encoder, decoder = VaeEncoder(config), VaeDecoder(config)
    for module in (encoder, decoder):
        random_module("vae", vae_shapes(config), module)
    ramp = torch.linspace(-1, 1, 64)
    mean, _ = encoder.encode((ramp[:, None] * ramp).expand(3, 5, 64, 64))
    assert 0.5 < float(mean.std()) * config.scaling_factor < 2
    decoded = decoder.decode(torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert 0.2 < float(decoded.std()) < 1


def test_text_activations_are_sane(model_once: Made) -> None:
    opened = open_model(model_once("token_replace", "fp32"))
    image = Image.linear_gradient("L").convert("RGB")
    with opened.load(
        "text_encoder",
        lambda: build_llava(opened.header.text_encoder),
        device=CPU,
        dtype=torch.float32,
        file_name=llava_tensor_name,
    ) as llava:
        rows = prompt_rows(llava, LlavaTokenizer(opened.tokenizer), "A cat walks", image, 4)
    with opened.load(
        "text_encoder_2",
        lambda: build_clip(opened.header.text_encoder_2),
        device=CPU,
        dtype=torch.float32,
        file_name=clip_tensor_name,
    ) as clip:
        pooled = pooled_vector(clip, ClipTokenizer(opened.tokenizer_2), "A cat walks")
    for states in (rows, pooled):
        assert 0.3 < float(states.std()) < 3


def test_events_count_every_byte(tmp_path: Path) -> None:
    events: list[Event] = []
    synth(tmp_path / "out", "tiny", "latent_concat", ["text_encoder"], listen=events.append)
    started = [event for event in events if isinstance(event, PhaseStarted)]
    advanced = [event for event in events if isinstance(event, PhaseAdvanced)]
    assert [event.phase for event in started] == ["synth text_encoder"]
    assert [event.done for event in advanced] == sorted(event.done for event in advanced)
    assert advanced[-1].done == started[0].total
    assert isinstance(events[-1], PhaseFinished)


@pytest.mark.parametrize("arguments", [("huge", "token_replace"), ("tiny", "t2v"), ("tiny", "token_replace", ["lora"])])
def test_unknown_choices_are_refused(arguments: tuple[object, ...], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="Choose from"):
        synth(tmp_path / "out", *arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="is a file"):
        synth(tmp_path / "file" / "out", "tiny", "token_replace")


def test_a_small_disk_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2**30))
    with pytest.raises(ResourceError, match=r"needs 4\d\.\d\d GiB"):
        synth(tmp_path / "out", "full", "token_replace")
    assert not (tmp_path / "out").exists()
