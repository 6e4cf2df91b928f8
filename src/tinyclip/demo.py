"""`tinyclip demo`: the whole story on built-in pictures, and one table.

A teacher is trained; it is compressed to 25 % by learned masks and by rule, in three stages each; and each student's
shape is trained from scratch with as many samples, without a teacher. Everything is kept in the run directory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tinyclip import recipes
from tinyclip.compress import compress
from tinyclip.evaluate import cost, describe
from tinyclip.evaluate.speed import pairs_per_s
from tinyclip.formats.checkpoint import load
from tinyclip.run import results, write_text

SCORES = ("top1", "image_to_text_recall@1", "text_to_image_recall@1")


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
    write_text(run_dir / "demo.json", json.dumps(rows, indent=2))
    Console().print(table(rows))
    say(f"{time.perf_counter() - started:.0f} s; models, metrics and scores are in {run_dir}")
    return run_dir / "demo.json"


def summarise(run_dir: Path) -> list[dict[str, object]]:
    """A row per model: name, cost, scores, retention (mean share of the teacher's scores), pairs per second."""
    names = {
        "teacher": "teacher",
        "auto": "25 %, learned masks",
        "scratch-auto": "same shape from scratch",
        "manual": "25 %, by rule",
        "scratch-manual": "same shape from scratch",
    }
    models = {part: load(run_dir / part) for part in names}
    speed = pairs_per_s(models)
    scores = {part: results(run_dir / part)[-1]["scores"] for part in names}
    rows: list[dict[str, object]] = []
    for part, name in names.items():
        counted = cost(models[part].config)
        retention = [scores[part][score] / scores["teacher"][score] for score in SCORES]
        rows.append(
            {
                "run": part,
                "model": name,
                "parameters": counted.parameters,
                "prunable_parameters": models[part].config.prunable_params,
                "macs": counted.image_macs + counted.text_macs,
                **{score: scores[part][score] for score in SCORES},
                "retention": sum(retention) / len(retention),
                "pairs_per_s": speed[part],
                "shape": describe(models[part].config),
            }
        )
    return rows


def table(rows: list[dict[str, object]]) -> Table:
    grid = Table(title="tinyclip demo: held-out pictures")
    grid.add_column("model")
    for column in (
        "parameters",
        "MMACs",
        "zero-shot",
        "image to text R@1",
        "text to image R@1",
        "retention",
        "pairs/s",
    ):
        grid.add_column(column, justify="right")
    for row in rows:
        shares = (f"{row[name]:.1%}" for name in (*SCORES, "retention"))
        counts = f"{row['parameters']:,}", f"{row['macs'] / 1e6:.1f}"  # type: ignore[operator]
        grid.add_row(str(row["model"]), *counts, *shares, f"{row['pairs_per_s']:,.0f}")
    return grid
