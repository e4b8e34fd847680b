import importlib
import json

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import lung_tumor_patches, slice_loading

CPU = torch.device("cpu")


def make_patches(num_full: int, num_empty: int, seed: int) -> dict[str, np.ndarray]:
    """Bright 8 x 8 squares on noise, and patches of noise."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((num_full + num_empty, 32, 32), np.uint8)
    for label in labels[:num_full]:
        y, x = rng.integers(0, 24, 2)
        label[y : y + 8, x : x + 8] = 1
    images = 0.2 * rng.random(labels.shape, np.float32) + 0.7 * labels
    return {"images": images.astype(np.float32), "labels": labels}


@pytest.fixture
def data_path(tmp_path):
    folder = tmp_path / "patches"
    folder.mkdir()
    for seed, part in enumerate(("val", "test")):
        np.savez(folder / f"{part}.npz", **make_patches(9, 3, seed))
    return folder


class Threshold(nn.Module):
    """Calls tumour what is brighter than `level` on the scale of -1 to 1."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.level = level

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.level - image, image - self.level], dim=1)


def read_results(folder, name: str) -> tuple[dict, list[list[str]]]:
    """The JSON file, and the cells of the Markdown file's first table without its header."""
    text = (folder / f"{name}.md").read_text(encoding="utf8")
    content = json.loads((folder / f"{name}.json").read_text(encoding="utf8"))
    for key in ("command", "date", "commit", "machine", "versions"):
        assert f"- {key}: {content[key]}" in text
    first = next(part for part in text.split("\n\n") if part.startswith("|"))
    table = [line.strip("|").split("|") for line in first.splitlines()]
    assert len({len(row) for row in table}) == 1
    return content, [[cell.strip() for cell in row] for row in table[2:]]


def test_score_by_hand():
    labels = np.zeros((4, 10, 10), np.uint8)
    labels[0, :5] = 1  # 50 pixels
    labels[1, 0, :4] = 1  # 4 pixels
    images = 255 * labels

    def score(level):
        probs = lung_tumor_patches.tumour_probs(Threshold(level), images, CPU)
        return lung_tumor_patches.score(probs, labels)

    assert score(0) == dict(pooled_dice=1, tumour_patch_dice=1, empty_patch_fp=0)
    assert score(2) == dict(pooled_dice=0, tumour_patch_dice=0, empty_patch_fp=0)
    everything = score(-2)
    assert everything["pooled_dice"] == pytest.approx(2 * 54 / (54 + 400))
    assert everything["tumour_patch_dice"] == pytest.approx((100 / 150 + 8 / 104) / 2)
    assert everything["empty_patch_fp"] == 1
    images[1] = 0  # the small tumour is missed
    images[2, 3, 3] = 255  # and one pixel is invented
    some = score(0)
    assert some["pooled_dice"] == pytest.approx(2 * 50 / (2 * 50 + 1 + 4))
    assert some["tumour_patch_dice"] == 0.5 and some["empty_patch_fp"] == 0.5


def test_scores_by_threshold():
    labels = np.array([[[1, 1, 0, 0]], [[0, 0, 0, 0]]], np.uint8)
    probs = np.array([[[0.9, 0.4, 0.2, 0.1]], [[0.3, 0.1, 0.0, 0.0]]], np.float32)
    at = {t: tuple(lung_tumor_patches.score(probs, labels, t).values()) for t in (0.15, 0.35, 0.5)}
    assert at[0.15] == pytest.approx((4 / 6, 4 / 5, 1))  # 2 right, 1 extra in the patch, 1 in the empty one
    assert at[0.35] == (1, 1, 0)
    assert at[0.5] == pytest.approx((2 / 3, 2 / 3, 0))


def test_batches_repeat_with_the_seed(data_path):
    images, labels = lung_tumor_patches.load_patches(data_path / "val.npz")
    assert images.dtype == labels.dtype == np.uint8 and images.max() > 1
    first, again, other = (lung_tumor_patches.batches(images, labels, 4, seed) for seed in (0, 0, 1))
    for _ in range(3):
        image, target = next(first)
        same_image, same_target = next(again)
        assert torch.equal(image, same_image) and torch.equal(target, same_target)
        assert not torch.equal(image, next(other)[0])
        assert image.shape == (4, 1, 32, 32) and target.shape == (4, 32, 32)
        assert image.min() >= -1 and image.max() <= 1 and set(target.unique().tolist()) <= {0, 1}


def test_patches_script_learns_and_reports(data_path, tmp_path):
    flags = ["--data_path", data_path, "--out", tmp_path / "out", "--models", "ours", "--seeds", 1]
    flags += ["--steps", 40, "--batch_size", 4, "--base_features", 4, "--lr", 0.02, 0.02]
    returned = lung_tumor_patches.main(flags)
    content, table = read_results(tmp_path / "out", "lung_tumor_patches")
    assert str(tmp_path) not in json.dumps(content)
    assert content["runs"] == returned["runs"]
    rows = content["runs"]["ours"]
    assert [(r["trained_on"], r["scored_on"]) for r in rows] == [("val", "test"), ("test", "val")]
    assert all(r["pooled_dice"] > 0.8 for r in rows), "a bright square on a dark ground is easy"
    assert content["means"]["ours"]["pooled_dice"] == pytest.approx(np.mean([r["pooled_dice"] for r in rows]))
    assert [row[0] for row in table] == ["ours"]
    half = [r["thresholds"]["0.5"]["pooled_dice"] for r in rows]
    assert half == [r["pooled_dice"] for r in rows]
    assert float(table[0][3].split()[0]) == pytest.approx(content["means"]["ours"]["pooled_dice"], abs=6e-4)


def test_patches_script_without_monai(data_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lung_tumor_patches, "find_spec", lambda name: None)
    flags = ["--data_path", data_path, "--out", tmp_path / "out", "--seeds", 1, "--steps", 1]
    lung_tumor_patches.main([*flags, "--batch_size", 2, "--base_features", 2])
    assert "not measured: pip install -r benchmarks/requirements.txt" in capsys.readouterr().out
    content, table = read_results(tmp_path / "out", "lung_tumor_patches")
    assert list(content["runs"]) == ["ours"] and len(table) == 1


def test_patches_script_with_monai(data_path, tmp_path):
    pytest.importorskip("monai")
    flags = ["--data_path", data_path, "--out", tmp_path / "out", "--seeds", 1, "--steps", 3]
    flags += ["--models", "ours", "monai", "monai_batch_norm"]
    lung_tumor_patches.main([*flags, "--batch_size", 2, "--base_features", 4])
    content, table = read_results(tmp_path / "out", "lung_tumor_patches")
    runs = content["runs"]
    ours, monai, batch_norm, cut = list(runs)[:4]
    assert (ours, monai, batch_norm) == ("ours", "monai", "monai_batch_norm")
    assert cut in ("ours, equal time", "monai, equal time")
    merged = 2 * (16 + 32 + 64 + 128)  # scale and shift of each channel, which MONAI's instance norm lacks
    assert runs[batch_norm][0]["parameters"] == runs[monai][0]["parameters"] + merged
    assert len(table) == len(runs) == 6
    assert 1 <= runs[cut][0]["steps"] <= 3 == runs[ours][0]["steps"] == runs[monai][0]["steps"]
    for key in ("pooled_dice", "ms_per_step"):
        expected = [a[key] - b[key] for a, b in zip(runs[ours], runs[monai], strict=True)]
        assert [d[key] for d in runs["ours - monai, equal steps"]] == pytest.approx(expected)


def test_patches_of_a_wrong_range_are_refused(tmp_path):
    patches = make_patches(2, 1, 0)
    np.savez(tmp_path / "val.npz", images=255 * patches["images"], labels=patches["labels"])
    with pytest.raises(ValueError, match=r"val\.npz: expected images in 0\.\.1"):
        lung_tumor_patches.load_patches(tmp_path / "val.npz")
    np.savez(tmp_path / "val.npz", images=patches["images"][:2], labels=patches["labels"][:2])
    with pytest.raises(ValueError, match="some without tumour"):
        lung_tumor_patches.load_patches(tmp_path / "val.npz")


def test_slice_loading(tmp_path):
    flags = ["--cases", 2, "--slices", 8, "--image_size", 64, "--repeats", 3, "--out", tmp_path]
    slice_loading.main(flags)
    content, table = read_results(tmp_path, "slice_loading")
    assert content["slices"] == 16
    assert content["kib_per_slice"]["packed"] == pytest.approx(2 * (64 * 64 + 128 / 16) / 1024)
    rates = content["slices_per_s"]
    assert len(rates["png"]) == len(rates["packed"]) == len(content["speedup"]) == 3
    assert content["speedup"] == pytest.approx(np.divide(rates["packed"], rates["png"]).tolist())
    assert min(content["packing_ms_per_slice"]) > 0
    assert [row[0] for row in table] == ["png", "packed"]


def test_short_scans_compares_what_is_shown_beyond_the_border(tmp_path, verse_runs):
    """An untrained network's Dice says nothing; each way is there for each length, and whole scans agree."""
    weights = verse_runs["segmentation"] / "weights" / "best.pt"
    module = importlib.import_module("benchmarks.short_scans")
    content = module.main(["--weights", str(weights), "--rows", "12", "40", "--out", str(tmp_path)])
    written, table = read_results(tmp_path, "short_scans")
    assert table and written["dice"] == content["dice"]
    assert list(content["dice"]) == ["whole", "12 along z", "12 along y", "12 along x"]
    whole = content["dice"]["whole"]
    assert whole["edge repeated"] == whole["region of the whole scan"]
    assert len(whole["air"]) == len(content["cases"]) == 2


def test_pieces_of_a_scan_and_their_surroundings():
    module = importlib.import_module("benchmarks.short_scans")
    assert module.pieces((10, 7, 5), 0, 4) == [([0, 0, 0], [4, 7, 5]), ([4, 0, 0], [8, 7, 5])]
    assert module.pieces((10, 7, 5), 2, 6) == []
    image = np.ones((3, 7, 5), np.int16)
    wide, inner = module.in_air(image, (6, 6, 6))
    assert wide.shape == (6, 7, 6) and (wide[inner] == 1).all() and wide[inner].shape == image.shape
    assert wide[0, 0, 0] == -1024 and np.count_nonzero(wide == 1) == image.size


@pytest.mark.parametrize(
    "name, flags",
    [
        ("patch_reading", ["--shape", "40", "40", "40", "--patch_sizes", "16", "--reads", "2"]),
        ("surface_metrics", ["--ways", "ours", "--shape", "20", "64", "64", "--repeats", "1"]),
        ("training_memory", ["--models", "UNet", "--patch_size", "16", "16", "16", "--device", "cpu"]),
        ("lha_networks", ["--networks", "LHANet tiny", "SegResNet", "--cube", "32", "32", "32",
                          "--slab", "16", "32", "32", "--repeats", "1"]),
        ("lha_blocks", ["--side", "16", "--repeats", "1"]),
        ("medformer_memory", ["--widths", "half", "--sides", "32", "--device", "cpu"]),
        pytest.param("resampling", ["--ct_shape", "8", "32", "32", "--cube", "12", "--repeats", "1"],
                     marks=pytest.mark.slow),  # fmt: skip
        pytest.param("augmentation", ["--patch_size", "16", "--batches", "1", "--default_batches", "1",
                     "--repeats", "1"], marks=pytest.mark.slow),  # fmt: skip
    ],
)  # fmt: skip
def test_benchmarks_of_the_3d_core_write_their_table(tmp_path, name, flags):
    """At toy sizes, without the peers where they are not installed."""
    module = importlib.import_module(f"benchmarks.{name}")
    module.main([*flags, "--out", str(tmp_path)])
    content, table = read_results(tmp_path, name)
    assert table and content["command"].startswith(f"python benchmarks/{name}.py")


def test_abdomen_peers_scores_label_files_and_adds_up_runs(tmp_path):
    """Two of three voxels of a kidney, and a liver that nobody found; organs not asked for do not count."""
    from common.nifti import write_nifti

    module = importlib.import_module("benchmarks.abdomen_peers")
    label = np.zeros((4, 5, 6), np.uint8)
    label[0, 0, :3], label[1], label[3] = 2, 6, 14
    found = np.where(label == 2, label, 0)
    found[0, 0, 2] = 14
    (tmp_path / "pred").mkdir()
    for folder, array in (("imagesTr", label.astype(np.int16)), ("labelsTr", label)):
        (tmp_path / "set" / folder).mkdir(parents=True)
        write_nifti(tmp_path / "set" / folder / "amos_0001.nii.gz", array, (5, 1, 1), orientation="LPS")
    write_nifti(tmp_path / "pred" / "amos_0001.nii.gz", found, (5, 1, 1), orientation="LPS")
    flags = ["--peer", "files", "--data_path", str(tmp_path / "set"), "--labels", "2", "4", "6"]
    flags += ["--test", "amos_0001", "--pred", str(tmp_path / "pred"), "--out", str(tmp_path / "out")]
    for name in ("first", "second"):
        assert module.main([*flags, "--name", name]) == 0
    content, table = read_results(tmp_path / "out", "abdomen_peers")
    assert [run["name"] for run in content["runs"]] == ["first", "second"] and len(table) == 2
    organs = content["runs"][1]["organs"]
    assert organs["2"] == pytest.approx(2 * 2 / (2 + 3)) and organs["6"] == 0 and np.isnan(organs["4"])
    assert content["runs"][1]["dice"] == pytest.approx(0.4), "an organ that nobody has counts nowhere"
    with pytest.raises(SystemExit, match="no case amos_0007"):
        module.main([*flags, "--train", "amos_0007"])
    with pytest.raises(SystemExit, match="in --train and in --test"):
        module.main([*flags, "--train", "amos_0001"])
