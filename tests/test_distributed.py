"""common/distributed.py: no-ops alone, shares and batches of several processes, a real run of two."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from common import checkpoints, distributed, runs
from common.distributed import EpochSampler
from common.losses import balanced_cross_entropy, dice_loss

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def as_rank(monkeypatch):
    """as_rank(r, n): from now on this process believes to be number r of n."""

    def pretend(rank, world_size):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world_size)

    return pretend


# ---- alone ----


def test_alone_everything_is_a_no_op(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    distributed.init()
    assert not torch.distributed.is_initialized()
    assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (0, 1, 0)
    assert distributed.is_main()
    tensor = torch.tensor([1.0, 2.0])
    assert distributed.all_sum(tensor) is tensor and tensor.tolist() == [1.0, 2.0]
    assert distributed.any_true(True, CPU) is True and distributed.any_true(False, CPU) is False
    value = object()
    assert distributed.from_main(value) is value
    assert distributed.gather(value) == [value]
    calls = []
    assert distributed.on_main(lambda: calls.append(1) or "made") == "made"
    assert distributed.main_first(lambda: calls.append(2) or "made") == "made"
    assert calls == [1, 2]
    items = ["a", "b"]
    assert distributed.my_share(items) == items
    model = nn.Linear(1, 1)
    assert distributed.wrap(model, CPU) is model
    distributed.barrier()
    distributed.shutdown()


def test_init_needs_both_variables(monkeypatch):
    monkeypatch.setenv("RANK", "0")  # as some schedulers set it
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed.init()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_my_share_covers_all_exactly_once(as_rank, world_size):
    for items in ([], ["a"], list(range(4)), list(range(11))):
        shares = []
        for rank in range(world_size):
            as_rank(rank, world_size)
            shares.append(distributed.my_share(items))
        assert sorted(sum(shares, [])) == items
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


# ---- sampler ----


def drawn(sampler, epoch, first_batch=0):
    sampler.start(epoch, first_batch)
    items = list(sampler)
    assert len(items) == len(sampler)
    return items


def test_sampler_is_a_function_of_seed_and_epoch():
    sampler = EpochSampler(20, 4, seed=7)
    first = drawn(sampler, 3)
    assert sorted(index for index, _ in first) == list(range(20))
    torch.manual_seed(99)  # the global generator has no part in it
    assert drawn(EpochSampler(20, 4, seed=7), 3) == first
    others = [drawn(sampler, 4), drawn(sampler, 0), drawn(EpochSampler(20, 4, seed=8), 3)]
    for other in others:
        assert [i for i, _ in other] != [i for i, _ in first]
        assert not {s for _, s in other} & {s for _, s in first}  # other augmentation of each item, too
    # Nor may the next epoch of one seed be this epoch of the next seed, as with seed + epoch.
    assert others[0] != others[2]


def test_sampler_augments_each_item_differently():
    seeds = [seed for _, seed in drawn(EpochSampler(100, 10, seed=0), 0)]
    assert len(set(seeds)) == 100 and all(0 <= seed < 2**31 for seed in seeds)


def test_sampler_leaves_out_an_incomplete_batch_each_epoch_another():
    sampler = EpochSampler(11, 4, seed=0)
    left_out = set()
    for epoch in range(20):
        indices = [i for i, _ in drawn(sampler, epoch)]
        assert len(set(indices)) == len(indices) == 8 == sampler.num_batches * 4
        left_out |= set(range(11)) - set(indices)
    assert left_out == set(range(11))


def test_sampler_resumed_in_the_middle_gives_exactly_the_rest():
    whole = drawn(EpochSampler(22, 4, seed=1), epoch=2)
    for first_batch in range(6):
        assert drawn(EpochSampler(22, 4, seed=1), 2, first_batch) == whole[first_batch * 4 :]
    sampler = EpochSampler(22, 4, seed=1)
    drawn(sampler, 2, 3)
    assert len(drawn(sampler, 3)) == len(whole)  # the next epoch is whole again


@pytest.mark.parametrize("world_size, batch_size", [(2, 2), (4, 1), (2, 3)])
def test_sampler_ranks_together_draw_the_batches_of_one_process(as_rank, world_size, batch_size):
    global_batch = world_size * batch_size
    alone = drawn(EpochSampler(27, global_batch, seed=3), epoch=5)
    shares = []
    for rank in range(world_size):
        as_rank(rank, world_size)
        shares.append(drawn(EpochSampler(27, batch_size, seed=3), epoch=5))
    together = []
    for batch in range(27 // global_batch):
        for share in shares:
            together += share[batch * batch_size : (batch + 1) * batch_size]
    assert together == alone


def test_sampler_refuses_a_batch_larger_than_the_set(as_rank):
    with pytest.raises(
        ValueError, match="a batch of 8 is larger than the training set of 5; use --batch_size 5 or"
    ):
        EpochSampler(5, 8, seed=0)
    as_rank(1, 2)
    with pytest.raises(
        ValueError, match="a batch of 3 x 2 processes is .* set of 5; use --batch_size 2 or less"
    ):
        EpochSampler(5, 3, seed=0)
    assert EpochSampler(5, 2, seed=0).num_batches == 1  # the advice holds
    with pytest.raises(ValueError, match="set of 1; add cases or start fewer processes"):
        EpochSampler(1, 1, seed=0)
    as_rank(0, 1)
    with pytest.raises(ValueError, match="set of 0; add cases"):
        EpochSampler(0, 1, seed=0)


def test_sampler_in_a_loader_does_not_depend_on_the_number_of_workers():
    class Echo(Dataset):
        def __getitem__(self, item):
            return item[0], item[1]

    sampler = EpochSampler(10, 2, seed=0)
    sampler.start(1, 2)
    epochs = [
        [torch.stack(batch, 1).tolist() for batch in DataLoader(Echo(), 2, sampler=sampler, num_workers=n)]
        for n in (0, 2)
    ]
    assert epochs[0] == epochs[1] and len(epochs[0]) == 3
    assert [list(pair) for pair in sampler] == sum(epochs[0], [])


def test_a_loader_leaves_the_global_random_state_alone():
    """Else a run resumed within an epoch, which makes one iterator more, would go on with other numbers."""
    loader = distributed.make_loader([0] * 4, 2, seed=0, workers=0, device=CPU)
    before = torch.get_rng_state()
    iter(loader)
    assert torch.equal(torch.get_rng_state(), before)


class Signalled(Dataset):
    """A worker that gets the signals which reach all processes of a terminal or of a scheduler's job."""

    def __len__(self):
        return 4

    def __getitem__(self, item):
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        return item[0]


def test_data_workers_leave_signals_to_the_main_process():
    """They must go on until the main process has saved its state."""
    loader = distributed.make_loader(Signalled(), 1, seed=0, workers=2, device=CPU)
    loader.sampler.start(0)
    assert sorted(torch.cat(list(loader)).tolist()) == [0, 1, 2, 3]


def test_buffers_become_those_of_rank_0(monkeypatch):
    """BatchNorm's statistics and count, whatever this process has seen."""
    first, own = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    first(torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0)))
    values = {buffer: value for buffer, value in zip(own.buffers(), first.buffers(), strict=True)}
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "broadcast", lambda buffer, src: buffer.copy_(values[buffer]))
    distributed.share_buffers(own)
    for buffer, value in values.items():
        torch.testing.assert_close(buffer, value, rtol=0, atol=0)


# ---- gradients ----


def small_net():
    """Convolutions and GroupNorm: no layer mixes the images of a batch."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)
    )


def small_batch():
    """Images (4, 1, 12, 12) and targets (4, 12, 12), the last one without foreground."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(4, 1, 12, 12, generator=generator)
    target = torch.randint(3, (4, 12, 12), generator=generator)
    target[1, 3:] = 0
    target[3] = 0
    return image, target


def loss_of(model, image, target):
    logits = model(image)
    return dice_loss(logits, target) + balanced_cross_entropy(logits, target)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def gradients_of_whole_batch():
    model = small_net()
    loss_of(model, *small_batch()).backward()
    return gradients(model)


@pytest.mark.parametrize("size", [1, 2])
def test_accumulated_micro_batches_give_the_gradients_of_the_whole(size):
    model, (image, target) = small_net(), small_batch()
    for start in range(0, 4, size):
        part = slice(start, start + size)
        (loss_of(model, image[part], target[part]) / (4 // size)).backward()
    expected = gradients_of_whole_batch()
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(gradients(model), expected, atol=1e-6, rtol=0)


# ---- two processes ----

SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from test_distributed import in_each_process
in_each_process(sys.argv[1])
"""


def in_each_process(folder):
    """What torchrun starts twice; rank 0 writes what all ranks saw to facts.json."""
    distributed.init()
    rank, folder = distributed.rank(), Path(folder)
    seen = {"rank": rank, "world_size": distributed.world_size(), "local_rank": distributed.local_rank()}
    seen["is_main"] = distributed.is_main()

    tensor = torch.tensor([1.0 + rank, 10.0])
    seen["all_sum_in_place"] = distributed.all_sum(tensor) is tensor
    seen["all_sum"] = tensor.tolist()
    seen["any_true"] = [distributed.any_true(flag, CPU) for flag in (rank == 0, rank == 1, True, False)]
    seen["from_main"] = distributed.from_main({"of": rank, "list": [rank]})
    seen["on_main"] = distributed.on_main(lambda: f"made by {rank}")
    seen["gather"] = distributed.gather([rank, "x"])
    seen["my_share"] = distributed.my_share(list(range(5)))

    def make():
        """Whether the file was there already; rank 0 is slow, so that the other one must have waited."""
        existed = (folder / "converted").exists()
        if rank == 0:
            time.sleep(0.3)
        (folder / "converted").touch()
        return existed

    seen["main_first"] = distributed.main_first(make)
    sampler = EpochSampler(9, 2, seed=4)
    sampler.start(1)
    seen["sampler"] = [index for index, _ in sampler]

    image, target = small_batch()
    seen["gradients"] = []
    for size in (2, 1):  # a batch of 2, then two of 1 accumulated
        net = small_net()
        model = distributed.wrap(net, CPU)
        seen["wrapped"] = type(model).__name__
        for number in range(2 // size):
            part = slice(2 * rank + number * size, 2 * rank + (number + 1) * size)
            with distributed.no_sync(model, (number + 1) * size < 2):
                (loss_of(model, image[part], target[part]) / (2 // size)).backward()
        seen["gradients"].append(gradients(net).tolist())
    # In bf16 gradients of a 1x1x1 kernel come with other strides than the kernel, of which DDP warns.
    conv = torch.nn.Conv3d(4, 2, 1)
    image = torch.ones(1, 4, 3, 3, 3).contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", torch.bfloat16):
        scores = distributed.wrap(conv, CPU)(image)
    scores.float().square().sum().backward()
    seen["strides"] = [conv.weight.grad.stride(), conv.weight.stride()]

    log = runs.start_log(folder / "run", {}, [])
    log(f"written by {rank}")
    checkpoints.save_checkpoint(folder / f"of_rank{rank}.pt", {"model": {}, "config": {}})
    distributed.barrier()
    everyone = distributed.gather(seen)
    if distributed.is_main():
        (folder / "facts.json").write_text(json.dumps(everyone))
    distributed.shutdown()
    assert not torch.distributed.is_initialized() and distributed.world_size() == 1


def torchrun(script, *words, processes=2):
    """Run a script in several processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes]
    command += ["--master_addr", "127.0.0.1", "--master_port", port, script, *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_under_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(paths=[str(ROOT), str(ROOT / "tests")]))
    done = torchrun(script, tmp_path)
    assert done.returncode == 0, done.stderr
    both = json.loads((tmp_path / "facts.json").read_text())
    for rank, seen in enumerate(both):
        assert (seen["rank"], seen["local_rank"], seen["world_size"]) == (rank, rank, 2)
        assert seen["is_main"] is (rank == 0)
        assert seen["all_sum_in_place"] and seen["all_sum"] == [3.0, 20.0]
        assert seen["any_true"] == [True, True, True, False]
        assert seen["from_main"] == {"of": 0, "list": [0]}
        assert seen["on_main"] == "made by 0"
        assert seen["gather"] == [[0, "x"], [1, "x"]]
        assert seen["my_share"] == [[0, 2, 4], [1, 3]][rank]
        assert seen["main_first"] is (rank == 1)
        assert seen["wrapped"] == "DistributedDataParallel"
        assert seen["strides"][0] == seen["strides"][1]
        for of_rank in seen["gradients"]:
            torch.testing.assert_close(torch.tensor(of_rank), gradients_of_whole_batch(), atol=1e-6, rtol=0)
    sampler = EpochSampler(9, 4, seed=4)
    sampler.start(1)
    alone = [index for index, _ in sampler]
    first, second = both[0]["sampler"], both[1]["sampler"]
    assert first[:2] + second[:2] + first[2:] + second[2:] == alone
    assert (tmp_path / "of_rank0.pt").exists() and not (tmp_path / "of_rank1.pt").exists()
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "written by 0" in log and "written by 1" not in log and log.count("commit: ") == 1


# ---- session ----


def test_what_fails_on_rank_0_ends_the_others_without_a_word(as_rank, monkeypatch):
    """Else they would wait, and tell of a lost connection."""

    def no_label():
        raise ValueError("no label")

    monkeypatch.setattr(distributed, "from_main", lambda value: (None, True))  # as broadcast by rank 0
    for call in (distributed.on_main, distributed.main_first):
        as_rank(1, 2)
        with pytest.raises(SystemExit) as ended:
            call(lambda: pytest.fail("called on rank 1"))
        assert ended.value.code == 1
        as_rank(0, 2)
        with pytest.raises(ValueError, match="no label"):
            call(no_label)


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("case 7: no label"), "error: case 7: no label"),
        (FileNotFoundError("data: no such folder"), "error: data: no such folder"),
        (
            torch.OutOfMemoryError("tried 2 GiB"),
            "error: out of GPU memory; --device cpu needs none",
        ),
        (
            RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:544] Connection closed by peer [::1]:4711"),
            "error: another process of this run has ended, and its own message says why, or cannot be",
        ),
        (OSError(28, "No space left on device"), "error: No space left on device; make room where"),
    ],
)
def test_a_session_turns_what_a_user_can_mend_into_one_line(error, line, monkeypatch):
    ended = []
    monkeypatch.setattr(distributed, "shutdown", lambda: ended.append(sys.exc_info()[0]))
    with pytest.raises(SystemExit, match=line), distributed.session():
        raise error
    assert ended == [type(error)], "the group is left without waiting for processes that may never come"


def test_a_session_hides_no_mistake_of_the_program(monkeypatch):
    ended = []
    monkeypatch.setattr(distributed, "shutdown", lambda: ended.append(sys.exc_info()[0]))
    with pytest.raises(KeyError), distributed.session():
        raise KeyError("typo")
    with distributed.session():
        pass
    assert ended == [KeyError, None]
