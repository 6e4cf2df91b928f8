"""Compare ways to reach 25 % on one data set: progressive or one-shot, masks or rule, and training from scratch.

One teacher is trained on the data set (contrastive loss). Then, for each seed, every way gets the same number of
samples. Used by emoji.py and flickr8k.py; each call continues where the last one stopped.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tinyclip.compress import compress
from tinyclip.data.spec import DataSpec
from tinyclip.distill.objective import Objective
from tinyclip.distill.train import DataConfig, TrainConfig
from tinyclip.evaluate import cost
from tinyclip.evaluate.scores import Evaluation
from tinyclip.formats.checkpoint import load
from tinyclip.recipe import Recipe, Stage
from tinyclip.run import results, write_text
from tinyclip.shrink.inherit import Inherit
from tinyclip.shrink.masks import LearnMasks
from tinyclip.start import Like, Scratch

MASK_SHARE = 0.4  # of an automatic stage's steps; the rest distils
CONTRASTIVE = Objective(affinity=0, contrastive=1)
OWN_SCALES = Objective(student_scale="learned", teacher_scale="teacher")


class Study:
    def __init__(
        self,
        run_dir: Path,
        *,
        data: DataConfig,
        evaluation: Evaluation,
        teacher: Scratch,
        batch_size: int,
        teacher_steps: int,
        student_steps: int,
    ):
        self.run_dir, self.data, self.evaluation, self.shape = run_dir, data, evaluation, teacher
        self.batch_size, self.teacher_steps, self.student_steps = batch_size, teacher_steps, student_steps

    def train(self, steps: int, objective: Objective) -> TrainConfig:
        return TrainConfig(
            steps=steps, batch_size=self.batch_size, lr=1e-3, warmup_steps=max(1, steps // 10), objective=objective
        )

    def teacher(self) -> Path:
        recipe = Recipe(
            start=self.shape,
            data=self.data,
            stages=(Stage(name="train", distill=self.train(self.teacher_steps, CONTRASTIVE)),),
            evaluation=self.evaluation,
        )
        return compress(recipe, self.run_dir / "teacher")

    def student(self, kind: str, shares: tuple[float, ...], seed: int) -> Path:
        """`kind` is auto (learned masks) or manual (by rule)."""
        steps = self.student_steps // len(shares)
        masking = int(MASK_SHARE * steps)

        def stage(share: float) -> Stage:
            name = f"{kind}-{100 * share:.0f}"
            if kind == "manual":
                return Stage(name=name, shrink=Inherit(keep_params=share), distill=self.train(steps, OWN_SCALES))
            return Stage(
                name=name,
                shrink=LearnMasks(keep_params=share, log_alpha_lr=10 / masking, initial_log_alpha=3.0, multiplier_lr=2),
                while_masking=self.train(masking, OWN_SCALES),
                distill=self.train(steps - masking, OWN_SCALES),
            )

        recipe = Recipe(
            teacher=str(self.run_dir / "teacher"),
            data=self.data,
            stages=tuple(map(stage, shares)),
            evaluation=self.evaluation,
            seed=seed,
        )
        return compress(recipe, self.run_dir / f"{kind}-{'progressive' if len(shares) > 1 else 'one-shot'}-{seed}")

    def scratch(self, kind: str, seed: int) -> Path:
        recipe = Recipe(
            start=Like(like=str(self.run_dir / f"{kind}-progressive-{seed}")),
            data=self.data,
            stages=(Stage(name="train", distill=self.train(self.student_steps, CONTRASTIVE)),),
            evaluation=self.evaluation,
            seed=seed,
        )
        return compress(recipe, self.run_dir / f"{kind}-scratch-{seed}")

    def run(self, seeds: int) -> None:
        self.teacher()
        for seed in range(seeds):
            for kind in ("auto", "manual"):
                self.student(kind, (0.75, 0.5, 0.25), seed)
                self.student(kind, (0.25,), seed)
                self.scratch(kind, seed)
            self.report(seed + 1)

    def report(self, seeds: int) -> None:
        rows = [self.row("teacher", ["teacher"])]
        for kind in ("auto", "manual"):
            for way in ("progressive", "one-shot", "scratch"):
                rows.append(self.row(f"{kind} {way}", [f"{kind}-{way}-{seed}" for seed in range(seeds)]))
        write_text(self.run_dir / "study.json", json.dumps(rows, indent=2))
        scores = [name for name in rows[0]["scores"] if re.search(r"@\d+$|^top\d+$", name)]
        table = Table("way", "n", "parameters", "MMACs", *(name.replace("_recall", "") for name in scores))
        for row in rows:
            cells = (f"{100 * mean:.1f} ± {100 * spread:.1f}" for mean, spread in (row["scores"][s] for s in scores))
            table.add_row(row["way"], str(row["n"]), f"{row['parameters']:,.0f}", f"{row['macs'] / 1e6:.1f}", *cells)
        Console(width=160).print(table)

    def row(self, way: str, runs: list[str]) -> dict:
        """Mean and standard deviation over runs."""
        counted = [cost(load(self.run_dir / run).config) for run in runs]
        scores = [results(self.run_dir / run)[-1]["scores"] for run in runs]
        return {
            "way": way,
            "n": len(runs),
            "parameters": statistics.mean(c.parameters for c in counted),
            "macs": statistics.mean(c.image_macs + c.text_macs for c in counted),
            "scores": {
                name: (
                    statistics.mean(s[name] for s in scores),
                    statistics.stdev(s[name] for s in scores) if len(scores) > 1 else 0.0,
                )
                for name in scores[0]
            },
        }


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("data", type=Path, help="the data set's folder")
    parser.add_argument("--run", type=Path, required=True, help="directory of all runs of the study")
    parser.add_argument("--seeds", type=int, default=1)
    return parser.parse_args()


def pairs(path: Path, **fields: str) -> DataSpec:
    return DataSpec(path=str(path), **fields)
