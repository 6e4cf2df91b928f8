"""Runs -> one HTML page without scripts, fonts or anything else from outside. Values are escaped by the template."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from tinyclip import __version__
from tinyclip.data.sources import is_local, open_source
from tinyclip.data.spec import DataSpec, from_file
from tinyclip.distill.teacher import is_local as is_local_model
from tinyclip.formats.provenance import public
from tinyclip.model import TowerConfig
from tinyclip.model_resnet import ResNetConfig
from tinyclip.redact import redacted
from tinyclip.report import charts
from tinyclip.report.charts import Figure, Point, Series, Table, percent, si
from tinyclip.report.examples import Examples, examples
from tinyclip.report.losses import Losses, is_picture, losses
from tinyclip.report.measured import latency_tables, suite_tables
from tinyclip.report.read import Model, Run, Score, Stage, headline, kept, number, read_run
from tinyclip.run import write_text
from tinyclip.shrink.keep import TowerKeep
from tinyclip.shrink.keep_resnet import ResNetKeep

HERE = Path(__file__).parent
TERMS = ("loss", "affinity_kl", "contrastive", "feature")  # of the objective, among the metrics
ABSENT = {  # extra file of a run: what it would show, and the command that makes it
    "evaluation": ("Zero-shot suites", "tinyclip evaluate {run} --suite SUITE --out {run}/evaluation.json"),
    "compare": (
        "What was lost, class by class",
        "tinyclip compare {teacher} {run} --zeroshot DATA --out {run}/compare.json",
    ),
    "benchmark": ("Latency", "tinyclip benchmark {run} --against {teacher} --json > {run}/benchmark.json"),
}
KNOWN = {"evaluation": suite_tables, "benchmark": latency_tables}
MAX_ROWS = 60  # of a table of an extra file
MAX_DEPTH = 6  # of its objects; deeper ones are not shown


class Tile(NamedTuple):
    """A fact of the first screen: before -> after, and what it means."""

    name: str
    before: str | None
    after: str
    details: Sequence[str]


class ScoreLine(NamedTuple):
    name: str
    before: Score | None
    after: Score
    kept: Score | None


class Extra(NamedTuple):
    """A file of a run that other commands write. Tables, or the command that is missing."""

    title: str
    tables: list[tuple[str, Table]]
    pictures: list[tuple[str, str]]  # (text, data URI)
    command: str
    losses: Losses | None = None  # in place of tables and pictures


class Chapter(NamedTuple):
    """What the page says of one run."""

    run: Run
    training: list[Figure]
    sparsity: list[Figure]
    sizes: Table | None
    maps: list[Figure]
    no_maps: str
    scores: Table
    extras: list[Extra]
    environment: list[tuple[str, str]]
    calls: Table


def report(
    runs: Sequence[Path],
    *,
    out: Path | None = None,
    data: str | None = None,
    with_examples: bool = True,
    allow_remote: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the page of `runs`, the first one's story first, and return its path: `out`, or RUN/report.html.

    `data` is a spec of the pairs that the retrieval examples come from, by default the recipe's evaluation.retrieval.
    What the recipe names, data or teacher, may have been written by others: commands and addresses are followed only
    with `allow_remote`, else a note says so. `data` is trusted.
    Raises ValueError for a directory that is no run, and where `data` is given and no examples can be made of it.
    """
    if not runs:
        raise ValueError("report: expected a run, got none")
    read = [read_run(path) for path in runs]
    shown, why_not = (None, "left out (--no-examples)")
    if with_examples:
        shown, why_not = _examples(read[0], data, allow_remote, say)
    page = render(read, shown, why_not)
    target = out or runs[0] / "report.html"
    if target.is_dir():
        raise ValueError(f"{target}: expected a file to write, got a directory")
    write_text(target, page)
    return target


def _examples(
    run: Run, data: str | None, allow_remote: bool, say: Callable[[str], None]
) -> tuple[Examples | None, str]:
    """The examples, or why there are none; an error where the user asked for this data."""
    evaluation = run.recipe.get("evaluation")
    named = evaluation.get("retrieval") if isinstance(evaluation, dict) else None
    if data is None and named is None:
        return None, "the recipe has no evaluation.retrieval; name pairs with --data"
    try:
        if not allow_remote:
            refuse_to_follow(run, None if data is not None else named)
        source = open_source(data if data is not None else from_file(named), allow_remote=allow_remote)
        return examples(run, source, say=say, allow_remote=allow_remote), ""
    except (ValueError, OSError) as error:
        if data is not None:
            raise
        reason = " ".join(str(error).split())
        say(f"examples: left out: {reason}")
        return None, public(reason)


def refuse_to_follow(run: Run, spec: Any) -> None:
    """Raises ValueError where the recipe's teacher, or this data of it, starts a process or opens an address."""
    teacher = run.recipe.get("teacher")
    if isinstance(teacher, str) and not is_local_model(teacher):
        raise ValueError(f"the recipe's teacher, {redacted(teacher)}, would be fetched; --allow-remote does so")
    if spec is not None and not is_local(DataSpec.parse(spec)):  # not FromFile: that would say less
        raise ValueError("the recipe's evaluation.retrieval runs a command or opens an address; --allow-remote does so")


def render(runs: Sequence[Run], shown: Examples | None, why_not: str) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    chapters = [chapter(run) for run in runs]  # before the notes: a map that cannot be drawn adds one
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        finalize=_readable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "interval": interval}
    return environment.get_template("page.html.jinja").render(
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        version=__version__,
        title=", ".join(run.name for run in runs),
        lede=lede(runs[0]),
        tiles=tiles(runs[0]),
        score_lines=score_lines(runs[0]),
        command=runs[0].call.get("command"),
        runs=runs,
        notes=list(dict.fromkeys(note for run in runs for note in run.notes)),
        models=models_table(runs),
        pareto=pareto_figures(runs),
        chapters=chapters,
        examples=shown,
        why_not=why_not,
    )


def _readable(value: Any) -> Any:
    """Every value of the page: text without secrets, and nothing in it acts. SVG went through charts.shown."""
    return charts.shown(value, keep="\n") if isinstance(value, str) and not isinstance(value, Markup) else value


# The first screen.


def lede(run: Run) -> str:
    """The story in one sentence."""
    student, teacher = run.student, run.teacher
    if student is None:
        return f"No stage of {run.name} is complete yet."
    if teacher is None:
        return f"{run.name} was trained without a teacher: a teacher for others, or a baseline."
    retained = mean_kept(student, teacher)
    parts = []
    if student.parameters and teacher.parameters:
        parts.append(f"has {percent(student.parameters / teacher.parameters)} of its teacher's parameters")
    if student.macs and teacher.macs:
        parts.append(f"{percent(student.macs / teacher.macs)} of its multiply-accumulates")
    if retained is not None:
        parts.append(f"keeps {percent(retained)} of its scores")
    return f"The student {_listed(parts)}." if parts else f"{run.name} is a student of {public(teacher.name)}."


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def mean_kept(student: Model, teacher: Model) -> float | None:
    """Mean over the headline scores of the student's share of the teacher's."""
    found = [_kept(name, student, teacher) for name in headline(student.scores)]
    shares = [share.value for share in found if share is not None]
    return sum(shares) / len(shares) if shares else None


def tiles(run: Run) -> list[Tile]:
    student, teacher = run.student, run.teacher
    if student is None:
        return []
    size = _tile("Size", "parameters", student.parameters, teacher and teacher.parameters)
    if student.parameters:
        before = [f"{teacher.parameters * 4 / 1e6:,.1f} →"] if teacher and teacher.parameters else []
        size.details.append(" ".join([*before, f"{student.parameters * 4 / 1e6:,.1f} MB in fp32"]))  # type: ignore[attr-defined]
    compute = _tile("Compute", "MACs per image and text", student.macs, teacher and teacher.macs)
    return [size, compute, _time(run)]


def _tile(name: str, unit: str, after: int | None, before: int | None) -> Tile:
    details = [unit]
    if before and after:
        details.append(f"{percent(after / before)} of the teacher's")
    return Tile(name, si(before) if before else None, si(after, like=before) if after else "not counted", details)


def _time(run: Run) -> Tile:
    stages = [stage for stage in run.stages if stage.seconds is not None]
    pairs = f"{sum(stage.pairs for stage in run.stages):,} pairs distilled"
    where = machine(run.call)
    count = f"{len(run.complete)} of {len(run.stages)} stages"
    if stages:
        return Tile("Time taken", None, duration(sum(s.seconds or 0 for s in stages)), [count, pairs, where])
    seconds = sum(stage.distill_seconds or 0 for stage in run.stages)
    return Tile("Time taken", None, duration(seconds), [f"{count}; distillation alone, no more was recorded", pairs])


def machine(call: Mapping[str, Any]) -> str:
    if not call:
        return "machine not recorded"
    if call.get("device") == "cpu":
        threads = call.get("threads")
        return f"{call.get('cpu')}, {threads} thread{'s' if threads != 1 else ''}"
    return str(call.get("device"))


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def score_lines(run: Run) -> list[ScoreLine]:
    return (
        [] if run.student is None else [_score_line(n, run.student, run.teacher) for n in headline(run.student.scores)]
    )


def _score_line(name: str, student: Model, teacher: Model | None) -> ScoreLine:
    before = teacher.scores.get(name) if teacher is not None else None
    return ScoreLine(readable(name), before, student.scores[name], _kept(name, student, teacher))


def readable(name: str) -> str:
    """image_to_text_recall@1 -> image → text recall@1; top1 -> zero-shot top-1."""
    name = re.sub(r"(^|[/ ])top(\d+)$", r"\1zero-shot top-\2", name)
    return name.replace("image_to_text_", "image → text ").replace("text_to_image_", "text → image ").replace("_", " ")


def interval(score: Score) -> str:
    if score.low is None or score.high is None:
        return ""
    return f"[{100 * score.low:.1f}, {100 * score.high:.1f}]"


# All models side by side.


def models_of(runs: Sequence[Run]) -> list[Model]:
    """Teachers, each once, and every complete stage, by names as short as they can be told apart by."""
    teachers = {(run.teacher.name, run.teacher.parameters): run.teacher for run in runs if run.teacher is not None}

    def label(run: Run, stage: Stage) -> str:
        if len(runs) == 1 and len(run.stages) > 1:
            return stage.name
        return run.name if stage is run.stages[-1] else f"{run.name}/{stage.name}"

    named = [replace(model, name=teacher_label(model, runs)) for model in teachers.values()]
    return [
        *named,
        *(replace(s.model, name=label(run, s)) for run in runs for s in run.complete if s.model is not None),
    ]


def teacher_label(teacher: Model, runs: Sequence[Run]) -> str:
    several = len({run.teacher.name for run in runs if run.teacher is not None}) > 1
    return f"teacher {_last_parts(teacher.name)}" if several else "teacher"


def _last_parts(name: str) -> str:
    """The end of a path; a name on the hub as it is."""
    return name if ":" in name else Path(name).name


def models_table(runs: Sequence[Run]) -> Table:
    models = models_of(runs)
    reference = next((model for model in models if model.role == "teacher"), None)
    names = list(dict.fromkeys(name for model in models for name in headline(model.scores)))
    rows = []
    for model in models:
        retained = mean_kept(model, reference) if reference is not None else None
        rows.append(
            [
                model.name,
                model.role,
                si(model.parameters) if model.parameters else "—",
                si(model.macs) if model.macs else "—",
                *(_with_interval(model.scores.get(name)) for name in names),
                percent(retained) if retained is not None else "—",
            ]
        )
    return Table(["model", "role", "parameters", "MACs", *map(readable, names), "kept, mean"], rows)


def _with_interval(score: Score | None) -> str:
    return "—" if score is None else f"{percent(score.value)} {interval(score)}".strip()


def pareto_figures(runs: Sequence[Run]) -> list[Figure]:
    """The first headline score over size, over MACs, and over latency where it was measured."""
    models = models_of(runs)
    names = list(dict.fromkeys(name for model in models for name in headline(model.scores)))
    figures = []
    for name in names[:1]:
        for what, unit in (("parameters", "parameters"), ("macs", "MACs")):
            points = [_point(model, name, value) for model in models if (value := getattr(model, what))]
            figures += _scatter(name, unit, [point for point in points if point is not None])
        latency = latencies(runs, models)
        points = [_point(model, name, latency[model.name]) for model in models if model.name in latency]
        figures += _scatter(name, "latency of one image, ms (p50)", [point for point in points if point is not None])
    return figures


def _point(model: Model, name: str, x: float) -> Point | None:
    score = model.scores.get(name)
    return None if score is None else Point(model.name, x, score.value, score.low, score.high, model.role)


def _scatter(name: str, unit: str, points: Sequence[Point]) -> list[Figure]:
    title = f"{readable(name)} over {unit}"
    return [charts.scatter(title, points, x_label=f"{unit} (log)", y_label=readable(name))] if len(points) > 1 else []


def latencies(runs: Sequence[Run], models: Sequence[Model]) -> dict[str, float]:
    """Model: its lowest p50 of one image in milliseconds, from rows of benchmark.json that name a model of the page.

    A row is an object with `model` (a path, or the teacher's name) and `values`.
    """
    labels = {_place(model.place): model.name for model in models}
    labels |= {_place(str(run.path)): labels[_place(run.student.place)] for run in runs if run.student is not None}
    found: dict[str, float] = {}
    for run in runs:
        rows = (run.extras.get("benchmark") or {}).get("rows")
        for row in rows if isinstance(rows, list) else ():
            values = row.get("values") if isinstance(row, dict) else None
            value = number(values.get("image_latency_p50_ms")) if isinstance(values, dict) else None
            label = labels.get(_place(str(row.get("model")))) if value else None
            if label is not None and value is not None and value > 0:
                found[label] = min(value, found.get(label, value))
    return found


def _place(name: str) -> str:
    """One spelling of a path, with or without the last `model`; a published name as it is."""
    path = Path(name)
    return name if ":" in name else str((path.parent if path.name == "model" else path).resolve())


# A run's own chapter.


def chapter(run: Run) -> Chapter:
    stages = [stage for stage in run.stages if stage.phases]
    maps, no_maps = kept_maps(run)
    return Chapter(
        run=run,
        training=[training_figure(stage) for stage in stages],
        sparsity=[figure for stage in stages for figure in sparsity_figures(stage)],
        sizes=sizes_table(run),
        maps=maps,
        no_maps=no_maps,
        scores=scores_table(run),
        extras=[extra(run, name) for name in ABSENT],
        environment=list(environment_rows(run)),
        calls=calls_table(run),
    )


def joined(stage: Stage, names: Sequence[str]) -> tuple[list[Series], list[tuple[float, str]]]:
    """The phases one after the other over the steps of the stage, and where each begins."""
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    marks, offset = [], 0.0
    for phase in stage.phases:
        marks.append((offset, "masks" if phase.name == "masks" else "distillation"))
        for line in phase.lines:
            for name in names:
                points[name].append((offset + line["step"], line.get(name, math.nan)))
        offset += phase.lines[-1]["step"] + 1
    series = [Series(name, own) for name, own in points.items() if any(math.isfinite(y) for _, y in own)]
    return series, marks


def training_figure(stage: Stage) -> Figure:
    """Every term that is not the whole loss again."""
    series, marks = joined(stage, TERMS)
    loss = next((one.points for one in series if one.name == "loss"), None)
    shown = [
        one._replace(name=one.name.replace("_", " ")) for one in series if one.name == "loss" or one.points != loss
    ]
    return charts.line_chart(f"{stage.name}: loss", shown, x_label="step", marks=marks if len(marks) > 1 else ())


def sparsity_figures(stage: Stage) -> list[Figure]:
    """Asked for and expected while masks are learned."""
    lines = next((phase.lines for phase in stage.phases if phase.name == "masks"), [])
    wanted = (("asked for", "target_sparsity"), ("expected", "sparsity"))
    series = [Series(name, [(line["step"], line[key]) for line in lines if key in line]) for name, key in wanted]
    if not all(one.points for one in series):
        return []
    return [charts.line_chart(f"{stage.name}: sparsity", series, x_label="step of mask learning", shares=True)]


def sizes_table(run: Run) -> Table | None:
    """The share of the start's prunable parameters that was asked for, and the one that is left."""
    stages = [stage for stage in run.complete if stage.config is not None]
    if not any(stage.asked or stage.keep for stage in stages):
        return None
    whole = run.start.prunable_params if run.start is not None else None
    rows = [["start", "", si(whole), "100.0%" if whole else "—", *_shapes(run.start)]] if run.start and whole else []
    for stage in stages:
        assert stage.config is not None, "filtered above"
        left = stage.config.prunable_params
        asked = percent(stage.asked) if stage.asked else "—"
        rows.append([stage.name, asked, si(left), percent(left / whole) if whole else "—", *_shapes(stage.config)])
    columns = ["stage", "asked for", "prunable parameters", "reached", "image: layers, width", "text: layers, width"]
    return Table(columns, rows)


def _shapes(config: Any) -> list[str]:
    return [f"{_layers(tower)}, {tower.width}" for tower in (config.image, config.text)]


def _layers(tower: TowerConfig | ResNetConfig) -> str:
    return str(len(tower.blocks)) if isinstance(tower, TowerConfig) else " ".join(str(len(s)) for s in tower.stages)


class Survivors(NamedTuple):
    """What is left of one tower after each stage, in the numbers of the starting model."""

    head_stages: list[list[int]]  # per layer and head: how many stages it survived
    ffn: list[list[int]]  # per layer: neurons at the start and after each stage


def survivors(start: TowerConfig, keeps: Sequence[TowerKeep | None]) -> Survivors:
    """Follow every head and count neurons through the cuts; None is a stage that cuts nothing.

    Raises IndexError for a keep that does not fit what is left.
    """
    layers = list(range(len(start.blocks)))
    heads = [list(range(block.heads)) for block in start.blocks]
    ffn = [block.ffn for block in start.blocks]
    survived = [[0] * block.heads for block in start.blocks]
    counts = [[block.ffn] for block in start.blocks]
    for keep in keeps:
        if keep is not None:
            heads = [[heads[old][h] for h in own] for old, own in zip(keep.blocks, keep.heads, strict=True)]
            ffn = [len(own) for own in keep.ffn]
            layers = [layers[old] for old in keep.blocks]
        for layer, own in zip(layers, heads, strict=True):
            for head in own:
                survived[layer][head] += 1
        left = dict(zip(layers, ffn, strict=True))
        for layer, row in enumerate(counts):
            row.append(left.get(layer, 0))
    return Survivors(survived, counts)


def channels_left(start: ResNetConfig, keeps: Sequence[ResNetKeep | None]) -> dict[str, list[list[int]]]:
    """Per convolution and block of a ResNet: channels at the start and after each stage.

    Raises IndexError for a keep that does not fit what is left.
    """
    numbers = [list(range(len(blocks))) for blocks in start.stages]
    for stage in range(1, len(numbers)):
        numbers[stage] = [1 + numbers[stage - 1][-1] + number for number in numbers[stage]]  # through all stages
    sizes = [(place.block.conv1, place.block.conv2) for place in start.blocks()]
    counts = {"1x1": [[first] for first, _ in sizes], "3x3": [[second] for _, second in sizes]}
    left = dict(enumerate(sizes))
    for keep in keeps:
        if keep is not None:
            numbers = [[own[old] for old in kept] for own, kept in zip(numbers, keep.blocks, strict=True)]
            channels = zip(map(len, keep.conv1), map(len, keep.conv2), strict=True)
            left = dict(zip((block for own in numbers for block in own), channels, strict=True))
        for block in range(len(sizes)):
            first, second = left.get(block, (0, 0))
            counts["1x1"][block].append(first)
            counts["3x3"][block].append(second)
    return counts


def _resnet_maps(start: ResNetConfig, keeps: Sequence[ResNetKeep | None], columns: Sequence[str]) -> Iterator[Figure]:
    for convolution, counts in channels_left(start, keeps).items():
        totals = [row[0] for row in counts]
        yield charts.heat_map(f"image tower: {convolution} channels", columns, totals, counts)


def kept_maps(run: Run) -> tuple[list[Figure], str]:
    """Heads and neurons per tower, channels of a ResNet, or why there are none."""
    stages = [stage for stage in run.stages if stage.keep is not None or stage.model is not None]
    if not any(stage.keep is not None for stage in stages):
        return [], "Nothing was cut."
    if run.start is None:
        return [], "The shape before the first cut was not recorded (start.json), so there is no map."
    figures = []
    for tower in ("image", "text"):
        config = getattr(run.start, tower)
        keeps = [getattr(stage.keep, tower) if stage.keep is not None else None for stage in stages]
        names = [stage.name for stage in stages]
        columns = ["start", *(_short_stage(name) for name in names)]
        kind = ResNetKeep if isinstance(config, ResNetConfig) else TowerKeep
        try:
            if not all(keep is None or isinstance(keep, kind) for keep in keeps):
                raise ValueError("the keep of another kind of tower")
            if isinstance(config, ResNetConfig):
                figures += _resnet_maps(config, keeps, columns)
                continue
            left = survivors(config, keeps)
        except (IndexError, ValueError):
            run.notes.append(f"{run.name}: keep.json of the {tower} tower does not fit the model before it; no map")
            continue
        heads, ffn = [block.heads for block in config.blocks], [block.ffn for block in config.blocks]
        figures.append(charts.head_map(f"{tower} tower: attention heads", heads, left.head_stages, names))
        figures.append(charts.heat_map(f"{tower} tower: FFN neurons", columns, ffn, left.ffn))
    return figures, ""


def _short_stage(name: str) -> str:
    """0-auto-75 -> auto-75."""
    return name.partition("-")[2] or name


def scores_table(run: Run) -> Table:
    """Every score of the teacher and of all stages, and what the student keeps."""
    models = [model for model in (run.teacher, *(stage.model for stage in run.stages)) if model is not None]
    columns = ["score", *("teacher" if model.role == "teacher" else model.name for model in models)]
    names = dict.fromkeys(name for model in models for name in model.scores)
    rows = [[readable(name), *(_with_interval(model.scores.get(name)) for model in models)] for name in names]
    if run.teacher is not None and run.student is not None:
        columns.append("kept")
        for name, row in zip(names, rows, strict=True):
            row.append(_with_interval(_kept(name, run.student, run.teacher)))
    for name in dict.fromkeys(name for model in models for name in model.ranks):
        cells = [_rank(model.ranks.get(name)) for model in models]
        rows.append([readable(name), *cells, ""][: len(columns)])
    return Table(columns, rows)


def _rank(rank: Score | None) -> str:
    if rank is None:
        return "—"
    known = rank.low is not None and rank.high is not None
    return f"{rank.value:g}" + (f" [{rank.low:g}, {rank.high:g}]" if known else "")


def _kept(name: str, student: Model, teacher: Model | None) -> Score | None:
    if teacher is None or name not in student.scores or name not in teacher.scores:
        return None
    return kept(student.scores[name], teacher.scores[name])


def extra(run: Run, name: str) -> Extra:
    title, command = ABSENT[name]
    teacher = run.teacher.name if run.teacher is not None else "TEACHER"
    content = run.extras.get(name)
    if name == "compare" and (found := losses(content)) is not None:
        return Extra(title, [], [], "", found)
    tables = [] if content is None else KNOWN.get(name, lambda _: None)(content) or list(tables_of(content, title))
    pictures = list(pictures_of(content)) if content is not None else []
    named = {"run": shlex.quote(str(run.path)), "teacher": shlex.quote(teacher)}  # it is there to be copied
    return Extra(title, tables, pictures, command.format(**named))


def tables_of(content: Any, title: str, depth: int = MAX_DEPTH) -> Iterator[tuple[str, Table]]:
    """Tables of a JSON value: plain values of an object, objects alike, and lists of objects."""
    if isinstance(content, list):
        content = {str(index): item for index, item in enumerate(content)}
    if not isinstance(content, dict) or not depth:
        return
    plain = {key: value for key, value in content.items() if _is_plain(value)}
    if plain:
        yield (
            title,
            Table(["", "value"], [[readable(str(key)), _shown(value)] for key, value in plain.items()][:MAX_ROWS]),
        )
    flat = {
        key: value for key, value in content.items() if isinstance(value, dict) and all(map(_is_plain, value.values()))
    }
    if flat:
        columns = list(dict.fromkeys(column for row in flat.values() for column in row))
        rows = [[str(key), *(_shown(row.get(column, "")) for column in columns)] for key, row in flat.items()]
        yield title, Table(["", *map(readable, columns)], rows[:MAX_ROWS])
    for key, value in content.items():
        if not _is_plain(value) and key not in flat:
            yield from tables_of(value, f"{title}: {readable(str(key))}", depth - 1)


def pictures_of(content: Any, name: str = "", depth: int = MAX_DEPTH) -> Iterator[tuple[str, str]]:
    """Every data URI of a picture, with the other plain values beside it as its text."""
    if isinstance(content, list) and depth:
        for item in content:
            yield from pictures_of(item, name, depth - 1)
    elif isinstance(content, dict) and depth:
        beside = ", ".join(
            f"{readable(str(k))}: {_shown(v)}" for k, v in content.items() if _is_plain(v) and not is_picture(v)
        )
        for key, value in content.items():
            if is_picture(value):
                yield beside or name, value
            else:
                yield from pictures_of(value, str(key), depth - 1)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _shown(value: Any) -> str:
    if is_picture(value):
        return "picture"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def environment_rows(run: Run) -> Iterator[tuple[str, str]]:
    call = run.call
    if not call:
        return
    times = [_utc(str(line["time"])) for line in run.calls if "time" in line]
    yield "started", times[0] if times else "—"
    yield "ended" if run.finished else "last recorded", times[-1] if times else "—"
    for name in ("tinyclip", "python", "torch", "system", "cpu", "threads", "device"):
        yield name, str(call.get(name, "not recorded"))
    for stage in run.stages:
        if stage.seconds is not None:
            yield f"seconds of {stage.name}", f"{stage.seconds:,.1f}"


def _utc(time: str) -> str:
    """2026-01-31T12:00:00+00:00 -> 2026-01-31 12:00:00 UTC."""
    return time.replace("T", " ").replace("+00:00", " UTC")


def calls_table(run: Run) -> Table:
    columns = ("time", "event", "stage", "seconds", "command")
    return Table(columns, [[str(line.get(column, "")) for column in columns] for line in run.calls])
