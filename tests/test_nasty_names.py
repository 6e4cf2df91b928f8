"""Names and texts of others are shown as they are: nothing acts on a terminal, or is markup in card and report."""

import csv
import io
import json
import re
import shutil
import sys

import pytest
import yaml
from markdown_it import MarkdownIt
from rich.text import Text

import tinyclip
from tests.data.test_sources import png
from tests.formats.test_export import UNIFORM, toy
from tests.test_cli import tiny  # noqa: F401  a fixture
from tinyclip import progress
from tinyclip.compress import compress
from tinyclip.distill.checkpoints import Checkpoints
from tinyclip.evaluate.benchmark import Report, Row
from tinyclip.evaluate.benchmark_table import tables as benchmark_tables
from tinyclip.formats.card import Record, card
from tinyclip.formats.provenance import Origin, Provenance, license_line
from tinyclip.recipes import load_recipe
from tinyclip.report import report
from tinyclip.terminal import Table, line, say, show

ACTS = "\x1b[31m\x07\x9b2J\u202e\u2066\r\n"
MARKUP = "[bold]b[/bold] [link=http://e]l[/link] <script>s</script> **b** `c` ``` ![i](http://e) | _u_ &lt; :smile:"
NASTY = f"{ACTS}{MARKUP}"
ACTING = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
STAGE = {"name": "half", "distill": {"steps": 1, "batch_size": 4, "warmup_steps": 0}}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A table whose classes, captions and files have nasty names."""
    folder = tmp_path_factory.mktemp("labelled")
    rows = []
    for number, colour in enumerate(("red", "green", "blue", "red")):
        name = f"{number}\x1b[bold]\u202e.png"
        (folder / name).write_bytes(png(colour) if number else b"broken")
        rows.append([name, f"{number} {NASTY}", f"{number % 2} {NASTY}"])
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "caption", "name"], *rows])
    return folder / "pairs.csv"


@pytest.fixture(scope="module")
def run(labelled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model = toy(UNIFORM)
    model.provenance = Provenance(
        teacher=Origin(name=NASTY, license=NASTY), data=Origin(name=f"hf:{NASTY}", license=NASTY),
        recipe=NASTY, code=Origin(name="tinyclip 0", license="mit"),
    )  # fmt: skip
    tinyclip.save(model, folder / "teacher")
    settings = {"device": "cpu", "data": {"train": str(labelled), "max_bad_share": 1}, "stages": [STAGE]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings | {"evaluation": {"retrieval": str(labelled)}}))
    recipe = load_recipe(str(folder / "recipe.yaml"), teacher=str(folder / "teacher"))
    compress(recipe, folder / "run", say=lambda _: None)
    return folder / "run"


def assert_is_read(text: str, *, where: object = "") -> None:
    """Nothing acts, and markup stands there."""
    assert (found := ACTING.search(text)) is None, (where, found)
    assert "[bold]b[/bold]" in "".join(text.split("\n")) or "[bold]" in text, where


def test_commands_print_names_as_they_are(run, labelled, tiny, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    commands = [
        ("compare", run, run, "--zeroshot", f"{labelled}?label=name", "--retrieval", labelled, "--no-timing"),
        ("data", "check", labelled),
        ("export", run, "--to", "tinyclip", "--out", out, "--no-verify"),
        ("inspect", f"{tmp_path}/{MARKUP}"),
        ("inspect", f"{tmp_path}/{NASTY}"),
        ("evaluate", run, "--retrieval", f"{tmp_path}/{NASTY}.tsv"),
        ("evaluate", run, f"--{MARKUP}"),
        ("recipes", NASTY),
    ]
    for command in commands:
        result = tiny(*command)
        assert_is_read(result.out + result.err, where=command)


def test_what_a_suite_says_is_printed_as_it_is(run, tmp_path, labelled, tiny):  # noqa: F811
    entry = {"name": NASTY, "data": f"{labelled}?label=name"}
    absent = {"name": f"{NASTY} 2", "data": "nowhere"}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"datasets": [entry, absent]}))
    result = tiny("evaluate", run, "--suite", tmp_path / "suite.yaml")
    assert result.status == 0 and "absent: " in result.out
    assert_is_read(result.out + result.err)


def test_a_line_is_one_line_and_tables_read_no_markup(capsys, monkeypatch):
    say(NASTY)
    said = capsys.readouterr().err
    assert (
        said == rf"\x1b[31m\x07\x9b2J\u202e\u2066\r\n{MARKUP}" + "\n" and line("猫 é 👩\u200d🚀") == "猫 é 👩\u200d🚀"
    )
    monkeypatch.setenv("COLUMNS", "400")
    table = Table("name", "ours", title=NASTY)
    table.add_row(NASTY, Text("two\nlines"))
    report = Report(
        reference=NASTY, settings={"batch_sizes": [1], "backends": ["onnx"], "memory": False, "rounds": 1},
        environment={
            "versions": {}, "device": NASTY, "threads": 1, "cores": 1, "peak_memory": "", "fp32_products": "",
            "load_before": None,
        },
        rows=(Row(model=NASTY, backend="onnx", not_measured="needs pip install 'tinyclip[onnx]'"),),
    )  # fmt: skip
    show(NASTY, table, *benchmark_tables(report))
    out = capsys.readouterr().out
    assert_is_read(out)
    assert out.count(MARKUP) >= 4 and "needs pip install 'tinyclip[onnx]'" in out and "two " in out


def test_a_progress_bar_reads_no_markup(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", lambda **_: progress_console(screen))
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(screen, "isatty", lambda: True)
    display = progress.Display(f"asking {NASTY}", 0, 4)
    display.note(NASTY)
    display.advance(2, 1.0)
    display.close()
    assert (
        screen.getvalue().count(MARKUP) >= 1 and "\x07" not in screen.getvalue() and "\u202e" not in screen.getvalue()
    )


def progress_console(file):
    from tinyclip.terminal import console

    return console(file=file, force_terminal=True, width=600, color_system=None)


def test_a_checkpoint_says_its_name_as_it_is(tmp_path, capsys):
    directory = tmp_path / "\x1b[bold]\u202e"
    directory.mkdir()
    (directory / f"checkpoint-000002-{'0' * 16}.pt").write_bytes(b"damaged")
    Checkpoints(directory).latest()
    assert_is_read(capsys.readouterr().err)


def test_the_licences_are_one_line(run, capsys):
    say(license_line(tinyclip.load(run).provenance))
    said = capsys.readouterr().err
    assert_is_read(said)
    assert said.count("\n") == 1


def test_the_card_has_no_markup_but_its_own():
    model = toy(UNIFORM)
    origin = Origin(name=NASTY, license=NASTY)
    model.provenance = Provenance(
        teacher=origin, more_teachers=(Origin(name=f"hf:{NASTY}"), Origin(name="hf:a/b\n---\nc")), data=origin,
        recipe=f"`{NASTY}`", code=origin,
    )  # fmt: skip
    scores = {NASTY: 0.5, f"{NASTY}_low": 0.4, f"{NASTY}_high": 0.6}
    text = card(model, "me/small", to="tinyclip", record=Record(scores, scores, {NASTY: NASTY}))
    assert ACTING.search(text) is None
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front).keys() == {"license", "library_name", "pipeline_tag", "tags"}
    page = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body)
    assert not re.search(r"<(script|strong|em|img|a|s)\b", page)
    assert page.count("<table>") == 3 and page.count("&lt;script&gt;s&lt;/script&gt; **b** ") >= 7
    widths = [row.count("<t") - 1 for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL)]
    assert set(widths) == {3, 4}


def test_the_report_has_no_markup_but_its_own_and_nothing_acts(run, tmp_path, labelled, tiny):  # noqa: F811
    copy = shutil.copytree(run, tmp_path / "\u202e<b>run [bold]")
    label = f"{labelled}?label=name"
    assert tiny("compare", run, run, "--zeroshot", label, "--no-timing", "--out", copy / "compare.json").status == 0
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    recipe |= {NASTY: [NASTY], "stages": [*recipe["stages"], {"name": NASTY}]}
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    teacher = json.loads((copy / "teacher.json").read_text())
    scores = teacher["scores"] | {NASTY: 0.5, f"{NASTY}_low": 0.4}
    (copy / "teacher.json").write_text(json.dumps(teacher | {"name": NASTY, "scores": scores}))
    (copy / "calls.jsonl").write_text(json.dumps({"event": "start", "command": NASTY, "device": NASTY, "cpu": NASTY}))
    (copy / "benchmark.json").write_text(json.dumps({NASTY: {NASTY: NASTY}, "javascript": "javascript:alert(1)"}))
    (copy / "evaluation.json").write_text(json.dumps({"picture": 'data:image/png;base64,"onerror="s', NASTY: NASTY}))
    page = report([copy], say=lambda _: None).read_text(encoding="utf-8")
    assert "<article" in page and "<script" not in page and "<b>run" not in page
    assert ACTING.search(page) is None
    assert "&lt;script&gt;s&lt;/script&gt;" in page
    assert not re.search(r"<[a-z][^>]* on[a-z]+=", page) and not re.search(r"(href|src)=\"javascript:", page)
    assert page.count("data:image/png;base64,&#34;onerror=&#34;s") == 1
