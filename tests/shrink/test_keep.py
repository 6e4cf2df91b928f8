"""`take` cuts exactly: taking everything is the identity, and a cut model computes what the gated one did."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyclip.model import (
    CLIP,
    BlockConfig,
    CLIPConfig,
    Gates,
    ImageConfig,
    LayerNorm,
    TextConfig,
    TowerGates,
    initialise,
)
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


@pytest.mark.parametrize("num_open", [1, 2, 3, 511, 768])
def test_a_gated_layernorm_is_that_of_the_open_channels_also_where_their_values_are_equal_or_nearly_so(num_open):
    torch.manual_seed(0)
    norm, cut = LayerNorm(768), LayerNorm(num_open)
    kept = torch.randperm(768)[:num_open].sort().values
    gate_D = torch.zeros(768).index_fill(0, kept, 1e-30)  # how far a gate is open is not the norm's business
    with torch.no_grad():
        for weight, of_all in ((cut.weight, norm.weight), (cut.bias, norm.bias)):
            of_all.normal_(mean=1)
            weight.copy_(of_all[kept])
    spread = torch.randn(4, num_open)
    for rows in (spread, 37 + spread, torch.full((4, num_open), 37.0), torch.full((4, num_open), 1e4)):
        x = torch.zeros(4, 768).index_copy(1, kept, rows)
        y = norm(x, gate_D)
        torch.testing.assert_close(y[:, kept], cut(rows), rtol=0, atol=3e-5 if rows[0, 0] > 30 else 3e-6)
        assert not y[:, gate_D == 0].any()
        if (rows == rows[0, 0]).all():
            assert torch.equal(y[:, kept], cut.bias.expand(4, -1))
    near = 37 + 1e-4 * spread  # in fp32 the plain norm itself keeps few digits of this: fp64 is the judge
    exact = F.layer_norm(near.double(), [num_open], cut.weight.double(), cut.bias.double(), cut.eps)
    got = norm(torch.zeros(4, 768).index_copy(1, kept, near), gate_D)[:, kept]
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-6)


def test_the_gradient_of_a_gated_layernorm_is_that_of_the_cut_one():
    torch.manual_seed(0)
    norm, kept = LayerNorm(9).double(), torch.tensor([1, 2, 4, 8])
    norm.weight.data.normal_()
    rows, wanted = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64)

    def gradients(y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((y * wanted).sum(), [rows, norm.weight, norm.bias]))

    x = torch.zeros(5, 9, dtype=torch.float64).index_copy(1, kept, rows)
    gate_D = torch.zeros(9, dtype=torch.float64).index_fill(0, kept, 0.3)
    cut = F.layer_norm(rows, [4], norm.weight[kept], norm.bias[kept], norm.eps)
    for ours, expected in zip(gradients(norm(x, gate_D)[:, kept]), gradients(cut), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


EDGES = {  # channels, heads of each block, neurons of each block, value of an open gate
    "one channel": (1, 4, 16, 1.0),
    "one head": (7, 1, 16, 1.0),
    "one neuron": (7, 4, 1, 1.0),
    "one of each": (1, 1, 1, 1.0),
    "one channel, and nothing in the blocks": (1, 0, 0, 1.0),
    "everything": (7, 4, 16, 1.0),
    "gates that are hardly open": (5, 2, 3, 1e-20),
}


@torch.no_grad()
@pytest.mark.parametrize("alike", [False, True])  # whether the channels of a token all have the same value
@pytest.mark.parametrize("edge", EDGES)
def test_in_fp32_too_the_cut_model_equals_the_gated_one_at_the_edge_of_every_range(edge, alike):
    """One pair, in one block, of one-token texts: nothing averages a loss of digits away."""
    channels, heads, neurons, value = EDGES[edge]
    blocks = (BlockConfig(heads=4, ffn=16),)
    config = CLIPConfig(
        embed_dim=3,
        image=ImageConfig(width=7, head_dim=2, blocks=blocks, image_size=4, patch_size=4),
        text=TextConfig(width=7, head_dim=2, blocks=blocks, context_length=3, vocab_size=5),
    )
    model = initialise(CLIP(config), torch.Generator().manual_seed(0)).eval()
    for name, weight in model.named_parameters():
        if alike and name.endswith(("class_embedding", "patch.weight", "token_embedding.weight")):
            weight.zero_()
        elif name.startswith("text.") and name.endswith(("position", "token_embedding.weight")):
            weight *= 20  # as large as the biases
        elif name.endswith("bias"):
            weight += 0.25
    if alike:
        model.image.position.fill_(3.7)
        model.text.position.fill_(3.7)

    def gate(size: int, num_open: int) -> Tensor:
        return torch.arange(size).lt(num_open).flip(0) * value

    tower = TowerGates(gate(7, channels), (gate(4, heads),), (gate(16, neurons),))
    gates = Gates(tower, tower)
    cut = take(fold(model, gates), Keep.open_gates(config, gates))
    pixels = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    for tokens in (torch.tensor([[4]]), torch.tensor([[3, 4, 0]])):
        assert_same_features(cut(pixels, tokens), model(pixels, tokens, gates), atol=1e-6)


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


@pytest.mark.parametrize("embed", [(0, 1, 2), (9,), (1, 4, 5, 8)])
def test_a_cut_embedding_is_a_slice_of_the_whole_one_before_it_is_a_unit_vector(embed):
    model = tiny_clip()
    keep = Keep.everything(model.config).model_copy(update={"embed": embed})
    taken, (pixels, tokens) = take(model, keep), inputs()
    assert taken.config == model.config.model_copy(update={"embed_dim": len(embed)})
    torch.testing.assert_close(taken.encode_image(pixels), model.encode_image(pixels)[:, embed], rtol=0, atol=1e-14)
    torch.testing.assert_close(taken.encode_text(tokens), model.encode_text(tokens)[:, embed], rtol=0, atol=1e-14)
    assert keep.describe(model.config).endswith(f"; embedding {len(embed)} of 10")
    assert Keep.model_validate_json(keep.model_dump_json()) == keep


def test_a_keep_that_was_written_before_embeddings_were_cut_keeps_all_of_it():
    model = tiny_clip()
    keep = Keep.everything(model.config)
    written = keep.model_dump_json(exclude={"embed"})
    assert "embed" not in written and Keep.model_validate_json(written) == keep
    assert take(model, keep).config.embed_dim == 10 and "embedding" not in keep.describe(model.config)


@pytest.mark.parametrize("embed", [(), (1, 0), (0, 0), (3, 10), (-1, 2)])
def test_a_cut_of_the_embedding_that_does_not_fit_is_refused(embed):
    model = tiny_clip()
    with pytest.raises(ValueError, match="keep.embed: expected "):
        take(model, Keep.everything(model.config).model_copy(update={"embed": embed}))


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
