"""`take` cuts exactly: taking everything is the identity, and a cut model computes what the gated one did."""

import pytest
import torch
from torch import Tensor

from tinyclip.model import CLIP, BlockConfig, CLIPConfig, Gates, ImageConfig, TextConfig, TowerGates, initialise
from tinyclip.shrink.keep import Keep, TowerKeep, take
from tinyclip.shrink.masks import fold


def tiny_clip(activation: str = "gelu", seed: int = 0) -> CLIP:
    """Blocks of unequal sizes, biases and norms away from their initial values, in fp64."""
    config = CLIPConfig(
        embed_dim=10,
        activation=activation,
        image=ImageConfig(
            width=12, head_dim=3, image_size=16, patch_size=5,
            blocks=(BlockConfig(heads=4, ffn=9), BlockConfig(heads=0, ffn=7), BlockConfig(heads=2, ffn=0)),
        ),
        text=TextConfig(
            width=8, head_dim=4, context_length=7, vocab_size=30,
            blocks=(BlockConfig(heads=2, ffn=16), BlockConfig(heads=3, ffn=5)),
        ),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    model = initialise(CLIP(config), generator).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.eval()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)
    return pixels, torch.tensor([[28, 3, 29, 0, 0, 0, 0], [28, 29, 0, 0, 0, 0, 0], [28, 5, 9, 11, 2, 4, 29]])


def random_gates(model: CLIP, closed: float, seed: int) -> Gates:
    """Values in (0, 1], a share of them exactly zero; at least one channel stays open."""
    generator = torch.Generator().manual_seed(seed)

    def gate(size: int, keep_one: bool = False) -> Tensor:
        values = torch.rand(size, generator=generator, dtype=torch.float64) * 0.9 + 0.1
        values[torch.rand(size, generator=generator) < closed] = 0
        if keep_one:
            values[0] = 0.7
        return values

    def tower(config) -> TowerGates:
        return TowerGates(
            gate(config.width, keep_one=True),
            tuple(gate(block.heads) for block in config.blocks),
            tuple(gate(block.ffn) for block in config.blocks),
        )

    return Gates(tower(model.config.image), tower(model.config.text))


def assert_same_features(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], atol: float = 1e-12) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


def test_taking_everything_is_the_identity():
    model = tiny_clip()
    taken = take(model, Keep.everything(model.config))
    assert taken.config == model.config
    for name, weight in model.state_dict().items():
        assert torch.equal(taken.state_dict()[name], weight), name


def test_the_taken_model_shares_no_memory_with_the_model():
    model = tiny_clip()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    taken = take(model, Keep.everything(model.config))
    with torch.no_grad():
        for parameter in taken.parameters():
            parameter.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("closed", [0.0, 0.4, 0.9, 1.0])  # 1.0: no heads, no neurons and one channel are left
@pytest.mark.parametrize("seed", range(3))
def test_the_cut_model_equals_the_gated_model(activation, closed, seed):
    model = tiny_clip(activation)
    gates = random_gates(model, closed, seed)
    cut = take(fold(model, gates), Keep.open_gates(model.config, gates))
    pixels, tokens = inputs()
    assert_same_features(cut(pixels, tokens), model(pixels, tokens, gates))
    if closed == 1.0:
        assert cut.config.image.width == 1 and all(b.heads == b.ffn == 0 for b in cut.config.text.blocks)


def test_two_cuts_equal_one():
    model = tiny_clip()
    first = Keep.open_gates(model.config, random_gates(model, 0.3, seed=5))
    once = take(model, first)
    second = Keep.open_gates(once.config, random_gates(once, 0.3, seed=6))

    def compose(a: TowerKeep, b: TowerKeep) -> TowerKeep:
        def through(outer, inner):
            return tuple(outer[i] for i in inner)

        return TowerKeep(
            blocks=through(a.blocks, b.blocks),
            width=through(a.width, b.width),
            heads=tuple(through(a.heads[i], heads) for i, heads in zip(b.blocks, b.heads, strict=True)),
            ffn=tuple(through(a.ffn[i], ffn) for i, ffn in zip(b.blocks, b.ffn, strict=True)),
        )

    both = take(model, Keep(image=compose(first.image, second.image), text=compose(first.text, second.text)))
    twice = take(once, second)
    assert twice.config == both.config
    for name, weight in both.state_dict().items():
        assert torch.equal(twice.state_dict()[name], weight), name


def test_fewer_blocks_by_eye():
    """Dropping the middle block of three keeps the outer two, renumbered."""
    model = tiny_clip()
    everything = Keep.everything(model.config)
    image = TowerKeep(
        blocks=(0, 2),
        width=everything.image.width,
        heads=(everything.image.heads[0], everything.image.heads[2]),
        ffn=(everything.image.ffn[0], ()),
    )
    taken = take(model, Keep(image=image, text=everything.text))
    assert [(b.heads, b.ffn) for b in taken.config.image.blocks] == [(4, 9), (2, 0)]
    assert torch.equal(taken.image.blocks[1].attention.qkv.weight, model.image.blocks[2].attention.qkv.weight)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": (0, 12)}, r"keep.image.width: expected ascending indices in \[0, 12\)"),
        ({"width": ()}, "keep.image.width: expected at least 1"),
        ({"blocks": (0, 1)}, "expected heads and ffn for 2 blocks, got 3 and 3"),
        ({"heads": ((1, 0), (), ())}, "heads of block 0: expected ascending"),
    ],
)
def test_a_keep_that_does_not_fit_is_refused(change, message):
    model = tiny_clip()
    keep = Keep.everything(model.config)
    with pytest.raises(ValueError, match=message):
        take(model, keep.model_copy(update={"image": keep.image.model_copy(update=change)}))
