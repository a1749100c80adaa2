"""Profiles: the one dial between speed and memory. A profile is a TOML file in `profiles/`; the directory is the list.

Invariant: a key that is unknown, missing or of the wrong kind is refused, so that a typing error never passes
silently. What follows from the budget (resident blocks, chunks) is not here: `plan.py` works it out.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path

from lowvram_i2v.attention import AUTO, BACKENDS
from lowvram_i2v.errors import RequestError
from lowvram_i2v.kernels.compute import COMPUTES

DECODE_POLICIES = ("reference", "seamless")
HOSTS = ("auto", "pinned", "mapped")
CHOICES = {"decode": DECODE_POLICIES, "compute": tuple(COMPUTES), "host": HOSTS, "attention": (AUTO, *BACKENDS)}
DEFAULT_PROFILE = "auto"
FEWEST_SLOTS = 2
KINDS = {"str": (str, "a string"), "int": (int, "an integer"), "float": (float, "a number with a decimal point")}


@dataclass(frozen=True)
class VramProfile:
    """One profile.

    vram_gib: GiB of video memory that a run may take in all; 0 for what is free on the device.
    reserve_gib: how much of it CUDA and the libraries take for themselves, outside torch's allocator.
    compute: how quantized layers multiply: "w8a16" exactly, after dequantizing, "w8a8" in 8 bits.
    attention: a name from the table of attention backends, or "auto" for 8 bits with "w8a8" and torch's own else.
    sparse_density: of "triton-sparse": the share of key blocks that a block of queries sees exactly.
    sparse_after: of "triton-sparse": the share of the steps that run dense before.
    decode: "reference" gives what the released code's tiles give, "seamless" decodes the video as one, without tiles.
    host: where streamed blocks wait: "pinned" in RAM, "mapped" in the file; "auto" is the first that fits.
    resident_blocks: how many of the transformer's blocks keep their weights on the device; -1 for as many as fit.
    slots: places on the device for the blocks that stream, 2 or more.
    """

    name: str
    description: str
    vram_gib: float
    reserve_gib: float
    compute: str
    attention: str
    sparse_density: float
    sparse_after: float
    decode: str
    host: str
    resident_blocks: int
    slots: int


def profile_names() -> list[str]:
    """The profiles that come with the program: `auto`, then by size."""
    folder = resources.files("lowvram_i2v.profiles")
    names = [entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")]
    return sorted(names, key=_size_first)


def _size_first(name: str) -> tuple[int, str]:
    digits = name.partition("gb")[0]
    return (int(digits) if digits.isdecimal() else 0, name)


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
    for key, choices in CHOICES.items():
        if getattr(profile, key) not in choices:
            faults.append(f"{key} is {getattr(profile, key)!r}, not one of {', '.join(choices)}")
    if not 0 <= profile.vram_gib <= 1024:
        faults.append(f"vram_gib is {profile.vram_gib:g}, not a size in GiB or 0 for what is free")
    if not profile.reserve_gib >= 0 or 0 < profile.vram_gib <= profile.reserve_gib:
        faults.append(f"reserve_gib is {profile.reserve_gib:g}, not a part of vram_gib")
    if not 0 < profile.sparse_density <= 1:
        faults.append(f"sparse_density is {profile.sparse_density:g}, not above 0 and up to 1")
    if not 0 <= profile.sparse_after <= 1:
        faults.append(f"sparse_after is {profile.sparse_after:g}, not from 0 to 1")
    if profile.resident_blocks < -1:
        faults.append(f"resident_blocks is {profile.resident_blocks}, not a number of blocks or -1 for all that fit")
    if profile.slots < FEWEST_SLOTS:
        faults.append(f"slots is {profile.slots}, not {FEWEST_SLOTS} or more")
    if faults:
        raise _refused(name, faults)
    return profile


def _refused(name: str, faults: list[str]) -> RequestError:
    return RequestError(f"profile {name}: {'; '.join(faults)}", "profiles/auto.toml shows all keys.")
