"""Reading data on one core: JPEGs to pixels, captions to ids, samples out of a tar; ours against the usual way.

    python benchmarks/data.py [--quick] [--threads 1] [--photographs ../shared/data/flickr8k-train/images.zip]

    images     square JPEGs of 224, 448 and 896 px to the view of a model that reads 224 px: open_clip's image_transform
               on Pillow's decoder, the same without floats (Pillow), ours, and ours decoded with jpeg_side=224
    batches    the same as batches of 32: of floats from open_clip, of uint8 from us, and of ours normalised on the CPU
    captions   ids of 512 captions: open_clip's SimpleTokenizer against ours
    samples    image file and caption of 512 samples of a tar: webdataset's reader in order, ours by offset, shuffled

Pictures are mosaics of the photographs in a zip, in their own resolution, or where it is absent of drawn scenes: more
detailed than a photograph of that size, so decoding, which costs both sides the same, weighs more. Contenders take
turns in one process; printed are medians of process time and the median and range over rounds of the ratio of the
first contender's time to the other's; for images also the differences of pixels in levels of 255.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import PIL
import torch
import webdataset
from machine import prepare
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor

from tinyclip.data.decode import decode, simplejpeg
from tinyclip.data.scenes import Scenes
from tinyclip.data.sources import open_source
from tinyclip.preprocess import Preprocess, stack, to_rgb
from tinyclip.tokenizer import Tokenizer

SIZE = 224  # px, that the model reads
BATCH = 32
NUM_TEXTS = 512
TILE = 128  # px, of a photograph in a mosaic
PHOTOGRAPHS = Path("../shared/data/flickr8k-train/images.zip")


def photographs(archive: Path, count: int) -> list[Image.Image]:
    """RGB of TILE px a side."""
    if not archive.exists():
        return [Scenes("train", count, size=TILE).image(index) for index in range(count)]
    with zipfile.ZipFile(archive) as files:
        names = [name for name in files.namelist() if not name.endswith("/")][:count]
        pictures = [Image.open(io.BytesIO(files.read(name))).convert("RGB") for name in names]
    return [picture.resize((TILE, TILE), Image.Resampling.BICUBIC) for picture in pictures]


def jpegs(tiles: list[Image.Image], side: int, quality: int) -> list[bytes]:
    """BATCH mosaics of `side` px, each of other photographs."""
    across, found = -(-side // TILE), []
    for number in range(BATCH):
        mosaic, drawn = Image.new("RGB", (across * TILE, across * TILE)), random.Random(number)
        for place in range(across * across):
            mosaic.paste(drawn.choice(tiles), (place % across * TILE, place // across * TILE))
        buffer = io.BytesIO()
        mosaic.crop((0, 0, side, side)).save(buffer, "JPEG", quality=quality)
        found.append(buffer.getvalue())
    return found


VIEW = Preprocess(size=SIZE)
THEIR_VIEW = image_transform(SIZE, is_train=False)


def by_open_clip(file: bytes) -> Tensor:
    """float [3, S, S]"""
    return THEIR_VIEW(Image.open(io.BytesIO(file)))


def by_pillow(file: bytes) -> Tensor:
    """uint8 [3, S, S]"""
    resized = to_rgb(Image.open(io.BytesIO(file))).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def by_us(file: bytes) -> Tensor:
    """uint8 [3, S, S]"""
    return VIEW(decode(lambda: file))


def by_us_scaled(file: bytes) -> Tensor:
    return VIEW(decode(lambda: file, jpeg_side=SIZE))


VIEWS = {"open_clip": by_open_clip, "Pillow": by_pillow, "ours": by_us, "ours, scaled": by_us_scaled}


def image_contenders(files: list[bytes]) -> dict[str, Callable[[], None]]:
    def one_by_one(view: Callable[[bytes], Tensor]) -> None:
        for file in files:
            view(file)

    return {label: partial(one_by_one, view) for label, view in VIEWS.items()}


def batch_contenders(files: list[bytes]) -> dict[str, Callable[[], Tensor]]:
    def ours() -> Tensor:
        return stack([by_us(file) for file in files])

    return {
        "open_clip": lambda: torch.stack([by_open_clip(file) for file in files]),
        "ours": ours,
        "ours, normalised": lambda: VIEW.normalise(ours()),
    }


def levels_from_pillow(files: list[bytes], view: Callable[[bytes], Tensor]) -> dict[str, float]:
    """The largest and the mean difference, and the share of pixels more than one level apart."""
    apart = torch.stack([(view(file).int() - by_pillow(file).int()).abs() for file in files])
    share = (apart > 1).double().mean().item()
    return {"largest": apart.max().item(), "mean": round(apart.double().mean().item(), 5), "share over 1": share}


def caption_contenders(texts: list[str]) -> dict[str, Callable[[], Tensor]]:
    theirs, ours = open_clip.SimpleTokenizer(), Tokenizer.openai()
    assert torch.equal(theirs(texts), ours(texts)), "the ids are the same"
    return {"open_clip": lambda: theirs(texts), "ours": lambda: ours(texts)}


def sample_contenders(shard: Path) -> dict[str, Callable[[], int]]:
    """Each returns how many bytes of images and captions it read."""
    source: Any = open_source(str(shard))
    order = random.Random(0).sample(range(len(source)), len(source))

    def theirs() -> int:
        samples = webdataset.WebDataset(str(shard), shardshuffle=False)
        return sum(len(sample["jpg"]) + len(sample["txt"]) for sample in samples)

    def ours() -> int:
        return sum(len(source.encoded(index)) + len(source.captions(index)[0].encode()) for index in order)

    assert theirs() == ours()
    return {"webdataset, in order": theirs, "ours, shuffled": ours}


def write_shard(path: Path, files: list[bytes], texts: list[str]) -> None:
    with tarfile.open(path, "w") as archive:
        for number, text in enumerate(texts):
            for extension, content in (("jpg", files[number % len(files)]), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{number:06}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def measure(what: str, contenders: Mapping[str, Callable[[], Any]], count: int, rounds: int) -> dict[str, Any]:
    """Seconds of process time and things a second, of `count` things a call."""
    seconds: dict[str, list[float]] = {label: [] for label in contenders}
    labels = list(contenders)
    for number in range(-1, rounds):  # the first round warms up
        for label in labels[number % len(labels) :] + labels[: number % len(labels)]:
            started = time.process_time()
            contenders[label]()
            if number >= 0:
                seconds[label].append(time.process_time() - started)
    first, *others = labels
    row: dict[str, Any] = {"what": what, "rounds": rounds}
    row["per_s"] = {label: round(count / statistics.median(times)) for label, times in seconds.items()}
    for other in others:
        ratios = [a / b for a, b in zip(seconds[first], seconds[other], strict=True)]
        row[f"{first}/{other}"] = [round(f(ratios), 2) for f in (statistics.median, min, max)]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--photographs", type=Path, default=PHOTOGRAPHS, help="a zip of images")
    parser.add_argument("--quick", action="store_true", help="two rounds")
    options = parser.parse_args()
    versions = {"open_clip": open_clip.__version__, "pillow": PIL.__version__}
    versions["simplejpeg"] = "absent" if simplejpeg is None else simplejpeg.__version__
    tiles = photographs(options.photographs, 256)
    pictures = options.photographs.parent.name if options.photographs.exists() else "drawn scenes"
    prepare(options.threads, **versions, pictures=pictures)
    rounds = 2 if options.quick else options.rounds
    for side in (224, 448, 896):
        for quality in (75, 90):
            files = jpegs(tiles, side, quality)
            bits = 8 * sum(map(len, files)) / len(files) / side**2
            what = f"{side} px, quality {quality}, {bits:.1f} bits a pixel"
            row = measure(f"images of {what}", image_contenders(files), BATCH, rounds)
            for label in ("ours", "ours, scaled"):
                row[f"{label}: levels from Pillow"] = levels_from_pillow(files, VIEWS[label])
            print(json.dumps(row), flush=True)
            print(json.dumps(measure(f"batches of {what}", batch_contenders(files), BATCH, rounds)), flush=True)
    scenes = Scenes("train", NUM_TEXTS)
    texts = [f"A photo of {scenes.captions(index)[index % 3]}." for index in range(NUM_TEXTS)]
    print(json.dumps(measure("captions", caption_contenders(texts), NUM_TEXTS, rounds)), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder) / "0.tar", jpegs(tiles, SIZE, 90), texts)
        print(json.dumps(measure("samples", sample_contenders(Path(folder) / "0.tar"), NUM_TEXTS, rounds)), flush=True)


if __name__ == "__main__":
    main()
