"""The words of the demo's world: short prompts of subject, action, background and camera, and which are held out.

    A striped red star moves quickly to the right next to a blue house, brick wall behind it, the camera stands still.

Invariants: a `Script` says what happens and nothing about where; `sentence` is the prompt of a script, its wording
drawn from a few synonyms. The held-out split is by (colour, shape, action) of an object and never changes: it hashes
the words, so new colours or shapes move no old combination to the other side. Training never shows a held-out
combination, not in the second object either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import numpy as np

Word = TypeVar("Word")

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.12, 0.10),
    "orange": (0.98, 0.50, 0.05),
    "yellow": (0.96, 0.87, 0.12),
    "green": (0.10, 0.66, 0.16),
    "turquoise": (0.06, 0.78, 0.76),
    "blue": (0.12, 0.26, 0.92),
    "purple": (0.52, 0.12, 0.78),
    "pink": (1.00, 0.40, 0.74),
}
ROUND = ("ball", "ring")
"""Shapes that look the same at every angle: they never spin."""
SHAPES = (*ROUND, "square", "diamond", "triangle", "star", "heart", "cross", "moon", "fish", "car", "house")
PATTERNS = ("", "striped", "spotted")

PATHS = ("left", "right", "up", "down")
TURNS = ("clockwise", "counterclockwise")
IN_PLACE = (*TURNS, "grow", "shrink", "fade")
ACTIONS = ("still", *PATHS, "bounce", *IN_PLACE, "orbit")
PACES = {"slowly": 24.0, "": 40.0, "quickly": 60.0}  # pixels from the first to the last frame

PANS = tuple(f"pan {way}" for way in PATHS)
ZOOMS = ("zoom in", "zoom out")
CAMERAS = ("still", *PANS, *ZOOMS)

BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "plain wall": (),
    "cloudy sky": ("blue", "turquoise"),
    "green meadow": ("green", "yellow"),
    "brick wall": ("red", "orange"),
    "checkered floor": (),
    "dotted wallpaper": (),
    "starry night": ("blue", "purple"),
    "sandy beach": ("orange", "yellow"),
}
"""Background -> the colours that no object has before it, because they would hardly stand out."""
FEATURELESS = ("plain wall",)
"""Backgrounds on which a moving camera cannot be seen."""

VERBS = {
    "still": ("stands still", "does not move", "stays where it is"),
    "left": ("moves{pace} to the left", "slides{pace} left", "drifts{pace} to the left"),
    "right": ("moves{pace} to the right", "slides{pace} right", "drifts{pace} to the right"),
    "up": ("moves{pace} up", "rises{pace}", "floats{pace} upwards"),
    "down": ("moves{pace} down", "sinks{pace}", "falls{pace}"),
    "bounce": ("bounces", "hops up and down", "jumps up and down"),
    "clockwise": ("rotates clockwise", "spins clockwise", "turns clockwise"),
    "counterclockwise": ("rotates counterclockwise", "spins counterclockwise", "turns counterclockwise"),
    "grow": ("grows", "gets bigger", "becomes larger"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller"),
    "fade": ("fades away", "disappears", "vanishes"),
    "orbit": ("moves in a circle", "flies in a circle", "goes round in a circle"),
}
ROUND_ANOTHER = ("circles around", "orbits", "goes around")
BESIDE = ("next to", "beside", "near")
CAMERA_WORDS = {
    "still": ("the camera stands still", "static camera", "still camera"),
    **{f"pan {way}": (f"the camera pans {way}", f"the camera moves {way}") for way in PATHS},
    "zoom in": ("the camera zooms in", "the camera moves closer"),
    "zoom out": ("the camera zooms out", "the camera moves away"),
}
HELD_OUT_IN = 8  # one in so many combinations is held out
FEWEST_DEGREES = 50.0  # between the hues of two objects
TWO_OBJECTS, MOVING_CAMERA, NOTHING_MOVES = 0.35, 0.25, 0.02  # shares of the prompts


@dataclass(frozen=True)
class Subject:
    """One object and what it does. pace: a key of `PACES`, "" for all but moves along a line."""

    colour: str
    shape: str
    pattern: str
    action: str
    pace: str = ""

    @property
    def held_out(self) -> bool:
        """Whether training may not show this colour and shape doing this."""
        words = f"{self.colour} {self.shape} {self.action}"
        return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest()) % HELD_OUT_IN == 0

    @property
    def name(self) -> str:
        words = " ".join(word for word in (self.pattern, self.colour, self.shape) if word)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Script:
    """What a video shows, in words. subjects: one or two, the first one acts; the second may."""

    subjects: tuple[Subject, ...]
    background: str
    camera: str

    @property
    def motion(self) -> tuple[str, ...]:
        """What is measured: the action of each object, then the camera's."""
        return (*(subject.action for subject in self.subjects), self.camera)

    @property
    def moves(self) -> bool:
        return any(word != "still" for word in self.motion)

    @property
    def demanding(self) -> bool:
        """The camera moves while an object turns, or past stars: two motions in one place, or tiny things that move.
        One script in twelve."""
        turns = any(subject.action in TURNS for subject in self.subjects)
        return self.camera != "still" and (turns or self.background == "starry night")


def hue(colour: str) -> float:
    """Degrees, 0 for red, 120 for green."""
    red, green, blue = COLOURS[colour]
    return float(np.degrees(np.arctan2(np.sqrt(3) / 2 * (green - blue), red - (green + blue) / 2)))


def draw_script(random: np.random.Generator, held_out: bool = False, demanding: bool = False) -> Script:
    """A script for training, or one whose acting object is a held-out combination and in which something moves.
    demanding: no other."""
    while True:
        script = _any_script(random)
        if demanding and not script.demanding:
            continue
        first, *others = script.subjects
        if held_out and first.held_out and script.moves:
            return script
        if not held_out and not any(subject.held_out for subject in (first, *others)):
            return script


def _any_script(random: np.random.Generator) -> Script:
    """A script without regard to the split. A camera moves only while objects stay in place, so that each motion can be
    told from the other."""
    background = _one(random, tuple(BACKGROUNDS))
    colours = [colour for colour in COLOURS if colour not in BACKGROUNDS[background]]
    camera = "still"
    actions: tuple[str, ...] = ACTIONS[1:]
    if random.random() < MOVING_CAMERA and background not in FEATURELESS:
        camera = _one(random, CAMERAS[1:])
        actions = ("still", "still", "still", *TURNS, *(("grow", "shrink", "fade") if camera in PANS else ()))
    elif random.random() < NOTHING_MOVES:
        actions = ("still",)
    first = _subject(random, colours, actions)
    if random.random() >= TWO_OBJECTS:
        return Script((first,), background, camera)
    apart = [colour for colour in colours if _degrees_apart(colour, first.colour) >= FEWEST_DEGREES]
    free = camera == "still" and first.action in IN_PLACE and random.random() < 0.5
    second = _subject(random, apart, (*PATHS, *IN_PLACE) if free else ("still",))
    return Script((first, second), background, camera)


def _subject(random: np.random.Generator, colours: Sequence[str], actions: Sequence[str]) -> Subject:
    action = _one(random, actions)
    shape = _one(random, SHAPES[len(ROUND) :] if action in TURNS else SHAPES)
    pace = _one(random, tuple(PACES)) if action in PATHS else ""
    return Subject(_one(random, colours), shape, _one(random, PATTERNS), action, pace)


def sentence(script: Script, random: np.random.Generator) -> str:
    """The script's prompt. Of a camera that stands still nothing is said half of the time."""
    first, *others = script.subjects
    second = others[0] if others else None
    words = first.name
    if second and first.action == "orbit":
        words += f" {_one(random, ROUND_ANOTHER)} {second.name}"
    elif second and second.action == "still":
        words += f" {_verb(first, random)} {_one(random, BESIDE)} {second.name}"
    elif second:
        words += f" {_verb(first, random)} and {second.name} {_verb(second, random)}"
    else:
        words += f" {_verb(first, random)}"
    words += f", {script.background} behind {'them' if second else 'it'}"
    if script.camera != "still" or random.random() < 0.5:
        words += f", {_one(random, CAMERA_WORDS[script.camera])}"
    return f"{words[0].upper()}{words[1:]}."


def combinations() -> Iterator[Subject]:
    """Every (colour, shape, action) that there is, without pattern."""
    for colour, shape, action in product(COLOURS, SHAPES, ACTIONS):
        if not (shape in ROUND and action in TURNS):
            yield Subject(colour, shape, "", action)


def _verb(subject: Subject, random: np.random.Generator) -> str:
    pace = f" {subject.pace}" if subject.pace else ""
    return _one(random, VERBS[subject.action]).format(pace=pace)


def _degrees_apart(a: str, b: str) -> float:
    return abs((hue(a) - hue(b) + 180) % 360 - 180)


def _one(random: np.random.Generator, words: Sequence[Word]) -> Word:
    return words[int(random.integers(len(words)))]
