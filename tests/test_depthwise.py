"""common/depthwise.py: the results and gradients of PyTorch's own convolution."""

import pytest
import torch
from torch import nn

from common.depthwise import DepthwiseConv3d, weight_gradient


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (5, 3, 1)])
@pytest.mark.parametrize("shape", [(2, 4, 5, 6, 7), (1, 3, 1, 1, 2), (1, 5, 2, 2, 2)])
def test_depthwise_convolution_has_the_results_and_gradients_of_pytorchs(kernel, shape, monkeypatch):
    monkeypatch.setattr("common.depthwise.CACHED_FLOATS", 500)  # several pieces
    torch.manual_seed(0)
    ours = DepthwiseConv3d(shape[1], kernel)
    theirs = nn.Conv3d(
        shape[1], shape[1], kernel, padding=[k // 2 for k in kernel], groups=shape[1], bias=False
    )
    theirs.load_state_dict(ours.state_dict())
    results = []
    for conv in (ours, theirs):
        x = noise(*shape).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
        y = conv(x)
        y.backward(noise(*shape, seed=1))
        results.append((y, x.grad, conv.weight.grad))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert torch.equal(ours(noise(*shape)), theirs(noise(*shape)))


def test_depthwise_gradients_in_bf16_are_those_of_the_rounded_numbers():
    x, gradient = noise(1, 4, 6, 7, 8).bfloat16(), noise(1, 4, 6, 7, 8, seed=1).bfloat16()
    exact = weight_gradient(x.float(), gradient.float(), (3, 3, 3))
    assert torch.equal(weight_gradient(x, gradient, (3, 3, 3)), exact.bfloat16())
    conv = DepthwiseConv3d(4, (3, 3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(noise(1, 4, 6, 7, 8))
    assert y.dtype == torch.bfloat16
    y.backward(gradient)
    assert conv.weight.grad.dtype == torch.float32
    assert torch.allclose(conv.weight.grad, exact, atol=0.01 * exact.abs().max())
