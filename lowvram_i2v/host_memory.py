"""How much RAM can be had, as Linux says: for the machine, and for the control groups that a container lives in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def available_ram(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can be allocated without swapping and without passing a control group's limit; None where the system
    does not say (it is not Linux). Files in the cache count as free: the system drops them when memory is wanted."""
    rooms = [*_machine(proc / "meminfo"), *_groups(proc / "self" / "cgroup", cgroups)]
    return max(0, min(rooms)) if rooms else None


def _machine(meminfo: Path) -> Iterator[int]:
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _groups(membership: Path, cgroups: Path) -> Iterator[int]:
    """What each group that limits this process, and each group around it, has left. Both versions of control groups.

    Inside a container the group's path may be that outside of it; then the container's own group is the root.
    """
    for line in _lines(membership):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            for root in (cgroups, cgroups / "unified"):
                for folder in _upwards(root, path):
                    yield from _left(folder / "memory.max", folder / "memory.current", folder / "memory.stat", "")
        elif "memory" in controllers.split(","):
            for folder in _upwards(cgroups / "memory", path):
                limit, usage = folder / "memory.limit_in_bytes", folder / "memory.usage_in_bytes"
                yield from _left(limit, usage, folder / "memory.stat", "total_")


def _upwards(root: Path, path: str) -> list[Path]:
    """The folder at `path` below the root, and each around it up to the root."""
    inner = root / path.strip("/")
    return [folder for folder in (inner, *inner.parents) if folder.is_relative_to(root)]


def _left(limit: Path, usage: Path, stat: Path, cache: str) -> Iterator[int]:
    """Limit less use plus files in the cache, if there is a limit."""
    limits, uses = _numbers(limit), _numbers(usage)
    if not limits or not uses:
        return
    kinds = {f"{cache}inactive_file", f"{cache}active_file"}
    fields = [line.split() for line in _lines(stat)]
    yield limits[0] - uses[0] + sum(int(field[1]) for field in fields if field[0] in kinds)


def _numbers(path: Path) -> list[int]:
    """The numbers in a file of one on each line; the word `max` is none."""
    return [int(line) for line in _lines(path) if line.strip().isdigit()]


def _lines(path: Path) -> list[str]:
    """Of a text file; none if it is not there or may not be read."""
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
