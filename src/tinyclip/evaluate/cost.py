"""What a model costs, counted from its config: no model is built.

1 MAC (multiply-accumulate) = 2 FLOPs. Counted are the linear layers, the patch embedding and both attention products
(full, no causal saving), for one image, and for one text of full context length; biases, norms, activations,
soft-max, pooling and the embedding look-up are not.

Shape legend: L tokens, D width, H heads, K head dim, F FFN neurons, E embedding, P patch size.
"""

from dataclasses import asdict, dataclass

from tinyclip.model import BlockConfig, CLIPConfig, TowerConfig


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
    patch_weights = 3 * image.patch_size**2 * image.width
    image_vectors = image.num_tokens + 1 + 2 + 2  # positions, class token, norm before the blocks, norm after
    text_vectors = text.context_length + 2  # positions, final norm
    image_parameters = patch_weights + image.width * (image_vectors + E) + _block_parameters(image)
    text_parameters = text.width * (text_vectors + E) + _block_parameters(text)
    token_embedding_parameters = text.vocab_size * text.width
    return Cost(
        image_parameters=image_parameters,
        text_parameters=text_parameters,
        token_embedding_parameters=token_embedding_parameters,
        parameters=image_parameters + text_parameters + token_embedding_parameters + 1,
        image_macs=(image.num_tokens - 1) * patch_weights + image.width * E + _block_macs(image, image.num_tokens),
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
        "patch_size": image.patch_size,
        "image_width": image.width,
        "image_head_dim": image.head_dim,
        "image_heads": [block.heads for block in image.blocks],
        "image_ffn": [block.ffn for block in image.blocks],
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "text_width": text.width,
        "text_head_dim": text.head_dim,
        "text_heads": [block.heads for block in text.blocks],
        "text_ffn": [block.ffn for block in text.blocks],
    }


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
