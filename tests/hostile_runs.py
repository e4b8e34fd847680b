"""Small data sets and models of the five tasks, damaged files put into them, and how scripts cope with it.

An entry is a script with the place where strangers' files come in. `run_entry` puts damaged files there,
beside whole ones, runs the script in this process, and returns what is wrong with how that ended.
"""

import contextlib
import functools
import importlib
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import conftest
import torch
from hostile import Files, label_voxels, nifti, scan_voxels
from test_odd_checkpoints import atrium, head, lung, organs, spine

TASKS = {"lung": "lung_tumor", "spine": "verse_spine", "organs": "amos_lha"}
TASKS |= {"head": "amygdala", "atrium": "wsss_medical"}
LABELS = {"lung": (1,), "spine": (20,), "organs": (3, 2), "head": (1, 2), "atrium": (1,)}
NUM_WHOLE = 4  # cases p001 and so on of a data set
CPU = ["--device", "cpu", "--amp", "off"]
LIMIT_S = 60  # of computing, after which a run counts as hung; whole ones take a few seconds
LIMIT_MIB = 2048
CACHES = ("cache", "small_grids")  # in a converted data set, which its readers fill
TORCH_MIB = 4096  # of address space that a run may ask for

# ---- whole data sets ----


def place(folder: Path, name: str, content: bytes | Callable[[Path], None]) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    return path


def ending_of(name: str) -> str:
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def raw_names(task: str, case: str, ending: str, label_ending: str) -> tuple[str, str]:
    """Where the scan and the label of a case lie in a raw data set."""
    if task == "spine":
        name = f"sub-{case}/sub-{case}"
        return f"rawdata/{name}_ct{ending}", f"derivatives/{name}_seg-vert_msk{label_ending}"
    return f"imagesTr/{case}{ending}", f"labelsTr/{case}{label_ending}"


def raw_data(task: str, folder: Path, scans: Files | None = None, labels: Files | None = None) -> Path:
    """A raw data set with whole cases p001 to p004, and p101 and so on with the damaged files."""
    scan, label = nifti(scan_voxels()), nifti(label_voxels(*LABELS[task]))
    pairs = {f"p{i:03d}": ((".nii", nifti(scan_voxels(i))), (".nii", label)) for i in range(1, NUM_WHOLE + 1)}
    for number, (name, content) in enumerate((scans or {}).items()):
        pairs[f"p{101 + number}"] = ((ending_of(name), content), (".nii", label))
    for number, (name, content) in enumerate((labels or {}).items()):
        pairs[f"p{201 + number}"] = ((".nii", scan), (ending_of(name), content))
    for case, ((ending, image), (label_ending, mask)) in pairs.items():
        where = raw_names(task, case, ending, label_ending)
        place(folder, where[0], image)
        place(folder, where[1], mask)
    if task != "spine":
        names = {"0": "background", "2": "right kidney", "3": "left kidney"} if task == "organs" else {}
        names = names or {"0": "background", **{str(n): f"structure {n}" for n in LABELS[task]}}
        notes = {"modality": {"0": "CT"}, "labels": names}
        place(folder, "dataset.json", json.dumps(notes).encode())
    if task == "head":  # the damaged scans are one scan, which must then be of one subject
        rows = [f"{case}\t{'p101' if case > 'p100' else case}\tsite" for case in pairs]
        place(folder, "participants.tsv", "\n".join(["name\tsubject\tsite", *rows]).encode())
    return folder


def preprocess_flags(task: str, source: Path, out: Path) -> list[str]:
    where = "--data_path" if task == "organs" else "--source"
    flags = [where, source, "--out", out, "--workers", 0]
    if task in ("spine", "organs"):
        flags += ["--spacing", 4, 4, 4]
    flags += {"head": ["--dataset", "Hippocampus"], "atrium": ["--dataset", "X", "--pixel_mm", 2]}.get(
        task, []
    )
    return [str(flag) for flag in flags]


def main_of(script: str) -> Callable[[list[str]], int]:
    return importlib.import_module(script.replace("/", ".")).main


@functools.cache
def kept_folder() -> Path:
    """For what is made once; removed at the end of this process."""
    holder = tempfile.TemporaryDirectory(prefix="hostile_")
    kept_folder.holder = holder
    return Path(holder.name)


@functools.cache
def converted(task: str) -> Path:
    """The whole cases as preprocess.py writes them."""
    folder = kept_folder() / task
    raw_data(task, folder / "raw")
    with contextlib.redirect_stdout(io.StringIO()) as told:
        code = main_of(f"{TASKS[task]}/preprocess")(preprocess_flags(task, folder / "raw", folder / "data"))
    assert code == 0, told.getvalue()
    return folder / "data"


@functools.cache
def weights_of(task: str) -> dict:
    """A checkpoint of a network that was not trained, for voxels larger than those of the scans."""
    torch.manual_seed(0)
    at_8_mm = {"spacing_mm": [8.0] * 3}
    make = {"spine": lambda: spine(data_path="x", **at_8_mm), "organs": lambda: organs(**at_8_mm)}
    make |= {"head": lambda: head(**at_8_mm), "atrium": lambda: atrium(pixel_mm=2.0), "lung": lung}
    state = make[task]()
    if "patch_size" in state["config"]:
        state["config"]["patch_size"] = [16, 16, 16]
    return state


def saved_weights(task: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights_of(task), folder / "best.pt")
    return folder / "best.pt"


# ---- one run ----


class Hang(BaseException):
    """Not an Exception, so that no script takes it for the failure of a case."""


class Outcome(NamedTuple):
    code: int
    told: str
    problems: list[str]


def status_mib(key: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+)", text)[1]) / 1024


@contextlib.contextmanager
def limits(problems: list[str]) -> Iterator[None]:
    """Turns a hang, and a need of memory, into a problem instead of a machine that stands still."""

    def hang(*_) -> None:
        raise Hang

    has_proc = Path("/proc/self/clear_refs").exists()
    if has_proc:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, begins anew
        before = status_mib("VmRSS")
        old_limit = resource.getrlimit(resource.RLIMIT_AS)
        most = int(status_mib("VmSize") + TORCH_MIB) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, old_limit[1]))
    old = [(number, signal.signal(number, hang)) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)  # of computing time
    signal.alarm(5 * LIMIT_S)  # for what waits without computing
    try:
        yield
    except Hang:
        problems.append(f"hangs for more than {LIMIT_S} s")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in old:
            signal.signal(number, handler)
        if has_proc:
            resource.setrlimit(resource.RLIMIT_AS, old_limit)
            if (grown := status_mib("VmHWM") - before) > LIMIT_MIB:
                problems.append(f"needs {grown:.0f} MiB")


def listing(folder: Path) -> dict[str, tuple]:
    found = {}
    for path in folder.rglob("*"):
        state = path.lstat()
        if not path.is_dir():
            found[str(path)] = (state.st_size, state.st_mtime_ns, state.st_ino)
    return found


# What `failure_reason` of common/conversion.py says about an error that nobody foresaw.
UNFORESEEN = re.compile(r"\w*Error:? .*\(\w+\.py, line \d+\).*|Traceback.*")


def run_script(script: str, flags: list, sandbox: Path) -> Outcome:
    """Run a script's main in an empty folder of the sandbox; it may write to `out` there and nowhere else."""
    flags, problems, code = [str(flag) for flag in flags], [], 0
    for name in ("cwd", "tmp", "out"):
        (sandbox / name).mkdir(exist_ok=True)
    before, told = listing(sandbox), io.StringIO()
    old_folder, old_temporary = Path.cwd(), tempfile.tempdir
    os.chdir(sandbox / "cwd")
    tempfile.tempdir = str(sandbox / "tmp")
    try:
        with limits(problems), contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            code = main_of(script)(flags)
    except SystemExit as stopped:
        code = stopped.code
        if isinstance(code, str):
            told.write(f"{code}\n")
            code = 1
    except Exception:
        lines = traceback.format_exc().strip().splitlines()
        places = [line.strip() for line in lines if line.strip().startswith("File")]
        problems.append(f"traceback: {lines[-1][:300]} ... {places[-1] if places else ''}")
        code = 1
    finally:
        os.chdir(old_folder)
        tempfile.tempdir = old_temporary
    told, out = told.getvalue(), str(sandbox / "out") + os.sep
    after = listing(sandbox)
    for path in sorted(before.keys() | after.keys()):
        is_cache = any(f"{os.sep}data{os.sep}{name}{os.sep}" in path for name in CACHES)
        if before.get(path) != after.get(path) and not path.startswith(out) and not is_cache:
            problems.append(f"{'changed' if path in before else 'written'} outside of --out: {path}")
    problems += [f"unforeseen: {line[:400]}" for line in told.splitlines() if UNFORESEEN.search(line)]
    if code and not told.strip() and not problems:
        problems.append(f"ends with {code} without a word")
    return Outcome(code or 0, told, problems)


# ---- entries ----


class Entry(NamedTuple):
    """A script and the place in which damaged files come.

    Attributes:
        prepare: (sandbox, files) -> flags of the script; it writes the files into the sandbox.
        kinds: {name: function that makes the files}.
        together: how many files a run gets at once.
        finished: pattern of the files in the sandbox that a run must leave behind for the whole cases.
    """

    script: str
    prepare: Callable[[Path, Files], list]
    kinds: dict[str, Callable[[], Files]]
    together: int = 1
    finished: str = ""
    most: int | None = None  # files; a seeded sample of them where there are more


def scans_to_predict(task: str) -> Callable[[Path, Files], list]:
    def prepare(sandbox: Path, files: Files) -> list:
        for name, content in files.items():
            place(sandbox / "in", name, content)
        place(sandbox / "in", "whole.nii", nifti(scan_voxels()))
        weights = saved_weights(task, sandbox / "weights")
        flags = ["--weights", weights, "--source", sandbox / "in", "--out", sandbox / "out", *CPU]
        return flags + {"spine": ["--no_roi"], "organs": ["--modality", "ct"]}.get(task, [])

    return prepare


def raw_to_convert(task: str, which: str) -> Callable[[Path, Files], list]:
    def prepare(sandbox: Path, files: Files) -> list:
        raw_data(task, sandbox / "raw", **{which: files})
        return preprocess_flags(task, sandbox / "raw", sandbox / "out")

    return prepare


def masks_to_score(task: str, damaged: str) -> Callable[[Path, Files], list]:
    """evaluate.py --pred: the damaged files are masks of "pred" or of "target"."""

    def prepare(sandbox: Path, files: Files) -> list:
        whole = nifti(label_voxels(*LABELS[task]))
        cases = {"p001": (".nii", whole)}
        cases |= {f"p{101 + i}": (ending_of(n), content) for i, (n, content) in enumerate(files.items())}
        for case, (ending, content) in cases.items():
            endings = {"pred": ".nii", "target": ".nii", damaged: ending}
            contents = {"pred": whole, "target": whole, damaged: content}
            scan, label = raw_names(task, case, ".nii", endings["target"])
            place(sandbox / "true", label, contents["target"])
            if task == "spine":
                place(sandbox / "true", scan, nifti(scan_voxels()))
            name = f"sub-{case}_ct" if task == "spine" else case
            place(sandbox / "pred", f"{name}_mask{endings['pred']}", contents["pred"])
        true = ["--source", sandbox / "true"] if task == "spine" else ["--target", sandbox / "true/labelsTr"]
        flags = ["--pred", sandbox / "pred", *true, "--out", sandbox / "out"]
        return flags + {"spine": ["--labels", "levels26"], "head": ["--dataset", "Hippocampus"]}.get(task, [])

    return prepare


def copied(task: str, sandbox: Path) -> Path:
    shutil.copytree(converted(task), sandbox / "data")
    return sandbox / "data"


def train_flags(script: str, data: Path, out: Path) -> list:
    flags = ["--data_path", data]
    if script == "wsss_medical/dist_train":
        flags += ["--work_dir", out / "run", "--backbone", "tiny", "--crop_size", 64, "--batch_size", 2]
        flags += ["--max_iters", 2, "--cam_iters", 1, "--aff_iters", 2, "--eval_iters", 1, "--scales", 1.0]
        return [*flags, "--val_slices", 4, "--workers", 0, "--no-evaluate", "--slice_split", 0.25, 0.5, *CPU]
    tiny = {
        "lung_tumor/train": conftest.TINY,
        "verse_spine/train_heatmap": conftest.TINY_HEATMAP,
        "verse_spine/train_segmentation": conftest.TINY_SEGMENTATION,
        "amos_lha/train": conftest.TINY_AMOS,
        "amygdala/train": [*conftest.TINY_AMYGDALA, "--dataset", "Hippocampus", "--fold", "0"],
    }[script]
    if script == "amygdala/train":
        flags += ["--log_path", out / "log"]  # its curves have a folder of their own
    more = [] if script == "lung_tumor/train" else ["--no-evaluate"]
    return [*flags, "--out", out, "--model_name", "run", "--epochs", 1, *tiny, *more]


def file_of_data(task: str, name: str, script: str, more: Callable[[Path], list] | None = None):
    """Training (or what `more` makes of it) on the converted data set with one of its files damaged."""

    def prepare(sandbox: Path, files: Files) -> list:
        data = copied(task, sandbox)
        ((_, content),) = files.items()
        path = next(iter(sorted(data.glob(name))), data / name)
        path.unlink(missing_ok=True)
        place(path.parent, path.name, content)
        if more:
            return more(sandbox)
        return train_flags(script, data, sandbox / "out")

    return prepare


def flag_with_file(flag: str, others: Callable[[Path], list]) -> Callable[[Path, Files], list]:
    """A script that gets the damaged file by a flag of its own."""

    def prepare(sandbox: Path, files: Files) -> list:
        ((name, content),) = files.items()
        flags = others(sandbox)
        return [*flags, flag, place(sandbox / "given", name, content)]

    return prepare


def chunks(files: Files, number: int) -> Iterator[Files]:
    items = iter(files.items())
    while part := dict(itertools.islice(items, number)):
        yield part


def run_entry(entry: Entry, files: Files, sandbox: Path) -> list[str]:
    """Problems of a run with these damaged files; none if it is as it should be."""
    outcome = run_script(entry.script, entry.prepare(sandbox, files), sandbox)
    problems = list(outcome.problems)
    if entry.finished and not problems and not list((sandbox / "out").glob(entry.finished)):
        last = outcome.told.strip().splitlines()[-1:]
        problems.append(f"the whole cases were not finished (exit code {outcome.code}, {last})")
    return problems
