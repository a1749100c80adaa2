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


@dataclass(frozen=True)
class VramProfile:
    """One profile.

    attention: a name from the table of attention backends.
    decode: "tiled" cuts the VAE's work into the reference's tiles, "plain" decodes the whole video at once.
    """

    name: str
    description: str
    attention: str
    decode: str


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
    known = {field.name for field in fields(VramProfile)} - {"name"}
    faults = [f"unknown key {key!r}" for key in sorted(values.keys() - known)]
    faults += [f"missing key {key!r}" for key in sorted(known - values.keys())]
    faults += [f"{key} is not a string" for key in sorted(known & values.keys()) if not isinstance(values[key], str)]
    if not faults and values["decode"] not in DECODE_POLICIES:
        faults.append(f"decode is {values['decode']!r}, not one of {', '.join(DECODE_POLICIES)}")
    if faults:
        raise RequestError(f"profile {name}: {'; '.join(faults)}", "profiles/whole.toml shows all keys.")
    return VramProfile(name, **{key: str(values[key]) for key in known})
