"""Weights that others trained, read without running code; `common.checkpoints.load_weights` loads them."""

from pathlib import Path

from torch import Tensor

from common.checkpoints import load_tensors, without_wrappers

HOLDERS = ("state_dict", "model")  # keys under which a file may hold its weights
MOST_HOLDERS = 3  # one within the other; in a damaged file they may go round in a circle


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file, by name, on the CPU.

    Args:
        path: .safetensors, or what torch.save wrote since torch 1.6 (.pth, .pt, .bin): the weights themselves
            or a dictionary that holds them as "state_dict" or "model". What `without_wrappers` takes from a
            name is left out.

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
    for _ in range(MOST_HOLDERS):
        inside = [found[h] for h in HOLDERS if isinstance(found, dict) and isinstance(found.get(h), dict)]
        found = inside[0] if inside else found
    if not isinstance(found, dict) or not any(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path}: holds no weights by name")
    return {without_wrappers(str(n)): value for n, value in found.items() if isinstance(value, Tensor)}


def first_names(names: list[str]) -> str:
    """The first three of a list of names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
