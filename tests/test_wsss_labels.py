"""From slice labels to pixel labels: CAM, PAR, affinity, losses, scores. Numbers are worked out by hand."""

from math import hypot, log, log1p, sqrt

import numpy as np
import pytest
import torch
from torch import nn

from common.par import PAR
from common.pixel_labels import class_shares, in_boxes, zero_pixels_background
from common.sweep import Sweep
from wsss_medical import affinity, cam, losses

POSITIVE = torch.tensor([[1.0]])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=generator(seed))


# ---- multi-scale CAM ----


class StubNetwork(nn.Module):
    """A cell is a mean over 16 x 16 pixels; the CAM is its first channel plus `slope` for each column."""

    def __init__(self, slope: float = 0.0) -> None:
        super().__init__()
        self.slope, self.dropout, self.frozen = slope, nn.Dropout(0.5), nn.Dropout(0.5).eval()

    def cam_only(self, image):
        cells = nn.functional.avg_pool2d(self.frozen(self.dropout(image)), 16, ceil_mode=True)
        values = cells.flatten(2)
        columns = torch.arange(cells.shape[3]) * self.slope
        return cells[:, :1] + columns, values.transpose(1, 2) @ values, []


def test_cam_is_the_sum_over_scales_of_the_positive_part():
    image = torch.full((2, 3, 32, 64), 0.5)
    image[1] = -0.5
    found, _, _ = cam.multi_scale_cam(StubNetwork(), image, (1.0, 0.5, 1.5))
    assert found.shape == (2, 1, 32, 64)
    assert torch.allclose(found[0], torch.tensor(1.5)) and (found[1] == 0).all()


def test_cam_takes_the_larger_one_of_image_and_mirror_image():
    """Two cells of 0 and 1 are the ramp 1/32, 3/32, ... between the middles of the cells, flat outside."""
    found, _, _ = cam.multi_scale_cam(StubNetwork(slope=1.0), torch.zeros(1, 3, 16, 32), (1.0,))
    ramp = ((torch.arange(32) - 7.5) / 16).clamp(0, 1)
    assert torch.allclose(found[0, 0], torch.maximum(ramp, ramp.flip(0)).expand(16, 32), atol=1e-6)


def test_cam_of_the_mirror_image_is_the_mirror_of_the_cam():
    network, image = StubNetwork(slope=0.3), random(2, 3, 48, 80)
    found = cam.normalise_cam(cam.multi_scale_cam(network, image)[0])
    mirrored = cam.normalise_cam(cam.multi_scale_cam(network, image.flip(3))[0])
    assert (found - mirrored.flip(3)).abs().max() <= 5e-5


@pytest.mark.parametrize("scales", [(1.0, 0.5, 1.5), (1.5, 1.0), (0.5, 1.5)])
def test_affinity_is_that_of_the_largest_scale_and_of_the_image_itself(scales):
    network, image = StubNetwork(), random(2, 3, 32, 64)
    _, found, cells = cam.multi_scale_cam(network, image, scales)
    assert cells == (3, 6) and found.shape == (2, 18, 18)
    expected = network.eval().cam_only(nn.functional.interpolate(image, size=(48, 96), mode="bilinear"))[1]
    assert torch.allclose(found, expected)


def test_cells_that_begin_count():
    _, found, cells = cam.multi_scale_cam(StubNetwork(), random(1, 3, 30, 50), (1.0,))
    assert cells == (2, 4) and found.shape == (1, 8, 8)


def test_cam_is_computed_in_evaluation_mode_and_every_module_keeps_its_own():
    network, image = StubNetwork().train(), random(1, 3, 32, 32)
    network.frozen.eval()
    first, again = (cam.multi_scale_cam(network, image)[0] for _ in range(2))
    assert torch.equal(first, again) and not first.requires_grad
    assert network.training and network.dropout.training and not network.frozen.training
    network.cam_only = None
    with pytest.raises(TypeError):
        cam.multi_scale_cam(network, image)
    assert network.dropout.training


def test_cam_needs_a_scale():
    with pytest.raises(ValueError, match="no scales"):
        cam.multi_scale_cam(StubNetwork(), random(1, 3, 32, 32), ())


def test_normalised_cam():
    raw = torch.tensor([[2.0, 5.0], [3.0, 2.5]])
    found = cam.normalise_cam(torch.stack([raw, torch.zeros(2, 2), torch.full((2, 2), 7.0)])[:, None])
    assert found[0].min() == 0 and found[0].max().item() == pytest.approx(3 / 3.00001, abs=1e-7)
    assert found[0, 0, 1, 0].item() == pytest.approx(1 / 3.00001, abs=1e-7)
    assert (found[1:] == 0).all()


# ---- labels from a CAM ----


def test_cam_to_label_with_one_threshold():
    values = torch.tensor([[[[0.2, 0.45, 0.46, 0.9]]]])
    assert cam.cam_to_label(values, POSITIVE, background=0.45).tolist() == [[[0, 0, 1, 1]]]
    assert cam.cam_to_label(values, 0 * POSITIVE, background=0.45).tolist() == [[[0, 0, 0, 0]]]


def test_cam_to_label_with_two_thresholds_and_boxes():
    values = torch.tensor([[[[0.2, 0.35, 0.36, 0.55, 0.56, 0.9]]]]).expand(2, 1, 1, 6)
    cls_label, boxes = torch.tensor([[1], [0]]), torch.tensor([[0, 1, 0, 5], [0, 1, 2, 6]])
    found = cam.cam_to_label(values, cls_label, boxes, low=0.35, high=0.55)
    assert found.tolist() == [[[0, 0, 255, 255, 1, 255]], [[255, 255, 0, 0, 0, 0]]]


def test_cam_to_label_chooses_among_the_classes_in_the_slice():
    values = torch.tensor([0.5, 0.8, 0.6]).view(1, 3, 1, 1)
    assert cam.cam_to_label(values, torch.tensor([[1, 1, 1]]), background=0.45).item() == 2
    assert cam.cam_to_label(values, torch.tensor([[1, 0, 1]]), background=0.45).item() == 3
    with pytest.raises(ValueError, match="either background or both"):
        cam.cam_to_label(values, torch.tensor([[1, 1, 1]]), low=0.3)


def test_boxes_do_not_include_their_ends():
    found = in_boxes(torch.tensor([[1, 3, 2, 4], [0, 3, 0, 5]]), (3, 5))
    assert found[0].nonzero().tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]] and found[1].all()


def test_pixels_that_are_exactly_zero_are_background():
    image = torch.tensor([[[[0.0, 0.0, 1e-3, 0.0]], [[0.0, 0.5, 0.0, 0.0]]]])
    label = torch.tensor([[[1, 1, 255, 255]]])
    assert zero_pixels_background(label, image).tolist() == [[[0, 1, 255, 0]]]
    boxes = torch.tensor([[0, 1, 0, 3]])
    assert zero_pixels_background(label, image, boxes).tolist() == [[[0, 1, 255, 255]]]
    assert label.tolist() == [[[1, 1, 255, 255]]]


class RecordingPAR(PAR):
    """Refines nothing, but brings to the size of the image, and notes what it is called with."""

    def __init__(self) -> None:
        super().__init__(num_iter=0)
        self.shapes = []

    def forward(self, image01, masks):
        self.shapes.append(tuple(image01.shape))
        return super().forward(image01, masks)


def blocks(*values: float, side: int = 16) -> torch.Tensor:
    """(1, 1, side, side * n): blocks of one value each, side by side."""
    return torch.tensor(values).repeat_interleave(side).expand(side, -1)[None, None].clone()


def test_refined_label_is_undecided_between_the_two_thresholds():
    image, par = random(3, 3, 16, 48), RecordingPAR()
    values = torch.cat([blocks(0.3, 0.5, 0.6), blocks(0.9, 0.9, 0.9), blocks(0.6, 0.3, 0.3)])
    cls_label, boxes = torch.tensor([[1], [0], [1]]), torch.tensor([[2, 16, 0, 48]] * 3)
    found = cam.refined_label(par, image, values, cls_label, boxes, 0.35, 0.55)
    assert found.dtype == torch.int64 and found.shape == (3, 16, 48)
    assert (found[:, :2] == 255).all() and (found[1, 2:] == 0).all()
    middles = found[:, 8, [4, 24, 44]]  # away from the edges, which halving blurs
    assert middles.tolist() == [[0, 255, 1], [0, 0, 0], [1, 0, 0]]
    assert par.shapes == [(2, 3, 8, 24)], "at half the resolution, and without the negative slice"


def test_refined_label_of_negative_slices_needs_no_refinement():
    par = RecordingPAR()
    found = cam.refined_label(
        par, random(2, 3, 16, 16), random(2, 1, 16, 16), torch.zeros(2, 1), None, 0.35, 0.55
    )
    assert (found == 0).all() and par.shapes == []


def test_refined_label_chooses_among_the_classes_in_the_slice():
    values = torch.cat([blocks(0.9, 0.6, 0.1), blocks(0.7, 0.8, 0.1)], dim=1).expand(2, 2, 16, 48)
    cls_label = torch.tensor([[1, 1], [0, 1]])
    found = cam.refined_label(RecordingPAR(), random(2, 3, 16, 48), values, cls_label, None, 0.35, 0.55)
    assert found[:, 8, [4, 24, 44]].tolist() == [[1, 2, 0], [2, 2, 0]]


def test_refined_label_agrees_with_refining_all_shares():
    """The label is that of the largest share after PAR, of the shares of a softmax, at both thresholds."""
    image, par = random(1, 3, 32, 40), PAR()
    values = cam.normalise_cam(random(1, 1, 32, 40, seed=1))
    half = nn.functional.interpolate(image, size=(16, 20), mode="bilinear")
    winners = []
    for background in (0.45, 0.55):
        shares = torch.cat([torch.full_like(values, background), values], dim=1).softmax(1)
        refined = nn.functional.interpolate(par(half, shares), size=(32, 40), mode="bilinear")
        winners.append(refined.argmax(1))
    low, high = winners
    assert 0 < (low - high).sum() < low.numel()
    expected = torch.where(high > 0, 1, torch.where(low == 0, 0, 255))
    assert torch.equal(cam.refined_label(par, image, values, POSITIVE, None, 0.45, 0.55), expected)


# ---- PAR ----


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


# ---- affinity ----


def test_down_size():
    assert affinity.get_down_size() == (32, 32)
    assert affinity.get_down_size((250, 234)) == (16, 15)
    assert affinity.get_down_size((320, 65), 32) == (10, 3)


def test_pairs_within_the_radius():
    mask = affinity.get_mask_by_radius(20, 20, 8)
    assert mask.shape == (400, 400) and mask.dtype == torch.bool
    assert torch.equal(mask, mask.T) and mask.diagonal().all()
    assert mask[10 * 20 + 9].sum() == 17**2 and mask[0].sum() == 9**2
    assert affinity.get_mask_by_radius(20, 20, 8) is mask, "made once"


def test_pairs_within_the_radius_by_brute_force():
    h, w, radius = 9, 7, 3
    expected = torch.zeros(h * w, h * w, dtype=torch.bool)
    for i in range(h * w):
        for j in range(h * w):
            expected[i, j] = abs(i // w - j // w) <= radius and abs(i % w - j % w) <= radius
    assert torch.equal(affinity.get_mask_by_radius(h, w, radius), expected)


def test_affinity_target():
    """Cells 0 1 / 255 1; with radius 1 all are near each other."""
    label = torch.tensor([[0, 1], [255, 1]]).repeat_interleave(16, 0).repeat_interleave(16, 1)[None]
    found = affinity.affinity_target(label, affinity.get_mask_by_radius(2, 2, 1), (2, 2))
    x = 255
    assert found.tolist() == [[[1, 0, x, 0], [0, 1, x, 1], [x, x, x, x], [0, 1, x, 1]]]


def test_affinity_target_outside_the_radius_and_of_a_negative_slice():
    mask = affinity.get_mask_by_radius(2, 5, 2)
    found = affinity.affinity_target(torch.zeros(2, 32, 80), mask, (2, 5))
    assert found.unique().tolist() == [1, 255] and torch.equal(found == 1, mask.expand(2, -1, -1))
    noise = torch.randint(0, 2, (2, 32, 80), generator=generator())
    found = affinity.affinity_target(noise, mask, (2, 5))
    assert found.unique().tolist() == [0, 1, 255] and torch.equal(found, found.transpose(1, 2))


def test_shares_of_background_and_classes():
    values = torch.tensor([0.9, 0.2]).view(1, 2, 1, 1).expand(2, 2, 1, 1)
    found = class_shares(values, torch.tensor([[1, 1], [0, 1]]), 0.35)[:, :, 0, 0]
    exponentials = torch.tensor([[0.35, 0.9, 0.2], [0.35, -torch.inf, 0.2]]).exp()
    assert torch.allclose(found, exponentials / exponentials.sum(1, keepdim=True))
    assert class_shares(values[:1], torch.zeros(1, 2), 0.35).flatten().tolist() == [1, 0, 0]


ALL_PAIRS = torch.ones(12, 12, dtype=torch.bool)


def test_propagation_to_oneself_changes_no_label():
    values = random(2, 1, 3, 4)
    cls_label = torch.tensor([[1], [0]])
    found = affinity.propagate(values, torch.eye(12).expand(2, 12, 12), ALL_PAIRS, cls_label, 0.4, (3, 4))
    assert torch.allclose(found, class_shares(values, cls_label, 0.4) / 1.1)
    assert torch.equal(found.argmax(1) == 1, (values[:, 0] > 0.4) & (cls_label[:, :, None] == 1))


def test_propagation_by_hand():
    """Two cells; column sums of the squares 1 + 0.16 and 0.25 + 0.81, columns are where shares go to."""
    values, attn = torch.tensor([[[[0.9, 0.1]]]]), torch.tensor([[[1.0, 0.5], [0.4, 0.9]]])
    found = affinity.propagate(values, attn, torch.ones(2, 2, dtype=torch.bool), POSITIVE, 0.5, (1, 2))
    left, right = (1 / (1 + np.exp(0.5 - v)) for v in (0.9, 0.1))
    expected = [(left + 0.16 * right) / 1.26, (0.25 * left + 0.81 * right) / 1.16]
    assert found[0, 1, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert found[0].sum(0)[0].tolist() == pytest.approx([1.16 / 1.26, 1.06 / 1.16], abs=1e-6)


def test_propagation_does_not_leak():
    attn = torch.zeros(1, 12, 12)
    attn[:, :4, :4] = random(4, 4)
    attn[:, 4:, 4:] = random(8, 8, seed=1)
    values, other = random(1, 1, 3, 4, seed=2), random(1, 1, 3, 4, seed=3)
    other[:, :, 0] = values[:, :, 0]
    copy = attn.clone()
    first, second = (affinity.propagate(v, attn, ALL_PAIRS, POSITIVE, 0.4, (3, 4)) for v in (values, other))
    assert torch.equal(first[:, :, 0], second[:, :, 0]) and not torch.equal(first, second)
    assert torch.equal(attn, copy)
    near = affinity.get_mask_by_radius(3, 4, 1)
    masked = affinity.propagate(values, random(1, 12, 12), near, POSITIVE, 0.4, (3, 4))
    far = values.clone()
    far[..., 2:] += 0.5
    assert torch.equal(
        affinity.propagate(far, random(1, 12, 12), near, POSITIVE, 0.4, (3, 4))[..., 0], masked[..., 0]
    )


def test_propagated_label():
    """Both cells of the right half resemble each other, so that the doubtful one follows the clear one."""
    values = blocks(0.1, 0.1, 0.5, 0.95)
    attn = torch.eye(4)[None] * 0.5
    attn[:, 2:, 2:] = 0.9
    cls_label, boxes = torch.tensor([[1], [0]]), torch.tensor([[0, 16, 0, 64], [0, 12, 0, 64]])
    found = affinity.propagated_label(
        RecordingPAR(),
        random(2, 3, 16, 64),
        values.expand(2, 1, 16, 64),
        attn.expand(2, 4, 4),
        torch.ones(4, 4, dtype=torch.bool),
        cls_label,
        boxes,
        0.35,
        0.55,
        (1, 4),
    )
    alone = cam.refined_label(RecordingPAR(), random(1, 3, 16, 64), values, POSITIVE, None, 0.35, 0.55)
    assert alone[0, 8, [8, 24, 40, 56]].tolist() == [0, 0, 255, 1]
    assert found[0, 8, [8, 24, 40, 56]].tolist() == [0, 0, 1, 1]
    assert (found[1, :12] == 0).all() and (found[1, 12:] == 255).all()


def test_a_higher_background_leaves_less_foreground():
    image, values, attn = random(1, 3, 64, 48), random(1, 1, 64, 48, seed=1), random(1, 12, 12, seed=2)
    inside = []
    for background in (0.35, 0.45, 0.55):
        same = (background, background)
        label = affinity.propagated_label(
            PAR(), image, values, attn, ALL_PAIRS, POSITIVE, None, *same, size=(4, 3)
        )
        inside.append(label == 1)
    sizes = [int(found.sum()) for found in inside]
    assert sizes[0] > sizes[2]
    assert not (inside[1] & ~inside[0]).any() and not (inside[2] & ~inside[1]).any()


# ---- losses ----


def test_classification_loss():
    found = losses.classification_loss(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [0.0]]))
    assert found.item() == pytest.approx((log(2) + log1p(np.exp(2))) / 2)


def two_class_logits(*foreground: float) -> torch.Tensor:
    """(1, 2, 1, n) whose softmax gives the pixels these logits of being foreground."""
    return torch.stack([torch.zeros(len(foreground)), torch.tensor(foreground)])[None, :, None]


def test_segmentation_loss_of_equal_logits_is_ln_2():
    label = torch.tensor([[[0, 1, 255, 0]]])
    assert losses.get_seg_loss(torch.zeros(1, 2, 1, 4), label).item() == pytest.approx(log(2))


def test_segmentation_loss_by_hand():
    """Background pixels 0 and ln 3: mean of ln 2 and ln 4; the foreground pixel ln 3: ln(4/3); each half."""
    pred, label = two_class_logits(0, log(3), log(3), -50), torch.tensor([[[0, 0, 1, 255]]])
    expected = (1.5 * log(2) + log(4 / 3)) / 2
    assert losses.get_seg_loss(pred, label).item() == pytest.approx(expected, rel=1e-6)
    more = torch.cat([pred[..., :2], pred], dim=3), torch.cat([label[..., :2], label], dim=2)
    assert losses.get_seg_loss(*more).item() == pytest.approx(expected, rel=1e-6), (
        "more of the same background"
    )


@pytest.mark.parametrize("label, expected", [([0, 0], 1.5 * log(2)), ([1, 255], log(2)), ([255, 255], 0.0)])
def test_segmentation_loss_without_one_kind_of_pixel(label, expected):
    pred = two_class_logits(0, log(3)).requires_grad_()
    loss = losses.get_seg_loss(pred, torch.tensor([[label]]))
    loss.backward()
    assert loss.item() == pytest.approx(expected) and pred.grad.isfinite().all()


def test_segmentation_loss_brings_logits_to_the_size_of_the_label():
    label = torch.randint(0, 2, (2, 8, 12), generator=generator())
    pred = random(2, 2, 2, 3)
    larger = nn.functional.interpolate(pred, size=(8, 12), mode="bilinear")
    assert losses.get_seg_loss(pred, label.to(torch.uint8)) == losses.get_seg_loss(larger, label)


def test_affinity_loss():
    target = torch.tensor([[[1, 0], [255, 1]]])
    perfect = torch.tensor([[[1.0, 0.0], [0.4, 1.0]]])
    assert losses.affinity_loss(perfect, target).item() == 0
    assert losses.affinity_loss(1 - perfect, target).item() == pytest.approx((2 / 3 + 1 / 2) / 2)  # 0.58333
    assert losses.affinity_loss(perfect, torch.full_like(target, 255)).item() == 0


def test_cam_of_negative_slices_is_pressed_to_zero():
    values = torch.tensor([[1.0, -3.0], [5.0, 2.0], [0.0, 4.0]]).view(3, 1, 1, 2)
    assert losses.negative_cam_loss(values, torch.tensor([[0], [1], [0]])).item() == pytest.approx(2.5 / 2)
    assert losses.negative_cam_loss(values, torch.ones(3, 1)).item() == 0


def test_token_contrast_by_hand():
    """Tokens 0 and 1 are foreground, of cosine 0.8; 2 is background, of cosines 0 and 0.6; 3 is undecided."""
    tokens = torch.tensor([[5.0, 0.0], [8.0, 6.0], [0.0, -2.0], [1.0, 1.0]]).T.reshape(1, 2, 1, 4)
    values = torch.tensor([1.0, 0.9, 0.0, 0.5]).view(1, 1, 1, 4)
    mask = torch.ones(4, 4, dtype=torch.bool)
    found = losses.token_contrast_loss(tokens, values, POSITIVE, mask)
    # Ordered pairs: two alike of 0.8, four different ones of 0, 0, 0.6, 0.6.
    assert found.item() == pytest.approx((1 - 1.6 / 3 + 1.2 / 5) / 2, abs=1e-6)
    near = affinity.get_mask_by_radius(1, 4, 1)  # leaves out tokens 0 and 2
    assert losses.token_contrast_loss(tokens, values, POSITIVE, near).item() == pytest.approx(
        (1 - 1.6 / 3 + 1.2 / 3) / 2, abs=1e-6
    )
    # In a negative slice all are background: cosines 0.8, 0, s, 0.6, 1.4 s, s, each twice; s * s = 1 / 2.
    alike = 2 * (0.8 + 0.6 + 3.4 * sqrt(0.5)) / 13
    negative = losses.token_contrast_loss(tokens, values, 0 * POSITIVE, mask)
    assert negative.item() == pytest.approx((1 - alike) / 2, abs=1e-6)


def test_token_contrast_teaches_the_tokens_only():
    tokens, values = random(2, 4, 3, 3).requires_grad_(), random(2, 1, 3, 3, seed=1).requires_grad_()
    losses.token_contrast_loss(
        tokens, values, torch.ones(2, 1), affinity.get_mask_by_radius(3, 3, 8)
    ).backward()
    assert tokens.grad.abs().sum() > 0 and values.grad is None


def test_the_high_threshold_falls_along_a_cosine():
    found = [losses.high_threshold(share) for share in (0, 0.25, 0.5, 1)]
    assert found == pytest.approx([0.7, 0.55 + 0.15 * (1 + sqrt(0.5)) / 2, 0.625, 0.55])


def test_all_is_float32_whatever_autocast_says():
    values, attn, tokens = random(1, 1, 3, 4), random(1, 12, 12), random(1, 8, 3, 4)
    label = torch.randint(0, 2, (1, 6, 8), generator=generator())
    pred = random(1, 2, 6, 8)

    def compute():
        return [
            affinity.propagate(values, attn, ALL_PAIRS, POSITIVE, 0.4, (3, 4)),
            losses.token_contrast_loss(tokens, values, POSITIVE, ALL_PAIRS),
            losses.get_seg_loss(pred, label),
            losses.affinity_loss(attn, ALL_PAIRS[None].int()),
            losses.classification_loss(values.flatten(1), torch.ones(1, 12)),
            PAR()(random(1, 3, 8, 8), values),
        ]

    plain = compute()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for expected, found in zip(plain, compute(), strict=True):
            assert found.dtype == torch.float32 and torch.equal(found, expected)


# ---- thresholds ----


def test_sweep_by_hand():
    sweep = Sweep([0.5, 0.25])
    sweep.add(np.array([[0.9, 0.3], [0.6, 0.1]]), np.array([[1, 1], [0, 0]]), "a")
    sweep.add(np.array([[0.3, 0.5]]), np.array([[0, 0]]), "a")  # 0.5 is not above 0.5
    sweep.add(np.array([[0.7, 0.7, 0.9]]), np.array([[1, 0, 255]]), "b")
    sweep.add(np.array([[0.1]]), np.array([[0]]), "c")
    low, high = sweep.rows()
    assert low == pytest.approx(
        {
            "threshold": 0.25,
            "dice_slices": (4 / 5 + 2 / 3) / 2,
            "iou_slices": (2 / 3 + 1 / 2) / 2,
            "dice_volumes": (4 / 7 + 2 / 3) / 2,  # a: tp 2, fp 1 + 2; b: tp 1, fp 1; c has no Dice
            "iou_volumes": (2 / 5 + 1 / 2) / 2,
            "false_alarms": 1 / 2,
        }
    )
    assert high == pytest.approx(
        {
            "threshold": 0.5,
            "dice_slices": (1 / 2 + 2 / 3) / 2,
            "iou_slices": (1 / 3 + 1 / 2) / 2,
            "dice_volumes": (1 / 2 + 2 / 3) / 2,
            "iou_volumes": (1 / 3 + 1 / 2) / 2,
            "false_alarms": 0,
        }
    )
    assert sweep.best("dice_slices") == low and sweep.best() == low


def test_sweep_against_counting_at_each_threshold():
    rng = np.random.default_rng(0)
    scores = (rng.random((30, 40)) * 50).round() / 50  # many lie exactly on a threshold
    mask = (rng.random((30, 40)) < 0.3).astype(np.uint8)
    sweep = Sweep()
    sweep.add(scores.astype(np.float32), mask, "a")
    for row, threshold in zip(sweep.rows(), np.arange(1, 50) / 50, strict=True):
        above = scores.astype(np.float32) > np.float32(threshold)
        tp = (above & (mask == 1)).sum()
        assert row["threshold"] == threshold
        assert row["dice_volumes"] == pytest.approx(2 * tp / (above.sum() + mask.sum()))


def test_sweeps_of_two_processes_are_merged():
    rng = np.random.default_rng(1)
    slices = [(rng.random((5, 6)), rng.integers(0, 2, (5, 6)) * (i % 2), "ab"[i // 3]) for i in range(6)]
    one, first, second = Sweep(), Sweep(), Sweep()
    for i, item in enumerate(slices):
        one.add(*item)
        (first if i < 2 else second).add(*item)
    first.merge(second)
    for a, b in zip(first.rows(), one.rows(), strict=True):
        assert a == pytest.approx(b)


def test_sweep_without_masks_and_with_another_shape():
    sweep = Sweep()
    sweep.add(np.zeros((2, 2)), np.zeros((2, 2)), "a")
    assert np.isnan(sweep.rows()[0]["dice_slices"]) and sweep.rows()[0]["false_alarms"] == 0
    with pytest.raises(ValueError, match="none of the slices"):
        sweep.best()
    with pytest.raises(ValueError, match=r"patient a: scores \(2, 3\), mask \(3, 2\)"):
        sweep.add(np.zeros((2, 3)), np.zeros((3, 2)), "a")
