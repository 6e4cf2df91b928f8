"""A run directory -> values for the page. What is damaged or missing becomes a note; only what is no run is an error.

The layout is that of tinyclip/run.py. evaluation.json, compare.json and benchmark.json are read where they are there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tinyclip.distill.metrics import LOGS
from tinyclip.formats.files import check_digests, read_sealed, validated
from tinyclip.model import CLIPConfig
from tinyclip.redact import redacted
from tinyclip.run import is_as_written, read_recipe
from tinyclip.shrink.keep import Keep

EXTRAS = ("evaluation", "compare", "benchmark")
RANK = "_rank"  # ends the name of what is no share
COUNTS = ("images", "texts", "n", "classes", "alike_classes")  # among the scores, but no shares
Z = 1.959964  # of a two-sided interval of 95 %


class Score(NamedTuple):
    """A share in [0, 1] and its interval of 95 %, where one is known."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    measured: bool = True  # the interval was recorded; else it is Wilson's, from the share and n


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model with what was measured of it. MACs are of one image and one text."""

    name: str
    place: str  # its directory, or the teacher's published name
    role: str  # teacher, student, stage or baseline
    parameters: int | None
    macs: int | None
    scores: Mapping[str, Score]
    ranks: Mapping[str, Score]  # median ranks, from 1: lower is better, and no shares


class Phase(NamedTuple):
    """masks or distill, and its logged steps."""

    name: str
    lines: list[dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str  # of its directory
    model: Model | None  # None: not complete
    phases: list[Phase]
    keep: Keep | None
    config: CLIPConfig | None
    asked: float | None  # share of the start's prunable parameters
    seconds: float | None  # of all work on the stage, where calls.jsonl tells
    distill_seconds: float | None  # of the last call that distilled
    pairs: int


@dataclass(kw_only=True)
class Run:
    path: Path
    recipe: dict[str, Any]
    recipe_text: str
    teacher: Model | None = None
    start: CLIPConfig | None = None
    stages: list[Stage] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    extras: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def complete(self) -> list[Stage]:
        return [stage for stage in self.stages if stage.model is not None]

    @property
    def student(self) -> Model | None:
        """The smallest that there is: the last complete stage's."""
        return self.complete[-1].model if self.complete else None

    @property
    def finished(self) -> bool:
        return len(self.complete) == len(self.stages) and (self.path / "model" / "config.json").is_file()

    @property
    def call(self) -> dict[str, Any]:
        """The last command that worked on the run; empty for a run that did not record it."""
        return next((line for line in reversed(self.calls) if line.get("event") == "start"), {})


def read_run(path: Path) -> Run:
    """Raises ValueError for a directory that is no run."""
    file = path / "recipe.yaml"
    if not file.is_file():
        raise ValueError(f"{path}: expected a run (a directory with recipe.yaml), found none")
    recipe = read_recipe(file)
    stages = recipe.get("stages")
    named = isinstance(stages, list) and all(isinstance(s, dict) and isinstance(s.get("name"), str) for s in stages)
    if not named:
        raise ValueError(f"{file}: damaged, expected the recipe of a run with its stages")
    shown = yaml.safe_dump(redacted(recipe), sort_keys=False, allow_unicode=True)  # folded text could hide a secret
    return _Reader(Run(path=path, recipe=recipe, recipe_text=shown)).read()


class _Reader:
    """Fills a run, and its notes."""

    def __init__(self, run: Run):
        self.run = run

    def read(self) -> Run:
        run = self.run
        run.calls = list(self._lines(run.path / "calls.jsonl"))
        run.teacher = self._teacher()
        run.start = self._start()
        if not is_as_written(run.path / "recipe.yaml"):
            self.note(run.path / "recipe.yaml", "damaged or changed since it was written")
        names = [f"{index}-{stage['name']}" for index, stage in enumerate(run.recipe["stages"])]
        run.stages = [self._stage(name, stage) for name, stage in zip(names, run.recipe["stages"], strict=True)]
        run.extras = {name: self._json(run.path / f"{name}.json") for name in EXTRAS}
        if not run.finished:
            done = f"{len(run.complete)} of {len(run.stages)} stages are complete"
            run.notes.insert(0, f"{run.name}: unfinished, {done}; the page shows what is there")
        return run

    def note(self, path: Path, what: str) -> None:
        self.run.notes.append(f"{self.run.name}: {path.relative_to(self.run.path)}: {what}")

    def _json(self, path: Path) -> dict[str, Any] | None:
        """None where there is none, and, with a note, where it is damaged."""
        if not path.is_file():
            return None
        try:
            return read_sealed(path)
        except ValueError:
            self.note(path, "damaged, left out")
            return None

    def _lines(self, path: Path) -> Iterator[dict[str, Any]]:
        if not path.is_file():
            return
        if path.name in LOGS and not self._is_as_written(path):
            self.note(path, "not as it was written: what it shows may be wrong")
        bad = []
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            if isinstance(values, dict):
                yield values
            else:
                bad.append(number)
        if bad:
            self.note(path, f"{_count(len(bad), 'damaged line')} left out, the first is line {bad[0]}")

    def _is_as_written(self, path: Path) -> bool:
        try:
            check_digests(path.parent)
            return True
        except ValueError as error:
            return not str(error).startswith(f"{path}: ")
        except OSError:
            return True

    def _teacher(self) -> Model | None:
        path = self.run.path / "teacher.json"
        record = self._json(path)
        if record is None:
            return None
        return self._model(path, record, str(record.get("name", "teacher")), "", "teacher")

    def _start(self) -> CLIPConfig | None:
        """start.json; before it was written, the model that the recipe names, where that is a directory."""
        named = self.run.recipe.get("start") or self.run.recipe.get("teacher")
        named = named.get("like") if isinstance(named, dict) else named
        places = [self.run.path / "start.json"]
        if isinstance(named, str):
            places += [Path(named) / "config.json", Path(named) / "model" / "config.json"]
        return next((config for path in places if (config := self._config(path)) is not None), None)

    def _config(self, path: Path) -> CLIPConfig | None:
        if not path.is_file():
            return None
        try:
            settings = read_sealed(path)
            return validated(CLIPConfig, settings.get("model", settings), str(path))
        except ValueError:
            if path.is_relative_to(self.run.path):
                self.note(path, "damaged, left out")
            return None

    def _stage(self, name: str, settings: Mapping[str, Any]) -> Stage:
        path = self.run.path / name
        record = self._json(path / "stage.json")
        shrink = settings.get("shrink")
        training = (record or {}).get("training")
        training = training if isinstance(training, dict) else {}
        baseline = self.run.teacher is None
        last = name.startswith(f"{len(self.run.recipe['stages']) - 1}-")
        role = "baseline" if baseline else "student" if last else "stage"
        phases = [Phase(phase, self._metrics(path / phase / "metrics.jsonl")) for phase in ("masks", "distill")]
        return Stage(
            name=name,
            model=None if record is None else self._model(path / "stage.json", record, name, str(path), role),
            phases=[phase for phase in phases if phase.lines],
            keep=self._keep(path / "keep.json"),
            config=self._config(path / "model" / "config.json"),
            asked=_share(shrink.get("keep_params")) if isinstance(shrink, dict) else None,
            seconds=self._seconds(name),
            distill_seconds=number(training.get("seconds")),
            pairs=int(number(training.get("pairs")) or 0),
        )

    def _metrics(self, path: Path) -> list[dict[str, float]]:
        """Of every line the numbers; lines without a step are left out."""
        lines = [{k: n for k, v in line.items() if (n := number(v)) is not None} for line in self._lines(path)]
        return [line for line in lines if "step" in line]

    def _keep(self, path: Path) -> Keep | None:
        settings = self._json(path)
        try:
            return None if settings is None else validated(Keep, settings, str(path))
        except ValueError:
            self.note(path, "damaged, left out")
            return None

    def _seconds(self, stage: str) -> float | None:
        """Of all calls that worked on the stage, but for those that were killed."""
        ends = [line for line in self.run.calls if line.get("event") == "end" and line.get("stage") == stage]
        seconds = [found for line in ends if (found := number(line.get("seconds"))) is not None]
        return sum(seconds) if seconds else None

    def _model(self, path: Path, record: Mapping[str, Any], name: str, place: str, role: str) -> Model:
        cost, values = record.get("cost"), record.get("scores")
        counted = {k: n for k, v in (cost if isinstance(cost, dict) else {}).items() if (n := number(v)) and n > 0}
        if not isinstance(values, dict):
            self.note(path, "no scores")
            values = {}
        both = [counted[tower] for tower in ("image_macs", "text_macs") if tower in counted]
        return Model(
            name=name,
            place=place or name,
            role=role,
            parameters=int(counted["parameters"]) if "parameters" in counted else None,
            macs=int(sum(both)) if len(both) == 2 else None,
            scores=scores(values),
            ranks={k: Score(*v) for k, v in intervals(values).items() if k.endswith(RANK)},
        )


class Recorded(NamedTuple):
    value: float
    low: float | None
    high: float | None


def intervals(values: Mapping[str, Any]) -> dict[str, Recorded]:
    """NAME, NAME_low and NAME_high of a flat record -> NAME: (value, low, high). Counts are left out."""
    numbers = {name: found for name, value in values.items() if (found := number(value)) is not None}

    def belongs(name: str) -> bool:
        base, _, ending = name.rpartition("_")
        return name in COUNTS or (ending in ("low", "high", "n") and base in numbers)

    return {
        name: Recorded(value, numbers.get(f"{name}_low"), numbers.get(f"{name}_high"))
        for name, value in numbers.items()
        if not belongs(name)
    }


def scores(values: Mapping[str, Any]) -> dict[str, Score]:
    """The shares of a flat record, with its interval, else with Wilson's where the number of queries is known."""
    return {
        name: _score(name, found, values)
        for name, found in intervals(values).items()
        if 0 <= found.value <= 1 and not name.endswith(RANK)
    }


def _score(name: str, found: Recorded, values: Mapping[str, Any]) -> Score:
    group = "images" if name.startswith("image_to_text") else "texts" if name.startswith("text_to_image") else "n"
    n = max(0, int(number(values.get(f"{name}_n", values.get(group))) or 0)) or None
    if (found.low is not None and found.high is not None) or n is None:
        return Score(*found, n)
    return Score(found.value, *wilson(found.value, n), n, measured=False)


def wilson(share: float, n: int) -> tuple[float, float]:
    """Interval of 95 % of a share of n independent queries. Source: Wilson, JASA 22 (1927), 209-212."""
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def kept(student: Score, teacher: Score) -> Score | None:
    """The student's share of the teacher's score, with an interval of 95 % where both have one.

    The interval is that of the logarithm of a ratio of two independent shares, their standard errors read from their
    own intervals. Both models answer the same queries and so are positively correlated: the true interval is narrower.
    Source: Katz et al., Biometrics 34 (1978), 469-474.
    """
    if teacher.value <= 0:
        return None
    ratio = student.value / teacher.value
    errors = [_relative_error(score) for score in (student, teacher)]
    if student.value <= 0 or None in errors:
        return Score(ratio)
    width = math.exp(Z * math.hypot(*(error or 0.0 for error in errors)))
    return Score(ratio, ratio / width, ratio * width, student.n, measured=False)


def _relative_error(score: Score) -> float | None:
    """Standard error over value; an interval of 95 % is 2 Z standard errors wide."""
    if score.low is None or score.high is None or score.value <= 0:
        return None
    return (score.high - score.low) / (2 * Z) / score.value


def headline(names: Mapping[str, Score]) -> list[str]:
    """The scores that the first screen shows: top-1 and the recalls at 1, else the first two."""
    main = [name for name in names if re.search(r"(^|[_/ ])(top1|acc1|mean_per_class)$|recall@1$", name)]
    return (main or list(names)[:2])[:3]


def number(value: Any) -> float | None:
    """A finite number, or None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _share(value: Any) -> float | None:
    share = number(value)
    return share if share is not None and 0 < share <= 1 else None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
