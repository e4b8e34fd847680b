"""Memory for time: what the backward pass computes again instead of keeping it."""

import contextlib
from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class _FrozenRunningStatistics:
    """Inside, BatchNorm normalises by the batch but leaves its running statistics and count of batches alone.

    A class, because every backward through one graph enters it again, which a generator-based context
    manager does not allow.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def __enter__(self) -> None:
        self.before = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:
            # Not track_running_stats=False: checkpointing demands that the same tensors are saved both times.
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *_) -> None:
        for norm, (momentum, count) in zip(self.norms, self.before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def checkpointed(module: nn.Module, *inputs: Tensor) -> Tensor:
    """Run `module` without keeping its activations; backward computes them again.

    The second computation does not update BatchNorm's running statistics a second time.
    """

    def contexts() -> tuple:
        return contextlib.nullcontext(), _FrozenRunningStatistics(module)

    return checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)


def _plain(module: nn.Module, *inputs: Tensor) -> Tensor:
    return module(*inputs)


def stage_runner(network: nn.Module) -> Callable[..., Tensor]:
    """What a network's `forward` calls its stages with: `run(stage, *inputs)`.

    Stages are `checkpointed` where `network.checkpointing` is set (neither False nor "none") and the network
    is in training mode; otherwise they run as they are.
    """
    is_set = network.checkpointing not in (False, "none")
    return checkpointed if is_set and network.training else _plain
