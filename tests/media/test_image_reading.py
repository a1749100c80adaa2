"""Every kind of picture file: read upright as RGB, or refused with what, numbers and a remedy."""

import contextlib
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lowvram_i2v import image as module
from lowvram_i2v.errors import RequestError
from lowvram_i2v.image import fit_image, pixels, read_image, to_rgb
from lowvram_i2v.sample_photo import draw_sample_photo

PHOTO = draw_sample_photo(96, 64)


def refused(path):
    with pytest.raises(RequestError) as error:
        read_image(path)
    assert error.value.remedy
    return str(error.value)


def saved(folder, image, name, **options):
    path = folder / name
    image.save(path, **options)
    return path


def array(path):
    picture = read_image(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def test_missing_folder_empty_and_no_picture(tmp_path):
    assert "does not exist" in refused(tmp_path / "no.png")
    assert "folder" in refused(tmp_path)
    empty = tmp_path / "empty.jpg"
    empty.touch()
    assert "0 bytes" in refused(empty)
    text = tmp_path / "text.png"
    text.write_text("this is not a picture")
    assert "21 bytes" in refused(text)
    assert "is not a picture" in refused(text)
    assert refused(tmp_path / ("x" * 300 + ".png"))
    assert refused(tmp_path / "nul\0.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "regular file" in refused(tmp_path / "pipe.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tif"])
def test_truncated_files_are_refused(tmp_path, name):
    data = saved(tmp_path, PHOTO, name).read_bytes()
    for share in (0.3, 0.6):
        part = tmp_path / f"part{share}{name}"
        part.write_bytes(data[: int(len(data) * share)])
        assert str(len(part.read_bytes())) in refused(part)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_are_read_or_refused_but_never_crash(tmp_path, data):
    name = data.draw(st.sampled_from(["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tif", "a.ppm"]))
    path = tmp_path / name
    PHOTO.resize((24, 20)).save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    with contextlib.suppress(RequestError):
        assert read_image(path).mode == "RGB"


def png_header(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [12_500, 13_000, 60_000])
def test_decompression_bombs_are_refused_with_numbers(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(side, side))
    message = refused(path)
    assert str(side * side) in message
    assert str(module.MAX_PIXELS) in message


def test_small_and_thin_pictures(tmp_path):
    assert "15x200" in refused(saved(tmp_path, Image.new("RGB", (15, 200)), "small.png"))
    assert "1000:1" in refused(saved(tmp_path, Image.new("RGB", (16_100, 16)), "thin.png"))
    assert array(saved(tmp_path, Image.new("RGB", (16, 16)), "least.png")).shape == (16, 16, 3)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.bmp", "a.tif", "a.ppm"])
def test_lossless_formats_keep_every_value(tmp_path, name):
    options = {"lossless": True} if name.endswith("webp") else {}
    np.testing.assert_array_equal(array(saved(tmp_path, PHOTO, name, **options)), np.asarray(PHOTO))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_honoured(tmp_path, orientation):
    upright = np.asarray(PHOTO)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), "turned.png", exif=exif)
    np.testing.assert_array_equal(array(path), upright)


def test_transparency_is_laid_on_white(tmp_path):
    clear = np.zeros((20, 30, 4), np.uint8)
    clear[:, 15:] = (10, 20, 30, 255)
    clear[:5, 15:, 3] = 128
    for name, image in {
        "rgba.png": Image.fromarray(clear),
        "rgba.webp": Image.fromarray(clear),
    }.items():
        got = array(saved(tmp_path, image, name, **({"lossless": True} if name.endswith("webp") else {})))
        assert (got[:, :15] == 255).all()
        assert (got[5:, 15:] == (10, 20, 30)).all()
        assert np.abs(got[:5, 15:].astype(int) - (132, 137, 142)).max() <= 1
    grey = np.dstack([clear[..., 1], clear[..., 3]])
    got = array(saved(tmp_path, Image.fromarray(grey, "LA"), "la.png"))
    assert (got[:, :15] == 255).all()
    assert (got[5:, 15:] == 20).all()


def test_palettes_with_and_without_transparency(tmp_path):
    indices = Image.fromarray((np.arange(20 * 30).reshape(20, 30) % 3).astype(np.uint8)).convert("P")
    indices.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    plain = array(saved(tmp_path, indices, "plain.png"))
    assert plain[0, 0].tolist() == [255, 0, 0]
    assert plain[0, 1].tolist() == [0, 255, 0]
    for name in ("clear.png", "clear.gif"):
        clear = array(saved(tmp_path, indices, name, transparency=1))
        assert clear[0, 0].tolist() == [255, 0, 0]
        assert clear[0, 1].tolist() == [255, 255, 255]
    by_colour = Image.new("RGB", (20, 20), (1, 2, 3))
    assert (array(saved(tmp_path, by_colour, "trns.png", transparency=(1, 2, 3))) == 255).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 32 * 16).astype(np.uint16).reshape(16, 32)
    expected = np.rint(ramp / 257).astype(np.uint8)
    for name in ("deep.png", "deep.tif", "deep.pgm"):
        got = array(saved(tmp_path, Image.fromarray(ramp), name))
        for channel in range(3):
            np.testing.assert_array_equal(got[..., channel], expected, err_msg=name)


def test_floats_run_to_one_or_to_255_and_must_be_finite(tmp_path):
    unit = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    expected = np.arange(256).reshape(16, 16)
    np.testing.assert_array_equal(array(saved(tmp_path, Image.fromarray(unit), "unit.tif"))[..., 0], expected)
    np.testing.assert_array_equal(array(saved(tmp_path, Image.fromarray(unit * 255), "byte.tif"))[..., 1], expected)
    unit[3, 3] = np.nan
    assert "not finite" in refused(saved(tmp_path, Image.fromarray(unit), "nan.tif"))


def test_grey_one_bit_cmyk_and_lab(tmp_path):
    grey = PHOTO.convert("L")
    got = array(saved(tmp_path, grey, "grey.png"))
    assert (got == np.asarray(grey)[..., None]).all()
    assert set(np.unique(array(saved(tmp_path, PHOTO.convert("1"), "bit.png")))) == {0, 255}
    near = array(saved(tmp_path, PHOTO.convert("CMYK"), "print.jpg", quality=95)).astype(int)
    assert np.abs(near - np.asarray(PHOTO)).mean() < 12
    assert to_rgb(PHOTO.convert("YCbCr")).mode == "RGB"


@pytest.mark.parametrize("name", ["moving.gif", "moving.webp", "moving.png", "pages.tif"])
def test_the_first_of_several_pictures_is_used_with_a_notice(tmp_path, name):
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if name.endswith("webp") else {}
    path = saved(tmp_path, red, name, save_all=True, append_images=[blue, red], **options)
    events = []
    assert np.asarray(read_image(path, events.append))[0, 0].tolist() == [255, 0, 0]
    assert len(events) == 1
    assert "3 pictures" in events[0].text


def test_a_single_picture_makes_no_notice(tmp_path):
    events = []
    read_image(saved(tmp_path, PHOTO, "one.jpg"), events.append)
    assert events == []


sides = st.integers(16, 400)
targets = st.integers(1, 24).map(lambda n: 16 * n)


@settings(max_examples=200, deadline=None)
@given(sides, sides, targets, targets)
def test_fit_is_exact_and_never_pads(width, height, target_width, target_height):
    # No black and no other colour may appear: every pixel of the result is picture.
    fitted = fit_image(Image.new("RGB", (width, height), (200, 150, 100)), target_width, target_height)
    assert fitted.image.size == (target_width, target_height)
    assert (np.asarray(fitted.image) == (200, 150, 100)).all()
    assert f"{width}x{height}" in fitted.description
    assert f"{target_width}x{target_height}" in fitted.description


@settings(max_examples=60, deadline=None)
@given(sides, sides, targets, targets)
def test_fit_keeps_the_centre_and_the_proportions(width, height, target_width, target_height):
    # A picture whose values are its own coordinates tells where each pixel came from.
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    picture = Image.fromarray(np.stack([x, y, 0 * x], -1).round().astype(np.uint8))
    got = np.asarray(fit_image(picture, target_width, target_height).image).astype(float)
    scale = max(target_width / width, target_height / height)
    tolerance = 2 + 255 * 1.5 * max(1 / width, 1 / height, 1 / (scale * width), 1 / (scale * height))
    assert abs(got[..., 0].mean() - 127.5) < tolerance
    assert abs(got[..., 1].mean() - 127.5) < tolerance


def test_a_very_long_picture_is_fitted_without_scaling_all_of_it():
    fitted = fit_image(Image.new("RGB", (400_000, 16), "green"), 1920, 480)
    assert fitted.image.size == (1920, 480)
    assert "px of its width (100.0 %)" in fitted.description


def test_the_sentence_has_the_numbers():
    def sentence(size, width, height):
        return fit_image(Image.new("RGB", size), width, height).description

    assert "75 of 4032 px of its width (1.9 %)" in sentence((4032, 3084), 1088, 848)
    assert "reduced x0.275" in sentence((4032, 3084), 1088, 848)
    assert "nothing is cropped" in sentence((640, 320), 1280, 640)
    assert "enlarged x2 " in sentence((640, 320), 1280, 640)
    assert "kept at its scale" in sentence((640, 480), 480, 480)
    assert "160 of 640 px of its width (25.0 %)" in sentence((640, 480), 480, 480)
    assert "of its height" in sentence((640, 640), 640, 320)


def test_pixels_are_minus_one_to_one_channels_first():
    picture = Image.new("RGB", (32, 16), (0, 255, 51))
    values = pixels(picture)
    assert values.shape == (3, 16, 32)
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    assert (values[0] == -1).all()
    assert (values[1] == 1).all()
    np.testing.assert_allclose(values[2], -0.6, atol=1e-6)


def test_the_sample_photo_is_repeatable_and_has_texture():
    assert PHOTO.size == (96, 64)
    assert PHOTO.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(PHOTO), np.asarray(draw_sample_photo(96, 64)))
    assert not np.array_equal(np.asarray(PHOTO), np.asarray(draw_sample_photo(96, 64, seed=1)))
    assert np.asarray(PHOTO).std() > 30
