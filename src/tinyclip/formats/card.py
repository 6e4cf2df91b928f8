"""The model card: README.md with the front matter that the Hugging Face hub reads. Facts alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from tinyclip import run
from tinyclip.evaluate.confidence import is_share, with_interval
from tinyclip.evaluate.cost import describe, rows
from tinyclip.evaluate.scores import Evaluation
from tinyclip.formats.files import read_record, validated
from tinyclip.formats.provenance import UNKNOWN, Origin, Provenance, hub_name, public
from tinyclip.formats.uniform import is_uniform
from tinyclip.model import CLIP
from tinyclip.redact import redacted, visible

HUB_LICENSES = {  # identifiers that the hub knows; it takes any other as "other" with a name
    *("mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "unlicense"),
    *("cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0"),
    *("cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
    *("openrail", "odc-by", "unknown"),
}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
LIBRARIES = {"huggingface": "transformers", "open_clip": "open_clip", "tinyclip": "tinyclip"}
LOADING = {
    "huggingface": """from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}"{remote})
processor = AutoProcessor.from_pretrained("{name}"{remote})""",
    "open_clip": """import open_clip

model, preprocess = open_clip.create_model_from_pretrained("hf-hub:{name}")
tokenizer = open_clip.get_tokenizer("hf-hub:{name}")""",
    "tinyclip": """import tinyclip

model = tinyclip.load("hf:{name}")
similarity = model.encode_image(images, normalize=True) @ model.encode_text(captions, normalize=True).T""",
}


class Record(NamedTuple):
    """What was measured in the run of a model. Empty where nothing is known."""

    scores: Mapping[str, float] = MappingProxyType({})
    teacher_scores: Mapping[str, float] = MappingProxyType({})
    data: Mapping[str, str] = MappingProxyType({})  # kind of score: spec of what it was measured on


def record_of(model: str | Path) -> Record:
    """The record of RUN, RUN/model, RUN/STAGE or RUN/STAGE/model; an empty one of any other model."""
    path = Path(model).absolute()
    run_dir = next((place for place in (path, *path.parents[:2]) if (place / "recipe.yaml").is_file()), None)
    if run_dir is None:
        return Record()
    results = {result["name"]: result for result in run.results(run_dir)}
    inside = path.relative_to(run_dir).parts
    name = inside[0] if inside and inside[0] != "model" else next(reversed(results), None)
    if name not in results or inside[1:] not in ((), ("model",)):
        return Record()
    teacher_scores = read_record(run.TeacherRecord, file).scores if (file := run_dir / "teacher.json").is_file() else {}
    recipe = run_dir / "recipe.yaml"
    evaluation = validated(Evaluation, run.read_recipe(recipe).get("evaluation", {}), f"{recipe}: evaluation")
    data = {
        kind: public(spec.public)
        for kind, spec in (("retrieval", evaluation.retrieval), ("zeroshot", evaluation.zeroshot))
        if spec is not None
    }
    return Record(results[name]["scores"], teacher_scores, data)


def card(model: CLIP, name: str, *, to: str, record: Record) -> str:
    """README.md of `model`, in the format `to` of `export`, under its `name` on the hub, USER/NAME."""
    remote = to == "huggingface" and not is_uniform(model.config)
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(model, to, remote), sort_keys=False)}---",
        f"# {plain(name.rpartition('/')[2])}",
        "A CLIP model: it embeds images and texts in one space, where similar ones are close.",
        "## Model",
        "\n".join(_architecture(model)),
        "## Scores",
        "\n".join(_scores(record)),
        "## Where it comes from",
        "\n".join(_origins(model.provenance)),
        "## How to load it",
        f"```python\n{LOADING[to].format(name=name, remote=', trust_remote_code=True' if remote else '')}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(model: CLIP, to: str, remote: bool) -> dict[str, Any]:
    models = [origin for part, origin in _ingredients(model.provenance) if part != "data"]
    found = (base for origin in models if (base := hub_name(origin.name)) is not None and HUB_NAME.fullmatch(base))
    base_model = list(dict.fromkeys(found))
    return {
        **_license(model.provenance),
        "library_name": LIBRARIES[to],
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "tinyclip", *(["custom_code"] if remote else [])],
        **({"base_model": base_model} if base_model else {}),
    }


def _ingredients(provenance: Provenance | None) -> list[tuple[str, Origin]]:
    """The models and the data that went in, now and in earlier compressions."""
    line = provenance.line if provenance is not None else ()
    return [(part, origin) for one in line for part, origin in one.parts.items() if part != "code"]


def _license(provenance: Provenance | None) -> dict[str, str]:
    """That of all ingredients. Where one is unknown so is the whole; where they differ all are named."""
    licenses = {origin.license for _, origin in _ingredients(provenance)} or {UNKNOWN}
    if UNKNOWN in licenses:
        return {"license": UNKNOWN}
    name = ", ".join(sorted(licenses))
    if name in HUB_LICENSES:
        return {"license": name}
    return {"license": "other", "license_name": visible(redacted(name))}


def _architecture(model: CLIP) -> Iterator[str]:
    facts: dict[str, Any] = describe(model.config)
    yield from _table("", "image", "text")
    for row in rows(model.config):
        yield _row(*row)
    total, embedding = facts["parameters"], facts["token_embedding_parameters"]
    yield f"\n{total:,} parameters in all, {total - embedding:,} without the token embedding;"
    yield f"vocabulary {facts['vocab_size']:,}, embedding {facts['embed_dim']}, {facts['activation']};"
    yield f"{facts['size_mb']:.1f} MB in fp32."


def _scores(record: Record) -> Iterator[str]:
    if not record.scores:
        yield "Unknown: nothing that was measured came with the model."
        return
    for kind, data in record.data.items():
        yield f"{plain(kind)} on {code(data)}  "
    yield ""
    compared = bool(record.teacher_scores)
    yield from _table("score", "model", *(["teacher", "share kept"] if compared else []))
    teacher_shown = dict(with_interval(record.teacher_scores))
    for name, shown in with_interval(record.scores):
        value, teacher, beside = record.scores[name], record.teacher_scores.get(name), [UNKNOWN, UNKNOWN]
        if not isinstance(value, float):
            beside = ["", ""]
        elif teacher:
            beside = [teacher_shown[name], f"{value / teacher:.1%}" if is_share(name) else ""]
        yield _row(name, shown, *(beside if compared else []))


def _origins(provenance: Provenance | None) -> Iterator[str]:
    """The ledger: of every compression, the oldest first, what went in and under which licence."""
    if provenance is None:
        yield "Unknown: the model does not say what it was made from, nor under which licences."
        return
    for number, one in enumerate(provenance.line, 1):
        if number > 1:
            yield "\nand then\n"
        yield f"Recipe: {code(one.recipe) if one.recipe else UNKNOWN}\n"
        yield from _table("", "what", "licence")
        for part, origin in one.parts.items():
            remark = f" ({origin.restriction})" if origin.restriction else ""
            yield f"| {part} | {code(origin.name, in_table=True)} | {plain(origin.license + remark)} |"


def _table(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield _row(*("---" for _ in names))


def _row(*cells: str) -> str:
    return f"| {' | '.join(map(plain, cells))} |"


def plain(text: str) -> str:
    """Text of others as it is, in Markdown that GitHub and the hub show: no markup, no HTML, one line, no secrets."""
    text = visible(redacted(text))
    return re.sub(r"[\\`*\[\]<>|~&$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)


def code(text: str, *, in_table: bool = False) -> str:
    """Text of others as code. A table's cell ends at a bar even there, unless it is escaped."""
    text = visible(redacted(text))
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " * (text.startswith("`") or text.endswith("`"))
    return f"{fence}{space}{text.replace('|', chr(92) + '|') if in_table else text}{space}{fence}"
