"""Pixel-adaptive refinement (PAR): a coarse map is moved to the edges of the image that lies under it.

Ru et al. 2022, Learning affinity from attention, arXiv:2203.02664. Every pixel takes the weighted mean of 48
neighbours, 10 times; neighbours that look like the pixel weigh more. There is nothing to learn.
"""

from collections.abc import Sequence
from math import hypot

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIRECTIONS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
MOST_WEIGHTS = {"cpu": 1 << 22, "cuda": 1 << 26}  # held at a time: 16 MiB, near a CPU's caches, and 256 MiB


class PAR(nn.Module):
    """The refinement; a call is `par(image01, masks)`.

    Args:
        num_iter: how often the map is averaged.
        dilations: distances of the neighbours, in pixels; eight directions each.
        w1: contrast, in standard deviations of the 48 neighbours, at which a neighbour's weight falls to 1/e.
        w2: share of the weights by distance beside those by grey value.

    Differs from the paper: the weights are divided by 1 + w2, so that they sum to 1, a constant map stays as
    it is, and a probability stays a probability. Which class is the largest does not change.
    """

    def __init__(
        self,
        num_iter: int = 10,
        dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
        w1: float = 0.3,
        w2: float = 0.01,
    ) -> None:
        super().__init__()
        self.num_iter, self.w1, self.w2 = num_iter, w1, w2
        self.border = max(dilations)
        self.offsets = [(d * dy, d * dx) for d in dilations for dy, dx in DIRECTIONS]
        distance = torch.tensor([hypot(*offset) for offset in self.offsets])
        by_distance = (-((distance / (distance.std() + 1e-8) / w1) ** 2)).softmax(0)
        self.register_buffer("by_distance", by_distance, persistent=False)

    @torch.no_grad()
    def forward(self, image01: Tensor, masks: Tensor) -> Tensor:
        """Refined maps (N, K, H, W) float32, without gradient.

        Args:
            image01: (N, 3, H, W) with grey values from 0 to 1; any number of channels.
            masks: (N, K, h, w) of any size, brought to that of the image with corners aligned; of any sign.
        """
        image, (height, width) = image01.float(), image01.shape[2:]
        masks = F.interpolate(masks.float(), size=(height, width), mode="bilinear", align_corners=True)
        refined = torch.empty_like(masks)
        limit = MOST_WEIGHTS.get(image.device.type, MOST_WEIGHTS["cuda"])
        step = max(1, limit // (len(self.offsets) * height * width))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # waking others for each of many short steps costs more than they bring
        try:
            for start in range(0, len(image), step):
                some = slice(start, start + step)
                self._refine(self._weights(image[some]), masks[some], refined[some])
        finally:
            torch.set_num_threads(threads)
        return refined

    def _neighbours(self, padded: Tensor) -> list[Tensor]:
        """Views (..., H, W) of `padded`, which has a border on all sides: what lies at each offset."""
        b = self.border
        h, w = padded.shape[-2] - 2 * b, padded.shape[-1] - 2 * b
        return [padded[..., b + y : b + y + h, b + x : b + x + w] for y, x in self.offsets]

    def _weights(self, image: Tensor) -> Tensor:
        """(48, N, 1, H, W), of sum 1 over the neighbours."""
        if (image == image[:, :1]).all():
            image = image[:, :1]  # the mean over equal channels is that of one
        weights = image.new_zeros(len(self.offsets), len(image), 1, *image.shape[2:])
        difference = torch.empty_like(weights)
        for channel in image.split(1, dim=1):
            padded = F.pad(channel, (self.border,) * 4, mode="replicate")
            for neighbour, out in zip(self._neighbours(padded), difference, strict=True):
                torch.sub(neighbour, channel, out=out)
            variance = (difference - difference.mean(0)).square_().sum(0).div_(len(self.offsets) - 1)
            scale = variance.sqrt_().add_(1e-8).mul_(self.w1)  # std() takes five times as long
            weights.sub_(difference.div_(scale).square_(), alpha=1 / image.shape[1])
        weights = weights.softmax(0)
        weights += self.w2 * self.by_distance.view(-1, 1, 1, 1, 1)
        return weights.div_(1 + self.w2)

    def _refine(self, weights: Tensor, masks: Tensor, out: Tensor) -> None:
        """`masks` (N, K, H, W), averaged `num_iter` times, written to `out`."""
        out.copy_(masks)
        for _ in range(self.num_iter):
            padded = F.pad(out, (self.border,) * 4, mode="replicate")
            out.zero_()
            for weight, neighbour in zip(weights, self._neighbours(padded), strict=True):
                out.addcmul_(weight, neighbour)


def image01(image: Tensor) -> Tensor:
    """uint8 (n, 3, h, w) -> float32 in [0, 1], as PAR takes it."""
    return image.float() / 255
