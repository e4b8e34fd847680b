"""How much memory a training step will take, found without allocating it, on any machine; and --vram."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

MIB = 2**20
# What a card holds besides tensors: the CUDA context (300 to 500 MiB) and workspaces of convolutions.
RESERVED_MIB = 600


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


@dataclass(frozen=True)
class Plan:
    """What decides the memory of a training step.

    Attributes:
        patch_size: spatial sides of the input.
        accumulate: steps an optimiser update; batch_size * accumulate is what the recipe's learning rate
            fits.
        checkpointing: recompute activations instead of keeping them.
        precision: fp32, bf16 or fp16.
    """

    patch_size: tuple[int, ...]
    batch_size: int
    accumulate: int
    checkpointing: bool
    precision: str

    def __str__(self) -> str:
        sides = "x".join(map(str, self.patch_size))
        recompute = "checkpointing" if self.checkpointing else "no checkpointing"
        return f"patch {sides}, batch {self.batch_size} x {self.accumulate}, {recompute}, {self.precision}"


def candidates(wanted: Plan, *, step: int = 16, smallest: int = 48) -> Iterator[Plan]:
    """`wanted` and what to give up for memory, the least loss first.

    Checkpointing costs a second forward pass and nothing else; smaller batches with more accumulation cost
    speed (and, with BatchNorm, statistics of fewer items); only then the patch shrinks, its longest sides
    first, by `step` voxels and not below `smallest` (a side that is smaller already stays).
    """
    patch = wanted.patch_size
    while True:
        batch = wanted.batch_size
        while batch:
            # Rounded up: an update must not see fewer items than the recipe's.
            accumulate = -(-wanted.batch_size * wanted.accumulate // batch)
            plan = replace(wanted, patch_size=patch, batch_size=batch, accumulate=accumulate)
            yield plan
            if not wanted.checkpointing:
                yield replace(plan, checkpointing=True)
            batch //= 2
        longest = max(patch)
        if longest <= smallest:
            return
        patch = tuple(max(smallest, side - step) if side == longest else side for side in patch)


def fit_plan(wanted: Plan, peak_mib: Callable[[Plan], float], vram_gib: float) -> tuple[Plan, list]:
    """The first of `candidates` that a card of `vram_gib` holds, and [(plan, MiB), ...] of all tried.

    Args:
        peak_mib: predicted peak of a training step, e.g. by `training_peak_mib`.

    Raises:
        ValueError: not even the smallest fits.
    """
    limit_mib = vram_gib * 1024 - RESERVED_MIB
    tried: list[tuple[Plan, float]] = []
    for plan in candidates(wanted):
        tried.append((plan, peak_mib(plan)))
        if tried[-1][1] <= limit_mib:
            return plan, tried
    least = min(tried, key=lambda entry: entry[1])
    raise ValueError(
        f"--vram {vram_gib:g}: even {least[0]} needs {least[1]:.0f} MiB of tensors, more than the "
        f"{limit_mib:.0f} that a card of this size leaves; choose a smaller network"
    )


def plan_table(tried: list[tuple[Plan, float]], vram_gib: float) -> str:
    """Lines for the log: what was considered, its predicted MiB, and which was taken (the last)."""
    lines = [f"plan for --vram {vram_gib:g} ({vram_gib * 1024 - RESERVED_MIB:.0f} MiB of tensors):"]
    for index, (plan, mib) in enumerate(tried):
        lines.append(f"  {mib:7.0f} MiB  {plan}{'  <- taken' if index == len(tried) - 1 else ''}")
    return "\n".join(lines)


def limit_cuda_memory(vram_gib: float, device: torch.device) -> None:
    """Make this process's allocator on a CUDA card refuse more than `vram_gib`; elsewhere nothing."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(vram_gib * 2**30 / total, 1.0), device)
