"""Files of torch.save and torch.jit.save -> named tensors, without executing or building anything else.

Three forms, all of a pickle that describes tensors and of the bytes of their storages:

    zip         torch.save: NAME/data.pkl is the pickle; NAME/data/0, NAME/data/1, ... are the storages
    TorchScript torch.jit.save: the same, the pickle is a tree of modules, of classes that only the archive's own code
                defines; that code is never looked at
    old         torch.save before torch 1.6: five pickles (a magic number, a version, the machine, the description and
                the storages' keys), then each storage as its length and its bytes

The pickle is read by an unpickler that knows plain values and *descriptions* of tensors: no tensor is there while it
runs. Then the wanted ones are read, and nothing is as long as it says but as long as the file: a storage's length is
compared with the file before any memory is taken. Format: torch/csrc/jit/docs/serialization.md in PyTorch, and
`_legacy_load` in torch/serialization.py.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from tinyclip.formats.files import read_member

MAX_PICKLE = 2**22  # bytes; that of a CLIP of 24 blocks with its optimizer's state has a tenth
MAGIC = 0x1950A86A20F9469CFC6C  # of the old form
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
PASSED_OVER = {  # values that may stand beside the weights in the checkpoint of a training
    *(("collections", "Counter"), ("collections", "defaultdict"), ("__builtin__", "set"), ("_codecs", "encode")),
    ("torch", "device"),
    *(("torch", str(dtype).removeprefix("torch.")) for dtype in STORAGES.values()),
}


class Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    numel: int

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Described(NamedTuple):
    """What a pickle says of a tensor: a value, so that the pickle cannot write into it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Module:
    """A module of a TorchScript archive: an empty object that holds its attributes."""


class PassedOver(dict[Any, Any]):
    """Anything that is neither a tensor nor a plain value."""

    def __init__(self, *_: Any):
        super().__init__()


def is_torchscript(path: Path) -> bool:
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04" or not zipfile.is_zipfile(file):
            return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torch_file(path: Path) -> Any:
    """What the file holds, with tensors where it maps names to them; {"state_dict": ...} is unwrapped.

    Of a TorchScript archive the tensors of all modules under their dotted names.
    Raises UnpicklingError where the pickle asks for anything but modules, tensors and plain values, and other
    exceptions for a damaged file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(file) as archive:
                return _tensors(_Archive(archive, size))
        file.seek(0)
        return _tensors(_Old(file, size))


def _tensors(file: _Archive | _Old) -> Any:
    content = file.content
    if isinstance(content, Module):
        content = dict(_below(content, "", set()))
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        return content
    storages: dict[str, Tensor] = {}

    def tensor(own: Described) -> Tensor:
        if own.storage.key not in storages:
            content, dtype = bytearray(file.read(own.storage)), own.storage.dtype
            empty = torch.empty(0, dtype=dtype)
            storages[own.storage.key] = torch.frombuffer(content, dtype=dtype) if content else empty
        return storages[own.storage.key].as_strided(own.shape, own.stride, own.offset)  # or it reaches beyond: an error

    return {name: tensor(own) if isinstance(own, Described) else own for name, own in content.items()}


class _Archive:
    """The zip forms."""

    def __init__(self, archive: zipfile.ZipFile, size: int):
        names = archive.namelist()
        (tree,) = (name for name in names if name.split("/")[1:] == ["data.pkl"])
        self.archive, self.folder, self.left = archive, tree.removesuffix(".pkl"), size
        order = f"{tree.removesuffix('data.pkl')}byteorder"
        if order in names and (found := read_member(archive, order, 16)) != sys.byteorder.encode():
            raise ValueError(f"expected numbers in {sys.byteorder}-endian order, got {found!r}")
        self.content, _ = _unpickled(io.BytesIO(read_member(archive, tree, MAX_PICKLE)))

    def read(self, storage: Storage) -> bytes:
        name = f"{self.folder}/{storage.key}"
        found = self.archive.getinfo(name).file_size
        self.left -= found
        if self.left < 0:
            raise ValueError("the archive would unpack to more than its own size")
        if found != storage.num_bytes:
            raise ValueError(f"{name}: expected {storage.numel} numbers of {storage.dtype}, got {found} bytes")
        return read_member(self.archive, name, found)


class _Old:
    """The old form."""

    def __init__(self, file: BinaryIO, size: int):
        pickles = io.BytesIO(file.read(min(size, MAX_PICKLE)))
        if _unpickled(pickles)[0] != MAGIC:
            raise ValueError("expected a file of torch.save")
        _unpickled(pickles)  # a version
        if _unpickled(pickles)[0]["little_endian"] != (sys.byteorder == "little"):
            raise ValueError(f"expected numbers in {sys.byteorder}-endian order")
        self.content, storages = _unpickled(pickles)
        keys, _ = _unpickled(pickles)
        self.file, self.positions = file, {}
        file.seek(pickles.tell())
        for key in keys:
            length = int.from_bytes(file.read(8), "little")
            if length != storages[key].numel or storages[key].num_bytes > size - file.tell():
                raise ValueError(f"the storage {key:.40} is not as long as it should be")
            self.positions[key] = file.tell()
            file.seek(storages[key].num_bytes, io.SEEK_CUR)

    def read(self, storage: Storage) -> bytes:
        self.file.seek(self.positions[storage.key])
        return self.file.read(storage.num_bytes)


def _unpickled(stream: io.BytesIO) -> tuple[Any, dict[str, Storage]]:
    """The value of the pickle that begins here, and the storages that it names."""
    start = stream.tell()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if "PUT" in opcode.name and isinstance(argument, int) and argument > number:  # the memo is as long as that
            raise pickle.UnpicklingError(f"a memo of {argument} places for {number} values")
    stream.seek(start)
    unpickler = _Unpickler(stream)
    return unpickler.load(), unpickler.storages


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO):
        super().__init__(stream)
        self.storages: dict[str, Storage] = {}
        # Made for this file: a pickle can write attributes of what it is given.
        self.Module, self.PassedOver = type("Module", (Module,), {}), type("PassedOver", (PassedOver,), {})
        self.known = {
            # What takes a list takes none here, or returns it: a copy of a long one for each few bytes has no end.
            ("collections", "OrderedDict"): lambda: OrderedDict(),
            ("torch", "Size"): lambda sides: sides,
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, stride, *_: Described(
                storage, offset, shape, stride
            ),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
            **{
                ("torch.jit._pickle", f"build_{kind}list"): lambda own: own
                for kind in ("int", "double", "bool", "tensor")
            },
            **{("torch", name): dtype for name, dtype in STORAGES.items()},
            **dict.fromkeys(PASSED_OVER, self.PassedOver),
        }

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name.split(".")[0] == "__torch__":
            return self.Module
        if (module_name, global_name) not in self.known:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not a tensor")
        return self.known[module_name, global_name]

    def persistent_load(self, pid: Any, /) -> Storage:
        kind, dtype, key, _, numel, *view = pid  # "storage", its type, its key, its device then, its length
        if kind != "storage" or not isinstance(dtype, torch.dtype) or any(view):
            raise pickle.UnpicklingError(f"expected a storage, got {kind!r:.40}")
        storage = Storage(dtype, key, numel)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"the storage {key:.40} is there twice, with another type or length")
        return storage


def _below(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Described]]:
    """The tensors below a module. A module that occurs twice is refused: it could be its own child."""
    if isinstance(value, Described):
        yield name, value
    elif isinstance(value, Module):
        if id(value) in seen:
            raise ValueError(f"the module {name} occurs twice")
        seen.add(id(value))
        for attribute, child in vars(value).items():
            yield from _below(child, f"{name}.{attribute}" if name else attribute, seen)
