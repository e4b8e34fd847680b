"""How much memory a training step will take, found without allocating it, on any machine."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

MIB = 2**20


class _StorageCounter(TorchDispatchMode):
    """Sums the bytes of all living storages that operations make, and remembers the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.bytes -= size


def training_peak_mib(
    make_network: Callable[[], nn.Module],
    loss_function: Callable[..., Tensor],
    image_shape: tuple[int, ...],
    *,
    make_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    dtype: torch.dtype | None = None,
) -> float:
    """Peak memory in MiB of the second training step: weights, gradients, optimiser state, kept and passing
    activations.

    The step runs on fake tensors, which have shapes but no data. Not included: the CUDA context (300 to
    500 MiB), workspaces of the convolution library and fragmentation; leave a margin of about 0.5 GiB.

    Args:
        make_network: builds the network; called once.
        loss_function: (logits, target) -> scalar.
        image_shape: (N, C, *spatial); the target is (N, *spatial) int64.
        make_optimizer: parameters -> optimiser.
        dtype: of autocast; None for fp32.
    """
    with FakeTensorMode(), _StorageCounter() as counter:
        network = make_network().train()
        optimizer = make_optimizer(network.parameters())
        for _ in range(2):  # the first makes the optimiser's state
            image = torch.empty(image_shape)
            target = torch.empty((image_shape[0], *image_shape[2:]), dtype=torch.long)
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                logits = network(image)
            loss_function(logits, target).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            del logits
    return counter.peak / MIB
