"""common/cells.py: which cells belong together, by hand and by brute force."""

import torch

from common.cells import affinity_target, get_down_size, get_mask_by_radius


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_down_size():
    assert get_down_size() == (32, 32)
    assert get_down_size((250, 234)) == (16, 15)
    assert get_down_size((320, 65), 32) == (10, 3)


def test_pairs_within_the_radius():
    mask = get_mask_by_radius(20, 20, 8)
    assert mask.shape == (400, 400) and mask.dtype == torch.bool
    assert torch.equal(mask, mask.T) and mask.diagonal().all()
    assert mask[10 * 20 + 9].sum() == 17**2 and mask[0].sum() == 9**2
    assert get_mask_by_radius(20, 20, 8) is mask, "made once"


def test_pairs_within_the_radius_by_brute_force():
    h, w, radius = 9, 7, 3
    expected = torch.zeros(h * w, h * w, dtype=torch.bool)
    for i in range(h * w):
        for j in range(h * w):
            expected[i, j] = abs(i // w - j // w) <= radius and abs(i % w - j % w) <= radius
    assert torch.equal(get_mask_by_radius(h, w, radius), expected)


def test_affinity_target():
    """Cells 0 1 / 255 1; with radius 1 all are near each other."""
    label = torch.tensor([[0, 1], [255, 1]]).repeat_interleave(16, 0).repeat_interleave(16, 1)[None]
    found = affinity_target(label, get_mask_by_radius(2, 2, 1), (2, 2))
    x = 255
    assert found.tolist() == [[[1, 0, x, 0], [0, 1, x, 1], [x, x, x, x], [0, 1, x, 1]]]


def test_affinity_target_outside_the_radius_and_of_a_negative_slice():
    mask = get_mask_by_radius(2, 5, 2)
    found = affinity_target(torch.zeros(2, 32, 80), mask, (2, 5))
    assert found.unique().tolist() == [1, 255] and torch.equal(found == 1, mask.expand(2, -1, -1))
    noise = torch.randint(0, 2, (2, 32, 80), generator=torch.Generator().manual_seed(0))
    found = affinity_target(noise, mask, (2, 5))
    assert found.unique().tolist() == [0, 1, 255] and torch.equal(found, found.transpose(1, 2))
