"""Rewrite the generated parts of the pages beside this file and of RESULTS.md, so that they say what the code says.

    python docs/generate.py

A generated part stands between `<!-- generated: KIND ARGUMENTS -->` and `<!-- end -->`; KIND is a name in `PARTS`.
tests/test_docs.py checks that all are current.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tinyclip.data.spec import KEYS
from tinyclip.evaluate import cost
from tinyclip.formats import export, huggingface, open_clip, uniform, zoo
from tinyclip.formats.openai import VOCAB_SIZE
from tinyclip.model import CLIP, BlockConfig, CLIPConfig
from tinyclip.model_resnet import ResNetConfig
from tinyclip.preprocess import Preprocess
from tinyclip.recipes import PRESETS
from tinyclip.shrink.inherit import layer_map
from tinyclip.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
tables = import_module("tables")
PART = re.compile(r"(<!-- generated: (\w+)(.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
BOUNDS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}"}


def fields(where: str) -> Iterator[str]:
    """A table of a settings class, named as module.Class."""
    module, _, name = where.rpartition(".")
    yield from _table("field", "type", "default", "what")
    for field, info in getattr(import_module(module), name).model_fields.items():
        yield _row(f"`{field}`", _type(info.annotation) + _bounds(info), _default(info), info.description or "")


def presets() -> Iterator[str]:
    yield from _table("preset", "what")
    for name, preset in PRESETS.items():
        yield _row(f"`{name}`", (inspect.getdoc(preset) or "").splitlines()[0])


def keys() -> Iterator[str]:
    """Which keys of a data spec go with which kind of data."""
    yield from _table("kind", "keys beside the path")
    for kind, names in KEYS.items():
        yield _row(kind, ", ".join(f"`{name}`" for name in names))


def maps() -> Iterator[str]:
    yield from _table("layers", "`even`", "`leading`", "`official`")
    for before, after in ((12, 9), (12, 6), (9, 6), (6, 3)):
        choices = (layer_map(choice, after, before) for choice in ("even", "leading", "official"))
        yield _row(f"{before} to {after}", *(" ".join(map(str, layers)) for layers in choices))


def outputs() -> Iterator[str]:
    """What each target of `tinyclip export` can hold, tried with tiny students; graphs, slow to write, with one."""
    yield from _table("`--to`", "student", "held", "files")
    students = _students()
    for to in export.TARGETS:
        tried = {"any, a ResNet too": students["a ResNet cut in its blocks"]} if to.startswith("onnx") else students
        for student, config in tried.items():
            yield _row(f"`{to}`", student, *_held(to, config))


def _students() -> dict[str, CLIPConfig]:
    alike = CLIPConfig.uniform(
        embed_dim=8, image_size=32, patch_size=16, image_width=16, image_layers=2, text_width=16, text_layers=1,
        head_dim=8, context_length=77, vocab_size=VOCAB_SIZE,
    )  # fmt: skip
    blocks = (BlockConfig(heads=1, ffn=5), BlockConfig(heads=0, ffn=7))
    differ = alike.model_copy(update={"image": alike.image.model_copy(update={"blocks": blocks})})
    cut = differ.model_copy(update={"image": differ.image.model_copy(update={"width": 15})})
    resnet = ResNetConfig.uniform(image_size=32, width=4, layers=(1, 1, 1, 1), head_dim=32)
    first = (resnet.stages[0][0].model_copy(update={"conv1": 3}),)
    cut_resnet = resnet.model_copy(update={"stages": (first, *resnet.stages[1:])})
    return {
        "blocks alike": alike,
        "blocks that differ": differ,
        "a width that is not whole heads": cut,
        "a stock ResNet": alike.model_copy(update={"image": resnet}),
        "a ResNet cut in its blocks": alike.model_copy(update={"image": cut_resnet}),
    }


def _held(to: str, config: CLIPConfig) -> tuple[str, str]:
    """Whether, and in which files."""
    reader = {"preprocess": Preprocess(size=config.image.image_size), "tokenizer": Tokenizer.openai(77)}
    model = CLIP(config, **reader)
    for answer, form in (("yes", lambda: model), ("with `--pad`", lambda: uniform.pad(model))):
        with TemporaryDirectory() as directory:
            try:
                export.TARGETS[to].write(form(), Path(directory))
            except ValueError:
                continue
            return answer, ", ".join(f"`{path.name}`" for path in sorted(Path(directory).iterdir()))
    return "no", ""


def tolerances() -> Iterator[str]:
    yield from _table(f"largest difference, over {export.NUM_PROBES} pictures with captions", "at most")
    for to, target in export.TARGETS.items():
        limit = f"{target.tolerance:.0e}" if math.isfinite(target.tolerance) else "no limit; it is printed"
        yield _row(f"`{to}`: unit features of images and texts, given the same pixels and captions", limit)
    yield _row("each: logits of every image with every text, divided by the scale", "as its unit features")
    yield _row("pixels, in levels of 255", str(export.PIXEL_TOLERANCE))


def names() -> Iterator[str]:
    """The key tables of the formats, side by side."""
    yield from _table("tinyclip", "open_clip, OpenAI", "transformers")
    for ours, theirs in open_clip.TABLE.items():
        yield _row(*(f"`{name}`" for name in (ours, theirs, huggingface.TABLE[ours])))


def architectures() -> Iterator[str]:
    """The published architectures and what `cost` counts."""
    yield from _table("architecture", "image", "text", "token embedding", "all", "image MACs", "text MACs")
    for name, model_cfg in zoo.ARCHITECTURES.items():
        counts = asdict(cost(open_clip.config_from_open_clip(model_cfg))).values()
        yield _row(f"`{name}`", *(f"{count:,}" for count in counts))


def checkpoints() -> Iterator[str]:
    yield from _table("name", "sizes", "known SHA-256")
    for (architecture, data), sha256 in zoo.CHECKPOINTS.items():
        how = f"from the file, pruned from `{zoo.PRUNED[architecture]}`" if architecture in zoo.PRUNED else "as above"
        yield _row(f"`{zoo.PREFIX}{architecture}-{data}`", how, f"`{sha256}`" if sha256 else "none")


def benchmark(table: str) -> Iterator[str]:
    """A table of what was measured, with the machine."""
    name = table.partition("_")[0]
    yield f"`python benchmarks/{name}.py`. {tables.machine(name)}"
    yield ""
    yield from (_row(*cells) for cells in getattr(tables, table)())


PARTS = {
    part.__name__: part
    for part in (fields, presets, keys, maps, outputs, tolerances, names, architectures, checkpoints, benchmark)
}


def rewrite(page: str) -> str:
    """The page with its generated parts made anew."""

    def part(match: re.Match[str]) -> str:
        return match[1] + "\n".join(PARTS[match[2]](*match[3].split())) + "\n" + match[4]

    return PART.sub(part, page)


def _table(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield _row(*("---" for _ in names))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(map(_type, arguments))
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    return "null" if annotation is type(None) else annotation.__name__


def _bounds(info: FieldInfo) -> str:
    """` > 0`, from the constraints of a field."""
    found = (
        text.format(getattr(constraint, name))
        for constraint in info.metadata
        for name, text in BOUNDS.items()
        if getattr(constraint, name, None) is not None
    )
    return "".join(f", {bound}" for bound in found)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    if isinstance(info.default, BaseModel):
        return "its defaults"
    if isinstance(info.default, tuple) and len(info.default) > 3:
        return f"{len(info.default)} of them"
    if isinstance(info.default, tuple):
        return ", ".join(map(str, info.default)) or "none"
    return "null" if info.default is None else f"{info.default}"


if __name__ == "__main__":
    for path in (*sorted(Path(__file__).parent.glob("*.md")), ROOT / "RESULTS.md"):
        path.write_text(rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")
