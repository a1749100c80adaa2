"""GenerateRequest: checks, the resolved request, settings that repeat a run, and the buckets' rules."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram_i2v.errors import RequestError
from lowvram_i2v.request import RESOLUTIONS, GenerateRequest, buckets, nearest_bucket

REQUEST = GenerateRequest(Path("photo.jpg"), "a cat", Path("out.mp4"))


def refused(**changes):
    with pytest.raises(RequestError) as error:
        replace(REQUEST, **changes).check()
    assert error.value.what
    assert error.value.remedy
    return str(error.value)


def test_defaults_pass_the_checks():
    REQUEST.check()
    replace(REQUEST, prompt="").check()


@pytest.mark.parametrize(
    ("frames", "nearest"),
    [
        (6, "5 and 9"),
        (130, "129 and 133"),
        (131, "129 and 133"),
        (132, "133 and 129"),
        (2, "5"),
        (1, "5"),
        (-3, "5"),
    ],
)
def test_frames_that_are_not_4n_plus_1_name_the_nearest(frames, nearest):
    message = refused(frames=frames)
    assert str(frames) in message
    assert nearest in message


@given(st.integers(1, 256))
def test_every_4n_plus_1_is_accepted(n):
    replace(REQUEST, frames=4 * n + 1).check()


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((500, 512), "496x512"),
        ((512, 0), "512x16"),
        ((-16, 64), "16x64"),
        ((5000, 512), "4096x512"),
        ((7, 7), "16x16"),
    ],
)
def test_sizes_that_cannot_be_made_name_the_nearest(size, nearest):
    message = refused(size=size)
    assert f"{size[0]}x{size[1]}" in message
    assert nearest in message


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("size", (512,), "--size"),
        ("size", (512.0, 512), "--size"),
        ("resolution", "1080p", "720p"),
        ("frames", 1_000_001, "1025"),
        ("frames", True, "--frames"),
        ("frames", "129", "--frames"),
        ("steps", 0, "--steps"),
        ("fps", 0, "--fps"),
        ("fps", 121, "120"),
        ("seed", -1, "--seed"),
        ("seed", 2**63, str(2**63 - 1)),
        ("flow_shift", 0.0, "--flow-shift"),
        ("flow_shift", float("nan"), "nan"),
        ("flow_shift", float("inf"), "inf"),
        ("guidance", -1.0, "--guidance"),
        ("cfg", 0.5, "--cfg"),
        ("cfg", None, "--cfg"),
        ("stability", 1, "stability"),
        ("prompt", None, "--prompt"),
        ("prompt", "caf\udce9", "character 4"),
        ("negative_prompt", 3, "--negative-prompt"),
    ],
)
def test_bad_values_are_refused_and_named(field, value, named):
    assert named in refused(**{field: value})


def test_a_negative_prompt_without_cfg_is_noticed():
    assert replace(REQUEST, negative_prompt="blurry").notices()
    assert not replace(REQUEST, negative_prompt="blurry", cfg=2.0).notices()
    assert not REQUEST.notices()


@pytest.mark.parametrize(("stability", "shift"), [(True, 7.0), (False, 17.0)])
def test_resolve_fills_in_size_and_shift_and_keeps_what_was_given(stability, shift):
    resolved = replace(REQUEST, stability=stability).resolve(1280, 720)
    assert resolved.flow_shift == shift
    assert resolved.size == (1248, 704)
    given_size = replace(REQUEST, size=(640, 320), flow_shift=3.5)
    assert given_size.resolve(1280, 720) == given_size
    assert resolved.resolve(1, 1) == resolved


texts = st.text(st.characters(exclude_categories=["Cs"]))
requests = st.builds(
    GenerateRequest,
    image=st.just(Path("photo.jpg").absolute()),
    output=st.just(Path("new.mp4")),
    prompt=texts,
    negative_prompt=texts,
    resolution=st.sampled_from(sorted(RESOLUTIONS)),
    size=st.none() | st.tuples(*[st.integers(1, 256).map(lambda n: 16 * n)] * 2),
    frames=st.integers(1, 256).map(lambda n: 4 * n + 1),
    steps=st.integers(1, 1000),
    flow_shift=st.none() | st.floats(0.01, 1000),
    stability=st.booleans(),
    guidance=st.none() | st.floats(0, 100),
    cfg=st.floats(1, 100),
    seed=st.integers(0, 2**63 - 1),
    fps=st.integers(1, 120),
)


@given(requests)
def test_settings_repeat_the_request_through_json(request_):
    settings = json.loads(json.dumps(request_.to_settings(model="tiny")))
    assert settings["about"]["program"] == "lowvram-i2v"
    assert settings["about"]["version"]
    assert settings["about"]["model"] == "tiny"
    assert GenerateRequest.from_settings(settings, Path("new.mp4")) == request_


def test_settings_hold_an_absolute_image_path_and_no_output():
    settings = REQUEST.to_settings()
    assert Path(settings["image"]).is_absolute()
    assert "output" not in settings


def test_unknown_and_missing_settings_are_all_named():
    settings = {**REQUEST.to_settings(), "teacache": 0.1, "sage": True}
    del settings["prompt"]
    with pytest.raises(RequestError) as error:
        GenerateRequest.from_settings(settings, Path("o.mp4"))
    assert all(name in error.value.what for name in ("teacache", "sage", "prompt"))


@pytest.mark.parametrize("change", [{"image": 3}, {"frames": 130}, {"steps": "50"}, {"size": "640x320"}, {"size": []}])
def test_settings_with_bad_values_are_refused(change):
    with pytest.raises(RequestError):
        GenerateRequest.from_settings({**REQUEST.to_settings(), **change}, Path("o.mp4"))


@given(st.integers(64, 1600), st.sampled_from([16, 32, 64]), st.sampled_from([2.0, 4.0]))
def test_buckets_keep_to_their_rules(base, cell, max_ratio):
    sizes = buckets(base, cell, max_ratio)
    cells = round((base / cell) ** 2)
    assert sizes == sorted(set(sizes), key=lambda size: (-size[0], size[1]))
    for height, width in sizes:
        assert height % cell == width % cell == 0
        assert (height // cell) * (width // cell) <= cells
        assert max(height, width) <= max_ratio * min(height, width)
    assert any(height == width for height, width in sizes)


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from(sorted(RESOLUTIONS.values())))
def test_the_bucket_is_at_least_as_square_as_the_picture(width, height, base):
    bucket_height, bucket_width = nearest_bucket(width, height, base)
    assert (bucket_height, bucket_width) in buckets(base)
    assert (bucket_height >= bucket_width) if height >= width else (bucket_height <= bucket_width)
    if height >= width:
        assert round(bucket_height / bucket_width, 5) <= height / width
    else:
        assert round(bucket_height / bucket_width, 5) > height / width or width > 4 * height


def test_the_request_and_media_modules_do_not_import_torch():
    modules = ("request", "image", "video", "sample_photo")
    code = "; ".join(f"import lowvram_i2v.{name}" for name in modules)
    code += "; import sys; assert not {'torch', 'transformers', 'imageio_ffmpeg'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
