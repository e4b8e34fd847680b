"""Convolution blocks without biases, with any norm and activation, and what U-Nets of them need."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from common.layers import CONV, MAX_POOL, make_norm, resize_linear, upsample_to

NORMS = {"in": "plain_instance", "bn": "batch", "ln": "channel_layer"}  # short names -> those of `make_norm`
ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "gelu": nn.GELU}
EPS = {"in": 1e-4, "bn": 1e-5, "ln": 1e-5}  # added to the variance


def make_short_norm(norm: str, channels: int, ndim: int) -> nn.Module:
    """The norm called 'in' (instance norm without scale and shift), 'bn' or 'ln' (over the channels).

    Raises:
        ValueError: another `norm`.
    """
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; take one of {', '.join(NORMS)}")
    return make_norm(NORMS[norm], channels, ndim, eps=EPS[norm])


def make_activation(act: str) -> nn.Module:
    """The activation of this name; all but GELU overwrite their input.

    Raises:
        ValueError: another name.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"unknown activation {act!r}; take one of {', '.join(ACTIVATIONS)}")
    return nn.GELU() if act == "gelu" else ACTIVATIONS[act](inplace=True)


def same_size_conv(in_channels: int, out_channels: int, kernel: Sequence[int]) -> nn.Module:
    """A convolution without bias that keeps the size; `kernel` has an odd side for each axis, 2 or 3."""
    padding = [side // 2 for side in kernel]
    return CONV[len(kernel)](in_channels, out_channels, tuple(kernel), padding=padding, bias=False)


class SingleConv(nn.Sequential):
    """Convolution, norm, activation."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: Sequence[int], norm: str, act: str
    ) -> None:
        super().__init__(
            same_size_conv(in_channels, out_channels, kernel),
            make_short_norm(norm, out_channels, len(kernel)),
            make_activation(act),
        )


class PreActivationConv(nn.Module):
    """Norm, activation, convolution."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: Sequence[int], norm: str, act: str
    ) -> None:
        super().__init__()
        self.norm = make_short_norm(norm, in_channels, len(kernel))
        self.act = make_activation(act)
        self.conv = same_size_conv(in_channels, out_channels, kernel)

    def activated(self, x: Tensor) -> Tensor:
        """What the convolution gets."""
        return self.act(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.activated(x))


class BasicBlock(nn.Module):
    """Two pre-activation convolutions and a shortcut, which is a third one where the channels change.

    The convolution of the shortcut has the full kernel, not 1x1x1.

    Args:
        of_image: the input is an image, which is convolved as it is: the activation would set half of its
            grey values to 0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        norm: str,
        act: str,
        of_image: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = PreActivationConv(in_channels, out_channels, kernel, norm, act)
        self.conv2 = PreActivationConv(out_channels, out_channels, kernel, norm, act)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = PreActivationConv(in_channels, out_channels, kernel, norm, act)
        if of_image:
            self.conv1.norm = self.conv1.act = nn.Identity()
            if self.shortcut is not None:
                self.shortcut.norm = self.shortcut.act = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is None:
            return self.conv2(self.conv1(x)) + x
        activated = self.conv1.activated(x)
        # Norms without weights give both convolutions the same input, which is then kept only once.
        same = not list(self.shortcut.norm.parameters())
        shortcut = self.shortcut.conv(activated if same else self.shortcut.activated(x))
        return self.conv2(self.conv1.conv(activated)) + shortcut


BLOCKS = {"SingleConv": SingleConv, "BasicBlock": BasicBlock}


def make_blocks(
    conv_block: str, channels: Sequence[int], kernel: Sequence[int], norm: str, act: str, **options: bool
) -> nn.Sequential:
    """Blocks of this name one after the other: from channels[0] to channels[1], to channels[2], and so on.

    Args:
        options: of the first block, see there.

    Raises:
        ValueError: another `conv_block`.
    """
    if conv_block not in BLOCKS:
        raise ValueError(f"unknown conv_block {conv_block!r}; take one of {', '.join(BLOCKS)}")
    block = BLOCKS[conv_block]
    blocks = [block(channels[0], channels[1], kernel, norm, act, **options)]
    steps = zip(channels[1:-1], channels[2:], strict=True)
    return nn.Sequential(*blocks, *(block(i, o, kernel, norm, act) for i, o in steps))


def pool(scale: Sequence[int]) -> nn.Module:
    """Max pooling by `scale`, one number for each of the 2 or 3 axes."""
    return MAX_POOL[len(scale)](tuple(scale))


def resize_aligned(x: Tensor, size: Sequence[int]) -> Tensor:
    """Linear interpolation of (N, C, *spatial) to `size`, corners aligned; the faster way in 3-D."""
    if x.ndim == 5:
        return resize_linear(x, tuple(size), align_corners=True)
    return upsample_to(x, torch.Size(size))


def per_level(
    name: str, values: Sequence[int | Sequence[int]] | None, default: int, levels: int, ndim: int
) -> list[tuple[int, ...]]:
    """The kernels or scales of all levels, each a tuple of `ndim` sides; None = `default` on every side.

    Args:
        name: of the setting, for errors.
        values: of each level a number for all sides, or one for each.

    Raises:
        ValueError: too few or too many of them, or sides that are not numbers of at least 1.
    """
    if values is None:
        return [(default,) * ndim] * levels
    result = [(sides,) * ndim if isinstance(sides, int) else tuple(map(int, sides)) for sides in values]
    if len(result) != levels or any(len(sides) != ndim or min(sides) < 1 for sides in result):
        raise ValueError(
            f"{name} is {result}; give {levels}, one for each level, each of {ndim} numbers of at least 1"
        )
    return result


def kernels_per_level(
    values: Sequence[int | Sequence[int]] | None, levels: int, ndim: int
) -> list[tuple[int, ...]]:
    """As `per_level`, for kernels, which have odd sides; None = 3 on every side."""
    kernels = per_level("kernel_size", values, 3, levels, ndim)
    if any(side % 2 == 0 for kernel in kernels for side in kernel):
        raise ValueError(f"kernel_size is {kernels}; sides must be odd, so that images keep their size")
    return kernels


def strides_product(scales: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What the sides of an image must be multiples of, axis by axis, to be divided by all `scales`."""
    return tuple(prod(sides) for sides in zip(*scales, strict=True))
