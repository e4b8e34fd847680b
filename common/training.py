"""What every training loop shares: where a run stands and when it ends, and one optimiser update."""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import distributed, faults, runs
from common.checkpoints import load_weights, naming_damage, rng_state, save_checkpoint, set_rng_state
from common.ema import WeightAverage
from common.hardware import peak_memory_mib
from common.tables import append_row
from common.trackers import Trackers


class Run:
    """A training run: its folder and log, where it stands, when it ends. It touches no network and no batch.

    with run:
        while run.next_epoch():
            batches = run.batches(loader)
            while size := run.next_update():  # of so many batches
                for k in range(size):
                    ...  # next(batches), forward, backward
                    run.count(loss)
                optimizer_step(...)
            run.end_epoch(scores, score, network.state_dict())

    Args:
        folder: of the run, new or that of the run that goes on; the same in every process.
        config: flag values as they are used; written to config.yaml and held by every checkpoint.
        flags: flag values as they were given, where --vram may have made less of them.
        parts: {name: object with state_dict(), or None} without which a run cannot go on: model, optimizer,
            scaler, weight average.
        notes: plain values that prediction needs, such as preprocessing and split; held by every checkpoint.
        num_batches: of an epoch, in each process.
        accumulate: batches of an optimiser update.
        epochs, time_budget_s, patience: the run ends after so many epochs, or instead of these after so many
            seconds; and after `patience` epochs without a better score, unless it is 0.
        resumed: a last.pt to go on from; its states are loaded into `parts`.
        resume_words: the command that goes on with this run; None = this script with --resume and last.pt.
        wandb_project: also log to Weights & Biases.
        tensorboard: folder for TensorBoard's curves; None = none.

    Attributes:
        epoch, batch: the epoch under way, and how many of its batches are done.
        counts: {name: number} of this epoch, free for the script; kept when the run stops, emptied when the
            epoch ends.
        stop: whether Ctrl-C or SIGTERM has come to this process, `stop.requested`.
        best, best_epoch: highest score so far (-inf: none) and its epoch (-1: none).
        history: one row for each finished epoch, as in metrics.csv.

    Raises:
        ValueError: it was stopped within an epoch that had another number of batches.
    """

    def __init__(
        self,
        folder: Path,
        config: dict,
        *,
        flags: dict,
        parts: dict[str, Any],
        notes: dict,
        num_batches: int,
        accumulate: int,
        device: torch.device,
        epochs: int,
        time_budget_s: float | None = None,
        patience: int = 0,
        resumed: dict | None = None,
        resume_words: list[str] | None = None,
        wandb_project: str | None = None,
        tensorboard: str | Path | None = None,
    ) -> None:
        self.folder = folder
        self.last, self.best_weights = folder / "weights" / "last.pt", folder / "weights" / "best.pt"
        self.parts, self.device = parts, device
        self.notes = notes | {"config": config, "flags": flags, "epochs": epochs}
        self.accumulate, self.epochs = accumulate, epochs
        self.time_budget_s, self.patience = time_budget_s, patience
        self.resume_command = runs.resume_command(resume_words or [sys.argv[0], "--resume", str(self.last)])
        self.epoch, self.batch, self.loss_sum = 0, 0, 0.0
        self.counts: dict[str, float] = {}
        self.best, self.best_epoch, self.elapsed_s = -math.inf, -1, 0.0
        self.history: list[dict] = []
        if resumed:
            self._restore(resumed, num_batches)
        self.num_batches = num_batches
        self.log = runs.start_log(folder, config, self.history)
        if resumed:
            self.log(f"resumed at epoch {self.epoch}, batch {self.batch}")
            before = resumed.get("epochs")
            if not time_budget_s and before is not None and self.epoch >= before:
                self.log(f"warning: it was over after {before} epochs; now its learning rate jumps up again")
        self.trackers = Trackers(folder, config, self.epoch, self.log, wandb_project, tensorboard)
        self._started = time.perf_counter() - self.elapsed_s
        self._validation_s, self._update_size = 0.0, 0
        self._losses: list[Tensor] = []  # of the update under way, still on their device
        self._bar = tqdm(disable=True)
        self.stop = runs.StopRequest()

    def __enter__(self) -> "Run":
        self.stop.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._bar.close()
        self.stop.__exit__(kind, error, trace)
        self.trackers.close()
        if isinstance(error, Exception):  # neither Ctrl-C nor a stop that saved
            why = faults.sentence(error) or f"{type(error).__name__}: {error}"
            self.log(f"error in epoch {self.epoch}, batch {self.batch + 1}: {why}", show=False)
            if self.last.is_file():
                self.log(f"stopped by an error; {self.last} is whole, go on with: {self.resume_command}")

    @property
    def progress(self) -> float:
        """Share of the epochs, or of the time budget, that is done: 0 to 1, for `learning_rate`."""
        if self.time_budget_s:
            return self.elapsed_s / self.time_budget_s
        return (self.epoch + self.batch / self.num_batches) / self.epochs

    @property
    def is_last_epoch(self) -> bool:
        """Whether the epoch under way is the last, as far as one can tell before it is validated."""
        return self._is_out_of_time() if self.time_budget_s else self.epoch + 1 == self.epochs

    def next_epoch(self) -> bool:
        """Begin the epoch `epoch`; False when the run is over: its length, its time or its patience."""
        self.exit_if_asked()
        if self.time_budget_s:
            is_over = self.elapsed_s >= self.time_budget_s
        else:
            is_over = self.epoch >= self.epochs
        if not is_over and self.patience and self.best_epoch >= 0:
            is_over = self.epoch - 1 - self.best_epoch >= self.patience
            if is_over:
                self.log(f"no better validation score for {self.patience} epochs")
        if is_over:
            distributed.barrier()  # now the others, too, may read what rank 0 has written
            return False
        self._epoch_began, self._wait_s = time.perf_counter(), 0.0
        return True

    def batches(self, loader: DataLoader) -> Iterator:
        """The batches of this epoch that are still to come, with a progress bar; the time that one waits for
        them goes into the epoch's row.

        Args:
            loader: of `distributed.make_loader`.
        """
        loader.sampler.start(self.epoch, self.batch)
        self._bar = tqdm(
            desc=f"epoch {self.epoch}",
            total=self.num_batches,
            initial=self.batch,
            unit="batch",
            leave=False,
            disable=None if distributed.is_main() else True,
        )
        batches = faults.read_batches(loader, loader.num_workers)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._wait_s += time.perf_counter() - began
            if batch is None:
                return
            self._bar.update()
            yield batch

    def next_update(self) -> int:
        """How many batches the next optimiser update has: `accumulate`, or fewer at the end of an epoch.

        0 ends the epoch, or its training for lack of time. Between two updates is the one place where Ctrl-C
        and SIGTERM save last.pt and end the program.
        """
        self.exit_if_asked()
        if self.time_budget_s:
            self.elapsed_s = self._seconds()
        self._update_size = min(self.accumulate, self.num_batches - self.batch)
        if self.batch and self._is_out_of_time():
            self._update_size = 0
        if not self._update_size:
            self._bar.close()
            self._training_ended_s = self._seconds()
        return self._update_size

    def count(self, loss: Tensor) -> None:
        """One more batch is done. The losses of an update are read together: each reading makes a GPU wait.

        Raises:
            ValueError: the loss of a batch of this update is infinite or NaN.
        """
        self._losses.append(loss.detach())
        self.batch += 1
        if len(self._losses) < self._update_size:
            return
        first = self.batch - self._update_size
        for number, value in enumerate(torch.stack(self._losses).tolist(), first + 1):
            if not math.isfinite(value):
                raise ValueError(
                    f"the loss became {value} in epoch {self.epoch}, batch {number}. Try --amp off or a "
                    f"lower --lr; the state after the epoch before is in {self.last}"
                )
            self.loss_sum += value
        self._losses.clear()

    def end_epoch(self, scores: dict, score: float, weights: dict) -> bool:
        """Close an epoch: metrics.csv, last.pt and, if no earlier score was as high, best.pt with `weights`.

        Args:
            scores: numbers for the epoch's row; epoch, training loss, times and memory are added.
            score: higher is better; NaN (not validated) is never the best.

        Returns:
            Whether it is the best so far.
        """
        seconds = time.perf_counter() - self._epoch_began
        self.elapsed_s = self._seconds()
        self._validation_s = self.elapsed_s - self._training_ended_s
        row = {"epoch": self.epoch, "train_loss": self.loss_sum / self.batch} | scores
        row |= {"seconds": seconds, "data_wait": self._wait_s / seconds}
        row["peak_mib"] = peak_memory_mib(self.device)
        score = distributed.from_main(score)  # lest processes disagree by a rounding error on when to end
        is_best = score > self.best
        if is_best:
            self.best, self.best_epoch = score, self.epoch
        self.history.append(row)
        self.epoch, self.batch, self.loss_sum, self.counts = self.epoch + 1, 0, 0.0, {}
        if is_best:
            save_checkpoint(self.best_weights, self.notes | {"model": weights, "history": self.history})
        self.save()
        if distributed.is_main():
            append_row(self.folder / "metrics.csv", row)
        self.trackers.add(row)
        return is_best

    def log_epoch(self, text: str) -> None:
        """Log one line about the epoch that has just ended, with `text` (its scores) in the middle."""
        row = self.history[-1]
        mark = "*" if self.best_epoch == row["epoch"] else " "
        self.log(
            f"epoch {row['epoch']:3d}{mark} loss {row['train_loss']:.4f}  {text}  lr {row['lr']:.1e}  "
            f"{row['seconds']:.1f} s ({100 * row['data_wait']:.0f} % waiting for data)  "
            f"{row['peak_mib']:.0f} MiB peak"
        )

    def best_or_last(self) -> Path:
        """best.pt, or last.pt with a line in the log if no epoch has a score."""
        if self.best_epoch >= 0:
            return self.best_weights
        self.log(f"warning: no validation gave a score, so there is no best.pt: going on with {self.last}")
        return self.last

    def save(self) -> None:
        """Write last.pt, from which a run goes on as if it had never stopped."""
        states = {name: part.state_dict() if part is not None else None for name, part in self.parts.items()}
        position = {name: getattr(self, name) for name in runs.POSITION}
        save_checkpoint(self.last, self.notes | states | {"position": position, "rng": rng_state()})

    def _restore(self, resumed: dict, num_batches: int) -> None:
        position = resumed["position"]
        with naming_damage(f"--resume {self.last}"):
            if position["batch"] and position["num_batches"] != num_batches:
                raise ValueError(
                    f"--resume: it was stopped in an epoch of {position['num_batches']} batches, now there "
                    f"are {num_batches}; give --batch_size and the number of processes that it had"
                )
            for name in runs.POSITION:
                setattr(self, name, position[name])
            for name, part in self.parts.items():
                if isinstance(part, nn.Module):
                    load_weights(part, resumed[name], f"--resume {self.last}")
                elif part is not None:
                    part.load_state_dict(resumed[name])
            set_rng_state(resumed["rng"])

    def _seconds(self) -> float:
        """Since the run began, without pauses; the same in every process if a decision depends on it."""
        seconds = time.perf_counter() - self._started
        return distributed.from_main(seconds) if self.time_budget_s else seconds

    def _is_out_of_time(self) -> bool:
        """Whether a validation as long as the last one would now end after the time budget."""
        if not self.time_budget_s:
            return False
        return self.elapsed_s + self._validation_s >= self.time_budget_s

    def exit_if_asked(self) -> None:
        """After Ctrl-C or SIGTERM in any process: save last.pt and end the program. All have to call it."""
        if not distributed.any_true(self.stop.requested, self.device):
            return
        if self.batch or not self.last.exists():  # else the end of the last epoch has saved it
            self.elapsed_s = time.perf_counter() - self._started
            self.save()
        self.log(f"stopped in epoch {self.epoch}; go on with: {self.resume_command}")
        raise SystemExit(130)


# ---- one optimiser update ----


def optimizer_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    lr: float,
    grad_clip: float = 0.0,
    average: WeightAverage | None = None,
) -> None:
    """New weights from the gradients that `scaler.scale(loss / size).backward()` has summed up.

    Args:
        optimizer: a group of its parameters may have an "lr_scale", by which `lr` is multiplied for it.
        grad_clip: largest norm of the gradient; 0 leaves it as it is.
        average: moving average that follows the new weights.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    scaler.unscale_(optimizer)
    if grad_clip:
        nn.utils.clip_grad_norm_(network.parameters(), grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if average:
        average.update(network)
