"""All that tinyclip measures of a compressed model, on the runs of emoji.py and flickr8k.py, and a report of each.

    python examples/measure.py DATA --runs runs

DATA holds the data sets of those examples and tiny-imagenet-val and tiny-imagenet-train (labels.tsv with the columns
file and names, and images.zip). For each example the student (masks, one stage, seed 0) is scored zero-shot and by a
linear probe on Tiny-ImageNet, compared with its teacher, timed against it, and reported with its baseline, the same
shape from scratch. Every step is a command, which is printed. The models are tiny and have seen few pictures: on
Tiny-ImageNet's 200 classes they are a little above chance (0.5 %), which the intervals say.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

RETRIEVAL = {
    "emoji": "emoji-demo/pairs.tsv?images=images.zip&caption={name}&where=split=train;style=noto",
    "flickr8k": "flickr8k-train/captions.tsv?images=images.zip&where=split=dev",
}
TABLE = "labels.tsv?images=images.zip&label=names&sep=,"
SUITE = {"name": "tiny-imagenet", "data": f"tiny-imagenet-val/{TABLE}", "train": f"tiny-imagenet-train/{TABLE}"}


def tinyclip(*arguments: object, into: Path | None = None) -> None:
    words = [str(argument) for argument in arguments]
    print(f"$ tinyclip {shlex.join(words)}{f' > {into}' if into else ''}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "tinyclip", *words], check=True, stdout=subprocess.PIPE if into else None
    )
    if into is not None:
        into.write_bytes(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--no-probe", action="store_true", help="30,000 pictures, 16 fits: a quarter of an hour")
    options = parser.parse_args()
    suite = options.runs / "tiny-imagenet.yaml"
    suite.write_text(yaml.safe_dump({"datasets": [SUITE]}), encoding="utf-8")
    on_suite = ["--suite", suite, "--data-root", options.data]
    for name, pairs in RETRIEVAL.items():
        run, teacher, baseline = (
            options.runs / name / part for part in ("auto-one-shot-0", "teacher", "auto-scratch-0")
        )
        probe = [] if options.no_probe else ["--probe"]
        tinyclip("evaluate", run, *on_suite, *probe, "--out", run / "evaluation.json")
        retrieval = f"{options.data}/{pairs}"
        tinyclip("compare", teacher, run, *on_suite, "--retrieval", retrieval, "--out", run / "compare.json")
        tinyclip("benchmark", run, "--against", teacher, "--json", into=run / "benchmark.json")
        tinyclip("report", run, baseline)


if __name__ == "__main__":
    main()
