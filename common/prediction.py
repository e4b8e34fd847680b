"""What scripts that write label maps have in common: flags, what is read of a scan, all scans in turn."""

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common import batch, distributed
from common.checkpoints import TrainedModel
from common.components import lies_left_of
from common.dicom import find_scans
from common.files import check_room, make_folder
from common.hardware import describe_device, peak_memory_mib
from common.inference import predict_labels, warn_of_memory
from common.losses import labelled_mask, merge_unlabelled
from common.mask_files import PROBABILITIES
from common.messages import warn
from common.nifti import NIFTI_SUFFIXES, NiftiFile, Scan, case_name, load_nifti, save_probability
from common.nifti_checks import check_memory
from common.volumes import Box, Triple, crop
from common.windows import MIB, PredictionPeak, prediction_peak_mib, reading_box

ROWS_PRINTED = 20
FLIPS = ((), (2,))  # of --tta: as it is, left to right
NEVER = -1e4  # logit of a class that no training case had labels for


def check_tta(model: TrainedModel) -> None:
    """ValueError if the network has never seen mirrored scans, of which it then makes nonsense.

    A network that was trained on CHAOS without them had a Dice of 0.91 on three held-out scans, with --tta
    0.87; of the liver 0.91 and 0.78.
    """
    if not model.config.get("flip_sides"):
        raise ValueError(
            "--tta averages over the mirrored scan, but this network was trained without mirrored scans "
            "(train.py --flip_sides 0), where it does badly; predict without --tta"
        )


def mirrored_classes(num_classes: int, sides: Sequence[tuple[int, int]]) -> list[int]:
    """For each class the one that it is in a mirror.

    Args:
        num_classes: with the background.
        sides: pairs of labels that change places when left and right are exchanged.
    """
    classes = list(range(num_classes))
    for a, b in sides:
        classes[a], classes[b] = b, a
    return classes


def check_ensemble(models: Sequence[TrainedModel], weights: Sequence[str | Path], num_classes: int) -> None:
    """ValueError if networks cannot be averaged; `weights` are their files, for the message.

    Args:
        num_classes: of networks whose configuration does not tell.
    """

    def described(model: TrainedModel) -> dict:
        return {
            "data set": model.preprocessing["dataset"],
            "spacing in mm": tuple(model.preprocessing["spacing_mm"]),
            "classes": model.config.get("num_classes", num_classes),
            "patch size": tuple(model.config["patch_size"]),
        }

    first = described(models[0])
    for model, path in zip(models[1:], weights[1:], strict=True):
        for what, value in described(model).items():
            if value != first[what]:
                raise ValueError(
                    f"--weights: {path} was trained with another {what} ({value}) than {weights[0]} "
                    f"({first[what]}), so their predictions cannot be averaged; name folds of one run"
                )


def mean_network(networks: Sequence[torch.nn.Module]) -> Callable[[torch.Tensor], torch.Tensor]:
    """(N, 1, d, h, w) -> (N, K, d, h, w) whose softmax is the mean of the networks' softmax.

    A single network is handed back as it is.
    """
    if len(networks) == 1:
        return networks[0]

    def predict(image: torch.Tensor) -> torch.Tensor:
        total = networks[0](image).float().log_softmax(1)
        for network in networks[1:]:
            total = torch.logaddexp(total, network(image).float().log_softmax(1))
        return total - math.log(len(networks))

    return predict


class Reading(NamedTuple):
    """The part of a scan that is read to predict a region of it.

    Attributes:
        image: (z, y, x) of the box from `start` to `stop` of the scan.
        start, stop: z y x, in voxels of the scan.
        region: (start, stop) in voxels of `image`.
        need: memory that the prediction takes, with the image, without the network.
    """

    image: np.ndarray
    start: Triple
    stop: Triple
    region: Box
    need: PredictionPeak

    def on_scan(self, labels: np.ndarray, file: NiftiFile) -> np.ndarray:
        """uint8 labels of `image` -> those of the whole scan, 0 where it was not read."""
        whole = np.zeros(file.shape, np.uint8)
        crop(whole, self.start, self.stop)[...] = labels
        return whole


def read_region(
    file: NiftiFile,
    region: Box,
    working_mm: Sequence[float],
    patch_size: Sequence[int],
    num_classes: int,
    *,
    batch_size: int,
    device: torch.device,
    source: str,
    scan: np.ndarray | None = None,
    smaller: str = "a smaller --batch_size, or a scan cut to the part that matters",
) -> Reading:
    """Read what is needed to predict a box of a scan, and print beforehand how much memory that will take.

    A region smaller than a patch is read with what is around it, see `reading_box`. ValueError if more
    memory is needed than is free.

    Args:
        working_mm, patch_size: spacing and patch of the network, z y x.
        source: where the region is from, such as "body", for the line that is printed.
        scan: (z, y, x) of the whole file, if it has been read already.
        smaller: what the script can be told to predict less at a time, for the message of too little memory.
    """
    start, stop = reading_box(region, file.shape, file.spacing_mm, working_mm, patch_size)
    shape = tuple(np.subtract(stop, start).tolist())
    peak = prediction_peak_mib(
        shape, file.spacing_mm, working_mm, patch_size, num_classes, batch_size=batch_size, device=device
    )
    need = PredictionPeak(peak.host_mib + 2 * math.prod(shape) / MIB, peak.device_mib)
    tqdm.write(
        f"{file.path.name}: {source}, {' x '.join(map(str, shape))} of {' x '.join(map(str, file.shape))} "
        f"voxels; scores and labels take up to {need.host_mib:,.0f} MiB of RAM, "
        f"{need.device_mib:,.0f} MiB of GPU memory, besides the network"
    )
    check_memory(f"{file.path}: predicting it", need.host_mib * MIB, f"it needs {smaller}")
    first, last = (tuple(np.subtract(corner, start).tolist()) for corner in region)
    image = file.read_box(start, stop) if scan is None else crop(scan, start, stop)
    return Reading(image, start, stop, (first, last), need)


def load_scan(path: Path) -> Scan:
    """Read a whole scan; ValueError if it is a single slice, or all of it has one value."""
    scan = load_nifti(path)
    if min(scan.shape) < 2:
        raise ValueError(f"{path}: a single slice ({scan.shape} voxels z y x); a 3-D scan is needed")
    if scan.array.min() == scan.array.max():
        raise ValueError(f"{path}: all voxels are {scan.array.min():g}; is it the right file?")
    return scan


def predict_volume(
    model: TrainedModel,
    volume,
    spacing_mm: Sequence[float],
    *,
    network: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **options,
) -> np.ndarray:
    """`predict_labels` with the patch, the voxels, the device and the precision of a trained model.

    Args:
        volume, spacing_mm: as of `predict_labels`.
        network: in the place of that of the model.
        options: the other arguments of `predict_labels`.
    """
    return predict_labels(
        network or model.network,
        volume,
        spacing_mm=spacing_mm,
        working_spacing_mm=model.preprocessing["spacing_mm"],
        patch_shape=tuple(model.config["patch_size"]),
        device=model.device,
        precision=model.precision,
        on_message=warn_of_memory,
        **options,
    )


def only_trained(
    network: Callable[[torch.Tensor], torch.Tensor], num_classes: int, labelled: Collection[int]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The network with classes that no training case had labels for as parts of the background.

    Training asks only for their sum with the background (marginal softmax). What is left of each by itself
    says nothing, and could be the highest score.

    Args:
        num_classes: channels of its logits.
        labelled: classes that a training case had labels for, without the background.
    """
    mask = labelled_mask(num_classes, labelled)

    def predict(image: torch.Tensor) -> torch.Tensor:
        logits = network(image)
        return merge_unlabelled(logits, mask.expand(len(logits), -1)).clamp(min=NEVER)

    return network if mask.all() else predict


@contextlib.contextmanager
def probability_maps(
    out: Path, classes: Sequence[int], file: NiftiFile, reading: Reading
) -> Iterator[dict[int, np.ndarray]]:
    """Yields {class: array on disk} for `predict_labels` to fill, a byte for each voxel of the image; then
    writes <out>/probabilities/<name>_<class>.nii.gz of each on the scan's grid."""
    check_room(out, len(classes) * reading.image.size, f"probability maps of {file.path.name}")
    with tempfile.TemporaryDirectory(dir=out, prefix=".maps_") as folder:
        maps = {
            n: np.memmap(Path(folder) / str(n), np.uint8, "w+", shape=reading.image.shape) for n in classes
        }
        yield maps
        for n in classes:
            path = make_folder(out / PROBABILITIES) / f"{case_name(file.path)}_{n:02d}.nii.gz"
            save_probability(path, reading.on_scan(maps.pop(n), file), file)


def warn_if_mirrored(path: Path, labels: np.ndarray, right: int, left: int, names: Mapping[int, str]) -> bool:
    """Whether the label that lies on the patient's right is found left of the other one, with a warning.

    Args:
        labels: (z, y, x) of the scan, in RAS+.
        right, left: such as liver and spleen.
        names: {label: name}.
    """
    reason = why_mirrored(labels, right, left, names)
    if reason:
        warn(f"{path.name}: {reason} Then left and right organs are too")
    return bool(reason)


def why_mirrored(labels: np.ndarray, right: int, left: int, names: Mapping[int, str]) -> str:
    """A sentence if the label that lies on the patient's right is found left of the other one, else "".

    Args: as of `warn_if_mirrored`.
    """
    if not lies_left_of(labels, right, left):
        return ""
    return f"the {names[right]} lies left of the {names[left]}; are left and right exchanged in the file?"


@contextlib.contextmanager
def window_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """Bar of the windows of a scan, on a terminal; yields what `predict_labels` takes as `progress`."""
    with tqdm(desc=name, unit="window", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def prediction_notes(path: Path, model: TrainedModel, need: PredictionPeak, started_s: float) -> dict:
    """What the JSON file of every predicted scan holds: scan, seconds, memory, device and precision.

    Args:
        need: memory as predicted, of `Reading`.
        started_s: `time.perf_counter()` when the scan was begun.
    """
    memory = peak_memory_mib(model.device)
    return {
        "scan": str(path),
        "seconds": time.perf_counter() - started_s,
        "predicted_mib": {"host": need.host_mib, "device": need.device_mib},
        "peak_mib": None if math.isnan(memory) else memory,
        "device": describe_device(model.device),
        "precision": model.precision.name,
    }


def predict_scans(
    predict: Callable[[Path, Path], dict],
    source: str | Path,
    out: Path,
    *,
    own_names: tuple[str, ...],
    recursive: bool,
    table: str,
    machine: str,
    found: Callable[[dict], str],
    suffixes: tuple[str, ...] = NIFTI_SUFFIXES,
    name_of: Callable[[Path], str] = case_name,
) -> dict[Path, str]:
    """Call `predict` for each scan of `source`, shared over the processes, and print what came of it.

    Args:
        predict: writes the results of a scan to its folder of `batch.result_folders`, with the scan's name in
            front, and returns its row with at least "scan" (its path) and "seconds".
        source, own_names: as of `find_scans`.
        table: name of the CSV file of the rows in `out`.
        machine: what it runs on, for the line that is printed first.
        found: row -> what was found, for the scan's line; only 20 lines are printed.
        suffixes: of the files that count as scans.
        name_of: scan -> name that its results begin with.

    Returns:
        {scan that failed: reason}, the same in every process.

    Raises:
        FileNotFoundError: no scan.
    """
    scans, unconverted = find_scans(
        source, suffixes, out=out, own_names=own_names, recursive=recursive, what="NIfTI scan"
    )
    make_folder(out)
    if distributed.is_main():
        print(f"{len(scans)} scan(s) on {machine}")
    names = {path: name_of(path) for path in scans}
    folders = batch.result_folders(names, source, out)
    clashes = batch.name_clashes({path: folders[path] / name for path, name in names.items()})
    todo = [path for path in scans if path not in clashes]
    rows, failed = batch.each(
        lambda path: predict(path, make_folder(folders[path])), todo, unit="scan", table=out / table
    )
    failed = unconverted | clashes | failed
    if distributed.is_main():
        for row in rows[:ROWS_PRINTED]:
            print(f"  {Path(row['scan']).name}: {found(row)}, {row['seconds']:.1f} s")
        if len(rows) > ROWS_PRINTED:
            print(f"  ... {len(rows) - ROWS_PRINTED} more in {table}")
        print(f"{len(rows)} of {len(scans) + len(unconverted)} scan(s) written to {out}")
        for line in batch.failed_lines(failed):
            print(line)
    return failed
