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
from common.plots import costs_the_picture
from common.slices import write_png
from wsss_medical.dataset import MedicalSliceDataset
from wsss_medical.segment import SCALES, SliceResult, segment_slices


def heat_picture(image: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """Slice uint8 (H, W) or (H, W, 3) with a map in [0, 1] over it, from blue to red -> RGB uint8."""
    from matplotlib import colormaps

    grey = image if image.ndim == 3 else image[..., None]
    picture = grey / 255 + colormaps["jet"](cam)[..., :3]
    return np.rint(255 * picture / picture.max()).astype(np.uint8)


def write_picture(folder: Path, stem: str, image: np.ndarray, score: float, cam: np.ndarray) -> None:
    write_png(folder / f"{stem}_{score:.3f}.png", heat_picture(image, cam))


def write_cam(folder: Path, stem: str, result: SliceResult, label: int, scales: Sequence[float]) -> None:
    """<stem>.npy and <stem>.npz: cam, cam_raw, pred_score, cls_label (uint8, of one class) and scales."""
    content = {"cam": result.cam, "cam_raw": result.cam_raw, "pred_score": result.score}
    content |= {"cls_label": np.array([label], np.uint8), "scales": list(scales)}
    with replacing(folder / f"{stem}.npy") as partial:
        np.save(partial, content)
    with replacing(folder / f"{stem}.npz") as partial:
        np.savez_compressed(partial, **content)


def write_attention(folder: Path, stem: str, result: SliceResult, *, half: bool) -> None:
    """<stem>.npy: attn_pred (n, n), num_attn_layers and attn_layer_0 ... of the last blocks; `half`: in 16
    bits."""
    content = {name: a.astype(np.float16) if half else a for name, a in result.attention.items()}
    with replacing(folder / f"{stem}.npy") as partial:
        np.save(partial, content | {"num_attn_layers": len(content) - 1})


def generate_maps(
    model: TrainedModel,
    dataset: MedicalSliceDataset,
    output_dir: str | Path,
    cam_npy_dir: str | Path,
    attn_npy_dir: str | Path | None = None,
    *,
    scales: Sequence[float] = SCALES,
    batch_size: int = 1,
    half: bool = False,
) -> tuple[dict[str, int], dict[str, str]]:
    """Write the files of all slices of `dataset`, shared over the processes.

    Args:
        attn_npy_dir: None writes no attention, which takes 32 MB a layer at 512 x 512 pixels.
        half: attention in 16 bits.

    Returns:
        ({"slices", "positives": those with a score of at least 0.5}, {slice that failed: reason}).
    """
    pictures, cams = make_folder(output_dir, "--output_dir"), make_folder(cam_npy_dir, "--cam_npy_dir")
    attention = make_folder(attn_npy_dir, "--attn_npy_dir") if attn_npy_dir else None
    earlier = {path.stem.rpartition("_")[0]: path for path in pictures.glob("*.png")}  # of other scores
    distributed.barrier()

    def write(indices: tuple[int, ...]) -> dict:
        images = [dataset.read(i) for i in indices]
        found = segment_slices(
            model, images, scales=scales, batch_size=batch_size, attention=attention is not None
        )
        positives = 0
        for i, image, result in zip(indices, images, found, strict=True):
            stem = dataset.names[i]
            if stem in earlier:
                earlier[stem].unlink()
            with costs_the_picture(f"the picture of {stem}"):
                write_picture(pictures, stem, image, result.score, result.cam)
            write_cam(cams, stem, result, int(dataset.labels[i]), scales)
            if attention:
                write_attention(attention, stem, result, half=half)
            positives += result.score >= 0.5
        return {"slices": len(indices), "positives": positives}

    count = len(dataset.names)
    parts = [tuple(range(i, min(i + batch_size, count))) for i in range(0, count, batch_size)]
    rows, failed = batch.each(write, parts, unit="batch")
    counts = {key: sum(row[key] for row in rows) for key in ("slices", "positives")}
    return counts, {dataset.names[i]: reason for part, reason in failed.items() for i in part}
