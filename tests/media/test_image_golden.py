"""Golden G: buckets, the choice among them, and the pixels of the first frame, all exact."""

import numpy as np
import pytest
import torch
from PIL import Image

from goldens import FOLDER, Sampled, golden, names
from lowvram_i2v.image import fit_image, pixels, read_image
from lowvram_i2v.request import buckets, nearest_bucket

pytestmark = [pytest.mark.golden, pytest.mark.parametrize("name", names("G_"))]


def assert_exact(actual: np.ndarray, expected: torch.Tensor | Sampled) -> None:
    if isinstance(expected, Sampled):
        assert actual.shape == expected.shape
        actual, expected = actual.reshape(-1)[:: expected.stride], expected.values
    np.testing.assert_array_equal(actual, expected.numpy())


def test_bucket_lists(name):
    info = golden(name).info
    cell, max_ratio = info["config"]["patch"], info["config"]["max_ratio"]
    assert info["bucket_lists"]
    for entry in info["bucket_lists"].values():
        expected = [tuple(size) for size in entry["sizes_h_w"]]
        assert buckets(entry["base"], cell, max_ratio) == expected
        assert len(expected) == entry["count"]


def test_table_and_extreme_ratios(name):
    info = golden(name).info
    bases = info["config"]["base"]
    for row in info["table"]:
        for resolution in bases.keys() & row.keys():
            height, width = nearest_bucket(row["image_w"], row["image_h"], bases[resolution])
            chosen = row[resolution]
            assert (height, width) == (chosen["h"], chosen["w"]), row
            assert round(height / width, 5) == chosen["bucket_ratio"]
    for row in info["extreme_ratios"]:
        expected = (row["h"], row["w"])
        assert nearest_bucket(row["image_w"], row["image_h"], bases[row["res"]]) == expected, row


def test_pixels_of_the_first_frame(name):
    data = golden(name)
    assert data.info["images"]
    for index, entry in enumerate(data.info["images"]):
        picture = read_image(FOLDER / entry["file"])
        assert picture.size == (entry["image_w"], entry["image_h"])
        height, width = nearest_bucket(*picture.size, entry["base"])
        assert (height, width) == (entry["target_h"], entry["target_w"])
        fitted = fit_image(picture, width, height).image
        assert isinstance(fitted, Image.Image)
        assert_exact(np.asarray(fitted), data[f"image{index}.u8_hwc"])
        values = pixels(fitted)
        if f"image{index}.tensor" in data:
            assert_exact(values, data[f"image{index}.tensor"])
        if f"image{index}.tensor_rows_0_8" in data:
            assert_exact(values[:, :8], data[f"image{index}.tensor_rows_0_8"])
