"""The blocks that LHA-Net was chosen from: milliseconds forwards and backwards on this CPU.

    python benchmarks/lha_blocks.py --threads 2

On features of the sizes that "small" has at strides 1, 2, 4 and 8 of a patch of 96^3. The blocks take turns.
Writes lha_blocks.json and .md to --out.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amos_lha.lha_net import PMSA, BottleneckBlock, ResidualBlock
from benchmarks.lha_networks import step_seconds
from benchmarks.results_files import write_results
from common.config import make_parser, parse_args, positive_int
from common.hardware import DTYPES
from common.layers import ConvNormAct, InstanceNorm, fast_layout

FEATURES = ((16, 1), (32, 2), (64, 4), (128, 8))  # channels and stride


class SeparableBlock(nn.Module):
    """x + 1x1x1(leaky ReLU(norm(depthwise k^3))): few parameters and little arithmetic."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        padding = kernel // 2
        self.main = nn.Sequential(
            nn.Conv3d(channels, channels, kernel, padding=padding, groups=channels, bias=False),
            InstanceNorm(channels),
            nn.LeakyReLU(0.01, inplace=True),
            nn.Conv3d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.main(x)


def plain_block(channels: int, norm: nn.Module) -> nn.Module:
    """3x3x3 convolution, norm, leaky ReLU: for norms that are not ours."""
    conv = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, norm, nn.LeakyReLU(0.01, inplace=True))


# Makes the block, and whether its input has the fast layout.
BLOCKS: dict[str, tuple[Callable[[int], nn.Module], bool]] = {
    "dense residual, ours": (lambda c: ResidualBlock(c, (3, 3, 3)), True),
    "bottleneck, ours": (lambda c: BottleneckBlock(c, (3, 3, 3)), True),
    "separable, k 3": (lambda c: SeparableBlock(c, 3), True),
    "separable, k 5": (lambda c: SeparableBlock(c, 5), True),
    "PMSA, ours": (PMSA, True),
    "conv, norm, ReLU: ours": (lambda c: ConvNormAct(c, c), True),
    "the same, nn.InstanceNorm3d, channels first": (
        lambda c: plain_block(c, nn.InstanceNorm3d(c, affine=True)),
        False,
    ),
    "the same, nn.GroupNorm, channels first": (lambda c: plain_block(c, nn.GroupNorm(c, c)), False),
    "the same, nn.GroupNorm, channels last": (lambda c: plain_block(c, nn.GroupNorm(c, c)), True),
}


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--side",
        type=positive_int,
        default=96,
        help="side in voxels of the patch that the features are of",
    )
    parser.add_argument("--repeats", type=positive_int, default=5, help="number of timed runs of each block")
    parser.add_argument(
        "--threads", type=positive_int, default=2, help="number of processor threads of torch"
    )
    parser.add_argument(
        "--amp", choices=("bf16", "off"), default="bf16", help="precision that the blocks compute in"
    )
    parser.add_argument(
        "--out",
        default="benchmarks/results",
        help="folder that the results (JSON and Markdown) are written to",
    )
    return parser


def block_step(
    block: nn.Module, channels: int, side: int, fast: bool, dtype: torch.dtype | None
) -> Callable[[], None]:
    """A function that runs a block forwards and backwards on noise."""
    x = torch.randn(1, channels, side, side, side, dtype=dtype or torch.float32)
    x = (fast_layout(x) if fast else x).requires_grad_()
    gradient = torch.randn_like(x)

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            y = block(x)
        y.backward(gradient)

    return step


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(build_parser(), argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = DTYPES["fp32" if args.amp == "off" else args.amp]
    times: dict[str, dict] = {}
    rows = [{"block": name} for name in BLOCKS]
    for channels, stride in FEATURES:
        side = max(2, args.side // stride)
        steps = {
            name: block_step(make(channels), channels, side, fast, dtype)
            for name, (make, fast) in BLOCKS.items()
        }
        title = f"{channels} channels, {side}^3"
        times[title] = step_seconds(steps, args.repeats)
        for row, taken in zip(rows, times[title].values(), strict=True):
            row[title] = f"{1000 * min(taken['seconds']):.1f}"
    notes = f"Milliseconds, the fastest of {args.repeats} runs in {args.amp}, {args.threads} threads."
    write_results(args.out, "lha_blocks", argv, {"times": times}, rows, notes)
    return times


if __name__ == "__main__":
    main()
