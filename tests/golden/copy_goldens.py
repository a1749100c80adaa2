"""Copies goldens into this folder, small: `python tests/golden/copy_goldens.py SOURCE`.

Weights, settings, inputs and pictures are copied whole. Expected tensors of more than 4096 values keep every 13th
value (name `NAME::every13`), except those that another golden or an end-to-end test feeds on.
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
STRIDE = 13
WHOLE = ("in.", "weight.", "step0.model_input", "text.mask", "sigmas", "timesteps", "euler", "not_reversed")


def copy_golden(path: Path) -> None:
    tensors, shapes = {}, {}
    for name, value in load_file(path).items():
        last = name.rsplit(".", 1)[-1]
        fed = name.startswith(WHOLE) or last in ("rows", "input_ids", "attention_mask", "mask")
        if fed or value.numel() <= 4096:
            tensors[name] = value
        else:
            shapes[name] = list(value.shape)
            tensors[f"{name}::every{STRIDE}"] = value.reshape(-1)[::STRIDE].clone()
    save_file(tensors, HERE / path.name, metadata={"shapes": json.dumps(shapes)})


def main(source: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.name in ("README.md", "goldenio.py"):
            continue
        if path.is_dir():
            shutil.copytree(path, HERE / path.name, dirs_exist_ok=True)
        elif path.suffix == ".safetensors" and not path.stem.startswith("weights_") and path.stem != "I_lora_kohya":
            copy_golden(path)
        else:
            shutil.copyfile(path, HERE / path.name)
    total = sum(p.stat().st_size for p in HERE.rglob("*") if p.is_file())
    print(f"{total / 1e6:.2f} MB in {HERE}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
