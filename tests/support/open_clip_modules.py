"""CLIP in torch with open_clip's names and layout, written from its definition: an oracle for such files.

torch's own multi-head attention holds queries, keys and values in one matrix; embeddings are projected by
matrices that are not layers, on the right; the end of a text is its highest token.
"""

from collections import OrderedDict

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, hidden), gelu=nn.GELU(), c_proj=nn.Linear(hidden, width))
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, hidden: int):
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads, hidden) for _ in range(layers)])

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(
        self, side: int, patch: int, width: int, heads: int, layers: int, hidden: int, features: int
    ):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((side // patch) ** 2 + 1, width))
        self.proj = nn.Parameter(torch.zeros(width, features))
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, heads, layers, hidden)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([first, patches], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class CLIP(nn.Module):
    def __init__(
        self,
        *,
        side: int = 28,
        patch: int = 7,
        widths: tuple[int, int] = (128, 64),
        heads: tuple[int, int] = (2, 1),
        layers: tuple[int, int] = (1, 2),
        hidden: tuple[int, int] = (40, 24),
        features: int = 1024,
        vocabulary: int = 514,
        length: int = 77,
    ):
        """Of each pair, the first is the image tower's, the second the text tower's."""
        super().__init__()
        self.visual = Visual(side, patch, widths[0], heads[0], layers[0], hidden[0], features)
        self.transformer = Transformer(widths[1], heads[1], layers[1], hidden[1])
        self.token_embedding = nn.Embedding(vocabulary, widths[1])
        self.positional_embedding = nn.Parameter(torch.zeros(length, widths[1]))
        self.ln_final = nn.LayerNorm(widths[1])
        self.text_projection = nn.Parameter(torch.zeros(widths[1], features))
        self.logit_scale = nn.Parameter(torch.tensor(4.0))

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((tokens.shape[1], tokens.shape[1]), float("-inf")).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection

    def cosine(self, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """[B] of images [B, 3, H, W] with their texts [B, S]."""
        return nn.functional.cosine_similarity(self.visual(pixels), self.encode_text(tokens))
