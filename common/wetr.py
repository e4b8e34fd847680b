"""WeTr, the network of Affinity from Attention (AFA): it learns from labels of whole pictures."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.cells import get_down_size
from common.layers import resize_linear
from common.mit import STRIDES, MixTransformer, SegFormerDecoder
from common.pixel_labels import resize
from common.recomputation import stage_runner

POOLINGS = ("gmp", "gap")
ATTENTION_BYTES = 2**28  # of attention that `multi_scale_cam` holds at a time; it grows with the side^4
CAM_STAGES = (4, 3, 2)  # of the encoder, that can give class activation maps


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

    @torch.no_grad()
    def last_attention(self, image: Tensor, blocks: int = 4) -> list[Tensor]:
        """Attention of the last `blocks` blocks of the encoder, in their order, as of MixTransformer."""
        return self.encoder(image, handed_out=blocks)[1]

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


@torch.no_grad()
def multi_scale_cam(
    network: WeTr, image: Tensor, scales: Sequence[float] = (1.0, 0.5, 1.5)
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Class activation map summed over `scales`, at each the larger one of the image and its mirror image.

    Runs in evaluation mode, so that the map has no dropout noise and the running statistics of the norms
    stay as they are; every module gets its own mode back afterwards.

    Args:
        image: (N, 3, H, W), normalised for the network.
        scales: of the image's sides; each order gives the same result.

    Returns:
        The map (N, C, H, W), without values below 0 and not normalised; the affinity (N, n, n) at the
        largest scale; the cells (h, w) of that scale, n = h * w.
    """
    if not scales:
        raise ValueError("multi_scale_cam: no scales; give at least one, such as 1.0")
    height, width = image.shape[2:]
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    cam, affinity = 0, None
    try:
        for scale in scales:
            size = (int(scale * height), int(scale * width))
            scaled = resize(image, size)
            cells_here = get_down_size(size)
            per_image = 16 * 4 * prod(cells_here) ** 2  # bytes of 16 maps of all pairs
            both = torch.cat([scaled, scaled.flip(3)]).split(max(1, ATTENTION_BYTES // per_image))
            parts = [network.cam_only(some)[:2] for some in both]
            plain, mirrored = resize(torch.cat([found for found, _ in parts]), (height, width)).chunk(2)
            cam = cam + torch.maximum(plain, mirrored.flip(3)).relu()
            if scale == max(scales):
                affinity = torch.cat([attn_pred for _, attn_pred in parts])[: len(image)].float()
                cells = cells_here
    finally:
        for module, training in modes:
            module.training = training
    return cam, affinity, cells
