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
import time
from argparse import ArgumentParser, Namespace
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import distributed, hardware, runs
from common.augment import augment_batch
from common.config import Switch, fraction, make_parser, parse_args, resolved_config, run_script
from common.memory import fit_plan, limit_cuda_memory, plan_table
from common.metrics import summary, write_table
from common.plots import save_curves
from common.schedules import learning_rate
from verse_spine.boxes import evaluate_boxes, save_preview, validate_heatmaps
from verse_spine.dataset import HeatmapDataset
from verse_spine.heatmap import AIR_HU, LOSSES, TARGETS, heatmap_loss
from verse_spine.networks import ARCHITECTURE, TrainedModel, get_model, load_trained, scale_hu
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

CURVES = {
    "loss": ["train_loss", "val_loss"],
    "box on validation scans": ["box_recall", "box_iou"],
    "learning rate": ["lr"],
}


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    add_training_flags(parser, input_shape=(128, 64, 64), model="UNet", out="runs/verse_spine")
    task = parser.add_argument_group("this stage")
    task.add_argument("--target", choices=TARGETS, default="distance", help="form of the heat map")
    task.add_argument("--loss", choices=LOSSES, default="weighted_mse", help="see heatmap.py")
    task.add_argument(
        "--truncate", type=fraction, default=0.3, help="probability that a training scan is cut short in z"
    )
    task.add_argument("--evaluate", action=Switch, default=True, help="score the test scans after training")
    return parser


def truncate(image: Tensor, target: Tensor, seeds: list[int], probability: float) -> None:
    """Replace up to half of some scans (N, 1, d, h, w) at the top or bottom by air, in place: fields of view
    end anywhere."""
    for item, seed in enumerate(seeds):
        rng = np.random.default_rng([seed, 1])
        if rng.random() < probability:
            depth = image.shape[2]
            rows = int(rng.uniform(0.1, 0.5) * depth)
            cut = slice(0, rows) if rng.random() < 0.5 else slice(depth - rows, depth)
            image[item, :, cut], target[item, :, cut] = AIR_HU, 0


def train(args: Namespace, resumed: dict | None = None, run_dir: Path | None = None) -> list[dict]:
    """One run, new or `resumed` from a checkpoint; returns the rows of its evaluation."""
    device = hardware.start_device(args.device, distributed.local_rank())
    runs.seed_everything(args.seed, args.deterministic)
    verse = distributed.main_first(lambda: open_data(args))
    config = resolved_config(args)

    def loss_function(logits: Tensor, target: Tensor) -> Tensor:
        return heatmap_loss(args.loss, logits, target if target.ndim == 5 else target[:, None])

    # ---- memory and precision ----
    network = get_model(config, 1).to(device)
    trial = training_trial(network, loss_function, (args.batch_size, *args.patch_size), device)
    # Timed once a run: its second half is computed like its first, and config.yaml repeats it.
    amp = resumed["config"]["amp"] if resumed and args.amp == "auto" else args.amp
    precision = distributed.on_main(lambda: hardware.choose_precision(amp, device, trial))
    config["amp"] = precision.amp
    plan = wanted_plan(config, precision.name)
    tried = [(plan, step_peak_mib(config, 1, loss_function, plan))]
    if args.vram:
        plan, tried = fit_plan(plan, lambda p: step_peak_mib(config, 1, loss_function, p), args.vram)
        limit_cuda_memory(args.vram, device)
        network.checkpointing = plan.checkpointing
    config |= dict(
        patch_size=list(plan.patch_size),
        batch_size=plan.batch_size,
        accumulate=plan.accumulate,
        checkpointing=plan.checkpointing,
    )

    # ---- data ----
    shape = plan.patch_size
    names = [verse.split["train"], validation_names(verse)]
    train_set, val_set = distributed.main_first(
        lambda: [HeatmapDataset(verse, of_part, shape, args.target) for of_part in names]
    )
    loader, sampler = distributed.make_loader(
        train_set, plan.batch_size, seed=args.seed, workers=args.workers, device=device
    )
    num_batches = sampler.num_batches
    # Rotations need proportions only, and voxels of the small grid are nearly cubes.
    grid_mm = (4.0, 4.0, 4.0)
    augmentation = get_augmentation(args)

    # ---- optimiser, resuming ----
    optimizer = get_optimizer(args.optimizer, network.parameters(), args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.scaler)
    parts = dict(model=network, optimizer=optimizer, scaler=scaler)
    # Where the run stands; all of it goes into every checkpoint.
    at = Namespace(epoch=0, batch=0, loss_sum=0.0, best=math.inf, best_epoch=-1, elapsed_s=0.0, history=[])
    at.num_batches = num_batches
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
        f"cases: {len(train_set)} training, {len(val_set)} validation, {len(verse.split['test'])} test; "
        f"{num_batches} steps an epoch, effective batch "
        f"{plan.batch_size * plan.accumulate * distributed.world_size()}"
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
        stage="heatmap",
        num_outputs=1,
    )
    resume_command = shlex.join([sys.argv[0], *_required(args), "--resume", str(last)])

    # ---- train ----
    lr_start = usual_lr(args.optimizer, args.lr)
    started, validation_s = time.perf_counter() - at.elapsed_s, 0.0
    with runs.StopRequest() as stop:
        while (at.elapsed_s < args.time_budget) if args.time_budget else (at.epoch < args.epochs):
            if (
                args.early_stopping
                and at.best_epoch >= 0
                and at.epoch - 1 - at.best_epoch >= args.early_stopping
            ):
                log(f"no lower validation loss for {args.early_stopping} epochs")
                break
            epoch_started = waiting_since = time.perf_counter()
            wait_s, lr = 0.0, optimizer.param_groups[0]["lr"]
            sampler.start(at.epoch, at.batch)
            model.train()
            for image, target, seeds in tqdm(
                loader, f"epoch {at.epoch}", unit="batch", leave=False, disable=None
            ):
                wait_s += time.perf_counter() - waiting_since
                # (N, 1, d, h, w) HU and heat map in [0, 1]
                image, target = image.to(device, non_blocking=True), target.to(device, non_blocking=True)
                if args.augment:
                    truncate(image, target, seeds.tolist(), args.truncate)
                image = scale_hu(image)
                if args.augment:
                    image, target = augment_batch(image, target, augmentation, seeds.tolist(), grid_mm)
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
            row = dict(epoch=at.epoch, lr=lr, train_loss=at.loss_sum / at.batch)
            distributed.share_buffers(network)
            network.eval()
            row |= validate_heatmaps(trained, val_set.scans, val_set.targets, args.loss)
            now = time.perf_counter()
            validation_s = distributed.from_main(now - validation_started)
            seconds = now - epoch_started
            row |= dict(
                seconds=seconds, data_wait=wait_s / seconds, peak_mib=hardware.peak_memory_mib(device)
            )
            is_best = row["val_loss"] < at.best or not verse.split["val"]
            if is_best:
                at.best, at.best_epoch = row["val_loss"], at.epoch
            at.history.append(row)
            at.epoch, at.batch, at.loss_sum = at.epoch + 1, 0, 0.0
            at.elapsed_s = distributed.on_main(lambda: time.perf_counter() - started)
            if is_best:
                runs.save_checkpoint(best, kept | dict(model=network.state_dict(), history=at.history))
            runs.save_checkpoint(last, runs.training_state(at, **parts) | kept)
            if distributed.is_main():
                runs.append_row(run_dir / "metrics.csv", row)
                save_curves(run_dir / "training_curves.png", at.history, CURVES)
                save_preview(run_dir / "previews" / f"epoch_{row['epoch']:03d}.png", trained, val_set)
            log(
                f"epoch {row['epoch']:3d}  loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}"
                f"{' *' if is_best else '  '}  box recall {row['box_recall']:.3f} (lowest "
                f"{row['lowest_recall']:.3f})  lr {lr:.1e}  {seconds:.1f} s ({100 * row['data_wait']:.0f} % "
                f"waiting for data)  {row['peak_mib']:.0f} MiB peak"
            )
            if wandb_run:
                wandb_run.log(row)
            if distributed.any_true(stop.requested, device):
                log(f"stopped after epoch {at.epoch - 1}; go on with: python {resume_command}")
                raise SystemExit(130)

    # ---- evaluate ----
    distributed.barrier()
    part = "test" if verse.split["test"] else "val"
    log(f"best.pt: validation loss {at.best:.4f} in epoch {at.best_epoch}")
    rows: list[dict] = []
    if args.evaluate and verse.split[part]:
        rows = evaluate_boxes(load_trained(best, device, precision, "heatmap"), verse, verse.split[part])
        recalls = summary([row["box_recall"] for row in rows])
        lowest = min((row["box_recall"] for row in rows), default=math.nan)
        log(
            f"{len(rows)} {part} scans: share of vertebra voxels in the box: mean {recalls['mean']:.4f}, "
            f"lowest {lowest:.4f}"
        )
        if distributed.is_main() and rows:
            (run_dir / "evaluation").mkdir(exist_ok=True)
            write_table(run_dir / "evaluation" / "boxes.csv", rows)
    log(f"written: {run_dir}/ with log.txt, metrics.csv, training_curves.png, previews/, weights/")
    data = shlex.quote(args.data_path)
    log(f"next: python verse_spine/train_segmentation.py --data_path {data} --model_name spine")
    return rows


def _required(args: Namespace) -> list[str]:
    return ["--data_path", args.data_path, "--model_name", args.model_name]


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parse_args(parser, argv)
    distributed.init()
    try:
        found = load_resumed(args, "heatmap")
        if found is None:
            train(args)
        else:
            checkpoint, run_dir = found
            args = parse_args(parser, argv, base=checkpoint["config"])
            runs.require_same(checkpoint["config"], args, [*ARCHITECTURE, "patch_size", "target"])
            train(args, checkpoint, run_dir)
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"error: out of GPU memory; --vram fits the run to a card ({error})") from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    run_script(main)
