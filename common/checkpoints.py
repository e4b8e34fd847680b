"""Checkpoints, written whole or not at all, read without running code; trained networks and random states."""

import contextlib
import pickle
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common import distributed
from common.faults import first_line
from common.files import check_keys, check_names, replacing
from common.hardware import Precision
from common.splits import PARTS


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write tensors and plain values so that a reader never sees half a file; rank 0 only.

    Whatever goes wrong, the previous checkpoint of that name survives.

    Raises:
        TypeError: `state` holds something that `torch.load(weights_only=True)` would refuse; names where.
        OSError: disk full or no permission.
    """
    if not distributed.is_main():
        return
    _require_plain(state, "checkpoint")
    path = Path(path)
    for left_over in path.parent.glob(f".partial_*_{path.name}"):  # a process was killed while it wrote it
        left_over.unlink()
    try:
        # Through a file object: torch's own writing to a path does not tell why it failed.
        with replacing(path, sync=True) as partial, partial.open("wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a failed write into RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else None
        reason = reason or first_line(error)
        what_is_left = f"the earlier {path.name} is untouched" if path.exists() else "nothing was written"
        raise OSError(
            f"{path}: checkpoint could not be written ({reason}); {what_is_left}. Free space or check "
            "permissions, then go on with --resume"
        ) from error


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """Read a checkpoint of this project without ever running code from it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it carries code or foreign objects, is damaged, or was not written by this project.
    """
    state = load_tensors(path, device)
    if not isinstance(state, dict) or "model" not in state or "config" not in state:
        raise ValueError(f"{path}: holds no 'model' and 'config'; it was not written by this project")
    check_keys(state, {"model": dict, "config": dict}, str(path))
    return state


def load_tensors(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """Read tensors and plain values, whoever saved them (torch 1.6 or later); never runs code from the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it carries code or foreign objects, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    with path.open("rb") as file:
        is_zip = zipfile.is_zipfile(file)
    if not is_zip:  # also torch.save's format before 1.6, a bare pickle
        raise ValueError(
            f"{path}: refused, because it is truncated, damaged or not a checkpoint at all; a bare pickle "
            "could run code. Only checkpoints written by this project are opened"
        )
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} in it is damaged")
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many types here; each ends as one clear sentence
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            raise ValueError(
                f"{path}: refused, because it holds more than tensors and plain values and loading it could "
                "run code from the file. Only checkpoints written by this project are opened"
            ) from error
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        detail = first_line(error)
        raise ValueError(f"{path}: not a readable checkpoint ({detail})") from error


def _require_plain(value: Any, where: str) -> None:
    """Exact types, since reading with weights_only refuses most subclasses, a defaultdict for one."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _require_plain(key, f"the key {key!r} of {where}")
            _require_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, torch.Size):
        for index, item in enumerate(value):
            _require_plain(item, f"{where}[{index}]")
    elif type(value) not in (type(None), bool, int, float, str, torch.Tensor, nn.Parameter):
        raise TypeError(
            f"{where} is a {type(value).__name__}; checkpoints hold tensors and plain values only"
        )


# ---- trained networks ----


@dataclass
class TrainedModel:
    """A network, and how its input was made.

    Attributes:
        config: flag values of its training run.
        preprocessing: what the task's preprocessing noted: spacing_mm, window_hu ...
        split: {"train", "val", "test"}: names of the cases.
    """

    network: nn.Module
    config: dict
    device: torch.device
    precision: Precision
    preprocessing: dict
    split: dict[str, list[str]]


def require_stage(checkpoint: dict, stage: str, models: Collection[str], script: str) -> None:
    """Refuse the checkpoint of another script.

    Args:
        stage: what its "stage" must be; models: what its "model" may be.
        script: that writes such checkpoints, for the message.

    Raises:
        ValueError: it is that of something else.
    """
    found = checkpoint.get("stage", "another task")
    if found != stage or checkpoint["config"].get("model") not in models:
        raise ValueError(f"not weights of {script} but of {found}; swapped?")


@contextlib.contextmanager
def naming_damage(what: str) -> Iterator[None]:
    """What goes wrong inside because a checkpoint lacks a part, or one is of a wrong type, ends as ValueError
    in one sentence with `what` in front. A ValueError passes as it is."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        detail = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"{what}: a part is missing or damaged ({detail}); take another checkpoint, or train again"
        ) from error


WRAPPERS = ("_orig_mod.", "module.")  # what torch.compile and DistributedDataParallel put in front of names


def load_weights(network: nn.Module, state: Any, what: str) -> None:
    """Give a network its weights, also those of one that was compiled or trained on several cards.

    They must be exactly those that it has, in names and shapes; else the network stays as it was.

    Args:
        state: {name: tensor}.
        what: names the file in error messages.

    Raises:
        ValueError: names or shapes are not those of the network, or a weight is NaN or infinite.
    """
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{what}: holds no weights, {{name: tensor}} was expected")
    own = network.state_dict()
    if set(state) != set(own):
        state = {without_wrappers(str(name)): value for name, value in state.items()}
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or surplus:
        examples = [
            f"{names[0]} is {kind}" for names, kind in ((missing, "missing"), (surplus, "new")) if names
        ]
        raise ValueError(
            f"{what}: the weights do not fit the network: {len(missing)} of its {len(own)} names are "
            f"missing, {len(surplus)} are unknown ({', '.join(examples)}); were they made by other flags or "
            "other code?"
        )
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"{what}: the weights do not fit the network: {name} has shape {tuple(value.shape)}, not "
                f"{tuple(own[name].shape)}; were they made by other flags or other code?"
            )
        if not value.isfinite().all():
            raise ValueError(
                f"{what}: {name} holds NaN or infinite weights, so that nothing can be computed with them; "
                "take an earlier checkpoint"
            )
    network.load_state_dict(state)


def without_wrappers(name: str) -> str:
    """The name of a weight as it is in the network itself: module.encoder.bias is encoder.bias."""
    for wrapper in WRAPPERS * 2:
        name = name.removeprefix(wrapper)
    return name.replace("._orig_mod.", ".")  # of parts that were compiled by themselves


def load_trained(
    weights: str | Path,
    device: torch.device,
    precision: Precision,
    make_network: Callable[[dict], nn.Module],
) -> TrainedModel:
    """Rebuild the network of a checkpoint, in evaluation mode; with averaged weights if the run kept them.

    Args:
        make_network: checkpoint -> its network without the weights; it raises ValueError for a checkpoint
            that is not the task's own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: refused by `load_checkpoint`, `make_network` or `load_weights`; names the file.
    """
    checkpoint = load_checkpoint(weights, device)
    with naming_damage(str(weights)):
        try:
            check_keys(checkpoint["config"], {"checkpointing": bool | str | None}, "config")
            network = make_network(checkpoint).to(device)
            expected = {"preprocessing": dict, "split": dict, "ema": dict | None}
            check_keys(checkpoint, expected, "what it holds")
            check_keys(checkpoint["preprocessing"], {"data_path": str | None}, "preprocessing")
            split = {part: checkpoint["split"].get(part, []) for part in PARTS}
            for part, names in split.items():
                check_names(names, f'"{part}" of its split')
            if averaged := checkpoint.get("ema"):
                check_keys(averaged, {"average": dict}, "its averaged weights")
        except ValueError as error:
            raise ValueError(f"{weights}: {error}") from error
    load_weights(network, averaged["average"] if averaged else checkpoint["model"], str(weights))
    return TrainedModel(
        network.eval(),
        checkpoint["config"],
        device,
        precision,
        checkpoint["preprocessing"],
        split,
    )


# ---- random states ----


def rng_state() -> dict:
    """States of all random generators as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": [
            str(name),
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict) -> None:
    """Put all random generators back to where `rng_state` found them."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
