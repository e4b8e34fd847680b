"""What this machine can do for these scripts, and what to repair before a long run.

    python common/doctor.py             versions, processor, memory, disk, each GPU and its build of torch
    python common/doctor.py --conv3d    also times a 3-D convolution in each precision, about 10 s

Reads requirements.txt and asks the machine; writes nothing. Exit code 1 if there is something to repair.
"""

from __future__ import annotations  # lets an old Python reach the line that says it is too old

import argparse
import importlib
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
# Packages that are imported under another name than they are installed.
MODULES = {"opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml", "pynrrd": "nrrd"}
CU126 = 'pip install "torch<2.14" --index-url https://download.pytorch.org/whl/cu126'


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    about = "time a 3-D convolution, forward and backward, in each precision of this device (about 10 s)"
    parser.add_argument("--conv3d", action="store_true", help=about)
    return parser


def version_tuple(version: str) -> tuple[int, ...]:
    return (*(int(digits) for digits in re.findall(r"\d+", version)[:3]), 0, 0, 0)[:3]


def check_package(name: str, bounds: str, version: str | None, fault: str | None) -> tuple[str, str | None]:
    """Text and problem of a line of requirements.txt; a version above its bounds is named, not refused."""
    install = f'pip install "{name}{bounds}"'
    if name == "torch":
        install += f"  (GTX 10xx, Titan V and older cards: {CU126})"
    if version is None:
        return "MISSING", f"{name} is not installed: {install}"
    if fault is not None:
        return f"{version}, BROKEN", f"importing {name} {version} fails, reinstall it: {install}  ({fault})"
    for sign, bound in re.findall(r"(>=|<)([\d.]+)", bounds):
        if sign == ">=" and version_tuple(version) < version_tuple(bound):
            return f"{version}, TOO OLD", f"{name} {version} is too old: {install}"
        if sign == "<" and version_tuple(version) >= version_tuple(bound):
            return f"{version}, newer than tested ({bounds})", None
    return version, None


def check_gpu(
    name: str, capability: tuple[int, int], total_gib: float, arch_list: list[str], *versions: str | None
) -> tuple[str, str | None]:
    """Text on a GPU, and the problem if torch has no code for it; `versions` are those of torch and CUDA."""
    from common.hardware import wheel_advice

    line = f"{name}, capability {capability[0]}.{capability[1]}, {total_gib:.1f} GiB"
    if advice := wheel_advice(capability, arch_list, *versions):
        return f"{line}; this torch CANNOT drive it", f"{name}: {advice}"
    return f"{line}; this torch drives it", None


def check_conv3d(device_type: str, auto: str, ms: dict[str, float]) -> tuple[str, str | None]:
    """Text on ms by precision, and the problem if CUDA is slower in the default, `auto`, than in fp32."""
    text = ", ".join(f"{name} {ms[name]:.1f} ms ({ms['fp32'] / ms[name]:.1f}x)" for name in ms)
    if device_type != "cuda" or ms[auto] <= ms["fp32"]:
        return text, None
    return text, f"Conv3d is slower in {auto} than in fp32: run with --amp off or install another torch"


def nvidia_smi() -> list[tuple[str, str, tuple[int, int]]]:
    """(name, driver, capability) of each GPU that the NVIDIA driver knows; empty without a working driver."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = re.findall(r"^(.+), ([\d.]+), (\d+)\.(\d+)$", answer, re.M)
    return [(name, driver, (int(major), int(minor))) for name, driver, major, minor in rows]


def import_fault(module: str) -> str | None:
    """What importing `module` raises: anything, from ImportError to OSError for a lost library."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def time_conv3d(device, precisions: list, seconds: float = 10) -> dict[str, float]:
    """Best ms of a forward and backward, by precision, taken in turn: 32 to 32 channels, 64^3 voxels."""
    import torch

    layer = torch.nn.Conv3d(32, 32, 3, padding=1).to(device)
    image = torch.randn(1, 32, 64, 64, 64, device=device, requires_grad=True)
    ms = {precision.name: math.inf for precision in precisions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:  # the first turn, which picks kernels, is never the best
        for precision in precisions:
            start = time.perf_counter()
            with torch.autocast(device.type, dtype=precision.dtype, enabled=precision.dtype is not None):
                output = layer(image)
            output.float().mean().backward()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            ms[precision.name] = min(ms[precision.name], 1000 * (time.perf_counter() - start))
    return ms


def report_software() -> Iterator[tuple[str, str, str | None]]:
    """(topic, text, problem) of Python, each line of requirements.txt and the disk."""
    old = None if sys.version_info >= (3, 10) else "Python is too old: install 3.10 or newer"
    yield "python", f"{platform.python_version()}, {platform.platform()}", old
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else its import asks the network for a newer version
    found = [(dist.metadata["Name"] or "", dist.version) for dist in metadata.distributions()]
    installed = {name.lower().replace("_", "-"): version for name, version in found}
    for name, bounds in re.findall(r"^([\w-]+) *([<>=\d.,]*)", REQUIREMENTS.read_text().lower(), re.M):
        fault = import_fault(MODULES.get(name, name.replace("-", "_"))) if name in installed else None
        yield name, *check_package(name, bounds, installed.get(name), fault)
    owners = " ".join(sorted(name for name in installed if name.startswith("opencv-")))
    if " " in owners:
        advice = f"pip uninstall -y {owners}, then pip install opencv-python-headless"
        yield "cv2", f"TWO OWNERS: {owners}", f"{owners} overwrite each other's cv2: {advice}"
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    full = f"only {free_gib:.1f} GiB free in {Path.cwd()}: make room for scans and checkpoints"
    yield "disk", f"{free_gib:.1f} GiB free in {Path.cwd()}", full if free_gib < 2 else None


def report_machine(conv3d: bool) -> Iterator[tuple[str, str, str | None]]:
    """(topic, text, problem) of torch's build, processor, memory, GPUs and precision."""
    if import_fault("torch") is not None:
        yield "processor, GPUs", "reported once torch can be imported", None
        return
    import torch

    from common import hardware

    device, cpu = hardware.pick_device(), torch.device("cpu")
    version, cuda = torch.__version__, torch.version.cuda
    yield "torch build", f"CUDA {cuda}, cuDNN {torch.backends.cudnn.version()}" if cuda else "no CUDA", None
    yield "processor", hardware.describe_device(cpu).removeprefix("cpu "), None
    yield "free RAM", f"{hardware.cores_and_ram_gib()[2]:.1f} GiB", None
    warned = {line.split()[0]: line for line in hardware.startup_warnings(cpu)}
    if (shm := hardware.SHM).is_dir():
        yield str(shm), f"{shutil.disk_usage(shm).free / 2**20:.0f} MiB free", warned.get(str(shm))
    for index in range(torch.cuda.device_count() if device.type == "cuda" else 0):
        card, free_gib = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)[0] / 2**30
        facts = (card.name, (card.major, card.minor), card.total_memory / 2**30)
        line, problem = check_gpu(*facts, torch.cuda.get_arch_list(), version, cuda)
        yield f"GPU {index}", line, problem or hardware.known_bad_torch(version)
        yield "free GPU memory", f"{free_gib:.1f} GiB", None
    if device.type != "cuda":
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        cards = [] if hidden else nvidia_smi()
        for name, driver, capability in cards:
            advice = hardware.wheel_advice(capability, [], version, None)
            if cuda is not None:
                needs = f"CUDA {cuda} (13.x needs 580 or newer, 12.x 525)"
                advice = f"driver {driver} is probably too old for {needs}: update it"
            yield "GPU", f"{name}, NOT SEEN by torch", f"{name}: {advice}"
        if not cards:
            none = "hidden by CUDA_VISIBLE_DEVICES" if hidden else "none; everything runs on the processor"
            yield "GPU", "Apple (MPS)" if device.type == "mps" else none, None
    auto = hardware.choose_precision("auto", device)
    yield "--amp auto", f"{auto.name}: {auto.reason}", None
    if conv3d:
        amps = {"cuda": ["off", "auto", "fp16"], "cpu": ["off", "bf16"], "mps": ["off"]}[device.type]
        precisions = [hardware.choose_precision(amp, device) for amp in amps]
        yield "conv3d", *check_conv3d(device.type, auto.name, time_conv3d(device, precisions))


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    warnings.simplefilter("ignore")  # torch's long words on old cards and drivers; the report has a line
    problems = []
    try:
        for topic, text, problem in chain(report_software(), report_machine(args.conv3d)):
            print(f"{topic:<24}{text}", flush=True)
            if problem and problem not in problems:
                problems.append(problem)
    except RuntimeError as error:  # of CUDA
        problems.append(f"the GPU does not work, restart the machine or update its driver: {error}")
    if not problems:
        print("\nall good")
        return 0
    print("\n- ".join([f"\n{len(problems)} problem(s) to fix:", *problems]))
    return 1


if __name__ == "__main__":
    sys.exit(main())
