"""What a model costs, counted from its config: no model is built.

1 MAC (multiply-accumulate) = 2 FLOPs. Counted are linear layers, convolutions and both attention products (full: no
causal saving, and every query of a ResNet's attention pool), for one image, and for one text of full context length;
biases, norms, activations, soft-max, pooling and the embedding look-up are not. That is how others count, too; ours
computes the last block for one token alone, and no padding of texts.

Shape legend: L tokens, D width, H heads, K head dim, F FFN neurons, E embedding, P patch size, S side of a grid.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from tinyclip.model import BlockConfig, CLIPConfig, ImageConfig, TowerConfig
from tinyclip.model_resnet import ResNetConfig


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Parameter counts and MACs. `text_parameters` are without the token embedding, as in the published names."""

    image_parameters: int
    text_parameters: int
    token_embedding_parameters: int
    parameters: int  # all, with the logit scale
    image_macs: int
    text_macs: int


def cost(config: CLIPConfig) -> Cost:
    """Count the model that `CLIP(config)` would build."""
    image, text, E = config.image, config.text, config.embed_dim
    image_parameters, image_macs = _resnet(image, E) if isinstance(image, ResNetConfig) else _vit(image, E)
    text_vectors = text.context_length + 2  # positions, final norm
    text_parameters = text.width * (text_vectors + E) + _block_parameters(text)
    token_embedding_parameters = text.vocab_size * text.width
    return Cost(
        image_parameters=image_parameters,
        text_parameters=text_parameters,
        token_embedding_parameters=token_embedding_parameters,
        parameters=image_parameters + text_parameters + token_embedding_parameters + 1,
        image_macs=image_macs,
        text_macs=text.width * E + _block_macs(text, text.context_length),
    )


def size_mb(config: CLIPConfig, bytes_per_parameter: float = 4) -> float:
    """Size of the weights in MB (10^6 bytes)."""
    return cost(config).parameters * bytes_per_parameter / 1e6


def describe(config: CLIPConfig) -> dict[str, object]:
    """What `tinyclip inspect --json` prints: the cost, and the shape of both towers, layer by layer."""
    image, text = config.image, config.text
    return {
        **asdict(cost(config)),
        "size_mb": size_mb(config),
        "embed_dim": config.embed_dim,
        "activation": config.activation,
        "image_size": image.image_size,
        "image_width": image.width,
        "image_head_dim": image.head_dim,
        **_image_shape(image),
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "text_width": text.width,
        "text_head_dim": text.head_dim,
        "text_heads": [block.heads for block in text.blocks],
        "text_ffn": [block.ffn for block in text.blocks],
    }


def rows(config: CLIPConfig) -> Iterator[tuple[str, str, str]]:
    """`describe` for people: rows of what, the image tower's, the text tower's."""
    image, text, costs = config.image, config.text, cost(config)

    def counts(numbers: Iterable[int]) -> str:
        first, *others = numbers
        return f"{first} each" if all(other == first for other in others) else " ".join(map(str, (first, *others)))

    yield "parameters", f"{costs.image_parameters:,}", f"{costs.text_parameters:,} (without the token embedding)"
    yield "token embedding", "", f"{costs.token_embedding_parameters:,}"
    yield "multiply-accumulates", f"{costs.image_macs:,}", f"{costs.text_macs:,}"
    heads = counts(block.heads for block in text.blocks)
    neurons = counts(block.ffn for block in text.blocks)
    if isinstance(image, ResNetConfig):
        yield "reads", f"{image.image_size} px", f"{text.context_length} tokens"
        yield "layers", f"{' '.join(str(len(blocks)) for blocks in image.stages)} (ResNet)", str(len(text.blocks))
        yield "width", f"{image.width}", f"{text.width}"
        yield "head size", f"{image.head_dim}", f"{text.head_dim}"
        yield "heads per layer", f"{image.heads} (in the attention pool)", heads
        yield "neurons per layer", "", neurons
        yield "1x1 channels per layer", " ".join(str(place.block.conv1) for place in image.blocks()), ""
        yield "3x3 channels per layer", " ".join(str(place.block.conv2) for place in image.blocks()), ""
        return
    yield "reads", f"{image.image_size} px, patches of {image.patch_size}", f"{text.context_length} tokens"
    yield "layers", str(len(image.blocks)), str(len(text.blocks))
    yield "width", f"{image.width}", f"{text.width}"
    yield "head size", f"{image.head_dim}", f"{text.head_dim}"
    yield "heads per layer", counts(block.heads for block in image.blocks), heads
    yield "neurons per layer", counts(block.ffn for block in image.blocks), neurons


def _image_shape(image: ImageConfig | ResNetConfig) -> dict[str, object]:
    if isinstance(image, ImageConfig):
        return {
            "patch_size": image.patch_size,
            "image_heads": [block.heads for block in image.blocks],
            "image_ffn": [block.ffn for block in image.blocks],
        }
    return {
        "image_layers": [len(blocks) for blocks in image.stages],
        "image_conv1": [place.block.conv1 for place in image.blocks()],
        "image_conv2": [place.block.conv2 for place in image.blocks()],
    }


def _vit(image: ImageConfig, E: int) -> tuple[int, int]:
    """Parameters and MACs."""
    L, D, patch_weights = image.num_tokens, image.width, 3 * image.patch_size**2 * image.width
    vectors = L + 1 + 2 + 2  # positions, class token, norm before the blocks, norm after
    parameters = patch_weights + D * (vectors + E) + _block_parameters(image)
    return parameters, (L - 1) * patch_weights + D * E + _block_macs(image, L)


def _resnet(image: ResNetConfig, E: int) -> tuple[int, int]:
    """Parameters (without running statistics) and MACs."""
    width, L, D, S = image.width, image.num_tokens, image.num_features, image.image_size // 2
    stem = 9 * (3 * width // 2 + width * width // 4 + width * width // 2)
    pool = 3 * D * D + D * E
    parameters = stem + 2 * 2 * width + image.prunable_params + pool + L * D + 3 * D + E
    macs = stem * S * S + L * pool + 2 * L * L * D
    S //= 2
    for place in image.blocks():
        first, second, shortcut = place.block.conv1, place.block.conv2, 0
        if place.has_shortcut:
            shortcut = place.channels_in * place.channels_out
            parameters += shortcut + 2 * place.channels_out
        macs += (place.channels_in * first + 9 * first * second) * S * S
        S //= place.stride
        macs += (second * place.channels_out + shortcut) * S * S
    return parameters, macs


def _block_parameters(tower: TowerConfig) -> int:
    """Attention and FFN, and a norm (weight and bias) before each of them that is there."""
    norms = sum((block.heads > 0) + (block.ffn > 0) for block in tower.blocks)
    return tower.prunable_params + norms * 2 * tower.width


def _block_macs(tower: TowerConfig, num_tokens: int) -> int:
    L, D = num_tokens, tower.width

    def macs(block: BlockConfig) -> int:
        HK = block.heads * tower.head_dim
        return 4 * L * D * HK + 2 * L * L * HK + 2 * L * D * block.ffn  # q, k, v, out; q @ k and p @ v; up and down

    return sum(macs(block) for block in tower.blocks)
