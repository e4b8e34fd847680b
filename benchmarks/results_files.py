"""What each benchmark writes: numbers as JSON and a table in Markdown, with command, commit and machine."""

import json
import sys
import time
from pathlib import Path

import torch

from common.hardware import describe_device
from common.runs import git_state

PACKAGES = ("torch", "numpy", "cv2", "albumentations", "monai")  # whose versions are noted


def write_results(out: str, name: str, argv: list | None, content: dict, rows: list, notes: str) -> None:
    """out/<name>.json (`content`) and .md (`rows` by column title, `notes`), each with its origin."""
    words = map(str, sys.argv[1:] if argv is None else argv)
    words = [Path(w).name if Path(w).is_absolute() else w for w in words]  # names no folder of this machine
    origin = {
        "command": " ".join(["python", f"benchmarks/{name}.py", *words]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_state(),
        "machine": describe_device(torch.device("cpu")),
        "versions": ", ".join(f"{m} {sys.modules[m].__version__}" for m in PACKAGES if m in sys.modules),
    }
    head = "".join(f"- {key}: {value}\n" for key, value in origin.items())
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    table = "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines) + f"\n{notes}\n"
    Path(out).mkdir(parents=True, exist_ok=True)
    Path(out, f"{name}.json").write_text(json.dumps(origin | content, indent=2) + "\n", encoding="utf8")
    Path(out, f"{name}.md").write_text(f"# {name}\n\n{head}\n{table}", encoding="utf8")
    print(f"\n{table}\nwritten: {Path(out, name)}.json and .md")
