"""`tinyclip demo`: the whole story on built-in pictures, and one table.

A teacher is trained; it is compressed to 25 % by learned masks and by rule, in three stages each; and each student's
shape is trained from scratch with as many samples, without a teacher. Everything is kept in the run directory.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD

from tinyclip import recipes
from tinyclip.compress import compress
from tinyclip.evaluate import cost
from tinyclip.evaluate.speed import pairs_per_s
from tinyclip.formats.checkpoint import load
from tinyclip.run import results, write_text
from tinyclip.terminal import Table, show

SCORES = ("top1", "image_to_text_recall@1", "text_to_image_recall@1")
MODELS = {  # directory in the run: what the table calls it
    "teacher": "teacher",
    "auto": "25 % by masks",
    "scratch-auto": "  from scratch",
    "manual": "25 % by rule",
    "scratch-manual": "  from scratch",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model of the demo. Scores are shares in [0, 1]; `kept` is their mean ratio to the teacher's."""

    run: str
    model: str
    parameters: int
    prunable_parameters: int
    macs: int
    scores: dict[str, float]
    kept: float
    pairs_per_s: float


def demo(run_dir: Path, *, say: Callable[[str], None] = print) -> Path:
    """Run the demo in `run_dir` (a second call continues), print its table, and return the path of demo.json."""
    started = time.perf_counter()
    teacher_dir = run_dir / "teacher"
    say("1/5  train a teacher on generated pictures")
    compress(recipes.demo_teacher(), teacher_dir, say=say)
    say("2/5  compress it to 25 % with learned masks, in three stages")
    compress(recipes.demo(str(teacher_dir)), run_dir / "auto", say=say)
    say("3/5  compress it to 25 % by rule, in three stages")
    compress(recipes.demo_manual(str(teacher_dir)), run_dir / "manual", say=say)
    for number, kind in ((4, "auto"), (5, "manual")):
        say(f"{number}/5  train the {kind} student's shape from scratch, with as many samples")
        compress(recipes.demo_scratch(str(run_dir / kind)), run_dir / f"scratch-{kind}", say=say)
    rows = summarise(run_dir)
    write_text(run_dir / "demo.json", json.dumps([asdict(row) for row in rows], indent=2))
    show(table(rows))
    say(f"{time.perf_counter() - started:.0f} s; models, metrics and scores are in {run_dir}")
    return run_dir / "demo.json"


def summarise(run_dir: Path) -> list[Row]:
    models = {part: load(run_dir / part) for part in MODELS}
    speed = pairs_per_s(models)
    scores = {part: {name: results(run_dir / part)[-1]["scores"][name] for name in SCORES} for part in MODELS}

    def row(part: str) -> Row:
        config = models[part].config
        counted = cost(config)
        return Row(
            run=part,
            model=MODELS[part],
            parameters=counted.parameters,
            prunable_parameters=config.prunable_params,
            macs=counted.image_macs + counted.text_macs,
            scores=scores[part],
            kept=statistics.mean(scores[part][name] / max(scores["teacher"][name], 1e-9) for name in SCORES),
            pairs_per_s=speed[part],
        )

    return [row(part) for part in MODELS]


def table(rows: list[Row]) -> Table:
    """Eighty columns wide."""
    grid = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title="Held-out pictures",
        caption="zero-shot: top-1; I > T, T > I: recall@1, image to text and back; kept: mean share of the teacher's",
    )
    for column in ("model", "params", "MMACs", "zero-shot", "I > T", "T > I", "kept", "pairs/s"):
        grid.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for row in rows:
        shares = (f"{share:.1%}" for share in (*row.scores.values(), row.kept))
        counts = f"{row.parameters / 1e6:.2f} M", f"{row.macs / 1e6:.1f}"
        grid.add_row(row.model, *counts, *shares, f"{row.pairs_per_s:,.0f}")
    return grid
