"""Every script of the five tasks with the places where damaged files reach it: ENTRIES."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import hostile
import torch
from hostile import Files, label_voxels, nifti, scan_voxels
from hostile_runs import (
    CPU,
    LABELS,
    NUM_WHOLE,
    TASKS,
    Entry,
    converted,
    copied,
    ending_of,
    file_of_data,
    flag_with_file,
    kept_folder,
    masks_to_score,
    place,
    preprocess_flags,
    raw_data,
    raw_names,
    raw_to_convert,
    run_script,
    saved_weights,
    scans_to_predict,
    train_flags,
    weights_of,
)

TRAIN = {
    "lung_tumor/train": "lung",
    "verse_spine/train_heatmap": "spine",
    "verse_spine/train_segmentation": "spine",
    "amos_lha/train": "organs",
    "amygdala/train": "head",
    "wsss_medical/dist_train": "atrium",
}
SCANS: dict[str, Callable[[], Files]] = {
    "NIfTI headers": lambda: hostile.nifti_headers(scan_voxels(99)),
    "NIfTI": lambda: hostile.nifti_odd(scan_voxels(99)),
    "NRRD": lambda: hostile.nrrd_files(scan_voxels(99)),
    "FreeSurfer": lambda: hostile.freesurfer_files(scan_voxels(99)),
}
CASE_OF = {  # files that a whole case leaves behind
    "lung": "images/p001_slice_*.png",
    "spine": "cases/sub-p001.h5",
    "organs": "cases/p001.h5",
    "head": "cases/p001.h5",
    "atrium": "imageSlice/X_001_*.npy",
}
# ---- the files themselves: made when they are asked for, as some need a converted data set ----


def labels_of(task: str) -> dict[str, Callable[[], Files]]:
    voxels = label_voxels(*LABELS[task])
    return {
        "NIfTI headers": lambda: hostile.nifti_headers(voxels),
        "NIfTI": lambda: hostile.nifti_odd(voxels),
        "NRRD": lambda: hostile.nrrd_files(voxels),
        "FreeSurfer": lambda: hostile.freesurfer_files(voxels),
    }


def only_nifti(kinds: dict[str, Callable[[], Files]]) -> dict[str, Callable[[], Files]]:
    return {name: make for name, make in kinds.items() if name.startswith("NIfTI")}


def first_file(task: str, pattern: str) -> bytes:
    return next(iter(sorted(converted(task).glob(pattern)))).read_bytes()


def notes_of(task: str, name: str) -> dict[str, Callable[[], Files]]:
    return {"JSON": lambda: hostile.json_files(json.loads(first_file(task, name)))}


def caches_of(task: str) -> dict[str, Callable[[], Files]]:
    return {"HDF5": lambda: hostile.hdf5_files(first_file(task, "cases/*.h5"))}


def png_only() -> Files:
    return {name: content for name, content in hostile.pictures().items() if name.endswith(".png")}


@functools.cache
def trained(script: str) -> Path:
    """Folder of a whole run of a train script."""
    folder = kept_folder() / script.replace("/", "_")
    folder.mkdir()
    outcome = run_script(script, train_flags(script, converted(TRAIN[script]), folder / "out"), folder)
    assert outcome.code == 0 and not outcome.problems, (outcome.told, outcome.problems)
    return next((folder / "out").glob("**/log.txt")).parent


def last_of(script: str) -> dict:
    return torch.load(trained(script) / "weights" / "last.pt", weights_only=True)


# ---- where they go ----


def resumed(script: str) -> Callable[[Path, Files], list]:
    """--resume with a damaged last.pt in the folder of a run."""

    def prepare(sandbox: Path, files: Files) -> list:
        ((_, content),) = files.items()
        run = sandbox / "out" / "run"
        place(run, "weights/last.pt", content)
        (run / "log.txt").write_text("a line\n")
        return ["--resume", run]

    return prepare


def weights_flags(task: str, script: str) -> Callable[[Path], list]:
    """The other flags of a script that gets a damaged checkpoint by --weights."""

    def flags(sandbox: Path) -> list:
        if script.endswith("predict"):
            return scans_to_predict(task)(sandbox, {})[2:]
        return ["--data_path", copied(task, sandbox), "--out", sandbox / "out", *CPU]

    return flags


def evaluation_of_data(task: str) -> Callable[[Path], list]:
    """evaluate.py --weights on the converted data set in `data`."""

    def flags(sandbox: Path) -> list:
        weights = saved_weights(task, sandbox / "weights")
        more = {"lung": ["--part", "val"], "spine": ["--part", "val"], "atrium": ["--split", "train"]}[task]
        return ["--weights", weights, "--data_path", sandbox / "data", "--out", sandbox / "out", *CPU, *more]

    return flags


def notes_before_conversion(task: str, name: str) -> Callable[[Path, Files], list]:
    """preprocess.py once more, on a data set with a damaged file of notes."""

    def prepare(sandbox: Path, files: Files) -> list:
        ((_, content),) = files.items()
        raw_data(task, sandbox / "raw")
        flags = preprocess_flags(task, sandbox / "raw", sandbox / "out")
        run_script(f"{TASKS[task]}/preprocess", flags, sandbox)
        place(sandbox / "out", name, content)
        return flags

    return prepare


def beside_raw_data(task: str, name: str) -> Callable[[Path, Files], list]:
    """preprocess.py on whole scans with a damaged file beside them."""

    def prepare(sandbox: Path, files: Files) -> list:
        ((_, content),) = files.items()
        raw_data(task, sandbox / "raw")
        place(sandbox / "raw", name, content)
        return preprocess_flags(task, sandbox / "raw", sandbox / "out")

    return prepare


def centroids(sandbox: Path, files: Files) -> list:
    raw_data("spine", sandbox / "raw", scans={f"{name}.nii": nifti(scan_voxels(7)) for name in files})
    for number, content in enumerate(files.values()):
        name = f"derivatives/sub-p{101 + number}/sub-p{101 + number}_seg-subreg_ctd.json"
        place(sandbox / "raw", name, content)
    return preprocess_flags("spine", sandbox / "raw", sandbox / "out")


def centroid_file() -> Files:
    places = [{"direction": ["L", "A", "S"]}, {"label": 20, "X": 8.0, "Y": 10.0, "Z": 8.0}]
    files = hostile.json_files({"places": places})
    changed = [
        [{"direction": ["L", "A"]}, places[1]],
        [{"direction": "LAS"}, places[1]],
        [{"direction": ["Q", "A", "S"]}, places[1]],
        [{"direction": ["L", "L", "S"]}, places[1]],
        [places[0], {"label": "L1", "X": 8.0, "Y": 10.0, "Z": 8.0}],
        [places[0], {"label": 20, "X": 1e300, "Y": 10.0, "Z": 8.0}],
        [places[0], {"label": 20, "X": None, "Y": [1], "Z": 8.0}],
        [places[0], {"label": 20}],
        [places[0], places[1], places[1]],
        [places[0], 7],
        [places[1]],
        [None, None],
    ]
    return files | {f"places_{i}.json": json.dumps(value).encode() for i, value in enumerate(changed)}


def slices_to_predict(sandbox: Path, files: Files) -> list:
    flags = scans_to_predict("lung")(sandbox, files)
    (sandbox / "in" / "whole.nii").unlink()
    place(sandbox / "in", "whole.png", first_file("lung", "images/*.png"))
    return flags


def maps_of_slices(sandbox: Path) -> list:
    flags = ["--checkpoint", saved_weights("atrium", sandbox / "out"), "--data_path", sandbox / "data"]
    flags += ["--split", "train", "--scales", 1.0, "--output_dir", sandbox / "out/attention"]
    return [*flags, "--cam_npy_dir", sandbox / "out/cam", "--attn_npy_dir", sandbox / "out/npy", *CPU]


def volumes_to_score(sandbox: Path, files: Files) -> list:
    """lung_tumor/evaluate.py reads the scans themselves: those of p002 to p004 are damaged."""
    weights, source = saved_weights("lung", sandbox / "weights"), raw_data("lung", sandbox / "raw")
    for number, (name, content) in enumerate(files.items()):
        (source / "imagesTr" / f"p{2 + number:03d}.nii").unlink()
        place(source / "imagesTr", f"p{2 + number:03d}{ending_of(name)}", content)
    flags = ["--weights", weights, "--data_path", copied("lung", sandbox), "--source", source]
    volumes = [f"p{n:03d}" for n in range(1, NUM_WHOLE + 1)]
    return [*flags, "--volumes", *volumes, "--out", sandbox / "out", *CPU]


def table_flags(sandbox: Path) -> list:
    place(sandbox / "b", "results.csv", TABLE.encode())
    return ["--out", sandbox / "out", sandbox / "b/results.csv"]


TABLE = "case,patient,dice,hd95_mm\na,a,0.5,3\nb,b,0.6,2\nc,c,0.7,1\n"


def compared(sandbox: Path, files: Files) -> list:
    ((name, content),) = files.items()
    return [place(sandbox / "a", name, content), *table_flags(sandbox)]


def compared_masks(sandbox: Path, files: Files) -> list:
    flags = masks_to_score("organs", "pred")(sandbox, files)
    return [flags[1], flags[1], "--target", flags[3], "--out", sandbox / "out"]


def label_maps(sandbox: Path, files: Files) -> list:
    for name, content in (files | {"whole.nii": nifti(label_voxels(20, 21))}).items():
        place(sandbox / "in", name, content)
    return ["--source", sandbox / "in", "--out", sandbox / "out", "--workers", 0]


def checked_data(sandbox: Path, files: Files) -> list:
    source = raw_data("organs", sandbox / "raw", labels=files)
    return ["--data_path", source, "--out", sandbox / "out", "--workers", 0]


def views(sandbox: Path, files: Files) -> list:
    ((name, content),) = files.items()
    return ["--mask", place(sandbox / "in", name, content), "--out", sandbox / "out"]


def archive_flags(sandbox: Path) -> list:
    return ["--out", sandbox / "out" / "raw"]


def zipped(sandbox: Path, files: Files) -> list:
    ((_, content),) = files.items()
    place(sandbox / "zips", "dataset-verse19training.zip", content)
    return ["--out", sandbox / "out" / "verse", "--archives", sandbox / "zips", "--parts", "training"]


def pretrained_flags(sandbox: Path) -> list:
    return train_flags("wsss_medical/dist_train", copied("atrium", sandbox), sandbox / "out")


def archive_members(task: str, inside: str) -> Files:
    scan, label = nifti(scan_voxels()), nifti(label_voxels(*LABELS[task]))
    names = raw_names(task, "p001", ".nii", ".nii")
    return {f"{inside}{names[0]}": scan, f"{inside}{names[1]}": label}


def roi_flags(sandbox: Path) -> list:
    return [flag for flag in scans_to_predict("spine")(sandbox, {}) if flag != "--no_roi"]


def roi_files() -> Files:
    return hostile.json_files(
        {"shape": [18, 20, 16], "roi": [[0, 0, 0], [18, 20, 16]], "spacing_mm": [4, 4, 4]}
    )


# ---- all of them ----


def all_entries() -> dict[str, Entry]:
    entries = {}
    for task, folder in TASKS.items():
        predict, preprocess, evaluate = (f"{folder}/{s}" for s in ("predict", "preprocess", "evaluate"))
        read = only_nifti if task == "spine" else dict
        done = "whole_mask*" if task != "lung" else "whole_mask*"
        entries[predict] = Entry(predict, scans_to_predict(task), SCANS, 8, f"**/{done}")
        for which, kinds in (("scans", SCANS), ("labels", labels_of(task))):
            prepare = raw_to_convert(task, which)
            entries[f"{preprocess} {which}"] = Entry(preprocess, prepare, read(kinds), 8, CASE_OF[task])
        if task != "lung":
            for which in ("pred", "target"):
                prepare, kinds = masks_to_score(task, which), read(labels_of(task))
                entries[f"{evaluate} {which}"] = Entry(evaluate, prepare, kinds, 8, "*.csv")
        weights = {"checkpoints": functools.partial(lambda t: hostile.checkpoints(weights_of(t)), task)}
        prepare = flag_with_file("--weights", weights_flags(task, predict))
        entries[f"{predict} --weights"] = Entry(predict, prepare, weights)
        note = "volumes.json" if task == "lung" else "preprocessing.json"
        prepare = notes_before_conversion(task, note)
        entries[f"{preprocess} again"] = Entry(preprocess, prepare, notes_of(task, note), most=40)
        if task != "spine":
            prepare, kinds = beside_raw_data(task, "dataset.json"), {"JSON": decathlon_notes}
            entries[f"{preprocess} dataset.json"] = Entry(preprocess, prepare, kinds, most=40)
        prepare = flag_with_file("--config", functools.partial(lambda t, s: scans_to_predict(t)(s, {}), task))
        entries[f"{predict} --config"] = Entry(predict, prepare, {"YAML": hostile.yaml_files})
    for script, task in TRAIN.items():
        last = {"checkpoints": functools.partial(lambda s: hostile.checkpoints(last_of(s)), script)}
        entries[f"{script} --resume"] = Entry(script, resumed(script), last, most=60)
        flags = functools.partial(lambda s, t, box: train_flags(s, copied(t, box), box / "out"), script, task)
        entries[f"{script} --config"] = Entry(
            script, flag_with_file("--config", flags), {"YAML": hostile.yaml_files}, most=15
        )
        for name in {"lung": ("dataset.json", "volumes.json", "splits.json"), "atrium": ("slices.json",)}.get(
            task, ("preprocessing.json",)
        ):
            prepare = file_of_data(task, name, script)
            entries[f"{script} {name}"] = Entry(script, prepare, notes_of(task, name), most=40)
        if task in ("spine", "organs", "head"):
            prepare = file_of_data(task, "cases/*.h5", script)
            entries[f"{script} cases"] = Entry(script, prepare, caches_of(task))
    pictures, arrays = {"pictures": png_only}, {"arrays": hostile.arrays}
    for part in ("images", "labels"):
        prepare = file_of_data("lung", f"{part}/*.png", "lung_tumor/train")
        entries[f"lung_tumor/train {part}"] = Entry("lung_tumor/train", prepare, pictures)
        prepare = file_of_data("lung", f"{part}/*.png", "", evaluation_of_data("lung"))
        entries[f"lung_tumor/evaluate {part}"] = Entry("lung_tumor/evaluate", prepare, pictures)
    for part in ("imageSlice", "maskSlice"):
        script = "wsss_medical/dist_train"
        entries[f"{script} {part}"] = Entry(
            script, file_of_data("atrium", f"{part}/*_003_007_1.npy", script), arrays
        )
        for script, more in (("evaluate", evaluation_of_data("atrium")), ("gen_attn", maps_of_slices)):
            prepare = file_of_data("atrium", f"{part}/*_003_007_1.npy", "", more)
            entries[f"wsss_medical/{script} {part}"] = Entry(f"wsss_medical/{script}", prepare, arrays)
    prepare = file_of_data("spine", "cases/*.h5", "", evaluation_of_data("spine"))
    entries["verse_spine/evaluate cases"] = Entry("verse_spine/evaluate", prepare, caches_of("spine"))
    for task in ("lung", "spine", "atrium"):
        script = f"{TASKS[task]}/evaluate"
        kinds = {"checkpoints": functools.partial(lambda t: hostile.checkpoints(weights_of(t)), task)}
        prepare = flag_with_file("--weights", weights_flags(task, script))
        entries[f"{script} --weights"] = Entry(script, prepare, kinds, most=30)
    sheet = "name,subject,site\np001,s1,a\np002,s2,a\np003,s3,b\np004,s4,b\n"
    heads = lambda box: preprocess_flags("head", raw_data("head", box / "raw"), box / "out")  # noqa: E731
    zips = lambda: hostile.zips(archive_members("spine", ""))  # noqa: E731
    tars = lambda: hostile.tars(archive_members("lung", "Task06_Lung/"))  # noqa: E731
    atrium = lambda: hostile.safetensors_files(  # noqa: E731
        {name: value.clone() for name, value in weights_of("atrium")["model"].items()}
    )
    pth = lambda: hostile.checkpoints(weights_of("atrium"))  # noqa: E731
    tables, labels = {"CSV": lambda: hostile.csv_files(TABLE)}, labels_of("spine")
    one = {
        "lung_tumor/predict slices": Entry(
            "lung_tumor/predict", slices_to_predict, {"pictures": hostile.pictures}, 8, "**/whole_mask.png"
        ),
        "lung_tumor/evaluate scans": Entry(
            "lung_tumor/evaluate", volumes_to_score, only_nifti(SCANS), 3, "per_volume.csv"
        ),
        "lung_tumor/download": Entry(
            "lung_tumor/download", flag_with_file("--archive", archive_flags), {"tar": tars}
        ),
        "verse_spine/download": Entry("verse_spine/download", zipped, {"zip": zips}),
        "verse_spine/preprocess centroids": Entry(
            "verse_spine/preprocess", centroids, {"JSON": centroid_file}, 8, CASE_OF["spine"]
        ),
        "verse_spine/predict --roi": Entry(
            "verse_spine/predict", flag_with_file("--roi", roi_flags), {"JSON": roi_files}, most=40
        ),
        "verse_spine/stats": Entry("verse_spine/stats", label_maps, labels, 8, "*.csv"),
        "verse_spine/views": Entry("verse_spine/views", views, labels, most=60),
        "amos_lha/check_data": Entry(
            "amos_lha/check_data", checked_data, labels_of("organs"), 8, "check.csv"
        ),
        "common/compare": Entry("common/compare", compared, tables),
        "common/compare --target": Entry("common/compare", compared_masks, labels_of("organs"), 8, "*.csv"),
        "amygdala/preprocess --subjects": Entry(
            "amygdala/preprocess",
            flag_with_file("--subjects", heads),
            {"CSV": lambda: hostile.csv_files(sheet)},
        ),
        "wsss_medical/dist_train --pretrained": Entry(
            "wsss_medical/dist_train",
            flag_with_file("--pretrained", pretrained_flags),
            {"safetensors": atrium, "checkpoints": pth},
            most=40,
        ),
    }
    return entries | one


def decathlon_notes() -> Files:
    training = [{"image": "./imagesTr/p001.nii", "label": "./labelsTr/p001.nii"}]
    names = {"0": "background", "1": "structure"}
    return hostile.json_files({"modality": {"0": "CT"}, "labels": names, "training": training, "test": []})


ENTRIES = all_entries()
