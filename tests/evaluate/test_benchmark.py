"""The numbers follow from the rounds (by eye), contenders take turns, every backend runs, what cannot run says why."""

import io
import json
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import tinyclip
from tests.formats.test_export import IRREGULAR, UNIFORM, toy
from tinyclip.cli import app
from tinyclip.evaluate import benchmark as benchmark_module
from tinyclip.evaluate import peak_memory
from tinyclip.evaluate.benchmark import BACKENDS, Benchmark, Contender, Report, Row, benchmark, to_json
from tinyclip.evaluate.benchmark_table import tables
from tinyclip.evaluate.timings import Round, best_batch, pairs_per_s, percentile, ratios, summary
from tinyclip.model import CLIP

FAST = {"rounds": 2, "latency_calls": 2, "min_seconds": 0, "batch_sizes": (1, 3), "memory": False, "device": "cpu"}


def one_round(image_ms, text_ms, image_per_s, text_per_s) -> Round:
    return Round(
        latency_ms={"image": image_ms, "text": text_ms},
        per_s={
            "image": dict(zip((1, 8), image_per_s, strict=True)),
            "text": dict(zip((1, 8), text_per_s, strict=True)),
        },
    )


STUDENT = [
    one_round([1, 2, 3], [1, 1, 1], (400, 600), (1000, 300)),
    one_round([4, 4, 4], [2, 2, 2], (200, 300), (600, 150)),  # a machine that slowed down
    one_round([2, 2, 2], [1, 1, 1], (500, 500), (1000, 900)),
]
TEACHER = [
    one_round([10, 10, 10], [4, 4, 4], (100, 60), (250, 240)),
    one_round([20, 20, 20], [8, 8, 8], (50, 30), (150, 100)),
    one_round([10, 10, 10], [3, 3, 3], (100, 60), (200, 100)),
]


def test_latencies_are_percentiles_over_all_calls():
    values = summary(STUDENT)
    assert values["image_latency_p50_ms"] == 2  # of 1 2 2 2 2 3 4 4 4
    assert values["text_latency_p95_ms"] == 2
    assert percentile([1, 2, 3, 4, 5], 95) == pytest.approx(4.8)
    assert percentile([7], 95) == 7


def test_throughput_is_the_median_at_the_best_batch_size():
    values = summary(STUDENT)
    assert (values["image_batch"], values["text_batch"]) == (8, 1)
    assert [values[f"image_per_s{end}"] for end in ("", "_low", "_high")] == [500, 300, 600]
    assert best_batch(TEACHER, "image") == 1


def test_a_pair_takes_as_long_as_an_image_and_a_text():
    assert pairs_per_s(600, 300) == pytest.approx(200)
    assert summary(STUDENT)["pairs_per_s"] == pytest.approx(1 / (1 / 500 + 1 / 1000))
    assert summary(STUDENT)["pairs_per_s_low"] == pytest.approx(200)  # 300 images and 600 texts


def test_ratios_are_within_a_round_so_that_a_slow_machine_cancels():
    values = ratios(STUDENT, TEACHER)
    assert [values[f"image_per_s_ratio{end}"] for end in ("", "_low", "_high")] == [6, 5, 6]
    assert [values[f"image_latency_ratio{end}"] for end in ("", "_low", "_high")] == [5, 5, 5]
    assert [values[f"text_latency_ratio{end}"] for end in ("", "_low", "_high")] == [4, 3, 4]
    assert all(value == 1 for value in ratios(TEACHER, TEACHER).values())


def test_contenders_take_turns_and_every_other_round_goes_backwards():
    order = []

    def contender(name):
        def embed(batch):
            if not order or order[-1] != name:
                order.append(name)

        return Contender(name, "eager", {"image": embed, "text": embed})

    settings = Benchmark(**{**FAST, "rounds": 3})
    measured = benchmark_module._interleave([contender(name) for name in "abc"], settings, lambda line: None)
    assert "".join(order) == "abcbabc"  # abc, cba, abc
    assert all(len(rounds) == 3 for rounds in measured.values())


@pytest.fixture(scope="module")
def report() -> Report:
    bare = CLIP(UNIFORM)
    bare.load_state_dict(toy(UNIFORM).state_dict())  # no preprocessing, no tokenizer
    backends = ("eager", "bf16", "onnx", "int8")
    settings = Benchmark(**FAST, backends=backends)
    return benchmark({"odd": toy(IRREGULAR), "bare": bare}, settings, reference="bare", say=lambda line: None)


def test_every_model_is_measured_in_every_backend(report):
    assert [(row.backend, row.model) for row in report.rows] == [
        (backend, model) for backend in ("eager", "bf16", "onnx", "int8") for model in ("odd", "bare")
    ]
    for row in report.rows:
        assert row.not_measured is None and all(value > 0 for value in row.values.values())
        v = row.values
        assert v["image_latency_p50_ms"] <= v["image_latency_p95_ms"]
        assert v["pairs_per_s_ratio_low"] <= v["pairs_per_s_ratio"] <= v["pairs_per_s_ratio_high"]
        assert row.model != "bare" or v["pairs_per_s_ratio"] == v["text_latency_ratio"] == 1


def test_the_report_says_what_the_numbers_depend_on_and_is_json(report):
    read = json.loads(to_json(report))
    place = read["environment"]
    assert place["threads"] == torch.get_num_threads() and torch.__version__.startswith(place["versions"]["torch"])
    assert place["device"].startswith("cpu: ") and "fresh process" in place["peak_memory"]
    assert read["settings"]["batch_sizes"] == [1, 3] and len(read["rows"]) == 8


def test_the_table_is_readable_at_100_columns():
    large = {name: 12345.6 for name in summary(STUDENT) | ratios(STUDENT, TEACHER)}
    large |= {name: 128.25 for name in large if "latency" in name}
    large |= {name: 11.27 for name in large if "ratio" in name} | {"image_batch": 32, "text_batch": 32}
    large |= {"peak_memory_mb": 1866.1, "peak_memory_largest_batch_mb": 3244.0}
    rows = (
        Row(model="open_clip:ViT-B-16/laion2b_s34b_b88k", backend="eager", values=large),
        Row(model="runs/student/model", backend="eager", values=large),
        Row(model="runs/student/model", backend="compiled", not_measured="no C++ compiler"),
        Row(model="runs/student/model", backend="onnx", values=large, memory_not_measured="the process ended with 9"),
    )
    place = benchmark_module.environment(torch.device("cpu"), 2, "torch's default") | {"load_before": 99.0}
    settings = Benchmark(batch_sizes=(1, 32)).model_dump(mode="json")
    console = Console(width=100, record=True, file=io.StringIO())
    for part in tables(Report(reference=rows[0].model, environment=place, settings=settings, rows=rows)):
        console.print(part, highlight=False)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text
    assert "x 11.3" in text and "11.3-11.3" in text and "12346 at 32" in text and "1866" in text and "3244" in text
    assert "runs/student/model, compiled: not measured: no C++ compiler" in " ".join(text.split())
    assert "memory not measured: the process ended with 9" in text and "not a quiet measurement" in text


def test_a_contender_that_fails_has_a_row_that_says_why(monkeypatch):
    def broken(function, **settings):
        raise RuntimeError("backend='inductor' raised:\nno C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    settings = Benchmark(**FAST, backends=("compiled", "eager"))
    found = benchmark({"a": toy(UNIFORM)}, settings, say=lambda line: None)
    assert [row.not_measured for row in found.rows] == ["backend='inductor' raised: no C++ compiler", None]
    assert not found.rows[0].values


def test_without_onnxruntime_its_rows_name_the_extra(monkeypatch):
    monkeypatch.setattr(benchmark_module.onnx, "find_spec", lambda name: None)
    found = benchmark({"a": toy(UNIFORM)}, Benchmark(**FAST, backends=("int8",)), say=lambda line: None)
    assert "pip install 'tinyclip[onnx]'" in found.rows[0].not_measured


def test_threads_and_products_are_put_back_as_they_were():
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    found = benchmark({"a": toy(UNIFORM)}, Benchmark(**FAST, backends=("eager",), threads=2), say=lambda line: None)
    assert found.environment["threads"] == 2
    assert before == (torch.get_num_threads(), torch.get_float32_matmul_precision())


@pytest.mark.parametrize("backend", ["eager", "onnx"])
def test_peak_memory_is_that_of_a_process_of_its_own(backend, tmp_path):
    from tinyclip.formats.onnx import to_onnx

    model = toy(UNIFORM)
    tinyclip.save(model, tmp_path / "eager")
    to_onnx(model, tmp_path / "onnx", say=lambda line: None)
    job = {"backend": backend, "directory": str(tmp_path / backend), "device": "cpu", "threads": 1}
    job |= {"batch_sizes": [1, 4000], "sizes": benchmark_module._sizes(model)}
    ballast = bytearray(1_500_000_000)  # untouched pages are not resident: touch them
    ballast[::4096] = bytes([1]) * len(ballast[::4096])
    peaks = benchmark_module._peaks(job)
    pixels_mb = 4000 * 3 * 23 * 23 * 4 / 1e6
    assert pixels_mb < peaks["peak_memory_mb"] < 1200  # not the 1500 MB of the process that started it
    assert peaks["peak_memory_largest_batch_mb"] > peaks["peak_memory_mb"]


def test_the_graphs_are_measured_without_torch(tmp_path):
    code = "import sys; sys.modules['torch'] = sys.modules['tinyclip'] = None; sys.argv = sys.argv[1:]; "
    code += "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    from tinyclip.formats.onnx import to_onnx

    model = toy(UNIFORM)
    directory = to_onnx(model, tmp_path / "onnx", say=lambda line: None)
    job = {"backend": "onnx", "directory": str(directory), "device": "cpu", "threads": 1, "batch_sizes": [1, 2]}
    job = json.dumps(job | {"sizes": benchmark_module._sizes(model)})
    done = subprocess.run([sys.executable, "-c", code, peak_memory.__file__, job], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(low <= high for low, high in pairwise(json.loads(done.stdout)))


def test_a_process_that_dies_is_a_reason_and_no_number():
    assert "FileNotFoundError" in benchmark_module._peaks(
        {
            "backend": "eager",
            "directory": "/nowhere",
            "device": "cpu",
            "threads": 1,
            "batch_sizes": [1],
            "sizes": [1] * 3,
        }
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--backends", "eager,tensorrt"], f"backends: expected some of {', '.join(BACKENDS)}, got tensorrt"),
        (["--batch-sizes", "8,0"], "--batch-sizes: expected numbers of at least 1 with commas"),
        (["--batch-sizes", "eight"], "--batch-sizes: expected numbers of at least 1 with commas"),
        (["--device", "abacus"], "device: 'abacus' cannot be used here"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path):
    tinyclip.save(toy(UNIFORM), tmp_path / "model")
    done = CliRunner().invoke(app, ["benchmark", str(tmp_path / "model"), *arguments])
    assert isinstance(done.exception, ValueError) and message in str(done.exception)
    assert "\n" not in str(done.exception).split(" (")[0]


def test_an_unknown_reference_is_refused():
    with pytest.raises(ValueError, match="expected a reference among a, got b"):
        benchmark({"a": toy(UNIFORM)}, reference="b")


def test_the_command_measures_against_a_teacher(tmp_path):
    for name, config in (("teacher", UNIFORM), ("student", IRREGULAR)):
        tinyclip.save(toy(config), tmp_path / name)
    teacher, student = str(tmp_path / "teacher"), str(tmp_path / "student")
    command = ["benchmark", student, "--against", teacher, "--quick", "--backends", "eager", "--batch-sizes", "2,1"]
    done = CliRunner().invoke(app, [*command, "--rounds", "2", "--json"], catch_exceptions=False)
    report = json.loads(done.stdout)
    assert report["reference"] == teacher and [row["model"] for row in report["rows"]] == [teacher, student]
    assert report["settings"]["rounds"] == 2 and report["settings"]["latency_calls"] == 3  # --quick's
    assert report["rows"][1]["values"]["peak_memory_mb"] > 50
    assert "loading 2 of 2" in done.stderr and "timing: round 1 of 2" in done.stderr and "memory 1 of 2" in done.stderr
    done = CliRunner().invoke(app, [*command, "--no-memory"], env={"COLUMNS": "100"}, catch_exceptions=False)
    assert "eager" in done.stdout and "times as fast as" in done.stdout
