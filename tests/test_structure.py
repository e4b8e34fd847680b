"""The house rules that a machine can check."""

import argparse
import ast
import difflib
import importlib
import itertools
import re
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

TASKS = sorted(p.parent.name for p in ROOT.glob("*/preprocess.py"))
MODULES = sorted(p for folder in ("common", "benchmarks", *TASKS) for p in (ROOT / folder).glob("*.py"))
SCRIPTS = [p for p in MODULES if "__main__" in p.read_text(encoding="utf8")]
TRAIN_SCRIPTS = [
    p for p in SCRIPTS if p.parent.name in TASKS and "\ndef train(" in p.read_text(encoding="utf8")
]
BOOTSTRAP = "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> set[str]:
    """First parts of all modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_who_imports_whom(path):
    others = {"benchmarks", *TASKS} - {path.parent.name}
    if path.parent.name == "benchmarks":
        others = set()
    assert not imported(path) & others, "tasks do not import each other, common imports no task"
    if not name(path).startswith("common/nifti"):
        assert "nibabel" not in imported(path), "common/nifti*.py are the only users of nibabel"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_size_and_docstring(path):
    text = path.read_text(encoding="utf8")
    if path.name == "__init__.py":
        assert text == ""
        return
    limit = 260 if path in TRAIN_SCRIPTS else 300 if path in SCRIPTS else 350
    assert text.count("\n") <= limit, "a file you would not want to read in one sitting is two files"
    assert ast.get_docstring(ast.parse(text))


def train_lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf8")
    (node,) = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "train")
    return text.splitlines()[node.lineno - 1 : node.end_lineno]


@pytest.mark.parametrize("path", TRAIN_SCRIPTS, ids=name)
def test_a_training_loop_is_read_at_a_glance(path):
    assert len(train_lines(path)) <= 110


@pytest.mark.parametrize("a, b", [*itertools.combinations(TRAIN_SCRIPTS, 2)], ids=name)
def test_training_loops_repeat_little(a, b):
    """What two scripts have in common belongs to common/training.py; what a reader changes stands in each."""
    first, second = ([line.strip() for line in train_lines(p) if line.strip(" )}],") != ""] for p in (a, b))
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    assert sum(block.size for block in matcher.get_matching_blocks()) < 60


def test_public_functions_of_common_say_what_they_do():
    silent = []
    for path in (ROOT / "common").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                one_liner = isinstance(node, ast.FunctionDef) and len(node.body) == 1
                if not ast.get_docstring(node) and not one_liner:
                    silent.append(f"{name(path)}:{node.name}")
    assert not {s for s in silent if s.split(":")[1] not in ("build_parser", "main")}


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_scripts(path):
    text = path.read_text(encoding="utf8")
    assert BOOTSTRAP in text and "def build_parser(" in text and "def main(argv" in text
    doc = ast.get_docstring(ast.parse(text))
    assert name(path) in doc, "the docstring shows the command"
    module = importlib.import_module(name(path)[:-3].replace("/", "."))
    for action in module.build_parser()._actions:
        assert action.help, f"{action.option_strings} has no help"
        for option in action.option_strings:
            assert option.startswith("-") and (
                option == "--save-overlay" or "-" not in option.strip("-").replace("no-", "")
            )


def test_no_flag_takes_nan_infinity_or_a_senseless_sign():
    either_sign = {"--window"}  # densities in HU
    for path in SCRIPTS:
        module = importlib.import_module(name(path)[:-3].replace("/", "."))
        for action in module.build_parser()._actions:
            option = (action.option_strings or [action.dest])[0]
            if action.type is None or action.choices or option == "--local_rank":  # torch's launcher gives it
                continue
            refused = ["nan", "inf", "-inf", "1e999", *([] if option in either_sign else ["-1", "-0.5"])]
            for text in refused:
                with pytest.raises(argparse.ArgumentTypeError):
                    pytest.fail(f"{name(path)} {option} takes {action.type(text)}")


def test_a_flag_means_the_same_in_every_script():
    beginnings = {
        "--accumulate": "number of batches whose gradients are added up",
        "--batch_size": "number of ",
        "--checkpointing": "compute activations a second time",
        "--data_path": "folder that ",
        "--device": "where to compute: ",
        "--grad_clip": "largest norm of the gradient",
        "--image_size": "side ",
        "--out": "folder ",
        "--recursive": "also look into the subfolders of --source",
        "--seed": "number that fixes what is random",
        "--threshold": "probability, 0 to 1, above which",
        "--weight_decay": "share of each weight",
        "--weights": "trained model",
        "--workers": "number of processes that ",
    }
    for path in SCRIPTS:
        module = importlib.import_module(name(path)[:-3].replace("/", "."))
        for action in module.build_parser()._actions:
            for option in beginnings.keys() & set(action.option_strings):
                assert action.help.startswith(beginnings[option]), f"{name(path)} {option}: {action.help}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/*.yaml")), ids=name)
def test_yaml_files_hold_flags_of_their_script(path):
    from common.config import parse_args

    script = re.search(rf"python {path.parent.name}/(\w+)\.py", path.read_text(encoding="utf8"))[1]
    module = importlib.import_module(f"{path.parent.name}.{script}")
    args = parse_args(module.build_parser(), ["--config", str(path)])
    for key, value in yaml.safe_load(path.read_text(encoding="utf8")).items():
        assert str(getattr(args, key)) == str(value) or float(getattr(args, key)) == float(value)


def test_commands_in_the_documents_exist():
    """Every `python task/script.py --flag` of a README or docstring names a script and flags that exist."""
    texts = {
        name(p): p.read_text(encoding="utf8") for p in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *MODULES]
    }
    count = 0
    for where, text in texts.items():
        for script, rest in re.findall(r"(?:python|nproc_per_node \w+) ((?:\w+)/\w+\.py)([^\n`;]*)", text):
            assert (ROOT / script).is_file(), f"{where}: {script}"
            parser = importlib.import_module(script[:-3].replace("/", ".")).build_parser()
            known = {option for action in parser._actions for option in action.option_strings}
            for flag in re.findall(r"(?<!\S)(--[\w-]+)", rest.split("#")[0]):
                assert flag in known, f"{where}: {script} {flag}"
            count += 1
    assert count > 10


def test_the_readme_lists_every_module_of_common():
    listed = re.findall(r"^ +(\w+\.py) ", (ROOT / "README.md").read_text(encoding="utf8"), re.M)
    assert sorted(listed) == sorted(p.name for p in (ROOT / "common").glob("[!_]*.py"))


def test_requirements_name_what_is_imported():
    """Nothing is imported, lazily or not, that requirements.txt or that of the benchmarks does not bring."""
    names = {"cv2": "opencv-python-headless", "yaml": "PyYAML", "PIL": "pillow", "nrrd": "pynrrd"}
    optional = {"wandb", "kagglehub", "huggingface_hub", "dcm2niix"}
    core = set(re.findall(r"^([A-Za-z][\w-]*)", (ROOT / "requirements.txt").read_text(), re.M))
    peers = set(re.findall(r"^([A-Za-z][\w-]*)", (ROOT / "benchmarks/requirements.txt").read_text(), re.M))
    for path in MODULES:
        allowed = core | (peers if path.parent.name == "benchmarks" else set())
        for module in (
            imported(path) - set(sys.stdlib_module_names) - {"common", "benchmarks", *TASKS} - optional
        ):
            assert names.get(module, module) in allowed, f"{name(path)} imports {module}"


def test_heavy_packages_are_imported_on_use():
    """Importing the modules must not need albumentations, OpenCV, matplotlib, kagglehub or nibabel."""
    lazy = {"albumentations", "cv2", "matplotlib", "kagglehub", "nibabel", "nrrd", "wandb", "monai", "PIL"}
    lazy |= {"dcm2niix"}
    for path in MODULES:
        if path.parent.name == "benchmarks":
            continue
        for node in ast.parse(path.read_text(encoding="utf8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = {a.name for a in node.names} if isinstance(node, ast.Import) else {node.module}
                assert not {m.split(".")[0] for m in modules} & lazy, name(path)


def test_warnings_are_worded_in_one_place():
    """By `warn` of common/messages.py, or by the log of a run."""
    for path in MODULES:
        if path.name != "messages.py" and path.parent.name != "benchmarks":
            found = re.search(
                r'(print|write)\(\s*f?"warning:|formatwarning|showwarning', path.read_text("utf8")
            )
            assert not found, f"{name(path)}: {found[0]}"


def test_nothing_unsafe_or_unfinished():
    patterns = {
        r"type=bool": "a flag that is True for any text",
        r"weights_only=False|allow_pickle=True": "runs code from a file",
        r"yaml\.load\(|(?<![.\w])eval\(|(?<![.\w])exec\(|shell=True": "runs code from a file",
        r"except\s*:": "swallows every error",
        r"TODO|FIXME|NotImplementedError": "unfinished",
        r"get_fdata\(": "a float64 copy of a scan",
    }
    for path in MODULES:
        for pattern, why in patterns.items():
            for match in re.finditer(pattern, path.read_text(encoding="utf8")):
                line = path.read_text(encoding="utf8")[: match.start()].count("\n") + 1
                raise AssertionError(f"{name(path)}:{line} {match[0]}: {why}")
