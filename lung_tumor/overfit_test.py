"""Can the model learn at all? Fit a few slices and stop when they are known by heart.

    python lung_tumor/overfit_test.py --data_path data/lung_tumor

Takes the slices with most tumour. Passes (exit code 0) when their Dice gets above --target within --epochs
steps; if it does not, something is wrong with data, loss or model, and training on everything is a waste of
time. Writes overfit.png (slices, truth, prediction) and overfit_curves.png to --out.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.config import (
    fraction,
    make_parser,
    non_negative_int,
    parse_args,
    positive_float,
    positive_int,
    run_script,
    seed_number,
)
from common.faults import ending_in_a_sentence
from common.files import make_folder
from common.hardware import autocast, choose_precision, start_device
from common.metrics import dice_from_counts
from common.plots import PRED_COLOR, TRUTH_COLOR, overlay, save_curves, save_panels
from common.run_flags import add_prediction_flags
from common.runs import seed_everything
from lung_tumor.dataset import common_scale
from lung_tumor.flags import add_network_flags
from lung_tumor.model import LOSSES, get_loss, get_model
from lung_tumor.preprocess import demo_dataset
from lung_tumor.slice_files import list_slices, read_volumes, training_slices
from lung_tumor.slices import fit_to_square, normalise, read_image, read_mask


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--data_path",
        default="data/lung_tumor",
        help="folder that preprocess.py wrote, or demo for phantoms that are made on the spot",
    )
    parser.add_argument(
        "--samples", type=positive_int, default=4, help="number of slices to learn by heart; few are enough"
    )
    parser.add_argument(
        "--min_pixels",
        type=non_negative_int,
        default=100,
        help="take only slices that show more tumour pixels than this; lower it for small tumours",
    )
    parser.add_argument(
        "--epochs",
        type=positive_int,
        default=200,
        help="largest number of updates of the weights; if the Dice is not above --target by then, the "
        "test has failed",
    )
    parser.add_argument(
        "--target", type=fraction, default=0.8, help="Dice, 0 to 1, above which the test has passed"
    )
    parser.add_argument(
        "--lr",
        type=positive_float,
        default=1e-3,
        help="learning rate of Adam; take a tenth if the loss jumps",
    )
    parser.add_argument(
        "--loss",
        choices=LOSSES,
        default="dice_bce",
        help="what is minimised: dice_bce = class-balanced cross-entropy + Dice (finds small tumours), "
        "dice = Dice alone, ce = cross-entropy, balanced_ce = class-balanced cross-entropy alone, "
        "focal_tversky = a loss that weighs missed tumour more than false alarms; take the one that "
        "you will train with",
    )
    add_network_flags(parser, base_features=32)
    parser.add_argument(
        "--image_size",
        type=positive_int,
        default=256,
        help="side in pixels of the square in which the network sees a slice; 256 instead of 512 takes a "
        "quarter of memory and time, but where the median slice does not fit all slices are shrunk "
        "and small tumours are lost",
    )
    parser.add_argument(
        "--seed", type=seed_number, default=42, help="number that fixes what is random: the first weights"
    )
    parser.add_argument(
        "--out", default="runs/overfit_test", help="folder that the two pictures are written to"
    )
    add_prediction_flags(parser)
    return parser


def slices_with_most_tumour(data_path: str | Path, count: int, min_pixels: int, size: int):
    """(images, masks) uint8 (n, size, size) of the `count` training slices with most tumour, as the network
    sees them in training.

    Raises:
        ValueError: no slice with more than `min_pixels` pixels of tumour.
    """
    volumes = read_volumes(data_path)
    files = training_slices(list_slices(data_path), volumes)
    areas = np.array([int(read_mask(f.label)[0].sum()) for f in files])
    chosen = [i for i in np.argsort(-areas, kind="stable")[:count] if areas[i] > min_pixels]
    if not chosen:
        raise ValueError(
            f"{data_path}: no slice has more than {min_pixels} tumour pixels (largest: {areas.max()}); "
            "lower --min_pixels or check the labels"
        )
    scale = common_scale(volumes, size)
    images, masks = [], []
    for i in chosen:
        images.append(fit_to_square(read_image(files[i].image), size, scale, cut=True))
        masks.append(fit_to_square(read_mask(files[i].label)[0], size, scale, cut=True, is_mask=True))
    return np.stack(images), np.stack(masks)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with ending_in_a_sentence():
        device = start_device(args.device)
        precision = choose_precision(args.amp, device)
        data_path = demo_dataset() if args.data_path == "demo" else Path(args.data_path)
        images, masks = slices_with_most_tumour(data_path, args.samples, args.min_pixels, args.image_size)
        out = Path(args.out)
        make_folder(out)
    seed_everything(args.seed)
    network = get_model({**vars(args), "deep_supervision": False, "checkpointing": False}).to(device)
    loss_function = get_loss(args.loss)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.scaler)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)
    image = normalise(images).unsqueeze(1).to(device)  # (n, 1, size, size)
    target = torch.from_numpy(masks.astype(np.int64)).to(device)
    print(f"{args.model}, {args.loss}: {len(images)} slices of {args.image_size} pixels on {device}")
    history: list[dict] = []
    for step in range(args.epochs):
        network.train()
        with autocast(device, precision):
            logits = network(image)
        loss = loss_function(logits, target)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        # The output in training mode, on purpose: BatchNorm's running statistics lag behind.
        pred, tumour = logits.argmax(1) == 1, target == 1
        counts = ((pred & tumour).sum(), (pred & ~tumour).sum(), (~pred & tumour).sum())
        dice = float(dice_from_counts(*(int(c) for c in counts)))
        history.append({"epoch": step, "loss": loss.item(), "dice": dice})
        if step % 10 == 0 or dice > args.target:
            print(f"step {step:3d}  loss {loss.item():.4f}  Dice {dice:.4f}", flush=True)
        if dice > args.target:
            break
    passed = dice > args.target
    rows = [
        [shown, overlay(shown, truth, TRUTH_COLOR), overlay(shown, found, PRED_COLOR)]
        for shown, truth, found in zip(images, masks, pred.cpu().numpy(), strict=True)
    ]
    save_panels(out / "overfit.png", rows, [["image", "truth", "prediction"]] * len(rows))
    save_curves(out / "overfit_curves.png", history, {"loss": ["loss"], "Dice": ["dice"]})
    verdict = "passed" if passed else "FAILED: look at the pictures, then at labels, loss and learning rate"
    print(
        f"{verdict}: Dice {dice:.3f} after {len(history)} steps (target {args.target:g}); pictures in {out}"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    run_script(main)
