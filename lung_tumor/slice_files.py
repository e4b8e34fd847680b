"""Slices on disk and the notes beside them; see dataset.py for the layout."""

from dataclasses import dataclass
from pathlib import Path

from common.files import check_keys, check_numbers, read_json
from common.splits import natural_key
from lung_tumor.slices import IMAGE_SUFFIXES

AGAIN = "convert the data again with lung_tumor/preprocess.py"
# What an entry of volumes.json holds, and how many numbers stand in its lists.
ENTRY = {"source": dict, "stamp": list, "kept": list, "num_slices": int, "voxel_mm3": float}
ENTRY |= {"shape_zyx": list, "spacing_mm": list}
LISTS = {"shape_zyx": 3, "spacing_mm": 3, "slice_shape": 2}


@dataclass(frozen=True)
class SliceFile:
    """One slice: volume it belongs to, its number in the volume, image and label files."""

    volume: str
    number: int
    image: Path
    label: Path


def parse_slice_name(stem: str) -> tuple[str, int]:
    """'lung_001_slice_0042' -> ('lung_001', 42). A name without '_slice_' is a volume of its own."""
    volume, separator, number = stem.rpartition("_slice_")
    return (volume, int(number)) if separator and number.isdecimal() else (stem, 0)


def list_slices(data_path: str | Path) -> list[SliceFile]:
    """All slices in natural order.

    Raises:
        FileNotFoundError: no images/ or labels/ folder.
        ValueError: empty, or an image without label or the reverse; names them.
    """
    data_path = Path(data_path)
    files = {}
    for kind in ("images", "labels"):
        if not (data_path / kind).is_dir():
            raise FileNotFoundError(
                f"{data_path}: no folder {kind}/; make it with lung_tumor/preprocess.py --out {data_path}, "
                "or try --data_path demo"
            )
        found = (p for p in (data_path / kind).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        files[kind] = {}
        for path in found:
            if path.name.startswith("."):
                continue
            if path.stem in files[kind]:
                raise ValueError(f"{path}: there is also {files[kind][path.stem].name}; keep one of the two")
            files[kind][path.stem] = path
    images, labels = files["images"], files["labels"]
    if not images and not labels:
        raise ValueError(f"{data_path}: images/ and labels/ are empty; run lung_tumor/preprocess.py")
    for ours, others, kind in ((images, labels, "label"), (labels, images, "image")):
        missing = sorted(ours.keys() - others.keys(), key=natural_key)
        if missing:
            raise ValueError(
                f"{data_path}: {len(missing)} slice(s) without {kind}, first {missing[0]}; "
                "add the files or remove their partners"
            )
    return [SliceFile(*parse_slice_name(s), images[s], labels[s]) for s in sorted(images, key=natural_key)]


def read_notes(data_path: str | Path, name: str) -> dict:
    """dataset.json or volumes.json of a data set; {} when absent."""
    path = Path(data_path) / name
    return read_json(path, advice=AGAIN) if path.is_file() else {}


def read_volumes(data_path: str | Path) -> dict[str, dict]:
    """volumes.json of a data set: {volume: its entry}, after checking what is read of it; {} when absent.

    Raises:
        ValueError: with the volume and the key that are not as they should be.
    """
    path = Path(data_path) / "volumes.json"
    volumes = read_notes(data_path, path.name)
    for name, entry in volumes.items():
        where = f'{path}: "{name}"'
        check_keys(entry, ENTRY, where, advice=AGAIN)
        check_numbers(entry["kept"], len(entry["kept"]), f'{where}: "kept"')
        for key, count in LISTS.items():
            if key in entry:  # an earlier version knows no slice_shape
                check_numbers(entry[key], count, f'{where}: "{key}"')
    return volumes


def training_slices(slices: list[SliceFile], volumes: dict) -> list[SliceFile]:
    """The slices that volumes.json names for training (`kept`); all slices if `volumes` is {}."""
    chosen = {name: set(entry["kept"]) for name, entry in volumes.items()}
    return [s for s in slices if s.volume not in chosen or s.number in chosen[s.volume]]
