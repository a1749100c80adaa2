"""The demo's tokenizer files, made from its prompts. No torch here.

Invariants: a word of the demo's prompts or of the video template is one token, so a prompt is as long as it has words;
any other text can be encoded, byte by byte at worst; the files are the same every time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from lowvram_i2v.synth.tokenizers import ALPHABET, LLAVA_WORDS, NAMED, SENTENCES, SPECIAL, learn_merges
from lowvram_i2v.text.tokenizers import CLIP_END, CLIP_START, CLIP_WORDS

TABLE_ROWS = 8  # an embedding table's length is a multiple of it


def write_llava_tokenizer(folder: Path, prompts: Iterable[str]) -> tuple[dict[str, int], int]:
    """Writes tokenizer.json. Returns the ids that LLaVA's config.json names, and the embedding table's length."""
    folder.mkdir(parents=True, exist_ok=True)
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAVA_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    merges = learn_merges(list(word) for word in _words(split, (*SENTENCES[:-3], *prompts)))
    tokens = dict.fromkeys([*ALPHABET, *(a + b for a, b in merges)])
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return {name: vocabulary[token] for name, token in NAMED.items()}, _table_rows(len(vocabulary))


def write_clip_tokenizer(folder: Path, prompts: Iterable[str]) -> int:
    """Writes vocab.json and merges.txt. Returns the embedding table's length."""
    folder.mkdir(parents=True, exist_ok=True)
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = _words(split, [prompt.lower() for prompt in prompts])
    merges = learn_merges([*word[:-1], f"{word[-1]}</w>"] for word in words)
    ends = (f"{letter}</w>" for letter in ALPHABET)
    tokens = dict.fromkeys([*ALPHABET, *ends, *(a + b for a, b in merges), CLIP_START, CLIP_END])
    table = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return _table_rows(len(tokens))


def _words(split: pre_tokenizers.PreTokenizer, texts: Iterable[str]) -> list[str]:
    """Each word once, in the order of first appearance."""
    return list(dict.fromkeys(word for text in texts for word, _ in split.pre_tokenize_str(text)))


def _table_rows(tokens: int) -> int:
    return -(-tokens // TABLE_ROWS) * TABLE_ROWS
