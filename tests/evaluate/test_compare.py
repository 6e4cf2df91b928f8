"""What was lost is what a person counts on small matrices, equal models differ in nothing, and CKA is its formula."""

import json
import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import binomtest, false_discovery_control
from torch.nn import functional as F

from tests.evaluate.conftest import COLOURS, ColourModel, Pictures
from tests.test_cli import tiny  # noqa: F401  a fixture
from tinyclip.data.sources import open_source
from tinyclip.distill.teacher import Teacher
from tinyclip.evaluate.compare import Comparing, class_losses, compare, per_cost
from tinyclip.evaluate.compare_words import tables, to_json, words
from tinyclip.evaluate.datasets import labelled_set
from tinyclip.evaluate.drift import (
    cka,
    cka_debiased,
    ece,
    ece_difference,
    geometry,
    jaccard,
    neighbours,
    overlap,
    rank_biased_overlap,
    reliability,
)
from tinyclip.evaluate.paired import agreement, benjamini_hochberg, mcnemar, retention, right_and_wrong
from tinyclip.formats import checkpoint
from tinyclip.model import CLIP, CLIPConfig, initialise
from tinyclip.preprocess import Preprocess
from tinyclip.tokenizer import Tokenizer

QUICK = Comparing(timing=False, min_items=2, neighbours=2)


def quiet(_: str) -> None:
    """Progress that nobody reads."""


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Neighbours.


def test_neighbours_by_eye():
    angle_N = torch.tensor([0.0, 10.0, 30.0, 90.0]).deg2rad()
    unit_NE = torch.stack([angle_N.cos(), angle_N.sin()], 1)
    assert neighbours(unit_NE, 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert neighbours(unit_NE, 10).shape == (4, 3)  # there are no more than three others


def test_equal_pictures_are_each_others_neighbours_and_not_their_own():
    same = F.normalize(torch.ones(6, 3), dim=-1)
    nearest_NK = neighbours(same, 2)
    assert nearest_NK.shape == (6, 2) and all(row not in own for row, own in enumerate(nearest_NK.tolist()))


def test_overlap_and_jaccard_by_eye():
    first, second = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[3, 2, 9], [7, 8, 9]])
    assert overlap(first, second).tolist() == [2 / 3, 0]
    assert jaccard(first, second).tolist() == [2 / 4, 0]
    assert overlap(first, first).tolist() == jaccard(first, first).tolist() == [1, 1]


def test_rank_biased_overlap_by_eye():
    one, other = torch.tensor([[1, 2]]), torch.tensor([[2, 1]])
    # Depth 1 shares nothing, depth 2 all: 0.1 * 0 + 0.1 * 0.9 * 1, and 0.9^2 for all deeper ones.
    assert rank_biased_overlap(one, other).item() == pytest.approx(0.09 + 0.81)
    assert rank_biased_overlap(one, one).item() == pytest.approx(1)
    assert rank_biased_overlap(one, other + 5).item() == 0


def test_of_rank_biased_overlap_the_top_weighs_most():
    lists = torch.tensor([[1, 2, 3, 4]])
    top, end = torch.tensor([[9, 2, 3, 4]]), torch.tensor([[1, 2, 3, 9]])
    assert rank_biased_overlap(lists, top) < rank_biased_overlap(lists, end)
    assert overlap(lists, top) == overlap(lists, end)


# Geometry.


def gram_cka(x_NE: torch.Tensor, y_NF: torch.Tensor) -> float:
    """Kornblith et al. 2019, equations 2 and 3, on centred Gram matrices."""
    centre = torch.eye(len(x_NE), dtype=torch.float64) - 1 / len(x_NE)
    k, m = (centre @ rows @ rows.T @ centre for rows in (x_NE, y_NF))
    return ((k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt()).item()


def gram_cka_debiased(x_NE: torch.Tensor, y_NF: torch.Tensor) -> float:
    """Song et al. 2012, equation 5, on Gram matrices with a diagonal of 0."""
    num = len(x_NE)

    def hsic(k, m):
        k, m = k - k.diag().diag(), m - m.diag().diag()
        both = (k @ m).trace() + k.sum() * m.sum() / ((num - 1) * (num - 2)) - 2 * (k @ m).sum() / (num - 2)
        return both / (num * (num - 3))

    k, m = x_NE @ x_NE.T, y_NF @ y_NF.T
    return (hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()).item()


def test_cka_is_the_formula_on_gram_matrices():
    x, y = noise(20, 6), noise(20, 9, seed=1)
    y[:, :3] += x[:, :3]
    assert cka(x, y) == pytest.approx(gram_cka(x, y), rel=1e-12)
    assert cka_debiased(x, y) == pytest.approx(gram_cka_debiased(x, y), rel=1e-10)


def test_cka_by_eye():
    # Centred, the first is (-1, 0, 1) and the second (1, -2, 1): products that sum to 0.
    assert cka(torch.tensor([[0.0], [1], [2]]), torch.tensor([[1.0], [-2], [1]])) == pytest.approx(0)
    assert cka(torch.tensor([[0.0], [1], [2]]), torch.tensor([[10.0], [8], [6]])) == pytest.approx(1)


def test_cka_sees_no_rotation_scale_or_shift():
    x_NE = noise(30, 5)
    rotation_EE = torch.linalg.qr(noise(5, 5, seed=1)).Q
    assert cka(x_NE, 3 * x_NE @ rotation_EE + 7) == pytest.approx(1)


def test_unrelated_embeddings_of_many_dimensions_look_alike_to_cka_alone():
    x, y = noise(20, 200), noise(20, 200, seed=1)
    assert cka(x, y) > 0.8 and abs(cka_debiased(x, y)) < 0.1


def test_a_cosine_is_given_only_where_the_sizes_are_equal():
    x = F.normalize(noise(6, 4), dim=-1)
    assert geometry(x, x) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))
    assert geometry(x, -x).cosine == pytest.approx(-1)
    assert geometry(x, noise(6, 5)).cosine is None and geometry(x[:3], x[:3]).cka_debiased is None


# Calibration.

CONFIDENCE = torch.tensor([0.85, 0.85, 0.85, 0.85, 0.25, 0.25])
RIGHT = torch.tensor([True, True, True, False, False, False])


def test_calibration_by_eye():
    # At 0.85 three of four are right: a gap of 0.1 on 4/6 of the answers. At 0.25 none is: 0.25 on 2/6.
    assert ece(CONFIDENCE, RIGHT, bins=10) == pytest.approx(0.1 * 4 / 6 + 0.25 * 2 / 6)
    low, high = (reliability(CONFIDENCE, RIGHT, bins=10)[number] for number in (2, 8))
    assert low == (0.2, 0.3, 2, pytest.approx(0.25), 0.0)
    assert high == (0.8, 0.9, 4, pytest.approx(0.85), 0.75)
    assert reliability(CONFIDENCE, RIGHT, bins=10)[0] == (0.0, 0.1, 0, None, None)


def test_the_edges_of_bins_belong_to_the_lower_one_and_0_to_the_first():
    edges = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert [one.n for one in reliability(edges, edges > 0, bins=2)] == [2, 1]


def test_a_difference_in_calibration_is_paired():
    same, worse = (CONFIDENCE.repeat(50), RIGHT.repeat(50)), (CONFIDENCE.repeat(50) * 0.5, RIGHT.repeat(50))
    assert ece_difference(same, same) == (0, 0, 0, 300) and not ece_difference(same, same).different
    found = ece_difference(worse, same)
    assert found.value == pytest.approx(ece(*worse) - ece(*same)) and found.low <= found.value <= found.high


@pytest.mark.parametrize("confidence", [torch.tensor([1.1]), torch.tensor([torch.nan]), torch.tensor([])])
def test_what_is_no_confidence_is_refused(confidence):
    with pytest.raises(ValueError, match="expected confidences in"):
        ece(confidence, confidence > 0)


# Pairs of answers.


def test_agreement_by_eye():
    teacher, student = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 0])
    assert agreement(teacher, student) == 2 / 4
    assert agreement(teacher, student, torch.tensor([True, False, True, False])) == 1 / 2
    assert agreement(teacher, student, torch.zeros(4)) is None
    shares = right_and_wrong(torch.tensor([1, 1, 0, 0, 1]), torch.tensor([1, 0, 1, 0, 0]))
    assert list(shares.values()) == [1 / 5, 2 / 5, 1 / 5, 1 / 5]


@pytest.mark.parametrize("lost, gained", [(0, 0), (5, 0), (1, 7), (30, 12), (4, 4), (5000, 4800)])
def test_mcnemar_is_the_binomial_test_of_the_discordant(lost, gained):
    expected = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected)


def test_adjusted_p_values_are_scipys():
    p_C = [0.01, 0.5, 0.02, 0.03, 0.9, 0.04, 0.02]
    assert benjamini_hochberg(p_C) == pytest.approx(false_discovery_control(p_C))


def test_of_classes_without_a_difference_none_is_called_different():
    """64 classes of 10 coin flips each: alone some would be, adjusted none is."""
    generator = torch.Generator().manual_seed(0)
    teacher_I, student_I = (torch.rand(640, generator=generator) < 0.5 for _ in range(2))
    losses = class_losses(teacher_I, student_I, torch.arange(640) % 64, [str(number) for number in range(64)])
    assert any(loss.difference_high < 0 for loss in losses)
    assert {loss.verdict for loss in losses} == {"not different"}


def test_class_losses_by_eye():
    """Class 0 loses 8 of 10 images, class 2 none of 3; class 1 has no images."""
    teacher_I = torch.tensor([1] * 10 + [1, 0, 1])
    student_I = torch.tensor([1] * 2 + [0] * 8 + [1, 0, 1])
    lost, kept = class_losses(teacher_I, student_I, torch.tensor([0] * 10 + [2] * 3), ["cat", "dog", "fox"])
    assert (lost.name, lost.label, lost.n, lost.teacher, lost.student) == ("cat", 0, 10, 1.0, 0.2)
    assert (lost.difference, lost.verdict) == (pytest.approx(-0.8), "worse")
    assert lost.p == 2 / 2**8 and lost.q == 2 * lost.p
    assert (kept.name, kept.difference, kept.difference_low, kept.verdict) == ("fox", 0, 0, "not different")


def test_the_share_kept_by_eye():
    teacher, student = torch.tensor([1, 1, 1, 1] * 50), torch.tensor([1, 1, 1, 0] * 50)
    kept = retention(student, teacher)
    assert kept is not None and kept.value == 0.75 and 0.65 < kept.low < 0.75 < kept.high < 0.85
    assert retention(teacher, teacher) == (1, 1, 1, 200)
    assert retention(student, torch.zeros(200)) is None
    grouped = retention(student, teacher, torch.tensor([0, 0, 0, 1] * 50))  # class 0 keeps all, class 1 nothing
    assert grouped == (0.5, 0.5, 0.5, 200)


def test_score_per_cost_by_eye():
    values = per_cost({"teacher": 0.8, "student": 0.6}, {"teacher": {"mb": 40}, "student": {"mb": 10}})
    assert values["teacher_score_per_mb"] == 0.02 and values["student_score_per_mb"] == 0.06
    assert values["mb_ratio"] == 0.25 and values["score_per_mb_ratio"] == pytest.approx(3)


# The whole, on a toy whose answers are plain.


class Blind(ColourModel):
    """Sees no blue: a blue picture is as much red as green, and yellow is what it was."""

    def encode_image(self, pixels, *, normalize=False):
        rgb = super().encode_image(pixels, normalize=normalize)
        return F.normalize(torch.stack([rgb[:, 0] + rgb[:, 2], rgb[:, 1], 0 * rgb[:, 2]], 1), dim=-1)


class Toy(Teacher):
    """A teacher around the toy, which reads uint8 pixels and words."""

    def encode_image(self, pixels, *, normalize=False):
        return self.model.encode_image(pixels, normalize=normalize)

    def encode_text(self, texts, *, normalize=False):
        return self.model.encode_text(texts, normalize=normalize)


def toy(model: ColourModel, name: str) -> Toy:
    return Toy(name, model.preprocess, tuple, 3, 10.0, model)  # type: ignore[arg-type]


@pytest.fixture
def coloured():
    return Pictures(*((colour, [f"a {colour}"], (colour,)) for colour in COLOURS for _ in range(6)))


def test_a_blind_student_loses_the_blue_pictures(coloured):
    found = compare(
        toy(ColourModel(), "sees"), toy(Blind(), "blind"), [labelled_set("toy", coloured)], settings=QUICK, say=quiet
    )
    (loss,) = found.data_sets
    assert (loss.n, loss.classes, loss.verdict) == (24, 4, "worse")
    assert loss.scores["teacher"] == 1 and loss.scores["student"] == 0.75 and loss.scores["retention"] == 0.75
    assert loss.scores["agreement"] == loss.scores["agreement_teacher_right"] == 0.75
    assert loss.scores["teacher_alone_right"] == 0.25 and "agreement_teacher_wrong" not in loss.scores
    (worst,) = loss.worst_classes
    assert (worst.name, worst.lost, worst.difference) == ("blue", 6, -1) and len(worst.examples) == 4
    assert {example.student_said for example in worst.examples} == {"red"}
    assert [(e.key, e.item) for e in worst.examples] == [(f"item{item}", item) for item in range(12, 16)]
    assert all((e.picture or "").startswith("data:image/webp;base64,") for e in worst.examples)
    (confusion,) = loss.confusions_gained
    assert (confusion.label, confusion.said, confusion.teacher_n, confusion.student_n) == ("blue", "red", 0, 6)
    assert (loss.per_class[0].name, loss.per_class[0].verdict) == ("blue", "not different")  # 6 images: q = 0.125
    assert found.not_measured["cost"] == "the layers of sees, blind are not tinyclip's: its cost is not counted"
    first, *_ = words(found)
    assert first.startswith("toy: student 75.0% [58.3, 91.7] vs teacher 100.0% [100.0, 100.0]: -25.0 points")
    assert "(different: worse)" in first and "worst classes: blue -100 points" in first


def test_a_model_and_itself_differ_in_nothing(coloured):
    sees = toy(ColourModel(), "sees")
    found = compare(sees, sees, [labelled_set("toy", coloured)], coloured, QUICK, say=quiet)
    (loss,) = found.data_sets
    assert loss.verdict == "not different" and not loss.worst_classes and not loss.confusions_gained
    for name, value in loss.scores.items():
        if "difference" in name:
            assert value == 0, name
        if name.split("_", 1)[-1].startswith(("overlap@2", "rank_biased", "jaccard", "cosine", "cka")):
            assert "by_chance" in name or value == pytest.approx(1), name
    assert found.retrieval is not None
    assert set(found.retrieval.verdicts.values()) == {"not different"}
    assert found.retrieval.scores["text_to_image_agreement"] == 1
    assert "not different" in next(words(found))


def test_data_sets_count_alike_in_the_mean_whatever_their_size(coloured):
    small = Pictures(("red", [], ("red",)), ("green", [], ("green",)))
    sets = [labelled_set("large", coloured), labelled_set("small", small, metric="mean_per_class")]
    found = compare(toy(ColourModel(), "sees"), toy(Blind(), "blind"), sets, settings=QUICK, say=quiet)
    assert found.overall["student"] == pytest.approx((0.75 + 1) / 2) and found.overall["data_sets"] == 2
    assert found.data_sets[1].score == "mean_per_class"
    assert next(words(found)).startswith("mean of 2 data sets: student 87.5%")


def test_a_set_of_several_classes_per_image_is_absent_with_its_reason(coloured):
    several = replace(labelled_set("toy", coloured), metric="map_11point", label_sets=tuple((0, 1) for _ in range(24)))
    with pytest.raises(ValueError, match="expected labelled images or pairs, got none; toy: the labels are of several"):
        compare(toy(ColourModel(), "a"), toy(Blind(), "b"), [several], say=quiet)


def test_pictures_stay_within_their_bytes(coloured):
    settings = QUICK.model_copy(update={"picture_bytes": 200})
    models = toy(ColourModel(), "sees"), toy(Blind(), "blind")
    found = compare(*models, [labelled_set("toy", coloured)], settings=settings, say=quiet)
    pictures = [example.picture for example in found.data_sets[0].worst_classes[0].examples]
    assert sum(len(picture or "") for picture in pictures) <= 200 and None in pictures


# The command.


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two models of noise, of different embedding sizes."""
    folder = tmp_path_factory.mktemp("models")
    for name, embed_dim in (("teacher", 8), ("small", 6)):
        config = CLIPConfig.uniform(
            embed_dim=embed_dim, image_size=16, patch_size=8, image_width=16, image_layers=2, text_width=16,
            text_layers=1, context_length=12, head_dim=8,
        )  # fmt: skip
        model = initialise(CLIP(config), torch.Generator().manual_seed(embed_dim))
        model.preprocess, model.tokenizer = Preprocess(size=16), Tokenizer.openai(12)
        checkpoint.save(model, folder / name)
    return folder


def test_the_command_writes_what_the_report_shows(runs, tmp_path, tiny):  # noqa: F811
    data = ("--zeroshot", "scenes?split=classes&count=48", "--retrieval", "scenes?split=heldout&count=16")
    result = tiny("compare", runs / "teacher", runs / "small", *data, "--out", tmp_path / "compare.json")
    assert result.status == 0 and result.out.startswith("scenes classes: student ")
    written = json.loads((tmp_path / "compare.json").read_text())
    assert written["words"][0].startswith("scenes classes: student ")
    assert {"teacher_mb", "student_gmac", "ms_ratio", "student_score_per_ms"} <= written["value"].keys()
    assert len(written["data_sets"][0]["teacher_reliability"]) == 15
    assert written["settings"]["neighbours"] == 10 and written["retrieval"]["texts"] == 48
    assert all(math.isfinite(value) for value in written["data_sets"][0]["scores"].values())


def test_json_is_the_same_and_nothing_else(runs, tiny):  # noqa: F811
    result = tiny("compare", runs / "teacher", runs / "small", "--retrieval", "scenes?count=8", "--no-timing", "--json")
    printed = json.loads(result.out)
    assert printed["data_sets"] == [] and printed["value_of"] == "image_to_text_recall@1"
    assert printed["not_measured"] == {
        "ms": "left out",
        "cosine": "not comparable: embeddings of 8 and 6 dimensions",
    }
    assert "teacher_ms" not in printed["value"] and "image_cosine" not in printed["retrieval"]["scores"]


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "expected --suite NAME, --zeroshot DATA or --retrieval DATA"),
        (["--data-root", ".", "--retrieval", "scenes"], "--data-root is for --suite NAME"),
        (["--template", "a {}.", "--retrieval", "scenes"], "--template is for --zeroshot DATA"),
        (["--retrieval", "scenes", "--out", "."], "expected a file to write, got a directory"),
        (["--zeroshot", "scenes", "--batch-size", "0"], "--batch-size: expected a whole number of at least 1, got '0'"),
    ],
)
def test_a_mistake_is_one_line(tiny, options, message):  # noqa: F811
    result = tiny("compare", "teacher", "student", *options)
    assert result.status == 2 and result.err.count("\n") == 1 and message in result.err


def test_tables_are_made_of_everything(coloured):
    models = toy(ColourModel(), "sees"), toy(Blind(), "blind")
    found = compare(*models, [labelled_set("toy", coloured)], open_source("scenes?count=8"), QUICK, say=quiet)
    assert len(list(tables(found))) == 3 + 3 + 1 and json.loads(to_json(found))["words"]
