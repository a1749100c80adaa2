"""Every profile that ships can be read, and a wrong key never passes silently."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowvram_i2v.errors import RequestError
from lowvram_i2v.profile import DEFAULT_PROFILE, load_profile, profile_names

GOOD = 'description = "d"\nattention = "sdpa"\ndecode = "plain"\nresident_blocks = 0\nslots = 2\n'


def test_all_profiles_load() -> None:
    assert DEFAULT_PROFILE in profile_names()
    for name in profile_names():
        assert load_profile(name).description


def test_a_file_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    assert load_profile(str(path)).name == "mine"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + 'atention = "x"\n', "unknown key 'atention'"),
        ('description = "d"\n', "missing key 'attention'"),
        (GOOD.replace('"plain"', "3"), "decode is not a string"),
        (GOOD.replace("plain", "shiny"), "shiny"),
        (GOOD.replace("resident_blocks = 0", "resident_blocks = true"), "resident_blocks is not an integer"),
        (GOOD.replace("resident_blocks = 0", "resident_blocks = -2"), "resident_blocks is -2"),
        (GOOD.replace("slots = 2", "slots = 1"), "slots is 1"),
        (GOOD.replace("slots = 2", 'slots = "2"'), "slots is not an integer"),
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
