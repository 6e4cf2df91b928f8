"""tinyclip makes CLIP models small: weight inheritance and affinity mimicking, stage by stage."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyclip.formats.checkpoint import load, save
    from tinyclip.model import CLIP, BlockConfig, CLIPConfig, ImageConfig, TextConfig
    from tinyclip.preprocess import Preprocess
    from tinyclip.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "CLIP",
    "BlockConfig",
    "CLIPConfig",
    "ImageConfig",
    "Preprocess",
    "TextConfig",
    "Tokenizer",
    "load",
    "save",
]

_HOMES = {  # of the others: model
    "load": "formats.checkpoint",
    "save": "formats.checkpoint",
    "Preprocess": "preprocess",
    "Tokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    """A public name, when it is first asked for: the command answers a stop before torch is imported."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'model')}"), name)
