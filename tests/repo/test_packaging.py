"""The package in every mode of installation: the list of packages is the tree, and the odd layout works."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_listed_packages_are_the_tree() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    tree = set()
    for folder, package in {
        "lowvram_i2v": "lowvram_i2v",
        **{n: f"lowvram_i2v.{n}" for n in ("kernels", "convert")},
    }.items():
        for directory in [ROOT / folder, *(p for p in (ROOT / folder).rglob("*") if p.is_dir())]:
            if "__pycache__" not in directory.parts and list(directory.glob("*.py")):
                tree.add(".".join([package, *directory.relative_to(ROOT / folder).parts]))
    assert set(settings["packages"]) == tree | {"lowvram_i2v.profiles"}
    for package, folder in settings["package-dir"].items():
        assert (ROOT / folder).is_dir(), package


def test_kernels_has_no_init_file() -> None:
    """With one, a top-level folder `kernels` on the path shadows the Hugging Face package of that name, and then
    `import transformers` dies."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_version_is_written_twice_and_equal() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    code = "import lowvram_i2v; print(lowvram_i2v.__version__)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == project["version"]


def test_profiles_and_subpackages_are_found_from_another_folder(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r});"
        "from lowvram_i2v.profile import profile_names; import lowvram_i2v.convert, lowvram_i2v.kernels.modulate;"
        "print(profile_names())"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "auto" in shown.stdout
