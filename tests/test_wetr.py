"""common/wetr.py: heads and decoder against plain versions, gradients, sizes, images that do not fit."""

import pytest
import torch
import torch.nn.functional as F
from test_mit import noise, randomised
from torch._subclasses.fake_tensor import FakeTensorMode

from common.mit import BACKBONES, Attention
from common.wetr import WeTr


def tiny(**options):
    torch.manual_seed(0)
    return randomised(WeTr("tiny", **options))


@pytest.fixture(scope="module")
def network():
    """Not to be changed."""
    return tiny().eval()


def test_parameters_of_the_network():
    with FakeTensorMode():
        b1, tiny_one = (list(WeTr(name).parameters()) for name in ("b1", "tiny"))
    assert (sum(p.numel() for p in b1), len(b1)) == (13_678_291, 192)
    assert sum(p.numel() for p in tiny_one) == 2_332_627


@pytest.mark.parametrize("backbone", BACKBONES)
def test_sixteen_maps_of_attention(backbone):
    with FakeTensorMode():
        assert WeTr(backbone).attn_proj.weight.shape == (1, 16, 1, 1)


@pytest.mark.parametrize(
    "size, cells, seg",
    [
        ((320, 320), (20, 20), (80, 80)),
        ((224, 224), (14, 14), (56, 56)),
        ((240, 240), (15, 15), (60, 60)),
        ((250, 234), (16, 15), (63, 59)),
        ((32, 33), (2, 3), (8, 9)),
    ],
)
def test_shapes(network, size, cells, seg):
    n = cells[0] * cells[1]
    with torch.no_grad():
        features, _ = network.encoder(noise(1, 3, *size))
        output = network(noise(1, 3, *size))
    assert [f.shape[1] for f in features] == [32, 64, 128, 192]
    assert features[2].shape[2:] == features[3].shape[2:] == cells
    assert output.cls.shape == (1, 1) and output.seg.shape == (1, 2, *seg)
    assert output.attn_pred.shape == (1, n, n)
    assert [a.shape for a in output.attentions] == [(1, 8, n, n)] * 2
    assert output.tokens.shape == (1, 192, *cells) and output.cam.shape == (1, 1, *cells)
    assert output.aux_cls is None and output.aux_cam is None


def test_strides_of_segformer():
    network = WeTr("tiny", stride=(4, 2, 2, 2)).eval()
    assert network(noise(1, 3, 64, 96)).cam.shape == (1, 1, 2, 3)


def test_memory_can_be_planned():
    """common/memory.py runs networks on tensors without content."""
    with FakeTensorMode():
        output = tiny(token_contrast=True).train()(torch.zeros(2, 3, 64, 64))
        (output.seg.mean() + output.cls.mean() + output.attn_pred.mean()).backward()


def test_images_of_a_batch_do_not_meet(network):
    images = noise(2, 3, 48, 64)
    with torch.no_grad():
        both, second = network(images), network(images[1:])
    for field in ("cls", "seg", "attn_pred", "cam"):
        torch.testing.assert_close(getattr(both, field)[1:], getattr(second, field), rtol=1e-4, atol=1e-5)


def test_gradients_lie_in_memory_as_their_weights():
    network = tiny(token_contrast=True)
    output = network(noise(2, 3, 64, 64))
    (output.seg.mean() + output.attn_pred.mean() + output.cls.mean() + output.aux_cls.mean()).backward()
    # Of an axis of length 1 the stride means nothing; `distributed.wrap` makes them equal.
    assert not [
        n for n, p in network.named_parameters() if 1 not in p.shape and p.stride() != p.grad.stride()
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_parameter(checkpointing):
    network = tiny(token_contrast=True, cam_stages=(4, 3, 2), checkpointing=checkpointing).train()
    output = network(noise(2, 3, 64, 64))
    loss = sum(part.square().mean() for part in output if isinstance(part, torch.Tensor))
    loss.backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        network = tiny(checkpointing=checkpointing, drop_path=0.5).train()
        torch.manual_seed(0)
        output = network(noise(2, 3, 64, 64))
        (output.seg.square().mean() + output.attn_pred.mean() + output.cls.sum()).backward()
        gradients.append([p.grad for p in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_decoder_is_the_plain_one(network):
    """Against linear layers, bilinear enlarging, concatenation and a 1 x 1 convolution in that order."""
    features = [
        noise(2, c, *grid, seed=c)
        for c, grid in zip((32, 64, 128, 192), [(13, 15), (7, 8), (4, 4), (4, 4)], strict=True)
    ]
    state = network.decoder.state_dict()
    parts = []
    for i, x in enumerate(features, start=1):
        tokens = (
            x.flatten(2).transpose(1, 2) @ state[f"linear_c{i}.proj.weight"].T
            + state[f"linear_c{i}.proj.bias"]
        )
        image = tokens.transpose(1, 2).reshape(2, 256, *x.shape[2:])
        parts.append(F.interpolate(image, size=(13, 15), mode="bilinear", align_corners=False))
    x = F.conv2d(torch.cat(parts[::-1], dim=1), state["linear_fuse.conv.weight"])
    names = ("running_mean", "running_var", "weight", "bias")
    x = F.batch_norm(x, *(state[f"linear_fuse.bn.{name}"] for name in names))
    expected = F.conv2d(x.relu(), state["linear_pred.weight"], state["linear_pred.bias"])
    with torch.no_grad():
        torch.testing.assert_close(network.decoder(features), expected, rtol=1e-4, atol=1e-4)


def test_affinity_is_the_plain_one(network):
    with torch.no_grad():
        output = network(noise(2, 3, 64, 48))
        attention = torch.cat(output.attentions, dim=1)
        symmetric = attention + attention.transpose(2, 3)
        expected = torch.sigmoid(network.attn_proj(symmetric))[:, 0]
    torch.testing.assert_close(output.attn_pred, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(output.attn_pred, output.attn_pred.transpose(1, 2))
    assert output.attn_pred.dtype == torch.float32 and output.attn_pred.std() > 1e-3


def test_class_logit_and_map():
    image = noise(2, 3, 64, 80)
    weights = tiny().state_dict()
    with torch.no_grad():
        for pooling in ("gap", "gmp"):
            network = WeTr("tiny", pooling=pooling).eval()
            network.load_state_dict(weights)
            output = network(image)
            weight = weights["classifier.weight"][:, :, 0, 0]
            torch.testing.assert_close(
                output.cam, torch.einsum("kc,nchw->nkhw", weight, output.tokens), rtol=1e-4, atol=1e-5
            )
            if pooling == "gap":
                torch.testing.assert_close(output.cls, output.cam.mean((2, 3)), rtol=1e-4, atol=1e-5)
            else:
                expected = output.tokens.flatten(2).max(dim=2).values @ weight.T
                torch.testing.assert_close(output.cls, expected, rtol=1e-4, atol=1e-5)
                assert ((output.cls - output.cam.amax((2, 3))).abs() > 0.1).all()  # not the map's maximum


def test_cam_only_says_the_same_without_the_decoder(network, monkeypatch):
    image = noise(1, 3, 64, 64)
    with torch.no_grad():
        output = network(image)
        monkeypatch.setattr(network.decoder, "forward", lambda features: pytest.fail("the decoder ran"))
        cam, attn_pred, attentions = network.cam_only(image)
    assert torch.equal(cam, output.cam) and torch.equal(attn_pred, output.attn_pred)
    assert all(torch.equal(a, b) for a, b in zip(attentions, output.attentions, strict=True))


def test_attention_of_more_blocks(network, monkeypatch):
    """That of the last two is what the affinity is made of. The two before lie in stage 3, whose keys are
    means over 2 x 2 cells: their queries are averaged likewise, here by hand."""
    image, products = noise(1, 3, 64, 80), []
    forward = Attention.forward

    def kept(self, x, grid, hand_out):
        mixed, product = forward(self, x, grid, hand_out)
        products.append(product)
        return mixed, product

    with torch.no_grad():
        output = network(image)
        monkeypatch.setattr(Attention, "forward", kept)
        found = network.last_attention(image)
    assert [a.shape for a in found] == [(1, 4, 4, 4)] * 2 + [(1, 8, 20, 20)] * 2
    torch.testing.assert_close(found[2:], output.attentions, rtol=1e-4, atol=1e-4)
    assert products[-5] is None, "the fifth last is not handed out"
    queries = products[-4][0, 1].unflatten(0, (4, 5))  # of the second head
    expected = [queries[y : y + 2, x : x + 2].mean((0, 1)) for y in (0, 2) for x in (0, 2)]
    torch.testing.assert_close(found[0][0, 1], torch.stack(expected))


def test_auxiliary_classifiers():
    network = tiny(token_contrast=True).eval()
    assert set(network.state_dict()) - set(tiny().state_dict()) == {"aux_classifiers.3.weight"}
    image = noise(2, 3, 64, 96)
    with torch.no_grad():
        features, _ = network.encoder(image)
    output = network(image)
    weight = network.aux_classifiers["3"].weight[:, :, 0, 0]
    torch.testing.assert_close(output.aux_cls, features[2].amax((2, 3)) @ weight.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        output.aux_cam, torch.einsum("kc,nchw->nkhw", weight, features[2]), rtol=1e-4, atol=1e-5
    )
    assert output.aux_cls.requires_grad and not output.aux_cam.requires_grad and output.cam.requires_grad
    torch.testing.assert_close(
        output.cam, network.classifier(features[3]), rtol=1e-4, atol=1e-5
    )  # not the sum


def test_maps_of_several_stages_are_added_on_the_finest_grid():
    network = tiny(cam_stages=[2, 4, 3], num_classes=3).eval()
    image = noise(1, 3, 80, 64)
    with torch.no_grad():
        features, output = network.encoder(image)[0], network(image)
        cams = [network._cam_of_stage(stage, features) for stage in (4, 3, 2)]
    assert [cam.shape for cam in cams] == [(1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 10, 8)]
    enlarged = [F.interpolate(c, size=(10, 8), mode="bilinear", align_corners=False) for c in cams]
    torch.testing.assert_close(output.cam, sum(enlarged), rtol=1e-4, atol=1e-4)
    assert output.aux_cls.shape == (1, 4)  # two classifiers of two classes
    torch.testing.assert_close(output.aux_cam, cams[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("detached", [False, True])
def test_seg_detach(detached):
    network = tiny(seg_detach=detached)
    network(noise(2, 3, 32, 32)).seg.square().mean().backward()
    assert (network.encoder.patch_embed1.proj.weight.grad is None) == detached
    assert network.decoder.linear_c1["proj"].weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_affinity_stays_float32_in_lower_precision(network, dtype):
    if dtype == torch.float16:
        network = tiny().eval()
        with torch.no_grad():  # queries times keys beyond what float16 holds, 65504
            network.encoder.block4[1].attn.q.weight.mul_(1000)
            network.encoder.block4[1].attn.kv.weight[:192].mul_(100)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        output = network(noise(1, 3, 64, 64))
    assert output.attn_pred.dtype == output.attentions[0].dtype == torch.float32
    assert all(part.isfinite().all() for part in (output.cls, output.seg, output.attn_pred, output.cam))
    assert dtype == torch.bfloat16 or output.attentions[1].abs().max() > 65504


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 1, 64, 64), r"\(1, 1, 64, 64\)"),
        ((3, 64, 64), "shape"),
        ((1, 3, 31, 64), "31 x 64 pixels is too small"),
    ],
)
def test_images_that_do_not_fit(network, shape, message):
    with pytest.raises(ValueError, match=message):
        network(torch.zeros(shape))
