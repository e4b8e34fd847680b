"""The network of wsss_medical: its encoder and decoder against plain versions, its loaders, its bad input."""

import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from common.checkpoints import save_checkpoint
from common.hardware import Precision
from common.mit import BACKBONES, Attention, Block, MixTransformer
from common.mit_weights import backbone_of, encoder_weights, from_hugging_face, load_encoder
from common.pretrained import load_exactly
from wsss_medical import download_weights
from wsss_medical.model import ARCHITECTURE, WeTr, get_model, load_trained

CONFIG = {"backbone": "tiny", "num_classes": 2, "pooling": "gmp", "cam_stages": [4], "contrast_weight": 0.0}
CPU = torch.device("cpu")
FULL = Precision("fp32", None, False, "")


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


def tiny(**options):
    torch.manual_seed(0)
    return randomised(WeTr("tiny", **options))


@pytest.fixture(scope="module")
def network():
    """Not to be changed."""
    return tiny().eval()


# ---- sizes and shapes ----


@pytest.mark.parametrize(
    "backbone, encoder, tensors",
    [("tiny", 1_961_728, 136), ("b0", 3_319_392, 176), ("b1", 13_151_424, 176), ("b2", 24_196_288, 332)],
)
def test_parameters_of_the_encoder(backbone, encoder, tensors):
    with FakeTensorMode():
        parameters = list(MixTransformer(backbone).parameters())
    assert (sum(p.numel() for p in parameters), len(parameters)) == (encoder, tensors)


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


# ---- the encoder ----


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
    assert not [name for name, p in network.named_parameters() if p.stride() != p.grad.stride()]


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


# ---- what stands on it ----


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
        cams, output = network.cams(image), network(image)
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


# ---- weights of others ----


def to_hugging_face(weights):
    """The inverse of from_hugging_face, by text replacement."""
    result = {}
    for name, tensor in weights.items():
        if ".attn.kv." in name:
            key, value = tensor.chunk(2)
            result[name.replace("attn.kv", "KEY")], result[name.replace("attn.kv", "VALUE")] = key, value
        else:
            result[name] = tensor

    def renamed(name):
        name = re.sub(r"^norm(\d)", lambda m: f"layer_norm.{int(m[1]) - 1}", name)
        name = re.sub(r"^patch_embed(\d)\.", lambda m: f"patch_embeddings.{int(m[1]) - 1}.", name)
        name = re.sub(r"^(patch_embeddings\.\d)\.norm", r"\1.layer_norm", name)
        name = re.sub(r"^block(\d)", lambda m: f"block.{int(m[1]) - 1}", name)
        for old, new in [
            (".norm1", ".layer_norm_1"), (".norm2", ".layer_norm_2"),
            ("attn.norm", "attention.self.layer_norm"), ("attn.sr", "attention.self.sr"),
            ("attn.q", "attention.self.query"), ("attn.proj", "attention.output.dense"),
            ("KEY", "attention.self.key"), ("VALUE", "attention.self.value"), ("mlp.fc", "mlp.dense"),
        ]:  # fmt: skip
            name = name.replace(old, new)
        return name

    return {renamed(name): tensor for name, tensor in result.items()}


@pytest.mark.parametrize("backbone, theirs, ours", [("b1", 192, 176), ("b2", 364, 332)])
def test_mapping_there_and_back(backbone, theirs, ours):
    with FakeTensorMode():
        shapes = {name: tensor.shape for name, tensor in MixTransformer(backbone).state_dict().items()}
    weights = {name: noise(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    foreign = to_hugging_face(weights)
    assert (len(foreign), len(weights)) == (theirs, ours)
    back = from_hugging_face(foreign)
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    assert backbone_of(back) == backbone


@pytest.fixture(scope="module")
def encoder():
    return randomised(MixTransformer("tiny"), seed=5).state_dict()


@pytest.mark.parametrize(
    "name", ["mit.pth", "pytorch_model.bin", "model.safetensors", "wrapped.pth", "ours.pt", "bare.bin"]
)
def test_load_encoder(tmp_path, encoder, name):
    classifier = {"classifier.weight": torch.zeros(10, 192), "classifier.bias": torch.zeros(10)}
    theirs = to_hugging_face(encoder)
    state = {
        "mit.pth": encoder | {"head.weight": torch.zeros(10, 192)},
        "pytorch_model.bin": {f"segformer.encoder.{k}": v for k, v in theirs.items()} | classifier,
        "model.safetensors": {f"segformer.encoder.{k}": v for k, v in theirs.items()} | classifier,
        "wrapped.pth": {
            "state_dict": {f"module.backbone.{k}": v for k, v in encoder.items()},
            "meta": {"epoch": 3},
        },
        "ours.pt": {"model": {f"encoder.{k}": v for k, v in encoder.items()} | classifier, "config": {}},
        "bare.bin": {f"encoder.{k}": v for k, v in theirs.items()},
    }[name]
    path = tmp_path / name
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors.torch").save_file(
            {k: v.contiguous() for k, v in state.items()}, path
        )
    else:
        torch.save(state, path)
    network = WeTr("tiny")
    (line,) = load_encoder(network, path)
    assert "136 tensors, none missing, none unexpected" in line
    assert ("left out" in line) == (name not in ("wrapped.pth", "bare.bin"))
    loaded = network.encoder.state_dict()
    assert all(torch.equal(loaded[k], encoder[k]) for k in encoder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("block2.0.attn.q.bias"), "missing: block2.0.attn.q.bias"),
        (lambda w: w.update({"block2.5.norm1.bias": torch.zeros(3)}), "unexpected: block2.5.norm1.bias"),
        (lambda w: w.update({"norm4.bias": torch.zeros(7)}), r"norm4.bias \(7,\) instead of \(192,\)"),
    ],
)
def test_load_encoder_is_strict(tmp_path, encoder, change, message):
    weights = dict(encoder)
    change(weights)
    torch.save(weights, tmp_path / "mit.pth")
    network = WeTr("tiny")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=rf"mit.pth: .*{message}"):
        load_encoder(network, tmp_path / "mit.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_half_a_pair_of_keys_and_values_is_missing(encoder):
    theirs = to_hugging_face(encoder)
    del theirs["block.3.1.attention.self.value.bias"]
    weights, _ = encoder_weights(theirs)
    with pytest.raises(
        ValueError, match=r"missing: block4.1.attn.kv.bias; unexpected: block.3.1.attention.self.key"
    ):
        load_exactly(MixTransformer("tiny"), weights)


def test_weights_of_another_backbone(tmp_path):
    torch.save(MixTransformer("b0").state_dict(), tmp_path / "b0.pth")
    with pytest.raises(ValueError, match="It holds MiT-b0: choose --backbone b0"):
        load_encoder(WeTr("tiny"), tmp_path / "b0.pth")


def test_weights_of_something_else(tmp_path):
    torch.save(nn.Conv2d(1, 1, 1).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: .*It holds no MiT encoder"):
        load_encoder(WeTr("tiny"), tmp_path / "other.pth")


@pytest.mark.parametrize("backbone", ["b1", "b2"])
@pytest.mark.parametrize("last_stride", [1, 2])
def test_parity_with_transformers(tmp_path, backbone, last_stride):
    """Hidden states of SegformerModel, and its attention, from a file that it wrote itself."""
    transformers = pytest.importorskip("transformers")
    size, strides = BACKBONES[backbone], [4, 2, 2, last_stride]
    config = transformers.SegformerConfig(
        hidden_sizes=list(size.widths), depths=list(size.depths), num_attention_heads=list(size.heads),
        sr_ratios=list(size.reductions), strides=strides, hidden_dropout_prob=0.0, drop_path_rate=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = randomised(transformers.SegformerModel(config)).eval()
    theirs.save_pretrained(tmp_path)
    network = WeTr(backbone, stride=strides).eval()
    load_encoder(network, tmp_path / "model.safetensors")
    image = noise(1, 3, 96, 128)
    with torch.no_grad():
        expected = theirs(image, output_hidden_states=True, output_attentions=True)
        features, products = network.encoder(image)
        native = [(a - b).abs().max() for a, b in zip(features, expected.hidden_states[-4:], strict=True)]
        for module in network.encoder.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5
        same_eps, products = network.encoder(image)
    for a, b in zip(same_eps, expected.hidden_states[-4:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert max(native) < 5e-5  # theirs has 1e-5 everywhere; values reach 4
    for product, attention in zip(products, expected.attentions[-2:], strict=True):
        torch.testing.assert_close((product * 64**-0.5).softmax(3), attention, rtol=0, atol=1e-5)


# ---- by flag values, and trained ones ----


def test_get_model():
    network = get_model(CONFIG | {"cam_stages": [4, 3], "pooling": "gap", "seg_detach": True})
    assert network.pooling == "gap" and network.seg_detach and network.cam_stages == [4, 3]
    assert not get_model(CONFIG | {"cam_stages": None, "epochs": 3}).aux_classifiers
    assert list(get_model(CONFIG | {"contrast_weight": 0.2}).aux_classifiers) == ["3"]
    assert set(ARCHITECTURE) == set(CONFIG) - {"num_classes"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backbone": "b9"}, "b9"),
        ({"pooling": "max"}, "gmp"),
        ({"cam_stages": [3]}, "take 4"),
        ({"cam_stages": [4, 1]}, "take 4"),
    ],
)
def test_unknown_choices(change, message):
    with pytest.raises(ValueError, match=message):
        get_model(CONFIG | change)


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


def trained(path, **changes):
    network = tiny()
    preprocessing = {"dataset": "LASC", "pixel_mm": 1.25, "step": 1, "channels": ["LGE"]}
    state = {
        "model": network.state_dict(),
        "config": CONFIG,
        "stage": "wsss_medical",
        "preprocessing": preprocessing,
    }
    state |= {"split": {"train": ["a"], "val": ["b"], "test": []}} | changes
    save_checkpoint(path, state)
    return network.eval()


def test_load_trained(tmp_path):
    network = trained(tmp_path / "best.pth")
    model = load_trained(tmp_path / "best.pth", CPU, FULL)
    assert model.config == CONFIG and model.preprocessing["dataset"] == "LASC" and not model.network.training
    image = noise(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.network(image).seg, network(image).seg)


@pytest.mark.parametrize("layout", ["bare", "wrapped", "distributed"])
def test_load_trained_from_weights_of_afa(tmp_path, layout):
    state = tiny(num_classes=21, embedding_dim=64).state_dict()
    if layout == "distributed":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"model": state, "iteration": 8000} if layout == "wrapped" else state, tmp_path / "wetr.pth")
    model = load_trained(tmp_path / "wetr.pth", CPU, FULL)
    assert model.config["backbone"] == "tiny" and model.config["num_classes"] == 21
    assert torch.equal(
        model.network.state_dict()["attn_proj.weight"],
        next(v for k, v in state.items() if "attn_proj.weight" in k),
    )
    assert model.preprocessing["channels"] is None and model.split["train"] == []


def test_checkpoints_of_something_else(tmp_path, encoder):
    trained(tmp_path / "other.pth", stage="lung_tumor")
    with pytest.raises(
        ValueError, match=r"other.pth: not weights of wsss_medical/dist_train.py but of lung_tumor"
    ):
        load_trained(tmp_path / "other.pth", CPU, FULL)
    torch.save(encoder, tmp_path / "mit.pth")
    with pytest.raises(ValueError, match="mit.pth: neither .* an encoder alone is for --pretrained"):
        load_trained(tmp_path / "mit.pth", CPU, FULL)


# ---- download_weights.py ----


def stand_in(monkeypatch, download):
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=download))


@pytest.fixture
def small_b0(monkeypatch):
    """b0 is made as small as tiny, so that nothing large is written."""
    monkeypatch.setitem(BACKBONES, "b0", BACKBONES["tiny"])


def test_download(tmp_path, monkeypatch, capsys, encoder, small_b0):
    def download(repository, name):
        assert (repository, name) == ("nvidia/mit-b0", "pytorch_model.bin")
        torch.save(
            {f"segformer.encoder.{k}": v for k, v in to_hugging_face(encoder).items()}, tmp_path / "cached"
        )
        return str(tmp_path / "cached")

    stand_in(monkeypatch, download)
    command = ["--backbone", "b0", "--out", str(tmp_path / "pretrained")]
    assert download_weights.main(command) == 0
    out = capsys.readouterr().out
    path = tmp_path / "pretrained" / "mit_b0.bin"
    assert f"--backbone b0 --pretrained {path}" in out and "136 tensors" in out
    load_encoder(WeTr("b0"), path)
    stand_in(monkeypatch, lambda *_: pytest.fail("downloaded a second time"))
    assert download_weights.main(command) == 0


def test_download_without_network_or_package(tmp_path, monkeypatch, capsys):
    def fail(repository, name):
        raise ConnectionError("no route to host")

    stand_in(monkeypatch, fail)
    assert download_weights.main(["--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert (
        "no route to host" in out
        and "huggingface.co/nvidia/mit-b1" in out
        and str(tmp_path / "mit_b1.bin") in out
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert download_weights.main(["--out", str(tmp_path)]) == 1
    assert "pip install huggingface_hub" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_download_checks_the_file(tmp_path, capsys):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "mit_b0.bin")
    assert download_weights.main(["--backbone", "b0", "--out", str(tmp_path)]) == 1
    assert "It holds no MiT encoder" in capsys.readouterr().err
