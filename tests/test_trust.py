"""What a stranger's run, recipe, mixture, suite or model names starts no process, and opens no address."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

import tinyclip
from tests.data.test_sources import COLOURS, png, write_tar
from tests.formats.test_export import UNIFORM, toy
from tests.test_cli import assert_one_line, tiny  # noqa: F401  a fixture
from tinyclip.compress import compress
from tinyclip.data.sources import open_source
from tinyclip.data.spec import DataSpec
from tinyclip.distill import teacher as teachers
from tinyclip.evaluate.suites import open_suite
from tinyclip.recipes import load_recipe
from tinyclip.report import report

REFUSED = "a command (pipe:) runs where it is typed (--data, --set), or from a file with --allow-remote"
STAGE = {"name": "half", "distill": {"steps": 1, "batch_size": 4, "warmup_steps": 0}}
RECIPE = {"device": "cpu", "data": {"train": "scenes?count=8"}, "stages": [STAGE]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tinyclip.save(toy(UNIFORM), folder / "teacher")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    recipe = load_recipe(str(folder / "recipe.yaml"), teacher=str(folder / "teacher"))
    compress(recipe, folder / "run", say=lambda _: None)
    return folder / "run"


@pytest.fixture
def planted(run, tmp_path):
    """`planted(**settings)` is a stranger's copy of the run, whose recipe has these settings."""

    def plant(**settings):
        path = shutil.copytree(run, tmp_path / "foreign", dirs_exist_ok=True)
        recipe = yaml.safe_load((path / "recipe.yaml").read_text())
        (path / "recipe.yaml").write_text(yaml.safe_dump(recipe | settings))
        return path

    return plant


@pytest.fixture
def asked():
    """The requests that reached a server of this machine, and its address."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield requests, f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


def shard(path):
    files = {f"{colour}.png": png(colour) for colour in COLOURS}
    write_tar(path, files | {f"{colour}.txt": colour.encode() for colour in COLOURS})
    return path


# Runs


def test_no_command_follows_what_a_strangers_run_names(planted, asked, tiny, tmp_path):  # noqa: F811
    requests, address = asked
    mark = tmp_path / "mark"
    member = {"data": {"path": f"pipe:touch {mark}"}, "weight": 1.0}
    foreign = planted(
        data={"train": {"path": f"pipe:touch {mark}"}},
        evaluation={"retrieval": {"path": "mixture", "mixture": [member]}, "zeroshot": f"{address}/0.tar?label=name"},
        start=f"pipe:touch {mark}",
        store={"path": f"{address}/store", "views": 1},
    )
    pairs = "scenes?split=heldout&count=4"
    commands = [
        ("report", foreign),
        ("report", foreign, "--no-examples"),
        ("evaluate", foreign, "--retrieval", pairs),
        ("compare", foreign, foreign, "--retrieval", pairs, "--no-timing"),
        ("export", foreign, "--to", "tinyclip", "--out", tmp_path / "export"),
        ("push", foreign, "me/small", "--to", "tinyclip", "--dry-run", tmp_path / "push"),
        ("inspect", foreign),
        ("benchmark", foreign, "--quick", "--backends", "eager", "--batch-sizes", "1", "--no-memory"),
        ("data", "check", pairs, "--model", foreign),
    ]
    for command in commands:
        assert tiny(*command).status == 0, command
    assert requests == [] and not mark.exists()
    page = (foreign / "report.html").read_text()
    said = "the recipe&#39;s evaluation.retrieval runs a command or opens an address; --allow-remote does so"
    assert f"<p>Not shown: {said}.</p>" in report([foreign], say=print).read_text()
    assert "--no-examples" in page  # the last page that was written


@pytest.mark.parametrize(
    "evaluation",
    ["{address}/0.tar", "huggingface:someone/set", "mixture?1=scenes&1={address}/0.tar", "pipe:touch {mark}", "{mix}"],
)
def test_a_report_names_the_flag_with_which_it_follows(evaluation, planted, asked, tiny, tmp_path):  # noqa: F811
    requests, address = asked
    mark, mix = tmp_path / "mark", tmp_path / "mix.yaml"
    mix.write_text(yaml.safe_dump({"mixture": [{"data": f"pipe:touch {mark}"}]}))
    named = evaluation.format(address=address, mark=mark, mix=mix)
    foreign = planted(evaluation={"retrieval": named, "zeroshot": None, "templates": []})
    result = tiny("report", foreign)
    assert result.status == 0 and result.err.count("\n") == 1 and "--allow-remote" in result.err
    assert requests == [] and not mark.exists()
    assert "--allow-remote" in (foreign / "report.html").read_text()
    if "huggingface" not in evaluation:
        tiny("report", foreign, "--allow-remote")
        assert requests or mark.exists()


@pytest.mark.parametrize("name", ["open_clip:ViT-B-32/laion2b_e16", "hf:someone/clip", "hf-hub:a/b", "tinyclip:x"])
def test_a_published_teacher_is_fetched_only_with_the_flag(name, planted, tiny, monkeypatch):  # noqa: F811
    foreign = planted(teacher=name, evaluation={"retrieval": "scenes?split=heldout&count=4"})
    fetched = []

    def load(spec, **options):
        fetched.append((spec, options))
        raise ValueError("no network")

    monkeypatch.setattr("tinyclip.report.examples.load_teacher", load)
    said = tiny("report", foreign).err
    assert said == f"examples: left out: the recipe's teacher, {name}, would be fetched; --allow-remote does so\n"
    with pytest.raises(ValueError, match="would be fetched"):
        report([foreign], data="scenes?count=4", say=print)
    assert fetched == []
    assert "no network" in tiny("report", foreign, "--allow-remote").err
    assert fetched == [(name, {"allow_remote": True})]


def test_what_lies_on_this_machine_is_followed(planted, tiny, tmp_path):  # noqa: F811
    for evaluation in ("scenes?split=heldout&count=4", str(shard(tmp_path / "0.tar"))):
        foreign = planted(evaluation={"retrieval": evaluation})
        assert "examples: teacher and student read" in tiny("report", foreign).err
        assert "<article" in (foreign / "report.html").read_text()


# Recipes, mixtures and suites


def test_a_command_in_a_recipe_is_refused_where_it_was_not_typed(run, tiny, tmp_path):  # noqa: F811
    command = f"pipe:cat {shard(tmp_path / '0.tar')}"
    mark = tmp_path / "mark"
    teacher = ("--teacher", run.parent / "teacher")

    def written(**settings):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | settings))
        return ("compress", tmp_path / "recipe.yaml", *teacher, "--run", tmp_path / "run")

    forms = [f"pipe:touch {mark}", {"path": f"pipe:touch {mark}"}, f"mixture?1=scenes&2=pipe:touch {mark}"]
    forms.append(f"{tmp_path}/0.tar::pipe:touch {mark}")
    for form in [*forms, {"mixture": [{"data": form} for form in forms[:2]]}]:
        assert_one_line(tiny(*written(data={"train": form})), "recipe.yaml: data.train", REFUSED)
        assert_one_line(tiny(*written(evaluation={"retrieval": form})), "recipe.yaml: evaluation.retrieval", REFUSED)
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"mixture": [{"data": forms[0]}]}))
    assert_one_line(tiny(*written(), "--data", tmp_path / "mix.yaml"), REFUSED)
    assert_one_line(tiny(*written(data={"train": str(tmp_path / "mix.yaml")})), REFUSED)
    assert_one_line(tiny("evaluate", run, "--retrieval", tmp_path / "mix.yaml"), REFUSED)
    assert_one_line(tiny("compare", run, run, "--zeroshot", tmp_path / "mix.yaml"), REFUSED)
    assert_one_line(tiny("data", "check", tmp_path / "mix.yaml"), REFUSED)
    assert not mark.exists() and not (tmp_path / "run").exists()

    half = {"stages": [{"name": "half", "distill": {"steps": 1, "batch_size": 3, "warmup_steps": 0}}]}
    typed = tiny(*written(**half, data={"train": forms[0]}), "--data", command)
    assert typed.status == 0 and not mark.exists(), typed.err
    again = ("compress", tmp_path / "run" / "recipe.yaml", "--run", tmp_path / "run")
    assert_one_line(tiny(*again), REFUSED)
    assert tiny(*again, "--allow-remote").status == 0
    assert tiny(*again, "--set", f"data.train.path={command}").status == 0


def test_a_command_in_a_suite_is_refused_without_the_flag(tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"datasets": [{"name": "a", "data": f"pipe:touch {mark}"}]}))
    with pytest.raises(ValueError, match="--allow-remote"):
        open_suite(str(tmp_path / "suite.yaml"), None)
    assert not mark.exists()
    with pytest.raises(ValueError, match="not an uncompressed tar"):
        open_suite(str(tmp_path / "suite.yaml"), None, allow_remote=True)
    assert mark.exists()


def test_what_a_program_passes_is_trusted(tmp_path):
    command = f"pipe:cat {shard(tmp_path / '0.tar')}"
    assert len(open_source(command)) == len(open_source({"mixture": [{"data": command}]})) == 3
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"mixture": [{"data": command}]}))
    with pytest.raises(ValueError, match="runs where it is typed"):
        open_source(str(tmp_path / "mix.yaml"))
    assert len(open_source(str(tmp_path / "mix.yaml"), allow_remote=True)) == 3
    fields = DataSpec.parse(str(tmp_path / "mix.yaml"), allow_remote=True).model_dump()
    assert type(fields["mixture"][0]["data"]["path"]) is str


# Models


@pytest.mark.parametrize(
    "section, field, name",
    [("text_cfg", "hf_model_name", "someone/bert"), ("vision_cfg", "timm_model_name", "hf-hub:someone/vit")],
)
def test_parts_of_a_model_are_fetched_only_with_the_flag(section, field, name, tmp_path, tiny, monkeypatch):  # noqa: F811
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {section: {field: name}}}))
    fetched = []
    monkeypatch.setattr(teachers, "load_pretrained", lambda spec: fetched.append(spec) or pytest.fail("caught"))
    for command in (
        ("inspect",),
        ("evaluate", "--retrieval", "scenes?count=4"),
        ("export", "--to", "tinyclip", "--out", "x"),
    ):
        verb, *options = command
        assert_one_line(
            tiny(verb, f"local-dir:{tmp_path}", *options), f"{field}: {name} would be fetched", "--allow-remote"
        )
    assert fetched == []
    with pytest.raises(pytest.fail.Exception, match="caught"):
        teachers.load_teacher(f"local-dir:{tmp_path}", allow_remote=True)
    assert fetched
