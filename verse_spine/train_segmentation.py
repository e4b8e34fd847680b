"""Train the second stage: vertebrae in patches of CT, read straight from the HDF5 files.

    python verse_spine/train_segmentation.py --config verse_spine/demo.yaml              phantoms, no download
    python verse_spine/train_segmentation.py --data_path data/verse_h5 --model_name spine --model UNetFull
    torchrun --nproc_per_node 2 verse_spine/train_segmentation.py ...                    several GPUs

Reads what verse_spine/preprocess.py wrote. Writes runs/verse_spine/<model_name>/: config.yaml, log.txt,
metrics.csv, training_curves.png, previews/, weights/last.pt and weights/best.pt (best Dice on whole
validation scans), and after the last epoch the evaluation of best.pt on the test scans. Ctrl-C saves;
--resume goes on.
"""

import math
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import batch, distributed, hardware, runs
from common.augment import augment_batch
from common.checkpoints import TrainedModel
from common.config import make_parser, resolved_config, run_script
from common.evaluation import validate_cases
from common.flags import add_patches_flag, add_validation_flags
from common.losses import dice_ce_loss
from common.patches import histogram
from common.plots import save_curves
from common.schedules import learning_rate
from common.training import Run, optimizer_step
from verse_spine.dataset import STRATA, UNIFORM, PatchDataset, VerSe
from verse_spine.evaluate import evaluate_cases, mean_dice, part_notes
from verse_spine.flags import add_training_flags
from verse_spine.labels import MODES, num_outputs
from verse_spine.networks import ARCHITECTURE, INTENSITIES, load_trained, scale_patches
from verse_spine.pictures import save_case_preview
from verse_spine.report import write_report
from verse_spine.training import (
    get_augmentation,
    get_optimizer,
    open_data,
    set_up,
    start_run,
    usual_lr,
    validation_names,
)

CURVES = {"loss": ["train_loss"], "validation, whole scans": ["val_dice"], "learning rate": ["lr"]}
SAMPLING = {"foreground": STRATA, "uniform": UNIFORM}
UNCHANGEABLE = [*ARCHITECTURE, "patch_size", "labels"]  # flags that a resumed run keeps


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    add_training_flags(parser, patch_size=(96, 96, 96))
    stage = parser.add_argument_group("this stage")
    stage.add_argument(
        "--labels",
        choices=MODES,
        default="binary",
        help="what the labels tell apart: binary = vertebra or not, region3 = cervical, thoracic and "
        "lumbar vertebrae, levels26 = every vertebra by its name",
    )
    stage.add_argument(
        "--sampling",
        choices=SAMPLING,
        default="foreground",
        help="where training patches come from: foreground = mostly from vertebrae and from what is "
        "mistaken for them, uniform = from anywhere in the scan",
    )
    stage.add_argument(
        "--intensity",
        choices=INTENSITIES,
        default="hu",
        help="how HU become the network's input: hu = every scan on one scale, so that a grey value means "
        "one density, patch = each patch by its own range, for comparison only",
    )
    add_patches_flag(stage, 250)
    add_validation_flags(stage, every=5, cases=20)
    return parser


def train(args: Namespace, resumed: dict | None, folder: Path | None) -> tuple[list[dict], dict[str, str]]:
    """One run, new or `resumed` from a checkpoint; returns the rows of its evaluation
    and {case that failed: reason}."""
    device = hardware.start_device(args.device, distributed.local_rank())
    runs.seed_everything(args.seed, args.deterministic)

    # ---- data, network, precision ----
    verse = distributed.main_first(lambda: open_data(args))
    runs.require_same_data(resumed, verse.split, verse.preprocessing, ["spacing_mm"], verse.path)
    outputs, loss_function, config = num_outputs(args.labels), dice_ce_loss, resolved_config(args)
    network, setup = set_up(args, config, outputs, loss_function, device, resumed)
    precision, plan = setup.precision, setup.plan
    config |= setup.config | {"patch_size": list(plan.patch_size)}
    train_set = PatchDataset(
        verse,
        verse.split["train"],
        plan.patch_size,
        args.labels,
        strata=SAMPLING[args.sampling],
        length=max(args.patches, len(verse.split["train"])),
    )
    val_names = validation_names(verse)
    val_names = val_names[:: math.ceil(len(val_names) / args.val_cases)]
    loader = distributed.make_loader(
        train_set, plan.batch_size, seed=args.seed, workers=args.workers, device=device
    )
    augmentation, spacing_mm = get_augmentation(args), verse.preprocessing["spacing_mm"]
    optimizer = get_optimizer(args.optimizer, network.parameters(), args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.scaler)
    trained = TrainedModel(network, config, device, precision, verse.preprocessing, verse.split)

    # ---- run ----
    run = start_run(
        args,
        config,
        trained,
        stage="segmentation",
        num_outputs=outputs,
        optimizer=optimizer,
        scaler=scaler,
        loader=loader,
        setup=setup,
        resumed=resumed,
        folder=folder,
    )
    model = distributed.wrap(network, device)
    mm = " x ".join(f"{side:g}" for side in spacing_mm)
    run.log(f"patches: {len(train_set)} in an epoch, of voxels of {mm} mm; {len(val_names)} scans validate")

    # ---- train ----
    with run:  # Ctrl-C and SIGTERM: the update is finished, last.pt saved
        while run.next_epoch():
            batches = run.batches(loader)
            model.train()
            while size := run.next_update():  # of the weights, from the gradients of `size` batches
                lr = learning_rate("cosine_annealing", run.progress, usual_lr(args.optimizer, args.lr))
                for k in range(size):
                    image, label, seeds, strata = next(batches)
                    run.counts = dict(Counter(run.counts) + Counter(strata))
                    # (N, 1, d, h, w) HU -> about [-1, 1]; (N, d, h, w)
                    image = scale_patches(image.to(device, non_blocking=True), args.intensity)
                    label = label.to(device, non_blocking=True)
                    if args.augment:
                        image, label = augment_batch(image, label, augmentation, seeds.tolist(), spacing_mm)
                    with distributed.no_sync(model, k + 1 < size):
                        with hardware.autocast(device, precision):
                            logits = model(image)
                        loss = loss_function(logits, label.long())
                        scaler.scale(loss / size).backward()
                    run.count(loss)
                optimizer_step(network, optimizer, scaler, lr, args.grad_clip)

            # ---- validate, save, log ----
            distributed.share_buffers(network)  # else each process has its own BatchNorm statistics
            network.eval()
            dice, text = math.nan, ""
            if (run.epoch + 1) % args.val_every == 0 or run.is_last_epoch:
                evaluate = partial(evaluate_cases, trained, verse, surfaces=False)
                dice = mean_dice(validate_cases(evaluate, val_names, len(val_names), run.log))
                text = f"Dice {dice:.4f}  "
            drawn = histogram(run.counts)
            score = dice
            if not verse.split["val"] and not math.isnan(dice):
                score = run.epoch  # nothing to choose by: the latest weights count as the best
            scores = {"lr": optimizer.param_groups[0]["lr"], "val_dice": dice}
            run.end_epoch(scores, score, network.state_dict())
            if distributed.is_main():
                save_curves(run.folder / "training_curves.png", run.history, CURVES)
                save_case_preview(run.folder / "previews", run.epoch - 1, trained, verse.cases[val_names[0]])
            run.log_epoch(text + ", ".join(f"{name} {100 * share:.0f} %" for name, share in drawn.items()))
    return score_best(run, trained, verse, evaluate=args.evaluate)


def score_best(
    run: Run, trained: TrainedModel, verse: VerSe, *, evaluate: bool
) -> tuple[list[dict], dict[str, str]]:
    """Score best.pt on whole test scans, or validation scans where there are none; name the next command."""
    part = "test" if verse.split["test"] else "val"
    rows: list[dict] = []
    failed: dict[str, str] = {}
    weights = run.best_or_last()
    if run.best_epoch >= 0:
        dice = run.history[run.best_epoch]["val_dice"]
        run.log(f"best.pt: validation Dice {dice:.4f} in epoch {run.best_epoch}")
    if evaluate and verse.split[part]:
        run.log(f"now the whole {part} scans with {weights}")
        best = load_trained(weights, trained.device, trained.precision, "segmentation")
        rows, failed = evaluate_cases(best, verse, verse.split[part])
        if distributed.is_main():
            title = f"{len(verse.split[part])} {part} scans of {verse.path}, no region, {best.precision.name}"
            notes = part_notes(part, set(), trained, verse)
            write_report(rows, run.folder / "evaluation", title, failed, notes)
    run.log(f"written: {run.folder}/ with log.txt, metrics.csv, training_curves.png, previews/, weights/")
    predict = shlex.join(["python", "verse_spine/predict.py", "--weights", str(weights)])
    run.log(f"next: {predict} --source <scan or folder>")
    run.log("      and --heatmap_weights <best.pt of train_heatmap.py>, to search around the spine only")
    return rows, failed


def main(argv: list[str] | None = None) -> int:
    with distributed.session():
        _, failed = train(*runs.resume(build_parser(), argv, same=UNCHANGEABLE, stage="segmentation"))
        return batch.exit_code(failed)


if __name__ == "__main__":
    run_script(main)
