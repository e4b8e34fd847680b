"""Exponential moving average of a model's weights."""

import torch
from torch import nn


class WeightAverage:
    """Exponential moving average of a model's parameters *and* float buffers.

    Averaging BatchNorm's running statistics as well matters: averaged weights with the live model's
    statistics belong to no model. The decay is ramped, min(decay, (1 + n) / (10 + n)) in the n-th update, so
    that the random initial weights do not linger. Integer buffers are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.num_updates = decay, 0
        self.average = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
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
