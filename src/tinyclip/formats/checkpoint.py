"""Our own format: a directory that describes itself.

    config.json         {"format": "tinyclip", "version": 1, "model": CLIPConfig, "provenance": Provenance (where it
                        knows), and what the writer adds}
    model.safetensors   the weights, under the names of model.py
    preprocess.json     how it reads pictures (where it knows; for transformers preprocessor_config.json says it)
    tokenizer.json      how it reads captions (where it knows); Hugging Face `tokenizers`
    digests.json        the sha256 of each of these, where a run wrote them: `load` tells when one is damaged

`load` also reads directories of Hugging Face and open_clip, single checkpoint files in our names or in those of OpenAI,
open_clip or TinyCLIP's releases, and published models by their names.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tinyclip.config import changes
from tinyclip.formats import huggingface, open_clip, weights, zoo
from tinyclip.formats.files import (
    M,
    check_digests,
    is_there,
    read_json,
    validated,
    whole,
    write_digests,
    write_json,
)
from tinyclip.formats.open_clip import config_from_open_clip, from_open_clip, has_their_names
from tinyclip.formats.openai import from_openai, is_openai
from tinyclip.formats.provenance import entry, read_provenance
from tinyclip.formats.release import from_release, is_release
from tinyclip.model import CLIP, CLIPConfig
from tinyclip.preprocess import Preprocess
from tinyclip.tokenizer import Tokenizer

FORMAT, VERSION = "tinyclip", 1
PREFIXES = (zoo.PREFIX, huggingface.HUB, *open_clip.PREFIXES)


def save(model: CLIP, directory: str | Path, *, extra: Mapping[str, Any] | None = None, digests: bool = False) -> Path:
    """Write a model directory and return it; `extra` goes into config.json and must be plain JSON.

    With `digests` it also gets a digests.json.

    It is written beside its place and then renamed, so that it is never half-written. A model that is there is
    replaced; raises FileExistsError where something else is.
    """
    directory = Path(directory).absolute()
    if directory.exists() and not _is_model(directory) and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(f"{directory}: expected a model to replace or nothing, found something else")
    with whole(directory) as unfinished:
        write(model, unfinished, extra or {})
        if digests:
            write_digests(unfinished, sorted(path.name for path in unfinished.iterdir()))
    return directory


def load(
    path: str | Path,
    *,
    config: CLIPConfig | Mapping[str, Any] | str | Path | None = None,
    device: str | torch.device = "cpu",
) -> CLIP:
    """A model in evaluation mode, its weights in fp32, from one of

    - a model directory, or a run's or stage's directory that holds one as model/;
    - a directory of Hugging Face transformers' CLIPModel, or hf:ORGANISATION/NAME for one on the hub;
    - a directory that open_clip reads as local-dir:;
    - a .safetensors, .pt, .pth or .bin file, in our names or in those of OpenAI, open_clip or TinyCLIP's releases. It
      needs `config`, or is one of OpenAI's own: a CLIPConfig, or our config.json or an open_clip model config, each as
      a mapping or the path of a JSON file;
    - the name of a published model, tinyclip:ViT-39M-16-Text-19M-YFCC15M: formats/zoo.py.

    A name without its prefix is never guessed, but the error says how it may be spelt. Raises FileNotFoundError, or
    ValueError for what is damaged or does not fit; nothing is allocated before.
    """
    if str(path).startswith(zoo.PREFIX):
        if config is not None:
            raise ValueError(f"{path}: a published model has its own config, expected no other")
        return zoo.load(str(path), device=device)
    name = str(path)
    path = huggingface.fetch(path) if name.startswith(huggingface.HUB) else Path(path)
    if path.is_dir():
        if config is not None:
            raise ValueError(f"{path}: a model directory has its own config, expected no other")
        return _load_directory(path, device)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a model directory or a checkpoint file, found nothing{_meant(name)}")
    return _load_weights(path, None if config is None else _as_config(config), device)


def _meant(name: str) -> str:
    """ "; did you mean ...?" for a name that is no path; empty where nothing is close. Asks no network."""
    path = Path(name)
    if name.startswith(open_clip.PREFIXES):
        return "; a name of open_clip's is for a teacher (tinyclip.distill.teacher.load_teacher)"
    there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    found = [str(path.parent / one) for one in difflib.get_close_matches(path.name, there, n=2, cutoff=0.8)]
    prefix, colon, rest = name.partition(":")
    prefixes = difflib.get_close_matches(prefix.lower() + ":", PREFIXES, n=1, cutoff=0.6)
    if colon and rest and prefixes and "/" not in prefix:
        found.append(prefixes[0] + rest)
    elif not path.parent.is_dir() or "/" not in name:  # no mistyped path
        found += [*zoo.meant(name), *open_clip.meant(name)] or huggingface.meant(name)
    return f"; did you mean {', '.join(found[:-1])}{' or ' if found[1:] else ''}{found[-1]}?" if found else ""


def _is_model(directory: Path) -> bool:
    return (directory / "config.json").is_file() and (directory / "model.safetensors").is_file()


def write(model: CLIP, directory: Path, extra: Mapping[str, Any]) -> None:
    """The files of a model, into a directory that is there."""
    settings = {"format": FORMAT, "version": VERSION, "model": model.config.model_dump(mode="json")}
    settings |= entry(model.provenance)
    assert not settings.keys() & extra.keys(), f"extra: {', '.join(settings)} are ours, got {', '.join(extra)}"
    write_json(directory / "config.json", {**settings, **extra})
    weights.write(model.state_dict(), directory / "model.safetensors")
    if model.preprocess is not None:
        (directory / "preprocess.json").write_text(model.preprocess.model_dump_json(indent=2), encoding="utf-8")
    if model.tokenizer is not None:
        model.tokenizer.save(directory / "tokenizer.json")


def _load_directory(path: Path, device: str | torch.device) -> CLIP:
    if open_clip.is_theirs(path):
        return open_clip.from_open_clip_dir(path, device)
    directory = path if is_there(path / "config.json") else huggingface.clip_module(path) or path / "model"
    if not is_there(directory / "config.json"):
        raise FileNotFoundError(f"{path}: expected a model (config.json) or a run (model/config.json), found neither")
    settings = read_json(directory / "config.json")
    if huggingface.is_theirs(settings):
        model = huggingface.from_huggingface_dir(directory, device)
    elif "model_type" in settings:  # with code for transformers, and perhaps saved by it since
        model = _load_ours_for_transformers(directory, device)
    else:
        model = _load_ours(directory, device)
    check_digests(directory)
    model.provenance = read_provenance(settings, str(directory / "config.json"))
    return model


def _load_ours(directory: Path, device: str | torch.device) -> CLIP:
    model = _load_weights(directory / "model.safetensors", _as_config(directory / "config.json"), device)
    image, text = model.config.image, model.config.text
    if is_there(file := directory / "preprocess.json"):
        model.preprocess = _complete(Preprocess, read_json(file), str(file))
        if model.preprocess.size != image.image_size:
            raise ValueError(f"{file}: expected size {image.image_size}, got {model.preprocess.size}")
    if is_there(file := directory / "tokenizer.json"):
        model.tokenizer = tokenizer = Tokenizer.load(file)
        expected, got = (text.vocab_size, text.context_length), (tokenizer.vocab_size, tokenizer.context_length)
        if expected != got:
            raise ValueError(f"{file}: expected vocabulary and context length {expected}, got {got}")
    return model


def _load_ours_for_transformers(directory: Path, device: str | torch.device) -> CLIP:
    """Weights in our names; pictures and captions are read as transformers reads them with this directory."""
    config = _as_config(directory / "config.json")
    state, where = huggingface.read_weights(directory, config)
    model = _fill(state, config, str(where), device)
    model.preprocess = huggingface.read_preprocess(directory, config.image.image_size)
    model.tokenizer = huggingface.read_tokenizer(directory, config.text)
    if is_there(file := directory / "preprocess.json"):  # former exports have it too
        ours = _complete(Preprocess, read_json(file), str(file))
        if model.preprocess not in (None, ours):
            changed = changes(ours.model_dump(mode="json"), model.preprocess.model_dump(mode="json"))
            raise ValueError(f"{file}: what transformers reads in this directory says otherwise: {changed}")
        model.preprocess = ours
    return model


def _load_weights(path: Path, config: CLIPConfig | None, device: str | torch.device) -> CLIP:
    state = weights.read(path, config)
    if config is None:
        if not is_openai(state):
            raise ValueError(f"{path}: a single file does not describe its model, expected a config with it")
        return from_openai(state, where=str(path), device=device)
    if is_release(state):
        return from_release(state, config, where=str(path), device=device)
    if has_their_names(state):
        return from_open_clip(state, config, where=str(path), device=device)
    return _fill(state, config, str(path), device)


def _fill(state: Mapping[str, torch.Tensor], config: CLIPConfig, where: str, device: str | torch.device) -> CLIP:
    model = weights.on_meta(config, where)
    weights.check(state, model.state_dict(), where)
    return weights.fill(model, state, device)


def _as_config(config: CLIPConfig | Mapping[str, Any] | str | Path) -> CLIPConfig:
    if isinstance(config, CLIPConfig):
        return config
    where = "config" if isinstance(config, Mapping) else str(config)
    settings = config if isinstance(config, Mapping) else read_json(Path(config))
    if "model_cfg" in settings or "vision_cfg" in settings:
        return config_from_open_clip(settings.get("model_cfg", settings), where)
    if "format" not in settings:
        return validated(CLIPConfig, settings, where)
    if (settings["format"], settings.get("version")) != (FORMAT, VERSION):
        got = f"{settings['format']!r} version {settings.get('version')!r}"
        raise ValueError(f"{where}: expected format {FORMAT!r} version {VERSION}, got {got}")
    return _complete(CLIPConfig, settings.get("model"), where)


def _complete(kind: type[M], settings: Any, where: str) -> M:
    """Of a file that we wrote: every field is there, so that none takes a default that was never meant."""
    value = validated(kind, settings, where)
    if lost := changes(settings, value.model_dump(mode="json")):
        raise ValueError(f"{where}: expected every setting as it was written; {lost}")
    return value
