"""common/optimizers.py: what a name gives, and what does not decay."""

import pytest
import torch
from torch import nn

from common.optimizers import decay_groups, make_optimizer


def network() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 2, 1), nn.InstanceNorm3d(2, affine=True))


def test_norms_and_biases_do_not_decay():
    decaying, others = decay_groups(network(), 0.1)
    assert [p.shape for p in decaying["params"]] == [(2, 1, 1, 1, 1)] and decaying["weight_decay"] == 0.1
    assert [p.shape for p in others["params"]] == [(2,)] * 3 and others["weight_decay"] == 0


@pytest.mark.parametrize("name, kind", [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_optimisers_by_name(name, kind):
    optimizer = make_optimizer(name, decay_groups(network(), 0.1), 0.01, weight_decay=0.5)
    assert type(optimizer) is kind and [g["lr"] for g in optimizer.param_groups] == [0.01, 0.01]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0], "a group's own decay wins"
    if name == "sgd":
        assert all(g["momentum"] == 0.99 and g["nesterov"] for g in optimizer.param_groups)
    (group,) = make_optimizer(name, network().parameters(), 0.01, weight_decay=0.5).param_groups
    assert group["weight_decay"] == 0.5
    with pytest.raises(ValueError, match="unknown optimiser 'lion'; take one of adamw, sgd"):
        make_optimizer("lion", network().parameters(), 0.01)


def test_one_step_of_sgd_by_hand():
    """Nesterov at the first step: gradient + 0.99 x gradient; with decay the gradient is 2 + 0.5 x 1."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = make_optimizer("sgd", [weight], 0.1, weight_decay=0.5)
    (2 * weight).sum().backward()
    optimizer.step()
    assert weight.item() == pytest.approx(1 - 0.1 * (2.5 + 0.99 * 2.5))
