"""The network of this task, by flag values and from checkpoints."""

from pathlib import Path

import torch
from torch import nn

from common import checkpoints
from common.checkpoints import TrainedModel
from common.files import check_keys, check_numbers
from common.hardware import Precision
from common.mit_weights import backbone_of, encoder_weights
from common.pretrained import read_weights
from common.slices import check_slice_notes
from common.splits import PARTS
from common.wetr import WeTr

# Flags that decide the shape of the weights or what they mean; a run can only be resumed with the same ones.
ARCHITECTURE = ("backbone", "pooling", "cam_stages", "contrast_weight")


def get_model(config: dict) -> WeTr:
    """The network that `config` (flag values, as in a checkpoint) names.

    It must hold backbone and pooling, and may hold num_classes, embedding_dim, cam_stages, contrast_weight,
    seg_detach, drop_path and checkpointing; what is missing or None is WeTr's default.
    """
    names = ("num_classes", "embedding_dim", "cam_stages", "seg_detach", "drop_path", "checkpointing")
    options = {name: config[name] for name in names if config.get(name) is not None}
    contrast = bool(config.get("contrast_weight"))
    return WeTr(config["backbone"], pooling=config["pooling"], token_contrast=contrast, **options)


def load_trained(weights: str | Path, device: torch.device, precision: Precision) -> TrainedModel:
    """Rebuild a network from a checkpoint of dist_train.py, or from weights of AFA's.

    The shapes of AFA's weights tell the backbone; the pooling is taken to be gmp, AFA's default, and their
    `preprocessing` holds None for what nobody knows.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, refused, or weights of something else.
    """
    found = checkpoints.load_tensors(weights)
    if isinstance(found, dict) and "config" in found:
        return checkpoints.load_trained(weights, device, precision, _network_of)
    named = read_weights(weights)
    try:
        config = {"backbone": backbone_of(encoder_weights(named)[0]), "pooling": "gmp"}
        config["num_classes"] = len(named["decoder.linear_pred.bias"])
        config["embedding_dim"] = len(named["decoder.linear_c1.proj.bias"])
        network = get_model(config)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{weights}: neither a checkpoint of wsss_medical/dist_train.py nor weights of AFA's network "
            f"({error}); an encoder alone is for --pretrained of dist_train.py"
        ) from error
    checkpoints.load_weights(network, named, str(weights))
    preprocessing = {"dataset": None, "pixel_mm": None, "step": 1, "channels": None}
    split = {"train": [], "val": [], "test": []}
    return TrainedModel(network.to(device).eval(), config, device, precision, preprocessing, split)


def _network_of(checkpoint: dict) -> nn.Module:
    if (found := checkpoint.get("stage", "another task")) != "wsss_medical":
        raise ValueError(f"not weights of wsss_medical/dist_train.py but of {found}; swapped?")
    notes = checkpoint["preprocessing"]
    check_slice_notes(notes, "preprocessing")
    check_keys(notes, {"threshold": dict | None, "data_path": str | None}, "preprocessing")
    check_keys(checkpoint["split"], dict.fromkeys(PARTS, list), "split")
    thresholds, scales = (notes.get("threshold") or {}).values(), checkpoint["config"].get("scales") or []
    for name, values in (("threshold", list(thresholds)), ("scales", scales)):
        check_numbers(values, len(values), f"{name} in it")
    return get_model(checkpoint["config"])
