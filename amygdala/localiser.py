"""Where in a head the amygdalae are: a small network that looks at the whole scan in coarse voxels.

Of each of the two structures it gives a map of the whole scan; where its softmax over all voxels is highest,
there is the middle of the structure. It never sees a label when a scan is predicted. One is trained for each
fold, before the segmentation, and is kept in the checkpoints of the fold.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from amygdala.head import add_surroundings
from amygdala.structures import DATASETS
from common.augment import Augmentation3d, augment_batch
from common.checkpoints import TrainedModel, load_weights
from common.ema import WeightAverage
from common.hardware import Precision, autocast
from common.hdf5 import CaseFile
from common.intensity import scale_by_own_values
from common.networks import UNet
from common.schedules import learning_rate
from common.training import optimizer_step
from common.volumes import Box, box_around, resample, resample_labels, resampled_shape

SPACING_MM = 4.0
GRID = (48, 56, 48)  # of training: 192 x 224 x 192 mm, a brain and what is around it
APART = 6  # voxels: the right structure lies at least 24 mm right of the left one
LEAST = 32  # voxels of an axis that the network needs, which halves them four times
WIDTH = 8
SIGMA_MM = 6.0  # of the blob that is asked for around the middle of a structure
BATCH, LR = 2, 3e-3
SURROUNDINGS = 0.5  # share of the training heads that get a made-up skull
SHIFT = 4  # voxels, by which a training head lies elsewhere in the grid
AUGMENTATION = Augmentation3d(
    spatial_probability=0.9,
    rotation_deg=(20, 20, 20),
    scale=0.2,
    elastic_probability=0,
    noise_probability=0.3,
    noise_sd=0.3,
    brightness_probability=0.3,
    brightness=0.3,
    contrast_probability=0.3,
    gamma_probability=0.5,
    gamma=(0.6, 1.7),
    value_range=(-3, 3),
)


def make_network() -> nn.Module:
    """Scores (N, 2, d, h, w) of the two structures from a coarse head (N, 1, d, h, w)."""
    return UNet(1, 2, width=WIDTH, norm="instance", ndim=3)


def coarse(image: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """A scan (z, y, x) in voxels of 4 mm, float32."""
    shape = resampled_shape(image.shape, spacing_mm, (SPACING_MM,) * 3)
    return resample(image, shape).astype(np.float32)


class Heads:
    """Coarse training heads and the middles of their structures, in memory: a head takes 1 MiB."""

    def __init__(self, cases: Sequence[CaseFile]) -> None:
        self.images, self.labels = [], []
        for case in cases:
            self.images.append(coarse(case.image[...], case.spacing_mm))
            self.labels.append(resample_labels(case.label[...], self.images[-1].shape).astype(np.uint8))

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Image and label of a head, somewhere in the middle of the grid."""
        number = int(rng.integers(len(self.images)))
        image, label = self.images[number], self.labels[number]
        if rng.random() < SURROUNDINGS:
            image = add_surroundings(image, SPACING_MM, rng)
        for axis, size in enumerate(GRID):
            shift = int(rng.integers(-SHIFT, SHIFT + 1))
            image, label = (_fit(array, axis, size, shift) for array in (image, label))
        return image, label


def _fit(array: np.ndarray, axis: int, size: int, shift: int) -> np.ndarray:
    """Cut or repeat the edges of an axis so that it has `size` voxels, moved by `shift`."""
    places = np.arange(size) + (array.shape[axis] - size) // 2 + shift
    return np.take(array, places.clip(0, array.shape[axis] - 1), axis)


def target_maps(label: Tensor) -> tuple[Tensor, Tensor]:
    """Blobs (N, 2, d, h, w) with sum 1 around the middles of labels 1 and 2; whether both are there (N,)."""
    axes = [torch.arange(n, device=label.device, dtype=torch.float32) for n in label.shape[1:]]
    maps, complete = [], []
    for item in label:
        found = [(item == k).nonzero().float() for k in (1, 2)]
        complete.append(all(len(voxels) > 0 for voxels in found))
        middles = [voxels.mean(0) if len(voxels) else torch.zeros(3, device=label.device) for voxels in found]
        blobs = []
        for z, y, x in middles:
            lines = [
                torch.exp(-0.5 * ((axis - c) * SPACING_MM / SIGMA_MM) ** 2)
                for axis, c in zip(axes, (z, y, x), strict=True)
            ]
            blob = torch.einsum("z,y,x->zyx", *lines)
            blobs.append(blob / blob.sum())
        maps.append(torch.stack(blobs))
    return torch.stack(maps), torch.tensor(complete, device=label.device)


def localiser_loss(scores: Tensor, maps: Tensor, complete: Tensor) -> Tensor:
    """Cross-entropy between the softmax of the scores over all voxels and the blobs; mean over the heads
    that are complete."""
    log_shares = F.log_softmax(scores.float().flatten(2), dim=2)
    loss = -(log_shares * maps.flatten(2)).sum(2).mean(1)
    return (loss * complete).sum() / complete.sum().clamp(min=1)


def train_localiser(
    cases: Sequence[CaseFile], device: torch.device, precision: Precision, seed: int, updates: int
) -> dict:
    """Train on whole heads; returns what `find_middles` needs, as plain values and tensors.

    Args:
        cases: training cases with both structures.
    """
    started = time.perf_counter()
    heads, rng = Heads(cases), np.random.default_rng(seed)
    network = make_network().to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.scaler)
    average = WeightAverage(network, 0.98)
    recent = []
    for update in tqdm(range(updates), "localiser", unit="update", disable=None, leave=False):
        drawn = [heads.draw(rng) for _ in range(BATCH)]
        image = torch.from_numpy(np.stack([head[0] for head in drawn]))[:, None].to(device)
        label = torch.from_numpy(np.stack([head[1] for head in drawn])).to(device)
        seeds = rng.integers(2**31, size=BATCH).tolist()
        image, label = augment_batch(scale_by_own_values(image), label, AUGMENTATION, seeds)
        maps, complete = target_maps(label)
        with autocast(device, precision):
            scores = network(image)
        loss = localiser_loss(scores, maps, complete)
        scaler.scale(loss).backward()
        lr = learning_rate("warmup_cosine", update / updates, LR, 0.0, 0.05)
        optimizer_step(network, optimizer, scaler, lr, 1.0, average)
        recent.append(loss.detach())
    network.load_state_dict(average.average)
    last = torch.stack(recent[-50:]).mean().item()
    state = {name: value.cpu() for name, value in network.state_dict().items()}
    return {"state": state, "seconds": time.perf_counter() - started, "loss": last}


def load_localiser(state: dict, device: torch.device) -> nn.Module:
    """The network of a checkpoint, ready to predict."""
    network = make_network()
    load_weights(network, state["state"], "the localiser")
    return network.to(device).eval()


@torch.inference_mode()
def find_middles(
    network: nn.Module, image: np.ndarray, spacing_mm: Sequence[float], device: torch.device
) -> np.ndarray:
    """Middles (2, 3) of structures 1 (left) and 2 (right) in voxels z y x of the scan (z, y, x).

    The two sides look alike, so that each map may be high on both: the best pair of which the second lies to
    the right of the first counts.
    """
    small = coarse(image, spacing_mm)
    padded = np.pad(small, [(0, max(0, LEAST - n)) for n in small.shape], mode="edge")
    scores = network(scale_by_own_values(torch.from_numpy(padded)[None, None].to(device)))[0].float()
    depth, height, width = small.shape
    scores = scores[:, :depth, :height, :width]
    highest = scores.amax((1, 2))  # (2, width)
    pairs = highest[0][:, None] + highest[1]
    allowed = torch.ones_like(pairs).triu(min(APART, width - 1)) > 0
    columns = divmod(int(pairs.masked_fill(~allowed, -torch.inf).argmax()), width)
    shares = scores.flatten(1).softmax(1).reshape(scores.shape)
    middles = []
    for share, column in zip(shares, columns, strict=True):
        # The mean over the peak's neighbourhood is more exact than a voxel of 4 mm.
        peak = (*np.unravel_index(int(share[..., column].argmax()), (depth, height)), column)
        near = [slice(max(0, p - 3), p + 4) for p in peak]
        part = share[tuple(near)].double()
        grids = torch.meshgrid(
            *(torch.arange(s.start, s.start + n) for s, n in zip(near, part.shape, strict=True)),
            indexing="ij",
        )
        middles.append([float((part * grid.to(part)).sum() / part.sum()) for grid in grids])
    factors = np.divide(image.shape, small.shape)
    return (np.array(middles) + 0.5) * factors - 0.5


def find_box(model: TrainedModel, image: np.ndarray, spacing_mm: Sequence[float]) -> Box:
    """(start, stop) in voxels z y x of the part of a scan that the segmentation network is to search.

    As large as the network's patch, around the middle between the two structures that the localiser finds; of
    a data set without a localiser all of the scan.
    """
    if not DATASETS[model.preprocessing["dataset"]].localised:
        return (0, 0, 0), tuple(image.shape)
    network = load_localiser(model.preprocessing["localiser"], model.device)
    middle = find_middles(network, image, spacing_mm, model.device).mean(0)
    return box_around(
        middle, model.config["patch_size"], model.preprocessing["spacing_mm"], image.shape, spacing_mm
    )
