"""What kernels ask of cards: `python tests/aot/table.py [--gate] [WORD ...]`, all with the words in name or card."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="aot"))
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import attention_variants  # noqa: E402
import fused_variants  # noqa: E402
import triton  # noqa: E402
from compile import HEADER, faults, report  # noqa: E402


def main() -> int:
    """With --gate only the attention tiles that are used; the number of those that fail is the exit status."""
    words = [word for word in sys.argv[1:] if word != "--gate"]
    gate, failed = "--gate" in sys.argv, 0
    print(f"Triton {triton.__version__}\n\n{HEADER}")
    variants = attention_variants.variants(first=gate) + ([] if gate else fused_variants.variants())
    for card, variant in variants:
        if not all(word in f"{variant.name} {card}" for word in words):
            continue
        try:
            found = report(variant)
        except Exception as error:  # noqa: BLE001, the compiler's errors have no common base
            wrong, row = [type(error).__name__], str(error)[-1000:]
        else:
            wrong, row = faults(variant, found), found.row()
        failed += bool(wrong)
        print(f"| {variant.name} | {card} | {row} | {'; '.join(wrong)} |", flush=True)
    return failed if gate else 0


if __name__ == "__main__":
    sys.exit(main())
