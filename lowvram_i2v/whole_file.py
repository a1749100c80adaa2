"""A file that appears under its name whole or not at all.

Invariant: what a reader finds under the name is the old file or the new one, also after a crash or a power cut.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, part: Path | None = None) -> Iterator[Path]:
    """Yields a name in the folder of `path` to write to; at exit it becomes `path`, its bytes on the disk.

    part: that name, a hidden one if not given. If the body raises, `path` is untouched and the other file is gone.
    Raises OSError as the file system does.
    """
    with hidden(path) if part is None else _gone_at_exit(part) as written:
        yield written
        land(written, path)


def hidden(path: Path, suffix: str = "") -> AbstractContextManager[Path]:
    """A name in the folder of `path` that no other run has, gone at exit unless it was renamed."""
    name = f".lowvram-i2v-{os.getpid()}-{secrets.token_hex(4)}{suffix or path.suffix}"
    return _gone_at_exit(path.absolute().with_name(name))


def land(part: Path, path: Path) -> None:
    """Renames `part` to `path` when its bytes are on the disk, so that the rename cannot overtake them."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    if os.name == "posix":
        folder = os.open(path.absolute().parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _gone_at_exit(path: Path) -> Iterator[Path]:
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
