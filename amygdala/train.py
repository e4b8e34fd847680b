"""Train a network on T1 MRI by cross-validation: five folds, each tested by a model that never saw it.

    python amygdala/train.py --model medformer --dimension 3d --dataset Amygdala --batch_size 3 --gpu 0
    python amygdala/train.py --config amygdala/demo.yaml                                 phantoms, no download
    torchrun --nproc_per_node 4 amygdala/train.py --batch_size 16 --amp bf16             several GPUs

Reads what amygdala/preprocess.py wrote. Writes exp/<dataset>/<unique_name>/: config.yaml, of each fold a
folder with log.txt, metrics.csv and training_curves.png, fold_<i>_best.pt and fold_<i>_latest.pt, and
cross_validation.txt and .csv once all folds are done; curves for TensorBoard in log/. Whole heads need a
localiser, which is trained first and kept with the weights. Ctrl-C saves; the same command with --resume
goes on.
"""

import math
import shlex
import sys
from argparse import ArgumentParser, Namespace
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amygdala import training
from amygdala.dataset import Cohort
from amygdala.evaluate import evaluate_cases
from amygdala.flags import add_training_flags, choose
from amygdala.losses import segmentation_loss
from amygdala.model import architecture, get_model, load_trained
from amygdala.structures import DATASETS
from common import batch, distributed, hardware, runs
from common.augment import augment_batch
from common.checkpoints import TrainedModel
from common.class_metrics import mean_dice
from common.config import make_parser, parse_args, resolved_config, run_script
from common.ema import WeightAverage
from common.evaluation import validate_cases
from common.intensity import scale_by_own_values
from common.memory import Plan, set_up_step
from common.optimizers import decay_groups
from common.plots import save_curves
from common.report import write_report
from common.schedules import learning_rate
from common.training import Run, optimizer_step

WARMUP, LEAST_LR = 0.05, 1e-6
EPS = 1e-5  # of AdamW, for steps in half precision
CURVES = {"loss": ["train_loss"], "Dice of whole scans": ["val_dice"], "learning rate": ["lr"]}


def build_parser(chosen: Namespace | None = None) -> ArgumentParser:
    """The flags of a network; without `chosen` of the default one."""
    parser = make_parser(__doc__)
    add_training_flags(parser, chosen or choose([])[0])
    return parser


def train(
    args: Namespace, resumed: dict | None, folder: Path, resume_words: list[str] | None = None
) -> tuple[dict[str, str], str]:
    """One fold, new or `resumed` from a checkpoint; returns {case that failed: reason} and its precision."""
    device = hardware.start_device(args.device, distributed.local_rank())
    runs.seed_everything(args.seed, args.deterministic)

    # ---- data, network, precision ----
    data = training.open_data(args)
    split, notes = data.split, data.preprocessing
    runs.require_same_data(resumed, split, notes, ["spacing_mm"], notes["data_path"])
    config = resolved_config(args)
    network = get_model(config).to(device)
    loss_function = partial(segmentation_loss, loss=args.loss, boundary=args.boundary_weight)
    share = args.batch_size // distributed.world_size()  # --batch_size is that of all processes
    setup = set_up_step(
        network,
        lambda checkpointing: get_model(config | {"checkpointing": checkpointing}),
        loss_function,
        Plan(tuple(args.patch_size), share, args.accumulate, args.checkpointing),
        device,
        name=args.model,
        amp=args.amp,
        resumed=resumed,
        vram_gib=args.vram,
        patch_step=0 if DATASETS[args.dataset].localised else 16,  # it has to hold both amygdalae
    )
    precision, plan = setup.precision, setup.plan
    batch_size = plan.batch_size * distributed.world_size()
    config |= setup.config | {"patch_size": list(plan.patch_size), "batch_size": batch_size}
    train_set = training.get_patches(args, data, plan.patch_size)
    loader = distributed.make_loader(
        train_set, plan.batch_size, seed=args.seed, workers=args.workers, device=device
    )
    augmentation = training.get_augmentation(args)
    groups = decay_groups(network, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, eps=EPS)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.scaler)
    average = WeightAverage(network, args.ema_decay) if args.ema else None
    validated = deepcopy(network) if average else network  # the network that best.pt keeps
    notes["localiser"], time_budget_s = training.get_localiser(args, data, device, precision, resumed)
    trained = TrainedModel(validated, config, device, precision, notes, split)

    # ---- run ----
    run = Run(
        folder,
        config,
        flags=resolved_config(args),
        parts={"model": network, "optimizer": optimizer, "scaler": scaler, "ema": average},
        notes={"preprocessing": notes, "split": split, "stage": "amygdala"},
        num_batches=len(loader),
        accumulate=plan.accumulate,
        device=device,
        epochs=args.epochs,
        time_budget_s=time_budget_s,
        patience=args.early_stopping,
        resumed=resumed,
        resume_words=resume_words,
        wandb_project="amygdala" if args.use_wandb else None,
        tensorboard=Path(args.log_path) / args.dataset / folder.parent.name / folder.name,
    )
    for line in [*setup.lines, *training.data_lines(data, len(train_set), len(loader), notes["localiser"])]:
        run.log(line)
    if distributed.is_main():
        fold = "all" if resume_words else args.fold
        runs.save_config(folder.with_name("config.yaml"), resolved_config(args) | {"fold": fold})
        training.link_weights(folder, args.fold)
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
                    label = patch["label"].to(device, non_blocking=True)
                    image = scale_by_own_values(patch["image"].to(device, non_blocking=True))
                    if args.augment:  # (N, 1, d, h, w) and (N, d, h, w)
                        seeds = patch["seed"].tolist()
                        image, label = augment_batch(image, label, augmentation, seeds, notes["spacing_mm"])
                    with distributed.no_sync(model, k + 1 < size):
                        with hardware.autocast(device, precision):
                            output = model(image)
                        loss = loss_function(output, label.long())
                        scaler.scale(loss / size).backward()
                    run.count(loss)
                optimizer_step(network, optimizer, scaler, lr, args.grad_clip, average)

            # ---- validate, save, log ----
            if average:
                validated.load_state_dict(average.average)
            distributed.share_buffers(validated)  # else each process has its own BatchNorm statistics
            scores = validate(run, trained, data, args)
            score = scores["val_dice"] if split["val"] else run.epoch  # else the last weights are the best
            scores |= {"lr": optimizer.param_groups[0]["lr"]}
            run.end_epoch(scores, score, validated.state_dict())
            if distributed.is_main():
                save_curves(run.folder / "training_curves.png", run.history, CURVES, only_above_0=True)
            run.log_epoch("" if math.isnan(scores["val_dice"]) else f"Dice {scores['val_dice']:.4f}")
    return score_best(run, trained, data, args)[1], precision.amp


def validate(run: Run, trained: TrainedModel, data: Cohort, args: Namespace) -> dict[str, float]:
    """Mean Dice of whole validation scans; NaN where it is not due."""
    names, rows = data.split["val"], []
    if names and ((run.epoch + 1) % args.val_every == 0 or run.is_last_epoch):
        trained.network.eval()
        evaluate = partial(evaluate_cases, [trained], data, surfaces=False)
        rows = validate_cases(evaluate, names, args.val_cases, run.log)
    return {"val_dice": mean_dice(rows)}


def score_best(
    run: Run, trained: TrainedModel, data: Cohort, args: Namespace
) -> tuple[list[dict], dict[str, str]]:
    """Score best.pt on the scans that were held out, once; name the next command."""
    rows, failed = [], {}
    weights, experiment = run.best_or_last(), run.folder.parent
    test, folds = data.split["test"], training.fold_names(args)
    if args.evaluate and test and not training.is_scored(experiment, args.fold, weights):
        best = load_trained(weights, trained.device, trained.precision)
        rows, failed = evaluate_cases([best], data, test, table=run.folder / "test_cases.csv")
        notes = [training.BIASED] if args.select_on_test else []
        run.log("; ".join([f"Dice of the {len(test)} held-out scans: {mean_dice(rows):.4f}", *notes]))
        if distributed.is_main():
            title = f"fold {args.fold}: {len(test)} held-out scans"
            write_report(rows, run.folder / "evaluation", title, failed, notes=notes)
            used = Namespace(**trained.config)  # the flags, with what --vram has made of them
            if not failed and (done := training.note_results(experiment, used, data, rows, folds)):
                run.log(f"all folds are done: {done}")
    if distributed.is_main():
        training.link_weights(run.folder, args.fold)  # again, for where links are copies
    run.log(f"written: {experiment}/ with fold_{args.fold}_best.pt and {run.folder.name}/")
    best = shlex.quote(str(experiment / f"fold_{args.fold}_best.pt"))
    run.log(f"next: python amygdala/predict.py --weights {best} --source <scan or folder>")
    return rows, failed


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    with distributed.session():
        chosen, words = choose(argv)
        parser = build_parser(chosen)
        same = [*architecture(chosen.model, chosen.dimension), "patch_size", "dataset"]
        if chosen.resume not in (None, "last"):  # one fold
            args, found, folder = runs.resume(parser, argv, same=same, stage="amygdala")
            training.resolve_flags(args)
            return batch.exit_code(train(args, found, folder)[0])
        args = parse_args(parser, words)
        training.resolve_flags(args)
        folds = training.fold_names(args) if args.fold == "all" else [args.fold]
        experiment = distributed.on_main(lambda: training.experiment_folder(args, folds))
        resume_words = runs.with_resume(sys.argv) if args.fold == "all" else None
        failed, amp = {}, args.amp
        for fold in folds:
            of_fold = ["--fold", fold, "--amp", amp]  # the first decides the precision of all
            folder, found = experiment / f"fold_{fold}", None
            last = folder / "weights" / "last.pt"
            if args.resume and last.is_file():
                of_run = [*argv, *of_fold, "--resume", str(last)]
                args, found, folder = runs.resume(parser, of_run, same=same, stage="amygdala")
            else:
                args = parse_args(parser, [*words, *of_fold])
            training.resolve_flags(args)
            failed_in_fold, amp = train(args, found, folder, resume_words)
            failed |= failed_in_fold
        return batch.exit_code(failed)


if __name__ == "__main__":
    run_script(main)
