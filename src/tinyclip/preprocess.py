"""Images -> pixels: size, mean, std and resizing as one value that travels with the checkpoint.

Pixels stay uint8 until they are on the model's device; `normalise` makes them the float input of the network.
The evaluation view is open_clip's within one of 255 levels, but for a pixel in a million or so that differs by two
(tests/test_preprocess.py): torch resizes uint8 as Pillow does, antialiased and in two rounded passes, with weights of
16 bits in place of 22. Random crops are of whole pixels, as torchvision's.

Until `normalise`, pixels keep the memory order in which decoders write them, [H, W, 3]: a view [3, S, S] is permuted.

Shape legend: B images, C = 3 colours, H and W a picture's height and width, S the side of the square view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from tinyclip.data.decode import Jpeg, to_rgb
from tinyclip.device import to_device

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1]; open_clip/constants.py
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT = 100  # resizing the shortest side of a longer picture would fill the memory

Mean = Annotated[float, Field(ge=-1e3, le=1e3, allow_inf_nan=False)]
Std = Annotated[float, Field(ge=1e-6, le=1e3, allow_inf_nan=False)]


class Preprocess(BaseModel):
    """How a model wants to see a picture. `mean` and `std` are of pixels in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(gt=0, le=16384, description="side of the square output, in pixels")
    mean: tuple[Mean, Mean, Mean] = OPENAI_MEAN
    std: tuple[Std, Std, Std] = OPENAI_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize: Literal["shortest", "squash"] = "shortest"  # the shortest side, then the centre; or the whole picture

    def __call__(self, image: Image.Image) -> Tensor:
        """The evaluation view, uint8 [3, S, S]. Raises ValueError for a picture that is hardly more than a line."""
        width, height = image.size
        short, long = min(width, height), max(width, height)
        if long > MAX_ASPECT * short:
            raise ValueError(f"expected a picture at most {MAX_ASPECT} times as long as wide, got {width} x {height}")
        if self.resize == "squash" and height > width:  # Pillow 13 begins with the height, torch with the width
            return to_pixels(to_rgb(image).resize((self.size, self.size), self._resample)).permute(2, 0, 1)
        if self.resize == "squash":
            return self.crop(image, (0, 0, width, height))
        # Rounded as torchvision's Resize and CenterCrop round.
        resized_HWC = self._resize(to_pixels(image), self.size * height // short, self.size * width // short)
        top, left = (round((side - self.size) / 2) for side in resized_HWC.shape[:2])
        return resized_HWC[top : top + self.size, left : left + self.size].permute(2, 0, 1)

    def crop(self, image: Image.Image, box: tuple[float, float, float, float]) -> Tensor:
        """The box (left, top, right, bottom in source pixels, rounded to whole ones) resized to uint8 [3, S, S]."""
        left, top, right, bottom = box
        if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
            raise ValueError(f"expected a box inside the {image.width} x {image.height} picture, got {box}")
        rows, columns = _whole_pixels(top, bottom, image.height), _whole_pixels(left, right, image.width)
        return self._resize(to_pixels(image)[rows, columns], self.size, self.size).permute(2, 0, 1)

    def _resize(self, pixels_HWC: Tensor, height: int, width: int) -> Tensor:
        """As Pillow does: antialiased, and no change where the size stays."""
        if pixels_HWC.shape[:2] == (height, width):
            return pixels_HWC
        pixels_BCHW = pixels_HWC[None].permute(0, 3, 1, 2)
        resized_BCHW = F.interpolate(pixels_BCHW, (height, width), mode=self.interpolation, antialias=True)
        return resized_BCHW.permute(0, 2, 3, 1)[0]

    @property
    def _resample(self) -> Image.Resampling:
        return Image.Resampling.BICUBIC if self.interpolation == "bicubic" else Image.Resampling.BILINEAR

    def normalise(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float32 (pixels / 255 - mean) / std, contiguous, on the pixels' device."""
        mean, std = (to_device(torch.tensor(c), pixels_BCHW.device).view(3, 1, 1) for c in (self.mean, self.std))
        return (pixels_BCHW.contiguous() / 255).sub_(mean).div_(std)

    def same_pixels(self, other: Preprocess) -> bool:
        """Whether the uint8 pixels made for one can be given to the other."""
        return (self.size, self.interpolation, self.resize) == (other.size, other.interpolation, other.resize)


def to_pixels(image: Image.Image) -> Tensor:
    """uint8 [height, width, 3], RGB."""
    if isinstance(image, Jpeg) and image.pixels is not None:
        return torch.from_numpy(image.pixels)
    pixels = torch.frombuffer(bytearray(to_rgb(image).tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3)


def stack(views: Sequence[Tensor]) -> Tensor:
    """uint8 [B, 3, S, S] of views [3, S, S], in their memory order: torch.stack would reorder every pixel."""
    return torch.stack([view_CHW.permute(1, 2, 0) for view_CHW in views]).permute(0, 3, 1, 2)


def _whole_pixels(start: float, end: float, size: int) -> slice:
    first = min(round(start), size - 1)
    return slice(first, max(round(end), first + 1))
