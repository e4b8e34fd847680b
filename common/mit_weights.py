"""MiT encoders that others trained on ImageNet, in NVlabs' and in Hugging Face's layout."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from common.checkpoints import load_weights, naming_damage
from common.faults import first_line
from common.files import replacing
from common.mit import BACKBONES
from common.pretrained import first_names, read_weights

PREFIXES = ("backbone.", "segformer.", "encoder.")  # that stand before the names of an encoder's weights
HEADS = ("head.", "classifier.", "decode_head.", "decoder.", "attn_proj.", "aux_classifiers.")  # not its own

# What Hugging Face calls the parts of a patch embedding and of a block, and what the original calls them.
EMBEDDING_PARTS = {"proj": "proj", "layer_norm": "norm"}
BLOCK_PARTS = {
    "layer_norm_1": "norm1",
    "layer_norm_2": "norm2",
    "attention.self.query": "attn.q",
    "attention.self.sr": "attn.sr",
    "attention.self.layer_norm": "attn.norm",
    "attention.output.dense": "attn.proj",
    "mlp.dense1": "mlp.fc1",
    "mlp.dwconv.dwconv": "mlp.dwconv.dwconv",
    "mlp.dense2": "mlp.fc2",
}
KEY, VALUE = "attention.self.key", "attention.self.value"  # one matrix in the original, the key first


def load_encoder(network: nn.Module, path: str | Path) -> list[str]:
    """Load every weight of `network.encoder`, a MixTransformer, from a file; heads in it are left out.

    Args:
        path: see `read_weights`.

    Returns: lines for the log.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, refused, or not exactly the weights of the encoder, as of `load_weights`.
    """
    with naming_damage(str(path)):
        weights, heads = encoder_weights(read_weights(path))
        found = backbone_of(weights)
    try:
        load_weights(network.encoder, weights, str(path))
    except ValueError as error:
        if found and found == backbone_of(network.encoder.state_dict()):
            raise
        advice = f"It holds MiT-{found}: choose --backbone {found}" if found else "It holds no MiT encoder"
        raise ValueError(f"{error}. {advice}") from error
    left_out = f"; not of the encoder and left out: {first_names(heads)}" if heads else ""
    return [f"Encoder from {path}: {len(weights)} tensors, none missing, none unexpected{left_out}"]


def download_encoder(backbone: str, target: Path) -> None:
    """Download nvidia/mit-<backbone> from Hugging Face to the file `target`.

    Raises:
        RuntimeError: huggingface_hub is missing or gave up.
    """
    try:
        from huggingface_hub import hf_hub_download

        found = hf_hub_download(f"nvidia/mit-{backbone}", "pytorch_model.bin")
        with replacing(target) as partial:
            shutil.copyfile(found, partial)
    except Exception as error:  # network, disk, ...: all end in the steps by hand
        cause = first_line(error)
        raise RuntimeError(f"huggingface_hub (pip install huggingface_hub) failed: {cause}") from error


def encoder_weights(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of an encoder, from either layout, under the names of mit.py; and the names of heads."""
    heads = [name for name in weights if name.startswith(HEADS)]
    encoder = {}
    for name in weights.keys() - set(heads):
        bare = name
        for prefix in PREFIXES:
            bare = bare.removeprefix(prefix)
        encoder[bare] = weights[name]
    return from_hugging_face(encoder), heads


def from_hugging_face(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under Hugging Face's names -> under the original's; what is called otherwise keeps its name."""
    result = {}
    for name, tensor in weights.items():
        path, _, kind = name.rpartition(".")  # kind: weight or bias
        first, *place = path.split(".")
        numbers = 2 if first == "block" else 1  # stage from 0, and number of the block
        part = ".".join(place[numbers:])
        stage = int(place[0]) + 1 if place and place[0].isdecimal() else 0
        if first == "layer_norm" and not part:
            name = f"norm{stage}.{kind}"
        elif first == "patch_embeddings" and part in EMBEDDING_PARTS:
            name = f"patch_embed{stage}.{EMBEDDING_PARTS[part]}.{kind}"
        elif first == "block" and part in BLOCK_PARTS:
            name = f"block{stage}.{place[1]}.{BLOCK_PARTS[part]}.{kind}"
        elif first == "block" and part == KEY and name.replace(KEY, VALUE) in weights:
            tensor = torch.cat([tensor, weights[name.replace(KEY, VALUE)]])
            name = f"block{stage}.{place[1]}.attn.kv.{kind}"
        elif first == "block" and part == VALUE and name.replace(VALUE, KEY) in weights:
            continue
        result[name] = tensor
    return result


def backbone_of(weights: Mapping[str, Tensor]) -> str | None:
    """Which of BACKBONES has these weights, under the names of mit.py; None if no one has."""
    embeddings = [weights.get(f"patch_embed{stage}.proj.bias") for stage in "1234"]
    widths = tuple(0 if bias is None else len(bias) for bias in embeddings)
    blocks = [name for name in weights if name.endswith(".norm1.weight")]
    depths = tuple(sum(name.startswith(f"block{stage}.") for name in blocks) for stage in "1234")
    fitting = [name for name, size in BACKBONES.items() if (size.widths, size.depths) == (widths, depths)]
    return fitting[0] if fitting else None
