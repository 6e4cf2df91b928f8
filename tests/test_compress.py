"""The story: stages leave loadable models within their budget, and a run that was cut off ends with the same bits."""

import copy
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import pytest
import torch
import yaml
from PIL import Image

import tinyclip
from tinyclip.compress import compress
from tinyclip.data.files import _open_zip
from tinyclip.data.sources import evidence, open_source
from tinyclip.data.spec import DataSpec
from tinyclip.distill.checkpoints import Checkpoints
from tinyclip.distill.objective import Objective
from tinyclip.distill.train import DataConfig, TrainConfig
from tinyclip.evaluate.scores import Evaluation
from tinyclip.formats.files import read_sealed, write_record
from tinyclip.recipe import Recipe, Stage
from tinyclip.run import claim, exclusive, results
from tinyclip.shrink.inherit import Inherit
from tinyclip.shrink.masks import LearnMasks
from tinyclip.start import Like, Scratch

DATA = DataConfig(train=DataSpec.parse("scenes?count=64"))
EVALUATION = Evaluation(
    retrieval=DataSpec.parse("scenes?split=heldout&count=16"), zeroshot=DataSpec.parse("scenes?split=classes&count=16")
)
CONTRASTIVE = Objective(affinity=0, contrastive=1)


def phase(steps: int, **settings) -> TrainConfig:
    return TrainConfig(steps=steps, batch_size=8, warmup_steps=1, log_every=1, checkpoint_every=2, **settings)


def teacher_recipe() -> Recipe:
    shape = Scratch(
        embed_dim=16, image_size=32, patch_size=16, image_width=32, image_layers=2,
        text_width=32, text_layers=2, head_dim=8, context_length=20, vocabulary=620,
    )  # fmt: skip
    stages = (Stage(name="train", distill=phase(3, objective=CONTRASTIVE)),)
    return Recipe(start=shape, data=DATA, stages=stages)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    run = tmp_path_factory.mktemp("teacher") / "run"
    compress(teacher_recipe(), run, say=lambda _: None)
    return run


def student_recipe(teacher) -> Recipe:
    return Recipe(
        teacher=str(teacher),
        data=DATA,
        stages=(
            Stage(name="auto-70", shrink=LearnMasks(keep_params=0.7), while_masking=phase(4), distill=phase(4)),
            Stage(name="manual-35", shrink=Inherit(keep_params=0.35), distill=phase(5, ema_decay=0.9)),
        ),
        evaluation=EVALUATION,
    )


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    run = tmp_path_factory.mktemp("student") / "run"
    lines = []
    compress(student_recipe(teacher), run, say=lines.append)
    return run, lines


def weights(run) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def test_every_stage_and_the_run_load_as_models_within_their_budget(finished, teacher):
    run, _ = finished
    whole = tinyclip.load(teacher).config.prunable_params
    for directory, share in ((run / "0-auto-70", 0.7), (run / "1-manual-35", 0.35), (run, 0.35)):
        model = tinyclip.load(directory)
        assert 0.97 * share * whole < model.config.prunable_params <= share * whole
        assert model.encode_text(["a red ring"], normalize=True).norm().item() == pytest.approx(1, abs=1e-5)
    auto = tinyclip.load(run / "0-auto-70").config
    neuron = 2 * max(auto.image.width, auto.text.width) + 1
    assert 0.7 * whole - auto.prunable_params < neuron + 1


def test_a_stage_records_scores_cost_and_map_and_leaves_no_scaffolding(finished):
    run, lines = finished
    stages = results(run)
    assert [stage["name"] for stage in stages] == ["0-auto-70", "1-manual-35"]
    for stage in stages:
        assert set(stage["scores"]) >= {"top1", "image_to_text_recall@1", "text_to_image_recall@5"}
        assert stage["cost"]["parameters"] == sum(
            parameter.numel() for parameter in tinyclip.load(run / stage["name"]).parameters()
        )
    assert not list(run.rglob("checkpoint*")) and not list(run.rglob("shrunk"))
    assert len(json.loads((run / "0-auto-70" / "keep.json").read_text())["image"]["blocks"]) == 2
    assert any("prunable parameters; image: layers" in line for line in lines)  # the map was printed
    assert json.loads((run / "teacher.json").read_text())["cost"]["parameters"] > stages[0]["cost"]["parameters"]


def test_a_finished_run_is_left_as_it_is(finished, teacher):
    run, _ = finished
    before, lines = weights(run), []
    compress(student_recipe(teacher), run, say=lines.append)
    assert weights(run) == before and lines == ["0-auto-70: complete", "1-manual-35: complete"]


def test_a_model_of_another_run_is_noticed(finished, tmp_path):
    """Whole, with checksums of its own: the run's is written again, a stage's is refused."""
    run, _ = finished
    shutil.copytree(run, tmp_path / "run")
    recipe, lines = yaml.safe_load((run / "recipe.yaml").read_text()), []
    recipe = Recipe.model_validate(recipe)
    for place in ("model", "1-manual-35/model"):
        shutil.rmtree(tmp_path / "run" / place)
        shutil.copytree(run / "0-auto-70/model", tmp_path / "run" / place)
        if place == "model":
            compress(recipe, tmp_path / "run", say=lines.append)
            assert lines[-1] == f"{tmp_path / 'run/model'}: another model than the last stage's; written again"
            assert weights(tmp_path / "run") == weights(run)
    with pytest.raises(ValueError, match=r"1-manual-35/model: another model .*; delete .*1-manual-35 to make"):
        compress(recipe, tmp_path / "run", say=lines.append)
    shutil.rmtree(tmp_path / "run/0-auto-70/model")
    with pytest.raises(ValueError, match="0-auto-70/model: gone; delete"):
        compress(recipe, tmp_path / "run", say=lines.append)


def test_a_run_from_before_embeddings_were_cut_is_the_same_run(tmp_path):
    """What an older version wrote lacks the new field, whose default is what it did."""
    settings = student_recipe("somewhere").model_dump(mode="json")
    older = copy.deepcopy(settings)
    assert older["stages"][1]["shrink"].pop("embed_dim") is None
    claim(tmp_path / "run", older)
    claim(tmp_path / "run", settings)
    settings["stages"][1]["shrink"]["embed_dim"] = 8
    with pytest.raises(ValueError, match=r"changed: stages.1.shrink.embed_dim: None -> 8$"):
        claim(tmp_path / "run", settings)


def test_a_student_with_a_smaller_embedding_mimics_its_teacher_and_continues(teacher, tmp_path, monkeypatch):
    """Its affinities are rows over the same pairs; the feature term maps 6 numbers to the teacher's 16."""
    steps = phase(3, objective=Objective(feature=0.5))
    shrink = Inherit(keep_params=0.8, embed_dim=6)
    recipe = Recipe(teacher=str(teacher), data=DATA, stages=(Stage(name="small", shrink=shrink, distill=steps),))
    lines = []
    compress(recipe, tmp_path / "whole", say=lines.append)
    assert "; embedding 6 of 16" in lines[0]
    model = tinyclip.load(tmp_path / "whole")
    assert model.config.embed_dim == 6 and model.encode_text("a red circle").shape == (1, 6)
    with monkeypatch.context() as patch:
        patch.setattr("tinyclip.run.complete", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compress(recipe, tmp_path / "cut", say=lines.append)
    compress(recipe, tmp_path / "cut", say=lines.append)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_a_run_directory_of_another_recipe_is_refused_with_the_difference(finished, teacher):
    run, _ = finished
    with pytest.raises(ValueError, match=r"changed: seed: 0 -> 1"):
        compress(student_recipe(teacher).model_copy(update={"seed": 1}), run)


COMMAND = [sys.executable, "-m", "tinyclip", "compress"]


def start(recipe_file, run) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*COMMAND, str(recipe_file), "--run", str(run)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def wait_for(run, pattern, process: subprocess.Popen) -> None:
    while not list(run.glob(pattern)):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@pytest.mark.parametrize(
    "after, stop, status, workers",
    [
        ("0-auto-70/stage.json", signal.SIGKILL, -signal.SIGKILL, 0),  # between the stages
        ("0-auto-70/masks/checkpoint-*.pt", signal.SIGKILL, -signal.SIGKILL, 0),  # while masks are learned
        ("1-manual-35/distill/checkpoint-*.pt", signal.SIGINT, 130, 2),  # while distilling; the workers get it too
    ],
)
def test_a_run_that_was_cut_off_continues_to_the_same_bits(finished, teacher, tmp_path, after, stop, status, workers):
    recipe_file, run = tmp_path / "recipe.yaml", tmp_path / "run"
    settings = student_recipe(teacher).model_dump(mode="json")
    settings["data"]["workers"] = workers
    recipe_file.write_text(yaml.safe_dump(settings))
    process = start(recipe_file, run)
    wait_for(run, after, process)
    os.killpg(process.pid, stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in errors
    assert not (run / "model").exists()
    again = start(recipe_file, run)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert weights(run) == weights(finished[0])
    for metrics in run.rglob("metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
        assert steps == list(range(len(steps)))  # no line twice, none missing


def test_a_random_start_can_take_the_shape_of_a_student(finished, tmp_path):
    run, _ = finished
    recipe = Recipe(
        start=Like(like=str(run)), data=DATA, stages=(Stage(name="train", distill=phase(2, objective=CONTRASTIVE)),)
    )
    scratch = tinyclip.load(compress(recipe, tmp_path / "scratch"))
    student = tinyclip.load(run)
    assert scratch.config == student.config and scratch.tokenizer == student.tokenizer
    assert not torch.equal(scratch.text.position, student.text.position)


def test_an_objective_without_its_teacher_is_refused():
    with pytest.raises(ValueError, match="stage train: affinity and feature need a teacher"):
        Recipe(start=teacher_recipe().start, data=DATA, stages=(Stage(name="train", distill=phase(2)),))


def test_bad_pairs_are_counted_in_the_line_of_a_stage_and_named_in_a_file(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    rows = ["file\tcaption"]
    for index in range(15):
        open_source(DATA.train).image(index).save(tmp_path / f"{index}.png")
        rows.append(f"{index}.png\tpicture {index}")
    (tmp_path / "list.tsv").write_text("\n".join([*rows, "broken.png\ta broken one"]) + "\n")
    data = DataConfig(train=DataSpec.parse(str(tmp_path / "list.tsv")), max_bad_share=0.2)
    recipe = teacher_recipe().model_copy(update={"data": data})
    lines = []
    run = compress(recipe, tmp_path / "run", say=lines.append).parent
    (skipped,) = {
        line["key"] for line in map(json.loads, (run / "0-train/distill/skipped.jsonl").read_text().splitlines())
    }
    assert skipped == "broken.png" and "bad pairs skipped" in lines[-1]


def test_bad_pairs_are_counted_over_all_calls_of_a_run(tmp_path):
    """Three of forty are more than a twentieth, wherever a run was cut off. A higher limit lets it continue."""
    rows = ["file\tcaption"]
    for index in range(40):
        if index % 16 == 3:
            (tmp_path / f"{index}.png").write_bytes(b"not a picture")
        else:
            open_source(DATA.train).image(index).save(tmp_path / f"{index}.png")
        rows.append(f"{index}.png\tpicture {index}")
    (tmp_path / "list.tsv").write_text("\n".join(rows) + "\n")

    def call(run, limit):
        data = DataConfig(train=DataSpec.parse(str(tmp_path / "list.tsv")), max_bad_share=limit)
        stage = Stage(name="train", distill=phase(8, objective=CONTRASTIVE))
        recipe = teacher_recipe().model_copy(update={"data": data, "stages": (stage,)})
        return compress(recipe, tmp_path / run, say=lambda _: None)

    with pytest.raises(ValueError, match=r"3 of 40 items are bad, the limit is 5.0%: .*png: "):
        call("run", 0.05)
    assert Checkpoints(tmp_path / "run/0-train/distill").latest() is not None
    with pytest.raises(ValueError, match=r"3 of 40 items are bad, the limit is 5.0%"):
        call("run", 0.05)
    assert (call("run", 0.1) / "model.safetensors").read_bytes() == (
        call("whole", 0.1) / "model.safetensors"
    ).read_bytes()


def test_a_run_goes_on_elsewhere_but_not_with_other_data_or_another_teacher(teacher, tmp_path):
    recipe, run = student_recipe(teacher), tmp_path / "run"
    compress(recipe, run, say=lambda _: None)

    def call(**changes):
        compress(recipe.model_copy(update=changes), run, say=lambda _: None)

    call(device="cpu", data=DATA.model_copy(update={"workers": 1, "max_bad_share": 0.5}))
    inputs = read_sealed(run / "inputs.json")
    for name, other in (("images", 3), ("teachers", ["0" * 64])):
        write_record(run / "inputs.json", json.dumps(inputs | {name: other}))
        with pytest.raises(ValueError, match=f"run began with other data or another teacher; changed: {name}"):
            call()


def test_data_that_changed_between_calls_is_told_in_one_line_and_louder_where_its_content_did(tmp_path):
    rows = ["file\tcaption"]
    for index in range(16):
        open_source(DATA.train).image(index).save(tmp_path / f"{index}.png")
        rows.append(f"{index}.png\tpicture {index}")
    table, run = tmp_path / "list.tsv", tmp_path / "run"
    table.write_text("\n".join(rows) + "\n")
    data = DataConfig(train=DataSpec.parse(str(table)))
    recipe = teacher_recipe().model_copy(update={"data": data})

    def said() -> list[str]:
        lines = []
        compress(recipe, run, say=lines.append)
        return [line for line in lines if line.startswith(f"{run}: ")]

    assert said() == said() == []
    os.utime(tmp_path / "3.png", (1, 1))
    assert said() == [
        f"{run}: files of the data were written or copied since the run began; their sizes have not changed"
    ]
    table.write_text(table.read_text().replace("picture 3", "another 3"))
    (line,) = said()
    assert "THE DATA HAS CHANGED since the run began (sizes, checksums or captions differ)" in line
    table.write_text(table.read_text().replace("another 3", "picture 3"))
    open_source(DATA.train).image(20).save(tmp_path / "3.png")
    (line,) = said()
    assert "THE DATA HAS CHANGED" in line
    inputs = read_sealed(run / "inputs.json")
    del inputs["data"]
    write_record(run / "inputs.json", json.dumps(inputs))
    assert said() == []  # of a run of before it was noted


@pytest.mark.parametrize("kind", ["zip", "tar", "filtered"])
def test_every_kind_of_set_tells_when_its_content_changed(tmp_path, kind):
    pictures = {"a.png": _png(10), "a.txt": b"a", "b.png": _png(200), "b.txt": b"b"}
    (tmp_path / "list.tsv").write_text("file\tcaption\na.png\ta\nb.png\tb\n")

    def seen(members: dict[str, bytes]):
        _open_zip.cache_clear()  # another call is another process
        if kind == "zip":
            with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
                for name, content in members.items():
                    archive.writestr(name, content)
            return evidence(open_source(f"{tmp_path}/list.tsv?images=set.zip"))
        with tarfile.open(tmp_path / "set.tar", "w") as archive:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return evidence(open_source(f"{tmp_path}/set.tar{'?min_side=2' if kind == 'filtered' else ''}"))

    before = seen(pictures)
    assert seen(pictures).since(before).startswith("files of the data were written or copied")
    assert "THE DATA HAS CHANGED" in seen(pictures | {"b.png": _png(30, side=40)}).since(before)


def _png(shade: int, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((side, side), shade).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_start_whose_weights_changed_is_refused(teacher, tmp_path):
    """Its shape is noted, and the sha256 of its weights, where it is not random."""
    start = tmp_path / "start"
    tinyclip.save(model := tinyclip.load(teacher), start)
    stage = Stage(name="rule", shrink=Inherit(keep_params=0.5), distill=phase(2))
    recipe = Recipe(teacher=str(teacher), start=str(start), data=DATA, stages=(stage,))
    compress(recipe, tmp_path / "run", say=lambda _: None)
    model.text.position.data += 1
    tinyclip.save(model, start)
    with pytest.raises(ValueError, match=r"start\.json: the run began with another model; changed: weights: .* use"):
        compress(recipe, tmp_path / "run", say=lambda _: None)


def test_two_calls_do_not_work_on_one_run(teacher, tmp_path):
    recipe = student_recipe(teacher)
    with exclusive(tmp_path / "run"):
        with pytest.raises(ValueError, match="run: another process is working on this run"):
            compress(recipe, tmp_path / "run", say=lambda _: None)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]  # the first one's
