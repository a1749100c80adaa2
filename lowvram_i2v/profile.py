"""Profiles: the one dial between speed and memory. A profile is a TOML file in `profiles/`; the directory is the list.

Invariant: a key that is unknown, missing or of the wrong kind is refused, so that a typing error never passes
silently.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path

from lowvram_i2v.errors import RequestError

DECODE_POLICIES = ("tiled", "plain")
DEFAULT_PROFILE = "whole"
KINDS = {"str": (str, "a string"), "int": (int, "an integer")}


@dataclass(frozen=True)
class VramProfile:
    """One profile.

    attention: a name from the table of attention backends.
    decode: "tiled" cuts the VAE's work into the reference's tiles, "plain" decodes the whole video at once.
    resident_blocks: how many of the transformer's blocks keep their weights on the device, -1 for all; the others wait
    in RAM and are copied when it is their turn. slots: places on the device for those, 2 or more.
    """

    name: str
    description: str
    attention: str
    decode: str
    resident_blocks: int
    slots: int


def profile_names() -> list[str]:
    """The profiles that come with the program."""
    folder = resources.files("lowvram_i2v.profiles")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_profile(name: str) -> VramProfile:
    """A profile by its name, or by the path of a TOML file. Raises RequestError for one that cannot be used."""
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise RequestError(f"profile file {name} does not exist")
        text = Path(name).read_text(encoding="utf-8")
    elif name in profile_names():
        text = (resources.files("lowvram_i2v.profiles") / f"{name}.toml").read_text(encoding="utf-8")
    else:
        raise RequestError(
            f"profile {name!r} is not known",
            f"Use one of: {', '.join(profile_names())}; or the path of a .toml file.",
        )
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"profile {name} is not valid TOML: {error}") from error
    return _checked(Path(name).stem, values)


def _checked(name: str, values: dict[str, object]) -> VramProfile:
    kinds = {field.name: KINDS[str(field.type)] for field in fields(VramProfile) if field.name != "name"}
    known = kinds.keys()
    faults = [f"unknown key {key!r}" for key in sorted(values.keys() - known)]
    faults += [f"missing key {key!r}" for key in sorted(known - values.keys())]
    faults += [
        f"{key} is not {words}"
        for key, (kind, words) in kinds.items()
        if key in values and type(values[key]) is not kind  # true and false are no integers
    ]
    if faults:
        raise _refused(name, faults)
    profile = VramProfile(name, **values)  # type: ignore[arg-type]
    if profile.decode not in DECODE_POLICIES:
        faults.append(f"decode is {profile.decode!r}, not one of {', '.join(DECODE_POLICIES)}")
    if profile.resident_blocks < -1:
        faults.append(f"resident_blocks is {profile.resident_blocks}, not a number of blocks or -1 for all")
    if profile.slots < 2:
        faults.append(f"slots is {profile.slots}, not 2 or more")
    if faults:
        raise _refused(name, faults)
    return profile


def _refused(name: str, faults: list[str]) -> RequestError:
    return RequestError(f"profile {name}: {'; '.join(faults)}", "profiles/whole.toml shows all keys.")
