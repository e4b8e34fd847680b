"""Patches a second of common/augment.py and of TorchIO's equivalent transforms, on the CPU.

    python benchmarks/augmentation.py --threads 2

Image and uint8 label of --patch_size cubed voxels of 1 mm; both do the same kinds of change with the same
probabilities and ranges, in turns, over --repeats rounds. TorchIO has no brightness and contrast: ours does
these two on top. TorchIO changes one patch after the other in this process, as one worker of a data loader
would, and may use as many threads as ours. Writes augmentation.json and .md to --out.
"""

import math
import os
import statistics
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_files import write_results
from common.augment import Augmentation3d, augment_batch
from common.config import make_parser, parse_args, positive_int, resolved_config

CHANGES = ("spatial", "elastic", "noise", "blur", "brightness", "contrast", "low_resolution", "gamma")
NOT_IN_TORCHIO = ("brightness", "contrast")
HALF = (0.5, 0.5, 0.5)


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--patch_size", type=positive_int, default=96, help="side of the patches in voxels")
    parser.add_argument("--batch_size", type=positive_int, default=2, help="number of patches in a batch")
    parser.add_argument(
        "--batches",
        type=positive_int,
        default=2,
        help="number of batches that each way augments in a round of a case",
    )
    parser.add_argument(
        "--default_batches",
        type=positive_int,
        default=10,
        help="the same for the case `defaults`, whose batches differ more",
    )
    parser.add_argument(
        "--repeats",
        type=positive_int,
        default=5,
        help="number of rounds, in each of which all ways take turns",
    )
    parser.add_argument(
        "--threads",
        type=positive_int,
        default=2,
        help="number of processor threads, of torch and of SimpleITK",
    )
    parser.add_argument(
        "--out",
        default="benchmarks/results",
        help="folder that the results (JSON and Markdown) are written to",
    )
    return parser


def settings_of_cases() -> dict[str, Augmentation3d]:
    """By name: everything always, everything but elastic, the default probabilities, each change alone."""
    nothing = Augmentation3d(**{f"{name}_probability": 0.0 for name in CHANGES})
    always = {f"{name}_probability": 1.0 for name in CHANGES}
    cases = {"all": replace(nothing, flip_probability=HALF, **always)}
    cases["all but elastic"] = replace(cases["all"], elastic_probability=0.0)
    cases["defaults"] = Augmentation3d(flip_probability=HALF)
    for name in ("flip", *CHANGES):
        cases[name] = replace(nothing, **{f"{name}_probability": HALF if name == "flip" else 1.0})
    return cases


def torchio_transform(settings: Augmentation3d, patch_size: int) -> Callable:
    """The same ranges and probabilities; a transform that would never apply is left out."""
    import torchio as tio

    points = max(
        4, math.ceil(patch_size / settings.elastic_grid_mm) + 3
    )  # 3 more than cells, as B-splines have
    affine = dict(scales=settings.scale, degrees=settings.rotation_deg[::-1], isotropic=True)
    steps = [
        tio.RandomFlip(
            axes=(0, 1, 2),
            flip_probability=settings.flip_probability[0],
            p=float(any(settings.flip_probability)),
        ),
        tio.RandomAffine(**affine, p=settings.spatial_probability),
        tio.RandomElasticDeformation(
            points, settings.elastic_mm, locked_borders=0, p=settings.elastic_probability
        ),
        tio.RandomNoise(std=(0, settings.noise_sd), p=settings.noise_probability),
        tio.RandomBlur(std=settings.blur_mm, p=settings.blur_probability),
        tio.RandomAnisotropy(downsampling=settings.low_resolution, p=settings.low_resolution_probability),
        tio.RandomGamma(log_gamma=tuple(map(math.log, settings.gamma)), p=settings.gamma_probability),
    ]
    return tio.Compose([step for step in steps if step.probability > 0])


def make_batch(batch_size: int, size: int) -> tuple[Tensor, Tensor]:
    """Smooth random images in -1..1, (N, 1, D, H, W), and where they are above 0.2, uint8 (N, D, H, W)."""
    coarse = torch.rand(batch_size, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image = torch.nn.functional.interpolate(coarse, size=(size,) * 3, mode="trilinear")
    return image, (image[:, 0] > 0.2).to(torch.uint8)


def ways_of_case(settings: Augmentation3d, image: Tensor, label: Tensor, with_torchio: bool) -> dict:
    """By name: a function of the batch's number that augments the batch once."""
    size = len(image)
    ways = {"ours": lambda i: augment_batch(image, label, settings, range(i * size, (i + 1) * size))}
    if with_torchio:
        import torchio as tio

        transform = torchio_transform(settings, image.shape[-1])

        def torchio_batch(i: int) -> list:
            torch.manual_seed(i)
            subjects = [
                tio.Subject(image=tio.ScalarImage(tensor=a), label=tio.LabelMap(tensor=b))
                for a, b in zip(image, label[:, None], strict=True)
            ]
            return [transform(subject) for subject in subjects]

        ways["torchio"] = torchio_batch
    return ways


def measure(ways: dict[str, Callable], batches: int, patches: int, repeats: int) -> dict[str, dict]:
    """Wall and processor ms for a patch in each way, one number for each round, after a first batch that does
    not count."""
    taken = {name: {"wall_ms": [], "cpu_ms": []} for name in ways}
    for run in ways.values():
        run(0)
    order = list(ways.items())
    for repeat in range(repeats):
        for name, run in order:
            wall, cpu = time.perf_counter(), time.process_time()
            for i in range(batches):
                run(1 + repeat * batches + i)
            taken[name]["wall_ms"].append(1000 * (time.perf_counter() - wall) / (batches * patches))
            taken[name]["cpu_ms"].append(1000 * (time.process_time() - cpu) / (batches * patches))
        order.reverse()  # neither always follows the other
    return taken


def shown(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(build_parser(), argv)
    torch.set_num_threads(args.threads)
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(args.threads)  # read when ITK is imported
    with_torchio = find_spec("torchio") is not None
    if not with_torchio:
        print("torchio: not measured: pip install -r benchmarks/requirements.txt")
    image, label = make_batch(args.batch_size, args.patch_size)
    cases, rows = {}, []
    for name, settings in settings_of_cases().items():
        ways = ways_of_case(settings, image, label, with_torchio and name not in NOT_IN_TORCHIO)
        batches = args.default_batches if name == "defaults" else args.batches
        case = cases[name] = measure(ways, batches, args.batch_size, args.repeats)
        row = {"case": name.replace("_", " ")}
        for way in ("ours", "torchio"):
            row[f"{way}, ms a patch"] = shown(case[way]["wall_ms"], 1) if way in case else ""
        for kind, title in (("wall_ms", "times as fast"), ("cpu_ms", "times less processor time")):
            pairs = zip(case["torchio"][kind], case["ours"][kind], strict=True) if "torchio" in case else []
            case[f"{kind}_ratio"] = [torchio / ours for torchio, ours in pairs if ours > 0]
            row[title] = shown(case[f"{kind}_ratio"], 1) if case[f"{kind}_ratio"] else ""
        rows.append(row)
        print(*row.values(), sep=" | ", flush=True)
    version = sys.modules["torchio"].__version__ if with_torchio else "not installed"
    content = {"settings": resolved_config(args, ("out",)), "torchio": version, "cases": cases}
    notes = f"""Batches of {args.batch_size} patches of {args.patch_size}^3 voxels, image and label.
Threads: {args.threads}. TorchIO {version}.
Median (lowest to highest) of {args.repeats} rounds, in turns; ratios are taken round by round. Other
programs may have used the cores at the same time. Processor time is that of all threads: what counts where
the workers of a data loader fill the cores. `all`, `all but elastic` and `defaults` have brightness and
contrast in ours only."""
    write_results(args.out, "augmentation", argv, content, rows, notes)
    return content


if __name__ == "__main__":
    main()
