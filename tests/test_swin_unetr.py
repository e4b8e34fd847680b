"""common/swin_unetr.py against attention written as loops, and against MONAI's network."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from common.layers import padded_to_multiple
from common.swin_unetr import PatchMerging, SwinUNETR, WindowAttention


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomised(net, seed=0):
    """All parameters of noticeable size, so that none can be wrong without effect."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "table" in name:
                p.normal_(generator=rng)
            elif p.ndim == 1:
                p.add_(0.2 * torch.randn(p.shape, generator=rng))
    return net


def swin(**options):
    torch.manual_seed(0)
    return randomised(SwinUNETR(**{"width": 12} | options))


# ---- parts ----


@pytest.mark.parametrize("width, total", [(12, 4_078_051), (24, 15_702_979), (48, 62_186_659)])
def test_parameter_totals(width, total):
    with torch.device("meta"):
        net = SwinUNETR(width=width)
    assert sum(p.numel() for p in net.parameters()) == total
    assert len(list(net.buffers())) == 0, "neither masks nor indices in the checkpoint"


def attention_by_hand(module, x):
    """Each voxel of a padded, rolled grid with each other one, (D, H, W, C) float64."""
    size, channels, heads = x.shape[:3], x.shape[3], module.heads
    weights = {k: v.double().numpy() for k, v in module.state_dict().items()}
    window = [min(7, s) for s in size]
    shift = [3 if module.shifted and s > 7 else 0 for s in size]
    full = [-(-s // w) * w for s, w in zip(size, window, strict=True)]
    padded = np.zeros((*full, channels))
    padded[: size[0], : size[1], : size[2]] = x

    where = np.array(list(itertools.product(*map(range, full))))  # voxels after the roll
    source = (where + shift) % full  # before it
    of_window = where // window
    within = where % window
    rank = (within[:, 0] * window[1] + within[:, 1]) * window[2] + within[:, 2]
    place = np.stack([rank // 49, rank // 7 % 7, rank % 7], 1)  # in a window that is not clipped
    wrapped = where >= np.array(full) - shift  # came round from the other end

    same = (of_window[:, None] == of_window[None]).all(-1) & (wrapped[:, None] == wrapped[None]).all(-1)
    offset = place[:, None] - place[None] + 6
    bias = weights["bias_table"][(offset[..., 0] * 13 + offset[..., 1]) * 13 + offset[..., 2]]

    values = padded[tuple(source.T)] @ weights["qkv.weight"].T + weights["qkv.bias"]
    query, key, value = values.reshape(len(where), 3, heads, channels // heads).transpose(1, 2, 0, 3)
    result = []
    for head in range(heads):
        scores = query[head] @ key[head].T / np.sqrt(channels // heads) + bias[..., head]
        scores[~same] = -np.inf
        exp = np.exp(scores - scores.max(1, keepdims=True))
        result.append(exp / exp.sum(1, keepdims=True) @ value[head])
    out = np.zeros_like(padded)
    out[tuple(source.T)] = np.concatenate(result, 1) @ weights["proj.weight"].T + weights["proj.bias"]
    return out[: size[0], : size[1], : size[2]]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [(8, 3, 9), (2, 2, 4), (14, 7, 1), (1, 13, 14), (13, 2, 14), (14, 13, 1)])
def test_window_attention_equals_loops(size, shifted):
    torch.manual_seed(1)
    module = randomised(WindowAttention(12, 3, shifted))
    x = noise(2, *size, 12)
    out = module(x)
    assert out.shape == x.shape
    for n in range(2):
        np.testing.assert_allclose(
            out[n].detach(), attention_by_hand(module, x[n].double().numpy()), atol=2e-5
        )


def test_attention_masks_do_not_grow_with_the_image(monkeypatch):
    plain, shapes = torch.nn.functional.scaled_dot_product_attention, []

    def recorded(query, key, value, attn_mask):
        shapes.append(tuple(attn_mask.shape))
        return plain(query, key, value, attn_mask=attn_mask)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", recorded)
    WindowAttention(12, 3, shifted=True)(noise(1, 28, 21, 14, 12))
    assert shapes == [(1, 3, 343, 343)] * 8


@pytest.mark.parametrize(
    ("legacy", "expected"),
    [
        # The value of a voxel is 4 z + 2 y + x. MONAI from 1.5 on takes the corners (z, y, x)
        # 000 100 010 001 110 101 011 111.
        (False, [0, 4, 2, 1, 6, 5, 3, 7]),
        # MONAI before 1.5: 000 100 010 001 101 010 001 111; 110 and 011 are lost.
        (True, [0, 4, 2, 1, 5, 2, 1, 7]),
    ],
)
def test_patch_merging_takes_the_corners_of_a_block_in_the_order_of_monai(legacy, expected):
    merging = PatchMerging(1, swin(legacy_merging=legacy).stages[0][-1].corners)
    merging.reduction, merging.norm = nn.Identity(), nn.Identity()
    block = torch.arange(8.0).view(1, 2, 2, 2, 1)
    assert merging(block).flatten().tolist() == expected
    # Two channels stay together, and every stage merges alike.
    both = torch.stack([block, block + 100], -1).flatten(4)
    assert merging(both).flatten().tolist() == [v + c for v in expected for c in (0, 100)]
    assert len({stage[-1].corners for stage in swin(legacy_merging=legacy).stages}) == 1


# ---- the network ----


@pytest.mark.parametrize("size", [(1, 1, 1), (5, 40, 31), (32, 32, 32)])
def test_any_size(size):
    net = swin(in_channels=2, num_classes=3).train()  # where instance norm refuses a single voxel
    with torch.no_grad():
        logits = net(noise(1, 2, *size))
    assert logits.shape == (1, 3, *size) and logits.isfinite().all()


def test_padding_repeats_the_border_and_is_cut_off_in_place():
    net, image = swin().eval(), noise(1, 1, 30, 33, 31)
    padded, crop = padded_to_multiple(image, 32)
    assert padded.shape == (1, 1, 32, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(image), net(padded)[crop])


def gradients(net, image):
    net.zero_grad()
    logits = net(image)
    (logits * noise(*logits.shape, seed=5)).mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in net.named_parameters()}


def test_checkpointing_changes_memory_and_nothing_else():
    net, image = swin().train(), noise(1, 1, 32, 32, 64)

    results, sizes = [], []
    for net.checkpointing in (True, False):
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            results.append(gradients(net, image))
        sizes.append(sum(kept.values()))
    assert sizes[0] < sizes[1] / 4
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name])
        assert gradient.abs().max() > 0, f"{name} has no gradient"


def test_checkpointing_is_the_default():
    assert SwinUNETR(width=12).checkpointing


def test_images_of_a_batch_do_not_mix():
    net, images = swin().train(), noise(2, 1, 32, 32, 64)
    with torch.no_grad():
        together, alone = net(images), torch.cat([net(images[:1]), net(images[1:])])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # CPUs without bf16 take minutes
def test_runs_in_bf16():
    net, image = swin().train(), noise(1, 1, 32, 32, 64)
    exact = net(image).detach()
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(image)
    logits.float().square().mean().backward()
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).abs().mean() < 0.1 * exact.std()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("width", [0, -12, 20])
def test_wrong_widths_are_refused(width):
    with pytest.raises(ValueError, match=f"width is {width}; take 12, 24, 48"):
        SwinUNETR(width=width)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (1, 2, 32, 32, 32), (1, 1, 0, 32, 32)])
def test_other_images_are_refused(shape):
    with pytest.raises(ValueError, match="the image has shape"):
        swin()(torch.zeros(shape))


# ---- MONAI ----


def from_monai(state):
    """State dict of MONAI's SwinUNETR with our names; the order of the parameters is the same."""
    weights = [v for k, v in state.items() if not k.endswith("relative_position_index")]
    names = SwinUNETR(width=weights[0].shape[0]).state_dict()
    assert [w.shape for w in weights] == [w.shape for w in names.values()]
    return dict(zip(names, weights, strict=True))


def pair(width, **options):
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    theirs = randomised(nets.SwinUNETR(1, 1, feature_size=width))
    ours = SwinUNETR(width=width, **options)
    ours.load_state_dict(from_monai(theirs.state_dict()))
    return ours, theirs


def check_parity(width, size):
    ours, theirs = pair(width)
    image = noise(1, 1, *size)
    padded, crop = padded_to_multiple(image, 32)
    with torch.no_grad():
        logits, expected = ours.eval()(image), theirs.eval()(padded)[crop]
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() < 1e-4


def test_equals_monai():
    check_parity(12, (64, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("width", [12, 24])
@pytest.mark.parametrize("size", [(64, 64, 64), (96, 96, 96), (64, 64, 128), (50, 71, 93)])
def test_equals_monai_in_all_sizes(width, size):
    check_parity(width, size)


def test_gradients_equal_monai():
    ours, theirs = pair(12)
    image = noise(1, 1, 32, 32, 64)
    mine, expected = gradients(ours.train(), image), gradients(theirs.train(), image)
    for (name, gradient), other in zip(mine[1].items(), expected[1].values(), strict=True):
        assert (gradient - other).abs().max() < 5e-4 * other.abs().max() + 1e-8, name


def test_the_installed_monai_has_one_of_the_two_orders_of_merging():
    module = pytest.importorskip("monai.networks.nets.swin_unetr")
    theirs = module.PatchMerging(dim=3)
    image, equal = noise(1, 4, 6, 2, 3), {}
    for legacy in (False, True):
        ours = PatchMerging(3, swin(legacy_merging=legacy).stages[0][-1].corners)
        ours.load_state_dict(theirs.state_dict())
        equal[legacy] = torch.allclose(ours(image), theirs(image), atol=1e-6)
    version = tuple(map(int, pytest.importorskip("monai").__version__.split(".")[:2]))
    assert equal == {False: version >= (1, 5), True: version < (1, 5)}
