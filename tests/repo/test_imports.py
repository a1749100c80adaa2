"""Imports point one way, importing is cheap, and nothing touches a GPU by being imported."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "lowvram_i2v"

# what each part may import from the project; parts not named here may be imported by nobody but the command line
LEAVES = {
    "errors",
    "events",
    "variant",
    "device",
    "host_memory",
    "request",
    "profile",
    "image",
    "video",
    "sample_photo",
    "demo_model",
    "whole_file",
    "__init__",
}
CONFIGS = {"dit.config", "vae.config"}
ALLOWED = {
    "kernels": {"kernels", "errors"},
    "attention": {"attention", "kernels", "errors"},
    "streaming": {"streaming", "kernels", "safetensors_file", "host_memory", "errors"},
    "dit": {"dit", "attention", "kernels", "safetensors_file", "errors"},
    "vae": {"vae", "kernels", "attention", "streaming", "device", "errors"},
    "text": {"text", "streaming", "kernels", "safetensors_file", "errors"},
    "embed_cache": {"checkpoint", "safetensors_file", "text", *LEAVES},
    "sampling": {"sampling", "attention", "dit", "variant", "errors"},
    "safetensors_file": {"errors"},
    "checkpoint": {"safetensors_file", "kernels", "variant", "errors", *CONFIGS},
    "convert": {
        "whole_file",
        "attention",
        "convert",
        "checkpoint",
        "safetensors_file",
        "kernels",
        "dit",
        "vae",
        "text",
        "variant",
        "errors",
        "events",
    },
    "synth": {
        "synth",
        "convert",
        "checkpoint",
        "safetensors_file",
        "dit",
        "vae",
        "text",
        "variant",
        "errors",
        "events",
        "device",
    },
    "sizes": {"checkpoint", "dit", "streaming", "text", "kernels", "variant", *CONFIGS},
    "plan": {"sizes", "dit", "attention", "streaming", "text", "vae", "request", "profile", "video", "errors"},
    "cards": {"dit.config"},
    "job": {
        "checkpoint",
        "attention",
        "dit",
        "vae",
        "text",
        "kernels",
        "preview",
        "plan",
        "sizes",
        "embed_cache",
        "latents_file",
        *LEAVES,
    },
    "pipeline": {
        "job",
        "checkpoint",
        "attention",
        "dit",
        "vae",
        "text",
        "sampling",
        "streaming",
        "kernels",
        "embed_cache",
        "latents_file",
        "preview",
        *LEAVES,
    },
    "demo": {"pipeline", *LEAVES},
    "latents_file": {"safetensors_file", "vae.config", *LEAVES},
    "preview": {"checkpoint", "safetensors_file", "vae", *LEAVES},
    "seams": set(),
    "compare": {"seams", "errors"},
    "cli_media": {"compare", "seams", "latents_file", "pipeline", "console", *LEAVES},
    "console": {"events"},
    "kernel_check": {"attention", "kernels", "device"},
    "cli_kernels": {"kernel_check", *LEAVES},
    "cli_convert": {"convert", "console", *LEAVES},
    "cli_plan": {"plan", "sizes", "cards", "checkpoint", "synth", *LEAVES},
    "cli": {
        "cli_convert",
        "cli_kernels",
        "cli_media",
        "cli_plan",
        "job",
        "pipeline",
        "convert",
        "synth",
        "demo",
        "checkpoint",
        "embed_cache",
        "console",
        *LEAVES,
    },
    "__main__": {"cli"},
    **{leaf: {"errors", "events", "variant", "whole_file", "__init__"} for leaf in LEAVES},
    "profile": {"errors", "kernels.compute", "attention"},
    "demo_model": {"image"},
}


def modules() -> list[tuple[str, Path]]:
    """(dotted name below the package, file) of all that ships."""
    found = []
    for folder, prefix in (("lowvram_i2v", ""), ("kernels", "kernels."), ("convert", "convert.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = prefix + ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
            found.append((name, path))
    return found


def imports_of(path: Path) -> set[str]:
    """Project modules that a file imports, anywhere in it, those for type checkers included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            assert node.level == 0
            below = node.module.removeprefix(PACKAGE).lstrip(".")
            for alias in node.names:
                inner = f"{below}.{alias.name}".lstrip(".")
                is_module = (ROOT / PACKAGE / inner.replace(".", "/")).with_suffix(".py").is_file() or (
                    ROOT / PACKAGE / inner.replace(".", "/")
                ).is_dir()
                found.add(inner if is_module else below or "__init__")
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix(f"{PACKAGE}.") for a in node.names if a.name.split(".")[0] == PACKAGE}
    return found


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_one_way(name: str, path: Path) -> None:
    part = name.split(".")[0]
    assert part in ALLOWED, f"{name}: say in tests/repo/test_imports.py what it may import"
    allowed = ALLOWED[part]
    wrong = [other for other in imports_of(path) if other not in allowed and other.split(".")[0] not in allowed]
    assert not wrong, f"{name} must not import {wrong}"


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "numpy", "PIL", "safetensors", "tokenizers", "triton", "diffusers"]
    assert python(f"import sys, lowvram_i2v.cli; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_help_answers_at_once() -> None:
    durations = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", PACKAGE, "generate", "--help"], cwd=ROOT, capture_output=True, check=True)
        durations.append(time.perf_counter() - start)
    assert min(durations) < 0.5, durations


def test_importing_everything_touches_no_gpu() -> None:
    names = [f"{PACKAGE}.{name}".removesuffix(".__init__") for name, _ in modules() if "__main__" not in name]
    code = f"import importlib, torch\nfor n in {names}: importlib.import_module(n)\nprint(torch.cuda.is_initialized())"
    assert python(code) == "False"
