"""amos_lha/lha_net.py and networks.py: size, shapes, start, gradients, memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from amos_lha.lha_net import PMSA, PRESETS, Heads, LHANet, TrainingOutput, routed
from amos_lha.networks import ARCHITECTURE, MODELS, get_model, load_trained
from amos_lha.organs import GROUPS
from common.checkpoints import save_checkpoint
from common.hardware import Precision
from common.losses import dice_ce_loss
from common.memory import training_peak_mib
from common.nnunet import strides_for

THICK_SLICES = [[1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
CUBES = [[2, 2, 2]] * 4
SPACING, THICK_SPACING = (2.0, 1.5, 1.5), (7.7, 1.2, 1.2)  # mm, of the strides CUBES and THICK_SLICES
CONFIG = {
    "model": "LHANet",
    "preset": "tiny",
    "heads": "size_aware",
    "attention": True,
    "router": False,
    "deep_supervision": False,
    "checkpointing": "none",
    "feature_size": 24,
}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny(**options):
    """A tiny network whose attention has an effect."""
    torch.manual_seed(0)
    network = LHANet("tiny", **options)
    for module in network.modules():
        if isinstance(module, PMSA):
            nn.init.normal_(module.expand.weight, std=0.1)
    return network


def count(module):
    return sum(p.numel() for p in module.parameters())


def on_meta(spacing_mm=SPACING, **changes):
    with torch.device("meta"):
        return get_model(CONFIG | changes, spacing_mm)


# ---- size ----


@pytest.mark.parametrize(
    "changes, total",
    [
        ({"preset": "tiny"}, 554_309),
        ({"preset": "small"}, 2_058_937),
        ({"preset": "base"}, 5_041_345),
        ({"preset": "small", "attention": False}, 1_784_007),
        ({"preset": "small", "heads": "shared"}, 1_985_954),
        ({"preset": "small", "router": True}, 2_058_937 + 3 * 33),
        ({"preset": "small", "deep_supervision": True}, 2_058_937 + 16 * (32 + 64 + 128 + 3)),
        # Thick slices: 18 weights less in a kernel of levels 0 and 1 on both sides and in two heads, 4 less
        # in their transposed convolutions.
        (
            {"preset": "small", "spacing_mm": THICK_SPACING},
            2_058_937
            - 18 * (16 + 16 * 32 + 32 * 32 + 16 * 16 + 32 * 32 + 16 * 8 + 32 * 16)
            - 4 * (32 * 16 + 64 * 32),
        ),
        ({"model": "UNet"}, 31_190_672),
        ({"model": "ResEncUNet"}, 102_335_632),
        ({"model": "SegResNet"}, 4_701_152),
        ({"model": "SegFormer3D"}, 4_495_664),
        ({"model": "SwinUNetR"}, 15_703_354),
    ],
)
def test_parameter_totals(changes, total):
    assert count(on_meta(**changes)) == total


def test_every_option_but_checkpointing_decides_the_shape_of_the_weights():
    assert set(ARCHITECTURE) == set(CONFIG) - {"checkpointing"}


@pytest.mark.parametrize("shape, spacing_mm", [((96, 96, 96), SPACING), ((32, 128, 128), THICK_SPACING)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_small_takes_at_most_half_the_memory_of_a_plain_unet(shape, spacing_mm, dtype):
    def peak_mib(**changes):
        config = CONFIG | {"preset": "small"} | changes
        return training_peak_mib(
            lambda: get_model(config, spacing_mm), dice_ce_loss, (1, 1, *shape), dtype=dtype
        )

    plain = peak_mib()
    assert plain <= peak_mib(model="UNet") / 2
    high, everything = peak_mib(checkpointing="high"), peak_mib(checkpointing="all")
    assert everything < high < plain


# ---- shapes ----


@pytest.mark.parametrize("strides", [CUBES, THICK_SLICES])
@pytest.mark.parametrize("shape", [(16, 32, 32), (1, 1, 1), (5, 40, 3), (17, 31, 9), (16, 16, 16)])
def test_any_size(strides, shape):
    network = tiny(strides=strides)
    with torch.no_grad():
        logits = network(noise(2, 1, *shape))  # in training mode, where norms refuse a single voxel
    assert logits.shape == (2, 16, *shape)
    assert logits.isfinite().all()


@pytest.mark.parametrize("model", MODELS)
def test_every_model_takes_any_size(model):
    network = get_model(CONFIG | {"model": model, "feature_size": 12}, SPACING).eval()
    with torch.no_grad():
        assert network(noise(1, 1, 17, 32, 35)).shape == (1, 16, 17, 32, 35)


def test_unknown_model():
    with pytest.raises(ValueError, match="unknown model 'VNet'; take one of LHANet, UNet"):
        get_model(CONFIG | {"model": "VNet"}, SPACING)


@pytest.mark.parametrize("model", ["LHANet", "UNet", "ResEncUNet"])
def test_deep_supervision_is_a_list_on_coarser_grids_in_training_only(model):
    if model == "LHANet":
        network = tiny(strides=THICK_SLICES, deep_supervision=True)
    else:
        network = on_meta(THICK_SPACING, model=model, deep_supervision=True)
    image = torch.zeros(1, 1, 16, 64, 64, device=network.head.weight.device if model != "LHANet" else "cpu")
    with torch.no_grad():
        levels = network(image)
        assert [tuple(x.shape) for x in levels] == [
            (1, 16, 16, 64, 64),
            (1, 16, 16, 32, 32),
            (1, 16, 16, 16, 16),
            (1, 16, 8, 8, 8),
        ]
        assert network.eval()(image).shape == (1, 16, 16, 64, 64)


def test_deep_supervision_refuses_patches_that_would_be_padded():
    network = tiny(deep_supervision=True)
    for shape in ((16, 32, 30), (16, 16, 16)):
        with pytest.raises(ValueError, match=r"multiples of \(16, 16, 16\)") as error:
            network(noise(1, 1, *shape))
        assert str(shape) in str(error.value)
    network.eval()(noise(1, 1, 16, 32, 30))


def test_router_output():
    network = tiny(router=True, deep_supervision=True)
    output = network(noise(1, 1, 16, 32, 32))
    assert isinstance(output, TrainingOutput) and len(output.levels) == 4
    assert output.router.shape == (1, 3, 8, 16, 16)
    assert isinstance(network.eval()(noise(1, 1, 16, 32, 32)), torch.Tensor)
    alone = tiny(router=True)(noise(1, 1, 16, 32, 32))
    assert len(alone.levels) == 1


def test_router_by_hand():
    router = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1, 1)  # small, medium, large
    logits = routed(torch.zeros(1, 16, 2, 2, 2), router)[0, :, 0, 0, 0]
    small, medium, large = (router.flatten() - router.exp().sum().log()).tolist()
    by_label = [0, *[large] * 3, *[small] * 2, *[large] * 2, *[medium] * 3, *[small] * 3, *[medium] * 2]
    assert logits.tolist() == pytest.approx(by_label)


@pytest.mark.parametrize(
    "spacing_mm, z_strides",
    [
        ((2.0, 1.5, 1.5), [2, 2, 2, 2]),
        ((3.7, 1.5, 1.5), [2, 2, 2, 2]),  # 2.47 times
        ((5.0, 2.0, 2.0), [1, 2, 2, 2]),  # 2.5 times; then 5 and 4 mm
        ((7.7, 1.5, 1.5), [1, 1, 2, 2]),  # 7.7 and 3 mm are still 2.57 times, 7.7 and 6 are not
        ((5.0, 1.9, 0.5), [1, 1, 1, 2]),
        ((50.0, 0.5, 0.5), [1, 1, 1, 1]),
    ],
)
def test_strides_for(spacing_mm, z_strides):
    assert strides_for(spacing_mm) == [[z, 2, 2] for z in z_strides]


def test_thick_slices_do_not_see_each_other_at_the_finest_levels():
    def z_sides(module):
        convs = [m for m in module.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d))]
        return {conv.kernel_size[0] for conv in convs}

    network = tiny(strides=THICK_SLICES)
    heads = network.heads.groups
    for flat in (network.stem, network.encoder[0], *network.decoder[:2], heads["small"], heads["medium"]):
        assert z_sides(flat) == {1}
    for deep in (*network.encoder[1:], *network.decoder[2:], heads["large"]):
        assert 3 in z_sides(deep)


# ---- heads ----


def test_heads_lie_in_the_order_of_labels():
    """Each head says which organ it means by its bias; all else is silenced."""
    heads = Heads((4, 6, 8), [(3, 3, 3)] * 3)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.zero_()
        heads.all.bias[0] = 100.0
        for group, organs in GROUPS.items():
            heads.groups[group][1].bias.copy_(torch.tensor(organs))
        logits = heads(noise(1, 4, 4, 8, 8), noise(1, 6, 2, 4, 4), noise(1, 8, 1, 2, 2))
    expected = torch.tensor([100.0, *range(1, 16)]).view(1, 16, 1, 1, 1).expand(1, 16, 4, 8, 8)
    assert torch.allclose(logits, expected)


def test_which_stride_an_organ_is_seen_at():
    heads = Heads((4, 6, 8), [(3, 3, 3)] * 3).eval()
    features = [noise(1, 4, 8, 8, 8), noise(1, 6, 4, 4, 4), noise(1, 8, 2, 2, 2)]
    with torch.no_grad():
        before = heads(*features)
        for i, group in enumerate(("small", "medium", "large")):
            changed = [*features]
            changed[i] = noise(*features[i].shape, seed=1)
            moved = (heads(*changed) - before).abs().amax((0, 2, 3, 4)) > 1e-4
            own = {0, *range(1, 16)} if group == "small" else set(GROUPS[group])  # fine detail is for all
            assert set(moved.nonzero().flatten().tolist()) == own


# ---- attention ----


def test_attention_starts_as_the_identity():
    torch.manual_seed(0)
    x = noise(2, 32, 5, 6, 7)
    assert torch.equal(PMSA(32)(x), x)
    with_attention = LHANet("tiny").eval()
    without = LHANet("tiny", attention=False).eval()
    without.load_state_dict(with_attention.state_dict(), strict=False)
    image = noise(1, 1, 16, 32, 32)
    with torch.no_grad():
        assert torch.equal(with_attention(image), without(image))


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 2, 2), (1, 5, 9), (6, 6, 6)])
def test_attention_takes_small_grids_and_looks_far(shape):
    torch.manual_seed(0)
    module = PMSA(32)
    nn.init.normal_(module.expand.weight)
    x = noise(1, 32, *shape).requires_grad_()
    out = module(x)
    assert out.shape == x.shape
    out[0, 0, 0, 0, 0].backward()
    assert (x.grad[0].abs().amax(0) > 0).all(), "a corner sees the whole grid"


def test_presets_grow():
    for name, (channels, blocks) in PRESETS.items():
        assert len(channels) == 5 and len(blocks) == 4, name
    with pytest.raises(ValueError, match="unknown preset 'huge'; take tiny, small or base"):
        LHANet("huge")
    with pytest.raises(ValueError, match="heads is 'many'; take size_aware or shared"):
        LHANet("tiny", heads="many")


# ---- gradients ----


def total_loss(output):
    """Of everything a training step predicts."""
    if isinstance(output, TrainingOutput):
        return total_loss(output.levels) + output.router.square().mean()
    levels = [output] if isinstance(output, torch.Tensor) else output
    return sum(F.cross_entropy(x, torch.full_like(x[:, 0], 5, dtype=torch.long)) for x in levels)


@pytest.mark.parametrize("options", [{}, {"router": True, "deep_supervision": True}, {"heads": "shared"}])
def test_every_parameter_learns(options):
    network = tiny(**options)
    total_loss(network(noise(1, 1, 32, 32, 32))).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-9, name


@pytest.mark.parametrize("options", [{}, {"router": True, "deep_supervision": True}])
def test_checkpointing_policies_give_the_same_gradients_and_keep_less(options):
    image, gradients, kept = noise(1, 1, 16, 32, 32), {}, {}
    for policy in ("none", "high", "all"):
        network, sizes = tiny(**options), []
        network.checkpointing = policy
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            output = network(image)
        total_loss(output).backward()
        gradients[policy], kept[policy] = [p.grad for p in network.parameters()], sum(sizes)
    for policy in ("high", "all"):
        for a, b in zip(gradients["none"], gradients[policy], strict=True):
            assert torch.allclose(a, b, atol=1e-6, rtol=1e-6)
    assert kept["all"] < 0.6 * kept["high"] and kept["high"] < 0.6 * kept["none"]


@pytest.mark.parametrize("model", ["LHANet", "UNet"])
def test_checkpointing_takes_the_planners_words_and_yes_and_no(model):
    image, kept = noise(1, 1, 32, 32, 64), {}
    network = get_model(CONFIG | {"model": model, "preset": "tiny"}, (2, 1.5, 1.5)).train()
    for policy in ("none", False, "all", True):
        network.checkpointing, sizes = policy, []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            network(image)
        kept[str(policy)] = sum(sizes)
    assert kept["none"] == kept["False"] > 2 * kept["all"] and kept["all"] == kept["True"]


def test_policies_of_checkpointing():
    with pytest.raises(ValueError, match="checkpointing is 'some'; take one of none, high, all"):
        on_meta(checkpointing="some")
    assert on_meta(model="UNet", checkpointing="high").checkpointing is True
    assert on_meta(model="SwinUNetR", checkpointing=False).checkpointing is False


def test_bf16_stays_close_to_fp32():
    network, image = tiny(), noise(1, 1, 32, 32, 32)
    with torch.no_grad():
        exact = network(image)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(image)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().mean() < 0.05 * exact.std()


def test_a_few_steps_learn_two_boxes():
    network = tiny(router=True, deep_supervision=True)
    target = torch.zeros(1, 16, 32, 32, dtype=torch.long)
    target[:, 2:12, 4:20, 4:16], target[:, 4:10, 8:14, 22:28] = 6, 11  # a large and a small organ
    image = target[:, None].float() + 0.1 * noise(1, 1, 16, 32, 32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for _ in range(40):
        loss = F.cross_entropy(network(image).levels[0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    labels = network.eval()(image).argmax(1)
    for organ in (6, 11):
        overlap = ((labels == organ) & (target == organ)).sum()
        assert 2 * overlap / ((labels == organ).sum() + (target == organ).sum()) > 0.8


# ---- checkpoints ----


def test_load_trained(tmp_path):
    torch.manual_seed(0)
    network = get_model(CONFIG, SPACING)
    state = {
        "stage": "amos_lha",
        "config": CONFIG | {"patch_size": [16, 32, 32]},
        "model": network.state_dict(),
        "preprocessing": {"spacing_mm": [2.0, 1.5, 1.5], "modality": "ct", "labelled": [1], "scaling": None},
        "split": {"train": ["amos_0001"], "val": [], "test": []},
    }
    save_checkpoint(tmp_path / "best.pt", state)
    precision = Precision("fp32", None, None, "")
    model = load_trained(tmp_path / "best.pt", torch.device("cpu"), precision)
    image = noise(1, 1, 16, 32, 32)
    assert not model.network.training
    assert torch.equal(model.network(image), network.eval()(image))
    save_checkpoint(tmp_path / "other.pt", state | {"stage": "segmentation"})
    with pytest.raises(ValueError, match=r"other.pt: not weights of amos_lha/train.py but of segmentation"):
        load_trained(tmp_path / "other.pt", torch.device("cpu"), precision)
