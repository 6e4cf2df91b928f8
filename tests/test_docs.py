"""What the pages say is so: commands and Python run (with tiny stand-ins), tables are current, links lead somewhere."""

import importlib.util
import io
import json
import re
import shlex
import tarfile
import tracemalloc
from pathlib import Path
from zipfile import ZipFile

import open_clip
import pytest
import torch
import transformers.dynamic_module_utils
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

import tinyclip.recipes
from tinyclip.cli import app
from tinyclip.data.scenes import Scenes
from tinyclip.data.sources import open_source
from tinyclip.distill.affinity import affinity_loss_reference
from tinyclip.distill.teacher import load_teacher
from tinyclip.evaluate import cost
from tinyclip.formats import huggingface, zoo
from tinyclip.formats.export import export
from tinyclip.formats.open_clip import config_from_open_clip, config_to_open_clip, to_open_clip
from tinyclip.model import CLIP, CLIPConfig, initialise
from tinyclip.preprocess import Preprocess
from tinyclip.recipe import Recipe
from tinyclip.recipes import _models
from tinyclip.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
STORY = [README, DOCS / "recipes.md", *(page for page in PAGES if page.parent == DOCS and page.name != "recipes.md")]
STAND_INS = {
    "open_clip:ViT-B-32/laion2b_s34b_b79k": "local-dir:teacher",
    "open_clip:convnext_base_w/laion2b_s13b_b82k": "local-dir:teacher",
    "{00000..00331}": "{00000..00001}",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines() if line]


def tiny(recipe: Recipe) -> Recipe:
    """A step per phase, few pictures, on the CPU: what is left to see is that the command fits the program."""

    def phase(config):
        changes = {"steps": 1, "epochs": None, "batch_size": 8, "warmup_steps": 0, "precision": "fp32"}
        return config and config.model_copy(update=changes)

    def few(spec):
        return spec.model_copy(update={"count": 32}) if spec and spec.kind == "scenes" else spec

    stages = (
        stage.model_copy(update={"while_masking": phase(stage.while_masking), "distill": phase(stage.distill)})
        for stage in recipe.stages
    )
    tests = {name: few(getattr(recipe.evaluation, name)) for name in ("retrieval", "zeroshot")}
    evaluation = recipe.evaluation.model_copy(update={**tests, "templates": ("a {}.",)})
    return recipe.model_copy(
        update={
            "stages": tuple(stages),
            "data": recipe.data.model_copy(update={"workers": 0, "train": few(recipe.data.train)}),
            "evaluation": evaluation,
            "device": "cpu",
        }
    )


def write_teacher(directory: Path) -> None:
    tower = {"width": 16, "layers": 2}
    config = {
        "embed_dim": 8,
        "vision_cfg": {**tower, "image_size": 32, "head_width": 8, "patch_size": 16},
        "text_cfg": {**tower, "context_length": 77, "vocab_size": 49408, "heads": 2},
    }
    directory.mkdir()
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(open_clip.CLIP(**config).state_dict(), directory / "open_clip_model.safetensors")


def write_pictures(folder: Path) -> None:
    """Shards as img2dataset writes them, two tables with zipped images, and a photograph."""
    scenes = Scenes("classes", 32)
    pictures = [io.BytesIO() for _ in range(32)]
    for index, picture in enumerate(pictures):
        scenes.image(index).save(picture, "JPEG")
    (folder / "photo.jpg").write_bytes(pictures[0].getvalue())
    (folder / "cc3m").mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"cc3m/{shard:05d}.tar", "w") as archive:
            for index in range(shard, 32, 2):
                caption = scenes.captions(index)[0]
                add(archive, f"{index:09d}.jpg", pictures[index].getvalue())
                add(archive, f"{index:09d}.txt", caption.encode())
                add(archive, f"{index:09d}.json", json.dumps({"caption": caption, "status": "success"}).encode())
    captions = [f"{index}.jpg\t{scenes.captions(index)[0]}\ttest" for index in range(32)]
    classes = [f"{index}.jpg\t{(scenes.label(index) or ('',))[0]}" for index in range(32)]
    for name, header, rows, images in (
        ("flickr30k/captions.tsv", "file\tcaption\tsplit", captions, "images.zip"),
        ("imagenet/val.tsv", "file\tclass", classes, "val.zip"),
    ):
        table = folder / name
        table.parent.mkdir()
        table.write_text("\n".join([header, *rows]))
        with ZipFile(table.with_name(images), "w") as archive:
            for index, picture in enumerate(pictures):
                archive.writestr(f"{index}.jpg", picture.getvalue())


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def test_what_the_pages_show_runs_in_reading_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_teacher(tmp_path / "teacher")
    write_pictures(tmp_path)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    load_recipe = tinyclip.recipes.load_recipe
    monkeypatch.setattr(tinyclip.recipes, "load_recipe", lambda *args, **kwargs: tiny(load_recipe(*args, **kwargs)))
    for page in STORY:
        for command in commands(page):
            for real, stand_in in STAND_INS.items():
                command = command.replace(real, stand_in)
            program, *arguments = shlex.split(re.sub(r"count=\d+", "count=64", command))
            assert program == "tinyclip", f"{page.name}: {command}"
            assert not app(arguments, standalone_mode=False), f"{page.name}: {command}"
        code = "\n".join(blocks(page, "python"))
        exec(compile(code, str(page), "exec"), {"__name__": page.stem})
    assert (
        tinyclip.load("runs/b32-25").config.prunable_params
        < tinyclip.load("runs/b32-25/0-auto-75").config.prunable_params
    )


def test_the_definition_on_the_page_is_the_one_in_the_code():
    names: dict = {}
    exec("\n".join(blocks(DOCS / "affinity.md", "python")), names)
    unit = [torch.nn.functional.normalize(torch.randn(5, size), dim=-1) for size in (4, 4, 6, 6)]
    arguments = (*unit[:2], 20.0, *unit[2:], 50.0)
    torch.testing.assert_close(names["affinity_loss"](*arguments), affinity_loss_reference(*arguments))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_tables_are_current(page):
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    text = page.read_text(encoding="utf-8")
    assert generate.rewrite(text) == text, "run: python docs/generate.py"


def test_every_input_goes_where_the_table_says(tmp_path, monkeypatch):
    """A tiny model in each form: the commands take it as a teacher, `tinyclip.load` takes it alone, or they refuse."""
    config = CLIPConfig.uniform(
        embed_dim=8, image_size=32, patch_size=16, image_width=64, image_layers=1, text_width=64, text_layers=1,
        context_length=77, vocab_size=49408, activation="quick_gelu",
    )  # fmt: skip
    model = initialise(CLIP(config), torch.Generator().manual_seed(0))
    model.preprocess, model.tokenizer = Preprocess(size=32), Tokenizer.openai(77)
    for to in ("tinyclip", "huggingface", "open_clip"):
        export(model, tmp_path / to, to=to, verify=False, say=lambda line: None)
    state = to_open_clip(model)
    save_file(state, tmp_path / "plain.safetensors")
    sizes = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    torch.save({**state, **{name: torch.tensor(size) for name, size in sizes.items()}}, tmp_path / "openai.pt")
    released = {f"_image_encoder.module.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": released}, tmp_path / "TinyCLIP-ViT-39M-16-Text-19M-YFCC15M.pt")
    monkeypatch.setenv("TINYCLIP_CACHE", str(tmp_path))
    monkeypatch.setitem(zoo.ARCHITECTURES, "ViT-39M-16-Text-19M", config_to_open_clip(config))
    monkeypatch.setattr(huggingface, "fetch", lambda name: tmp_path / "huggingface")
    forms = {
        "runs/b32-25": tmp_path / "tinyclip",
        "DIRECTORY": tmp_path / "huggingface",
        "hf:ORGANISATION/NAME": "hf:ORGANISATION/NAME",
        "tinyclip:ARCHITECTURE-DATA": "tinyclip:ViT-39M-16-Text-19M-YFCC15M",
        "tinyclip:ARCHITECTURE/FILE": f"tinyclip:ViT-39M-16-Text-19M/{tmp_path}/plain.safetensors",
        "ViT-B-32.pt": tmp_path / "openai.pt",
        "weights.safetensors": tmp_path / "plain.safetensors",
        "local-dir:DIRECTORY": f"local-dir:{tmp_path}/open_clip",
        "hf-hub:ORGANISATION/MODEL": f"local-dir:{tmp_path}/open_clip",  # open_clip reads all three
        "open_clip:ARCHITECTURE/TAG": f"local-dir:{tmp_path}/open_clip",
    }

    def is_read(read, form) -> bool:
        try:
            found = read(str(form))
        except (ValueError, FileNotFoundError):
            return False
        return torch.equal(getattr(found, "model", found).logit_scale, model.logit_scale)

    table = (DOCS / "formats.md").read_text(encoding="utf-8").partition("## What goes out")[0]
    rows = re.findall(r"^\| `(\S+)` \| .* \| (yes|no) \| (yes|no) \|$", table, re.MULTILINE)
    assert rows == [
        (name, *("yes" if is_read(read, forms[name]) else "no" for read in (load_teacher, tinyclip.load)))
        for name, *_ in rows
    ]
    assert forms.keys() == {name for name, *_ in rows}
    assert tinyclip.load(tmp_path / "plain.safetensors", config=config).config == config


def test_every_setting_of_a_recipe_stands_in_a_table():
    shown = set(re.findall(r"<!-- generated: fields \S+\.(\w+) -->", "".join(page.read_text() for page in PAGES)))
    assert {model.__name__ for model in models_in(Recipe)} <= shown


def models_in(model: type[BaseModel], seen: frozenset[type[BaseModel]] = frozenset()) -> set[type[BaseModel]]:
    inside = {found for field in model.model_fields.values() for found in _models(field.annotation)}
    return {model}.union(*(models_in(found, seen | {model}) for found in inside - seen - {model}))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_pages_sections_and_files(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, section = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.is_file(), f"{page.name}: {target}"
        titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not section or section in {title.lower().replace(" ", "-") for title in titles}, target
    for target in re.findall(r"`((?:tests|benchmarks|examples|docs)/[\w/]+\.\w+)`", text):
        assert (ROOT / target).is_file(), f"{page.name}: {target}"


def test_the_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", README.read_text(encoding="utf-8")))
    assert linked == {f"docs/{page.name}" for page in DOCS.glob("*.md")}


def test_parameters_that_the_readme_quotes():
    config = config_from_open_clip(open_clip.get_model_config("ViT-B-32") or {})
    total, prunable = cost(config).parameters / 1e6, config.prunable_params / 1e6
    assert f"ViT-B/32's {total:.1f} M parameters, {prunable:.1f} M" in README.read_text(encoding="utf-8")


def test_memory_of_the_shard_index(tmp_path):
    with tarfile.open(tmp_path / "many.tar", "w") as archive:
        for index in range(1000):
            for extension in ("jpg", "txt", "json"):
                add(archive, f"{index:09d}.{extension}", b'{"caption": "a"}'.ljust(300))
    tracemalloc.start()
    try:
        source = open_source(str(tmp_path / "many.tar"))
        bytes_per_sample = tracemalloc.get_traced_memory()[0] / len(source)
    finally:
        tracemalloc.stop()
    assert 100 < bytes_per_sample < 300  # what README.md says, and docs/data.md


def test_how_far_the_official_cut_is_from_its_masked_model(shared):
    golden = load_file(shared / "golden" / "auto_expected.safetensors")
    errors = []
    for tower in ("image", "text"):
        masked, pruned = (golden[f"{kind}/float64/{tower}_features"] for kind in ("masked", "pruned"))
        errors.append(((masked - pruned).abs().max() / masked.abs().max()).item())
    assert f"{100 * min(errors):.0f} to {100 * max(errors):.0f} %" in (DOCS / "inheritance.md").read_text(
        encoding="utf-8"
    )
