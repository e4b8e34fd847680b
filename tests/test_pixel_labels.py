"""common/pixel_labels.py: which label a pixel gets, worked out by hand."""

import pytest
import torch

from common.pixel_labels import (
    cam_to_label,
    class_shares,
    in_boxes,
    normalise_cam,
    slice_peaks_at_1,
    zero_pixels_background,
)

POSITIVE = torch.tensor([[1.0]])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_normalised_cam():
    raw = torch.tensor([[2.0, 5.0], [3.0, 2.5]])
    found = normalise_cam(torch.stack([raw, torch.zeros(2, 2), torch.full((2, 2), 7.0)])[:, None])
    assert found[0].min() == 0 and found[0].max().item() == pytest.approx(3 / 3.00001, abs=1e-7)
    assert found[0, 0, 1, 0].item() == pytest.approx(1 / 3.00001, abs=1e-7)
    assert (found[1:] == 0).all()


def test_cam_to_label_with_one_threshold():
    values = torch.tensor([[[[0.2, 0.45, 0.46, 0.9]]]])
    assert cam_to_label(values, POSITIVE, background=0.45).tolist() == [[[0, 0, 1, 1]]]
    assert cam_to_label(values, 0 * POSITIVE, background=0.45).tolist() == [[[0, 0, 0, 0]]]


def test_cam_to_label_with_two_thresholds_and_boxes():
    values = torch.tensor([[[[0.2, 0.35, 0.36, 0.55, 0.56, 0.9]]]]).expand(2, 1, 1, 6)
    cls_label, boxes = torch.tensor([[1], [0]]), torch.tensor([[0, 1, 0, 5], [0, 1, 2, 6]])
    found = cam_to_label(values, cls_label, boxes, low=0.35, high=0.55)
    assert found.tolist() == [[[0, 0, 255, 255, 1, 255]], [[255, 255, 0, 0, 0, 0]]]


def test_cam_to_label_chooses_among_the_classes_in_the_slice():
    values = torch.tensor([0.5, 0.8, 0.6]).view(1, 3, 1, 1)
    assert cam_to_label(values, torch.tensor([[1, 1, 1]]), background=0.45).item() == 2
    assert cam_to_label(values, torch.tensor([[1, 0, 1]]), background=0.45).item() == 3
    with pytest.raises(ValueError, match="either background or both"):
        cam_to_label(values, torch.tensor([[1, 1, 1]]), low=0.3)


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


def test_shares_of_background_and_classes():
    values = torch.tensor([0.9, 0.2]).view(1, 2, 1, 1).expand(2, 2, 1, 1)
    found = class_shares(values, torch.tensor([[1, 1], [0, 1]]), 0.35)[:, :, 0, 0]
    exponentials = torch.tensor([[0.35, 0.9, 0.2], [0.35, -torch.inf, 0.2]]).exp()
    assert torch.allclose(found, exponentials / exponentials.sum(1, keepdim=True))
    assert class_shares(values[:1], torch.zeros(1, 2), 0.35).flatten().tolist() == [1, 0, 0]


def test_peaks_of_slices_become_1():
    """The value that 1 % exceed is the second highest of 101; noise is not blown up above 50 times."""
    probs = torch.zeros(2, 1, 1, 101)
    probs[0, 0, 0, :4] = torch.tensor([0.5, 0.4, 0.2, 0.1])
    probs[1, 0, 0, :4] = 0.01
    found = slice_peaks_at_1(probs)
    assert found[0, 0, 0, :4].tolist() == pytest.approx([1, 1, 0.5, 0.25])
    assert found[1, 0, 0, :5].tolist() == pytest.approx([0.5] * 4 + [0])
