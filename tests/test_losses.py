"""common/losses.py against loops, hand-computed numbers and MONAI."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.losses import (
    balanced_cross_entropy,
    batch_dice_loss,
    class_weights,
    coarser_target,
    cross_entropy,
    deep_supervision_loss,
    dice_ce_loss,
    dice_loss,
    drop_classes,
    focal_tversky_loss,
    merge_unlabelled,
    patch_errors,
)

LOSSES = [dice_loss, balanced_cross_entropy, cross_entropy, focal_tversky_loss]
SHAPES = [(3, 2, 6, 5), (2, 3, 6, 5), (2, 2, 3, 4, 5), (3, 4, 3, 4, 5)]  # (N, C, *spatial), 2-D and 3-D

all_losses = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def random_pair(shape, seed=0, scale=2.0):
    """Random logits and target; the last image has no foreground."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(shape, generator=generator)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
    target[-1] = 0
    return logits, target


def certain(target, num_classes, margin):
    """Logits that say `target` with a margin over every other class."""
    return margin * F.one_hot(target, num_classes).movedim(-1, 1).float()


def images_by_voxel(logits, target):
    """[[(probabilities of the classes, class of the target), ...] of each image], plain floats."""
    images = []
    for image_logits, image_target in zip(logits, target, strict=True):
        voxels = []
        for scores, label in zip(
            image_logits.flatten(1).T.tolist(), image_target.flatten().tolist(), strict=True
        ):
            powers = [math.exp(s) for s in scores]
            voxels.append(([p / sum(powers) for p in powers], label))
        images.append(voxels)
    return images


# ---- against loops ----


@all_shapes
def test_dice_equals_a_loop(shape):
    logits, target = random_pair(shape)
    terms = []
    for voxels in images_by_voxel(logits, target):
        for c in range(1, shape[1]):
            overlap = sum(p[c] for p, t in voxels if t == c)
            total = sum(p[c] + (t == c) for p, t in voxels)
            terms.append(1 - (2 * overlap + 1) / (total + 1))
    assert dice_loss(logits, target).item() == pytest.approx(sum(terms) / len(terms), abs=1e-6)


@all_shapes
def test_cross_entropy_equals_a_loop(shape):
    logits, target = random_pair(shape)
    terms = [-math.log(p[t]) for voxels in images_by_voxel(logits, target) for p, t in voxels]
    assert cross_entropy(logits, target).item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)


@pytest.mark.parametrize("weight", [0.5, 0.8])
@all_shapes
def test_balanced_cross_entropy_equals_a_loop(shape, weight):
    logits, target = random_pair(shape)
    costs = []
    for voxels in images_by_voxel(logits, target):
        foreground = [-math.log(p[t]) for p, t in voxels if t > 0]
        background = [-math.log(p[t]) for p, t in voxels if t == 0]
        cost = (1 - weight) * sum(background) / len(background)
        costs.append(cost + weight * sum(foreground) / len(foreground) if foreground else cost)
    got = balanced_cross_entropy(logits, target, foreground_weight=weight)
    assert got.item() == pytest.approx(sum(costs) / len(costs), abs=1e-5)


@all_shapes
def test_focal_tversky_equals_a_loop(shape):
    logits, target = random_pair(shape)
    voxels = [v for image in images_by_voxel(logits, target) for v in image]
    terms = []
    for c in range(1, shape[1]):
        tp = sum(p[c] for p, t in voxels if t == c)
        fn = sum(1 - p[c] for p, t in voxels if t == c)
        fp = sum(p[c] for p, t in voxels if t != c)
        terms.append((1 - (tp + 1) / (tp + 0.7 * fn + 0.3 * fp + 1)) ** 0.75)
    assert focal_tversky_loss(logits, target).item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)


# ---- numbers by hand ----


@pytest.mark.parametrize("false_positives, cost", [(0, 0.0), (1, 0.50), (10, 0.91), (100, 0.99)])
def test_dice_cost_of_false_positives_on_an_empty_image(false_positives, cost):
    pred = torch.zeros(1, 20, 20, dtype=torch.int64)
    pred.view(-1)[:false_positives] = 1
    loss = dice_loss(certain(pred, 2, 50), torch.zeros_like(pred))
    assert loss.item() == pytest.approx(1 - 1 / (false_positives + 1), abs=1e-6)
    assert round(loss.item(), 2) == cost


def test_weight_of_the_dice_of_empty_images():
    """Image 0 is empty with 3 false-positive voxels, image 1 has 2 voxels, one found and one invented."""
    target = torch.tensor([[[0, 0], [0, 0]], [[1, 1], [0, 0]]])
    logits = certain(torch.tensor([[[1, 1], [1, 0]], [[1, 0], [1, 0]]]), 2, 50)
    for weight in (0.0, 0.25, 1.0):
        loss = dice_loss(logits, target, empty_weight=weight)
        assert loss.item() == pytest.approx((weight * 3 / 4 + 2 / 5) / 2, abs=1e-6)
    only_empty = logits[:1].clone().requires_grad_()
    dice_loss(only_empty, target[:1], empty_weight=0).backward()
    assert not only_empty.grad.any()


def test_dice_by_hand():
    target = torch.tensor([[[1, 1], [0, 0]]])
    pred = torch.tensor([[[1, 0], [1, 0]]])
    logits = certain(pred, 2, 50)
    assert dice_loss(logits, target).item() == pytest.approx(1 - 3 / 5, abs=1e-6)
    assert dice_loss(logits, target, smooth=0).item() == pytest.approx(1 - 2 / 4, abs=1e-6)


def test_balanced_cross_entropy_of_zero_logits():
    target = torch.zeros(1, 16, 16, dtype=torch.int64)
    logits = torch.zeros(1, 2, 16, 16)
    assert balanced_cross_entropy(logits, target).item() == pytest.approx(
        0.5 * math.log(2), abs=1e-6
    )  # 0.3466
    target[0, 3, 3] = 1
    assert balanced_cross_entropy(logits, target).item() == pytest.approx(math.log(2), abs=1e-6)  # 0.6931
    target[:] = 1
    assert balanced_cross_entropy(logits, target).item() == pytest.approx(0.5 * math.log(2), abs=1e-6)


def test_balanced_cross_entropy_does_not_depend_on_the_size_of_the_tumour():
    small, large = torch.zeros(2, 1, 16, 16, dtype=torch.int64)
    small[0, 0, 0] = 1
    large[0, :8] = 1
    miss = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 16, 16)
    a, b = balanced_cross_entropy(miss, small), balanced_cross_entropy(miss, large)
    assert a.item() == pytest.approx(b.item(), rel=1e-5)
    assert cross_entropy(miss, large) > 10 * cross_entropy(miss, small)  # plain cross-entropy does


def test_focal_tversky_weighs_misses_above_false_alarms():
    target = torch.zeros(1, 1, 40, dtype=torch.int64)
    target[..., :20] = 1
    miss, alarm = target.clone(), target.clone()
    miss[..., 10:20], alarm[..., 20:30] = 0, 1
    missed, alarmed = (focal_tversky_loss(certain(p, 2, 50), target).item() for p in (miss, alarm))
    assert missed == pytest.approx((1 - 11 / 18) ** 0.75, abs=1e-5)  # 10 hits, 10 missed
    assert alarmed == pytest.approx((1 - 21 / 24) ** 0.75, abs=1e-5)  # 20 hits, 10 false alarms


# ---- properties ----


@all_losses
@all_shapes
def test_perfect_fit_costs_nothing_and_the_opposite_a_lot(loss, shape):
    _, target = random_pair(shape)
    wrong = (target + 1) % shape[1]
    assert loss(certain(target, shape[1], 100), target).item() == pytest.approx(0, abs=1e-5)
    assert loss(certain(wrong, shape[1], 100), target) > 0.5


@all_losses
@all_shapes
def test_order_of_the_batch_does_not_matter(loss, shape):
    logits, target = random_pair(shape)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(3))
    order = order.flip(0) if order.equal(torch.arange(shape[0])) else order
    assert loss(logits[order], target[order]).item() == pytest.approx(loss(logits, target).item(), abs=1e-6)


@pytest.mark.parametrize("loss", [dice_loss, balanced_cross_entropy, cross_entropy])
def test_loss_of_a_batch_is_the_mean_over_its_images(loss):
    logits, target = random_pair((4, 3, 6, 5))
    alone = [loss(logits[i : i + 1], target[i : i + 1]).item() for i in range(4)]
    assert loss(logits, target).item() == pytest.approx(sum(alone) / 4, abs=1e-6)


def test_focal_tversky_pools_the_batch():
    logits, target = random_pair((4, 2, 6, 5))
    alone = [focal_tversky_loss(logits[i : i + 1], target[i : i + 1]).item() for i in range(4)]
    assert abs(focal_tversky_loss(logits, target).item() - sum(alone) / 4) > 1e-3
    flat = logits.movedim(1, 0).reshape(1, 2, -1)
    assert focal_tversky_loss(flat, target.reshape(1, -1)).item() == pytest.approx(
        focal_tversky_loss(logits, target).item(), abs=1e-6
    )


@all_losses
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_a_float32_loss(loss, dtype):
    logits, target = random_pair(
        (2, 2, 128, 128), scale=0.1
    )  # 16,384 voxels: a sum in bf16 or fp16 is far off
    low = logits.to(dtype).requires_grad_()
    value = loss(low, target)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(low.detach().float(), target).item(), rel=1e-6)
    value.backward()
    assert low.grad.dtype == dtype and low.grad.isfinite().all()


@all_losses
@pytest.mark.parametrize("margin", [1e-3, 20.0, 1000.0, -1000.0])
@pytest.mark.parametrize("empty", [False, True])
def test_gradient_is_finite_when_saturated_and_on_empty_images(loss, margin, empty):
    _, target = random_pair((2, 3, 8, 8))
    if empty:
        target.zero_()
    logits = certain(target, 3, margin).requires_grad_()
    value = loss(logits, target)
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()


@all_losses
def test_gradient_points_to_the_target(loss):
    logits, target = random_pair((2, 2, 8, 8))
    logits.requires_grad_()
    loss(logits, target).backward()
    towards = certain(target, 2, 1.0)
    assert (logits.grad * towards).sum() < 0


@all_losses
def test_shapes_that_do_not_fit_are_refused(loss):
    target = torch.zeros(2, 8, 8, dtype=torch.int64)
    for shape in [(2, 2, 8, 9), (3, 2, 8, 8), (2, 2, 8), (2, 1, 8, 8)]:
        with pytest.raises(ValueError) as error:
            loss(torch.zeros(shape), target)
        assert str(error.value) == (
            f"logits {shape} do not fit target (2, 8, 8); expected (N, C >= 2, *spatial) and (N, *spatial)"
        )


# ---- Dice over the batch, and with cross-entropy; also for a single logit ----

batch_losses = pytest.mark.parametrize("loss", [batch_dice_loss, dice_ce_loss], ids=lambda f: f.__name__)


@all_shapes
def test_batch_dice_equals_a_loop(shape):
    logits, target = random_pair(shape)
    target[target == shape[1] - 1] = 0  # the last class is absent: left out
    voxels = [v for image in images_by_voxel(logits, target) for v in image]
    terms = []
    for c in range(1, shape[1] - 1):
        overlap = sum(p[c] for p, t in voxels if t == c)
        terms.append(1 - 2 * overlap / sum(p[c] + (t == c) for p, t in voxels))
    expected = sum(terms) / max(1, len(terms))
    assert batch_dice_loss(logits, target).item() == pytest.approx(expected, abs=1e-6)


@batch_losses
@pytest.mark.parametrize("empty", [False, True])
def test_a_single_logit_is_a_softmax_against_zero(loss, empty):
    logits, target = random_pair((3, 1, 4, 5, 6), scale=3.0)
    target = torch.zeros_like(target) if empty else (logits[:, 0] > 1).long()
    two = torch.cat([torch.zeros_like(logits), logits], dim=1)
    one_leaf, two_leaf = logits.clone().requires_grad_(), two.clone().requires_grad_()
    one, both = loss(one_leaf, target), loss(two_leaf, target)
    torch.testing.assert_close(one, both, atol=1e-6, rtol=1e-5)
    one.backward()
    both.backward()
    torch.testing.assert_close(one_leaf.grad[:, 0], two_leaf.grad[:, 1], atol=1e-7, rtol=1e-4)


def test_batch_dice_and_ce_by_hand():
    """Two images of two voxels, probabilities 3/4 1/2 | 1/4 1/2 of class 1, target 1 0 | 1 0."""
    probs = torch.tensor([[[0.75, 0.5]], [[0.25, 0.5]]])
    target = torch.tensor([[1, 0], [1, 0]])
    dice = 1 - 2 * (0.75 + 0.25) / (2 + 2)
    ce = -(math.log(0.75) + math.log(0.25) + 2 * math.log(0.5)) / 4
    assert batch_dice_loss(probs.logit(), target).item() == pytest.approx(dice, abs=1e-5)
    assert dice_ce_loss(probs.logit(), target).item() == pytest.approx(dice + ce, abs=1e-5)
    weighted = dice_ce_loss(probs.logit(), target, dice_weight=3.0, ce_weight=0.5)
    assert weighted.item() == pytest.approx(3 * dice + 0.5 * ce, abs=1e-5)
    # `smooth` voxels above and below.
    smoothed = batch_dice_loss(probs.logit(), target, smooth=4.0)
    assert smoothed.item() == pytest.approx(1 - (2 * 1 + 4) / (4 + 4), abs=1e-6)


def test_absent_classes_do_not_count_whatever_is_predicted():
    logits, target = random_pair((2, 4, 6, 5))
    target[target == 2] = 0
    without = logits.clone().requires_grad_()
    batch_dice_loss(without, target).backward()
    kept = [batch_dice_loss(logits, torch.where(target == c, target, 0)) for c in (1, 3)]
    assert batch_dice_loss(logits, target).item() == pytest.approx(sum(kept).item() / 2, abs=1e-6)
    empty = torch.zeros_like(target)
    leaf = logits.clone().requires_grad_()
    loss = batch_dice_loss(leaf, empty)
    loss.backward()
    assert loss.item() == 0 and not leaf.grad.any()
    assert dice_ce_loss(logits, empty).item() == pytest.approx(cross_entropy(logits, empty).item())


def test_dice_is_of_the_batch_and_ce_the_mean_of_its_items():
    logits, target = random_pair((3, 1, 6, 5))
    target = (logits[:, 0] > 0).long()
    target[2] = 0  # alone it has no Dice; in the batch its false positives count

    def ce(images):
        return dice_ce_loss(logits[images], target[images], dice_weight=0).item()

    assert ce([0, 1, 2]) == pytest.approx(sum(ce([i]) for i in range(3)) / 3, abs=1e-6)
    assert batch_dice_loss(logits[2:], target[2:]).item() == 0
    assert batch_dice_loss(logits, target).item() > batch_dice_loss(logits[:2], target[:2]).item() + 0.01


@batch_losses
@pytest.mark.parametrize("num_logits", [1, 4])
def test_batch_losses_vanish_at_the_truth_only(loss, num_logits):
    _, target = random_pair((2, max(2, num_logits), 8, 8))
    signs = 2.0 * target[:, None] - 1
    truth = 40 * signs if num_logits == 1 else certain(target, num_logits, 40.0)
    assert loss(truth, target).item() == pytest.approx(0, abs=1e-5)
    assert loss(-truth, target).item() > 0.9


@batch_losses
@pytest.mark.parametrize("num_logits", [1, 3])
@pytest.mark.parametrize("margin", [0.0, 1e4])
def test_batch_losses_of_bfloat16_are_float32_with_finite_gradients(loss, num_logits, margin):
    _, target = random_pair((2, max(2, num_logits), 8, 8))
    logits = torch.full((2, num_logits, 8, 8), margin, dtype=torch.bfloat16)
    logits[:, :, ::2] *= -1
    logits.requires_grad_()
    value = loss(logits, target)
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite() and logits.grad.isfinite().all()


@batch_losses
def test_batch_losses_refuse_shapes_that_do_not_fit(loss):
    target = torch.zeros(2, 8, 8, dtype=torch.int64)
    for shape in [(2, 1, 8, 9), (1, 2, 8, 8), (2, 2, 8), (2, 0, 8, 8), (2, 1, 1, 8)]:
        with pytest.raises(ValueError) as error:
            loss(torch.zeros(shape), target)
        assert str(error.value) == (
            f"logits {shape} do not fit target (2, 8, 8); expected (N, C >= 1, *spatial) and (N, *spatial)"
        )


# ---- parity with MONAI ----


@all_shapes
def test_dice_equals_monai(shape):
    losses = pytest.importorskip("monai.losses")
    peer = losses.DiceLoss(include_background=False, softmax=True, to_onehot_y=True, smooth_nr=1, smooth_dr=1)
    for seed in range(3):
        logits, target = random_pair(shape, seed)  # the last image is empty
        got = dice_loss(logits, target).item()
        assert got == pytest.approx(peer(logits, target.unsqueeze(1)).item(), abs=1e-7)


@all_shapes
def test_focal_tversky_equals_monai(shape):
    losses = pytest.importorskip("monai.losses")
    peer = losses.TverskyLoss(
        include_background=False, softmax=True, to_onehot_y=True, alpha=0.3, beta=0.7,  # alpha: of FP
        batch=True, smooth_nr=1, smooth_dr=1, reduction="none",
    )  # fmt: skip
    for seed in range(3):
        logits, target = random_pair(shape, seed)
        expected = (peer(logits, target.unsqueeze(1)) ** 0.75).mean()
        assert focal_tversky_loss(logits, target).item() == pytest.approx(expected.item(), abs=1e-6)


# ---- several levels, cases that lack labels of some classes ----


C = 16  # classes


def test_marginal_softmax_adds_what_is_not_labelled_to_the_background():
    logits = torch.randn(2, C, 2, 3, 4)
    labelled = torch.ones(2, C, dtype=torch.bool)
    assert merge_unlabelled(logits, labelled) is logits
    labelled[1, [4, 5]] = False
    before = logits.softmax(1)
    after = merge_unlabelled(logits, labelled).softmax(1)
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[1, 0], before[1, [0, 4, 5]].sum(0))
    assert after[1, [4, 5]].abs().max() == 0
    rest = [c for c in range(1, C) if c not in (4, 5)]
    torch.testing.assert_close(after[1, rest], before[1, rest])


def test_classes_without_labels_get_no_gradient_to_leave_the_background():
    """Where the target is background, the sum of background and unlabelled class counts, not their ratio."""
    logits = torch.zeros(1, C, 2, 2, 2)
    logits[:, 0], logits[:, 7] = 1.0, 3.0
    logits.requires_grad_()
    target = torch.zeros(1, 2, 2, 2, dtype=torch.long)
    labelled = torch.ones(1, C, dtype=torch.bool)
    labelled[:, 7] = False
    deep_supervision_loss([logits], target, labelled=labelled).backward()
    assert logits.grad[:, 7].max() < 0, "rises as the background does, for it may be there"
    assert logits.grad[:, 8].min() > 0
    logits.grad = None
    deep_supervision_loss([logits], target).backward()
    assert logits.grad[:, 7].min() > 0, "with labels it would be an error"


def test_a_labelled_class_is_learned_from_the_case_that_has_it():
    """Of two cases only the first has labels of class 3: the Dice of 3 is that of the first case alone."""
    logits = torch.randn(2, C, 4, 4, 4)
    target = torch.randint(0, 3, (2, 4, 4, 4))
    target[0, :2] = 3
    labelled = torch.ones(2, C, dtype=torch.bool)
    labelled[1, 3] = False
    loss = deep_supervision_loss([logits], target, labelled=labelled)
    merged = merge_unlabelled(logits, labelled)
    assert loss.item() == pytest.approx(dice_ce_loss(merged, target).item())
    assert torch.isfinite(loss)


def test_levels_count_half_of_the_one_before():
    target = torch.randint(0, C, (1, 8, 8, 8))
    levels = [torch.randn(1, C, n, n, n) for n in (8, 4, 2)]
    each = [
        dice_ce_loss(levels[0], target),
        dice_ce_loss(levels[1], target[:, 1::2, 1::2, 1::2]),
        dice_ce_loss(levels[2], target[:, 2::4, 2::4, 2::4]),
    ]
    expected = (each[0] + each[1] / 2 + each[2] / 4) / 1.75
    assert deep_supervision_loss(levels, target).item() == pytest.approx(expected.item())


def test_coarser_targets():
    target = torch.arange(12).view(1, 2, 6, 1)
    assert coarser_target(target, (1, 3, 1)).ravel().tolist() == [7, 9, 11]
    assert coarser_target(target, (2, 6, 1)) is target


def test_class_weights_by_hand():
    frequency = torch.zeros(C)
    frequency[[0, 1, 2, 3, 4]] = torch.tensor([0.9, 0.04, 0.01, 0.0025, 0.00001])
    weights = class_weights(frequency)
    assert weights[:5].tolist() == pytest.approx([0.5, 0.5, 1, 2, 4]) and weights[5:].eq(1).all()
    logits, target = torch.randn(1, C, 2, 2, 2), torch.randint(0, 5, (1, 2, 2, 2))
    expected = torch.nn.functional.cross_entropy(logits, target, weights)
    only_ce = dice_ce_loss(logits, target, dice_weight=0, class_weights=weights)
    assert only_ce.item() == pytest.approx(expected.item())


def test_errors_of_patches_by_hand():
    """Every second voxel is looked at: a prediction that is sure and right in half of a class's voxels."""
    target = torch.zeros(1, 4, 4, 4, dtype=torch.uint8)
    target[:, :, :, :2] = 6
    logits = torch.zeros(1, C, 4, 4, 4)
    logits[:, 0] = 50
    logits[:, 6, :2, :, :2] = 100
    labelled = torch.ones(1, C, dtype=torch.bool)
    errors = patch_errors(logits, target, labelled)
    assert errors[0, 6].item() == pytest.approx(1 - 2 * 2 / (2 + 4)) and errors.isnan().sum() == 15
    labelled[0, 6] = False
    assert patch_errors(logits, target, labelled).isnan().all()


def test_classes_that_no_item_has_labels_for_change_nothing_but_the_time():
    """The same loss and gradient as of the merged softmax over all classes."""
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 4, 4, 4, requires_grad=True)
    labelled = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 0, 1]], dtype=torch.bool)
    target = torch.randint(0, 2, (2, 4, 4, 4)) * 5
    target[0, :2] = 4
    weights = torch.tensor([0.5, 1.0, 9.0, 9.0, 2.0, 3.0])
    loss = deep_supervision_loss([logits], target, labelled=labelled, class_weights=weights)
    expected = dice_ce_loss(merge_unlabelled(logits, labelled), target, class_weights=weights)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (grad,) = torch.autograd.grad(loss, logits)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(grad, expected_grad)
    dropped = drop_classes(logits, labelled.any(0)).softmax(1)
    torch.testing.assert_close(dropped[:, 0], logits.softmax(1)[:, [0, 2, 3]].sum(1))
    torch.testing.assert_close(dropped[:, 2], logits.softmax(1)[:, 4])
