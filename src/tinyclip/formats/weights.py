"""Files of tensors -> a model whose every weight was expected. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file
from torch import Tensor

from tinyclip.model import CLIP, CLIPConfig

NUM_NAMED = 3  # keys that an error names


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt, .pth or .bin file without code; {"state_dict": ...} is unwrapped.

    Raises FileNotFoundError, or ValueError for a damaged file and one that holds more than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a checkpoint file, found none")
    try:
        is_safe = path.suffix == ".safetensors"
        state = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise ValueError(f"{path}: expected tensors only; the file holds code or is damaged, and is not read") from None
    except Exception as error:  # a damaged file can fail anywhere in the parsers
        raise ValueError(f"{path}: not a readable checkpoint: {first_line(error)}") from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: expected a mapping of names to tensors, got {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: expected tensors only, got {type(value).__name__} at {key!r}")
    return dict(state)


def on_meta(config: CLIPConfig) -> CLIP:
    """The model without memory for its weights. Raises ValueError for sizes beyond any memory."""
    try:
        with torch.device("meta"):
            return CLIP(config)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"the config describes a model that cannot be built: {first_line(error)}") from None


def check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError unless names and shapes are the expected ones and all values are finite floats."""
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
    check_finite(state, where)


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError for weights that are not floats, or hold NaN or infinity."""
    whole = [f"{name} ({tensor.dtype})" for name, tensor in state.items() if not tensor.is_floating_point()]
    if whole:
        raise ValueError(f"{where}: expected floating-point weights; {_listed('others', whole)}")
    extremes = {name: torch.stack(torch.aminmax(tensor.float())) for name, tensor in state.items()}  # NaN propagates
    broken = [name for name, low_high in extremes.items() if not low_high.isfinite().all()]
    if broken:
        raise ValueError(f"{where}: expected finite weights; {_listed('with NaN or infinity', broken)}")


def fill(model: CLIP, state: Mapping[str, Tensor], device: str | torch.device = "cpu") -> CLIP:
    """Give a model from `on_meta` its weights, in fp32, and evaluation mode."""
    model.load_state_dict({name: tensor.to(device, torch.float32) for name, tensor in state.items()}, assign=True)
    return model.eval()


def first_line(error: Exception) -> str:
    """What foreign code says, short enough for one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _listed(what: str, names: list[str]) -> str:
    """`3 missing: a, b, c`, or nothing where there are none."""
    more = ", ..." if len(names) > NUM_NAMED else ""
    return f"{len(names)} {what}: {', '.join(names[:NUM_NAMED])}{more}" if names else ""
