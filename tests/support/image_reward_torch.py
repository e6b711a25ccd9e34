"""ImageReward in torch, from its released architecture and names: an oracle, with random weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

CONFIG: dict[str, Any] = {
    "architectures": ["ImageReward"],
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "layer_norm_eps": 1e-6,
        "image_size": 224,
        "patch_size": 16,
    },
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "layer_norm_eps": 1e-12,
        "vocab_size": 30524,
        "max_position_embeddings": 512,
    },
    "head_features": [1024, 128, 64, 16],
}

BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*BERT_SPECIAL, "a", "red", "cat", "##s", "dog", "!", "e", "猫", "enc"]


def reduced(**changes: Mapping[str, Any]) -> dict[str, Any]:
    """A small config whose heads are as wide as those of the published one; `changes` are by part."""
    vision = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes = {
        "vision_config": vision | {"image_size": 32, "patch_size": 16},
        "text_config": text | {"vocab_size": len(VOCABULARY) + 2, "max_position_embeddings": 40},
    }
    parts = {part: CONFIG[part] | sizes[part] | changes.get(part, {}) for part in sizes}
    return CONFIG | parts | {"head_features": [12, 9, 6, 5]}


def multiply(query, key, value, heads, mask=None):
    """Attention of [B, T, C] to [B, S, C]; `mask` [B, S] is added to the logits as the released code does."""
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        logits = logits + (1 - mask.float())[:, None, None] * -10_000.0
    return (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)


class ImageBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        width, self.heads = cfg["hidden_size"], cfg["num_attention_heads"]
        self.norm1 = nn.LayerNorm(width, eps=cfg["layer_norm_eps"])
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=cfg["layer_norm_eps"])
        hidden = cfg["intermediate_size"]
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x):
        x = x + self.attn["proj"](multiply(*self.attn["qkv"](self.norm1(x)).chunk(3, -1), self.heads))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class ImageEncoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        width, patch = cfg["hidden_size"], cfg["patch_size"]
        patches = (cfg["image_size"] // patch) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, patches + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.blocks = nn.ModuleList(ImageBlock(cfg) for _ in range(cfg["num_hidden_layers"]))
        self.norm = nn.LayerNorm(width, eps=cfg["layer_norm_eps"])

    def forward(self, pixels):
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Attention(nn.Module):
    def __init__(self, cfg, context):
        super().__init__()
        width, self.heads = cfg["hidden_size"], cfg["num_attention_heads"]
        sources = {"query": width, "key": context, "value": context}
        self.self = nn.ModuleDict({name: nn.Linear(source, width) for name, source in sources.items()})
        self.output = nn.ModuleDict(
            {
                "dense": nn.Linear(width, width),
                "LayerNorm": nn.LayerNorm(width, eps=cfg["layer_norm_eps"]),
            }
        )

    def forward(self, x, context, mask=None):
        projected = self.self["query"](x), self.self["key"](context), self.self["value"](context)
        return self.output["LayerNorm"](self.output["dense"](multiply(*projected, self.heads, mask)) + x)


class TextLayer(nn.Module):
    def __init__(self, cfg, image_width):
        super().__init__()
        width, hidden = cfg["hidden_size"], cfg["intermediate_size"]
        self.attention = Attention(cfg, width)
        self.crossattention = Attention(cfg, image_width)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        norm = nn.LayerNorm(width, eps=cfg["layer_norm_eps"])
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, width), "LayerNorm": norm})

    def forward(self, x, mask, image_states):
        x = self.crossattention(self.attention(x, x, mask), image_states)
        hidden = F.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](self.output["dense"](hidden) + x)


class TextEncoder(nn.Module):
    def __init__(self, cfg, image_width):
        super().__init__()
        width = cfg["hidden_size"]
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(cfg["vocab_size"], width),
                "position_embeddings": nn.Embedding(cfg["max_position_embeddings"], width),
                "LayerNorm": nn.LayerNorm(width, eps=cfg["layer_norm_eps"]),
            }
        )
        layers = (TextLayer(cfg, image_width) for _ in range(cfg["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, input_ids, mask, image_states):
        x = self.embeddings["word_embeddings"](input_ids)
        x = x + self.embeddings["position_embeddings"].weight[: input_ids.shape[1]]
        x = self.embeddings["LayerNorm"](x)
        for layer in self.encoder["layer"]:
            x = layer(x, mask, image_states)
        return x


class ImageReward(nn.Module):
    """The released model up to what its head gives, before that is standardised."""

    def __init__(self, config):
        super().__init__()
        vision, text = config["vision_config"], config["text_config"]
        encoder = TextEncoder(text, vision["hidden_size"])
        self.blip = nn.ModuleDict({"visual_encoder": ImageEncoder(vision), "text_encoder": encoder})
        first, second, third, fourth = config["head_features"]
        layers = nn.Sequential(
            nn.Linear(text["hidden_size"], first),
            nn.Dropout(0.2),
            nn.Linear(first, second),
            nn.Dropout(0.2),
            nn.Linear(second, third),
            nn.Dropout(0.1),
            nn.Linear(third, fourth),
            nn.Linear(fourth, 1),
        )
        self.mlp = nn.ModuleDict({"layers": layers})

    def forward(self, pixels, input_ids, mask):
        """NCHW pixels, ids and mask [B, T] -> [B]."""
        states = self.blip["text_encoder"](input_ids, mask, self.blip["visual_encoder"](pixels))
        return self.mlp["layers"](states[:, 0])[:, 0]


def published(module: ImageReward) -> dict[str, torch.Tensor]:
    """The state dict with what the published one holds besides: two projections and a buffer."""
    state = module.state_dict()
    for part, name in (("vision", "visual_encoder.norm"), ("text", "text_encoder.embeddings.LayerNorm")):
        width = len(state[f"blip.{name}.weight"])
        state |= {
            f"blip.{part}_proj.weight": torch.ones(256, width),
            f"blip.{part}_proj.bias": torch.ones(256),
        }
    positions = len(state["blip.text_encoder.embeddings.position_embeddings.weight"])
    return state | {"blip.text_encoder.embeddings.position_ids": torch.arange(positions)[None]}


def write_vocabulary(folder: Path, tokens: list[str] = VOCABULARY) -> Path:
    """A tokenizer's folder."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return folder
