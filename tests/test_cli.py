"""The commands work as a user types them, and every mistake is one line on stderr, exit status 2, nothing written.

CPU only: models of a few thousand weights, a few steps each.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import tinyclip
from tinyclip import cli
from tinyclip.recipes import PRESETS, load_recipe

CONTRASTIVE = {"affinity": 0, "contrastive": 1}
TEACHER_RECIPE = {
    "start": {
        "embed_dim": 8, "image_size": 16, "patch_size": 8, "image_width": 16, "image_layers": 2,
        "text_width": 16, "text_layers": 2, "head_dim": 8, "context_length": 12, "vocabulary": 600,
    },
    "data": {"train": "scenes?count=32"},
    "stages": [{"name": "train", "distill": {"steps": 3, "batch_size": 8, "objective": CONTRASTIVE}}],
}  # fmt: skip
STUDENT_RECIPE = {
    "data": {"train": "scenes?count=32"},
    "stages": [
        {"name": "half", "shrink": {"kind": "inherit", "keep_params": 0.5}, "distill": {"steps": 2, "batch_size": 8}}
    ],
    "evaluation": {"retrieval": "scenes?split=heldout&count=8"},
}


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def tiny(capsys, monkeypatch):
    """`tiny("inspect", path)` runs the command in this process, as its entry point does."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["tinyclip", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code is None or isinstance(stop.value.code, int)
        return Result(stop.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Trained through the command in a process of its own."""
    directory = tmp_path_factory.mktemp("teacher")
    (directory / "tiny.yaml").write_text(yaml.safe_dump(TEACHER_RECIPE))
    command = [sys.executable, "-m", "tinyclip", "train", "tiny.yaml", "--run", "run"]
    done = subprocess.run(
        command, cwd=directory, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "run/model\n"), done.stderr
    return directory / "run"


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "student.yaml"
    path.write_text(yaml.safe_dump(STUDENT_RECIPE))
    return path


def assert_one_line(result: Result, *expected: str) -> None:
    assert result.status == 2 and result.out == "", result
    assert result.err.startswith("tinyclip: error: ") and result.err.count("\n") == 1, result.err
    for text in expected:
        assert text in result.err, result.err


# What works.


def test_train_compress_evaluate_and_inspect(tiny, teacher, recipe, tmp_path):
    run = tmp_path / "run"
    result = tiny("compress", recipe, "--teacher", teacher, "--run", run)
    assert (result.status, result.out) == (0, f"{run}/model\n")
    assert "0-half: 12,864 -> " in result.err and "image_to_text_recall@1" in result.err

    facts = json.loads(tiny("inspect", run, "--json").out)
    student = tinyclip.load(run)
    assert facts["parameters"] == sum(parameter.numel() for parameter in student.parameters())
    assert student.config.prunable_params <= 12_864 / 2
    shown = tiny("inspect", run)
    assert shown.status == 0 and f"{facts['parameters']:,} parameters" in shown.out

    data = "scenes?split=heldout&count=8"
    scores = json.loads(tiny("evaluate", run, "--retrieval", data, "--json").out)
    assert scores == json.loads((run / "0-half" / "stage.json").read_text())["scores"]
    assert (scores["images"], scores["texts"]) == (8, 24)
    shown = tiny("evaluate", run, "--retrieval", data, "--zeroshot", "scenes?split=classes&count=16")
    assert shown.status == 0 and "image_to_text_recall@1" in shown.out and "top1" in shown.out

    again = tiny("compress", recipe, "--teacher", teacher, "--run", run)
    assert (again.status, again.out, again.err) == (0, f"{run}/model\n", "0-half: complete\n")


def test_set_changes_the_run(tiny, teacher, recipe, tmp_path):
    run = tmp_path / "run"
    result = tiny(
        "compress", recipe, "--teacher", teacher, "--run", run, "--data", "scenes?count=16",
        "--set", "stages.0.distill.lr=3e-4", "--set", "stages.0.shrink={kind: inherit, text: {layers: 1}}",
    )  # fmt: skip
    assert result.status == 0, result.err
    written = yaml.safe_load((run / "recipe.yaml").read_text())
    assert (written["data"]["train"]["count"], written["stages"][0]["distill"]["lr"]) == (16, 3e-4)
    assert len(tinyclip.load(run).config.text.blocks) == 1


def test_recipes_lists_the_presets(tiny):
    lines = tiny("recipes").out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert all(len(line) > 40 and line.endswith((".", ":")) for line in lines)


@pytest.mark.parametrize("name", PRESETS)
def test_a_printed_preset_is_a_recipe_file_of_the_same_recipe(name, tiny, tmp_path):
    printed = tiny("recipes", name).out
    assert (
        printed.startswith("# ") and f"# tinyclip {'train' if name == 'demo_teacher' else 'compress'} {name}" in printed
    )
    path = tmp_path / "mine.yaml"
    path.write_text(printed)
    given = {"teacher": "some/teacher"} | ({"data": "a.tsv"} if "DATA" in printed else {})
    if name == "demo_teacher":
        given = {}
    assert load_recipe(str(path), **given) == load_recipe(name, **given)


def test_help_names_every_command(tiny):
    result = tiny("--help")
    assert result.status == 0 and all(f" {c} " in result.out for c in ("compress", "train", "evaluate", "inspect"))


# What does not. `bad` runs a compression that must fail before it has written anything.


@pytest.fixture
def bad(tiny, teacher, recipe, tmp_path):
    def run(*arguments: object, set_: tuple[str, ...] = ()) -> Result:
        before = sorted(tmp_path.rglob("*"))
        changes = [word for change in set_ for word in ("--set", change)]
        teachers = () if "--teacher" in arguments else ("--teacher", teacher)
        result = tiny("compress", recipe, "--run", tmp_path / "new", *teachers, *arguments, *changes)
        assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
        return result

    return run


@pytest.mark.parametrize(
    "change, message",
    [
        ("stages.0.distill.lrr=1", "stages.0.distill.lrr: unknown field; known: batch_size, "),
        ("stages.0.distill.lr=fast", "stages.0.distill.lr: Input should be a valid number"),
        ("stages.0.shrink.keep_params=1.2", "stages.0.shrink.keep_params: Input should be less than or equal to 1"),
        ("stages.0.shrink.keep_params=0.01", "keep_params: no image tower of 2 layers or fewer"),
        (
            "stages.0={name: a, shrink: {kind: learn_masks, keep_params: 0.0005}, while_masking: {steps: 1}, "
            "distill: {steps: 1, batch_size: 8}}",
            "keep_params: 6 parameters are below the 8 of the smallest cut",
        ),
        ("stages.0.shrink={kind: inherit, image: {width: 12}}", "image width: expected a multiple of the head size 8"),
        ("stages.0.shrink={kind: inherit, image: {width: 24}}", "image width: expected at most 16 (the model's)"),
        ("stages.0.shrink={kind: inherit, text: {layers: 3}}", "text layers: expected at most 2 (the model's), got 3"),
        ("stages.0.distill.batch_size=64", "batch_size 64: expected 2 to 32, the images in scenes train"),
        ("data.crop_scale=[0.9, 0.1]", "crop_scale: expected two shares, 0 < smallest <= largest <= 1"),
        ("evaluation.zeroshot=nowhere.tsv", "nowhere.tsv: No such file or directory"),
        ("device=warp", "device: 'warp' cannot be used here"),
        ("seed", "--set seed: expected path=value"),
    ],
)
def test_a_wrong_setting_is_one_line_before_anything_is_written(change, message, bad):
    assert_one_line(bad(set_=(change,)), message)


def test_a_later_stage_that_cannot_be_is_found_before_the_first_is_trained(bad, recipe):
    first = STUDENT_RECIPE["stages"][0]
    wider = {**first, "name": "wider", "shrink": {"kind": "inherit", "text": {"layers": 2}}}
    recipe.write_text(yaml.safe_dump(STUDENT_RECIPE | {"stages": [first, wider]}))
    assert_one_line(bad(), "text layers: expected at most 1 (the model's), got 2")


def test_a_missing_recipe_or_teacher_is_one_line(tiny, bad, tmp_path):
    assert_one_line(
        tiny("compress", "auto25", "--run", tmp_path / "new"), "no such file or preset; did you mean auto_25?"
    )
    assert_one_line(
        tiny("compress", "auto_25", "--run", tmp_path / "new"), "preset auto_25: needs --teacher and --data"
    )
    assert_one_line(
        bad("--teacher", "no/where"), "no/where: expected a model directory or a checkpoint file, found nothing"
    )
    assert_one_line(bad("--teacher", "open_clip:ViT-B32/openai"), "no architecture 'ViT-B32'; close: ViT-B-32")
    assert_one_line(tiny("recipes", "demo-manual"), "no preset demo-manual; did you mean demo_manual?")
    assert not list(tmp_path.glob("new*"))


@pytest.fixture
def data(tmp_path) -> Path:
    """Tables and shards of 8 pictures, in every state."""
    directory = tmp_path / "data"
    (directory / "images").mkdir(parents=True)
    (directory / "nothing").mkdir()
    for number in range(8):
        Image.new("RGB", (20, 20), (number * 30, 0, 0)).save(directory / "images" / f"{number}.png")
        (directory / "images" / f"{number}.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture after all")

    def table(name: str, header: str, row: str, rows: int = 8) -> None:
        lines = [header, *(row.format(number) for number in range(rows))]
        (directory / name).write_text("".join(line.replace(" ", "\t") + "\n" for line in lines))

    table("good.tsv", "file caption", "images/{0}.png thing{0}")
    table("uncaptioned.tsv", "file style", "images/{0}.png red{0}")
    table("headeronly.tsv", "file caption", "", rows=0)
    table("corrupt.tsv", "file caption", "images/{0}.jpg thing{0}")
    table("gone.tsv", "file caption", "images/{0}.gif thing{0}")
    table("labels.tsv", "file label", "images/{0}.png thing{0}")
    (directory / "empty.tsv").touch()
    with tarfile.open(directory / "good.tar", "w") as archive:
        for number in range(8):
            archive.add(directory / "images" / f"{number}.png", f"{number}.png")
            caption = tarfile.TarInfo(f"{number}.txt")
            caption.size = 5
            archive.addfile(caption, io.BytesIO(b"thing"))
    whole = (directory / "good.tar").read_bytes()
    for size in (300, 5120, 10240):  # inside a header, between two files, before the end mark
        (directory / f"cut{size}.tar").write_bytes(whole[:size])
    return directory


@pytest.mark.parametrize(
    "name, message",
    [
        ("none.tsv", "none.tsv: No such file or directory"),
        ("none", "none: no such folder (or .zip, table .tsv/.csv/.parquet, shard .tar)"),
        ("none.tar", "none.tar: No such file or directory"),
        ("empty.tsv", "empty.tsv: empty, expected a header line"),
        ("headeronly.tsv", "headeronly.tsv: no images"),
        ("nothing", "nothing: no images"),
        ("good.tsv?where=caption=nothing", "no images where caption=nothing"),
        ("uncaptioned.tsv", "no caption column captions or caption or txt or title or text; it has file, style"),
        ("good.tsv?caption=words", "no column 'words'; it has file, caption"),
        ("good.tsv?captoin=x", "unknown key 'captoin'; known: path, images"),
        ("gone.tsv", "8 of 8 images are not in"),
        ("corrupt.tsv", "0 readable pairs in batch 0 of 8, needs 2: images/"),
        ("labels.tsv?label=label", "0 readable pairs in batch 0 of 8, needs 2: images/"),
        ("cut300.tar", "not an uncompressed tar, or cut short"),
        ("cut5120.tar", "cut short"),
        ("cut10240.tar", "cut short"),
    ],
)
def test_data_that_cannot_be_trained_on_is_one_line_before_anything_is_written(name, message, bad, data):
    assert_one_line(bad("--data", data / name), message)


@pytest.mark.parametrize("name", ["good.tsv", "good.tar"])
def test_the_same_data_whole_trains(name, tiny, teacher, recipe, data, tmp_path):
    result = tiny("compress", recipe, "--teacher", teacher, "--data", data / name, "--run", tmp_path / "new")
    assert result.status == 0, result.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "expected --retrieval DATA, --zeroshot DATA or --suite NAME"),
        (("--retrieval", "DATA/corrupt.tsv"), "expected images, none of the 8 that have a text can be read"),
        (("--zeroshot", "DATA/good.tsv"), "expected labels, none of the 8 items has any"),
        (("--zeroshot", "scenes?split=classes&count=8", "--template", "plain"), "expected templates like"),
        (("--retrieval", "scenes?split=test"), "split: expected 'train', 'heldout' or 'classes', got 'test'"),
        (("--retrieval", "scenes?count=4", "--device", "warp"), "device: 'warp' cannot be used here"),
    ],
)
def test_an_evaluation_that_cannot_be_is_one_line(arguments, message, tiny, teacher, data):
    arguments = [argument.replace("DATA", str(data)) for argument in arguments]
    assert_one_line(tiny("evaluate", teacher, *arguments), message)


def drop(weights) -> None:
    del weights["image.projection.weight"]


def add(weights) -> None:
    weights["image.extra"] = torch.zeros(2)


def reshape(weights) -> None:
    weights["image.position"] = weights["image.position"][:3]


def break_(weights) -> None:
    weights["image.position"][0, 0] = torch.nan


@pytest.mark.parametrize(
    "damage, message",
    [
        (drop, "weights do not fit the config: 1 missing: image.projection.weight"),
        (add, "weights do not fit the config: 1 unexpected: image.extra"),
        (reshape, "1 of another shape: image.position (expected [5, 16], got [3, 16])"),
        (break_, "expected finite weights; 1 with NaN or infinity: image.position"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(damage, message, tiny, bad, teacher, tmp_path):
    model = shutil.copytree(teacher / "model", tmp_path / "model")
    weights = {name: weight.clone() for name, weight in load_file(model / "model.safetensors").items()}
    damage(weights)
    save_file(weights, model / "model.safetensors")
    assert_one_line(tiny("inspect", model), message, str(model))
    assert_one_line(tiny("evaluate", model, "--retrieval", "scenes?count=4"), message)
    assert_one_line(bad("--teacher", model), message)


def test_a_cut_checkpoint_is_one_line(tiny, teacher, tmp_path):
    model = shutil.copytree(teacher / "model", tmp_path / "model")
    os.truncate(model / "model.safetensors", 1000)
    assert_one_line(tiny("inspect", model), "not a readable checkpoint")
    (model / "model.safetensors").unlink()
    assert_one_line(tiny("inspect", model), "expected a checkpoint file, found none")


def test_pixels_that_are_not_finite_are_refused_and_named(teacher):
    model = tinyclip.load(teacher)
    pixels = torch.zeros(3, 3, 16, 16)
    pixels[1, 0, 4, 4] = torch.nan
    with pytest.raises(ValueError, match="expected finite pixels, got NaN or infinity in image 1 of 3"):
        model.encode_image(pixels)


def test_a_run_directory_of_another_recipe_is_kept_and_named(tiny, teacher, recipe, tmp_path):
    run = tmp_path / "run"
    command = ("compress", recipe, "--teacher", teacher, "--run", run)
    assert tiny(*command).status == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert_one_line(tiny(*command, "--set", "seed=3"), "holds a run of another recipe; changed: seed: 0 -> 3")
    masks = "{kind: learn_masks, keep_params: 0.5}, while_masking: {steps: 1, batch_size: 8}"
    changed = f"stages.0={{name: a, shrink: {masks}, distill: {{steps: 1, batch_size: 8}}}}"
    result = tiny(*command, "--set", changed)
    assert_one_line(result, "stages.0.name: half -> a", "and 5 more")
    assert len(result.err) < 1000
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (run / "recipe.yaml").write_text("{[")
    assert_one_line(tiny(*command), "recipe.yaml: damaged, expected the recipe of a run to continue")


def test_a_directory_or_file_that_is_no_run_is_left_alone(tiny, teacher, recipe, data):
    before = sorted(data.rglob("*"))
    for path in (data, recipe):
        result = tiny("compress", recipe, "--teacher", teacher, "--run", path)
        assert_one_line(result, f"{path}: expected a new directory or a run to continue, found neither")
    result = tiny("compress", recipe, "--teacher", teacher, "--run", recipe / "run")
    assert_one_line(
        result, f"--run {recipe / 'run'}: expected a place in a folder, got one in {recipe}, and it is a file"
    )
    assert sorted(data.rglob("*")) == before and recipe.is_file()


def test_train_does_not_take_a_recipe_with_a_teacher(tiny, recipe, tmp_path):
    recipe.write_text(yaml.safe_dump(STUDENT_RECIPE | {"teacher": "somewhere"}))
    assert_one_line(tiny("train", recipe, "--run", tmp_path / "new"), "names a teacher; use `tinyclip compress`")


def test_a_warning_of_a_dependency_fails_no_command(tmp_path):
    """Not even under -W error: torch warns here while it is imported."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, warnings\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            warnings.warn('deprecated', FutureWarning)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-W", "error", "-m", "tinyclip", "inspect", "no/where"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tinyclip", "--debug", "inspect", "no/where"])
    with pytest.raises(FileNotFoundError, match="no/where: expected a model directory"):
        cli.main()
    command = [sys.executable, "-m", "tinyclip", "--debug", "inspect", "no/where"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback (most recent call last)" in done.stderr


class StoppedInside(list):
    """What torch asks for its first row just when the signal comes; it then says that there is no shape."""

    def __getitem__(self, row):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("command, status", [("compress", 0), ("inspect", 128 + signal.SIGTERM)])
def test_a_stop_that_torch_turns_into_an_error_of_its_own_is_still_a_stop(command, status, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tinyclip", command])
    monkeypatch.setattr(cli, "app", lambda args, standalone_mode: torch.tensor(StoppedInside([0.0])))
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == status and said.startswith("tinyclip: stopped") and said.count("\n") == 1


def start_and_stop(command, number, after_s):
    """Signal a process so long after it first listens; its status and what it said."""
    arguments = [sys.executable, "-m", "tinyclip", *command]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    status = Path(f"/proc/{process.pid}/status")
    while not int(status.read_text().partition("SigCgt:")[2].split()[0], 16) & 1 << (signal.SIGTERM - 1):
        time.sleep(0.001)
    time.sleep(after_s)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, to see when a process listens")
def test_a_stop_while_torch_is_imported_is_one_line(tmp_path):
    """At once, and later in the imports of a command and in what it does first."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(TEACHER_RECIPE))
    train = ["train", str(tmp_path / "recipe.yaml"), "--run", str(tmp_path / "run")]
    cases = [(train, signal.SIGTERM, 0, 0.0), (train, signal.SIGINT, 130, 0.1), (train, signal.SIGTERM, 0, 0.3)]
    cases += [(train, signal.SIGTERM, 0, 0.6), (["inspect", "tinyclip:no"], signal.SIGTERM, 143, 0.02)]
    with ThreadPoolExecutor(len(cases)) as pool:
        ends = list(pool.map(lambda case: start_and_stop(case[0], case[1], case[3]), cases))
    for (command, _, expected, _), (status, said) in zip(cases, ends, strict=True):
        assert status == expected, said
        assert said.startswith("tinyclip: stopped") and said.count("\n") == 1
        assert ("continue with: python -m tinyclip train" in said) == (command is train)


def test_torch_is_imported_only_when_something_is_asked_for():
    code = "import sys, tinyclip; assert 'torch' not in sys.modules; tinyclip.CLIP; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(tinyclip, name) for name in tinyclip.__all__)
    with pytest.raises(AttributeError, match="no attribute 'clip'"):
        tinyclip.clip  # noqa: B018
