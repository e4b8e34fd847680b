"""Preprocessed cases, an HDF5 file for each: image, label, attributes, and places worth drawing patches from.

    write_case("case.h5", image, label, attributes={"spacing_mm": (1, 1, 1)}, index=location_index(label))
    case = CaseFile("case.h5")  # opens nothing yet: safe to build before the data workers start
    patch = case.read_image((10, -5, 0), (128, 128, 128))

In the file: datasets `image` and `label`; a group `index` with (n, 3) places by name (common/patches.py); a
group `attributes` (geometry and preprocessing). Only this module and hdf5_checks.py use h5py and hdf5plugin.
"""

import io
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from common.files import check_numbers, printable, replacing
from common.hdf5_checks import AGAIN, FORMAT_VERSION, IMAGE_DTYPES, open_file, own_dataset

# Side of a chunk in voxels. A random 128^3 patch of CT costs 5.5 ms of CPU time, 7.7 ms with chunks of 64^3.
CHUNK = 32
MAX_OPEN_FILES = 64  # of one process; opening a file again takes 0.4 ms
JSON_MARK = "json:"

# Open files of this process, and the places read from each, by id(CaseFile); least recently used first.
# A forked worker inherits its parent's, which must not be used there: _open_in tells the process.
_open: OrderedDict[int, tuple[Any, dict[str, np.ndarray]]] = OrderedDict()
_open_in = 0


def write_case(
    path: str | Path,
    image: np.ndarray,
    label: np.ndarray | None = None,
    *,
    attributes: dict[str, Any],
    index: dict[str, np.ndarray] | None = None,
) -> str:
    """Write one case, whole or not at all.

    Args:
        image: (z, y, x) or (c, z, y, x), one of IMAGE_DTYPES. CT belongs in int16: float16 takes more space.
        label: (z, y, x) uint8.
        attributes: str, numbers, bool, None, numeric arrays, and lists or dicts of plain values (kept as
            JSON, so a tuple comes back as a list). `spacing_mm` (z y x) is what `CaseFile.spacing_mm` reads.
        index: (n, 3) places z y x by name, as from `location_index` of common/patches.py.

    Returns:
        the compression used: blosc2 if hdf5plugin is installed, else gzip.

    Raises:
        ValueError: wrong shape or dtype, or an attribute that cannot be stored.
        OSError: the file cannot be written, e.g. the disk is full. An older file of this name stays.
    """
    import h5py

    path = Path(path)
    if image.ndim not in (3, 4) or 0 in image.shape or image.dtype.name not in IMAGE_DTYPES:
        raise ValueError(
            f"{path}: image {image.dtype} {image.shape}, expected (z, y, x) or (c, z, y, x) of one of "
            f"{', '.join(IMAGE_DTYPES)}"
        )
    shape = image.shape[-3:]
    if label is not None and (label.shape != shape or label.dtype != np.uint8):
        raise ValueError(f"{path}: label {label.dtype} {label.shape}, expected uint8 {shape}")
    used, options = _filter_options()
    chunks = tuple(min(CHUNK, n) for n in shape)

    # Built in memory (as large as the file, 58 MB for 320 x 320 x 512 of CT): when the disk is full, HDF5
    # itself cannot close its file and the interpreter dies of it, while a plain write raises an OSError.
    content = io.BytesIO()
    with h5py.File(content, "w", libver=("v110", "v110")) as file:
        file.attrs["format_version"], file.attrs["compression"] = FORMAT_VERSION, used
        image_chunks = (1,) * (image.ndim - 3) + chunks
        file.create_dataset("image", data=image, chunks=image_chunks, **options)
        if label is not None:
            file.create_dataset("label", data=label, chunks=chunks, **options)
        places = file.create_group("index")
        for name, found in (index or {}).items():
            places[name] = _checked_places(found, shape, f"{path}: index {name!r}")
        stored = file.create_group("attributes").attrs
        for name, value in attributes.items():
            stored[name] = _to_attribute(value, f"{path}: attribute {name!r}")

    try:
        with replacing(path, sync=True) as partial:
            partial.write_bytes(content.getbuffer())
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            error.errno,
            f"{path}: could not be written ({reason}); nothing finished is lost: "
            "make room or choose another folder, then run the same command again",
        ) from error
    return used


class _Attributes(dict):
    """Attributes of a case; one that the file lacks is a ValueError with the name of the file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __missing__(self, name: str) -> NoReturn:
        raise ValueError(f"{self.path}: has no attribute {name}; {AGAIN}")


class CaseFile:
    """A case written by `write_case`, opened read-only at the first use in each process.

    Cheap to build, to pickle and to hold in thousands: a process keeps the MAX_OPEN_FILES files used last
    open. Forked and spawned workers open their own. Not for several threads at once.

    Every access may raise FileNotFoundError, or ValueError for a file that is truncated, not a case, of a
    newer format, or compressed with a filter that is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._attributes: dict[str, Any] | None = None

    def __reduce__(self):
        return CaseFile, (self.path,)

    def __repr__(self) -> str:
        return f"CaseFile({str(self.path)!r})"

    def __del__(self) -> None:
        if _open_in == os.getpid():
            _open.pop(id(self), None)

    @property
    def image(self):
        """The h5py dataset (z, y, x) or (c, z, y, x): has `.shape` and `.dtype`, reads what is sliced."""
        return self._opened()[0]["image"]

    @property
    def label(self):
        """The h5py dataset (z, y, x) uint8; ValueError: the case has none."""
        if not self.has_label:
            raise ValueError(f"{self.path}: has no label; it was preprocessed for prediction only")
        return self._opened()[0]["label"]

    @property
    def has_label(self) -> bool:
        return "label" in self._opened()[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(z, y, x) in voxels, without channels."""
        return self.image.shape[-3:]

    @property
    def attributes(self) -> dict[str, Any]:
        """What `write_case` was given; numpy numbers come back as Python's, tuples as lists."""
        if self._attributes is None:
            self._attributes = _Attributes(self.path)
            try:
                for name, value in self._opened()[0]["attributes"].attrs.items():
                    self._attributes[name] = _from_attribute(value)
            except (OSError, ValueError, RuntimeError, RecursionError, TypeError) as error:
                self._attributes = None
                raise ValueError(f"{self.path}: its attributes cannot be read ({error}); {AGAIN}") from error
        return self._attributes

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size z y x."""
        found, what = self.attributes["spacing_mm"], f"{self.path}: attribute spacing_mm"
        z, y, x = check_numbers(list(found) if np.ndim(found) else found, 3, what, above=0)
        return z, y, x

    @property
    def index_names(self) -> tuple[str, ...]:
        """Names in the location index, also those without a single place."""
        return tuple(self._opened()[0]["index"])

    def locations(self, name: str) -> np.ndarray:
        """(n, 3) uint16 places z y x of the index; ValueError: no such name."""
        file, places = self._opened()
        if name not in places:
            if name not in file["index"]:
                raise ValueError(f"{self.path}: index has no {name!r}, only {', '.join(self.index_names)}")
            what = f"{self.path}: index {name!r}"
            dataset = own_dataset(file["index"], name, what)
            places[name] = _checked_places(self._slice(dataset, ()), self.shape, what)
        return places[name]

    def read_image(self, start: Sequence[int], shape: Sequence[int]) -> np.ndarray:
        """Box of `shape` voxels from `start`, both z y x, in the file's dtype; (c, *shape) with channels.

        The box may reach beyond the volume or lie outside of it; there the nearest voxel of the volume is
        repeated. Prediction (common/inference.py) and augmentation (common/augment.py) do the same, so that a
        network sees beyond the border of a scan what it saw there in training.
        """
        return self._read(self.image, start, shape)

    def read_label(self, start: Sequence[int], shape: Sequence[int], num_labels: int = 256) -> np.ndarray:
        """Box of the label like `read_image`, uint8; beyond the volume the nearest label is repeated too.

        A repeated voxel looks like the one that it repeats. Called background there, it would teach the
        network that what looks like, say, the end of a cut vertebra is background.

        Raises:
            ValueError: a label that is not below `num_labels`, which a loss would count in the wrong place.
        """
        label = self._read(self.label, start, shape)
        if num_labels < 256 and label.max() >= num_labels:
            raise ValueError(f"{self.path}: label {label.max()}, at most {num_labels - 1} is known; {AGAIN}")
        return label

    def close(self) -> None:
        """Close the file and forget what was read; the next use opens it again."""
        self._attributes = None
        _drop_inherited()
        file, _ = _open.pop(id(self), (None, None))
        if file is not None:
            file.close()

    def _opened(self) -> tuple[Any, dict[str, np.ndarray]]:
        """The h5py file and the places read so far, which are let go with it: 1.5 MB for 26 labels."""
        _drop_inherited()
        if id(self) not in _open:
            _open[id(self)] = open_file(self.path), {}
            if len(_open) > MAX_OPEN_FILES:
                _open.popitem(last=False)  # h5py closes it once no dataset of it is in use
        _open.move_to_end(id(self))
        return _open[id(self)]

    def _read(self, dataset, start: Sequence[int], shape: Sequence[int]) -> np.ndarray:
        volume, start, shape = dataset.shape[-3:], [int(s) for s in start], [int(n) for n in shape]
        if len(start) != 3 or len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"{self.path}: box from {start} of {shape}, expected z y x and sizes above 0")
        inside, around = [], [(0, 0)] * (dataset.ndim - 3)
        for first, length, size in zip(start, shape, volume, strict=True):
            low = min(max(first, 0), size - 1)  # one voxel at least, where the box lies outside
            high = max(min(first + length, size), low + 1)
            missing = length - (high - low)
            before = min(max(low - first, 0), missing)
            inside.append(slice(low, high))
            around.append((before, missing - before))
        box = self._slice(dataset, tuple(inside))
        return np.pad(box, around, mode="edge") if np.any(around) else box

    def _slice(self, dataset, inside: tuple[slice, ...]) -> np.ndarray:
        try:
            return dataset[(..., *inside)]
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{self.path}: damaged, voxels {inside} cannot be read; {AGAIN}") from error


def _filter_options() -> tuple[str, dict]:
    """(compression used, options of h5py's create_dataset)."""
    try:
        from hdf5plugin import Blosc2
    except ImportError:
        return "gzip", {"compression": "gzip", "compression_opts": 1, "shuffle": True}
    # Bit-shuffle makes CT 10 % smaller, and a 128^3 patch costs 7.3 instead of 5.5 ms of CPU time.
    return "blosc2", dict(Blosc2(cname="lz4", clevel=5, filters=Blosc2.SHUFFLE))


def _checked_places(places: np.ndarray, shape: tuple[int, ...], what: str) -> np.ndarray:
    if places.ndim != 2 or places.shape[1] != 3 or places.dtype.kind not in "iu":
        raise ValueError(f"{what}: {places.dtype} {places.shape}, expected integers (n, 3)")
    if len(places) and (places.min() < 0 or (places.max(axis=0) >= shape).any()):
        raise ValueError(f"{what}: places up to {places.max(axis=0)} outside the volume {shape}")
    return places.astype(np.uint16)


def _to_attribute(value: Any, what: str) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise ValueError(f"{what}: an array of {value.dtype}; only numbers and bool, lists for text")
        return value
    if isinstance(value, str) and _stays_text(value):
        return value
    if isinstance(value, bool | int | float | np.generic) and not isinstance(value, str):
        return value
    try:
        # None, lists, dicts, and text that looks as if it had been stored in this way
        return JSON_MARK + json.dumps(value, default=np.generic.item)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: cannot be stored ({error}); use plain values") from error


def _stays_text(text: str) -> bool:
    """Whether HDF5 can keep a text as it is, and `_from_attribute` does not take it for JSON."""
    return printable(text) == text and not text.startswith(JSON_MARK) and "\0" not in text


def _from_attribute(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(JSON_MARK):
        return json.loads(value[len(JSON_MARK) :])
    return value.item() if isinstance(value, np.generic) else value


def _drop_inherited() -> None:
    """In a forked worker: let go of the parent's files, of which it would share state and position."""
    global _open_in
    if _open_in != os.getpid():
        _open.clear()
        _open_in = os.getpid()
