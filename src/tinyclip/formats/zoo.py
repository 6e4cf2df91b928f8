"""The published models by name: `tinyclip:ViT-39M-16-Text-19M-YFCC15M`.

    tinyclip:ARCHITECTURE           the shape alone; also of the usual teachers ViT-B-32, ViT-B-16 and RN50
    tinyclip:ARCHITECTURE-DATA      the weights: from the cache directory, else downloaded into it
    tinyclip:ARCHITECTURE/FILE      the weights, from this file; or with the data in the name

The cache directory is $TINYCLIP_CACHE, else ~/.cache/tinyclip. A download is kept only where its SHA-256 is the known
one; most are not published, and then `tinyclip:ARCHITECTURE-DATA?sha256=...` says which file is accepted.
Source of names, sizes and links: README.md of wkcn/TinyCLIP-model-zoo; of the configs: src/open_clip/model_configs of
wkcn/TinyCLIP.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shutil
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tinyclip.formats import weights
from tinyclip.formats.open_clip import config_from_open_clip
from tinyclip.formats.openai import with_openai_reader
from tinyclip.formats.release import from_release
from tinyclip.model import CLIP, CLIPConfig

PREFIX = "tinyclip:"
URL = "https://github.com/wkcn/TinyCLIP-model-zoo/releases/download/checkpoints/"


def _model_cfg(image: tuple[Any, int, int | None], text: tuple[int, int], embed_dim: int = 512) -> dict[str, Any]:
    """open_clip's form, from the image tower's layers, width and patch and the text tower's layers and width."""
    vision_cfg = dict(zip(("layers", "width", "patch_size"), image, strict=True))
    text_cfg = {"layers": text[0], "width": text[1], "heads": text[1] // 64}
    return {"embed_dim": embed_dim, "vision_cfg": {"image_size": 224, **vision_cfg}, "text_cfg": text_cfg}


RESNET_50 = (3, 4, 6, 3)  # blocks of each stage
ARCHITECTURES = {
    "ViT-39M-16-Text-19M": _model_cfg((12, 512, 16), (6, 512)),
    "ViT-8M-16-Text-3M": _model_cfg((10, 256, 16), (3, 256)),
    "ViT-61M-32-Text-29M": _model_cfg((12, 640, 32), (9, 512)),
    "ViT-40M-32-Text-19M": _model_cfg((12, 512, 32), (6, 512)),
    "ResNet-30M-Text-29M": _model_cfg((RESNET_50, 56, None), (9, 512), embed_dim=1024),
    "ResNet-19M-Text-19M": _model_cfg((RESNET_50, 44, None), (6, 512), embed_dim=1024),
    "ViT-B-32": _model_cfg((12, 768, 32), (12, 512)),
    "ViT-B-16": _model_cfg((12, 768, 16), (12, 512)),
    "RN50": _model_cfg((RESNET_50, 64, None), (12, 512), embed_dim=1024),
}
PRUNED = {  # by learned masks: the sizes are in the file; the dense architecture they were pruned from
    "auto-ViT-63M-32-Text-31M": "ViT-B-32",
    "auto-ViT-45M-32-Text-18M": "ViT-B-32",
    "auto-ViT-22M-32-Text-10M": "ViT-B-32",
}
CHECKPOINTS = {  # (architecture, data): SHA-256 where public projects that verify their downloads record it
    ("ViT-39M-16-Text-19M", "YFCC15M"): None,
    ("ViT-8M-16-Text-3M", "YFCC15M"): "3d9f86a556cd13acc1aa6cc18495a79ffd1f58b6f17a552400bdefd244c3a92c",
    ("ResNet-30M-Text-29M", "LAION400M"): None,
    ("ResNet-19M-Text-19M", "LAION400M"): None,
    ("ViT-61M-32-Text-29M", "LAION400M"): None,
    ("ViT-40M-32-Text-19M", "LAION400M"): "af5042c3e3662c43573c16113d4a72014cf3aa19267a7a50c4b94be3c4e8366a",
    ("auto-ViT-63M-32-Text-31M", "LAION400M"): None,
    ("auto-ViT-45M-32-Text-18M", "LAION400M"): "9739fe1783f1d75eb6246a276b0865da6a965ac6b730b5ca1e02e1740e6444b7",
    ("auto-ViT-22M-32-Text-10M", "LAION400M"): "fadfe0486c7eb64208d2cfe4dec08120b284a37a11dc2c63cb5dfbac0ed4f018",
    ("auto-ViT-63M-32-Text-31M", "LAIONYFCC400M"): None,
    ("auto-ViT-45M-32-Text-18M", "LAIONYFCC400M"): None,
}


class Entry(NamedTuple):
    """What a name stands for."""

    architecture: str
    data: str | None  # that it was trained on; an architecture alone has none
    file: Path | None  # given by the user
    sha256: str | None  # expected of the file

    @property
    def file_name(self) -> str:
        return f"TinyCLIP-{self.architecture}-{self.data}.pt"

    @property
    def model_cfg(self) -> dict[str, Any]:
        """open_clip's config, of the dense architecture where this one is pruned."""
        return ARCHITECTURES[PRUNED.get(self.architecture, self.architecture)]


def parse(name: str) -> Entry:
    """Raises ValueError for an unknown name, with the close ones."""
    spec, _, query = name.removeprefix(PREFIX).removeprefix("TinyCLIP-").partition("?")
    title, _, file = spec.partition("/")
    known: dict[str, tuple[str, str | None, str | None]]  # architecture, data, SHA-256
    known = {architecture: (architecture, None, None) for architecture in (*ARCHITECTURES, *PRUNED)}
    known |= {"-".join(pair): (*pair, sha256) for pair, sha256 in CHECKPOINTS.items()}
    if title not in known:
        close = difflib.get_close_matches(title, known, n=3, cutoff=0.4)
        raise ValueError(f"{name}: no published model has this name; close: {', '.join(close) or 'none'}")
    if query and not re.fullmatch("sha256=[0-9a-fA-F]{64}", query):
        raise ValueError(f"{name}: expected ?sha256= and 64 hexadecimal digits, got ?{query}")
    architecture, data, sha256 = known[title]
    if file or query:
        sha256 = query.removeprefix("sha256=").lower() or None
    return Entry(architecture, data, Path(file).expanduser() if file else None, sha256)


def meant(name: str) -> list[str]:
    """The published models that `name`, without the prefix, may mean: that one, those of an architecture, or close."""
    title = name.removeprefix("TinyCLIP-").removesuffix(".pt")
    titles = {"-".join(pair): pair[0] for pair in CHECKPOINTS}
    found = [known for known, architecture in titles.items() if title in (known, architecture)]
    return [PREFIX + known for known in found or difflib.get_close_matches(title, titles, n=2, cutoff=0.8)]


def config(name: str) -> CLIPConfig:
    """The config of a published model; the weights are needed only where it is pruned."""
    entry = parse(name)
    if entry.architecture in PRUNED:
        return load(name).config
    return config_from_open_clip(entry.model_cfg)


def load(name: str, *, device: str | torch.device = "cpu") -> CLIP:
    """A published model, with its preprocessing and tokenizer. Raises ValueError or FileNotFoundError, one line."""
    entry = parse(name)
    if entry.data is None and entry.file is None:
        known = [f"{PREFIX}{known}-{data}" for known, data in CHECKPOINTS if known == entry.architecture]
        raise ValueError(f"{name}: expected {' or '.join(known) or name}, or {name}/FILE: the weights")
    whole, file = config_from_open_clip(entry.model_cfg), resolve(entry)
    model = from_release(weights.read(file, whole), whole, where=str(file), device=device)
    if model.config != whole and entry.architecture not in PRUNED:
        raise ValueError(f"{file}: expected the sizes of {entry.architecture}, got those of a pruned model")
    return with_openai_reader(model)


def resolve(entry: Entry) -> Path:
    """The file of the weights: the one given, the cached one, or the one downloaded now.

    Raises FileNotFoundError, or ValueError for a file without the expected checksum or a download without a known one.
    """
    cache = Path(os.environ.get("TINYCLIP_CACHE") or "~/.cache/tinyclip").expanduser()
    file, unverified = entry.file or cache / entry.file_name, cache / f"{entry.file_name}.unverified"
    if file.is_file():
        if entry.sha256 is not None:
            _check(file, entry.sha256)
        return file
    if entry.file is not None:
        raise FileNotFoundError(f"{file}: expected the weights of {entry.architecture}, found no file")
    if not unverified.is_file():
        _download(URL + entry.file_name, unverified)
    if entry.sha256 is None:
        raise ValueError(
            f"{unverified}: no checksum of it is published; if its SHA-256 is right, "
            f"accept it with {PREFIX}{entry.architecture}-{entry.data}?sha256={_sha256(unverified)}"
        )
    _check(unverified, entry.sha256)
    return unverified.replace(file)


def _download(url: str, file: Path) -> None:
    """Raises ValueError where the network or the server does not give it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.unfinished")
    try:
        with urllib.request.urlopen(url, timeout=60) as response, unfinished.open("wb") as target:
            shutil.copyfileobj(response, target)
            if response.length:
                raise OSError(f"it broke off {response.length} bytes before the end")
        unfinished.replace(file)
    except OSError as error:  # URLError is one
        raise ValueError(
            f"could not download {url}: {getattr(error, 'reason', error)}; "
            f"if you have the file, put it into {file.parent} or give it as {PREFIX}NAME/FILE"
        ) from None
    finally:
        unfinished.unlink(missing_ok=True)


def _check(file: Path, expected: str) -> None:
    if (got := _sha256(file)) != expected:
        raise ValueError(f"{file}: expected SHA-256 {expected}, got {got}; remove it where it is not wanted")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
