"""Train a 2-D (Attention) U-Net on lung CT slices.

    python lung_tumor/train.py --config lung_tumor/demo.yaml            phantoms, no download, under 3 minutes
    python lung_tumor/train.py --config lung_tumor/lung_tumor.yaml --data_path data/lung_tumor
    torchrun --nproc_per_node 2 lung_tumor/train.py --config ...        several GPUs, or processes on a CPU

Reads what lung_tumor/preprocess.py wrote. Writes runs/<model_name>/: config.yaml, log.txt, metrics.csv,
training_curves.png, val_predictions.png, weights/last.pt and weights/best.pt (best tumour Dice), and after
the last epoch the evaluation of best.pt on whole held-out volumes. Ctrl-C saves; --resume goes on.
"""

import shlex
import sys
from argparse import ArgumentParser, Namespace
from copy import deepcopy
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import batch, distributed, hardware, runs
from common.checkpoints import TrainedModel
from common.config import make_parser, resolved_config, run_script
from common.cross_validation import run_folds, run_name
from common.ema import WeightAverage
from common.memory import Plan, set_up_step
from common.plots import save_curves
from common.schedules import learning_rate, plateau_drops
from common.training import Run, optimizer_step
from lung_tumor.augmentations import Augmentation
from lung_tumor.dataset import PackedSlices, SliceDataset, open_data
from lung_tumor.evaluate import evaluate_volumes, validate
from lung_tumor.flags import add_training_flags
from lung_tumor.model import ARCHITECTURE, LOSS_WEIGHTS, get_loss, get_model, load_trained
from lung_tumor.preprocess import demo_dataset
from lung_tumor.report import save_val_predictions, write_report

CURVES = {"loss": ["train_loss", "val_loss"], "validation": ["val_dice", "val_iou"], "learning rate": ["lr"]}
UNCHANGEABLE = [*ARCHITECTURE, "image_size"]  # flags that a resumed run keeps


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    add_training_flags(parser)
    return parser


def open_training_data(args: Namespace) -> tuple[PackedSlices, dict[str, list[str]], dict]:
    """Slices, split and preprocessing of --data_path; phantoms are made if they are not there."""
    data_path = demo_dataset() if args.data_path == "demo" else Path(args.data_path)
    fold = None if args.fold is None else int(args.fold)
    return open_data(data_path, args.image_size, args.seed, args.folds, fold, args.patient_pattern)


def data_notes(packed: PackedSlices, preprocessing: dict, image_size: int) -> list[str]:
    """What the log should say about pixels and masks."""
    notes = []
    pixel_mm, scale = preprocessing["pixel_mm"], preprocessing["scale"]
    if pixel_mm and scale:
        seen_mm = pixel_mm / scale
        notes.append(f"pixels: {seen_mm:.3g} mm in squares of {image_size} pixels")
    if packed.num_unclean:
        unclean = f"{packed.num_unclean} masks hold grey values besides 0 and 255"
        notes.append(f"warning: {unclean}; above 127 is tumour")
    return notes


def train(
    args: Namespace, resumed: dict | None, folder: Path | None, resume_words: list[str] | None = None
) -> list[dict]:
    """One run, new or `resumed` from a checkpoint; returns its evaluation, one row for each volume."""
    device = hardware.start_device(args.device, distributed.local_rank())
    runs.seed_everything(args.seed, args.deterministic)

    # ---- data ----
    packed, split, preprocessing = distributed.main_first(lambda: open_training_data(args))
    data_path = preprocessing["data_path"]
    runs.require_same_data(resumed, split, preprocessing, ["window_hu", "pixel_mm", "scale"], data_path)
    augmentation = Augmentation(
        args.horizontal_flip, args.rotation_limit, args.elastic, args.brightness_contrast
    )
    train_set = SliceDataset(packed, split["train"], augmentation if args.augment else None)
    val_set = SliceDataset(packed, split["val"])

    # ---- network, precision, optimiser ----
    config = resolved_config(args)
    network = get_model(config).to(device, memory_format=torch.channels_last)
    loss_function = get_loss(args.loss, **{name: config[name] for name in LOSS_WEIGHTS})
    setup = set_up_step(
        network,
        lambda checkpointing: get_model(config | {"checkpointing": checkpointing}),
        loss_function,
        Plan((args.image_size,) * 2, args.batch_size, args.accumulate, args.checkpointing),
        device,
        name=args.model,
        amp=args.amp,
        resumed=resumed,
        vram_gib=args.vram,
        patch_step=0,
    )
    config |= setup.config
    precision, plan = setup.precision, setup.plan
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.scaler)
    average = WeightAverage(network, args.ema_decay) if args.ema else None
    validated = deepcopy(network) if average else network  # the network that best.pt keeps
    trained = TrainedModel(validated, config, device, precision, preprocessing, split)
    loader = distributed.make_loader(
        train_set, plan.batch_size, seed=args.seed, workers=args.workers, device=device
    )

    # ---- run ----
    name = run_name(args.model_name, args.fold)
    run = Run(
        folder or distributed.on_main(lambda: runs.new_run_dir(args.out, name)),
        config,
        flags=resolved_config(args),
        parts={"model": network, "optimizer": optimizer, "scaler": scaler, "ema": average},
        notes={"preprocessing": preprocessing, "split": split},
        num_batches=len(loader),
        accumulate=plan.accumulate,
        device=device,
        epochs=args.epochs,
        time_budget_s=args.time_budget,
        patience=args.early_stopping,
        resumed=resumed,
        resume_words=resume_words,
        wandb_project="lung_tumor" if args.use_wandb else None,
    )
    model = distributed.wrap(network, device)
    for line in [*setup.lines, *data_notes(packed, preprocessing, args.image_size)]:
        run.log(line)
    effective_batch = plan.batch_size * plan.accumulate * distributed.world_size()
    run.log(
        f"slices: {len(train_set)} training of {len(split['train'])} volumes, {len(val_set)} validation of "
        f"{len(split['val'])}; test volumes: {len(split['test'])}; {len(loader)} batches in an epoch, "
        f"effective batch {effective_batch}"
    )

    # ---- train ----
    with run:  # Ctrl-C and SIGTERM: the update is finished, last.pt saved
        while run.next_epoch():
            drops = plateau_drops([row["val_dice"] for row in run.history], args.plateau_patience)
            batches = run.batches(loader)
            model.train()
            while size := run.next_update():  # of the weights, from the gradients of `size` batches
                lr = learning_rate(args.schedule, run.progress, args.lr, args.min_lr, args.warmup, drops)
                for k in range(size):
                    image, target = next(batches)
                    # (N, 1, h, w) and (N, h, w)
                    image = image.to(device, memory_format=torch.channels_last, non_blocking=True)
                    target = target.to(device, non_blocking=True)
                    with distributed.no_sync(model, k + 1 < size):
                        with hardware.autocast(device, precision):
                            logits = model(image)
                        loss = loss_function(logits, target)
                        scaler.scale(loss / size).backward()
                    run.count(loss)
                optimizer_step(network, optimizer, scaler, lr, args.grad_clip, average)

            # ---- validate, save, log ----
            if average:
                validated.load_state_dict(average.average)
            distributed.share_buffers(validated)  # else each process has its own BatchNorm statistics
            scores = {"lr": optimizer.param_groups[0]["lr"]} | validate(trained, val_set, loss_function)
            is_best = run.end_epoch(scores, scores["val_dice"], validated.state_dict())
            if distributed.is_main():
                save_curves(run.folder / "training_curves.png", run.history, CURVES)
                if is_best:
                    save_val_predictions(run.folder / "val_predictions.png", trained, val_set)
            run.log_epoch(f"val loss {scores['val_loss']:.4f}  tumour Dice {scores['val_dice']:.4f}")
            if run.epoch % 5 == 0 and all(row["val_pred_to_true"] < 0.01 for row in run.history[-5:]):
                run.log(
                    "warning: almost no tumour predicted for 5 epochs; try --loss dice_bce or a lower --lr"
                )
    return *score_best(run, trained, data_path), precision.amp


def score_best(run: Run, trained: TrainedModel, data_path: str) -> tuple[list[dict], dict[str, str]]:
    """Score best.pt on whole test volumes (validation volumes where there are none): tables and pictures."""
    part = "test" if trained.split["test"] else "val"
    weights = run.best_or_last()
    best = load_trained(weights, trained.device, trained.precision)
    run.log(f"best validation Dice {run.best:.4f} in epoch {run.best_epoch}")
    run.log(f"now whole {part} volumes with {weights}")
    rows, failed = evaluate_volumes(best, data_path, best.split[part])
    if distributed.is_main():
        title = f"{len(rows)} {part} volumes of {data_path}, threshold 0.5, {best.precision.name}"
        write_report(rows, run.folder / "evaluation", title, failed)
    run.log(f"written: {run.folder}/ with log.txt, metrics.csv, training_curves.png, weights/ ...")
    predict = shlex.join(["python", "lung_tumor/predict.py", "--weights", str(weights)])
    run.log(f"next: {predict} --source <image, scan or folder of them>")
    return rows, failed


def main(argv: list[str] | None = None) -> int:
    with distributed.session():
        failed = run_folds(train, write_report, build_parser(), argv, same=UNCHANGEABLE, unit="volume")
        return batch.exit_code(failed)


if __name__ == "__main__":
    run_script(main)
