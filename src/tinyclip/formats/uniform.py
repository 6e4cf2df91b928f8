"""Stock libraries know one kind of tower: blocks all alike, heads x head size = width. What fits, and padding to it."""

from __future__ import annotations

import torch

from tinyclip.model import CLIP, BlockConfig, CLIPConfig, TowerConfig


def is_uniform(config: CLIPConfig) -> bool:
    return not any(map(why_not, (config.image, config.text)))


def why_not(tower: TowerConfig) -> str | None:
    """What stock blocks lack, or None for a tower that has such blocks."""
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
    config = model.config.model_copy(
        update={
            "image": image.model_copy(update={"blocks": _padded("image", image)}),
            "text": text.model_copy(update={"blocks": _padded("text", text)}),
        }
    )
    padded = CLIP(config, preprocess=model.preprocess, tokenizer=model.tokenizer, provenance=model.provenance).to(
        model.device
    )
    rooms = {name: torch.atleast_1d(room.zero_()) for name, room in padded.state_dict().items()}  # views
    for name, weight in model.state_dict().items():
        room = rooms[name.replace("attention.bias", "attention.out.bias").replace("ffn.bias", "ffn.down.bias")]
        parts = 3 if "qkv" in name else 1  # rows: q, k, v; in each, head after head
        for source, target in zip(torch.atleast_1d(weight).chunk(parts), room.chunk(parts), strict=True):
            target[tuple(slice(size) for size in source.shape)] = source
    return padded.eval()


def _padded(name: str, tower: TowerConfig) -> tuple[BlockConfig, ...]:
    heads, rest = divmod(tower.width, tower.head_dim)
    most = max(block.heads for block in tower.blocks)
    if rest or most > heads:
        raise ValueError(
            f"the {name} tower cannot be padded: expected a width of whole heads of {tower.head_dim}, at least {most}, "
            f"got {tower.width}; huggingface without padding holds it exactly"
        )
    return (BlockConfig(heads=heads, ffn=max(1, *(block.ffn for block in tower.blocks))),) * len(tower.blocks)
