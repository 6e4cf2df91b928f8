"""The report: one page that needs nothing else, says what the run wrote, escapes it, and bears damage and absence.

The browser's test needs playwright and a Chromium of the system, and is skipped with that reason elsewhere.
"""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from scipy.stats import binomtest

from tests.test_cli import tiny  # noqa: F401  a fixture
from tests.test_compress import student_recipe, teacher_recipe
from tinyclip.compress import compress
from tinyclip.formats.files import read_sealed, write_record
from tinyclip.model import BlockConfig, TextConfig
from tinyclip.model_resnet import BottleneckConfig, ResNetConfig
from tinyclip.report import charts, losses, report
from tinyclip.report.charts import Point, Series
from tinyclip.report.examples import choose
from tinyclip.report.page import HERE, channels_left, survivors, tables_of
from tinyclip.report.read import Score, kept, read_run, scores, wilson
from tinyclip.run import recorded
from tinyclip.shrink.keep import TowerKeep
from tinyclip.shrink.keep_resnet import ResNetKeep


def quiet(_: str) -> None:
    """Progress that nobody reads."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    compress(teacher_recipe(), folder / "teacher", say=quiet)
    compress(student_recipe(folder / "teacher"), folder / "small", say=quiet)
    return folder


@pytest.fixture(scope="module")
def page(runs):
    return report([runs / "small"], out=runs / "page.html", say=quiet).read_text(encoding="utf-8")


@pytest.fixture
def copy(runs, tmp_path):
    """A run that a test may damage."""
    shutil.copytree(runs / "small", tmp_path / "small")
    return tmp_path / "small"


def written(run, **options) -> str:
    return report([run], say=quiet, with_examples=False, **options).read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Start tags with their attributes; raises where tags are not closed in order."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# The page.


def test_the_page_needs_no_network_and_no_script(page):
    tags = Tags(page).found
    links = [a[name] for _, a in tags for name in ("src", "href") if name in a]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert not {tag for tag, _ in tags} & {"script", "iframe", "object", "form"}
    assert "url(" not in page and "@import" not in page and len(page) < 2_000_000


def test_every_picture_and_figure_has_a_text_and_every_link_a_target(page):
    tags = Tags(page).found
    assert all(attributes.get("alt") for tag, attributes in tags if tag == "img")
    figures = [attributes for tag, attributes in tags if tag == "svg"]
    assert len(figures) >= 8 and all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in figures)
    assert page.count("<figure>") == page.count('<details class="data">') == len(figures)
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for tag, a in tags if tag == "a"} <= set(ids)


def test_the_first_screen_tells_sizes_scores_time_and_the_command(runs, page):
    story = page.partition('<section class="story"')[2].partition("<nav")[0]
    costs = [
        json.loads((runs / "small" / file).read_text())["cost"] for file in ("teacher.json", "1-manual-35/stage.json")
    ]
    before, after = (cost["parameters"] for cost in costs)
    assert charts.si(before) in story and charts.si(after, like=before) in story
    assert charts.percent(after / before) in story
    assert "zero-shot top-1" in story and "image → text recall@1" in story and "2 of 2 stages" in story
    call = json.loads((runs / "small" / "calls.jsonl").read_text().splitlines()[0])
    assert call["command"].split()[0] in story and f"{call['threads']} thread" in story


def test_the_same_runs_give_the_same_page(runs, page):
    again = report([runs / "small"], out=runs / "again.html", say=quiet)
    assert again.read_text(encoding="utf-8") == page


def test_examples_show_teacher_and_student_side_by_side(page):
    assert page.count("<article") == page.count("Teacher <span") == page.count("Student <span") >= 2
    assert "data:image/webp;base64," in page
    counts = [
        list(map(int, row))
        for row in re.findall(
            r"<tr><th scope=\"row\">(?:text to image|image to text)</th>" + 5 * r"<td>(\d+)</td>", page
        )
    ]
    assert [row[0] for row in counts] == [sum(row[1:]) for row in counts] and len(counts) == 2


def test_several_runs_stand_in_one_table(runs):
    page = report(
        [runs / "small", runs / "teacher"], out=runs / "both.html", with_examples=False, say=quiet
    ).read_text()
    table = page.partition('aria-label="all models"')[2].partition("</table>")[0]
    assert re.findall(r'<th scope="row">(.*?)</th>', table) == ["teacher", "small/0-auto-70", "small", "teacher"]
    assert "Run 2</span> teacher" in page and "Nothing was cut." in page


def test_what_a_run_file_says_is_escaped(copy):
    attack = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    for name in ("teacher.json", "1-manual-35/stage.json"):
        record = read_sealed(copy / name)
        record["scores"][attack] = 0.5
        (copy / name).write_text(json.dumps({**record, "name": attack}))
    (copy / "benchmark.json").write_text(
        json.dumps({"rows": [{"model": attack, attack: 'data:image/png;base64,"><b>'}]})
    )
    (copy / "calls.jsonl").write_text(json.dumps({"event": "start", "stage": attack, "command": attack}) + "\n")
    page = written(copy)
    assert attack[:8] not in page and "onerror=alert(1)>" not in page and "&lt;script&gt;" in page
    Tags(page)


# What is there, damaged, and absent.


def test_what_was_not_measured_is_named_with_its_command(copy):
    page = written(copy)
    for command in ("tinyclip evaluate", "tinyclip compare", "tinyclip benchmark"):
        assert f"Not measured: run <code>{command} " in page
    (copy / "evaluation.json").write_text(json.dumps({"flowers": {"top1": 0.25, "n": 40}, "absent": ["cars"]}))
    page = written(copy)
    assert "Not measured: run <code>tinyclip evaluate" not in page and ">flowers</th>" in page and "0.25" in page


def test_what_was_lost_is_shown_class_by_class_with_pictures(runs, copy, tiny):  # noqa: F811
    data = ("--zeroshot", "scenes?split=classes&count=384", "--no-timing", "--out", copy / "compare.json")
    assert tiny("compare", runs / "teacher", copy, *data).status == 0
    content = json.loads((copy / "compare.json").read_text())
    examples = [example for own in content["data_sets"][0]["worst_classes"] for example in own["examples"]]
    attack = "<img src=x onerror=alert(1)>"
    examples[0]["student_said"] = attack
    (copy / "compare.json").write_text(json.dumps(content))
    page = written(copy)
    Tags(page)
    assert "Not measured: run <code>tinyclip compare" not in page and ": class by class</h4>" in page
    assert page.count('<svg class="bar"') == len(content["data_sets"][0]["per_class"]) == 64
    assert len(examples) == page.count(", which the student called ") and attack not in page
    assert examples and all(example["picture"] in page for example in examples)


def test_what_was_lost_fits_a_phone(browser, runs, copy, tiny):  # noqa: F811
    data = ("--zeroshot", "scenes?split=classes&count=384", "--retrieval", "scenes?count=8", "--no-timing")
    assert tiny("compare", runs / "teacher", copy, *data, "--out", copy / "compare.json").status == 0
    written(copy)
    view = browser.new_page(viewport={"width": 390, "height": 844})
    view.goto(f"file://{copy / 'report.html'}")
    assert view.evaluate("document.documentElement.scrollWidth") == 390
    assert view.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_a_comparison_of_another_layout_is_shown_as_plain_tables(copy):
    (copy / "compare.json").write_text(json.dumps({"words": [], "data_sets": [{"name": "x", "per_class": 3}]}))
    page = written(copy)
    Tags(page)
    assert '<svg class="bar"' not in page and ">per class</th>" in page


def test_a_bar_by_eye():
    bar = str(losses.bar(-0.5, -1, 0.25, widest=1))  # 0 is at 60 px, 1 is 58 px wide
    assert 'class="lost" x="31.0" y="2" width="29.0"' in bar and 'x1="2.0" x2="74.5"' in bar
    assert losses.losses(None) is losses.losses([]) is losses.losses({"words": 3}) is None


def test_latencies_give_a_third_chart(copy):
    teacher = json.loads((copy / "teacher.json").read_text())["name"]
    values = dict.fromkeys(("text_latency_p50_ms", "text_latency_p95_ms", "image_latency_p95_ms", "text_per_s"), 3.0)
    values |= dict.fromkeys(("image_per_s", "pairs_per_s", "pairs_per_s_ratio_low", "pairs_per_s_ratio_high"), 1234.5)
    rows = [
        {
            "model": str(copy),
            "backend": "eager",
            "values": values | {"image_latency_p50_ms": 2.5, "pairs_per_s_ratio": 7},
        },
        {
            "model": teacher,
            "backend": "eager",
            "values": values | {"image_latency_p50_ms": 9.0, "peak_memory_mb": 512.3},
        },
        {"model": "?", "backend": "int8", "values": {}, "not_measured": "no such library"},
    ]
    rows = [{"backend": "eager", **row} for row in rows]
    place = {"device": "cpu", "threads": 1, "cores": 2, "versions": {"torch": "2", "onnx": None}, "peak_memory": "rss"}
    content = {
        "rows": rows,
        "reference": teacher,
        "environment": place,
        "settings": {"rounds": 3, "backends": ["eager"]},
    }
    (copy / "benchmark.json").write_text(json.dumps(content))
    page = written(copy)
    assert "over latency of one image, ms (p50)" in page and "7.00 (1,234 to 1,234)" in page and "2.50 / 3.00" in page
    content["settings"]["backends"] = ["int8"]
    (copy / "benchmark.json").write_text(json.dumps(content))
    assert "not measured: no such library" in written(copy)


def test_a_suite_is_a_row_for_each_data_set(copy):
    scores = {"top1": 0.25, "top1_low": 0.2, "top1_high": 0.3, "n": 1200, "penultimate_probe_top1": 0.5}
    content = {
        "suite": "clip23",
        "datasets": {"mnist": scores},
        "absent": {"dtd": "no <folder>"},
        "mean": {"value": 0.25, "of": 1, "n_datasets": 2},
        "in_mean": {"mnist": "top1"},
    }
    (copy / "evaluation.json").write_text(json.dumps(content))
    page = written(copy)
    assert "clip23: mean of 1 of 2 data sets, 25.0%" in page and "25.0% [20.0, 30.0]" in page
    assert "penultimate probe top1" in page and "no &lt;folder&gt;" in page


def test_an_unfinished_run_shows_what_is_there(copy):
    (copy / "1-manual-35/stage.json").unlink()
    shutil.rmtree(copy / "model")
    page = written(copy)
    assert "small: unfinished, 1 of 2 stages are complete" in page and "0-auto-70: loss" in page
    (copy / "0-auto-70/stage.json").unlink()
    assert "No stage of small is complete yet." in written(copy)


def test_damage_is_a_note_and_no_end(copy):
    (copy / "1-manual-35/stage.json").write_text('{"scores": ')
    (copy / "0-auto-70/keep.json").write_text('{"image": 3}')
    metrics = copy / "0-auto-70/masks/metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 3, "lo\n[1]\n{"step": 4, "loss": NaN}\n')
    page = written(copy)
    for note in (
        "1-manual-35/stage.json: damaged, left out",
        "0-auto-70/keep.json: damaged, left out",
        "0-auto-70/masks/metrics.jsonl: 2 damaged lines left out, the first is line 5",
    ):
        assert f"<li>small: {note}</li>" in page


def test_values_of_the_wrong_kind_are_left_out(copy):
    deep: dict = {}
    for _ in range(400):
        deep = {"a": deep, "b": [1]}
    (copy / "compare.json").write_text(json.dumps(deep))
    (copy / "benchmark.json").write_text(
        json.dumps({"rows": [3, {"model": 4, "values": {"image_latency_p50_ms": "fast"}}, {"values": 3}]})
    )
    (copy / "calls.jsonl").write_text(
        '{"event": "start", "command": {"a": 1}, "time": 3}\n{"event": "end", "seconds": "x"}\n'
    )
    (copy / "start.json").write_text("[]")
    record = {"name": 3, "scores": {"top1": "high", "top5": 7, "n": -1}, "cost": {"parameters": -5, "image_macs": None}}
    (copy / "teacher.json").write_text(json.dumps(record))
    (copy / "1-manual-35/stage.json").write_text(json.dumps({"scores": [], "cost": 3, "training": "long"}))
    page = written(copy)
    Tags(page)
    assert "small: start.json: damaged, left out" in page and "small: 1-manual-35/stage.json: no scores" in page


def test_a_keep_that_fits_another_model_is_a_note(copy):
    keep = read_sealed(copy / "0-auto-70/keep.json")
    keep["image"]["heads"][0] = [77]
    write_record(copy / "0-auto-70/keep.json", json.dumps(keep))
    assert "keep.json of the image tower does not fit the model before it" in written(copy)


@pytest.mark.parametrize("recipe", [None, "stages: 3", "a: [", "- 1", "stages: [{}]"])
def test_what_is_no_run_is_refused_in_one_line(tmp_path, recipe):
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(ValueError, match="expected a run|damaged, expected the recipe of a run") as error:
        report([tmp_path], say=quiet)
    assert "\n" not in str(error.value) and not (tmp_path / "report.html").exists()


def test_examples_that_cannot_be_made_are_an_error_only_where_they_were_asked_for(runs, copy):
    (copy / "recipe.yaml").write_text(
        (copy / "recipe.yaml").read_text().replace(str(runs / "teacher"), "/nowhere/at/all")
    )
    said = []
    page = report([copy], say=said.append).read_text()
    assert "Not shown: " in page and said[-1].startswith("examples: left out: ")
    with pytest.raises((ValueError, OSError), match="nowhere"):
        report([copy], data="scenes?count=16", say=quiet)


def test_the_command_writes_beside_the_run_and_prints_the_path(copy, tiny):  # noqa: F811
    result = tiny("report", copy, "--no-examples")
    assert (result.status, result.out) == (0, f"{copy / 'report.html'}\n")
    assert "left out (--no-examples)" in (copy / "report.html").read_text()
    result = tiny(
        "report", copy, "--out", copy.parent / "deep" / "page.html", "--data", "scenes?count=16&split=heldout"
    )
    assert result.status == 0 and (copy.parent / "deep" / "page.html").is_file()
    failed = tiny("report", copy / "0-auto-70")
    assert failed.status == 2 and failed.err.count("\n") == 1 and "expected a run" in failed.err


# What a run records of itself.


def test_a_call_is_recorded_before_and_after_the_work_even_where_it_fails(tmp_path):
    with pytest.raises(KeyError), recorded(tmp_path, "0-half", torch.device("cpu")):
        raise KeyError
    start, end = map(json.loads, (tmp_path / "calls.jsonl").read_text().splitlines())
    assert (start["event"], end["event"]) == ("start", "end") and start["stage"] == end["stage"] == "0-half"
    assert start["threads"] == torch.get_num_threads() and start["torch"] == torch.__version__ and end["seconds"] >= 0


def test_the_seconds_of_a_stage_are_those_of_all_calls(copy):
    lines = [{"event": "end", "stage": "0-auto-70", "seconds": seconds} for seconds in (40, 50.5)]
    (copy / "calls.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    run = read_run(copy)
    assert [stage.seconds for stage in run.stages] == [90.5, None] and "1 min 30 s" in written(copy)


# Numbers.


def test_a_recorded_interval_stands_and_else_it_is_wilsons():
    found = scores({"top1": 0.5, "top1_low": 0.4, "top1_high": 0.7, "top5": 0.8, "n": 10, "classes": 1, "x_rank": 1.0})
    assert found.keys() == {"top1", "top5"} and found["top1"] == Score(0.5, 0.4, 0.7, 10)
    for share, n in ((0.8, 10), (0.0, 5), (1.0, 5), (0.25, 1000)):
        expected = binomtest(round(share * n), n).proportion_ci(method="wilson")
        assert wilson(share, n) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert (found["top5"].low, found["top5"].high) == wilson(0.8, 10) and not found["top5"].measured


def test_the_interval_of_a_kept_share_by_hand():
    share = kept(Score(0.4, 0.36, 0.44), Score(0.8, 0.72, 0.88))  # both +- 10 %: log-normal with sqrt(2) * 10 %
    assert share is not None and share.value == 0.5
    assert (share.low, share.high) == pytest.approx((0.5 * math.exp(-0.1 * 2**0.5), 0.5 * math.exp(0.1 * 2**0.5)))
    assert kept(Score(0.4), Score(0.0)) is None and kept(Score(0.4), Score(0.8)) == Score(0.5)


def test_survivors_by_eye():
    start = TextConfig(
        width=8, head_dim=4, context_length=5, vocab_size=9,
        blocks=(BlockConfig(heads=2, ffn=6), BlockConfig(heads=3, ffn=6)),
    )  # fmt: skip
    first = TowerKeep(blocks=(0, 1), width=(0,), heads=((1,), (0, 2)), ffn=((0, 1), (0, 1, 2)))
    second = TowerKeep(
        blocks=(1,), width=(0,), heads=((1,),), ffn=((0,),)
    )  # block 0 goes; of block 1's heads 0, 2 stays 2
    left = survivors(start, [first, None, second])
    assert left.head_stages == [[0, 2], [2, 0, 3]]
    assert left.ffn == [[6, 2, 2, 0], [6, 3, 3, 1]]


def test_examples_are_chosen_by_the_change_of_rank_and_no_image_twice():
    teacher, student = torch.tensor([1, 1, 1, 9, 1, 1]), torch.tensor([4, 8, 1, 1, 7, 1])
    image = torch.tensor([0, 1, 2, 3, 1, 4])
    used: set[int] = set()
    assert choose(teacher, student, image, {"lost": 2, "gained": 1, "kept": 1}, used) == [
        ("lost", 1), ("lost", 0), ("gained", 3), ("kept", 5),
    ]  # fmt: skip
    assert used == {0, 1, 3, 4}


def test_tables_of_nested_values():
    content = {"mean": 0.5, "sets": {"pets": {"top1": 0.9}, "cars": {"top5": 1}}, "rows": [{"a": 1}, {"a": 2}]}
    found = dict(tables_of(content, "T"))
    assert found["T"].rows == [["mean", "0.5"]]
    assert found["T: sets"].rows == [["pets", "0.9", ""], ["cars", "", "1"]] and len(found["T: rows"].rows) == 2


# Charts.


def test_ticks_are_round_and_inside():
    assert charts.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts.ticks(3, 47, 5) == [10, 20, 30, 40]
    assert charts.log_ticks(3, 300) == [5, 10, 20, 50, 100, 200]
    assert charts.log_ticks(1, 1e6, at_most=4) == [1, 100, 1e4, 1e6]


def test_numbers_have_three_digits_and_a_unit():
    space = "\N{NO-BREAK SPACE}"
    shown = [charts.si(number).replace(space, " ") for number in (0.5, 42, 999.7, 73_000, 2_110_977, 17.4e9)]
    assert shown == ["0.50", "42.0", "1.00 k", "73.0 k", "2.11 M", "17.4 G"]
    assert charts.si(738_000, like=2_110_977) == f"0.74{space}M" and charts.si(7_380, like=2_110_977) == f"7.38{space}k"


def test_a_line_is_broken_where_a_value_is_not_finite():
    figure = charts.line_chart("t", [Series("loss", [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0)])], x_label="step")
    (path,) = re.findall(r'<path class="line s0" d="(M[^"]*L[^"]*M[^"]*)"', figure.svg)
    assert path.count("M") == 2 and "nan" not in path
    assert [row[0] for row in figure.table.rows] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("values", [[], [math.inf], [5.0], [0.0, 0.0], [-1.0, -3.0]])
def test_a_chart_of_hardly_any_values_is_whole(values):
    figure = charts.line_chart("t", [Series("a<b", list(enumerate(values)))], x_label="step", marks=[(0, "x")])
    assert ElementTree.fromstring(figure.svg).tag == "svg" and "a&lt;b" in figure.svg and "nan" not in figure.svg


def test_a_long_line_is_thinned_and_keeps_its_last_point():
    figure = charts.line_chart("t", [Series("a", [(x, float(x)) for x in range(10_001)])], x_label="step")
    assert len(figure.svg) < 15_000 and figure.table.rows[-1][0] == "10000" and len(figure.table.rows) < 450


def test_the_front_holds_what_no_smaller_one_equals():
    points = [Point("a", 1, 0.2), Point("b", 2, 0.2), Point("c", 3, 0.5), Point("d", 4, 0.4), Point("e", 4, 0.6)]
    assert [point.label for point in charts.pareto(points)] == ["a", "c", "e"]


def test_labels_lie_inside_and_on_no_other():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        anchors = [(50 + 280 * x, 20 + 180 * y) for x, y in torch.rand(6, 2, generator=generator).tolist()]
        boxes = charts.place_labels(anchors, ["some-model"] * 6, (46, 4, 340, 216))
        for number, box in enumerate(boxes):
            assert box[0] >= 46 and box[1] >= 4 and box[2] <= 340.01 and box[3] <= 216.01
            assert all(charts._overlap(box, other) == 0 for other in boxes[:number])


def test_maps_say_in_words_what_they_show():
    heads = charts.head_map("image tower", [2, 1], [[2, 0], [1]], ["a", "b"])
    assert (
        heads.table.rows == [["0", "2", "1", "0"], ["1", "1", "0", "none"]] and "Layer 0: 1 of 2" in heads.description
    )
    heat = charts.heat_map("ffn", ["start", "a"], [4, 0], [[4, 1], [0, 0]])
    assert "--share:0.250" in heat.svg and heat.table.rows[0] == ["0", "4", "4", "1"]


# Colours and the browser.


def luminance(color: tuple[float, ...]) -> float:
    """WCAG 2.2, relative luminance of sRGB in [0, 255]."""
    red, green, blue = (c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", [0, 1, 2], ids=["light", "dark", "print"])
def test_text_has_a_contrast_of_at_least_4_5(mode):
    block = re.findall(r":root \{(.*?)\}", (HERE / "page.css").read_text(), re.DOTALL)[mode]
    value = dict(re.findall(r"--([\w-]+): ([^;]+);", block))
    colors = {
        k: tuple(int((v * 2 if len(v) == 4 else v)[i : i + 2], 16) for i in (1, 3, 5))
        for k, v in value.items()
        if len(v) == 7
    }
    colors |= {k: tuple(int(digit * 2, 16) for digit in v[1:]) for k, v in value.items() if re.fullmatch("#...", v)}
    for text in ("ink", "soft", "blue", "rust", "green", "plum"):
        for ground in ("paper", "raised"):
            assert contrast(colors[text], colors[ground]) >= 4.5, f"{text} on {ground}"
    assert contrast(colors["ink"], colors["wash"]) >= 4.5
    most, shade = float(value["most"]), tuple(map(int, value["shade"].split()))
    cell = tuple(most * s + (1 - most) * p for s, p in zip(shade, colors["paper"], strict=True))
    assert contrast(colors["ink"], cell) >= 4.5


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs a Chromium on the PATH")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width, height", [(1280, 800), (390, 844)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(browser, runs, page, width, height, scheme):
    """No message on the console, no request, nothing wider than the screen, the story first, all by keyboard."""
    view = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    said, asked = [], []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(f"file://{runs / 'page.html'}")
    assert not said and [url for url in asked if not url.startswith("data:")] == [f"file://{runs / 'page.html'}"]
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    assert view.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    top = view.evaluate("document.querySelector('.command').getBoundingClientRect().top")
    assert top < height
    paper = view.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(tuple(map(int, re.findall(r"\d+", paper)))) < 0.1) == (scheme == "dark")
    wanted = view.evaluate("document.querySelectorAll('a, summary').length")
    reached = set()
    for _ in range(3 * wanted + 40):
        view.keyboard.press("Tab")
        reached.add(view.evaluate("[...document.querySelectorAll('a, summary')].indexOf(document.activeElement)"))
    assert reached - {-1} == set(range(wanted))
    view.close()


def test_channels_of_a_resnet_by_eye():
    stages = tuple(tuple(BottleneckConfig(conv1=4, conv2=6) for _ in range(count)) for count in (2, 1, 1, 1))
    start = ResNetConfig(image_size=32, width=2, head_dim=32, stages=stages)
    everything = ResNetKeep.everything(start)
    masks = everything.model_copy(update={"conv1": ((0, 3),) * 5})  # 2 of 4 channels in each of five blocks
    rule = everything.model_copy(update={"blocks": ((0,),) * 4, "conv1": ((0,),) * 4, "conv2": ((0, 1, 2),) * 4})
    assert channels_left(start, [masks, None, rule]) == {
        "1x1": [[4, 2, 2, 1], [4, 2, 2, 0], [4, 2, 2, 1], [4, 2, 2, 1], [4, 2, 2, 1]],
        "3x3": [[6, 6, 6, 3], [6, 6, 6, 0], [6, 6, 6, 3], [6, 6, 6, 3], [6, 6, 6, 3]],
    }
    with pytest.raises(IndexError):
        channels_left(start, [rule, masks])
