"""Networks of amygdala but MedFormer, their flags and YAML files, and common/conv_blocks.py."""

import ast
import shutil
import subprocess
import sys
from argparse import ArgumentParser

import pytest
import torch
import yaml
from conftest import ROOT
from torch import nn
from torch.nn import functional as F

from amygdala.model import (
    MODELS,
    MODELS_2D,
    MODELS_3D,
    SliceBySlice,
    add_architecture_flags,
    architecture,
    architecture_defaults,
    get_model,
    load_trained,
    sides,
)
from amygdala.structures import DATASETS
from amygdala.unet import UNet
from common.config import make_parser, parse_args, read_yaml_files
from common.conv_blocks import BasicBlock, PreActivationConv, SingleConv, resize_aligned
from common.hardware import Precision
from common.layers import InstanceNorm, make_norm, resize_linear
from common.memory import training_peak_mib
from common.swin_unetr import SwinUNETR
from common.unetpp import UNetPlusPlus
from common.unetr import UNETR
from common.vnet import VNet

ANISOTROPIC = {
    "kernel_size": [(1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)],
    "down_scale": [(1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)],
}
FAMILIES = [(model, dimension) for dimension in MODELS for model in MODELS[dimension]]
OURS = [family for family in FAMILIES if family[0] != "medformer"]  # medformer: tests/test_medformer.py
every_network = pytest.mark.parametrize("model, dimension", OURS)
# Swin UNETR takes seconds on the smallest image; tests/test_swin_unetr.py knows the rest about it.
quick_networks = pytest.mark.parametrize("model, dimension", [f for f in OURS if f[0] != "swin_unetr"])
FP32 = Precision("fp32", None, False, "test")
CROSS_ATTENTION = 4 * 768**2 + 768 + 2 * 768  # weights that no layer of MONAI 1.4's UNETR uses


def values_of(path):
    """What a configuration file and the one that it builds upon hold."""
    files = read_yaml_files(make_parser(None), path)
    return {key: value for _, content in files for key, value in content.items()}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def count(network):
    return sum(p.numel() for p in network.parameters())


def on_meta(network, *args, **options):
    with torch.device("meta"):
        return network(*args, **options)


def small(model, dimension, **more):
    """The flag values of a network that a test can run in a moment."""
    config = {"model": model, "dimension": dimension}
    flags = architecture_defaults(model, dimension)
    if "base_chan" in flags:
        config["base_chan"] = 4
    if model == "unetr":
        config |= {"feature_size": 4, "hidden_size": 24, "mlp_dim": 32, "num_heads": 2}
        config["position_grid"] = [2, 2, 3]
    if model == "swin_unetr":
        config |= {"feature_size": 12, "checkpointing": False}
    if model == "vnet":
        config["dropout"] = 0.0
    return config | more


def built(model, dimension, **more):
    torch.manual_seed(0)
    return get_model(small(model, dimension, **more))


# ---- parameters ----


@pytest.mark.parametrize(
    "network, args, options, total",
    [
        (UNet, (1, 3), {}, 16_562_115),
        (UNet, (1, 3), {"conv_block": "BasicBlock"}, 40_560_579),
        (UNet, (1, 3), {"attention": True}, 16_668_339),  # 16,793,747 less 125,408 that nothing reads
        (UNet, (1, 3), {"attention": True, "conv_block": "BasicBlock"}, 40_792_211 - 125_408),
        (UNet, (1, 3), ANISOTROPIC, 16_063_875),
        (UNet, (1, 3), {"conv_block": "BasicBlock", **ANISOTROPIC}, 39_398_787),
        (UNet, (1, 4), {"ndim": 2, "norm": "bn"}, 7_240_260),
        (UNet, (1, 4), {"ndim": 2, "norm": "bn", "attention": True}, 7_980_828),
        (UNetPlusPlus, (1, 3), {}, 20_488_131),
        (UNetPlusPlus, (1, 3), {"conv_block": "BasicBlock"}, 49_187_619),
        (VNet, (1, 3), {"norm": "bn"}, 45_601_906),  # MONAI's count
        # Scale and shift of the batch norms: 16; 2 for each stage down and its convolutions; on the way up
        # half of each stage and its convolutions; 3 at the end.
        (VNet, (1, 3), {}, 45_601_906 - 2 * (16 + 2 * 32 + 3 * 64 + 4 * 128 + 3 * 256 + 128 + 2 * 256 + 64
                                             + 2 * 128 + 32 + 64 + 16 + 32 + 3)),
        (UNETR, (1, 3), {}, 121_123_059 - 12 * CROSS_ATTENTION),
        (SwinUNETR, (1, 3), {"width": 48}, 62_186_757),
        (SwinUNETR, (1, 3), {"width": 24}, 15_703_029),
    ],
)  # fmt: skip
def test_parameter_totals(network, args, options, total):
    assert count(on_meta(network, *args, **options)) == total


@pytest.mark.parametrize(
    "model, dimension, total",
    [
        ("unet", "3d", 16_562_115),
        ("resunet", "3d", 40_560_579),
        ("unetpp", "3d", 20_488_131),
        ("attention_unet", "3d", 16_668_339),
        ("vnet", "3d", 45_596_588),
        ("unetr", "3d", 92_783_859),
        ("swin_unetr", "3d", 15_703_029),
        ("unet", "2d", 7_234_403),  # without the 5,824 of batch norm, and with 3 classes
        ("attention_unet", "2d", 7_974_003),  # without 6,792
    ],
)
def test_the_defaults_are_those_networks(model, dimension, total):
    with torch.device("meta"):
        assert count(get_model({"model": model, "dimension": dimension})) == total


def test_parameters_of_unet_by_level():
    net = on_meta(UNet, 1, 3)
    inner = [27 * n for n in (32 + 32**2, 32 * 64 + 64**2, 64 * 128 + 128**2, 128 * 256 + 256**2)]
    assert [count(level) for level in net.down] == [*inner, 27 * (256 * 320 + 320**2)]
    wide = [(320 + 256, 256), (256 + 128, 128), (128 + 64, 64), (64 + 32, 32)]
    assert [count(up) for up in net.up] == [27 * (i * o + o * o) for i, o in wide]
    assert count(net.head) == 99


# ---- every network ----


@quick_networks
def test_any_size_every_weight_learns_and_images_do_not_mix(model, dimension):
    net = built(model, dimension).train()
    for size in ((1, 1, 1), (5, 20, 17)):
        with torch.no_grad():
            logits = net(noise(1, 1, *size))
        assert logits.shape == (1, 3, *size) and logits.isfinite().all()
    images = noise(2, 1, 16, 16, 32)
    together = net(images)
    (together * noise(*together.shape, seed=1)).mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    with torch.no_grad():
        alone = net(images[1:])
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-4)


@quick_networks
def test_checkpointing_changes_memory_and_nothing_else(model, dimension):
    net = built(model, dimension).train()
    image = noise(1, 1, 16, 16, 32)
    results, sizes = [], []
    for net.checkpointing in (True, False):
        held = {}

        def keep(tensor, held=held):
            held[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        net.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = net(image)
            logits.square().mean().backward()
        sizes.append(sum(held.values()) - 4 * count(net))
        results.append([logits.detach(), *(p.grad.clone() for p in net.parameters())])
    assert sizes[0] < sizes[1] * 0.7
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


@quick_networks
def test_bf16_on_a_cpu_gives_finite_gradients(model, dimension):
    net = built(model, dimension).train()
    image = noise(1, 1, 16, 32, 32)
    exact = net(image).detach()
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(image)
    logits.float().square().mean().backward()
    assert (logits.float() - exact).abs().mean() < 0.25 * exact.std()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@every_network
def test_memory_of_a_training_step_can_be_predicted(model, dimension):
    """On tensors without data, where an initialisation that draws until all numbers fit would never end."""
    shape = (1, 1, 16, 32, 32)
    peak = training_peak_mib(lambda: built(model, dimension), F.cross_entropy, shape)
    assert 4 * 4 * count(built(model, dimension)) / 2**20 < peak < 500


@every_network
def test_sides_are_padded_by_repeating_the_border(model, dimension):
    net = built(model, dimension).eval()
    step = 32 if model == "swin_unetr" else 16
    assert net.multiple == (1 if dimension == "2d" else step, step, step)
    depth = net.multiple[0]
    image = noise(1, 1, depth, step - 5, step + 3)  # to `step` and twice `step`
    padding = ((step - 3) // 2, step - 3 - (step - 3) // 2, 2, 3)
    with torch.no_grad():
        whole = net(F.pad(image, (*padding, 0, 0), mode="replicate"))
        inner = whole[..., 2 : 2 + step - 5, padding[0] : padding[0] + step + 3]
        torch.testing.assert_close(net(image), inner)


def test_evaluation_of_a_case_does_not_depend_on_the_batch_with_batch_norm_either():
    net = built("vnet", "3d", norm="bn").train()
    with torch.no_grad():
        net(noise(2, 1, 16, 16, 32))
    net.eval()
    images = noise(2, 1, 16, 16, 32, seed=3)
    torch.testing.assert_close(net(images)[1:], net(images[1:]), rtol=1e-3, atol=1e-4)


def test_scales_and_kernels_of_1_leave_thick_slices_alone():
    net = built("unet", "3d", kernel_size=["1x3x3"] * 5, down_scale=["1x2x2"] * 4).eval()
    assert net.multiple == (1, 16, 16)
    for module in net.modules():
        if isinstance(module, InstanceNorm):
            module.forward = lambda x: x  # the only thing that sees all slices at once
    image = noise(1, 1, 3, 32, 16)
    changed = image.clone()
    changed[:, :, 2] += 1
    before, after = net(image), net(changed)
    assert torch.equal(before[:, :, :2], after[:, :, :2]) and not torch.equal(before, after)


# ---- MONAI ----


def shaken(net):
    """Every weight and running statistic away from its start, so that a wrong place shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point() and value.ndim == 1:
                value.add_(0.2 * torch.rand(value.shape, generator=generator))
            elif "position" in name:
                value.normal_(generator=generator)
    return net


def copy_in_order(ours, theirs, kinds):
    """Weights kind by kind, in the order in which both register them."""
    for kind in kinds:
        mine = [m for m in ours.modules() if isinstance(m, kind)]
        other = [m for m in theirs.modules() if isinstance(m, kind)]
        assert len(mine) == len(other), kind
        for a, b in zip(mine, other, strict=True):
            a.load_state_dict(b.state_dict())


def test_unetr_equals_monai():
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    small = {"feature_size": 8, "hidden_size": 48, "mlp_dim": 64, "num_heads": 4}
    theirs = shaken(nets.UNETR(1, 3, img_size=(32, 48, 64), **small)).eval()
    ours = UNETR(1, 3, position_grid=(2, 3, 4), **small).eval()
    with torch.no_grad():
        ours.positions.copy_(theirs.vit.patch_embedding.position_embeddings)
    copy_in_order(ours.embed, theirs.vit.patch_embedding, [nn.Conv3d])
    for mine, other in zip(ours.layers, theirs.vit.blocks, strict=True):
        pairs = [
            (mine.norm1, other.norm1),
            (mine.qkv, other.attn.qkv),
            (mine.proj, other.attn.out_proj),
            (mine.norm2, other.norm2),
            (mine.mlp[0], other.mlp.linear1),
            (mine.mlp[2], other.mlp.linear2),
        ]
        for a, b in pairs:
            a.load_state_dict(b.state_dict())
    ours.norm.load_state_dict(theirs.vit.norm.state_dict())
    convs = [nn.Conv3d, nn.ConvTranspose3d]
    for i in range(4):
        copy_in_order(ours.encoders[i], getattr(theirs, f"encoder{i + 1}"), convs)
        copy_in_order(ours.decoders[i], getattr(theirs, f"decoder{5 - i}"), convs)
    copy_in_order(ours.head, theirs.out, convs[:1])
    used = [p.numel() for name, p in theirs.named_parameters() if "cross_attn" not in name]
    assert count(ours) == sum(used)
    image = noise(2, 1, 32, 48, 64)
    with torch.no_grad():
        logits, expected = ours(image), theirs(image)
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() < 1e-4


def test_vnet_with_batch_norm_equals_monai_up_to_the_end():
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    theirs = shaken(nets.VNet(out_channels=3)).eval()
    ours = VNet(1, 3, norm="bn").eval()
    copy_in_order(ours, theirs, [nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d])
    image = noise(1, 1, 16, 16, 32)
    with torch.no_grad():
        logits, expected = ours(image), theirs(image)
    assert expected.std() > 0.01
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_swin_unetr_has_the_weights_of_monai():
    """What it computes is compared in tests/test_swin_unetr.py; here that get_model builds that network."""
    nets = pytest.importorskip("monai.networks.nets")
    theirs = nets.SwinUNETR(1, 3, feature_size=12)
    ours = get_model({"model": "swin_unetr", "dimension": "3d", "feature_size": 12})
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]


# ---- blocks ----


def test_plain_instance_norm_and_layer_norm_by_hand():
    x = noise(2, 3, 4, 5, 6)
    mean, var = x.mean((2, 3, 4), keepdim=True), x.var((2, 3, 4), correction=0, keepdim=True)
    norm = make_norm("plain_instance", 3, 3, eps=0.1)
    assert isinstance(norm, InstanceNorm) and not list(norm.parameters())
    torch.testing.assert_close(norm(x), (x - mean) / (var + 0.1).sqrt())
    mean, var = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
    layer = make_norm("channel_layer", 3, 3, eps=0.1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    scale = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1)
    torch.testing.assert_close(layer(x), scale * (x - mean) / (var + 0.1).sqrt())
    assert make_norm("batch", 3, 2, eps=0.1).eps == make_norm("instance", 3, 2, eps=0.1).eps == 0.1


@pytest.mark.parametrize("size", [(4, 6, 8), (7, 3, 5), (1, 2, 11)])
def test_linear_interpolation_with_aligned_corners(size):
    x = noise(2, 3, 4, 3, 5)
    expected = F.interpolate(x, size, mode="trilinear", align_corners=True)
    torch.testing.assert_close(resize_linear(x, size, align_corners=True), expected)


@pytest.mark.parametrize("size, mode", [((4, 6, 8), "trilinear"), ((6, 9), "bilinear")])
def test_decoders_upsample_with_aligned_corners(size, mode):
    x = noise(1, 2, *(side // 2 for side in size))
    expected = F.interpolate(x, size, mode=mode, align_corners=True)
    torch.testing.assert_close(resize_aligned(x, size), expected)


def test_skips_stand_in_front_of_what_comes_from_below():
    torch.manual_seed(0)
    unet, plus, vnet = UNet(base_chan=4), UNetPlusPlus(base_chan=4), VNet(base_chan=4, dropout=0.0)
    fine, coarse = noise(1, 4, 8, 8, 8), noise(1, 8, 4, 4, 4, seed=1)
    other = noise(1, 4, 8, 8, 8, seed=2)
    with torch.no_grad():
        unet.up[-1].convs[0][0].weight[:, :4] = 0  # the four channels of the skip
        assert torch.equal(unet.up[-1](coarse, fine), unet.up[-1](coarse, other))
        node = plus.nodes[1][0]  # its level's two earlier nodes, then the one below
        node.convs[0][0].weight[:, 4:8] = 0
        assert torch.equal(node(coarse, fine, fine), node(coarse, fine, other))
        assert not torch.equal(node(coarse, fine, fine), node(coarse, other, fine))
        up = vnet.up[-1]  # V-Net has them the other way round
        up.convs = up.act = nn.Identity()
        assert torch.equal(up(noise(1, 16, 4, 4, 4), fine)[:, 4:], 2 * fine)


def test_vnet_adds_the_image_to_its_first_stage_and_drops_channels_where_it_says():
    net = VNet(base_chan=4, dropout=0.3)
    image = noise(1, 1, 4, 4, 4)
    with torch.no_grad():
        net.down[0].conv[0].weight.zero_()
        torch.testing.assert_close(net.down[0](image), F.elu(image).expand(1, 4, 4, 4, 4))
    assert [down.dropout.p for down in net.down[1:]] == [0, 0, 0.3, 0.3]
    assert [up.dropout.p for up in net.up] == [0.3, 0.3, 0, 0]
    assert [up.skip_dropout.p for up in net.up] == [0.3] * 4


@pytest.mark.parametrize("norm", ["in", "bn"])
def test_a_basic_block_is_two_pre_activation_convolutions_and_a_third_around_them(norm):
    torch.manual_seed(0)
    block = BasicBlock(2, 3, (1, 3, 3), norm, "relu").train()
    if norm == "bn":
        nn.init.constant_(block.shortcut.norm.bias, 0.7)
    x = noise(2, 2, 3, 4, 5)

    def step(x, conv):
        """Norm over each image (or the batch), ReLU, convolution."""
        axes = (2, 3, 4) if norm == "in" else (0, 2, 3, 4)
        mean, var = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
        x = (x - mean) / (var + (1e-4 if norm == "in" else 1e-5)).sqrt()
        x = (x + (0.7 if norm == "bn" and conv is block.shortcut else 0)).clamp(min=0)
        return F.conv3d(x, conv.conv.weight, padding=(0, 1, 1))

    expected = step(step(x, block.conv1), block.conv2) + step(x, block.shortcut)
    torch.testing.assert_close(block(x), expected)
    assert BasicBlock(3, 3, (3, 3, 3), norm, "relu").shortcut is None
    assert count(block) == 9 * (2 * 3 + 3 * 3 + 2 * 3) + (2 * (2 + 3 + 2) if norm == "bn" else 0)


def test_the_first_block_of_unetpp_sees_dark_and_bright_alike():
    torch.manual_seed(0)
    first = UNetPlusPlus(base_chan=4, conv_block="BasicBlock").down[0][0]
    x = -noise(1, 1, 8, 8, 8).abs()  # nothing would be left of it after a ReLU
    torch.testing.assert_close(first.conv1(x), first.conv1.conv(x))
    assert first.conv1(x).std() > 0.01


def test_wrong_blocks_are_refused():
    for block, wrong in ((SingleConv, "norm 'gn'"), (PreActivationConv, "norm 'gn'")):
        with pytest.raises(ValueError, match=wrong):
            block(1, 1, (3, 3, 3), "gn", "relu")
    with pytest.raises(ValueError, match="activation 'tanh'"):
        SingleConv(1, 1, (3, 3, 3), "in", "tanh")
    with pytest.raises(ValueError, match="conv_block 'Bottleneck'"):
        UNet(conv_block="Bottleneck")
    with pytest.raises(ValueError, match="give 5, one for each level, each of 3 numbers"):
        UNet(kernel_size=[(3, 3, 3)] * 4)
    with pytest.raises(ValueError, match="give 4, one for each level, each of 2 numbers"):
        UNet(ndim=2, down_scale=[(2, 2, 2)] * 4)
    with pytest.raises(ValueError, match="sides must be odd"):
        UNet(kernel_size=[(2, 3, 3)] * 5)
    with pytest.raises(ValueError, match="even multiple of in_channels, 3"):
        VNet(in_channels=3)
    with pytest.raises(ValueError, match="768 is not a multiple of num_heads 7"):
        UNETR(num_heads=7)


# ---- slices ----


def test_slice_by_slice_computes_each_slice_by_itself():
    net = built("attention_unet", "2d").eval()
    volume = noise(2, 1, 3, 20, 17)
    logits = net(volume)
    assert logits.shape == (2, 3, 3, 20, 17)
    for n in range(2):
        for z in range(3):
            alone = net.network(volume[n : n + 1, :, z])
            torch.testing.assert_close(logits[n : n + 1, :, z], alone, rtol=1e-3, atol=1e-4)


def test_slice_by_slice_takes_networks_with_a_second_output():
    class Two(nn.Module):
        multiple, checkpointing = (4, 8), False

        def forward(self, x):
            return [x, 2 * x]

    net, volume = SliceBySlice(Two()), noise(2, 3, 4, 5, 6)
    first, second = net(volume)
    assert torch.equal(first, volume) and torch.equal(second, 2 * volume)
    assert net.multiple == (1, 4, 8)
    net.checkpointing = True
    assert net.network.checkpointing and net.checkpointing
    with pytest.raises(ValueError, match="the image has shape"):
        net(volume[0])


# ---- flags and YAML files ----


def parser_for(model, dimension):
    parser = make_parser("")
    add_architecture_flags(parser, model, dimension)
    return parser


def test_the_models_of_both_dimensions():
    names = ["unet", "resunet", "unetpp", "attention_unet", "vnet", "medformer", "unetr", "swin_unetr"]
    assert list(MODELS_3D) == names and list(MODELS_2D) == ["unet", "attention_unet", "medformer"]
    for model, dimension in (("vnet", "2d"), ("unet", "4d"), ("nnformer", "3d")):
        with pytest.raises(ValueError, match=f"there is no {model} in {dimension}; take 3d: unet, resunet"):
            add_architecture_flags(ArgumentParser(), model, dimension)


@pytest.mark.parametrize("model, dimension", FAMILIES)
def test_a_key_or_flag_of_another_family_is_an_error(model, dimension, tmp_path, capsys):
    own = architecture_defaults(model, dimension)
    everything = {k: v for family in FAMILIES for k, v in architecture_defaults(*family).items()}
    for name in everything:
        file = tmp_path / "keys.yaml"
        value = own.get(name, everything[name])
        file.write_text(yaml.safe_dump({name: value}))
        words = value if isinstance(value, list) else [value]
        if name in own:
            assert getattr(parse_args(parser_for(model, dimension), ["--config", str(file)]), name) == value
            continue
        for argv in (["--config", str(file)], [f"--{name}", *map(str, words)]):
            with pytest.raises(SystemExit):
                parse_args(parser_for(model, dimension), argv)
            assert f"unknown {'key' if '--config' in argv else 'option'}" in capsys.readouterr().err


# Another value of every flag of every family; each must change the network.
OTHER_VALUES = {
    "base_chan": 8,
    "norm": "bn",
    "act": "gelu",
    "down_scale": ["2", "2", "2", "1"],
    "kernel_size": ["3", "3", "1", "3", "3"],
    "conv_block": None,  # the other one
    "dropout": 0.5,
    "feature_size": None,
    "hidden_size": 48,
    "mlp_dim": 48,
    "num_heads": 3,
    "position_grid": [1, 2, 3],
    "checkpointing": None,
}


def behaviour(net):
    """Weights' names and shapes, output, and what the forward pass of a training step keeps."""
    held = {}

    def keep(tensor):
        held[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = net.train()(noise(1, 1, 16, 16, 32))
    shapes = [(name, tuple(p.shape)) for name, p in net.named_parameters()]
    return shapes, logits.detach(), sum(held.values())


@quick_networks
def test_every_flag_changes_the_network(model, dimension):
    plain = small(model, dimension)
    defaults = architecture_defaults(model, dimension)
    before = behaviour(built(model, dimension))
    for name, default in defaults.items():
        value, present = OTHER_VALUES[name], plain.get(name, default)
        if name == "conv_block":
            value = "BasicBlock" if present == "SingleConv" else "SingleConv"
        if name == "feature_size":
            value = 8
        if name == "checkpointing":
            value = not present
        assert value != present, name
        after = behaviour(built(model, dimension, **{name: value}))
        same_weights = before[0] == after[0]
        same_output = torch.allclose(before[1], after[1], atol=1e-5)
        same_memory = abs(before[2] - after[2]) < 0.02 * before[2]
        if name == "checkpointing":
            assert same_weights and same_output and not same_memory, name
        else:
            assert not (same_weights and same_output), name


def test_every_flag_of_swin_unetr_changes_it():
    assert set(architecture_defaults("swin_unetr", "3d")) == {"feature_size", "checkpointing"}
    with torch.device("meta"):
        nets = [built("swin_unetr", "3d", feature_size=size) for size in (12, 24, 48)]
    assert len({count(net) for net in nets}) == 3
    assert [built("swin_unetr", "3d", checkpointing=c).checkpointing for c in (True, False)] == [True, False]


def test_values_of_scales_and_kernels():
    assert [sides(text) for text in ("2", "1x2x2", "[1, 2, 2]", "[3,3]")] == ["2", "1x2x2", "1x2x2", "3x3"]
    for wrong in ("", "two", "0", "1x0x2", "-2", "2.5", "1 2 2"):
        with pytest.raises(Exception, match="neither a number"):
            sides(wrong)
    config = {"model": "unet", "dimension": "3d", "down_scale": ["1x2x2", "1x2x2", "2", "2"]}
    with torch.device("meta"):
        assert get_model(config).multiple == (4, 16, 16)
        config["kernel_size"] = ["1x3x3", "1x3x3", "3", "3", "3"]
        assert count(get_model(config)) == 16_063_875


def test_what_a_resumed_run_must_have_in_common():
    assert architecture("vnet", "3d") == (
        "model",
        "dimension",
        "base_chan",
        "norm",
        "act",
        "down_scale",
        "dropout",
    )
    assert "checkpointing" not in architecture("unetr", "3d") and "hidden_size" in architecture("unetr", "3d")


@pytest.mark.parametrize("dataset", DATASETS)
@every_network
def test_yaml_files_name_the_whole_architecture_and_nothing_of_others(dataset, model, dimension):
    content = values_of(ROOT / "amygdala" / "config" / dataset / f"{model}_{dimension}.yaml")
    own = architecture_defaults(model, dimension)
    others = {name for family in FAMILIES for name in architecture_defaults(*family)} - set(own)
    assert set(own) <= set(content) and not others & set(content)
    parser, argv = parser_for(model, dimension), []
    for name in own:
        words = content[name] if isinstance(content[name], list) else [content[name]]
        argv += [f"--{name}", *(str(word) for word in words)]
    config = vars(parse_args(parser, argv)) | {"model": model, "dimension": dimension}
    with torch.device("meta"):
        net = get_model(config)
    assert count(net) > 1_000_000
    patch = content["patch_size"]
    assert len(patch) == 3 and all(side % m == 0 for side, m in zip(patch, net.multiple, strict=True))
    if model == "unetr":
        assert content["position_grid"] == [side // 16 for side in patch]


# ---- use ----


@pytest.mark.parametrize("dimension", ["2d", "3d"])
def test_a_checkpoint_is_enough(dimension, tmp_path):
    net = built("unet", dimension)
    checkpoint = {
        "model": net.state_dict(),
        "config": small("unet", dimension) | {"patch_size": [16, 16, 32]},
        "preprocessing": {"spacing_mm": [1, 1, 1], "dataset": "Hippocampus", "localiser": None},
        "stage": "amygdala",
        "split": {"train": [], "val": [], "test": []},
    }
    path = tmp_path / "best.pt"
    torch.save(checkpoint, path)
    trained = load_trained(path, torch.device("cpu"), FP32)
    image = noise(1, 1, 16, 16, 32)
    with torch.no_grad():
        torch.testing.assert_close(trained.network(image), net.eval()(image))
    for wrong in ({"stage": "amos_lha"}, {"config": {"model": "vnet", "dimension": "2d"}}):
        torch.save(checkpoint | wrong, path)
        with pytest.raises(ValueError, match="not weights of amygdala/train.py"):
            load_trained(path, torch.device("cpu"), FP32)


def imported_modules(path):
    tree = ast.walk(ast.parse(path.read_text(encoding="utf8")))
    return {n.module for n in tree if isinstance(n, ast.ImportFrom)}


ALONE = {  # how a stranger would call them
    "amygdala.unet": "UNet(base_chan=4, attention=True)",
    "common.unetpp": "UNetPlusPlus(base_chan=4)",
    "common.vnet": "VNet(base_chan=4)",
    "common.unetr": "UNETR(hidden_size=24, num_heads=2, mlp_dim=24, feature_size=4)",
}


def copy_with_imports(file, folder):
    """A family's file, and the files of common that it imports, directly or not, in an empty folder."""
    (folder / "common").mkdir(parents=True)
    done, wanted = set(), [ROOT / f"{file.replace('.', '/')}.py"]
    while wanted:
        path = wanted.pop()
        done.add(path)
        shutil.copy(path, folder / "common" if path.parent.name == "common" else folder)
        for module in imported_modules(path):
            assert not module.startswith("amygdala"), "a family stands in one file"
            found = ROOT / f"{module.replace('.', '/')}.py"
            if module.startswith("common.") and found not in done:
                wanted.append(found)
    return done


def test_each_family_works_alone(tmp_path):
    """One new interpreter, which forgets between the folders what it knows of `common`."""
    code = "import sys, torch\n"
    for file, call in ALONE.items():
        assert len(copy_with_imports(file, tmp_path / file)) <= 5
        code += f"sys.path[0] = {str(tmp_path / file)!r}\n"
        code += "for name in [n for n in sys.modules if n.startswith('common')]: del sys.modules[name]\n"
        code += f"from {file.removeprefix('amygdala.')} import {call.split('(')[0]}\n"
        code += f"print(*{call}(torch.zeros(1, 1, 16, 16, 32)).shape)\n"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={}
    )
    assert result.stdout.splitlines() == ["1 3 16 16 32"] * 4, result.stderr


@pytest.mark.slow
@every_network
def test_learns_one_crop_by_heart(model, dimension):
    """Two balls in noise, one brighter: a Dice above 0.95 after at most 500 steps."""
    wider = {"base_chan": 8} if "base_chan" in small(model, dimension) else {}
    if model == "unetr":
        wider = {"feature_size": 8, "hidden_size": 48}
    net = built(model, dimension, **wider).train()
    axes = torch.meshgrid(*(torch.arange(32.0) for _ in range(3)), indexing="ij")
    target = torch.zeros(1, 32, 32, 32, dtype=torch.long)
    for label, centre in ((1, (16, 14, 8)), (2, (16, 14, 24))):
        distance = sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True))
        target[0][distance < 36] = label
    image = target[:, None].float() * 0.5 + 0.2 * noise(1, 1, 32, 32, 32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)  # at 2e-3 the U-Net loses the second ball again
    for step in range(1, 501):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=model != "swin_unetr"):
            logits = net(image)
        probs = logits.float().softmax(1)
        overlap = [(probs[:, k] * (target == k)).sum() for k in (1, 2)]
        total = [probs[:, k].sum() + (target == k).sum() for k in (1, 2)]
        dice = sum(2 * o / t for o, t in zip(overlap, total, strict=True)) / 2
        (F.cross_entropy(logits.float(), target) + 1 - dice).backward()
        optimizer.step()
        if step % 50 == 0:
            with torch.no_grad():
                pred = net.eval()(image).argmax(1)
            net.train()
            counts = [
                (((pred == k) & (target == k)).sum(), (pred == k).sum() + (target == k).sum()) for k in (1, 2)
            ]
            found = [float(2 * both / all_of_it) for both, all_of_it in counts]
            if min(found) > 0.95:
                return
    raise AssertionError(f"{model} {dimension}: Dice of {found}")
