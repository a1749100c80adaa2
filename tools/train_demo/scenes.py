"""From a script to a scene: where each object is in every frame.

Invariants: a scene is drawn from (seed, number) alone, so any video of the endless data set can be made by itself; the
first frame and the prompt together decide the rest of the video (a circle begins at its top and runs clockwise, speeds
are words); every object stays inside the picture and two objects stay apart. Lengths are pixels, x to the right, y
down; angles are radians, positive clockwise on the screen. Left out: acceleration, all motion is steady.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tools.train_demo.prompts import PACES, PANS, TURNS, Script, Subject, draw_script, sentence

Track = npt.NDArray[np.float32]  # [F]

SIZES = ((128, 128), (192, 128), (128, 192))  # width, height
FRAMES, FPS = 33, 24
RADII = (15.0, 22.0)
BOUNCE_HEIGHT, BOUNCES = 28.0, 2
CIRCLE = 20.0  # radius of a circle around nothing
TURN = np.pi
GROWN, SHRUNK = 1.7, 0.5
PAN = 36.0
ZOOM = 1.4
TILT = 0.3
UPRIGHT = ("heart", "fish", "car", "house")
MARGIN = 2.0  # between an object and the edge of the picture
GAP = 6.0  # between two objects
TRIES = 200
WAYS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}


@dataclass(frozen=True)
class Thing:
    """An object in the first frame: its centre, its radius and how it is turned."""

    subject: Subject
    x: float
    y: float
    radius: float
    tilt: float


@dataclass(frozen=True)
class Scene:
    """One video. things: in the script's order. background_seed: of the background's random parts."""

    script: Script
    prompt: str
    size: tuple[int, int]
    frames: int
    things: tuple[Thing, ...]
    background_seed: int


@dataclass(frozen=True)
class Course:
    """An object on the screen, frame by frame: each [F]. opacity: 1 to 0."""

    x: Track
    y: Track
    radius: Track
    angle: Track
    opacity: Track


@dataclass(frozen=True)
class CameraCourse:
    """What the camera does, each [F]: screen = centre + (place - centre - offset) * zoom."""

    x: Track
    y: Track
    zoom: Track


def draw_scene(
    seed: int, number: int, held_out: bool = False, size: tuple[int, int] | None = None, demanding: bool = False
) -> Scene:
    """Scene `number` of the data set that `seed` names; held-out ones are another data set. size: None for any.
    demanding: as the script's."""
    random = np.random.default_rng([seed, number, int(held_out)])
    size = size or SIZES[int(random.integers(len(SIZES)))]
    while True:
        script = draw_script(random, held_out, demanding)
        things = _place(script, size, random)
        if things is not None:
            prompt = sentence(script, random)
            return Scene(script, prompt, size, FRAMES, things, int(random.integers(2**31)))


def courses(scene: Scene) -> list[Course]:
    """Every object's way over the screen, the camera's motion included."""
    return _courses(scene.script, scene.things, scene.size, scene.frames)


def camera_course(camera: str, frames: int) -> CameraCourse:
    time = _time(frames)
    still, one = np.zeros_like(time), np.ones_like(time)
    if camera in PANS:
        across, along = WAYS[camera.removeprefix("pan ")]
        return CameraCourse(PAN * across * time, PAN * along * time, one)
    if camera == "zoom in":
        return CameraCourse(still, still, ZOOM**time)
    if camera == "zoom out":
        return CameraCourse(still, still, ZOOM**-time)
    return CameraCourse(still, still, one)


def _courses(script: Script, things: tuple[Thing, ...], size: tuple[int, int], frames: int) -> list[Course]:
    camera = camera_course(script.camera, frames)
    centre = size[0] / 2, size[1] / 2
    made = []
    for index, thing in enumerate(things):
        around = things[1] if thing.subject.action == "orbit" and index == 0 and len(things) > 1 else None
        way = _own_course(thing, frames, around)
        x = centre[0] + (way.x - centre[0] - camera.x) * camera.zoom
        y = centre[1] + (way.y - centre[1] - camera.y) * camera.zoom
        made.append(Course(x, y, way.radius * camera.zoom, way.angle, way.opacity))
    return made


def _own_course(thing: Thing, frames: int, around: Thing | None) -> Course:
    """Where the object is in the world, whatever the camera does."""
    time, action = _time(frames), thing.subject.action
    one = np.ones_like(time)
    x, y, radius, angle, opacity = thing.x * one, thing.y * one, thing.radius * one, thing.tilt * one, one
    if action in WAYS:
        across, along = WAYS[action]
        distance = PACES[thing.subject.pace]
        x, y = x + across * distance * time, y + along * distance * time
    elif action == "bounce":
        y = y - np.float32(BOUNCE_HEIGHT) * np.abs(np.sin(np.pi * BOUNCES * time))
    elif action in TURNS:
        angle = angle + (TURN if action == "clockwise" else -TURN) * time
    elif action == "grow":
        radius = radius * GROWN**time
    elif action == "shrink":
        radius = radius * SHRUNK**time
    elif action == "fade":
        opacity = 1 - time
    elif action == "orbit":
        middle_x, middle_y = (around.x, around.y) if around else (thing.x, thing.y + CIRCLE)
        far = np.hypot(thing.x - middle_x, thing.y - middle_y)
        start = np.arctan2(thing.y - middle_y, thing.x - middle_x)
        x = middle_x + far * np.cos(start + 2 * np.pi * time)
        y = middle_y + far * np.sin(start + 2 * np.pi * time)
    return Course(*(np.asarray(track, np.float32) for track in (x, y, radius, angle, opacity)))


def _place(script: Script, size: tuple[int, int], random: np.random.Generator) -> tuple[Thing, ...] | None:
    """Random places until all stays inside and apart; smaller objects after a while; None when it is hopeless."""
    for attempt in range(TRIES):
        shrink = 1 - 0.3 * attempt / TRIES
        things = tuple(_thing(subject, size, shrink, random) for subject in script.subjects)
        ways = _courses(script, things, size, 9)
        if all(_inside(way, size) for way in ways) and (len(ways) == 1 or _apart(*ways)):
            return things
    return None


def _thing(subject: Subject, size: tuple[int, int], shrink: float, random: np.random.Generator) -> Thing:
    radius = shrink * random.uniform(*RADII)
    tilt = 0.0 if subject.shape in UPRIGHT else random.uniform(-TILT, TILT)
    return Thing(subject, random.uniform(0, size[0]), random.uniform(0, size[1]), radius, tilt)


def _inside(way: Course, size: tuple[int, int]) -> bool:
    reach = way.radius + MARGIN
    low = min((way.x - reach).min(), (way.y - reach).min())
    return bool(low >= 0 and (way.x + reach).max() <= size[0] and (way.y + reach).max() <= size[1])


def _apart(a: Course, b: Course) -> bool:
    return bool(np.all(np.hypot(a.x - b.x, a.y - b.y) >= a.radius + b.radius + GAP))


def _time(frames: int) -> Track:
    """0 in the first frame, 1 in the last."""
    return np.linspace(0, 1, frames, dtype=np.float32)
