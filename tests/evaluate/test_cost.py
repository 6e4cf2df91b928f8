"""Counting from the config gives the golden numbers, what a built model holds, and what torch's counter counts."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tinyclip.evaluate import cost, describe, size_mb
from tinyclip.model import CLIP, Block, BlockConfig, CLIPConfig, ImageConfig, TextConfig

VIT_MODELS = [
    "TinyCLIP-ViT-39M-16-Text-19M",
    "TinyCLIP-ViT-8M-16-Text-3M",
    "TinyCLIP-ViT-61M-32-Text-29M",
    "TinyCLIP-ViT-40M-32-Text-19M",
    "ViT-B-32",
    "ViT-B-16",
]


def irregular() -> CLIPConfig:
    """Two head sizes, blocks without heads, without neurons and without both, pixels that no patch covers."""

    def blocks(*sizes):
        return tuple(BlockConfig(heads=heads, ffn=ffn) for heads, ffn in sizes)

    return CLIPConfig(
        embed_dim=20,
        image=ImageConfig(width=22, head_dim=6, blocks=blocks((3, 7), (0, 11), (1, 0)), image_size=35, patch_size=8),
        text=TextConfig(width=13, head_dim=4, blocks=blocks((2, 5), (0, 0)), context_length=9, vocab_size=61),
    )


@pytest.mark.parametrize("name", VIT_MODELS)
def test_equal_to_the_golden_zoo(shared, name):
    golden = json.loads((shared / "golden/zoo.json").read_text())["models"][name]
    vision, text = golden["config"]["vision_cfg"], golden["config"]["text_cfg"]
    config = CLIPConfig.uniform(
        embed_dim=golden["config"]["embed_dim"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        image_width=vision["width"],
        image_layers=vision["layers"],
        text_width=text["width"],
        text_layers=text["layers"],
    )
    counted = cost(config)
    assert counted.image_parameters == golden["image_params"]
    assert counted.text_parameters == golden["text_params_excl_token_embedding"]
    assert counted.token_embedding_parameters == golden["token_embedding_params"]
    assert counted.parameters == golden["total_params"]
    assert counted.image_macs == golden["macs_image"]
    assert counted.text_macs == golden["macs_text"]


def test_equal_to_the_parameters_of_the_built_model():
    model, counted = CLIP(irregular()), cost(irregular())
    assert counted.image_parameters == sum(parameter.numel() for parameter in model.image.parameters())
    assert counted.token_embedding_parameters == model.text.token_embedding.weight.numel()
    assert counted.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_equal_to_half_the_flops_that_torch_counts(monkeypatch):
    """Of the whole last block, as others count it; ours computes one token of it."""
    monkeypatch.setattr(Block, "read", lambda self, x_BLD, at_B: self(x_BLD)[:, 0])
    model, counted = CLIP(irregular()), cost(irregular())
    inputs = {"image": torch.zeros(1, 3, 35, 35), "text": torch.zeros(1, 9, dtype=torch.int64)}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for name, macs in {"image": counted.image_macs, "text": counted.text_macs}.items():
            with FlopCounterMode(display=False) as counter:
                model.get_submodule(name)(inputs[name])
            assert counter.get_total_flops() == 2 * macs


def test_size_is_parameters_times_bytes():
    parameters = cost(irregular()).parameters
    assert size_mb(irregular()) == parameters * 4 / 1e6
    assert size_mb(irregular(), bytes_per_parameter=2) == parameters * 2 / 1e6


def test_the_description_is_json_and_goes_layer_by_layer():
    description = json.loads(json.dumps(describe(irregular())))
    assert description["image_heads"] == [3, 0, 1] and description["image_ffn"] == [7, 11, 0]
    assert description["text_heads"] == [2, 0] and description["text_ffn"] == [5, 0]
    assert description["parameters"] == cost(irregular()).parameters
