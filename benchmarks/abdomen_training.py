"""Organs learned by two public programs: MONAI's BasicUNet with MONAI's transforms, and nnU-Net v2.

Both read the NIfTI files of cases in AMOS22's layout, prepare them in their own way, train on the processor
for a number of minutes, and write label files on the grids of the test scans. For abdomen_peers.py.
"""

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from amos_lha.cases import Case
from amos_lha.organs import ORGANS
from common.files import read_json
from common.hardware import Precision, autocast
from common.nifti import load_label, save_label
from common.runs import seed_everything
from common.schedules import learning_rate

CPU = torch.device("cpu")
CT_WINDOW_HU = (-175, 250)  # of MONAI's tutorials for abdominal organs
FILE_ENDING = ".nii.gz"


class Clock:
    """Counts the iterations of a training that may take a number of minutes."""

    def __init__(self, minutes: float) -> None:
        self.limit_s, self.iterations, self.start = 60 * minutes, 0, time.perf_counter()

    def share(self) -> float:
        """Share of the time that has passed, 0 to 1."""
        return min((time.perf_counter() - self.start) / self.limit_s, 1.0)

    def result(self) -> dict:
        """Iterations and seconds until now."""
        return {"iterations": self.iterations, "train_s": time.perf_counter() - self.start}


# ---- MONAI ----


def monai_transforms(
    modality: str,
    spacing_mm: Sequence[float],
    labels: Sequence[int] = (),
    patch_size: Sequence[int] | None = None,
    batch_size: int = 1,
):
    """Transforms of {"image", "label"} for training or, without a patch size, of {"image"} for prediction."""
    from monai import transforms as t

    keys, modes = (["image", "label"], ["bilinear", "nearest"]) if patch_size else (["image"], ["bilinear"])
    low, high = CT_WINDOW_HU
    if modality == "ct":
        grey = t.ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True)
    else:
        grey = t.NormalizeIntensityd("image", nonzero=True)
    steps = [
        t.LoadImaged(keys, ensure_channel_first=True),
        t.Orientationd(keys, axcodes="RAS", labels=None),
        t.Spacingd(keys, pixdim=spacing_mm[::-1], mode=modes),
        grey,
    ]
    if patch_size:
        size = patch_size[::-1]  # x y z
        steps += [
            t.SpatialPadd(keys, size),
            t.LabelFilterd("label", labels),
            t.RandCropByPosNegLabeld(keys, "label", size, pos=2, neg=1, num_samples=batch_size),
            t.RandAffined(
                keys,
                prob=0.3,
                rotate_range=(0.26, 0.26, 0.5),
                scale_range=(0.15,) * 3,
                mode=modes,
                padding_mode="border",
            ),
            t.RandGaussianNoised("image", prob=0.15, std=0.05),
            t.RandScaleIntensityd("image", factors=0.2, prob=0.3),
            t.RandShiftIntensityd("image", offsets=0.1, prob=0.3),
        ]
    return t.Compose(steps)


def train_monai(
    train: list[Case],
    test: list[Case],
    labels: list[int],
    pred: Path,
    *,
    minutes: float,
    precision: Precision,
    seed: int,
    spacing_mm: Sequence[float],
    patch_size: Sequence[int],
    batch_size: int,
    lr: float,
) -> dict:
    """Train BasicUNet (32 to 256 channels) and write pred/<case>.nii.gz for each test case.

    Args:
        labels: organs, AMOS's numbers; others count as background.
        minutes: of training; the preparation of the scans and the prediction come on top.
        spacing_mm, patch_size: z y x.
        lr: highest learning rate of AdamW, which falls as a cosine of the time.

    Returns:
        iterations, train_s, parameters.
    """
    from monai.data import CacheDataset, DataLoader, MetaTensor, decollate_batch, list_data_collate
    from monai.inferers import sliding_window_inference
    from monai.losses import DiceCELoss
    from monai.networks.nets import BasicUNet
    from monai.transforms import Invertd, SaveImage
    from monai.utils import set_determinism

    set_determinism(seed)
    modality = train[0].modality
    files = [{"image": str(case.image), "label": str(case.label)} for case in train]
    prepare = monai_transforms(modality, spacing_mm, labels, patch_size, batch_size)
    cached = CacheDataset(files, prepare, num_workers=0, progress=False)
    loader = DataLoader(
        cached, num_workers=1, shuffle=True, persistent_workers=True, collate_fn=list_data_collate
    )
    position = torch.zeros(max(ORGANS) + 1, dtype=torch.long)  # organ number -> output channel
    position[labels] = torch.arange(1, len(labels) + 1)
    network = BasicUNet(3, 1, len(labels) + 1)
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-4)
    clock = Clock(minutes)
    while clock.share() < 1:
        for batch in loader:
            now = learning_rate("warmup_cosine", clock.share(), lr, 1e-6, 0.05)
            optimizer.param_groups[0]["lr"] = now
            image, label = batch["image"].as_tensor(), position[batch["label"].as_tensor().long()]
            with autocast(CPU, precision):
                logits = network(image)  # (N, 1 + labels, x, y, z)
            optimizer.zero_grad(set_to_none=True)
            loss_function(logits.float(), label).backward()
            optimizer.step()
            clock.iterations += 1
            if clock.share() >= 1:
                break
    result = clock.result() | {"parameters": sum(p.numel() for p in network.parameters())}

    network.eval()
    prepare = monai_transforms(modality, spacing_mm)
    save = SaveImage(pred, "", output_dtype=np.uint8, resample=False, separate_folder=False, print_log=False)
    back = Invertd("logits", prepare, "image", nearest_interp=False)
    for case in test:
        item = prepare({"image": str(case.image)})
        with torch.inference_mode(), autocast(CPU, precision):
            logits = sliding_window_inference(
                item["image"][None], patch_size[::-1], batch_size, network, 0.5, "gaussian"
            )
        item["logits"] = decollate_batch(logits.float())[0]
        found = back(item)["logits"]  # (1 + labels, x, y, z) on the scan's own grid
        organs = torch.tensor([0, *labels])[found.as_tensor().argmax(0, keepdim=True)]
        save(MetaTensor(organs, meta=found.meta))
    return result


# ---- nnU-Net ----


def train_nnunet(
    train: list[Case],
    test: list[Case],
    labels: list[int],
    pred: Path,
    *,
    minutes: float,
    precision: Precision,
    seed: int,
    work: Path,
    gpu_memory_gb: float,
    mirroring: bool,
) -> dict:
    """Plan, preprocess and train with nnU-Net's 3d_fullres and write pred/<case>.nii.gz for each test case.

    Its network, loss, optimiser and augmentation; the learning rate falls by its formula with the time
    instead of with 1000 epochs, and there is no validation.

    Args:
        work: empty folder for nnU-Net's own files.
        gpu_memory_gb: what nnU-Net plans for; its default is 8.
        mirroring: along all axes in training and prediction, its default; False = as its trainer without.

    Other arguments and what is returned: as for `train_monai`, and patch_size, batch_size, spacing_mm of the
    plan.
    """
    for kind in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{kind}"] = str(work / kind)  # nnU-Net reads them when it is imported
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_compile": "f", "nnUNet_def_n_proc": "1"}
    write_nnunet_folder(train, labels, work / "raw" / "Dataset501_Abdomen")
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from torch.nn.utils import clip_grad_norm_

    api.extract_fingerprints([501], num_processes=1, check_dataset_integrity=True)
    name = api.plan_experiments([501], gpu_memory_target_in_gb=gpu_memory_gb)
    api.preprocess([501], name, configurations=("3d_fullres",), num_processes=[1])
    folder = work / "preprocessed" / "Dataset501_Abdomen"
    plans = read_json(folder / f"{name}.json") | {"continue_training": False}

    class Trainer(nnUNetTrainer):
        def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
            rotation, dummy_2d, size, mirror_axes = (
                super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
            )
            if not mirroring:
                self.inference_allowed_mirroring_axes = mirror_axes = None
            return rotation, dummy_2d, size, mirror_axes

    seed_everything(seed)
    trainer = Trainer(plans, "3d_fullres", "all", read_json(folder / "dataset.json"), device=CPU)
    trainer.initialize()
    trainer.on_train_start()
    trainer.network.train()
    clock = Clock(minutes)
    while clock.share() < 1:
        lr = learning_rate("poly", clock.share(), trainer.initial_lr)
        for group in trainer.optimizer.param_groups:
            group["lr"] = lr
        batch = next(trainer.dataloader_train)
        with autocast(CPU, precision):
            output = trainer.network(batch["data"])  # of each resolution
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.loss([o.float() for o in output], batch["target"]).backward()
        clip_grad_norm_(trainer.network.parameters(), 12)
        trainer.optimizer.step()
        clock.iterations += 1
    result = clock.result() | {"parameters": sum(p.numel() for p in trainer.network.parameters())}
    plan = trainer.configuration_manager
    result |= {"patch_size": plan.patch_size, "batch_size": plan.batch_size, "spacing_mm": plan.spacing}
    trainer.on_train_end()

    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(use_mirroring=mirroring, device=CPU, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network.eval(),
        trainer.plans_manager,
        trainer.configuration_manager,
        [trainer.network.state_dict()],
        trainer.dataset_json,
        "nnUNetTrainer",
        trainer.inference_allowed_mirroring_axes,
    )
    organs = np.array([0, *labels], np.uint8)  # by output channel
    for case in test:
        with autocast(CPU, precision):
            predictor.predict_from_files_sequential([[str(case.image)]], [str(work / case.name)])
        found = load_label(work / f"{case.name}{FILE_ENDING}")
        save_label(pred / f"{case.name}{FILE_ENDING}", organs[found.array], found)
    return result


def write_nnunet_folder(train: list[Case], labels: list[int], folder: Path) -> None:
    """Training cases in nnU-Net's raw layout, the organs numbered from 1 on without gaps."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for case in train:
        shutil.copyfile(case.image, folder / "imagesTr" / f"{case.name}_0000{FILE_ENDING}")
        label = load_label(case.label)
        position = np.zeros(max(ORGANS) + 1, np.uint8)
        position[labels] = range(1, len(labels) + 1)
        save_label(folder / "labelsTr" / f"{case.name}{FILE_ENDING}", position[label.array], label)
    notes = {
        "channel_names": {"0": "CT" if train[0].modality == "ct" else "MR"},
        "labels": {"background": 0} | {ORGANS[organ]: k for k, organ in enumerate(labels, start=1)},
        "numTraining": len(train),
        "file_ending": FILE_ENDING,
    }
    (folder / "dataset.json").write_text(json.dumps(notes), encoding="utf8")
