"""common/nnunet.py: size, arithmetic, any size of image, gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from common import nnunet
from common.nnunet import PlainUNet, ResEncUNet

THICK_SLICES = [[1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
both = pytest.mark.parametrize("network", [PlainUNet, ResEncUNet])


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def count(network):
    return sum(p.numel() for p in network.parameters())


@pytest.fixture
def narrow(monkeypatch):
    """Both networks in small."""
    monkeypatch.setattr(nnunet, "CHANNELS", (4, 6, 8, 10, 12, 12))
    monkeypatch.setattr(nnunet, "RESIDUAL_BLOCKS", (1, 2, 1, 2, 1, 1))
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "network, total, nnunets", [(PlainUNet, 31_190_672, 31_206_864), (ResEncUNet, 102_335_632, 102_361_040)]
)
def test_parameter_totals(network, total, nnunets):
    """nnU-Net's own network also has a bias in front of each norm, and heads for deep supervision."""
    with torch.device("meta"):
        net = network(1, 16)
    assert count(net) == total
    convs_before_norms = [m for m in net.modules() if isinstance(m, nn.Conv3d) and m.bias is None]
    shortcuts = [m for m in convs_before_norms if m.kernel_size == (1, 1, 1)]  # these have none there either
    biases = sum(m.out_channels for m in convs_before_norms) - sum(m.out_channels for m in shortcuts)
    heads = 16 * (64 + 128 + 256 + 320) + 4 * 16
    assert total + biases + heads == nnunets


def test_arithmetic_and_memory_at_96():
    """As counted for nnU-Net's plain U-Net: 403.5 GFLOP, 1,441 MiB kept for the backward (fp32)."""
    with FakeTensorMode():
        net, kept = PlainUNet(1, 16).train(), {}

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
    assert flops.get_total_flops() / 1e9 == pytest.approx(403.5, abs=0.05)
    assert saved / 2**20 == pytest.approx(1441, rel=0.02)


@both
@pytest.mark.parametrize("strides", [nnunet.STRIDES, THICK_SLICES])
@pytest.mark.parametrize("shape", [(8, 32, 32), (1, 1, 1), (17, 31, 9), (32, 32, 32)])
def test_any_size(narrow, network, strides, shape):
    net = network(2, 3, strides=strides)
    with torch.no_grad():
        logits = net(noise(1, 2, *shape))  # in training mode, where norms refuse a single voxel
    assert logits.shape == (1, 3, *shape) and logits.isfinite().all()


@both
def test_kernels_of_thick_slices(narrow, network):
    net = network(1, 2, strides=THICK_SLICES)
    assert net.multiple == (8, 32, 32)
    kernels = [next(m for m in down.modules() if isinstance(m, nn.Conv3d)).kernel_size for down in net.down]
    assert kernels == [(1, 3, 3)] * 2 + [(3, 3, 3)] * 4


@both
def test_every_parameter_learns(narrow, network):
    net = network(1, 3, deep_supervision=True)
    levels = net(noise(2, 1, 32, 32, 64))
    assert [x.shape[2:] for x in levels] == [(32, 32, 64), (16, 16, 32), (8, 8, 16), (4, 4, 8)]
    sum(F.cross_entropy(x, (x[:, 0] > 0).long()) for x in levels).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-9, name
    with pytest.raises(ValueError, match=r"multiples of \(32, 32, 32\).*\(32, 32, 48\)"):
        net(noise(1, 1, 32, 32, 48))


@both
def test_checkpointing_changes_no_gradient(narrow, network):
    image, gradients = noise(1, 1, 32, 32, 64), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = network(1, 2, checkpointing=checkpointing)
        net(image).square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_residual_block_by_hand():
    torch.manual_seed(0)
    block = nnunet._ResidualBlock(2, 3, (3, 3, 3), (1, 2, 2))
    x = noise(1, 2, 3, 4, 6)
    means = F.avg_pool3d(x, (1, 2, 2))
    expected = F.leaky_relu(block.main(x) + block.shortcut(means), 0.01)
    assert torch.allclose(block(x), expected, atol=1e-6)
