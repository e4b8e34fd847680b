"""Exponential moving average of a model's weights."""

import torch
from torch import nn


class WeightAverage:
    """Exponential moving average of a model's parameters *and* float buffers.

    BatchNorm's running statistics are averaged too, because those of the model under training do not fit
    averaged weights. The decay of the n-th update is min(decay, (1 + n) / (10 + n)), so that the random
    initial weights are soon forgotten. Integer buffers are copied.

    Args:
        decay: share of the old average that stays in an update, such as 0.999.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.num_updates = decay, 0
        self.average = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Let the average follow the model's present weights; called after each update of the weights."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, value in model.state_dict().items():
            if value.dtype.is_floating_point:
                self.average[name].lerp_(value, 1 - decay)
            else:
                self.average[name].copy_(value)

    def state_dict(self) -> dict:
        return {"average": self.average, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict) -> None:
        self.num_updates = state["num_updates"]
        for name, value in state["average"].items():
            self.average[name].copy_(value)
