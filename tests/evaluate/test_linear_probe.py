"""Both solvers are scikit-learn's logistic regression, C is found by OpenAI's search, and features are the layer's."""

import math
import sys

import pytest
import torch

from tests.test_model import random_model, small
from tinyclip.data.sources import open_source
from tinyclip.evaluate import few_shot, linear_probe, probe
from tinyclip.evaluate.linear_probe import Labelled, _hold_out, best_C, features, fit, fit_sklearn, fit_torch, split
from tinyclip.model import CLIPConfig
from tinyclip.preprocess import Preprocess

GRID = [10 ** (step / 8 - 6) for step in range(97)]


def clouds(classes, count, seed=0, dim=24, noise=4.0):
    """Overlapping clouds around `classes` centres: `count` features and their labels 3, 6, 9, ..."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    number = torch.randint(classes, (count,), generator=generator)
    return centre[number] + noise * torch.randn(count, dim, generator=generator), 3 + 3 * number


@pytest.mark.parametrize("C", [1e-6, 1e-3, 0.316, 10, 1e6])
@pytest.mark.parametrize("classes", [2, 7])
def test_torch_equals_scikit_learn(classes, C):
    train, (test, label) = Labelled(*clouds(classes, 300)), clouds(classes, 1000, seed=1)
    theirs, ours = fit_sklearn(train, C), fit_torch(train, C)
    torch.testing.assert_close(ours.weight_CD, theirs.weight_CD, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours.bias_C, theirs.bias_C, rtol=1e-6, atol=1e-8)
    assert torch.equal(ours.class_C, theirs.class_C)
    rough = fit_torch(train, C, dtype=torch.float32)
    right = [(one.predict(test) == label).double().mean().item() for one in (theirs, ours, rough)]
    assert right[0] == right[1] and abs(right[0] - right[2]) <= 0.002


@pytest.mark.parametrize("classes", [2, 5])
def test_the_fit_is_where_the_definition_has_no_gradient(classes):
    feature_ND, label_N = clouds(classes, 200)
    found = fit_torch(Labelled(feature_ND, label_N), 0.5, tolerance=1e-9)
    weight_CD, bias_C = found.weight_CD.requires_grad_(), found.bias_C.requires_grad_()
    logits = feature_ND.double() @ weight_CD.T + bias_C
    errors = torch.nn.functional.cross_entropy(logits, label_N // 3 - 1, reduction="sum")
    # Of two classes the difference of the rows is penalised; the rows found are half of it, with opposite signs.
    size = (weight_CD[1] - weight_CD[0]).square().sum() if classes == 2 else weight_CD.square().sum()
    gradients = torch.autograd.grad(size / 2 + 0.5 * errors, [weight_CD, bias_C])
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients)


def test_chunks_change_nothing(monkeypatch):
    train = Labelled(*clouds(5, 200))
    whole = fit_torch(train, 1.0)
    monkeypatch.setattr(sys.modules[fit_torch.__module__], "LOGITS_PER_CHUNK", 5 * 33)  # 200 = 6 * 33 + 2
    chunked = fit_torch(train, 1.0)
    torch.testing.assert_close(chunked.weight_CD, whole.weight_CD, rtol=1e-6, atol=1e-8)
    assert torch.equal(chunked.predict(train.feature_ND), whole.predict(train.feature_ND))


def test_an_fp32_fit_multiplies_in_fp32_and_leaves_the_global_setting():
    train, before = Labelled(*clouds(5, 200)), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        single, kept = fit_torch(train, 1.0, dtype=torch.float32), torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)
    assert kept == "medium"
    torch.testing.assert_close(single.weight_CD, fit_torch(train, 1.0).weight_CD, rtol=0, atol=1e-3)


@pytest.mark.parametrize("peak", [0, 1, 37, 48, 90, 96])
def test_the_search_finds_a_single_peak_in_15_fits(peak):
    tried = []

    def accuracy(C):
        tried.append(C)
        return -abs(math.log10(C) - math.log10(GRID[peak]))

    assert best_C(accuracy) == pytest.approx(GRID[peak])
    assert tried[:7] == pytest.approx([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6]) and len(tried) <= 15


def test_of_equally_good_values_the_search_takes_the_smallest():
    assert best_C(lambda C: float(C > 0.5e-2)) < 0.6e-2
    assert best_C(lambda C: 1.0) == pytest.approx(1e-6)


@pytest.mark.parametrize("solver", ["sklearn", "torch"])
def test_the_probe_is_the_protocol_written_out(solver):
    """Sweep on held-out images, then a fit on all: here in scikit-learn's own words, on a full grid."""
    from sklearn.linear_model import LogisticRegression

    (train, train_label), (held, held_label), (test, label) = (clouds(4, n, seed=n) for n in (120, 80, 500))
    scores = linear_probe(train, train_label, test, label, validation=(held, held_label), solver=solver)

    def right(C, x, y, to_x, to_y):
        return LogisticRegression(C=C, max_iter=1000).fit(x.double(), y).score(to_x.double(), to_y)

    assert min(abs(math.log10(scores["probe_C"] / C)) for C in GRID) < 1e-9
    both = torch.cat([train, held]), torch.cat([train_label, held_label])
    assert scores["probe_top1"] == pytest.approx(right(scores["probe_C"], *both, test, label))
    coarse = max(right(C, train, train_label, held, held_label) for C in GRID[::16])
    assert right(scores["probe_C"], train, train_label, held, held_label) >= coarse
    assert scores["probe_top1_low"] <= scores["probe_top1"] <= scores["probe_top1_high"]
    assert (scores["probe_n"], scores["probe_train_n"], scores["probe_classes"]) == (500, 200, 4)


def test_without_a_validation_split_a_fifth_of_each_class_is_held_out():
    label_N = torch.tensor([0] * 10 + [1] * 5 + [2] * 2 + [3])
    fitted, held_out = split(label_N, _hold_out, seed=0)
    assert label_N[held_out].bincount().tolist() == [2, 1, 1]
    assert sorted(torch.cat([fitted, held_out]).tolist()) == [*range(18)]
    assert not torch.equal(fitted, split(label_N, _hold_out, seed=1)[0])


def test_mean_per_class_weighs_classes_alike():
    train, label = clouds(2, 200, noise=0.01)
    of_three, of_six = train[label == 3][:9], train[label == 6][:1]
    test = torch.cat([of_three, of_six]), torch.tensor([3] * 8 + [6, 6])  # the ninth's label is wrong
    scores = linear_probe(train, label, *test)
    assert scores["probe_top1"] == 9 / 10 and scores["probe_mean_per_class"] == (1 + 1 / 2) / 2


def test_more_shots_classify_better_and_seeds_are_averaged():
    train, test = clouds(5, 400, noise=1.5), clouds(5, 300, seed=1, noise=1.5)
    scores = few_shot(*train, *test, shots=(1, 8), seeds=(0, 1, 2))
    assert scores["probe_1shot_top1"] < scores["probe_8shot_top1"] and scores["probe_1shot_top1_std"] > 0
    alone = [few_shot(*train, *test, shots=(8,), seeds=(seed,))["probe_8shot_top1"] for seed in range(3)]
    assert scores["probe_8shot_top1"] == pytest.approx(sum(alone) / 3)
    assert scores["probe_8shot_top1_std"] == pytest.approx(torch.tensor(alone).std().item())
    assert scores["probe_8shot_seeds"] == 3 and scores["probe_n"] == 300


def vit_or_resnet(kind):
    if kind == "vit":
        return random_model(small())
    return random_model(
        CLIPConfig.uniform(
            embed_dim=12, image_size=32, image_width=8, image_layers=(1, 1, 1, 1), text_width=16, text_layers=1,
            head_dim=8, vocab_size=64,
        )
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_the_layers_are_what_their_names_say(kind, pictures):
    model = vit_or_resnet(kind).eval()
    model.preprocess = Preprocess(size=model.config.image.image_size)
    source = pictures(("red", [], ("warm",)), ("blue", [], None), (None, [], ("cold",)), ("green", [], ("cold",)))
    names, projected_ND = features(model, source, layer="projected")
    assert names == [("warm",), ("cold",)]
    pixels = torch.stack([model.preprocess(source.image(index)) for index in (0, 3)])
    with torch.no_grad():
        torch.testing.assert_close(projected_ND, model.encode_image(pixels))
        assert not torch.allclose(projected_ND.norm(dim=-1), torch.ones(2))
        _, penultimate_ND = features(model, source, layer="penultimate")
        torch.testing.assert_close(model.image.projection(penultimate_ND), projected_ND)
    assert not model.image.projection._forward_pre_hooks


def test_a_model_is_probed_on_sources(pictures):
    model = random_model(small()).eval()
    model.preprocess = Preprocess(size=model.config.image.image_size)
    source = pictures(*((colour, [], (colour,)) for colour in ("red", "green", "blue") for _ in range(5)))
    scores = probe(model, source, source)
    assert scores["penultimate_probe_top1"] == 1.0 and scores["penultimate_probe_train_n"] == 15
    few = probe(model, source, source, layer="projected", shots=(2,))
    assert few["projected_probe_2shot_top1"] == 1.0 and few["projected_probe_2shot_seeds"] == 3


def test_a_generated_data_set_is_probed_by_both_solvers_alike():
    model = random_model(small()).eval()
    model.preprocess = Preprocess(size=model.config.image.image_size)
    train, test = open_source("scenes?split=classes&count=200"), open_source("scenes?split=classes&count=100&seed=1")
    names, train_ND = features(model, train)
    numbers = {own: number for number, own in enumerate(sorted(set(names)))}
    label_N = torch.tensor([numbers[own] for own in names])
    test_names, test_MD = features(model, test)
    fits = [fit(Labelled(train_ND, label_N), 1.0, solver).predict(test_MD) for solver in ("sklearn", "torch")]
    assert torch.equal(*fits) and len(test_names) == 100


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_label_N": torch.ones(10, dtype=torch.int64)}, "test images of the 1 classes trained on, got 1 other"),
        ({"test_label_M": torch.tensor([0, 1, 5, 6])}, r"got 2 other classes \(the first is 5\)"),
        ({"train_ND": torch.full((10, 3), torch.nan)}, "finite embeddings, got 10 of 10"),
        ({"train_label_N": torch.arange(9) % 2}, "a label for each of 10 images, got 9"),
        ({"train_label_N": torch.arange(10)}, "at least 2 training images of some class"),
        ({"test_MD": torch.ones(0, 3), "test_label_M": torch.ones(0, dtype=torch.int64)}, "trained on, got none"),
        ({"validation": (torch.ones(1, 3), torch.tensor([7]))}, "validation images of the 2 classes"),
    ],
)
def test_what_cannot_be_probed_is_refused(changes, message):
    sets = {"train_ND": torch.randn(10, 3), "train_label_N": torch.arange(10) % 2}
    sets |= {"test_MD": torch.randn(4, 3), "test_label_M": torch.arange(4) % 2}
    with pytest.raises(ValueError, match=message) as error:
        linear_probe(**sets | changes)
    assert "\n" not in str(error.value)


def test_one_class_too_few_shots_and_foreign_models_are_refused(model, pictures):
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        linear_probe(torch.randn(4, 3), torch.zeros(4), torch.randn(4, 3), torch.zeros(4))
    with pytest.raises(ValueError, match=r"4-shot probe: expected 4 \+ 4 images of each class .* a class with 5"):
        few_shot(torch.randn(10, 3), torch.arange(10) % 2, torch.randn(4, 3), torch.arange(4) % 2, shots=(4,))
    with pytest.raises(ValueError, match="no layer 'penultimate'; take 'projected'"):
        features(model, pictures(("red", [], ("red",))))


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.exceptions", None)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    for fit_by in (fit_sklearn, fit_torch):
        with pytest.raises(ValueError, match=r"pip install 'tinyclip\[probe\]'"):
            fit_by(Labelled(*clouds(2, 20)), 1.0)
