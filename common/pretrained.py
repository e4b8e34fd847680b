"""Weights that others trained: read without running code, and loaded whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from common.checkpoints import load_tensors

WRAPPERS = ("state_dict", "model")  # keys under which a file may hold its weights


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file, by name, on the CPU.

    Args:
        path: .safetensors, or what torch.save wrote since torch 1.6 (.pth, .pt, .bin): the weights themselves
            or a dictionary that holds them as "state_dict" or "model". "module." before a name is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, refused because it could run code, or without weights.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            found = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable .safetensors file ({error})") from error
    else:
        found = load_tensors(path)
    while isinstance(found, dict) and (
        inside := [found[w] for w in WRAPPERS if isinstance(found.get(w), dict)]
    ):
        found = inside[0]
    if not isinstance(found, dict) or not any(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path}: holds no weights by name")
    return {name.removeprefix("module."): value for name, value in found.items() if isinstance(value, Tensor)}


def load_exactly(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights that are exactly those of `network`, in names and shapes; otherwise it stays as it was.

    Raises:
        ValueError: some are missing, unexpected or of another shape; names the first of each.
    """
    own = network.state_dict()
    problems = {
        "missing": sorted(own.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - own.keys()),
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if name in weights and weights[name].shape != own[name].shape
        ],
    }
    if any(problems.values()):
        found = [f"{what}: {first_names(names)}" for what, names in problems.items() if names]
        raise ValueError(f"the weights do not fit the network; {'; '.join(found)}")
    network.load_state_dict(dict(weights))


def first_names(names: list[str]) -> str:
    """The first three of a list of names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
