"""common/par.py against its definition pixel by pixel, and on pictures whose result is known."""

from math import hypot

import numpy as np
import pytest
import torch

from common.par import PAR


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def slow_par(image: torch.Tensor, mask: torch.Tensor, par: PAR, dilations: tuple[int, ...]) -> torch.Tensor:
    """The definition, pixel by pixel: image (C, H, W), mask (H, W)."""
    _, height, width = image.shape
    offsets = [(dy * d, dx * d) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    distance = np.array([hypot(*offset) for offset in offsets])
    position = np.exp(-((distance / distance.std(ddof=1) / par.w1) ** 2))
    position /= position.sum()
    image, mask = image.double().numpy(), mask.double().numpy()
    for _ in range(par.num_iter):
        result = np.zeros_like(mask)
        for y in range(height):
            for x in range(width):
                places = [(min(max(y + a, 0), height - 1), min(max(x + b, 0), width - 1)) for a, b in offsets]
                near = np.array([image[:, i, j] for i, j in places])
                scale = near.std(0, ddof=1) * par.w1
                likeness = np.exp(-(((near - image[:, y, x]) / scale) ** 2).mean(1))
                weight = (likeness / likeness.sum() + par.w2 * position) / (1 + par.w2)
                result[y, x] = sum(w * mask[i, j] for w, (i, j) in zip(weight, places, strict=True))
        mask = result
    return torch.from_numpy(mask).float()


@pytest.mark.parametrize("grey", [True, False])
def test_par_follows_its_definition(grey):
    image = random(2, 1 if grey else 3, 9, 7).expand(2, 3, 9, 7)
    masks = random(2, 2, 9, 7, seed=1)
    par = PAR(num_iter=3, dilations=(1, 2, 5), w1=0.8, w2=0.3)
    found = par(image, masks)
    for n in range(2):
        for k in range(2):
            assert torch.allclose(found[n, k], slow_par(image[n], masks[n, k], par, (1, 2, 5)), atol=2e-6)


def test_par_of_one_pixel_on_a_flat_image():
    """Weights (1/8 + 0.01/4) / 1.01 of straight neighbours, (1/8) / 1.01 of diagonal ones: at a distance of
    sqrt(2) the position's softmax is exp(-227) of that at 1."""
    mask = torch.zeros(1, 1, 5, 5)
    mask[..., 2, 2] = 1
    found = PAR(num_iter=1, dilations=(1,))(torch.full((1, 3, 5, 5), 0.7), mask)[0, 0]
    assert found[1:4, 1:4].tolist() == [
        pytest.approx(row, abs=1e-6)
        for row in ([0.123762, 0.126238, 0.123762], [0.126238, 0, 0.126238], [0.123762, 0.126238, 0.123762])
    ]
    assert found.sum().item() == pytest.approx(1, abs=1e-6)


def test_par_keeps_to_one_side_of_an_edge():
    """Beside the edge 5 of 8 neighbours are on its side; std sqrt(1.875 / 7), so that others weigh e^-41."""
    image = torch.zeros(1, 3, 5, 6)
    image[..., 3:] = 1
    mask = torch.zeros(1, 1, 5, 6)
    mask[..., 2:] = 1  # one column too wide
    found = PAR(num_iter=1, dilations=(1,), w2=0)(image, mask)[0, 0]
    assert found[2].tolist() == pytest.approx([0, 3 / 8, 2 / 5, 1, 1, 1], abs=1e-6)


def test_par_of_a_blurred_step_finds_the_edge_of_the_image():
    image = torch.zeros(1, 3, 24, 48)
    image[..., 20:] = 0.6
    image += 0.02 * random(1, 3, 24, 48)
    mask = ((torch.arange(48) - 12) / 16).clamp(0, 1).expand(1, 1, 24, 48)  # from 12 to 28
    found = PAR()(image, mask)[0, 0, 12]
    before, after = (m[20] - m[19] for m in (mask[0, 0, 12], found))
    assert before.item() == pytest.approx(1 / 16) and after > 0.5
    assert found[:19].max() < 0.3 and found[21:].min() > 0.7


def test_par_brings_masks_to_the_size_of_the_image_with_corners_aligned():
    found = PAR(num_iter=0)(random(1, 3, 2, 4), torch.tensor([[[[0.0, 3.0]]]]))
    assert torch.allclose(found, torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(1, 1, 2, 4))


def test_par_is_linear_and_keeps_constants():
    image, par = random(2, 3, 20, 30), PAR()
    first, second = random(2, 1, 20, 30, seed=1), random(2, 1, 20, 30, seed=2)
    both = par(image, torch.cat([first, second, 3 * first - second], dim=1))
    assert torch.allclose(both[:, 2], 3 * both[:, 0] - both[:, 1], atol=1e-5)
    assert torch.allclose(par(image, torch.full((2, 1, 4, 4), 0.4)), torch.tensor(0.4), atol=1e-5)
    assert torch.allclose(par(image, first) + par(image, 1 - first), torch.tensor(1.0), atol=1e-5)


def test_par_of_the_mirror_image():
    image, mask, par = random(2, 3, 20, 30), random(2, 1, 20, 30, seed=1), PAR()
    for axis in (2, 3):
        assert (par(image.flip(axis), mask.flip(axis)).flip(axis) - par(image, mask)).abs().max() <= 5e-6


def test_par_is_finite_on_flat_images_and_in_half_precision():
    mask = random(1, 1, 8, 8)
    assert PAR()(torch.full((1, 3, 8, 8), 0.3), mask).isfinite().all()
    lonely = torch.full((1, 3, 8, 8), 0.3)
    lonely[..., 4, 4] = 0.9
    assert PAR()(lonely, mask).isfinite().all()
    found = PAR()(random(1, 3, 8, 8).bfloat16(), mask.bfloat16())
    assert found.dtype == torch.float32 and found.isfinite().all()


def test_par_does_not_depend_on_how_the_batch_is_cut(monkeypatch):
    image, mask, par = random(3, 3, 12, 16), random(3, 2, 6, 8, seed=1), PAR()
    together = par(image, mask)
    monkeypatch.setattr("common.par.MOST_WEIGHTS", {"cpu": 2 * 48 * 12 * 16, "cuda": 1})
    assert torch.equal(par(image, mask), together) and together.shape == (3, 2, 12, 16)
    assert par(image[:0], mask[:0]).shape == (0, 2, 12, 16)


def test_par_leaves_its_input_and_the_threads_as_they_are():
    image, mask, threads = random(1, 3, 8, 8), random(1, 1, 8, 8), torch.get_num_threads()
    copies = image.clone(), mask.clone()
    PAR()(image, mask)
    assert torch.equal(image, copies[0]) and torch.equal(mask, copies[1])
    assert torch.get_num_threads() == threads
