"""Files of tensors -> a model whose every weight was expected. Nothing is unpickled."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinyclip.formats.torch_file import read_torch_file
from tinyclip.model import CLIP, CLIPConfig

NUM_NAMED = 3  # keys that an error names
BYTES_PER_WEIGHT = 32  # fp32 with AdamW's two moments, all of it twice: under a wrapper's names too
SLACK_BYTES = 2**24  # of names, headers and buffers
MAX_BYTES = 2**36  # of a file without a config
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COUNTER = ".num_batches_tracked"  # of a BatchNorm: the only weight that is not a float


def read(path: Path, config: CLIPConfig | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt, .pth or .bin file, or of a TorchScript archive, whose code is never run.

    {"state_dict": ...} is unwrapped. They take no more memory than the file has bytes, and a file that is larger than
    the weights of `config` can need is not opened.

    Raises FileNotFoundError, or ValueError for a damaged file and one that holds more than tensors.
    """
    check_room([path], config)
    try:
        state = load_file(path) if path.suffix == ".safetensors" else read_torch_file(path)
    except UnpicklingError:
        raise ValueError(f"{path}: expected tensors only; the file holds code or is damaged, and is not read") from None
    except Exception as error:  # a damaged file can fail anywhere in the parsers
        raise ValueError(f"{path}: not a readable checkpoint: {first_line(error)}") from None
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: expected a mapping of names to tensors, got {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: expected tensors only, got {type(value).__name__} at {key!r:.80}")
        if not re.fullmatch(r"[\w.-]+", key):
            raise ValueError(f"{path}: expected names of tensors, got {key!r:.80}")
        if not _is_stored(value):
            raise ValueError(f"{path}: {key:.80}: expected a tensor that the file holds in full")
    return dict(state)


def check_room(files: Sequence[Path], config: CLIPConfig | None) -> None:
    """Raises FileNotFoundError for what is no file, and ValueError where the files are larger than a model can need."""
    for path in files:
        if not path.is_file():
            found = "a directory" if path.is_dir() else "none"
            raise FileNotFoundError(f"{path}: expected a checkpoint file, found {found}")
    limit, reason = MAX_BYTES, "for a file that says itself what it is"
    if config is not None:
        num_weights = sum(tensor.numel() for tensor in on_meta(config, str(files[0])).state_dict().values())
        limit, reason = BYTES_PER_WEIGHT * num_weights + SLACK_BYTES, f"for the {num_weights} weights of the config"
    if (size := sum(path.stat().st_size for path in files)) > limit:
        raise ValueError(f"{files[0]}: expected at most {limit} bytes {reason}, got {size}")


def _is_stored(tensor: Tensor) -> bool:
    """Whether every value has its own bytes: a shape of a terabyte fits into a few otherwise."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def shape(state: Mapping[str, Tensor], name: str, num_dims: int, where: str) -> tuple[int, ...]:
    """The shape of a tensor that says what the model is. Raises ValueError where it is not there or has other axes."""
    if name not in state or state[name].ndim != num_dims:
        got = f"shape {list(state[name].shape)}" if name in state else "none"
        raise ValueError(f"{where}: expected {name} with {num_dims} axes, got {got}")
    return tuple(state[name].shape)


def write(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A .safetensors file with the permissions of any new file; save_file's own are private.

    Of two entries of `metadata` the order is not always the same, and so neither are the file's bytes.
    """
    path.unlink(missing_ok=True)  # what another left behind has its own permissions
    path.touch()
    mode = path.stat().st_mode
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, path, metadata=dict(metadata or {"format": "pt"}))
    path.chmod(mode)


def on_meta(config: CLIPConfig, where: str) -> CLIP:
    """The model without memory for its weights. Raises ValueError, with `where`, for sizes beyond any memory."""
    try:
        with torch.device("meta"):
            return CLIP(config)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"{where}: the config describes a model that cannot be built: {first_line(error)}") from None


def check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError unless names and shapes are the expected ones and all values are finite floats.

    But for a BatchNorm's count of batches, which is one whole number.
    """
    problems = [
        _listed("missing", [name for name in expected if name not in state]),
        _listed("unexpected", [name for name in state if name not in expected]),
        _listed(
            "of another shape",
            [
                f"{name} (expected {list(tensor.shape)}, got {list(state[name].shape)})"
                for name, tensor in expected.items()
                if name in state and state[name].shape != tensor.shape
            ],
        ),
    ]
    if any(problems):
        raise ValueError(f"{where}: weights do not fit the config: {'; '.join(filter(None, problems))}")
    check_finite({name: tensor for name, tensor in state.items() if not name.endswith(COUNTER)}, where)
    counters = {name: state[name] for name in state if name.endswith(COUNTER)}
    if bad := [f"{name} ({tensor.dtype})" for name, tensor in counters.items() if tensor.dtype != torch.int64]:
        raise ValueError(f"{where}: expected whole numbers; {_listed('others', bad)}")


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError for weights that are not floats, or hold NaN or infinity."""
    whole = [f"{name} ({tensor.dtype})" for name, tensor in state.items() if tensor.dtype not in FLOATS]
    if whole:
        raise ValueError(f"{where}: expected floating-point weights; {_listed('others', whole)}")
    extremes = {name: torch.stack(torch.aminmax(tensor.float())) for name, tensor in state.items()}  # NaN propagates
    broken = [name for name, low_high in extremes.items() if not low_high.isfinite().all()]
    if broken:
        raise ValueError(f"{where}: expected finite weights; {_listed('with NaN or infinity', broken)}")


def their_name(ours: str, table: Mapping[str, str], library: str) -> str:
    """A weight's name in a table whose * is a block's number. Raises ValueError for a block that is only a bias."""
    number = re.search(r"\.blocks\.(\d+)\.", ours)
    pattern = ours.replace(number[0], ".blocks.*.") if number else ours
    if pattern not in table:
        raise ValueError(f"{ours}: {library} has no block without heads or FFN neurons")
    return table[pattern].replace("*", number[1] if number else "")


def fill(model: CLIP, state: Mapping[str, Tensor], device: str | torch.device = "cpu") -> CLIP:
    """Give a model from `on_meta` its weights, in fp32, and evaluation mode."""
    types = {name: torch.float32 if tensor.is_floating_point() else tensor.dtype for name, tensor in state.items()}
    model.load_state_dict({name: tensor.to(device, types[name]) for name, tensor in state.items()}, assign=True)
    return model.eval()


def first_line(error: Exception) -> str:
    """What foreign code says, short enough for one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _listed(what: str, names: list[str]) -> str:
    """`3 missing: a, b, c`, or nothing where there are none."""
    more = ", ..." if len(names) > NUM_NAMED else ""
    return f"{len(names)} {what}: {', '.join(names[:NUM_NAMED])}{more}" if names else ""
