"""Stock libraries know one kind of tower: blocks all alike, heads x head size = width. What fits, and padding to it.

Of a ResNet they know the one whose inner convolutions write width x 2^stage channels.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from tinyclip.model import CLIP, BlockConfig, CLIPConfig, TowerConfig
from tinyclip.model_resnet import ResNetConfig, stock_block

AnyTower = TypeVar("AnyTower", bound=TowerConfig)


def is_uniform(config: CLIPConfig) -> bool:
    return not any(map(why_not, (config.image, config.text)))


def why_not(tower: TowerConfig | ResNetConfig) -> str | None:
    """What stock blocks lack, or None for a tower that has such blocks."""
    if isinstance(tower, ResNetConfig):
        alike = all(place.block == stock_block(tower.width, place.stage) for place in tower.blocks())
        return None if alike else "channels were cut inside its blocks"
    block = tower.blocks[0]
    if any(other != block for other in tower.blocks):
        return "its blocks differ"
    if not block.ffn:
        return "its blocks have no neurons"
    if block.heads * tower.head_dim != tower.width:
        return f"{block.heads} heads of {tower.head_dim} are not its width, {tower.width}"
    return None


@torch.no_grad()
def pad(model: CLIP) -> CLIP:
    """The same function as a uniform model, on the same device: missing heads and neurons are zeros and add nothing.

    Every block becomes as large as the largest, and has width / head size heads. Raises ValueError, naming the tower,
    where that is not a whole number or too few: the width itself cannot be padded, since zeros in it would change the
    mean and the variance of every LayerNorm.
    """
    image, text = model.config.image, model.config.text
    padded_image = _padded_resnet(image) if isinstance(image, ResNetConfig) else _padded("image", image)
    config = model.config.model_copy(update={"image": padded_image, "text": _padded("text", text)})
    padded = CLIP(config, preprocess=model.preprocess, tokenizer=model.tokenizer, provenance=model.provenance).to(
        model.device
    )
    rooms = {name: torch.atleast_1d(room.zero_()) for name, room in padded.state_dict().items()}  # views
    for name, weight in model.state_dict().items():
        room = rooms[name.replace("attention.bias", "attention.out.bias").replace("ffn.bias", "ffn.down.bias")]
        if name.endswith(".running_var"):
            room.fill_(1)  # of channels that are zero throughout
        parts = 3 if "qkv" in name else 1  # rows: q, k, v; in each, head after head
        for source, target in zip(torch.atleast_1d(weight).chunk(parts), room.chunk(parts), strict=True):
            target[tuple(slice(size) for size in source.shape)] = source
    return padded.eval()


def _padded_resnet(tower: ResNetConfig) -> ResNetConfig:
    layers = tuple(len(blocks) for blocks in tower.stages)
    stock = ResNetConfig.uniform(image_size=tower.image_size, width=tower.width, layers=layers, head_dim=tower.head_dim)
    for here, there in zip(tower.blocks(), stock.blocks(), strict=True):
        if here.block.conv1 > there.block.conv1 or here.block.conv2 > there.block.conv2:
            raise ValueError(
                f"the image tower cannot be padded: expected at most {there.block.conv1} inner channels in block "
                f"{here.index} of stage {here.stage}, got {here.block.conv1} and {here.block.conv2}"
            )
    return stock


def _padded(name: str, tower: AnyTower) -> AnyTower:
    heads, rest = divmod(tower.width, tower.head_dim)
    most = max(block.heads for block in tower.blocks)
    if rest or most > heads:
        raise ValueError(
            f"the {name} tower cannot be padded: expected a width of whole heads of {tower.head_dim}, at least {most}, "
            f"got {tower.width}; huggingface without padding holds it exactly"
        )
    block = BlockConfig(heads=heads, ffn=max(1, *(block.ffn for block in tower.blocks)))
    return tower.model_copy(update={"blocks": (block,) * len(tower.blocks)})
