"""Recall and median rank are what a person counts on a 4 x 8 matrix, ties against the model, in tiles of any size."""

import pytest
import torch

from tinyclip.evaluate import embed, recall_at_k, recall_differences, retrieval, retrieval_ranks, with_interval
from tinyclip.evaluate.retrieval import ranks, scores_of

# Similarities of 4 images (rows) and 8 texts. Texts 0, 1 belong to image 0; 2, 3 to 1; 4, 5 to 2; 6, 7 to 3.
SIMILARITY = torch.tensor(
    [
        [0.1, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.3],  # text 1 is first: rank 1
        [0.0, 0.5, 0.4, 0.2, 0.0, 0.0, 0.0, 0.0],  # text 1 is before text 2: rank 2
        [0.2, 0.3, 0.5, 0.6, 0.1, 0.1, 0.7, 0.8],  # all others are before texts 4 and 5: rank 7
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.4, 0.6],  # texts 6 and 7 lead; they do not compete: rank 1
    ]
)
#     2    1    2    2    1    1    2    2  = rank of the text's own image
IMAGE_OF_TEXT = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])


def of_matrix(similarity, image_of_text, **options):
    """With the images as axes, the texts' coordinates are the similarities."""
    return recall_at_k(torch.eye(len(similarity)), similarity.T, image_of_text, **options)


def test_recall_by_eye():
    assert of_matrix(SIMILARITY, IMAGE_OF_TEXT, ks=(1, 2, 4, 7)) == {
        "image_to_text_recall@1": 2 / 4,
        "image_to_text_recall@2": 3 / 4,
        "image_to_text_recall@4": 3 / 4,
        "image_to_text_recall@7": 4 / 4,
        "text_to_image_recall@1": 3 / 8,
        "text_to_image_recall@2": 8 / 8,
        "text_to_image_recall@4": 8 / 8,  # k = 7 is left out: there are 4 images
    }


def test_a_model_that_says_the_same_of_everything_scores_nothing():
    recalls = of_matrix(torch.ones(4, 8), IMAGE_OF_TEXT, ks=(1,))
    assert recalls == {"image_to_text_recall@1": 0.0, "text_to_image_recall@1": 0.0}


def test_scores_have_intervals_median_ranks_and_counts():
    scores = scores_of(ranks(torch.eye(4), SIMILARITY.T, IMAGE_OF_TEXT), ks=(1, 7))
    assert scores["image_to_text_median_rank"] == 1.5  # of 1 2 7 1
    assert scores["text_to_image_median_rank"] == 2.0  # of 2 1 2 2 1 1 2 2
    assert (scores["images"], scores["texts"]) == (4, 8)
    assert scores["text_to_image_recall@1_low"] < 3 / 8 < scores["text_to_image_recall@1_high"]
    names = [name for name, _ in with_interval(scores)]
    assert names[:3] == ["image_to_text_recall@1", "image_to_text_recall@7", "text_to_image_recall@1"]
    assert set(scores) == {*names} | {f"{name}_{end}" for name in names[:-2] for end in ("low", "high")}


def test_two_models_are_compared_on_the_same_pictures():
    generator = torch.Generator().manual_seed(0)
    image_IE, noise_TE = (torch.randn(count, 6, generator=generator) for count in (300, 600))
    image_of_text_T = torch.arange(300).repeat_interleave(2)
    good, bad = (ranks(image_IE, image_IE[image_of_text_T] + size * noise_TE, image_of_text_T) for size in (1, 2))
    for name, difference in recall_differences(good, bad).items():
        assert difference.value == pytest.approx(scores_of(good)[name] - scores_of(bad)[name])
        assert difference.different and difference.low > 0 and difference.n == 300
    assert not any(difference.different for difference in recall_differences(good, good).values())
    with pytest.raises(ValueError, match="ranks of the same images and texts"):
        recall_differences(good, good._replace(image_of_text_T=image_of_text_T.flip(0)))


@pytest.mark.parametrize("candidates_per_chunk", [1, 10, 1000])
@pytest.mark.parametrize("queries_per_chunk", [1, 7, 36, 37, 1000])
def test_tiles_change_nothing(monkeypatch, queries_per_chunk, candidates_per_chunk):
    generator = torch.Generator().manual_seed(0)
    image_IE, noise_TE = (torch.randn(count, 6, generator=generator) for count in (37, 74))
    image_of_text_T = torch.arange(37).repeat_interleave(2)
    text_TE = image_IE[image_of_text_T] + noise_TE
    expected = recall_at_k(image_IE, text_TE, image_of_text_T)
    assert 0.05 < expected["text_to_image_recall@5"] < 0.95
    monkeypatch.setattr(embed, "QUERIES_PER_CHUNK", queries_per_chunk)
    monkeypatch.setattr(embed, "CANDIDATES_PER_CHUNK", candidates_per_chunk)
    assert recall_at_k(image_IE, text_TE, image_of_text_T) == expected


def test_embeddings_that_are_not_finite_are_refused():
    text_TE = SIMILARITY.T.clone()
    text_TE[5, 1] = torch.nan
    with pytest.raises(ValueError, match=r"finite embeddings, got 1 of 8 with NaN or infinity \(the first is number 5"):
        recall_at_k(torch.eye(4), text_TE, IMAGE_OF_TEXT)


@pytest.mark.parametrize("image_of_text, image", [([0, 0, 1, 1, 3, 3, 3, 3], 2), ([0, 0, 1, 1, 2, 2, 3, 4], 4)])
def test_every_image_needs_a_text_and_every_text_an_image(image_of_text, image):
    with pytest.raises(ValueError, match=f"images 0 to 3, not so for image {image}"):
        of_matrix(SIMILARITY, torch.tensor(image_of_text))


def test_a_source_is_embedded_and_scored(model, pictures):
    source = pictures(
        ("red", ["red", "a red one"], None),
        (None, ["a corrupt picture"], None),
        ("green", ["green"], None),
        ("blue", [], None),
        ("blue", ["yellow"], None),  # the caption is wrong: its nearest pictures are red and green
    )
    scores = retrieval(model, source, batch_size=2)
    assert scores["image_to_text_recall@1"] == 2 / 3 and scores["text_to_image_recall@1"] == 3 / 4
    assert scores["images"] == 3 and scores["texts"] == 4
    assert scores == scores_of(retrieval_ranks(model, source, batch_size=3))


def test_scoring_leaves_the_training_mode_as_it_was(model, pictures):
    source = pictures(("red", ["red"], None), ("blue", ["blue"], None))
    for training in (True, False):
        model.train(training)
        retrieval(model, source)
        assert model.training is training
    assert model.modes == {(False, False)}  # evaluation mode, no gradients


def test_a_source_without_captions_or_images_is_refused(model, pictures):
    with pytest.raises(ValueError, match="toy: expected captions, none of the 1 items has any"):
        retrieval(model, pictures(("red", [], None)))
    with pytest.raises(ValueError, match="toy: expected images, none of the 1 that have a text can be read"):
        retrieval(model, pictures((None, ["red"], None)))
