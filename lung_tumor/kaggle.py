"""The Kaggle set modaresimr/medical-image-segmentation: find a task, list its cases, read image and label.

    Task006_Lung/CT.zip             <case>.nii or <case>.nii.gz, one for each case
                 GroundTruth/       <case>.pkl: a pickled object of the package evalseg
                 Predictions/, metadata.json    not used

Opening a pickle in the ordinary way can run any program. Here nothing that it names is called: a name that a
label needs becomes a `_Record` of what was to be called, any other name is refused, and the numbers are
rebuilt from the records.
"""

import pickle
import re
import shutil
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from common.archives import leads_outside, require_space
from common.files import refuse_pipe, replacing
from common.nifti import case_name, is_nifti
from common.splits import natural_key

ALLOWED_NAMES = re.compile(
    r"numpy\._?core\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer)|numpy\.(ndarray|dtype|bool_?)"
    r"|numpy\.(u?int|float)[0-9]+|(builtins|__builtin__)\.(slice|object|bool|int|float)"
    r"|_codecs\.encode|(copyreg|copy_reg)\._reconstructor"
)


@dataclass(frozen=True)
class KaggleCase:
    """One case: `image_member` is the image's name inside CT.zip, `label_path` its pickle."""

    case_id: str
    image_member: str
    label_path: Path


def is_kaggle_folder(folder: str | Path) -> bool:
    """Whether the folder is a task of the Kaggle set or holds one, at most two levels down."""
    return bool(_task_folders(Path(folder)))


def find_task(folder: str | Path, task: str) -> Path:
    """The task folder in `folder` (or `folder` itself) whose name contains `task`; upper and lower case are
    not told apart.

    Raises:
        ValueError: not one or several match; the message lists the tasks that are there.
    """
    tasks = _task_folders(Path(folder))
    names = {path: path.resolve().name.casefold() for path in tasks}
    found = [path for path in tasks if task.casefold() in names[path]]
    found = [path for path in found if task.casefold() == names[path]] or found
    if len(found) != 1:
        there = ", ".join(str(path.resolve()) for path in tasks) or "no folder with CT.zip and GroundTruth/"
        problem = "several tasks match" if found else "no task matches"
        raise ValueError(f"{folder}: {problem} '{task}'. There: {there}. Give the full name of one task")
    return found[0]


def list_kaggle_cases(task_folder: str | Path) -> list[KaggleCase]:
    """All cases in natural order (2 before 10); macOS resource files are left out.

    Raises:
        ValueError: CT.zip is damaged or without a case, there are two images of one case, or an image or a
            label without the other.
    """
    folder = Path(task_folder)
    labels = {p.stem: p for p in (folder / "GroundTruth").glob("*.pkl") if not p.name.startswith(".")}
    images: dict[str, str] = {}
    problems = []
    with _open_archive(folder / "CT.zip") as archive:
        for member in archive.namelist():
            name = PurePosixPath(member).name
            if is_nifti(name) and "__MACOSX" not in member:
                if case_name(name) in images:
                    problems.append(f"{case_name(name)} (two images)")
                images[case_name(name)] = member
    problems += [f"{case} (image without label)" for case in images.keys() - labels.keys()]
    problems += [f"{case} (label without image)" for case in labels.keys() - images.keys()]
    if problems or not images:
        shown = ", ".join(sorted(problems, key=natural_key)[:10]) + (", ..." if len(problems) > 10 else "")
        raise ValueError(
            f"{folder}: {len(problems)} cases do not fit: {shown or 'no image in CT.zip'}. "
            "Download the task again or remove what does not belong there"
        )
    return [KaggleCase(case, images[case], labels[case]) for case in sorted(images, key=natural_key)]


def extract_image(task_folder: str | Path, case: KaggleCase, out_dir: str | Path) -> Path:
    """Extract the image of one case to `out_dir`/<its file name>, whole or not at all.

    Raises:
        ValueError: damaged or encrypted archive, or a member name that points outside of its folder.
    """
    source, member = Path(task_folder) / "CT.zip", case.image_member
    if leads_outside(member):
        raise ValueError(f"{source}: member {member!r} could be written outside of its folder; not unpacked")
    target = Path(out_dir) / PurePosixPath(member).name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(target) as partial, _open_archive(source) as archive:
            require_space(archive.getinfo(member).file_size, target.parent, f"{source}: {member}")
            with archive.open(member) as packed, open(partial, "wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
    except (KeyError, RuntimeError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the disk's fault; damaged bzip2 data is an OSError without a number
        raise ValueError(f"{source}: cannot unpack {member} ({error}); download the archive again") from error
    return target


def load_ground_truth(path: str | Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read the label map of a case; nothing that the pickle names is run.

    Args:
        path: GroundTruth/<case>.pkl with `shape` and `segments` (attributes or dict keys), or a list of
            segments. A segment has `roi`, a tuple of slices, and `data`, the values inside.
        shape: of the scan in its file's index order, nibabel's (x, y, z).

    Returns:
        uint8 of `shape`: the maximum over the segments at each voxel, 0 outside of all. A label of exactly
        the reverse shape is transposed.

    Raises:
        ValueError: the file names what could run code, is damaged, or its contents do not fit the scan.
    """
    refuse_pipe(path)
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file).load()
        content = {"segments": content} if isinstance(content, (list, tuple)) else _fields(content)
        segments = [_fields(segment) for segment in content["segments"]]
        stated = next((fields["shape"] for fields in (content, *segments) if "shape" in fields), shape)
        shape, stated = (tuple(_numbers(n).item() for n in lengths) for lengths in (shape, stated))
        if stated not in (shape, shape[::-1]):
            raise ValueError(f"its shape {stated} is neither the scan's {shape} nor the reverse")
        mask = np.zeros(stated, np.uint8)
        for segment in segments:
            _draw(segment, mask)
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile file can fail in any way
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path}: not a usable label ({reason[:300]}). Delete it, download it again"
        ) from error
    return mask if stated == shape else np.ascontiguousarray(mask.T)


def _draw(segment: dict, mask: np.ndarray) -> None:
    """Raise `mask` inside the segment's roi to the segment's values."""
    data = _numbers(segment["data"])
    roi = [_bounds(part, size) for part, size in zip(segment["roi"], mask.shape, strict=True)]
    box = mask[tuple(slice(*bounds) for bounds in roi)]
    if data.shape != box.shape:
        raise ValueError(f"segment with roi {roi} has data of shape {data.shape}, expected {box.shape}")
    if not ((data >= 0) & (data <= 255) & (data == np.rint(data))).all():  # NaN fails every comparison
        raise ValueError(f"segment with roi {roi} has values other than whole numbers in 0..255")
    if _numbers(segment.get("fill_value", 0)):
        raise ValueError(f"segment with roi {roi} fills its outside with something else than 0")
    np.maximum(box, data.astype(np.uint8), out=box)


class _Record:
    """What the pickle wants to be called, written down instead."""

    name = ""

    def __new__(cls, *args, **kwargs):
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __setstate__(self, state):
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Record]:
        full, foreign = f"{module}.{name}", re.fullmatch(r"evalseg(\.\w+)*", module) and name.isidentifier()
        if not foreign and not ALLOWED_NAMES.fullmatch(full):
            raise pickle.UnpicklingError(f"it names {full!r} and could run code, so it was not opened")
        return type("Record", (_Record,), {"name": "evalseg" if foreign else name})


def _fields(node: object) -> dict:
    """The attributes of a recorded object of evalseg, or a dict as it is."""
    if isinstance(node, _Record) and node.name in ("evalseg", "_reconstructor"):
        node = node.state
    if not isinstance(node, dict):
        raise ValueError(
            f"found {getattr(node, 'name', type(node).__name__)} where an object with attributes belongs"
        )
    return node


def _bounds(part: object, size: int) -> tuple[int, int]:
    """(start, stop) of one recorded slice along an axis of `size` voxels."""
    if getattr(part, "name", "") != "slice":
        raise ValueError(f"found {type(part).__name__} in a roi where a slice belongs")
    start, stop, step = (None if n is None else _numbers(n).item() for n in part.args)
    start, stop = start or 0, size if stop is None else stop
    if step not in (None, 1) or not 0 <= start <= stop <= size:
        raise ValueError(f"roi {start}:{stop}:{step} does not lie on an axis of {size} voxels")
    return start, stop


def _numbers(node: object) -> np.ndarray:
    """A number, or a recorded numpy scalar or array, as a numeric array."""
    if isinstance(node, (int, float, np.number)):
        return np.array(node)
    if not isinstance(node, _Record):
        raise ValueError(f"found {type(node).__name__} where numbers belong")
    if node.name == "_reconstruct":
        _, shape, dtype, fortran, data = node.state
    elif node.name == "scalar":
        (dtype, data), shape, fortran = node.args, (), False
    else:
        data, dtype, shape, fortran = node.args
    if isinstance(data, _Record) and data.name == "encode":  # how pickles before protocol 3 store bytes
        data = data.args[0].encode("latin1")
    code = f"{dtype.state[1]}{dtype.args[0]}"
    if not isinstance(data, (bytes, bytearray)) or not re.fullmatch(r"[<>=|](b1|[iu][1248]|f[248])", code):
        raise ValueError(f"an array of type {code!r} where plain numbers belong")
    array = np.frombuffer(data, code.replace("b1", "u1")) if data else np.empty(0)
    return array.reshape(shape, order="F" if fortran in (True, "F") else "C")


def _task_folders(folder: Path) -> list[Path]:
    def is_task(path):
        return (path / "CT.zip").is_file() and (path / "GroundTruth").is_dir()

    below = [*folder.glob("*"), *folder.glob("*/*")]
    return [folder] if is_task(folder) else sorted(filter(is_task, below))


def _open_archive(path: Path) -> zipfile.ZipFile:
    refuse_pipe(path)
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not a complete zip archive ({error}); download it again") from error
