"""Free RAM as the system tells it, with the limits of the control groups that a container lives in."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowvram_i2v.host_memory import available_ram

GIB = 2**30
UNLIMITED = 9223372036854771712  # what version 1 says where there is no limit


class System:
    """Files as Linux has them, below a folder."""

    def __init__(self, root: Path) -> None:
        self.proc, self.cgroups = root / "proc", root / "cgroup"
        (self.proc / "self").mkdir(parents=True)

    def machine(self, free: int) -> None:
        (self.proc / "meminfo").write_text(f"MemTotal:  99999999 kB\nMemFree:  1 kB\nMemAvailable: {free // 1024} kB\n")

    def member(self, *lines: str) -> None:
        (self.proc / "self" / "cgroup").write_text("\n".join(lines) + "\n")

    def version_2(self, path: str, limit: int | str, used: int, cached: int = 0) -> None:
        self._write(path, {"memory.max": limit, "memory.current": used}, cached, "")

    def version_1(self, path: str, limit: int, used: int, cached: int = 0) -> None:
        names = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used}
        self._write(f"memory/{path}", names, cached, "total_")

    def _write(self, path: str, numbers: dict[str, int | str], cached: int, prefix: str) -> None:
        folder = self.cgroups / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, number in numbers.items():
            (folder / name).write_text(f"{number}\n")
        kinds = ("active_file", "inactive_file")
        lines = [f"anon {used}" for used in numbers.values()] + [f"{prefix}{kind} {cached // 2}" for kind in kinds]
        (folder / "memory.stat").write_text("\n".join(lines) + "\n")

    def available(self) -> int | None:
        return available_ram(self.proc, self.cgroups)


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path)


def test_a_machine_without_groups(system: System) -> None:
    assert system.available() is None
    system.machine(4 * GIB)
    assert system.available() == 4 * GIB
    (system.proc / "meminfo").write_text("MemTotal:       16000000 kB\n")
    assert system.available() is None


@pytest.mark.parametrize("kind", ["version_1", "version_2"])
def test_the_tightest_group_counts_and_cached_files_are_free(system: System, kind: str) -> None:
    system.machine(100 * GIB)
    system.member("9:name=systemd:/", "4:cpu,memory:/outer/inner" if kind == "version_1" else "0::/outer/inner")
    group = getattr(system, kind)
    group("outer/inner", 10 * GIB, 7 * GIB, 2 * GIB)
    assert system.available() == 5 * GIB
    group("outer", 8 * GIB, 7 * GIB)
    assert system.available() == 1 * GIB
    group("outer", 200 * GIB, 7 * GIB)
    system.machine(3 * GIB)
    assert system.available() == 3 * GIB


def test_no_limit_is_no_limit(system: System) -> None:
    system.machine(6 * GIB)
    system.member("4:memory:/a", "0::/b")
    system.version_1("a", UNLIMITED, 7 * GIB)
    system.version_2("b", "max", 7 * GIB)
    assert system.available() == 6 * GIB


@pytest.mark.parametrize("kind", ["version_1", "version_2"])
def test_inside_a_container_the_groups_folder_is_the_root(system: System, kind: str) -> None:
    system.machine(100 * GIB)
    system.member("4:memory:/docker/0123" if kind == "version_1" else "0::/../outside")
    getattr(system, kind)("", 8 * GIB, 3 * GIB)
    assert system.available() == 5 * GIB


def test_both_versions_side_by_side(system: System) -> None:
    system.machine(100 * GIB)
    system.member("4:memory:/a", "0::/b")
    system.version_1("a", 20 * GIB, 1 * GIB)
    system.version_2("unified/b", 9 * GIB, 1 * GIB)
    assert system.available() == 8 * GIB


def test_a_group_over_its_limit_leaves_nothing(system: System) -> None:
    system.machine(100 * GIB)
    system.member("0::/a")
    system.version_2("a", 1 * GIB, 2 * GIB)
    assert system.available() == 0


def test_this_machine_says_something_sensible() -> None:
    available = available_ram()
    assert available is None or 0 < available < 2**50
