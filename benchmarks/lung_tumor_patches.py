"""Attention U-Nets of this project and of MONAI on real lung CT patches: same training, held-out score, time.

    python benchmarks/lung_tumor_patches.py --data_path ../shared/data/lung_ct/msd_lung_2mm_patches

--data_path holds val.npz and test.npz: images float32 (n, h, w) in 0..1, labels uint8 (n, h, w), 1 = tumour;
here 2 mm patches of Medical Segmentation Decathlon Task06 (github.com/shizoda/data, CC BY-SA 4.0). Each file
trains and is scored in turn, --seeds times. The networks take their steps in turns on the same batches, in
float32; then the slower one trains again, with only the steps that fit into the time of the other. The last
weights are scored, nothing is chosen by the scored file. The second table has other thresholds of the tumour
probability than 0.5. Writes lung_tumor_patches.json and .md to --out.
"""

import itertools
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_files import PACKAGES, write_results
from common.config import (
    Switch,
    make_parser,
    non_negative_float,
    non_negative_int,
    parse_args,
    positive_float,
    positive_int,
    resolved_config,
)
from common.hardware import pick_device
from common.metrics import binary_counts, dice_from_counts
from common.networks import AttentionUNet
from common.schedules import learning_rate
from lung_tumor.augmentations import Augmentation
from lung_tumor.model import NUM_CLASSES, get_loss
from lung_tumor.slices import normalise

MODELS = ("ours", "monai", "monai_batch_norm")
MONAI_CHANNELS = (16, 32, 64, 128, 256)  # as ours at base_features 16, but for our bottleneck of 128
DIRECTIONS = (("val", "test"), ("test", "val"))  # trained on, scored on
SCORES = {"pooled_dice": 3, "tumour_patch_dice": 3, "empty_patch_fp": 2}  # and their decimal places
COLUMNS = SCORES | {"ms_per_step": 0, "train_s": 1}
THRESHOLDS = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.98)  # of the tumour probability


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--data_path", required=True, help="folder that holds val.npz and test.npz")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=["ours", "monai"],
        help="networks to compare: ours is this project's; monai_batch_norm is MONAI's with batch "
        "normalisation after each merge of skip and decoder, where MONAI's has instance normalisation",
    )
    parser.add_argument(
        "--seeds",
        type=positive_int,
        default=5,
        help="number of runs in each direction, each with another seed",
    )
    parser.add_argument(
        "--steps", type=positive_int, default=300, help="number of optimiser updates in a run"
    )
    parser.add_argument("--batch_size", type=positive_int, default=16, help="number of patches in an update")
    parser.add_argument(
        "--lr",
        type=positive_float,
        nargs=2,
        default=[3e-3, 1e-2],
        help="highest learning rates of this project's network and of MONAI's; they fall as a cosine",
    )
    parser.add_argument(
        "--empty_weight",
        type=non_negative_float,
        nargs=2,
        default=[0.0, 1.0],
        help="factors on the Dice loss of patches without tumour, for the two networks; as in train.py",
    )
    parser.add_argument(
        "--base_features",
        type=positive_int,
        default=16,
        help="number of channels of the first level of this project's network, doubled at each deeper level",
    )
    parser.add_argument(
        "--bilinear",
        action=Switch,
        default=False,
        help="enlarge feature maps of this project's network by interpolation, with half the bottleneck; "
        "--no-bilinear enlarges them by transposed convolutions",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="where to compute: cuda, cuda:1 (the second card), mps (Apple) or cpu; auto takes the first "
        "of cuda, mps and cpu that this machine has",
    )
    parser.add_argument(
        "--threads",
        type=non_negative_int,
        default=0,
        help="number of processor threads of torch; 0 = as many as there are cores; take 1 on a machine "
        "that others use",
    )
    parser.add_argument("--jobs", type=positive_int, default=1, help="number of runs at the same time")
    parser.add_argument(
        "--out",
        default="benchmarks/results",
        help="folder that the results (JSON and Markdown) are written to",
    )
    return parser


def load_patches(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 0..255, labels uint8 0/1, (n, h, w) each; ValueError: not of both kinds, not in 0..1."""
    with np.load(path, allow_pickle=False) as file:
        images, labels = file["images"], (file["labels"] > 0).astype(np.uint8)
    if images.min() < 0 or images.max() > 1 or len(set(labels.any(axis=(1, 2)))) != 2:
        raise ValueError(f"{path}: expected images in 0..1, some patches with and some without tumour")
    return np.rint(255 * images).astype(np.uint8), labels


def build_network(name: str, args: Namespace, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if name == "ours":
        network = AttentionUNet(1, NUM_CLASSES, width=args.base_features, bilinear=args.bilinear)
    else:
        from monai.networks.nets import AttentionUnet

        network = AttentionUnet(2, 1, NUM_CLASSES, channels=MONAI_CHANNELS, strides=(2, 2, 2, 2))
    if name == "monai_batch_norm":
        for layer in network.modules():
            if hasattr(layer, "merge"):  # the convolution of skip and enlarged feature
                layer.merge.adn.N = nn.BatchNorm2d(layer.merge.conv.out_channels)
    return network.to(memory_format=torch.channels_last)


def batches(images: np.ndarray, labels: np.ndarray, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented (size, 1, h, w) in [-1, 1] and (size, h, w) int64 without end; equal seeds, equal batches."""
    rng, augment = np.random.default_rng(seed), Augmentation()
    while True:
        chosen = rng.choice(len(images), size, replace=False)
        changed = [augment(images[i], labels[i], int(rng.integers(2**31))) for i in chosen]
        image, target = (np.stack(part) for part in zip(*changed, strict=True))
        yield normalise(image).unsqueeze(1), torch.from_numpy(target.astype(np.int64))


def train(
    networks: dict, data: Iterator, steps: int, settings: dict[str, tuple], device: torch.device
) -> dict[str, list]:
    """Train all networks (by name) on the same batches, one step each in turns; ms of every step by name.

    `settings` holds, by name, the highest learning rate and the weight of patches without tumour. On one
    thread of a CPU the ms are those of the processor, so that other programs do not count.
    """
    own_time = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if own_time else time.perf_counter
    taken_ms = {name: [] for name in networks}
    optimizers = {k: torch.optim.AdamW(n.parameters(), weight_decay=1e-4) for k, n in networks.items()}
    for step in range(steps):
        image, target = (part.to(device) for part in next(data))  # (N, 1, h, w), (N, h, w)
        for name, network in networks.items():
            start, optimizer, (lr, empty_weight) = clock(), optimizers[name], settings[name]
            optimizer.param_groups[0]["lr"] = learning_rate("cosine_annealing", step / steps, lr, 1e-6)
            optimizer.zero_grad(set_to_none=True)
            get_loss("dice_bce", empty_weight=empty_weight)(network(image), target).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken_ms[name].append(1000 * (clock() - start))
    return taken_ms


@torch.inference_mode()
def tumour_probs(network: nn.Module, images: np.ndarray, device: torch.device) -> np.ndarray:
    """Tumour probability of each pixel of images uint8 (n, h, w), float32 of the same shape."""
    parts = normalise(images).unsqueeze(1).to(device).split(64)
    probs = [network.eval()(part).softmax(dim=1)[:, 1] for part in parts]
    return torch.cat(probs).cpu().numpy()


def score(probs: np.ndarray, labels: np.ndarray, threshold: float = 0.5) -> dict[str, float]:
    """Dice of one confusion matrix over all patches, mean Dice of those with tumour, share of those
    without in which some is predicted."""
    pred = probs > threshold
    counts = [binary_counts(p, t) for p, t in zip(pred, labels > 0, strict=True)]  # (tp, fp, fn, tn) each
    filled = labels.any(axis=(1, 2))
    dices = [dice_from_counts(*c[:3]) for c, has_tumour in zip(counts, filled, strict=True) if has_tumour]
    return {
        "pooled_dice": dice_from_counts(*np.sum(counts, axis=0).tolist()[:3]),
        "tumour_patch_dice": statistics.mean(dices),
        "empty_patch_fp": float(pred.any(axis=(1, 2))[~filled].mean()),
    }


def run(args: Namespace, names: list[str], steps: int, seed_and_files: tuple[int, tuple[str, str]]) -> dict:
    """Train the networks called `names` together with one seed in one direction; the result of each."""
    seed, (trained, scored) = seed_and_files
    device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    patches = {part: load_patches(Path(args.data_path, f"{part}.npz")) for part in (trained, scored)}
    networks = {name: build_network(name, args, seed).to(device) for name in names}
    own, peer = zip(args.lr, args.empty_weight, strict=True)
    settings = {name: own if name == "ours" else peer for name in names}
    taken_ms = train(networks, batches(*patches[trained], args.batch_size, seed), steps, settings, device)
    rows, (images, labels) = {}, patches[scored]
    for name, network in networks.items():
        probs = tumour_probs(network, images, device)
        rows[name] = dict(trained_on=trained, scored_on=scored, seed=seed, steps=steps)
        rows[name]["parameters"] = sum(p.numel() for p in network.parameters())
        rows[name] |= score(probs, labels)
        rows[name] |= dict(ms_per_step=statistics.median(taken_ms[name]), train_s=sum(taken_ms[name]) / 1000)
        rows[name]["thresholds"] = {str(t): score(probs, labels, t) for t in THRESHOLDS}
    return rows


def threshold_table(runs: dict[str, list[dict]]) -> str:
    """Markdown: the mean scores of each network, by threshold of the tumour probability."""
    titles = ["threshold", "network", *(key.replace("_", " ") for key in SCORES)]
    table = f"| {' | '.join(titles)} |\n{len(titles) * '| --- '}|\n"
    for threshold, (name, of_run) in itertools.product(map(str, THRESHOLDS), runs.items()):
        if "thresholds" in of_run[0]:  # a row of differences has none
            means = [statistics.mean(row["thresholds"][threshold][key] for row in of_run) for key in SCORES]
            cells = [f"{mean:.{digits}f}" for mean, digits in zip(means, SCORES.values(), strict=True)]
            table += f"| {threshold} | {name} | {' | '.join(cells)} |\n"
    return table


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(build_parser(), argv)
    settings = resolved_config(args, ("data_path", "out"))
    args.threads = threads = args.threads or torch.get_num_threads()
    models = [name for name in args.models if name == "ours" or find_spec("monai")]
    if models != args.models:
        print("monai: not measured: pip install -r benchmarks/requirements.txt")
    for name in filter(find_spec, PACKAGES):
        import_module(name)  # so that the results name its version, where only other processes use it
    runs: dict[str, list[dict]] = {}

    def run_all(names: list[str], steps: int, suffix: str = "") -> None:
        orders = itertools.product(range(args.seeds), DIRECTIONS)
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            apply = map if args.jobs == 1 else pool.map
            for rows in apply(run, *map(itertools.repeat, (args, names, steps)), orders):
                for name, row in rows.items():
                    runs.setdefault(name + suffix, []).append(row)
                    print(name + suffix, *list(row.values())[:-1], flush=True)

    run_all(models, args.steps)
    if set(both := ("ours", "monai")) <= set(models):
        ms = {name: statistics.median(row["ms_per_step"] for row in runs[name]) for name in both}
        slow = max(both, key=ms.__getitem__)
        run_all([slow], max(1, round(args.steps * min(ms.values()) / ms[slow])), ", equal time")
        for title, cut in (("equal steps", ""), ("equal time", slow)):
            ours, monai = (runs[f"{name}, equal time" if name == cut else name] for name in both)
            pairs = [{k: a[k] - b[k] for k in COLUMNS} for a, b in zip(ours, monai, strict=True)]
            runs[f"ours - monai, {title}"] = pairs
    means, rows = {}, []
    for name, of_run in runs.items():
        means[name] = {k: statistics.mean(r[k] for r in of_run) for k in COLUMNS}
        rows.append({"network": name} | {k: of_run[0].get(k, "") for k in ("parameters", "steps")})
        for key, digits in COLUMNS.items():
            sd = f" ± {statistics.stdev(r[key] for r in of_run):.{digits}f}" if len(of_run) > 1 else ""
            rows[-1][key.replace("_", " ")] = f"{means[name][key]:.{digits}f}{sd}"
    notes = f"Mean ± SD of {args.seeds} seeds in 2 directions; differences run by run. Threads: {threads}."
    content = {"settings": settings, "means": means, "runs": runs}
    write_results(args.out, "lung_tumor_patches", argv, content, rows, notes + f"\n\n{threshold_table(runs)}")
    return content


if __name__ == "__main__":
    main()
