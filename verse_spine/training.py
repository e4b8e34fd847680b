"""What both train scripts do alike: open the data, make network, augmentation and optimiser."""

from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common import distributed, runs
from common.augment import Augmentation3d, grey_value_probabilities
from common.checkpoints import TrainedModel
from common.config import parse_args, resolved_config
from common.memory import Plan, StepSetup, set_up_step
from common.optimizers import make_optimizer
from common.phantoms import prepare_demo
from common.training import Run
from verse_spine import anatomy, download, phantoms, preprocess
from verse_spine.dataset import VerSe
from verse_spine.networks import get_model, uses_checkpointing
from verse_spine.prodigy import Prodigy

# Learning rates that replace --lr 1.0, which only Prodigy understands.
DEFAULT_LR = {"prodigy": 1.0, "adamw": 1e-3, "sgd": 1e-2}


def open_data(args: Namespace) -> VerSe:
    """The data set that the flags name: phantoms, downloaded, or there already."""
    if args.data_path == "demo":
        return VerSe(demo_dataset(), seed=args.seed)
    if args.download and not (Path(args.data_path) / "preprocessing.json").is_file():
        download_and_convert(Path(args.data_path), args.dataset_edition)
    verse = VerSe(args.data_path, args.dataset_edition, args.seed)
    if distributed.is_main() and (left_out := len(verse.entries) - len(verse.cases)):
        print(f"--dataset_edition {args.dataset_edition}: leaves out {left_out} case(s) of VerSe20")
    return verse


def demo_dataset(folder: Path = Path("data/demo/verse_spine")) -> Path:
    """Phantom spines in VerSe's layout, converted by the ordinary route; made once."""
    source, out = folder / "verse", folder / "h5"
    flags = ["--source", str(source), "--out", str(out), "--spacing", *["3"] * 3, "--workers", "2"]

    def make() -> dict[str, str]:
        phantoms.write_verse_phantoms(source)
        return preprocess.convert(parse_args(preprocess.build_parser(), flags))

    return prepare_demo(source, out, make, flags, [phantoms, anatomy, preprocess])


def validation_names(verse: VerSe) -> list[str]:
    """Validation scans; without any the first training scan, so that a run can still be watched."""
    return verse.split["val"] or verse.split["train"][:1]


def download_and_convert(data_path: Path, edition: int) -> None:
    """VerSe into <data_path>_raw and converted into <data_path>."""
    raw = data_path.with_name(f"{data_path.name}_raw")
    # VerSe20 in its subject-based release leaves out the scans that VerSe19 has already.
    editions = ["19", "20"] if edition == 20 else ["19"]
    if download.main(["--out", str(raw), "--dataset_edition", *editions]):
        raise ValueError(f"VerSe{edition} could not be downloaded; see the steps above")
    if preprocess.main(["--source", str(raw), "--out", str(data_path)]):
        print("some cases could not be converted, see above; going on with the others")


def get_augmentation(args: Namespace) -> Augmentation3d:
    """What the flags ask for. Only left-right flips: after preprocessing no scan is upside down."""
    return Augmentation3d(
        flip_probability=(0, 0, args.flip),
        spatial_probability=args.rotate_scale,
        elastic_probability=args.elastic,
        low_resolution_probability=args.low_resolution,
        **grey_value_probabilities(args.grey_values),
    )


def get_optimizer(name: str, parameters: Iterable, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Prodigy, AdamW or SGD with momentum; `lr` 1.0 becomes the default of the latter two."""
    lr = usual_lr(name, lr)
    if name == "prodigy":
        return Prodigy(parameters, lr=lr, weight_decay=weight_decay)
    return make_optimizer(name, parameters, lr, weight_decay)


def usual_lr(name: str, lr: float) -> float:
    return DEFAULT_LR[name] if lr == 1.0 else lr


def optimizer_notes(args: Namespace, network: nn.Module) -> list[str]:
    """What a user should know about the optimiser, for the log."""
    if args.optimizer == "prodigy":
        mib = 16 * sum(p.numel() for p in network.parameters()) / 2**20
        return [f"Prodigy finds its step size itself (--lr is a factor); its state takes {mib:.0f} MiB"]
    if args.lr == 1.0:
        return [f"--lr 1.0 belongs to Prodigy: {args.optimizer} takes {DEFAULT_LR[args.optimizer]:g}"]
    return []


def set_up(
    args: Namespace,
    config: dict,
    num_outputs: int,
    loss_function: Callable[..., Tensor],
    device: torch.device,
    resumed: dict | None,
) -> tuple[nn.Module, StepSetup]:
    """The network that the flags ask for, on its device, with the precision and memory plan of its steps."""
    network = get_model(config, num_outputs).to(device)
    wanted = Plan(tuple(args.patch_size), args.batch_size, args.accumulate, uses_checkpointing(config))
    setup = set_up_step(
        network,
        lambda checkpointing: get_model(config | {"checkpointing": checkpointing}, num_outputs),
        loss_function,
        wanted,
        device,
        name=args.model,
        amp=args.amp,
        resumed=resumed,
        vram_gib=args.vram,
        make_optimizer=lambda parameters: get_optimizer(args.optimizer, parameters, 1.0, 0.0),
    )
    return network, setup


def start_run(
    args: Namespace,
    config: dict,
    trained: TrainedModel,
    *,
    stage: str,
    num_outputs: int,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loader: DataLoader,
    setup: StepSetup,
    resumed: dict | None,
    folder: Path | None,
) -> Run:
    """The run of one stage, in a new folder or in that of the run that goes on; its log begins with what was
    set up."""
    run = Run(
        folder or distributed.on_main(lambda: runs.new_run_dir(args.out, args.model_name)),
        config,
        flags=resolved_config(args),
        parts={"model": trained.network, "optimizer": optimizer, "scaler": scaler},
        notes={
            "preprocessing": trained.preprocessing,
            "split": trained.split,
            "stage": stage,
            "num_outputs": num_outputs,
        },
        num_batches=len(loader),
        accumulate=setup.plan.accumulate,
        device=trained.device,
        epochs=args.epochs,
        time_budget_s=args.time_budget,
        patience=args.early_stopping,
        resumed=resumed,
        wandb_project="verse_spine" if args.use_wandb else None,
    )
    for line in [*setup.lines, *optimizer_notes(args, trained.network)]:
        run.log(line)
    plan, split = setup.plan, trained.split
    effective_batch = plan.batch_size * plan.accumulate * distributed.world_size()
    run.log(
        f"cases: {len(split['train'])} training, {len(split['val'])} validation, {len(split['test'])} test; "
        f"{len(loader)} batches in an epoch, effective batch {effective_batch}"
    )
    if not split["val"]:
        run.log(
            f"warning: there is no validation scan: the training scan {split['train'][0]} stands in for one, "
            "and best.pt is that of the last validation"
        )
    return run
