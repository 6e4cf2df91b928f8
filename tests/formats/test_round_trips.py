"""Every config that can be built goes out and comes back with equal numbers, or is refused before anything is written.

What the target library makes of it is compared by the export itself; what tinyclip reads back, here. (ONNX is only
read by onnxruntime, and slow to write: test_onnx.py.)
"""

import math
from pathlib import Path

import pytest
import torch

import tinyclip
from tests.formats.test_export import noise
from tinyclip.formats.export import export
from tinyclip.formats.uniform import is_uniform
from tinyclip.model import CLIP, BlockConfig, CLIPConfig, ImageConfig, TextConfig, initialise
from tinyclip.model_resnet import BottleneckConfig, ResNetConfig
from tinyclip.preprocess import Preprocess
from tinyclip.tokenizer import Tokenizer

WORDS = ["a red star", "two blue hearts"] * 2


def blocks(*sizes: tuple[int, int]) -> tuple[BlockConfig, ...]:
    return tuple(BlockConfig(heads=heads, ffn=ffn) for heads, ffn in sizes)


def vit(width, head_dim, sizes, image_size, patch_size) -> ImageConfig:
    return ImageConfig(
        width=width, head_dim=head_dim, blocks=blocks(*sizes), image_size=image_size, patch_size=patch_size
    )


def resnet(*layers, cut=False) -> ResNetConfig:
    stock = ResNetConfig.uniform(image_size=32, width=2, layers=layers, head_dim=8)
    narrow = ((BottleneckConfig(conv1=1, conv2=2),), *stock.stages[1:])
    return stock.model_copy(update={"stages": narrow}) if cut else stock


def text(width, head_dim, sizes) -> TextConfig:  # vocabulary and context length are those of the tokenizer
    return TextConfig(width=width, head_dim=head_dim, blocks=blocks(*sizes), context_length=77, vocab_size=514)


QUICK, GELU = {"activation": "quick_gelu"}, {"activation": "gelu"}
SQUASHED = {"resize": "squash", "interpolation": "bilinear", "mean": (0.1, 0.0, 0.9), "std": (1.0, 0.5, 0.25)}
CONFIGS = {  # image tower, text tower, of the whole, vocabulary and context length, preprocessing, logit_scale
    "one of everything": (vit(1, 1, [(1, 1)], 4, 4), text(1, 1, [(1, 1)]), {"embed_dim": 1, **GELU}, (514, 3), {}, 0.0),
    "an odd grid": (vit(6, 3, [(2, 7)] * 2, 23, 5), text(8, 2, [(4, 9)]), {"embed_dim": 5, **QUICK}, (520, 7), {}, 1.0),
    "another eps": (vit(8, 8, [(1, 33)], 16, 8), text(4, 2, [(2, 3)]), {"embed_dim": 7, "norm_eps": 1e-3, **GELU},
                    (517, 12), SQUASHED, math.log(100)),
    "a scale above 100": (vit(4, 2, [(2, 16)], 9, 4), text(4, 4, [(1, 16)]), {"embed_dim": 4}, (514, 9), {}, 5.0),
    "blocks that differ": (vit(6, 3, [(2, 7), (1, 7)], 9, 4), text(4, 2, [(2, 3)]),
                           {"embed_dim": 3, "norm_eps": 1e-6, **QUICK}, (514, 8), SQUASHED, 5.0),
    "empty blocks": (vit(6, 2, [(0, 0), (3, 0), (0, 5)], 8, 4), text(4, 4, [(0, 0)]), {"embed_dim": 3}, (514, 8), {},
                     2.0),
    "alike and empty": (vit(6, 2, [(0, 4)] * 2, 8, 4), text(4, 4, [(1, 0)] * 2), {"embed_dim": 3}, (514, 8), {}, 2.0),
    "a cut width": (vit(7, 2, [(3, 4)] * 2, 8, 4), text(5, 4, [(1, 4)]), {"embed_dim": 3}, (514, 8), {}, 2.0),
    "a ResNet of another eps": (resnet(1, 1, 1, 1), text(4, 2, [(2, 3)]), {"embed_dim": 3, "norm_eps": 1e-3, **QUICK},
                                (514, 8), SQUASHED, 5.0),
    "a cut ResNet": (resnet(1, 1, 2, 1, cut=True), text(4, 2, [(1, 3)]), {"embed_dim": 3, "norm_eps": 1e-3}, (514, 8),
                     {}, 2.0),
}  # fmt: skip


def build(name: str) -> CLIP:
    image, text, whole, (vocab_size, context_length), reading, logit_scale = CONFIGS[name]
    tokenizer = Tokenizer.train(WORDS, vocab_size=vocab_size, context_length=context_length)
    text = text.model_copy(update={"vocab_size": tokenizer.vocab_size, "context_length": context_length})
    config = CLIPConfig(image=image, text=text, **whole)
    preprocess = Preprocess(size=image.image_size, **reading)
    generator = torch.Generator().manual_seed(0)
    model = initialise(CLIP(config, preprocess=preprocess, tokenizer=tokenizer), generator).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.logit_scale.fill_(logit_scale)
    return model


@torch.no_grad()
def logits(model: CLIP) -> torch.Tensor:
    captions = ["a red star", "Two  blue hearts and more", "x"]
    return model.scale * model.encode_image(noise(), normalize=True) @ model.encode_text(captions, normalize=True).T


@pytest.mark.parametrize("to", ["huggingface", "open_clip", "tinyclip"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_comes_back_or_is_refused(name, to, tmp_path):
    model, said = build(name), []
    if to == "open_clip" and not is_uniform(model.config):
        with pytest.raises(ValueError, match="pad it, or export to huggingface") as error:
            export(model, tmp_path / "out", to=to, say=said.append)
        assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
        assert_padded_comes_back_or_is_refused(model, to, tmp_path / "out")
        return
    result = export(model, tmp_path / "out", to=to, say=said.append)
    assert result["max_difference"] <= 1e-5 and result["max_logit_difference"] <= 1e-5 * model.scale.item()
    back = tinyclip.load(tmp_path / "out")
    assert (back.config, back.preprocess, back.tokenizer) == (model.config, model.preprocess, model.tokenizer)
    above = model.logit_scale > math.log(100) + 1e-6
    assert any("148.41, is above 100" in line for line in said) == bool(above)
    for key, weight in back.state_dict().items():
        expected = torch.tensor(math.log(100)) if key == "logit_scale" and above else model.state_dict()[key]
        assert torch.allclose(weight, expected, rtol=0, atol=2e-6) if above else torch.equal(weight, expected), key
    torch.testing.assert_close(logits(back), logits(model), rtol=1e-5, atol=1e-6 * model.scale.item())


def assert_padded_comes_back_or_is_refused(model: CLIP, to: str, directory: Path) -> None:
    try:
        export(model, directory, to=to, pad=True, say=lambda line: None)
    except ValueError as error:
        assert "tower cannot be padded" in str(error) and "\n" not in str(error)
        assert not list(directory.parent.iterdir())
    else:
        expected = logits(model)
        torch.testing.assert_close(logits(tinyclip.load(directory)), expected, rtol=1e-5, atol=1e-5)
