"""How much memory a training step will take, found without allocating it, on any machine; and --vram."""

import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from common import distributed
from common.hardware import DTYPES, Precision, choose_precision, describe_device, startup_warnings

MIB = 2**20
# What a card holds besides tensors: the CUDA context (300 to 500 MiB) and workspaces of convolutions.
RESERVED_MIB = 600
META = torch.device("meta")  # PyTorch's device whose tensors have shapes and no data


class _Hollow(Tensor):
    """To autograd and autocast a tensor on the CPU; what it holds is on the device "meta"."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, meta: Tensor) -> "_Hollow":
        hollow = Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device="cpu",
        )
        hollow.meta = meta
        return hollow

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function}: a tensor without data was used outside of StorageCounter")


class StorageCounter(TorchDispatchMode):
    """Sums the bytes of all living storages that operations make, and remembers the peak.

    Args:
        hollow: compute shapes only and allocate nothing; every number read from a tensor is 1. PyTorch's
            FakeTensorMode does so too, with the same sums in float32 and some 3 times slower.

    Raises:
        ValueError: hollow, an operation that changes the shape of a tensor in place, such as `squeeze_`.

    Attributes:
        bytes: alive now.
        peak: the most that were alive at a time.
    """

    def __init__(self, *, hollow: bool) -> None:
        super().__init__()
        self.hollow = hollow
        self.bytes = self.peak = 0
        self._seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.hollow:
            return _map_tensors(self._counted, function(*args, **kwargs))
        schema = function._schema
        if torch.Tag.inplace_view in function.tags:
            raise ValueError(
                f"{schema.name} changes a tensor's shape in place; use {schema.name.rstrip('_')}"
            )
        if schema.is_mutable and schema.name.endswith("_"):
            return args[0] if schema.returns else None  # in place: nothing new; half of all operations
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1  # .item(), as AdamW does with its count of steps

        given: dict[int, _Hollow] = {}

        def emptied(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, _Hollow):
                return tensor.to(META)  # a constant, made before
            given[id(tensor.meta)] = tensor
            return tensor.meta

        def wrapped(tensor: Tensor) -> Tensor:
            return given[id(tensor)] if id(tensor) in given else _Hollow(self._counted(tensor))

        args = _map_tensors(emptied, args)
        kwargs = {key: _map_tensors(emptied, value) for key, value in kwargs.items()}
        makes_new = not given and any(a.name == "device" for a in schema.arguments)
        if makes_new or kwargs.get("device") is not None:
            kwargs["device"] = META
        return _map_tensors(wrapped, function(*args, **kwargs))

    def _counted(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            size = storage.nbytes()
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._release, size)
        return tensor

    def _release(self, size: int) -> None:
        self.bytes -= size


def _map_tensors(function: Callable[[Tensor], Tensor], value):
    """`function` of each tensor in a tensor, list, tuple or something else."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_map_tensors(function, v) for v in value])
    return value


def training_peak_mib(
    make_network: Callable[[], nn.Module],
    loss_function: Callable[..., Tensor],
    image_shape: tuple[int, ...],
    *,
    make_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    dtype: torch.dtype | None = None,
    hollow: bool = True,
) -> float:
    """Peak memory in MiB of a training step: weights, gradients, optimiser state, and the
    activations that are kept or exist for a moment.

    The step runs on tensors which have shapes but no data, as it would on a CPU. Not included: the CUDA
    context (300 to 500 MiB), workspaces of the convolution library and fragmentation; leave a margin of about
    0.5 GiB. AdamW on a card updates all weights together and takes another copy of them. Attention
    (F.scaled_dot_product_attention) is the CPU's here: like CUDA's memory-efficient kernel it keeps no matrix
    of all pairs, but the buffers beside its result, and gradients of a mask, may differ.

    Args:
        make_network: builds the network; called once.
        loss_function: (logits, target) -> scalar.
        image_shape: (N, C, *spatial); the target is (N, *spatial) int64.
        make_optimizer: parameters -> optimiser.
        dtype: of autocast; None for fp32.
        hollow: False really computes the step on the CPU, to check the prediction.
    """
    with StorageCounter(hollow=hollow) as counter:
        network = make_network().train()
        optimizer = make_optimizer(network.parameters())
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # the first makes the optimiser's state
        optimizer.zero_grad(set_to_none=True)

        image = torch.zeros(image_shape)
        target = torch.zeros((image_shape[0], *image_shape[2:]), dtype=torch.long)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits = network(image)
        loss_function(logits, target).backward()
        optimizer.step()
    return counter.peak / MIB


MORE_CHECKPOINTING = {False: (True,), "none": ("high", "all"), "high": ("all",)}  # the cheapest first


@dataclass(frozen=True)
class Plan:
    """What decides the memory of a training step.

    Attributes:
        patch_size: spatial sides of the input.
        accumulate: batches in an update of the weights; the recipe's learning rate fits batch_size *
            accumulate.
        checkpointing: recompute activations instead of keeping them: a bool, or one of the policies "none",
            "high" and "all".
        precision: fp32, bf16 or fp16; "" while it is not chosen.
    """

    patch_size: tuple[int, ...]
    batch_size: int
    accumulate: int
    checkpointing: bool | str
    precision: str = ""

    def __str__(self) -> str:
        sides = "x".join(map(str, self.patch_size))
        recompute = "no checkpointing" if self.checkpointing in (False, "none") else "checkpointing"
        if self.checkpointing in ("high", "all"):
            recompute += f" {self.checkpointing}"
        return f"patch {sides}, batch {self.batch_size} x {self.accumulate}, {recompute}, {self.precision}"


def candidates(wanted: Plan, *, patch_step: int = 16, smallest: int = 48) -> Iterator[Plan]:
    """`wanted` and what to give up for memory, the least loss first.

    Checkpointing costs a second forward pass and nothing else; smaller batches with more accumulation cost
    speed (and, with BatchNorm, statistics of fewer items); only then the patch shrinks, its longest sides
    first, by `patch_step` voxels (0: it stays) and not below `smallest`, or the next multiple of the step (a
    side that is smaller already stays).
    """
    smallest = -(-smallest // patch_step) * patch_step if patch_step else smallest
    patch = wanted.patch_size
    while True:
        batch = wanted.batch_size
        while batch:
            # Rounded up: an update must not see fewer items than the recipe's.
            accumulate = -(-wanted.batch_size * wanted.accumulate // batch)
            plan = replace(wanted, patch_size=patch, batch_size=batch, accumulate=accumulate)
            yield plan
            for policy in MORE_CHECKPOINTING.get(wanted.checkpointing, ()):
                yield replace(plan, checkpointing=policy)
            batch //= 2
        longest = max(patch)
        if longest <= smallest or not patch_step:
            return
        patch = tuple(max(smallest, side - patch_step) if side == longest else side for side in patch)


def fit_plan(
    wanted: Plan, peak_mib: Callable[[Plan], float], vram_gib: float, *, patch_step: int = 16
) -> tuple[Plan, list[tuple[Plan, float]]]:
    """The first of `candidates` that a card of `vram_gib` holds, and [(plan, MiB), ...] of all considered,
    itself as the last.

    Args:
        peak_mib: predicted peak of a training step, e.g. by `training_peak_mib`.
        patch_step: as of `candidates`.

    Raises:
        ValueError: not even the smallest fits.
    """
    limit_mib = vram_gib * 1024 - RESERVED_MIB
    considered: list[tuple[Plan, float]] = []
    for plan in candidates(wanted, patch_step=patch_step):
        considered.append((plan, peak_mib(plan)))
        if considered[-1][1] <= limit_mib:
            return plan, considered
    least = min(considered, key=lambda entry: entry[1])
    raise ValueError(
        f"--vram {vram_gib:g}: even {least[0]} needs {least[1]:.0f} MiB of tensors, more than the "
        f"{limit_mib:.0f} that a card of this size leaves; choose a smaller network or input"
    )


def plan_table(considered: list[tuple[Plan, float]], vram_gib: float) -> str:
    """Lines for the log: what was considered, its predicted MiB, and which was taken (the last)."""
    lines = [f"plan for --vram {vram_gib:g} ({vram_gib * 1024 - RESERVED_MIB:.0f} MiB of tensors):"]
    for plan, mib in considered:
        lines.append(f"  {mib:7.0f} MiB  {plan}")
    lines[-1] += "  <- taken"
    return "\n".join(lines)


def limit_cuda_memory(vram_gib: float, device: torch.device) -> None:
    """Make this process's allocator on a CUDA card refuse more than `vram_gib`; elsewhere nothing."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(vram_gib * 2**30 / total, 1.0), device)


# ---- how a run computes its steps ----


@dataclass(frozen=True)
class StepSetup:
    """Precision and plan of a run, the predicted peak of a step; `lines` say so in its log."""

    precision: Precision
    plan: Plan
    peak_mib: float
    lines: list[str]

    @property
    def config(self) -> dict:
        """The flags as they are used, for config.yaml: what was left open is decided."""
        return {
            "amp": self.precision.amp,
            "batch_size": self.plan.batch_size,
            "accumulate": self.plan.accumulate,
            "checkpointing": self.plan.checkpointing,
        }


def set_up_step(
    network: nn.Module,
    make_network: Callable[[bool], nn.Module],
    loss_function: Callable[..., Tensor],
    wanted: Plan,
    device: torch.device,
    *,
    name: str,
    amp: str,
    resumed: dict | None = None,
    vram_gib: float | None = None,
    patch_step: int = 16,
    channels: int = 1,
    make_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
) -> StepSetup:
    """Choose the precision of a run and, with `vram_gib`, what fits a card; `network` gets its checkpointing.

    Args:
        network: on `device`; a copy of it is timed where only that tells which precision is faster.
        make_network: checkpointing or not -> the same network once more, to predict its memory.
        wanted: what the flags ask for, without a precision.
        name: of the network, for the log.
        amp: value of --amp.
        resumed: checkpoint of the run that goes on: "auto" then means its precision, so that both halves are
            computed in the same one.
        vram_gib, patch_step, make_optimizer: see `fit_plan` and `training_peak_mib`.
        channels: of the network's input.

    Raises:
        ValueError: nothing fits, or `amp` is not for this device.
    """

    def step_once(dtype: torch.dtype | None) -> None:
        copy = deepcopy(network).train()
        image = torch.zeros(wanted.batch_size, channels, *wanted.patch_size, device=device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = copy(image)
        loss_function(logits, torch.zeros_like(image[:, 0], dtype=torch.long)).backward()

    def peak_mib(plan: Plan) -> float:
        return training_peak_mib(
            lambda: make_network(plan.checkpointing),
            loss_function,
            (plan.batch_size, channels, *plan.patch_size),
            make_optimizer=make_optimizer,
            dtype=DTYPES[plan.precision],
        )

    if resumed and amp == "auto":
        amp = resumed["config"].get("amp", amp)
    precision = distributed.on_main(lambda: choose_precision(amp, device, step_once))
    plan = replace(wanted, precision=precision.name)
    if vram_gib:
        plan, considered = fit_plan(plan, peak_mib, vram_gib, patch_step=patch_step)
        limit_cuda_memory(vram_gib, device)
    else:
        considered = [(plan, peak_mib(plan))]
    network.checkpointing = plan.checkpointing
    needed_mib = considered[-1][1]  # the plan that was taken comes last
    num_parameters = sum(p.numel() for p in network.parameters())
    lines = [f"device: {describe_device(device)}; {distributed.world_size()} process(es)"]
    lines += [f"warning: {warning}" for warning in startup_warnings(device, needed_mib)]
    lines.append(f"precision: {precision.name} ({precision.reason})")
    lines.append(f"{name}: {num_parameters:,} parameters; a step will take {needed_mib:.0f} MiB of tensors")
    if vram_gib:
        lines.append(plan_table(considered, vram_gib))
    return StepSetup(precision, plan, needed_mib, lines)
