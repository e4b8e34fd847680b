"""Random changes of a batch of 3-D patches, on the device that holds it (CPU or GPU).

    image, label = augment_batch(image, label, Augmentation3d(scale=0.1), seeds, spacing_mm)

Rotation, scale and elastic deformation together read the patch once: linearly for images and soft targets,
nearest for labels. Flips read nothing in between. Then image only: noise, blur, brightness, contrast, low
resolution, gamma, in the order of nnU-Net (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z); ranges and
probabilities differ.
Each item depends on its own seed and patch, not on the rest of the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.warp import sampling_grid, warp

Triple = tuple[float, float, float]
# A cubic B-spline field is one to one while no control point moves by more than this share of their spacing
# (Choi and Lee 2000, doi:10.1006/gmod.1999.0514: 1 / 2.48 in 3-D).
FOLDING_SHARE = 0.4


def grey_value_probabilities(probability: float) -> dict[str, float]:
    """Keywords of `Augmentation3d` that give noise, blur, brightness, contrast and gamma one probability."""
    changes = ("noise", "blur", "brightness", "contrast", "gamma")
    return {f"{change}_probability": probability for change in changes}


@dataclass(frozen=True)
class Augmentation3d:
    """What may happen to a patch. Triples are z y x; probabilities in [0, 1], drawn for each item by itself.

    Attributes:
        flip_probability: of each axis. 0 unless asked for: a flip along x needs `swap_labels` wherever left
            and right have labels of their own.
        swap_labels: label pairs exchanged when x is flipped, e.g. ((2, 3),) for left and right kidney; of
            soft targets the channels with these numbers.
        spatial_probability: of rotation and scale, together.
        rotation_deg: +- largest angle about the z, y and x axis, uniform. Angles hold in mm: shapes are not
            sheared on anisotropic voxels.
        scale: size times uniform 1 +- scale, the same for all axes; in [0, 1).
        elastic_probability: of the elastic deformation, with or without rotation and scale.
        elastic_mm: largest displacement of a control point along each axis, uniform +-; at most 0.4 of the
            grid, so that nothing folds. The standard deviation of the field is about a fifth of it.
        elastic_grid_mm: distance of the control points of the cubic B-spline.
        noise_sd: largest standard deviation of Gaussian noise, uniform from 0; units of the image.
        blur_mm: lowest and highest standard deviation of the Gaussian, uniform.
        brightness: +- largest shift, uniform; units of the image.
        contrast: factor 1 +- contrast about the mean of each channel, uniform; in [0, 1].
        low_resolution: lowest and highest factor, uniform, >= 1, by which voxels are made coarser, then fine
            again, along one axis, drawn with equal chance: thick slices.
        gamma: lowest and highest exponent, > 0, uniform in its logarithm.
        value_range: grey values that gamma keeps; values outside pass through it unchanged.

    Raises:
        ValueError: a value out of its range.
    """

    flip_probability: Triple = (0.0, 0.0, 0.0)
    swap_labels: tuple[tuple[int, int], ...] = ()
    spatial_probability: float = 0.5
    rotation_deg: Triple = (15.0, 15.0, 15.0)
    scale: float = 0.15
    elastic_probability: float = 0.2
    elastic_mm: float = 7.5
    elastic_grid_mm: float = 24.0
    noise_probability: float = 0.15
    noise_sd: float = 0.1
    blur_probability: float = 0.15
    blur_mm: tuple[float, float] = (0.5, 1.5)
    brightness_probability: float = 0.15
    brightness: float = 0.1
    contrast_probability: float = 0.15
    contrast: float = 0.25
    low_resolution_probability: float = 0.2
    low_resolution: tuple[float, float] = (1.5, 3.0)
    gamma_probability: float = 0.2
    gamma: tuple[float, float] = (0.7, 1.5)
    value_range: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("probability"):
                values = value if isinstance(value, (tuple, list)) else (value,)
                bad = [p for p in values if not 0 <= p <= 1]
                num_values = 3 if name == "flip_probability" else 1
                if bad or len(values) != num_values:
                    form = "a number in 0..1" if len(values) == 1 else "z y x, each in 0..1"
                    raise ValueError(f"{name} {value}: expected {form}")
        paired = [value for pair in self.swap_labels for value in pair]
        tests = {
            "rotation_deg": len(self.rotation_deg) == 3 and min(self.rotation_deg) >= 0,
            "scale": 0 <= self.scale < 1,
            "elastic_grid_mm": self.elastic_grid_mm > 0,
            "elastic_mm": 0 <= self.elastic_mm <= FOLDING_SHARE * self.elastic_grid_mm,
            "noise_sd": self.noise_sd >= 0,
            "blur_mm": _is_range(self.blur_mm, 0),
            "brightness": self.brightness >= 0,
            "contrast": 0 <= self.contrast <= 1,
            "low_resolution": _is_range(self.low_resolution, 1),
            "gamma": _is_range(self.gamma, 1e-3),
            "value_range": _is_range(self.value_range) and self.value_range[0] < self.value_range[1],
            "swap_labels": all(len(pair) == 2 for pair in self.swap_labels)
            and len(paired) == len(set(paired)),
        }
        hint = {
            "elastic_mm": f"at most {FOLDING_SHARE} of elastic_grid_mm ({self.elastic_grid_mm}), or it folds",
            "swap_labels": "each label may stand in one pair only",
        }
        for name, passed in tests.items():
            if not passed:
                value = getattr(self, name)
                raise ValueError(f"{name} {value}: {hint.get(name, 'out of range; see Augmentation3d')}")


def _is_range(pair: Sequence[float], lowest: float = -math.inf) -> bool:
    return len(pair) == 2 and lowest <= pair[0] <= pair[1] < math.inf


def augment_batch(
    image: Tensor,
    label: Tensor | None,
    settings: Augmentation3d,
    seeds: Sequence[int],
    spacing_mm: Triple = (1.0, 1.0, 1.0),
) -> tuple[Tensor, Tensor | None]:
    """Change each item by its seed; the inputs stay as they are.

    Parameters and elastic fields are drawn on the CPU: the same on each device. Noise is drawn on the device
    of the image, so a GPU adds other noise than the CPU. An item's elastic field also depends on the shape
    and spacing of its patch.

    Args:
        image: (N, C, D, H, W), scaled to about `settings.value_range`; half precision is taken as float32.
            All channels of an item change alike, but for the noise itself.
        label: (N, D, H, W) integers up to 2^24, or a soft target (N, K, D, H, W) of floats, or None.
        seeds: N integers.
        spacing_mm: voxel size, z y x.

    Returns:
        (image float32, label in its dtype), of the given shapes. What is read from beyond the edge of the
        patch repeats the edge, in both. Grey values may leave `value_range` (noise, brightness, contrast).

    Raises:
        ValueError: shapes, dtypes, number of seeds or spacing that do not fit.
    """
    _check(image, label, seeds, spacing_mm, settings)
    new_image = torch.empty(image.shape, dtype=torch.float32, device=image.device)
    new_label = None if label is None else torch.empty_like(label)
    # Half precision under a caller's autocast would blur the coordinates.
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        for i, seed in enumerate(seeds):
            drawn = draw(settings, int(seed), image.shape[2:], spacing_mm)
            item, target = image[i].float(), None if label is None else label[i]
            new_image[i], target = _change_space(item, target, drawn, settings, spacing_mm)
            _change_grey_values(new_image[i], drawn, settings, spacing_mm)
            if new_label is not None:
                new_label[i] = target
    return new_image, new_label


def draw(settings: Augmentation3d, seed: int, shape: Sequence[int], spacing_mm: Triple) -> dict:
    """What happens to the item of this seed: the amount of each change, or None where it does not happen.

    Every number is drawn whether used or not, so that switching one change off leaves the others as they are.
    `shape` (D, H, W) and `spacing_mm` say how many control points the elastic field has.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

    def maybe(probability: float, low: float, high: float) -> float | None:
        happens, amount = uniform(0, 1) < probability, uniform(low, high)
        return amount if happens else None

    flip = tuple(uniform(0, 1) < probability for probability in settings.flip_probability)
    spatial = uniform(0, 1) < settings.spatial_probability
    rotation_deg = tuple(uniform(-limit, limit) for limit in settings.rotation_deg)
    scale = uniform(1 - settings.scale, 1 + settings.scale)
    log_gamma = maybe(settings.gamma_probability, math.log(settings.gamma[0]), math.log(settings.gamma[1]))
    drawn = {
        "flip": flip,
        "rotation_deg": rotation_deg if spatial else (0.0, 0.0, 0.0),
        "scale": scale if spatial else 1.0,
        "noise_sd": maybe(settings.noise_probability, 0, settings.noise_sd),
        "noise_seed": int(torch.randint(2**62, (), generator=generator)),
        "blur_mm": maybe(settings.blur_probability, *settings.blur_mm),
        "brightness": maybe(settings.brightness_probability, -settings.brightness, settings.brightness),
        "contrast": maybe(settings.contrast_probability, 1 - settings.contrast, 1 + settings.contrast),
        "low_resolution": maybe(settings.low_resolution_probability, *settings.low_resolution),
        "low_resolution_axis": int(torch.randint(3, (), generator=generator)),
        "gamma": None if log_gamma is None else math.exp(log_gamma),
        "elastic_mm": None,
    }
    if uniform(0, 1) < settings.elastic_probability:  # last: how many numbers it takes depends on the shape
        points = [
            math.ceil(n * mm / settings.elastic_grid_mm) + 3 for n, mm in zip(shape, spacing_mm, strict=True)
        ]
        drawn["elastic_mm"] = (2 * torch.rand(*points, 3, generator=generator) - 1) * settings.elastic_mm
    return drawn


def _change_space(
    image: Tensor, label: Tensor | None, drawn: dict, settings: Augmentation3d, spacing_mm: Triple
) -> tuple:
    """Flip (C, D, H, W) and its label, then rotate, scale and deform both by the same grid."""
    soft = label is not None and label.is_floating_point()
    if axes := [axis for axis in range(3) if drawn["flip"][axis]]:
        image = image.flip([1 + axis for axis in axes])
        if label is not None:
            label = label.flip([label.ndim - 3 + axis for axis in axes])
            if 2 in axes:
                label = _swapped(label, settings.swap_labels)
    if any(drawn["rotation_deg"]) or drawn["scale"] != 1 or drawn["elastic_mm"] is not None:
        grid = sampling_grid(
            image.shape[1:],
            spacing_mm,
            drawn["rotation_deg"],
            drawn["scale"],
            drawn["elastic_mm"],
            settings.elastic_grid_mm,
            image.device,
        )
        image = warp(image, grid, "bilinear")
        if label is not None:
            whole = label.float() if soft else label.float().unsqueeze(0)
            whole = warp(whole, grid, "bilinear" if soft else "nearest")
            label = (whole if soft else whole.squeeze(0)).to(label.dtype)
    return image, label


def _swapped(label: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Exchange the labels of each pair, or the channels of a soft target."""
    new = label.clone()
    for a, b in pairs:
        if label.is_floating_point():
            new[a], new[b] = label[b], label[a]
        else:
            new[label == a], new[label == b] = b, a
    return new


def _change_grey_values(image: Tensor, drawn: dict, settings: Augmentation3d, spacing_mm: Triple) -> None:
    """Change (C, D, H, W) float32 in place: noise, blur, brightness, contrast, low resolution, gamma."""
    shape = image.shape[1:]
    if drawn["noise_sd"] is not None:
        generator = torch.Generator(image.device).manual_seed(drawn["noise_seed"])
        noise = torch.empty_like(image).normal_(generator=generator)
        image.add_(noise, alpha=drawn["noise_sd"])
    if drawn["blur_mm"] is not None:
        _mix_along(
            image, [_blur_matrix(n, drawn["blur_mm"] / mm) for n, mm in zip(shape, spacing_mm, strict=True)]
        )
    if drawn["brightness"] is not None:
        image.add_(drawn["brightness"])
    if drawn["contrast"] is not None:
        mean = image.mean(dim=(1, 2, 3), keepdim=True)
        image.mul_(drawn["contrast"]).add_(mean, alpha=1 - drawn["contrast"])
    if drawn["low_resolution"] is not None:
        axis, matrices = drawn["low_resolution_axis"], [None, None, None]
        matrices[axis] = _coarse_matrix(shape[axis], drawn["low_resolution"])
        _mix_along(image, matrices)
    if drawn["gamma"] is not None:
        low, high = settings.value_range
        share = image.sub(low).div_(high - low).clamp_(0, 1)
        image.add_(share.pow(drawn["gamma"]).sub_(share), alpha=high - low)  # + 0 outside the range


def _mix_along(image: Tensor, matrices: Sequence[Tensor | None]) -> None:
    """Multiply (C, D, H, W) in place by an (in, out) matrix along z, y and x each; None leaves an axis."""
    for equation, matrix in zip(("cihw,io->cohw", "cdiw,io->cdow", "cdhi,io->cdho"), matrices, strict=True):
        if matrix is not None:
            image.copy_(torch.einsum(equation, image, matrix.to(image.device)))


def _blur_matrix(n: int, sigma: float) -> Tensor:
    """(n, n) Gaussian weights, sigma in voxels; those beyond the edge are shared among those inside."""
    position = torch.arange(n, dtype=torch.float64)
    weights = torch.exp(-0.5 * ((position[:, None] - position) / max(sigma, 1e-3)) ** 2)
    return (weights / weights.sum(0)).float()


def _coarse_matrix(n: int, factor: float) -> Tensor:
    """(n, n): average n voxels into n / factor, then interpolate these linearly back to n."""
    coarse = F.interpolate(torch.eye(n)[None], size=max(1, round(n / factor)), mode="area")
    return F.interpolate(coarse, size=n, mode="linear", align_corners=False)[0]


def _check(
    image: Tensor, label: Tensor | None, seeds: Sequence[int], spacing_mm: Triple, settings: Augmentation3d
) -> None:
    if image.ndim != 5 or 0 in image.shape or not image.is_floating_point():
        raise ValueError(
            f"image {tuple(image.shape)} of {image.dtype}: expected floats (N, C, D, H, W), none of them 0"
        )
    if len(seeds) != len(image):
        raise ValueError(f"{len(seeds)} seeds for {len(image)} items; give one seed for each item")
    if len(spacing_mm) != 3 or not all(0 < mm < math.inf for mm in spacing_mm):
        raise ValueError(f"spacing_mm {tuple(spacing_mm)}: expected z y x, each above 0")
    if label is None:
        return
    soft = label.is_floating_point()
    if label.ndim != 4 + soft or len(label) != len(image) or label.shape[-3:] != image.shape[2:]:
        form = "a soft target (N, K, D, H, W)" if soft else "labels (N, D, H, W)"
        raise ValueError(
            f"label {tuple(label.shape)} of {label.dtype} does not fit image {tuple(image.shape)} as {form}"
        )
    if soft and settings.swap_labels and max(map(max, settings.swap_labels)) >= label.shape[1]:
        raise ValueError(
            f"swap_labels {settings.swap_labels}: the soft target has only {label.shape[1]} channels"
        )
    if label.device != image.device:
        raise ValueError(f"label on {label.device}, image on {image.device}; move both to one device")
