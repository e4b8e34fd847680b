"""common/mit_weights.py: weights of others loaded whole or not at all, and how they are fetched."""

import re
import sys
import types

import pytest
import torch
from test_mit import noise, randomised
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from common.checkpoints import load_weights
from common.mit import BACKBONES, MixTransformer
from common.mit_weights import backbone_of, encoder_weights, from_hugging_face, load_encoder
from common.wetr import WeTr
from wsss_medical import download_weights


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
        (lambda w: w.pop("block2.0.attn.q.bias"), "block2.0.attn.q.bias is missing"),
        (lambda w: w.update({"block2.5.norm1.bias": torch.zeros(3)}), "block2.5.norm1.bias is new"),
        (lambda w: w.update({"norm4.bias": torch.zeros(7)}), r"norm4.bias has shape \(7,\), not \(192,\)"),
        (lambda w: w.update({"norm4.bias": torch.full((192,), torch.nan)}), "norm4.bias holds NaN.*earlier"),
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
        ValueError, match=r"block4.1.attn.kv.bias is missing, block.3.1.attention.self.key.bias is new"
    ):
        load_weights(MixTransformer("tiny"), weights, "mit.pth")


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
