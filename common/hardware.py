"""What this machine can compute with: device, precision, one-line warnings about its torch installation.

Facts about builds of torch: pytorch's RELEASE.md and issues 157517, 172352, 190385 (end of Maxwell to Volta).
"""

import math
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Trial = Callable[[torch.dtype | None], None]
CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")
SHM = Path("/dev/shm")  # through which data workers pass batches on Linux
SMALL_SHM_MIB = 128  # Docker's default is 64; two workers prefetching pairs of 96^3 patches fill about 85
BF16_MIN_SPEEDUP = 1.1  # bf16's rounding is not worth a smaller gain
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
AMP = {"cuda": "auto off bf16 fp16", "cpu": "auto off bf16", "mps": "auto off"}  # choices of --amp
INDEX = "https://download.pytorch.org/whl"


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """Turn `--device` into a device that exists.

    Args:
        name: "auto" (CUDA, else MPS, else CPU), "cpu", "mps", "cuda" or "cuda:N".
        local_rank: index of this process on its machine; "auto" and "cuda" take the GPU of that index.

    Raises:
        ValueError: unknown name, no such device here, or one GPU named for several processes.
    """
    form = re.fullmatch(r"(auto|cpu|mps|cuda)(?:(?<=cuda):(\d+))?", name)
    if form is None:
        raise ValueError(f"--device {name!r} is unknown; use auto, cpu, mps, cuda or cuda:N")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    kind = form[1]
    if kind == "auto" and cuda:
        kind = "cuda"
    elif kind == "auto":
        kind = "mps" if mps else "cpu"
    if (kind == "cuda" and not cuda) or (kind == "mps" and not mps):
        raise ValueError(
            f"--device {name}: torch sees none; `python common/doctor.py` says why, --device cpu runs without"
        )
    if kind != "cuda":
        return torch.device(kind)
    if form[2] and local_rank > 0:
        raise ValueError(f"--device {name} puts every process on one GPU; use --device cuda with torchrun")
    index = int(form[2] or local_rank)
    if index >= (count := torch.cuda.device_count()):
        raise ValueError(f"no GPU {index} among the {count} here; lower --nproc_per_node or the N of cuda:N")
    return torch.device("cuda", index)


def start_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """`pick_device` for a script: refuses a card that the installed torch cannot drive.

    Raises:
        ValueError: as `pick_device`, or with what to install, before a kernel fails with "no kernel image".
    """
    device = pick_device(name, local_rank)
    if device.type == "cuda" and (problem := _wheel_problem(device)):
        raise ValueError(f"{problem}; or run without the card: --device cpu")
    return device


def _wheel_problem(device: torch.device) -> str | None:
    capability, arch_list = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    return wheel_advice(capability, arch_list, torch.__version__, torch.version.cuda)


def wheel_advice(
    capability: tuple[int, int], arch_list: list[str], torch_version: str, cuda_version: str | None
) -> str | None:
    """Whether the installed build of torch can drive a card.

    Machine code sm_XY runs on capability X.Z, Z >= Y ("sm_XYa": X.Y only); PTX compute_XY on X.Y and newer.

    Args:
        capability: of the card, (major, minor): (6, 1) for a GTX 1050 Ti.
        arch_list, torch_version, cuda_version: what torch.cuda.get_arch_list and torch.version give.

    Returns:
        None if it can, or if that cannot be told (ROCm, no list); else a line with what to install.
    """
    if any(arch.startswith("gfx") for arch in arch_list) or (cuda_version and not arch_list):
        return None
    for kind, digits, suffix in re.findall(r"\b(sm|compute)_(\d+)([af]?)\b", " ".join(arch_list)):
        built = divmod(int(digits), 10)
        portable = built[0] == capability[0] or (kind == "compute" and not suffix)
        if built == capability or (built < capability and portable and suffix != "a"):
            return None
    code = " ".join(arch_list) or "no GPU"
    what = f"GPU of capability {capability[0]}.{capability[1]}, but torch {torch_version} has code for {code}"
    if capability < (5, 0):
        return f"{what}; no torch >= 2.6 drives so old a card: use --device cpu"
    if capability < (7, 5):
        build, index = "the CUDA 12.6 build, the last for this card", "cu126"
    elif cuda_version and int(cuda_version.split(".")[0]) >= 13:
        return f"{what}; install a newer torch, untested by this project: pip install --upgrade torch"
    else:
        build, index = "a newer CUDA build (needs driver 580 or newer)", "cu130"
    # Without --force-reinstall pip finds torch<2.14 already satisfied: builds differ only after the "+".
    return f'{what}; install {build}: pip install "torch<2.14" --index-url {INDEX}/{index} --force-reinstall'


def known_bad_torch(version: str) -> str | None:
    """What is wrong with this release of torch and what to install instead, in one line; None if nothing."""
    if not version.startswith("2.9."):
        return None
    build = re.search(r"\+(cu\d+|cpu)$", version)  # also names the index with this build of other releases
    index = f" --index-url {INDEX}/{build[1]}" if build else ""
    what = "Conv3d under AMP is about 4x slower and takes more memory (pytorch issues 166122, 166643)"
    return f'torch {version}: {what}; install a newer one: pip install "torch>=2.10,<2.14"{index}'


def startup_warnings(device: torch.device, peak_mib: float = 0.0) -> list[str]:
    """What a script should say about this machine before it starts on `device`: any number of lines.

    Args:
        peak_mib: memory that the run is going to need.
    """
    lines: list[str | None] = []
    if device.type == "cuda":
        lines.append(_wheel_problem(device) or known_bad_torch(torch.__version__))  # one torch, not two
        if peak_mib and peak_mib > (free_mib := torch.cuda.mem_get_info(device)[0] / 2**20):
            lines.append(f"{free_mib:.0f} MiB of GPU memory free, {peak_mib:.0f} needed: lower --batch_size")
    elif os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1") and not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            lines.append("NVIDIA driver found, but torch sees no GPU; `python common/doctor.py` says why")
    if SHM.is_dir() and (free_mib := shutil.disk_usage(SHM).free / 2**20) < SMALL_SHM_MIB:
        what = f"{SHM} has {free_mib:.0f} MiB free, data workers may die of a bus error"
        lines.append(f"{what}; use --workers 0 or give the container more (docker run --shm-size 2g)")
    return [line for line in lines if line]


@dataclass(frozen=True)
class Precision:
    """Arithmetic of the forward pass; `dtype` None is float32 throughout, `reason` a line for the log."""

    name: str  # a key of DTYPES
    dtype: torch.dtype | None
    scaler: bool  # whether the gradients need torch.amp.GradScaler
    reason: str

    @property
    def amp(self) -> str:
        """The value of --amp that asks for exactly this."""
        return "off" if self.name == "fp32" else self.name


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context of a forward pass in `precision`; does nothing for fp32."""
    return torch.autocast(device.type, dtype=precision.dtype, enabled=precision.dtype is not None)


def choose_precision(amp: str, device: torch.device, trial: Trial | None = None) -> Precision:
    """Turn `--amp` into the arithmetic of the forward pass.

    auto: on CUDA bf16 from capability 8.0, fp16 with scaling on 7.x, fp32 below (Pascal computes fp16 slowly)
    and on the GTX 16 series (fp16 convolutions gave NaN, pytorch issue 77955). On a CPU bf16 if the processor
    has it and `trial` runs at least 1.1x faster in it. fp32 on MPS.

    Args:
        amp: "auto", "off", "bf16" or "fp16".
        device: where the network runs.
        trial: runs a forward and backward at the training shape under the given autocast dtype (None: fp32);
            called 4 to 8 times, only for "auto" on a CPU with bf16. It leaves what a step leaves (gradients,
            batch statistics, a moved random state): use a copy of the network, or seed and zero afterwards.
            Times vary: in one run let rank 0 choose, on resuming take the name from the checkpoint.

    Raises:
        ValueError: unknown `amp`, or a precision that `device` does not compute.
    """
    if amp not in (choices := AMP[device.type].split()):
        raise ValueError(f"--amp {amp!r} is unknown or slow on {device.type}; use {', '.join(choices)}")
    if amp == "off":
        name, reason = "fp32", "--amp off"
    elif device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name, reason = _cuda_precision(amp, capability, torch.cuda.get_device_name(device))
    elif device.type == "cpu":
        name, reason = _cpu_precision(amp, trial)
    else:
        name, reason = "fp32", f"mixed precision is untested on {device.type}"
    return Precision(name, DTYPES[name], name == "fp16", reason)


def _cuda_precision(amp: str, capability: tuple[int, int], card: str) -> tuple[str, str]:
    has = f"{card} has capability {capability[0]}.{capability[1]}"
    if amp == "bf16" and capability < (8, 0):
        raise ValueError(f"--amp bf16 needs capability 8.0 (Ampere), {has}; use --amp auto, fp16 or off")
    if amp == "bf16" or (amp == "auto" and capability >= (8, 0)):
        return "bf16", has
    drawback = ", which computes fp16 slowly" if capability < (7, 0) else ""
    if "GTX 16" in card:
        drawback = ", a series whose fp16 convolutions gave NaN"
    if amp == "auto" and drawback:
        return "fp32", f"{has}{drawback}; --amp fp16 would save memory"
    return "fp16", has + drawback


def _cpu_precision(amp: str, trial: Trial | None) -> tuple[str, str]:
    found = " and ".join(sorted(cpu_features() & {"amx_bf16", "avx512_bf16"}))
    has = f"CPU has {found or 'neither AMX-BF16 nor AVX512-BF16'}"
    if amp == "bf16":
        return "bf16", has if found else f"{has}: slower than fp32"
    if not found:
        return "fp32", has
    if trial is None:
        return "fp32", f"{has}; bf16 only after a timed training step shows it faster"
    best_ms = {None: math.inf, torch.bfloat16: math.inf}
    begin = time.perf_counter()
    for turn in range(4):  # the first, which allocates and compiles, is never the best
        for dtype in best_ms:  # alternated: a busy machine slows both alike
            start = time.perf_counter()
            trial(dtype)
            best_ms[dtype] = min(best_ms[dtype], 1000 * (time.perf_counter() - start))
        if turn > 0 and time.perf_counter() - begin > 8:  # seconds
            break
    fp32_ms, bf16_ms = best_ms.values()
    name = "bf16" if fp32_ms >= BF16_MIN_SPEEDUP * bf16_ms else "fp32"
    return name, f"{has}; a step took {fp32_ms:.0f} ms in fp32, {bf16_ms:.0f} ms in bf16"


def cpu_features() -> set[str]:
    """Which of avx2, avx512f, avx512_bf16, amx_bf16 the processor has; empty where Linux does not tell."""
    return {"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & set(_cpuinfo("flags").split())


def _cpuinfo(key: str) -> str:
    with CPUINFO.open() if CPUINFO.exists() else open(os.devnull) as lines:
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def cores_and_ram_gib() -> tuple[int, float, float]:
    """What this process may use: CPU cores, RAM, free RAM in GiB (NaN: unknown); container limits count."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total = free = math.nan
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if Path("/proc/meminfo").exists():
        free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) / 2**20
    # cgroup v2: microseconds of CPU in each period, and bytes; "max" without a limit
    if (file := CGROUP / "cpu.max").is_file() and (limit := file.read_text().split())[0] != "max":
        cores = min(cores, math.ceil(int(limit[0]) / int(limit[1])))
    if (file := CGROUP / "memory.max").is_file() and (limit := file.read_text().strip()) != "max":
        total, free = min(total, int(limit) / 2**30), min(free, int(limit) / 2**30)
    return cores, total, free


def describe_device(device: torch.device) -> str:
    """A line for the log: the card with capability and memory, or the CPU with what this process may use."""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return f"{card.name}, capability {card.major}.{card.minor}, {card.total_memory / 2**30:.1f} GiB"
    model = _cpuinfo("model name") or platform.processor() or platform.machine()
    cores, total_gib, _ = cores_and_ram_gib()
    parts = [model, f"{cores} cores", f"{total_gib:.1f} GiB RAM", *sorted(cpu_features())]
    return f"{device.type} {', '.join(parts)}"


def peak_memory_mib(device: torch.device) -> float:
    """Peak MiB of this process: tensors on CUDA (since its counter's reset), else resident (Windows: NaN)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Linux starts a process's getrusage at its parent's peak; VmHWM is its own.
    status = Path("/proc/self/status")
    if kib := re.search(r"VmHWM:\s+(\d+)", status.read_text() if status.exists() else ""):
        return int(kib[1]) / 2**10
    if os.name == "nt":
        return math.nan
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, others KiB
