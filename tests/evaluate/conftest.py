"""A toy CLIP whose right answers are plain: a picture is its mean colour, a text the sum of its colour words."""

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from tinyclip.data.sources import BadItem
from tinyclip.preprocess import Preprocess

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}


class ColourModel(nn.Module):
    device = torch.device("cpu")
    preprocess = Preprocess(size=8)

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))
        self.modes = set()

    def encode_image(self, pixels, *, normalize=False):
        assert normalize and pixels.dtype == torch.uint8
        self.modes.add((self.training, torch.is_grad_enabled()))
        return F.normalize(self.factor * pixels.float().mean((2, 3)), dim=-1)

    def encode_text(self, texts, *, normalize=False):
        assert normalize
        self.modes.add((self.training, torch.is_grad_enabled()))
        words = [text.replace(".", "").split() for text in texts]
        sums = [[sum(COLOURS.get(word, (1, 1, 1))[axis] for word in own) for axis in range(3)] for own in words]
        return F.normalize(self.factor * torch.tensor(sums, dtype=torch.float32), dim=-1)


class Pictures:
    """Items (colour or None for a corrupt image, captions, label). A text that is the word broken cannot be read."""

    name = "toy"

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def key(self, index):
        return f"item{index}"

    def image(self, index):
        if self.items[index][0] is None:
            raise BadItem("corrupt")
        return Image.new("RGB", (8, 8), COLOURS[self.items[index][0]])

    def captions(self, index):
        return self._read(self.items[index][1])

    def label(self, index):
        return self._read(self.items[index][2])

    @staticmethod
    def _read(text):
        if text == "broken":
            raise BadItem("no JSON")
        return text


@pytest.fixture
def model():
    return ColourModel()


@pytest.fixture
def pictures():
    return Pictures
