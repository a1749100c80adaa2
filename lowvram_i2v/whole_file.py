"""A file that appears under its name whole or not at all.

Invariant: what a reader finds under the name is the old file or the new one, also after a crash or a power cut.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a hidden name in the folder of `path` to write to; at exit it becomes `path`, its bytes on the disk.

    If the body raises, `path` is untouched and the hidden file is gone. Raises OSError as the file system does.
    """
    path = path.absolute()
    part = path.with_name(f".lowvram-i2v-{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
