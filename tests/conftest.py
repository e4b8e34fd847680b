"""Small phantom data made once a session, and the real scans beside the repository, where there are any."""

import os
import subprocess
import sys
from pathlib import Path

# One thread, also in subprocesses: the networks here are tiny, threads would only wait for each other, and
# sums over another number of threads differ in the last bit.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = ROOT.parent / "shared" / "data"
TINY = [
    "--image_size",
    "48",
    "--base_features",
    "8",
    "--batch_size",
    "4",
    "--accumulate",
    "2",
    "--workers",
    "0",
]
TINY += ["--lr", "1e-2", "--device", "cpu", "--amp", "off", "--no-checkpointing"]

# What a case may raise, of which the rest of a batch must not know anything.
ERRORS = [
    ValueError("no mask; draw one"),
    OSError(28, "No space left on device"),
    KeyError("affine"),
    OverflowError("too large"),
    MemoryError("Unable to allocate 9 TiB"),
    RuntimeError("CUDA error"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    TypeError("not a number"),
    EOFError(),
]

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def phantom_source(tmp_path_factory) -> Path:
    """Six phantom chest CT of 48 x 48 pixels in the Decathlon layout."""
    from lung_tumor.phantoms import write_chest_phantoms

    folder = tmp_path_factory.mktemp("phantoms") / "Task06_Lung"
    return write_chest_phantoms(folder, 6, shape=(36, 48, 48))


@pytest.fixture(scope="session")
def phantom_slices(phantom_source, tmp_path_factory) -> Path:
    """The phantoms converted by preprocess.py: train 4, val 1, test 1."""
    from lung_tumor.preprocess import main

    out = tmp_path_factory.mktemp("converted") / "slices"
    assert (
        main(["--source", str(phantom_source), "--out", str(out), "--test_ratio", "0.2", "--workers", "0"])
        == 0
    )
    return out


@pytest.fixture(scope="session")
def trained_run(phantom_slices, tmp_path_factory) -> Path:
    """Run folder of two epochs on the phantoms."""
    from lung_tumor.train import main

    out = tmp_path_factory.mktemp("runs")
    main(
        [
            "--data_path",
            str(phantom_slices),
            "--out",
            str(out),
            "--model_name",
            "tiny",
            "--epochs",
            "2",
            *TINY,
        ]
    )
    return out / "tiny"


TINY_VERSE = ["--batch_size", "2", "--workers", "0", "--amp", "off", "--device", "cpu"]
TINY_HEATMAP = ["--input_shape", "32", "16", "16", *TINY_VERSE]
TINY_SEGMENTATION = ["--input_shape", "32", "32", "32", "--patches", "4", "--val_every", "1", *TINY_VERSE]


@pytest.fixture(scope="session")
def verse_source(tmp_path_factory) -> Path:
    """Six phantom spines of 5 mm voxels in VerSe's layout."""
    from verse_spine.phantoms import write_verse_phantoms

    return write_verse_phantoms(tmp_path_factory.mktemp("spines") / "verse", 6, spacing_scale=2.0)


@pytest.fixture(scope="session")
def verse_h5(verse_source, tmp_path_factory) -> Path:
    """The phantom spines converted at 5 mm: train 4, val 1, test 1."""
    from verse_spine.preprocess import main

    out = tmp_path_factory.mktemp("spines_h5") / "h5"
    flags = ["--source", str(verse_source), "--out", str(out), "--spacing", "5", "5", "5", "--workers", "0"]
    assert main(flags) == 0
    return out


@pytest.fixture(scope="session")
def verse_runs(verse_h5, tmp_path_factory) -> dict[str, Path]:
    """{"heatmap", "segmentation"}: run folders of two epochs on the phantom spines."""
    from verse_spine import train_heatmap, train_segmentation

    out = tmp_path_factory.mktemp("spine_runs")
    flags = ["--data_path", str(verse_h5), "--out", str(out), "--epochs", "2"]
    train_heatmap.main([*flags, "--model_name", "heatmap", *TINY_HEATMAP])
    train_segmentation.main([*flags, "--model_name", "segmentation", *TINY_SEGMENTATION])
    return {stage: out / stage for stage in ("heatmap", "segmentation")}


TINY_AMOS = ["--preset", "tiny", "--patch_size", "32", "32", "32", "--patches", "4", "--val_cases", "1"]
TINY_AMOS += ["--val_every", "1", "--workers", "0", "--amp", "off", "--device", "cpu"]


@pytest.fixture(scope="session")
def amos_source(tmp_path_factory) -> Path:
    """Three training and two validation phantoms with coarse voxels."""
    from amos_lha.phantoms import write_amos_phantoms

    return write_amos_phantoms(tmp_path_factory.mktemp("amos") / "amos22", 3, 2, in_plane_mm=6)


@pytest.fixture(scope="session")
def amos_h5(amos_source, tmp_path_factory) -> Path:
    from amos_lha import preprocess

    out = tmp_path_factory.mktemp("amos_h5") / "h5"
    words = [
        "--data_path",
        str(amos_source),
        "--out",
        str(out),
        "--spacing",
        "12",
        "12",
        "12",
        "--workers",
        "0",
    ]
    assert preprocess.main(words) == 0
    return out


# Without a file of flags the recipe of the model would be read, which changes.
TINY_AMYGDALA = ["--config", os.devnull, "--base_chan", "4", "--lr", "1e-2", "--jitter", "2"]
TINY_AMYGDALA += ["--patch_size", "16", "16", "32"]
TINY_AMYGDALA += ["--patches", "4", "--batch_size", "1", "--val_every", "1", "--localiser_updates", "2"]
TINY_AMYGDALA += ["--folds", "3", "--workers", "0", "--amp", "off", "--device", "cpu"]


@pytest.fixture(scope="session")
def amygdala_h5(tmp_path_factory) -> Path:
    """Six small heads as preprocess.py writes them, of two sites, with a cube of 10 mm for each amygdala."""
    import json

    import numpy as np

    from common.hdf5 import write_case

    out = tmp_path_factory.mktemp("amygdala") / "h5"
    (out / "cases").mkdir(parents=True)
    entries = []
    for number in range(6):
        name, site = f"head_{number}", "ab"[number % 2]
        rng = np.random.default_rng(number)
        image, label = rng.integers(400, 500, (24, 24, 32)), np.zeros((24, 24, 32), np.uint8)
        image[:, :, [0, 1, 30, 31]] = 0  # air
        for k, x in ((1, 6), (2, 21)):
            label[10:15, 9:14, x : x + 5] = k
        image[label > 0] -= 250
        attributes = {"name": name, "spacing_mm": (2.0, 2.0, 2.0), "affine": np.diag([2.0, 2, 2, 1])}
        attributes["centre"] = np.argwhere(label).mean(0)
        write_case(out / "cases" / f"{name}.h5", image.astype(np.int16), label, attributes=attributes)
        entries.append({"name": name, "part": "train", "subject": name, "site": site})
    notes = {"spacing_mm": [2, 2, 2], "dataset": "Amygdala", "cases": entries}
    (out / "preprocessing.json").write_text(json.dumps(notes))
    return out


@pytest.fixture(scope="session")
def real_spine_ct() -> Path:
    """Three real CT with vertebra masks and centroids in VerSe's layout; skips where they are not."""
    folder = REAL_DATA / "spine_ct"
    if not folder.is_dir():
        pytest.skip("the real scans are not on this machine")
    return folder


@pytest.fixture(scope="session")
def real_lung_ct() -> Path:
    """Two real chest CT with tumour masks; skips where they are not."""
    folder = REAL_DATA / "lung_ct"
    if not folder.is_dir():
        pytest.skip("the real scans are not on this machine")
    return folder


def run_script(script: str, *flags: object, cwd: Path, **kwargs) -> subprocess.CompletedProcess:
    """Run a script as a user would, from another folder."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1200, **kwargs)


def read_cross_validation(path: Path) -> dict:
    """{"Dice", "HD", "ASD": (folds, labels) means} of a cross_validation.txt, as readers of the original code
    base find them."""
    import re

    import numpy as np

    blocks = {}
    for title in ("Dice", "HD", "ASD"):
        text = path.read_text(encoding="utf8")
        (block,) = re.findall(rf"^{title}\n(.*?)^Each Class {title} Avg:", text, re.M | re.S)
        rows = re.findall(r"^Fold \d+: \[([^\]]*)\]", block, re.M)
        blocks[title] = np.array([[float(number) for number in row.split()] for row in rows])
    return blocks
