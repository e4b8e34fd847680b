"""Files of a trained network's maps: pictures, class activation maps and attention, one of each slice.

    attention_maps/<stem>_<probability>.png   the map in colours over the slice
    cam_npy/<stem>.npy                        a pickled dictionary, as in the project that this task grew from
    cam_npy/<stem>.npz                        the same without pickle
    attn_npy/<stem>.npy                       attention, likewise a dictionary, only if asked for

Pickle files can run code: read a .npy only if you made it yourself, by `np.load` with pickles allowed and
`.item()`. The .npz needs no pickle.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import batch, distributed
from common.checkpoints import TrainedModel
from common.files import make_folder, replacing
from common.plots import costs_the_picture, heat_picture
from common.slices import write_png
from wsss_medical.dataset import MedicalSliceDataset
from wsss_medical.segment import GATE, scales_of, segment_slices


def write_picture(folder: Path, stem: str, image: np.ndarray, score: float, cam: np.ndarray) -> None:
    write_png(folder / f"{stem}_{score:.3f}.png", heat_picture(image, cam))


def save_dictionary(path: Path, content: dict) -> None:
    with replacing(path) as partial:
        np.save(partial, content)


def generate_maps(
    model: TrainedModel,
    dataset: MedicalSliceDataset,
    output_dir: str | Path,
    cam_npy_dir: str | Path,
    attn_npy_dir: str | Path | None = None,
    *,
    scales: Sequence[float] | None = None,
    batch_size: int = 1,
) -> tuple[dict[str, int], dict[str, str]]:
    """Write the files of all slices of `dataset`, shared over the processes.

    Args:
        attn_npy_dir: None writes no attention, which takes up to 32 MB a layer at 512 x 512 pixels.

    Returns:
        ({"slices", "positives": those with a score of at least 0.5}, {slice that failed: reason}).
    """
    pictures, cams = make_folder(output_dir, "--output_dir"), make_folder(cam_npy_dir, "--cam_npy_dir")
    scales = list(scales_of(model, scales))
    attention = make_folder(attn_npy_dir, "--attn_npy_dir") if attn_npy_dir else None
    found = pictures.glob("*_[01].[0-9][0-9][0-9].png")  # of an earlier checkpoint, with other scores
    earlier = {path.stem.rpartition("_")[0]: path for path in found}
    distributed.barrier()

    def write(indices: tuple[int, ...]) -> dict:
        images = [dataset.read(i) for i in indices]
        options = {"scales": scales, "batch_size": batch_size, "attention": attention is not None}
        results = list(segment_slices(model, images, **options))
        for i, image, result in zip(indices, images, results, strict=True):
            stem = dataset.names[i]
            if stem in earlier:
                earlier[stem].unlink()
            with costs_the_picture(f"the picture of {stem}"):
                write_picture(pictures, stem, image, result.score, result.cam)
            content = {"cam": result.cam, "cam_raw": result.cam_raw, "pred_score": result.score}
            content |= {"cls_label": np.array([dataset.labels[i]], np.uint8), "scales": scales}
            save_dictionary(cams / f"{stem}.npy", content)
            with replacing(cams / f"{stem}.npz") as partial:
                np.savez_compressed(partial, **content)
            if attention:
                layers = {"num_attn_layers": len(result.attention) - 1}  # the other one is attn_pred
                save_dictionary(attention / f"{stem}.npy", result.attention | layers)
        return {"slices": len(results), "positives": sum(result.score >= GATE for result in results)}

    count = len(dataset.names)
    parts = [tuple(range(i, min(i + batch_size, count))) for i in range(0, count, batch_size)]
    rows, failed = batch.each(write, parts, unit="batch")
    counts = {key: sum(row[key] for row in rows) for key in ("slices", "positives")}
    return counts, {dataset.names[i]: reason for part, reason in failed.items() for i in part}
