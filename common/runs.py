"""What a run leaves behind: folder, log, metrics.csv, checkpoints; and how it is stopped and continued."""

import atexit
import contextlib
import csv
import multiprocessing
import os
import pickle
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from common import distributed

# ---- folder, configuration, log ----


def new_run_dir(root: str | Path, name: str) -> Path:
    """Create and return root/name, or root/name_2, root/name_3, ... where earlier runs lie."""
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise ValueError(f"{name!r} is no name for a run; use letters, digits, '_', '-', '+' and '.'")
    number, run_dir = 1, Path(root) / name
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        while True:
            try:
                run_dir.mkdir()
                return run_dir
            except FileExistsError:
                number += 1
                run_dir = Path(root) / f"{name}_{number}"
    except OSError as error:
        raise OSError(
            f"{run_dir}: cannot be created ({error.strerror}); choose a folder you may write to"
        ) from error


def run_dir_of(weights: str | Path) -> Path:
    """Folder for what is made with these weights: that of their run, or theirs if they lie outside of one."""
    folder = Path(weights).resolve().parent
    return folder.parent if folder.name == "weights" else folder


def find_checkpoint(resume: str, root: str | Path, name: str) -> Path:
    """The last.pt that --resume means: a file, a run folder, or "last" = the newest run called `name`."""
    if resume != "last":
        path = Path(resume)
        path = path / "weights" / "last.pt" if path.is_dir() else path
        if path.is_file() and (path.parent.name != "weights" or not (path.parents[1] / "log.txt").is_file()):
            # Resuming writes into the run's folder; a stray copy would write into somebody else's.
            raise ValueError(f"--resume {path}: lies in no run folder (<run>/weights/last.pt beside log.txt)")
        if not path.is_file():
            raise FileNotFoundError(f"--resume {resume}: no such checkpoint")
        return path
    pattern = re.compile(re.escape(name) + r"(_\d+)?")
    found = [p for p in Path(root).glob("*/weights/last.pt") if pattern.fullmatch(p.parents[1].name)]
    if not found:
        raise FileNotFoundError(f"--resume: no run called {name} with a weights/last.pt under {root}")
    return max(found, key=lambda p: p.stat().st_mtime)


def save_config(path: str | Path, config: dict) -> None:
    """Write flag values as YAML: `--config` of this file repeats the run."""
    Path(path).write_text(yaml.safe_dump(config, sort_keys=True), encoding="utf8")


def git_state() -> str:
    """Commit of this checkout and whether files differ from it, for the log."""
    folder = Path(__file__).resolve().parent
    try:
        run = dict(cwd=folder, capture_output=True, text=True, timeout=10, check=True)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain"], **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown (not a git checkout)"
    return f"{commit} ({'dirty: files differ from it' if dirty else 'clean'})"


def start_log(run_dir: Path, config: dict, history: list[dict]) -> Callable[[str], None]:
    """Make weights/, config.yaml and metrics.csv with `history`, the epochs that a resumed run has done.

    Returns:
        A function that prints a line and appends it to log.txt; silent on all ranks but 0. The first lines,
        with command, commit and versions, are written here.
    """
    if distributed.is_main():
        (run_dir / "weights").mkdir(parents=True, exist_ok=True)
        save_config(run_dir / "config.yaml", config)
        (run_dir / "metrics.csv").unlink(missing_ok=True)
        for row in history:
            append_row(run_dir / "metrics.csv", row)

    def log(message: str) -> None:
        if distributed.is_main():
            print(message, flush=True)
            with (run_dir / "log.txt").open("a", encoding="utf8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    log(f"command: {shlex.join([Path(sys.executable).name, *sys.argv])}")
    log(f"commit: {git_state()}")
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    log(f"python {platform.python_version()}, torch {torch.__version__}{cuda}, numpy {np.__version__}")
    return log


def append_row(path: str | Path, row: dict) -> None:
    """Add one line to a CSV file whose columns are those of its first row.

    Later rows may lack a column, which stays empty there; what has no column is left out.
    """
    path = Path(path)
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a+", newline="", encoding="utf8") as file:
        file.seek(0)
        columns = list(row) if is_new else next(csv.reader(file))
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        if is_new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def open_wandb(project: str, name: str, config: dict) -> Any:
    """A Weights & Biases run, None on all ranks but 0; wandb is imported here only.

    Raises:
        SystemExit: wandb is not installed.
    """
    if not distributed.is_main():
        return None
    try:
        import wandb
    except ImportError as error:
        raise SystemExit("--use_wandb needs the wandb package: pip install wandb") from error
    return wandb.init(project=project, name=name, config=config)


# ---- seeds and random states ----


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch. `deterministic` also restricts CUDA to repeatable kernels."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  libraries draw from the global state
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at its first call
        torch.use_deterministic_algorithms(True, warn_only=True)


def rng_state() -> dict:
    """States of all random generators as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": [
            str(name),
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict) -> None:
    """Put all random generators back to where `rng_state` found them."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


# ---- checkpoints ----


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write tensors and plain values so that a reader never sees half a file; rank 0 only.

    Temporary name, fsync, rename: whatever goes wrong, the previous checkpoint of that name survives.

    Raises:
        TypeError: `state` holds something that `torch.load(weights_only=True)` would refuse; names where.
        OSError: disk full or no permission.
    """
    if not distributed.is_main():
        return
    _require_plain(state, "checkpoint")
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a failed write into RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else None
        reason = reason or str(error).split("\n")[0]
        kept = f"the earlier {path.name} is untouched" if path.exists() else "nothing was written"
        raise OSError(
            f"{path}: checkpoint could not be written ({reason}); {kept}. Free space or check permissions, "
            "then go on with --resume"
        ) from error


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """Read a checkpoint without ever running code from it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it carries code or foreign objects, is damaged, or is no checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    with path.open("rb") as file:
        is_zip = zipfile.is_zipfile(file)
    if not is_zip:  # also torch.save's format before 1.6, a bare pickle
        raise ValueError(
            f"{path}: refused, because it is truncated, damaged or no checkpoint at all; a bare pickle could "
            "run code. Only checkpoints written by this project are opened"
        )
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} in it is damaged")
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many types here; each ends as one clear sentence
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            raise ValueError(
                f"{path}: refused, because it holds more than tensors and plain values and loading it could "
                "run code from the file. Only checkpoints written by this project are opened"
            ) from error
        detail = str(error).split("\n")[0]
        raise ValueError(f"{path}: not a readable checkpoint ({detail})") from error
    if not isinstance(state, dict) or "model" not in state or "config" not in state:
        raise ValueError(f"{path}: holds no 'model' and 'config'; it was not written by this project")
    return state


def _require_plain(value: Any, where: str) -> None:
    """Exact types, since reading with weights_only refuses most subclasses, a defaultdict for one."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _require_plain(key, f"the key {key!r} of {where}")
            _require_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, torch.Size):
        for index, item in enumerate(value):
            _require_plain(item, f"{where}[{index}]")
    elif type(value) not in (type(None), bool, int, float, str, torch.Tensor, nn.Parameter):
        raise TypeError(
            f"{where} is a {type(value).__name__}; checkpoints hold tensors and plain values only"
        )


def training_state(at: Namespace, **parts: Any) -> dict:
    """What a run needs to go on as if it had never stopped: its position, random states and the states of
    `parts`.

    Args:
        at: where the run stands (epoch, batch, best score, history ...), plain values.
        parts: network, optimiser, scaler, weight average: whatever has a state_dict(), or None.
    """
    states = {name: part.state_dict() if part is not None else None for name, part in parts.items()}
    return {"at": vars(at), "rng": rng_state(), **states}


def restore_training_state(state: dict, **parts: Any) -> Namespace:
    """Undo `training_state`: load the states into `parts`, set the random states, return `at`."""
    for name, part in parts.items():
        if part is not None:
            part.load_state_dict(state[name])
    set_rng_state(state["rng"])
    return Namespace(**state["at"])


def load_resumed(
    resume: str | None, root: str | Path, name: str, *, may_be_missing: bool = False
) -> tuple[dict, Path] | None:
    """(checkpoint, run folder) that --resume means; None without --resume, or if there is none and it may be.

    Raises:
        FileNotFoundError, ValueError: see `find_checkpoint`, `load_checkpoint`; or it holds weights only.
    """
    if not resume:
        return None
    try:
        path = find_checkpoint(resume, root, name)
    except FileNotFoundError:
        if may_be_missing:
            return None
        raise
    checkpoint = load_checkpoint(path)
    if "optimizer" not in checkpoint:
        raise ValueError(f"--resume {path}: holds weights only; resume from the last.pt beside it")
    return checkpoint, path.parents[1]


def require_same(kept: dict, asked: Namespace, keys: Sequence[str]) -> None:
    """Refuse to resume a run with another network.

    Raises:
        ValueError: a flag of `keys` differs; names it with both values.
    """
    for key in keys:
        if getattr(asked, key) != kept[key]:
            raise ValueError(
                f"--resume: its {key} is {kept[key]}, not {getattr(asked, key)}; a run goes on as it began"
            )


# ---- stopping ----


class StopRequest:
    """Turns SIGINT and SIGTERM into a flag: finish the step, save, exit. A second Ctrl-C stops at once.

    with StopRequest() as stop:
        ... if stop.requested: ...
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        atexit.register(_end_children)
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: signals stay as they are
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        if distributed.is_main():
            # Not print: the signal may have come in the middle of a print, which cannot be entered twice.
            with contextlib.suppress(OSError):
                os.write(1, f"\n{signal.Signals(number).name}: finishing this step, then saving\n".encode())


def _end_children() -> None:
    """At exit, before multiprocessing's own handler, which waits for ever for workers that ignore SIGTERM."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as lost
    for child in multiprocessing.active_children():
        child.kill()
