"""common/doctor.py: its verdicts from plain values, and whole reports on real and faked machines."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common import doctor, hardware

CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
PIP_CU126 = 'pip install "torch<2.14" --index-url https://download.pytorch.org/whl/cu126'


@pytest.fixture
def healthy(tmp_path, monkeypatch):
    """This machine with what it may lack made good, and its GPUs hidden; returns its requirements.txt."""
    path = tmp_path / "requirements.txt"
    path.write_text("torch>=2.6\nnumpy>=1.26  # arrays\n")
    monkeypatch.setattr(doctor, "REQUIREMENTS", path)
    usage = type(doctor.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(100 << 30, 50 << 30, 50 << 30))
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return path


def problems(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("- ")]


def test_all_good(healthy, capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\nall good\n") and problems(out) == []
    for word in (
        torch.__version__,
        "numpy",
        "processor",
        "GiB",
        "none; everything runs",
        "--amp auto",
        "disk",
    ):
        assert word in out


def test_each_problem_has_its_line_and_the_exit_code_is_1(healthy, capsys):
    healthy.write_text("torch>=99\nno-such-package>=1.0,<2\nnumpy\n")
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "2 problem(s) to fix:" in out and "all good" not in out
    old, missing = problems(out)
    assert f"torch {torch.__version__.split('+')[0]}" in old and "too old" in old and PIP_CU126 in old
    assert 'no-such-package is not installed: pip install "no-such-package>=1.0,<2"' in missing


def test_report_without_torch(healthy, capsys, monkeypatch):
    for name in ("torch", "common.hardware"):
        monkeypatch.setitem(sys.modules, name, None)  # import raises ImportError
    assert doctor.main(["--conv3d"]) == 1
    out = capsys.readouterr().out
    (line,) = problems(out)
    assert "importing torch" in line and "pip install" in line and PIP_CU126 in line
    assert "numpy" in out and "disk" in out and "once torch can be imported" in out


def test_script_runs_from_elsewhere_and_help_names_its_flags(tmp_path):
    script = Path(doctor.__file__).resolve()
    answer = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert answer.returncode == 0 and "--conv3d" in answer.stdout
    assert "torch" not in answer.stderr
    with pytest.raises(SystemExit):
        doctor.main(["--conv"])  # no abbreviations


def test_the_projects_requirements_are_read(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "import_fault", lambda module: None)
    topics = {topic: text for topic, text, _ in doctor.report_software()}
    assert {"torch", "numpy", "nibabel", "albumentations", "opencv-python-headless", "pyyaml"} <= set(topics)
    assert re.match(r"\d+\.\d+", topics["torch"])


def test_every_package_of_the_projects_requirements_can_be_imported():
    """Also those whose import name is another one, as pillow's: else a healthy machine has a problem."""
    names = re.findall(r"^([\w-]+)", doctor.REQUIREMENTS.read_text(encoding="utf8").lower(), re.M)
    found = {topic: (text, problem) for topic, text, problem in doctor.report_software()}
    assert len(names) > 10 and set(names) <= set(found)
    assert not {name: found[name] for name in names if found[name][1] is not None}
    assert all(re.match(r"\d+\.\d+", found[name][0]) for name in names)


@pytest.mark.parametrize(
    "version, fault, text, problem",
    [
        ("2.13.0+cu126", None, "2.13.0+cu126", None),
        ("2.6", None, "2.6", None),
        ("2.5.1", None, "2.5.1, TOO OLD", "too old"),
        ("2.14.0", None, "2.14.0, newer than tested (>=2.6,<2.14)", None),
        ("2.14.0a0+git", None, "2.14.0a0+git, newer than tested (>=2.6,<2.14)", None),
        ("10.0", None, "10.0, newer than tested (>=2.6,<2.14)", None),  # numbers, not text, are compared
        (None, None, "MISSING", "not installed"),
        ("2.13.0", "OSError: libcudart.so.13", "2.13.0, BROKEN", "libcudart.so.13"),
    ],
)
def test_check_package(version, fault, text, problem):
    found, advice = doctor.check_package("torch", ">=2.6,<2.14", version, fault)
    assert found == text
    assert (
        advice is None
        if problem is None
        else problem in advice and 'pip install "torch>=2.6,<2.14"' in advice
    )


def test_only_torch_comes_with_a_word_for_old_cards():
    assert doctor.check_package("scipy", "", None, None)[1] == 'scipy is not installed: pip install "scipy"'
    assert doctor.check_package("torch", "", None, None)[1].endswith(f"{PIP_CU126})")


def test_two_owners_of_cv2_are_a_problem(healthy, capsys, monkeypatch):
    names = ["torch", "numpy", "opencv_python", "opencv-python-headless", None]
    packages = [SimpleNamespace(metadata={"Name": name}, version="5.0") for name in names]
    monkeypatch.setattr(doctor.metadata, "distributions", lambda: packages[:3])
    assert doctor.main([]) == 0
    monkeypatch.setattr(doctor.metadata, "distributions", lambda: packages)
    assert doctor.main([]) == 1
    (line,) = problems(capsys.readouterr().out)
    assert "pip uninstall -y opencv-python opencv-python-headless, then pip install opencv" in line


def test_import_fault_tells_what_was_raised(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_abi.py").write_text("raise AttributeError('built for numpy 1\\nsee the guide')\n")
    (tmp_path / "silent_fault.py").write_text("raise OSError\n")
    importlib.invalidate_caches()
    assert doctor.import_fault("broken_abi") == "AttributeError: built for numpy 1"
    assert doctor.import_fault("silent_fault") == "OSError: "
    assert doctor.import_fault("json") is None


def test_small_disk_and_shared_memory_are_problems(healthy, capsys, tmp_path, monkeypatch):
    usage = type(doctor.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(64 << 20, 0, 64 << 20))
    monkeypatch.setattr(hardware, "SHM", tmp_path)
    assert doctor.main([]) == 1
    disk, shm = problems(capsys.readouterr().out)
    assert "only 0.1 GiB free" in disk and str(Path.cwd()) in disk
    assert "64 MiB free" in shm and "--shm-size" in shm


@pytest.mark.parametrize(
    "name, capability, advice",
    [
        ("NVIDIA GeForce GTX 1050 Ti", (6, 1), PIP_CU126),
        ("Tesla V100", (7, 0), PIP_CU126),
        ("NVIDIA H100", (9, 0), None),
        ("NVIDIA GeForce RTX 2060", (7, 5), None),
    ],
)
def test_check_gpu(name, capability, advice):
    line, problem = doctor.check_gpu(name, capability, 3.94, CU130, "2.13.0+cu130", "13.0")
    assert f"{name}, capability {capability[0]}.{capability[1]}, 3.9 GiB" in line
    if advice is None:
        assert problem is None and "drives it" in line
    else:
        assert problem.startswith(f"{name}: ") and advice in problem and "CANNOT" in line


@pytest.fixture
def gtx_1050_ti(healthy, monkeypatch):
    """A machine with a Pascal card under the default build of torch 2.13."""
    card = SimpleNamespace(name="NVIDIA GeForce GTX 1050 Ti", major=6, minor=1, total_memory=4 << 30)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for function, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_properties": card,
        "get_device_capability": (6, 1),
        "get_device_name": card.name,
        "mem_get_info": (3 << 30, 4 << 30),
        "get_arch_list": CU130,
    }.items():
        monkeypatch.setattr(torch.cuda, function, lambda *args, value=value: value)


def test_pascal_under_the_default_build(gtx_1050_ti, capsys):
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    (line,) = problems(out)
    assert PIP_CU126 in line and "6.1" in line and "2.13.0+cu130" in line
    assert re.search(r"GPU 0 .*GTX 1050 Ti, capability 6.1, 4.0 GiB; this torch CANNOT", out)
    assert re.search(r"free GPU memory +3.0 GiB", out)
    assert re.search(r"--amp auto +fp32: .*computes fp16 slowly", out)


def test_pascal_under_the_right_build(gtx_1050_ti, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_50", "sm_60", "sm_70"])
    assert doctor.main([]) == 0
    assert "this torch drives it" in capsys.readouterr().out


def test_bad_torch_is_a_problem_where_there_is_a_gpu(gtx_1050_ti, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu126")
    assert doctor.main([]) == 1
    assert not [
        line for line in problems(capsys.readouterr().out) if "166122" in line
    ]  # one torch to install
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_60"])
    assert doctor.main([]) == 1
    (line,) = problems(capsys.readouterr().out)  # said once for two cards
    assert "166122" in line and "torch>=2.10" in line


def test_a_gpu_that_fails_is_a_problem(gtx_1050_ti, capsys, monkeypatch):
    def fail(index):
        raise RuntimeError("CUDA error: device busy or unavailable")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert doctor.main([]) == 1
    (line,) = problems(capsys.readouterr().out)
    assert "device busy or unavailable" in line


def test_gpu_not_seen_by_torch(healthy, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: [("NVIDIA GeForce GTX 1050 Ti", "535.54", (6, 1))])
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor.main([]) == 1
    (cpu_build,) = problems(capsys.readouterr().out)
    assert "GTX 1050 Ti" in cpu_build and PIP_CU126 in cpu_build
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert doctor.main([]) == 1
    (old_driver,) = problems(capsys.readouterr().out)
    assert "driver 535.54" in old_driver and "CUDA 12.6" in old_driver and "update it" in old_driver
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert doctor.main([]) == 0
    assert "hidden by CUDA_VISIBLE_DEVICES" in capsys.readouterr().out


def test_nvidia_smi_is_parsed(monkeypatch):
    answer = "NVIDIA GeForce GTX 1050 Ti, 535.183.01, 6.1\nNVIDIA H100, 80GB HBM3, 580.65, 9.0\n"
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **options: SimpleNamespace(stdout=answer))
    assert doctor.nvidia_smi() == [
        ("NVIDIA GeForce GTX 1050 Ti", "535.183.01", (6, 1)),
        ("NVIDIA H100, 80GB HBM3", "580.65", (9, 0)),
    ]

    def fail(*args, **options):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(doctor.subprocess, "run", fail)
    assert doctor.nvidia_smi() == []


def test_check_conv3d():
    text, problem = doctor.check_conv3d("cuda", "bf16", {"fp32": 10.0, "bf16": 40.0, "fp16": 5.0})
    assert text == "fp32 10.0 ms (1.0x), bf16 40.0 ms (0.2x), fp16 5.0 ms (2.0x)"
    assert "slower in bf16 than in fp32" in problem and "--amp off" in problem
    assert doctor.check_conv3d("cuda", "bf16", {"fp32": 10.0, "bf16": 4.0})[1] is None
    assert doctor.check_conv3d("cuda", "fp32", {"fp32": 10.0, "fp16": 40.0})[1] is None  # Pascal, as expected
    assert doctor.check_conv3d("cpu", "fp32", {"fp32": 10.0, "bf16": 40.0})[1] is None


def test_conv3d_is_timed_in_each_precision(healthy, capsys, monkeypatch):
    ticks = iter(range(10_000))
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: 4.0 * next(ticks))  # a turn or two of 10 s
    assert doctor.main(["--conv3d"]) == 0
    assert re.search(r"conv3d +fp32 4000.0 ms \(1.0x\), bf16 4000.0 ms \(1.0x\)", capsys.readouterr().out)
