"""Small tokenizers with the arithmetic of the released ones, made from a few sentences. No torch here.

Invariants: the words of the video template and a blank line are one token each, so the template is as long
as with the released vocabulary; any text can be encoded, byte by byte at worst; the files are the same
every time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from lowvram_i2v.text.template import BEGIN, CLOSING, DEFAULT_NEGATIVE_PROMPT, IMAGE, MARKS, PREFIX, USER_LEAD
from lowvram_i2v.text.tokenizers import CLIP_END, CLIP_START, CLIP_WORDS

END, PAD = "<|end_of_text|>", "<pad>"
SPECIAL = (BEGIN, END, *(mark for mark in MARKS if mark != BEGIN), PAD)
NAMED = {"begin": BEGIN, "end": END, "image": IMAGE, "pad": PAD}
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
LLAVA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTENCES = (
    *(piece for piece in (*PREFIX, USER_LEAD, *CLOSING) if piece not in MARKS),
    DEFAULT_NEGATIVE_PROMPT,
    "A woman looks at the camera and smiles, her hair moves in the wind, the camera slowly zooms in.",
    "An astronaut in a white suit turns her head; behind her a shuttle stands on the launch pad.",
    "A cat walks through the garden, realistic style, soft light, static shot.",
)


def write_llava_tokenizer(folder: Path) -> dict[str, int]:
    """Writes tokenizer.json and tokenizer_config.json; returns the ids that LLaVA's config.json names."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAVA_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    merges = learn_merges(list(word) for text in SENTENCES for word, _ in split.pre_tokenize_str(text))
    tokens = dict.fromkeys([*ALPHABET, *(a + b for a, b in merges)])
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B:1",
        special_tokens=[(BEGIN, vocabulary[BEGIN])],
    )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": BEGIN,
            "eos_token": END,
            "pad_token": PAD,
            "model_max_length": 8192,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    return {name: vocabulary[token] for name, token in NAMED.items()}


def write_clip_tokenizer(folder: Path) -> None:
    """Writes vocab.json, merges.txt and tokenizer_config.json. The end token has the highest id."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = [word for text in SENTENCES for word, _ in split.pre_tokenize_str(text.lower())]
    merges = learn_merges([*word[:-1], f"{word[-1]}</w>"] for word in words)
    ends = (f"{letter}</w>" for letter in ALPHABET)
    tokens = dict.fromkeys([*ALPHABET, *ends, *(a + b for a, b in merges), CLIP_START, CLIP_END])
    _write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": CLIP_START,
            "eos_token": CLIP_END,
            "pad_token": CLIP_END,
            "unk_token": CLIP_END,
            "model_max_length": 77,
            "tokenizer_class": "CLIPTokenizer",
        },
    )


def learn_merges(words: Iterable[list[str]]) -> list[tuple[str, str]]:
    """Byte-pair merges under which every one of the words, given as letters, is one token.

    Word after word, what is left of it is joined from its start. A new merge ranks last, so it cannot disturb the
    words before. (The package's own trainer orders equally frequent pairs differently from run to run.)
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = word
        while len(pieces) > 1:
            known = [(ranks[pair], at) for at, pair in enumerate(pairwise(pieces)) if pair in ranks]
            if not known:
                ranks[pieces[0], pieces[1]] = len(ranks)
            at = min(known)[1] if known else 0
            pieces = [*pieces[:at], pieces[at] + pieces[at + 1], *pieces[at + 2 :]]
    return list(ranks)


def _write_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
