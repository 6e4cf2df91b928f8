"""The command line: parse, call one function, print where the result is.

A user's mistake is one line on stderr and exit status 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from tinyclip.redact import redacted
from tinyclip.stopping import Interrupted, Stopped, answered, end
from tinyclip.terminal import Table, console, line, say, show

if TYPE_CHECKING:
    from tinyclip.distributed import World
    from tinyclip.model import CLIP
    from tinyclip.recipe import Recipe

EXPORTS = ("huggingface", "open_clip", "tinyclip", "onnx", "onnx-int8")  # the keys of formats.export.TARGETS

app = typer.Typer(
    help="Make CLIP models small: weight inheritance and affinity mimicking, stage by stage.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


# What an option must be is checked while the command line is parsed, before a model is loaded or anything is written.


def _workers(value: str) -> int:
    from tinyclip.config import MAX_WORKERS

    if (number := _at_least(0)(value)) > MAX_WORKERS:
        raise typer.BadParameter(f"expected at most {MAX_WORKERS}, got {value!r}")
    return number


def _at_least(least: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            number = least - 1
        if number < least:
            raise typer.BadParameter(f"expected a whole number of at least {least}, got {value!r}")
        return number

    return parse


def _file_to_write(flag: typer.CallbackParam, path: Path | None) -> Path | None:
    if path is not None and path.is_dir():
        raise ValueError(f"{flag.opts[0]} {path}: expected a file to write, got a directory")
    return _place_to_write(flag, path)


def _directory_to_write(flag: typer.CallbackParam, path: Path | None) -> Path | None:
    if path is not None and path.exists() and not path.is_dir():
        raise ValueError(f"{flag.opts[0]} {path}: expected a directory, got a file")
    return path if path is None or path.exists() else _place_to_write(flag, path)


def _new_directory(flag: typer.CallbackParam, path: Path | None) -> Path | None:
    if path is not None and path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{flag.opts[0]} {path}: expected a new or empty directory, found one with files")
    _directory_to_write(flag, path)
    return _place_to_write(flag, path)


def _run_directory(flag: typer.CallbackParam, path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{flag.opts[0]} {path}: expected a new directory or a run to continue, found neither: a file")
    _directory_to_write(flag, path)
    return path


def _place_to_write(flag: typer.CallbackParam, path: Path | None) -> Path | None:
    """What is missing of the folders above is made; the last that is there must take an entry."""
    if path is not None:
        there = next((parent for parent in path.absolute().parents if parent.exists()), path)
        if not there.is_dir() or not os.access(there, os.W_OK):
            what = "it may not be written to" if there.is_dir() else "it is a file"
            raise ValueError(f"{flag.opts[0]} {path}: expected a place in a folder, got one in {there}, and {what}")
    return path


def _templates(flag: typer.CallbackParam, templates: list[str] | None) -> list[str]:
    from tinyclip.evaluate.zeroshot import check_templates

    if templates:
        check_templates(templates, flag.opts[0])
    return templates or []  # an older typer does not take None


def _one_of(*known: str) -> Callable[[typer.CallbackParam, str], str]:
    def check(flag: typer.CallbackParam, value: str) -> str:
        if value not in known:
            raise ValueError(f"{flag.opts[0]}: expected one of {', '.join(known)}, got {value!r}")
        return value

    return check


def _sizes(flag: typer.CallbackParam, sizes: str | None) -> str | None:
    parts = [] if sizes is None else sizes.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{flag.opts[0]}: expected numbers of at least 1 with commas, such as 1,8,32, got {sizes!r}")
    return sizes


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A preset (see `tinyclip recipes`) or a YAML file.")
]
RunOption = Annotated[  # torchrun takes "--run", wherever it stands, for a beginning of its own --run-path
    Path,
    typer.Option(
        "--run", "--run-dir", callback=_run_directory, help="Directory of the run; an unfinished one is continued."
    ),
]
SetOption = Annotated[
    Optional[list[str]],  # noqa: UP045  typer reads this annotation
    typer.Option("--set", metavar="PATH=VALUE", help="Change a setting, e.g. stages.0.distill.lr=3e-4. Repeatable."),
]
DataOption = Annotated[Optional[str], typer.Option("--data", help="Training pairs: a path or a spec.")]  # noqa: UP045
TeacherOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--teacher", help="A directory, open_clip:ARCH/TAG, hf:ORG/NAME, tinyclip:NAME (docs/formats.md)."),
]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A directory, open_clip:ARCH/TAG, hf:ORG/NAME or tinyclip:NAME.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
RetrievalOption = Annotated[Optional[str], typer.Option(help="Pairs: a path or a spec.")]  # noqa: UP045
ZeroshotOption = Annotated[Optional[str], typer.Option(help="Labelled images: a path or a spec.")]  # noqa: UP045
TemplateOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(callback=_templates, help="Template for --zeroshot such as 'a photo of a {}.'. Repeatable."),
]
SuiteOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="NAME|FILE", help="Data sets: clip27, clip23, imagenet, vtab+ or a YAML file."),
]
DataRootOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="The folder that the suite's data sets lie in."),
]
WorkersOption = Annotated[int, typer.Option(parser=_workers, help="Processes that read images.")]
BatchSizeOption = Annotated[int, typer.Option(parser=_at_least(1), help="Images that are embedded together.")]
DeviceOption = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda:1, ...")]
AllowRemoteOption = Annotated[
    bool,
    typer.Option("--allow-remote", help="Follow commands and addresses that stand in files, where you trust them."),
]


@app.callback()
def _main(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """Options of every command."""


@app.command()
def compress(
    recipe: RecipeArgument,
    run: RunOption,
    teacher: TeacherOption = None,
    data: DataOption = None,
    set_: SetOption = None,
    allow_remote: AllowRemoteOption = False,
) -> None:
    """Compress a teacher in stages: each inherits weights, then mimics the teacher's affinities."""
    from tinyclip.recipes import load_recipe

    settings = load_recipe(recipe, teacher=teacher, data=data, changes=set_ or (), allow_remote=allow_remote)
    _compress(settings, run, _recipe_name(recipe, set_), allow_remote)


@app.command()
def embed(
    recipe: RecipeArgument,
    run: RunOption,
    teacher: TeacherOption = None,
    data: DataOption = None,
    set_: SetOption = None,
    allow_remote: AllowRemoteOption = False,
) -> None:
    """Ask the teachers once: store their embeddings of the data, from which `compress` of the same recipe trains.

    Needs `store` in the recipe, as in --set store.views=4. Without it `compress` runs the teachers at every visit.
    """
    from tinyclip.embed import embed
    from tinyclip.recipes import load_recipe

    settings = load_recipe(recipe, teacher=teacher, data=data, changes=set_ or (), allow_remote=allow_remote)
    _launch(settings, lambda world: embed(settings, run, say=say, world=world, allow_remote=allow_remote))


@app.command()
def train(
    recipe: RecipeArgument,
    run: RunOption,
    data: DataOption = None,
    set_: SetOption = None,
    allow_remote: AllowRemoteOption = False,
) -> None:
    """Train a CLIP from scratch with the contrastive loss: a teacher for small data, or a baseline."""
    from tinyclip.recipes import PRESETS, load_recipe, needs

    if recipe in PRESETS and "teacher" in needs(recipe):
        raise ValueError(f"preset {recipe}: compresses a teacher; use `tinyclip compress`")
    settings = load_recipe(recipe, data=data, changes=set_ or (), allow_remote=allow_remote)
    if settings.teacher is not None:
        raise ValueError(f"recipe {recipe}: names a teacher; use `tinyclip compress`")
    _compress(settings, run, _recipe_name(recipe, set_), allow_remote)


@app.command()
def evaluate(
    model: ModelArgument,
    retrieval: RetrievalOption = None,
    zeroshot: ZeroshotOption = None,
    template: TemplateOption = None,
    suite: SuiteOption = None,
    data_root: DataRootOption = None,
    probe: Annotated[bool, typer.Option("--probe", help="Linear probes of the suite's data sets too.")] = False,
    out: Annotated[Optional[Path], typer.Option(callback=_file_to_write, help="Also write the scores as JSON.")] = None,  # noqa: UP045
    device: DeviceOption = "auto",
    batch_size: BatchSizeOption = 64,
    workers: WorkersOption = 0,
    allow_remote: AllowRemoteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Zero-shot accuracy and retrieval recall of a model, on data of your own or on a suite of data sets."""
    from tinyclip.data.loader import LeftOut
    from tinyclip.data.spec import DataSpec
    from tinyclip.device import pick_device, prepare_cpu
    from tinyclip.distill.teacher import load_teacher
    from tinyclip.evaluate import DEFAULT_TEMPLATES, with_interval
    from tinyclip.evaluate.scores import Evaluation
    from tinyclip.evaluate.scores import evaluate as evaluate_model
    from tinyclip.evaluate.suites import check_suite, run_suite
    from tinyclip.run import write_text

    if retrieval is None and zeroshot is None and suite is None:
        raise ValueError("evaluate: expected --retrieval DATA, --zeroshot DATA or --suite NAME")
    if suite is None and (data_root is not None or probe):
        raise ValueError("evaluate: --data-root and --probe are for --suite NAME")
    if template and zeroshot is None:
        raise ValueError("evaluate: --template is for --zeroshot DATA")
    if suite is not None:
        check_suite(suite, data_root)
    wanted = Evaluation(
        retrieval=DataSpec.parse(retrieval, allow_remote=allow_remote) if retrieval is not None else None,
        zeroshot=DataSpec.parse(zeroshot, allow_remote=allow_remote) if zeroshot is not None else None,
        templates=tuple(template or DEFAULT_TEMPLATES),
    )
    prepare_cpu()
    where = pick_device(device)
    loaded = load_teacher(model, allow_remote=allow_remote).to(where)
    left_out = LeftOut(say)
    reading: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "say": say, "left_out": left_out}
    scores = evaluate_model(loaded, wanted, **reading)
    results: dict[str, Any] = {}
    if suite is not None:
        results = run_suite(loaded, suite, data_root, probe=probe, **reading, allow_remote=allow_remote)
    elif left_out.counts:
        results = {"left_out": left_out.counts}
    found = json.dumps(redacted(scores | results), indent=2)
    if out is not None:
        write_text(out, found)
    if as_json:
        print(found)
        return
    if scores:
        table = Table("score", "value", title=model)
        for row in with_interval(scores):
            table.add_row(*row)
        show(table)
    if suite is not None:
        _print_suite(results, model)


def _print_suite(results: dict[str, Any], model: str) -> None:
    """A row for each data set, why the absent ones are absent, and the mean of how many."""
    from tinyclip.evaluate import with_interval

    table = Table("data set", "score", "value", "images", title=f"{model}: {results['suite']}")
    for name, scores in results["datasets"].items():
        shown = dict(with_interval(scores))
        wanted = [results["in_mean"][name], *(score for score in shown if score.endswith("probe_top1"))]
        for score in wanted:
            table.add_row(name, score, shown[score], shown["n"])
    show(table)
    for kind, noun in (("absent", "absent"), ("probe_absent", "not probed")):
        for name, why in results.get(kind, {}).items():
            print(line(f"{noun}: {name}: {why}"))
    mean = results["mean"]
    shown = dict(
        with_interval({"mean": mean["value"], **{f"mean_{end}": mean[end] for end in ("low", "high") if end in mean}})
    )
    show(f"mean of {mean['of']} of {mean['n_datasets']} data sets: {shown['mean']}")


@app.command()
def compare(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="As for evaluate; models that only teach too.")],
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="A run, stage or model directory, or a name.")],
    suite: SuiteOption = None,
    data_root: DataRootOption = None,
    zeroshot: ZeroshotOption = None,
    retrieval: RetrievalOption = None,
    template: TemplateOption = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            callback=_file_to_write, help="Also write it as JSON; RUN/compare.json is shown by `tinyclip report RUN`."
        ),
    ] = None,
    no_timing: Annotated[bool, typer.Option("--no-timing", help="Measure no milliseconds.")] = False,
    device: DeviceOption = "auto",
    batch_size: BatchSizeOption = 64,
    workers: WorkersOption = 0,
    allow_remote: AllowRemoteOption = False,
    as_json: JsonOption = False,
) -> None:
    """What a student lost: by data set and class, in neighbours, calibration and geometry, and per cost."""
    from tinyclip.data.sources import open_source
    from tinyclip.device import pick_device, prepare_cpu
    from tinyclip.distill.teacher import load_teacher
    from tinyclip.evaluate import DEFAULT_TEMPLATES
    from tinyclip.evaluate.compare import Comparing, data_name
    from tinyclip.evaluate.compare import compare as compare_models
    from tinyclip.evaluate.compare_words import tables, to_json
    from tinyclip.evaluate.datasets import labelled_set
    from tinyclip.evaluate.suites import open_suite
    from tinyclip.formats.files import validated
    from tinyclip.run import write_text

    if retrieval is None and zeroshot is None and suite is None:
        raise ValueError("compare: expected --suite NAME, --zeroshot DATA or --retrieval DATA")
    if suite is None and data_root is not None:
        raise ValueError("compare: --data-root is for --suite NAME")
    if template and zeroshot is None:
        raise ValueError("compare: --template is for --zeroshot DATA")
    where = pick_device(device)
    given = {"timing": not no_timing, "batch_size": batch_size, "workers": workers}
    settings = validated(Comparing, given, "compare")
    sets, absent = ([], []) if suite is None else open_suite(suite, data_root, allow_remote=allow_remote)
    if zeroshot is not None:
        source = open_source(zeroshot, allow_remote=allow_remote)
        sets = [labelled_set(data_name(source), source, tuple(template or DEFAULT_TEMPLATES)), *sets]
    pairs = None if retrieval is None else open_source(retrieval, allow_remote=allow_remote)
    prepare_cpu()
    theirs, ours = (load_teacher(name, allow_remote=allow_remote).to(where) for name in (teacher, student))
    found = compare_models(theirs, ours, sets, pairs, settings, absent=absent, say=say)
    if out is not None:
        write_text(out, to_json(found))
    if as_json:
        print(to_json(found))
        return
    show(*tables(found))


@app.command()
def benchmark(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Directories or names, as for inspect.")],
    against: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--against", metavar="TEACHER", help="What ratios refer to; else the first MODEL."),
    ] = None,
    backends: Annotated[
        str, typer.Option(help="Of eager, bf16, compiled, onnx, int8; with commas.")
    ] = "eager,compiled,onnx,int8",
    batch_sizes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(callback=_sizes, help="Tried for throughput, with commas; else 1,8,32."),
    ] = None,
    threads: Annotated[Optional[int], typer.Option(parser=_at_least(1), help="Of torch and onnxruntime alike.")] = None,  # noqa: UP045
    rounds: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(parser=_at_least(1), help="Each times every contender once; else 7."),
    ] = None,
    device: DeviceOption = "auto",
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each in a fresh process.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds, calls and batch sizes.")] = False,
    allow_remote: AllowRemoteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Latency, throughput and memory, measured: models and ways to run them in turn, with ratios and their spread."""
    from tinyclip.device import pick_device
    from tinyclip.evaluate.benchmark import QUICK, Benchmark, to_json
    from tinyclip.evaluate.benchmark import benchmark as measure
    from tinyclip.evaluate.benchmark_table import MIN_WIDTH, tables
    from tinyclip.formats.files import validated

    given = {
        "backends": backends.split(","),
        "batch_sizes": None if batch_sizes is None else batch_sizes.split(","),
        "threads": threads,
        "rounds": rounds,
        "device": device,
        "memory": memory,
    }
    given = {name: value for name, value in given.items() if value is not None}
    settings = validated(Benchmark, {**(QUICK if quick else {}), **given}, "benchmark")
    pick_device(device)  # refused before a model is loaded
    names = list(dict.fromkeys(models if against is None else [against, *models]))
    loaded = {name: _load_bare(name, allow_remote) for name in names}
    report = measure(loaded, settings, reference=against, say=say)
    if as_json:
        print(to_json(report))
        return
    show(*tables(report), least_width=MIN_WIDTH)


@app.command()
def inspect(
    model: ModelArgument,
    allow_remote: AllowRemoteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Parameters, MACs and the shape of every layer, counted from the config."""
    from tinyclip.evaluate.cost import describe, rows
    from tinyclip.formats import zoo

    is_published = model.startswith(zoo.PREFIX)  # an architecture without weights is enough
    config = zoo.config(model) if is_published else _load_bare(model, allow_remote).config
    facts = describe(config)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table("", "image", "text", title=model)
    for row in rows(config):
        table.add_row(*row)
    show(
        table,
        f"{facts['parameters']:,} parameters, {facts['size_mb']:.1f} MB in fp32, "
        f"embedding {facts['embed_dim']}, {facts['activation']}",
    )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of runs; the first is the story.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(callback=_file_to_write, help="The page to write. [default: RUN/report.html]"),
    ] = None,
    data: Annotated[Optional[str], typer.Option(help="Pairs for the retrieval examples: a path or a spec.")] = None,  # noqa: UP045
    no_examples: Annotated[bool, typer.Option("--no-examples", help="Load no model, show no examples.")] = False,
    allow_remote: AllowRemoteOption = False,
) -> None:
    """Write what runs left as one HTML page: sizes, costs, scores, curves, maps and examples."""
    from tinyclip.report import report

    followed = {"with_examples": not no_examples, "allow_remote": allow_remote}
    print(line(report(runs, out=out, data=data, **followed, say=say)))


@app.command()
def export(
    model: ModelArgument,
    to: Annotated[
        str, typer.Option(callback=_one_of(*EXPORTS), help="huggingface, open_clip, tinyclip, onnx or onnx-int8.")
    ],
    out: Annotated[Path, typer.Option(callback=_new_directory, help="A new directory.")],
    pad: Annotated[bool, typer.Option("--pad", help="Make all blocks alike with zeros: exact, larger.")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not read it back and compare.")] = False,
    allow_remote: AllowRemoteOption = False,
) -> None:
    """Write a model for another library, which reads it back: features must be equal."""
    from tinyclip.formats.export import export

    loaded = _load(model, allow_remote)
    print(line(export(loaded, out, to=to, pad=pad, verify=not no_verify, say=say)["directory"]))


@app.command()
def push(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run, stage or model directory, open_clip:ARCH/TAG or hf:ORG/NAME.")
    ],
    name: Annotated[str, typer.Argument(metavar="USER/NAME", help="Of the repository on the Hugging Face hub.")],
    to: Annotated[
        str, typer.Option(callback=_one_of(*EXPORTS[:3]), help="huggingface, open_clip or tinyclip.")
    ] = "huggingface",
    private: Annotated[bool, typer.Option("--private", help="Nobody else sees the new repository.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Add a commit to a repository that is there.")] = False,
    dry_run: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--dry-run",
            metavar="DIR",
            callback=_new_directory,
            help="Write what would be uploaded into this new directory.",
        ),
    ] = None,
    allow_remote: AllowRemoteOption = False,
) -> None:
    """Put a model on the Hugging Face hub: verified files, and a model card that says where it comes from."""
    from tinyclip.formats.card import record_of
    from tinyclip.formats.push import prepare
    from tinyclip.formats.push import push as push_model

    loaded, record = _load(model, allow_remote), record_of(model)
    if dry_run is not None:
        print(line(prepare(loaded, dry_run, name, to=to, record=record, say=say)))
    else:
        print(line(push_model(loaded, name, to=to, private=private, update=update, record=record, say=say)))


data_app = typer.Typer(help="Look at a data set before anything is trained on it.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("check")
def check_data(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A path or a spec (docs/data.md).")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="DIR",
            callback=_directory_to_write,
            help="Also write check.json and a sheet of 48 pictures, pictures.webp.",
        ),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="MODEL", help="Whose tokens are counted; else those of OpenAI's CLIP."),
    ] = None,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(parser=_at_least(1), help="Read the first so many items only."),
    ] = None,
    workers: WorkersOption = 0,
    allow_remote: AllowRemoteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read a data set and say what is in it: pairs, sizes, caption lengths, duplicates, broken items, opt-out flags."""
    from rich.progress import Progress

    from tinyclip.data.check import Checking, check, rows, to_json
    from tinyclip.data.contact_sheet import contact_sheet
    from tinyclip.data.sources import open_source
    from tinyclip.formats.files import validated
    from tinyclip.run import write_text
    from tinyclip.tokenizer import Tokenizer

    settings = validated(Checking, {"limit": limit, "workers": workers}, "data check")
    source = open_source(data, allow_remote=allow_remote)
    tokenizer = Tokenizer.openai() if model is None else _load_bare(model, allow_remote).tokenizer
    if tokenizer is None:
        raise ValueError(f"{model}: expected a model with a tokenizer, this one came without")
    terminal = console(stderr=True)
    with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task("reading", total=min(len(source), limit or len(source)))
        found = check(source, tokenizer, settings, progress=lambda items: bar.advance(task, items))
    if out is not None:
        write_text(out / "check.json", json.dumps(to_json(found), indent=2))
        contact_sheet(source, out / "pictures.webp", num_items=found.seen)
    if as_json:
        print(json.dumps(to_json(found), indent=2))
        return
    table = Table("", "", title=found.data, show_header=False)
    for row in rows(found):
        table.add_row(*row)
    show(table)
    if out is not None:
        print(line(out / "pictures.webp"))


@app.command()
def recipes(name: Annotated[Optional[str], typer.Argument(help="Print this preset as YAML.")] = None) -> None:  # noqa: UP045
    """List the presets, or print one as YAML to keep and edit."""
    import difflib
    import inspect as python_inspect

    import yaml

    from tinyclip.recipes import PRESETS, load_recipe, needs

    if name is not None:
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"recipes: no preset {name}{hint} (presets: {', '.join(PRESETS)})")
        given: dict[str, Any] = {argument: argument.upper() for argument in needs(name)}
        recipe = load_recipe(name, **given)
        print(f"# {python_inspect.getdoc(PRESETS[name])}".replace("\n", "\n# ").replace("# \n", "#\n"))
        print(yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False), end="")
        return
    for preset in PRESETS.values():
        first_line = (preset.__doc__ or "").splitlines()[0]
        print(f"{preset.__name__:16} {first_line}")


@app.command()
def demo(run: RunOption = Path("runs/demo")) -> None:
    """The whole story on built-in pictures: a teacher, two ways to 25 %, their baselines, one table."""
    from tinyclip.demo import demo

    demo(run, say=say)


def _load(model: str, allow_remote: bool) -> CLIP:
    """A model to pass on. Raises ValueError for one that our towers cannot express."""
    from tinyclip.distill.teacher import load_teacher

    teacher = load_teacher(model, allow_remote=allow_remote)
    if teacher.clip is None:
        raise ValueError(f"{model}: cannot be converted: {teacher.teach_only}")
    return teacher.clip


def _load_bare(model: str, allow_remote: bool) -> CLIP:
    """A model whose weights and sizes are enough: it need not know how it reads pictures and captions."""
    from tinyclip.distill.teacher import OPEN_CLIP
    from tinyclip.formats.checkpoint import load

    return _load(model, allow_remote) if model.startswith(OPEN_CLIP) else load(model)


def _compress(recipe: Recipe, run: Path, name: str, allow_remote: bool) -> None:
    from tinyclip.compress import compress

    _launch(recipe, lambda world: compress(recipe, run, name=name, say=say, world=world, allow_remote=allow_remote))


def _launch(recipe: Recipe, work: Callable[[World], Path]) -> None:
    """In this process, or as one of those that torchrun started; prints where the result is."""
    from tinyclip.distributed import launched

    with launched(recipe.device) as world:
        result = work(world)
        if world.is_main:
            print(line(result))


def _recipe_name(recipe: str, changes: list[str] | None) -> str:
    """A preset or the name of a file, and what was set beside it."""
    from tinyclip.formats.provenance import public

    return " --set ".join([Path(recipe).name, *map(public, changes or ())])


def main() -> None:
    """What the `tinyclip` command does; it comes here from __main__.py."""
    with answered() as stops:
        _main_command(stops)


def _main_command(stops: Sequence[Stopped]) -> None:
    from tinyclip.distributed import MainFailed

    debug = "--debug" in sys.argv
    rank = os.environ.get("RANK", "0")  # among the processes that torchrun started
    try:
        arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]  # wherever it was typed
        sys.exit(app(args=arguments, standalone_mode=False) or 0)
    except (Interrupted, Stopped) as stop:
        end(stop)
    except MainFailed:
        sys.exit(2)
    except Exception as error:
        if stops:  # torch, in C, can put an error of its own in the place of a Stopped that passes through it
            end(stops[0])
        said = getattr(error, "format_message", None)  # of click's errors, whose class typer keeps to itself
        if said is not None and not said():  # a command without arguments: they show its help
            cast(Any, error).show()
            sys.exit(2)
        if said is None and (debug or not isinstance(error, ValueError | OSError)):
            sys.excepthook = _show_traceback
            raise
        message = str(error) if said is None else re.sub(r"^Invalid value for '(\S+)': ", r"\1: ", said())
        if isinstance(error, OSError) and error.filename and error.strerror:
            message = f"{error.filename}: {error.strerror}"  # without "[Errno 2]"
        where = "" if rank == "0" else f"process {rank}: "
        say(f"tinyclip: error: {where}{' '.join(message.split())}")
        sys.exit(2)


def _show_traceback(_kind: type[BaseException], error: BaseException, _traceback: Any) -> None:
    for part in traceback.format_exception(error):
        for own in redacted(part).splitlines():
            say(own)
