"""What models cost, measured: latency, throughput and memory of several models and several ways to run them.

All contenders are loaded and warm before anything is timed. Then come rounds; in each, every contender is timed once,
so that a machine that slows down slows all of them. What is compared are ratios within a round to the reference model
run the same way, reported as the median over rounds with the smallest and the largest.

    eager       the model as it is, fp32            bf16        its weights and activations in bf16
    compiled    torch.compile of each tower         onnx, int8  formats/onnx.py by onnxruntime, on the CPU

One call takes inputs from memory to unit embeddings: normalised pixels of the model's size, and texts of its full
context length, which is what a tower pads every caption to. Reading files, resizing and tokenising are not in it.

Shape legend: B pairs, L tokens.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from tinyclip.config import Config
from tinyclip.device import pick_device, use_fast_cpu_products
from tinyclip.evaluate import peak_memory
from tinyclip.evaluate.peak_memory import Embed, Sizes
from tinyclip.evaluate.timings import Round, ratios, summary
from tinyclip.formats import checkpoint, onnx
from tinyclip.model import CLIP
from tinyclip.redact import redacted

TORCH_BACKENDS, GRAPH_BACKENDS = ("eager", "bf16", "compiled"), ("onnx", "int8")
BACKENDS = TORCH_BACKENDS + GRAPH_BACKENDS
MAX_COMPILED = 1024  # shapes of one function; torch's own limit is 8, and every contender's tower is one function
PACKAGES = ("tinyclip", "torch", "onnxruntime", "numpy")
MB = 1e6

BatchSize = Annotated[int, Field(gt=0, le=65536)]


class Benchmark(Config):
    """What is measured, and how long."""

    backends: tuple[str, ...] = Field(
        default=("eager", "compiled", "onnx", "int8"), min_length=1, description="eager, bf16, compiled, onnx, int8"
    )
    batch_sizes: tuple[BatchSize, ...] = Field(default=(1, 8, 32), min_length=1, description="tried for throughput")
    rounds: int = Field(default=7, gt=0, description="each times every contender once")
    latency_calls: int = Field(default=10, gt=0, description="at batch 1, in each round")
    min_seconds: float = Field(default=0.2, ge=0, description="of calls for one throughput")
    threads: int | None = Field(default=None, gt=0, description="of torch and onnxruntime alike; null: torch's own")
    device: str = Field(default="auto", description="CUDA where there is one, else the CPU")
    memory: bool = Field(default=True, description="measure peak memory too")

    @field_validator("backends")
    @classmethod
    def _known(cls, backends: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in backends if name not in BACKENDS]
        if unknown:
            raise ValueError(f"expected some of {', '.join(BACKENDS)}, got {', '.join(unknown)}")
        return tuple(dict.fromkeys(backends))

    @field_validator("batch_sizes")
    @classmethod
    def _rising(cls, batch_sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(batch_sizes)))


QUICK: dict[str, Any] = {"batch_sizes": (1, 8), "rounds": 3, "latency_calls": 3, "min_seconds": 0.05}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model run in one way.

    `values` are image_latency_p50_ms, image_latency_p95_ms (batch 1, over all calls), image_per_s (median over rounds
    at the best batch size, image_batch), the same of text, pairs_per_s = 1 / (1 / image_per_s + 1 / text_per_s), and
    peak_memory_mb (batch 1) and peak_memory_largest_batch_mb. NAME_ratio says how many times as fast as the reference
    it is, so a latency's is the reference's over its own. NAME_low and NAME_high are the extremes over rounds.
    """

    model: str
    backend: str
    values: dict[str, float] = field(default_factory=dict)
    not_measured: str | None = None  # why there are no values
    memory_not_measured: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    reference: str  # the model that ratios refer to, in the same backend
    environment: dict[str, Any]
    settings: dict[str, Any]
    rows: tuple[Row, ...]


@dataclass(frozen=True, eq=False)
class Contender:
    model: str
    backend: str
    towers: Mapping[str, Embed]  # none where it cannot run here
    not_measured: str | None = None


def benchmark(
    models: Mapping[str, CLIP],
    settings: Benchmark = Benchmark(),  # noqa: B008  immutable
    *,
    reference: str | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """Measure every model in every backend; ratios refer to `reference`, the first where none is named.

    The models are left on the device, in evaluation mode. A contender that cannot run here has a row that says why.
    Raises ValueError for a reference that is not among the models and a device that is not there.
    """
    reference = next(iter(models)) if reference is None else reference
    if reference not in models:
        raise ValueError(f"benchmark: expected a reference among {', '.join(models)}, got {reference}")
    device, threads = pick_device(settings.device), settings.threads or torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with _computing(threads) as products, TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / str(index) for index, name in enumerate(models)}
        for name, model in models.items():
            checkpoint.save(model, folders[name] / "model")
            model.to(device).eval()
        contenders = _prepare(models, folders, settings, device, threads, say)
        measured = _interleave([c for c in contenders if c.not_measured is None], settings, say)
        memory = _memory(contenders, models, folders, settings, device, threads, say) if settings.memory else {}
    return Report(
        reference=reference,
        environment={**environment(device, threads, products), "load_before": load},
        settings=settings.model_dump(mode="json"),
        rows=tuple(_row(contender, reference, measured, memory) for contender in contenders),
    )


@contextmanager
def _computing(threads: int) -> Iterator[str]:
    """Threads, the fastest exact products, and compilation without a limit; says which products these are."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    try:
        with torch._dynamo.config.patch(recompile_limit=MAX_COMPILED):
            yield "oneDNN, exact to 1e-5" if use_fast_cpu_products() else "torch's default"
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


def environment(device: torch.device, threads: int, products: str) -> dict[str, Any]:
    """What the numbers depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    memory = "allocated on the device by torch" if device.type == "cuda" else "peak resident set, libraries included"
    return {
        "device": f"{device.type}: {name}",
        "cores": os.cpu_count(),
        "threads": threads,
        "fp32_products": products,
        "peak_memory": f"{memory}, of a fresh process",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# Contenders


def load_towers(backend: str, directory: Path, device: str, threads: int, largest_batch: int) -> dict[str, Embed]:
    """The towers of a saved model, alone in this process: what peak_memory.py measures."""
    torch.set_num_threads(threads)
    use_fast_cpu_products()
    model = checkpoint.load(directory).to(device)
    return torch_towers(model.bfloat16() if backend == "bf16" else model, largest_batch, compiled=backend == "compiled")


def torch_towers(model: CLIP, largest_batch: int, *, compiled: bool = False) -> dict[str, Embed]:
    """Both towers by torch, where the model is, fed with noise and with texts of full length."""
    image, text, device = model.config.image, model.config.text, model.device
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(largest_batch, 3, image.image_size, image.image_size, generator=generator)
    tokens_BL = torch.randint(text.vocab_size, (largest_batch, text.context_length), generator=generator)

    def embed(tower: nn.Module, inputs: Tensor) -> Embed:
        function = onnx.UnitTower(tower).eval()
        call = torch.compile(function, fullgraph=True) if compiled else function  # fullgraph: or it is an error

        @torch.no_grad()
        def run(batch: int) -> None:
            call(inputs[:batch])
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return run

    pixels = pixels.to(device, next(model.image.parameters()).dtype)
    return {"image": embed(model.image, pixels), "text": embed(model.text, tokens_BL.to(device))}


def _prepare(
    models: Mapping[str, CLIP],
    folders: Mapping[str, Path],
    settings: Benchmark,
    device: torch.device,
    threads: int,
    say: Callable[[str], None],
) -> list[Contender]:
    """Every model in every backend, each having embedded every batch size once."""
    contenders, pairs = [], list(product(settings.backends, models))
    for index, (backend, name) in enumerate(pairs, 1):
        say(f"loading {index} of {len(pairs)}: {name}, {backend}")
        try:
            towers = _towers(backend, models[name], folders[name], device, threads, max(settings.batch_sizes))
            for embed, batch in product(towers.values(), sorted({1, *settings.batch_sizes})):
                embed(batch)
            contenders.append(Contender(name, backend, towers))
        except Exception as error:  # whatever a compiler or a library raises: the row says it
            contenders.append(Contender(name, backend, {}, _reason(error)))
    return contenders


def _towers(
    backend: str, model: CLIP, folder: Path, device: torch.device, threads: int, largest_batch: int
) -> dict[str, Embed]:
    if backend in TORCH_BACKENDS:
        model = deepcopy(model).bfloat16() if backend == "bf16" else model
        return torch_towers(model, largest_batch, compiled=backend == "compiled")
    if device.type != "cpu":
        raise ValueError(
            f"these graphs run on the CPU, the other backends on {device.type}; --device cpu compares them"
        )
    return peak_memory.graphs(_graphs(backend, model, folder), _sizes(model), threads, largest_batch)


def _graphs(backend: str, model: CLIP, folder: Path) -> Path:
    """The directory of a model's graphs, written once."""
    directory = folder / backend
    if not directory.exists():
        if backend == "onnx":
            onnx.to_onnx(model, directory, say=lambda line: None)
        else:
            source = _graphs("onnx", model, folder)
            directory.mkdir()
            onnx.quantise(source, directory)
    return directory


def _sizes(model: CLIP) -> Sizes:
    text = model.config.text
    return Sizes(model.config.image.image_size, text.context_length, text.vocab_size)


def _reason(error: Exception) -> str:
    """What foreign code says, in one line; torch.compile puts the cause on the second."""
    lines = [line.strip() for line in str(error).strip().splitlines()[:2]]
    return " ".join(lines)[:200] or type(error).__name__


# Timing


def _interleave(
    contenders: Sequence[Contender], settings: Benchmark, say: Callable[[str], None]
) -> dict[tuple[str, str], list[Round]]:
    """The rounds of each (model, backend). Every other round goes backwards, so that nobody always follows the same."""
    measured: dict[tuple[str, str], list[Round]] = {(c.model, c.backend): [] for c in contenders}
    for index in range(settings.rounds):
        say(f"timing: round {index + 1} of {settings.rounds}, {len(contenders)} contenders")
        for contender in contenders[:: -1 if index % 2 else 1]:
            measured[contender.model, contender.backend].append(_time(contender, settings))
    return measured


def _time(contender: Contender, settings: Benchmark) -> Round:
    latency_ms, per_s = {}, {}
    for tower, embed in contender.towers.items():
        embed(1)  # the threads of the contender before may still be spinning
        latency_ms[tower] = [1000 * _seconds(embed, 1) for _ in range(settings.latency_calls)]
        per_s[tower] = {batch: _rate(embed, batch, settings.min_seconds) for batch in settings.batch_sizes}
    return Round(latency_ms=latency_ms, per_s=per_s)


def _seconds(embed: Embed, batch: int) -> float:
    started = time.perf_counter()
    embed(batch)
    return time.perf_counter() - started


def _rate(embed: Embed, batch: int, min_seconds: float) -> float:
    """Embeddings per second, over as many calls as `min_seconds` take, at least one."""
    calls, started = 0, time.perf_counter()
    while True:
        embed(batch)
        calls, elapsed = calls + 1, time.perf_counter() - started
        if elapsed >= min_seconds:
            return calls * batch / elapsed


# Memory


def _memory(
    contenders: Sequence[Contender],
    models: Mapping[str, CLIP],
    folders: Mapping[str, Path],
    settings: Benchmark,
    device: torch.device,
    threads: int,
    say: Callable[[str], None],
) -> dict[tuple[str, str], dict[str, float] | str]:
    """Peaks in MB of each contender that runs, or why there are none."""
    running = [contender for contender in contenders if contender.not_measured is None]
    found: dict[tuple[str, str], dict[str, float] | str] = {}
    for index, contender in enumerate(running, 1):
        say(f"memory {index} of {len(running)}: {contender.model}, {contender.backend}")
        folder = folders[contender.model] / (contender.backend if contender.backend in GRAPH_BACKENDS else "model")
        job = {
            "backend": contender.backend,
            "directory": str(folder),
            "device": str(device),
            "threads": threads,
            "batch_sizes": sorted({1, max(settings.batch_sizes)}),
            "sizes": _sizes(models[contender.model]),
        }
        found[contender.model, contender.backend] = _peaks(job)
    return found


def _peaks(job: Mapping[str, Any]) -> dict[str, float] | str:
    command = [sys.executable, "-P", peak_memory.__file__, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return _raised(done.stderr) or f"the process ended with {done.returncode}"
    peaks = json.loads(done.stdout.splitlines()[-1])
    return {"peak_memory_mb": peaks[0] / MB, "peak_memory_largest_batch_mb": peaks[-1] / MB}


def _raised(stderr: str) -> str:
    """The line of a traceback that names the exception: the first one after the frames that is not indented."""
    lines = stderr.rpartition("\n  File ")[2].splitlines()[1:]
    return next((line for line in lines if line.strip() and not line.startswith(" ")), "")[:200]


def _row(
    contender: Contender,
    reference: str,
    measured: Mapping[tuple[str, str], Sequence[Round]],
    memory: Mapping[tuple[str, str], dict[str, float] | str],
) -> Row:
    key = contender.model, contender.backend
    if contender.not_measured is not None:
        return Row(model=key[0], backend=key[1], not_measured=contender.not_measured)
    peaks = memory.get(key, {})
    values = summary(measured[key])
    if (reference, contender.backend) in measured:
        values |= ratios(measured[key], measured[reference, contender.backend])
    return Row(
        model=key[0],
        backend=key[1],
        values=values | (peaks if isinstance(peaks, dict) else {}),
        memory_not_measured=peaks if isinstance(peaks, str) else None,
    )


def to_json(report: Report) -> str:
    return json.dumps(redacted(asdict(report)), indent=2)
