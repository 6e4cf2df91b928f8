"""Files of torch.save give the tensors that torch.load gives; what claims more than the file holds is refused at once.

CPU only. Bombs: members that inflate, storages of a terabyte, a memo of four billion places.
"""

import pickle
import struct
import tracemalloc
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch

from tinyclip.formats import weights
from tinyclip.model import CLIPConfig

CONFIG = CLIPConfig.uniform(
    embed_dim=6, image_size=8, patch_size=4, image_width=8, image_layers=1, text_width=8, text_layers=1,
    context_length=10, vocab_size=514, head_dim=4,
)  # fmt: skip
FORMS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])


def tensors() -> OrderedDict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(6, 5, generator=generator)
    types = ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    state = {name: (10 * torch.rand(3, 2, generator=generator)).to(getattr(torch, name)) for name in types}
    views = {"whole": whole, "rows": whole[2:4], "turned": whole.T, "every_other": whole[::2, 1::2]}
    special = {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "parameter": torch.nn.Parameter(torch.ones(2))}
    return OrderedDict(state | views | special)


@FORMS
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_tensor_is_the_one_that_torch_reads(wrapped, zipped, tmp_path):
    beside = {"epoch": 3, "name": "run", "optimizer": {"state": {0: {"step": torch.ones(1)}}, "betas": (0.9, 0.98)}}
    beside |= {"milestones": Counter([1, 1]), "shape": torch.Size([2]), "type": torch.float32, "seen": {1, 2}}
    content = {**beside, "state_dict": tensors()} if wrapped else tensors()
    torch.save(content, tmp_path / "state.pt", _use_new_zipfile_serialization=zipped)
    expected = torch.load(tmp_path / "state.pt", weights_only=True)
    expected = expected["state_dict"] if wrapped else expected
    state = weights.read(tmp_path / "state.pt")
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
        assert state[name].stride() == tensor.stride(), name


def test_a_state_dict_of_a_module_with_its_metadata_is_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    torch.save(module.state_dict(), tmp_path / "state.pt")
    state = weights.read(tmp_path / "state.pt")
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())


def rezipped(path: Path, change: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """The same archive with other members, by the end of their names."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", method) as new:
        for name, content in members.items():
            new.writestr(name, change.get(name.partition("/")[2], content))
    return path


def assert_refused(path: Path, message: str, config: CLIPConfig | None = None) -> None:
    """One line with the file's name, and no more memory than a few times the file."""
    tracemalloc.start()
    with pytest.raises(ValueError, match=message) as error:
        weights.read(path, config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert peak < 2**21 + 20 * path.stat().st_size, peak


@pytest.fixture
def saved(tmp_path) -> Path:
    torch.save({"weight": torch.arange(4.0)}, tmp_path / "state.pt")
    return tmp_path / "state.pt"


def test_a_member_that_inflates_is_not(saved):
    assert_refused(
        rezipped(saved, {"data/0": bytes(10**8)}, zipfile.ZIP_DEFLATED),
        "the archive would unpack to more than its own size",
    )


def test_a_description_that_inflates_is_not(saved):
    assert_refused(
        rezipped(saved, {"data.pkl": b"N0" * 10**7 + b"N."}, zipfile.ZIP_DEFLATED),
        "data.pkl: expected at most 4194304 bytes, got 20000002",
    )


TERABYTE = b"\x8a\x05" + (2**38).to_bytes(5, "little")  # LONG1: numbers of four bytes


@FORMS
def test_a_storage_of_a_terabyte_is_compared_with_the_file_first(zipped, saved):
    torch.save({"weight": torch.arange(4.0)}, saved, _use_new_zipfile_serialization=zipped)
    if zipped:
        with zipfile.ZipFile(saved) as archive:
            content = archive.read("state/data.pkl")
        rezipped(saved, {"data.pkl": content.replace(b"K\x04", TERABYTE)})
        assert_refused(saved, r"data/0: expected 274877906944 numbers of torch.float32, got 16 bytes")
    else:
        content = saved.read_bytes().replace(b"K\x04", TERABYTE)
        saved.write_bytes(content.replace(struct.pack("<Q", 4), struct.pack("<Q", 2**38)))
        assert_refused(saved, "the storage .* is not as long as it should be")


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02Nr\xff\xff\xff\xff.",  # LONG_BINPUT: a memo of 2^32 places
        b"\x80\x02Np4000000000\n.",  # PUT
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",  # BINBYTES8: a terabyte of text follows
        b"\x80\x02](" + b"N" * 1000 + b"eq\x00" + b"ccollections\nOrderedDict\nh\x00\x85R" * 1000 + b".",
        b"\x80\x02cbuiltins\nbytearray\n" + TERABYTE + b"\x85R.",
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b".",
    ],
    ids=["memo", "memo as text", "bytes", "copies", "bytearray", "marks", "nested"],
)
def test_a_pickle_cannot_ask_for_memory(content, saved):
    assert_refused(rezipped(saved, {"data.pkl": content}), "not a readable checkpoint|expected tensors only|a mapping")
    old = pickle.dumps(0x1950A86A20F9469CFC6C) + pickle.dumps(1001) + pickle.dumps({"little_endian": True})
    saved.write_bytes(old + content + pickle.dumps([]))
    assert_refused(saved, "not a readable checkpoint|expected tensors only|a mapping")


def test_numbers_in_another_byte_order_are_refused(saved):
    assert_refused(rezipped(saved, {"byteorder": b"big"}), "expected numbers in little-endian order, got b'big'")


def test_one_flipped_bit_is_noticed(saved):
    content = bytearray(saved.read_bytes())
    content[content.index(struct.pack("<4f", 0, 1, 2, 3)) + 3] ^= 1
    saved.write_bytes(content)
    assert_refused(saved, "data/0: damaged: Bad CRC-32")


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_a_file_larger_than_its_config_can_need_is_not_opened(name, tmp_path, monkeypatch):
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**40)  # a hole
    monkeypatch.setattr(weights, "load_file", lambda *_: pytest.fail("was opened"))
    monkeypatch.setattr(weights, "read_torch_file", lambda *_: pytest.fail("was opened"))
    with pytest.raises(
        ValueError, match=r"expected at most \d+ bytes for the 6513 weights of the config, got 10995116"
    ):
        weights.read(tmp_path / name, CONFIG)
    with pytest.raises(ValueError, match="expected at most 68719476736 bytes for a file that says itself what it is"):
        weights.read(tmp_path / name)


def test_a_training_checkpoint_with_its_optimizer_is_small_enough(tmp_path):
    num_weights = 6513 + 2**20
    state = {"w": torch.zeros(num_weights)}
    torch.save({"state_dict": state, "optimizer": [torch.zeros(num_weights) for _ in range(2)]}, tmp_path / "state.pt")
    assert weights.read(tmp_path / "state.pt", CONFIG)["w"].numel() == num_weights


def test_what_is_no_file_of_torch_is_refused(tmp_path):
    for number, content in enumerate([b"", b"hello", pickle.dumps({"a": 1}), b"PK\x03\x04"]):
        (tmp_path / f"{number}.pt").write_bytes(content)
        assert_refused(tmp_path / f"{number}.pt", "not a readable checkpoint|expected tensors only")
