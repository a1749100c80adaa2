"""Prompts of every kind: marks as plain text, the window, what was cut off, CLIP's two kinds of files."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lowvram_i2v.errors import CheckpointError, RequestError
from lowvram_i2v.text.encode import pooled_vector, prompt_rows
from lowvram_i2v.text.template import CLOSING, IMAGE, MARKS, PREFIX, USER_LEAD
from lowvram_i2v.text.tokenizers import CLIP_END, CLIP_START, ClipTokenizer, LlavaTokenizer, cut_parts

pytestmark = pytest.mark.golden
quick = settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ALL_MARKS = (*MARKS, "<|end_of_text|>", "<pad>", CLIP_START, CLIP_END)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
PIECES = st.lists(st.sampled_from([*ALL_MARKS, "\n\n", " ", "😀", "a cat", "é", "猫", "'s", "12", "\t"]), max_size=120)
PROMPTS = st.one_of(UNICODE, PIECES.map("".join))
ODD_PROMPTS = [
    "",
    " ",
    "\n\n\n",
    "\t \n",
    "😀👩‍👩‍👧",
    "猫が歩く",
    "é vs e\u0301",
    "\u202eright to left",
    "\x00",
    IMAGE,
    "".join(ALL_MARKS),
]


def special_ids(tokenizer: Any) -> set[int]:
    return set(tokenizer._tokenizer.get_added_tokens_decoder())


@quick
@given(prompt=PROMPTS)
def test_llava_ids_come_from_the_template_or_from_plain_text(text: Any, prompt: str) -> None:
    tokenizer: LlavaTokenizer = text.llava_tokenizer
    tokens = tokenizer.encode(prompt)
    assert len(tokens.ids) <= tokenizer.max_length
    template = Counter(tokenizer.encode("").ids)
    special = special_ids(tokenizer)
    assert all(count <= template[id] for id, count in Counter(tokens.ids).items() if id in special)
    assert tokens.ids[tokens.image_index] == tokenizer.image_id
    user = [tokens.ids[row] for row in tokens.text_rows]
    assert not special & set(user)
    assert tokens.cut is None or prompt.endswith(tokens.cut.text)


@quick
@given(prompt=PROMPTS.filter(lambda p: not any(mark in p for mark in ALL_MARKS)))
def test_llava_ids_are_those_of_the_whole_text_tokenized_at_once(text: Any, prompt: str) -> None:
    """The way of the reference, which knows no plain-text marks."""
    whole = Tokenizer.from_file(str(text.llava_folder / "tokenizer.json"))
    ids = whole.encode("".join((*PREFIX, USER_LEAD)) + prompt + "".join(CLOSING), add_special_tokens=False).ids
    tokenizer: LlavaTokenizer = text.llava_tokenizer
    assert list(tokenizer.encode(prompt).ids) == ids[: tokenizer.max_length]


@quick
@given(prompt=UNICODE, copies=st.integers(1, 40))
def test_kept_rows_and_cut_text_are_the_whole_prompt(text: Any, prompt: str, copies: int) -> None:
    prompt = "x" + prompt * copies  # a leading line break would melt into the template's own
    tokenizer: LlavaTokenizer = text.llava_tokenizer
    tokens = tokenizer.encode(prompt)
    closing = len(tokenizer._closing) - 1
    if not tokens.cut:
        assert len(tokens.text_rows) >= 1
        return
    kept = prompt.removesuffix(tokens.cut.text)
    decoded = tokenizer._tokenizer.decode([tokens.ids[row] for row in tokens.text_rows], skip_special_tokens=False)
    assert decoded.rstrip("\ufffd").startswith(kept)
    assert tokens.cut.text
    assert tokens.cut.kept == len(tokens.text_rows) == tokenizer.max_length - tokenizer.prefix_length - closing
    assert tokens.cut.tokens > tokens.cut.kept


def test_window_edges(text: Any) -> None:
    """With n tokens of text: all rows and the closing one; near the window no closing row; then a cut."""
    tokenizer: LlavaTokenizer = text.llava_tokenizer
    closing = len(tokenizer._closing)
    room = tokenizer.max_length - tokenizer.prefix_length
    for n in range(room - closing - 1, room + 2):
        tokens = tokenizer.encode("a" + " a" * (n - 1))
        fits, cut = n + closing <= room, n > room - closing + 1
        assert len(tokens.text_rows) == min(n, room - closing + 1) + fits
        assert (tokens.cut is not None) == cut
        if tokens.cut:
            assert (tokens.cut.tokens, tokens.cut.text) == (n, " a" * (n - tokens.cut.kept))


def test_cut_parts_of_both_encoders(text: Any) -> None:
    assert cut_parts(text.llava_tokenizer, text.clip_tokenizer, "A cat.") == []
    prompt = "A " * 60 + "😀" * 60
    (clip_only,) = cut_parts(text.llava_tokenizer, text.clip_tokenizer, "A " * 90)
    assert (clip_only.encoder, clip_only.tokens, clip_only.kept) == (
        "CLIP",
        90,
        text.clip_tokenizer.length - 2,
    )
    assert clip_only.text.split() == ["A"] * (90 - clip_only.kept)
    llava, clip = cut_parts(text.llava_tokenizer, text.clip_tokenizer, prompt * 3)
    assert llava.encoder == "LLaVA"
    assert prompt.endswith("😀")
    for cut in (llava, clip):
        assert (prompt * 3).endswith(cut.text)
        assert str(cut.tokens) in str(cut)


@pytest.mark.parametrize("prompt", ODD_PROMPTS, ids=repr)
def test_odd_prompts_run(text: Any, prompt: str) -> None:
    case = next(iter(text.cases))
    tokens = text.llava_tokenizer.encode(prompt)
    rows = prompt_rows(text.llava, text.llava_tokenizer, prompt, text.image(case), 4)
    assert rows.isfinite().all()
    assert len(rows) == -(-text.golden.info["config"]["image_emb_len"] // 4) + len(tokens.text_rows)
    assert pooled_vector(text.clip, text.clip_tokenizer, prompt).isfinite().all()


def test_text_that_is_not_unicode_is_refused(text: Any) -> None:
    for tokenizer in (text.llava_tokenizer, text.clip_tokenizer):
        with pytest.raises(RequestError, match="udcff"):
            tokenizer.encode("a \udcff b")


def test_marks_that_their_file_does_not_call_special(text: Any, tmp_path: Path) -> None:
    file = json.loads((text.llava_folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in file["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    other = LlavaTokenizer(tmp_path, text.golden.info["config"]["text_len"])
    for prompt in ODD_PROMPTS:
        assert other.encode(prompt) == text.llava_tokenizer.encode(prompt)


def test_padding_and_truncation_of_the_file_are_ignored(text: Any, tmp_path: Path) -> None:
    whole = Tokenizer.from_file(str(text.llava_folder / "tokenizer.json"))
    whole.enable_truncation(7)
    whole.enable_padding(length=300)
    whole.save(str(tmp_path / "tokenizer.json"))
    other = LlavaTokenizer(tmp_path, text.golden.info["config"]["text_len"])
    for prompt in ODD_PROMPTS:
        assert other.encode(prompt) == text.llava_tokenizer.encode(prompt)


@quick
@given(prompt=PROMPTS)
def test_clip_ids(text: Any, prompt: str) -> None:
    tokenizer: ClipTokenizer = text.clip_tokenizer
    ids, cut = tokenizer.encode(prompt)
    assert (ids[0], ids[-1]) == (tokenizer.start_id, tokenizer.end_id)
    assert len(ids) <= tokenizer.length
    assert not {tokenizer.start_id, tokenizer.end_id} & set(ids[1:-1])
    assert cut is None or (len(ids) == tokenizer.length and prompt.endswith(cut.text))


@pytest.fixture(scope="session")
def clip_of_transformers(text: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ClipTokenizer]:
    """transformers' CLIPTokenizer of the same folder, and ours of the tokenizer.json that it writes."""
    from transformers import CLIPTokenizer

    oracle = CLIPTokenizer.from_pretrained(text.clip_folder)
    folder = tmp_path_factory.mktemp("clip")
    oracle.save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file()
    return oracle, ClipTokenizer(folder, text.clip_tokenizer.length)


@quick
@given(prompt=PROMPTS)
def test_clip_ids_are_transformers_and_those_of_tokenizer_json(
    text: Any, clip_of_transformers: tuple[Any, ClipTokenizer], prompt: str
) -> None:
    oracle, from_json = clip_of_transformers
    tokenizer: ClipTokenizer = text.clip_tokenizer
    prompt = re.sub(r"<\|(start|end)oftext\|>", "", prompt, flags=re.IGNORECASE)
    assert from_json.encode(prompt) == tokenizer.encode(prompt)
    theirs = oracle(prompt, truncation=True, max_length=tokenizer.length)["input_ids"]
    assert tokenizer.encode(prompt)[0] == theirs


def test_missing_or_damaged_files(text: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        LlavaTokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"vocab\.json and merges\.txt"):
        ClipTokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{", encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match="damaged"):
        ClipTokenizer(tmp_path)
    whole = (text.llava_folder / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2], encoding="utf-8")
    with pytest.raises(CheckpointError, match="not a tokenizer file"):
        LlavaTokenizer(tmp_path)
    without = json.loads(whole)
    without["added_tokens"] = [t for t in without["added_tokens"] if t["content"] != IMAGE]
    (tmp_path / "tokenizer.json").write_text(json.dumps(without), encoding="utf-8")
    with pytest.raises(CheckpointError, match="<image>"):
        LlavaTokenizer(tmp_path)
