"""Every op against its definition on this machine, and how long it takes beside torch's own: rows of a table.

The cases are those of the self-tests that `generate` makes before it trusts a kernel (`kernels.op_cases`,
`kernels.attention_cases`, `kernels.decoder_trial`); here they have the sizes of the released model at a video's real
length: ops get one chunk of tokens, as the transformer calls them, the decoder's one chunk of frames, attention all
tokens of a few heads, of which some queries are compared.

Invariants: nothing is as long as the video but a few heads' q, k and v and the scores of the compared queries; nothing
that an op raises ends the check. Without a card the ops are plain torch, checked on few rows in bfloat16, without
times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowvram_i2v import attention
from lowvram_i2v.attention import choice
from lowvram_i2v.kernels import attention_cases, decoder_trial, op_cases
from lowvram_i2v.kernels.op_cases import Case, Sizes
from lowvram_i2v.kernels.ops import PLAIN, Ops, choose

CHUNK = 4096
"""Tokens of an op's call: the largest chunk that a plan has."""
HEADS, DIM = 4, 128
"""Of an attention call: as few heads as a plan has, enough to fill a card."""
ON_CPU = Sizes(rows=48, first=16, heads=2, dim=64, mlp=512)
"""Rows and widths that take no time."""
TOKENS_ON_CPU = 200
TYPE = torch.bfloat16
DECODED = decoder_trial.Size(8, 45, 160, 128)
"""A chunk of the decoder, as 1280x720 has them."""
DENSITY, TEXT_TOKENS, LATENT_FRAMES = 0.2, 400, 33
"""Of sparse attention's call that is timed."""
PAUSE = 20_000_000
"""Clock cycles, about 10 ms: the time in which calls are queued that are to be timed."""


@dataclass(frozen=True)
class Row:
    """error: relative L2 distance from the definition in float32. ms, torch_ms: of one call, None where nothing was
    timed. trouble: what an op raised, or why it was not checked."""

    op: str
    kernel: str
    error: float | None = None
    limit: float | None = None
    ms: float | None = None
    torch_ms: float | None = None
    trouble: str = ""
    skipped: bool = False

    @property
    def right(self) -> bool:
        return self.skipped or (self.error is not None and self.limit is not None and self.error <= self.limit)

    @property
    def verdict(self) -> str:
        if self.skipped:
            return f"not checked: {self.trouble}"
        return "right" if self.right else f"WRONG {self.trouble}".strip()


@torch.inference_mode()
def check(device: torch.device, tokens: int) -> Iterator[Row]:
    """A row for each op and each attention backend, as they are done. tokens: of the whole video and its prompt."""
    on_gpu = device.type == "cuda"
    sizes = Sizes(min(CHUNK, tokens), min(CHUNK, tokens) // 3) if on_gpu else ON_CPU
    yield from op_rows(device, sizes, choose(device))
    if on_gpu:  # on a CPU the decoder's ops are their own definitions
        kernels = decoder_trial.fault(device) is None
        yield from decoder_rows(device, decoder_trial.fused() if kernels else decoder_trial.PLAIN, DECODED)
    yield from attention_rows(device, tokens if on_gpu else min(tokens, TOKENS_ON_CPU))


def op_rows(device: torch.device, sizes: Sizes, table: Ops) -> Iterator[Row]:
    """The ops of a table, as they are called on one chunk."""
    for name, case in op_cases.CASES.items():
        row = Row(name, "triton" if ".fused_" in getattr(table, case.op).__module__ else "torch")
        if case.codes == torch.float8_e4m3fn and not op_cases.multiplies_fp8(device):
            yield replace(row, trouble="this card has no 8-bit floats", skipped=True)
            continue
        row = replace(row, limit=op_cases.bound(case, TYPE, device))
        try:
            yield _op_row(row, case, table, sizes, device)
        except Exception as problem:  # noqa: BLE001 - whatever a compiler or a driver raises is the op's row
            yield replace(row, trouble=_said(problem))
        _free(device)


def _op_row(row: Row, case: Case, table: Ops, sizes: Sizes, device: torch.device) -> Row:
    calls: list[tuple[Any, ...]] = []
    recorded = replace(table, **{case.op: _recording(getattr(table, case.op), calls)})
    row = replace(row, error=op_cases.error(case, recorded, sizes, device, TYPE))
    if device.type != "cuda":
        return row
    ours, torchs = (getattr(ops, case.op) for ops in (table, PLAIN))
    row = replace(row, ms=milliseconds(lambda: ours(*calls[0]), device))
    try:
        return replace(row, torch_ms=milliseconds(lambda: torchs(*calls[0]), device))
    except RuntimeError:  # a product that this torch has not: our kernel is right all the same
        return row


def _recording(op: Callable[..., Any], calls: list[tuple[Any, ...]]) -> Callable[..., Any]:
    """The op, which keeps what it is called with."""

    def call(*arguments: Any) -> Any:
        calls.append(arguments)
        return op(*arguments)

    return call


def decoder_rows(device: torch.device, ops: decoder_trial.Ops, size: decoder_trial.Size) -> Iterator[Row]:
    """The decoder's ops on a chunk of this size."""
    for name, case in decoder_trial.CASES.items():
        kernel = "triton" if "triton" in getattr(ops, case.op).__module__ else "torch"
        row = Row(f"decoder: {name}", kernel, limit=decoder_trial.LIMIT)
        try:
            yield _decoder_row(row, case, ops, size, device)
        except Exception as problem:  # noqa: BLE001 - whatever a compiler or a driver raises is the op's row
            yield replace(row, trouble=_said(problem))
        _free(device)


def _decoder_row(
    row: Row, case: decoder_trial.Case, ops: decoder_trial.Ops, size: decoder_trial.Size, device: torch.device
) -> Row:
    calls: list[tuple[Any, ...]] = []
    ours, torchs = (getattr(table, case.op) for table in (ops, decoder_trial.PLAIN))
    recorded = ops._replace(**{case.op: _recording(ours, calls)})
    row = replace(row, error=decoder_trial.error(case, recorded, size, device))
    if device.type != "cuda":
        return row
    ms, torch_ms = (milliseconds(lambda: op(*calls[0]), device) for op in (ours, torchs))  # noqa: B023
    return replace(row, ms=ms, torch_ms=torch_ms)


def attention_rows(device: torch.device, tokens: int) -> Iterator[Row]:
    """Every backend on every case. All are timed on the first one, beside torch's choice of its own."""
    torch_ms: float | None = None
    for name in sorted(attention.BACKENDS, key=lambda name: name != "sdpa"):
        if why := choice.missing(name, device, DIM):
            yield Row("attention", name, trouble=why, skipped=True)
            continue
        for place, (title, case) in enumerate(attention_cases.CASES.items()):
            limit = attention_cases.bound(case, choice.kind(name))
            row = _attention_row(Row(f"attention, {title}", name, limit=limit), case, device, tokens, place == 0)
            torch_ms = row.ms if name == "sdpa" and place == 0 else torch_ms
            yield replace(row, torch_ms=torch_ms if row.ms is not None else None)
            _free(device)
        if name == "triton-sparse":
            yield _sparse_row(device, tokens, torch_ms)
            _free(device)


def _attention_row(row: Row, case: attention_cases.Case, device: torch.device, tokens: int, with_time: bool) -> Row:
    try:
        attend = attention.get(row.kernel)
        given = attention_cases.inputs(case, tokens, HEADS, DIM, device, TYPE)
        row = replace(row, error=attention_cases.error(attend, given))
        if with_time and device.type == "cuda":
            row = replace(row, ms=milliseconds(lambda: attend(*given), device))
    except Exception as problem:  # noqa: BLE001 - whatever a compiler, driver or package raises is its row
        return replace(row, trouble=_said(problem))
    return row


def _sparse_row(device: torch.device, tokens: int, torch_ms: float | None) -> Row:
    """Its own definition on few tokens, and at full length its lists and the time."""
    from lowvram_i2v.attention import sparse_trial
    from lowvram_i2v.attention.triton_sparse import attend

    row = Row(f"attention, {DENSITY:.0%} of blocks", "triton-sparse", limit=sparse_trial.LIMIT)
    text = min(TEXT_TOKENS, tokens // 10)
    layout = attention.Layout((tokens - text) // LATENT_FRAMES, tokens - text, text, step=0, steps=1)
    try:
        row = replace(row, error=sparse_trial.error(device, DIM, TYPE))
        if wrong := sparse_trial.lists_fault(layout, DENSITY, device, DIM):
            return replace(row, error=None, trouble=wrong)
        if device.type != "cuda":
            return row
        given = attention_cases.inputs(attention_cases.CASES["flat"], tokens, HEADS, DIM, device, TYPE)
        ms = milliseconds(lambda: attend(*given, layout=layout, density=DENSITY), device)
    except Exception as problem:  # noqa: BLE001 - whatever a compiler or driver raises is its row
        return replace(row, trouble=_said(problem))
    return replace(row, ms=ms, torch_ms=torch_ms)


def _free(device: torch.device) -> None:
    """What one row allocated is no use to the next."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> int:
    """Bytes of video memory that the allocator has reserved at most; 0 without a card."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def _said(problem: Exception) -> str:
    return f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:120] if str(problem).strip() else ''}"


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of a call on the device, the best of three means; of a long call, one time. Calls are queued behind a pause,
    so that the host's pace does not count."""

    def timed(repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(PAUSE)  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / repeats

    with torch.cuda.device(device):
        call()
        first = timed(1)
        return first if first > 50 else min(timed(max(1, min(20, int(20 / max(first, 0.1))))) for _ in range(3))
