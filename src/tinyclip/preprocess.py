"""Images -> pixels: size, mean, std and resizing as one value that travels with the checkpoint.

Pixels stay uint8 until they are on the model's device; `normalise` makes them the float input of the network.
Equal to open_clip's evaluation transform within one of 255 levels (tests/test_preprocess.py), with Pillow alone.

Shape legend: B images, S the side of the square picture that the model reads.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1]; open_clip/constants.py
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT = 100  # resizing the shortest side of a longer picture would fill the memory

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Preprocess(BaseModel):
    """How a model wants to see a picture. `mean` and `std` are of pixels in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(gt=0, le=16384, description="side of the square output, in pixels")
    mean: tuple[Finite, Finite, Finite] = OPENAI_MEAN
    std: tuple[Positive, Positive, Positive] = OPENAI_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize: Literal["shortest", "squash"] = "shortest"  # the shortest side, then the centre; or the whole picture

    def __call__(self, image: Image.Image) -> Tensor:
        """The evaluation view, uint8 [3, S, S]. Raises ValueError for a picture that is hardly more than a line."""
        width, height = image.size
        short, long = min(width, height), max(width, height)
        if long > MAX_ASPECT * short:
            raise ValueError(f"expected a picture at most {MAX_ASPECT} times as long as wide, got {width} x {height}")
        if self.resize == "squash":
            return self.crop(image, (0, 0, width, height))
        # Rounded as torchvision's Resize and CenterCrop round.
        resized = to_rgb(image).resize((self.size * width // short, self.size * height // short), self._resample)
        left, top = (round((side - self.size) / 2) for side in resized.size)
        return to_pixels(resized.crop((left, top, left + self.size, top + self.size)))

    def crop(self, image: Image.Image, box: tuple[float, float, float, float]) -> Tensor:
        """The box (left, top, right, bottom in source pixels) resized to uint8 [3, S, S]."""
        left, top, right, bottom = box
        if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
            raise ValueError(f"expected a box inside the {image.width} x {image.height} picture, got {box}")
        return to_pixels(to_rgb(image).resize((self.size, self.size), self._resample, box=box))

    @property
    def _resample(self) -> Image.Resampling:
        return Image.Resampling.BICUBIC if self.interpolation == "bicubic" else Image.Resampling.BILINEAR

    def normalise(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float32 (pixels / 255 - mean) / std, on the pixels' device."""
        mean = torch.tensor(self.mean, device=pixels_BCHW.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=pixels_BCHW.device).view(3, 1, 1)
        return (pixels_BCHW / 255 - mean) / std

    def same_pixels(self, other: Preprocess) -> bool:
        """Whether the uint8 pixels made for one can be given to the other."""
        return (self.size, self.interpolation, self.resize) == (other.size, other.interpolation, other.resize)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with whatever is transparent laid on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image: Image.Image) -> Tensor:
    """uint8 [3, height, width] of an RGB picture."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()
