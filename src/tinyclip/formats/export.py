"""A model -> the files of another library, and the proof: that library reads them before they are in their place.

Shape legend: B pairs, E embedding, S side of the picture.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tinyclip.data.scenes import Scenes
from tinyclip.formats import checkpoint, huggingface, onnx, open_clip, uniform, weights
from tinyclip.formats.files import whole
from tinyclip.formats.provenance import license_line
from tinyclip.model import CLIP, MAX_SCALE, ImageConfig

if TYPE_CHECKING:
    from PIL import Image

TOLERANCE = 1e-5  # between unit features, fp32
PIXEL_TOLERANCE = 8  # levels of 255; torchvision and Pillow resize a little differently
SCALE_ROUNDING = 1e-6  # a scale of 100 is 100.00001 in fp32
NUM_PROBES = 4  # pictures with their captions


class Target(NamedTuple):
    """A format: what writes a model into a directory, and what the library at home there makes of it.

    `features` gives normalised pixels [B, 3, S, S], unit image and unit text features [B, E], and logits [B, B] of
    every image (a row) with every text, as that library computes them.
    """

    write: Callable[[CLIP, Path], None]
    features: Callable[[Path, Sequence[Image.Image], Sequence[str]], tuple[Tensor, Tensor, Tensor, Tensor]]
    tolerance: float = TOLERANCE  # infinite: a finite difference is said, not judged


def export(
    model: CLIP,
    directory: str | Path,
    *,
    to: str,
    pad: bool = False,
    verify: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write `model` for another library and return what was done; `directory` must be new or empty.

    to          "open_clip" (its local-dir:), "huggingface" (transformers: a CLIPModel where the blocks are alike, else
                a model with its own code), "tinyclip", or "onnx" and "onnx-int8" (two graphs for onnxruntime)
    pad         first make all blocks alike with zeros, exact in value (`uniform.pad`)
    verify      let the target library read it back, and compare unit features and logits of pictures and captions

    A scale above 100, at which our models stop, is written as 100, so that it is the same number in every format.
    What is known of the licences is said at the end, with a warning where one restricts what may be done with it.

    Raises ValueError for a model that the format cannot hold, and where features differ by more than 1e-5 (onnx: 1e-4;
    onnx-int8: no limit), logits by more than that times the scale, or pixels by more than 8 of 255 levels;
    FileExistsError where something is in the way. Then nothing is left behind.
    """
    directory = Path(directory).absolute()
    if to not in TARGETS:
        raise ValueError(f"export: expected one of {', '.join(TARGETS)}, got {to!r}")
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(f"{directory}: expected a new or empty directory to export to")
    if model.preprocess is None or model.tokenizer is None:
        raise ValueError("export: expected a model that knows how it reads pictures and captions, got bare weights")
    model = deepcopy(model).cpu().eval()
    _limit_scale(model, say)
    written = uniform.pad(model) if pad else model
    if pad:
        say(_given_up(model, written))
    result: dict[str, Any] = {"directory": str(directory), "to": to, "padded": pad}
    with whole(directory) as unfinished:
        TARGETS[to].write(written, unfinished)
        if verify:
            result |= _compare(model, unfinished, to)
            difference, levels = result["max_difference"], result["max_pixel_levels"]
            logits, tolerance = result["max_logit_difference"], TARGETS[to].tolerance
            say(
                f"read back with {to}: features differ by at most {difference:.1e} (smallest cosine "
                f"{result['min_cosine']:.6f}), logits by {logits:.1e}, pixels by {levels:.1f} levels"
            )
            logit_tolerance = tolerance * model.scale.item()
            if not (levels <= PIXEL_TOLERANCE and difference <= tolerance and logits <= logit_tolerance):
                raise ValueError(
                    f"{directory}: not written: expected differences of at most {tolerance:.0e} in unit features, "
                    f"{logit_tolerance:.0e} in logits and {PIXEL_TOLERANCE} levels in pixels when {to} reads it, got "
                    f"{difference:.1e}, {logits:.1e} and {levels:.1f}"
                )
        else:
            say("not verified: nothing has read it back")
    say(license_line(model.provenance))
    return result


@torch.no_grad()
def _limit_scale(model: CLIP, say: Callable[[str], None]) -> None:
    """exp(logit_scale), which other libraries take as it is, becomes what `model.scale` is."""
    scale = model.logit_scale.exp().item()
    if scale > MAX_SCALE * (1 + SCALE_ROUNDING):
        model.clip_scale_()
        say(f"the scale, {scale:.2f}, is above {MAX_SCALE:g}, where tinyclip stops: written as {MAX_SCALE:g}")


def _given_up(model: CLIP, padded: CLIP) -> str:
    small, large = model.config.prunable_params, padded.config.prunable_params
    return (
        f"padded with zeros: {small:,} -> {large:,} prunable parameters, {large / max(small, 1):.2f} times "
        "the memory and the computation; huggingface and tinyclip hold the model as it is"
    )


@torch.no_grad()
def _compare(model: CLIP, directory: Path, to: str) -> dict[str, float]:
    """How far unit features and logits are, given the same pixels and captions, and pixels in levels of 255."""
    assert model.preprocess is not None, "checked by export"
    size = model.config.image.image_size
    side = 2 * size
    # Resized, as many pixels are cut off on the left as on the right: transformers rounds halves otherwise than we do.
    height = next(height for height in range(side * 3 // 4, 0, -1) if (size * side // height - size) % 2 == 0)
    scenes = Scenes("heldout", NUM_PROBES, size=side)
    pictures = [scenes.image(index).crop((0, 0, side, height)) for index in range(NUM_PROBES)]
    captions = [scenes.captions(index)[0] for index in range(NUM_PROBES)]
    try:
        pixels, image_BE, text_BE, logits_BB = TARGETS[to].features(directory, pictures, captions)
    except ImportError as error:
        raise ValueError(f"{to} is needed to read back what was written, or no verification: {error}") from None
    except Exception as error:  # whatever another library raises
        raise ValueError(f"{to} cannot read what was written: {weights.first_line(error)}") from error
    ours = model.preprocess.normalise(torch.stack([model.preprocess(picture) for picture in pictures]))
    levels = (pixels - ours).abs() * 255 * torch.tensor(model.preprocess.std).view(3, 1, 1)
    our_image_BE, our_text_BE = model.encode_image(pixels, normalize=True), model.encode_text(captions, normalize=True)
    expected_BE = torch.cat([our_image_BE, our_text_BE])
    got_BE = torch.cat([image_BE, text_BE])
    return {
        "max_difference": (expected_BE - got_BE).abs().max().item(),
        "max_logit_difference": (model.scale * our_image_BE @ our_text_BE.T - logits_BB).abs().max().item(),
        "min_cosine": (expected_BE * got_BE).sum(-1).min().item(),
        "max_pixel_levels": levels.max().item(),
    }


def _write_huggingface(model: CLIP, directory: Path) -> None:
    """A CLIPModel where it can be one, else our own directory with the code that reads it."""
    if isinstance(model.config.image, ImageConfig) and uniform.is_uniform(model.config):
        huggingface.to_huggingface_dir(model, directory)
        return
    checkpoint.write(model, directory, huggingface.REMOTE_CONFIG)
    (directory / "preprocess.json").unlink()  # preprocessor_config.json says it, to both libraries
    huggingface.write_processor(model, directory)
    shutil.copy(huggingface.REMOTE_CODE, directory)


@torch.no_grad()
def _our_features(
    directory: Path, pictures: Sequence[Image.Image], captions: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    model = checkpoint.load(directory)
    assert model.preprocess is not None, "checked by export"
    pixels = model.preprocess.normalise(torch.stack([model.preprocess(picture) for picture in pictures]))
    image_BE, text_BE = model.encode_image(pixels, normalize=True), model.encode_text(captions, normalize=True)
    return pixels, image_BE, text_BE, model.scale * image_BE @ text_BE.T


TARGETS = {
    "open_clip": Target(open_clip.to_open_clip_dir, open_clip.stock_features),
    "huggingface": Target(_write_huggingface, huggingface.stock_features),
    "tinyclip": Target(lambda model, directory: checkpoint.write(model, directory, {}), _our_features),
    "onnx": Target(onnx.write, onnx.features, onnx.TOLERANCE),
    "onnx-int8": Target(partial(onnx.write, quantize="int8"), onnx.features, math.inf),
}
