"""common/mit.py: the encoder against sums that are written out, its sizes and its start."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from common.mit import BACKBONES, Attention, Block, MixTransformer


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomised(network, seed=1):
    """All parameters and running statistics of noticeable size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=generator)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2, generator=generator)
    return network


@pytest.mark.parametrize(
    "backbone, encoder, tensors",
    [("tiny", 1_961_728, 136), ("b0", 3_319_392, 176), ("b1", 13_151_424, 176), ("b2", 24_196_288, 332)],
)
def test_parameters_of_the_encoder(backbone, encoder, tensors):
    with FakeTensorMode():
        parameters = list(MixTransformer(backbone).parameters())
    assert (sum(p.numel() for p in parameters), len(parameters)) == (encoder, tensors)


def test_attention_by_hand():
    """Two heads of three channels, keys on a grid half as fine, against sums written out."""
    torch.manual_seed(0)
    attention = randomised(Attention(6, heads=2, reduction=2)).double()
    x = noise(1, 4 * 5, 6).double()
    result, product = attention(x, (4, 5), hand_out=True)
    coarse = attention.sr(x.view(1, 4, 5, 6).permute(0, 3, 1, 2))  # the odd column at the end is left out
    assert coarse.shape[2:] == (2, 2)
    coarse = attention.norm(coarse.permute(0, 2, 3, 1).reshape(4, 6))
    query, key_value = attention.q(x[0]), attention.kv(coarse)
    heads = []
    for head in range(2):
        q, k, v = (part[:, 3 * head : 3 * head + 3] for part in (query, key_value[:, :6], key_value[:, 6:]))
        raw = torch.tensor([[(q[i] @ k[j]).item() for j in range(4)] for i in range(20)]).double()
        torch.testing.assert_close(product[0, head].double(), raw, rtol=1e-5, atol=1e-5)
        weights = (raw / 3**0.5).exp()
        heads.append(weights / weights.sum(1, keepdim=True) @ v)
    torch.testing.assert_close(result[0], attention.proj(torch.cat(heads, dim=1)), rtol=1e-5, atol=1e-5)
    silent, nothing = attention(x, (4, 5), hand_out=False)
    assert nothing is None
    torch.testing.assert_close(silent, result, rtol=1e-5, atol=1e-5)


def test_two_epsilons_of_layer_norm():
    for name, module in MixTransformer("tiny").named_modules():
        if isinstance(module, nn.LayerNorm):
            of_keys_or_patches = name.endswith("attn.norm") or name.startswith("patch_embed")
            assert module.eps == (1e-5 if of_keys_or_patches else 1e-6), name


def test_random_start():
    torch.manual_seed(0)
    state = MixTransformer("b0").state_dict()
    assert state["block4.0.mlp.fc1.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert not state["block4.0.mlp.fc1.bias"].any()
    assert state["patch_embed3.proj.weight"].std() == pytest.approx((2 / (9 * 160)) ** 0.5, rel=0.02)
    assert state["block4.1.mlp.dwconv.dwconv.weight"].std() == pytest.approx((2 / 9) ** 0.5, rel=0.03)


def test_drop_path():
    encoder = MixTransformer("b1", drop_path=0.1)
    rates = [m.drop_path for m in encoder.modules() if isinstance(m, Block)]
    assert rates == pytest.approx([0.1 * i / 7 for i in range(8)])
    block = Block(4, heads=1, reduction=1, drop_path=0.25)
    torch.manual_seed(0)
    dropped = block._dropped(torch.ones(4000, 2, 4))
    values = dropped[:, 0, 0]
    assert torch.equal(dropped, values[:, None, None].expand_as(dropped)), "a whole image or nothing"
    assert sorted(set(values.tolist())) == pytest.approx([0, 4 / 3])
    assert values.mean() == pytest.approx(1, abs=0.03)
    assert torch.equal(block.eval()._dropped(torch.ones(9, 2, 4)), torch.ones(9, 2, 4))


def test_only_the_last_two_blocks_hand_out_attention(monkeypatch):
    monkeypatch.setitem(BACKBONES, "tiny", BACKBONES["tiny"]._replace(depths=(1, 1, 2, 4)))
    calls = []

    def run(block, *inputs):
        calls.append(block(*inputs)[1])
        return block(*inputs)

    with torch.no_grad():
        _, products = MixTransformer("tiny").eval()(noise(1, 3, 32, 32), run)
    assert [product is None for product in calls] == [True] * 6 + [False] * 2
    assert all(torch.equal(a, b) for a, b in zip(products, calls[-2:], strict=True))
