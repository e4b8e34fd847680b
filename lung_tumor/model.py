"""Networks and losses of this task by name, and a trained network applied to slices."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common import checkpoints, losses
from common.checkpoints import TrainedModel
from common.files import check_keys, check_numbers, check_sizes
from common.hardware import Precision, autocast
from common.hu import check_window
from common.networks import AttentionUNet, UNet
from common.slices import resize, shape_at
from lung_tumor.slices import fit_to_square, normalise, probs_from_square

NUM_CLASSES = 2  # background, tumour
MODELS = ("AttentionUNet", "UNet")
LOSSES = ("dice_bce", "dice", "ce", "balanced_ce", "focal_tversky")
LOSS_WEIGHTS = ("ce_weight", "dice_weight", "tumour_weight", "empty_weight")  # flags, see `get_loss`
# Weights of the losses at strides 1, 2, 4, 8 under deep supervision.
DEEP_SUPERVISION_WEIGHTS = (1.0, 0.4, 0.2, 0.1)
# Flags that decide the shape of the weights; a run can only be resumed with the same ones.
ARCHITECTURE = ("model", "base_features", "bilinear", "norm", "deep_supervision")


def get_model(config: dict) -> nn.Module:
    """The network that `config` (flag values, as in a checkpoint) names: (N, 1, h, w) -> (N, 2, h, w)."""
    network = {"UNet": UNet, "AttentionUNet": AttentionUNet}[config["model"]]
    return network(
        in_channels=1,
        num_classes=NUM_CLASSES,
        width=config["base_features"],
        bilinear=config["bilinear"],
        norm=config["norm"],
        deep_supervision=config["deep_supervision"],
        checkpointing=config["checkpointing"],
    )


def get_loss(
    name: str,
    ce_weight: float = 1.0,
    dice_weight: float = 1.0,
    tumour_weight: float = 0.5,
    empty_weight: float = 1.0,
) -> Callable[..., Tensor]:
    """A function (logits, target) -> scalar.

    dice_bce is balanced cross-entropy + Dice on the softmax; the project that this task grew from called it
    so, although it holds no binary cross-entropy. Lists of logits (deep supervision) are weighted by
    DEEP_SUPERVISION_WEIGHTS. The weights are those of train.py's flags.
    """

    def dice(logits: Tensor, target: Tensor) -> Tensor:
        return losses.dice_loss(logits, target, empty_weight=empty_weight)

    def dice_bce(logits: Tensor, target: Tensor) -> Tensor:
        ce = losses.balanced_cross_entropy(logits, target, foreground_weight=tumour_weight)
        return ce_weight * ce + dice_weight * dice(logits, target)

    def balanced_ce(logits: Tensor, target: Tensor) -> Tensor:
        return losses.balanced_cross_entropy(logits, target, foreground_weight=tumour_weight)

    loss: Callable[[Tensor, Tensor], Tensor] = {
        "dice_bce": dice_bce,
        "dice": dice,
        "ce": losses.cross_entropy,
        "balanced_ce": balanced_ce,
        "focal_tversky": losses.focal_tversky_loss,
    }[name]

    def over_scales(logits: Tensor | list[Tensor], target: Tensor) -> Tensor:
        if isinstance(logits, Tensor):
            return loss(logits, target)
        return sum(w * loss(x, target) for w, x in zip(DEEP_SUPERVISION_WEIGHTS, logits, strict=True))

    return over_scales


def window_hu(model: TrainedModel) -> tuple[float, float]:
    """HU that became 0 and 255 in training.

    Raises:
        ValueError: trained on plain images, so that HU have no meaning for it.
    """
    if not model.preprocessing.get("window_hu"):
        raise ValueError(
            "these weights were trained on plain images without a known HU window, so they cannot be "
            "applied to scans; convert the training data with lung_tumor/preprocess.py"
        )
    low, high = model.preprocessing["window_hu"]
    return low, high


def load_trained(weights: str | Path, device: torch.device, precision: Precision) -> TrainedModel:
    """Rebuild the network from a checkpoint of train.py; the averaged weights if the run kept them.

    Raises:
        FileNotFoundError, ValueError: missing, refused, or not a checkpoint of this task.
    """
    return checkpoints.load_trained(weights, device, precision, _network_of)


def _network_of(checkpoint: dict) -> nn.Module:
    config = checkpoint["config"]
    is_ours = config.get("model") in MODELS and all(key in config for key in ARCHITECTURE)
    if not is_ours or "preprocessing" not in checkpoint:
        raise ValueError(f"not a checkpoint of lung_tumor/train.py (model {config.get('model')!r})")
    if "stage" in checkpoint:
        raise ValueError(f"not a checkpoint of lung_tumor/train.py but of {checkpoint['stage']}")
    notes = checkpoint["preprocessing"]
    check_keys(notes, {"data_path": str}, "preprocessing")
    check_window(notes.get("window_hu"), "window_hu in it")
    for key in ("pixel_mm", "scale"):
        if notes.get(key) is not None:
            check_numbers([notes[key]], 1, f"{key} in it", above=0)
    for key in ("image_size", "batch_size"):
        check_sizes([config[key]], 1, f"{key} in it")
    return get_model(config).to(memory_format=torch.channels_last)


def predict_slices(
    model: TrainedModel,
    slices: np.ndarray | list[np.ndarray],
    batch_size: int = 4,
    pixel_size_mm: tuple[float, float] | None = None,
) -> Iterator[np.ndarray]:
    """Tumour probability of each slice at its own size, one after the other.

    The network sees every slice at the pixel size of its training. A slice larger than the square of the
    training is shown whole, and fewer of them at a time.

    Args:
        slices: uint8 (n, h, w), or a list of (h, w), all of one shape.
        pixel_size_mm: of the slices, (row, column). None, or a model that was trained on slices of unknown
            pixel size: the pixels are taken to be those of the training slices.

    Yields:
        float32 (h, w) in [0, 1].
    """
    own_shape, scale = slices[0].shape, model.preprocessing.get("scale")
    shape = own_shape
    if pixel_size_mm is not None and model.preprocessing.get("pixel_mm"):
        shape = shape_at(own_shape, pixel_size_mm, model.preprocessing["pixel_mm"])
    shown = fit_to_square(np.zeros(shape, np.uint8), model.config["image_size"], scale)
    batch_size = max(1, batch_size * model.config["image_size"] ** 2 // shown.size)
    for start in range(0, len(slices), batch_size):
        batch = [resize(s, shape) for s in slices[start : start + batch_size]]
        squares = np.stack([fit_to_square(s, model.config["image_size"], scale) for s in batch])
        for probs in predict_squares(model, squares):
            yield resize(probs_from_square(probs, shape, model.config["image_size"], scale), own_shape)


@torch.inference_mode()
def predict_squares(model: TrainedModel, squares: np.ndarray) -> np.ndarray:
    """Tumour probability, float32 (n, h, w), of squares from `fit_to_square`, uint8 of that shape."""
    images = normalise(squares).unsqueeze(1).to(model.device, memory_format=torch.channels_last)
    with autocast(model.device, model.precision):
        logits = model.network(images)
    return logits.float().softmax(dim=1)[:, 1].cpu().numpy()
