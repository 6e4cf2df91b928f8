"""Top-k accuracy counts what a person counts, and a class is the renormalised mean of its descriptions."""

import json
import sys

import pytest
import torch
from PIL import Image

from tests.evaluate.test_suites import write_model
from tinyclip import cli
from tinyclip.evaluate import DEFAULT_TEMPLATES, answer_scores, answers, classifier, top_k_accuracy, zeroshot
from tinyclip.evaluate.datasets import labelled_set
from tinyclip.evaluate.zeroshot import Answers, class_ranks
from tinyclip.tokenizer import Tokenizer

# Similarities of 4 images (rows) and 8 classes.
SIMILARITY = torch.tensor(
    [
        [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],  # class 0: rank 1
        [0.9, 0.8, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],  # class 1: rank 2
        [0.9, 0.1, 0.5, 0.3, 0.4, 0.5, 0.6, 0.7],  # class 2: of the tie for rank 4 the first
        [0.9, 0.8, 0.2, 0.1, 0.4, 0.5, 0.6, 0.7],  # class 3: rank 8
    ]
)


def test_top_k_by_eye():
    accuracy = top_k_accuracy(SIMILARITY, torch.eye(8), torch.arange(4), ks=(1, 2, 4, 5, 8, 9))
    assert accuracy == {"top1": 1 / 4, "top2": 2 / 4, "top4": 3 / 4, "top5": 3 / 4, "top8": 1.0}


def test_of_equally_similar_classes_the_first_wins_as_by_argmax():
    row = torch.tensor([0.5, 0.9, 0.9, 0.1, 0.9])
    assert class_ranks(row.expand(5, -1), torch.eye(5), torch.arange(5)).tolist() == [4, 1, 2, 5, 3]


@pytest.mark.parametrize("classes, width", [(2, 3), (7, 16), (1001, 513)])
def test_classes_of_one_row_are_equally_similar_whatever_the_product_makes_of_its_last_columns(classes, width):
    torch.manual_seed(0)
    image_IE, class_CE = torch.randn(5, width), torch.randn(1, width).expand(classes, -1)
    label_I = torch.tensor([0, 1, classes - 1, 0, 1])
    assert torch.equal(class_ranks(image_IE, class_CE, label_I), label_I + 1)


class ReadsAsClip:
    """Of a text the model sees its token ids; their embedding depends on the texts beside it, in the last bits."""

    device, scale = torch.device("cpu"), 10.0

    def __init__(self, preprocess=None):
        self.tokenizer, self.preprocess = Tokenizer.openai(), preprocess

    def encode_text(self, texts, *, normalize):
        torch.manual_seed(0)
        rows = torch.randn(49408, 8)[self.tokenizer(texts)].sum(1) * (1 + 1e-7 * torch.rand(len(texts), 1))
        return torch.nn.functional.normalize(rows, dim=-1)

    def encode_image(self, pixels, *, normalize):
        return self.encode_text(["cat"] * len(pixels), normalize=normalize)


@pytest.mark.parametrize("templates", [["{}"], ["a {}.", "the {}"]])
def test_classes_of_the_same_tokens_have_the_same_row(templates):
    names = ["missile", "Cat", ["dog", "hound"], "cat", "missile", ["Hound", "DOG"], "cat ", "cats", ["cat", "puss"]]
    rows = classifier(ReadsAsClip(), names, templates)
    same = (rows[:, None] == rows).all(-1)
    assert [row.nonzero().flatten().tolist() for row in same] == [
        [0, 4], [1, 3, 6], [2, 5], [1, 3, 6], [0, 4], [2, 5], [1, 3, 6], [7], [8],
    ]  # fmt: skip


def test_labels_that_differ_in_case_only_are_two_classes_and_it_is_said_that_the_first_wins(model, pictures):
    reads = ReadsAsClip(model.preprocess)
    source, said = pictures(("red", [], ("cat",)), ("red", [], ("Cat",)), ("red", [], ("dog",))), []
    scores = zeroshot(reads, source, ["{}"], say=said.append)
    assert (scores["top1"], scores["classes"], scores["alike_classes"]) == (1 / 3, 3, 2)
    line = "classes that read the same to the model, of which only the first can be predicted: 'Cat' (0), 'cat' (1)"
    assert said == [f"toy: {line}"]
    own = answers(reads, labelled_set("toy", source, ["{}"]))
    assert own.predicted_I.tolist() == [0, 0, 0] and own.rank_I.tolist() == [2, 1, 3]
    assert answer_scores(own)["alike_classes"] == 2
    assert "alike_classes" not in zeroshot(model, pictures(("red", [], ("red",)), ("blue", [], ("blue",))))


def test_the_command_says_which_classes_read_the_same(tmp_path, monkeypatch, capsys):
    for name in ("red", "Red", "green"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9), name.lower()).save(tmp_path / "data" / name / "0.png")
    (tmp_path / "own.yaml").write_text("datasets: [{name: own, data: data}]")
    command = ["tinyclip", "evaluate", str(write_model(tmp_path / "model")), "--json"]
    for more in (["--zeroshot", str(tmp_path / "data")], ["--suite", str(tmp_path / "own.yaml")]):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit):
            cli.main()
        shown = capsys.readouterr()
        found = json.loads(shown.out)
        assert found.get("datasets", {"own": found})["own"]["alike_classes"] == 2
        assert "only the first can be predicted: 'Red' (0), 'red' (2)" in shown.err


def test_scores_of_answers_by_eye():
    """Ranks 1, 2, 5, 6 of the right class, the last two of a class of their own. Of four classes there is no top 5."""
    found = Answers(*[torch.empty(0)] * 3, torch.tensor([0, 0, 1, 1]), torch.empty(0), torch.tensor([1, 2, 5, 6]), None)
    scores = answer_scores(found._replace(class_CE=torch.eye(6)), "mean_top1_top5")
    assert (scores["top1"], scores["top5"], scores["mean_per_class"]) == (1 / 4, 3 / 4, (1 / 2 + 0) / 2)
    assert scores["mean_top1_top5"] == 1 / 2 and (scores["n"], scores["classes"]) == (4, 6)
    assert "top5" not in answer_scores(found._replace(class_CE=torch.eye(4)))


def test_a_class_is_the_mean_over_synonyms_and_templates(model):
    names, templates = [["red", "yellow"], ["blue"]], ["{}", "green {}."]
    first, second = classifier(model, names, templates)
    texts = model.encode_text(["red", "green red.", "yellow", "green yellow."], normalize=True)
    torch.testing.assert_close(first, torch.nn.functional.normalize(texts.mean(0), dim=0))
    assert second.norm().item() == pytest.approx(1) and not second.requires_grad
    assert torch.equal(classifier(model, ["red", "blue"], templates), classifier(model, [["red"], ["blue"]], templates))


def test_a_labelled_source_is_scored(model, pictures):
    source = pictures(
        ("red", [], ("red", "scarlet")),
        ("green", [], ("green",)),
        (None, [], ("green",)),
        ("blue", [], None),
        ("red", [], ("blue",)),  # the label is wrong
    )
    model.train()
    scores = zeroshot(model, source, batch_size=2)  # top5 of 3 classes: no
    assert scores == {"top1": 2 / 3, "top1_low": 0, "top1_high": 1, "n": 3, "classes": 3}
    assert model.training and model.modes == {(False, False)}


@pytest.mark.parametrize(
    "labels, templates, message",
    [
        ([None, None], DEFAULT_TEMPLATES, "toy: expected labels, none of the 2 items has any"),
        ([("red",), ("red",)], DEFAULT_TEMPLATES, "at least 2 classes"),
        ([("red",), ("blue",)], ["a photo"], "expected templates like"),
        ([("red",), ("blue",)], [], "expected templates like"),
        ([("red",), ("blue", " ")], DEFAULT_TEMPLATES, r"a name for each class, class 0 has \('blue', ' '\)"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, pictures, labels, templates, message):
    with pytest.raises(ValueError, match=message) as error:
        zeroshot(model, pictures(*(("red", [], label) for label in labels)), templates)
    assert "\n" not in str(error.value)


def test_embeddings_that_are_not_finite_are_refused(model, pictures):
    model.factor.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="expected finite embeddings"):
        zeroshot(model, pictures(("red", [], ("red",)), ("blue", [], ("blue",))))
