"""tinyclip makes CLIP models small: weight inheritance and affinity mimicking, stage by stage."""

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
