"""A secret that stands in every place where a user can write one is in no output but the run's recipe.yaml.

Servers are threads of the test; nothing leaves the machine.
"""

import contextlib
import io
import json
import os
import stat
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

import tinyclip
from tests.data.test_sources import COLOURS, png, write_tar
from tests.formats.test_export import UNIFORM, toy
from tinyclip import cli, stopping
from tinyclip.distill.metrics import _open_tracker
from tinyclip.evaluate.benchmark import Report, Row
from tinyclip.evaluate.benchmark import to_json as benchmark_json
from tinyclip.formats import onnx
from tinyclip.recipes import load_recipe

SECRET = "s3cr3tQ7XkLm9"
RECIPE = {"device": "cpu", "stages": [{"name": "half", "distill": {"steps": 2, "batch_size": 6, "warmup_steps": 0}}]}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Two shards of three pairs and a broken one each, and the address where they are served, with a secret in it."""
    folder = tmp_path_factory.mktemp("served")
    for shard in range(2):
        files = {f"{shard}-x.png": b"broken", f"{shard}-x.txt": b"nothing"}
        for colour in COLOURS:
            files |= {f"{shard}-{colour}.png": png(colour), f"{shard}-{colour}.txt": f"{colour} {shard}".encode()}
        write_tar(folder / f"{shard}.tar", files)
    served = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield folder, f"http://me:{SECRET}@127.0.0.1:{served.server_port}"
    served.shutdown()
    thread.join()
    served.server_close()


class Typed:
    """Runs commands as the entry point does, and keeps all that they print."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.patch, self.printed = patch, io.StringIO()

    def __call__(self, *arguments: object, status: int = 0) -> str:
        self.patch.setattr(sys, "argv", ["tinyclip", *map(str, arguments)])
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as stop:
            cli.main()
        self.printed.write(said.getvalue())
        assert (stop.value.code or 0) == status, said.getvalue()
        return said.getvalue()


@pytest.fixture(scope="module")
def outputs(server, tmp_path_factory):
    """Everything that commands wrote and printed."""
    folder, address = server
    place = tmp_path_factory.mktemp("outputs")
    inputs = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYCLIP_CACHE", str(place / "cache"))
        tiny = Typed(patch)
        teacher = tinyclip.save(toy(UNIFORM), inputs / "teacher")
        command = f"pipe:sh -c 'cat {folder}/1.tar || echo me:{SECRET}'"
        signed = f"{address}/0.tar%3FX-Amz-Signature={SECRET}%26any={SECRET}"
        mixture = f"mixture?2={signed.replace('%', '%25')}&1={command}"
        licence = f"licenses.data=see https://me:{SECRET}@host/?sig={SECRET}"
        (inputs / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"data": {"train": "scenes?count=8"}}))
        changes = [f"data.train={mixture}", f"evaluation.retrieval={signed}", licence, "data.max_bad_share=1"]
        typed = [argument for change in changes for argument in ("--set", change)]
        run = place / "run"
        recipe = ("compress", inputs / "recipe.yaml", "--teacher", teacher, *typed, "--run", run)
        tiny(*recipe)
        patch.setattr(sys, "argv", ["tinyclip", *map(str, recipe)])
        tiny.printed.write(stopping._to_continue())
        tiny("evaluate", run, "--retrieval", command, "--out", run / "evaluation.json")
        tiny("compare", teacher, run, "--retrieval", command, "--out", run / "compare.json", "--no-timing")
        tiny("report", run, "--out", place / "local.html")
        tiny("report", run, "--allow-remote")
        for to in ("tinyclip", "huggingface", "open_clip"):
            tiny("export", run, "--to", to, "--out", place / to, "--no-verify")
        (place / "onnx.json").write_text(json.dumps(onnx._description(tinyclip.load(run), 18, "int64")))
        tiny("push", run, "me/small", "--to", "tinyclip", "--dry-run", place / "push")
        tiny("data", "check", mixture, "--out", place / "check")
        tiny("compress", inputs / "recipe.yaml", "--teacher", teacher, "--run", run, "--data", signed, status=2)

        # A run that was cut off leaves its checkpoints.
        with patch.context() as cut:
            cut.setattr("tinyclip.run.complete", lambda *_: [][0])
            cut.setattr(sys, "argv", ["tinyclip", *map(str, recipe[:-1]), str(place / "cut")])
            with pytest.raises(IndexError), contextlib.redirect_stderr(tiny.printed):
                cli.main()

        # Errors.
        where = ("evaluate", teacher, "--retrieval")
        assert "exit status 3" in tiny(*where, f"pipe:sh -c 'echo no {SECRET} >&2; exit 3'?retries=0", status=2)
        assert "FileNotFoundError" in tiny(*where, f"{address}/9.tar%3Fkey={SECRET}?retries=0", status=2)
        assert "unknown key 'key'" in tiny(*where, f"{address}/0.tar?key={SECRET}", status=2)
        tiny(*where, f"pipe:sh -c '{SECRET}?retries=0", status=2)
        tiny(*where, "scenes?count=4", command, status=2)
        tiny("inspect", f"https://me:{SECRET}@host/model", status=2)
        tiny("evaluate", f"hf:someone/{SECRET}?token={SECRET}".replace(f"/{SECRET}", "/x"), status=2)
        tiny("compress", inputs / "recipe.yaml", "--set", f"data.train.path=pipe:{SECRET}", "--run", run, status=2)
        tiny("compress", inputs / "recipe.yaml", "--set", f"pipe:cat {SECRET}", "--run", run, status=2)
        with contextlib.redirect_stderr(tiny.printed):
            cli._show_traceback(ValueError, ValueError(f"{command}: no"), None)
        (place / "printed").write_text(tiny.printed.getvalue())
    return place, mixture


def test_the_secret_is_in_no_file_and_no_line_but_the_runs_recipe(outputs):
    place, _ = outputs
    files = [path for path in place.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"calls.jsonl", "skipped.jsonl", "metrics.jsonl", "teacher.json", "report.html", "local.html"} <= names
    assert {"evaluation.json", "compare.json", "check.json", "onnx.json", "open_clip_config.json", "README.md"} <= names
    found = {str(path.relative_to(place)) for path in files if SECRET.encode() in path.read_bytes()}
    assert found == {"run/recipe.yaml", "cut/recipe.yaml"}
    assert list(place.glob("cut/0-half/distill/checkpoint-*.pt"))


def test_what_was_left_out_left_the_rest(outputs):
    place, _ = outputs
    printed = (place / "printed").read_text()
    assert "pipe:... 0: OSError: exit status 3: no ..." in printed
    config = json.loads((place / "run/model/config.json").read_text())["provenance"]
    assert (
        config["data"]["name"].startswith("mixture?2.0=http://127.0.0.1:") and "1.0=pipe:..." in config["data"]["name"]
    )
    assert config["data"]["license"] == "see https://host/"
    assert "retrieval on `http://127.0.0.1:" in (place / "push/README.md").read_text()
    skipped = (place / "run/0-half/distill/skipped.jsonl").read_text()
    assert "not an image" in skipped and "-x" in skipped


def test_the_recipe_that_holds_it_is_its_owners_alone_and_continues_the_run(outputs, server, monkeypatch):
    place, mixture = outputs
    recipe = place / "run/recipe.yaml"
    assert stat.S_IMODE(recipe.stat().st_mode) == 0o600
    continued = (place / "printed").read_text()
    assert f"tinyclip compress {recipe} --run {recipe.parent} --allow-remote" in continued
    train = load_recipe(str(recipe), allow_remote=True).data.train
    assert str(train) == str(type(train).parse(mixture))
    monkeypatch.setenv("TINYCLIP_CACHE", str(place / "cache"))
    again = Typed(monkeypatch)("compress", recipe, "--run", recipe.parent, "--allow-remote")
    assert again.endswith(f"0-half: complete\n{place}/run/model\n")


def test_a_recipe_without_a_secret_is_for_all_whom_the_system_lets(tmp_path, monkeypatch):
    tinyclip.save(toy(UNIFORM), tmp_path / "teacher")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"data": {"train": "scenes?count=8"}}))
    before = os.umask(0o022)
    try:
        Typed(monkeypatch)(
            "compress", tmp_path / "recipe.yaml", "--teacher", tmp_path / "teacher", "--run", tmp_path / "run"
        )
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "run/recipe.yaml").stat().st_mode) == 0o644
    monkeypatch.setattr(sys, "argv", ["tinyclip", "compress", "recipe.yaml", "--run", str(tmp_path / "run")])
    assert stopping._to_continue() == f"tinyclip compress recipe.yaml --run {tmp_path}/run"


def test_a_benchmark_and_a_tracker_are_told_no_secret(monkeypatch, tmp_path):
    row = Row(model=f"https://me:{SECRET}@host/model", backend="eager", not_measured=f"token={SECRET}")
    report = Report(reference="a", settings={}, environment={}, rows=(row,))
    assert SECRET not in benchmark_json(report)

    class Wandb:
        def init(self, **_):
            self.sent = list(sys.argv)
            return self

        def log(self, values, step):
            pass

    told = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", told)
    monkeypatch.setattr(sys, "argv", ["tinyclip", "--data", f"pipe:cat {SECRET}"])
    _open_tracker("wandb", tmp_path, 0)
    assert told.sent == ["tinyclip", "--data", "pipe:..."] and sys.argv[2] == f"pipe:cat {SECRET}"
