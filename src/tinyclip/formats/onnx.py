"""A model -> two ONNX graphs, image and text, that onnxruntime runs without torch and without tinyclip.

    image.onnx      pixels: float [B, 3, S, S], already normalised -> image: unit float [B, E]
    text.onnx       ids: int64 or int32 [B, L], L <= context length -> text: unit float [B, E]
    onnx.json       names and sizes, the preprocessing, the scale, where the model comes from
    tokenizer.json  how it reads captions (where it knows); Hugging Face `tokenizers`

B and L are free when a graph runs. Weights are inside the graph, but in image.onnx.data or text.onnx.data beside it
where those of the tower are more than `MAX_INSIDE` bytes: a protobuf ends at 2^31.

With int8 the weights of linear layers are stored in 8 bits, one scale for each output channel, and activations are
rounded while the graph runs (onnxruntime's dynamic quantisation); token embedding, norms and attention products stay
fp32.

Shape legend: B pairs, L tokens, E embedding, S side of the picture.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tinyclip.data.scenes import Scenes
from tinyclip.formats.files import read_json, validated, whole, write_json
from tinyclip.formats.provenance import entry
from tinyclip.model import CLIP, unit
from tinyclip.preprocess import Preprocess
from tinyclip.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL import Image

FORMAT, VERSION = "tinyclip-onnx", 1
OPSET = 18  # what torch's exporter writes without converting, and the least that it can write
TOLERANCE = 1e-4  # between unit embeddings, fp32
MAX_INSIDE = 2_000_000_000  # bytes of weights in one graph file
NUM_PROBES = 4  # pictures with their captions
EXTRA = "pip install 'tinyclip[onnx]'"


class Difference(NamedTuple):
    """How far unit embeddings of the graphs are from the model's, over all probes of both towers."""

    largest: float
    smallest_cosine: float


def to_onnx(
    model: CLIP,
    directory: str | Path,
    *,
    opset: int = OPSET,
    quantize: Literal["int8"] | None = None,
    ids: Literal["int64", "int32"] = "int64",
    say: Callable[[str], None] = print,
) -> Path:
    """Write the graphs into a new or empty directory, run them beside the model, and return the directory.

    `opset` is 18 or more, as far as the installed torch writes; `ids` the type of token ids that text.onnx takes. The
    probes are pictures and captions where the model reads those, else noise. Raises ValueError for an option that
    cannot be obeyed, where fp32 graphs differ by more than 1e-4, or a library is missing, and FileExistsError where
    something is in the way; then nothing is left behind. int8 graphs do differ: what is said is by how much.
    """
    _check_options(opset, quantize, ids)
    directory = Path(directory).absolute()
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(f"{directory}: expected a new or empty directory to export to")
    with whole(directory) as unfinished:
        write(model, unfinished, opset=opset, quantize=quantize, ids=ids)
        found = difference(model, unfinished)
        say(f"onnxruntime: {found.largest:.1e} largest difference, {found.smallest_cosine:.6f} smallest cosine")
        if quantize is None and not found.largest <= TOLERANCE:
            raise ValueError(
                f"{directory}: not written: expected unit embeddings that differ by at most {TOLERANCE:.0e}, "
                f"got {found.largest:.1e}"
            )
    return directory


def write(
    model: CLIP,
    directory: Path,
    *,
    opset: int = OPSET,
    quantize: Literal["int8"] | None = None,
    ids: Literal["int64", "int32"] = "int64",
) -> None:
    """The files of a model, into a directory that is there."""
    check_installed()
    _check_options(opset, quantize, ids)
    if quantize == "int8":
        with TemporaryDirectory(dir=directory) as exact:
            write(model, Path(exact), opset=opset, ids=ids)
            quantise(Path(exact), directory)
        _check_opset(directory, opset)
        return
    model = deepcopy(model).cpu().float().eval()
    image, text = model.config.image, model.config.text
    pixels = torch.zeros(2, 3, image.image_size, image.image_size)
    tokens_BL = torch.ones(2, text.context_length, dtype=getattr(torch, ids))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=text.context_length)
    _trace(model.image, directory / "image.onnx", pixels, {"pixels": {0: batch}}, "image", opset)
    _trace(model.text, directory / "text.onnx", tokens_BL, {"ids": {0: batch, 1: length}}, "text", opset)
    _check_opset(directory, opset)
    write_json(directory / "onnx.json", _description(model, opset, ids))
    if model.tokenizer is not None:
        model.tokenizer.save(directory / "tokenizer.json")


def quantise(source: Path, directory: Path) -> None:
    """The int8 graphs of a directory of fp32 graphs, into a directory that is there."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for name in ("image.onnx", "text.onnx"):
        graph = onnx.load(source / name)
        graph.graph.ClearField("value_info")  # the quantiser transposes weights and trips over their former shapes
        with _quiet():
            quantize_dynamic(
                graph,
                directory / name,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=(source / f"{name}.data").exists(),
            )
    write_json(directory / "onnx.json", {**read_json(source / "onnx.json"), "quantize": "int8"})
    if (source / "tokenizer.json").is_file():
        shutil.copy(source / "tokenizer.json", directory)


@torch.no_grad()
def difference(model: CLIP, directory: Path) -> Difference:
    """Run the graphs and the model on the same inputs, together and the first of them alone."""
    pixels, tokens_BL = _probes(model)
    pixels, tokens_BL = pixels.to(model.device), tokens_BL.to(model.device)
    run = _runner(directory)
    largest, smallest_cosine = 0.0, 1.0
    for count in (len(pixels), 1):
        ours = model(pixels[:count], tokens_BL[:count])
        for expected_BE, got_BE in zip(ours, run(pixels[:count], tokens_BL[:count]), strict=True):
            expected_BE = expected_BE.cpu().float()
            distance = (expected_BE - got_BE).abs().max().item()
            largest = max(largest, distance) if distance == distance else distance  # NaN stays
            smallest_cosine = min(smallest_cosine, (expected_BE * got_BE).sum(-1).min().item())
    return Difference(largest, smallest_cosine)


def features(
    directory: Path, pictures: Sequence[Image.Image], captions: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels, unit embeddings [B, E] of both and logits [B, B], of what stands in the directory alone."""
    settings = read_json(directory / "onnx.json")
    preprocess = validated(Preprocess, settings.get("preprocess"), f"{directory / 'onnx.json'}: preprocess")
    pixels = preprocess.normalise(torch.stack([preprocess(picture) for picture in pictures]))
    tokens_BL = Tokenizer.load(directory / "tokenizer.json")(list(captions))
    image_BE, text_BE = _runner(directory)(pixels, tokens_BL)
    return pixels, image_BE, text_BE, settings["scale"] * image_BE @ text_BE.T


def check_installed() -> None:
    """Raises ValueError where a library that writes or runs graphs is missing."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX graphs need {', '.join(missing)}: {EXTRA}")


def _check_options(opset: int, quantize: str | None, ids: str) -> None:
    if type(opset) is not int or opset < OPSET:
        raise ValueError(f"opset: expected {OPSET} or more, the least that torch's exporter writes, got {opset!r}")
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize: expected int8 or nothing, got {quantize!r}")
    if ids not in ("int64", "int32"):
        raise ValueError(f"ids: expected int64 or int32, got {ids!r}")


def _check_opset(directory: Path, opset: int) -> None:
    """Raises ValueError where graphs have another opset: an exporter that cannot convert to one logs that alone."""
    import onnx

    for name in ("image.onnx", "text.onnx"):
        graph = onnx.load(directory / name, load_external_data=False)
        [got] = [entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")]
        if got != opset:
            raise ValueError(f"opset: the installed torch cannot write {opset}; {name} got {got}; expected another")


class UnitTower(nn.Module):
    """A tower whose embeddings have length 1."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower

    def forward(self, x: Tensor) -> Tensor:
        return unit(self.tower(x))


def _trace(
    tower: nn.Module, path: Path, example: Tensor, shapes: dict[str, dict[int, Any]], output: str, opset: int
) -> None:
    num_bytes = sum(weight.numel() * weight.element_size() for weight in tower.state_dict().values())
    [name] = shapes
    with _quiet():
        torch.onnx.export(
            UnitTower(tower).eval(),
            (example,),
            path,
            input_names=[name],
            output_names=[output],
            opset_version=opset,
            dynamo=True,
            dynamic_shapes=(shapes[name],),
            external_data=num_bytes > MAX_INSIDE,
            verbose=False,
        )


def _description(model: CLIP, opset: int, ids: str) -> dict[str, Any]:
    image, text = model.config.image, model.config.text
    pixels = {"name": "pixels", "type": "float32", "shape": ["batch", 3, image.image_size, image.image_size]}
    tokens = {"name": "ids", "type": ids, "shape": ["batch", "length"], "context_length": text.context_length}
    embedding = {"type": "float32", "shape": ["batch", model.config.embed_dim]}
    return {
        "format": FORMAT,
        "version": VERSION,
        "opset": opset,
        "quantize": None,
        "image": {"file": "image.onnx", "input": pixels, "output": {"name": "image", **embedding}},
        "text": {"file": "text.onnx", "input": tokens, "output": {"name": "text", **embedding}},
        "scale": model.scale.item(),
        "preprocess": None if model.preprocess is None else model.preprocess.model_dump(mode="json"),
        **entry(model.provenance),
    }


def _runner(directory: Path) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Unit embeddings of normalised pixels and token ids, by onnxruntime on the CPU."""
    import onnxruntime

    image, text = (
        onnxruntime.InferenceSession(directory / name, providers=["CPUExecutionProvider"])
        for name in ("image.onnx", "text.onnx")
    )
    ids = torch.int32 if text.get_inputs()[0].type == "tensor(int32)" else torch.int64

    def run(pixels: Tensor, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        [image_BE] = image.run(None, {"pixels": pixels.cpu().numpy()})
        [text_BE] = text.run(None, {"ids": tokens_BL.to("cpu", ids).numpy()})
        return torch.from_numpy(image_BE), torch.from_numpy(text_BE)

    return run


def _probes(model: CLIP) -> tuple[Tensor, Tensor]:
    """Normalised pixels and token ids: of pictures and captions, or noise for what the model cannot read."""
    image, text = model.config.image, model.config.text
    scenes, generator = Scenes("heldout", NUM_PROBES, size=2 * image.image_size), torch.Generator().manual_seed(0)
    pixels = torch.randn(NUM_PROBES, 3, image.image_size, image.image_size, generator=generator)
    tokens_BL = torch.randint(text.vocab_size, (NUM_PROBES, text.context_length), generator=generator)
    if model.preprocess is not None:
        pictures = [model.preprocess(scenes.image(index)) for index in range(NUM_PROBES)]
        pixels = model.preprocess.normalise(torch.stack(pictures))
    if model.tokenizer is not None:
        tokens_BL = model.tokenizer([scenes.captions(index)[0] for index in range(NUM_PROBES)])
    return pixels, tokens_BL


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that exporter and quantiser log and warn."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
