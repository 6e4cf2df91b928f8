"""Stop small runs anywhere, continue them, and compare every file with those of a run that was never stopped.

    python -m tests.soak --faults 300 --seed 0          (make soak)

A run is `tinyclip compress` in a forked child of this process, which has imported everything and computed nothing; some
calls are `embed`, and a variant is `evaluate`. A fault strikes in a place (the n-th step, the n-th checkpoint that is
saved, ...), there before or after any call of Python or C, or any call that touches files: SIGKILL, SIGTERM or Ctrl-C.
Others are a signal after some milliseconds, a file size limit (a write fails in its middle, as on a full disk), a kill
after which the disk forgets what was not synced (tests/disk.py), any file that was damaged while nothing ran, and a
stop while a process of its own still imports. A life is one run directory: some faults, then a call that ends. A
teacher store in it is compared like the rest. Races are two calls that begin one run, or two runs that begin one store.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch._dynamo
import yaml

from tests import damage, disk
from tests.test_cli import start_and_stop
from tests.test_compress import student_recipe, teacher_recipe
from tinyclip import check, cli, compress, recipes, run, start
from tinyclip.data.loader import PairLoader
from tinyclip.distill import store, train
from tinyclip.distill.checkpoints import Checkpoints
from tinyclip.distill.metrics import JsonLines
from tinyclip.evaluate import retrieval, scores, zeroshot
from tinyclip.formats import checkpoint, files
from tinyclip.shrink import masks

PLACES: dict[str, tuple[Any, str]] = {
    "start": (start, "starting_point"),
    "check": (check, "check_data"),
    "claim": (run, "claim"),
    "claim inputs": (run, "claim_inputs"),
    "record teacher": (run, "record_teacher"),
    "claim store": (store, "_claim"),
    "missing parts": (store._Asked, "missing"),
    "ask teacher": (store._Asked, "_images"),
    "write part": (store._Asked, "write"),
    "open part": (store._Part, "__init__"),
    "read store": (store.Stored, "embeddings"),
    "evaluate": (scores, "evaluate"),
    "read batch": (PairLoader, "batch"),
    "step": (train, "_step"),
    "save checkpoint": (Checkpoints, "save"),
    "find checkpoint": (Checkpoints, "latest"),
    "resume": (train._State, "resume"),
    "open metrics": (JsonLines, "__init__"),
    "write metrics": (JsonLines, "write"),
    "survivors": (masks, "survivors"),
    "write text": (files, "write_text"),
    "note call": (run, "_append"),
    "save model": (checkpoint, "save"),
    "load model": (checkpoint, "load"),
    "complete stage": (run, "complete"),
    "finish run": (run, "finish"),
}
FILE_CALLS = {"replace", "rename", "fsync", "unlink", "mkdir", "rmdir", "open", "write", "flush", "serialize_file"}
KILLS = {"kill", "damage", "power loss"}
SIGNALS = {"term": signal.SIGTERM, "ctrl-c": signal.SIGINT} | dict.fromkeys(KILLS, signal.SIGKILL)
KINDS = ["kill"] * 8 + ["term", "ctrl-c", "full disk", "damage", "damage", "power loss", "power loss", "import"]
IMPORT_S = 1.5  # about what imports take
STORE = {"claim store", "missing parts", "ask teacher", "write part", "open part"}  # places that `embed` comes to
DAMAGES = (damage.a_bit, damage.cut, damage.emptied, damage.noise)
PHASES = {  # function -> what part of a run it is; of several on the stack the first of these
    "store_teacher": "store", "evaluate": "evaluation", "save": "saving", "learn_masks": "masks", "train": "distill"
}  # fmt: skip
STATUS = {"term": 0, "ctrl-c": 130, "full disk": 2} | dict.fromkeys(KILLS, -signal.SIGKILL)
PATIENCE_S = 120
ITEMS, READ_AT_ONCE = 24, 8  # of a part of the store: 64 pictures make three, the last one short; written every time
WARM = (compress, recipes, retrieval, torch._dynamo, zeroshot)  # a command imports them late, the optimizers dynamo
Process = multiprocessing.get_context("fork").Process


class Visit(NamedTuple):
    """That a run came to a place: which time, when, and what it called there."""

    place: str
    occurrence: int
    start: int  # calls before it, counted from the start of an undisturbed run
    calls: int  # of any function, and returns
    file_calls: int  # likewise


@dataclass(frozen=True)
class Fault:
    kind: str  # of SIGNALS, "full disk" or "import"; "damage" kills, then changes a file
    place: str = ""  # empty: after `amount` milliseconds
    occurrence: int = 1
    amount: int = 0  # calls after the place was reached; milliseconds; or bytes that a file may have
    of_files: bool = False  # the calls
    order: int = 0  # where in an undisturbed run it would be
    command: str = ""  # else the variant's


@dataclass
class Report:
    struck: list[dict[str, Any]] = field(default_factory=list)
    missed: int = 0  # faults that the run had passed, or ended before
    lives: int = 0
    races: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Hook:
    """Wraps the places; in the fault's own (or, without a fault, always) it counts calls, and strikes."""

    def __init__(self, fault: Fault | None, note: Path):
        self.fault, self.note, self.process = fault, note, os.getpid()
        self.calls = self.file_calls = 0
        self.seen: Counter[str] = Counter()
        self.visits: list[Visit] = []

    def install(self) -> None:
        """Wherever the program has a place by name."""
        owners = [module for name, module in sys.modules.items() if name.startswith("tinyclip")]
        for place, (owner, name) in PLACES.items():
            plain = getattr(owner, name)
            wrapped = self._wrapped(place, plain)
            for one in {id(one): one for one in (owner, *owners)}.values():
                if getattr(one, name, None) is plain:
                    setattr(one, name, wrapped)
        os.register_at_fork(after_in_child=lambda: sys.setprofile(None))  # workers do not count
        if self.fault is None:
            sys.setprofile(self)

    def _wrapped(self, place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def visit(*arguments: Any, **named: Any) -> Any:
            if os.getpid() != self.process:
                return function(*arguments, **named)
            self.seen[place] += 1
            occurrence, before = self.seen[place], (self.calls, self.file_calls)
            armed = self.fault is not None and (self.fault.place, self.fault.occurrence) == (place, occurrence)
            if armed:
                self.calls = self.file_calls = 0
                sys.setprofile(self)
            result = function(*arguments, **named)
            if armed and self.fault is not None:  # it called less than in the undisturbed run
                self._strike(sys._getframe())
            counts = self.calls - before[0], self.file_calls - before[1]
            self.visits.append(Visit(place, occurrence, before[0], *counts))
            return result

        return visit

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        self.calls += 1
        if event in ("c_call", "c_return") and arg.__name__ in FILE_CALLS and _is_of_files(arg):
            self.file_calls += 1
        elif self.fault is not None and self.fault.of_files:
            return
        if self.fault is not None and self.fault.amount < (self.file_calls if self.fault.of_files else self.calls):
            self._strike(frame)

    def _strike(self, frame: FrameType) -> None:
        fault, self.fault = self.fault, None
        assert fault is not None
        sys.setprofile(None)
        self.note.write_text(json.dumps({"phase": _phase(frame), "line": f"{frame.f_code.co_name}:{frame.f_lineno}"}))
        os.killpg(0, SIGNALS[fault.kind])  # the workers too, as by a terminal, a cluster or a machine that goes down


def _is_of_files(function: Any) -> bool:
    """os.replace is, str.replace is not."""
    owner = function.__module__ or type(function.__self__).__module__
    return owner in ("posix", "io", "_io") or function.__name__ == "serialize_file"


def _phase(frame: FrameType | None) -> str:
    """What part of a run a frame is in."""
    names = set()
    while frame is not None:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    for name, phase in PHASES.items():
        if name in names:
            return phase
    return "between"


def _child(arguments: list[str], output: Path, fault: Fault | None, note: Path) -> None:
    """`tinyclip ARGUMENTS` in this process, with its output in a file."""
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    store.ITEMS, store.READ_AT_ONCE, store.UNWRITTEN_S = ITEMS, READ_AT_ONCE, 0.0
    sys.argv = ["tinyclip", *arguments]
    if fault is not None and fault.kind == "power loss":
        disk.Journal(note.with_suffix(".synced"))
    if fault is not None and fault.kind == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.amount, fault.amount))
    hook = None
    if fault is None or fault.place:
        hook = Hook(fault, note)
        hook.install()
    try:
        cli.main()
    finally:
        sys.setprofile(None)
        if hook is not None and fault is None:
            note.write_text(json.dumps(hook.visits))


class Variant:
    """A recipe, what an undisturbed run of it leaves, and the faults that it offers."""

    command = "compress"

    def __init__(self, name: str, settings: dict[str, Any], room: Path):
        self.name, self.room = name, room / name
        self.room.mkdir()
        self.places: list[str] = []  # still to be dealt
        self.recipe = self.room / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(settings))
        self.output, self.note = self.room / "output.txt", self.room / "note.json"
        self.visits: dict[str, list[Visit]] = defaultdict(list)

    def prepare(self) -> Variant:
        """Run it once without a fault, and once cut off in its middle."""
        self._record(self.room / "undisturbed")
        self.expected = snapshot(self.room / "undisturbed")
        self.largest = max(path.stat().st_size for path in (self.room / "undisturbed").rglob("*") if path.is_file())
        middle = self.visits["step"][len(self.visits["step"]) // 2]
        half = Fault("kill", "step", middle.occurrence)
        began = time.monotonic()
        self.call(self.room / "continued", half)
        self.seconds = 2 * (time.monotonic() - began)
        self._record(self.room / "continued", after=middle.start)  # places that look for what is there find it
        self.end = max(visits[-1].start for visits in self.visits.values())
        return self

    def same_as(self, other: Variant) -> Variant:
        """Of a variant that leaves the same and visits the same, but where workers read."""
        self.visits = {place: visits for place, visits in other.visits.items() if place != "read batch"}
        self.expected, self.largest, self.seconds, self.end = other.expected, other.largest, other.seconds, other.end
        return self

    def beyond(self, other: Variant) -> Variant:
        """Strike where that one does not come, and in steps."""
        self.visits = {place: visits for place, visits in self.visits.items() if place not in other.visits} | {
            "step": self.visits["step"]
        }
        return self

    def _record(self, run_dir: Path, after: int = 0) -> None:
        status = self.call(run_dir, None)
        assert status == 0, self.output.read_text()
        for visit in map(Visit._make, json.loads(self.note.read_text())):
            self.visits[visit.place].append(visit._replace(start=after + visit.start))

    def call(self, run_dir: Path, fault: Fault | None) -> int:
        """The exit status of the command."""
        for left in (self.note, self.note.with_suffix(".synced")):
            left.unlink(missing_ok=True)
        arguments = self.arguments((fault and fault.command) or self.command, run_dir)
        if fault is not None and fault.kind == "import":
            return self._stopped_while_importing(arguments, fault)
        process = Process(target=_child, args=(arguments, self.output, fault, self.note))
        process.start()
        if fault is not None and fault.kind in SIGNALS and not fault.place:
            process.join(fault.amount / 1000)
            if process.is_alive():
                self.note.write_text(json.dumps({"phase": "by time", "line": f"{fault.amount} ms"}))
                os.killpg(process.pid, SIGNALS[fault.kind])
        process.join(PATIENCE_S)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            return 124
        if process.exitcode == 0 and fault is not None and SIGNALS.get(fault.kind) == signal.SIGKILL:
            self.note.unlink(missing_ok=True)  # it ended before the signal came
        return process.exitcode or 0

    def arguments(self, command: str, run_dir: Path) -> list[str]:
        return [command, str(self.recipe), "--run", str(run_dir)]

    def _stopped_while_importing(self, arguments: list[str], fault: Fault) -> int:
        number = signal.SIGTERM if fault.occurrence == 1 else signal.SIGINT
        status, said = start_and_stop(arguments, number, fault.amount / 1000)
        self.output.write_text(said)
        right = status == {signal.SIGTERM: 0, signal.SIGINT: 130}[number] and "tinyclip: stopped" in said
        if right or status != 0:
            self.note.write_text(json.dumps({"phase": "import", "line": f"{fault.amount} ms"}))
        return status if right or status == 0 else 125

    def fault(self, random: Random, kind: str) -> Fault:
        """A fault of this kind: places in turn, a random moment there."""
        if kind == "import":
            if self.name in ("masks", "scratch", "workers"):  # a process of its own has parts of the store's usual size
                after = random.randrange(int(1000 * IMPORT_S))
                return Fault(kind, amount=after, occurrence=random.choice((1, 2)), order=random.randrange(self.end))
            kind = "kill"
        if kind == "full disk" and self.name != "workers":  # they share memory as files
            return Fault(kind, amount=random.randrange(4096, self.largest), order=random.randrange(self.end))
        if kind == "damage":
            visit = random.choice(self.visits["step"][2:])  # there is a checkpoint
            return Fault(kind, "step", visit.occurrence, random.randrange(visit.calls), order=visit.start)
        if not self.places:
            self.places = random.sample(["", *self.visits], len(self.visits) + 1)
        place = self.places.pop()
        kind = "kill" if kind == "full disk" else kind
        command = "embed" if self.name == "stored" and place in STORE and random.random() < 0.5 else ""
        if not place:
            return Fault(kind, amount=50 + int(1000 * self.seconds * random.random()), order=self.end // 2)
        visit = random.choice(self.visits[place])
        of_files = visit.file_calls > 0 and random.random() < 0.7
        amount = random.randrange(visit.file_calls if of_files else visit.calls)
        return Fault(kind, place, visit.occurrence, amount, of_files, visit.start, command)


class Evaluate(Variant):
    """`tinyclip evaluate` of a run, which leaves one file."""

    command = "evaluate"

    def __init__(self, model: Path, room: Path):
        super().__init__("evaluate", {}, room)
        self.model = model

    def prepare(self) -> Variant:
        began = time.monotonic()
        self._record(self.room / "undisturbed")
        self.expected = snapshot(self.room / "undisturbed")
        self.seconds = time.monotonic() - began
        self.end = max(visits[-1].start for visits in self.visits.values())
        return self

    def arguments(self, command: str, run_dir: Path) -> list[str]:
        data = ["--retrieval", "scenes?split=heldout&count=16", "--zeroshot", "scenes?split=classes&count=16"]
        return [command, str(self.model), *data, "--out", str(run_dir / "scores.json")]

    def fault(self, random: Random, kind: str) -> Fault:
        return super().fault(random, "kill" if kind in ("full disk", "damage") else kind)


def snapshot(run_dir: Path) -> dict[str, Any]:
    """Every file of a run but calls.jsonl, without times, and without the number of workers, which changes nothing."""
    found = {}
    for path in sorted(run_dir.rglob("*")):
        name, content = str(path.relative_to(run_dir)), path.read_bytes() if path.is_file() else None
        if content is None:
            found[name] = "directory"
        elif path.name == "calls.jsonl":
            assert all(json.loads(line) for line in content.splitlines())
        elif path.name == "recipe.yaml":
            settings = yaml.safe_load(content)
            found[name] = settings | {"data": settings["data"] | {"workers": 0}}
        elif path.name == "digests.json" and path.parent.name in ("masks", "distill"):  # of times too
            files.check_digests(path.parent)
            found[name] = sorted(files.read_sealed(path)["files"])
        elif path.name == "stage.json":
            result = files.read_sealed(path)
            found[name] = result | {"training": result["training"] | {"seconds": 0}}
        elif path.suffix == ".jsonl":
            found[name] = [json.loads(line) | {"pairs_per_s": 0} for line in content.splitlines()]
        else:
            found[name] = content
    return found


def compared(expected: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """The files that differ."""
    return [name for name in sorted(expected.keys() | got.keys()) if expected.get(name) != got.get(name)]


class Damaged(NamedTuple):
    """A file that was damaged while nothing ran, and what it was."""

    path: Path
    content: bytes


def live(variant: Variant, faults: list[Fault], run_dir: Path, report: Report, random: Random) -> None:
    """One run directory from its start, through the faults, to its end."""
    story: list[dict[str, Any]] = []
    damaged: list[Damaged] = []
    for fault in sorted(faults, key=lambda fault: fault.order):
        if story and fault.kind != "import":  # what comes after is less than a whole run
            fault = replace(fault, occurrence=min(fault.occurrence, random.randint(1, 3)))
        known = disk.Known.of(run_dir)
        status = called(variant, run_dir, fault, damaged)
        output = variant.output.read_text()
        struck = json.loads(variant.note.read_text()) if variant.note.exists() else None
        if fault.kind == "full disk" and status == 2:
            struck = {"phase": "by size", "line": f"{fault.amount} bytes"}
        if struck is None and status == 0:
            report.missed += 1
            if fault.command:  # it came to the end of a part
                continue
            break
        too_late = not fault.place and (run_dir / "model").exists()  # while Python shut down, say
        report.wrong += [] if too_late else _answer(fault, status, output, variant)
        if struck is None:
            report.missed += 1
            continue
        if fault.kind == "damage" and (found := _damage(run_dir, random)) is not None:
            damaged.append(found)
            struck["damaged"] = str(found.path.relative_to(run_dir))
        if fault.kind == "power loss":
            struck["lost"] = disk.forget(run_dir, known, variant.note.with_suffix(".synced"), random)
        told = {"variant": variant.name, "kind": fault.kind, "place": fault.place, "occurrence": fault.occurrence}
        story.append(told | struck | {"status": status, "command": fault.command or variant.command})
    status = called(variant, run_dir, Fault("none"), damaged)
    if status != 0:
        report.wrong.append(f"{variant.name}: ended with {status}: {variant.output.read_text()[-500:]} after {story}")
    elif differ := compared(variant.expected, snapshot(run_dir)):
        report.wrong.append(f"{variant.name}: {', '.join(differ)} differ after {story}")
    report.struck += story
    report.lives += 1
    shutil.rmtree(run_dir, ignore_errors=True)


def called(variant: Variant, run_dir: Path, fault: Fault, damaged: list[Damaged]) -> int:
    """The command's exit status; a file that it names as damaged gets back what it was, and the command comes again."""
    while True:
        status = variant.call(run_dir, fault)
        output = variant.output.read_text()
        named = [one for one in damaged if str(one.path) in output.strip().rpartition("\n")[2]]
        if status != 2 or not named or "Traceback" in output:
            return status
        for one in named:
            one.path.write_bytes(one.content)
            damaged.remove(one)


def _answer(fault: Fault, status: int, output: str, variant: Variant) -> list[str]:
    """What is wrong with how the command ended."""
    where = f"{variant.name}: {fault}: status {status}: {output[-700:]!r}"
    if fault.kind == "import":
        right = status in (0, 130) and "Traceback" not in output and "continue with: python -m tinyclip" in output
        return [] if right or variant.command == "evaluate" else [where]
    command = fault.command or variant.command
    expected = STATUS[fault.kind] if command != "evaluate" or fault.kind != "term" else 128 + signal.SIGTERM
    if status != expected or "Traceback" in output:
        return [where]
    if command == "evaluate":
        return []
    if fault.kind in ("term", "ctrl-c") and f"continue with: tinyclip {command} {variant.recipe}" not in output:
        return [where]
    return [where] if fault.kind == "full disk" and "intact" not in output else []


def _damage(run_dir: Path, random: Random) -> Damaged | None:
    """Cut or change any file, the newest checkpoint as often as all others."""
    found = [path for path in sorted(run_dir.rglob("*")) if path.is_file() and path.stat().st_size]
    found = [path for path in found if path.suffix != ".tmp" and path.name[0] != "." and path.name != "calls.jsonl"]
    checkpoints = [path for path in found if path.suffix == ".pt"]
    if checkpoints and random.random() < 0.5:
        found = [max(checkpoints, key=lambda path: path.stat().st_mtime_ns)]
    if not found:
        return None
    path = random.choice(found)
    content = path.read_bytes()
    random.choice(DAMAGES)(path, random)
    return Damaged(path, content)


def race(variant: Variant, run_dirs: tuple[Path, Path], report: Report) -> None:
    """Two first calls at once: each ends well, or with one line since the other works; then one call more."""
    outputs = [run_dirs[0].with_suffix(f".{number}.txt") for number in (1, 2)]
    arguments = [variant.arguments(variant.command, run_dir) for run_dir in run_dirs]
    both = [
        Process(target=_child, args=(own, output, Fault("none", "nowhere"), variant.note))
        for own, output in zip(arguments, outputs, strict=True)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(PATIENCE_S)
    said = [output.read_text() for output in outputs]
    ends = [
        (process.exitcode, "another process is working on this run" in text)
        for process, text in zip(both, said, strict=True)
    ]
    right = [(0, False), (2, True)] if run_dirs[0] == run_dirs[1] else [(0, False)]
    if any(end not in right for end in ends) or (0, False) not in ends or "Traceback" in "".join(said):
        report.wrong.append(f"{variant.name}: two at once: {ends}: {said}")
    for run_dir in dict.fromkeys(run_dirs):
        status = variant.call(run_dir, Fault("none"))
        if status != 0 or (differ := compared(variant.expected, snapshot(run_dir))):
            report.wrong.append(
                f"{variant.name}: after two at once: {status} {differ if not status else variant.output.read_text()}"
            )
        shutil.rmtree(run_dir, ignore_errors=True)
    report.races += 1


def variants(room: Path) -> list[Variant]:
    """Masks, rule, micro-batches and averaged weights; the same with workers that read; an ensemble that is stored; a
    start from random weights."""
    teacher = room / "teacher"
    settings = teacher_recipe().model_dump(mode="json")
    settings["stages"][0]["distill"]["evaluate_every"] = 2
    scratch = Variant("scratch", settings, room).prepare()
    shutil.copytree(scratch.room / "undisturbed", teacher)
    settings = student_recipe(teacher).model_dump(mode="json")
    masks, distill = (settings["stages"][0][phase] for phase in ("while_masking", "distill"))
    masks["micro_batch_size"], masks["keep_checkpoints"] = 3, 1
    distill["micro_batch_size"], distill["evaluate_every"], distill["ema_decay"] = 5, 3, 0.5
    plain = Variant("masks", settings, room).prepare()
    workers = Variant("workers", settings | {"data": settings["data"] | {"workers": 1}}, room).same_as(plain)
    asked_once = {"store": {"views": 2}, "more_teachers": [str(teacher)], "stages": settings["stages"][1:]}
    stored = Variant("stored", settings | asked_once, room).prepare().beyond(plain)
    return [plain, stored, workers, scratch, Evaluate(teacher, room).prepare()]


def soak(faults: int, seed: int, room: Path, *, per_life: int = 5) -> Report:
    """Lives until so many faults have struck: places and kinds in turn, moments by the seed."""
    report, began = Report(), time.monotonic()
    known = variants(room)
    kinds: list[str] = []  # still to be dealt
    while len(report.struck) < faults and report.lives < faults:
        variant = known[report.lives % len(known)]
        random = Random(f"{seed} {report.lives}")  # what a life is dealt does not hang on when the last one was struck
        chosen = []
        for _ in range(min(per_life, faults - len(report.struck))):
            kinds = kinds or random.sample(KINDS, len(KINDS))
            chosen.append(variant.fault(random, kinds.pop()))
        live(variant, chosen, variant.room / f"life-{report.lives}", report, random)
    shared = Variant("shared", yaml.safe_load(known[1].recipe.read_text()), room)
    place = shared.room / "teacher-store"
    settings = yaml.safe_load(known[1].recipe.read_text())
    settings["store"]["path"] = str(place)
    shared.recipe.write_text(yaml.safe_dump(settings))
    shared.call(shared.room / "undisturbed", Fault("none"))
    shared.expected = snapshot(shared.room / "undisturbed")
    for number in range(max(2, faults // 30)):
        one, other = (shared.room / f"race-{number}-{letter}" for letter in "ab")
        if number % 2:
            shutil.rmtree(place)
            race(shared, (one, other), report)
        else:
            race(known[0], (one, one), report)
    report.seconds = time.monotonic() - began
    return report


def summary(report: Report) -> str:
    lines = [f"{len(report.struck)} faults in {report.lives} lives, {report.missed} missed, {report.races} races, "]
    lines[0] += f"{report.seconds:.0f} s"
    for column in ("variant", "kind", "command", "phase", "place"):
        counts = Counter(entry[column] or "by time" for entry in report.struck)
        lines.append(f"{column:8s} " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    return "\n".join([*lines, *report.wrong, f"{len(report.wrong)} wrong"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args()
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # what is tested is not whether a disk can wait
    with tempfile.TemporaryDirectory(dir=fast) as room:
        report = soak(options.faults, options.seed, Path(room))
    if options.json:
        print(json.dumps(vars(report)))
        sys.exit(bool(report.wrong))
    print(summary(report), flush=True)
    sys.exit(bool(report.wrong) or bool(damage.main()))


if __name__ == "__main__":
    main()
