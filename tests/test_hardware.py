"""common/hardware.py: advice on builds of torch, choice of device and precision, facts about this machine."""

import math
import os
import subprocess
import sys

import pytest
import torch

from common import hardware
from common.hardware import (
    autocast,
    choose_precision,
    cpu_features,
    describe_device,
    known_bad_torch,
    peak_memory_mib,
    pick_device,
    start_device,
    startup_warnings,
    wheel_advice,
)

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")
# torch.cuda.get_arch_list() of the official Linux x86 builds (pytorch issue 182250 and RELEASE.md)
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU128 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CU130 = [*CU128, "compute_120"]
PIP_CU126 = 'pip install "torch<2.14" --index-url https://download.pytorch.org/whl/cu126'
PIP_CU130 = 'pip install "torch<2.14" --index-url https://download.pytorch.org/whl/cu130'


@pytest.mark.parametrize(
    "capability, arch_list",
    [
        ((6, 1), CU126),  # GTX 1050 Ti runs sm_60
        ((5, 2), CU126),
        ((7, 0), CU126),
        ((7, 5), CU130),
        ((8, 9), CU130),  # Ada runs sm_86
        ((9, 0), CU126),
        ((9, 0), CU130),
        ((12, 0), CU128),
        ((12, 1), CU128),
        ((13, 0), CU130),  # only through the PTX of 12.0
        ((6, 1), ["compute_50"]),  # PTX of an older architecture
        ((9, 0), ["sm_100a", "sm_90a"]),
        ((9, 0), ["gfx90a", "gfx1100"]),  # ROCm: other rules
        ((6, 1), []),  # a CUDA build that does not tell
    ],
)
def test_wheel_with_code_for_the_card_needs_no_advice(capability, arch_list):
    assert wheel_advice(capability, arch_list, "2.13.0", "12.6") is None


@pytest.mark.parametrize(
    "capability, arch_list, version, cuda, command",
    [
        ((6, 1), CU128, "2.11.0+cu128", "12.8", PIP_CU126),
        ((6, 1), CU130, "2.13.0+cu130", "13.0", PIP_CU126),
        ((5, 0), CU130, "2.13.0+cu130", "13.0", PIP_CU126),
        ((7, 0), CU130, "2.13.0+cu130", "13.0", PIP_CU126),  # Volta cannot run sm_75
        ((6, 1), [], "2.13.0+cpu", None, PIP_CU126),
        ((8, 6), [], "2.13.0+cpu", None, PIP_CU130),
        ((12, 0), CU126, "2.6.0+cu126", "12.6", PIP_CU130),
        ((12, 1), ["sm_120a"], "2.8.0+cu128", "12.8", PIP_CU130),  # "a": that capability alone
        ((14, 0), CU128, "2.13.0+cu130", "13.0", "pip install --upgrade torch"),
        ((3, 5), CU126, "2.13.0+cu126", "12.6", "--device cpu"),  # Kepler
    ],
)
def test_wheel_without_code_for_the_card_names_card_wheel_and_command(
    capability, arch_list, version, cuda, command
):
    advice = wheel_advice(capability, arch_list, version, cuda)
    assert command in advice
    assert f"{capability[0]}.{capability[1]}" in advice and version in advice
    assert all(arch in advice for arch in arch_list)
    assert "\n" not in advice


def test_pip_is_forced_since_the_wrong_build_satisfies_the_requirement():
    assert wheel_advice((6, 1), CU130, "2.13.0+cu130", "13.0").endswith("/cu126 --force-reinstall")


@pytest.mark.parametrize("version", ["2.9.0", "2.9.1+cu126", "2.9.0+cu128"])
def test_known_bad_torch(version):
    line = known_bad_torch(version)
    assert version in line and 'pip install "torch>=2.10,<2.14"' in line and "166122" in line
    build = version.partition("+")[2]
    assert line.endswith(
        f"/whl/{build}" if build else '<2.14"'
    )  # a Pascal card must stay on the CUDA 12.6 index


@pytest.mark.parametrize("version", ["2.8.0", "2.10.0+cu128", "2.13.0+cpu", "12.9.0", "2.90.0"])
def test_other_torch_is_not_known_bad(version):
    assert known_bad_torch(version) is None


@pytest.fixture
def fake_gpus(monkeypatch):
    """fake_gpus(count, capability, name): what torch then says about the machine's CUDA cards."""

    def fake(count=1, capability=(8, 6), name="NVIDIA GeForce RTX 3060"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    return fake


def test_pick_device_prefers_cuda_then_mps_then_cpu(fake_gpus, monkeypatch):
    fake_gpus(count=2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device() == torch.device("cuda", 0)
    assert pick_device("auto", local_rank=1) == torch.device("cuda", 1)
    assert pick_device("cuda", local_rank=1) == torch.device("cuda", 1)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert pick_device("cpu") == CPU
    assert pick_device("mps") == MPS
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == MPS
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device() == CPU
    assert pick_device(local_rank=3) == CPU  # torchrun without GPUs


def test_pick_device_errors_say_what_to_do(fake_gpus):
    fake_gpus(count=0)
    for name in ("cuda", "cuda:0", "mps"):
        with pytest.raises(ValueError, match=rf"--device {name}.*common/doctor.py.*--device cpu"):
            pick_device(name)
    for name in ("gpu", "", "cuda:", "cuda:x", "cpu:0", "auto:1", "CUDA"):
        with pytest.raises(ValueError, match="auto, cpu, mps, cuda or cuda:N"):
            pick_device(name)
    fake_gpus(count=2)
    for name, rank in (("cuda:2", 0), ("cuda", 2), ("auto", 2)):
        with pytest.raises(ValueError, match="no GPU 2 among the 2 here.*--nproc_per_node"):
            pick_device(name, rank)
    with pytest.raises(ValueError, match="every process on one GPU; use --device cuda"):
        pick_device("cuda:0", local_rank=1)


@pytest.mark.parametrize(
    "name, capability, expected, scaler",
    [
        ("NVIDIA H100", (9, 0), "bf16", False),
        ("NVIDIA GeForce RTX 5090", (12, 0), "bf16", False),
        ("NVIDIA A100", (8, 0), "bf16", False),
        ("Tesla T4", (7, 5), "fp16", True),
        ("Tesla V100", (7, 0), "fp16", True),
        ("NVIDIA GeForce GTX 1650", (7, 5), "fp32", False),  # Turing without tensor cores
        ("NVIDIA GeForce GTX 1050 Ti", (6, 1), "fp32", False),
        ("Tesla P100", (6, 0), "fp32", False),
        ("NVIDIA GeForce GTX 980", (5, 2), "fp32", False),
    ],
)
def test_auto_precision_on_cuda(fake_gpus, name, capability, expected, scaler):
    fake_gpus(capability=capability, name=name)
    chosen = choose_precision("auto", CUDA, trial=pytest.fail)  # nothing is timed on a GPU
    assert (chosen.name, chosen.dtype, chosen.scaler) == (expected, hardware.DTYPES[expected], scaler)
    assert name in chosen.reason and f"{capability[0]}.{capability[1]}" in chosen.reason
    assert choose_precision("off", CUDA).dtype is None
    forced = choose_precision("fp16", CUDA)
    assert (forced.dtype, forced.scaler) == (torch.float16, True)
    if capability >= (8, 0):
        assert choose_precision("bf16", CUDA).dtype == torch.bfloat16
    else:
        with pytest.raises(ValueError, match=rf"--amp bf16 needs capability 8.0.*{name}.*use --amp auto"):
            choose_precision("bf16", CUDA)


def test_pascal_is_told_that_fp16_is_slow_but_saves_memory(fake_gpus):
    fake_gpus(capability=(6, 1), name="NVIDIA GeForce GTX 1050 Ti")
    assert "computes fp16 slowly; --amp fp16 would save memory" in choose_precision("auto", CUDA).reason
    assert "computes fp16 slowly" in choose_precision("fp16", CUDA).reason


def test_mps_computes_in_fp32():
    assert choose_precision("auto", MPS).name == choose_precision("off", MPS).name == "fp32"
    for amp in ("bf16", "fp16"):
        with pytest.raises(ValueError, match="on mps; use auto, off"):
            choose_precision(amp, MPS)


class Clock:
    """A time.perf_counter that moves only when a trial computes."""

    def __init__(self, fp32_s, bf16_s, first_s=0.0):
        self.now, self.calls = 100.0, []
        self.cost = {None: fp32_s, torch.bfloat16: bf16_s}
        self.first_s = first_s

    def __call__(self):
        return self.now

    def trial(self, dtype):
        self.now += self.cost[dtype] + (0.0 if dtype in self.calls else self.first_s)
        self.calls.append(dtype)


@pytest.fixture
def bf16_cpu(monkeypatch):
    """bf16_cpu(seconds...): a CPU with AMX whose steps last as long as said; returns the clock."""

    def fake(*seconds):
        clock = Clock(*seconds)
        monkeypatch.setattr(hardware, "cpu_features", lambda: {"avx2", "avx512f", "avx512_bf16", "amx_bf16"})
        monkeypatch.setattr(hardware.time, "perf_counter", clock)
        return clock

    return fake


@pytest.mark.parametrize(
    "fp32_s, bf16_s, expected",
    [(0.230, 0.100, "bf16"), (0.111, 0.100, "bf16"), (0.109, 0.100, "fp32"), (0.100, 0.400, "fp32")],
)
def test_cpu_precision_is_measured(bf16_cpu, fp32_s, bf16_s, expected):
    clock = bf16_cpu(fp32_s, bf16_s, 0.5)  # the first call of each, 0.5 s longer, must not count
    chosen = choose_precision("auto", CPU, clock.trial)
    assert (chosen.name, chosen.dtype, chosen.scaler) == (expected, hardware.DTYPES[expected], False)
    assert f"{1000 * fp32_s:.0f} ms in fp32, {1000 * bf16_s:.0f} ms in bf16" in chosen.reason
    assert clock.calls == [None, torch.bfloat16] * 4  # alternated


def test_cpu_trial_of_long_steps_ends_after_one_timed_turn(bf16_cpu):
    clock = bf16_cpu(6.0, 3.0, 10.0)
    assert choose_precision("auto", CPU, clock.trial).name == "bf16"
    assert len(clock.calls) == 4


def test_cpu_takes_the_best_of_the_turns(bf16_cpu):
    clock = bf16_cpu(0.2, 0.1)
    disturbed = iter([0, 0, 0.9, 0, 0, 0.9, 0, 0])  # another program interrupts one step of each

    def trial(dtype):
        clock.now += next(disturbed)
        clock.trial(dtype)

    assert "200 ms in fp32, 100 ms in bf16" in choose_precision("auto", CPU, trial).reason


def test_cpu_without_bf16_is_not_timed(monkeypatch):
    monkeypatch.setattr(hardware, "cpu_features", lambda: {"avx2", "avx512f"})
    chosen = choose_precision("auto", CPU, trial=pytest.fail)
    assert chosen.name == "fp32" and "neither AMX-BF16 nor AVX512-BF16" in chosen.reason
    forced = choose_precision("bf16", CPU)
    assert forced.dtype == torch.bfloat16 and "slower than fp32" in forced.reason


def test_cpu_without_a_trial_stays_in_fp32(bf16_cpu):
    bf16_cpu(1, 1)
    chosen = choose_precision("auto", CPU)
    assert chosen.name == "fp32" and "avx512_bf16" in chosen.reason and "timed" in chosen.reason
    assert "slower" not in choose_precision("bf16", CPU).reason


def test_unknown_or_useless_amp_is_refused():
    for amp in ("fp16", "half", "", "true"):
        with pytest.raises(ValueError, match=f"--amp '{amp}'.*on cpu; use auto, off, bf16"):
            choose_precision(amp, CPU)


def test_a_real_step_in_the_chosen_precision():
    layer, image = torch.nn.Conv3d(1, 2, 3), torch.rand(1, 1, 5, 5, 5)
    for amp, dtype in (("off", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(CPU, choose_precision(amp, CPU)):
            assert layer(image).dtype == dtype


def test_startup_warnings_of_a_card_without_code_and_a_bad_torch(fake_gpus, monkeypatch):
    fake_gpus(capability=(6, 1))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CU130)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu130")
    monkeypatch.setattr(hardware, "SHM", hardware.Path("/nonexistent"))
    (wheel,) = startup_warnings(CUDA)
    assert PIP_CU126 in wheel
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CU126)
    (bad,) = startup_warnings(CUDA)
    assert "166122" in bad
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu126")
    assert startup_warnings(CUDA) == []
    assert startup_warnings(CPU) == []  # chosen although there is a GPU


def test_start_device_refuses_a_card_without_code(fake_gpus, monkeypatch):
    fake_gpus(capability=(6, 1))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CU130)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError, match="capability 6.1.*cu126.*--device cpu"):
        start_device("auto")
    assert start_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CU126)
    assert start_device("auto") == CUDA


def test_startup_warning_of_too_little_gpu_memory(fake_gpus, monkeypatch):
    fake_gpus(capability=(6, 1))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CU126)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 4 << 30))
    (line,) = startup_warnings(CUDA, peak_mib=3500)
    assert "3072 MiB of GPU memory free, 3500 needed" in line
    assert startup_warnings(CUDA, peak_mib=3000) == []


def test_startup_warning_of_small_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "SHM", tmp_path)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    usage = type(hardware.shutil.disk_usage(tmp_path))
    for mib, count in ((64, 1), (1024, 0)):  # Docker's default; enough
        monkeypatch.setattr(
            hardware.shutil, "disk_usage", lambda path, mib=mib: usage(mib << 20, 0, mib << 20)
        )
        lines = startup_warnings(CPU)
        assert len(lines) == count
        assert all("64 MiB free" in line and "--workers 0" in line and "--shm-size" in line for line in lines)


def test_startup_warning_of_a_gpu_that_torch_does_not_see(fake_gpus, monkeypatch):
    fake_gpus(count=0)
    monkeypatch.setattr(hardware, "SHM", hardware.Path("/nonexistent"))
    monkeypatch.setattr(hardware.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (line,) = startup_warnings(CPU)
    assert "common/doctor.py" in line
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert startup_warnings(CPU) == []


def test_cpu_features_are_read_from_cpuinfo(tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(hardware, "CPUINFO", cpuinfo)
    assert cpu_features() == set()  # not Linux
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz: fast\nflags\t\t: sse avx2 amx_bf16 amx_tile\n"
    )
    assert cpu_features() == {"avx2", "amx_bf16"}
    line = describe_device(CPU)
    assert line.startswith("cpu Some CPU @ 2 GHz: fast, ") and line.endswith("amx_bf16, avx2")


def test_cores_and_ram_obey_a_containers_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    cores, total_gib, free_gib = hardware.cores_and_ram_gib()
    assert 1 <= cores <= os.cpu_count() and not total_gib <= 0 and not free_gib > total_gib
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.cores_and_ram_gib()[:2] == pytest.approx((cores, total_gib), nan_ok=True)
    (tmp_path / "cpu.max").write_text("50000 100000\n")  # half a core
    assert hardware.cores_and_ram_gib()[0] == 1
    if not math.isnan(total_gib):
        (tmp_path / "memory.max").write_text(f"{1 << 28}\n")
        assert hardware.cores_and_ram_gib()[1] == 0.25


def test_peak_memory_grows_by_what_is_allocated_and_ignores_the_parent():
    if os.name == "nt":
        assert math.isnan(peak_memory_mib(CPU))
        return
    before = peak_memory_mib(CPU)
    block = torch.ones(64 << 18)  # 64 MiB
    after = peak_memory_mib(CPU)
    assert before > 20 and 0 <= after - before < 200  # memory freed earlier may be used again
    assert after > block.nbytes / 2**20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a fault of getrusage on Linux")
def test_peak_memory_of_a_child_is_its_own():
    block = torch.ones(1 << 27)  # 512 MiB in the parent, more than importing torch takes
    code = "import torch; from common.hardware import *; print(peak_memory_mib(torch.device('cpu')))"
    root = hardware.Path(hardware.__file__).resolve().parents[1]
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    assert float(answer.stdout) < block.nbytes / 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_on_a_real_card():
    device = pick_device()
    chosen = choose_precision("auto", device)
    torch.cuda.reset_peak_memory_stats()
    layer, image = torch.nn.Conv3d(1, 8, 3).to(device), torch.rand(1, 1, 32, 32, 32, device=device)
    with autocast(device, chosen):
        assert layer(image).dtype == (chosen.dtype or torch.float32)
    assert 0 < peak_memory_mib(device) < 500
    assert "GiB" in describe_device(device)
    assert not [line for line in startup_warnings(device) if line.startswith("GPU of capability")]
