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
from wsss_medical.dataset import MedicalSliceDataset, patient_of
from wsss_medical.segment import GATE, scales_of, segment_slices
from wsss_medical.volume import by_patient, patient_scores


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
    """Write the files of all slices of `dataset`, patient by patient, shared over the processes.

    Args:
        attn_npy_dir: None writes no attention, which takes up to 32 MB a layer at 512 x 512 pixels.
        batch_size: number of slices that are computed at a time.

    Returns:
        ({"slices", "positives": those with a score of at least 0.5}, {patient that failed: reason}).
    """
    pictures, cams = make_folder(output_dir, "--output_dir"), make_folder(cam_npy_dir, "--cam_npy_dir")
    scales = list(scales_of(model, scales))
    attention = make_folder(attn_npy_dir, "--attn_npy_dir") if attn_npy_dir else None
    found = pictures.glob("*_[01].[0-9][0-9][0-9].png")  # of an earlier checkpoint, with other scores
    earlier = {path.stem.rpartition("_")[0]: path for path in found}
    distributed.barrier()
    patients = {patient_of(names[0]): names for names in by_patient(dataset.names)}

    def write(patient: str) -> dict:
        data = MedicalSliceDataset(dataset.root, patients[patient])
        images, results = [data.read(i) for i in range(len(data))], []
        options = {"scales": scales, "batch_size": batch_size, "attention": attention is not None}
        for stem, result in zip(data.names, segment_slices(model, images, **options), strict=True):
            if attention:  # at once: that of all slices would fill the memory
                layers = {"num_attn_layers": len(result.attention) - 1}  # the other one is attn_pred
                save_dictionary(attention / f"{stem}.npy", result.attention | layers)
            results.append(result._replace(attention=None))
        scores = patient_scores(model, images, results)
        for stem, label, image, score, result in zip(
            data.names, data.labels, images, scores, results, strict=True
        ):
            if stem in earlier:
                earlier[stem].unlink()
            with costs_the_picture(f"the picture of {stem}"):
                write_picture(pictures, stem, image, score, result.cam)
            content = {"cam": result.cam, "cam_raw": result.cam_raw, "pred_score": score}
            content |= {"cls_label": np.array([label], np.uint8), "scales": scales}
            save_dictionary(cams / f"{stem}.npy", content)
            with replacing(cams / f"{stem}.npz") as partial:
                np.savez_compressed(partial, **content)
        return {"slices": len(scores), "positives": sum(score >= GATE for score in scores)}

    rows, failed = batch.each(write, list(patients), unit="patient")
    return {key: sum(row[key] for row in rows) for key in ("slices", "positives")}, failed
