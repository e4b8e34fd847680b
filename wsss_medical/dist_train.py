"""Train a segmentation from labels of slices: classify slices, and learn pixels from the classifier's maps.

    python wsss_medical/dist_train.py --config wsss_medical/demo.yaml                   phantoms, no download
    python wsss_medical/dist_train.py --config wsss_medical/lasc.yaml --data_path data/LASC
    torchrun --nproc_per_node 2 wsss_medical/dist_train.py --config wsss_medical/brats.yaml

Reads what wsss_medical/preprocess.py wrote. Writes work_dir_<dataset>/: config.yaml, log.txt, metrics.csv,
training_curves.png, checkpoints/best.pth, last.pth and wetr_iter_<n>.pth, tb_logger/ for TensorBoard, and at
the end attention_maps/, cam_npy/ and evaluation_<part>/. Ctrl-C saves; --resume goes on.
"""

import math
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from copy import deepcopy
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import distributed, hardware, runs
from common.checkpoints import TrainedModel
from common.config import make_parser, parse_args, resolved_config, run_script
from common.ema import WeightAverage
from common.memory import Plan, set_up_step
from common.mit import to_network_input
from common.mit_weights import load_encoder
from common.optimizers import encoder_and_head_groups
from common.par import PAR
from common.schedules import learning_rate
from common.training import Run, optimizer_step
from wsss_medical import training
from wsss_medical.dataset import MedicalSliceDataset
from wsss_medical.evaluate import BY_SCORE, evaluate_split, write_evaluation
from wsss_medical.flags import add_training_flags, resolve_flags
from wsss_medical.maps import generate_maps
from wsss_medical.medical_utils import cal_eta
from wsss_medical.model import ARCHITECTURE, get_model, load_trained
from wsss_medical.segment import part_of
from wsss_medical.volume import by_patient

UNCHANGEABLE = [*ARCHITECTURE, "crop_size", "recipe", "pixel_labels", "eval_iters"]  # by a resumed run


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    add_training_flags(parser)
    return parser


def train(args: Namespace, resumed: dict | None, folder: Path | None) -> None:
    """A run, new or `resumed` from a checkpoint."""
    device = hardware.start_device(args.device, distributed.local_rank())
    runs.seed_everything(args.seed, args.deterministic)

    # ---- data, network, precision ----
    root, notes, split = distributed.main_first(lambda: training.open_data(args))
    runs.require_same_data(resumed, split, notes, ["pixel_mm", "channels"], root)
    config = resolved_config(args)
    network = get_model(config).to(device)
    encoder_lines = load_encoder(network, args.pretrained) if args.pretrained and not resumed else []
    setup = set_up_step(
        network,
        lambda checkpointing: get_model(config | {"checkpointing": checkpointing}),
        training.step_loss,
        Plan((args.crop_size,) * 2, args.batch_size, args.accumulate, args.checkpointing),
        device,
        name=f"WeTr {args.backbone}",
        amp=args.amp,
        resumed=resumed,
        vram_gib=args.vram,
        patch_step=0,
        channels=3,
    )
    config |= setup.config
    precision, plan = setup.precision, setup.plan
    groups = encoder_and_head_groups(network, args.weight_decay, pretrained=bool(args.pretrained))
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.scaler)
    teacher, average = network, None  # what makes the labels, and what best.pth keeps
    if args.ema:
        teacher, average = deepcopy(network), WeightAverage(network, args.ema_decay)
        teacher.load_state_dict(average.average, assign=True)  # the same tensors: it follows by itself
    par = PAR().to(device)
    trained = TrainedModel(teacher, config, device, precision, notes, split)
    per_update = plan.batch_size * distributed.world_size() * plan.accumulate
    folder = folder or distributed.on_main(lambda: runs.new_run_dir(*training.work_dir(args)))
    slices = training.training_slices(args, root, split["train"], folder, per_update * args.eval_iters)
    loader = distributed.make_loader(
        slices, plan.batch_size, seed=args.seed, workers=args.workers, device=device
    )

    # ---- run: its "epochs" are what lies between two validations ----
    run = Run(
        folder,
        config,
        flags=resolved_config(args),
        parts={"model": network, "optimizer": optimizer, "scaler": scaler, "ema": average},
        notes={"preprocessing": notes, "split": split, "stage": "wsss_medical"},
        num_batches=len(loader),
        accumulate=plan.accumulate,
        device=device,
        epochs=-(-args.max_iters // args.eval_iters),
        time_budget_s=args.time_budget,
        resumed=resumed,
        wandb_project="wsss_medical" if args.use_wandb else None,
        tensorboard=folder / "tb_logger",
    )
    for line in [*setup.lines, *encoder_lines, *training.data_lines(root, split, len(loader), per_update)]:
        run.log(line)
    model = distributed.wrap(network, device)
    began, first = time.time(), round(run.progress * args.max_iters)

    # ---- train ----
    with run:  # Ctrl-C and SIGTERM: the update is finished, last.pt saved
        while run.next_epoch():
            training.renew_labels(run, trained, root)
            batches = run.batches(loader)
            model.train()
            pixels = labels = None  # of the last batch, for the pictures
            while size := run.next_update():  # of the weights, from the gradients of `size` batches
                lr = learning_rate("warmup_poly", run.progress, args.lr, 1e-6 * args.lr, args.warmup)
                iteration = round(run.progress * args.max_iters)
                for k in range(size):
                    batch = next(batches)
                    pixels, classes, boxes = (
                        batch[key].to(device, non_blocking=True) for key in ("image", "label", "box")
                    )
                    labels = None
                    if "target" in batch:
                        target = batch["target"].to(device, non_blocking=True)
                        labels = training.known_labels(target, args.radius)
                    elif iteration >= args.cam_iters and (args.seg_weight or args.affinity_weight):
                        labels = training.make_labels(
                            teacher, par, pixels, classes, boxes, args, precision, iteration
                        )
                    with distributed.no_sync(model, k + 1 < size):
                        with hardware.autocast(device, precision):
                            output = model(to_network_input(pixels))
                        losses = training.all_losses(output, classes, labels, args)
                        loss = sum(losses.values())
                        scaler.scale(loss / size).backward()
                    run.count(loss)
                    training.count_batch(run.counts, losses, labels)
                optimizer_step(network, optimizer, scaler, lr, args.grad_clip, average)

            # ---- validate, save, log ----
            distributed.share_buffers(teacher)  # else each process has its own BatchNorm statistics
            iteration = round(min(run.progress, 1) * args.max_iters)  # a time budget may be exceeded a little
            scores = training.means_of_round(run, iteration) | {"lr": optimizer.param_groups[0]["lr"]}
            scores |= validate(trained, root, args)
            # Not before all heads have learned, long after labels of slices are; but the last one counts.
            begun = min(max(args.cam_iters, args.aff_iters), args.max_iters - args.eval_iters)
            score = scores["val_f1"] if iteration > begun else math.nan
            run.end_epoch(scores, score, teacher.state_dict())
            training.keep_round(run, teacher.state_dict(), iteration)
            run.trackers.add_images("labels", training.label_pictures(trained, pixels, labels), run.epoch - 1)
            elapsed, left = cal_eta(began, iteration - first, args.max_iters - first)
            run.log_epoch(f"{training.scores_text(scores, args)}  {elapsed} done, {left} to go")
    finish(run, trained, root, args)


def validate(trained: TrainedModel, root: Path, args: Namespace) -> dict[str, float]:
    """Scores of validation slices; notes the thresholds that suit them best, where there are masks."""
    names = trained.split["val"]
    patients = by_patient(names)[:: math.ceil(len(names) / args.val_slices)]  # whole volumes
    chosen = [name for patient in patients for name in patient]
    evaluation = evaluate_split(trained, root, chosen, scales=args.scales, batch_size=args.batch_size)
    trained.preprocessing["threshold"] = thresholds = evaluation.thresholds()
    found = {f"val_{name}": evaluation.scores[name] for name in ("f1", "accuracy", "auroc")}
    for row in evaluation.overlap(thresholds):
        if row["group"] == BY_SCORE:
            found[f"val_dice_{row['output']}"] = row["dice_slices"]
    return found


def finish(run: Run, trained: TrainedModel, root: Path, args: Namespace) -> None:
    """Score best.pth on the test slices, or on the validation slices if there are none; write its maps."""
    best = load_trained(run.best_or_last(), trained.device, trained.precision)
    part = "test" if best.split["test"] else "val"
    if args.evaluate:
        evaluation = evaluate_split(
            best, root, best.split[part], scales=args.scales, batch_size=args.batch_size
        )
        out, thresholds = run.folder / f"evaluation_{part}", best.preprocessing["threshold"]
        write_evaluation(out, f"{part} slices of {root}", evaluation, thresholds)
    write_maps(best, root, best.split["val"], run.folder, args)
    run.log(f"written: {run.folder}/ with log.txt, metrics.csv, checkpoints/, attention_maps/, cam_npy/ ...")
    weights = str(run.folder / "checkpoints" / "best.pth")
    predict = shlex.join(["python", "wsss_medical/predict.py", "--weights", weights])
    run.log(f"next: {predict} --source <scan or folder> --out <folder>")


def write_maps(model: TrainedModel, root: Path, names: list[str], folder: Path, args: Namespace) -> None:
    """Maps of the slices `names`, as gen_attn.py writes them."""
    slices = MedicalSliceDataset(root, names)
    options = {"scales": args.scales, "batch_size": args.batch_size}
    generate_maps(model, slices, folder / "attention_maps", folder / "cam_npy", **options)


def generate(args: Namespace) -> None:
    """What --generate_only does."""
    folder = Path(*training.work_dir(args))
    device = hardware.start_device(args.device, distributed.local_rank())
    weights = Path(args.checkpoint) if args.checkpoint else folder / "checkpoints" / "best.pth"
    model = load_trained(weights, device, hardware.choose_precision(args.amp, device))
    write_maps(model, *part_of(model, args.data_path, "val"), folder, args)
    if distributed.is_main():
        print(f"written: {folder / 'attention_maps'} and {folder / 'cam_npy'}")


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    asked = parse_args(parser, argv)
    with distributed.session("gloo" if asked.cpu else asked.backend):
        if asked.generate_only:
            resolve_flags(asked)
            generate(asked)
            return 0
        root, name = training.work_dir(asked)
        args, found, folder = runs.resume(
            parser, argv, same=UNCHANGEABLE, name=name, root=root, stage="wsss_medical"
        )
        resolve_flags(args)
        train(args, found, folder)
    return 0


if __name__ == "__main__":
    run_script(main)
