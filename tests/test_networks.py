"""common/networks.py and common/layers.py: sizes, parameter counts, names, gradients, checkpointing."""

import copy
import itertools

import pytest
import torch
from torch import nn

from common.layers import AttentionGate, Conv3d, make_norm, pad_to, upsample_to
from common.networks import AttentionUNet, DoubleConv, UNet, Up
from common.recomputation import checkpointed

VARIANTS = [  # (attention, bilinear, norm, ndim)
    v for v in itertools.product([False, True], [True, False], ["batch", "group"], [2, 3])
]
every_variant = pytest.mark.parametrize("attention, bilinear, norm, ndim", VARIANTS)


def count(module):
    return sum(p.numel() for p in module.parameters())


def on_meta(network=UNet, *args, **options):
    """The network without memory or arithmetic: shapes and counts only."""
    with torch.device("meta"):
        return network(*args, **options)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(network=UNet, *args, **options):
    torch.manual_seed(0)
    return network(*args, **options)


# ---- parameters, names and shapes ----


@pytest.mark.parametrize(
    "bilinear, width, plain, attention, deep",
    [
        (True, 64, 17_261_890, 17_612_458, 17_613_360),
        (True, 32, 4_317_858, 4_406_106, 4_406_560),
        (True, 16, 1_080_658, 1_103_026, 1_103_256),
        (False, 64, 31_036_546, 31_561_194, 31_562_992),
    ],
)
def test_parameter_totals(bilinear, width, plain, attention, deep):
    options = {"bilinear": bilinear, "width": width}
    assert count(on_meta(UNet, **options)) == plain
    assert count(on_meta(AttentionUNet, **options)) == attention
    assert count(on_meta(AttentionUNet, deep_supervision=True, **options)) == deep
    assert count(on_meta(UNet, deep_supervision=True, **options)) == plain + deep - attention


def test_parameter_totals_of_three_channels():
    assert count(on_meta(UNet, 3, 2)) == 17_263_042
    assert count(on_meta(UNet, 3, 2, bilinear=False)) == 31_037_698


def test_parameters_by_module():
    net = on_meta(UNet)
    assert {name: count(module) for name, module in net.named_children()} == {
        "inc": 37_696, "down1": 221_696, "down2": 885_760, "down3": 3_540_992, "down4": 4_720_640,
        "up1": 6_163_202 - 263_426, "up2": 1_541_506 - 66_178, "up3": 385_730 - 16_706,
        "up4": 115_106 - 4_258, "outc": 130,
    }  # fmt: skip
    net = on_meta(AttentionUNet)
    ups = [net.up1, net.up2, net.up3, net.up4]
    assert [count(up) for up in ups] == [6_163_202, 1_541_506, 385_730, 115_106]
    assert [count(up.gate) for up in ups] == [263_426, 66_178, 16_706, 4_258]


def node_shapes(net, image):
    """{name: shape of its output} of the network's direct children."""
    shapes = {}
    for name, module in net.named_children():
        module.register_forward_hook(lambda _, __, out, name=name: shapes.update({name: tuple(out.shape)}))
    net(image)
    return shapes


@pytest.mark.parametrize("network", [UNet, AttentionUNet])
def test_shapes_at_every_node(network):
    assert node_shapes(on_meta(network), torch.empty(1, 1, 512, 512, device="meta")) == {
        "inc": (1, 64, 512, 512), "down1": (1, 128, 256, 256), "down2": (1, 256, 128, 128),
        "down3": (1, 512, 64, 64), "down4": (1, 512, 32, 32), "up1": (1, 256, 64, 64),
        "up2": (1, 128, 128, 128), "up3": (1, 64, 256, 256), "up4": (1, 64, 512, 512),
        "outc": (1, 2, 512, 512),
    }  # fmt: skip
    shapes = node_shapes(on_meta(network, bilinear=False), torch.empty(1, 1, 512, 512, device="meta"))
    assert [shapes[n][1] for n in ("down4", "up1", "up2", "up3", "up4")] == [1024, 512, 256, 128, 64]


def milesial_layout(in_channels, num_classes):
    """Names and shapes of the public U-Net weights with transposed convolutions, by their rule."""

    def double_conv(prefix, c_in, c_out):
        for conv, norm, c in ((0, 1, c_in), (3, 4, c_out)):
            yield f"{prefix}double_conv.{conv}.weight", (c_out, c, 3, 3)
            for name in ("weight", "bias", "running_mean", "running_var"):
                yield f"{prefix}double_conv.{norm}.{name}", (c_out,)
            yield f"{prefix}double_conv.{norm}.num_batches_tracked", ()

    yield from double_conv("inc.", in_channels, 64)
    for i, c in enumerate((64, 128, 256, 512), 1):
        yield from double_conv(f"down{i}.maxpool_conv.1.", c, 2 * c)
    for i, c in enumerate((1024, 512, 256, 128), 1):
        yield f"up{i}.up.weight", (c, c // 2, 2, 2)
        yield f"up{i}.up.bias", (c // 2,)
        yield from double_conv(f"up{i}.conv.", c, c // 2)
    yield "outc.conv.weight", (num_classes, 64, 1, 1)
    yield "outc.conv.bias", (num_classes,)


def test_public_weights_load_strictly():
    public = {name: torch.empty(shape, device="meta") for name, shape in milesial_layout(3, 2)}
    for name in ("inc.double_conv.0.weight", "down1.maxpool_conv.1.double_conv.0.weight", "up1.up.weight"):
        assert name in public
    net = on_meta(UNet, 3, 2, bilinear=False)
    net.load_state_dict(public, strict=True, assign=True)
    assert list(net.state_dict()) == list(public)  # the order as well, by which optimizer states match
    assert "up1.conv.double_conv.0.weight" in on_meta(UNet).state_dict()
    assert "up1.up.weight" not in on_meta(UNet).state_dict()


@every_variant
@pytest.mark.parametrize("sides", [(500, 500), (33, 47), (16, 31)])
def test_any_input_size_comes_back(attention, bilinear, norm, ndim, sides):
    if ndim == 3:
        sides = (17, *(min(s, 47) for s in sides))
    net = on_meta(UNet, 2, 3, width=8, attention=attention, bilinear=bilinear, norm=norm, ndim=ndim)
    assert net.eval()(torch.empty(2, 2, *sides, device="meta")).shape == (2, 3, *sides)


@every_variant
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_forward_and_backward_at_odd_sizes_and_any_batch(attention, bilinear, norm, ndim, batch):
    net = seeded(width=2, attention=attention, bilinear=bilinear, norm=norm, ndim=ndim)
    sides = (33, 47) if ndim == 2 else (17, 33, 19)
    logits = net(noise(batch, 1, *sides))
    assert logits.shape == (batch, 2, *sides) and logits.isfinite().all()
    logits.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@every_variant
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_gradient_reaches_every_parameter(attention, bilinear, norm, ndim, deep_supervision):
    options = {"attention": attention, "bilinear": bilinear, "norm": norm, "ndim": ndim}
    net = seeded(width=4, deep_supervision=deep_supervision, **options)
    outputs = net(noise(2, 1, *(32, 32, 16)[:ndim]))
    for output in outputs if deep_supervision else [outputs]:
        (output * noise(*output.shape, seed=1)).sum().backward(retain_graph=True)
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_deep_supervision_gives_four_outputs_in_training_and_one_in_evaluation():
    net = seeded(AttentionUNet, width=4, deep_supervision=True)
    image = noise(2, 1, 33, 47)
    outputs = net(image)
    assert [tuple(o.shape) for o in outputs] == [(2, 2, 33, 47)] * 4
    logits = net.eval()(image)
    assert logits.shape == (2, 2, 33, 47)
    plain = AttentionUNet(width=4)  # the heads change nothing else
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("heads")})
    torch.testing.assert_close(plain.eval()(image), logits, rtol=0, atol=0)


@pytest.mark.parametrize("bilinear, widths", [(True, [64, 128, 256]), (False, [128, 256, 512])])
def test_deep_supervision_heads_sit_at_strides_2_4_8(bilinear, widths):
    net = on_meta(UNet, deep_supervision=True, bilinear=bilinear)
    seen = []
    for head in net.heads:
        head.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[1:])))
    net(torch.empty(1, 1, 64, 64, device="meta"))
    assert seen == [(c, 64 // s, 64 // s) for c, s in zip(widths, (2, 4, 8), strict=True)]


def test_attention_unet_is_unet_with_attention():
    a, b = seeded(AttentionUNet, width=4), seeded(UNet, width=4, attention=True)
    image = noise(1, 1, 32, 32)
    assert torch.equal(a.eval()(image), b.eval()(image))


# ---- checkpointing ----


def batch_norm_buffers(net):
    return {k: v.clone() for k, v in net.named_buffers()}


def two_steps(net, images):
    """Outputs of two SGD steps and the gradients of the second."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    outputs = []
    for image in images:
        optimizer.zero_grad()
        logits = net(image)
        outputs.append(logits.detach())
        (logits * noise(*logits.shape, seed=9)).mean().backward()
        optimizer.step()
    return outputs, [p.grad for p in net.parameters()]


@every_variant
def test_checkpointing_changes_nothing_but_memory(attention, bilinear, norm, ndim):
    net = seeded(width=4, attention=attention, bilinear=bilinear, norm=norm, ndim=ndim)
    saving = copy.deepcopy(net)
    saving.checkpointing = True
    runs = dict.fromkeys(("inc", "down4", "up4", "outc"), 0)
    for name in runs:
        module = getattr(saving, name)
        module.register_forward_pre_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))
    images = [noise(2, 1, *(32, 32, 16)[:ndim], seed=s) for s in (1, 2)]
    (outputs, gradients), (saved_outputs, saved_gradients) = two_steps(net, images), two_steps(saving, images)
    assert runs == {"inc": 4, "down4": 4, "up4": 4, "outc": 2}  # the stages did run again
    torch.testing.assert_close(saved_outputs, outputs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(saved_gradients, gradients, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(batch_norm_buffers(saving), batch_norm_buffers(net), rtol=1e-6, atol=1e-6)
    if norm == "batch":
        assert all(v == 2 for k, v in saving.named_buffers() if k.endswith("num_batches_tracked"))
        assert all(m.track_running_stats for m in saving.modules() if hasattr(m, "track_running_stats"))
    for each in (net, saving):
        each.eval()
    with torch.no_grad():
        torch.testing.assert_close(saving(images[0]), net(images[0]), rtol=1e-6, atol=1e-6)


def test_checkpointing_keeps_fewer_activations():
    num_kept = {}
    for checkpointing in (False, True):
        net = seeded(width=4, checkpointing=checkpointing)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            net(noise(1, 1, 64, 64))
        num_kept[checkpointing] = sum(sizes.values())
    assert num_kept[True] < 0.5 * num_kept[False]


@pytest.mark.parametrize("how", ["evaluation", "no gradient"])
def test_checkpointing_is_idle_where_nothing_is_kept(how):
    net = seeded(width=4, checkpointing=True)
    runs = []
    net.inc.register_forward_pre_hook(lambda *_: runs.append(1))
    if how == "evaluation":
        net.eval()(noise(1, 1, 32, 32)).sum().backward()
    else:
        with torch.no_grad():
            net(noise(1, 1, 32, 32))
        assert net.inc.double_conv[1].num_batches_tracked == 1
    assert len(runs) == 1


def test_checkpointed_block_can_be_differentiated_twice():
    block = seeded(DoubleConv, 2, 4, 4, "batch", 2)
    out = checkpointed(block, noise(2, 2, 8, 8)).square().sum()
    first = torch.autograd.grad(out, block.double_conv[0].weight, retain_graph=True)[0]
    second = torch.autograd.grad(out, block.double_conv[0].weight)[0]
    torch.testing.assert_close(first, second)
    assert block.double_conv[1].num_batches_tracked == 1


# ---- norms ----


@pytest.mark.parametrize("norm, independent", [("group", True), ("batch", False)])
def test_group_norm_does_not_depend_on_the_rest_of_the_batch(norm, independent):
    net = seeded(AttentionUNet, width=8, norm=norm)  # in training mode
    first, others = noise(1, 1, 32, 32), noise(3, 1, 32, 32, seed=1)
    alone, together = net(first), net(torch.cat([first, others]))[:1]
    assert torch.allclose(alone, together, atol=1e-5) is independent


@pytest.mark.parametrize("channels, groups", [(64, 8), (8, 8), (12, 4), (6, 2), (2, 2), (1, 1), (7, 1)])
def test_group_norm_groups(channels, groups):
    assert make_norm("group", channels, 2).num_groups == groups


@pytest.mark.parametrize(
    "norm, ndim, kind",
    [
        ("batch", 2, nn.BatchNorm2d),
        ("batch", 3, nn.BatchNorm3d),
        ("instance", 2, nn.InstanceNorm2d),
        ("instance", 3, nn.InstanceNorm3d),
    ],
)
def test_kinds_of_norms_have_scale_and_shift(norm, ndim, kind):
    made = make_norm(norm, 4, ndim)
    assert isinstance(made, kind) and made.weight.shape == made.bias.shape == (4,)


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="unknown norm 'layer'; take batch, instance or group"):
        UNet(norm="layer")


# ---- blocks ----


def test_pad_to_halves_the_padding():
    x = torch.ones(1, 1, 2, 3)
    padded = pad_to(x, torch.Size((4, 6)))
    assert padded.shape == (1, 1, 4, 6) and padded.sum() == 6
    assert torch.equal(padded[0, 0, 1:3, 1:4], torch.ones(2, 3))  # 1 above and below; 1 left, 2 right
    assert pad_to(x, x.shape[2:]) is x


def test_upsample_to_aligns_corners():
    x = torch.tensor([0.0, 3.0]).view(1, 1, 1, 2)
    torch.testing.assert_close(upsample_to(x, torch.Size((1, 4))), torch.tensor([[[[0.0, 1.0, 2.0, 3.0]]]]))
    assert upsample_to(x, x.shape[2:]) is x
    corner = upsample_to(noise(1, 2, 2, 3, 4), torch.Size((5, 6, 7)))[..., -1, -1, -1]
    torch.testing.assert_close(corner, noise(1, 2, 2, 3, 4)[..., -1, -1, -1])


@pytest.mark.parametrize("bilinear", [True, False])
def test_up_puts_the_skip_first_and_the_upsampled_feature_second(bilinear):
    up = seeded(Up, 8, 4, bilinear, False, "batch", 2)
    seen = []
    up.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x, skip = noise(1, 4 if bilinear else 8, 4, 4), noise(1, 4, 9, 8, seed=1)
    assert up(x, skip).shape == (1, 4, 9, 8)
    assert torch.equal(seen[0][:, :4], skip)
    torch.testing.assert_close(seen[0][:, 4:, :8], up.up(x))
    assert not seen[0][:, 4:, 8].any()  # zero-padded


def test_gate_uses_the_feature_before_upsampling():
    up = seeded(Up, 8, 4, False, True, "batch", 2)
    seen = []
    up.gate.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    x, skip = noise(1, 8, 4, 4), noise(1, 4, 8, 8, seed=1)
    up(x, skip)
    assert seen[0][0] is x and seen[0][1] is skip


@pytest.mark.parametrize("ndim", [2, 3])
def test_gate_weighs_each_position_alike_in_all_channels_within_0_and_1(ndim):
    gate = seeded(AttentionGate, 6, 4, "batch", ndim)
    skip = noise(2, 4, *((8,) * ndim))
    ratio = gate(noise(2, 6, *((4,) * ndim), seed=1), skip) / skip
    assert 0 < ratio.min() and ratio.max() < 1 and ratio.std() > 0.05
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ndim", [2, 3])
def test_gate_equals_monai(ndim):
    nets = pytest.importorskip("monai.networks.nets.attentionunet")
    ours, peer = seeded(AttentionGate, 6, 8, "batch", ndim), nets.AttentionBlock(ndim, 4, 6, 8)
    gate, skip = noise(2, 6, *((8,) * ndim)), noise(2, 8, *((8,) * ndim), seed=1)
    ours(gate, skip)  # one step in training mode, so that the running statistics are not the initial ones
    weights = {
        (k.replace(".0.", ".0.conv.") if ".0." in k else k): v.clone() for k, v in ours.state_dict().items()
    }
    missing, unexpected = peer.load_state_dict(weights, strict=False)
    assert unexpected == [] and sorted(missing) == ["W_g.0.conv.bias", "W_x.0.conv.bias", "psi.0.conv.bias"]
    for name in missing:
        nn.init.zeros_(peer.get_parameter(name))
    assert (ours.eval()(gate, skip) - peer.eval()(gate, skip)).abs().max() == 0


@pytest.mark.parametrize("depth, kernel", [(2, 3), (3, 5), (4, 5), (1, 3), (4, 3)])
def test_gradients_of_flat_images_in_bfloat16(depth, kernel):
    """With nn.Conv3d the first three are wrong at random, mostly NaN."""
    torch.manual_seed(0)
    image, slope = torch.randn(1, 32, depth, 4, 4), torch.randn(1, 32, depth, 4, 4)
    conv = Conv3d(32, 32, kernel, padding=kernel // 2, bias=False)
    conv(image).backward(slope)
    expected, conv.weight.grad = conv.weight.grad, None
    for _ in range(10):
        rubbish = [torch.full((2**k,), torch.nan) for k in range(6, 21)]  # what freed memory may hold
        del rubbish
        conv.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            conv(image).to(slope.dtype).backward(slope)
        torch.testing.assert_close(conv.weight.grad, expected, rtol=0.05, atol=0.2)
