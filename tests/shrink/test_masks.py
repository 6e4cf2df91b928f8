"""Hard-concrete gates equal the official numbers; the cut meets the budget; masked features equal the official ones."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.shrink.test_keep import tiny_clip
from tinyclip.formats.open_clip import config_from_open_clip, from_open_clip
from tinyclip.model import CLIPConfig, Gates, TowerGates
from tinyclip.shrink.keep import Keep, take
from tinyclip.shrink.masks import (
    HardConcreteGates,
    LearnMasks,
    SizeConstraint,
    expected_zeros,
    fold,
    open_probability,
    sample,
    survivors,
    value,
)


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "golden" / "hard_concrete.json").read_text())


def fp64(values):
    return torch.tensor(values, dtype=torch.float64)


def test_probability_and_value_equal_the_official_ones(golden):
    points = golden["pointwise"]
    log_alpha = fp64(points["loga"])
    torch.testing.assert_close(open_probability(log_alpha), fp64(points["prob_nonzero"]), rtol=0, atol=1e-12)
    torch.testing.assert_close(value(log_alpha), fp64(points["soft_mask"]), rtol=0, atol=1e-12)


def test_samples_and_their_gradients_equal_the_official_ones(golden):
    for point in golden["sample_grid"]:
        uniform = fp64(point["u"])
        drawn = sample(torch.full_like(uniform, point["loga"]), uniform)
        torch.testing.assert_close(drawn, fp64(point["z"]), rtol=0, atol=1e-12)
    case = golden["sample_random"]
    log_alpha = fp64(case["loga"])[:, None].expand(-1, 4).clone().requires_grad_()
    drawn = sample(log_alpha, fp64(case["u"]))
    torch.testing.assert_close(drawn, fp64(case["z"]), rtol=0, atol=1e-12)
    (slope,) = torch.autograd.grad(drawn.sum(), log_alpha)
    torch.testing.assert_close(slope, fp64(case["dz_dloga"]), rtol=0, atol=1e-12)


def test_expected_zeros_equal_the_official_ones(golden):
    for case in golden["deterministic"]:
        log_alpha = fp64(case["loga"] if "loga" in case else [case["loga_constant"]] * case["size"])
        assert expected_zeros(log_alpha) == case["num_zeros"]


def test_the_target_rises_as_the_official_one(golden):
    for case in golden["target_schedule"]:
        steps = 2 * case["warmup"]
        constraint = SizeConstraint(
            LearnMasks(keep_params=1 - case["target"], target_warmup=0.5),
            reference_params=1000,
            current_params=round(1000 * (1 - case["start"])),
            steps=steps,
        )
        for step, expected in zip(case["steps"], case["values"], strict=True):
            assert constraint.target(step) == pytest.approx(expected, abs=1e-12)


def test_the_penalty_below_the_target_equals_the_official_one_sided_one(golden):
    """There the multiplier of the linear term has the other sign: it pushes q - p, ours p - q."""
    cases = [case for part in golden["tiny"] for case in part["lagrangian"] if case["loss"] > 0]
    assert len(cases) > 10
    for case in cases:
        constraint = SizeConstraint(
            LearnMasks(keep_params=1 - case["target"], target_warmup=0.5),
            reference_params=10**6,
            current_params=round(10**6 * (1 - case["start"])),
            steps=2 * case["warmup"],
        ).double()
        if case["warmup"] == 0:
            constraint.start = constraint.end
        constraint.linear.fill_(-case["lambda_1"])
        constraint.quadratic.fill_(case["lambda_2"])
        sparsity = torch.tensor(case["expected_sparsity"], dtype=torch.float64)
        assert constraint.penalty(sparsity, case["step"]).item() == pytest.approx(case["loss"], rel=1e-10)
        before = constraint.linear.item(), constraint.quadratic.item()
        constraint.ascend(sparsity, case["step"])  # by the official gradients, times a step of 1
        assert before[0] - constraint.linear.item() == pytest.approx(case["grad_lambda_1"], rel=1e-9)
        assert constraint.quadratic.item() - before[1] == pytest.approx(case["grad_lambda_2"], rel=1e-9)


def vit_b32() -> CLIPConfig:
    return CLIPConfig.uniform(
        embed_dim=512, image_size=224, patch_size=32,
        image_width=768, image_layers=12, text_width=512, text_layers=12,
    )  # fmt: skip


def test_expected_parameters_equal_the_official_ones_up_to_the_biases(golden):
    """Ours counts what is in the cut model. The official count takes heads' biases as if they shrank with the width
    and leaves the FFN's and the output biases out; with those terms put in its way the two are equal."""
    for case in golden["vit_b32"]:
        if case["fill"]["kind"] != "constant":
            continue
        gates = HardConcreteGates(vit_b32(), 0.0).double()
        total = 0.0
        for tower, golden_tower in ((gates.image, case["vit_b32_image"]), (gates.text, case["vit_b32_text"])):
            groups = {"hidden": [tower.width_D], "heads": list(tower.heads), "intermediate": list(tower.ffn)}
            for name, vectors in groups.items():
                for log_alpha in vectors:
                    torch.nn.init.constant_(log_alpha, case["fill"][name])
            p = {name: sum(open_probability(a).sum().item() for a in vectors) for name, vectors in groups.items()}
            width, heads = golden_tower["hidden_size"], golden_tower["num_heads"]
            per_head = golden_tower["params_per_head"]
            official = p["hidden"] * p["heads"] * per_head / width + 2 * p["hidden"] * p["intermediate"]
            assert official == pytest.approx(golden_tower["expected_params"], rel=1e-12)
            ours = (
                p["heads"] * 64 * (4 * p["hidden"] + 3) + p["intermediate"] * (2 * p["hidden"] + 1) + 24 * p["hidden"]
            )
            head_biases = p["heads"] * 64 * 3 - p["hidden"] * p["heads"] * (64 * 3 + width / heads) / width
            without = ours - p["intermediate"] - 24 * p["hidden"] - head_biases
            assert without == pytest.approx(official, rel=1e-12)
            total += ours
        assert gates.expected_params().item() == pytest.approx(total, rel=1e-12)


def test_gates_by_eye():
    """Those of the official code: temperature 2/3, stretched to (-0.1, 1.1); a survivor's value is a little sharper."""
    gates = HardConcreteGates(small_uniform(), LearnMasks(keep_params=0.5).initial_log_alpha)
    assert open_probability(gates.text.width_D[0]).item() == pytest.approx(0.996, abs=5e-4)
    assert open_probability(torch.tensor(0.0)).item() == pytest.approx(1 / (1 + (0.1 / 1.1) ** (2 / 3)))
    assert value(torch.tensor([0.0, 1.0, -5.0])).tolist() == pytest.approx([0.5, 0.7685, 0.0025], abs=5e-5)
    assert sample(torch.tensor([0.0, 9.0, -9.0]), torch.full((3,), 0.5)).tolist() == [0.5, 1.0, 0.0]


def test_all_gates_open_are_expected_to_keep_every_parameter():
    model = tiny_clip()
    gates = HardConcreteGates(model.config, initial_log_alpha=100.0).double()
    assert gates.expected_params().item() == pytest.approx(model.config.prunable_params, rel=1e-12)


def golden_model(shared):
    files = shared / "golden"
    golden = load_file(files / "auto_expected.safetensors")
    config = config_from_open_clip(json.loads((files / "auto_checkpoint_config.json").read_text()))
    weights = {k.removeprefix("dense/"): v.double() for k, v in golden.items() if k.startswith("dense/")}
    weights.setdefault("logit_scale", golden["logit_scale"].double())
    return golden, from_open_clip(weights, config).double().eval()


def golden_gates(golden, prefix: str, dtype=torch.float64) -> Gates:
    def tower(name: str) -> TowerGates:
        part = {group: golden[prefix.format(tower=name, group=group)].to(dtype) for group in GROUPS}
        return TowerGates(
            part["hidden"].flatten(), tuple(part["heads"].flatten(1)), tuple(part["intermediate"].flatten(1))
        )

    return Gates(tower("image"), tower("text"))


GROUPS = ("hidden", "heads", "intermediate")


def relative_error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


def test_masked_features_equal_the_official_masked_model(shared):
    golden, model = golden_model(shared)
    gates = golden_gates(golden, "mask/{tower}/{group}")
    pixels, tokens = golden["pixels"].double(), golden["tokens"]
    assert relative_error(model.image(pixels, gates.image), golden["masked/float64/image_features"]) < 1e-10
    assert relative_error(model.text(tokens, gates.text), golden["masked/float64/text_features"]) < 1e-10


def test_features_under_sampled_gates_equal_the_official_ones(shared):
    golden, model = golden_model(shared)
    pixels, tokens = golden["pixels"].double(), golden["tokens"]
    uniforms = golden_gates(golden, "sampled/{tower}/u_{group}")
    log_alphas = golden_gates(golden, "loga/{tower}/{group}")
    expected = golden_gates(golden, "sampled/{tower}/mask_{group}")
    towers = []
    for log_alpha, uniform, mask in zip(log_alphas, uniforms, expected, strict=True):
        drawn = TowerGates(
            sample(log_alpha.width_D, uniform.width_D),
            tuple(map(sample, log_alpha.heads, uniform.heads)),
            tuple(map(sample, log_alpha.ffn, uniform.ffn)),
        )
        torch.testing.assert_close(drawn.width_D, mask.width_D, rtol=0, atol=1e-12)
        towers.append(drawn)
    gates = Gates(*towers)
    assert relative_error(model.image(pixels, gates.image), golden["sampled/float64/image_features"]) < 1e-10
    assert relative_error(model.text(tokens, gates.text), golden["sampled/float64/text_features"]) < 1e-10


def test_the_cut_golden_model_equals_the_official_masked_one(shared):
    """The official cut differs from its own masked model by 14 to 17 % of the largest feature; ours does not."""
    golden, model = golden_model(shared)
    gates = golden_gates(golden, "mask/{tower}/{group}")
    cut = take(fold(model, gates), Keep.open_gates(model.config, gates))
    assert [block.heads for block in cut.config.image.blocks] == [4, 0, 2, 3]
    assert [block.ffn for block in cut.config.text.blocks] == [124, 10, 134, 91]
    pixels, tokens = golden["pixels"].double(), golden["tokens"]
    assert relative_error(cut.image(pixels), golden["masked/float64/image_features"]) < 1e-10
    assert relative_error(cut.text(tokens), golden["masked/float64/text_features"]) < 1e-10


def small_uniform() -> CLIPConfig:
    return CLIPConfig.uniform(
        embed_dim=8, image_size=16, patch_size=8, image_width=32, image_layers=3,
        text_width=24, text_layers=2, head_dim=8, context_length=8, vocab_size=50,
    )  # fmt: skip


@pytest.mark.parametrize("initial", [-3.0, 0.0, 4.0])  # far below, near and far above the budget
@pytest.mark.parametrize("keep_params", [0.05, 0.25, 0.5, 0.9])
def test_survivors_meet_the_budget_to_less_than_a_neuron(keep_params, initial):
    config = small_uniform()
    gates = HardConcreteGates(config, initial)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for log_alpha in gates.parameters():
            log_alpha += torch.randn(log_alpha.shape, generator=generator)
    budget = int(keep_params * config.prunable_params)
    cut = survivors(gates, budget).shrink(config)
    neuron = 2 * max(cut.image.width, cut.text.width) + 1
    assert 0 <= budget - cut.prunable_params < neuron


def test_equal_gates_lose_the_same_share_everywhere():
    config = small_uniform()
    cut = survivors(HardConcreteGates(config, 4.0), config.prunable_params // 4).shrink(config)
    shares = [cut.image.width / 32, cut.text.width / 24, *(block.ffn / 128 for block in cut.image.blocks)]
    assert all(0.4 < share < 0.6 for share in shares)  # a half of the width times a half of the rest


def test_gates_that_met_the_constraint_are_cut_as_expected():
    """Half of every vector wide open, half shut: exactly the open ones survive."""
    config = small_uniform()
    gates = HardConcreteGates(config)
    with torch.no_grad():
        for log_alpha in gates.parameters():
            log_alpha.fill_(-9.0)
            log_alpha[::2] = 9.0
    expected = Keep.open_gates(gates.config, gates.map(lambda log_alpha: (log_alpha > 0).float()))
    assert survivors(gates, expected.shrink(config).prunable_params) == expected


def test_what_is_left_of_a_budget_goes_to_the_most_open_that_fit_exactly():
    """Of one closed vector two neurons are paid for: the two that are most open."""
    config = small_uniform()
    gates = HardConcreteGates(config, 9.0)
    with torch.no_grad():
        for tower in (gates.image, gates.text):
            for log_alpha in tower.ffn:
                log_alpha.fill_(-30.0)
        gates.image.ffn[1][5], gates.image.ffn[1][70] = -29.0, -28.0
    without = Keep.open_gates(config, gates.map(lambda log_alpha: (log_alpha > 0).float()))
    budget = without.shrink(config).prunable_params + 2 * (2 * config.image.width + 1)
    keep = survivors(gates, budget)
    assert keep.image.ffn == ((), (5, 70), ()) and keep.shrink(config).prunable_params == budget


def test_everything_survives_a_budget_of_everything():
    config = small_uniform()
    assert survivors(HardConcreteGates(config, -3.0), config.prunable_params) == Keep.everything(config)


def test_a_budget_below_the_smallest_cut_is_refused():
    with pytest.raises(ValueError, match="3 parameters are below the"):
        survivors(HardConcreteGates(small_uniform()), 3)


def test_gates_with_their_survivors_equal_the_cut_model():
    model = tiny_clip()
    gates = HardConcreteGates(model.config, 1.0).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for log_alpha in gates.parameters():
            log_alpha += torch.randn(log_alpha.shape, generator=generator, dtype=torch.float64)
    keep = survivors(gates, model.config.prunable_params // 2)
    values = gates.values(keep)
    assert Keep.open_gates(gates.config, values) == keep
    cut = take(fold(model, values), keep)
    pixels = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    tokens = torch.tensor([[28, 3, 29], [28, 29, 0]])
    for ours, expected in zip(cut(pixels, tokens), model(pixels, tokens, values), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_the_constraint_pulls_the_expected_size_to_the_target_from_both_sides():
    config = tiny_clip().config
    rule = LearnMasks(keep_params=0.5, target_warmup=0.3, log_alpha_lr=0.05)
    for initial in (4.0, -2.0):  # too large and too small
        gates = HardConcreteGates(config, initial)
        constraint = SizeConstraint(
            rule, reference_params=config.prunable_params, current_params=config.prunable_params, steps=600
        )
        optimizer = torch.optim.Adam(gates.parameters(), lr=rule.log_alpha_lr)
        for step in range(600):
            sparsity = constraint.sparsity(gates)
            constraint.penalty(sparsity, step).backward()
            constraint.ascend(sparsity, step)
            optimizer.step()
            optimizer.zero_grad()
            gates.clamp_()
        assert constraint.sparsity(gates).item() == pytest.approx(0.5, abs=0.02)


def test_the_same_generator_draws_the_same_gates():
    gates = HardConcreteGates(tiny_clip().config, 0.0)
    first, second, other = (gates.sample(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.image.width_D, second.image.width_D)
    assert not torch.equal(first.image.width_D, other.image.width_D)
