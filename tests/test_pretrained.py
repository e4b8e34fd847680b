"""common/pretrained.py: what it reads and what it refuses."""

import pytest
import torch
from torch import nn

from common.pretrained import first_names, read_weights


@pytest.fixture
def weights():
    return nn.Linear(3, 2).state_dict()


def same(found, weights):
    return found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"model": w, "config": {"lr": 0.1}},
        lambda w: {"state_dict": {f"module.{name}": tensor for name, tensor in w.items()}},
        lambda w: {f"_orig_mod.module.{name}": tensor for name, tensor in w.items()},
        lambda w: {"model": {"state_dict": w}, "epoch": 3},
        lambda w: w | {"version": 2},
    ],
)
def test_layouts(tmp_path, weights, wrap):
    torch.save(wrap(weights), tmp_path / "a.pth")
    assert same(read_weights(tmp_path / "a.pth"), weights)


def test_safetensors(tmp_path, weights):
    pytest.importorskip("safetensors.torch").save_file(weights, tmp_path / "a.safetensors")
    assert same(read_weights(tmp_path / "a.safetensors"), weights)
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="a.safetensors: not a readable .safetensors"):
        read_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["no.pth", "no.safetensors"])
def test_no_such_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        read_weights(tmp_path / name)


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_no_code_is_run(tmp_path, capsys):
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="refused"):
        read_weights(tmp_path / "evil.pth")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [{"epoch": 3}, {"model": {}}, [torch.zeros(2)], torch.zeros(2)])
def test_no_weights(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth: holds no weights by name"):
        read_weights(tmp_path / "a.pth")


def test_holders_that_go_round_in_a_circle(tmp_path):
    content = {"state_dict": {"epoch": 3}}
    content["state_dict"]["model"] = content
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth: holds no weights by name"):
        read_weights(tmp_path / "a.pth")


def test_first_names():
    assert first_names(["a", "b", "c"]) == "a, b, c"
    assert first_names(list("abcde")) == "a, b, c and 2 more"
