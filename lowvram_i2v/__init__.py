"""lowvram-i2v: HunyuanVideo-I2V on the GPUs that people own.

Importing the package does nothing but this: in a source tree, `kernels/`, `convert/` and `profiles/` lie beside
this folder and are found as `lowvram_i2v.kernels`, `lowvram_i2v.convert` and `lowvram_i2v.profiles`, as they are
once installed. No CUDA call, no download, no heavy import.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir() and (_root / "convert").is_dir():
    __path__.append(str(_root))
