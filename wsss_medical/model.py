"""The network of this task, trained networks, and what else can be read as one."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import checkpoints
from common.checkpoints import TrainedModel
from common.hardware import Precision
from common.layers import resize_linear
from wsss_medical.mit import STRIDES, MixTransformer

POOLINGS = ("gmp", "gap")
STAGE = "wsss_medical"  # of the checkpoints of dist_train.py


class Output(NamedTuple):
    """What the network says of N slices, C classes without the background, K = C + 1, n = h * w cells.

    Attributes:
        cls: logit of each class, (N, C); above 0 means that the slice shows it.
        seg: logits of the segmentation at stride 4, (N, K, ceil(H / 4), ceil(W / 4)).
        attn_pred: how alike two cells are, float32 (N, n, n) in (0, 1), symmetric.
        attentions: see MixTransformer.
        tokens: last features, (N, channels, h, w).
        aux_cls: logits of the auxiliary classifiers side by side, (N, A * C), or None.
        aux_cam: class activation map of the one of stage 3, (N, C, h, w), without gradient, or None.
        cam: class activation map, as of `WeTr.cam_only` but with gradient.
    """

    cls: Tensor
    seg: Tensor
    attn_pred: Tensor
    attentions: list[Tensor]
    tokens: Tensor
    aux_cls: Tensor | None
    aux_cam: Tensor | None
    cam: Tensor


class Projection(nn.Module):
    """A linear layer of the channels; its name in checkpoints is that of AFA."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, channels)


class Fusion(nn.Module):
    """Weights of the decoder's 1 x 1 convolution and its norm, under AFA's names."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)


class Decoder(nn.Module):
    """SegFormer's decoder: all stages on the grid of stride 4, concatenated, and turned into classes.

    Nothing but linear steps lies between a stage and the norm, so they are taken in another order: each stage
    is multiplied once, on its own coarse grid, by the product of its two matrices, and the results are added.
    The concatenation of 4 * `channels` channels at stride 4 never exists.
    """

    def __init__(self, widths: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__()
        for i, width in enumerate(widths, start=1):
            self.add_module(f"linear_c{i}", Projection(width, channels))
        self.linear_fuse = Fusion(len(widths) * channels, channels)
        self.dropout = nn.Dropout2d(0.1)
        self.linear_pred = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Features of the stages, finest first -> logits (N, K, h, w) on the grid of the first."""
        grid = features[0].shape[2:]
        fusing = self.linear_fuse.conv.weight[:, :, 0, 0].chunk(len(features), dim=1)  # coarsest stage first
        fused = 0
        for i, (x, fuse) in enumerate(zip(features, reversed(fusing), strict=True), start=1):
            linear = getattr(self, f"linear_c{i}").proj
            with torch.autocast(x.device.type, enabled=False):
                weight, bias = fuse @ linear.weight, fuse @ linear.bias
            x = F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)
            fused = fused + resize_linear(x, grid)
        x = F.relu(self.linear_fuse.bn(fused))
        return self.linear_pred(self.dropout(x))


class WeTr(nn.Module):
    """AFA's network: slices to class logits, class activation maps, affinities and a segmentation.

    Weights have AFA's names, so that its checkpoints fit, except for the auxiliary classifiers.

    Args:
        backbone: encoder, one of BACKBONES.
        num_classes: with the background.
        embedding_dim: channels of the decoder.
        stride: of the encoder's stages.
        pooling: of the classifier's features: 'gmp', the maximum of each channel, or 'gap', its mean.
        cam_stages: stages whose class activation maps are added up. Stages 3 and 2 are finer or earlier than
            4 and get an auxiliary classifier.
        token_contrast: give stage 3 an auxiliary classifier, whose map says which tokens belong together.
        seg_detach: the segmentation loss does not reach the encoder.
        drop_path: see MixTransformer.
        checkpointing: see MixTransformer.

    Parameters (2 classes): tiny 2,332,627, b1 13,678,291.

    Source: Ru et al. 2022, Learning Affinity from Attention, arXiv:2203.02664; auxiliary classifier:
    Ru et al. 2023, ToCo, arXiv:2303.01267.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int = 2,
        embedding_dim: int = 256,
        stride: Sequence[int] = STRIDES,
        pooling: str = "gmp",
        *,
        cam_stages: Sequence[int] = (4,),
        token_contrast: bool = False,
        seg_detach: bool = False,
        drop_path: float = 0.1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {pooling!r}; take gmp (maximum) or gap (mean)")
        if 4 not in cam_stages or not set(cam_stages) <= {2, 3, 4}:
            raise ValueError(f"cam_stages {tuple(cam_stages)}: take 4, and 3 and 2 beside it if you like")
        self.pooling, self.seg_detach = pooling, seg_detach
        self.cam_stages = tuple(sorted(set(cam_stages), reverse=True))
        self.encoder = MixTransformer(backbone, stride, drop_path, checkpointing)
        widths, classes = self.encoder.widths, num_classes - 1
        self.decoder = Decoder(widths, embedding_dim, num_classes)
        self.attn_proj = nn.Conv2d(self.encoder.attention_maps, 1, 1)
        nn.init.kaiming_normal_(self.attn_proj.weight, a=5**0.5, mode="fan_out")
        self.classifier = nn.Conv2d(widths[3], classes, 1, bias=False)
        auxiliary = [3] if token_contrast or 3 in self.cam_stages else []
        auxiliary += [2] if 2 in self.cam_stages else []
        self.aux_classifiers = nn.ModuleDict(
            {str(stage): nn.Conv2d(widths[stage - 1], classes, 1, bias=False) for stage in auxiliary}
        )

    @property
    def checkpointing(self) -> bool:
        return self.encoder.checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        self.encoder.checkpointing = value

    def forward(self, image: Tensor) -> Output:
        """image (N, 3, H, W), normalised, any size from 32 x 32 -> see Output."""
        features, attentions = self.encoder(image)
        auxiliary = self.aux_classifiers.items()
        aux_cls = [self._class_logits(features[int(stage) - 1], layer) for stage, layer in auxiliary]
        aux_cam = None
        if "3" in self.aux_classifiers:
            aux_cam = self.aux_classifiers["3"](features[2]).detach()
        return Output(
            cls=self._class_logits(features[3], self.classifier),
            seg=self.decoder([x.detach() for x in features] if self.seg_detach else features),
            attn_pred=self._affinity(attentions),
            attentions=attentions,
            tokens=features[3],
            aux_cls=torch.cat(aux_cls, dim=1) if aux_cls else None,
            aux_cam=aux_cam,
            cam=_sum_on_finest_grid(self._cams(features)),
        )

    def cam_only(self, image: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Class activation map, affinities and attention of `image`, without the decoder.

        Returns:
            The map (N, C, h, w), before the ReLU; where `cam_stages` holds more than the 4, the sum of their
            maps on the finest grid. Then `attn_pred` and `attentions` as in Output.
        """
        features, attentions = self.encoder(image)
        return _sum_on_finest_grid(self._cams(features)), self._affinity(attentions), attentions

    def cams(self, image: Tensor) -> list[Tensor]:
        """The class activation maps of `cam_stages`, coarsest first, each (N, C, h, w) on its own grid."""
        return self._cams(self.encoder(image)[0])

    def _cams(self, features: list[Tensor]) -> list[Tensor]:
        layers = {4: self.classifier} | {int(stage): layer for stage, layer in self.aux_classifiers.items()}
        return [layers[stage](features[stage - 1]) for stage in self.cam_stages]

    def _class_logits(self, x: Tensor, classifier: nn.Conv2d) -> Tensor:
        pooled = x.amax(dim=(2, 3), keepdim=True) if self.pooling == "gmp" else x.mean((2, 3), keepdim=True)
        return classifier(pooled)[:, :, 0, 0]

    def _affinity(self, attentions: list[Tensor]) -> Tensor:
        """Sigmoid of a 1 x 1 convolution of attention + its transpose; in float32.

        The convolution comes first, which is the same and needs one transposed map instead of 16.
        """
        weights = self.attn_proj.weight.flatten(1).chunk(len(attentions), dim=1)
        with torch.autocast(attentions[0].device.type, enabled=False):
            maps = sum(w.float() @ a.flatten(2) for a, w in zip(attentions, weights, strict=True))
            maps = maps.unflatten(2, attentions[0].shape[2:])[:, 0]
            return torch.sigmoid(maps + maps.transpose(1, 2) + self.attn_proj.bias.float())


def _sum_on_finest_grid(cams: list[Tensor]) -> Tensor:
    grid = cams[-1].shape[2:]
    return sum(resize_linear(cam, grid) for cam in cams)


# ---- by flag values ----

# Flags that decide the shape of the weights or their meaning; a resumed run keeps them.
ARCHITECTURE = ("backbone", "pooling", "num_classes", "cam_stages", "token_contrast")


def get_model(config: dict) -> WeTr:
    """The network that `config` (flag values, as in a checkpoint) names: those of ARCHITECTURE and, where
    they are given, strides, seg_detach, drop_path and checkpointing."""
    return WeTr(
        config["backbone"],
        config["num_classes"],
        stride=config.get("strides") or STRIDES,
        pooling=config["pooling"],
        cam_stages=config.get("cam_stages") or (4,),
        token_contrast=bool(config.get("token_contrast")),
        seg_detach=bool(config.get("seg_detach")),
        drop_path=config.get("drop_path", 0.1),
        checkpointing=bool(config.get("checkpointing")),
    )


def load_trained(weights: str | Path, device: torch.device, precision: Precision) -> TrainedModel:
    """Rebuild the network of a checkpoint of dist_train.py."""

    def make_network(checkpoint: dict) -> nn.Module:
        if checkpoint.get("stage") != STAGE:
            raise ValueError(f"not weights of wsss_medical/dist_train.py but of {checkpoint.get('stage')}")
        return get_model(checkpoint["config"])

    return checkpoints.load_trained(weights, device, precision, make_network)
