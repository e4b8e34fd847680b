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
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import distributed, hardware, runs
from common.augment import augment_batch
from common.config import Switch, make_parser, parse_args, positive_int, resolved_config, run_script
from common.losses import dice_ce_loss
from common.memory import fit_plan, limit_cuda_memory, plan_table
from common.patches import histogram
from common.plots import save_curves
from common.schedules import learning_rate
from verse_spine.dataset import STRATA, UNIFORM, PatchDataset
from verse_spine.evaluate import evaluate_cases, mean_dice, part_notes
from verse_spine.labels import MODES, num_outputs
from verse_spine.networks import (
    ARCHITECTURE,
    INTENSITIES,
    TrainedModel,
    get_model,
    load_trained,
    scale_patches,
)
from verse_spine.pictures import save_case_preview
from verse_spine.report import write_report
from verse_spine.training import (
    add_training_flags,
    check_same_data,
    get_augmentation,
    get_optimizer,
    load_resumed,
    no_validation_note,
    open_data,
    optimizer_notes,
    step_peak_mib,
    training_trial,
    usual_lr,
    validation_names,
    wanted_plan,
)

CURVES = {"loss": ["train_loss"], "validation, whole scans": ["val_dice"], "learning rate": ["lr"]}
SAMPLING = {"foreground": STRATA, "uniform": UNIFORM}


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    add_training_flags(parser, input_shape=(96, 96, 96), model="UNet", out="runs/verse_spine")
    task = parser.add_argument_group("this stage")
    task.add_argument(
        "--labels", choices=MODES, default="binary", help="one class, C/T/L, or every level by its name"
    )
    task.add_argument(
        "--sampling", choices=SAMPLING, default="foreground", help="where training patches come from"
    )
    task.add_argument(
        "--intensity", choices=INTENSITIES, default="hu", help="fixed HU scale, or each patch by its range"
    )
    task.add_argument("--patches", type=positive_int, default=250, help="an epoch, or a case each if more")
    task.add_argument("--val_every", type=positive_int, default=5, help="epochs between validations")
    task.add_argument("--val_cases", type=positive_int, default=20, help="whole scans a validation, at most")
    task.add_argument("--evaluate", action=Switch, default=True, help="score the test scans after training")
    return parser


def train(args: Namespace, resumed: dict | None = None, run_dir: Path | None = None) -> list[dict]:
    """One run, new or `resumed` from a checkpoint; returns the rows of its evaluation."""
    device = hardware.start_device(args.device, distributed.local_rank())
    runs.seed_everything(args.seed, args.deterministic)
    verse = distributed.main_first(lambda: open_data(args))
    outputs, loss_function = num_outputs(args.labels), dice_ce_loss
    config = resolved_config(args)

    # ---- memory and precision ----
    network = get_model(config, outputs).to(device)
    trial = training_trial(network, loss_function, (args.batch_size, *args.patch_size), device)
    # Timed once a run: its second half is computed like its first, and config.yaml repeats it.
    amp = resumed["config"]["amp"] if resumed and args.amp == "auto" else args.amp
    precision = distributed.on_main(lambda: hardware.choose_precision(amp, device, trial))
    config["amp"] = precision.amp
    plan = wanted_plan(config, precision.name)
    tried = [(plan, step_peak_mib(config, outputs, loss_function, plan))]
    if args.vram:
        plan, tried = fit_plan(plan, lambda p: step_peak_mib(config, outputs, loss_function, p), args.vram)
        limit_cuda_memory(args.vram, device)
        network.checkpointing = plan.checkpointing
    config |= dict(
        patch_size=list(plan.patch_size),
        batch_size=plan.batch_size,
        accumulate=plan.accumulate,
        checkpointing=plan.checkpointing,
    )

    # ---- data ----
    train_set = PatchDataset(
        verse,
        verse.split["train"],
        plan.patch_size,
        args.labels,
        strata=SAMPLING[args.sampling],
        length=max(args.patches, len(verse.split["train"])),
    )
    val_names = validation_names(verse)
    val_names = val_names[:: max(1, -(-len(val_names) // args.val_cases))]
    loader, sampler = distributed.make_loader(
        train_set, plan.batch_size, seed=args.seed, workers=args.workers, device=device
    )
    num_batches = sampler.num_batches
    augmentation = get_augmentation(args)

    # ---- optimiser, resuming ----
    optimizer = get_optimizer(args.optimizer, network.parameters(), args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.scaler)
    parts = dict(model=network, optimizer=optimizer, scaler=scaler)
    # Where the run stands; all of it goes into every checkpoint.
    at = Namespace(epoch=0, batch=0, loss_sum=0.0, best=-1.0, best_epoch=-1, elapsed_s=0.0, history=[])
    at.num_batches, at.drawn = num_batches, {}
    if resumed:
        check_same_data(resumed, verse)
        at = runs.restore_training_state(resumed, **parts)
        if at.batch and at.num_batches != num_batches:
            raise ValueError(
                f"--resume: it was stopped in an epoch of {at.num_batches} batches, now there are "
                f"{num_batches}; give --batch_size and the number of processes that it had"
            )
        at.num_batches = num_batches
    model = distributed.wrap(network, device)
    trained = TrainedModel(network, config, device, precision, verse.preprocessing, verse.split)

    # ---- run folder and log ----
    if run_dir is None:
        run_dir = distributed.on_main(lambda: runs.new_run_dir(args.out, args.model_name))
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
    for note in optimizer_notes(args, num_parameters):
        log(note)
    log(
        f"cases: {len(verse.split['train'])} training, {len(val_names)} of {len(verse.split['val'])} "
        f"validation, {len(verse.split['test'])} test; {len(train_set)} patches and {num_batches} steps an "
        f"epoch, effective batch {plan.batch_size * plan.accumulate * distributed.world_size()}"
    )
    if note := no_validation_note(verse):
        log(note)
    if resumed:
        log(f"resumed at epoch {at.epoch}, batch {at.batch}")
    wandb_run = runs.open_wandb("verse_spine", run_dir.name, config) if args.use_wandb else None
    kept = dict(
        config=config,
        preprocessing=verse.preprocessing,
        split=verse.split,
        stage="segmentation",
        num_outputs=outputs,
    )
    resume_command = shlex.join([sys.argv[0], *_required(args), "--resume", str(last)])

    # ---- train ----
    lr_start = usual_lr(args.optimizer, args.lr)
    started, validation_s = time.perf_counter() - at.elapsed_s, 0.0
    out_of_time = False  # a run that was stopped after the last batch of an epoch goes on with none
    with runs.StopRequest() as stop:
        while (at.elapsed_s < args.time_budget) if args.time_budget else (at.epoch < args.epochs):
            if (
                args.early_stopping
                and at.best_epoch >= 0
                and at.epoch - 1 - at.best_epoch >= args.early_stopping
            ):
                log(f"no better validation Dice for {args.early_stopping} epochs")
                break
            epoch_started = waiting_since = time.perf_counter()
            wait_s, lr = 0.0, optimizer.param_groups[0]["lr"]
            sampler.start(at.epoch, at.batch)
            model.train()
            for image, label, seeds, strata in tqdm(
                loader, f"epoch {at.epoch}", unit="batch", leave=False, disable=None
            ):
                wait_s += time.perf_counter() - waiting_since
                at.drawn = dict(Counter(at.drawn) + Counter(strata))
                # (N, 1, d, h, w) HU -> about [-1, 1]; (N, d, h, w)
                image = scale_patches(image.to(device, non_blocking=True), args.intensity)
                label = label.to(device, non_blocking=True)
                if args.augment:
                    spacing_mm = verse.preprocessing["spacing_mm"]
                    image, label = augment_batch(image, label, augmentation, seeds.tolist(), spacing_mm)
                group_start = at.batch - at.batch % plan.accumulate
                group_size = min(plan.accumulate, num_batches - group_start)  # the last group may be smaller
                is_update = at.batch + 1 == group_start + group_size
                with nullcontext() if is_update or model is network else model.no_sync():
                    with hardware.autocast(device, precision):
                        logits = model(image)
                    loss = loss_function(logits, label.long())
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
                    lr = learning_rate("cosine_annealing", progress, lr_start)
                    optimizer.param_groups[0]["lr"] = lr
                    scaler.unscale_(optimizer)
                    if args.grad_clip:
                        nn.utils.clip_grad_norm_(network.parameters(), args.grad_clip)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad(set_to_none=True)
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
            is_last = at.epoch + 1 == args.epochs or bool(args.time_budget and out_of_time)
            row = dict(epoch=at.epoch, lr=lr, train_loss=at.loss_sum / at.batch, val_dice=float("nan"))
            distributed.share_buffers(network)
            network.eval()
            if (at.epoch + 1) % args.val_every == 0 or is_last:
                rows, failed = evaluate_cases(trained, verse, val_names, surfaces=False)
                row["val_dice"] = mean_dice(rows)
                for name, reason in failed.items():
                    log(f"warning: {name} could not be validated: {reason}")
            now = time.perf_counter()
            validation_s = distributed.from_main(now - validation_started)
            seconds = now - epoch_started
            row |= dict(
                seconds=seconds, data_wait=wait_s / seconds, peak_mib=hardware.peak_memory_mib(device)
            )
            is_best = row["val_dice"] > at.best or not (verse.split["val"] or math.isnan(row["val_dice"]))
            if is_best:
                at.best, at.best_epoch = row["val_dice"], at.epoch
            drawn = ", ".join(
                f"{k} {100 * v:.0f} %" for k, v in histogram(Counter(at.drawn).elements()).items()
            )
            at.history.append(row)
            at.epoch, at.batch, at.loss_sum, at.drawn = at.epoch + 1, 0, 0.0, {}
            at.elapsed_s = distributed.on_main(lambda: time.perf_counter() - started)
            if is_best:
                runs.save_checkpoint(best, kept | dict(model=network.state_dict(), history=at.history))
            runs.save_checkpoint(last, runs.training_state(at, **parts) | kept)
            if distributed.is_main():
                runs.append_row(run_dir / "metrics.csv", row)
                save_curves(run_dir / "training_curves.png", at.history, CURVES)
                save_case_preview(run_dir / "previews", row["epoch"], trained, verse.cases[val_names[0]])
            score = (
                ""
                if math.isnan(row["val_dice"])
                else f"Dice {row['val_dice']:.4f}{' *' if is_best else ''}  "
            )
            log(
                f"epoch {row['epoch']:3d}  loss {row['train_loss']:.4f}  {score}lr {lr:.1e}  {seconds:.1f} s "
                f"({100 * row['data_wait']:.0f} % waiting for data)  {row['peak_mib']:.0f} MiB peak; {drawn}"
            )
            if wandb_run:
                wandb_run.log(row)
            if distributed.any_true(stop.requested, device):
                log(f"stopped after epoch {at.epoch - 1}; go on with: python {resume_command}")
                raise SystemExit(130)

    # ---- evaluate ----
    distributed.barrier()
    part = "test" if verse.split["test"] else "val"
    if at.best_epoch >= 0:
        log(f"best.pt: validation Dice {at.best:.4f} in epoch {at.best_epoch}")
    if not best.is_file():
        best = last
        log(f"warning: no validation gave a Dice, so there is no best.pt: going on with {last}")
    rows: list[dict] = []
    if args.evaluate and verse.split[part]:
        log(f"now the whole {part} scans with {best}")
        rows, failed = evaluate_cases(
            load_trained(best, device, precision, "segmentation"), verse, verse.split[part]
        )
        if distributed.is_main():
            title = f"{len(verse.split[part])} {part} scans of {verse.path}, no region, {precision.name}"
            notes = part_notes(part, set(), trained, verse)
            write_report(rows, run_dir / "evaluation", title, failed, notes)
    log(f"written: {run_dir}/ with log.txt, metrics.csv, training_curves.png, previews/, weights/")
    log(f"next: python verse_spine/predict.py --weights {shlex.quote(str(best))} --source <scan or folder>")
    log("      and --heatmap_weights <best.pt of train_heatmap.py>, to search around the spine only")
    return rows


def _required(args: Namespace) -> list[str]:
    return ["--data_path", args.data_path, "--model_name", args.model_name]


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parse_args(parser, argv)
    distributed.init()
    try:
        found = load_resumed(args, "segmentation")
        if found is None:
            train(args)
        else:
            checkpoint, run_dir = found
            args = parse_args(parser, argv, base=checkpoint["config"])
            runs.require_same(checkpoint["config"], args, [*ARCHITECTURE, "patch_size", "labels"])
            train(args, checkpoint, run_dir)
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"error: out of GPU memory; --vram fits the run to a card ({error})") from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    run_script(main)
