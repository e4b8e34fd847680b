"""Every case of a data set once, in several processes; a case that fails costs the others nothing."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any


def convert_cases(
    convert: Callable[..., Any], cases: Sequence, *arguments: Any, workers: int
) -> Iterator[tuple[Any, Any, str]]:
    """Yield (case, `convert(case, *arguments)`, "") or (case, None, reason) in the order of completion.

    Whatever a case raises is the failure of this case only. If its process is ended from outside, most likely
    by a system that is short of memory, the cases without a result are converted again one after the other.
    Ctrl-C ends after the cases in work; if this process is killed, its workers end with it.

    Args:
        convert: a function of a module, because it is pickled when `workers` > 1; never returns None.
        workers: number of processes; 0 or 1 converts all cases in this process.
    """
    if workers < 2 or len(cases) < 2:
        for case in cases:
            yield case, *_attempt(convert, case, *arguments)
        return
    unfinished = []
    with ProcessPoolExecutor(min(workers, len(cases)), initializer=_start_worker) as pool:
        futures = {pool.submit(_attempt, convert, case, *arguments): case for case in cases}
        untold = set(futures)
        try:
            for future in as_completed(futures):
                untold.remove(future)
                try:
                    yield futures[future], *future.result()
                except BrokenProcessPool:
                    unfinished.append(futures[future])
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # waits for the cases in work, whose results count
            for future in untold:
                if not future.cancelled() and future.exception() is None:
                    yield futures[future], *future.result()
            raise
        finally:
            pool.shutdown(cancel_futures=True)  # else Ctrl-C would wait for all cases
    for case in unfinished:
        with ProcessPoolExecutor(1, initializer=_start_worker) as pool:
            try:
                yield case, *pool.submit(_attempt, convert, case, *arguments).result()
            except BrokenProcessPool:
                reason = "its process was ended from outside, most likely for lack of memory"
                yield case, None, f"{reason}; close other programs or use a machine with more memory"


def failure_reason(error: Exception) -> str:
    """One failed case in words: the message of an error that was written for the user, the type of any other.

    ValueError and OSError of this project say what is wrong and what to do. Of other errors the type and the
    line of code are named as well, since their message alone (of KeyError: the key) tells little.
    """
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which need not be loaded here
        return f"out of GPU memory; use a smaller --batch_size, or --device cpu ({_first_line(text)})"
    if isinstance(error, MemoryError):
        return f"out of memory ({_first_line(text) or 'no further details'})"
    if isinstance(error, (ValueError, OSError)) and text:
        return text
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {_first_line(text)}{place}"


def file_stamp(paths: Sequence[Path]) -> list[list]:
    """[path, size in bytes, time of change in ns] of each file: tells whether it is still the one converted.

    Both size and time count: a mask that was corrected often keeps its size.
    """
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]


def _attempt(convert: Callable[..., Any], case: Any, *arguments: Any) -> tuple[Any, str]:
    """(result, "") or (None, reason); in the worker, because not every exception can be pickled."""
    try:
        return convert(case, *arguments), ""
    except Exception as error:
        return None, failure_reason(error)


def _start_worker() -> None:
    """Leave Ctrl-C, which reaches all processes, to the main process; and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this the workers of a process that was killed wait for ever for their next case."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _first_line(text: str) -> str:
    return text.split("\n")[0]
