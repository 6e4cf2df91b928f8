"""Every option of every command refuses a silly value in one line that names it, before a model is looked for.

The table is over the commands as they are registered: an option that is not in it, and a number without bounds, fail.
"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest

from tinyclip import cli
from tinyclip.formats.export import TARGETS

MODEL = "no/such/model"  # an error that names it comes too late
REST = {  # what each command needs beside the option
    "compress": ["auto_25", "--teacher", MODEL, "--data", "scenes?count=8", "--run", "RUN"],
    "embed": ["auto_25", "--teacher", MODEL, "--data", "scenes?count=8", "--run", "RUN"],
    "train": ["demo_teacher", "--run", "RUN"],
    "evaluate": [MODEL, "--retrieval", "scenes?count=8"],
    "compare": [MODEL, MODEL, "--retrieval", "scenes?count=8"],
    "benchmark": [MODEL],
    "inspect": [MODEL],
    "report": [MODEL],
    "export": [MODEL, "--to", "onnx", "--out", "NEW"],
    "push": [MODEL, "somebody/something"],
    "data check": ["scenes?count=8"],
    "recipes": [],
    "demo": [],
}
FILE = {"FOLDER": "expected a file to write", "FILE/x": "expected a place in a folder"}
NEW = {"FOLDER": "expected a new or empty directory", "FILE": "expected a directory", "FILE/x/y": "expected a place in"}
RUN = {"FILE": "expected a new directory or a run to continue", "FILE/x": "expected a place in a folder"}
DEVICE = {"warp": "cannot be used here", "cpu:x": "cannot be used here"}
SETTING = {
    "seed": "path=value",
    "seed=-1": "greater than or equal to 0",
    "seed=x": "valid integer",
    "sead=1": "unknown",
}
TEMPLATE = {"a photo": "expected templates like"}
SILLY: dict[str, dict[str, str]] = {  # COMMAND --option: {value: what the line says beside the option's name}
    **{f"{command} --run": RUN for command in ("compress", "embed", "train", "demo")},
    **{f"{command} --set": SETTING for command in ("compress", "embed", "train")},
    **{f"{command} --device": DEVICE for command in ("evaluate", "compare", "benchmark")},
    **{f"{command} --out": FILE for command in ("evaluate", "compare", "report")},
    **{f"{command} --template": TEMPLATE for command in ("evaluate", "compare")},
    **{f"{command} --suite": {"cifar": "no such suite"} for command in ("evaluate", "compare")},
    **{f"{command} --data-root": {"nowhere": "no such folder"} for command in ("evaluate", "compare")},
    "benchmark --backends": {"fast": "expected some of eager, bf16", "": "expected some of"},
    "benchmark --batch-sizes": {"0": "at least 1", "8,": "at least 1", "many": "at least 1", "1,-2": "at least 1"},
    "export --to": {"tflite": "expected one of huggingface, open_clip, tinyclip, onnx, onnx-int8, got 'tflite'"},
    "export --out": NEW,
    "push --to": {"onnx": "expected one of huggingface, open_clip, tinyclip, got 'onnx'"},
    "push --dry-run": NEW,
    "data check --out": {"FILE": "expected a directory, got a file", "FILE/x": "expected a place in a folder"},
}
ALSO = {"--suite": ["--data-root", "."], "--data-root": ["--suite", "clip23"], "--template": ["--zeroshot", "scenes"]}
NAMES = {"--teacher", "--data", "--retrieval", "--zeroshot", "--against", "--model"}  # of models and data: other tests


def options() -> Iterator[tuple[str, str, type]]:
    """(command, option, type of its value) of every option that is not a switch."""
    groups = [("", cli.app), *((f"{group.name} ", group.typer_instance) for group in cli.app.registered_groups)]
    for prefix, group in groups:
        for command in group.registered_commands:
            function: Any = command.callback
            hints = get_type_hints(function, include_extras=True)
            for name in inspect.signature(function).parameters:
                assert get_origin(hints[name]) is Annotated, f"{name} of {function.__name__} without a help text"
                kind, info = get_args(hints[name])[:2]
                while get_origin(kind) in (Union, UnionType, list):
                    kind = get_args(kind)[0]
                if type(info).__name__ == "OptionInfo" and kind is not bool:
                    given = [flag for flag in (info.default, *(info.param_decls or [])) if isinstance(flag, str)]
                    flag = given[0] if given else "--" + name.strip("_").replace("_", "-")
                    yield prefix + (command.name or function.__name__), flag, kind


OPTIONS = list(options())
NUMBERS = [(command, flag) for command, flag, kind in OPTIONS if kind in (int, float)]


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """What `tinyclip COMMAND` says on stderr; FILE and FOLDER are there, and nothing else is afterwards."""
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER" / "FILE").touch()
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)

    def run(command: str, *more: str) -> str:
        rest = list(REST[command])
        for flag in more[::2]:
            if flag in rest:
                del rest[rest.index(flag) : rest.index(flag) + 2]
        monkeypatch.setattr(sys, "argv", ["tinyclip", *command.split(), *rest, *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith("tinyclip: error: "), err
        assert {path.name for path in Path().rglob("*")} == {"FOLDER", "FILE"}
        return err

    return run


def test_the_table_has_every_option():
    known = {f"{command} {flag}" for command, flag in NUMBERS} | SILLY.keys()
    assert [
        f"{command} {flag}" for command, flag, _ in OPTIONS if flag not in NAMES and f"{command} {flag}" not in known
    ] == []
    assert SILLY.keys() <= {f"{command} {flag}" for command, flag, _ in OPTIONS}
    assert len(NUMBERS) >= 8 and set(cli.EXPORTS) == set(TARGETS)


@pytest.mark.parametrize("command, flag", NUMBERS)
@pytest.mark.parametrize("value", ["-1000000", "x", "1.5", ""])
def test_a_number_has_bounds(command, flag, value, said):
    line = said(command, flag, value)
    assert f"{flag}: expected a whole number of at least " in line and line.endswith(f", got {value!r}\n")


@pytest.mark.parametrize("command, flag", [pair for pair in NUMBERS if pair[1] == "--workers"])
def test_more_workers_than_any_machine_bears_are_refused(command, flag, said):
    assert "--workers: expected at most 1024, got '1000000000'" in said(command, flag, "1000000000")


@pytest.mark.parametrize("command, flag", [pair for pair in NUMBERS if pair[1] != "--workers"])
def test_nothing_can_be_done_zero_times(command, flag, said):
    assert f"{flag}: expected a whole number of at least 1, got '0'" in said(command, flag, "0")


@pytest.mark.parametrize("option, value", [(option, value) for option, values in SILLY.items() for value in values])
def test_a_silly_value_is_refused_in_one_line_that_names_the_option(option, value, said):
    command, _, flag = option.rpartition(" ")
    line = said(command, flag, value, *ALSO.get(flag, []))
    named = {"--set": value.partition("=")[0], "--data-root": value}.get(flag, flag.strip("-").replace("-", "_"))
    assert flag in line or named in line
    assert SILLY[option][value] in line and MODEL not in line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["evaluate", MODEL, "--retrieval", "scenes", "--template", "a {}"], "--template is for --zeroshot DATA"),
        (["evaluate", MODEL, "--retrieval", "scenes", "--probe"], "--data-root and --probe are for --suite NAME"),
        (["evaluate", MODEL, "--retreival", "scenes"], "No such option: --retreival"),
        (["evaluate"], "Missing argument 'MODEL'"),
        (["evaluat", MODEL], "No such command 'evaluat'"),
        (["export", MODEL, "--to", "onnx"], "Missing option '--out'"),
        (["inspect", MODEL, "two"], "unexpected extra argument"),
    ],
)
def test_a_command_line_that_does_not_parse_is_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tinyclip", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1


def test_help_is_shown_and_is_no_error(monkeypatch, capsys):
    for arguments in (["--help"], ["evaluate", "--help"], [], ["data"]):
        monkeypatch.setattr(sys, "argv", ["tinyclip", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        shown = capsys.readouterr()
        assert stop.value.code in ((0,) if "--help" in arguments else (0, 2))  # which, changes with typer's version
        assert "Usage: " in shown.out + shown.err


def test_a_recipes_templates_are_checked_when_it_is_read(said):
    line = said("compress", "--set", "evaluation.templates=[plain]")
    assert "recipe auto_25: evaluation.templates: zero-shot: expected templates like" in line
