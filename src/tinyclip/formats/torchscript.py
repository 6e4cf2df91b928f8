"""TorchScript archives (`torch.jit.save`) -> named tensors, without executing or building anything else.

An archive is a zip file. `data.pkl` is the tree of modules, a pickle of classes that only the archive's own code
defines; `data/0`, `data/1`, ... are the bytes of its tensors; `code/` is never looked at. The pickle is read by an
unpickler that knows tensors and plain values, and makes every module an empty object that holds its attributes.
Format: torch/csrc/jit/docs/serialization.md in PyTorch.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04" or not zipfile.is_zipfile(file):
            return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The tensors of all modules under their dotted names.

    Raises UnpicklingError where the pickle asks for anything but modules, tensors and plain values, and other
    exceptions for a damaged archive.
    """
    with zipfile.ZipFile(path) as archive:
        data = [info for info in archive.infolist() if "/code/" not in info.filename]
        if sum(info.file_size for info in data) > path.stat().st_size:
            raise ValueError("the archive would unpack to more than its own size")
        (tree,) = (info.filename for info in data if info.filename.split("/")[1:] == ["data.pkl"])
        reader = _Unpickler(archive, tree)
        return dict(_tensors(reader.load(), "", reader.Module, set()))


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, tree: str):
        super().__init__(archive.open(tree))
        self.archive, self.folder, self.storages = archive, tree.removesuffix(".pkl"), {}
        # Made for this file: a pickle can write attributes of what it is given.
        self.Module = type("Module", (), {})
        self.known = {
            ("collections", "OrderedDict"): OrderedDict,  # of hooks, always empty
            ("torch._utils", "_rebuild_tensor_v2"): lambda flat, offset, shape, stride, *_: flat.as_strided(
                shape, stride, offset
            ),
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
            **{("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "double", "bool", "tensor")},
            **{("torch", name): dtype for name, dtype in STORAGES.items()},
        }

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name.split(".")[0] == "__torch__":
            return self.Module
        if (module_name, global_name) not in self.known:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not a tensor")
        return self.known[module_name, global_name]

    def persistent_load(self, pid: Any, /) -> Tensor:
        _, dtype, key, _, numel = pid  # "storage", its type, its file in data/, its device then, its length
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.folder}/{key}"))
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self.storages[key][:numel]


def _tensors(value: Any, name: str, kind: type, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors below a module. A module that occurs twice is refused: it could be its own child."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, kind):
        if id(value) in seen:
            raise ValueError(f"the module {name} occurs twice")
        seen.add(id(value))
        for attribute, child in vars(value).items():
            yield from _tensors(child, f"{name}.{attribute}" if name else attribute, kind, seen)
