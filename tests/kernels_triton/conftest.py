"""Triton's interpreter looks through all of `triton.language` for built-in functions whenever a kernel calls a function
of its own, which takes longer than most kernels here. In these tests it remembers their names."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any


class Remembering:
    """`inspect`, as the interpreter uses it: of modules and classes of the language, only the built-ins are members."""

    def __init__(self) -> None:
        self._names: dict[object, list[str]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(inspect, name)

    def getmembers(self, owner: object) -> list[tuple[str, Any]]:
        from triton.language.core import is_builtin

        if owner not in self._names:
            self._names[owner] = [name for name, member in inspect.getmembers(owner) if is_builtin(member)]
        return [(name, getattr(owner, name)) for name in self._names[owner]]


if find_spec("triton") is not None:
    from triton.runtime import interpreter

    interpreter.inspect = Remembering()
