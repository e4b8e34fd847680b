"""common/weak_losses.py: numbers worked out by hand, finite whatever a batch holds."""

from math import log, log1p, sqrt

import numpy as np
import pytest
import torch
from torch import nn

from common import weak_losses as losses
from common.cells import get_mask_by_radius

POSITIVE = torch.tensor([[1.0]])
ALL_PAIRS = torch.ones(12, 12, dtype=torch.bool)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


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
    label = torch.randint(0, 2, (2, 8, 12), generator=torch.Generator().manual_seed(0))
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
    near = get_mask_by_radius(1, 4, 1)  # leaves out tokens 0 and 2
    assert losses.token_contrast_loss(tokens, values, POSITIVE, near).item() == pytest.approx(
        (1 - 1.6 / 3 + 1.2 / 3) / 2, abs=1e-6
    )
    # In a negative slice all are background: cosines 0.8, 0, s, 0.6, 1.4 s, s, each twice; s * s = 1 / 2.
    alike = 2 * (0.8 + 0.6 + 3.4 * sqrt(0.5)) / 13
    negative = losses.token_contrast_loss(tokens, values, 0 * POSITIVE, mask)
    assert negative.item() == pytest.approx((1 - alike) / 2, abs=1e-6)


def test_token_contrast_teaches_the_tokens_only():
    tokens, values = random(2, 4, 3, 3).requires_grad_(), random(2, 1, 3, 3, seed=1).requires_grad_()
    losses.token_contrast_loss(tokens, values, torch.ones(2, 1), get_mask_by_radius(3, 3, 8)).backward()
    assert tokens.grad.abs().sum() > 0 and values.grad is None


def test_the_high_threshold_falls_along_a_cosine():
    found = [losses.high_threshold(share) for share in (0, 0.25, 0.5, 1)]
    assert found == pytest.approx([0.7, 0.55 + 0.15 * (1 + sqrt(0.5)) / 2, 0.625, 0.55])
