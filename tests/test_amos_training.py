"""amos_lha: which patches are drawn, the loss where some organs have no labels, grey values, data sets."""

import json

import numpy as np
import pytest
import torch

from amos_lha import train
from amos_lha.dataset import Amos, PatchDataset, case_scaling
from amos_lha.lha_net import TrainingOutput
from amos_lha.losses import router_loss, segmentation_loss
from amos_lha.organs import COLORS, GROUPS, NUM_CLASSES, ORGANS, SIDES, TOLERANCES_MM
from amos_lha.sampling import SAMPLING, STRATA, Difficulty, Sampler
from amos_lha.training import open_data
from common.hdf5 import CaseFile, write_case
from common.intensity import fingerprint
from common.patches import location_index

# ---- organs ----


def test_every_organ_has_a_group_a_colour_and_a_tolerance():
    assert (
        sorted(organ for organs in GROUPS.values() for organ in organs) == list(ORGANS) == list(range(1, 16))
    )
    assert COLORS.shape == (16, 3) and len({tuple(c) for c in COLORS.tolist()}) == 16
    assert list(TOLERANCES_MM) == list(ORGANS)
    for right, left in SIDES:
        assert ORGANS[right].replace("right", "left") == ORGANS[left]


# ---- sampling ----


def make_case(path, organs, shape=(40, 48, 56), seed=0, labelled=tuple(ORGANS), spacing=(2, 1.5, 1.5)):
    """A case of this shape with a box of 6 voxels for each organ, at places of its own."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    for k, organ in enumerate(organs):
        z, y, x = 2 + 9 * (k // 16), 2 + 10 * (k // 4 % 4), 2 + 12 * (k % 4)
        label[z : z + 6, y : y + 6, x : x + 6] = organ
    image = rng.integers(-200, 200, shape).astype(np.int16)
    image[label > 0] += 40
    attributes = {
        "name": path.stem,
        "modality": "ct",
        "labelled": list(labelled),
        "spacing_mm": spacing,
        "affine": np.eye(4),
        "scaling": None,
        "foreground_sample": image[label > 0][:100],
        "voxels": {str(organ): int((label == organ).sum()) for organ in organs},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_case(
        path, image, label, attributes=attributes, index=location_index(label, boundary_per_class=True)
    )
    return CaseFile(path)


def draws(sampler, count, cases=1):
    rng = np.random.default_rng(1)
    return [sampler.draw(i % cases, rng) for i in range(count)]


def test_strata_come_in_their_shares_and_hit_what_they_name(tmp_path):
    case = make_case(tmp_path / "a.h5", list(ORGANS))
    label = case.label[...]
    found = draws(Sampler([case], (16, 16, 16), SAMPLING["smart"]), 10_000)
    for stratum in STRATA:
        of_stratum = [d for d in found if d.stratum == stratum]
        assert len(of_stratum) / len(found) == pytest.approx(SAMPLING["smart"][stratum], abs=0.02)
        organs = {d.organ for d in of_stratum}
        if stratum == "small":
            assert organs == set(GROUPS["small"])
        elif stratum == "uniform":
            assert organs == {0}
        else:
            assert organs == set(ORGANS), f"{stratum}: every organ is drawn"
    for drawn in found[:500]:
        assert all(0 <= s <= n - 16 for s, n in zip(drawn.start, case.shape, strict=True))
        z, y, x = drawn.start
        if drawn.organ:
            assert (label[z : z + 16, y : y + 16, x : x + 16] == drawn.organ).any()
    starts = np.array([d.start for d in found if d.stratum == "uniform"])
    assert starts.min(0).tolist() == [0, 0, 0] and starts.max(0).tolist() == [24, 32, 40], "first and last"


def test_border_places_are_on_the_border(tmp_path):
    case = make_case(tmp_path / "a.h5", [6, 11])
    label = case.label[...]
    for organ in (6, 11):
        places = case.locations(f"boundary_{organ}")
        inner = np.zeros(label.shape, bool)
        inner[3:7, 3:7, (3 if organ == 6 else 15) : (7 if organ == 6 else 19)] = True
        assert all(label[tuple(p)] == organ and not inner[tuple(p)] for p in places) and len(places) == 152


def test_cases_without_small_organs_or_without_any(tmp_path):
    large = make_case(tmp_path / "large.h5", [1, 6])
    empty = make_case(tmp_path / "empty.h5", [])
    found = draws(Sampler([large], (16, 16, 16), SAMPLING["original"]), 2000)
    assert {d.stratum for d in found} == {"any", "boundary", "uniform"} and {d.organ for d in found} == {
        0,
        1,
        6,
    }
    found = draws(Sampler([empty], (16, 16, 16), SAMPLING["smart"]), 200)
    assert {d.stratum for d in found} == {"uniform"}


def test_a_volume_smaller_than_the_patch(tmp_path):
    case = make_case(tmp_path / "a.h5", [6], shape=(12, 48, 20))
    for drawn in draws(Sampler([case], (32, 32, 32), SAMPLING["smart"]), 50):
        assert (drawn.start[0], drawn.start[2]) == (-10, -6) and 0 <= drawn.start[1] <= 16
        assert case.read_image(drawn.start, (32, 32, 32)).shape == (32, 32, 32)


def test_hard_organs_are_drawn_by_the_square_of_their_error(tmp_path):
    cases = [make_case(tmp_path / "a.h5", [6, 11]), make_case(tmp_path / "b.h5", [6])]
    sampler = Sampler(cases, (16, 16, 16), {"hard": 1.0})
    assert sampler.difficulty.probability[0, 6] == pytest.approx(1 / 3), "equal at first, absent ones never"
    errors = torch.full((2, NUM_CLASSES), torch.nan)
    errors[0, 6], errors[1, 11] = 0.0, 1.0
    sampler.difficulty.add(torch.tensor([1, 0]), errors)
    assert sampler.difficulty.probability[0, 6] == pytest.approx(1 / 3), "only the next epoch draws by them"
    sampler.difficulty.end_epoch()
    # 0.9 of 0.5 plus 0.1 of the new error: 0.45 and 0.55; the third stays at 0.5.
    weights = {(0, 6): 0.5**2, (0, 11): 0.55**2, (1, 6): 0.45**2}
    found = draws(sampler, 20_000, cases=2)
    for (case, organ), weight in weights.items():
        share = sum((d.case, d.organ) == (case, organ) for d in found) / len(found)
        assert share == pytest.approx(weight / sum(weights.values()), abs=0.01)
    assert {d.stratum for d in found} == {"hard"}


def test_difficulty_goes_on_where_a_run_was_stopped():
    present = np.ones((3, NUM_CLASSES), bool)
    rng = torch.Generator().manual_seed(0)
    seen = [(torch.tensor([k % 3]), torch.rand(1, NUM_CLASSES, generator=rng)) for k in range(8)]
    whole, first, second = (Difficulty(present) for _ in range(3))
    for cases, errors in seen[:3]:
        first.add(cases, errors)
        whole.add(cases, errors)
    second.load_state_dict(first.state_dict())
    for cases, errors in seen[3:]:
        second.add(cases, errors)
        whole.add(cases, errors)
    whole.end_epoch()
    second.end_epoch()
    assert torch.equal(whole.error, second.error) and torch.equal(whole.probability, second.probability)
    assert not torch.equal(whole.error, first.error)


def test_drawing_does_not_depend_on_the_size_of_the_volume(tmp_path):
    """Only the index is read: no voxel of image or label."""
    case = make_case(tmp_path / "a.h5", list(ORGANS))
    sampler = Sampler([case], (16, 16, 16), SAMPLING["smart"])

    class Unread:
        shape = case.shape

        def __getattr__(self, name):
            if name in ("label", "image", "read_image", "read_label"):
                raise AssertionError(f"{name} was read")
            return getattr(case, name)

    sampler.cases = [Unread()]
    draws(sampler, 100)


# ---- loss ----


def test_router_learns_the_group_of_an_organ():
    """Voxels of the liver (large, the last of the three) and of background, which does not count."""
    target = torch.tensor([6, 0]).view(1, 1, 1, 2)
    router = torch.tensor([[0.0, 9.0], [0.0, 9.0], [2.0, 9.0]]).view(1, 3, 1, 1, 2)
    expected = -torch.tensor([0.0, 0.0, 2.0]).log_softmax(0)[2]
    assert list(GROUPS) == ["small", "medium", "large"]
    assert router_loss(router, target).item() == pytest.approx(expected.item())
    assert router_loss(router, torch.zeros_like(target)).item() == 0
    logits = torch.randn(1, NUM_CLASSES, 1, 1, 2)
    alone = segmentation_loss(logits, target)
    assert (
        alone
        == segmentation_loss([logits], target)
        == segmentation_loss(TrainingOutput([logits], None), target)
    )
    with_router = segmentation_loss(TrainingOutput([logits], router), target)
    assert with_router.item() == pytest.approx(
        segmentation_loss(logits, target).item() + 0.1 * expected.item()
    )


# ---- data sets ----


def make_folder(folder, parts, organs=tuple(ORGANS), labelled=tuple(ORGANS), spacing=(2, 1.5, 1.5)):
    """A folder as preprocess.py writes it; `parts` {case: "train", "val" or ""}."""
    entries = []
    for seed, (name, part) in enumerate(parts.items()):
        make_case(
            folder / "cases" / f"{name}.h5", organs, seed=seed, labelled=labelled, spacing=spacing
        ).close()
        entries.append({"name": name, "part": part, "modality": "ct", "labelled": list(labelled)})
    content = {"spacing_mm": list(spacing), "cases": entries}
    (folder / "preprocessing.json").write_text(json.dumps(content))
    return folder


PARTS = {"amos_0001": "train", "amos_0004": "train", "amos_0008": "val"}


def test_the_published_parts_and_the_fingerprint_of_the_training_cases(tmp_path):
    data = Amos([make_folder(tmp_path / "amos", PARTS)])
    assert data.split == {"train": ["amos_0001", "amos_0004"], "val": ["amos_0008"], "test": []}
    samples = [data.cases[name].attributes["foreground_sample"] for name in data.split["train"]]
    assert data.preprocessing["scaling"] == list(fingerprint(samples))
    assert data.preprocessing["modality"] == "ct" and data.preprocessing["labelled"] == list(ORGANS)
    assert case_scaling(data.cases["amos_0008"], data.preprocessing) == fingerprint(samples)
    everything = Amos([tmp_path / "amos"], validation=False)
    assert everything.split == {"train": list(PARTS), "val": [], "test": []}


def test_what_was_trained_on_is_told_by_the_training_cases_alone(tmp_path):
    """Prediction relies on it: what only a validation case has labels for is not known to the network."""
    folder = make_folder(tmp_path / "amos", PARTS, labelled=(1, 6))
    make_case(folder / "cases/amos_0008.h5", tuple(ORGANS), seed=9, labelled=tuple(ORGANS)).close()
    assert Amos([folder]).preprocessing["labelled"] == [1, 6]
    assert Amos([folder], validation=False).preprocessing["labelled"] == list(ORGANS)


def test_folds_and_refusals(tmp_path):
    folder = make_folder(tmp_path / "amos", dict.fromkeys((f"amos_{k:04d}" for k in range(8)), "train"))
    seen = [Amos([folder], folds=4, fold=k, validation=False).split for k in range(4)]
    assert sorted(name for split in seen for name in split["test"]) == [f"amos_{k:04d}" for k in range(8)]
    assert all(len(split["train"]) == 6 and not split["val"] for split in seen)
    with pytest.raises(ValueError, match="8 cases, but none of --modality mr"):
        Amos([folder], "mr")
    with pytest.raises(FileNotFoundError, match="no preprocessed cases here.*amos_lha/preprocess.py"):
        Amos([tmp_path / "nothing"])


def test_two_sets_with_labels_of_different_organs(tmp_path):
    a = make_folder(tmp_path / "a", PARTS, organs=(1, 6, 11), labelled=(1, 2, 6, 11))
    b = make_folder(tmp_path / "b", PARTS, organs=(2, 3), labelled=(2, 3))
    data = Amos([a, b])
    assert data.split["train"] == ["a/amos_0001", "a/amos_0004", "b/amos_0001", "b/amos_0004"]
    assert data.preprocessing["labelled"] == [1, 2, 3, 6, 11]
    frequency, size, box = data.class_frequency(), 40 * 48 * 56, 6**3
    assert frequency[6].item() == pytest.approx(box / size), "of the cases that have labels for it"
    assert frequency[3].item() == pytest.approx(box / size)
    assert frequency[2].item() == pytest.approx(box / (2 * size)), "in half of them"
    assert frequency[0].item() == pytest.approx(1 - 2.5 * box / size) and frequency[4] == 0
    patches = PatchDataset(data, data.split["train"], (16, 16, 16), SAMPLING["smart"], 8)
    items = [patches[k, 7 * k] for k in range(200)]
    assert {item["organ"] for item in items} == {ORGANS[k] for k in (1, 2, 3, 6, 11)} | {"none"}
    for item in items[:20]:
        found = set(item["label"].unique().tolist()) - {0}
        allowed = set(np.flatnonzero(item["labelled"].numpy()).tolist())
        assert found <= allowed and allowed in ({0, 1, 2, 6, 11}, {0, 2, 3})
        assert item["image"].dtype == torch.float32 and item["image"].shape == (1, 16, 16, 16)
    again = patches[3, 21]
    assert all(torch.equal(again[k], items[3][k]) for k in ("image", "label"))
    with pytest.raises(ValueError, match="voxels of different sizes .*one --spacing"):
        Amos([a, make_folder(tmp_path / "c", PARTS, spacing=(3, 3, 3))])
    with pytest.raises(ValueError, match="two folders of one name"):
        Amos([a, tmp_path / "other" / "a"])


def test_without_a_published_validation_part_one_is_drawn(tmp_path):
    folder = make_folder(tmp_path / "chaos", dict.fromkeys((f"amos_06{k:02d}" for k in range(10)), "train"))
    split = Amos([folder]).split
    assert (len(split["train"]), len(split["val"]), len(split["test"])) == (8, 2, 0)
    assert Amos([folder], validation=False).split["train"] == [f"amos_06{k:02d}" for k in range(10)]


def test_scans_of_a_patient_stay_in_one_part(tmp_path):
    names = [f"p{patient}_{scan}" for patient in range(6) for scan in "ab"]
    folder = make_folder(tmp_path / "amos", dict.fromkeys(names, "train"))
    for fold in range(3):
        data = Amos([folder], folds=3, fold=fold, patient_pattern="(p[0-9]+)_")
        split = data.split
        assert data.patients["p3_b"] == "p3"
        parts = {part: {name.split("_")[0] for name in split[part]} for part in split}
        assert sorted(parts["train"] | parts["val"] | parts["test"]) == [f"p{k}" for k in range(6)]
        assert sum(map(len, parts.values())) == 6, "nobody stands in two parts"
    make_folder(tmp_path / "va", {"p1_a": "train", "p1_b": "val", "p2_a": "train"})
    with pytest.raises(ValueError, match="patient p1 stands in train .* and in val"):
        Amos([tmp_path / "va"], patient_pattern="(p[0-9]+)_")


def test_mirrors_need_labels_of_both_sides(tmp_path):
    """A right kidney would become a left one that the case has no labels for."""
    one_side = make_folder(tmp_path / "one", PARTS, organs=(2, 6), labelled=(2, 6))
    both = make_folder(tmp_path / "both", PARTS, organs=(2, 3), labelled=(2, 3))

    def flags(path, share):
        words = ["--data_path", str(path), "--flip_sides", str(share)]
        return train.build_parser().parse_args(words)

    assert open_data(flags(both, 0.5)).split["train"] and open_data(flags(one_side, 0)).split["train"]
    with pytest.raises(ValueError, match="--flip_sides 0.5: amos_0001 has labels of one side"):
        open_data(flags(one_side, 0.5))


def test_errors_of_all_processes_count(monkeypatch):
    """Two processes saw the same organ of one case with errors 1 and 0: 0.05 up, 0.05 down."""
    difficulty = Difficulty(np.ones((1, NUM_CLASSES), bool))
    difficulty.add(torch.tensor([0]), torch.ones(1, NUM_CLASSES))
    other = torch.full((1, NUM_CLASSES), -0.05)
    monkeypatch.setattr("amos_lha.sampling.gather", lambda change: [change, other])
    difficulty.end_epoch()
    torch.testing.assert_close(difficulty.error, torch.full((1, NUM_CLASSES), 0.5))
