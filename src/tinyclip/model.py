"""The model: two towers, one for images and one for captions, that meet in one embedding space.

Here are the transformers; the other image tower, a ResNet, is model_resnet.py. Every block says how many heads and FFN
neurons it has, so a shrunk student is an ordinary instance of the same classes. Read top-down: configs, blocks, towers,
CLIP. Source of the architecture: Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision" (2021); equal to open_clip's towers.

A *gate* is a value in [0, 1] that multiplies a head, an FFN neuron or a channel of the residual stream
(`Gates` below). `shrink/masks.py` learns gates, `shrink/keep.py` cuts what they close.

Shape legend: B pairs, L tokens, D width, H heads, K head dim, F FFN neurons, E embedding, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self, cast

import torch
from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tinyclip.config import Config
from tinyclip.device import to_device
from tinyclip.model_resnet import ResNetConfig, ResNetGates, ResNetTower, initialise_resnet
from tinyclip.preprocess import Preprocess
from tinyclip.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL import Image

    from tinyclip.formats.provenance import Provenance

MACS_PER_CALL = {"cpu": 5e7, "cuda": 1e10}  # the price of calling a block once more: LOG.md; of a GPU a guess
COMPILER = "inductor"
MAX_SCALE = 100.0  # 1 / temperature is clipped here, as in CLIP (section 2.5)
LARGEST_LOGIT_SCALE = math.log(MAX_SCALE) - 1e-6  # in fp32, exp(log(100)) is 100.00001


class BlockConfig(Config):
    """One transformer block. A block without heads or neurons still adds its output bias."""

    heads: int = Field(ge=0)
    ffn: int = Field(ge=0, description="hidden neurons of the feed-forward network")

    def num_params(self, width: int, head_dim: int) -> int:
        """Attention and FFN weights and biases: the parameters that the published constraint counts."""
        attention = self.heads * head_dim * (4 * width + 3) + width
        return attention + self.ffn * (2 * width + 1) + width


class TowerConfig(Config):
    width: int = Field(gt=0, le=65536)
    head_dim: int = Field(gt=0, le=65536)
    blocks: tuple[BlockConfig, ...] = Field(min_length=1, max_length=1024)

    @property
    def prunable_params(self) -> int:
        """Parameters of attention and FFN of every block (the paper's prunable set)."""
        return sum(block.num_params(self.width, self.head_dim) for block in self.blocks)


class ImageConfig(TowerConfig):
    image_size: int = Field(gt=0, le=16384)
    patch_size: int = Field(gt=0, le=16384)

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1  # + the class token

    @model_validator(mode="after")
    def _patch_fits(self) -> Self:
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size {self.patch_size} is larger than image_size {self.image_size}")
        return self


class TextConfig(TowerConfig):
    context_length: int = Field(gt=1, le=65536)
    vocab_size: int = Field(gt=2, le=2**24)


def _kind(image: Any) -> str:
    """A ResNet's config, or what is to become one, has stages."""
    return "resnet" if isinstance(image, ResNetConfig) or (isinstance(image, dict) and "stages" in image) else "vit"


class CLIPConfig(Config):
    """Everything that decides the shapes and the arithmetic of a model."""

    embed_dim: int = Field(gt=0, le=65536)
    activation: Literal["gelu", "quick_gelu"] = Field(default="gelu", description="in transformer blocks")
    norm_eps: float = Field(default=1e-5, gt=0, description="of LayerNorms")
    image: Annotated[Annotated[ImageConfig, Tag("vit")] | Annotated[ResNetConfig, Tag("resnet")], Discriminator(_kind)]
    text: TextConfig

    @property
    def prunable_params(self) -> int:
        return self.image.prunable_params + self.text.prunable_params

    @classmethod
    def uniform(
        cls,
        *,
        embed_dim: int,
        image_size: int,
        patch_size: int | None = None,
        image_width: int,
        image_layers: int | tuple[int, ...],
        text_width: int,
        text_layers: int,
        context_length: int = 77,
        vocab_size: int = 49408,
        head_dim: int = 64,
        activation: Literal["gelu", "quick_gelu"] = "gelu",
    ) -> CLIPConfig:
        """The usual shape: every block alike, width / head_dim heads, 4 x width neurons.

        The image tower is a ResNet where `image_layers` are four numbers and there is no patch size.
        Raises ValueError where a width is not a multiple of the head size.
        """

        def blocks(tower: str, width: int, layers: int) -> tuple[BlockConfig, ...]:
            if width % head_dim:
                raise ValueError(f"{tower} width {width} is not a multiple of the head size {head_dim}")
            return (BlockConfig(heads=width // head_dim, ffn=4 * width),) * layers

        if isinstance(image_layers, int) and patch_size is not None:
            image = ImageConfig(
                width=image_width,
                head_dim=head_dim,
                blocks=blocks("image", image_width, image_layers),
                image_size=image_size,
                patch_size=patch_size,
            )
        elif not isinstance(image_layers, int) and patch_size is None:
            image = ResNetConfig.uniform(
                image_size=image_size, width=image_width, layers=image_layers, head_dim=head_dim
            )
        else:
            raise ValueError(
                "expected a number of image layers and a patch size (a ViT), or four numbers of layers and no patch "
                f"size (a ResNet), got {image_layers} and {patch_size}"
            )
        return cls(
            embed_dim=embed_dim,
            activation=activation,
            image=image,
            text=TextConfig(
                width=text_width,
                head_dim=head_dim,
                blocks=blocks("text", text_width, text_layers),
                context_length=context_length,
                vocab_size=vocab_size,
            ),
        )


class TowerGates(NamedTuple):
    """Gate values of one tower, each in [0, 1]: the residual stream's channels, and per block heads and neurons."""

    width_D: Tensor
    heads: tuple[Tensor, ...]  # per block [H]
    ffn: tuple[Tensor, ...]  # per block [F]

    def map(self, function: Callable[[Tensor], Tensor]) -> TowerGates:
        return TowerGates(function(self.width_D), tuple(map(function, self.heads)), tuple(map(function, self.ffn)))

    def flat(self) -> list[Tensor]:
        return [self.width_D, *self.heads, *self.ffn]


class Gates(NamedTuple):
    image: TowerGates | ResNetGates
    text: TowerGates

    def map(self, function: Callable[[Tensor], Tensor]) -> Gates:
        """`function` of every gate vector, in the order of `flat`."""
        return Gates(self.image.map(function), self.text.map(function))

    def flat(self) -> list[Tensor]:
        return [*self.image.flat(), *self.text.flat()]


class LayerNorm(nn.LayerNorm):
    """LayerNorm; with a width gate, over the open channels only. In the closed ones, input and output are 0.

    Of D channels n are open. Put the closed ones at the mean of the open ones, and the open ones sqrt(D / n) times as
    far from it: mean and variance over all channels are then those of the open ones, for a common LayerNorm to take.
    So there is no index_select and no host sync, and it equals LayerNorm of the cut model. The mean is taken twice,
    the second time of what the first left: rows of nearly equal values lose no digits, and one open channel gives its
    bias exactly. A shift changes nothing in the result, so the first mean needs no gradient.
    """

    def forward(self, input: Tensor, width_D: Tensor | None = None) -> Tensor:
        if width_D is None:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        open_D = (width_D > 0).to(x.dtype)
        num_open = open_D.sum().clamp(min=1)
        stretch = (len(open_D) / num_open).sqrt()
        x = torch.addcmul(x, open_D, x.detach().sum(-1, keepdim=True) / num_open, value=-1)
        x = torch.lerp(x.sum(-1, keepdim=True) / num_open, x, open_D * stretch)
        weight_D, bias_D = self.weight * (open_D / stretch), self.bias * open_D
        return F.layer_norm(x, self.normalized_shape, weight_D, bias_D, self.eps).to(input.dtype)


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear. On a CPU the bias follows the product: torch would fill the output with it and read that back."""
    if bias is None or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    y = F.linear(x, weight)
    return y.add_(bias.to(y.dtype))


class OutputBias(nn.Module):
    """A branch that lost all its heads or neurons: what is left of it is its output bias."""

    def __init__(self, width: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_BLD: Tensor, width_D: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        return self.bias if width_D is None else self.bias * width_D

    def read(self, x_BLD: Tensor, at_B: Tensor, width_D: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        return self(x_BLD, width_D)


def attend(
    q_BHQK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, *, causal: bool = False, last_B: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v by SDPA, but on a CPU in three products.

    With `last_B`, row b attends to positions up to last_B[b] only.
    At CLIP's lengths SDPA's CPU kernel is several times slower, forward and backward: benchmarks/attention.py.
    """
    (B, H, Q, K), L, device = q_BHQK.shape, k_BHLK.shape[-2], q_BHQK.device
    seen = None if last_B is None else torch.arange(L, device=device) <= last_B[:, None]
    if device.type != "cpu":
        mask = None if seen is None else seen[:, None, None]
        return F.scaled_dot_product_attention(q_BHQK, k_BHLK, v_BHLK, attn_mask=mask, is_causal=causal)
    q_GQK, k_GLK, v_GLK = (x.flatten(0, 1) for x in (q_BHQK, k_BHLK, v_BHLK))  # G = B H
    mask = None
    if causal:
        mask = q_GQK.new_full((L, L), -torch.inf).triu(1)
    elif seen is not None:
        mask = q_GQK.new_zeros(B, L).masked_fill(~seen, -torch.inf).repeat_interleave(H, 0)[:, None]
    if mask is None:
        score_GQL = torch.bmm(q_GQK * K**-0.5, k_GLK.transpose(1, 2))
    else:
        score_GQL = torch.baddbmm(mask, q_GQK, k_GLK.transpose(1, 2), alpha=K**-0.5)
    return torch.bmm(score_GQL.softmax(-1).to(v_GLK.dtype), v_GLK).view(B, H, Q, K)


class Attention(nn.Module):
    """Pre-norm multi-head self-attention."""

    def __init__(self, width: int, heads: int, head_dim: int, *, causal: bool, eps: float):
        super().__init__()
        self.heads, self.head_dim, self.causal = heads, head_dim, causal
        self.norm = LayerNorm(width, eps=eps)
        self.qkv = Linear(width, 3 * heads * head_dim)  # rows: q, k, v; in each, head after head
        self.out = Linear(heads * head_dim, width)

    def forward(self, x_BLD: Tensor, width_D: Tensor | None = None, gate_H: Tensor | None = None) -> Tensor:
        qkv = self.qkv(self.norm(x_BLD, width_D)).unflatten(-1, (3, self.heads, self.head_dim))
        q_BHLK, k_BHLK, v_BHLK = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self._leave(attend(q_BHLK, k_BHLK, v_BHLK, causal=self.causal), width_D, gate_H)

    def read(self, x_BLD: Tensor, at_B: Tensor, width_D: Tensor | None = None, gate_H: Tensor | None = None) -> Tensor:
        """`forward` at one position of each row, [B, 1, D]: keys and values of all positions, one query."""
        normed_BLD, HK = self.norm(x_BLD, width_D), self.heads * self.head_dim
        (q_weight, kv_weight), (q_bias, kv_bias) = (
            part.split([HK, 2 * HK]) for part in (self.qkv.weight, self.qkv.bias)
        )
        q_BHQK = (
            linear(_rows(normed_BLD, at_B[:, None]), q_weight, q_bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        )
        kv = linear(normed_BLD, kv_weight, kv_bias).unflatten(-1, (2, self.heads, self.head_dim))
        k_BHLK, v_BHLK = kv.permute(2, 0, 3, 1, 4).unbind(0)
        y_BHQK = attend(q_BHQK, k_BHLK, v_BHLK, last_B=at_B if self.causal else None)
        return self._leave(y_BHQK, width_D, gate_H)

    def _leave(self, y_BHQK: Tensor, width_D: Tensor | None, gate_H: Tensor | None) -> Tensor:
        gate = None if gate_H is None else gate_H.repeat_interleave(self.head_dim)
        return _gated_linear(self.out, y_BHQK.transpose(1, 2).flatten(2), width_D, gate)


class FeedForward(nn.Module):
    """Pre-norm two-layer network."""

    def __init__(self, width: int, ffn: int, *, activation: str, eps: float):
        super().__init__()
        self.activation = activation
        self.norm = LayerNorm(width, eps=eps)
        self.up = Linear(width, ffn)
        self.down = Linear(ffn, width)

    def forward(self, x_BLD: Tensor, width_D: Tensor | None = None, gate_F: Tensor | None = None) -> Tensor:
        h_BLF = self.up(self.norm(x_BLD, width_D))
        h_BLF = F.gelu(h_BLF) if self.activation == "gelu" else h_BLF * torch.sigmoid(1.702 * h_BLF)
        return _gated_linear(self.down, h_BLF, width_D, gate_F)


class Block(nn.Module):
    """x + attention(x), then x + ffn(x)."""

    def __init__(self, config: BlockConfig, tower: TowerConfig, clip: CLIPConfig, *, causal: bool):
        super().__init__()
        D, eps = tower.width, clip.norm_eps
        self.attention: Attention | OutputBias = OutputBias(D)
        self.ffn: FeedForward | OutputBias = OutputBias(D)
        if config.heads:
            self.attention = Attention(D, config.heads, tower.head_dim, causal=causal, eps=eps)
        if config.ffn:
            self.ffn = FeedForward(D, config.ffn, activation=clip.activation, eps=eps)

    def forward(
        self,
        x_BLD: Tensor,
        width_D: Tensor | None = None,
        gate_H: Tensor | None = None,
        gate_F: Tensor | None = None,
    ) -> Tensor:
        x_BLD = x_BLD + self.attention(x_BLD, width_D, gate_H)
        return x_BLD + self.ffn(x_BLD, width_D, gate_F)

    def read(
        self,
        x_BLD: Tensor,
        at_B: Tensor,
        width_D: Tensor | None = None,
        gate_H: Tensor | None = None,
        gate_F: Tensor | None = None,
    ) -> Tensor:
        """`forward` at one position of each row, [B, D]: of the last block nothing else is used."""
        x_B1D = _rows(x_BLD, at_B[:, None]) + self.attention.read(x_BLD, at_B, width_D, gate_H)
        return (x_B1D + self.ffn(x_B1D, width_D, gate_F))[:, 0]


def _rows(x_BLD: Tensor, at_Bn: Tensor) -> Tensor:
    """x_BLD[b, at_Bn[b]], [B, n, D]."""
    return x_BLD.gather(1, at_Bn[:, :, None].expand(-1, -1, x_BLD.shape[-1]))


def _gated_linear(layer: nn.Linear, y_BLF: Tensor, width_D: Tensor | None, gate_F: Tensor | None) -> Tensor:
    """layer(y * gate) * width. The gates multiply the weights, or the activations where those are fewer.

    Compiled, always the activations: both ways would be traced, and these products are fused with their neighbours.
    """
    if width_D is None or gate_F is None:
        return layer(y_BLF)
    if torch.compiler.is_compiling() or y_BLF.shape[:-1].numel() < layer.out_features:
        y_BLD = layer(y_BLF * gate_F.to(y_BLF.dtype))
        return y_BLD * width_D.to(y_BLD.dtype)
    return linear(y_BLF, layer.weight * gate_F * width_D[:, None], layer.bias * width_D)


class Tower(nn.Module):
    """The blocks that both towers share."""

    def __init__(self, config: TowerConfig, clip: CLIPConfig, *, causal: bool):
        super().__init__()
        blocks = nn.ModuleList(Block(block, config, clip, causal=causal) for block in config.blocks)
        self.blocks = cast("Sequence[Block]", blocks)
        self.recompute = False  # gradient checkpointing: keep only each block's input for backward

    def run_blocks(self, x_BLD: Tensor, at_B: Tensor, gates: TowerGates | None) -> Tensor:
        """What the blocks make of the position `at_B` of each row, [B, D]."""
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            inputs = (x_BLD, at_B) if index == last else (x_BLD,)
            if gates is not None:
                inputs = (*inputs, gates.width_D, gates.heads[index], gates.ffn[index])
            run = block.read if index == last else block
            if self.recompute and torch.is_grad_enabled():
                x_BLD = cast(Tensor, checkpoint(run, *inputs, use_reentrant=False))
            else:
                x_BLD = run(*inputs)
        return x_BLD


class ImageTower(Tower):
    """Pixels -> patches + class token -> blocks -> the class token, normed and projected."""

    def __init__(self, config: ImageConfig, clip: CLIPConfig):
        super().__init__(config, clip, causal=False)
        self.patch_size = config.patch_size
        self.patch = nn.Linear(3 * config.patch_size**2, config.width, bias=False)  # a convolution with stride = kernel
        self.class_embedding = nn.Parameter(torch.zeros(config.width))
        self.position = nn.Parameter(torch.zeros(config.num_tokens, config.width))
        self.norm_pre = LayerNorm(config.width, eps=clip.norm_eps)
        self.norm_post = LayerNorm(config.width, eps=clip.norm_eps)
        self.projection = nn.Linear(config.width, clip.embed_dim, bias=False)

    def forward(self, pixels_BCHW: Tensor, gates: TowerGates | None = None, seen_Bn: Tensor | None = None) -> Tensor:
        """[B, E]; with `seen_Bn`, of the n patches of each image that it numbers (row by row, from 0)."""
        B, C, height, width = pixels_BCHW.shape
        P = self.patch_size
        rows, columns = height // P, width // P
        patches = pixels_BCHW[:, :, : rows * P, : columns * P].view(B, C, rows, P, columns, P)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(B, rows * columns, C * P * P)
        position = self.position[1:].expand(B, -1, -1)
        if seen_Bn is not None:
            patches, position = _rows(patches, seen_Bn), _rows(position, seen_Bn)
        class_token = (self.class_embedding + self.position[0]).expand(B, 1, -1)
        x_BLD = self.patch(patches)
        x_BLD = torch.cat([class_token.to(x_BLD.dtype), x_BLD + position.to(x_BLD.dtype)], dim=1)
        width_D = None if gates is None else gates.width_D
        if width_D is not None:
            x_BLD = x_BLD * width_D.to(x_BLD.dtype)
        class_token_B = torch.zeros(B, dtype=torch.int64, device=x_BLD.device)
        x_BD = self.run_blocks(self.norm_pre(x_BLD, width_D), class_token_B, gates)
        return self.projection(self.norm_post(x_BD, width_D))


class TextTower(Tower):
    """Token ids -> causal blocks -> the end token, normed and projected.

    The end token is the largest id of a row (CLIP's rule), so padding after it changes nothing.
    """

    def __init__(self, config: TextConfig, clip: CLIPConfig):
        super().__init__(config, clip, causal=True)
        self.chunk_counts: tuple[int, ...] = (1, 2, 4, 8)  # what `in_chunks` chooses from
        self.macs_per_token = config.prunable_params
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Parameter(torch.zeros(config.context_length, config.width))
        self.norm_final = LayerNorm(config.width, eps=clip.norm_eps)
        self.projection = nn.Linear(config.width, clip.embed_dim, bias=False)

    def forward(self, tokens_BL: Tensor, gates: TowerGates | None = None, embedded: Tensor | None = None) -> Tensor:
        """[B, E], every row at the length of `tokens_BL`; `embedded` are their embeddings where looked up already."""
        token_BLD = self.token_embedding(tokens_BL) if embedded is None else embedded
        x_BLD = token_BLD + self.position[: tokens_BL.shape[1]]
        width_D = None if gates is None else gates.width_D
        if width_D is not None:
            x_BLD = x_BLD * width_D.to(x_BLD.dtype)
        x_BD = self.run_blocks(x_BLD, tokens_BL.argmax(-1), gates)
        return self.projection(self.norm_final(x_BD, width_D))

    def in_chunks(self, tokens_BL: Tensor, length_B: Tensor, gates: TowerGates | None = None) -> Tensor:
        """The same without the padding, or nearly: in chunks of rows of similar length.

        `length_B`, on the CPU, counts each row's tokens up to its end token.
        """
        if len(tokens_BL) == 0:
            return self(tokens_BL, gates)
        order_B = length_B.argsort(stable=True)
        rows = order_B.tensor_split(self._num_chunks(length_B[order_B], tokens_BL.device))
        chunks = [tokens_BL[to_device(chunk, tokens_BL.device), : int(length_B[chunk[-1]])] for chunk in rows]
        # One look-up for all: each would have a gradient of the whole table.
        x_D = self.token_embedding(torch.cat([chunk.flatten() for chunk in chunks]))
        embedded = x_D.split([chunk.numel() for chunk in chunks])
        parts = [self(chunk, gates, x.view(*chunk.shape, -1)) for chunk, x in zip(chunks, embedded, strict=True)]
        return torch.cat(parts)[to_device(order_B.argsort(), tokens_BL.device)]

    def _num_chunks(self, sorted_B: Tensor, device: torch.device) -> int:
        """The cheapest: more chunks leave less padding, and every one is a call of every block."""
        macs_per_call = MACS_PER_CALL.get(device.type, MACS_PER_CALL["cuda"]) * len(self.blocks)

        def macs(num_chunks: int) -> float:
            tokens = sum(len(chunk) * int(chunk[-1]) for chunk in sorted_B.tensor_split(num_chunks))
            return tokens * self.macs_per_token + num_chunks * macs_per_call

        return min((n for n in self.chunk_counts if n <= len(sorted_B)), key=macs)


class CLIP(nn.Module):
    """A CLIP model with what it needs to read pictures and captions.

    `preprocess` and `tokenizer` travel with the weights; without them only tensors are accepted. So does `provenance`,
    where the weights come from.
    """

    def __init__(
        self,
        config: CLIPConfig,
        *,
        preprocess: Preprocess | None = None,
        tokenizer: Tokenizer | None = None,
        provenance: Provenance | None = None,
    ):
        super().__init__()
        self.config, self.preprocess, self.tokenizer, self.provenance = config, preprocess, tokenizer, provenance
        self.image: ImageTower | ResNetTower
        if isinstance(config.image, ResNetConfig):
            self.image = ResNetTower(config.image, config.embed_dim)
        else:
            self.image = ImageTower(config.image, config)
        self.text = TextTower(config.text, config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def scale(self) -> Tensor:
        """1 / temperature = exp(logit_scale), at most 100."""
        return self.logit_scale.exp().clamp(max=MAX_SCALE)  # the other way around, fp32 gives 100.00001

    @torch.no_grad()
    def clip_scale_(self) -> None:
        """Put a trained logit_scale back to where it has a gradient: at its largest, `scale` is 100."""
        self.logit_scale.clamp_(max=LARGEST_LOGIT_SCALE)

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def forward(
        self,
        pixels: Tensor,
        tokens_BL: Tensor,
        gates: Gates | None = None,
        length_B: Tensor | None = None,
        seen_Bn: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Unit image and text embeddings [B, E] in at least fp32, of pixels (see `encode_image`) and token ids.

        `length_B`, on the CPU, counts each row's tokens up to its end, so that padding is not computed; without it
        tokens on a GPU run as they are, since looking would wait for the device. `seen_Bn` are the patches of each
        image that a ViT sees, from 0; all without it.
        """
        inputs = (self._as_input(pixels), None if gates is None else gates.image)
        image_BE = self.image(*inputs) if seen_Bn is None else self.image(*inputs, seen_Bn)
        if length_B is None and tokens_BL.device.type == "cpu":
            length_B = lengths(tokens_BL)
        text_gates = None if gates is None else gates.text
        if length_B is None:
            text_BE = self.text(tokens_BL, text_gates)
        else:
            text_BE = self.text.in_chunks(tokens_BL, length_B, text_gates)
        return unit(image_BE), unit(text_BE)

    def encode_image(self, images: Tensor | Image.Image | Sequence[Image.Image], *, normalize: bool = False) -> Tensor:
        """Image embeddings [B, E] of PIL images, of uint8 pixels [B, 3, S, S], or of normalised float pixels.

        Embeddings are dimensionless; with `normalize` they are unit vectors. Raises ValueError for
        another size and for pixels that are not finite.
        """
        if not isinstance(images, Tensor):
            if self.preprocess is None:
                raise ValueError("this model came without preprocessing: expected pixels, got PIL images")
            pictures = images if isinstance(images, Sequence) else [images]
            size = self.config.image.image_size
            views = [self.preprocess(picture) for picture in pictures]
            images = (torch.stack(views) if views else torch.empty(0, 3, size, size)).to(self.device)
        # A NaN is both least and greatest; `isfinite` of every pixel takes a sixteenth of the whole encoder's time.
        if images.is_floating_point() and images.numel() and not all(map(torch.isfinite, images.aminmax())):
            broken = (~images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            raise ValueError(f"expected finite pixels, got NaN or infinity in image {broken[0]} of {len(images)}")
        image_BE = self.image(self._as_input(images))
        return unit(image_BE) if normalize else image_BE

    def encode_text(self, texts: Tensor | str | Sequence[str], *, normalize: bool = False) -> Tensor:
        """Text embeddings [B, E] of strings or of token ids [B, L], L <= context_length.

        Raises ValueError for strings without a tokenizer, for too many tokens and for ids outside the vocabulary.
        """
        if not isinstance(texts, Tensor):
            if self.tokenizer is None:
                raise ValueError("this model came without a tokenizer: expected token ids, got strings")
            texts = self.tokenizer([texts] if isinstance(texts, str) else list(texts)).to(self.device)
        config = self.config.text
        if texts.is_floating_point() or texts.ndim != 2 or not 1 <= texts.shape[1] <= config.context_length:
            expected = f"expected integer token ids [B, L], 1 <= L <= {config.context_length}"
            raise ValueError(f"{expected}, got {texts.dtype} of shape {tuple(texts.shape)}")
        if texts.numel() and not (int(texts.min()) >= 0 and int(texts.max()) < config.vocab_size):
            raise ValueError(
                f"expected token ids in [0, {config.vocab_size}), got {int(texts.min())} to {int(texts.max())}"
            )
        text_BE = self.text.in_chunks(texts, lengths(texts).cpu())
        return unit(text_BE) if normalize else text_BE

    def _as_input(self, pixels: Tensor) -> Tensor:
        size = self.config.image.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"expected pixels [B, 3, {size}, {size}], got shape {tuple(pixels.shape)}")
        if pixels.dtype != torch.uint8:
            return pixels.to(self.logit_scale.dtype)
        if self.preprocess is None:
            raise ValueError("this model came without preprocessing: expected normalised float pixels, got uint8")
        return self.preprocess.normalise(pixels).to(self.logit_scale.dtype)

    def set_recompute(self, on: bool) -> None:
        """Gradient checkpointing: trade one more forward pass for the activations inside the blocks."""
        self.image.recompute = self.text.recompute = on

    def set_compiled(self, on: bool) -> None:
        """torch.compile of both towers, for batches and texts of any size at once; the first call takes long."""
        for tower in (self.image, self.text):
            if on:
                tower.compile(dynamic=True, backend=COMPILER)
            else:
                tower._compiled_call_impl = None  # what nn.Module.compile sets; there is no way back of its own


def lengths(tokens_BL: Tensor) -> Tensor:
    """Tokens of each row up to its end token, the largest id."""
    return tokens_BL.argmax(-1) + 1


def unit(x_BE: Tensor) -> Tensor:
    """Rows of length 1, in at least fp32: bf16 rows would be up to 0.3 % off."""
    return F.normalize(x_BE.to(torch.promote_types(x_BE.dtype, torch.float32)), dim=-1)


@torch.no_grad()
def initialise(model: CLIP, generator: torch.Generator) -> CLIP:
    """Random weights for training from scratch, in place: CLIP's initialisation (Radford et al. 2021, section 2.4).

    Residual outputs shrink with depth, so that the sum over blocks keeps its size.
    """

    def normal_(parameter: Tensor, std: float) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def transformer(tower: ImageTower | TextTower, D: int) -> None:
        residual_std = (2 * len(tower.blocks) * D) ** -0.5
        for block in tower.blocks:
            if isinstance(block.attention, Attention):
                normal_(block.attention.qkv.weight, D**-0.5)
                normal_(block.attention.out.weight, residual_std)
            if isinstance(block.ffn, FeedForward):
                normal_(block.ffn.up.weight, (2 * D) ** -0.5)
                normal_(block.ffn.down.weight, residual_std)
        normal_(tower.projection.weight, D**-0.5)
        for name, parameter in tower.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()

    image, D = model.image, model.config.image.width
    if isinstance(image, ResNetTower):
        initialise_resnet(image, normal_)
    else:
        transformer(image, D)
    transformer(model.text, model.config.text.width)
    if isinstance(image, ImageTower):
        normal_(image.patch.weight, image.patch.in_features**-0.5)
        normal_(image.class_embedding, D**-0.5)
        normal_(image.position, D**-0.5)
    normal_(model.text.token_embedding.weight, 0.02)
    normal_(model.text.position, 0.01)
    model.logit_scale.fill_(math.log(1 / 0.07))
    return model
