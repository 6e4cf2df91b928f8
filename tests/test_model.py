"""The towers compute what the reference, open_clip and the formulas say, in float64 and float32."""

import math
import re
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from tests.shrink.test_keep import random_gates, tiny_clip
from tinyclip.formats.open_clip import config_from_open_clip, config_to_open_clip, from_open_clip, to_open_clip
from tinyclip.model import CLIP, MACS_PER_CALL, CLIPConfig, initialise, lengths
from tinyclip.preprocess import Preprocess
from tinyclip.tokenizer import Tokenizer

GOLDEN_VIT = {
    "embed_dim": 20,
    "vision_cfg": {"layers": 3, "width": 48, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"layers": 2, "width": 32, "heads": 4, "context_length": 12, "vocab_size": 61},
}
GOLDEN_MANUAL = {
    "embed_dim": 24,
    "vision_cfg": {"layers": 2, "width": 48, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"layers": 2, "width": 32, "heads": 2, "context_length": 16, "vocab_size": 97},
}
PRECISIONS = [("float64", 1e-10), ("float32", 1e-5)]  # relative to the largest value


def small(**changes) -> CLIPConfig:
    shape = dict(
        embed_dim=12, image_size=16, patch_size=4, image_width=16, image_layers=2, text_width=24, text_layers=3
    )
    return CLIPConfig.uniform(**shape | dict(context_length=9, vocab_size=50, head_dim=8) | changes)


def random_model(config: CLIPConfig, seed: int = 0) -> CLIP:
    """Every parameter away from its initial value, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    model = initialise(CLIP(config), generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def check_features(model: CLIP, golden, inputs: str, features: str, tolerance: float) -> None:
    dtype = model.logit_scale.dtype
    pixels, tokens = golden[f"{inputs}pixels"].to(dtype), golden[f"{inputs}tokens"]
    with torch.no_grad():
        ours = {"image": model.encode_image(pixels), "text": model.encode_text(tokens)}
        unit = dict(zip(("image", "text"), model(pixels, tokens), strict=True))
    for tower in ("image", "text"):
        for got, name in ((ours[tower], f"{tower}_features"), (unit[tower], f"{tower}_features_normalized")):
            expected = golden[f"{features}{name}"]
            assert (got - expected).abs().max() / expected.abs().max() < tolerance, name
    assert abs(model.scale.item() / golden[f"{features}logit_scale_exp"].item() - 1) < max(tolerance, 1e-6)


@pytest.mark.parametrize("precision, tolerance", PRECISIONS)
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_golden_forward(shared, activation, precision, tolerance):
    golden = load_file(shared / "golden" / "forward.safetensors")
    state = {key.removeprefix("vit/state/"): value for key, value in golden.items() if key.startswith("vit/state/")}
    config = config_from_open_clip({**GOLDEN_VIT, "quick_gelu": activation == "quick_gelu"})
    model = from_open_clip(state, config).to(getattr(torch, precision))
    check_features(model, golden, "vit/", f"vit/{activation}/{precision}/", tolerance)


@pytest.mark.parametrize("precision, tolerance", PRECISIONS)
def test_golden_manual_checkpoint(shared, precision, tolerance):
    wrapper = re.compile(r"^(_image_encoder|_text_encoder|_logit_scale)\.module\.")
    weights = load_file(shared / "golden" / "manual_checkpoint.safetensors")
    state = {wrapper.sub("", key): value for key, value in weights.items()}
    model = from_open_clip(state, config_from_open_clip(GOLDEN_MANUAL)).to(getattr(torch, precision))
    expected = load_file(shared / "golden" / "manual_checkpoint_expected.safetensors")
    check_features(model, expected, "", f"expected/{precision}/", tolerance)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "quick_gelu"},
        {"image_size": 48, "patch_size": 16},
        {"image_size": 23, "patch_size": 5},  # 3 pixels at the right and the bottom are read by nobody
        {"head_dim": 4, "image_layers": 1, "vocab_size": 514, "context_length": 33},
    ],
)
def test_towers_equal_open_clip(changes):
    import open_clip

    config = small(**changes)
    ours = random_model(config)
    theirs = open_clip.CLIP(**config_to_open_clip(config)).eval()
    theirs.load_state_dict(to_open_clip(ours))
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, config.image.image_size, config.image.image_size, generator=generator)
    tokens = torch.randint(1, config.text.vocab_size - 1, (3, config.text.context_length), generator=generator)
    tokens[0, 1], tokens[1, 4:], tokens[2, -1] = (config.text.vocab_size - 1,) * 3
    with torch.no_grad():
        for got, expected in zip(ours(pixels, tokens), theirs(pixels, tokens)[:2], strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        image, text = theirs.encode_image(pixels), theirs.encode_text(tokens)
        torch.testing.assert_close(ours.encode_image(pixels), image, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.encode_text(tokens), text, rtol=1e-5, atol=1e-5)


def test_padding_after_the_end_token_changes_nothing():
    model, tokens = random_model(small()), torch.tensor([[48, 3, 7, 49, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(model.encode_text(tokens), model.encode_text(tokens[:, :4]))


def test_uint8_pixels_are_normalised_by_the_models_own_preprocessing():
    model = random_model(small())
    model.preprocess = Preprocess(size=16, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    expected = model.encode_image(model.preprocess.normalise(pixels))
    assert torch.equal(model.encode_image(pixels), expected)
    assert torch.equal(model(pixels, torch.tensor([[48, 49]] * 2))[0], torch.nn.functional.normalize(expected, dim=-1))
    doubled = model.double().encode_image(pixels)
    torch.testing.assert_close(doubled, expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_recomputing_changes_no_gradient(activation):
    model = random_model(small(activation=activation))
    pixels, tokens = torch.randn(2, 3, 16, 16), torch.tensor([[48, 3, 49], [48, 49, 0]])

    def gradients() -> list[torch.Tensor]:
        image, text = model(pixels, tokens)
        return list(torch.autograd.grad((image * text).sum(), [*model.image.parameters(), *model.text.parameters()]))

    expected = gradients()
    model.set_recompute(True)
    for got, want in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_initialisation_gives_every_parameter_its_published_size():
    config = small(image_width=64, text_width=64, image_layers=4, text_layers=4, embed_dim=64, vocab_size=400)
    model = CLIP(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1)
    initialise(model, torch.Generator().manual_seed(0))
    block = model.text.blocks[0]
    for parameter, std in (
        (block.attention.qkv.weight, 64**-0.5),
        (block.attention.out.weight, 64**-0.5 * 8**-0.5),
        (block.ffn.up.weight, 128**-0.5),
        (block.ffn.down.weight, 64**-0.5 * 8**-0.5),
        (model.text.token_embedding.weight, 0.02),
        (model.text.position, 0.01),
        (model.image.position, 64**-0.5),
        (model.image.patch.weight, 48**-0.5),
        (model.text.projection.weight, 64**-0.5),
        (model.image.projection.weight, 64**-0.5),
    ):
        assert parameter.std().item() == pytest.approx(std, rel=0.1)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.scale.item() == pytest.approx(1 / 0.07)
    again = initialise(CLIP(config), torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_parameters_are_counted_exactly():
    config = small()
    blocks = sum(parameter.numel() for name, parameter in CLIP(config).named_parameters() if ".blocks." in name)
    norms = sum(4 * tower.width * len(tower.blocks) for tower in (config.image, config.text))
    assert config.prunable_params == blocks - norms


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"images": torch.zeros(1, 3, 8, 8)}, r"expected pixels \[B, 3, 16, 16\], got shape \(1, 3, 8, 8\)"),
        ({"images": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)}, "without preprocessing"),
        ({"texts": ["a cat"]}, "without a tokenizer"),
        ({"texts": torch.zeros(1, 10, dtype=torch.int64)}, r"token ids \[B, L\], 1 <= L <= 9, got .* \(1, 10\)"),
        ({"texts": torch.zeros(2, 0, dtype=torch.int64)}, r"token ids \[B, L\], 1 <= L <= 9, got .* \(2, 0\)"),
        ({"texts": torch.zeros(1, 9)}, "expected integer token ids .* got torch.float32"),
        ({"texts": torch.tensor([[48, 50]])}, r"token ids in \[0, 50\), got 48 to 50"),
    ],
)
def test_wrong_inputs_are_refused(arguments, message):
    model = random_model(small())
    with pytest.raises(ValueError, match=message):
        model.encode_image(**arguments) if "images" in arguments else model.encode_text(**arguments)


def test_no_inputs_have_no_embeddings():
    model = random_model(small())
    model.preprocess, model.tokenizer = Preprocess(size=16), Tokenizer.openai(9)
    assert model.encode_image([]).shape == model.encode_text([]).shape == (0, model.config.embed_dim)


def test_the_scale_is_at_most_100_and_comes_back_from_there():
    """In fp32 exp(log(100)) is 100.00001, and what is clipped has no gradient."""
    model = random_model(small()).float()
    for saturated in (math.log(100), 4.6052, 7.0):
        with torch.no_grad():
            model.logit_scale.fill_(saturated)
        assert model.scale.item() == 100
        model.clip_scale_()
        model.logit_scale.grad = None
        model.scale.backward()
        assert 99.999 < model.scale.item() <= 100 and model.logit_scale.grad.item() == pytest.approx(100, rel=1e-5)


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="image width 20 is not a multiple of the head size 8"):
        small(image_width=20)
    with pytest.raises(ValidationError, match="patch_size 32 is larger than image_size 16"):
        small(patch_size=32)
    with pytest.raises(ValidationError, match="heads_of_state"):
        CLIPConfig.model_validate({**small().model_dump(), "heads_of_state": 1})


def test_the_model_is_loaded_without_heavy_packages():
    heavy = ("open_clip", "torchvision", "transformers", "timm")
    code = f"import sys, tinyclip.model, tinyclip.formats.checkpoint; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("gated", [False, True])
def test_the_last_block_is_computed_for_the_token_that_is_read_alone(gated):
    """Value and gradient of the whole block, at every position."""
    model = tiny_clip()
    gates = random_gates(model, 0.3, seed=1) if gated else None
    for tower, tower_gates in ((model.image, gates and gates.image), (model.text, gates and gates.text)):
        for index, block in enumerate(tower.blocks):
            block_gates = (tower_gates.width_D, tower_gates.heads[index], tower_gates.ffn[index]) if gates else ()
            x_BLD = torch.randn(3, 5, model.config.image.width if tower is model.image else 8, dtype=torch.float64)
            x_BLD.requires_grad_()
            for at_B in (torch.tensor([0, 3, 4]), torch.tensor([4, 4, 4])):
                ours = block.read(x_BLD, at_B, *block_gates)
                expected = block(x_BLD, *block_gates)[torch.arange(3), at_B]
                torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
                grads = [torch.autograd.grad(y.square().sum(), x_BLD)[0] for y in (ours, expected)]
                torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_texts_in_chunks_of_similar_length_are_the_same_texts(monkeypatch):
    """Value and gradient, in the order that they came in; lengths from 2 to the context."""
    monkeypatch.setitem(MACS_PER_CALL, "cpu", 1.0)
    generator = torch.Generator().manual_seed(0)
    model = tiny_clip().text
    tokens_BL = torch.randint(1, 28, (300, 7), generator=generator)
    length_B = torch.randint(2, 8, (300,), generator=generator)
    tokens_BL[torch.arange(300), length_B - 1] = 29
    tokens_BL[torch.arange(7) >= length_B[:, None]] = 0
    assert torch.equal(lengths(tokens_BL), length_B)
    results = []
    for run in (lambda: model(tokens_BL), lambda: model.in_chunks(tokens_BL, length_B)):
        model.zero_grad()
        text_BE = run()
        (text_BE * torch.arange(300)[:, None]).sum().backward()
        results.append((text_BE.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-11)
    assert model.in_chunks(tokens_BL[:0], length_B[:0]).shape == (0, 10)
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    model.in_chunks(tokens_BL, length_B)
    assert len(seen) == 8 and sum(rows for rows, _ in seen) == 300 and seen[0][1] < seen[-1][1] == 7
    monkeypatch.undo()
    model.in_chunks(tokens_BL, length_B)  # a tower so small is called once
    assert len(seen) == 9 and seen[-1] == (300, 7)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's compiler looks at inputs' gradients
def test_compiled_towers_compute_the_same_and_are_compiled_once(monkeypatch):
    """For any number of pairs (more and fewer than numbers in a layer) and chunks of texts, gates included."""
    monkeypatch.setattr("tinyclip.model.COMPILER", "aot_eager")  # it traces alike, and needs no C++
    monkeypatch.setitem(MACS_PER_CALL, "cpu", 4e4)
    model, compiled, generator = tiny_clip(), tiny_clip(), torch.Generator().manual_seed(0)
    compiled.set_compiled(True)
    gates = random_gates(model, 0.3, seed=1)
    try:
        for pairs, num_chunks in ((88, 2), (600, 4), (100, 2), (37, 1), (7, 1)):
            tokens_BL = torch.randint(1, 28, (pairs, 7), generator=generator)
            tokens_BL[torch.arange(pairs), torch.randint(1, 7, (pairs,), generator=generator)] = 29
            pixels = torch.randn(pairs, 3, 16, 16, generator=generator, dtype=torch.float64)
            assert compiled.text._num_chunks(lengths(tokens_BL).sort().values, tokens_BL.device) == num_chunks
            torch.compiler.set_stance("default" if pairs == 88 else "fail_on_recompile")
            ours, expected = compiled(pixels, tokens_BL, gates), model(pixels, tokens_BL, gates)
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
            (ours[0] * ours[1]).sum().backward()
    finally:
        torch.compiler.set_stance("default")
    compiled.set_compiled(False)
    assert compiled.image._compiled_call_impl is None


def test_a_vit_that_sees_all_patches_in_any_order_sees_the_picture():
    model = random_model(small()).double()
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([[1, 2, 49], [3, 49, 0], [4, 5, 49]])
    orders = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(row)) for row in range(3)])
    whole, shuffled = model(pixels, tokens)[0], model(pixels, tokens, seen_Bn=orders)[0]
    torch.testing.assert_close(shuffled, whole, rtol=0, atol=1e-12)


def test_what_lies_in_a_dropped_patch_is_not_seen():
    """Patch 5 of a 4 x 4 grid is row 1, column 1: pixels 4 to 7."""
    model = random_model(small()).double()
    pixels = torch.randn(1, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    changed = pixels.clone()
    changed[:, :, 4:8, 4:8] += 1
    tokens = torch.tensor([[1, 2, 49]])
    without = torch.tensor([[patch for patch in range(16) if patch != 5]])
    assert torch.equal(model(pixels, tokens, seen_Bn=without)[0], model(changed, tokens, seen_Bn=without)[0])
    alone = torch.tensor([[5]])
    assert not torch.allclose(model(pixels, tokens, seen_Bn=alone)[0], model(changed, tokens, seen_Bn=alone)[0])
