"""Inheritance by rule copies what the official code copies, and meets its budget from below. CPU only."""

import json
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from tests.shrink.test_keep import tiny_clip
from tinyclip.formats.open_clip import config_from_open_clip, from_open_clip, to_open_clip
from tinyclip.model import CLIP, CLIPConfig
from tinyclip.shrink.inherit import Inherit, TowerRule, choose, layer_map
from tinyclip.shrink.keep import take

HEAD = 4


def clip(image_width: int = 12, text_width: int = 8, image_layers: int = 3, text_layers: int = 3) -> CLIP:
    config = CLIPConfig.uniform(
        embed_dim=4, image_size=8, patch_size=4, image_width=image_width, image_layers=image_layers,
        text_width=text_width, text_layers=text_layers, context_length=6, vocab_size=20, head_dim=HEAD,
    )  # fmt: skip
    torch.manual_seed(0)
    return CLIP(config)


def test_official_layers_are_those_of_the_official_code(shared):
    table = json.loads((shared / "golden" / "manual_inherit.json").read_text())["layer_map_table"]
    assert len(table) == 118
    for row in table:
        assert list(layer_map("official", row["student_layers"], row["teacher_layers"])) == row["map"], row


@pytest.mark.parametrize(
    "teacher, student, layers",
    [
        (12, 12, (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)),
        (12, 9, (0, 1, 3, 4, 6, 7, 8, 10, 11)),
        (12, 6, (0, 2, 4, 7, 9, 11)),
        (6, 3, (0, 3, 5)),
        (5, 3, (0, 2, 4)),
        (4, 2, (0, 3)),
        (12, 1, (0,)),
        (1, 1, (0,)),
    ],
)
def test_even_layers_by_eye(teacher, student, layers):
    assert layer_map("even", student, teacher) == layers


@pytest.mark.parametrize("teacher", range(1, 25))
def test_even_layers_reach_from_the_first_to_the_last_in_steps_that_differ_by_at_most_one(teacher):
    for student in range(2, teacher + 1):
        layers = layer_map("even", student, teacher)
        steps = {b - a for a, b in pairwise(layers)}
        assert (layers[0], layers[-1], len(layers)) == (0, teacher - 1, student)
        assert max(steps) - min(steps) <= 1 and min(steps) >= 1


def test_leading_and_listed_layers_by_eye():
    assert layer_map("leading", 9, 12) == tuple(range(9))
    assert layer_map("official", 9, 12) == tuple(range(9))
    assert layer_map((0, 5, 11), 3, 12) == (0, 5, 11)


@pytest.mark.parametrize(
    "choice, kept", [("even", (0, 2)), ("leading", (0, 1)), ("official", (0, 1)), ((1, 2), (1, 2))]
)
def test_the_rule_chooses_the_layers_and_the_student_has_their_weights(choice, kept):
    model = clip()
    keep = choose(model, Inherit(text=TowerRule(layers=2, layer_choice=choice)))
    assert (keep.text.blocks, keep.image.blocks) == (kept, (0, 1, 2))
    student = take(model, keep)
    for block, layer in zip(student.text.blocks, kept, strict=True):
        for name, weight in block.state_dict().items():
            assert torch.equal(weight, model.text.blocks[layer].state_dict()[name]), (layer, name)


@pytest.mark.parametrize("embed_dim", [None, 32, 20])
def test_the_manual_student_equals_the_official_codes_bit_for_bit(shared, embed_dim):
    """Its file keeps the whole embedding of 32; a smaller one is the first entries of that axis, as of every other."""
    facts = json.loads((shared / "golden" / "manual_inherit.json").read_text())["manual_inherit"]
    codes = load_file(shared / "golden" / "manual_inherit.safetensors")

    def weights(model: str) -> dict[str, Tensor]:
        prefixes = (f"{model}/_image_encoder.", f"{model}/_text_encoder.")
        return {
            name.removeprefix(prefix): code.float()
            for name, code in codes.items()
            for prefix in prefixes
            if name.startswith(prefix)
        }

    scale = {"logit_scale": torch.tensor(0.0)}  # the official code inherits it separately
    teacher = from_open_clip(weights("teacher") | scale, config_from_open_clip(facts["teacher_config"]))
    rule = Inherit(
        image=TowerRule(width=64, layers=2, layer_choice="official"),
        text=TowerRule(width=64, layers=3, layer_choice="official"),
        embed_dim=embed_dim,
    )
    keep = choose(teacher, rule)
    assert [*keep.image.blocks] == facts["towers"]["image"]["layer_map"]
    assert [*keep.text.blocks] == facts["towers"]["text"]["layer_map"]
    student = take(teacher, keep)
    assert student.config == config_from_open_clip({**facts["student_config"], "embed_dim": embed_dim or 32})
    got, expected = to_open_clip(student), weights("student") | scale
    for projection in ("visual.proj", "text_projection"):
        expected[projection] = expected[projection][:, :embed_dim]
    assert got.keys() == expected.keys() and len(expected) == facts["student_tensors"] + 1
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_leading_keeps_the_first_channels_heads_and_neurons():
    keep = choose(clip(), Inherit(image=TowerRule(width=8, ffn=5)))
    assert keep.image.width == tuple(range(8))
    assert keep.image.heads == ((0, 1),) * 3 and keep.image.ffn == (tuple(range(5)),) * 3
    assert keep.text == choose(clip(), Inherit()).text


def test_a_narrower_tower_has_narrower_ffn_unless_told_otherwise():
    assert {len(kept) for kept in choose(clip(), Inherit(image=TowerRule(width=8))).image.ffn} == {48 * 8 // 12}
    assert {len(kept) for kept in choose(clip(), Inherit(image=TowerRule(width=8, ffn=48))).image.ffn} == {48}
    assert {len(kept) for kept in choose(clip(), Inherit(image=TowerRule(layers=2))).image.ffn} == {48}


@torch.no_grad()
def test_largest_keeps_the_largest_by_eye():
    """Weights of 1, but for head 1, neurons 3 and 30, and channels 1, 2, 5 and 7, which are larger."""
    model = clip(text_width=8, text_layers=1)
    weights = model.text.state_dict()  # the weights themselves, not copies
    for weight in weights.values():
        weight.fill_(1.0)
    weights["blocks.0.attention.qkv.weight"].unflatten(0, (3, 2, HEAD))[2, 1] = 5
    weights["blocks.0.ffn.up.weight"][3] = 7
    weights["blocks.0.ffn.down.weight"][:, 30] = 9
    weights["token_embedding.weight"][:, [1, 2, 5, 7]] = 6
    keep = choose(model, Inherit(text=TowerRule(width=4, ffn=2, channels="largest"))).text
    assert (keep.width, keep.heads, keep.ffn) == ((1, 2, 5, 7), ((1,),), ((3, 30),))
    leading = choose(model, Inherit(text=TowerRule(width=4, ffn=2))).text
    assert (leading.width, leading.heads, leading.ffn) == ((0, 1, 2, 3), ((0,),), ((0, 1),))


@torch.no_grad()
def test_channels_are_judged_by_the_layers_that_stay():
    """Layer 0 writes most to channel 6, layer 1, which is lost, to channel 3."""
    model = clip(text_width=8, text_layers=2)
    weights = model.text.state_dict()  # the weights themselves, not copies
    for weight in weights.values():
        weight.fill_(1.0)
    weights["blocks.0.ffn.down.weight"][6] = 2
    weights["blocks.1.ffn.down.weight"][3] = 9
    keep = choose(model, Inherit(text=TowerRule(layers=1, width=4, channels="largest"))).text
    assert keep.blocks == (0,) and 6 in keep.width and 3 not in keep.width


@torch.no_grad()
def test_keys_and_queries_do_not_make_a_head_large():
    model = clip(text_width=8, text_layers=1)
    weights = model.text.state_dict()
    qkv = weights["blocks.0.attention.qkv.weight"].unflatten(0, (3, 2, HEAD))
    qkv.fill_(1.0)
    qkv[:2, 0] = 100
    qkv[2, 1] = 2
    weights["blocks.0.attention.out.weight"].fill_(1.0)
    assert choose(model, Inherit(text=TowerRule(width=4, channels="largest"))).text.heads == ((1,),)


@pytest.mark.parametrize("channels", ["leading", "largest"])
def test_heads_are_kept_whole(channels):
    model = clip()
    student = take(model, choose(model, Inherit(image=TowerRule(width=8, channels=channels))))
    keep = choose(model, Inherit(image=TowerRule(width=8, channels=channels))).image
    for index, heads in enumerate(keep.heads):
        name = f"image.blocks.{index}.attention.qkv.weight"
        ours = student.state_dict()[name].unflatten(0, (3, 2, HEAD))
        theirs = model.state_dict()[name].unflatten(0, (3, 3, HEAD))
        assert torch.equal(ours, theirs[:, list(heads)][..., list(keep.width)])


UNEQUAL = tiny_clip().float()  # blocks without heads, without neurons, and more heads than width / head size
MODELS = {
    "uniform": clip(image_width=24, text_width=16, image_layers=4, text_layers=4),
    "wide text": clip(image_width=8, text_width=40, image_layers=2, text_layers=6),
    "one layer": clip(image_width=16, text_width=16, image_layers=1, text_layers=1),
}


@pytest.mark.parametrize("share", [1.0, 0.9, 0.75, 0.6, 0.5, 0.41])
@pytest.mark.parametrize("name", MODELS)
def test_the_budget_is_met_from_below_by_less_than_a_neuron_per_block_of_each_tower(name, share):
    model = MODELS[name]
    budget = int(share * model.config.prunable_params)
    small = choose(model, Inherit(keep_params=share), budget).shrink(model.config)
    neurons = sum(len(tower.blocks) * (2 * tower.width + 1) for tower in (small.image, small.text))
    assert budget - neurons - 2 < small.prunable_params <= budget
    for tower in (small.image, small.text):
        assert tower.width % HEAD == 0 and all(block.heads * HEAD == tower.width for block in tower.blocks)
    if share == 1.0:
        assert small == model.config


@pytest.mark.parametrize("share", [0.95, 0.8, 0.6, 0.45])
def test_a_tower_of_unequal_blocks_fits_the_budget_too(share):
    budget = int(share * UNEQUAL.config.prunable_params)
    small = choose(UNEQUAL, Inherit(keep_params=share), budget).shrink(UNEQUAL.config)
    assert 0.7 * budget < small.prunable_params <= budget


@pytest.mark.parametrize(
    "share, image_width, text_layers",
    [(0.9, 768, 11), (0.75, 640, 9), (0.5, 512, 6), (0.25, 384, 3)],  # 0.75 and 0.5: the published manual shapes
)
def test_the_image_tower_gets_narrower_and_the_text_tower_shallower_as_in_the_published_models(
    share, image_width, text_layers
):
    config = CLIPConfig.uniform(
        embed_dim=512, image_size=224, patch_size=32, image_width=768, image_layers=12, text_width=512, text_layers=12,
    )  # fmt: skip
    with torch.device("meta"):
        model = CLIP(config)
    small = choose(model, Inherit(keep_params=share), int(share * config.prunable_params)).shrink(config)
    assert (small.image.width, len(small.image.blocks)) == (image_width, 12)
    assert (small.text.width, len(small.text.blocks)) == (512, text_layers)
    assert small.prunable_params > 0.9995 * share * config.prunable_params


def test_sizes_that_are_given_stay_and_the_budget_sets_the_rest():
    model = MODELS["uniform"]
    budget = int(0.5 * model.config.prunable_params)
    rule = Inherit(keep_params=0.5, image=TowerRule(width=16), text=TowerRule(layer_choice=(0, 2)))
    keep = choose(model, rule, budget)
    assert (len(keep.image.width), keep.image.blocks, keep.text.blocks) == (16, (0, 1, 2, 3), (0, 2))
    small = keep.shrink(model.config)
    assert 0.97 * budget < small.prunable_params <= budget
    assert {len(kept) for kept in choose(model, Inherit(text=TowerRule(ffn=7)), budget).text.ffn} == {7}


def test_odd_sizes_shrink():
    """Widths that are no multiple of the head size, as learned masks leave them, and heads of 3 channels."""
    model = tiny_clip().float()
    keep = choose(model, Inherit(image=TowerRule(width=9), text=TowerRule(layers=1, channels="largest", ffn=3)))
    student = take(model, keep)
    assert [(b.heads, b.ffn) for b in student.config.image.blocks] == [(3, 6), (0, 5), (2, 0)]
    assert [(b.heads, b.ffn) for b in student.config.text.blocks] == [(2, 3)]
    image, text = student(torch.randn(2, 3, 16, 16), torch.tensor([[28, 5, 29], [28, 29, 0]]))
    assert image.isfinite().all() and text.isfinite().all()


@pytest.mark.parametrize(
    "tower, message",
    [
        ({"width": 10}, "image width: expected a multiple of the head size 4, got 10"),
        ({"width": 16}, r"image width: expected at most 12 \(the model's\), got 16"),
        ({"ffn": 49}, r"image ffn: expected at most 48 \(the model's\), got 49"),
        ({"layers": 4}, r"image layers: expected at most 3 \(the model's\), got 4"),
        ({"layer_choice": (0, 1, 2, 3)}, r"image layers: expected at most 3 \(the model's\), got 4"),
        ({"layer_choice": (0, 3)}, "image layer_choice: expected layers 0 to 2, got 3"),
    ],
)
def test_a_rule_that_does_not_fit_the_model_is_refused(tower, message):
    with pytest.raises(ValueError, match=message):
        choose(clip(), Inherit(image=TowerRule(**tower)))


def test_an_embedding_cannot_grow_and_its_cut_is_not_in_the_budget():
    with pytest.raises(ValueError, match=r"embed_dim: expected at most 4 \(the model's\), got 5"):
        choose(clip(), Inherit(embed_dim=5))
    with pytest.raises(ValidationError, match="embed_dim\n.*greater than 0"):
        Inherit(embed_dim=0)
    model = MODELS["uniform"]
    budget = int(0.5 * model.config.prunable_params)
    whole, cut = (choose(model, Inherit(keep_params=0.5, embed_dim=size), budget) for size in (None, 3))
    assert cut == whole.model_copy(update={"embed": (0, 1, 2)})


@pytest.mark.parametrize("share", [0.001, 0.05])
def test_a_budget_below_one_head_and_neuron_per_block_is_refused(share):
    model = clip()
    with pytest.raises(ValueError, match="keep_params: no image tower .* and a neuron per block"):
        choose(model, Inherit(keep_params=share), int(share * model.config.prunable_params))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"layers": 1, "layer_choice": (0, 1)}, "layers is 1, but layer_choice lists 2"),
        ({"layer_choice": (1, 0)}, r"layer_choice: expected layers in ascending order, got \[1, 0\]"),
        ({"layer_choice": ()}, r"layer_choice: expected layers in ascending order, got \[\]"),
        ({"layer_choice": (1, 1)}, "layer_choice: expected layers in ascending order"),
        ({"layers": 0}, "layers: expected at least 1, got 0"),
        ({"depth": 3}, "depth\n.*not permitted"),
    ],
)
def test_a_rule_that_contradicts_itself_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        TowerRule(**settings)


@pytest.mark.parametrize("share", [0, -0.5, 1.01])
def test_a_share_is_above_0_and_at_most_1(share):
    with pytest.raises(ValidationError, match="keep_params"):
        Inherit(keep_params=share)
