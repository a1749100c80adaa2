"""Prompt -> token ids for the two text encoders, over the `tokenizers` package alone. No torch, no weights.

Invariants: nothing is padded; marks such as `<image>` or `<|eot_id|>` inside a prompt are plain text; where a
window is too short, what was cut off is known as text, so that the user can be told before a weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lowvram_i2v.errors import CheckpointError, RequestError
from lowvram_i2v.text.template import CLOSING, IMAGE, MARKS, PREFIX, TEXT_LENGTH, USER_LEAD

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_LENGTH = 77
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

SHOWN = 200  # characters at each end of what is not seen


@dataclass(frozen=True)
class Cut:
    """The end of a prompt that does not fit one encoder's window. `str()` is a sentence for the user.

    text: what is not seen. tokens, kept: length of the prompt and of the part that is seen, in that encoder's
    tokens.
    """

    encoder: str
    text: str
    tokens: int
    kept: int

    def __str__(self) -> str:
        text = repr(self.text)
        if len(self.text) > 2 * SHOWN:
            text = f"{self.text[:SHOWN]!r} ... {self.text[-SHOWN:]!r} ({len(self.text)} characters)"
        return (
            f"the prompt has {self.tokens} tokens for {self.encoder}, which reads {self.kept}; not seen by it: {text}"
        )


@dataclass(frozen=True)
class PromptTokens:
    """A prompt inside the template: `ids` with one id at `image_index` for the whole picture; `text_rows` are
    the positions whose hidden states are handed on."""

    ids: tuple[int, ...]
    image_index: int
    text_rows: tuple[int, ...]
    cut: Cut | None


class LlavaTokenizer:
    """Byte-level BPE of the LLaVA text model, from `tokenizer.json` in `folder`.

    text_length: the window, in tokens after the template's prefix (closing pieces included).
    Raises CheckpointError where the file is missing, damaged or lacks a mark of the template.
    """

    def __init__(self, folder: Path, text_length: int = TEXT_LENGTH) -> None:
        path = Path(folder) / "tokenizer.json"
        self._tokenizer = _open(path)
        self._marks = _mark_ids(self._tokenizer, MARKS, path)
        self._prefix = self._encode(PREFIX)
        self._closing = self._encode(CLOSING)
        self.image_id = self._marks[IMAGE]
        self.prefix_length = len(self._prefix) + len(self._encode((USER_LEAD,)))
        self.max_length = self.prefix_length + text_length

    def _encode(self, pieces: tuple[str, ...]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            ids += [self._marks[piece]] if piece in self._marks else _plain(self._tokenizer, piece)[0]
        return ids

    def encode(self, prompt: str) -> PromptTokens:
        """The template with `prompt` in it, at most `max_length` ids.

        Handed on are the user's text and the closing piece's last token, not the closing tokens before it:

            prefix | text                     | end of turn, "assistant" | blank line |
                     handed on                  left out                   handed on

        The reference leaves out the four rows before the last blank line. Where the window cuts that off, it leaves out
        the window's last four, which may be the user's:

            prefix | text ........................................ |
                     handed on                           left out
        """
        text, starts = _plain(self._tokenizer, USER_LEAD + prompt)
        text_end = len(self._prefix) + len(text)
        closing_rows = len(self._closing) - 1
        ids = self._prefix + text + self._closing
        if len(ids) <= self.max_length:
            rows = (*range(self.prefix_length, text_end), len(ids) - 1)
            return PromptTokens(tuple(ids), ids.index(self.image_id), rows, None)
        end = self.max_length - closing_rows
        cut = None
        if end < text_end:
            unseen = prompt[starts[end - len(self._prefix)] - len(USER_LEAD) :]
            cut = Cut("LLaVA", unseen, text_end - self.prefix_length, end - self.prefix_length)
        rows = tuple(range(self.prefix_length, end))
        return PromptTokens(tuple(ids[: self.max_length]), ids.index(self.image_id), rows, cut)


class ClipTokenizer:
    """CLIP's lower-case BPE, from `tokenizer.json` in `folder` or else from `vocab.json` and `merges.txt`.

    length: the window, start and end token included (the text model's max_position_embeddings).
    Raises CheckpointError where files are missing, damaged or lack the start or end token.
    """

    def __init__(self, folder: Path, length: int = CLIP_LENGTH) -> None:
        path = Path(folder) / "tokenizer.json"
        self._tokenizer = _open(path) if path.is_file() else _clip_from_vocabulary(Path(folder))
        ids = _mark_ids(self._tokenizer, (CLIP_START, CLIP_END), folder)
        self.start_id, self.end_id = ids[CLIP_START], ids[CLIP_END]
        self.length = length

    def encode(self, prompt: str) -> tuple[list[int], Cut | None]:
        """`[start, ..., end]`, at most `length` ids, and what did not fit."""
        ids, starts = _plain(self._tokenizer, prompt)
        room = self.length - 2
        cut = Cut("CLIP", prompt[starts[room] :], len(ids), room) if len(ids) > room else None
        return [self.start_id, *ids[:room], self.end_id], cut


def cut_parts(llava: LlavaTokenizer, clip: ClipTokenizer, prompt: str) -> list[Cut]:
    """What of `prompt` each encoder will not see; empty if it fits both."""
    return [cut for cut in (llava.encode(prompt).cut, clip.encode(prompt)[1]) if cut]


def _plain(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Ids of `text` with nothing added, and the index in `text` where each token starts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the prompt holds {text[error.start]!r}, which is not a character",
            "Type it anew, or pass it as UTF-8.",
        ) from error
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, [start for start, _ in encoding.offsets]


def _open(path: Path) -> Tokenizer:
    """A tokenizer to which the marks in a text are plain text, whether its file calls them special or not."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", "Convert the checkpoint again.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package knows no narrower class
        raise CheckpointError(f"{path} is not a tokenizer file: {error}", "Fetch the file again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens([token.content for token in tokenizer.get_added_tokens_decoder().values()])
    tokenizer.encode_special_tokens = True
    return tokenizer


def _clip_from_vocabulary(folder: Path) -> Tokenizer:
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    missing = [path.name for path in (vocabulary, merges) if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} has no tokenizer.json and lacks {' and '.join(missing)}",
            "Convert the checkpoint again.",
        )
    try:
        bpe = models.BPE.from_file(str(vocabulary), str(merges), end_of_word_suffix="</w>")
    except Exception as error:  # the package knows no narrower class
        raise CheckpointError(f"{folder} holds a damaged vocabulary: {error}", "Fetch it again.") from error
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _mark_ids(tokenizer: Tokenizer, marks: tuple[str, ...], source: Path) -> dict[str, int]:
    ids = {mark: tokenizer.token_to_id(mark) for mark in marks}
    missing = [mark for mark, token in ids.items() if token is None]
    if missing:
        raise CheckpointError(f"{source} has no token {', '.join(missing)}", "It is not this model's tokenizer.")
    return {mark: token for mark, token in ids.items() if token is not None}
