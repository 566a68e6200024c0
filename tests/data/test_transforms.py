"""Transforms of whole batches: each image is compared with what torch makes of it alone, or with a closed form."""

import pytest
import torch
import torch.nn.functional as F

from learnloop.data import transforms


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def images(n=200, height=6, width=8, channels=2):
    return torch.arange(1.0, n * channels * height * width + 1).view(n, channels, height, width)


def test_about_half_of_the_images_are_mirrored_and_the_others_stay():
    x = images()
    flipped = transforms.flip(x)
    is_flipped = [torch.equal(new, old.flip(-1)) for new, old in zip(flipped, x, strict=True)]
    assert all(torch.equal(new, old) for new, old, done in zip(flipped, x, is_flipped, strict=True) if not done)
    assert 70 < sum(is_flipped) < 130


@pytest.mark.parametrize(("p", "expected"), [(0.0, images(3)), (1.0, images(3).flip(-1))])
def test_with_probability_0_none_is_mirrored_and_with_1_all(p, expected):
    assert torch.equal(transforms.flip(images(3), p), expected)


@pytest.mark.parametrize("mode", ["reflect", "constant"])
def test_a_crop_is_a_window_of_the_padded_image_and_every_window_comes_up(mode):
    x = images()
    found = set()
    for new, old in zip(transforms.crop(x, 2, mode), x, strict=True):
        padded = F.pad(old[None], (2, 2, 2, 2), mode=mode)[0]
        windows = [(i, j) for i in range(5) for j in range(5) if torch.equal(new, padded[:, i : i + 6, j : j + 8])]
        assert windows
        found.add(windows[0])
    assert len(found) == 25


def test_a_crop_without_padding_is_the_image():
    assert torch.equal(transforms.crop(images(3), 0), images(3))


def test_bytes_stay_bytes():
    x = images(3).to(torch.uint8)
    for change in (transforms.flip, transforms.cutout, lambda x: transforms.crop(x, 1, "constant")):
        assert change(x).dtype == torch.uint8


def test_cutout_sets_one_square_to_0_in_all_channels_which_the_edge_may_cut():
    x = images()
    areas = set()
    for image in transforms.cutout(x, 4):
        hole = image[0] == 0
        assert torch.equal(hole, image[1] == 0)
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        areas.add((len(rows), len(columns)))
    assert areas == {(h, w) for h in (2, 3, 4) for w in (2, 3, 4)}
    assert torch.equal(x, images())


def test_normalize_takes_one_mean_and_one_deviation_per_channel():
    x = images(4)
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3))
    normalized = transforms.normalize(x, mean.tolist(), std)
    assert torch.allclose(normalized.mean((0, 2, 3)), torch.zeros(2), atol=1e-6)
    assert torch.allclose(normalized.std((0, 2, 3)), torch.ones(2), atol=1e-6)


def test_resize_keeps_what_is_constant_and_averages_the_rest():
    x = torch.ones(2, 1, 8, 8)
    x[1, :, :, 4:] = 3.0
    small = transforms.resize(x, (4, 2))
    assert small.shape == (2, 1, 4, 2)
    assert torch.allclose(small[0], torch.ones(1, 4, 2))
    assert small[1].mean().item() == pytest.approx(2.0)
