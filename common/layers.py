"""Blocks for 2-D and 3-D networks."""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """nn.Conv3d without a fault of PyTorch's, seen in 2.13 on a CPU in bfloat16.

    Where the kernel is deeper than an image of two voxels or more, gradients of the weights hold memory that
    nobody wrote to, often NaN. Such images are tiny: they are computed in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and 1 < x.shape[2] < self.kernel_size[0]:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())
        return super().forward(x)


CONV = {2: nn.Conv2d, 3: Conv3d}
CONV_TRANSPOSE = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
MAX_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
LINEAR_MODE = {2: "bilinear", 3: "trilinear"}


def make_norm(norm: str, channels: int, ndim: int, eps: float = 1e-5) -> nn.Module:
    """A normalisation layer, with learned scale and shift unless 'plain_instance'.

    Args:
        norm: 'batch'; 'instance', each channel of each image by itself; 'plain_instance', the same without
            scale and shift; 'group', 8 groups of channels (fewer where 8 does not divide `channels`); or
            'channel_layer', all channels of each voxel. All but the first do not depend on the batch size.
        ndim: 2 or 3 spatial axes.
        eps: added to the variance.

    Raises:
        ValueError: another `norm`.
    """
    if norm == "batch":
        return BATCH_NORM[ndim](channels, eps=eps)
    if norm == "instance":
        return INSTANCE_NORM[ndim](channels, eps=eps, affine=True)
    if norm == "plain_instance":
        return InstanceNorm(channels, eps=eps, affine=False)
    if norm == "group":
        groups = next(g for g in (8, 4, 2, 1) if channels % g == 0)
        return nn.GroupNorm(groups, channels, eps=eps)
    if norm == "channel_layer":
        return ChannelLayerNorm(channels, eps=eps)
    raise ValueError(
        f"unknown norm {norm!r}; take batch, instance or group (or plain_instance, channel_layer)"
    )


def upsample_to(x: Tensor, size: torch.Size) -> Tensor:
    """Linear interpolation of (N, C, *spatial) to `size`, corners aligned."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=tuple(size), mode=LINEAR_MODE[x.ndim - 2], align_corners=True)


def resize_linear(x: Tensor, size: tuple[int, ...], align_corners: bool = False) -> Tensor:
    """Linear interpolation of (N, C, *spatial) to `size`, as F.interpolate's.

    Written as one matrix product for each axis: deterministic on every device, also backwards, which
    F.interpolate is not on CUDA, and 4 to 15 times as fast on a CPU. Halving a side takes the mean of two.
    The result has the layout of `x`, channels first or last.
    """
    channels_last = x.is_contiguous(memory_format=CHANNELS_LAST[x.ndim - 2])
    y = x.movedim(1, -1) if channels_last else x
    for axis, want in enumerate(size, start=1 if channels_last else 2):
        have = y.shape[axis]
        if have != want:
            place = torch.arange(want, device=x.device)  # of a new voxel among the old ones
            if align_corners:
                place = place * ((have - 1) / max(want - 1, 1))
            else:
                place = (place + 0.5) * (have / want) - 0.5
            distance = place.clamp(0, have - 1)[:, None] - torch.arange(have, device=x.device)
            weights = (1 - distance.abs()).clamp(min=0).to(x.dtype)  # (want, have)
            before, after = y.shape[:axis], y.shape[axis + 1 :]
            if after:
                y = torch.matmul(weights, y.reshape(prod(before), have, prod(after)))
            else:
                y = torch.matmul(y, weights.T)
            y = y.reshape(*before, want, *after)
    return y.movedim(-1, 1) if channels_last else y


def pad_to(x: Tensor, size: torch.Size) -> Tensor:
    """Zero-pad (N, C, *spatial) to `size`, half on each side, so that odd input sizes fit their skips."""
    padding: list[int] = []
    for have, want in zip(reversed(x.shape[2:]), reversed(size), strict=True):
        padding += [(want - have) // 2, want - have - (want - have) // 2]
    return F.pad(x, padding) if any(padding) else x


def check_image(image: Tensor, in_channels: int, ndim: int) -> None:
    """Refuse an input that a network cannot take.

    Raises:
        ValueError: `image` is not (N, in_channels, *spatial) with `ndim` spatial axes, or has no element.
    """
    if image.ndim != ndim + 2 or image.shape[1] != in_channels or 0 in image.shape:
        axes = {2: "H, W", 3: "D, H, W"}[ndim]
        raise ValueError(
            f"the image has shape {tuple(image.shape)}, the network takes (N, {in_channels}, {axes}), none "
            "of them 0; add axes with image[None], or build the network with in_channels= of the image"
        )


def padded_to_multiple(
    x: Tensor, multiple: int | tuple[int, ...], two_blocks: bool = False
) -> tuple[Tensor, tuple]:
    """Repeat the border of (N, C, *spatial), half on each side, until every side is a multiple.

    The border is repeated, because what a 0 would mean depends on the normalisation: in images scaled to
    [-1, 1] it can be the HU of bone.

    Args:
        multiple: of all sides, or one for each spatial axis.
        two_blocks: where all sides would be just one `multiple`, make the last one two. At that stride the
            image would else be a single voxel, which an instance norm refuses in training.

    Returns:
        The padded tensor (`x` itself if nothing had to be added), and an index that cuts the original image
        out of whatever lies on the padded grid: `logits[crop]`.
    """
    multiples = (multiple,) * (x.ndim - 2) if isinstance(multiple, int) else tuple(multiple)
    size = [-(-side // m) * m for side, m in zip(x.shape[2:], multiples, strict=True)]
    if two_blocks and tuple(size) == multiples:
        size[-1] *= 2
    before = [(want - have) // 2 for have, want in zip(x.shape[2:], size, strict=True)]
    crop = (..., *(slice(b, b + have) for b, have in zip(before, x.shape[2:], strict=True)))
    padding: list[int] = []
    for b, have, want in zip(reversed(before), reversed(x.shape[2:]), reversed(size), strict=True):
        padding += [b, want - have - b]
    return (F.pad(x, padding, mode="replicate") if any(padding) else x), crop


def check_not_padded(image: Tensor, padded: Tensor, multiple: tuple[int, ...]) -> None:
    """Refuse an image that `padded_to_multiple` had to pad, where coarse outputs must fit the target's grid.

    Raises:
        ValueError: the two are not the same tensor.
    """
    if padded is not image:
        raise ValueError(
            f"deep supervision needs patches whose sides are multiples of {multiple}, one of them at least "
            f"twice that; this one is {tuple(image.shape[2:])}; choose another --patch_size"
        )


def pad_for_levels(
    image: Tensor, in_channels: int, multiple: tuple[int, ...], keeps_grid: bool
) -> tuple[Tensor, tuple]:
    """An image (N, in_channels, D, H, W) of any size as a 3-D network with levels takes it, and the way back.

    Args:
        multiple: of the sides, z y x.
        keeps_grid: refuse an image that would have to be padded, as in deep supervision.

    Returns: as `padded_to_multiple`.

    Raises:
        ValueError: as `check_image` and `check_not_padded`.
    """
    check_image(image, in_channels, ndim=3)
    padded, crop = padded_to_multiple(image, multiple, two_blocks=True)
    if keeps_grid:
        check_not_padded(image, padded, multiple)
    return padded, crop


CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def fast_layout(x: Tensor) -> Tensor:
    """(N, C, *spatial) as it is, but on a CPU with the channels next to each other in memory.

    Convolutions keep the layout of their input and are 1.2 to 3 times as fast in this one on a CPU.
    """
    return x.contiguous(memory_format=CHANNELS_LAST[x.ndim - 2]) if x.device.type == "cpu" else x


MOST_IMAGES = 8  # of a batch that InstanceNorm takes one by one


class InstanceNorm(nn.Module):
    """nn.InstanceNorm2d and 3d, in the `fast_layout` on a CPU; sums in float32.

    PyTorch's own copies the image to the other layout first. Without running statistics the batch norm of a
    single image is its instance norm, so that is what each image of a batch gets.

    Args:
        affine: learn a scale and a shift of each channel.
        eps: added to the variance.
    """

    def __init__(self, channels: int, *, affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) -> the same shape, dtype and layout."""
        if x.device.type != "cpu" or len(x) > MOST_IMAGES:
            return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
        images = [
            F.batch_norm(image, None, None, self.weight, self.bias, training=True, eps=self.eps)
            for image in x.split(1)
        ]
        return images[0] if len(images) == 1 else torch.cat(images)


class ChannelLayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the channels of each voxel of (N, C, *spatial)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ConvNormAct(nn.Sequential):
    """3-D convolution without bias, instance norm, leaky ReLU.

    Args:
        kernel: odd sides z y x; the image is padded so that a stride of 1 keeps its size.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int] = (3, 3, 3),
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        padding = tuple(side // 2 for side in kernel)
        super().__init__(
            Conv3d(in_channels, out_channels, kernel, stride=stride, padding=padding, bias=False),
            InstanceNorm(out_channels),
            nn.LeakyReLU(0.01, inplace=True),
        )


def kernels_of_levels(strides: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """Kernels z y x of the levels of a U-Net, one more than its `strides` (z y x of the steps down).

    (1, 3, 3), which looks within a slice only, while slices are so thick that all strides up to the next one
    leave z alone; then (3, 3, 3). This is nnU-Net's rule.
    """
    thick = [all(stride[0] == 1 for stride in strides[: i + 1]) for i in range(len(strides))]
    return [(1, 3, 3) if t else (3, 3, 3) for t in [*thick, False]]


class TransformerLayer(nn.Module):
    """Attention of all tokens to each other and an MLP, each after a layer norm and with a shortcut.

    Args:
        channels: of a token, a multiple of `heads`.
        mlp_dim: channels inside the MLP.
    """

    def __init__(self, channels: int, mlp_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, C) -> the same shape."""
        parts = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value)  # (N, heads, tokens, C / heads)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class AttentionGate(nn.Module):
    """Additive attention: weighs each position of a skip by what the coarser decoder level asks for.

    Source: Oktay et al. 2018, Attention U-Net, arXiv:1804.03999. Differs: attention is computed on the skip's
    grid (in the paper on the coarser grid of the gating signal), convolutions have a norm instead of a bias,
    and nothing follows the multiplication.
    """

    def __init__(self, gate_channels: int, skip_channels: int, norm: str, ndim: int) -> None:
        super().__init__()
        mid = max(skip_channels // 2, 1)

        def project(channels: int, out: int) -> nn.Sequential:
            return nn.Sequential(CONV[ndim](channels, out, 1, bias=False), make_norm(norm, out, ndim))

        self.W_g = project(gate_channels, mid)
        self.W_x = project(skip_channels, mid)
        self.psi = project(mid, 1)

    def forward(self, gate: Tensor, skip: Tensor) -> Tensor:
        """gate (N, Cg, *coarse), skip (N, Cx, *fine) -> skip times attention in (0, 1), (N, Cx, *fine)."""
        gate = upsample_to(gate, skip.shape[2:])
        attention = torch.sigmoid(self.psi(F.relu(self.W_g(gate) + self.W_x(skip), inplace=True)))
        return skip * attention


class SliceBySlice(nn.Module):
    """A 2-D network on the slices of a volume, each by itself: (N, C, D, H, W) -> (N, K, D, H, W).

    All slices go through the network as one batch. A network that returns a list in training gives a list.

    Args:
        network: with the attributes `multiple` and `checkpointing`, which the result has, too.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.multiple = (1, *network.multiple)

    @property
    def checkpointing(self) -> bool:
        return self.network.checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        self.network.checkpointing = value

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        check_image(image, image.shape[1] if image.ndim > 1 else 1, ndim=3)
        batch, depth = image.shape[0], image.shape[2]
        outputs = self.network(image.transpose(1, 2).flatten(0, 1))

        def volume(logits: Tensor) -> Tensor:
            return logits.unflatten(0, (batch, depth)).transpose(1, 2)

        return [volume(o) for o in outputs] if isinstance(outputs, (list, tuple)) else volume(outputs)
