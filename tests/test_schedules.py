"""common/schedules.py and common/ema.py: learning rates and averaged weights, computed by hand."""

import math

import pytest
import torch
from torch import nn

from common.ema import WeightAverage
from common.schedules import SCHEDULES, learning_rate, plateau_drops

LR, MIN_LR, EPOCHS = 5e-5, 1e-6, 150


# ---- learning rate ----


@pytest.mark.parametrize(
    "epoch, expected",
    [(0, 5e-5), (75, 2.55e-5), (50, 1e-6 + 4.9e-5 * 0.75), (100, 1e-6 + 4.9e-5 * 0.25), (150, 1e-6)],
)
def test_cosine_by_hand(epoch, expected):
    assert learning_rate("cosine_annealing", epoch / EPOCHS, LR, MIN_LR) == pytest.approx(expected, rel=1e-12)


def test_cosine_in_the_last_epoch_is_near_but_above_the_end():
    last = learning_rate("cosine_annealing", 149 / EPOCHS, LR, MIN_LR)
    assert last == pytest.approx(1.00537e-6, rel=1e-5)


def test_cosine_equals_torch_in_every_epoch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS, eta_min=MIN_LR)
    for epoch in range(EPOCHS + 1):
        ours = learning_rate("cosine_annealing", epoch / EPOCHS, LR, MIN_LR)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_progress_outside_the_run_is_held_at_its_ends(schedule):
    def rate(progress):
        return learning_rate(schedule, progress, LR, MIN_LR, warmup=0.1, plateau_drops=1)

    assert rate(-0.5) == rate(0) and rate(1.5) == rate(1)


@pytest.mark.parametrize(
    "step, expected",
    [(0, 6e-11), (749, 2.996e-5), (1499, 5.996e-5), (1500, 5.1e-5), (5000, 3e-5), (9999, 6e-9)],
)
def test_warmup_poly_by_hand(step, expected):
    """10,000 steps with 1,500 of warm-up: the decay does not begin where the warm-up ends, but below it."""
    rate = learning_rate("warmup_poly", step / 10_000, 6e-5, 6e-11, warmup=0.15)
    assert rate == pytest.approx(expected, rel=1e-4)


def test_warmup_rises_to_lr_and_falls_to_min_lr():
    def rate(progress):
        return learning_rate("warmup_cosine", progress, 1.0, 0.01, warmup=0.2)

    assert rate(0) == rate(0.001) == 0.01  # not below min_lr
    assert rate(0.1) == pytest.approx(0.5) and rate(0.15) == pytest.approx(0.75)
    assert rate(0.2) == 1.0  # the top at the end of the warm-up
    assert rate(0.6) == pytest.approx(0.505)  # half of the rest: the middle of the cosine
    assert rate(1) == pytest.approx(0.01)
    rates = [rate(p / 100) for p in range(101)]
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)


def test_warmup_of_nothing_and_of_everything():
    for progress in (0.0, 0.3, 1.0):
        cosine = learning_rate("cosine_annealing", progress, LR, MIN_LR)
        assert learning_rate("warmup_cosine", progress, LR, MIN_LR, warmup=0.0) == pytest.approx(cosine)
    assert learning_rate("warmup_cosine", 0.5, 1.0, warmup=1.0) == 0.5
    assert learning_rate("warmup_cosine", 1.0, 1.0, warmup=1.0) == 1.0


def test_plateau_halves_and_stops_at_min_lr():
    rates = [learning_rate("reduce_on_plateau", 0.5, 1.0, 0.2, plateau_drops=n) for n in range(5)]
    assert rates == [1.0, 0.5, 0.25, 0.2, 0.2]


def test_constant():
    assert {learning_rate("constant", p / 10, LR, MIN_LR, 0.5, 3) for p in range(11)} == {LR}


def test_unknown_schedule_lists_the_known():
    with pytest.raises(ValueError, match=f"unknown schedule 'linear'; choose from {', '.join(SCHEDULES)}"):
        learning_rate("linear", 0.5, LR)


@pytest.mark.parametrize(
    "scores, patience, drops",
    [
        ([], 0, 0),
        ([0.5], 0, 0),
        ([0.1, 0.2, 0.3], 0, 0),
        ([0.5, 0.5], 0, 1),  # equal is not better
        ([0.5, 0.4, 0.4], 2, 0),  # two epochs are allowed
        ([0.5, 0.4, 0.4, 0.4], 2, 1),
        ([0.5, 0.4, 0.6, 0.5, 0.5, 0.7], 2, 0),  # a better score restarts the count
        ([0.5] + [0.4] * 6, 2, 2),  # so does a drop
        ([0.5] + [0.4] * 5, 2, 1),
        ([0.5, 0.1, 0.4, 0.45, 0.49], 1, 2),  # better than the last but not than the best
        ([float("nan")] * 4, 1, 2),
        ([-3.0, -2.0, -2.5], 0, 1),
    ],
)
def test_plateau_drops_by_hand(scores, patience, drops):
    assert plateau_drops(scores, patience) == drops


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_drops_equal_torch(patience):
    scores = torch.rand(60, generator=torch.Generator().manual_seed(patience)).tolist()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max", factor=0.5, patience=patience, threshold=0.0, eps=0.0
    )
    for number, score in enumerate(scores, 1):
        schedule.step(score)
        drops = plateau_drops(scores[:number], patience)
        assert 0.5**drops == optimizer.param_groups[0]["lr"]
    assert drops > 2


# ---- averaged weights ----


class Toy(nn.Module):
    """A parameter, a float buffer and an integer buffer, all set by hand."""

    def __init__(self, value=0.0, count=0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value))
        self.register_buffer("mean", torch.full((3,), 10 * value))
        self.register_buffer("count", torch.tensor(count))


def test_decay_0_equals_the_model_exactly():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    average = WeightAverage(model, 0.0)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        model(torch.randn(4, 1, 8, 8, generator=generator))  # moves the statistics
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
        average.update(model)
        assert average.average.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(average.average[name], value), name


def test_ramp_by_hand():
    average = WeightAverage(Toy(1.0), 0.99)
    expected = 1.0
    for n, value in enumerate((2.0, -1.0, 5.0), 1):
        average.update(Toy(value))
        decay = {1: 2 / 11, 2: 3 / 12, 3: 4 / 13}[n]
        expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(average.average["weight"], torch.full((2,), expected))
    assert average.num_updates == 3


def test_ramp_ends_at_the_decay():
    average = WeightAverage(Toy(0.0), 0.5)
    average.num_updates = 7  # the eighth update: (1 + 8) / (10 + 8) = 0.5
    average.update(Toy(1.0))
    assert average.average["weight"].tolist() == [0.5, 0.5]
    average.num_updates = 1000
    average.update(Toy(1.0))
    assert average.average["weight"].tolist() == [0.75, 0.75]


def test_float_buffers_are_averaged_and_integer_buffers_copied():
    average = WeightAverage(Toy(0.0, 0), 0.99)
    average.update(Toy(1.1, 7))
    torch.testing.assert_close(average.average["mean"], torch.full((3,), 11.0 * 9 / 11))
    assert average.average["count"].item() == 7


def test_batch_norm_statistics_belong_to_the_average():
    model = nn.BatchNorm1d(1)
    average = WeightAverage(model, 0.99)
    model.running_mean.fill_(11.0)
    model.num_batches_tracked.fill_(4)
    average.update(model)
    assert average.average["running_mean"].item() == pytest.approx(9.0)
    assert average.average["num_batches_tracked"].item() == 4
    model.load_state_dict(average.average)
    assert model.running_mean.item() == pytest.approx(9.0)


def test_average_shares_no_memory_with_the_model_and_needs_no_gradient():
    model = Toy(1.0)
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        model.weight.fill_(5.0)
    assert average.average["weight"].tolist() == [1.0, 1.0]
    average.update(model)
    assert not any(v.requires_grad for v in average.average.values())
    assert model.weight.tolist() == [5.0, 5.0]


def test_state_dict_round_trip_continues_the_ramp():
    first, second = WeightAverage(Toy(1.0), 0.99), WeightAverage(Toy(-8.0), 0.99)
    first.update(Toy(2.0, 3))
    first.update(Toy(3.0, 4))
    second.load_state_dict(first.state_dict())
    assert second.num_updates == 2
    for average in (first, second):
        average.update(Toy(9.0, 5))
    assert first.average.keys() == second.average.keys()
    assert all(torch.equal(first.average[name], second.average[name]) for name in first.average)
    assert second.average["count"].item() == 5


def test_long_constant_run_reaches_the_weights():
    average = WeightAverage(Toy(0.0), 0.99)
    for _ in range(600):
        average.update(Toy(1.0))
    assert math.isclose(average.average["weight"][0].item(), 1.0, rel_tol=0.01)
