"""Keep: what survives. `take(model, keep)` is the only place where weights are sliced.

Shape legend: D width, H heads, K head dim, F FFN neurons, E embedding, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Discriminator, Tag
from torch import Tensor

from tinyclip.config import Config
from tinyclip.model import CLIP, BlockConfig, CLIPConfig, Gates, TowerConfig, TowerGates
from tinyclip.model_resnet import ResNetConfig, ResNetGates
from tinyclip.shrink.keep_resnet import ResNetKeep, counts, take_resnet

AnyTower = TypeVar("AnyTower", bound=TowerConfig)


def _check_indices(what: str, indices: tuple[int, ...], size: int, at_least: int) -> None:
    if list(indices) != sorted(set(indices)) or (indices and not 0 <= indices[0] <= indices[-1] < size):
        raise ValueError(f"{what}: expected ascending indices in [0, {size}), got {indices}")
    if len(indices) < at_least:
        raise ValueError(f"{what}: expected at least {at_least}, got none")


class TowerKeep(Config):
    """Surviving indices of one tower, ascending. `heads` and `ffn` have one entry per surviving block."""

    blocks: tuple[int, ...]
    width: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    ffn: tuple[tuple[int, ...], ...]

    def check(self, config: TowerConfig, tower: str) -> None:
        """Raises ValueError where the indices do not fit the tower."""

        def check_indices(what: str, indices: tuple[int, ...], size: int, at_least: int) -> None:
            _check_indices(f"keep.{tower}.{what}", indices, size, at_least)

        check_indices("blocks", self.blocks, len(config.blocks), 1)
        check_indices("width", self.width, config.width, 1)
        if not len(self.heads) == len(self.ffn) == len(self.blocks):
            raise ValueError(
                f"keep.{tower}: expected heads and ffn for {len(self.blocks)} blocks, "
                f"got {len(self.heads)} and {len(self.ffn)}"
            )
        for index, heads, ffn in zip(self.blocks, self.heads, self.ffn, strict=True):
            check_indices(f"heads of block {index}", heads, config.blocks[index].heads, 0)
            check_indices(f"ffn of block {index}", ffn, config.blocks[index].ffn, 0)

    def shrink(self, config: AnyTower) -> AnyTower:
        """The shape that is left."""
        blocks = tuple(BlockConfig(heads=len(h), ffn=len(f)) for h, f in zip(self.heads, self.ffn, strict=True))
        return config.model_copy(update={"width": len(self.width), "blocks": blocks})

    def describe(self, config: TowerConfig, tower: str) -> str:
        """The map: which layers, and how many channels, heads and neurons of how many."""
        layers = "all" if len(self.blocks) == len(config.blocks) else " ".join(map(str, self.blocks))
        return (
            f"{tower}: layers {layers} of {len(config.blocks)}, width {len(self.width)} of {config.width}, "
            f"heads {counts(self.heads)}, neurons {counts(self.ffn)}"
        )

    @classmethod
    def everything(cls, config: TowerConfig) -> TowerKeep:
        return cls(
            blocks=tuple(range(len(config.blocks))),
            width=tuple(range(config.width)),
            heads=tuple(tuple(range(block.heads)) for block in config.blocks),
            ffn=tuple(tuple(range(block.ffn)) for block in config.blocks),
        )

    @classmethod
    def open_gates(cls, gates: TowerGates) -> TowerKeep:
        """Every index whose gate is not zero, in every block."""

        def indices(gate: Tensor) -> tuple[int, ...]:
            return tuple(gate.nonzero().flatten().tolist())

        return cls(
            blocks=tuple(range(len(gates.heads))),
            width=indices(gates.width_D),
            heads=tuple(map(indices, gates.heads)),
            ffn=tuple(map(indices, gates.ffn)),
        )


def _kind(image: Any) -> str:
    """A ResNet's keep, or what is to become one, has a stem."""
    return "resnet" if isinstance(image, ResNetKeep) or (isinstance(image, dict) and "stem" in image) else "vit"


class Keep(Config):
    """What survives of a model; `embed` of the joint embedding's channels, where None is all."""

    image: Annotated[Annotated[TowerKeep, Tag("vit")] | Annotated[ResNetKeep, Tag("resnet")], Discriminator(_kind)]
    text: TowerKeep
    embed: tuple[int, ...] | None = None

    def shrink(self, config: CLIPConfig) -> CLIPConfig:
        """The config of the cut model. Raises ValueError where the indices do not fit."""
        if isinstance(self.image, ResNetKeep) != isinstance(config.image, ResNetConfig):
            got = type(self.image).__name__, type(config.image).__name__
            raise ValueError(f"keep.image: a {got[0]} does not fit a {got[1]}")
        keep: Any = self.image
        keep.check(config.image, "image")
        self.text.check(config.text, "text")
        left: dict[str, Any] = {"image": keep.shrink(config.image), "text": self.text.shrink(config.text)}
        if self.embed is not None:
            _check_indices("keep.embed", self.embed, config.embed_dim, 1)
            left["embed_dim"] = len(self.embed)
        return config.model_copy(update=left)

    def describe(self, config: CLIPConfig) -> str:
        """The map in one line: which layers, and how many channels, heads and neurons of how many.

        Of the embedding only where it is cut.
        """
        before, after = config.prunable_params, self.shrink(config).prunable_params
        keep: Any = self.image
        image, text = keep.describe(config.image, "image"), self.text.describe(config.text, "text")
        embed = "" if self.embed is None else f"; embedding {len(self.embed)} of {config.embed_dim}"
        return f"{before:,} -> {after:,} prunable parameters; {image}; {text}{embed}"

    @classmethod
    def everything(cls, config: CLIPConfig) -> Keep:
        image = config.image
        whole = ResNetKeep.everything(image) if isinstance(image, ResNetConfig) else TowerKeep.everything(image)
        return cls(image=whole, text=TowerKeep.everything(config.text))

    @classmethod
    def open_gates(cls, config: CLIPConfig, gates: Gates) -> Keep:
        """What gates of these values leave: every index whose gate is not zero, in every block."""
        if isinstance(gates.image, ResNetGates):
            assert isinstance(config.image, ResNetConfig), f"gates of a ResNet, config of a {type(config.image)}"
            image = ResNetKeep.open_gates(config.image, gates.image)
        else:
            image = TowerKeep.open_gates(gates.image)
        return cls(image=image, text=TowerKeep.open_gates(gates.text))


@torch.no_grad()
def take(model: CLIP, keep: Keep) -> CLIP:
    """A smaller model with copies of the surviving weights, on the same device. Raises ValueError for a bad keep."""
    with torch.device("meta"):
        small = CLIP(
            keep.shrink(model.config),
            preprocess=model.preprocess,
            tokenizer=model.tokenizer,
            provenance=model.provenance,
        )
    state, config = model.state_dict(), model.config
    image_weights, text_weights = (
        {name.removeprefix(tower): weight for name, weight in state.items() if name.startswith(tower)}
        for tower in ("image.", "text.")
    )
    if isinstance(keep.image, ResNetKeep) and isinstance(config.image, ResNetConfig):
        image = take_resnet(image_weights, config.image, keep.image)
    else:
        assert isinstance(keep.image, TowerKeep) and isinstance(config.image, TowerConfig), "checked by Keep.shrink"
        image = _take_tower(image_weights, config.image, keep.image)
    weights = {f"image.{name}": weight for name, weight in image}
    weights |= {f"text.{name}": weight for name, weight in _take_tower(text_weights, config.text, keep.text)}
    if keep.embed is not None:  # the rows of both projections, and the bias that a ResNet's has
        embed = torch.tensor(keep.embed, device=model.device)
        weights |= {name: weight[embed] for name, weight in weights.items() if ".projection." in name}
    small.load_state_dict(weights | {"logit_scale": model.logit_scale.clone()}, strict=True, assign=True)
    return small.train(model.training)


def _take_tower(weights: dict[str, Tensor], config: TowerConfig, keep: TowerKeep) -> Iterator[tuple[str, Tensor]]:
    """(new name, sliced weight) of every weight that survives in one tower."""
    device = weights["position"].device
    width = torch.tensor(keep.width, device=device)
    for name, weight in weights.items():  # outside the blocks, the width is the last axis but for the patch embedding
        if not name.startswith("blocks."):
            yield name, weight[width] if name == "patch.weight" else weight[..., width]
    for new, old in enumerate(keep.blocks):
        block = {n.removeprefix(f"blocks.{old}."): w for n, w in weights.items() if n.startswith(f"blocks.{old}.")}
        heads = torch.tensor(keep.heads[new], dtype=torch.long, device=device)
        neurons = torch.tensor(keep.ffn[new], dtype=torch.long, device=device)
        branches = _take_attention(block, config.head_dim, width, heads) | _take_ffn(block, width, neurons)
        yield from ((f"blocks.{new}.{name}", weight) for name, weight in branches.items())


def _take_attention(block: dict[str, Tensor], head_dim: int, width: Tensor, heads: Tensor) -> dict[str, Tensor]:
    if not len(heads):
        bias_D = block["attention.out.bias"] if "attention.out.bias" in block else block["attention.bias"]
        return {"attention.bias": bias_D[width]}
    qkv_3HKD = block["attention.qkv.weight"].unflatten(0, (3, -1, head_dim))
    qkv_3HK = block["attention.qkv.bias"].unflatten(0, (3, -1, head_dim))
    out_DHK = block["attention.out.weight"].unflatten(1, (-1, head_dim))
    return {
        "attention.norm.weight": block["attention.norm.weight"][width],
        "attention.norm.bias": block["attention.norm.bias"][width],
        "attention.qkv.weight": qkv_3HKD[:, heads][..., width].flatten(0, 2),
        "attention.qkv.bias": qkv_3HK[:, heads].flatten(),
        "attention.out.weight": out_DHK[width][:, heads].flatten(1),
        "attention.out.bias": block["attention.out.bias"][width],
    }


def _take_ffn(block: dict[str, Tensor], width: Tensor, neurons: Tensor) -> dict[str, Tensor]:
    if not len(neurons):
        return {"ffn.bias": (block["ffn.down.bias"] if "ffn.down.bias" in block else block["ffn.bias"])[width]}
    return {
        "ffn.norm.weight": block["ffn.norm.weight"][width],
        "ffn.norm.bias": block["ffn.norm.bias"][width],
        "ffn.up.weight": block["ffn.up.weight"][neurons][:, width],
        "ffn.up.bias": block["ffn.up.bias"][neurons],
        "ffn.down.weight": block["ffn.down.weight"][width][:, neurons],
        "ffn.down.bias": block["ffn.down.bias"][width],
    }
