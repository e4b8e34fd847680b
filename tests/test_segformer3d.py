"""common/segformer3d.py against a plain version for cubes, and its symmetry under swapped axes."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from common.layers import padded_to_multiple
from common.segformer3d import SegFormer3D


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SMALL = {"widths": (16, 32, 40, 64), "heads": (2, 2, 5, 4), "decoder_width": 48}


def segformer(**options):
    """A small one, with all parameters and running statistics of noticeable size."""
    torch.manual_seed(0)
    net = SegFormer3D(**SMALL | options)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng))
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=rng)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2, generator=rng)
    return net


def cubes_by_hand(state, image, heads, reductions, scales, norm):
    """Logits of SegFormer3D for a cubic image from the weights alone; two blocks a stage."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def layer_norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"]
            + state[f"{name}.bias"]
        )

    def conv(x, name, **options):
        return F.conv3d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)

    def channel_norm(x, name):
        mean, var = x.mean((2, 3, 4), keepdim=True), x.var((2, 3, 4), keepdim=True, unbiased=False)
        if norm == "batch":
            mean, var = (state[f"{name}.running_{k}"].view(1, -1, 1, 1, 1) for k in ("mean", "var"))
        weight, bias = (state[f"{name}.{k}"].view(1, -1, 1, 1, 1) for k in ("weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def tokens(x):
        return x.reshape(*x.shape[:2], -1).transpose(1, 2)

    def cube(x):
        side = round(x.shape[1] ** (1 / 3))
        return x.transpose(1, 2).reshape(len(x), -1, side, side, side)

    features, x = [], image
    for stage in range(4):
        at = f"stages.{stage}"
        x = conv(
            x, f"{at}.embed", **({"stride": 4, "padding": 3} if stage == 0 else {"stride": 2, "padding": 1})
        )
        x = layer_norm(tokens(x), f"{at}.embed_norm")
        for block in range(2):
            b = f"{at}.blocks.{block}"
            y = layer_norm(x, f"{b}.norm1")
            query, source = linear(y, f"{b}.attention.query"), y
            if reductions[stage] > 1:
                source = tokens(conv(cube(y), f"{b}.attention.reduce", stride=reductions[stage]))
                source = layer_norm(source, f"{b}.attention.reduce_norm")
            key_value, width = linear(source, f"{b}.attention.key_value"), x.shape[2]
            parts = []
            for head in range(heads[stage]):
                c = width // heads[stage]
                own = slice(head * c, head * c + c)
                q, k, v = query[..., own], key_value[..., :width][..., own], key_value[..., width:][..., own]
                parts.append((q @ k.transpose(1, 2) * scales[stage]).softmax(-1) @ v)
            x = x + linear(torch.cat(parts, -1), f"{b}.attention.proj")
            y = linear(layer_norm(x, f"{b}.norm2"), f"{b}.ffn.fc1")
            y = conv(cube(y), f"{b}.ffn.depthwise", padding=1, groups=y.shape[2])
            y = tokens(channel_norm(y, f"{b}.ffn.norm"))
            y = y * (1 + torch.erf(y / math.sqrt(2))) / 2  # GELU
            x = x + linear(y, f"{b}.ffn.fc2")
        x = cube(layer_norm(x, f"{at}.norm"))
        features.append(x)
    scaled = []
    for i in (3, 2, 1, 0):
        y = layer_norm(linear(tokens(features[i]), f"decoder.project.{i}.0"), f"decoder.project.{i}.1")
        scaled.append(F.interpolate(cube(y), scale_factor=2**i, mode="trilinear") if i else cube(y))
    y = channel_norm(conv(torch.cat(scaled, 1), "decoder.fuse"), "decoder.norm").clamp(min=0)
    return F.interpolate(conv(y, "decoder.head"), scale_factor=4, mode="trilinear")


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_equals_a_plain_version_for_cubes(norm):
    widths, heads, reductions = SMALL["widths"], SMALL["heads"], (4, 2, 1, 1)
    net = segformer(in_channels=2, num_classes=3, norm=norm).eval()
    scales = [(w // n) ** -0.5 for w, n in zip(widths, heads, strict=True)]
    image = noise(2, 2, 64, 64, 64)
    with torch.no_grad():
        logits = net(image)
        expected = cubes_by_hand(net.state_dict(), image, heads, reductions, scales, norm)
        other = cubes_by_hand(net.state_dict(), image, heads, reductions, [0.9 * s for s in scales], norm)
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (logits - other).abs().max() > 1e-3 * expected.abs().max(), "the scale has an effect"


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_parameter_total(norm):
    with torch.device("meta"):
        net = SegFormer3D(norm=norm)
    assert sum(p.numel() for p in net.parameters()) == 4_491_809


def test_arithmetic_of_96_cubed():
    with torch.device("meta"):
        net, image = SegFormer3D(), torch.empty(1, 1, 96, 96, 96)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(image)
    assert counter.get_total_flops() == pytest.approx(10.8e9, rel=0.001)


@pytest.mark.parametrize("checkpointing, expected_mib", [(False, 213), (True, 15)])
def test_memory_of_96_cubed(checkpointing, expected_mib):
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode():
        net = SegFormer3D(checkpointing=checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            net(torch.empty(1, 1, 96, 96, 96))
        weights = {p.untyped_storage()._cdata for p in net.parameters()}
        kept_mib = sum(storage.nbytes() for key, storage in kept.items() if key not in weights) / 2**20
    assert kept_mib == pytest.approx(expected_mib, rel=0.05)


def test_tokens_of_64_64_128():
    with torch.device("meta"):
        net = SegFormer3D()
        shapes = []
        for stage in net.stages:
            stage.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
        assert net(torch.empty(1, 1, 64, 64, 128)).shape == (1, 1, 64, 64, 128)
    assert shapes == [(32, 16, 16, 32), (64, 8, 8, 16), (160, 4, 4, 8), (256, 2, 2, 4)]


def symmetric(net):
    """All convolution kernels made equal under every order of their axes."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv3d):
                turned = [module.weight.permute(0, 1, *order) for order in itertools.permutations((2, 3, 4))]
                module.weight.copy_(torch.stack(turned).mean(0))
    return net


@pytest.mark.parametrize("size", [(32, 64, 96), (64, 64, 128), (17, 40, 90)])
def test_swapping_axes_swaps_the_output(size):
    """Fails if tokens are put back on a grid of other sides than they came from."""
    net, image = symmetric(segformer()).eval(), noise(1, 1, *size)
    with torch.no_grad():
        logits = net(image)
        for order in itertools.permutations((2, 3, 4)):
            turned = net(image.permute(0, 1, *order))
            error = (turned - logits.permute(0, 1, *order)).abs().max()
            assert error < 1e-4 * logits.abs().max() and error < 0.01 * logits.std()


@pytest.mark.parametrize("size", [(1, 1, 1), (5, 40, 33), (32, 32, 32), (31, 64, 32)])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_any_size_trains(size, norm):
    net = segformer(in_channels=2, num_classes=3, norm=norm).train()
    logits = net(noise(1, 2, *size))
    assert logits.shape == (1, 3, *size)
    logits.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_padding_repeats_the_border_and_is_cut_off_in_place():
    net, image = segformer().eval(), noise(1, 1, 30, 33, 32)
    padded, crop = padded_to_multiple(image, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(image), net(padded)[crop])


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_images_of_a_batch_do_not_mix(batch):
    net, images = segformer().train(), noise(batch, 1, 32, 64, 32)
    with torch.no_grad():
        together, alone = net(images), torch.cat([net(image[None]) for image in images])
    assert (together - alone).abs().max() < 1e-3 * alone.std()


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_checkpointing_changes_neither_gradients_nor_statistics(norm):
    results = []
    for checkpointing in (False, True):
        net = segformer(norm=norm, checkpointing=checkpointing).train()
        net(noise(2, 1, 32, 32, 64)).square().mean().backward()
        results.append([*(p.grad for p in net.parameters()), *net.buffers()])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other)


def test_every_parameter_gets_a_gradient():
    net = segformer().train()
    net(noise(1, 1, 32, 64, 64)).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())


def test_runs_in_bf16():
    torch.manual_seed(0)
    net, image = SegFormer3D(**SMALL).train(), noise(1, 1, 32, 32, 64)
    exact = net(image).detach()
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(image)
    logits.float().square().mean().backward()
    assert (logits.float() - exact).abs().mean() < 0.1 * exact.std()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"widths": (32, 64, 160)}, "need four values each, for strides 4, 8, 16, 32"),
        ({"heads": (3, 2, 5, 8)}, r"widths \(32, 64, 160, 256\) are not divisible by heads \(3, 2, 5, 8\)"),
        ({"reductions": (4, 2, 1, 2)}, r"reductions \(4, 2, 1, 2\) do not divide 8, 4, 2, 1"),
        ({"norm": "layer"}, "unknown norm 'layer'; take batch, instance or group"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SegFormer3D(**options)


def test_other_images_are_refused():
    with pytest.raises(
        ValueError, match=r"the image has shape \(1, 2, 32, 32, 32\), the network takes \(N, 1,"
    ):
        SegFormer3D()(torch.zeros(1, 2, 32, 32, 32))
