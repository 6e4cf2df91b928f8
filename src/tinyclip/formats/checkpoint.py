"""Our own format: a directory that describes itself.

    config.json         {"format": "tinyclip", "version": 1, "model": CLIPConfig, and what the writer adds}
    model.safetensors   the weights, under the names of model.py
    preprocess.json     how it reads pictures (where it knows)
    tokenizer.json      how it reads captions (where it knows); Hugging Face `tokenizers`

`load` also reads single checkpoint files in our names or in OpenAI's and open_clip's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import save_file

from tinyclip.formats import weights
from tinyclip.formats.open_clip import config_from_open_clip, from_open_clip, has_their_names
from tinyclip.model import CLIP, CLIPConfig
from tinyclip.preprocess import Preprocess
from tinyclip.tokenizer import Tokenizer

FORMAT, VERSION = "tinyclip", 1
M = TypeVar("M", bound=BaseModel)


def save(model: CLIP, directory: str | Path, *, extra: Mapping[str, Any] | None = None) -> Path:
    """Write a model directory and return it; `extra` goes into config.json and must be plain JSON.

    It is written beside its place and then renamed, so that it is never half-written. A model that is there is
    replaced; raises FileExistsError where something else is.
    """
    directory = Path(directory).absolute()
    if directory.exists() and not _is_model(directory) and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(f"{directory}: expected a model to replace or nothing, found something else")
    unfinished = directory.with_name(f".{directory.name}.{os.getpid()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        _write(model, unfinished, extra or {})
        _replace(directory, unfinished)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def load(
    path: str | Path,
    *,
    config: CLIPConfig | Mapping[str, Any] | str | Path | None = None,
    device: str | torch.device = "cpu",
) -> CLIP:
    """A model in evaluation mode, its weights in fp32, from one of

    - a model directory, or a run's or stage's directory that holds one as model/;
    - a .safetensors, .pt, .pth or .bin file, in our names or in OpenAI's and open_clip's. It needs `config`: a
      CLIPConfig, or our config.json or an open_clip model config, each as a mapping or the path of a JSON file.

    Raises FileNotFoundError, or ValueError for what is damaged or does not fit; nothing is allocated before.
    """
    path = Path(path)
    if path.is_dir():
        if config is not None:
            raise ValueError(f"{path}: a model directory has its own config, expected no other")
        return _load_directory(path, device)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a model directory or a checkpoint file, found nothing")
    if config is None:
        raise ValueError(f"{path}: a single file does not describe its model, expected a config with it")
    return _load_weights(path, _as_config(config), device)


def _is_model(directory: Path) -> bool:
    return (directory / "config.json").is_file() and (directory / "model.safetensors").is_file()


def _write(model: CLIP, directory: Path, extra: Mapping[str, Any]) -> None:
    settings = {"format": FORMAT, "version": VERSION, "model": model.config.model_dump(mode="json")}
    assert not settings.keys() & extra.keys(), f"extra: {', '.join(settings)} are ours, got {', '.join(extra)}"
    (directory / "config.json").write_text(json.dumps({**settings, **extra}, indent=2), encoding="utf-8")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(directory / "config.json", directory / "model.safetensors")  # save_file's own mode is private
    if model.preprocess is not None:
        (directory / "preprocess.json").write_text(model.preprocess.model_dump_json(indent=2), encoding="utf-8")
    if model.tokenizer is not None:
        model.tokenizer.save(directory / "tokenizer.json")
    for path in [*directory.iterdir(), directory]:
        _sync(path)


def _replace(directory: Path, finished: Path) -> None:
    """Put the finished directory in its place. No rename replaces a full directory, so the old one steps aside."""
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    if directory.exists():
        directory.rename(old)
    finished.rename(directory)
    _sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file or a directory's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load_directory(path: Path, device: str | torch.device) -> CLIP:
    directory = path if (path / "config.json").is_file() else path / "model"
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{path}: expected a model (config.json) or a run (model/config.json), found neither")
    model = _load_weights(directory / "model.safetensors", _as_config(directory / "config.json"), device)
    image, text = model.config.image, model.config.text
    if (file := directory / "preprocess.json").is_file():
        model.preprocess = _validated(Preprocess, _read_json(file), str(file))
        if model.preprocess.size != image.image_size:
            raise ValueError(f"{file}: expected size {image.image_size}, got {model.preprocess.size}")
    if (file := directory / "tokenizer.json").is_file():
        model.tokenizer = tokenizer = Tokenizer.load(file)
        expected, got = (text.vocab_size, text.context_length), (tokenizer.vocab_size, tokenizer.context_length)
        if expected != got:
            raise ValueError(f"{file}: expected vocabulary and context length {expected}, got {got}")
    return model


def _load_weights(path: Path, config: CLIPConfig, device: str | torch.device) -> CLIP:
    state = weights.read(path)
    if has_their_names(state):
        return from_open_clip(state, config, where=str(path), device=device)
    model = weights.on_meta(config)
    weights.check(state, model.state_dict(), str(path))
    return weights.fill(model, state, device)


def _as_config(config: CLIPConfig | Mapping[str, Any] | str | Path) -> CLIPConfig:
    if isinstance(config, CLIPConfig):
        return config
    where = "config" if isinstance(config, Mapping) else str(config)
    settings = config if isinstance(config, Mapping) else _read_json(Path(config))
    if "model_cfg" in settings or "vision_cfg" in settings:
        return config_from_open_clip(settings.get("model_cfg", settings))
    if "format" not in settings:
        return _validated(CLIPConfig, settings, where)
    if (settings["format"], settings.get("version")) != (FORMAT, VERSION):
        got = f"{settings['format']!r} version {settings.get('version')!r}"
        raise ValueError(f"{where}: expected format {FORMAT!r} version {VERSION}, got {got}")
    return _validated(CLIPConfig, settings.get("model"), where)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a JSON file, found none")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    return settings


def _validated(kind: type[M], settings: Any, where: str) -> M:
    """A pydantic value, or a ValueError of one line that names the first field at fault."""
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(f"{where}: {field}: {first['msg'].removeprefix('Value error, ')}") from None
