"""From slice labels to pixel labels: CAM, refined labels, affinity. Numbers are worked out by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from common import weak_losses as losses
from common.cells import get_mask_by_radius, propagate, propagated_label
from common.par import PAR
from common.pixel_labels import class_shares, normalise_cam, refined_label
from common.wetr import multi_scale_cam

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


@pytest.mark.parametrize("num_bytes", [1, 64 * 64, 2**28])
def test_images_are_mapped_in_parts_that_fit(num_bytes, monkeypatch):
    """Two images and their mirror images, one at a time, or all together: the same maps."""
    seen, image = [], random(2, 3, 32, 32)
    expected = multi_scale_cam(StubNetwork(), image, (1.0, 2.0))
    network = StubNetwork()
    cam_only = network.cam_only
    monkeypatch.setattr("common.wetr.ATTENTION_BYTES", num_bytes)
    network.cam_only = lambda some: seen.append(len(some)) or cam_only(some)
    found = multi_scale_cam(network, image, (1.0, 2.0))
    torch.testing.assert_close(found[:2], expected[:2], rtol=0, atol=0)
    # 4 cells at scale 1, 16 at scale 2: 1,024 and 16,384 bytes for an image.
    assert seen == {1: [1] * 8, 4096: [4, 1, 1, 1, 1], 2**28: [4, 4]}[num_bytes]


def test_cam_is_the_sum_over_scales_of_the_positive_part():
    image = torch.full((2, 3, 32, 64), 0.5)
    image[1] = -0.5
    found, _, _ = multi_scale_cam(StubNetwork(), image, (1.0, 0.5, 1.5))
    assert found.shape == (2, 1, 32, 64)
    assert torch.allclose(found[0], torch.tensor(1.5)) and (found[1] == 0).all()


def test_cam_takes_the_larger_one_of_image_and_mirror_image():
    """Two cells of 0 and 1 are the ramp 1/32, 3/32, ... between the middles of the cells, flat outside."""
    found, _, _ = multi_scale_cam(StubNetwork(slope=1.0), torch.zeros(1, 3, 16, 32), (1.0,))
    ramp = ((torch.arange(32) - 7.5) / 16).clamp(0, 1)
    assert torch.allclose(found[0, 0], torch.maximum(ramp, ramp.flip(0)).expand(16, 32), atol=1e-6)


def test_cam_of_the_mirror_image_is_the_mirror_of_the_cam():
    network, image = StubNetwork(slope=0.3), random(2, 3, 48, 80)
    found = normalise_cam(multi_scale_cam(network, image)[0])
    mirrored = normalise_cam(multi_scale_cam(network, image.flip(3))[0])
    assert (found - mirrored.flip(3)).abs().max() <= 5e-5


@pytest.mark.parametrize("scales", [(1.0, 0.5, 1.5), (1.5, 1.0), (0.5, 1.5)])
def test_affinity_is_that_of_the_largest_scale_and_of_the_image_itself(scales):
    network, image = StubNetwork(), random(2, 3, 32, 64)
    _, found, cells = multi_scale_cam(network, image, scales)
    assert cells == (3, 6) and found.shape == (2, 18, 18)
    expected = network.eval().cam_only(nn.functional.interpolate(image, size=(48, 96), mode="bilinear"))[1]
    assert torch.allclose(found, expected)


def test_cells_that_begin_count():
    _, found, cells = multi_scale_cam(StubNetwork(), random(1, 3, 30, 50), (1.0,))
    assert cells == (2, 4) and found.shape == (1, 8, 8)


def test_cam_is_computed_in_evaluation_mode_and_every_module_keeps_its_own():
    network, image = StubNetwork().train(), random(1, 3, 32, 32)
    network.frozen.eval()
    first, again = (multi_scale_cam(network, image)[0] for _ in range(2))
    assert torch.equal(first, again) and not first.requires_grad
    assert network.training and network.dropout.training and not network.frozen.training
    network.cam_only = None
    with pytest.raises(TypeError):
        multi_scale_cam(network, image)
    assert network.dropout.training


def test_cam_needs_a_scale():
    with pytest.raises(ValueError, match="no scales"):
        multi_scale_cam(StubNetwork(), random(1, 3, 32, 32), ())


# ---- labels from a CAM ----


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
    found = refined_label(par, image, values, cls_label, boxes, 0.35, 0.55)
    assert found.dtype == torch.int64 and found.shape == (3, 16, 48)
    assert (found[:, :2] == 255).all() and (found[1, 2:] == 0).all()
    middles = found[:, 8, [4, 24, 44]]  # away from the edges, which halving blurs
    assert middles.tolist() == [[0, 255, 1], [0, 0, 0], [1, 0, 0]]
    assert par.shapes == [(2, 3, 8, 24)], "at half the resolution, and without the negative slice"


def test_refined_label_of_negative_slices_needs_no_refinement():
    par = RecordingPAR()
    found = refined_label(
        par, random(2, 3, 16, 16), random(2, 1, 16, 16), torch.zeros(2, 1), None, 0.35, 0.55
    )
    assert (found == 0).all() and par.shapes == []


def test_refined_label_chooses_among_the_classes_in_the_slice():
    values = torch.cat([blocks(0.9, 0.6, 0.1), blocks(0.7, 0.8, 0.1)], dim=1).expand(2, 2, 16, 48)
    cls_label = torch.tensor([[1, 1], [0, 1]])
    found = refined_label(RecordingPAR(), random(2, 3, 16, 48), values, cls_label, None, 0.35, 0.55)
    assert found[:, 8, [4, 24, 44]].tolist() == [[1, 2, 0], [2, 2, 0]]


def test_refined_label_agrees_with_refining_all_shares():
    """The label is that of the largest share after PAR, of the shares of a softmax, at both thresholds."""
    image, par = random(1, 3, 32, 40), PAR()
    values = normalise_cam(random(1, 1, 32, 40, seed=1))
    half = nn.functional.interpolate(image, size=(16, 20), mode="bilinear")
    winners = []
    for background in (0.45, 0.55):
        shares = torch.cat([torch.full_like(values, background), values], dim=1).softmax(1)
        refined = nn.functional.interpolate(par(half, shares), size=(32, 40), mode="bilinear")
        winners.append(refined.argmax(1))
    low, high = winners
    assert 0 < (low - high).sum() < low.numel()
    expected = torch.where(high > 0, 1, torch.where(low == 0, 0, 255))
    assert torch.equal(refined_label(par, image, values, POSITIVE, None, 0.45, 0.55), expected)


# ---- affinity ----


ALL_PAIRS = torch.ones(12, 12, dtype=torch.bool)


def test_propagation_to_oneself_changes_no_label():
    values = random(2, 1, 3, 4)
    cls_label = torch.tensor([[1], [0]])
    found = propagate(values, torch.eye(12).expand(2, 12, 12), ALL_PAIRS, cls_label, 0.4, (3, 4))
    assert torch.allclose(found, class_shares(values, cls_label, 0.4) / 1.1)
    assert torch.equal(found.argmax(1) == 1, (values[:, 0] > 0.4) & (cls_label[:, :, None] == 1))


def test_propagation_by_hand():
    """Two cells; column sums of the squares 1 + 0.16 and 0.25 + 0.81, columns are where shares go to."""
    values, attn = torch.tensor([[[[0.9, 0.1]]]]), torch.tensor([[[1.0, 0.5], [0.4, 0.9]]])
    found = propagate(values, attn, torch.ones(2, 2, dtype=torch.bool), POSITIVE, 0.5, (1, 2))
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
    first, second = (propagate(v, attn, ALL_PAIRS, POSITIVE, 0.4, (3, 4)) for v in (values, other))
    assert torch.equal(first[:, :, 0], second[:, :, 0]) and not torch.equal(first, second)
    assert torch.equal(attn, copy)
    near = get_mask_by_radius(3, 4, 1)
    masked = propagate(values, random(1, 12, 12), near, POSITIVE, 0.4, (3, 4))
    far = values.clone()
    far[..., 2:] += 0.5
    assert torch.equal(propagate(far, random(1, 12, 12), near, POSITIVE, 0.4, (3, 4))[..., 0], masked[..., 0])


def test_propagated_label():
    """Both cells of the right half resemble each other, so that the doubtful one follows the clear one."""
    values = blocks(0.1, 0.1, 0.5, 0.95)
    attn = torch.eye(4)[None] * 0.5
    attn[:, 2:, 2:] = 0.9
    cls_label, boxes = torch.tensor([[1], [0]]), torch.tensor([[0, 16, 0, 64], [0, 12, 0, 64]])
    found = propagated_label(
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
    alone = refined_label(RecordingPAR(), random(1, 3, 16, 64), values, POSITIVE, None, 0.35, 0.55)
    assert alone[0, 8, [8, 24, 40, 56]].tolist() == [0, 0, 255, 1]
    assert found[0, 8, [8, 24, 40, 56]].tolist() == [0, 0, 1, 1]
    assert (found[1, :12] == 0).all() and (found[1, 12:] == 255).all()


def test_a_higher_background_leaves_less_foreground():
    image, values, attn = random(1, 3, 64, 48), random(1, 1, 64, 48, seed=1), random(1, 12, 12, seed=2)
    inside = []
    for background in (0.35, 0.45, 0.55):
        same = (background, background)
        label = propagated_label(PAR(), image, values, attn, ALL_PAIRS, POSITIVE, None, *same, size=(4, 3))
        inside.append(label == 1)
    sizes = [int(found.sum()) for found in inside]
    assert sizes[0] > sizes[2]
    assert not (inside[1] & ~inside[0]).any() and not (inside[2] & ~inside[1]).any()


# ---- precision ----


def test_all_is_float32_whatever_autocast_says():
    values, attn, tokens = random(1, 1, 3, 4), random(1, 12, 12), random(1, 8, 3, 4)
    label = torch.randint(0, 2, (1, 6, 8), generator=generator())
    pred = random(1, 2, 6, 8)

    def compute():
        return [
            propagate(values, attn, ALL_PAIRS, POSITIVE, 0.4, (3, 4)),
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
