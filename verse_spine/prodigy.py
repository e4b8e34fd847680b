"""The Prodigy optimiser: Adam that finds its own learning rate."""

import math
from collections.abc import Callable

import torch


class Prodigy(torch.optim.Optimizer):
    """Adam whose step size d grows by itself to the estimated distance from the start to the solution.

    `lr` is a factor on d: leave it at 1.0 and let a schedule lower it. Change d_coef for runs that learn too
    slowly or diverge. d is one number for all parameters. A parameter without gradient, and a group whose lr
    is 0, stay as they are in that step.

    Besides weights and gradients it needs 16 bytes for each parameter (start x0, momentum m, second moment v,
    numerator s; Adam needs 8): 0.9 GiB for Swin UNETR with 62 million parameters.

    Args:
        params: parameters or groups of them, all on one device.
        lr: factor on the step size; equal in all groups, or 0.
        betas: decay of m and of v; that of the estimate of d is the root of the second.
        eps: added to the root of v, times d.
        weight_decay: decoupled, as in AdamW; times lr and d.
        d0: first d.
        d_coef: factor on the estimate of d.
        growth_rate: the largest factor by which d grows in one step; 1.02 acts as a warm-up.
        bias_correction: Adam's correction of m and v in the first steps.

    Raises:
        ValueError: an argument out of range; in `step`, different learning rates.

    Source: Mishchenko and Defazio 2024, Prodigy, arXiv:2306.06101, algorithm 4, with the details of its
    authors' package: no factors 1 - beta3 (they cancel), d in eps is the new one, d in the step the old one.
    Differs: d stays on the device (`step` never waits for it), no coupled weight decay.
    """

    def __init__(
        self,
        params,
        lr: float = 1.0,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        bias_correction: bool = False,
    ) -> None:
        for name, value in [("eps", eps), ("d0", d0), ("d_coef", d_coef)]:
            if not value > 0:
                raise ValueError(f"{name} is {value}, must be above 0")
        for name, value in [("lr", lr), ("weight_decay", weight_decay)]:
            if not value >= 0:
                raise ValueError(f"{name} is {value}, must be 0 or more")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}, must be in [0, 1)")
        if not growth_rate > 1:
            raise ValueError(f"growth_rate is {growth_rate}, must be above 1: d could never grow")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.betas, self.eps, self.d0, self.d_coef = betas, eps, d0, d_coef
        self.growth_rate, self.bias_correction = growth_rate, bias_correction
        start = self.param_groups[0]["params"][0].new_tensor(d0)
        # state_dict leaves an entry as it is whose key is not a parameter.
        self.state["all"] = {"d": start, "d_max": start, "numerator": torch.zeros_like(start), "steps": 0}

    @property
    def d(self) -> float:
        """The present step size; reading it waits for the device."""
        return float(self.state["all"]["d"])

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One update; returns what `closure` returns, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        lr = max(group["lr"] for group in self.param_groups)
        if any(group["lr"] not in (0, lr) for group in self.param_groups):
            raise ValueError(
                f"learning rates {[group['lr'] for group in self.param_groups]} differ; Prodigy has one step "
                "size for all groups, set them equal or to 0"
            )
        groups = [group for group in self.param_groups if group["lr"] > 0]
        moving = [(p, g["weight_decay"]) for g in groups for p in g["params"] if p.grad is not None]
        if not moving:
            return loss

        shared = self.state["all"]
        steps = shared["steps"] + 1
        beta1, beta2 = self.betas
        beta3 = math.sqrt(beta2)
        if self.bias_correction:
            lr *= math.sqrt(1 - beta2**steps) / (1 - beta1**steps)
        d = shared["d"].to(moving[0][0].device)  # a loaded checkpoint may lie on the CPU
        step_size = d * lr
        weight = step_size / self.d0  # of this step's gradient in the estimate of d

        dots, sums = [], []
        for p, _ in moving:
            state = self.state[p]
            if not state:
                state["x0"] = p.clone()
                state["m"], state["v"], state["s"] = (torch.zeros_like(p) for _ in range(3))
            grad = p.grad * d
            dots.append(torch.dot(grad.flatten(), (state["x0"] - p).flatten()))
            state["m"].mul_(beta1).add_(grad, alpha=1 - beta1)
            state["v"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            state["s"].mul_(beta3).add_(grad.mul_(weight))
            sums.append(state["s"].abs().sum())

        numerator = beta3 * shared["numerator"].to(d.device) + weight * torch.stack(dots).sum()
        denominator = torch.stack(sums).sum().clamp(min=1e-38)  # all gradients so far can be 0
        estimate = self.d_coef * numerator / denominator
        d_max = torch.maximum(shared["d_max"].to(d.device), estimate)
        # The first growth is not limited, as d0 is not an estimate.
        grown = torch.where(d == self.d0, torch.maximum(d, estimate), d) * self.growth_rate
        d = torch.minimum(d_max, grown)
        # A new dictionary: the old one may also be another optimiser's, which was loaded from this one.
        self.state["all"] = {"d": d, "d_max": d_max, "numerator": numerator, "steps": steps}

        for p, weight_decay in moving:
            state = self.state[p]
            if weight_decay:
                p.sub_(p * (step_size * weight_decay))
            p.sub_((state["m"] / (state["v"].sqrt() + d * self.eps)).mul_(step_size))
        return loss
