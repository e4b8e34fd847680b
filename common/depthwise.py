"""A depthwise 3-D convolution whose gradients are computed several times as fast as PyTorch's on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CACHED_FLOATS = 2**18  # 1 MiB


class DepthwiseConv3d(nn.Conv3d):
    """Each channel convolved by itself: stride 1, no bias, odd kernel, the size stays.

    Same results as nn.Conv3d with as many groups as channels. On a CPU PyTorch's backward pass does both
    gradients by a slow general routine, in bfloat16 worse than in float32.
    """

    def __init__(self, channels: int, kernel: tuple[int, int, int]) -> None:
        padding = tuple(side // 2 for side in kernel)
        super().__init__(channels, channels, kernel, padding=padding, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> the same shape."""
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        return _Depthwise.apply(x, weight)


class _Depthwise(torch.autograd.Function):
    """Convolution of (N, C, D, H, W) with weights (C, 1, *kernel)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wanted_x, wanted_weight = ctx.needs_input_grad
        return (
            _convolve(gradient, weight.flip(2, 3, 4)) if wanted_x else None,
            weight_gradient(x, gradient, weight.shape[2:]) if wanted_weight else None,
        )


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv3d(x, weight, padding=[side // 2 for side in weight.shape[2:]], groups=len(weight))


def weight_gradient(x: Tensor, gradient: Tensor, kernel: tuple[int, int, int]) -> Tensor:
    """Gradient of the weights (C, 1, *kernel), from input and gradient of the output, (N, C, D, H, W) both.

    The input is padded on all sides, the gradient behind each row and slice only, so that both have rows and
    slices of the same length. Then a shift along all axes is one offset, and each weight one product of two
    lines of numbers for each channel; sums are in float32.
    """
    n, channels, _, height, width = x.shape
    kd, kh, kw = kernel
    row = width + kw - 1
    plane = (height + kh - 1) * row
    offsets = [i * plane + j * row + k for i in range(kd) for j in range(kh) for k in range(kw)]
    x_lines = F.pad(x.float().contiguous(), (kw // 2, kw // 2, kh // 2, kh // 2, kd // 2, kd // 2))
    lines = F.pad(gradient.float().contiguous(), (0, kw - 1, 0, kh - 1)).view(n * channels, -1)
    count = lines.shape[1] - offsets[-1] % plane  # without the padding behind the last voxel
    few = max(1, CACHED_FLOATS // count)  # channels that the cache holds at a time
    sums = [
        torch.stack([torch.linalg.vecdot(a[:, o : o + count], b[:, :count]) for o in offsets], dim=1)
        for a, b in zip(x_lines.view(n * channels, -1).split(few), lines.split(few), strict=True)
    ]
    return torch.cat(sums).view(n, channels, 1, *kernel).sum(0).to(x.dtype)
