"""The ResNet tower is open_clip's, its golden features are met, and its cuts compute what its gates did."""

import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.shrink.test_keep import random_gates as random_text_gates
from tinyclip.formats.open_clip import config_from_open_clip, from_open_clip, to_open_clip
from tinyclip.model import CLIP, BlockConfig, CLIPConfig, Gates, TextConfig, initialise
from tinyclip.model_resnet import BottleneckConfig, ResNetConfig, ResNetGates, frozen_statistics
from tinyclip.shrink.inherit import Inherit, TowerRule, choose
from tinyclip.shrink.keep import Keep, take
from tinyclip.shrink.keep_resnet import ResNetKeep
from tinyclip.shrink.masks import HardConcreteGates, fold, open_probability, survivors

TEXT = TextConfig(width=8, head_dim=4, context_length=7, vocab_size=30, blocks=(BlockConfig(heads=2, ffn=6),) * 2)
UNEQUAL = ((4, 6), (3, 8)), ((8, 5),), ((16, 16), (7, 9)), ((32, 20),)


def tiny_resnet(image: ResNetConfig | None = None, text: TextConfig = TEXT, seed: int = 0) -> CLIP:
    """Unequal blocks; biases, scales and statistics away from their initial values; in fp64."""
    stages = tuple(tuple(BottleneckConfig(conv1=a, conv2=b) for a, b in stage) for stage in UNEQUAL)
    image = image or ResNetConfig(image_size=64, width=4, head_dim=32, stages=stages)
    generator = torch.Generator().manual_seed(seed)
    model = initialise(CLIP(CLIPConfig(embed_dim=10, image=image, text=text)), generator).double()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor += torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            elif tensor.is_floating_point():
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            else:
                assert name.endswith("num_batches_tracked")
                tensor += 3
    return model.eval()


def inputs(count: int = 3) -> tuple[Tensor, Tensor]:
    pixels = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return pixels, torch.tensor([[28, 3, 29, 0, 0, 0, 0], [28, 29, 0, 0, 0, 0, 0], [28, 5, 9, 11, 2, 4, 29]])[:count]


def random_gates(model: CLIP, closed: float, seed: int) -> Gates:
    """A share of the gates is exactly zero; one of each vector stays open."""
    generator = torch.Generator().manual_seed(seed)

    def gate(size: int) -> Tensor:
        values = torch.rand(size, generator=generator, dtype=torch.float64) * 0.9 + 0.1
        values[torch.rand(size, generator=generator) < closed] = 0
        values[0] = 0.7
        return values

    places = list(model.config.image.blocks())
    image = ResNetGates(
        tuple(gate(place.block.conv1) for place in places), tuple(gate(place.block.conv2) for place in places)
    )
    vit = model.config.model_copy(update={"image": TEXT})
    return Gates(image, random_text_gates(type("Text", (), {"config": vit}), closed, seed).text)


def assert_same(ours, theirs, tolerance: float = 1e-12):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("training", [False, True])
def test_it_computes_what_open_clips_does_and_has_its_gradient(training):
    from open_clip.modified_resnet import ModifiedResNet

    image = ResNetConfig.uniform(image_size=64, width=4, layers=(2, 1, 3, 1), head_dim=32)
    ours = tiny_resnet(image)
    theirs = ModifiedResNet(layers=[2, 1, 3, 1], output_dim=10, heads=4, image_size=64, width=4).double()
    state = {k.removeprefix("visual."): v for k, v in to_open_clip(ours).items() if k.startswith("visual.")}
    theirs.load_state_dict(state, strict=True)
    pixels, _ = inputs()
    ours.train(training), theirs.train(training)
    features, expected = ours.image(pixels), theirs(pixels)
    assert_same([features], [expected])
    features.square().sum().backward(), expected.square().sum().backward()
    assert_same([ours.image.conv1.weight.grad], [theirs.conv1.weight.grad])
    assert_same([ours.image.pool.query.weight.grad], [theirs.attnpool.q_proj.weight.grad])
    for name, tensor in to_open_clip(ours).items():  # running statistics too
        if name.startswith("visual."):
            assert_same([tensor], [theirs.state_dict()[name.removeprefix("visual.")]])


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("precision, tolerance", [("float64", 1e-10), ("float32", 1e-5)])
def test_its_features_are_the_official_ones(shared, activation, precision, tolerance):
    golden = load_file(shared / "golden" / "forward.safetensors")
    config = json.loads((shared / "golden" / "forward_configs.json").read_text())["resnet"]
    state = {k.removeprefix("resnet/state/"): v for k, v in golden.items() if k.startswith("resnet/state/")}
    model = from_open_clip(state, config_from_open_clip({**config, "quick_gelu": activation == "quick_gelu"}))
    dtype = getattr(torch, precision)
    model.to(dtype)
    with torch.no_grad():
        features = model.encode_image(golden["resnet/pixels"].to(dtype)), model.encode_text(golden["resnet/tokens"])
    expected = [golden[f"resnet/{activation}/{precision}/{kind}_features"] for kind in ("image", "text")]
    assert_same(features, expected, tolerance)


def test_the_inherited_student_equals_the_official_codes_bit_for_bit(shared):
    facts = json.loads((shared / "golden" / "manual_inherit.json").read_text())["manual_inherit_resnet"]
    codes = load_file(shared / "golden" / "manual_inherit_resnet.safetensors")
    teacher = CLIP(config_from_open_clip(facts["teacher_config"]))
    state = to_open_clip(teacher)
    theirs = {k.removeprefix("teacher/_image_encoder."): v for k, v in codes.items() if k.startswith("teacher/")}
    teacher = from_open_clip({**state, **{k: v.to(state[k].dtype) for k, v in theirs.items()}}, teacher.config)
    rule = TowerRule(layers=(2, 1, 2, 1), width=2, layer_choice="official")
    student = take(teacher, choose(teacher, Inherit(image=rule)))
    assert student.config.image == config_from_open_clip(facts["student_config"]).image
    ours = {k: v for k, v in to_open_clip(student).items() if k.startswith("visual.")}
    expected = {k.removeprefix("student/_image_encoder."): v for k, v in codes.items() if k.startswith("student/")}
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor.to(ours[name].dtype)), name


def test_taking_everything_changes_nothing():
    model = tiny_resnet()
    taken = take(model, Keep.everything(model.config))
    assert taken.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(taken.state_dict()[name], tensor)
        assert taken.state_dict()[name].data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("closed", [0.0, 0.4, 1.0])
def test_the_cut_model_equals_the_gated_one(closed, training):
    model = tiny_resnet()
    gates = random_gates(model, closed, seed=2)
    cut = take(fold(model, gates), Keep.open_gates(model.config, gates))
    model.train(training), cut.train(training)
    with torch.no_grad():
        assert_same(cut(*inputs()), model(*inputs(), gates))
    if closed == 1.0:
        assert all(place.block == BottleneckConfig(conv1=1, conv2=1) for place in cut.config.image.blocks())


def test_a_cut_embedding_is_a_slice_of_the_whole_one():
    model, (pixels, _) = tiny_resnet(), inputs()
    taken = take(model, choose(model, Inherit(embed_dim=6)))
    with torch.no_grad():
        assert_same([taken.encode_image(pixels)], [model.encode_image(pixels)[:, :6]])
    assert taken.config == model.config.model_copy(update={"embed_dim": 6})


def test_two_cuts_equal_one():
    model = tiny_resnet()
    first = Keep.open_gates(model.config, random_gates(model, 0.3, seed=5))
    once = take(model, first)
    second = Keep.open_gates(once.config, random_gates(once, 0.3, seed=6))
    twice = take(once, second)
    composed = {
        part: tuple(
            tuple(a[i] for i in b) for a, b in zip(getattr(first.image, part), getattr(second.image, part), strict=True)
        )
        for part in ("conv1", "conv2")
    }
    at_once = take(model, first.model_copy(update={"image": first.image.model_copy(update=composed)}))
    for name, tensor in at_once.image.state_dict().items():
        assert torch.equal(twice.image.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"conv1": ((),) * 6}, r"keep.image.conv1.0: expected ascending indices in \[0, 4\), at least one"),
        ({"conv2": ((0,),) * 5}, "expected conv1 and conv2 for 6 blocks, got 6 and 5"),
        ({"blocks": ((1,), (0,), (0, 1), (0,))}, "keep.image.blocks.0: expected the first block of the stage"),
        ({"heads": (0,)}, "and heads for the last; got .* and 1 heads of 32"),
        ({"stem": ((0,), (0, 1), (0, 1, 2, 3))}, "expected 2, 2 and 4 stem channels"),
        ({"channels": (tuple(range(16)),) * 4}, r"4 stem channels, \[16, 32, 64, 128\] in the stages"),
    ],
)
def test_a_keep_that_leaves_no_tower_is_refused(change, message):
    model = tiny_resnet()
    keep = Keep.everything(model.config)
    with pytest.raises(ValueError, match=message):
        take(model, keep.model_copy(update={"image": keep.image.model_copy(update=change)}))


def test_a_keep_of_the_other_kind_of_tower_is_refused_and_both_are_read_back():
    model = tiny_resnet()
    keep = Keep.everything(model.config)
    assert Keep.model_validate_json(keep.model_dump_json()) == keep and isinstance(keep.image, ResNetKeep)
    with pytest.raises(ValueError, match="a TowerKeep does not fit a ResNetConfig"):
        take(model, keep.model_copy(update={"image": keep.text}))
    assert CLIPConfig.model_validate_json(model.config.model_dump_json()) == model.config


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9, 1.0])
def test_survivors_meet_the_budget_by_less_than_a_neuron(share):
    model = tiny_resnet()
    gates = HardConcreteGates(model.config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for log_alpha in gates.parameters():
            log_alpha += 3 * torch.randn(log_alpha.shape, generator=generator, dtype=torch.float64)
    everything, smallest = model.config.prunable_params, 1500
    budget = int(smallest + share * (everything - smallest))
    keep = survivors(gates, budget)
    left = budget - keep.shrink(model.config).prunable_params
    assert 0 <= left < 2 * TEXT.width + 1 or (share == 1.0 and left == 0)
    values = gates.values(keep)
    assert Keep.open_gates(model.config, values) == keep
    with pytest.raises(ValueError, match="below the .* of the smallest cut"):
        survivors(gates, 100)


def test_expected_parameters_of_decided_gates_are_those_of_the_cut_model():
    model = tiny_resnet()
    gates = HardConcreteGates(model.config).double()
    with torch.no_grad():
        for number, log_alpha in enumerate(gates.parameters()):
            log_alpha[:] = torch.where(torch.arange(len(log_alpha)) <= number % 5, 60.0, -60.0)
    keep = Keep.open_gates(model.config, gates.map(lambda log_alpha: open_probability(log_alpha).round()))
    assert gates.expected_params().item() == pytest.approx(keep.shrink(model.config).prunable_params, abs=1e-9)
    total = sum(p.numel() for name, p in model.image.named_parameters() if name.startswith("blocks."))
    shortcuts = sum(p.numel() for name, p in model.image.named_parameters() if "shortcut" in name)
    assert model.config.image.prunable_params == total - shortcuts


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 1.0])
def test_the_rule_takes_the_widest_stock_tower_within_the_budget(share):
    image = ResNetConfig.uniform(image_size=64, width=16, layers=(2, 2, 2, 2), head_dim=32)
    model = tiny_resnet(image, TEXT.model_copy(update={"blocks": (BlockConfig(heads=2, ffn=99),) * 3}))
    keep = choose(model, Inherit(keep_params=share), int(share * model.config.prunable_params))
    student = keep.shrink(model.config).image
    layers = tuple(map(len, student.stages))
    assert student == ResNetConfig.uniform(image_size=64, width=student.width, layers=layers, head_dim=32)
    assert student.prunable_params <= share * image.prunable_params
    if student.width < 16:
        wider = ResNetConfig.uniform(image_size=64, width=student.width + 2, layers=layers, head_dim=32)
        assert wider.prunable_params > share * image.prunable_params


def test_largest_keeps_what_the_norms_let_through():
    model = tiny_resnet()
    with torch.no_grad():
        model.image.blocks[0].bn2.weight[:] = torch.tensor([0.1, 3.0, 0.2, -4.0, 0.3, 5.0])
        model.image.bn1.weight[:] = torch.tensor([0.1, 2.0])
    keep = choose(model, Inherit(image=TowerRule(width=2, channels="largest"))).image
    assert keep.conv2[0] == (1, 3, 5) and keep.stem[0] == (1,)
    assert [len(channels) for channels in keep.channels] == [8, 16, 32, 64] and len(keep.heads) == 2


@pytest.mark.parametrize(
    "rule, message",
    [
        ({"layers": 3}, r"image layers: expected a number for each stage, at most \[2, 1, 2, 1\], got 3"),
        ({"layers": (2, 1, 3, 1)}, "image layers: expected a number for each stage"),
        ({"ffn": 3}, "a ResNet takes layers, width, layer_choice .even, leading, official. and channels only"),
        ({"width": 3}, "image width: expected an even one"),
        ({"width": 6}, "image width: expected at most 4"),
        ({"layer_choice": (0, 1)}, "a ResNet takes layers"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        choose(tiny_resnet(), Inherit(image=TowerRule(**rule)))


def test_four_numbers_of_layers_are_no_transformers_rule():
    with pytest.raises(ValueError, match="text layers: expected one number for a transformer"):
        choose(tiny_resnet(), Inherit(text=TowerRule(layers=(1, 1, 1, 1))))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image_size": 48}, "image_size: expected a multiple of 32, got 48"),
        ({"width": 5}, "width: expected an even one, 32 x it in heads of 32, got 5"),
        ({"stages": ((BottleneckConfig(conv1=1, conv2=1),),) * 3}, "at least 4"),
        ({"stages": ((BottleneckConfig(conv1=1, conv2=1),),) * 3 + ((),)}, "expected 1 to 1024 blocks each"),
    ],
)
def test_shapes_that_are_no_resnet_are_refused(fields, message):
    settings = tiny_resnet().config.image.model_dump() | fields
    with pytest.raises(ValueError, match=message):
        ResNetConfig(**settings)


def test_recomputation_and_a_second_pass_change_neither_gradient_nor_statistics():
    plain, recomputed = tiny_resnet().train(), tiny_resnet().train()
    recomputed.set_recompute(True)
    for model, context in ((plain, nullcontext), (recomputed, lambda: frozen_statistics(recomputed))):
        with torch.no_grad(), context():
            model(*inputs()) if model is recomputed else None
        image, text = model(*inputs())
        (image * text).sum().backward()
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14)
    for (name, a), b in zip(plain.named_buffers(), recomputed.buffers(), strict=True):
        assert torch.equal(a, b), name
