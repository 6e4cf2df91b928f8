"""Top-k accuracy counts what a person counts, and a class is the renormalised mean of its descriptions."""

import pytest
import torch

from tinyclip.evaluate import DEFAULT_TEMPLATES, classifier, top_k_accuracy, zeroshot
from tinyclip.evaluate.zeroshot import Answers, answer_scores

# Similarities of 4 images (rows) and 8 classes.
SIMILARITY = torch.tensor(
    [
        [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],  # class 0: rank 1
        [0.9, 0.8, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],  # class 1: rank 2
        [0.9, 0.1, 0.5, 0.3, 0.4, 0.5, 0.6, 0.7],  # class 2: a tie for rank 4 counts as 5
        [0.9, 0.8, 0.2, 0.1, 0.4, 0.5, 0.6, 0.7],  # class 3: rank 8
    ]
)


def test_top_k_by_eye():
    accuracy = top_k_accuracy(SIMILARITY, torch.eye(8), torch.arange(4), ks=(1, 2, 4, 5, 8, 9))
    assert accuracy == {"top1": 1 / 4, "top2": 2 / 4, "top4": 2 / 4, "top5": 3 / 4, "top8": 1.0}


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
