"""A batch is a function of (seed, step), all readers see the same crop, and bad items are left out and counted."""

from collections import Counter
from itertools import islice
from random import Random

import pytest
import torch
from PIL import Image

from tinyclip.data.loader import EvalBatches, PairLoader, Reader, check_share_of_bad, crop_box, view_random
from tinyclip.data.scenes import Scenes
from tinyclip.data.sources import BadItem, open_source
from tinyclip.distributed import World
from tinyclip.preprocess import Preprocess
from tinyclip.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def reader():
    scenes = Scenes("train", 20)
    captions = [caption for index in range(20) for caption in scenes.captions(index)]
    return Reader(Preprocess(size=16), Tokenizer.train(captions, vocab_size=600, context_length=40))


class Toy:
    """Item i is a picture of grey level i with the caption "number i"; some are corrupt, some have no caption."""

    name = "toy"

    def __init__(self, size, corrupt=(), silent=()):
        self.size, self.corrupt, self.silent = size, corrupt, silent

    def __len__(self):
        return self.size

    def key(self, index):
        return f"item {index}"

    def image(self, index):
        if index in self.corrupt:
            raise BadItem("corrupt")
        return Image.new("RGB", (20, 16), (index,) * 3)

    def captions(self, index):
        return () if index in self.silent else (f"number {index}",)


def first(loader, number):
    return list(islice(loader, number))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys == other.keys and batch.skipped == other.skipped
        for ours, theirs in zip(batch.inputs, other.inputs, strict=True):
            assert torch.equal(ours.pixels, theirs.pixels) and torch.equal(ours.tokens, theirs.tokens)


def test_workers_and_resuming_change_nothing(reader):
    settings = dict(source=Scenes("train", 10), readers=[reader], batch_size=4, seed=5)
    batches = first(PairLoader(**settings), 6)
    assert_same(first(PairLoader(**settings, workers=2), 6), batches)
    assert_same(first(PairLoader(**settings, start_step=3), 3), batches[3:])
    assert first(PairLoader(**{**settings, "seed": 6}), 1)[0].keys != batches[0].keys


def test_loading_leaves_the_global_random_state_alone(reader):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first(PairLoader(Toy(8), [reader], batch_size=4, seed=0), 3)
    assert torch.equal(torch.rand(3), expected)


def test_an_epoch_visits_every_item_once_in_its_own_order(reader):
    loader = PairLoader(Toy(13), [reader], batch_size=4, seed=0)
    assert loader.steps_per_epoch == 3
    epochs = [[key for batch in first(loader, 6)[start : start + 3] for key in batch.keys] for start in (0, 3)]
    assert all(len(set(keys)) == 12 for keys in epochs)
    assert epochs[0] != epochs[1]


def test_every_caption_of_every_item_is_drawn_about_as_often(reader):
    """Of three captions each a third of the visits, one visit an epoch."""
    source, epochs = Scenes("train", 10), 200
    loader = PairLoader(source, [reader], batch_size=10, seed=0, crop_scale=(1, 1))
    loader.picture = lambda index, random: {0: torch.zeros(3, 16, 16, dtype=torch.uint8)}  # nobody looks at them
    drawn = Counter()
    for epoch in range(epochs):
        batch = loader.batch(epoch)
        assert sorted(visit.index for visit in batch.visits) == list(range(10))
        for visit, caption in zip(batch.visits, batch.captions, strict=True):
            assert caption == source.captions(visit.index)[visit.caption]
            drawn[visit.index, visit.caption] += 1
    assert len(drawn) == 30 and all(abs(count - epochs / 3) < 25 for count in drawn.values())  # 6.7 is one deviation


def test_pixels_and_tokens_belong_to_the_same_item(reader):
    for batch in first(PairLoader(Toy(50), [reader], batch_size=10, seed=0), 5):
        numbers = [int(key.removeprefix("item ")) for key in batch.keys]
        assert batch.inputs[0].pixels.amax((1, 2, 3)).tolist() == numbers
        expected = reader.tokenizer([f"number {number}" for number in numbers])
        tokens = batch.inputs[0].tokens
        assert torch.equal(tokens, expected[:, : tokens.shape[1]]) and expected[:, tokens.shape[1] :].sum() == 0
        assert tokens.shape[1] == max(map(len, reader.tokenizer.encode([f"number {number}" for number in numbers])))


def test_readers_that_agree_share_tensors_and_the_others_see_the_same_crop(reader):
    def other_tokenizer(texts):
        return torch.ones(len(texts), 64, dtype=torch.int64)

    readers = [
        reader,
        Reader(Preprocess(size=16, mean=(0, 0, 0)), Tokenizer.openai()),
        Reader(Preprocess(size=32), other_tokenizer),
    ]
    for workers in (0, 1):
        loader = PairLoader(Scenes("train", 8), readers, batch_size=4, seed=0, crop_scale=(0.5, 0.5), workers=workers)
        student, same_pixels, teacher = first(loader, 1)[0].inputs
        assert same_pixels.pixels is student.pixels and same_pixels.tokens is not student.tokens
        halved = torch.nn.functional.avg_pool2d(teacher.pixels.float(), 2)
        assert (halved - student.pixels).abs().mean() < 4
        assert teacher.tokens.shape == (4, 64)  # a foreign tokenizer's padding is not ours to cut


def test_the_whole_picture_is_the_evaluation_view(reader):
    source = Scenes("train", 6)
    batch = first(PairLoader(source, [reader], batch_size=6, seed=0, crop_scale=(1, 1)), 1)[0]
    [(indices, pixels)] = EvalBatches(source, reader.preprocess)
    order = [batch.keys.index(source.key(index)) for index in indices]
    assert torch.equal(batch.inputs[0].pixels[order], pixels)


@pytest.mark.parametrize("width, height", [(100, 100), (300, 100), (1, 5000)])
def test_crops_have_the_asked_area_and_lie_inside(width, height):
    random = Random(0)
    for _ in range(1000):
        left, top, right, bottom = crop_box((width, height), (0.4, 0.9), random)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert 0.4 - 1e-9 <= (right - left) * (bottom - top) / (width * height) <= 0.9 + 1e-9


def test_aspects_of_a_square_picture_are_spread_around_one():
    random = Random(0)
    boxes = [crop_box((100, 100), (0.3, 0.5), random) for _ in range(2000)]
    aspects = torch.tensor([(right - left) / (bottom - top) for left, top, right, bottom in boxes])
    assert 0.75 <= aspects.min() < 0.76 and 1.32 < aspects.max() <= 4 / 3 + 1e-6
    assert abs(aspects.log().mean()) < 0.01


# Bad input


def test_bad_items_are_left_out_and_listed(reader):
    source = Toy(12, corrupt={3}, silent={7})
    for workers in (0, 1):
        batches = first(PairLoader(source, [reader], batch_size=6, seed=0, workers=workers), 2)
        skipped = sorted(skip for batch in batches for skip in batch.skipped)
        assert skipped == [("item 3", "corrupt"), ("item 7", "no caption")]
        for batch in batches:
            assert len(batch.keys) == len(batch.inputs[0].pixels) == len(batch.inputs[0].tokens)
            assert len(batch.keys) == 6 - len(batch.skipped)


@pytest.mark.parametrize(
    "num_bad, num_seen, enough, too_many",
    [(2, 100, 400, True), (1, 100, 400, False), (9, 99, 400, False), (1, 12, 12, True), (11, 11, 12, False)],
)
def test_too_many_bad_items_are_an_error_with_examples(num_bad, num_seen, enough, too_many):
    skipped = [(f"item {number}", "corrupt") for number in range(4)]
    if not too_many:
        return check_share_of_bad("toy", num_bad, num_seen, enough, 0.01, skipped)
    named = "; ".join(f"item {number}: corrupt" for number in range(3))
    with pytest.raises(ValueError, match=rf"^toy: {num_bad} of {num_seen} items are bad, the limit is 1.0%: {named}$"):
        check_share_of_bad("toy", num_bad, num_seen, enough, 0.01, skipped)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_without_pairs_is_an_error(reader, workers):
    loader = PairLoader(Toy(200, corrupt=range(200)), [reader], batch_size=4, seed=0, workers=workers)
    with pytest.raises(ValueError, match="^toy: 0 readable pairs in batch 0 of 4, needs 2: item [^\n]*$"):
        first(loader, 1)


def test_names_that_are_no_utf_8_have_crops_of_their_own():
    assert view_random("caf\udce9.jpg", 0).random() != view_random("caf.jpg", 0).random()
    assert view_random("a.jpg", 1).random() == Random("1/a.jpg").random()


def test_settings_that_cannot_work_are_refused(reader):
    with pytest.raises(ValueError, match="batch_size 9: expected 2 to 8, the images in toy"):
        PairLoader(Toy(8), [reader], batch_size=9, seed=0)
    with pytest.raises(ValueError, match="crop_scale"):
        PairLoader(Toy(8), [reader], batch_size=4, seed=0, crop_scale=(0.9, 1.1))


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_skips_corrupt_images_and_says_so(reader, workers):
    batches = EvalBatches(Toy(10, corrupt={4, 8, 9}), reader.preprocess, batch_size=4, workers=workers)
    assert [indices for indices, _ in batches] == [[0, 1, 2, 3], [5, 6, 7]]
    assert [(len(pixels), int(pixels[0].amax())) for _, pixels in batches] == [(4, 0), (3, 5)]
    assert [key for key, _ in batches.skipped] == ["item 4", "item 8", "item 9"]


def test_real_photographs_load_in_workers_that_share_a_zip(shared, reader):
    source = open_source(f"{shared}/data/flickr8k-train/captions.tsv?images=images.zip&where=split=dev&limit=40")
    settings = dict(source=source, readers=[reader], batch_size=8, seed=0)
    assert_same(first(PairLoader(**settings, workers=2), 5), first(PairLoader(**settings), 5))


def test_every_pair_is_seen_once_an_epoch_while_the_number_of_processes_changes(reader):
    """12 steps of an epoch on 1, then 3, then 2, then 1 process; an odd batch, so that shares differ."""
    source, seen = Scenes("train", 61), []
    for step in range(12):
        size = (1, 3, 2, 1)[step // 3]
        loaders = [PairLoader(source, [reader], batch_size=5, seed=3, world=World(rank, size)) for rank in range(size)]
        batches = [loader.batch(step) for loader in loaders]
        alone = PairLoader(source, [reader], batch_size=5, seed=3).batch(step)
        assert [key for batch in batches for key in batch.keys] == alone.keys
        assert torch.equal(torch.cat([batch.inputs[0].pixels for batch in batches]), alone.inputs[0].pixels)
        seen += alone.keys
    assert len(set(seen)) == len(seen) == 60  # of 61: the last incomplete batch is left out


def test_views_are_functions_of_the_key_and_the_views_number(reader):
    """In another order and under another seed the same crops; epochs take them in turn."""
    source, crops = Scenes("train", 6), {}
    for seed in (0, 1):
        loader = PairLoader(source, [reader], batch_size=6, seed=seed, crop_scale=(0.3, 1.0), views=2)
        for epoch in range(4):
            batch = loader.batch(epoch)
            assert {visit.view for visit in batch.visits} == {epoch % 2}
            for key, visit, pixels in zip(batch.keys, batch.visits, batch.inputs[0].pixels, strict=True):
                assert torch.equal(crops.setdefault((key, visit.view), pixels), pixels)
    assert len(crops) == 12 and not torch.equal(crops[source.key(0), 0], crops[source.key(0), 1])
