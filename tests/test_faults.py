"""Faults of machine and files: each ends every train script in one sentence, and the run can go on."""

import errno
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_AMOS, TINY_AMYGDALA, TINY_HEATMAP, TINY_SEGMENTATION

from common import faults
from common.checkpoints import load_checkpoint
from common.faults import of_workers, read_batches, sentence

WSSS = [
    "--backbone",
    "tiny",
    "--crop_size",
    "32",
    "--batch_size",
    "2",
    "--max_iters",
    "9",
    "--cam_iters",
    "3",
]
WSSS += ["--aff_iters", "6", "--eval_iters", "3", "--scales", "1.0", "--val_slices", "4", "--no-evaluate"]
WSSS += ["--device", "cpu", "--amp", "off"]
# Script: fixture of its data, flags of a run of seconds, folder of the run.
SCRIPTS = {
    "lung_tumor/train.py": ("phantom_slices", TINY, "run"),
    "verse_spine/train_heatmap.py": ("verse_h5", [*TINY_HEATMAP, "--batch_size", "1"], "run"),
    "verse_spine/train_segmentation.py": ("verse_h5", [*TINY_SEGMENTATION, "--batch_size", "1"], "run"),
    "amos_lha/train.py": ("amos_h5", TINY_AMOS, "run"),
    "amygdala/train.py": ("amygdala_h5", [*TINY_AMYGDALA, "--fold", "0"], "Amygdala/run/fold_0"),
    "wsss_medical/dist_train.py": ("wsss_slices", WSSS, ""),
}


@pytest.fixture(scope="session")
def wsss_slices(tmp_path_factory) -> Path:
    """Six patients with six slices of 32 x 32: noise, and a bright square in the middle slices."""
    root = tmp_path_factory.mktemp("wsss") / "slices"
    (root / "imageSlice").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for patient in range(6):
        for z in range(6):
            image = rng.integers(20, 80, (32, 32)).astype(np.uint8)
            has_square = z in (2, 3, 4)
            image[10:22, 8:20] += 150 * has_square
            np.save(root / "imageSlice" / f"X_{patient:03d}_{z:03d}_{int(has_square)}.npy", image)
    return root


# ---- sentences ----


@pytest.mark.parametrize(
    "error, beginning",
    [
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "out of GPU memory; --device cpu"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "out of GPU memory; --device cpu"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory; close other programs"),
        (RuntimeError("could not create a primitive"), "out of memory; close other programs"),
        (RuntimeError("std::bad_alloc"), "out of memory; close other programs"),
        (OSError(errno.EACCES, "Permission denied", "a/b.csv"), "a/b.csv: Permission denied"),
        (OSError(errno.ENOSPC, "a/x.h5: could not be written (full); make room"), "a/x.h5: could not be"),
        (OSError(errno.ENOSPC, "No space left on device", "a"), "a: No space left on device; make room"),
        (OSError(errno.EMFILE, "Too many open files", "a"), "a: Too many open files; raise the limit"),
        (OSError("<urlopen error [Errno -2] Name or service not known>"), "<urlopen error Name or"),
        (OSError("[WinError 112] There is not enough space on the disk"), "There is not enough space"),
        (ValueError("a.h5: ([Errno 13] Permission denied)"), "a.h5: (Permission denied)"),
        (ValueError("case 7: no label"), "case 7: no label"),
        (RuntimeError("NCCL communicator was aborted"), "another process of this run has ended"),
        (RuntimeError("listen failed. EADDRINUSE"), "the processes cannot find each other"),
    ],
)
def test_a_sentence_for_what_no_change_of_the_code_would_mend(error, beginning):
    assert sentence(error).startswith(beginning)
    assert "\n" not in sentence(error) and "Errno" not in sentence(error)


def test_what_torch_says_when_memory_is_out():
    """The allocation is refused at once: nobody has four petabytes."""
    with pytest.raises(RuntimeError) as refused:
        torch.empty(10**15)
    assert sentence(refused.value).startswith("out of memory; close other programs, or give smaller ")
    assert "you tried to allocate 4000000000000000 bytes" in sentence(refused.value)
    assert "enforce fail" not in sentence(refused.value)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 cannot be multiplied"), KeyError("affine")])
def test_a_mistake_of_the_program_has_no_sentence(error):
    assert sentence(error) is None


# ---- data workers ----


class Items(torch.utils.data.Dataset):
    """Items that are their own index; item 5 does what `fault` says."""

    def __init__(self, fault=None) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index):
        if index == 5 and self.fault:
            self.fault()
        return torch.tensor(index)


def worker_loader(fault=None, timeout_s: float = 0) -> torch.utils.data.DataLoader:
    """With `timeout_s` torch looks so often whether workers still live, else every five seconds."""
    return torch.utils.data.DataLoader(
        Items(fault), 2, num_workers=2, worker_init_fn=faults.start_worker, timeout=timeout_s
    )


@pytest.fixture
def no_worker_left():
    """Else torch would wait for workers, 20 seconds, whose queues are gone with the error that held them.

    The signal of a child's end stays at its default: torch's handler would report the killed workers in the
    middle of the next test.
    """
    yield
    children = multiprocessing.active_children()
    faults.end_children()
    for child in children:
        child.join()


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def raise_damaged():
    raise ValueError("a/case_3.h5: damaged: Traceback: it cannot be read;\n  make it again")


def raise_os_error():
    raise OSError(errno.EIO, "Input/output error", "a/case_3.h5")


def raise_numpy_memory():
    np.zeros(10**15)


def raise_torch_memory():
    torch.empty(10**15)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    "fault, expected",
    [
        (raise_damaged, "a/case_3.h5: damaged: Traceback: it cannot be read;\n  make it again"),
        (raise_os_error, "Input/output error: 'a/case_3.h5'"),
        (raise_numpy_memory, "out of memory; .* \\(Unable to allocate 7.11 PiB"),
        (raise_torch_memory, "out of memory; .* you tried to allocate 4000000000000000 bytes"),
        (killed, "a data worker was killed .SIGKILL., most likely"),
    ],
)
def test_what_happens_in_a_worker_is_told_where_its_batch_is_waited_for(fault, expected, no_worker_left):
    with pytest.raises(ValueError, match=expected) as found:
        list(read_batches(worker_loader(fault, timeout_s=1 if fault is killed else 0), 2))
    assert str(found.value).count("Traceback") == (fault is raise_damaged)
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL, "torch's would raise anywhere"
    assert [batch.tolist() for batch in read_batches(worker_loader(), 2)][2] == [4, 5]


def test_a_worker_that_stays_from_epoch_to_epoch_is_missed_in_the_second(no_worker_left):
    loader = torch.utils.data.DataLoader(
        Items(),
        2,
        num_workers=1,
        worker_init_fn=faults.start_worker,
        persistent_workers=True,
        timeout=1,
        prefetch_factor=1,
    )
    first = [batch.tolist() for batch in read_batches(loader, 1)]
    (worker,) = multiprocessing.active_children()
    batches = read_batches(loader, 1)
    next(batches)
    worker.kill()
    worker.join()
    with pytest.raises(ValueError, match="a data worker was killed .SIGKILL., most likely"):
        list(batches)
    assert len(first) > 3, "there are batches left when it is killed"


def test_a_mistake_in_a_data_set_keeps_its_traceback(no_worker_left):
    def mistake():
        raise TypeError("not a number")

    with pytest.raises(TypeError, match="not a number"):
        list(read_batches(worker_loader(mistake), 2))


def test_a_worker_that_cannot_hand_its_batch_over_ends(no_worker_left):
    """Of itself it would drop the batch, for which the main process would then wait for ever."""

    class Stuck:
        def __reduce__(self):
            raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left")

    loader = torch.utils.data.DataLoader(
        [Stuck()] * 4,
        num_workers=1,
        worker_init_fn=faults.start_worker,
        collate_fn=lambda items: items[0],
        timeout=1,
    )
    with pytest.raises(ValueError, match="found no room to pass their batches on: .*; use --workers 0, or"):
        list(read_batches(loader, 1))


def test_no_shared_memory_for_the_queues(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(multiprocessing, "Semaphore", full)
    with pytest.raises(ValueError, match="found no room .*; use --workers 0.* .No space left on device.$"):
        list(read_batches(worker_loader(), 2))


def test_no_process_can_be_started(monkeypatch):
    def refuse():
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(ValueError, match="2 data workers could not be started .Resource .*--workers 0"):
        list(read_batches(worker_loader(), 2))


@pytest.mark.parametrize(
    "code, beginning",
    [
        (-signal.SIGKILL, "a data worker was killed (SIGKILL), most likely by a system short of memory; "),
        (
            -signal.SIGBUS,
            "a data worker had a bus error (SIGBUS): a file that it read was cut off meanwhile, or",
        ),
        (
            -signal.SIGSEGV,
            "a data worker ended unexpectedly (SIGSEGV); start again with --resume --workers 0",
        ),
        (3, "a data worker ended unexpectedly (exit code 3); start again"),
        (faults.NOT_HANDED_OVER, "data workers found no room to pass their batches on: "),
    ],
)
def test_the_exit_code_of_a_worker_tells_why(code, beginning):
    others = [SimpleNamespace(exitcode=None), SimpleNamespace(exitcode=0)]
    assert of_workers(others) is None and of_workers([]) is None
    assert of_workers([*others, SimpleNamespace(exitcode=code)]).startswith(beginning)


def test_workers_end_with_a_script_that_forgot_them():
    """They ignore SIGTERM, so that multiprocessing alone would wait for them for ever."""
    script = """
import torch
from common import faults
loader = torch.utils.data.DataLoader(range(9), num_workers=1, worker_init_fn=faults.start_worker)
batches = faults.read_batches(loader, 1)
next(batches)
loader._get_iterator = batches  # lives until the end
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60, check=True)


# ---- every train script ----

FAULTY = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
fault, data, last = sys.argv.pop(1), Path(sys.argv.pop(1)), Path(sys.argv.pop(1))
import torch
from common import distributed, hdf5
from common.config import run_script
import {module} as script

class Faulty(torch.utils.data.Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, item):
        if last.is_file():  # from the second epoch on
            globals()[fault]()
        return self.dataset[item]

def nothing():
    pass

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

def memory():
    torch.empty(10**15)

def truncated():
    for path in [*data.rglob("*.h5"), *data.rglob("*.npy")]:
        os.truncate(path, 200)

def truncated_and_opened_again():
    truncated()
    hdf5._open.clear()

make_loader = distributed.make_loader
distributed.make_loader = lambda dataset, *args, **named: make_loader(Faulty(dataset), *args, **named)
for name in ("save_curves", "save_val_predictions", "save_preview", "save_case_preview", "write_maps"):
    if hasattr(script, name):
        setattr(script, name, lambda *_, **__: None)
if hasattr(script, "score_best"):
    script.score_best = lambda *_, **__: ([], {{}})
if "amygdala" in "{module}":
    import amygdala.localiser
    amygdala.localiser.GRID = (32, 32, 32)
run_script(script.main)
"""


def run_faulty(script: str, fault: str, data: Path, tmp_path: Path, *flags: str, processes: int = 1):
    """(the finished process, folder of the run); the data do as `fault` from the second epoch on."""
    _, tiny, folder = SCRIPTS[script]
    run = tmp_path / "runs" / folder
    starter = tmp_path / "start.py"
    starter.write_text(FAULTY.format(module=script.removesuffix(".py").replace("/", ".")))
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
    command += [starter, ROOT, fault, data, run / "weights" / "last.pt", "--data_path", data, *tiny]
    if script.startswith("wsss"):
        command += ["--work_dir", run]
    else:
        command += ["--out", run.parents[folder.count("/")], "--model_name", "run", "--epochs", "3"]
    done = subprocess.run(
        list(map(str, [*command, *flags])), capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    return done, run


EXPECTED = {
    "killed": "error: a data worker was killed (SIGKILL), most likely by a system short of memory; ",
    "memory": "error: out of memory; close other programs, or give smaller values to those of --batch_size",
    "truncated": "error: ",
    "truncated_and_opened_again": "error: ",
}
ALL = [(script, fault, workers) for script in SCRIPTS for fault in EXPECTED for workers in (0, 2)]
ALL = [(script, fault, workers) for script, fault, workers in ALL if workers or fault != "killed"]


@pytest.mark.slow
@pytest.mark.parametrize("script, fault, workers", ALL)
def test_a_fault_in_mid_epoch(script, fault, workers, request, tmp_path):
    if fault.startswith("truncated") and "heatmap" in script:
        pytest.skip("its items are in memory")
    source = request.getfixturevalue(SCRIPTS[script][0])
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", source, data], check=True)
    done, run = run_faulty(script, fault, data, tmp_path, "--workers", str(workers))
    lines = done.stderr.strip().split("\n")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr, done.stderr
    assert lines[-1].startswith(EXPECTED[fault]), done.stderr
    assert [line for line in lines if "error" in line.lower()] == lines[-1:], done.stderr
    if fault.startswith("truncated"):
        assert str(data) in lines[-1], "names the file"
    assert f"{run / 'weights' / 'last.pt'} is whole, go on with: python" in done.stdout
    log = (run / "log.txt").read_text()
    assert "error in epoch 1, batch " in log and lines[-1].removeprefix("error: ") in log
    before = load_checkpoint(run / "weights" / "last.pt")
    assert before["position"]["epoch"] == 1
    # It goes on, with the data as they were.
    subprocess.run(["cp", "-r", "-T", "--preserve=timestamps", source, data], check=True)
    done, _ = run_faulty(script, "nothing", data, tmp_path, "--workers", str(workers), "--resume", str(run))
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(run / "weights" / "last.pt")["position"]["epoch"] == 3


@pytest.mark.slow
def test_the_other_process_ends_too(verse_h5, tmp_path):
    done, run = run_faulty(
        "verse_spine/train_heatmap.py", "killed", verse_h5, tmp_path, "--workers", "1", processes=2
    )
    own = [line for line in done.stderr.split("\n") if line.startswith("error: ")]
    assert done.returncode == 1 and own, done.stderr
    told = ("error: a data worker was killed", "error: another process of this run has ended")
    assert all(line.startswith(told) for line in own)
    assert load_checkpoint(run / "weights" / "last.pt")["position"]["epoch"] == 1
