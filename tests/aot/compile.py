"""Triton kernels compiled for cards that are not here: no GPU, no driver, no CUDA toolkit.

The wheel of Triton holds ptxas, cuobjdump and nvdisasm, so a machine without a GPU can say what a kernel asks of each
card: shared memory, registers, spills, and the instructions of its hot loop, the innermost one with the most matrix
instructions. What it cannot say: bank conflicts, cache, clocks.

Run with TRITON_INTERPRET unset: in its presence `triton.jit` makes interpreted functions, which cannot be compiled.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA", "OMMA")
PER_ELEMENT = ("MUFU", "FMUL", "FFMA", "FADD", "FMNMX", "FMNMX3", "I2FP", "I2F", "F2FP", "SHFL", "PRMT")
MEMORY = ("LDSM", "LDS", "STS", "LDGSTS", "UTMALDG", "LDG", "LDL", "STL", "BAR", "SYNCS", "WARPGROUP")


@dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time choices for one card.

    types: every run-time argument, as "*bf16", "i32", "fp32" or "tensordesc<bf16[64, 128]>". aligned: the integers that
    are multiples of 16 (pointers always are). shared, matrix: what the gate allows and wants: bytes, and how the hot
    loop's matrix instructions begin.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    card: int
    warps: int
    stages: int
    aligned: tuple[str, ...] = ()
    shared: int = 101_376
    matrix: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What the compiler said: bytes, registers a thread, bytes spilled, opcodes of the hot loop (first word only).
    stale: see `stale_codes`."""

    shared: int
    warps: int
    registers: int
    local: int
    spilled: int
    warnings: list[str]
    stale: int = 0
    loop: Counter[str] = field(default_factory=Counter)
    matrix: Counter[str] = field(default_factory=Counter)

    def row(self) -> str:
        counts = {name: self.loop[name] for name in (*PER_ELEMENT, *MEMORY) if self.loop[name]}
        shown = " ".join(f"{name} {count}" for name, count in counts.items())
        matrix = " ".join(f"{name} {count}" for name, count in self.matrix.items())
        figures = (self.shared, self.registers, self.spilled, self.warps, self.loop.total(), matrix, shown)
        return " | ".join(map(str, figures))


HEADER = "| kernel | card | shared | registers | spilled | warps | loop | matrix | other | gate |\n" + 10 * "|---" + "|"


def compile_variant(variant: Variant) -> Any:
    """The compiled kernel, with `asm` and `metadata`."""
    kernel, constants = variant.kernel, variant.constants
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else variant.types[name] for name in names}
    aligned = [
        name for name in names if name not in constants and (signature[name][0] == "*" or name in variant.aligned)
    ]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", variant.card, 32),
        options={"num_warps": variant.warps, "num_stages": variant.stages},
    )


def report(variant: Variant) -> Report:
    compiled = compile_variant(variant)
    with tempfile.TemporaryDirectory() as folder:
        binary, text = os.path.join(folder, "k.cubin"), os.path.join(folder, "k.ptx")
        Path(binary).write_bytes(compiled.asm["cubin"])
        Path(text).write_text(compiled.asm["ptx"])
        usage = tool(BIN / "cuobjdump", "--dump-resource-usage", binary)
        target = f"sm_{variant.card}{'a' if variant.card >= 90 else ''}"
        assembler = get_ptxas(variant.card).path
        log = tool(assembler, "-v", f"--gpu-name={target}", text, "-o", os.path.join(folder, "o.cubin"))
        code = tool(BIN / "nvdisasm", "-c", binary)
    found = re.search(r"REG:(\d+) STACK:\d+ SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    loop = hot_loop(code)
    return Report(
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        registers=int(found[1]),
        local=int(found[2]),
        spilled=spilled,
        warnings=[line for line in log.splitlines() if "serialized" in line or "C75" in line],
        stale=stale_codes(code),
        loop=Counter(word.split(".")[0] for word in loop),
        matrix=Counter(short(word) for word in loop if word.startswith(MATRIX)),
    )


def faults(variant: Variant, found: Report) -> list[str]:
    """What a kernel may not ask of its card; empty if all is well."""
    wrong = []
    if found.shared > variant.shared:
        wrong.append(f"{found.shared} bytes of shared memory, {variant.shared} are there")
    if found.spilled or found.local:
        wrong.append(f"{found.spilled} bytes spilled")
    if found.warnings:
        wrong.append(found.warnings[0])
    if found.stale:
        wrong.append(f"{found.stale} conversions to 8 bits may be lost")
    wrong += [f"no {name}" for name in variant.matrix if not any(word.startswith(name) for word in found.matrix)]
    # one store: on sm_90 the assembler moves a score scale through shared memory once a tile
    if variant.matrix and found.loop["STS"] > (1 if variant.card == 90 else 0):
        wrong.append(f"{found.loop['STS']} shared-memory stores in the loop")
    return wrong


def stale_codes(code: str) -> int:
    """Conversions to e4m3 whose results ptxas 12.8 and 12.9 may have lost.

    Two numbers are converted at once, and the second two of a register merged with the first. Where a result that is
    merged has another use (is converted back, or shifted), that one reads a register of no meaning. So nothing converts
    back in a kernel that makes codes, and codes are merged with codes only.
    """
    halves: set[str] = set()
    found = 0
    for opcode, operands in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)\s+([^;&?\n]*)", code):
        registers = [word.split()[0].removesuffix(".reuse") for word in operands.split(",") if word.strip()]
        first = "MERGE_C" in opcode and registers[-1] == "RZ"
        if "MERGE_C" in opcode and not first:
            found += registers[-1] not in halves
        if registers:
            (halves.add if first else halves.discard)(registers[0])
    return found + code.count("F16.E4M3.UNPACK_B") * ("MERGE_C" in code)


def short(opcode: str) -> str:
    """An opcode with what tells kinds of products apart: shape and number formats."""
    return ".".join(part for part in opcode.split(".") if part not in ("SP", "SAT", "ROW", "COL", "gdesc", "gsb0"))


def tool(program: str | Path, *arguments: str) -> str:
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def hot_loop(code: str) -> list[str]:
    """Opcodes between a backward branch and its target, of the shortest such stretch with the most matrix products."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int, list[str]]] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x?_?\d+)\s*:", line):
            labels[label[1]] = len(opcodes)
        if not (instruction := re.search(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\S.*?);", line)):
            continue
        opcodes.append(instruction[1].split()[0])
        jump = re.match(r"BRA\b.*`\((\.L_x?_?\d+)\)", instruction[1])
        body = opcodes[labels[jump[1]] :] if jump and jump[1] in labels else []
        if body and "EXIT" not in body:  # after the end lie spins on barriers that jump back into the middle
            loops.append((sum(word.startswith(MATRIX) for word in body), -len(body), body))
    return max(loops, default=(0, 0, []))[2]
