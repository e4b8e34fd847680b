"""What preprocessing a data set needs: every case once, in several processes, failures collected."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any


def convert_cases(
    convert: Callable[..., Any], cases: Sequence, *arguments: Any, workers: int
) -> Iterator[tuple[Any, Any, str]]:
    """Yield (case, `convert(case, *arguments)`, "") or (case, None, reason) in the order of completion.

    A case that raises ValueError, OSError or MemoryError costs the others nothing. Ctrl-C ends after the
    cases in work.

    Args:
        convert: a function of a module (it is pickled when `workers` > 1); never returns None.
        workers: processes; 0 or 1: all in this one.
    """
    if workers < 2 or len(cases) < 2:
        for case in cases:
            try:
                yield case, convert(case, *arguments), ""
            except (ValueError, OSError, MemoryError) as error:
                yield case, None, str(error)
        return
    with ProcessPoolExecutor(min(workers, len(cases)), initializer=_ignore_interrupt) as pool:
        futures = {pool.submit(convert, case, *arguments): case for case in cases}
        try:
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result(), ""
                except BrokenProcessPool:
                    reason = "its process was ended from outside, most likely for lack of memory: --workers 0"
                    yield futures[future], None, reason
                except (ValueError, OSError, MemoryError) as error:
                    yield futures[future], None, str(error)
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C ends after the cases in work, not after all


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one decides


def write_json(path: Path, content: Any) -> None:
    """JSON in one step: a reader or an interruption never meets half a file."""
    partial = path.with_name(f".partial_{path.name}")
    partial.write_text(json.dumps(content, indent=1), encoding="utf8")
    os.replace(partial, path)


def file_stamp(paths: Sequence[Path]) -> list[list]:
    """[path, bytes, time of change] of each file: tells whether they are still the ones converted."""
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
