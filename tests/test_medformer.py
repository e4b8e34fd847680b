"""amygdala/medformer.py and its blocks: sizes, shapes, attention by formula, gradients, memory."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

from amygdala.medformer import MedFormer
from amygdala.medformer_attention import (
    AttentionBlock,
    BidirectionalAttention,
    MapFusion,
    MapGenerator,
    attend_both_ways,
    merge_heads,
    split_heads,
)
from amygdala.medformer_blocks import MBConv, PatchMerging, Style
from common.config import make_parser, read_yaml_files
from common.layers import InstanceNorm
from common.losses import dice_ce_loss
from common.memory import training_peak_mib

NO_CONVS_BELOW = dict(conv_num=(2, 0, 0, 0, 0, 0, 2, 2))
KITS = NO_CONVS_BELOW | dict(trans_num=(0, 2, 4, 6, 4, 2, 0, 0))
THICK = dict(kernel_size=[[1, 3, 3]] * 2 + [3] * 3, down_scale=[[1, 2, 2]] * 2 + [2] * 2)
ACDC = NO_CONVS_BELOW | THICK | dict(
    trans_num=(0, 2, 2, 2, 2, 2, 0, 0), num_heads=(1, 4, 4, 4, 4, 4, 1, 1), map_size=(2, 6, 6),
    fusion_dim=256, fusion_heads=4,
)  # fmt: skip
HALF = dict(
    base_chan=16, chan_num=(32, 64, 128, 160, 128, 64, 32, 16), num_heads=(1, 2, 4, 5, 4, 2, 1, 1),
    fusion_dim=160, fusion_heads=5,
)  # fmt: skip
TINY = dict(
    base_chan=4, chan_num=(4, 8, 8, 16, 8, 8, 4, 4), conv_num=(1, 1, 0, 0, 0, 1, 1, 1),
    trans_num=(0, 1, 1, 2, 2, 1, 0, 0), num_heads=(1, 2, 2, 4, 2, 2, 1, 1), map_size=2,
    fusion_dim=16, fusion_heads=4, fusion_depth=1,
)  # fmt: skip
CONFIGS = sorted((ROOT / "amygdala" / "config").glob("*/medformer*.yaml"))


def values_of(path):
    """What a configuration file and the one that it builds upon hold."""
    files = read_yaml_files(make_parser(None), path)
    return {key: value for _, content in files for key, value in content.items()}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny(ndim=3, **options):
    torch.manual_seed(0)
    return MedFormer(1, 3, ndim=ndim, **TINY | options)


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def on_meta(*numbers, **options):
    with torch.device("meta"):
        return MedFormer(*numbers, **options)


def total_loss(output, target):
    return sum(dice_ce_loss(logits, target) for logits in ([output] if torch.is_tensor(output) else output))


# ---- size ----


@pytest.mark.parametrize(
    "num_classes, options, total",
    [
        (3, {}, 39_591_942),
        (3, {"aux_loss": False}, 39_591_555),
        (2, {}, 39_591_780),
        (2, {"aux_loss": False}, 39_591_522),
        (16, {}, 39_594_048),  # AMOS
        (3, KITS, 38_586_118),
        (3, KITS | {"num_heads": [1] * 8, "aux_loss": False}, 38_585_731),  # LiTS
        (14, KITS | THICK | {"map_size": 3}, 36_669_180),  # BCV
        (4, ACDC, 21_826_408),
        (3, HALF, 10_409_734),
    ],
)
def test_parameter_totals(num_classes, options, total):
    assert count(on_meta(1, num_classes, **options)) == total


def test_parameters_of_each_module():
    network = on_meta(1, 3)
    assert count(network.stem, network.inc) == 56_160
    assert [count(down) for down in network.down] == [465_664, 2_009_472, 8_439_808, 17_865_856]
    assert [count(up) for up in network.up] == [6_405_568, 1_420_928, 995_328, 248_832]
    assert (count(network.map_fusion), count(network.aux), count(network.outc)) == (1_683_840, 387, 99)
    second, last = network.down[1], network.up[1]
    parts = second.generate, second.merge, second.convs, second.attention
    assert [count(part) for part in parts] == [663_552, 79_360, 884_736, 381_824]
    parts = last.reduce_maps, last.attention, last.convs
    assert [count(part) for part in parts] == [49_152, 487_040, 884_736]
    block = network.down[2].attention[0]
    own = block.attention
    parts = block, own, own.feat_qv, own.feat_out, own.map_qv, own.map_out, block.mbconv, own.norm
    expected = [1_484_544, 407_040, 137_984, 72_448, 131_072, 65_536, 1_077_504, 0]
    assert [count(part) for part in parts] == expected


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_yaml_files_name_every_choice_and_train_within_3_5_gib(path, monkeypatch):
    config = values_of(path)
    options = set(inspect.signature(MedFormer).parameters) - {"in_channels", "num_classes", "ndim"}
    assert set(config) >= options | {"patch_size", "batch_size", "lr"}
    network = {key: config[key] for key in options}
    flat = path.stem.endswith("2d")
    totals = {"medformer_3d": 39_591_942, "medformer_half_3d": 10_409_734, "medformer_2d": 19_712_326}
    assert count(on_meta(1, 3, ndim=2 if flat else 3, **network)) == totals[path.stem]
    if path.parent.name == "Amygdala":
        assert f"{totals[path.stem]:,}" in path.read_text(encoding="utf8")
    slices, *sides = config["patch_size"]
    shape = (config["batch_size"] * slices, 1, *sides) if flat else (config["batch_size"], 1, slices, *sides)
    if path.parent.name == "Amygdala" and "half" not in path.stem:  # the largest ones
        monkeypatch.setattr("common.depthwise.CACHED_FLOATS", 2**24)  # fewer steps to predict
        peak_mib = training_peak_mib(
            lambda: MedFormer(1, 3, ndim=2 if flat else 3, **network), total_loss, shape
        )
        assert peak_mib < 3.5 * 1024


# ---- shapes ----


@pytest.mark.parametrize("shape", [(96, 96, 96), (64, 96, 80)])
def test_shapes_of_all_stages(shape):
    network, shapes = on_meta(1, 3), {}

    def remember(name):
        def hook(module, inputs, output):
            outputs = [output] if torch.is_tensor(output) else output
            shapes[name] = [tuple(x.shape[1:]) for x in outputs if x is not None]

        return hook

    for i in range(4):
        network.down[i].register_forward_hook(remember(f"down{i + 1}"))
        network.up[i].register_forward_hook(remember(f"up{i + 1}"))
    for name in ("inc", "map_fusion", "aux", "outc"):
        getattr(network, name).register_forward_hook(remember(name))
    with torch.no_grad():
        output = network(torch.zeros(2, 1, *shape, device="meta"))

    def at(stride):
        return tuple(side // stride for side in shape)

    assert shapes == {
        "inc": [(32, *shape)],
        "down1": [(64, *at(2))],
        "down2": [(128, *at(4)), (128, 4, 4, 4)],
        "down3": [(256, *at(8)), (256, 4, 4, 4)],
        "down4": [(320, *at(16)), (320, 4, 4, 4)],
        "map_fusion": [(128, 4, 4, 4), (256, 4, 4, 4), (320, 4, 4, 4)],
        "up1": [(256, *at(8)), (256, 4, 4, 4)],
        "up2": [(128, *at(4)), (128, 4, 4, 4)],
        "aux": [(3, *at(4))],
        "up3": [(64, *at(2))],
        "up4": [(32, *shape)],
        "outc": [(3, *shape)],
    }
    assert [tuple(x.shape) for x in output] == [(2, 3, *shape)] * 2


@pytest.mark.parametrize(
    "shape", [(16, 32, 32), (1, 1, 1), (5, 40, 3), (17, 31, 9), (32, 32), (1, 1), (9, 35)]
)
def test_any_size(shape):
    network = tiny(ndim=len(shape))
    with torch.no_grad():
        logits, auxiliary = network(noise(2, 1, *shape))  # in training mode norms refuse a single voxel
        assert logits.shape == auxiliary.shape == (2, 3, *shape)
        assert logits.isfinite().all() and auxiliary.isfinite().all()
        assert network.eval()(noise(2, 1, *shape)).shape == (2, 3, *shape)


def test_multiple_follows_the_scales():
    assert tiny().multiple == (16, 16, 16) and tiny(ndim=2).multiple == (16, 16)
    thick = tiny(**THICK)
    assert thick.multiple == (4, 16, 16)
    assert thick(noise(1, 1, 6, 20, 30))[0].shape == (1, 3, 6, 20, 30)


def test_a_channel_more_in_and_another_norm_activation_and_projection():
    torch.manual_seed(0)
    for options in (
        {"norm": "bn", "act": "gelu"},
        {"norm": "ln", "act": "leaky_relu", "proj_type": "linear"},
    ):
        network = MedFormer(2, 4, aux_loss=False, **TINY | options)
        assert network(noise(1, 2, 16, 16, 32)).shape == (1, 4, 16, 16, 32)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"conv_num": [1, 2]}, r"conv_num has 2 entries instead of 8: \[1, 2\]"),
        ({"kernel_size": [3]},  "kernel_size is .*; give 5, one for each level"),
        ({"kernel_size": [2] * 5}, "kernel_size is .* sides must be odd"),
        ({"down_scale": [[1, 2]] * 4}, "down_scale is .*; give 4, one for each level, each of 3 numbers"),
        ({"num_heads": [1, 3, 2, 4, 2, 2, 1, 1]}, "num_heads is 3 in down2, which does not divide its 8"),
        ({"trans_num": [1] * 8}, "trans_num is 1 in down1, which needs 0"),
        ({"trans_num": [0, 1, 0, 2, 2, 1, 0, 0]}, "trans_num is 0 in down3, which needs at least 1"),
        ({"conv_num": [1, 1, 0, 0, 0, 1, 0, 1]}, "up3 has no block: conv_num and trans_num are both 0"),
        ({"fusion_heads": 3}, "fusion_heads is 3, which does not divide fusion_dim, 16"),
        ({"map_size": 1}, "map_size is 1; a map needs at least two cells"),
        ({"norm": "batch"}, "norm is 'batch'; take in or bn or ln"),
        ({"conv_block": "Plain"}, "conv_block is 'Plain'; take BasicBlock"),
    ],
)  # fmt: skip
def test_numbers_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


# ---- blocks by formula ----


def instance_norm(x, eps):
    mean = x.mean((2, 3, 4), keepdim=True)
    return (x - mean) / ((x - mean).square().mean((2, 3, 4), keepdim=True) + eps).sqrt()


def test_instance_norm_without_weights():
    x = 0.01 * noise(2, 3, 4, 5, 6)  # so faint that eps is seen
    for eps in (1e-4, 1e-5):
        assert torch.allclose(InstanceNorm(3, affine=False, eps=eps)(x), instance_norm(x, eps), atol=1e-5)
    flat = InstanceNorm(3, affine=False)(noise(2, 3, 8, 8))
    assert torch.allclose(flat, F.instance_norm(noise(2, 3, 8, 8)), atol=1e-5)
    assert not list(InstanceNorm(3, affine=False).parameters())


def test_mbconv_by_formula():
    torch.manual_seed(0)
    block, x = MBConv(4, (3, 3, 3), Style()), 0.1 * noise(2, 4, 5, 6, 7)
    y = F.conv3d(F.relu(instance_norm(x, 1e-4)), block.expand.conv.weight)
    y = F.conv3d(F.relu(instance_norm(y, 1e-4)), block.depthwise[2].weight, padding=1, groups=16)
    gate = F.linear(y.mean((2, 3, 4)), block.gate.squeeze.weight.flatten(1), block.gate.squeeze.bias)
    gate = F.linear(F.relu(gate), block.gate.excite.weight.flatten(1), block.gate.excite.bias)
    y = y * torch.sigmoid(gate)[:, :, None, None, None]
    expected = x + F.conv3d(instance_norm(y, 1e-4), block.reduce.weight)
    assert torch.allclose(block(x), expected, atol=1e-5)


def test_patch_merging_takes_the_last_axis_first():
    merging = PatchMerging(2, 3, (3, 3, 3), (1, 2, 2), Style())
    merging.norm, merging.reduce = nn.Identity(), nn.Identity()
    x = torch.arange(2 * 2 * 4 * 4.0).view(1, 2, 2, 4, 4)
    merged = merging(x)
    assert merged.shape == (1, 8, 2, 2, 2)
    # Channel 0 of the corners (y, x) = (0, 0), then channel 1; then of (0, 1), (1, 0), (1, 1).
    assert merged[0, :, 0, 0, 0].tolist() == [0, 32, 1, 33, 4, 36, 5, 37]


def test_a_map_is_a_mean_with_weights_of_each_cell():
    torch.manual_seed(0)
    generate, x = MapGenerator(4, (2, 3, 1), Style()), noise(2, 4, 5, 6, 7)
    both = F.conv3d(x, generate.conv.weight, padding=1)
    weights = both[:, 4:].flatten(2).exp()
    weights = weights / weights.sum(2, keepdim=True)  # over all voxels
    expected = torch.einsum("bcn,bmn->bcm", both[:, :4].flatten(2), weights).view(2, 4, 2, 3, 1)
    assert torch.allclose(generate(x), expected, atol=1e-5)


def reference_attention(block, x, m):
    """Attention both ways, written from the formulas: channel d * heads + head is channel d of a head."""
    weights, heads = dict(block.named_parameters()), block.heads

    def separable(y, name):
        y = F.conv3d(y, weights[f"{name}.0.weight"], padding=1, groups=y.shape[1])
        return torch.einsum("oi,bidhw->bodhw", weights[f"{name}.1.weight"].flatten(1), y)

    qv_x = separable(instance_norm(x, 1e-5), "feat_qv")
    qv_m = torch.einsum("oi,bidhw->bodhw", weights["map_qv.weight"].flatten(1), instance_norm(m, 1e-5))
    inner = qv_m.shape[1] // 2
    qx, vx, qm, vm = (
        part.flatten(2).reshape(len(x), inner // heads, heads, -1)
        for qv in (qv_x, qv_m)
        for part in (qv[:, :inner], qv[:, inner:])
    )  # (B, c, heads, n)
    scores = torch.einsum("bchn,bchm->bhnm", qx, qm) / (inner // heads) ** 0.5
    of_x = scores.exp() / scores.exp().sum(3, keepdim=True)
    of_m = scores.exp() / scores.exp().sum(2, keepdim=True)
    x = torch.einsum("bhnm,bchm->bchn", of_x, vm).reshape(len(x), inner, *x.shape[2:])
    m = torch.einsum("bhnm,bchn->bchm", of_m, vx).reshape(len(m), inner, *m.shape[2:])
    return separable(x, "feat_out"), torch.einsum("oi,bidhw->bodhw", weights["map_out.weight"].flatten(1), m)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_both_ways_by_formula(heads):
    torch.manual_seed(0)
    block = BidirectionalAttention(6, 8, heads, (3, 3, 3), Style())
    x, m = noise(2, 6, 3, 4, 5), noise(2, 8, 2, 3, 2, seed=1)
    for ours, expected in zip(block(x, m), reference_attention(block, x, m), strict=True):
        assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("channels", [8, 6])
def test_an_attention_block_adds_to_what_comes_in(channels):
    torch.manual_seed(0)
    block = AttentionBlock(channels, 8, 2, (3, 3, 3), Style())
    x, m = noise(2, channels, 3, 4, 5), noise(2, 8, 2, 3, 2, seed=1)
    read, read_by_map = reference_attention(block.attention, x, m)
    shortcut = x
    if channels != 8:
        shortcut = F.conv3d(F.relu(instance_norm(x, 1e-4)), block.shortcut.conv.weight)
    y, new_map = block(x, m)
    assert torch.allclose(y, block.mbconv(read + shortcut), atol=1e-4)
    assert torch.allclose(new_map, m + read_by_map, atol=1e-5)
    last = AttentionBlock(channels, 8, 2, (3, 3, 3), Style(), updates_map=False)
    assert last(x, m)[1] is m


def test_both_softmaxes_sum_to_one():
    """Values of 1 stay 1, on both sides, whatever the scores."""
    queries, map_queries = 3 * noise(2, 4, 30, 5), 3 * noise(2, 4, 8, 5, seed=1)
    ones = torch.ones_like
    for read in attend_both_ways(queries, ones(queries), map_queries, ones(map_queries)):
        assert torch.allclose(read, torch.ones_like(read), atol=1e-6)


def test_neighbouring_channels_belong_to_different_heads():
    x = torch.arange(6.0).view(1, 6, 1)
    assert split_heads(x, 2).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert torch.equal(merge_heads(split_heads(noise(2, 6, 5), 3)), noise(2, 6, 5))
    swapped = [1, 0, 3, 2, 5, 4]
    parts = [noise(2, 6, n, seed=i) for i, n in enumerate((7, 7, 4, 4))]
    before = attend_both_ways(*(split_heads(part, 2) for part in parts))
    after = attend_both_ways(*(split_heads(part[:, swapped], 2) for part in parts))
    for a, b in zip(before, after, strict=True):
        assert torch.allclose(a.flip(1), b, atol=1e-6), "the heads have changed places and nothing else"


def test_features_do_not_care_for_the_order_of_the_cells():
    torch.manual_seed(0)
    block, x = AttentionBlock(6, 8, 2, (3, 3, 3), Style()).eval(), noise(1, 6, 3, 4, 5)
    m = noise(1, 8, 2, 2, 2, seed=1)
    order = torch.randperm(8)
    shuffled = m.flatten(2)[:, :, order].view(m.shape)
    (y, new_map), (same, shuffled_map) = block(x, m), block(x, shuffled)
    assert torch.allclose(y, same, atol=1e-5)
    assert torch.allclose(new_map.flatten(2)[:, :, order].view(m.shape), shuffled_map, atol=1e-5)


def test_the_maps_of_all_levels_are_fused_wherever_their_cells_lie():
    torch.manual_seed(0)
    fusion = MapFusion((2, 3, 4), 8, 2, 2, Style())
    maps = [noise(1, c, 2, 2, 2, seed=c).requires_grad_() for c in (2, 3, 4)]
    order = torch.randperm(8)
    shuffled = [m.flatten(2)[:, :, order].view(m.shape) for m in maps]
    for fused, other in zip(fusion(*maps), fusion(*shuffled), strict=True):
        assert torch.allclose(fused.flatten(2)[:, :, order].view(fused.shape), other, atol=1e-5)
    fusion(*maps)[0][0, 0, 0, 0, 0].backward()
    assert all((m.grad.abs() > 0).all() for m in maps), "a cell sees all cells of all levels"


def test_a_corner_sees_the_whole_image():
    image = noise(1, 1, 16, 16, 64).requires_grad_()
    tiny().eval()(image)[0, 1, 0, 0, 0].backward()
    assert (image.grad != 0).float().mean() > 0.95


def test_dropout_in_training_only():
    network, image = tiny(attn_drop=0.5, proj_drop=0.5, aux_loss=False), noise(1, 1, 16, 16, 32)
    with torch.no_grad():
        assert not torch.equal(network(image), network(image))
        assert torch.equal(network.eval()(image), network(image))
    rates = {m.p for m in network.modules() if isinstance(m, nn.Dropout)}
    assert rates == {0.5}


# ---- gradients ----


@pytest.mark.parametrize(
    "options", [{}, {"ndim": 2, "norm": "bn"}, {"aux_loss": False, "proj_type": "linear"}]
)
def test_every_parameter_learns(options):
    network = tiny(**options)
    shape = (32,) * options.get("ndim", 3)
    target = (noise(2, *shape) > 0).long()
    total_loss(network(noise(2, 1, *shape)), target).backward()
    silent = set()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if parameter.grad.abs().max() < 1e-9:
            silent.add(name)
    # The last shifts of up1 meet batch norms, which subtract them again: what is left is rounding.
    allowed = {"up.0.attention.0.block.mbconv.norm.bias", "up.0.attention.1.mbconv.norm.bias"}
    assert silent <= (allowed if options.get("norm") == "bn" else set())


@pytest.mark.parametrize("options", [{}, {"ndim": 2, "norm": "bn"}])
def test_checkpointing_gives_the_same_gradients_and_keeps_less(options):
    shape = (16, 32, 32)[-options.get("ndim", 3) :]
    image, target = noise(2, 1, *shape), (noise(2, *shape, seed=1) > 0).long()
    gradients, kept, states = {}, {}, {}
    for checkpointing in (False, True):
        network, sizes = tiny(**options), []
        network.checkpointing = checkpointing
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            output = network(image)
        total_loss(output, target).backward()
        gradients[checkpointing] = [p.grad for p in network.parameters()]
        kept[checkpointing], states[checkpointing] = sum(sizes), network.state_dict()
    for a, b in zip(gradients[False], gradients[True], strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-5)
    for name, value in states[False].items():
        assert torch.equal(value, states[True][name]), f"{name}: running statistics were updated twice"
    assert kept[True] < 0.5 * kept[False]


def test_bf16_stays_close_to_fp32_and_has_gradients():
    network, image = tiny(), noise(1, 1, 32, 32, 32)
    exact, _ = network(image)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(image)
    assert rounded[0].dtype == torch.bfloat16
    assert (rounded[0] - exact).abs().mean() < 0.1 * exact.std()
    total_loss(rounded, torch.zeros(1, 32, 32, 32, dtype=torch.long)).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_a_few_steps_learn_two_boxes():
    network = tiny()
    target = torch.zeros(1, 16, 16, 32, dtype=torch.long)
    target[:, 2:12, 4:14, 4:14], target[:, 4:12, 2:12, 20:28] = 1, 2
    image = target[:, None].float() + 0.1 * noise(1, 1, 16, 16, 32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(30):
        loss = total_loss(network(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    labels = network.eval()(image).argmax(1)
    for label in (1, 2):
        overlap = ((labels == label) & (target == label)).sum()
        assert 2 * overlap / ((labels == label).sum() + (target == label).sum()) > 0.9
