"""What goes wrong on any machine, in one sentence: too little memory, dead data workers, full disks."""

import atexit
import contextlib
import errno
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

SHM = Path("/dev/shm")  # through which data workers pass batches on Linux
NOT_HANDED_OVER = 75  # exit code of a data worker that could not pass its batch on

# Not every script has all of these flags.
LESS = "close other programs, or give smaller values to those of --batch_size, --patch_size and --workers"
LESS += " that this script has"
GPU_LESS = "--device cpu needs none, a smaller --batch_size less, and --vram fits a training run to a card"

# Number of the system in front of its words, also within the text of another error.
NUMBER = re.compile(r"\[(Errno|WinError) -?\d+\] ")
# What torch's and oneDNN's RuntimeErrors say.
NO_GPU_MEMORY = re.compile(r"CUDA error: out of memory|CU\w+_STATUS_ALLOC_FAILED|(CUDA|MPS\w*) out of memory")
NO_MEMORY = re.compile(
    r"DefaultCPUAllocator|bad_alloc|could not create a (memory|primitive)|[Cc]annot allocate memory|"
    r"can't start new thread"
)
NO_ROOM_TO_SHARE = re.compile(r"shared memory|</torch_\d|Too many open files|ancdata")
CAUGHT = re.compile(r"Caught (\w+) in (DataLoader worker process|pin memory thread)")
SIGNALS = {member.value: member.name for member in signal.Signals}
NO_PEER = re.compile(r"gloo|NCCL(?! built in)|[Cc]onnection (closed|reset) by|ProcessGroup|TCPStore")


def sentence(error: BaseException) -> str | None:
    """What went wrong and what to do; None for an error that only a change of the code would mend.

    ValueError and OSError of this project say it themselves. The others are those of the machine: no memory,
    no room, another process that has ended.
    """
    text, kind = NUMBER.sub("", first_line(str(error))), type(error).__name__
    if kind == "OutOfMemoryError" or NO_GPU_MEMORY.search(text):  # of torch, which need not be loaded here
        return f"out of GPU memory; {GPU_LESS} ({text})"
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return f"out of memory; {LESS} ({text or 'no further details'})"
    if isinstance(error, OSError):
        return _of_files(error)
    if isinstance(error, ValueError):
        return NUMBER.sub("", str(error)) or None
    if not isinstance(error, RuntimeError):
        return None
    text = re.sub(r"^\[[^\]]*:\d+\] *(err == 0\.|data\.|\.)? *", "", text)  # the place in torch's code
    if NO_MEMORY.search(text):
        return f"out of memory; {LESS} ({text})"
    if "EADDRINUSE" in text:
        return f"the processes cannot find each other, give torchrun another --master_port ({text})"
    if kind in ("DistBackendError", "DistNetworkError", "DistStoreError") or NO_PEER.search(str(error)):
        why = "another process of this run has ended, and its own message says why, or cannot be reached"
        return f"{why}; start the command again, a training run with --resume ({text})"
    if NO_ROOM_TO_SHARE.search(text):
        return f"{no_room_to_share()} ({text})"
    return None


@contextlib.contextmanager
def ending_in_a_sentence() -> Iterator[None]:
    """An error inside that has a `sentence` ends the program with "error: " and that, exit code 1."""
    try:
        yield
    except Exception as error:
        reason = sentence(error)
        if reason is None:
            raise
        raise SystemExit(f"error: {reason}") from error


def no_room_to_share() -> str:
    """The sentence about too little shared memory."""
    return (
        f"data workers found no room to pass their batches on: {_shared_memory()} is too small, or too many "
        "files are open; use --workers 0, or give the container more (docker run --shm-size 2g)"
    )


def first_line(said: object) -> str:
    """The first line of a text or of what an error says; of an error that says nothing its type."""
    line = str(said).split("\n")[0]
    return line or (type(said).__name__ if isinstance(said, BaseException) else "")


def _shared_memory() -> str:
    if not SHM.is_dir():
        return "shared memory"
    return f"{SHM}, of which {shutil.disk_usage(SHM).free >> 20} MiB are free,"


def _of_files(error: OSError) -> str | None:
    """An error of the system without its number, with the file if it has one."""
    text = NUMBER.sub("", str(error))
    if error.filename is not None and error.strerror:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    if text.endswith(os.strerror(errno.ENOSPC)):  # where this project did not say more
        text += "; make room where results and temporary files are written, then start the command again"
    if text.endswith(os.strerror(errno.EMFILE)):
        text += "; raise the limit of open files (ulimit -n 4096), or use fewer --workers"
    return text or None


# ---- data workers ----


def start_worker(worker_id: int) -> None:
    """Called in each data worker when it starts.

    Ctrl-C and a scheduler's SIGTERM reach data workers too, but only the main process should act. A worker
    that cannot pass a batch on ends: of itself it would print a traceback, and the main process would wait
    for that batch for ever. Of a crash torch would print a line; the main process says it better.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for name in ("SIGBUS", "SIGSEGV", "SIGFPE"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)


def _end_worker(error: Exception, item: object) -> None:
    os._exit(NOT_HANDED_OVER)


def read_batches(loader: Iterable, num_workers: int) -> Iterator:
    """The batches of a DataLoader; what goes wrong in its workers ends as one sentence.

    torch notes a dead worker by a signal whose handler raises an error in whatever the main process does just
    then, such as writing a checkpoint or scoring a case. Here it is noted where its batch is waited for.

    Args:
        loader: its workers begin with `start_worker`.
        num_workers: 0 = it has none.

    Raises:
        ValueError: a worker has ended, or could not be started; or what its data set raised.
    """
    try:
        if num_workers:
            # What the loader's queues take of shared memory: with less, torch prints a traceback of its own.
            tried = [multiprocessing.Semaphore() for _ in range(8 + 3 * num_workers)]
            tried.clear()
        batches = iter(loader)
    except OSError as error:
        reason = error.strerror or error
        if error.errno in (errno.ENOSPC, errno.EACCES, errno.ENOSYS, errno.EROFS, errno.ENOENT):
            raise ValueError(f"{no_room_to_share()} ({reason})") from error
        why = f"{num_workers} data workers could not be started ({reason})"
        raise ValueError(f"{why}; use fewer, or --workers 0") from error
    workers = list(getattr(batches, "_workers", ()))  # those of this loader; they stay from epoch to epoch
    if workers:
        atexit.unregister(end_children)  # once is enough
        atexit.register(end_children)
    if workers and hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            reason = None
            if not CAUGHT.match(str(error)):  # a broken connection, most likely, a moment before its end
                _wait_for_one(workers)
                reason = of_workers(workers)
            reason = reason or _raised_in_worker(error)
            if reason is None:
                raise
            raise ValueError(reason) from error
        yield batch


def _wait_for_one(workers: Iterable[BaseProcess]) -> None:
    """Wait until one of these processes has ended, or for five seconds."""
    by_sentinel = {worker.sentinel: worker for worker in workers}
    if by_sentinel:  # to wait for none would take all of the time
        for sentinel in multiprocessing.connection.wait(list(by_sentinel), timeout=5):
            by_sentinel[sentinel].join(5)


def of_workers(workers: Iterable[BaseProcess]) -> str | None:
    """Why one of these processes that did not end by itself has ended; None if all live or are done."""
    codes = [worker.exitcode for worker in workers if worker.exitcode]
    if not codes:
        return None
    if NOT_HANDED_OVER in codes:
        return no_room_to_share()
    code = min(codes)  # that of a signal is negative, and says more
    name = SIGNALS.get(-code, f"signal {-code}") if code < 0 else f"exit code {code}"
    if name == "SIGBUS":
        why = f"a file that it read was cut off meanwhile, or {_shared_memory()} was too small"
        return f"a data worker had a bus error (SIGBUS): {why}; check the data set, or use --workers 0"
    if name == "SIGKILL":
        return f"a data worker was killed (SIGKILL), most likely by a system short of memory; {LESS}"
    return f"a data worker ended unexpectedly ({name}); start again with --resume --workers 0 to see why"


def _raised_in_worker(error: Exception) -> str | None:
    """The sentence of an error that a data worker passed on, which torch words as a whole traceback."""
    caught = CAUGHT.match(str(error))
    if not caught:
        return sentence(error)
    lines = str(error).rpartition("Traceback (most recent call last):\n")[2].rstrip().split("\n")
    while len(lines) > 1 and lines[0].startswith(" "):  # files, lines of code
        lines.pop(0)
    text = "\n".join(lines).partition(": ")[2]
    for kind in (MemoryError, OSError, ValueError, RuntimeError):
        if isinstance(error, kind) or caught[1].endswith(kind.__name__):
            return sentence(kind(text))
    return None


def end_children() -> None:
    """At exit, before multiprocessing's own handler, which waits for ever for workers that ignore SIGTERM."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as lost
    for child in multiprocessing.active_children():
        child.kill()
