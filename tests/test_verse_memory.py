"""Every default of verse_spine trains within 3.5 GiB, in fp32, as a card of 4 GB would."""

import pytest
import torch

from common.config import resolved_config
from common.losses import dice_ce_loss
from verse_spine import train_heatmap, train_segmentation
from verse_spine.heatmap import heatmap_loss
from verse_spine.networks import FEATURE_SIZES, MODELS
from verse_spine.training import set_up

LIMIT_MIB = 3.5 * 1024
NETWORKS = [(name, f) for name in MODELS for f in (FEATURE_SIZES if name == "SwinUNetR" else (24,))]
# MiB at 96 x 96 x 96 without and with checkpointing, as first measured by PyTorch's FakeTensorMode.
SEGMENTATION_MIB = {
    ("UNet", 24): (131, 106),
    ("UNetFull", 24): (667, 493),
    ("AttentionUNet", 24): (1139, 790),
    ("AttentionUNet3D", 24): (1552, 1264),
    ("SegFormer3D", 24): (363, 261),
    ("SwinUNetR", 12): (2445, 1532),
    ("SwinUNetR", 24): (3645, 1834),
    ("SwinUNetR", 48): (6491, 3144),
}
FAST = [("UNet", 24), ("UNetFull", 24), ("ContextResUNet", 24), ("SegResNet", 24)]
networks = pytest.mark.parametrize(
    "name, feature_size",
    [network if network in FAST else pytest.param(*network, marks=pytest.mark.slow) for network in NETWORKS],
)


def predicted_mib(script, loss_function, name, feature_size, *flags):
    flags = ["--data_path", "demo", "--model_name", "x", "--model", name, *flags]
    flags += ["--feature_size", str(feature_size), "--amp", "off"]
    args = script.build_parser().parse_args(flags)
    assert args.batch_size == 1 and args.optimizer == "prodigy"
    return set_up(args, resolved_config(args), 1, loss_function, torch.device("cpu"), None)[1].peak_mib


@networks
def test_segmentation(name, feature_size):
    peak_mib = predicted_mib(train_segmentation, dice_ce_loss, name, feature_size)
    assert 50 < peak_mib <= LIMIT_MIB
    if (name, feature_size) in SEGMENTATION_MIB:
        kept, checkpointed = SEGMENTATION_MIB[name, feature_size]
        assert peak_mib == pytest.approx(checkpointed if name == "SwinUNetR" else kept, abs=1)


@pytest.mark.slow
@pytest.mark.parametrize("name, feature_size", [*SEGMENTATION_MIB])
def test_checkpointing_as_measured(name, feature_size):
    flag = "--no-checkpointing" if name == "SwinUNetR" else "--checkpointing"  # the other is the default
    peak_mib = predicted_mib(train_segmentation, dice_ce_loss, name, feature_size, flag)
    kept, checkpointed = SEGMENTATION_MIB[name, feature_size]
    assert peak_mib == pytest.approx(kept if name == "SwinUNetR" else checkpointed, abs=1)


@networks
def test_heatmap(name, feature_size):
    def loss_function(logits, target):
        return heatmap_loss("bce", logits, target[:, None])

    assert 50 < predicted_mib(train_heatmap, loss_function, name, feature_size) <= LIMIT_MIB
