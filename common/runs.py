"""What a run leaves behind: folder, log, metrics.csv; seeds; how a run is stopped and how it goes on."""

import atexit
import contextlib
import os
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from common import distributed, faults
from common.checkpoints import load_checkpoint
from common.config import parse_args
from common.files import check_keys
from common.tables import append_row

# ---- folder, configuration, log ----


def new_run_dir(root: str | Path, name: str) -> Path:
    """Create and return root/name, or root/name_2, root/name_3, ... where earlier runs lie."""
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise ValueError(f"{name!r} cannot be the name of a run; use letters, digits, '_', '-', '+' and '.'")
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
    return folder.parent if folder.name in ("weights", "checkpoints") else folder


def find_checkpoint(resume: str, root: str | Path, name: str) -> Path:
    """The last.pt that --resume means: a file, a run folder, or "last" = the newest run called `name`."""
    if resume != "last":
        path = Path(resume).resolve()  # it may be a link to the checkpoint, which lies elsewhere
        path = path / "weights" / "last.pt" if path.is_dir() else path
        if path.is_file() and (path.parent.name != "weights" or not (path.parents[1] / "log.txt").is_file()):
            # Resuming writes into the run's folder; a stray copy would write into somebody else's.
            raise ValueError(
                f"--resume {path}: does not lie in the folder of a run, with weights/last.pt and log.txt"
            )
        if not path.is_file():
            raise FileNotFoundError(f"--resume {resume}: no such checkpoint")
        return path
    pattern = re.compile(re.escape(name) + r"(_\d+)?")
    folders = [p.parent for p in Path(root).glob("*/log.txt") if pattern.fullmatch(p.parent.name)]
    found = [p / "weights" / "last.pt" for p in folders if (p / "weights" / "last.pt").is_file()]
    if not found:
        raise FileNotFoundError(
            f"--resume: no run called {name} with a weights/last.pt under {root}; start it without --resume"
        )
    newest = max(found, key=lambda p: p.stat().st_mtime)
    for folder in folders:
        is_newer = (folder / "log.txt").stat().st_mtime > newest.stat().st_mtime
        if is_newer and not (folder / "weights" / "last.pt").is_file():
            raise FileNotFoundError(
                f"--resume: the newest run called {name}, {folder}, ended before its first checkpoint; "
                f"start it again without --resume, or go on with an earlier one: --resume {newest.parents[1]}"
            )
    return newest


def save_config(path: str | Path, config: dict) -> None:
    """Write flag values as YAML: `--config` of this file repeats the run."""
    Path(path).write_text(yaml.safe_dump(config, sort_keys=True), encoding="utf8")


def git_state() -> str:
    """Commit of this checkout and whether files differ from it, for the log."""
    folder = Path(__file__).resolve().parent

    def answer(*words: str) -> str:
        command = ["git", *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        commit, changes = answer("rev-parse", "HEAD"), answer("status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return "unknown (not a git checkout)"
    return f"{commit} ({'dirty: files differ from it' if changes else 'clean'})"


def start_log(run_dir: Path, config: dict, history: list[dict]) -> Callable[..., None]:
    """Make weights/, config.yaml and metrics.csv with `history`, the epochs that a resumed run has done.

    Returns:
        A function that prints a line, unless it is told show=False, and appends it to log.txt; silent on all
        ranks but 0. The first lines, with command, commit and versions, are written here.
    """
    if distributed.is_main():
        (run_dir / "weights").mkdir(parents=True, exist_ok=True)
        save_config(run_dir / "config.yaml", config)
        (run_dir / "metrics.csv").unlink(missing_ok=True)
        for row in history:
            append_row(run_dir / "metrics.csv", row)

    def log(message: str, *, show: bool = True) -> None:
        if distributed.is_main():
            if show:
                print(message, flush=True)
            with (run_dir / "log.txt").open("a", encoding="utf8", errors="backslashreplace") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    log(f"command: {shlex.join([Path(sys.executable).name, *sys.argv])}")
    log(f"commit: {git_state()}")
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    log(f"python {platform.python_version()}, torch {torch.__version__}{cuda}, numpy {np.__version__}")
    return log


# ---- seeds ----


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch. `deterministic` also restricts CUDA to repeatable kernels."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  libraries draw from the global state
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at its first call
        torch.use_deterministic_algorithms(True, warn_only=True)


# ---- going on with a run ----

# Attributes of a `training.Run` that its checkpoints hold under "position".
POSITION = {"epoch": int, "batch": int, "num_batches": int, "loss_sum": float | int, "counts": dict}
POSITION |= {"best": float | int, "best_epoch": int, "elapsed_s": float | int, "history": list}


def resume(
    parser: ArgumentParser,
    argv: Sequence[str] | None,
    *,
    same: Sequence[str],
    name: str | None = None,
    root: str | Path | None = None,
    stage: str | None = None,
    may_be_missing: bool = False,
) -> tuple[Namespace, dict | None, Path | None]:
    """Flag values of a train script, and the checkpoint and folder of the run that --resume goes on with.

    A run goes on with its own flags. Those of the command line win over them; those of a --config file, which
    may have changed since, do not. Lines tell which flags are others now, and which would be by the file.

    Args:
        parser: with the flags of `run_flags.add_run_flags`.
        same: flags that a run keeps, such as those that decide the network.
        name: of the run that a bare --resume means; None = --model_name.
        root: folder in which it lies; None = --out.
        stage: what the checkpoint's "stage" must be, where a task trains several kinds of network.
        may_be_missing: begin a new run where a bare --resume finds none.

    Returns:
        (flag values, checkpoint, run folder); the last two are None for a new run.

    Raises:
        FileNotFoundError, ValueError: see `find_checkpoint`, `load_checkpoint`; or it holds weights only,
            belongs to another stage, or a flag of `same` differs.
    """
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--resume", nargs="?", const="last")
    wanted = finder.parse_known_args(argv)[0].resume
    if wanted is None:
        return parse_args(parser, argv), None, None
    try:
        if wanted == "last":
            args = parse_args(parser, argv)
            path = find_checkpoint("last", root or args.out, name or args.model_name)
        else:  # its configuration supplies also the flags that a new run requires
            path = find_checkpoint(wanted, "", "")
    except FileNotFoundError:
        if may_be_missing and wanted == "last":
            return args, None, None
        raise
    checkpoint, folder = load_checkpoint(path), path.parents[1]
    if "optimizer" not in checkpoint:
        raise ValueError(f"--resume {path}: holds weights only; resume from the last.pt beside it")
    if checkpoint.get("stage") != stage:
        raise ValueError(f"--resume: {folder} is a run of another script, not of {parser.prog}")
    if "position" not in checkpoint or "flags" not in checkpoint:
        raise ValueError(
            f"--resume {path}: written by an earlier version of this project; start the run again"
        )
    check_keys(checkpoint, {"position": dict, "flags": dict, "epochs": int | None}, f"--resume {path}")
    check_keys(checkpoint["position"], POSITION, f"--resume {path}: position")
    for row in checkpoint["position"]["history"]:
        check_keys(row, {"epoch": int}, f"--resume {path}: a row of its history")
    config = checkpoint["config"]
    for name, values in (("config", config), ("flags", checkpoint["flags"])):
        if missing := [key for key in same if key not in values]:
            raise ValueError(f"--resume {path}: {name} lacks {missing[0]}; start the run again")
    args = parse_args(parser, argv, base=config, from_file=())
    for key in same:
        asked = getattr(args, key)
        if asked not in (config[key], checkpoint["flags"][key]):  # --vram may have made less of it
            raise ValueError(f"--resume: its {key} is {config[key]}, not {asked}; a run goes on as it began")
        setattr(args, key, config[key])
    if distributed.is_main():
        with_file = parse_args(parser, argv, base=config)
        for key in sorted(config.keys() & vars(args)):
            known = _plain(config[key]), _plain(checkpoint["flags"].get(key))
            now, in_file = _plain(getattr(args, key)), _plain(getattr(with_file, key))
            if now not in known:
                print(f"--resume: --{key} is {now} from here on, so far it was {known[0]}")
            elif in_file not in known:
                other = f"to make it {in_file}, as in --config, use the flag"
                begun = f"{in_file}, as in --config, needs a new run"
                print(f"--resume: --{key} stays {now}; {begun if key in same else other}")
    return args, checkpoint, folder


def resume_fold(
    parser: ArgumentParser,
    argv: Sequence[str],
    fold: int,
    model_name: str,
    amp: str,
    *,
    same: Sequence[str],
    stage: str | None = None,
) -> tuple[Namespace, dict | None, Path | None]:
    """As `resume`, for one fold of --fold all, which may have been stopped before this fold began.

    Args:
        amp: precision of the first fold, which is that of all: timed anew, another fold might get another.
    """
    one_fold, name = [*argv, "--fold", str(fold), "--amp", amp], f"{model_name}_fold{fold}"
    return resume(parser, one_fold, same=same, name=name, stage=stage, may_be_missing=True)


def with_resume(words: Sequence[str]) -> list[str]:
    """The words of a command with a bare --resume at the end, whatever --resume it had."""
    rest = []
    for before, word in zip(["", *words], words, strict=False):
        if word.split("=")[0] != "--resume" and (before, word) != ("--resume", "last"):
            rest.append(word)
    return [*rest, "--resume"]


def require_same_data(
    checkpoint: dict | None,
    split: dict[str, list[str]],
    preprocessing: dict,
    keys: Sequence[str],
    data_path: str | Path,
) -> None:
    """Refuse to go on with a run on other cases or other voxels than it began with; a new run has None.

    Args:
        keys: of `preprocessing` that must not change, such as spacing_mm.

    Raises:
        ValueError: naming both.
    """
    if checkpoint is None:
        return
    check_keys(checkpoint, {"preprocessing": dict, "split": dict}, "--resume: what the run kept")
    for key in keys:
        began, now = checkpoint["preprocessing"].get(key), preprocessing.get(key)
        if _plain(began) != _plain(now):
            raise ValueError(f"--resume: the run began with {key} {began}, {data_path} now has {now}")
    if checkpoint["split"] != split:
        raise ValueError(f"--resume: the split of {data_path} is not the one that this run began with")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


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
        atexit.register(faults.end_children)
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


def resume_command(words: Sequence[str]) -> str:
    """What the user types to go on: `words` behind python, or behind torchrun with as many processes."""
    launcher = ["python"]
    if distributed.world_size() > 1:
        launcher = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    return shlex.join([*launcher, *words])
