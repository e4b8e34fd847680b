"""Networks and losses of this task by name, and a trained model with what it needs to predict."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common import losses
from common.hardware import Precision, autocast
from common.memory import Plan, fit_plan, training_peak_mib
from common.networks import AttentionUNet, UNet
from common.runs import load_checkpoint
from lung_tumor.slices import fit_to_square, normalise, probs_from_square

NUM_CLASSES = 2  # background, tumour
MODELS = ("AttentionUNet", "UNet")
LOSSES = ("dice_bce", "dice", "ce", "balanced_ce", "focal_tversky")
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
        base_features=config["base_features"],
        bilinear=config["bilinear"],
        norm=config["norm"],
        deep_supervision=config["deep_supervision"],
        checkpointing=config["checkpointing"],
    )


def get_loss(
    name: str, ce_weight: float = 1.0, dice_weight: float = 1.0, tumour_weight: float = 0.5
) -> Callable[..., Tensor]:
    """A function (logits, target) -> scalar.

    dice_bce is the seed's name for balanced cross-entropy + Dice on the softmax; no binary cross-entropy in
    it. Lists of logits (deep supervision) are weighted by DEEP_SUPERVISION_WEIGHTS.
    """

    def dice_bce(logits: Tensor, target: Tensor) -> Tensor:
        ce = losses.balanced_cross_entropy(logits, target, foreground_weight=tumour_weight)
        return ce_weight * ce + dice_weight * losses.dice_loss(logits, target)

    def balanced_ce(logits: Tensor, target: Tensor) -> Tensor:
        return losses.balanced_cross_entropy(logits, target, foreground_weight=tumour_weight)

    loss: Callable[[Tensor, Tensor], Tensor] = {
        "dice_bce": dice_bce,
        "dice": losses.dice_loss,
        "ce": losses.cross_entropy,
        "balanced_ce": balanced_ce,
        "focal_tversky": losses.focal_tversky_loss,
    }[name]

    def over_scales(logits: Tensor | list[Tensor], target: Tensor) -> Tensor:
        if isinstance(logits, Tensor):
            return loss(logits, target)
        return sum(w * loss(x, target) for w, x in zip(DEEP_SUPERVISION_WEIGHTS, logits, strict=True))

    return over_scales


def training_trial(
    network: nn.Module, loss_function: Callable[..., Tensor], shape: tuple[int, int], device: torch.device
) -> Callable[[torch.dtype | None], None]:
    """A function that computes one training step in the given precision, to be timed; `network` stays as it
    is.

    Args:
        shape: (batch size, image size).
    """

    def trial(dtype: torch.dtype | None) -> None:
        copy = deepcopy(network).train()
        image = torch.zeros(shape[0], 1, shape[1], shape[1], device=device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = copy(image.contiguous(memory_format=torch.channels_last))
        loss_function(logits, torch.zeros_like(image[:, 0], dtype=torch.long)).backward()

    return trial


def plan_memory(
    config: dict, precision: Precision, loss_function: Callable[..., Tensor]
) -> tuple[Plan, list[tuple[Plan, float]]]:
    """What the flags ask for, or with `vram` the next best that fits a card of so many GiB; and
    [(plan, predicted MiB of a step), ...] of all that were considered. The image size stays.

    Raises:
        ValueError: nothing fits.
    """

    def peak_mib(plan: Plan) -> float:
        return training_peak_mib(
            lambda: get_model(config | {"checkpointing": plan.checkpointing}),
            loss_function,
            (plan.batch_size, 1, *plan.patch_size),
            dtype=precision.dtype,
        )

    sides = (config["image_size"],) * 2
    batch = config["batch_size"], config["accumulate"]
    wanted = Plan(sides, *batch, config["checkpointing"], precision.name)
    if config["vram"]:
        return fit_plan(wanted, peak_mib, config["vram"], shrink_patch=False)
    return wanted, [(wanted, peak_mib(wanted))]


@dataclass
class TrainedModel:
    """A network in evaluation mode, and how its input was made."""

    network: nn.Module
    config: dict
    device: torch.device
    precision: Precision
    preprocessing: dict
    split: dict[str, list[str]]

    @property
    def image_size(self) -> int:
        return self.config["image_size"]

    @property
    def window_hu(self) -> tuple[float, float]:
        """HU that became 0 and 255 in training.

        Raises:
            ValueError: trained on plain images, so that HU have no meaning for it.
        """
        if not self.preprocessing.get("window_hu"):
            raise ValueError(
                "these weights were trained on plain images without a known HU window, so they cannot be "
                "applied to scans; convert the training data with lung_tumor/preprocess.py"
            )
        low, high = self.preprocessing["window_hu"]
        return low, high


def load_trained(weights: str | Path, device: torch.device, precision: Precision) -> TrainedModel:
    """Rebuild the network from a checkpoint of train.py; the averaged weights if the run kept them.

    Raises:
        FileNotFoundError, ValueError: missing, refused, or not a checkpoint of this task.
    """
    state = load_checkpoint(weights, device)
    config = state["config"]
    if config.get("model") not in MODELS or "preprocessing" not in state:
        raise ValueError(
            f"{weights}: not a checkpoint of lung_tumor/train.py (model {config.get('model')!r})"
        )
    network = get_model(config).to(device, memory_format=torch.channels_last)
    network.load_state_dict(state["ema"]["average"] if state.get("ema") else state["model"])
    return TrainedModel(network.eval(), config, device, precision, state["preprocessing"], state["split"])


@torch.inference_mode()
def predict_slices(
    model: TrainedModel, slices: np.ndarray | list[np.ndarray], batch_size: int = 4
) -> Iterator[np.ndarray]:
    """Tumour probability of each slice at its own size, one after the other.

    Args:
        slices: uint8 (n, h, w), or a list of (h, w).

    Yields:
        float32 (h, w) in [0, 1].
    """
    for start in range(0, len(slices), batch_size):
        batch = [fit_to_square(s, model.image_size) for s in slices[start : start + batch_size]]
        images = normalise(np.stack(batch)).unsqueeze(1).to(model.device, memory_format=torch.channels_last)
        with autocast(model.device, model.precision):
            logits = model.network(images)
        probs = logits.float().softmax(dim=1)[:, 1].cpu().numpy()
        for prob, original in zip(probs, slices[start : start + batch_size], strict=True):
            yield probs_from_square(prob, original.shape)
