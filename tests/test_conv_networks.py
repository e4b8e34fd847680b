"""Convolutional networks of verse_spine and common; padding and checks of common/layers.py."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from common.layers import (
    Conv3d,
    InstanceNorm,
    check_image,
    kernels_of_levels,
    padded_to_multiple,
    resize_linear,
)
from common.recomputation import stage_runner
from common.segresnet import SegResNet
from verse_spine.attention_unet3d import SCA, AttentionUNet3D
from verse_spine.context_res_unet import ContextResUNet, DilatedContext
from verse_spine.unet import StridedAttentionUNet, StridedUNet, StridedUNetFull

NETWORKS = {
    "UNet": (StridedUNet, {}),
    "UNetFull": (StridedUNetFull, {}),
    "AttentionUNet": (StridedAttentionUNet, {}),
    "AttentionUNet-batch": (StridedAttentionUNet, {"norm": "batch"}),
    "AttentionUNet3D": (AttentionUNet3D, {}),
    "ContextResUNet": (ContextResUNet, {}),
    "SegResNet": (SegResNet, {}),
}
every_network = pytest.mark.parametrize("name", NETWORKS)
MULTIPLES = {"UNet": 16, "AttentionUNet": 16, "AttentionUNet-batch": 16, "AttentionUNet3D": 32}  # others: 8
SMALL = (16, 24, 31)
MONAI_CHANNELS = (16, 32, 64, 128, 256)


def built(name, *args, **options):
    network, own = NETWORKS[name]
    torch.manual_seed(0)
    return network(*args, **own, **options)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on_meta(network, *args, **options):
    with torch.device("meta"):
        return network(*args, **options)


def count(network):
    return sum(p.numel() for p in network.parameters())


# ---- parameters, arithmetic, memory ----


@pytest.mark.parametrize(
    "network, classes, options, parameters",
    [
        (StridedUNet, 1, {}, 1_978_745),
        (StridedUNetFull, 1, {}, 1_978_745),
        (StridedAttentionUNet, 1, {}, 5_909_113),
        (StridedAttentionUNet, 1, {"norm": "batch"}, 5_909_113),
        (AttentionUNet3D, 1, {}, 16_608_918),
        (ContextResUNet, 1, {}, 1_703_841),
        (SegResNet, 16, {"width": 8}, 1_176_312),
        (SegResNet, 16, {"width": 16}, 4_701_152),
    ],
)
def test_parameter_totals(network, classes, options, parameters):
    assert count(on_meta(network, 1, classes, **options)) == parameters


@pytest.mark.parametrize(
    "network, classes, options, gflop, mib",
    [
        (StridedUNet, 1, {}, 2.8, 66),
        (StridedUNetFull, 1, {}, 22.2, 508),
        (StridedAttentionUNet, 1, {}, 82.7, 908),
        (AttentionUNet3D, 1, {}, 110.3, 951),
        (ContextResUNet, 1, {}, 97.6, 889),
        (SegResNet, 16, {"width": 8}, 31.0, 426),
        (SegResNet, 16, {"width": 16}, 123.0, 848),
    ],
)
def test_arithmetic_and_memory_at_96(network, classes, options, gflop, mib):
    """Of the forward pass, on tensors without data: what backward keeps besides the parameters."""
    with FakeTensorMode():
        net = network(1, classes, **options).train()
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            FlopCounterMode(display=False) as flops,
        ):
            net(torch.zeros(1, 1, 96, 96, 96))
        for parameter in net.parameters():
            kept.pop(parameter.untyped_storage()._cdata, None)
        saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert flops.get_total_flops() / 1e9 == pytest.approx(gflop, abs=0.05)
    assert saved / 2**20 == pytest.approx(mib, abs=0.5)


# ---- parity with MONAI ----


def in_monai_order(net):
    """Modules of StridedAttentionUNet or SegResNet in the order in which MONAI registers its own."""
    if isinstance(net, SegResNet):
        return [*net.down, *(up.block for up in net.up), *(up.project for up in net.up), net.head]
    modules = [net.down[0]]
    for down, up in zip(net.down[1:], reversed(net.up), strict=True):
        modules += [up.gate, up.upsample, up.merge, down]
    return [*modules, net.head]


def copy_weights(ours, theirs):
    """Kind by kind in the order of registration; also the running statistics of batch norms."""
    modules = in_monai_order(ours) if not isinstance(ours, StridedUNet) else [ours]
    kinds = (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, nn.GroupNorm, nn.PReLU)
    for kind in kinds:
        mine = [m for part in modules for m in part.modules() if isinstance(m, kind)]
        other = [m for m in theirs.modules() if isinstance(m, kind)]
        assert len(mine) == len(other)
        for a, b in zip(mine, other, strict=True):
            a.load_state_dict(b.state_dict())


def shaken(net):
    """Every weight and running statistic away from its neutral start, so that a wrong mapping shows."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_floating_point() and tensor.ndim <= 1:
                step = torch.rand(tensor.shape, generator=generator) * 0.5
                tensor.data += step if name in ("weight", "running_var") else step - 0.25
    return net


def monai_pair(name):
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    if name.startswith("UNet"):
        strides = (1, 2, 2, 2) if name == "UNetFull" else (2, 2, 2, 2)
        ours = (StridedUNetFull if name == "UNetFull" else StridedUNet)(2, 3)
        theirs = nets.UNet(3, 2, 3, MONAI_CHANNELS, strides)
    elif name == "AttentionUNet":
        ours = StridedAttentionUNet(2, 3, norm="batch")
        theirs = nets.AttentionUnet(3, 2, 3, MONAI_CHANNELS, (2, 2, 2, 2))
    else:
        width = int(name.split("-")[1])
        ours = SegResNet(2, 3, width=width)
        theirs = nets.SegResNet(3, width, 2, 3)
    assert count(ours) == count(theirs)
    copy_weights(ours, shaken(theirs))
    return ours, theirs


def assert_parity(ours, theirs, shape, multiple):
    image = noise(1, 2, *shape)
    padded, crop = padded_to_multiple(image, multiple)
    with torch.no_grad():
        logits, expected = ours(image), theirs(padded)[crop]
    assert expected.std() > 1e-3
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < 1e-4


PARITY = ["UNet", "UNetFull", "AttentionUNet", "SegResNet-8", "SegResNet-16"]


@pytest.mark.parametrize("name", PARITY)
@pytest.mark.parametrize("shape", [(32, 32, 32), (33, 47, 29), (16, 24, 40)])
def test_parity_with_monai(name, shape):
    ours, theirs = (net.eval() for net in monai_pair(name))
    assert_parity(ours, theirs, shape, MULTIPLES.get(name, 8))


@pytest.mark.parametrize("name", PARITY)
def test_gradients_equal_those_of_monai(name):
    ours, theirs = (net.train() for net in monai_pair(name))
    image = noise(2, 2, 16, 16, 32)
    for net in (ours, theirs):
        net(image).square().mean().backward()
    mine = sorted(p.grad.norm().item() for p in ours.parameters())
    other = sorted(p.grad.norm().item() for p in theirs.parameters())
    assert mine == pytest.approx(other, rel=1e-3, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARITY)
@pytest.mark.parametrize("shape", [(96, 96, 96), (128, 64, 64)])
def test_parity_with_monai_at_working_sizes(name, shape):
    ours, theirs = (net.eval() for net in monai_pair(name))
    assert_parity(ours, theirs, shape, MULTIPLES.get(name, 8))


def test_weights_of_unet_and_unet_full_are_interchangeable():
    coarse, full = StridedUNet(), StridedUNetFull()
    full.load_state_dict(coarse.state_dict())
    image = noise(1, 1, 32, 32, 32)
    assert not torch.allclose(coarse(image), full(image), atol=1e-3), "the strides differ"


# ---- sizes, batches, classes ----


@every_network
@pytest.mark.parametrize("shape", [(17, 31, 9), (1, 1, 1), (5, 40, 3), (16, 16, 16)])
def test_any_size(name, shape):
    net = built(name, num_classes=2)
    with torch.no_grad():
        logits = net(noise(1, 1, *shape))  # in training mode, where norms refuse a single voxel
    assert logits.shape == (1, 2, *shape)
    assert logits.isfinite().all()


@every_network
def test_an_odd_image_is_padded_by_repeating_its_border(name):
    net = built(name).eval()
    image = noise(1, 1, 17, 30, 20)
    padded, crop = padded_to_multiple(image, MULTIPLES.get(name, 8))
    with torch.no_grad():
        assert torch.equal(net(image), net(padded)[crop])


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "AttentionUNet-batch"])
def test_items_of_a_batch_do_not_see_each_other(name):
    net = built(name).train()
    images = noise(4, 1, *SMALL)
    images[2] = 10 * images[2] + 5  # would move statistics shared by the batch
    with torch.no_grad():
        alone = torch.cat([net(image[None]) for image in images])
        for n in (2, 4):
            assert torch.allclose(
                net(images[:n]), alone[:n], atol=1e-3
            )  # norms over few voxels amplify rounding


def test_batch_norm_does_see_the_batch():
    net = built("AttentionUNet-batch").train()
    images = noise(2, 1, *SMALL)
    with torch.no_grad():
        assert not torch.allclose(net(images)[:1], net(images[:1]), atol=1e-3)


@every_network
def test_26_classes_and_3_channels(name):
    net = built(name, 3, 26)
    with torch.no_grad():
        logits = net(noise(1, 3, *SMALL))
    assert logits.shape == (1, 26, *SMALL)
    assert logits[:, 0].std() > 0 and not torch.equal(logits[:, 0], logits[:, 25])
    assert logits.min() < 0, "logits, no probabilities"


@every_network
@pytest.mark.parametrize("shape", [(1, 32, 32, 32), (32, 32, 32), (1, 2, 32, 32, 32), (1, 1, 0, 8, 8)])
def test_wrong_shapes_are_refused(name, shape):
    net = on_meta(NETWORKS[name][0], **NETWORKS[name][1])
    with pytest.raises(ValueError, match=r"the network takes \(N, 1, D, H, W\)") as error:
        net(torch.empty(shape, device="meta"))
    assert str(shape) in str(error.value)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="unknown norm 'layer'; take batch, instance or group"):
        StridedAttentionUNet(norm="layer")
    for width in (0, 4, 12):
        with pytest.raises(ValueError, match=f"width is {width}; take 8, 16"):
            SegResNet(width=width)


# ---- gradients ----


def cancelled_biases(net):
    """Names of biases whose convolution feeds a norm only, which takes their effect out again."""
    names = {n for n, m in net.named_modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d))}
    free = {"head", "head.2", "up.3.0"}  # the last layers
    free |= {n for n in names if n.endswith(".upsample")}  # into a concatenation
    if isinstance(net, StridedAttentionUNet):
        free -= {"up.3.0"}
    return {f"{n}.bias" for n in names - free}


@every_network
def test_every_parameter_learns(name):
    net = built(name, num_classes=2).train()
    target = (noise(1, 2, 32, 32, 32, seed=1) > 0).float()
    F.binary_cross_entropy_with_logits(net(noise(1, 1, 32, 32, 32)), target).backward()
    skip = cancelled_biases(net)
    for parameter_name, parameter in net.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all()
        if parameter_name not in skip:
            assert parameter.grad.abs().max() > 1e-8, parameter_name


@every_network
def test_checkpointing_changes_no_gradient_and_no_statistics(name):
    plain, saving = built(name, num_classes=2), built(name, num_classes=2, checkpointing=True)
    kept = {}
    image = noise(1, 1, *SMALL)
    for net in (plain, saving):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            logits = net.train()(image)
        kept[net] = sum(sizes)
        logits.square().mean().backward()
    assert kept[saving] < kept[plain] / 2
    for (key, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), key
    for (key, a), b in zip(plain.named_buffers(), saving.buffers(), strict=True):
        assert torch.equal(a, b), key


@every_network
def test_one_step_of_sgd_lowers_the_loss(name):
    net = built(name).train()
    image = noise(1, 1, *SMALL)
    target = (F.avg_pool3d(image, 3, 1, 1) > 0).float()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    before = F.binary_cross_entropy_with_logits(net(image), target)
    before.backward()
    optimizer.step()
    with torch.no_grad():
        after = F.binary_cross_entropy_with_logits(net(image), target)
    assert after < before


# ---- blocks ----


def test_sca_by_hand():
    gate = SCA(16)
    x = noise(2, 16, 3, 4, 5)
    with torch.no_grad():
        first, _, second = gate.channel
        hidden = (x.mean((2, 3, 4)) @ first.weight.T + first.bias).clamp(min=0)
        channel = 1 / (1 + torch.exp(-(hidden @ second.weight.T + second.bias)))
        position = torch.einsum("c,nczyx->nzyx", gate.position.weight[0, :, 0, 0, 0], x).sigmoid()
        expected = x * (1 + channel[:, :, None, None, None] + position[:, None])
        assert torch.allclose(gate(x), expected, atol=1e-6)
        assert (gate(x) / x).min() > 1 and (gate(x) / x).max() < 3


def test_dilated_branches_reach_1_2_4_and_8_voxels():
    context = DilatedContext(1, 2)
    x = torch.zeros(1, 1, 21, 21, 21)
    x[0, 0, 10, 10, 10] = 1
    for branch, reach in zip(context.branches, (1, 2, 4, 8), strict=True):
        touched = (branch(x)[0, 0] != branch.bias[0]).nonzero()
        assert touched.min(0).values.tolist() == [10 - reach] * 3
        assert touched.max(0).values.tolist() == [10 + reach] * 3


def test_thesis_variant_norms_after_the_relu():
    net = on_meta(AttentionUNet3D)
    kinds = [type(m) for m in net.down[0]]
    assert kinds == [Conv3d, nn.ReLU, nn.GroupNorm] * 2
    assert all(m.num_groups == 8 for m in net.modules() if isinstance(m, nn.GroupNorm))


@pytest.mark.parametrize(
    "shape, multiple, two_blocks, expected",
    [
        ((16, 16, 16), 16, False, (16, 16, 16)),
        ((16, 16, 16), 16, True, (16, 16, 32)),
        ((3, 9, 16), 16, True, (16, 16, 32)),
        ((17, 16, 16), 16, True, (32, 16, 16)),
        ((33, 47, 29), 8, True, (40, 48, 32)),
        ((5, 6), 4, False, (8, 8)),
        ((7, 5), 1, True, (7, 5)),
        ((1, 1), 1, True, (1, 2)),
        ((3, 9, 16), (4, 16, 16), True, (4, 16, 16 * 2)),
        ((5, 9, 17), (4, 16, 16), True, (8, 16, 32)),
    ],
)
def test_padded_to_multiple(shape, multiple, two_blocks, expected):
    x = noise(2, 3, *shape)
    padded, crop = padded_to_multiple(x, multiple, two_blocks=two_blocks)
    assert padded.shape == (2, 3, *expected)
    assert torch.equal(padded[crop], x)
    assert padded[:, :1][crop].shape == (2, 1, *shape), "the index also fits other numbers of channels"
    assert (padded is x) is (shape == expected)
    for axis, (have, want) in enumerate(zip(shape, expected, strict=True)):
        before = (want - have) // 2
        assert crop[1 + axis] == slice(before, before + have), "half on each side"


def test_padding_repeats_the_border():
    padded, _ = padded_to_multiple(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), 4)
    assert padded[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


def test_check_image_names_the_axes():
    check_image(torch.empty(2, 3, 4, 5), 3, ndim=2)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 5\).*\(N, 1, H, W\)"):
        check_image(torch.empty(2, 3, 4, 5), 1, ndim=2)


def test_stages_are_computed_again_only_in_training_with_checkpointing():
    x, calls = noise(1, 4), []
    stage = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
    stage.register_forward_pre_hook(lambda *_: calls.append(1))
    for training, checkpointing, times in ((True, False, 1), (False, True, 1), (True, True, 2)):
        network = nn.Module().train(training)
        network.checkpointing = checkpointing
        calls.clear()
        stage_runner(network)(stage, x).sum().backward()  # the second time is in the backward
        assert len(calls) == times


def test_thesis_decoder_concatenates_skip_and_nearest_upsampling():
    up = AttentionUNet3D().up[-1]
    up.attention, up.conv = nn.Identity(), nn.Identity()
    skip, x = noise(1, 16, 2, 4, 6), noise(1, 32, 1, 2, 3)
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    assert torch.equal(up(skip, x), torch.cat([skip, repeated], dim=1))


def test_segresnet_adds_the_skip_to_a_linear_upsampling_without_aligned_corners():
    up = SegResNet().up[-1]
    up.project, up.block = nn.Identity(), nn.Identity()
    x = torch.tensor([0.0, 1.0]).expand(1, 8, 1, 1, 2)
    result = up(torch.full((1, 8, 2, 2, 4), 10.0), x)
    assert torch.equal(result, torch.tensor([10.0, 10.25, 10.75, 11.0]).expand(1, 8, 2, 2, 4))


def test_residual_block_of_context_res_unet():
    block = ContextResUNet().down[1]
    x = noise(1, 16, 4, 4, 4)
    assert torch.equal(block(x), (block.main(x) + block.shortcut(x)).clamp(min=0))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("size", [(8, 5, 6), (3, 2, 1), (5, 5, 7)])
@pytest.mark.parametrize("new_size", [(16, 10, 12), (4, 3, 3), (5, 9, 2)])
def test_resize_linear_equals_interpolate(layout, size, new_size):
    x = noise(2, 3, *size).contiguous(memory_format=layout)
    resized = resize_linear(x, new_size)
    expected = F.interpolate(x, size=new_size, mode="trilinear", align_corners=False)
    assert torch.allclose(resized, expected, atol=1e-5)
    assert resized.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("new_size", [(16, 12), (4, 3), (5, 2)])
def test_resize_linear_of_images(layout, new_size):
    x = noise(2, 3, 5, 7).contiguous(memory_format=layout)
    resized = resize_linear(x, new_size)
    expected = F.interpolate(x, size=new_size, mode="bilinear", align_corners=False)
    assert torch.allclose(resized, expected, atol=1e-5)
    assert resized.is_contiguous(memory_format=layout)


def test_resize_linear_by_hand():
    x = torch.tensor([0.0, 4.0, 8.0, 12.0]).view(1, 1, 1, 1, 4)
    assert resize_linear(x, (1, 1, 2)).flatten().tolist() == [2, 10]
    assert resize_linear(x[..., :2], (1, 1, 4)).flatten().tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_instance_norm_equals_pytorchs(layout):
    ours, theirs = InstanceNorm(5), nn.InstanceNorm3d(5, affine=True)
    x = (3 * noise(3, 5, 4, 6, 7) + 2).contiguous(memory_format=layout)
    gradients = []
    for norm in (ours, theirs):
        with torch.no_grad():
            norm.weight.copy_(noise(5, seed=1))
            norm.bias.copy_(noise(5, seed=2))
        image = x.clone().requires_grad_()
        out = norm(image)
        (out * noise(*out.shape, seed=3)).sum().backward()
        gradients.append((out.detach(), image.grad, norm.weight.grad, norm.bias.grad))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert ours(x).is_contiguous(memory_format=layout)
    assert torch.equal(ours.eval()(x), ours.train()(x)), "no running statistics"


def test_instance_norm_sums_in_float32():
    """In bf16 a sum of 32,768 ones stops at 256."""
    x = (100 + noise(1, 2, 32, 32, 32)).bfloat16()
    out = InstanceNorm(2)(x).detach()
    assert out.dtype == torch.bfloat16
    assert out.float().mean().abs() < 0.01 and out.float().std().item() == pytest.approx(1, abs=0.01)


def test_kernels_of_levels():
    thin, thick = (2, 2, 2), (1, 2, 2)
    assert kernels_of_levels([thin, thin]) == [(3, 3, 3)] * 3
    assert kernels_of_levels([thick, thick, thin]) == [(1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)]
    assert kernels_of_levels([thin, thick]) == [(3, 3, 3)] * 3, "z once halved stays in"
    assert kernels_of_levels([thick]) == [(1, 3, 3), (3, 3, 3)]
