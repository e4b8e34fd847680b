"""The same script alone or under torchrun: start-up, rank, sums over processes, equal shares.

torchrun --nproc_per_node 2 lung_tumor/train.py ...     NCCL on CUDA, gloo on CPU

Everything here is a no-op in a process that runs alone.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from common import faults

T = TypeVar("T")


def init(backend: str | None = None) -> None:
    """Join the process group that torchrun describes in the environment; nothing without torchrun.

    Args:
        backend: gloo or nccl; None = both where there is a GPU.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return
    if backend != "gloo":
        has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"  # gloo as well for --device cpu
    if local_rank() < torch.cuda.device_count():  # else hardware.pick_device says what is wrong
        torch.cuda.set_device(local_rank())
    # Two hours: rank 0 may convert a data set or evaluate whole volumes while the others wait.
    dist.init_process_group(backend, timeout=timedelta(hours=2))


@contextmanager
def session(backend: str | None = None) -> Iterator[None]:
    """Everything that a script does stands inside: join the process group, and leave it whatever happens.

    `backend` is that of `init`.

    Errors that a user can mend (ValueError, OSError, too little memory, another process that has ended) end
    the program with one line.
    """
    with faults.ending_in_a_sentence():
        init(backend)
        try:
            yield
        finally:
            shutdown()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Index of this process on its machine, which is also the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def shutdown() -> None:
    """Leave the process group; after a normal end all together.

    Without waiting for each other 3 of 8 two-process runs on a CPU (gloo, torch 2.13) ended in SIGABRT, with
    it none of 10.
    """
    if dist.is_initialized():
        if sys.exc_info()[0] is None:  # else the others may never come
            dist.barrier()
        gc.collect()  # models that still hold the group
        dist.destroy_process_group()


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over processes, in place; returns the tensor."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_true(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process, so that all of them stop at the same step."""
    if not dist.is_initialized():
        return flag
    return bool(all_sum(torch.tensor(int(flag), device=device)).item())


def from_main(value: Any) -> Any:
    """Rank 0's value (plain, picklable) in every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 only; its (plain, picklable) result in every process.

    Raises:
        Exception: what `function` raises, on rank 0. The others end without a word: rank 0 tells why.
    """
    result, error = None, None
    if is_main():
        try:
            result = function()
        except Exception as reason:
            error = reason
    result, has_failed = from_main((result, error is not None))
    if error is not None:
        raise error
    if has_failed:
        raise SystemExit(1)
    return result  # type: ignore[return-value]


def main_first(function: Callable[[], T]) -> T:
    """Call `function` on rank 0, then on the others, which find on disk what rank 0 has made.

    Raises: as `on_main`.
    """
    results: list[T] = []
    on_main(lambda: results.append(function()))
    return results[0] if is_main() else function()


def share_buffers(model: nn.Module) -> None:
    """Give every process rank 0's buffers: BatchNorm's statistics, which each updates by its own batches."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def gather(value: Any) -> list[Any]:
    """The values (plain, picklable) of all processes, by rank."""
    if not dist.is_initialized():
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def my_share(items: list) -> list:
    """Every world_size-th item, beginning with the rank-th: no item twice, none left out."""
    return items[rank() :: world_size()]


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel when there are several processes, else the model itself."""
    if not dist.is_initialized():
        return model
    for parameter in model.parameters():
        if 1 in parameter.shape and parameter.requires_grad:
            # Strides of an axis of length 1 mean nothing, and gradients come with others than DDP's buffers
            # have, of which it warns.
            parameter.register_hook(partial(_with_strides, parameter.stride()))
    return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def _with_strides(strides: tuple[int, ...], grad: torch.Tensor) -> torch.Tensor:
    """The gradient with these strides where they differ along axes of length 1 only, else as it is."""
    pairs = zip(grad.shape, grad.stride(), strides, strict=True)
    same = all(has == wanted for size, has, wanted in pairs if size > 1)
    return grad.as_strided(grad.shape, strides) if same else grad


def no_sync(model: nn.Module, quiet: bool) -> AbstractContextManager:
    """While `quiet`, a DistributedDataParallel does not send its gradients: more will be added to them."""
    if quiet and isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def make_loader(
    dataset: Dataset, batch_size: int, *, seed: int, workers: int, device: torch.device
) -> DataLoader:
    """Training batches in the order of its `EpochSampler`; call `loader.sampler.start` before each epoch."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=EpochSampler(len(dataset), batch_size, seed),  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=faults.start_worker,
        generator=torch.Generator(),  # its own: else every new iterator moves the global random state
    )


class EpochSampler(Sampler[tuple[int, int]]):
    """Shuffled (index, augmentation seed) pairs, a pure function of (seed, epoch, position).

    So augmentation does not depend on the number of workers, and a run resumed in the middle of an epoch sees
    exactly the batches that were still to come. The global batch number b is made of the same indices
    whatever the number of processes: rank r takes its r-th part.

    Args:
        size: number of training items.
        batch_size: number of items in a batch of one process.

    Raises:
        ValueError: fewer items than one global batch.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        global_batch = batch_size * world_size()
        if size < global_batch:
            per_process = f"{batch_size} x {world_size()} processes" if world_size() > 1 else f"{batch_size}"
            largest = size // world_size()
            advice = (
                f"use --batch_size {largest} or less" if largest else "add cases or start fewer processes"
            )
            raise ValueError(f"a batch of {per_process} is larger than the training set of {size}; {advice}")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.num_batches = size // global_batch  # the rest is left out, other items in each epoch
        self.epoch, self.first_batch = 0, 0

    def start(self, epoch: int, first_batch: int = 0) -> None:
        """Set which epoch comes next and how many of its batches are already done."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        return (self.num_batches - self.first_batch) * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator)
        seeds = torch.randint(2**31, (self.size,), generator=generator)
        for batch in range(self.first_batch, self.num_batches):
            start = (batch * world_size() + rank()) * self.batch_size
            for position in range(start, start + self.batch_size):
                yield int(order[position]), int(seeds[position])
