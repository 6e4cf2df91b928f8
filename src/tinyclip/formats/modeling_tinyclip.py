"""A CLIP whose blocks may differ in size, for `AutoModel.from_pretrained(..., trust_remote_code=True)`.

This file needs torch and transformers alone. `model` in config.json has the sizes: per tower the width, the head size
and for every block its heads and FFN neurons; of a ResNet the channels that its inner convolutions write. A block
without heads or neurons still adds its output bias. A text ends at its largest token id. Otherwise it is CLIP (Radford
et al. 2021), with the interface of transformers' CLIPModel.

Shape legend: B pairs, L tokens, D width, H heads, K head dim, F FFN neurons, E embedding, C channels, S side of a grid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput


class TinyCLIPConfig(PretrainedConfig):
    model_type = "tinyclip"

    def __init__(self, model: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.model = model or {}


class OutputBias(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.bias


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int, causal: bool, eps: float):
        super().__init__()
        self.heads, self.head_dim, self.causal = heads, head_dim, causal
        self.norm = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * heads * head_dim)  # rows: q, k, v; in each, head after head
        self.out = nn.Linear(heads * head_dim, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        B, L, _ = x_BLD.shape
        qkv = self.qkv(self.norm(x_BLD)).view(B, L, 3, self.heads, self.head_dim)
        q_BHLK, k_BHLK, v_BHLK = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, is_causal=self.causal)
        return self.out(y_BHLK.transpose(1, 2).reshape(B, L, self.heads * self.head_dim))


class FeedForward(nn.Module):
    def __init__(self, width: int, ffn: int, activation: str, eps: float):
        super().__init__()
        self.activation = activation
        self.norm = nn.LayerNorm(width, eps=eps)
        self.up = nn.Linear(width, ffn)
        self.down = nn.Linear(ffn, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        h_BLF = self.up(self.norm(x_BLD))
        return self.down(F.gelu(h_BLF) if self.activation == "gelu" else h_BLF * torch.sigmoid(1.702 * h_BLF))


class Block(nn.Module):
    def __init__(self, block: dict[str, int], tower: dict[str, Any], model: dict[str, Any], causal: bool):
        super().__init__()
        D, heads, ffn, eps = tower["width"], block["heads"], block["ffn"], model["norm_eps"]
        self.attention = Attention(D, heads, tower["head_dim"], causal, eps) if heads else OutputBias(D)
        self.ffn = FeedForward(D, ffn, model["activation"], eps) if ffn else OutputBias(D)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attention(x_BLD)
        return x_BLD + self.ffn(x_BLD)


class ImageTower(nn.Module):
    def __init__(self, tower: dict[str, Any], model: dict[str, Any]):
        super().__init__()
        D, eps, self.size, self.side = tower["width"], model["norm_eps"], tower["image_size"], tower["patch_size"]
        self.blocks = nn.ModuleList(Block(block, tower, model, causal=False) for block in tower["blocks"])
        self.patch = nn.Linear(3 * self.side**2, D, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(D))
        self.position = nn.Parameter(torch.zeros((self.size // self.side) ** 2 + 1, D))
        self.norm_pre = nn.LayerNorm(D, eps=eps)
        self.norm_post = nn.LayerNorm(D, eps=eps)
        self.projection = nn.Linear(D, model["embed_dim"], bias=False)

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        if pixels_BCHW.shape[1:] != (3, self.size, self.size):
            got = tuple(pixels_BCHW.shape)
            raise ValueError(f"expected pixel_values [B, 3, {self.size}, {self.size}], got shape {got}")
        patches = F.unfold(pixels_BCHW.to(self.patch.weight.dtype), self.side, stride=self.side).transpose(1, 2)
        x_BLD = self.patch(patches)
        x_BLD = torch.cat([self.class_embedding.expand(len(x_BLD), 1, -1), x_BLD], dim=1) + self.position
        x_BLD = self.norm_pre(x_BLD)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return x_BLD, self.projection(self.norm_post(x_BLD[:, 0]))


class Bottleneck(nn.Module):
    def __init__(self, block: dict[str, int], channels_in: int, channels_out: int, stride: int):
        super().__init__()
        first, second = block["conv1"], block["conv2"]
        self.conv1 = nn.Conv2d(channels_in, first, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.pool = nn.AvgPool2d(stride)
        self.conv3 = nn.Conv2d(second, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        changes = stride > 1 or channels_in != channels_out
        self.shortcut = Shortcut(channels_in, channels_out, stride) if changes else nn.Identity()

    def forward(self, x_BCSS: Tensor) -> Tensor:
        y_BCSS = F.relu(self.bn1(self.conv1(x_BCSS)))
        y_BCSS = self.pool(F.relu(self.bn2(self.conv2(y_BCSS))))
        return F.relu(self.bn3(self.conv3(y_BCSS)) + self.shortcut(x_BCSS))


class Shortcut(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.pool = nn.AvgPool2d(stride)
        self.conv = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels_out)

    def forward(self, x_BCSS: Tensor) -> Tensor:
        return self.bn(self.conv(self.pool(x_BCSS)))


class AttentionPool(nn.Module):
    """The mean of the last grid asks, the grid and the mean answer."""

    def __init__(self, features: int, head_dim: int, side: int):
        super().__init__()
        self.head_dim = head_dim
        self.position = nn.Parameter(torch.zeros(side**2 + 1, features))
        self.query = nn.Linear(features, features)
        self.key = nn.Linear(features, features)
        self.value = nn.Linear(features, features)

    def forward(self, x_BCSS: Tensor) -> Tensor:
        x_BLD = x_BCSS.flatten(2).transpose(1, 2)
        x_BLD = torch.cat([x_BLD.mean(1, keepdim=True), x_BLD], dim=1) + self.position
        parts = self.query(x_BLD[:, :1]), self.key(x_BLD), self.value(x_BLD)
        q_BH1K, k_BHLK, v_BHLK = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in parts)
        return F.scaled_dot_product_attention(q_BH1K, k_BHLK, v_BHLK).flatten(1)


class ResNetTower(nn.Module):
    def __init__(self, tower: dict[str, Any], model: dict[str, Any]):
        super().__init__()
        self.size, width = tower["image_size"], tower["width"]
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        blocks, channels_in = [], width
        for stage, sizes in enumerate(tower["stages"]):
            for index, block in enumerate(sizes):
                stride, channels_out = 2 if index == 0 and stage > 0 else 1, width * 4 * 2**stage
                blocks.append(Bottleneck(block, channels_in, channels_out, stride))
                channels_in = channels_out
        self.blocks = nn.ModuleList(blocks)
        self.pool = AttentionPool(channels_in, tower["head_dim"], self.size // 32)
        self.projection = nn.Linear(channels_in, model["embed_dim"])

    def forward(self, pixels_BCSS: Tensor) -> tuple[Tensor, Tensor]:
        if pixels_BCSS.shape[1:] != (3, self.size, self.size):
            got = tuple(pixels_BCSS.shape)
            raise ValueError(f"expected pixel_values [B, 3, {self.size}, {self.size}], got shape {got}")
        x_BCSS = F.relu(self.bn1(self.conv1(pixels_BCSS.to(self.conv1.weight.dtype))))
        x_BCSS = F.relu(self.bn2(self.conv2(x_BCSS)))
        x_BCSS = F.avg_pool2d(F.relu(self.bn3(self.conv3(x_BCSS))), 2)
        for block in self.blocks:
            x_BCSS = block(x_BCSS)
        return x_BCSS.flatten(2).transpose(1, 2), self.projection(self.pool(x_BCSS))


class TextTower(nn.Module):
    def __init__(self, tower: dict[str, Any], model: dict[str, Any]):
        super().__init__()
        D = tower["width"]
        self.blocks = nn.ModuleList(Block(block, tower, model, causal=True) for block in tower["blocks"])
        self.token_embedding = nn.Embedding(tower["vocab_size"], D)
        self.position = nn.Parameter(torch.zeros(tower["context_length"], D))
        self.norm_final = nn.LayerNorm(D, eps=model["norm_eps"])
        self.projection = nn.Linear(D, model["embed_dim"], bias=False)

    def forward(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        x_BLD = self.token_embedding(tokens_BL) + self.position[: tokens_BL.shape[1]]
        for block in self.blocks:
            x_BLD = block(x_BLD)
        x_BLD = self.norm_final(x_BLD)
        end_BD = x_BLD[torch.arange(len(tokens_BL), device=tokens_BL.device), tokens_BL.argmax(-1)]
        return x_BLD, self.projection(end_BD)


class TinyCLIPModel(PreTrainedModel):
    config_class = TinyCLIPConfig
    main_input_name = "pixel_values"

    def __init__(self, config: TinyCLIPConfig):
        super().__init__(config)
        image = config.model["image"]
        self.image = (ResNetTower if "stages" in image else ImageTower)(image, config.model)
        self.text = TextTower(config.model["text"], config.model)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """`pooler_output` has the image features [B, E], as in transformers 5."""
        hidden, features = self.image(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=features)

    def get_text_features(self, input_ids: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """`pooler_output` has the text features [B, E]. Padding after the end of a text changes nothing."""
        hidden, features = self.text(input_ids)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=features)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        return_loss: bool = False,
        **kwargs: Any,
    ) -> CLIPOutput | BaseModelOutputWithPooling:
        """Logits of texts and images; of one of the two alone, what its own method above gives."""
        if pixel_values is None:
            if input_ids is None:
                raise ValueError("expected input_ids, pixel_values or both, got neither")
            return self.get_text_features(input_ids)
        if input_ids is None:
            return self.get_image_features(pixel_values)
        image: Any = self.get_image_features(pixel_values)
        text: Any = self.get_text_features(input_ids)
        image_BE, text_BE = (F.normalize(output.pooler_output, dim=-1) for output in (image, text))
        logits_per_text = self.logit_scale.exp() * text_BE @ image_BE.T
        loss = None
        if return_loss:
            target = torch.arange(len(text_BE), device=text_BE.device)
            loss = (F.cross_entropy(logits_per_text, target) + F.cross_entropy(logits_per_text.T, target)) / 2
        return CLIPOutput(
            loss=loss,
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_BE,
            image_embeds=image_BE,
            text_model_output=text,
            vision_model_output=image,
        )
