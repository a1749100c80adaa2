"""What a script says, as numbers: the targets of the text encoders' training.

Invariant: `labels(script)[i]` is an index into the i-th entry of `ATTRIBUTES`; a second object that is not there has
index 0 in each of its attributes.
"""

from __future__ import annotations

from tools.train_demo.prompts import ACTIONS, BACKGROUNDS, CAMERAS, COLOURS, PACES, PATTERNS, SHAPES, Script, Subject

OBJECT: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "pattern": PATTERNS,
    "action": ACTIONS,
    "pace": tuple(PACES),
}
NONE = "none"
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    **{f"first {name}": values for name, values in OBJECT.items()},
    **{f"second {name}": (NONE, *values) for name, values in OBJECT.items()},
    "background": tuple(BACKGROUNDS),
    "camera": CAMERAS,
}
COUNTS = tuple(len(values) for values in ATTRIBUTES.values())


def labels(script: Script) -> tuple[int, ...]:
    """One index for each of `ATTRIBUTES`."""
    first, *others = script.subjects
    second = [1 + index for index in _object(others[0])] if others else [0] * len(OBJECT)
    place = tuple(BACKGROUNDS).index(script.background)
    return (*_object(first), *second, place, CAMERAS.index(script.camera))


def _object(subject: Subject) -> list[int]:
    return [values.index(getattr(subject, name)) for name, values in OBJECT.items()]
