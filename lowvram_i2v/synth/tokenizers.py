"""Small tokenizers with the arithmetic of the released ones, trained on a few sentences. No torch here.

Invariants: the words of the video template and a blank line are one token each, so the template is as long
as with the released vocabulary; any text can be encoded, byte by byte at worst; the files are the same
every time.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lowvram_i2v.text.template import BEGIN, CLOSING, DEFAULT_NEGATIVE_PROMPT, IMAGE, MARKS, PREFIX, USER_LEAD
from lowvram_i2v.text.tokenizers import CLIP_END, CLIP_START, CLIP_WORDS

END, PAD = "<|end_of_text|>", "<pad>"
SPECIAL = (BEGIN, END, *(mark for mark in MARKS if mark != BEGIN), PAD)
NAMED = {"begin": BEGIN, "end": END, "image": IMAGE, "pad": PAD}
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
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAVA_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(SENTENCES, _trainer())
    tokenizer.add_special_tokens(list(SPECIAL))
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B:1", special_tokens=[(BEGIN, begin)]
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
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return {name: vocabulary[token] for name, token in NAMED.items()}


def write_clip_tokenizer(folder: Path) -> None:
    """Writes vocab.json, merges.txt and tokenizer_config.json. The end token has the highest id."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.train_from_iterator(SENTENCES, _trainer(end_of_word_suffix="</w>"))
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *(a + b for a, b in merges)]
    tokens = [*dict.fromkeys(tokens), CLIP_START, CLIP_END]
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


def _trainer(end_of_word_suffix: str = "") -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=4096,  # more than the sentences can fill: every word of theirs becomes one token
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix=end_of_word_suffix,
        show_progress=False,
    )


def _write_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
