"""Every profile that ships can be read, and a wrong key never passes silently."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowvram_i2v.errors import RequestError
from lowvram_i2v.profile import DEFAULT_PROFILE, load_profile, profile_names

GOOD = """
description = "d"
vram_gib = 6.0
reserve_gib = 0.75
compute = "w8a16"
attention = "sdpa"
sparse_density = 0.2
sparse_after = 0.2
decode = "seamless"
host = "auto"
resident_blocks = 0
slots = 2
"""


def test_all_profiles_load() -> None:
    assert DEFAULT_PROFILE in profile_names()
    for name in profile_names():
        assert load_profile(name).description


def test_a_file_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD.replace('"sdpa"', '"auto"'))
    assert load_profile(str(path)).name == "mine"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + 'atention = "x"\n', "unknown key 'atention'"),
        ('description = "d"\n', "missing key 'attention'"),
        (GOOD.replace('"seamless"', "3"), "decode is not a string"),
        (GOOD.replace("seamless", "shiny"), "shiny"),
        (GOOD.replace("resident_blocks = 0", "resident_blocks = true"), "resident_blocks is not an integer"),
        (GOOD.replace("resident_blocks = 0", "resident_blocks = -2"), "resident_blocks is -2"),
        (GOOD.replace("slots = 2", "slots = 1"), "slots is 1"),
        (GOOD.replace("slots = 2", 'slots = "2"'), "slots is not an integer"),
        (GOOD.replace("w8a16", "w4a4"), "compute is 'w4a4'"),
        (GOOD.replace('"auto"', '"floppy"'), "host is 'floppy'"),
        (GOOD.replace('"sdpa"', '"magic"'), "attention is 'magic', not one of auto, sdpa, triton"),
        (GOOD.replace("density = 0.2", "density = 0.0"), "sparse_density is 0"),
        (GOOD.replace("after = 0.2", "after = 1.5"), "sparse_after is 1.5"),
        (GOOD.replace("6.0", "6"), "vram_gib is not a number with a decimal point"),
        (GOOD.replace("6.0", "0.5"), "reserve_gib is 0.75"),
        (GOOD.replace("6.0", "-1.0"), "vram_gib is -1"),
        ("= broken", "TOML"),
    ],
)
def test_faults_are_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(RequestError, match=said):
        load_profile(str(path))


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(RequestError, match="auto"):
        load_profile("nothing")
