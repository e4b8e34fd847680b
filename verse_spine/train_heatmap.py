"""Train the first stage: where in a CT is the spine? A heat map of the whole scan on a small grid.

    python verse_spine/train_heatmap.py --config verse_spine/demo_heatmap.yaml          phantoms, no download
    python verse_spine/train_heatmap.py --data_path data/verse_h5 --model_name spine_heatmap
    torchrun --nproc_per_node 2 verse_spine/train_heatmap.py ...                         several GPUs

Reads what verse_spine/preprocess.py wrote. Writes runs/verse_spine/<model_name>/: config.yaml, log.txt,
metrics.csv, training_curves.png, previews/, weights/last.pt and weights/best.pt (lowest validation loss), and
after the last epoch evaluation/ of best.pt on the test scans: what share of the vertebra voxels lies in the
box that the second stage will search. Ctrl-C saves; --resume goes on.
"""

import math
import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import batch, distributed, hardware, runs
from common.augment import augment_batch
from common.checkpoints import TrainedModel
from common.config import fraction, make_parser, resolved_config, run_script
from common.metrics import summary
from common.plots import save_curves
from common.schedules import learning_rate
from common.training import Run, optimizer_step
from verse_spine.boxes import evaluate_boxes, save_preview, validate_heatmaps
from verse_spine.dataset import HeatmapDataset, VerSe
from verse_spine.flags import add_training_flags
from verse_spine.heatmap import LOSSES, TARGETS, heatmap_loss
from verse_spine.networks import ARCHITECTURE, load_trained, scale_hu
from verse_spine.training import (
    get_augmentation,
    get_optimizer,
    open_data,
    set_up,
    start_run,
    usual_lr,
    validation_names,
)

CURVES = {
    "loss": ["train_loss", "val_loss"],
    "box on validation scans": ["box_recall", "box_iou"],
    "learning rate": ["lr"],
}
UNCHANGEABLE = [*ARCHITECTURE, "patch_size", "target"]  # flags that a resumed run keeps
# Rotations need proportions only, and voxels of the small grid are nearly cubes.
GRID_MM = (4.0, 4.0, 4.0)


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    add_training_flags(parser, patch_size=(128, 64, 64))
    stage = parser.add_argument_group("this stage")
    stage.add_argument(
        "--target",
        choices=TARGETS,
        default="distance",
        help="form of the heat map: distance = highest in the middle of the vertebrae and falling off "
        "around them, gaussian = a blob at each vertebra, mask = the voxels of the vertebrae, hull = "
        "the convex hull of all of them",
    )
    stage.add_argument(
        "--loss",
        choices=LOSSES,
        default="weighted_mse",
        help="what is minimised: weighted_mse = mean squared error with more weight on the spine, sum_mse "
        "= plain sum of the squared errors, bce = binary cross-entropy, adaptive_wing = a loss that "
        "stresses small errors",
    )
    stage.add_argument(
        "--truncate",
        type=fraction,
        default=0.3,
        help="probability, 0 to 1, that a training scan loses up to half of its length, as real scans end "
        "anywhere",
    )
    return parser


def truncate(image: Tensor, target: Tensor, seeds: list[int], probability: float) -> None:
    """Cut up to half of some scans (N, 1, d, h, w) off at the top or bottom, in place: fields of view end
    anywhere. There the new edge is repeated, as `to_small_grid` does beyond a scan, and the target is 0."""
    for item, seed in enumerate(seeds):
        rng = np.random.default_rng([seed, 1])
        if rng.random() < probability:
            depth = image.shape[2]
            rows = int(rng.uniform(0.1, 0.5) * depth)
            if rng.random() < 0.5:
                cut, edge = slice(0, rows), rows
            else:
                cut, edge = slice(depth - rows, depth), depth - rows - 1
            image[item, :, cut] = image[item, :, edge, None]
            target[item, :, cut] = 0


def train(args: Namespace, resumed: dict | None, folder: Path | None) -> tuple[list[dict], dict[str, str]]:
    """One run, new or `resumed` from a checkpoint; returns the rows of its evaluation
    and {case that failed: reason}."""
    device = hardware.start_device(args.device, distributed.local_rank())
    runs.seed_everything(args.seed, args.deterministic)

    # ---- data, network, precision ----
    verse = distributed.main_first(lambda: open_data(args))
    runs.require_same_data(resumed, verse.split, verse.preprocessing, ["spacing_mm"], verse.path)
    config = resolved_config(args)

    def loss_function(logits: Tensor, target: Tensor) -> Tensor:
        return heatmap_loss(args.loss, logits, target if target.ndim == 5 else target[:, None])

    network, setup = set_up(args, config, 1, loss_function, device, resumed)
    precision, plan = setup.precision, setup.plan
    config |= setup.config | {"patch_size": list(plan.patch_size)}
    train_set, val_set = distributed.main_first(
        lambda: [
            HeatmapDataset(verse, names, plan.patch_size, args.target)
            for names in (verse.split["train"], validation_names(verse))
        ]
    )
    loader = distributed.make_loader(
        train_set, plan.batch_size, seed=args.seed, workers=args.workers, device=device
    )
    augmentation = get_augmentation(args)
    optimizer = get_optimizer(args.optimizer, network.parameters(), args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.scaler)
    trained = TrainedModel(network, config, device, precision, verse.preprocessing, verse.split)

    # ---- run ----
    run = start_run(
        args,
        config,
        trained,
        stage="heatmap",
        num_outputs=1,
        optimizer=optimizer,
        scaler=scaler,
        loader=loader,
        setup=setup,
        resumed=resumed,
        folder=folder,
    )
    model = distributed.wrap(network, device)

    # ---- train ----
    with run:  # Ctrl-C and SIGTERM: the update is finished, last.pt saved
        while run.next_epoch():
            batches = run.batches(loader)
            model.train()
            while size := run.next_update():  # of the weights, from the gradients of `size` batches
                lr = learning_rate("cosine_annealing", run.progress, usual_lr(args.optimizer, args.lr))
                for k in range(size):
                    image, target, seeds = next(batches)
                    # (N, 1, d, h, w) HU and heat map in [0, 1]
                    image, target = image.to(device, non_blocking=True), target.to(device, non_blocking=True)
                    if args.augment:
                        truncate(image, target, seeds.tolist(), args.truncate)
                    image = scale_hu(image)
                    if args.augment:
                        image, target = augment_batch(image, target, augmentation, seeds.tolist(), GRID_MM)
                    with distributed.no_sync(model, k + 1 < size):
                        with hardware.autocast(device, precision):
                            logits = model(image)
                        loss = loss_function(logits, target)
                        scaler.scale(loss / size).backward()
                    run.count(loss)
                optimizer_step(network, optimizer, scaler, lr, args.grad_clip)

            # ---- validate, save, log ----
            distributed.share_buffers(network)  # else each process has its own BatchNorm statistics
            network.eval()
            scores = {"lr": optimizer.param_groups[0]["lr"]}
            scores |= validate_heatmaps(trained, val_set.scans, val_set.targets, args.loss)
            score = -scores["val_loss"]
            if not verse.split["val"]:
                score = run.epoch  # nothing to choose by: the latest weights count as the best
            run.end_epoch(scores, score, network.state_dict())
            if distributed.is_main():
                save_curves(run.folder / "training_curves.png", run.history, CURVES)
                save_preview(run.folder / "previews" / f"epoch_{run.epoch - 1:03d}.png", trained, val_set)
            run.log_epoch(
                f"val loss {scores['val_loss']:.4f}  box recall {scores['box_recall']:.3f} (lowest "
                f"{scores['lowest_recall']:.3f})"
            )
    return score_best(run, trained, verse, evaluate=args.evaluate)


def score_best(
    run: Run, trained: TrainedModel, verse: VerSe, *, evaluate: bool
) -> tuple[list[dict], dict[str, str]]:
    """The boxes that best.pt gives for the test scans (validation scans where there are none), and the next
    command."""
    part = "test" if verse.split["test"] else "val"
    rows: list[dict] = []
    failed: dict[str, str] = {}
    weights = run.best_or_last()
    if run.best_epoch >= 0:
        val_loss = run.history[run.best_epoch]["val_loss"]
        run.log(f"best.pt: validation loss {val_loss:.4f} in epoch {run.best_epoch}")
    if evaluate and verse.split[part]:
        best = load_trained(weights, trained.device, trained.precision, "heatmap")
        table = run.folder / "evaluation" / "boxes.csv"
        rows, failed = evaluate_boxes(best, verse, verse.split[part], table)
        recalls = [row["box_recall"] for row in rows]
        run.log(
            f"{len(rows)} {part} scans: share of vertebra voxels in the box: mean "
            f"{summary(recalls)['mean']:.4f}, lowest {min(recalls, default=math.nan):.4f}"
        )
        for line in batch.failed_lines(failed):
            run.log(line)
    run.log(f"written: {run.folder}/ with log.txt, metrics.csv, training_curves.png, previews/, weights/")
    data = shlex.quote(str(run.notes["config"]["data_path"]))
    run.log(f"next: python verse_spine/train_segmentation.py --data_path {data} --model_name spine")
    return rows, failed


def main(argv: list[str] | None = None) -> int:
    with distributed.session():
        _, failed = train(*runs.resume(build_parser(), argv, same=UNCHANGEABLE, stage="heatmap"))
        return batch.exit_code(failed)


if __name__ == "__main__":
    run_script(main)
