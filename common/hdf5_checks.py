"""What a preprocessed case must look like before anything is read from it; see hdf5.py for its contents."""

from pathlib import Path

import numpy as np

FORMAT_VERSION = 1
IMAGE_DTYPES = ("int16", "uint8", "uint16", "float16", "float32")
# A chunk cache of 64 MB made random patches no faster (128^3 in 5.0 to 5.6 ms with 0, 1 and 64 MB) and would
# be held for image and label of every open file; 1 MB keeps 64 open files of a worker cheap.
CACHE_BYTES = 1 << 20
AGAIN = "run preprocessing again for this case"


def open_file(path: Path):
    """The h5py file of a case, after checking all that reading relies on; nothing is read from other files.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, not a case of this project, of a newer format, compressed with a filter that is
            not installed, or a part of it is a link or lies in another file.
    """
    try:
        import hdf5plugin  # noqa: F401  registers Blosc2; must come before the file is opened
    except ImportError:
        pass
    import h5py

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; run preprocessing first")
    try:
        # No locking: file systems of clusters often have none, and nothing is ever written in place.
        file = h5py.File(path, "r", locking=False, rdcc_nbytes=CACHE_BYTES)
    except OSError as error:
        with path.open("rb") as start:
            known = start.read(8) == b"\x89HDF\r\n\x1a\n"
        reason = "truncated or still being written" if known else "not an HDF5 file, or cut off at the start"
        raise ValueError(f"{path}: {reason} ({error}); {AGAIN}") from error
    try:
        _check_content(file, path)
    except (KeyError, OSError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged ({error}); {AGAIN}") from error
    return file


def _check_content(file, path: Path) -> None:
    """ValueError: no case of this project, or one that cannot be read here; else what h5py raises."""
    import h5py

    version = file.attrs.get("format_version", 0)
    version = int(version) if np.ndim(version) == 0 and np.isreal(version) else 0
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format {version}, but this code reads up to {FORMAT_VERSION}; update it, or {AGAIN}"
        )
    if version < 1 or not {"image", "index", "attributes"} <= set(file):
        raise ValueError(f"{path}: an HDF5 file, but not a preprocessed case of this project; {AGAIN}")
    image = own_dataset(file, "image", f"{path}: image")
    if image.ndim not in (3, 4) or 0 in image.shape or image.dtype.name not in IMAGE_DTYPES:
        raise ValueError(f"{path}: image {image.dtype} {image.shape} is none of this project; {AGAIN}")
    if "label" in set(file):  # unlike `in file` also where it is a link that leads nowhere
        label = own_dataset(file, "label", f"{path}: label")
        if label.shape != image.shape[-3:] or label.dtype != np.uint8:
            raise ValueError(
                f"{path}: label {label.dtype} {label.shape}, expected uint8 {image.shape[-3:]}; {AGAIN}"
            )
    for name in ("index", "attributes"):
        if not isinstance(file.get(name, getlink=True), h5py.HardLink) or not isinstance(
            file[name], h5py.Group
        ):
            raise ValueError(f"{path}: {name} leads elsewhere or is no group, which is refused; {AGAIN}")
    filters = image.id.get_create_plist()
    for number in range(filters.get_nfilters()):
        if not h5py.h5z.filter_avail(filters.get_filter(number)[0]):
            raise ValueError(
                f"{path}: compressed with {file.attrs.get('compression')}, which is not installed here; "
                f"pip install hdf5plugin, or {AGAIN}"
            )


def own_dataset(group, name: str, what: str):
    """A dataset whose bytes lie in this very file: no link, no raw file and no other HDF5 file behind it.

    A link in a stranger's file could show any file of this machine as voxels.

    Raises:
        ValueError: it is something else; `what` stands in front.
    """
    import h5py

    link, found = group.get(name, getlink=True), None
    if isinstance(link, h5py.HardLink):
        found = group[name]
    if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
        raise ValueError(f"{what} leads to another file or is no dataset, which is refused; {AGAIN}")
    return found
