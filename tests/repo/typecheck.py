"""Strict types for all that ships, and for tools/: `python tests/repo/typecheck.py`.

mypy does not follow the package's search path, so it is shown the tree as it is once installed: a folder of links in
which kernels/, convert/ and profiles/ lie inside lowvram_i2v/.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    tree = ROOT / "build" / "types"
    shutil.rmtree(tree, ignore_errors=True)
    package = tree / "lowvram_i2v"
    package.mkdir(parents=True)
    for entry in [
        *(ROOT / "lowvram_i2v").iterdir(),
        *(ROOT / name for name in ("kernels", "convert", "profiles")),
    ]:
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    (tree / "tools").symlink_to(ROOT / "tools")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        "-p",
        "lowvram_i2v",
        "-p",
        "tools",
    ]
    return subprocess.run(command, cwd=tree, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
