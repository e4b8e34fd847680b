"""common/memory.py: sums by hand, the same step really computed, what --vram gives up and when."""

import itertools
import warnings

import pytest
import torch
from torch import nn

from common import hardware
from common.losses import dice_ce_loss
from common.memory import (
    MIB,
    RESERVED_MIB,
    Plan,
    StorageCounter,
    candidates,
    fit_plan,
    limit_cuda_memory,
    plan_table,
    set_up_step,
    training_peak_mib,
)
from verse_spine.networks import get_model
from verse_spine.prodigy import Prodigy

both_ways = pytest.mark.parametrize("hollow", [True, False], ids=["hollow", "real"])
FLOATS = MIB // 4  # float32 values in a MiB


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def mean(logits, target):
    return logits.mean()


def config(name, checkpointing, feature_size=12):
    return dict(model=name, feature_size=feature_size, init_filters=8, checkpointing=checkpointing)


# ---- counting ----


@both_ways
def test_peak_is_the_most_at_a_time_not_the_sum(hollow):
    with StorageCounter(hollow=hollow) as counter:
        a = torch.zeros(3 * FLOATS)
        b = a + 1
        del a
        c = torch.zeros(1 * FLOATS)
        del b, c
    assert (counter.peak, counter.bytes) == (6 * MIB, 0)


@both_ways
def test_views_and_in_place_operations_count_once(hollow):
    with StorageCounter(hollow=hollow) as counter:
        a = torch.zeros(2, FLOATS)
        views = [a[0], a.T, a.view(-1)[5:], a.expand(7, 2, FLOATS), a.detach()]
        a.add_(1).mul_(a)
        a[1].copy_(a[0])
        assert counter.peak == counter.bytes == 2 * MIB
        del a
        assert counter.bytes == 2 * MIB, "the views still need it"
        del views
    assert counter.bytes == 0


@both_ways
def test_several_results_and_lists_of_tensors(hollow):
    with StorageCounter(hollow=hollow) as counter:
        a = torch.zeros(2, FLOATS)  # 2 MiB
        parts = a.split(1)
        joined = torch.cat(parts)  # 2 MiB
        values, indices = joined.max(dim=0)  # float32 and int64: 1 + 2 MiB
        half = values.to(torch.bfloat16)  # 0.5 MiB
    assert counter.peak == 7.5 * MIB and half.shape == indices.shape == (FLOATS,)


def test_hollow_tensors_hold_shapes_and_strides_only():
    with StorageCounter(hollow=True) as counter:
        a = torch.zeros(2**40)  # 4 TiB
        b = (a.view(2**20, 2**20).T * torch.arange(3)[2]).T
    assert b.shape == (2**20, 2**20) and b.stride() == (2**20, 1) and b.device.type == "cpu"
    assert counter.bytes >= 2 * 4 * 2**40
    with pytest.raises(RuntimeError, match="without data was used outside"):
        a + 1


def test_a_shape_changed_in_place_is_refused():
    with StorageCounter(hollow=True), pytest.raises(ValueError, match="aten::squeeze_ .* use aten::squeeze"):
        torch.zeros(1, 2).squeeze_(0)


def test_constants_from_outside_may_take_part():
    constant = torch.ones(FLOATS)
    with StorageCounter(hollow=True):
        assert (torch.zeros(FLOATS) * constant).shape == (FLOATS,)


# ---- a step by hand ----


@both_ways
@pytest.mark.parametrize(
    "make_optimizer, copies, passing",
    [  # copies of all weights: weights, gradients, state; passing: of one layer's
        (sgd, 2, 0),
        (momentum, 3, 0),
        (torch.optim.AdamW, 4, 3),  # the root, its quotient, and the quotient of the layer before
        (Prodigy, 6, 3),
    ],
    ids=["sgd", "momentum", "adamw", "prodigy"],
)
def test_copies_of_the_weights(make_optimizer, copies, passing, hollow):
    """16 layers of 1/4 MiB; activations of one item are negligible."""
    peak_mib = training_peak_mib(
        lambda: nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(16))),
        mean,
        (1, 256),
        make_optimizer=make_optimizer,
        hollow=hollow,
    )
    assert peak_mib == pytest.approx(copies * 4 + passing / 4, abs=0.05)


def activations_mib(dtype, hollow=True):
    """Peak of a layer without much weight and 8 ReLU on images of 4 MiB."""

    def make_network():
        return nn.Sequential(nn.Linear(16, 16, bias=False), *(nn.ReLU() for _ in range(8)))

    return training_peak_mib(
        make_network, mean, (FLOATS // 4, 16), make_optimizer=sgd, dtype=dtype,
        hollow=hollow,
    )  # fmt: skip


def test_activations_by_hand():
    target = 0.5  # int64, one for 16 floats of the image
    # Image and what each ReLU keeps, its result; in backward the gradient before and after a ReLU, but for
    # the last, whose gradient is one expanded number.
    assert activations_mib(None) == pytest.approx(4 + target + 8 * 4 + 4 + 4, abs=0.01)
    # bfloat16 halves all but the image, and keeps a bfloat16 image for the weights' gradient.
    assert activations_mib(torch.bfloat16) == pytest.approx(4 + 2 + target + 8 * 2 + 2 + 2, abs=0.01)


def test_float16_takes_what_bfloat16_takes():
    assert activations_mib(torch.float16) == activations_mib(torch.bfloat16)


# ---- the same step, really computed ----


SLOW = [("UNetFull", False), ("AttentionUNet", True), ("SegFormer3D", False), ("SegFormer3D", True)]
SLOW += [("SwinUNetR", False), ("SwinUNetR", True)]


@pytest.mark.parametrize(
    "name, checkpointing",
    [("UNet", False), ("UNet", True), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_prediction_is_what_a_real_step_takes(name, checkpointing):
    """Equal but for UNet, 1.5 % less (0.4 MiB), perhaps gradients copied to their weights' strides."""
    predicted, real = (
        training_peak_mib(
            lambda: get_model(config(name, checkpointing)),
            dice_ce_loss,
            (1, 1, 64 if name == "SwinUNetR" else 32, 32, 32),
            make_optimizer=momentum,
            hollow=hollow,
        )
        for hollow in (True, False)
    )
    assert predicted == pytest.approx(real, rel=0.02 if name == "UNet" else 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("name, checkpointing", [("UNetFull", False), ("AttentionUNet", True)])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_prediction_is_what_cuda_allocates(name, checkpointing, dtype):
    from benchmarks.training_memory import measure

    made = config(name, checkpointing)
    predicted = training_peak_mib(
        lambda: get_model(made), dice_ce_loss, (1, 1, 96, 96, 96), make_optimizer=Prodigy, dtype=dtype
    )
    measured = measure(made, (96, 96, 96), dtype, torch.device("cuda"))["measured_mib"]
    assert predicted == pytest.approx(measured, rel=0.1)


# ---- plans ----

WANTED = [
    Plan(patch, batch, accumulate, checkpointing, "fp32")
    for patch, batch, accumulate, checkpointing in itertools.product(
        [(96, 96, 96), (128, 64, 64), (100, 40)], [1, 4, 5], [1, 5], [False, True]
    )
]
plans = pytest.mark.parametrize("wanted", WANTED, ids=str)


@plans
def test_candidates_give_up_the_cheapest_first(wanted):
    found = list(candidates(wanted))
    assert found[0] == wanted and len(set(found)) == len(found)
    for plan in found:
        assert plan.batch_size * plan.accumulate >= wanted.batch_size * wanted.accumulate
        assert plan.checkpointing >= wanted.checkpointing and plan.precision == wanted.precision
    for before, after in itertools.pairwise(found):
        if after.patch_size == before.patch_size:
            assert after.batch_size <= before.batch_size
            continue
        assert before.batch_size == 1 and before.checkpointing, "nothing else was left"
        sides = list(zip(before.patch_size, after.patch_size, strict=True))
        longest = max(before.patch_size)
        assert all(b == (a if a < longest else max(48, a - 16)) for a, b in sides)
    assert max(found[-1].patch_size) == 48
    assert {p.patch_size for p in candidates(wanted, patch_step=0)} == {wanted.patch_size}
    by_32 = {p.patch_size for p in candidates(Plan((160, 96, 32), 1, 1, True), patch_step=32)}
    assert by_32 == {(160, 96, 32), (128, 96, 32), (96, 96, 32), (64, 64, 32)}, "multiples, the least is 64"


def test_candidates_by_hand():
    found = [str(plan) for plan in candidates(Plan((64, 50), 3, 2, False, "bf16"))]
    assert found == [
        f"patch {patch}, batch {batch}, {checkpointing}, bf16"
        for patch in ("64x50", "48x50", "48x48")
        for batch in ("3 x 2", "1 x 6")
        for checkpointing in ("no checkpointing", "checkpointing")
    ]


def voxels_mib(plan):
    return 500 * plan.batch_size / (1 + plan.checkpointing) * torch.Size(plan.patch_size).numel() / 96**3


def test_candidates_of_a_network_with_policies():
    """A word is never mistaken for True: "none" means that there is more to give up."""
    found = [str(plan) for plan in candidates(Plan((48, 48), 1, 2, "none", "bf16"))]
    plan = "patch 48x48, batch 1 x 2, {}, bf16"
    words = ["no checkpointing", "checkpointing high", "checkpointing all"]
    assert found == [plan.format(word) for word in words]
    assert [p.checkpointing for p in candidates(Plan((48, 48), 1, 2, "high"))] == ["high", "all"]
    assert [p.checkpointing for p in candidates(Plan((48, 48), 1, 2, "all"))] == ["all"]


@plans
@pytest.mark.parametrize("vram_gib", [0.7, 1.0, 1.5, 4.0])
def test_the_first_that_fits_is_taken(wanted, vram_gib):
    limit_mib = 1024 * vram_gib - RESERVED_MIB
    expected = next(plan for plan in candidates(wanted) if voxels_mib(plan) <= limit_mib)
    taken, tried = fit_plan(wanted, voxels_mib, vram_gib)
    assert taken == expected == tried[-1][0]
    assert all(mib == voxels_mib(plan) for plan, mib in tried)
    assert all(mib > limit_mib for _, mib in tried[:-1])
    lines = plan_table(tried, vram_gib).splitlines()
    assert lines[0] == f"plan for --vram {vram_gib:g} ({limit_mib:.0f} MiB of tensors):"
    assert [line.endswith(" <- taken") for line in lines[1:]] == [False] * (len(tried) - 1) + [True]
    assert all(f"{mib:.0f} MiB  {plan}" in line for (plan, mib), line in zip(tried, lines[1:], strict=True))


def test_nothing_fits():
    wanted = Plan((96, 96, 96), 2, 1, False, "fp32")
    with pytest.raises(ValueError) as error:
        fit_plan(wanted, lambda plan: 1000 + voxels_mib(plan), 1)
    assert str(error.value) == (
        "--vram 1: even patch 48x48x48, batch 1 x 2, checkpointing, fp32 needs 1031 MiB of tensors, more "
        "than the 424 that a card of this size leaves; choose a smaller network or input"
    )
    with pytest.raises(ValueError, match="even patch 96x96x96, batch 1 x 2, checkpointing"):
        fit_plan(wanted, lambda plan: 1000 + voxels_mib(plan), 1, patch_step=0)


def test_limit_on_a_card_and_elsewhere(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: calls.append(args))
    total = type("Properties", (), {"total_memory": 8 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    limit_cuda_memory(2, torch.device("cpu"))
    assert not calls
    card = torch.device("cuda", 0)
    limit_cuda_memory(2, card)
    limit_cuda_memory(16, card)
    assert calls == [(0.25, card), (1.0, card)]


def test_prediction_does_not_touch_the_random_state_or_warn():
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        activations_mib(None)
    assert torch.equal(before, torch.get_rng_state())


# ---- how a run computes its steps ----


class Recorder(nn.Module):
    """A convolution whose memory with and without checkpointing is told apart by the number of its layers."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.layers = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(2 if checkpointing else 8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def mean_loss(logits, target):
    return logits.mean()


def set_up(wanted, **options):
    network = Recorder(wanted.checkpointing)
    settings = {"name": "Recorder", "amp": "off"} | options
    return network, set_up_step(network, Recorder, mean_loss, wanted, torch.device("cpu"), **settings)


def test_without_a_limit_the_plan_is_what_the_flags_ask_for():
    wanted = Plan((64, 64), 4, 3, False)
    network, setup = set_up(wanted)
    assert setup.plan == Plan((64, 64), 4, 3, False, "fp32") and network.checkpointing is False
    assert setup.config == {"amp": "off", "batch_size": 4, "accumulate": 3, "checkpointing": False}
    expected = training_peak_mib(Recorder, mean_loss, (4, 1, 64, 64))
    assert setup.peak_mib == pytest.approx(expected) and 0 < expected < 1
    assert any(
        f"Recorder: 16 parameters; a step will take {expected:.0f} MiB" in line for line in setup.lines
    )
    assert not any("plan for" in line for line in setup.lines)


def test_with_a_limit_network_and_config_follow_the_plan_that_fits(monkeypatch):
    limits = []
    monkeypatch.setattr("common.memory.limit_cuda_memory", lambda vram_gib, device: limits.append(vram_gib))
    wanted = Plan((512, 512), 4, 3, False)
    full, less = (
        training_peak_mib(lambda c=c: Recorder(c), mean_loss, (4, 1, 512, 512)) for c in (False, True)
    )
    assert less < full
    vram_gib = (600 + (full + less) / 2) / 1024
    network, setup = set_up(wanted, vram_gib=vram_gib, patch_step=0)
    assert network.checkpointing is True and setup.config["checkpointing"] is True
    assert setup.config["batch_size"] == 4 and setup.peak_mib == pytest.approx(less)
    assert limits == [vram_gib] and setup.lines[-1].endswith("<- taken")


@pytest.mark.parametrize("patch_step, wanted, taken", [
    (0, Plan((256, 256), 4, 3, False), Plan((256, 256), 2, 6, True, "bf16")),
    (16, Plan((256, 256), 1, 3, False), Plan((224, 224), 1, 3, True, "bf16")),
])  # fmt: skip
def test_the_peak_is_that_of_the_plan_that_is_taken(patch_step, wanted, taken, monkeypatch):
    """Of its batch, patch, type and optimiser, with its checkpointing; not of what was asked for."""
    monkeypatch.setattr("common.memory.limit_cuda_memory", lambda *_: None)

    def needs_mib(plan):
        shape = (plan.batch_size, 1, *plan.patch_size)
        network = lambda: Recorder(plan.checkpointing)  # noqa: E731
        return training_peak_mib(network, mean_loss, shape, make_optimizer=sgd, dtype=torch.bfloat16)

    limit_mib = needs_mib(taken) * 1.001
    _, setup = set_up(
        wanted, amp="bf16", vram_gib=(RESERVED_MIB + limit_mib) / 1024, patch_step=patch_step,
        make_optimizer=sgd,
    )  # fmt: skip
    assert setup.plan == taken and setup.peak_mib == needs_mib(taken)
    assert setup.config["accumulate"] == taken.accumulate


def test_a_patch_that_must_not_shrink_is_refused(monkeypatch):
    monkeypatch.setattr("common.memory.limit_cuda_memory", lambda *_: None)
    limit_mib = training_peak_mib(lambda: Recorder(True), mean_loss, (1, 1, 240, 240))
    options = dict(vram_gib=(RESERVED_MIB + 1.001 * limit_mib) / 1024)
    assert set_up(Plan((256, 256), 1, 1, False), **options)[1].plan.patch_size < (256, 256)
    with pytest.raises(ValueError, match="even patch 256x256, batch 1 x 1, checkpointing"):
        set_up(Plan((256, 256), 1, 1, False), **options, patch_step=0)


def test_a_resumed_run_keeps_its_precision(monkeypatch):
    asked = []
    original = hardware.choose_precision
    monkeypatch.setattr(
        "common.memory.choose_precision", lambda amp, *rest: asked.append(amp) or original("off", *rest)
    )
    for amp, resumed in (
        ("auto", {"config": {"amp": "bf16"}}),
        ("off", {"config": {"amp": "bf16"}}),
        ("auto", None),
        ("auto", {"config": {}}),
    ):
        set_up(Plan((8, 8), 1, 1, False), amp=amp, resumed=resumed)
    assert asked == ["bf16", "off", "auto", "auto"]


def test_the_trial_of_a_precision_is_a_whole_step_on_a_copy(monkeypatch):
    """Forward and backward for a whole batch, in training mode, in the type that is tried."""
    seen, backward, is_trial = [], [], []

    class Watched(Recorder):
        def forward(self, x):
            logits = super().forward(x)
            if is_trial:
                seen.append((tuple(x.shape), logits.dtype, self.training))
            return logits

    def loss(logits, target):
        if is_trial:
            assert target.shape == (2, 8, 8) and target.dtype == torch.long
            logits.register_hook(lambda gradient: backward.append(tuple(gradient.shape)))
        return logits.float().mean()

    def choose(amp, device, trial):
        is_trial.append(True)
        trial(torch.bfloat16)
        trial(None)
        is_trial.clear()
        return hardware.choose_precision("off", device)

    monkeypatch.setattr("common.memory.choose_precision", choose)
    network = Watched().eval()
    wanted = Plan((8, 8), 2, 1, False)
    set_up_step(network, Watched, loss, wanted, torch.device("cpu"), name="Watched", amp="auto")
    shape = (2, 1, 8, 8)
    assert seen == [(shape, torch.bfloat16, True), (shape, torch.float32, True)]
    assert backward == [shape, shape], "in each type"
    assert all(p.grad is None for p in network.parameters()) and not network.training, "it was a copy"
