"""Train LHA-Net, or a network to compare it with, on abdominal organs in patches of preprocessed scans.

    python amos_lha/train.py --config amos_lha/demo.yaml                                 phantoms, no download
    python amos_lha/train.py --config amos_lha/lha_net.yaml --data_path data/amos
    torchrun --nproc_per_node 2 amos_lha/train.py ...                                    several GPUs

Reads what amos_lha/preprocess.py wrote. Writes runs/amos_lha/<model_name>/: config.yaml, log.txt,
metrics.csv, training_curves.png, weights/last.pt and weights/best.pt (best Dice on whole validation scans),
and after the last epoch the evaluation of best.pt on the test scans. Ctrl-C saves; --resume goes on.
"""

import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amos_lha import training
from amos_lha.dataset import Amos, PatchDataset
from amos_lha.evaluate import evaluate_cases, group_dice
from amos_lha.flags import add_training_flags
from amos_lha.losses import levels_and_router, segmentation_loss
from amos_lha.networks import ARCHITECTURE, get_model, load_trained
from amos_lha.sampling import SAMPLING
from common import batch, distributed, hardware, runs
from common.augment import augment_batch
from common.checkpoints import TrainedModel
from common.class_metrics import mean_dice
from common.config import make_parser, resolved_config, run_script
from common.cross_validation import run_folds, run_name
from common.ema import WeightAverage
from common.evaluation import validate_cases
from common.intensity import scale
from common.losses import class_weights, patch_errors
from common.memory import Plan, set_up_step
from common.optimizers import decay_groups, make_optimizer
from common.plots import save_curves
from common.report import write_report
from common.schedules import learning_rate
from common.training import Run, optimizer_step

WARMUP, LEAST_LR = 0.05, 1e-6
UNCHANGEABLE = [*ARCHITECTURE, "patch_size", "modality"]  # flags that a resumed run keeps


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    add_training_flags(parser)
    return parser


def train(
    args: Namespace, resumed: dict | None, folder: Path | None, resume_words: list[str] | None = None
) -> tuple[list[dict], dict[str, str], str]:
    """One run, new or `resumed` from a checkpoint; returns the rows of its evaluation, {case that failed:
    reason} and its precision."""
    device = hardware.start_device(args.device, distributed.local_rank())
    runs.seed_everything(args.seed, args.deterministic)

    # ---- data, network, precision ----
    data = distributed.main_first(lambda: training.open_data(args))
    split, notes = data.split, data.preprocessing
    runs.require_same_data(resumed, split, notes, ["spacing_mm", "scaling"], notes["data_path"])
    config = resolved_config(args)
    network = get_model(config, notes["spacing_mm"]).to(device)
    setup = set_up_step(
        network,
        lambda policy: get_model(config | {"checkpointing": policy}, notes["spacing_mm"]),
        segmentation_loss,
        Plan(tuple(args.patch_size), args.batch_size, args.accumulate, args.checkpointing),
        device,
        name=args.model,
        amp=args.amp,
        resumed=resumed,
        vram_gib=args.vram,
        patch_step=max(16, *getattr(network, "multiple", (16,))),  # --vram keeps what the strides divide
    )
    precision, plan = setup.precision, setup.plan
    config |= setup.config | {"patch_size": list(plan.patch_size)}
    num_patches = max(args.patches, len(split["train"]))
    train_set = PatchDataset(data, split["train"], plan.patch_size, SAMPLING[args.sampling], num_patches)
    difficulty = train_set.sampler.difficulty
    loader = distributed.make_loader(
        train_set, plan.batch_size, seed=args.seed, workers=args.workers, device=device
    )
    weights = class_weights(data.class_frequency()).to(device) if args.class_weights else None
    augmentation = training.get_augmentation(args)
    optimizer = make_optimizer(args.optimizer, decay_groups(network, args.weight_decay), args.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.scaler)
    average = WeightAverage(network, args.ema_decay) if args.ema else None
    validated = deepcopy(network) if average else network  # the network that best.pt keeps
    trained = TrainedModel(validated, config, device, precision, notes, split)
    parts = {"model": network, "optimizer": optimizer, "scaler": scaler, "ema": average}
    parts["difficulty"] = difficulty

    # ---- run ----
    name = run_name(args.model_name, args.fold)
    run = Run(
        folder or distributed.on_main(lambda: runs.new_run_dir(args.out, name)),
        config,
        flags=resolved_config(args),
        parts=parts,
        notes={"preprocessing": notes, "split": split, "stage": "amos_lha"},
        num_batches=len(loader),
        accumulate=plan.accumulate,
        device=device,
        epochs=args.epochs,
        time_budget_s=args.time_budget,
        patience=args.early_stopping,
        resumed=resumed,
        resume_words=resume_words,
        wandb_project="amos_lha" if args.use_wandb else None,
    )
    for line in [*setup.lines, *training.data_lines(data, num_patches, len(loader))]:
        run.log(line)
    model = distributed.wrap(network, device)

    # ---- train ----
    with run:  # Ctrl-C and SIGTERM: the update is finished, last.pt saved
        while run.next_epoch():
            batches = run.batches(loader)
            model.train()
            while size := run.next_update():  # of the weights, from the gradients of `size` batches
                lr = learning_rate(args.schedule, run.progress, args.lr, LEAST_LR, WARMUP)
                for k in range(size):
                    patch = next(batches)
                    run.counts = dict(Counter(run.counts) + Counter(patch["stratum"] + patch["organ"]))
                    label, labelled = patch["label"].to(device), patch["labelled"]
                    image = scale(patch["image"].to(device, non_blocking=True), patch["scaling"])
                    if args.augment:  # (N, 1, d, h, w) and (N, d, h, w)
                        seeds = patch["seed"].tolist()
                        image, label = augment_batch(image, label, augmentation, seeds, notes["spacing_mm"])
                    with distributed.no_sync(model, k + 1 < size):
                        with hardware.autocast(device, precision):
                            output = model(image)
                        loss = segmentation_loss(output, label.long(), labelled, weights)
                        scaler.scale(loss / size).backward()
                    finest = levels_and_router(output).levels[0]
                    difficulty.add(patch["case"], patch_errors(finest, label, labelled))
                    run.count(loss)
                optimizer_step(network, optimizer, scaler, lr, args.grad_clip, average)

            # ---- validate, save, log ----
            difficulty.end_epoch()
            if average:
                validated.load_state_dict(average.average)
            scores = validate(run, trained, data, args)
            drawn = training.shares(run.counts)
            score = scores["val_dice"] if split["val"] else run.epoch  # else the last weights are the best
            scores["lr"] = optimizer.param_groups[0]["lr"]
            run.end_epoch(scores | drawn, score, validated.state_dict())
            if distributed.is_main():
                picture = run.folder / "training_curves.png"
                save_curves(picture, run.history, training.CURVES, training.DRAWN, only_above_0=True)
            run.log_epoch(training.epoch_text(scores, drawn))
    return *score_best(run, trained, data, evaluate=args.evaluate), precision.amp


def validate(run: Run, trained: TrainedModel, data: Amos, args: Namespace) -> dict[str, float]:
    """Dice on whole validation scans: mean over organs, and of each size group; NaN where it is not due."""
    names, rows = data.split["val"], []
    if names and ((run.epoch + 1) % args.val_every == 0 or run.is_last_epoch):
        trained.network.eval()
        evaluate = partial(evaluate_cases, trained, data, surfaces=False)
        rows = validate_cases(evaluate, names, args.val_cases, run.log)
    return {"val_dice": mean_dice(rows)} | {f"dice_{group}": dice for group, dice in group_dice(rows).items()}


def score_best(
    run: Run, trained: TrainedModel, data: Amos, *, evaluate: bool
) -> tuple[list[dict], dict[str, str]]:
    """Score best.pt on whole test scans, or validation scans where there are none; name the next command."""
    part = "test" if data.split["test"] else "val"
    rows, failed = [], {}
    weights = run.best_or_last()
    if evaluate and data.split[part]:
        run.log(f"now the whole {part} scans with {weights}")
        best = load_trained(weights, trained.device, trained.precision)
        rows, failed = evaluate_cases(best, data, data.split[part])
        if distributed.is_main():
            title = f"{len(data.split[part])} {part} scans of {data.preprocessing['data_path']}"
            write_report(rows, run.folder / "evaluation", title, failed)
        run.log(f"Dice of the {part} scans: {mean_dice(rows):.4f}")
    run.log(f"written: {run.folder}/ with log.txt, metrics.csv, training_curves.png, weights/")
    predict = shlex.join(["python", "amos_lha/predict.py", "--weights", str(weights)])
    run.log(f"next: {predict} --source <scan or folder>")
    return rows, failed


def main(argv: list[str] | None = None) -> int:
    with distributed.session():
        failed = run_folds(train, write_report, build_parser(), argv, same=UNCHANGEABLE, stage="amos_lha")
        return batch.exit_code(failed)


if __name__ == "__main__":
    run_script(main)
