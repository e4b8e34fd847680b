"""The network of this task, by flag values and from checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common import checkpoints
from common.checkpoints import TrainedModel
from common.hardware import Precision
from common.layers import resize_linear
from common.mit import STRIDES, MixTransformer, SegFormerDecoder
from common.mit_weights import backbone_of, encoder_weights
from common.pretrained import load_exactly, read_weights
from common.recomputation import stage_runner

POOLINGS = ("gmp", "gap")
CAM_STAGES = (4, 3, 2)  # of the encoder, that can give class activation maps
# Flags that decide the shape of the weights or what they mean; a run can only be resumed with the same ones.
ARCHITECTURE = ("backbone", "pooling", "cam_stages", "contrast_weight")


class Output(NamedTuple):
    """What the network says of N slices: C classes without the background, n = h * w cells of stage 4.

    Attributes:
        cls: logit of each class, (N, C); above 0 means that the slice shows it.
        seg: logits of the segmentation, (N, 1 + C, ceil(H / 4), ceil(W / 4)).
        attn_pred: how alike two cells are, float32 (N, n, n) in (0, 1), symmetric.
        attentions: of the encoder, see there.
        tokens: features of stage 4, (N, channels, h, w).
        aux_cls: logits of the auxiliary classifiers, side by side, (N, classifiers * C); None without.
        aux_cam: class activation map of stage 3, without gradient, (N, C, h, w); None without its classifier.
        cam: what `WeTr.cam_only` gives, with gradient.
    """

    cls: Tensor
    seg: Tensor
    attn_pred: Tensor
    attentions: list[Tensor]
    tokens: Tensor
    aux_cls: Tensor | None
    aux_cam: Tensor | None
    cam: Tensor


class WeTr(nn.Module):
    """AFA's network: from a slice to its class, to where that shows, to affinities and to a segmentation.

    Weights have AFA's names, so that its checkpoints fit; only auxiliary classifiers are new.

    Args:
        backbone: encoder, one of BACKBONES.
        num_classes: with the background.
        embedding_dim: channels of the decoder.
        stride: of the encoder's stages.
        pooling: what the classifier sees of each channel: its maximum, 'gmp', or its mean, 'gap'.
        cam_stages: whose class activation maps are added up: 4, and beside it 3 and 2, which see less but are
            earlier or finer; they get an auxiliary classifier.
        token_contrast: give stage 3 an auxiliary classifier, which says what tokens belong together.
        seg_detach: keep the gradient of the segmentation out of the encoder.
        drop_path: see MixTransformer.
        checkpointing: in training keep only what passes between the blocks; backward computes the rest again.

    Parameters (2 classes): tiny 2,332,627, b1 13,678,291.

    Source: Ru et al. 2022, AFA, arXiv:2203.02664; auxiliary classifier: Ru et al. 2023, ToCo,
    arXiv:2303.01267.
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
        if 4 not in cam_stages or not set(cam_stages) <= set(CAM_STAGES):
            raise ValueError(f"cam_stages {tuple(cam_stages)}: take 4, and 3 and 2 beside it if you like")
        self.pooling, self.seg_detach, self.checkpointing = pooling, seg_detach, checkpointing
        self.cam_stages = [stage for stage in CAM_STAGES if stage in cam_stages]
        self.encoder = MixTransformer(backbone, stride, drop_path)
        widths = self.encoder.widths
        self.decoder = SegFormerDecoder(widths, embedding_dim, num_classes)
        self.attn_proj = nn.Conv2d(self.encoder.attention_maps, 1, 1)
        nn.init.kaiming_normal_(self.attn_proj.weight, a=5**0.5, mode="fan_out")
        self.classifier = nn.Conv2d(widths[3], num_classes - 1, 1, bias=False)
        auxiliary = [stage for stage in (3, 2) if stage in cam_stages or (stage == 3 and token_contrast)]
        self.aux_classifiers = nn.ModuleDict(
            {str(stage): nn.Conv2d(widths[stage - 1], num_classes - 1, 1, bias=False) for stage in auxiliary}
        )

    def forward(self, image: Tensor) -> Output:
        """image (N, 3, H, W), normalised, any size from 32 x 32 -> see Output."""
        features, attentions = self.encoder(image, stage_runner(self))
        auxiliary = {int(stage): layer for stage, layer in self.aux_classifiers.items()}
        aux_cls = [self._class_logits(layer, features[stage - 1]) for stage, layer in auxiliary.items()]
        return Output(
            cls=self._class_logits(self.classifier, features[3]),
            seg=self.decoder([x.detach() for x in features] if self.seg_detach else features),
            attn_pred=self._affinity(attentions),
            attentions=attentions,
            tokens=features[3],
            aux_cls=torch.cat(aux_cls, dim=1) if aux_cls else None,
            aux_cam=self._cam_of_stage(3, features).detach() if 3 in auxiliary else None,
            cam=self._cam(features),
        )

    def cam_only(self, image: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Class activation map, affinities and attention of `image`, without the decoder.

        Returns:
            The map (N, C, h, w), before any ReLU: of stage 4, or the sum of the maps of `cam_stages` on their
            finest grid. Then `attn_pred` and `attentions` as in Output.
        """
        features, attentions = self.encoder(image, stage_runner(self))
        return self._cam(features), self._affinity(attentions), attentions

    def cams(self, image: Tensor) -> list[Tensor]:
        """The class activation maps of `cam_stages`, from 4 down, each (N, C, h, w) on its own grid."""
        features = self.encoder(image, stage_runner(self))[0]
        return [self._cam_of_stage(stage, features) for stage in self.cam_stages]

    def _cam(self, features: list[Tensor]) -> Tensor:
        cams = [self._cam_of_stage(stage, features) for stage in self.cam_stages]
        return sum(resize_linear(cam, cams[-1].shape[2:]) for cam in cams)

    def _cam_of_stage(self, stage: int, features: list[Tensor]) -> Tensor:
        return (self.classifier if stage == 4 else self.aux_classifiers[str(stage)])(features[stage - 1])

    def _class_logits(self, classifier: nn.Conv2d, x: Tensor) -> Tensor:
        pooled = x.amax(dim=(2, 3), keepdim=True) if self.pooling == "gmp" else x.mean((2, 3), keepdim=True)
        return classifier(pooled)[:, :, 0, 0]

    def _affinity(self, attentions: list[Tensor]) -> Tensor:
        """Sigmoid of a 1 x 1 convolution of attention plus its transpose; here its result is transposed."""
        weights = self.attn_proj.weight.flatten(1).chunk(len(attentions), dim=1)
        with torch.autocast(attentions[0].device.type, enabled=False):
            maps = sum(w.float() @ a.flatten(2) for w, a in zip(weights, attentions, strict=True))
            maps = maps[:, 0].unflatten(1, attentions[0].shape[2:])
            return torch.sigmoid(maps + maps.transpose(1, 2) + self.attn_proj.bias.float())


def get_model(config: dict) -> WeTr:
    """The network that `config` (flag values, as in a checkpoint) names.

    It must hold backbone and pooling, and may hold num_classes, embedding_dim, cam_stages, contrast_weight,
    seg_detach, drop_path and checkpointing; what is missing or None is WeTr's default.
    """
    names = ("num_classes", "embedding_dim", "cam_stages", "seg_detach", "drop_path", "checkpointing")
    options = {name: config[name] for name in names if config.get(name) is not None}
    contrast = bool(config.get("contrast_weight"))
    return WeTr(config["backbone"], pooling=config["pooling"], token_contrast=contrast, **options)


def load_trained(weights: str | Path, device: torch.device, precision: Precision) -> TrainedModel:
    """Rebuild a network from a checkpoint of dist_train.py, or from weights of AFA's.

    The shapes of AFA's weights tell the backbone; the pooling is taken to be gmp, AFA's default, and their
    `preprocessing` holds None for what nobody knows.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, refused, or weights of something else.
    """
    found = checkpoints.load_tensors(weights)
    if isinstance(found, dict) and "config" in found:
        return checkpoints.load_trained(weights, device, precision, _network_of)
    named = read_weights(weights)
    config = {"backbone": backbone_of(encoder_weights(named)[0]), "pooling": "gmp"}
    try:
        config["num_classes"] = len(named["decoder.linear_pred.bias"])
        config["embedding_dim"] = len(named["decoder.linear_c1.proj.bias"])
        network = get_model(config)
        load_exactly(network, named)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{weights}: neither a checkpoint of wsss_medical/dist_train.py nor weights of AFA's network "
            f"({error}); an encoder alone is for --pretrained of dist_train.py"
        ) from error
    preprocessing = {"dataset": None, "pixel_mm": None, "step": 1, "channels": None}
    split = {"train": [], "val": [], "test": []}
    return TrainedModel(network.to(device).eval(), config, device, precision, preprocessing, split)


def _network_of(checkpoint: dict) -> nn.Module:
    if (found := checkpoint.get("stage", "another task")) != "wsss_medical":
        raise ValueError(f"not weights of wsss_medical/dist_train.py but of {found}; swapped?")
    return get_model(checkpoint["config"])
