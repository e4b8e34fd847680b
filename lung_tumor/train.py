"""Train a 2-D (Attention) U-Net on lung CT slices.

    python lung_tumor/train.py --config lung_tumor/demo.yaml            phantoms, no download, under 3 minutes
    python lung_tumor/train.py --config lung_tumor/lung_tumor.yaml --data_path data/lung_tumor
    torchrun --nproc_per_node 2 lung_tumor/train.py --config ...        several GPUs, or processes on a CPU

Reads what lung_tumor/preprocess.py wrote. Writes runs/<model_name>/: config.yaml, log.txt, metrics.csv,
training_curves.png, val_predictions.png, weights/last.pt and weights/best.pt (best tumour Dice), and after
the last epoch the evaluation of best.pt on whole held-out volumes. Ctrl-C saves; --resume goes on.
"""

import math
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import distributed, hardware, runs
from common.config import (
    Switch,
    add_length_flags,
    add_machine_flags,
    fraction,
    make_parser,
    parse_args,
    positive_int,
    resolved_config,
    run_script,
)
from common.ema import WeightAverage
from common.memory import limit_cuda_memory, plan_table
from common.plots import save_curves
from common.schedules import SCHEDULES, learning_rate, plateau_drops
from lung_tumor.augmentations import Augmentation
from lung_tumor.dataset import SliceDataset, open_data
from lung_tumor.evaluate import evaluate_volumes, validate
from lung_tumor.model import (
    ARCHITECTURE,
    LOSSES,
    MODELS,
    TrainedModel,
    get_loss,
    get_model,
    load_trained,
    plan_memory,
    training_trial,
)
from lung_tumor.preprocess import demo_dataset
from lung_tumor.report import save_val_predictions, write_report

CURVES = {"loss": ["train_loss", "val_loss"], "validation": ["val_dice", "val_iou"], "learning rate": ["lr"]}


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data_path", default="data/lung_tumor", help="folder from preprocess.py, or demo")
    data.add_argument(
        "--image_size", type=positive_int, default=512, help="side of the square slices, pixels"
    )
    data.add_argument("--folds", type=int, help="cross-validation with this many folds by patient")
    data.add_argument("--fold", help="which fold to hold out, 0 to folds - 1, or all, one after the other")
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODELS, default="AttentionUNet", help="network")
    model.add_argument("--base_features", type=positive_int, default=64, help="channels of the first level")
    model.add_argument("--bilinear", action=Switch, default=True, help="or transposed convolutions")
    model.add_argument("--norm", choices=["batch", "group"], default="batch", help="group for --batch_size 1")
    model.add_argument("--deep_supervision", action=Switch, default=False, help="losses at four scales")
    model.add_argument(
        "--checkpointing", action=Switch, default=True, help="recompute instead of keeping; slower"
    )
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--batch_size", type=positive_int, default=2, help="slices a step and process")
    optim.add_argument("--accumulate", type=positive_int, default=16, help="steps an optimiser update")
    optim.add_argument("--lr", type=float, default=5e-5, help="learning rate of AdamW")
    optim.add_argument("--weight_decay", type=float, default=1e-4, help="of AdamW")
    optim.add_argument("--grad_clip", type=float, default=1.0, help="largest norm of the gradient; 0 = any")
    optim.add_argument(
        "--schedule", choices=SCHEDULES, default="cosine_annealing", help="of the learning rate"
    )
    optim.add_argument("--min_lr", type=float, default=1e-6, help="where the schedule ends")
    optim.add_argument("--warmup", type=float, default=0.07, help="share of the run, for warmup_cosine")
    optim.add_argument("--plateau_patience", type=int, default=10, help="epochs, for reduce_on_plateau")
    optim.add_argument("--loss", choices=LOSSES, default="dice_bce", help="see the README")
    optim.add_argument("--ce_weight", type=float, default=1.0, help="of the cross-entropy in dice_bce")
    optim.add_argument("--dice_weight", type=float, default=1.0, help="of the Dice loss in dice_bce")
    optim.add_argument("--tumour_weight", type=float, default=0.5, help="tumour's share of the balanced CE")
    optim.add_argument("--ema", action=Switch, default=False, help="validate and keep averaged weights")
    optim.add_argument("--ema_decay", type=float, default=0.99, help="per update; 0.99 averages about 100")
    augment = parser.add_argument_group("augmentation")
    augment.add_argument("--augment", action=Switch, default=True, help="random changes of training slices")
    augment.add_argument("--horizontal_flip", type=fraction, default=0.5, help="probability")
    augment.add_argument("--rotation_limit", type=float, default=15.0, help="degrees to either side")
    augment.add_argument("--elastic", type=fraction, default=0.3, help="probability of each distortion")
    augment.add_argument("--brightness_contrast", type=fraction, default=0.15, help="share of the range")
    add_length_flags(parser, epochs=150, early_stopping=30)
    add_machine_flags(parser)
    parser.add_argument(
        "--vram", type=float, help="GiB of the card: fit batch and checkpointing to it and keep to it"
    )
    run = parser.add_argument_group("run")
    run.add_argument("--model_name", "--experiment_name", default="lung_tumor_ds512", help="name of the run")
    run.add_argument("--out", default="runs", help="folder of all runs")
    run.add_argument("--use_wandb", action=Switch, default=False, help="also log to Weights & Biases")
    return parser


def train(args: Namespace, fold: int | None = None, resumed: dict | None = None, run_dir: Path | None = None):
    """One run, new or `resumed` from a checkpoint; returns its evaluation, one dict a held-out volume."""
    device = hardware.start_device(args.device, distributed.local_rank())
    runs.seed_everything(args.seed, args.deterministic)

    # ---- data ----
    demo = args.data_path == "demo"
    data_path = distributed.main_first(lambda: demo_dataset() if demo else Path(args.data_path))
    packed, split, preprocessing = distributed.main_first(
        lambda: open_data(data_path, args.image_size, args.seed, args.folds, fold)
    )
    augmentation = Augmentation(
        args.horizontal_flip, args.rotation_limit, args.elastic, args.brightness_contrast
    )
    train_set = SliceDataset(packed, split["train"], augmentation if args.augment else None)
    val_set = SliceDataset(packed, split["val"])

    # ---- model and optimiser ----
    config = resolved_config(args) | {"fold": None if fold is None else str(fold)}
    network = get_model(config).to(device, memory_format=torch.channels_last)
    loss_function = get_loss(args.loss, args.ce_weight, args.dice_weight, args.tumour_weight)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    average = WeightAverage(network, args.ema_decay) if args.ema else None
    trial = training_trial(network, loss_function, (args.batch_size, args.image_size), device)
    # Timed once a run: its second half is computed like its first, and config.yaml repeats it.
    amp = resumed["config"]["amp"] if resumed and args.amp == "auto" else args.amp
    precision = distributed.on_main(lambda: hardware.choose_precision(amp, device, trial))
    plan, tried = plan_memory(config, precision, loss_function)
    if args.vram:
        limit_cuda_memory(args.vram, device)
        network.checkpointing = plan.checkpointing
    config |= dict(amp=precision.amp, checkpointing=plan.checkpointing)
    config |= dict(batch_size=plan.batch_size, accumulate=plan.accumulate)
    loader, sampler = distributed.make_loader(
        train_set, plan.batch_size, seed=args.seed, workers=args.workers, device=device
    )
    num_batches = sampler.num_batches
    scaler = torch.amp.GradScaler(device.type, enabled=precision.scaler)
    parts = dict(model=network, optimizer=optimizer, scaler=scaler, ema=average)
    # Where the run stands; all of it goes into every checkpoint.
    at = Namespace(epoch=0, batch=0, loss_sum=0.0, best=-1.0, best_epoch=-1, elapsed_s=0.0, history=[])
    at.num_batches = num_batches
    if resumed:
        if resumed["split"] != split:
            raise ValueError(f"--resume: the split of {data_path} is not the one that this run began with")
        at = runs.restore_training_state(resumed, **parts)
        if at.batch and at.num_batches != num_batches:
            raise ValueError(
                f"--resume: it was stopped in an epoch of {at.num_batches} batches, now there are "
                f"{num_batches}; give --batch_size and the number of processes that it had"
            )
        at.num_batches = num_batches
    model = distributed.wrap(network, device)
    judged = deepcopy(network) if average else network  # what is validated and kept as best.pt
    trained = TrainedModel(judged, config, device, precision, preprocessing, split)

    # ---- run folder and log ----
    if run_dir is None:
        name = args.model_name if fold is None else f"{args.model_name}_fold{fold}"
        run_dir = distributed.on_main(lambda: runs.new_run_dir(args.out, name))
    last, best = run_dir / "weights" / "last.pt", run_dir / "weights" / "best.pt"
    log = runs.start_log(run_dir, config, at.history)
    log(f"device: {hardware.describe_device(device)}; {distributed.world_size()} process(es)")
    for warning in hardware.startup_warnings(device, tried[-1][1]):
        log(f"warning: {warning}")
    log(f"precision: {precision.name} ({precision.reason})")
    num_parameters = sum(p.numel() for p in network.parameters())
    log(f"{args.model}: {num_parameters:,} parameters; a step will take {tried[-1][1]:.0f} MiB of tensors")
    if args.vram:
        log(plan_table(tried, args.vram))
    log(
        f"slices: {len(train_set)} training of {len(split['train'])} volumes, {len(val_set)} validation of "
        f"{len(split['val'])}; test volumes: {len(split['test'])}; {num_batches} steps an epoch, effective "
        f"batch {plan.batch_size * plan.accumulate * distributed.world_size()}"
    )
    if packed.num_unclean:
        log(f"warning: {packed.num_unclean} masks hold grey values besides 0 and 255; above 127 is tumour")
    if resumed:
        log(f"resumed at epoch {at.epoch}, batch {at.batch}")
    wandb_run = runs.open_wandb("lung_tumor", run_dir.name, config) if args.use_wandb else None
    kept = dict(config=config, preprocessing=preprocessing, split=split)
    again = [*sys.argv, "--resume"] if args.fold == "all" else [sys.argv[0], "--resume", str(last)]
    resume_command = shlex.join(again)

    # ---- train ----
    started, validation_s = time.perf_counter() - at.elapsed_s, 0.0
    with runs.StopRequest() as stop:
        while (at.elapsed_s < args.time_budget) if args.time_budget else (at.epoch < args.epochs):
            if args.early_stopping and len(at.history) - 1 - at.best_epoch >= args.early_stopping:
                log(f"no better validation Dice for {args.early_stopping} epochs")
                break
            epoch_started = waiting_since = time.perf_counter()
            wait_s, lr = 0.0, optimizer.param_groups[0]["lr"]
            drops = plateau_drops([row["val_dice"] for row in at.history], args.plateau_patience)
            sampler.start(at.epoch, at.batch)
            model.train()
            for image, target in tqdm(loader, f"epoch {at.epoch}", unit="batch", leave=False, disable=None):
                wait_s += time.perf_counter() - waiting_since
                image = image.to(device, memory_format=torch.channels_last, non_blocking=True)  # (N, 1, h, w)
                target = target.to(device, non_blocking=True)  # (N, h, w)
                group_start = at.batch - at.batch % plan.accumulate
                group_size = min(plan.accumulate, num_batches - group_start)  # the last group may be smaller
                is_update = at.batch + 1 == group_start + group_size
                with nullcontext() if is_update or model is network else model.no_sync():
                    with hardware.autocast(device, precision):
                        logits = model(image)
                    loss = loss_function(logits, target)
                    scaler.scale(loss / group_size).backward()
                at.loss_sum += loss.item()
                at.batch += 1
                if not math.isfinite(at.loss_sum):
                    raise ValueError(
                        f"the loss became {loss.item()} in epoch {at.epoch}, batch {at.batch}. Try --amp off "
                        f"or a lower --lr; the state after the epoch before is in {last}"
                    )
                if is_update:
                    at.elapsed_s = distributed.on_main(lambda: time.perf_counter() - started)
                    progress = (at.epoch + group_start / num_batches) / args.epochs
                    if args.time_budget:
                        progress = at.elapsed_s / args.time_budget
                    lr = learning_rate(args.schedule, progress, args.lr, args.min_lr, args.warmup, drops)
                    optimizer.param_groups[0]["lr"] = lr
                    scaler.unscale_(optimizer)
                    if args.grad_clip:
                        nn.utils.clip_grad_norm_(network.parameters(), args.grad_clip)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad(set_to_none=True)
                    if average:
                        average.update(network)
                    out_of_time = args.time_budget and at.elapsed_s + validation_s >= args.time_budget
                    if distributed.any_true(stop.requested, device) or out_of_time:
                        break
                waiting_since = time.perf_counter()
            if distributed.any_true(stop.requested, device):
                runs.save_checkpoint(last, runs.training_state(at, **parts) | kept)
                log(f"stopped in epoch {at.epoch}; go on with: python {resume_command}")
                raise SystemExit(130)

            # ---- validate, log, save ----
            validation_started = time.perf_counter()
            if average:
                judged.load_state_dict(average.average)
            row = dict(epoch=at.epoch, lr=lr, train_loss=at.loss_sum / at.batch)
            distributed.share_buffers(judged)  # else each process has its own BatchNorm statistics
            row |= validate(trained, val_set, loss_function)
            now = time.perf_counter()
            validation_s = distributed.from_main(now - validation_started)
            seconds = now - epoch_started
            row |= dict(seconds=seconds, data_wait=wait_s / seconds)
            row["peak_mib"] = hardware.peak_memory_mib(device)
            is_best = row["val_dice"] > at.best
            if is_best:
                at.best, at.best_epoch = row["val_dice"], at.epoch
            at.history.append(row)
            at.epoch, at.batch, at.loss_sum = at.epoch + 1, 0, 0.0
            at.elapsed_s = distributed.on_main(lambda: time.perf_counter() - started)
            if is_best:
                runs.save_checkpoint(best, kept | dict(model=judged.state_dict(), history=at.history))
            runs.save_checkpoint(last, runs.training_state(at, **parts) | kept)
            if distributed.is_main():
                runs.append_row(run_dir / "metrics.csv", row)
                save_curves(run_dir / "training_curves.png", at.history, CURVES)
                if is_best:
                    save_val_predictions(run_dir / "val_predictions.png", trained, val_set)
            log(
                f"epoch {row['epoch']:3d}  loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}  "
                f"tumour Dice {row['val_dice']:.4f}{' *' if is_best else '  '}  lr {lr:.1e}  {seconds:.1f} s "
                f"({100 * row['data_wait']:.0f} % waiting for data)  {row['peak_mib']:.0f} MiB peak"
            )
            if len(at.history) >= 5 and all(r["val_pred_to_true"] < 0.01 for r in at.history[-5:]):
                log("warning: next to no tumour predicted for 5 epochs; try --loss dice_bce or a lower --lr")
            if wandb_run:
                wandb_run.log(row)
            if distributed.any_true(stop.requested, device):
                log(f"stopped after epoch {at.epoch - 1}; go on with: python {resume_command}")
                raise SystemExit(130)

    # ---- evaluate ----
    distributed.barrier()
    part = "test" if split["test"] else "val"
    log(f"best validation Dice {at.best:.4f} in epoch {at.best_epoch}; now whole {part} volumes with {best}")
    rows, failed = evaluate_volumes(load_trained(best, device, precision), data_path, split[part])
    if distributed.is_main():
        title = f"{len(rows)} {part} volumes of {data_path}, threshold 0.5, {precision.name}"
        write_report(rows, run_dir / "evaluation", title, failed)
    log(f"written: {run_dir}/ with log.txt, metrics.csv, training_curves.png, val_predictions.png, weights/")
    weights = shlex.quote(str(best))
    log(f"next: python lung_tumor/predict.py --weights {weights} --source <image, scan or folder of them>")
    return rows


def resume_or_train(parser: ArgumentParser, args: Namespace, argv: list | None, fold: int | None) -> list:
    """Train one fold (or the only run); with --resume from where its checkpoint stands."""
    name = args.model_name if fold is None else f"{args.model_name}_fold{fold}"
    # A cross-validation may have been stopped before this fold began.
    found = runs.load_resumed(args.resume, args.out, name, may_be_missing=args.fold == "all")
    if found is None:
        return train(args, fold)
    checkpoint, run_dir = found
    args = parse_args(parser, argv, base=checkpoint["config"])
    runs.require_same(checkpoint["config"], args, [*ARCHITECTURE, "image_size"])
    fold = None if checkpoint["config"]["fold"] is None else int(checkpoint["config"]["fold"])
    return train(args, fold, checkpoint, run_dir)


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parse_args(parser, argv)
    distributed.init()
    try:
        if (args.folds is None) != (args.fold is None):
            raise ValueError("--folds N and --fold K (or --fold all) belong together")
        if args.fold not in (None, "all") and not args.fold.isdecimal():
            raise ValueError(f"--fold {args.fold}: a number from 0 on, or all")
        if args.fold == "all" and args.resume not in (None, "last"):
            raise ValueError("--fold all goes on with a bare --resume, which finds the last run of each fold")
        folds = range(args.folds) if args.fold == "all" else [None if args.fold is None else int(args.fold)]
        rows = [row for fold in folds for row in resume_or_train(parser, args, argv, fold)]
        if args.fold == "all" and distributed.is_main():
            out = Path(args.out) / f"{args.model_name}_all_folds"
            title = f"all {args.folds} folds, each volume scored by a model that never saw it"
            write_report(rows, out, title)
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"error: out of GPU memory; --vram fits the run to a card ({error})") from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    run_script(main)
