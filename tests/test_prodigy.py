"""verse_spine/prodigy.py against a literal implementation in NumPy and the authors' package."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from common.memory import MIB, training_peak_mib
from verse_spine.prodigy import Prodigy


def small_net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def regression(dtype=torch.float64):
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(40, n, generator=rng, dtype=dtype) for n in (6, 3)]


def run(net, optimizer, steps, lr=lambda step: 1.0, dtype=torch.float64):
    """Full-batch steps; returns d after each."""
    x, y = regression(dtype)
    sizes = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
        sizes.append(optimizer.d if isinstance(optimizer, Prodigy) else optimizer.param_groups[0]["d"])
    return sizes


def largest_difference(first, second):
    return max((p - q).abs().max().item() for p, q in zip(first, second, strict=True))


OPTIONS = [
    {},
    {"weight_decay": 0.05},
    {"bias_correction": True},
    {"growth_rate": 1.3},
    {"d_coef": 2.0},
    {"betas": (0.8, 0.95), "eps": 1e-4, "d0": 1e-4},
]
SCHEDULES = {
    "constant": lambda step: 1.0,
    "cosine": lambda step: (1 + math.cos(math.pi * step / 50)) / 2,
    "warm-up from 0": lambda step: min(step / 5, 0.7),
}
every_variant = pytest.mark.parametrize(
    "options, schedule", [({}, s) for s in SCHEDULES] + [(o, "cosine") for o in OPTIONS[1:]]
)


def by_hand(x, gradient, lrs, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, d0=1e-6, d_coef=1.0,
            growth_rate=math.inf, bias_correction=False):  # fmt: skip
    """The rule for one vector x in NumPy; returns all x and all d."""
    beta1, beta2 = betas
    beta3 = beta2**0.5
    x0, m, v, s = x.copy(), 0 * x, 0 * x, 0 * x
    r, d, d_max, k = 0.0, d0, d0, 0
    all_x, all_d = [], []
    for lr in lrs:
        g = gradient(x)
        if lr > 0:
            k += 1
            gamma = lr * ((1 - beta2**k) ** 0.5 / (1 - beta1**k) if bias_correction else 1)
            m = beta1 * m + (1 - beta1) * d * g
            v = beta2 * v + (1 - beta2) * d * d * g * g
            r = beta3 * r + d / d0 * gamma * d * (g @ (x0 - x))
            s = beta3 * s + d / d0 * gamma * d * g
            d_hat = d_coef * r / np.abs(s).sum()
            old = d
            if d == d0:
                d = max(d, d_hat)
            d_max = max(d_max, d_hat)
            d = min(d_max, d * growth_rate)
            x = x - weight_decay * gamma * old * x
            x = x - gamma * old * m / (np.sqrt(v) + d * eps)
        all_x.append(x)
        all_d.append(d)
    return all_x, all_d


@every_variant
def test_equals_the_rule_by_hand(options, schedule):
    rng = np.random.default_rng(0)
    matrix, goal, start = rng.normal(size=(12, 7)), rng.normal(size=12), rng.normal(size=7)
    lrs = [SCHEDULES[schedule](step) for step in range(50)]
    expected_x, expected_d = by_hand(start, lambda x: matrix.T @ (matrix @ x - goal), lrs, **options)
    assert expected_d[-1] > 100 * expected_d[0] or "growth_rate" in options, "d has grown"

    # The vector in three tensors of two groups: sums run over all of them.
    parts = [nn.Parameter(torch.tensor(start[a:b])) for a, b in [(0, 2), (2, 3), (3, 7)]]
    groups = [{"params": parts[:1]}, {"params": parts[1:]}]
    optimizer = Prodigy(groups, **options)
    for step, lr in enumerate(lrs):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        residual = torch.tensor(matrix) @ torch.cat(list(parts)) - torch.tensor(goal)
        (residual.square().sum() / 2).backward()
        optimizer.step()
        assert optimizer.d == pytest.approx(expected_d[step], rel=1e-9)
        np.testing.assert_allclose(torch.cat(list(parts)).detach(), expected_x[step], rtol=0, atol=1e-9)


def test_golden_sizes():
    """x in R^2 from (1, -2), gradient (x1, 4 x2): d after each step, computed by `by_hand` once."""
    x = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = Prodigy([x])
    sizes = []
    for _ in range(12):
        x.grad = x.detach() * torch.tensor([1.0, 4.0])
        optimizer.step()
        sizes.append(optimizer.d)
    golden = [1e-06, 1.581532813e-06, 4.822400982e-06, 1.349608001e-05, 3.450966155e-05, 8.858505182e-05]
    golden += [0.0002277235161, 0.0005856718063, 0.00150625522, 0.00387369539, 0.009961517645, 0.02561288565]
    assert sizes == pytest.approx(golden, rel=1e-9)


@every_variant
def test_equals_the_authors_package(options, schedule):
    reference = pytest.importorskip("prodigyopt").Prodigy
    nets = small_net(), small_net()
    renamed = {{"bias_correction": "use_bias_correction"}.get(k, k): v for k, v in options.items()}
    ours, theirs = Prodigy(nets[0].parameters(), **options), reference(nets[1].parameters(), **renamed)
    sizes = run(nets[0], ours, 50, SCHEDULES[schedule])
    assert sizes == pytest.approx(run(nets[1], theirs, 50, SCHEDULES[schedule]), rel=1e-9)
    assert largest_difference(nets[0].parameters(), nets[1].parameters()) < 1e-9


def test_equals_the_authors_package_in_float32():
    """Large steps amplify rounding, so only while d grows: 15 steps."""
    reference = pytest.importorskip("prodigyopt").Prodigy
    nets = small_net(torch.float32), small_net(torch.float32)
    ours, theirs = Prodigy(nets[0].parameters()), reference(nets[1].parameters())
    sizes = run(nets[0], ours, 15, dtype=torch.float32)
    assert sizes == pytest.approx(run(nets[1], theirs, 15, dtype=torch.float32), rel=1e-5)
    assert largest_difference(nets[0].parameters(), nets[1].parameters()) < 1e-6


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_trains_without_tuning_whatever_the_scale_of_the_data(scale):
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y = scale * (x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]]) + 1)
    net = nn.Linear(4, 1)
    optimizer = Prodigy(net.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert loss.item() < 1e-3 * y.var().item()


# ---- what a training run does with it ----


def test_d_never_shrinks():
    sizes = run(net := small_net(), Prodigy(net.parameters()), 60)
    assert all(a <= b for a, b in zip(sizes, sizes[1:], strict=False)) and sizes[-1] > 1e-3


def test_growth_rate_limits_growth_after_the_first_estimate():
    sizes = run(net := small_net(), Prodigy(net.parameters(), growth_rate=1.05), 40)
    grown = [b / a for a, b in zip(sizes, sizes[1:], strict=False) if a > 1e-6]
    assert max(grown[1:]) == pytest.approx(1.05) and len(grown) > 20


def test_parameters_without_gradient_stay_and_are_left_out_of_d():
    net, alone = small_net(), small_net()
    frozen = nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = Prodigy([frozen, *net.parameters()])
    sizes = run(net, optimizer, 20)
    assert sizes == run(alone, Prodigy(alone.parameters()), 20)
    assert torch.equal(frozen, torch.ones(5, dtype=torch.float64)) and frozen not in optimizer.state


def test_a_parameter_may_join_late():
    early, late = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    optimizer = Prodigy([early, late])
    for step in range(6):
        early.grad, late.grad = early.detach().clone(), late.detach().clone() if step > 2 else None
        optimizer.step()
    assert torch.equal(optimizer.state[late]["x0"], torch.ones(3)) and (late < 1).all()


def test_steps_with_lr_0_do_nothing_at_all():
    nets = small_net(), small_net()
    optimizers = [Prodigy(net.parameters()) for net in nets]
    plain = run(nets[0], optimizers[0], 20)
    paused = run(nets[1], optimizers[1], 25, lambda step: 0.0 if 5 <= step < 10 else 1.0)
    assert paused[:5] + paused[10:] == plain and paused[5:10] == [plain[4]] * 5
    assert largest_difference(nets[0].parameters(), nets[1].parameters()) == 0


def test_a_group_with_lr_0_is_frozen():
    net, alone = small_net(), small_net()
    frozen = [p.detach().clone() for p in net[0].parameters()]
    groups = [{"params": net[0].parameters(), "lr": 0.0}, {"params": net[2].parameters()}]
    optimizer = Prodigy(groups)
    x, y = regression()
    for _ in range(10):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
    assert largest_difference(net[0].parameters(), frozen) == 0
    alone[0].requires_grad_(False)
    assert optimizer.d == run(alone, Prodigy(alone[2].parameters()), 10)[-1]


def test_zero_gradients_change_nothing():
    p = nn.Parameter(torch.ones(4))
    optimizer = Prodigy([p])
    for _ in range(3):
        p.grad = torch.zeros(4)
        optimizer.step()
    assert torch.equal(p, torch.ones(4)) and optimizer.d == pytest.approx(1e-6)


@pytest.mark.parametrize("options", [{}, {"bias_correction": True, "growth_rate": 1.2, "weight_decay": 0.1}])
def test_a_saved_and_loaded_optimiser_continues_bit_for_bit(options):
    net = small_net(torch.float32)
    optimizer = Prodigy(net.parameters(), **options)
    run(net, optimizer, 10, dtype=torch.float32)
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = small_net(torch.float32)
    resumed_optimizer = Prodigy(resumed.parameters(), **options)
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    assert resumed_optimizer.d == optimizer.d
    lr = SCHEDULES["cosine"]
    unbroken = run(net, optimizer, 10, lr, torch.float32)
    assert run(resumed, resumed_optimizer, 10, lr, torch.float32) == unbroken
    assert largest_difference(net.parameters(), resumed.parameters()) == 0


def test_a_loaded_state_is_not_shared():
    net, other = small_net(), small_net()
    optimizer, copied = Prodigy(net.parameters()), Prodigy(other.parameters())
    run(net, optimizer, 10)
    copied.load_state_dict(optimizer.state_dict())
    before = optimizer.d
    run(other, copied, 30)
    assert copied.d > before and optimizer.d == before


def test_steps_that_the_scaler_skips_leave_it_untouched():
    net = small_net(torch.float32)
    optimizer, scaler = Prodigy(net.parameters()), torch.amp.GradScaler("cpu", init_scale=8.0)
    x, y = regression(torch.float32)

    def scaled_step(spoiled):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        scaler.scale(loss * (torch.inf if spoiled else 1)).backward()
        scaler.step(optimizer)
        scaler.update()

    for _ in range(5):
        scaled_step(spoiled=False)
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    scaled_step(spoiled=True)
    assert scaler.get_scale() == 4
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    for key, kept in optimizer.state_dict()["state"].items():
        torch.testing.assert_close(kept, state["state"][key], rtol=0, atol=0)
    scaled_step(spoiled=False)
    assert all(p.isfinite().all() for p in net.parameters())
    assert not torch.equal(net[0].weight, weights["0.weight"])


def test_closure_has_gradients_and_its_loss_is_returned():
    net, (x, y) = small_net(), regression()
    optimizer = Prodigy(net.parameters())

    def closure():
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > optimizer.step(closure).item() > 0


def test_state_takes_16_bytes_a_parameter():
    net = small_net(torch.float32)
    optimizer = Prodigy(net.parameters())
    run(net, optimizer, 1, dtype=torch.float32)
    of_parameters = [optimizer.state[p] for p in net.parameters()]
    assert sum(t.nbytes for state in of_parameters for t in state.values()) == 16 * sum(
        p.numel() for p in net.parameters()
    )


def test_memory_is_predicted():
    """Its four copies of the parameters are in the prediction."""

    def loss(logits, target):
        return (logits.squeeze(1) - target).square().mean()

    def peak_mib(make_optimizer):
        return training_peak_mib(
            lambda: nn.Conv3d(1, 1, 101, padding=50), loss, (1, 1, 2, 2, 2), make_optimizer=make_optimizer
        )

    a_copy = 4 * (101**3 + 1) / MIB
    prodigy, adam, sgd = (peak_mib(o) for o in (Prodigy, torch.optim.AdamW, torch.optim.SGD))
    assert 4 * a_copy < prodigy - sgd < 7 * a_copy  # and what passes during a step
    assert prodigy - adam > 2 * a_copy - 0.01


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr is -1.0, must be 0 or more"),
        ({"lr": math.nan}, "lr is nan"),
        ({"eps": 0.0}, "eps is 0.0, must be above 0"),
        ({"d0": 0.0}, "d0 is 0.0, must be above 0"),
        ({"d_coef": -1}, "d_coef is -1, must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\), must be in \[0, 1\)"),
        ({"growth_rate": 1.0}, "growth_rate is 1.0, must be above 1"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Prodigy([nn.Parameter(torch.ones(1))], **options)


def test_different_learning_rates_are_refused():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Prodigy([{"params": [first], "lr": 1.0}, {"params": [second], "lr": 0.5}])
    first.grad = second.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"learning rates \[1.0, 0.5\] differ"):
        optimizer.step()
    assert torch.equal(first, torch.ones(2))


def test_step_reads_no_number_from_the_device(monkeypatch):
    """Reading one would make the GPU wait in every step."""
    network = nn.Linear(3, 2)
    optimizer = Prodigy(network.parameters())

    def refuse(tensor):
        raise AssertionError("read from the device")

    network(torch.ones(1, 3)).sum().backward()
    monkeypatch.setattr(torch.Tensor, "item", refuse)
    monkeypatch.setattr(torch.Tensor, "__float__", refuse)
    monkeypatch.setattr(torch.Tensor, "__bool__", refuse)
    optimizer.step()
    monkeypatch.undo()
    assert optimizer.d > 0
