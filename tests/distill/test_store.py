"""A stored teacher says what the live one says, to the stored precision; a store is whole, its own, and continues."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.data.test_sources import write_tar
from tests.distill.test_train import tiny_clip
from tests.test_compress import DATA, phase, teacher_recipe
from tinyclip.compress import compress
from tinyclip.data.loader import PairLoader
from tinyclip.data.mixture import Mixture
from tinyclip.data.sources import jpeg_sides, open_source
from tinyclip.distill import store as store_module
from tinyclip.distill.objective import Objective, total_loss
from tinyclip.distill.store import StoreConfig, store_teacher
from tinyclip.distill.teacher import load_teacher
from tinyclip.distill.train import DataConfig, train
from tinyclip.distributed import ALONE, World
from tinyclip.embed import embed
from tinyclip.formats import checkpoint
from tinyclip.recipe import Recipe, Stage
from tinyclip.shrink.inherit import Inherit
from tinyclip.stopping import Interrupted

SOURCE = open_source("scenes?count=37")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Four parts of 37 items, the last one short; read in threes, embedded in fives."""
    monkeypatch.setattr(store_module, "ITEMS", 10)
    monkeypatch.setattr(store_module, "READ_AT_ONCE", 3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(str(checkpoint.save(tiny_clip(), tmp_path_factory.mktemp("teacher") / "model")))


def build(
    teacher, directory, source=SOURCE, crop_scale=(0.5, 1.0), bad=0.01, workers=0, world=ALONE, say=str, **settings
):
    config = StoreConfig(**({"views": 2, "dtype": "fp32", "batch_size": 5} | settings))
    how = {"crop_scale": crop_scale, "max_bad_share": bad, "workers": workers, "world": world, "say": say}
    return store_teacher(teacher, source, config, directory, **how)


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 2e-6), ("fp16", 1e-3), ("bf16", 8e-3)])
def test_stored_embeddings_are_those_of_the_crops_and_captions_that_a_batch_holds(teacher, tmp_path, dtype, tolerance):
    stored = build(teacher, tmp_path / "store", dtype=dtype)
    loader = PairLoader(SOURCE, [teacher.reader], batch_size=9, seed=5, crop_scale=(0.5, 1.0), views=stored.views)
    seen = set()
    for step in range(12):  # three epochs: the third takes the first view again
        batch = loader.batch(step)
        expected = teacher.embed(batch.inputs[0].pixels, batch.inputs[0].tokens)
        for rows, true in zip(stored.embeddings(batch), expected, strict=True):
            torch.testing.assert_close(rows, true, rtol=0, atol=tolerance)
            torch.testing.assert_close(rows.norm(dim=-1), torch.ones(9), rtol=0, atol=1e-6)
        seen |= {visit.view for visit in batch.visits}
    assert seen == {0, 1}


def test_a_student_of_the_store_is_the_student_of_the_live_teacher(teacher, tmp_path):
    """Whole pictures, so that both see the same. To the last bit: the log of every step, and the weights."""
    data = DataConfig(train=DATA.train, crop_scale=(1.0, 1.0))
    source = open_source(data.train)
    stored = build(teacher, tmp_path / "store", source, crop_scale=(1.0, 1.0), views=1)
    students, config = [], phase(6, lr=1e-3, objective=Objective(teacher_scale="teacher"))
    for name, taught_by in (("live", teacher), ("store", stored)):
        students.append(tiny_clip(seed=1))
        train(students[-1], source, data, config, tmp_path / name, teachers=[taught_by])
    live, store = (
        [
            json.loads(line) | {"pairs_per_s": None}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("live", "store")
    )
    assert live == store
    live, store = (dict(student.named_parameters()) for student in students)
    assert all(torch.equal(store[name], weight) for name, weight in live.items())


def test_a_store_in_pieces_is_the_store_at_once(teacher, tmp_path):
    """Killed after two parts, with another's leftovers; by two processes; with workers; from data that grew."""
    whole = build(teacher, tmp_path / "whole")
    expected = content(whole.directory)
    assert sorted(expected) == [*(f"{part:06d}.safetensors" for part in range(4)), "store.json"]
    assert len({path.stat().st_mode for path in whole.directory.iterdir()}) == 1  # who may read one may read all

    child = os.fork()
    if child == 0:
        written = iter(range(2))
        save = store_module.weights.write
        store_module.weights.write = lambda *args: (
            save(*args) if next(written, None) is not None else os.kill(os.getpid(), 9)
        )
        build(teacher, tmp_path / "killed")
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (tmp_path / "killed" / "000002.tmp").write_bytes(b"half a part")
    before = (tmp_path / "killed" / "000001.safetensors").stat().st_mtime_ns
    build(teacher, tmp_path / "killed")
    assert content(tmp_path / "killed") == expected
    assert (tmp_path / "killed" / "000001.safetensors").stat().st_mtime_ns == before

    for rank in (1, 0):  # no process waits for another while it embeds
        build(teacher, tmp_path / "ranks", world=Apart(rank, 2))
    assert content(tmp_path / "ranks") == expected
    build(teacher, tmp_path / "workers", workers=2)
    assert content(tmp_path / "workers") == expected
    build(teacher, tmp_path / "grown", open_source("scenes?count=25"))
    build(teacher, tmp_path / "grown")
    assert content(tmp_path / "grown") == expected


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("stopped_by", ["SIGTERM", "kill -9"])
def test_a_part_goes_on_where_it_was_cut_off(teacher, tmp_path, monkeypatch, stopped_by, dtype):
    """In the middle of the second part of ten, of which a kill loses what was not yet written."""
    expected = content(build(teacher, tmp_path / "whole", dtype=dtype).directory)
    if stopped_by == "kill -9":
        monkeypatch.setattr(store_module, "UNWRITTEN_S", 0.0)
    read, reads = store_module._read, []

    def stop_at_the_sixth(*args):
        reads.append(args)
        if len(reads) == 6:
            os.kill(os.getpid(), signal.SIGTERM if stopped_by == "SIGTERM" else signal.SIGKILL)
        return read(*args)

    child = os.fork()
    if child == 0:
        store_module._read = stop_at_the_sixth
        try:
            build(teacher, tmp_path / "store", dtype=dtype)
        except Interrupted as stop:
            os._exit(stop.signal_number)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert (os.WTERMSIG(status) or os.WEXITSTATUS(status)) == (9 if stopped_by == "kill -9" else signal.SIGTERM)
    rows = len(load_file(tmp_path / "store" / "000001.safetensors")["key"])
    assert rows == (3 if stopped_by == "kill -9" else 6)
    monkeypatch.setattr(store_module, "_read", lambda *args: reads.append(args) or read(*args))
    build(teacher, tmp_path / "store", dtype=dtype)
    assert [start for *_, start in reads][:2] == [10 + rows, 13 + rows]
    assert content(tmp_path / "store") == expected


class Apart(World):
    """One of several processes, whose meetings are not waited for."""

    def on_main(self, work, *args, **settings):
        return work(*args, **settings)

    def barrier(self):
        pass

    def concatenated(self, items):
        return items


def test_two_runs_that_share_a_store_do_not_write_at_once(teacher, tmp_path):
    """The second waits, and finds what the first has made; a store that lacks nothing is only read."""
    whole = content(build(teacher, tmp_path / "whole").directory)
    store, said, few = tmp_path / "store", [], open_source("scenes?count=20")
    build(teacher, store, source=few)
    with ThreadPoolExecutor(1) as pool:
        with FileLock(store / ".lock"):
            building = pool.submit(build, teacher, store, say=said.append)
            while not said:
                assert not building.done(), building.result()
                time.sleep(0.01)
            build(teacher, store, source=few)
            for name, data in whole.items():
                (store / name).write_bytes(data)
        building.result()
    assert said == [f"{store}: waiting for another process that adds to this store"]
    assert content(store) == whole


@pytest.mark.parametrize(
    "change, said",
    [
        ({"views": 3}, "views: 2 -> 3"),
        ({"dtype": "fp16"}, "dtype: fp32 -> fp16"),
        ({"crop_scale": (0.9, 1.0)}, r"crop_scale.0: 0.5 -> 0.9"),
        ({"source": open_source("scenes?count=37&seed=1&split=heldout")}, "built with other data: item 0 was not"),
    ],
)
def test_a_store_of_something_else_is_refused(teacher, tmp_path, change, said):
    build(teacher, tmp_path / "store")
    with pytest.raises(ValueError, match=said):
        build(teacher, tmp_path / "store", **change)


def test_a_store_of_another_teacher_is_refused_but_its_name_may_change(teacher, tmp_path):
    build(teacher, tmp_path / "store")
    moved = load_teacher(str(checkpoint.save(tiny_clip(), tmp_path / "moved")))
    build(moved, tmp_path / "store")
    other = load_teacher(str(checkpoint.save(tiny_clip(seed=3), tmp_path / "other")))
    with pytest.raises(ValueError, match="holds other embeddings; changed: weights"):
        build(other, tmp_path / "store")


def test_an_item_that_is_not_the_stored_one_is_refused(teacher, tmp_path):
    stored = build(teacher, tmp_path / "store")
    loader = PairLoader(SOURCE, [teacher.reader], batch_size=9, seed=5, views=2)
    batch = loader.batch(0)
    for changed, said in (
        ({"keys": ["renamed", *batch.keys[1:]]}, "renamed is not the one it was built with"),
        (
            {"captions": ["other words", *batch.captions[1:]]},
            "did not have the caption 'other words' when it was built",
        ),
        ({"visits": [visit._replace(caption=99) for visit in batch.visits]}, "did not have the caption"),
    ):
        with pytest.raises(ValueError, match=said):
            stored.embeddings(replace(batch, **changed))


def test_a_set_whose_items_have_the_same_names_is_another_set(teacher, tmp_path):
    for name, captions in (("ours", "cat"), ("theirs", "dog")):
        (tmp_path / name).mkdir()
        members = {}
        for number in range(4):
            Image.new("RGB", (40, 40), (number * 60, 0, 0)).save(tmp_path / f"{number}.png")
            members[f"{number}.png"] = (tmp_path / f"{number}.png").read_bytes()
            members[f"{number}.txt"] = f"{captions} {number}".encode()
        write_tar(tmp_path / name / "0.tar", members)
    build(teacher, tmp_path / "store", open_source(f"{tmp_path}/ours/0.tar?limit=3"))
    with pytest.raises(ValueError, match="built with other data: item 0 had other captions"):
        build(teacher, tmp_path / "store", open_source(f"{tmp_path}/theirs/0.tar"))
    build(teacher, tmp_path / "store", open_source(f"{tmp_path}/ours/0.tar"))
    odd = "a name that is no UTF-8: \udce9"
    assert store_module.hash_of(odd) != store_module.hash_of(odd[:-1])


def flipped(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda part: part.write_bytes(part.read_bytes()[:50]),
        lambda part: part.write_bytes(b""),
        lambda part: flipped(part, -100),
        lambda part: flipped(part, 40),
        lambda part: rewritten(part, image=lambda image: image * torch.nan),
        lambda part: rewritten(part, text=torch.zeros_like),
        lambda part: rewritten(part, image=lambda image: image[..., :5].clone()),
        lambda part: rewritten(part, text=lambda text: text.double()),
        lambda part: rewritten(part, first=lambda first: first.flip(0)),
        lambda part: rewritten(part, caption=None),
        lambda part: rewritten(part, **dict.fromkeys(["key", "caption", "image", "text"], lambda rows: rows[:0])),
    ],
    ids=[
        "cut",
        "empty",
        "a bit",
        "a bit of the header",
        "NaN",
        "zeros",
        "width",
        "dtype",
        "counts",
        "without",
        "nothing",
    ],
)
def test_a_damaged_part_is_told_and_the_teacher_asked_again(teacher, tmp_path, damage):
    """Whether its sha256 tells, or, where it has none as parts once had, its tensors."""
    expected, said = content(build(teacher, tmp_path / "store").directory), []
    part = tmp_path / "store" / "000001.safetensors"
    damage(part)
    build(teacher, tmp_path / "store", say=said.append)
    assert content(tmp_path / "store") == expected
    assert said[0].startswith(f"{part}: ") and said[0].endswith("; the teacher is asked again")
    assert len(said) == 2 and "\n" not in said[0] and said[1].startswith("teacher store: 37 images")


def rewritten(part, **changes):
    """By save_file, without a sha256."""
    tensors = {
        name: changes.get(name, lambda same: same)(rows)
        for name, rows in load_file(part).items()
        if changes.get(name, 1)
    }
    save_file(tensors, part)


def test_a_part_without_a_sha256_is_used_and_store_json_tells_when_it_is_damaged(teacher, tmp_path):
    build(teacher, tmp_path / "store", source=open_source("scenes?count=10"))
    rewritten(part := tmp_path / "store" / "000000.safetensors")
    before = part.read_bytes()
    build(teacher, tmp_path / "store")
    assert part.read_bytes() == before
    flipped(tmp_path / "store" / "store.json", 20)
    with pytest.raises(ValueError, match=rf"store\.json: .*; delete {tmp_path}/store to ask the teacher again$"):
        build(teacher, tmp_path / "store")


def test_a_teacher_without_an_answer_is_named_and_nothing_of_it_stored(teacher, tmp_path, monkeypatch):
    embed = type(teacher).embed_images
    monkeypatch.setattr(type(teacher), "embed_images", lambda *args: embed(*args) * torch.nan)
    with pytest.raises(
        ValueError, match=r"model: expected unit vectors, got none for 3 of 12 .* the first is train-000000"
    ):
        build(teacher, tmp_path / "store")
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"store.json", ".lock"}


def test_two_that_begin_one_store_do_so_one_after_the_other(teacher, tmp_path):
    """The second waits before it claims, and finds the first one's claim: of another teacher's crops it is told."""
    store, said = tmp_path / "store", []
    store.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(store / ".lock"):
            second = pool.submit(build, teacher, store, say=said.append, views=3)
            while not said:
                assert not second.done(), second.result()
                time.sleep(0.01)
            (store / "store.json").write_bytes(
                (build(teacher, tmp_path / "first").directory / "store.json").read_bytes()
            )
        with pytest.raises(ValueError, match=r"store holds other embeddings; changed: views: 2 -> 3"):
            second.result()
    assert said == [f"{store}: waiting for another process that adds to this store"]


def test_a_store_of_images_that_are_decoded_otherwise_is_refused(teacher, tmp_path):
    for name in "ab":
        Image.new("RGB", (400, 400), (90, 0, 0)).save(tmp_path / f"{name}.jpg")
    (tmp_path / "pairs.tsv").write_text("file\tcaption\na.jpg\ta picture\nb.jpg\tanother\n")
    scaled, whole = (open_source(f"{tmp_path}/pairs.tsv{more}") for more in ("?jpeg_side=40", ""))
    assert jpeg_sides(scaled) == 40 and jpeg_sides(Mixture([scaled, whole], [1, 1])) == [40, None]
    assert jpeg_sides(Mixture([whole, whole], [1, 1])) is None  # so that it may grow
    build(teacher, tmp_path / "store", scaled)
    with pytest.raises(ValueError, match="holds other embeddings; changed: jpeg_side: 40 -> None"):
        build(teacher, tmp_path / "store", whole)


def test_an_item_that_cannot_be_read_is_left_out_of_both(teacher, tmp_path):
    """And counted, when the teacher is asked and when the student learns, though it can be read by then."""
    rows = ["file\tcaption"]
    for number in range(12):
        file = tmp_path / f"{number}.png"
        if number == 4:
            file.write_bytes(b"no image")
        else:
            Image.new("RGB", (40, 40), (number * 20, 0, 0)).save(file)
        rows.append(f"{number}.png\tnumber {number}")
    (tmp_path / "pairs.tsv").write_text("\n".join(rows))
    source = open_source(str(tmp_path / "pairs.tsv"))
    with pytest.raises(ValueError, match=r"pairs.tsv: 1 of 12 items are bad, the limit is 1.0%: 4.png: "):
        build(teacher, tmp_path / "refused", source)
    said = []
    stored = build(teacher, tmp_path / "store", source, bad=0.1, say=said.append)
    assert said[0].startswith("teacher store: 1 images could not be read, and ") and ": 4.png: " in said[0]
    batch = PairLoader(source, [teacher.reader], batch_size=12, seed=0, crop_scale=(0.5, 1.0), views=2).batch(0)
    assert len(batch.keys) == 11 and stored.embeddings(batch)[0].shape == (11, 12)
    Image.new("RGB", (40, 40)).save(tmp_path / "4.png")
    data = DataConfig(train=DATA.train, crop_scale=(0.5, 1.0), max_bad_share=0.2)
    outcome = train(tiny_clip(seed=1), source, data, phase(6), tmp_path / "run", teachers=[stored])
    assert outcome.skipped_pairs > 0 and outcome.pairs + outcome.skipped_pairs == 48
    skipped = (tmp_path / "run/skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped[0])["reason"] == "could not be read when the teacher was asked"
    batch = PairLoader(source, [teacher.reader], batch_size=12, seed=0, crop_scale=(0.5, 1.0), views=2).batch(0)
    with pytest.raises(ValueError, match=r"4\.png could not be read when it was built"):
        stored.embeddings(batch)


def test_a_recipe_with_a_store_trains_from_it_and_embed_makes_it_first(tmp_path, capsys):
    run = tmp_path / "teacher"
    compress(teacher_recipe(), run, say=lambda _: None)
    stage = Stage(name="rule", shrink=Inherit(keep_params=0.5), distill=phase(3))
    recipe = Recipe(teacher=str(run), data=DATA, stages=(stage,), store=StoreConfig(views=2))
    lines = []
    assert embed(recipe, tmp_path / "run", say=lines.append) == tmp_path / "run" / "teacher-store"
    assert "64 images" in lines[0] and "bytes each" in lines[0]
    compress(recipe, tmp_path / "run", say=lines.append)
    assert sum(line.startswith("teacher store:") for line in lines) == 1  # made once
    part = load_file(tmp_path / "run" / "teacher-store" / "000000.safetensors")
    assert part["image"].shape == (10, 2, 16) and part["image"].dtype == torch.float16
    without = Recipe(teacher=str(run), data=DATA, stages=(stage,))
    with pytest.raises(ValueError, match=r"expected a recipe with a teacher and a store, for example by --set"):
        embed(without, tmp_path / "without")


def test_an_ensembles_target_is_the_mean_of_affinities_not_of_features():
    """CE to the mean of two teachers' rows, built here as matrices, is what the two losses average to."""
    generator = torch.Generator().manual_seed(0)

    def rows(size):
        return torch.nn.functional.normalize(torch.randn(5, size, generator=generator, dtype=torch.float64), dim=-1)

    image, text = rows(4), rows(4)
    targets = [(rows(6), rows(6), 20.0), (rows(3), rows(3), 50.0)]
    objective = Objective(student_scale=10.0, teacher_scale="teacher")
    loss, _ = total_loss(objective, image, text, torch.tensor(1.0), targets, None)
    student = 10 * image @ text.T
    expected = 0.0
    for transpose in (False, True):
        scores = [scale * teacher @ caption.T for teacher, caption, scale in targets]
        mean = sum((s.T if transpose else s).softmax(-1) for s in scores) / 2
        expected += torch.nn.functional.cross_entropy(student.T if transpose else student, mean) / 2
    torch.testing.assert_close(loss, expected)


def test_an_ensemble_runs_live_and_from_stores(tmp_path):
    names = [str(checkpoint.save(tiny_clip(seed), tmp_path / f"teacher-{seed}")) for seed in (0, 1)]
    stage = Stage(name="rule", shrink=Inherit(keep_params=0.5), distill=phase(2))
    data = DATA.model_copy(update={"crop_scale": (1.0, 1.0)})
    ensemble = Recipe(teacher=names[0], more_teachers=(names[1],), data=data, stages=(stage,))
    kl = {}
    for how, store in (("live", None), ("store", StoreConfig(dtype="fp32"))):
        compress(ensemble.model_copy(update={"store": store}), tmp_path / how, say=lambda _: None)
        lines = (tmp_path / how / "0-rule/distill/metrics.jsonl").read_text().splitlines()
        kl[how] = [json.loads(line)["affinity_kl"] for line in lines]
    assert kl["live"] == pytest.approx(kl["store"], abs=1e-5)
    assert (tmp_path / "store/teacher-store/teacher-2/000000.safetensors").exists()
