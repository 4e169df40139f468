"""The transformer of fsdm.py on other tokens: genomic regions of 283 features (motif scores and accessibility).

Two models to copy, made of fsdm's own blocks: one fills in regions that were hidden, one denoises all of them.
"""
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import fsdm

FEATURES = 283


class NoKeyBias(nn.Linear):
    """Queries, keys and values in one product; only queries and values have a bias (a key's would change nothing)."""
    def __init__(self, width):
        super().__init__(width, 3 * width, bias=False)
        self.query_bias, self.value_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        bias = torch.cat([self.query_bias, torch.zeros_like(self.query_bias), self.value_bias])
        return F.linear(x, self.weight, bias)


class Regions(nn.Module):
    """What both models share: features in, a CLS token in front, features out."""
    def __init__(self, width, features):
        super().__init__()
        self.region_embed, self.head_mask = nn.Linear(features, width), nn.Linear(width, features)
        self.mask_token, self.cls_token = (nn.Parameter(torch.randn(1, 1, width) * 0.02) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def enter(self, x, hidden=None):                            # [B, N, features], bool [B, N] -> [B, 1 + N, D]
        x = self.region_embed(x)
        if hidden is not None:
            x = torch.where(hidden[..., None], self.mask_token, x)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)

    def leave(self, x):                                         # [B, 1 + N, D] -> [B, N, features]
        return self.head_mask(self.norm(x[:, 1:]))


class GETRegionPretrain(Regions):
    """Predicts the features of the regions that were hidden behind a token."""
    def __init__(self, width=768, depth=12, heads=12, features=FEATURES):
        super().__init__(width, features)
        self.blocks = nn.ModuleList(fsdm.Block(width, heads) for _ in range(depth))
        for block in self.blocks:
            block.attention.qkv = NoKeyBias(width)

    def forward(self, x, hidden):                               # [B, N, features], bool [B, N] -> [B, N, features]
        x = self.enter(x, hidden)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


class GETRegionDiffusion(Regions):
    """Predicts the noise in all regions, at a time in 0 .. 1000."""
    def __init__(self, width=768, depth=12, heads=12, features=FEATURES):
        super().__init__(width, features)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(fsdm.DiTBlock(width, heads, 4 * width) for _ in range(depth))
        for block in self.blocks:
            block.norm1 = block.norm2 = nn.LayerNorm(width, elementwise_affine=False)
            nn.init.zeros_(block.ada.weight)
            nn.init.zeros_(block.ada.bias)

    def forward(self, x, t):                                    # [B, N, features], int [B] -> [B, N, features]
        c = F.silu(self.time(fsdm.timestep_embedding(t)))
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, c)
        return self.leave(x)


@pytest.mark.parametrize("model, total", [(GETRegionPretrain, 85_484_059), (GETRegionDiffusion, 128_767_003)])
def test_the_full_models_have_the_documented_parameters(model, total):
    with torch.device("meta"):
        model = model()
    assert sum(p.numel() for p in model.parameters()) == total


def invented_regions(sets, generator, count=12, features=FEATURES):
    """[sets, count, features] of about unit variance: six latent numbers of the cell decide most of it, and a smaller
    part differs from region to region."""
    fixed = torch.Generator().manual_seed(1)
    to_features = torch.randn(12, features, generator=fixed) / math.sqrt(12)
    places = torch.randn(count, 6, generator=fixed)
    cell = torch.randn(sets, 1, 6, generator=generator).expand(-1, count, -1)
    return torch.cat([1.3 * cell, 0.5 * cell * places], 2) @ to_features + 0.1 * torch.randn(sets, count, features,
                                                                                 generator=generator)


def train(model, loss_of, steps=150):
    generator, optimizer = torch.Generator().manual_seed(0), torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(steps):
        loss = loss_of(model, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():                                       # sets never seen
        return torch.stack([loss_of(model, torch.Generator().manual_seed(10 + i)) for i in range(5)]).mean().item()


def test_hidden_regions_are_filled_in():
    def loss_of(model, generator):
        x = invented_regions(32, generator)
        hidden = torch.rand(x.shape[:2], generator=generator) < 0.3
        mean = x[hidden].square().mean()
        return (model(x, hidden) - x)[hidden].square().mean() / mean
    torch.manual_seed(0)
    assert train(GETRegionPretrain(64, 2, 4), loss_of) < 0.5    # of what predicting the mean costs


def test_regions_are_denoised():
    alpha_bar = fsdm.linear_schedule(1000).float()

    def loss_of(model, generator):
        x = invented_regions(32, generator, features=32)
        t, noise = torch.randint(100, 400, (32,), generator=generator), torch.randn(x.shape, generator=generator)
        a = alpha_bar[t][:, None, None]
        return (model(a.sqrt() * x + (1 - a).sqrt() * noise, t) - noise).square().mean() / noise.square().mean()
    torch.manual_seed(0)
    # predicting the mean costs 1; x_t itself, the noise and a faint picture, would cost about what its picture weighs
    assert train(GETRegionDiffusion(64, 2, 4, features=32), loss_of) < 0.25
