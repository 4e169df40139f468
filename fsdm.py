"""Few-shot diffusion: give it a few images of something it has never seen, and it makes new images
of that thing.

    support images --set encoder--> context
    noisy image, time, context --DiT--> its noise, or v

In training every image of a set is the target once, and its context is made from the others
(leave-one-out). Classes are split, never images: what is called unseen was never trained on. The
method is that of Giannone, Nielsen and Winther, "Few-Shot Diffusion Models" (2022), with the DiT
denoiser of Peebles and Xie (2022).

This file is the whole method and has no side effects when imported. Its rooms: configuration,
transformer parts, set encoders, denoisers, diffusion, samplers, sets, data, files and machine.

Words: a set is some images of one class. The support is the images of a set that are given, a target
the image to generate, and the context what the encoder makes of the support. VFSDDPM is the system
that this one grew out of; from it come film, a context that is one vector, and lag, a context that
has tokens as well. A comment at the end of a line is the shape of what the line made, on a `def`
the shapes of its arguments.
"""
import argparse
import dataclasses
import hashlib
import importlib.util
import inspect
import logging
import math
import os
import re
import shutil
import sys
import sysconfig
import textwrap
import time
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision import datasets


# ---- Configuration: all that decides the shape and the meaning of the weights; every checkpoint has it.
# The comment of a field is the help of its flag.

@dataclass(frozen=True)
class Config:
    image_size: int = 32                 # pixels a side; sources are cropped square and resized
    in_channels: int = 3                 # 1 grey, 3 RGB
    sample_size: int = 6                 # images per set; each is generated from the others
    denoiser: str = "dit"                # dit, or conv, which knows the time only
    patch_size: int = 2                  # pixels a side of one token
    hidden_size: int = 384               # width of the denoiser
    depth: int = 12                      # blocks of the DiT, or convolutions
    num_heads: int = 6                   # attention heads
    mlp_ratio: float = 4.0               # width of the DiT's MLP over hidden_size
    fourier_features: bool = False       # show the DiT sines of its input: faint noise, made visible
    depthwise_conv: bool = False         # a 3x3 depthwise convolution in front of every DiT block
    encoder: str = "stacked"             # what reads the support: stacked, image or none
    encoder_depth: int = 6               # blocks of the set encoder
    encoder_patch_size: int = 2          # pixels a side of one context token
    hdim: int = 384                      # width of the set encoder and of its context
    mode_conditioning: str = "film"      # film: the context is a vector; lag: it has tokens as well
    mode_context: str = "deterministic"  # or variational: drawn from a Gaussian held near N(0, I)
    context_dropout: float = 0.0         # share of targets trained without support, for guidance
    vary_support: bool = False           # train on 1 .. sample_size - 1 of the others, not on all
    diffusion_steps: int = 250           # T
    schedule: str = "linear"             # linear or cosine: how alpha_bar falls with t
    prediction: str = "noise"            # what the network predicts: noise or v

    def __post_init__(self):
        """Raises ValueError with one sentence that names the field when the values make no sense."""
        def need(ok, sentence):
            if not ok:
                raise ValueError(sentence)

        # the upper ends are far above any use
        limits = dict(depth=(1, 512), encoder_depth=(0, 512), diffusion_steps=(2, 100_000),
                      mlp_ratio=(0.01, 64), context_dropout=(0, 0.99))
        for field in dataclasses.fields(self):
            name, kind, value = field.name, field.type, getattr(self, field.name)
            as_float = kind is float and type(value) is int
            need(as_float or type(value) is kind, f"{name} is {value!r}: expected {kind.__name__}")
            if kind in (int, float):
                low, high = limits.get(name, (1, 8192))
                need(low <= value <= high, f"{name} is {value}: expected {low} .. {high}")

        choices = dict(in_channels=(1, 3), denoiser=DENOISERS, encoder=("none", *ENCODERS),
                       schedule=SCHEDULES, prediction=PREDICTIONS, mode_conditioning=("film", "lag"),
                       mode_context=("deterministic", "variational"))
        for name, known in choices.items():
            value = getattr(self, name)
            need(value in known, f"{name} is {value!r}: expected one of {list(known)}")

        divisors = {}
        if self.denoiser == "dit":
            divisors = dict(patch_size="image_size", num_heads="hidden_size")
        if self.encoder != "none":
            divisors["encoder_patch_size"] = "image_size"
        for part, whole in divisors.items():
            part_size, size = getattr(self, part), getattr(self, whole)
            need(size % part_size == 0, f"{part} {part_size} does not divide {whole} {size}")

        if self.encoder != "none":
            need(self.denoiser == "dit",
                 f"denoiser {self.denoiser} is conditioned on time only: pass --encoder none")
            need(self.sample_size >= 2, f"sample_size {self.sample_size}: at least 2, since each "
                                        "image is generated from the others")
        else:
            need(self.mode_context == "deterministic",
                 "mode_context variational draws what an encoder makes: not with --encoder none")


# what made models use their support: tokens to attend to, and weight on the noisy times
FEW_SHOT = dict(encoder="image", mode_conditioning="lag", context_dropout=0.1, vary_support=True,
                depthwise_conv=True, fourier_features=True, schedule="cosine", prediction="v")
PRESETS = {
    # learns something worth seeing in 12 minutes on two CPU cores
    "demo": dict(FEW_SHOT, image_size=24, patch_size=4, hidden_size=192, depth=6, num_heads=3,
                 encoder_depth=2, encoder_patch_size=8, hdim=192),
    # VFSDDPM, the system that this one grew out of, exactly: 43,509,900 parameters
    "reference": dict(),
    # its wide and shallow configuration: 37,739,262 parameters
    "wide": dict(hidden_size=450, depth=6, num_heads=9, hdim=450),
    # DDPM on MNIST with dilated convolutions, without any support: 4,869,377 parameters
    "mnist": dict(image_size=28, in_channels=1, sample_size=1, denoiser="conv", hidden_size=256,
                  depth=8, num_heads=1, encoder="none", diffusion_steps=1000),
    # our recommendation for one T4
    "t4": dict(FEW_SHOT, hidden_size=384, depth=8, num_heads=6, encoder_depth=4,
               encoder_patch_size=4, hdim=384),
}


# ---- Transformer parts, of which encoders and denoiser are built. Each layer chooses its first weights.
# B images, or B sets of n targets where it says so; N tokens of an image, M of a context, D width, d
# width of a head, p pixels a side of a patch.

class Linear(nn.Linear):
    """Begins with Xavier's weights and a bias of zero, as in DiT."""
    def reset_parameters(self):
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def zero(layer):
    """Lets a branch or an output begin at nothing (adaLN-Zero)."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def layer_norm(width):
    return nn.LayerNorm(width, eps=1e-6)                    # as in DiT and in Flax


def mlp(width, hidden):
    return nn.Sequential(Linear(width, hidden), nn.GELU(approximate="tanh"), Linear(hidden, width))


def modulate(x, shift, scale):
    """[B, N, D] by [B, 1, D]: the adaptive part of adaptive layer normalisation."""
    return x * (1 + scale) + shift


class Attention(nn.Module):
    """The tokens of an image look at each other and, if there is a context, at its tokens as well.

    x is [B * n, N, D], the n targets of each of B sets in turn; keys_values [B, M, 2, heads, d] is
    made of their context by the method of that name; mask, bool [B, n, M]: who may look at what."""
    def __init__(self, width, heads, context_width=None):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.context_kv = None if context_width is None else Linear(context_width, 2 * width)
        self.out = Linear(width, width)

    def keys_values(self, tokens):
        """Context tokens [B, M, context_width] -> [B, M, 2, heads, d], the same at every time."""
        if self.context_kv is None:                         # under film
            return None
        return self.context_kv(tokens).unflatten(2, (2, self.heads, -1))

    def forward(self, x, keys_values=None, mask=None):
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))         # [B * n, N, 3, heads, d]
        q, kv = qkv[:, :, 0], qkv[:, :, 1:]
        look = None
        if keys_values is not None:
            context = keys_values.repeat_interleave(mask.shape[1], 0)       # [B * n, M, 2, heads, d]
            kv = torch.cat([kv, context], 1)                # [B * n, N + M, 2, heads, d]
            # at its own tokens an image always looks
            look = F.pad(mask.flatten(0, 1), (x.shape[1], 0), value=True)[:, None, None]
        k, v = kv.unbind(2)                                 # [B * n, N + M, heads, d] each
        return self.out(attend(q, k, v, look))              # [B * n, N, D]


def attend(q, k, v, mask=None):
    """q [B, N, heads, d], k and v [B, M, heads, d], mask bool [B, 1, 1 or N, M] (True: may look)
    -> [B, N, heads * d]."""
    d = q.shape[-1]
    q, k, v = (pad_head(h).transpose(1, 2) for h in (q, k, v))      # [B, heads, N or M, d]
    with cpu_kernel(k):
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=d ** -0.5)
    return out[..., :d].transpose(1, 2).flatten(2)


def pad_head(h):
    """[..., d] -> [..., d and zeros up to a multiple of 8], which change no product: in fp16 a T4
    has a fast kernel for these only."""
    missing = -h.shape[-1] % 8
    return F.pad(h, (0, missing)) if missing else h


def cpu_kernel(k):
    """-> a context manager. torch's fast kernel for CPUs is made for long rows: backward over k
    [B, heads, M, d] with 36 tokens takes it five times as long as plain products, with 160 still 1.5
    times (bf16)."""
    short = k.device.type == "cpu" and k.shape[2] < 256 and torch.is_grad_enabled()
    return sdpa_kernel(SDPBackend.MATH) if short else nullcontext()


class DepthwiseConv(nn.Conv2d):
    """A 3x3 convolution of the grid of tokens, each channel by itself (Chu et al. 2021): it lets
    neighbouring patches meet before attention does."""
    def __init__(self, width):
        super().__init__(width, width, 3, groups=width)
        self.weight = nn.Parameter(self.weight[:, 0])       # [D, 3, 3]: DDP warns of a side of one

    def forward(self, x):                                   # [B, N, D]
        side = math.isqrt(x.shape[1])
        grid = x.mT.unflatten(2, (side, side))              # [B, D, side, side]
        grid = F.conv2d(grid, self.weight[:, None], self.bias, padding=1, groups=self.groups)
        return grid.flatten(2).mT                           # [B, N, D]


def patchify(x, p):
    """[B, C, H, W] -> [B, N, C * p * p], tokens row by row."""
    return F.pixel_unshuffle(x, p).flatten(2).mT


def unpatchify(x, p):
    """[B, N, C * p * p] -> [B, C, H, W], the inverse of patchify for square images."""
    side = math.isqrt(x.shape[1])
    return F.pixel_shuffle(x.mT.unflatten(2, (side, side)), p)


def position_table(side, width):
    """-> [side * side, width], the start of a learned table: sines and cosines of row and column. These
    run from 0 to 16 whatever the patch size, so that a target's patch finds the same place in the
    support from the first step on."""
    if width % 4:                               # the preset wide: no room for sin, cos of both
        return torch.randn(side ** 2, width) * 0.02
    place = (torch.arange(side) + 0.5) * (16 / side)
    # down to 1/100: with DDPM's 1/10,000 half of them would not move in 16 rows
    frequency = 100.0 ** -torch.linspace(0, 1, width // 4)
    angle = place[:, None] * frequency                      # [side, width / 4]
    line = torch.cat([angle.sin(), angle.cos()], 1)         # [side, width / 2]
    rows = line.repeat_interleave(side, 0)                  # [side * side, width / 2]
    columns = line.repeat(side, 1)
    return torch.cat([rows, columns], 1)


def timestep_embedding(t):
    """t [B] in 0 .. 1000 -> [B, 256]: cosines and sines at geometric frequencies (DDPM)."""
    exponent = torch.arange(128, device=t.device) / 128
    angle = t[:, None] * 10_000.0 ** -exponent
    return torch.cat([angle.cos(), angle.sin()], 1)


class Block(nn.Module):
    """A pre-norm transformer block, for the set encoders."""
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attention = Attention(width, heads)
        self.norm2 = layer_norm(width)
        self.mlp = mlp(width, 4 * width)

    def forward(self, x):                                   # [B, N, D]
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DiTBlock(nn.Module):
    """A DiT block (Peebles and Xie 2022): the condition c shifts, scales and gates each branch, and
    all gates start at zero (adaLN-Zero). keys_values and mask are those of Attention."""
    def __init__(self, width, heads, mlp_width, context_width=None, depthwise_conv=False):
        super().__init__()
        self.local = zero(DepthwiseConv(width)) if depthwise_conv else None
        self.norm1 = layer_norm(width)
        self.attention = Attention(width, heads, context_width)
        self.norm2 = layer_norm(width)
        self.mlp = mlp(width, mlp_width)
        self.ada = zero(Linear(width, 6 * width))

    def forward(self, x, c, keys_values=None, mask=None):   # x [B, N, D], c [B, D]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(c)[:, None].chunk(6, dim=2)
        if self.local is not None:
            x = x + self.local(x)
        h = modulate(self.norm1(x), shift1, scale1)
        x = x + gate1 * self.attention(h, keys_values, mask)
        h = modulate(self.norm2(x), shift2, scale2)
        return x + gate2 * self.mlp(h)                      # [B, N, D]


# ---- Set encoders: the images of B sets, and who sees whom, -> their context.
# sees, bool [B, n, K]: target i of a set is generated from image j of it. In training the targets are
# the images themselves (n = K), and no target sees itself. An encoder returns for every target a vector
# [B, n, D], for every set M tokens [B, M, D], and mask, bool [B, n, M]: the tokens that a target may
# look at. A target that sees nothing, a row of sees that is all False, has a context too, the empty
# one; guidance leads away from it.

class ViT(nn.Module):
    """Dosovitskiy et al. 2021, without a head: images [B, channels, H, W] -> [B, N, D]; with a CLS
    token, if asked for, in front: [B, 1 + N, D]."""
    def __init__(self, config, channels, cls=False):
        super().__init__()
        width, self.patch = config.hdim, config.encoder_patch_size
        heads = math.gcd(width, config.num_heads)           # num_heads need not divide hdim
        self.embed = Linear(self.patch ** 2 * channels, width)
        self.pos = nn.Parameter(position_table(config.image_size // self.patch, width))
        self.cls = nn.Parameter(torch.randn(1, 1, width) * 0.02) if cls else None
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(config.encoder_depth)))
        self.norm = layer_norm(width)

    def forward(self, images):
        x = self.embed(patchify(images, self.patch)) + self.pos     # [B, N, D]
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)
        return self.norm(self.blocks(x))


class ImageEncoder(nn.Module):
    """Reads each image by itself, once, whoever will look at it: the order never matters, any
    number of images works, and leaving a target out is a mask. The vector is the mean over all
    patches of the seen images, zero for none."""
    def __init__(self, config):
        super().__init__()
        self.vit = ViT(config, config.in_channels)

    def forward(self, images, sees):                        # [B, K, C, H, W], [B, n, K]
        B, K = images.shape[:2]
        x = self.vit(images.flatten(0, 1)).unflatten(0, (B, K))     # [B, K, N, D]
        share = sees / sees.sum(2, keepdim=True).clamp(min=1)       # [B, n, K]
        vector = share.to(x.dtype) @ x.mean(2)              # [B, n, D]
        mask = sees.repeat_interleave(x.shape[2], dim=2)    # [B, n, K * N]
        return vector, x.flatten(1, 2), mask


class StackedEncoder(nn.Module):
    """VFSDDPM's sViT: the images of a set stacked on channels, so the order matters. Every target
    needs a pass of its own; the images it sees fill the first slots, zeros the others. The vector
    is the CLS token's, and a target looks only at the tokens of its own pass."""
    def __init__(self, config):
        super().__init__()
        self.slots = config.sample_size
        self.vit = ViT(config, config.in_channels * self.slots, cls=True)

    def forward(self, images, sees):                        # [B, K, C, H, W], [B, n, K]
        B, n, K = sees.shape
        order = (~sees).byte().argsort(dim=2, stable=True)  # [B, n, K], the seen ones first
        stack = images[:, None] * sees[..., None, None, None]       # [B, n, K, C, H, W]
        stack = stack.take_along_dim(order[..., None, None, None], 2)
        stack = F.pad(stack, (0, 0, 0, 0, 0, 0, 0, self.slots - K))         # [B, n, slots, C, H, W]
        x = self.vit(stack.flatten(2, 3).flatten(0, 1)).unflatten(0, (B, n))        # [B, n, 1 + N, D]
        vector, tokens = x[:, :, 0], x[:, :, 1:]
        own = torch.eye(n, dtype=torch.bool, device=sees.device)
        mask = own.repeat_interleave(tokens.shape[2], dim=1)        # [n, n * N]
        return vector, tokens.flatten(1, 2), mask.expand(B, -1, -1)


ENCODERS = {"stacked": StackedEncoder, "image": ImageEncoder}


class Posterior(nn.Module):
    """A variational context: q(c | h) = N(mu, sigma^2), and its KL to N(0, I), summed over the
    width (Kingma and Welling 2014, appendix B). A target's KL is that of its vector and of all the
    tokens that it sees."""
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(Linear(width, width), nn.GELU(), Linear(width, 2 * width))

    def forward(self, vector, tokens, mask, noise=None):
        """What an encoder returns, and noise [B, n + M or more, D] or None for the mean
        -> vector [B, n, D], tokens [B, M, D], KL [B, n]."""
        n = vector.shape[1]
        h = self.layers(torch.cat([vector, tokens], 1)).float()     # [B, n + M, 2 D]
        mu, log_var = h.chunk(2, dim=2)
        c = mu if noise is None else mu + (log_var / 2).exp() * noise[:, :mu.shape[1]]
        kl = (mu.square() + log_var.exp() - 1 - log_var).sum(2) / 2         # [B, n + M]
        seen = (mask * kl[:, None, n:]).sum(2)              # [B, n]
        return c[:, :n], c[:, n:], kl[:, :n] + seen


def context_noise_shape(config, count):
    """The shape of a set's noise for a Posterior: a row for each of `count` targets, or images if these
    are more, and a row for each of their tokens."""
    tokens = (config.image_size // config.encoder_patch_size) ** 2
    if config.mode_conditioning == "film":
        tokens = 0
    return count * (1 + tokens), config.hdim


# ---- Denoisers: noisy targets x [B, n, C, H, W], their times t [B, n], the context of their sets
# -> its prediction, noise or v, shaped like x.

class Context(NamedTuple):
    """What a DiT is told about the support of B sets with n targets each."""
    vector: torch.Tensor        # [B, n, hdim]
    keys_values: list           # for each block [B, M, 2, heads, d], or None under film
    mask: torch.Tensor          # bool [B, n, M]: the tokens that a target may look at
    kl: torch.Tensor            # float32 [B, n]: of a variational context, else 0


class DiT(nn.Module):
    """Peebles and Xie 2022: patches are tokens; time plus context vector steers every block. Under
    lag, blocks attend to the context's tokens too."""
    def __init__(self, config):
        super().__init__()
        width, self.patch = config.hidden_size, config.patch_size
        pixels = self.patch ** 2 * config.in_channels
        # sin and cos of 2^k pi x show what a linear embedding in bf16 cannot, the last noise of a
        # level or two (Kingma et al. 2021, appendix C): at k = 6 moving x by 1/64 flips both signs
        self.powers = (2, 4, 6) if config.fourier_features else ()
        self.embed = Linear(pixels * (1 + 2 * len(self.powers)), width, bias=False)
        nn.init.xavier_uniform_(self.embed.weight[:, :pixels])
        nn.init.zeros_(self.embed.weight[:, pixels:])       # mostly they are only noise
        self.pos = nn.Parameter(position_table(config.image_size // self.patch, width))

        self.time_scale = 1000 / config.diffusion_steps
        self.time = nn.Sequential(Linear(256, width, bias=False), nn.SiLU(),
                                  Linear(width, width, bias=False))
        nn.init.normal_(self.time[0].weight, std=0.02)
        nn.init.normal_(self.time[2].weight, std=0.02)

        few_shot = config.encoder != "none"
        self.project = Linear(config.hdim, width) if few_shot else None
        context_width = config.hdim if few_shot and config.mode_conditioning == "lag" else None
        mlp_width = int(width * config.mlp_ratio)
        self.blocks = nn.ModuleList(
            DiTBlock(width, config.num_heads, mlp_width, context_width, config.depthwise_conv)
            for _ in range(config.depth))

        self.norm = layer_norm(width)
        self.ada = zero(Linear(width, 2 * width))
        self.out = zero(Linear(width, pixels))

    def keys_values(self, tokens):
        """Context tokens [B, M, hdim] -> for every block what it makes of them: once for all times."""
        return [block.attention.keys_values(tokens) for block in self.blocks]

    def forward(self, x, t, context=None):
        c = self.time(timestep_embedding(t.flatten() * self.time_scale))    # [B * n, D]
        keys_values, mask = [None] * len(self.blocks), None
        if context is not None:
            c = c + self.project(context.vector.flatten(0, 1))
            keys_values, mask = context.keys_values, context.mask
        c = F.silu(c)                                       # adaLN's, once for all blocks

        x = x.flatten(0, 1)                                 # [B * n, C, H, W]
        angles = [2 ** k * math.pi * x for k in self.powers]
        waves = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
        x = torch.cat([x, *waves], 1)
        x = self.embed(patchify(x, self.patch)) + self.pos  # [B * n, N, D]
        for block, kv in zip(self.blocks, keys_values):
            x = block(x, c, kv, mask)                       # [B * n, N, D]
        shift, scale = self.ada(c)[:, None].chunk(2, dim=2)         # [B * n, 1, D] each
        x = self.out(modulate(self.norm(x), shift, scale))  # [B * n, N, C * p * p]
        return unpatchify(x, self.patch).unflatten(0, t.shape)      # [B, n, C, H, W]


class DilatedConv(nn.Module):
    """DDPM on digits: convolutions at full resolution, dilated 1, 1, 3, 3, 9, 9, ..., which know
    the time only. There is no context."""
    def __init__(self, config):
        super().__init__()
        width, dilations = config.hidden_size, [3 ** (i // 2) for i in range(config.depth)]
        self.time_scale = 1000 / config.diffusion_steps
        self.time = nn.Sequential(nn.Conv2d(256, width, 1), nn.SiLU(), nn.Conv2d(width, width, 1))
        self.embed = nn.Conv2d(config.in_channels, width, 7, padding=3)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
                                    for dilation in dilations)
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(8, width), width) for _ in dilations)
        self.out = nn.Conv2d(width, config.in_channels, 1)

    def forward(self, x, t, context=None):
        time = timestep_embedding(t.flatten() * self.time_scale)    # [B * n, 256]
        time = self.time(time[:, :, None, None])            # [B * n, D, 1, 1]
        y = self.embed(x.flatten(0, 1))                     # [B * n, D, H, W]
        for conv, norm in zip(self.blocks, self.norms):
            h = y + time
            y = F.silu(norm(h + conv(h)))                   # [B * n, D, H, W]
        return self.out(y).unflatten(0, t.shape)            # [B, n, C, H, W]


DENOISERS = {"dit": DiT, "conv": DilatedConv}


# ---- Diffusion: x_t = alpha x0 + sigma noise, t = 0 .. T - 1   (DDPM eq. 4)
# x0 a clean image in [-1, 1], x_t a noisy one; alpha = sqrt(alpha_bar_t), not DDPM's 1 - beta, and
# sigma = sqrt(1 - alpha_bar_t).

def linear_schedule(T):
    """-> alpha_bar, float64 [T]: beta from 1e-4 to 2e-2 at T = 1000 (DDPM, section 4), scaled by
    1000 / T: pure noise at the end at every T."""
    # unscaled, T = 250 would end at alpha_bar = 0.08: sampling from N(0, I) could never be right
    beta = torch.linspace(1e-4, 2e-2, T, dtype=torch.float64, device="cpu") * (1000 / T)
    return (1 - beta.clamp(max=0.999)).cumprod(0)           # clamps only below T = 21


def cosine_schedule(T):
    """-> alpha_bar, float64 [T]: Nichol and Dhariwal 2021, eq. 17, at the middles of T equal steps
    and, unlike there, not divided by its value at 0: neither end is quite 0 or 1, and at T = 250
    the last noise is 2 of 255 levels, not 1.2."""
    u = (torch.arange(T, dtype=torch.float64, device="cpu") + 0.5) / T
    return ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2


SCHEDULES = {"linear": linear_schedule, "cosine": cosine_schedule}


# target: what the network learns to output; to_x0: its inverse. Losses of different predictions cannot
# be compared.

class PredictNoise:
    """DDPM, eq. 14 and 15."""
    @staticmethod
    def target(x0, noise, alpha, sigma):
        return noise

    @staticmethod
    def to_x0(x_t, out, alpha, sigma):
        return (x_t - sigma * out) / alpha


class PredictV:
    """Salimans and Ho 2022, appendix D."""
    @staticmethod
    def target(x0, noise, alpha, sigma):
        return alpha * noise - sigma * x0

    @staticmethod
    def to_x0(x_t, out, alpha, sigma):
        return alpha * x_t - sigma * out


PREDICTIONS = {"noise": PredictNoise, "v": PredictV}


def to_signal(images):
    """uint8 0 .. 255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(x):
    """float -> uint8: -1 .. 1 becomes 0 .. 255, rounded (cut off, every image would be half a level
    darker), and what lies beyond is clipped."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()


class Colours(NamedTuple):
    """Samples stay among the colours of their support, or guidance leads them to other papers and inks.
    Of each channel, [B, 1, C, 1, 1] or numbers, the least value and the greatest; of the means of the
    support's images the least and the greatest. contrast, [B, 1, 1, 1, 1] or a number: the standard
    deviation of an image's values about the means of its channels, on average. axes, [B, C, C] or None:
    the principal axes of all colours, in columns, and along these the least value and the greatest: one
    ink on one paper is a line."""
    low: torch.Tensor = -1.0
    high: torch.Tensor = 1.0
    low_mean: torch.Tensor = -1.0
    high_mean: torch.Tensor = 1.0
    contrast: torch.Tensor = 1.0
    axes: torch.Tensor = None
    low_along: torch.Tensor = -1.0
    high_along: torch.Tensor = 1.0


def colours_of(images):
    """Images [B, K, C, H, W] in [-1, 1] -> Colours."""
    def ends(x):                                            # [B, K, C, ...] -> two of [B, 1, C, 1, 1]
        return x.amin((1, 3, 4), keepdim=True), x.amax((1, 3, 4), keepdim=True)

    means = images.mean((3, 4), keepdim=True)               # [B, K, C, 1, 1]
    contrast = (images - means).std((2, 3, 4), keepdim=True).mean(1, keepdim=True)

    pixels = images.cpu().transpose(1, 2).flatten(2)        # [B, C, pixels]; few devices have this svd
    axes = torch.linalg.svd(pixels - pixels.mean(2, keepdim=True), full_matrices=False).U
    axes = axes.to(images.device)                           # [B, C, C]
    return Colours(*ends(images), *ends(means), contrast, axes, *ends(rotate(images, axes)))


def rotate(images, axes):
    """[B, n, C, H, W] -> their coordinates along axes [B, C, C]; no product that autocast would round."""
    return (images[:, :, :, None] * axes[:, None, :, :, None, None]).sum(2)


def clip(x, colours, margin=0.0):
    """[B, n, C, H, W] -> the same, no colour beyond those of the support by more than a share of their
    range: neither along their axes nor, in the end, in any channel."""
    if colours.axes is not None:
        room = margin * (colours.high_along - colours.low_along)
        rotated = rotate(x, colours.axes).clamp(colours.low_along - room, colours.high_along + room)
        x = rotate(rotated, colours.axes.mT)
    room = margin * (colours.high - colours.low)
    return x.clamp(colours.low - room, colours.high + room)


def settle(x, colours):
    """Samples in the colours of their support; what is within 6 of 255 levels of the least or greatest
    value of a channel becomes it: a model leaves faint stains on paper and ink."""
    x, faint = clip(x, colours), 6 / 127.5
    end = torch.where(x - colours.low < colours.high - x, colours.low, colours.high)        # the nearer one
    away = x - end
    # without a jump: what is within 12 levels moves too, a little
    away = torch.where(away.abs() < 2 * faint, 2 * F.softshrink(away, faint), away)
    return end + away


class FSDM(nn.Module):
    """A set encoder and a denoiser. forward is what a loss is made of; read and denoise are for
    samplers."""
    def __init__(self, config):
        super().__init__()
        few_shot = config.encoder != "none"
        variational = config.mode_context == "variational"
        self.config = config
        self.encoder = ENCODERS[config.encoder](config) if few_shot else None
        self.posterior = Posterior(config.hdim) if variational else None
        self.denoiser = DENOISERS[config.denoiser](config)
        self.prediction = PREDICTIONS[config.prediction]
        # for samplers: on the CPU, even while load_model builds on the meta device
        self.alpha_bar64 = SCHEDULES[config.schedule](config.diffusion_steps)
        self.register_buffer("alpha_bar", self.alpha_bar64.float(), persistent=False)

    def read(self, images, sees, noise=None):
        """Images [B, K, C, H, W] in [-1, 1], and who sees whom, bool [B, n, K] -> Context, or None
        without encoder. noise: for a variational context [B, n + M or more, hdim]; None: its mean."""
        if self.encoder is None:
            return None
        vector, tokens, mask = self.encoder(images, sees)   # [B, n, D], [B, M, D], bool [B, n, M]
        if self.config.mode_conditioning == "film":
            tokens, mask = tokens[:, :0], mask[:, :, :0]    # the vector alone
        kl = vector.new_zeros(vector.shape[:2], dtype=torch.float32)
        if self.posterior is not None:
            vector, tokens, kl = self.posterior(vector, tokens, mask, noise)
        return Context(vector, self.denoiser.keys_values(tokens), mask, kl)

    def forward(self, images, sees, t, noise, context_noise=None, support=None):
        """Errors of all images of the sets. All randomness comes in, so it compiles whole.

        images uint8 [B, K, C, H, W], sees bool [B, K, K], t int64 [B, K], noise float32 of the images'
        shape; context_noise float32, as context_noise_shape says, for a variational context (None: its
        mean); support: other images to read the context from, to see what it is worth
        -> float32 [B, K], each image's mean squared error, and float32 [B, K], its context's KL."""
        x0 = to_signal(images)
        support = x0 if support is None else to_signal(support)
        a = self.alpha_bar[t][..., None, None, None]        # [B, K, 1, 1, 1]
        alpha, sigma = a.sqrt(), (1 - a).sqrt()
        x_t = alpha * x0 + sigma * noise                    # [B, K, C, H, W]

        context = self.read(support, sees, context_noise)
        out = self.denoiser(x_t, t, context).float()        # [B, K, C, H, W]

        target = self.prediction.target(x0, noise, alpha, sigma)
        error = (out - target).square().mean((2, 3, 4))     # [B, K]
        return error, torch.zeros_like(error) if context is None else context.kl

    def denoise(self, x, t, alpha, sigma, context, guidance=1.0, colours=Colours()):
        """x [B, 1, C, H, W] at the noise level (t, alpha, sigma), numbers -> the predicted x0,
        float32 [B, 1, C, H, W], clipped a little beyond the colours: the errors on white paper would
        otherwise all be to the dark side, and add up from step to step.

        Guidance takes a context of two targets, of which the second sees nothing; without, guidance 1, only
        the first counts."""
        targets = 1 if guidance == 1 else 2
        if context is not None:
            context = context._replace(vector=context.vector[:, :targets], mask=context.mask[:, :targets])
        both = x.expand(-1, targets, -1, -1, -1)
        times = torch.full(both.shape[:2], t, device=x.device)
        out = self.denoiser(both, times, context).float()
        x0 = self.prediction.to_x0(x, out, alpha, sigma)
        if targets == 2:
            x0 = guide(*x0.chunk(2, dim=1), guidance, colours)
        return clip(x0, colours, margin=0.025)


def guide(given, empty, guidance, colours):
    """Predictions of x0 with the support and without, [B, 1, C, H, W] each -> one that is further from
    the second, empty + guidance (given - empty)   (Ho and Salimans 2022). Grey paper would turn to dark
    patches: the means of channels stay among those of the support's images, and the contrast is rescaled
    (after Lin et al. 2024, section 3.4) to 1.2 times that of the support's images. A prediction, an
    average of all that may come, is fainter, and strokes left faint would break."""
    led = empty + guidance * (given - empty)
    led_mean = led.mean((3, 4), keepdim=True)               # [B, 1, C, 1, 1]
    led = led - led_mean
    scale = 1.2 * colours.contrast / led.std((2, 3, 4), keepdim=True)
    return led_mean.clamp(colours.low_mean, colours.high_mean) + scale * led


# ---- Samplers: from noise x, of any shape, to x0. denoise(x, t, alpha, sigma) -> the predicted x0;
# alpha_bar float64 [T]; draw() -> noise like x. Each calls denoise `steps` times, at falling times, the
# first of them T - 1, and returns its last answer.

def noise_levels(times, alpha_bar):
    """Sequences of one length -> [(t, alpha, sigma)], numbers."""
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return list(zip(times.tolist(), alpha.tolist(), sigma.tolist()))


def even_times(alpha_bar, steps):
    """-> [(t, alpha, sigma)], `steps` different times from T - 1 down to 0, evenly spaced.
    Raises ValueError for more than T."""
    T = len(alpha_bar)
    if steps > T:
        raise ValueError(f"{steps} steps: this sampler makes at most {T}, the model's diffusion_steps")
    times = torch.linspace(T - 1, 0, steps).round().long()
    return noise_levels(times, alpha_bar[times])


def even_log_snr(alpha_bar, steps):
    """-> [(t, alpha, sigma)], evenly spaced in log(alpha / sigma) from t = T - 1 down to 0, and h, the
    step between two. Times may lie between two of the trained ones."""
    known = alpha_bar.logit().numpy() / 2                   # log(alpha / sigma), [T], falling
    wanted, h = np.linspace(known[-1], known[0], steps, retstep=True)
    times = np.interp(wanted, known[::-1], np.arange(len(known))[::-1])
    alpha_bar = torch.from_numpy(wanted * 2).sigmoid()
    return noise_levels(times, alpha_bar), h


def ddim(denoise, x, alpha_bar, steps, draw, eta=0.0, large=False):
    """DDIM (Song et al. 2021, eq. 12 and 16). eta = 1 is DDPM's ancestral sampling (Ho et al. 2020,
    algorithm 2) with its smaller variance or, if `large`, with its larger one, beta."""
    levels = even_times(alpha_bar, steps)
    for (t, alpha, sigma), (_, alpha_next, sigma_next) in pairwise(levels):
        x0 = denoise(x, t, alpha, sigma)
        noise = (x - alpha * x0) / sigma                    # consistent with the clipped x0
        fresh = math.sqrt(1 - (alpha / alpha_next) ** 2)    # sqrt(beta) of this step
        spread = eta * sigma_next / sigma * fresh           # eq. 16
        x = alpha_next * x0 + math.sqrt(sigma_next ** 2 - spread ** 2) * noise      # eq. 12
        if eta > 0:
            x = x + (fresh if large else spread) * draw()
    return denoise(x, *levels[-1])


def dpm_solver(denoise, x, alpha_bar, steps, draw, sde=False):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), or with fresh noise at every step, which
    repairs what earlier steps got wrong, SDE-DPM-Solver++(2M) (their appendix)."""
    levels, h = even_log_snr(alpha_bar, steps)
    before = None
    for (t, alpha, sigma), (_, alpha_next, sigma_next) in pairwise(levels):
        x0 = denoise(x, t, alpha, sigma)
        ahead = x0 if before is None else x0 + (x0 - before) / 2    # x0 in the middle of the step
        before = x0
        if sde:                     # the old noise shrinks twice as fast, fresh noise fills the gap
            x = sigma_next / sigma * math.exp(-h) * x + alpha_next * (1 - math.exp(-2 * h)) * ahead
            x = x + sigma_next * math.sqrt(1 - math.exp(-2 * h)) * draw()
        else:
            x = sigma_next / sigma * x + alpha_next * (1 - math.exp(-h)) * ahead
    return denoise(x, *levels[-1])


SAMPLERS = {"2m_sde": partial(dpm_solver, sde=True), "2m": dpm_solver, "ddim": ddim,
            "ddpm": partial(ddim, eta=1.0), "ddpm_beta": partial(ddim, eta=1.0, large=True)}


@torch.no_grad()
def generate(model, support, n, sampler="2m_sde", steps=20, guidance=None, seed=0,
             draw_context=False, dtype=torch.float32, batch_size=64, **options):
    """n images of what each of S support sets shows. While there is more noise than image, and the class is
    decided, guidance leads, and an ImageEncoder reads views_of the support; then it reads the support
    alone, which is sharper.

    support: uint8 [S, K, C, H, W] on the model's device (a model without encoder ignores it)
    seed: image i has its own noise, a function of (seed, i)
    guidance: 1: none; above: closer to the support; None: best_guidance
    draw_context: every image has its own draw of a variational context, not the mean
    dtype: to multiply in; batch_size: images at a time; options: of the sampler, as eta of ddim
    -> uint8 [S, n, C, H, W], in every channel no darker and no lighter than a support that is read.
    ValueError when the model cannot do what is asked."""
    guidance = best_guidance(model.config) if guidance is None else guidance
    check_request(model, support, guidance, draw_context)
    S, K, *picture = support.shape
    # with guidance an image is two targets, one that sees its support and one that sees nothing
    targets = 1 if guidance == 1 else 2
    made, parts = [], torch.arange(S * n).split(batch_size)
    for numbers in watched(parts, "generated", S * n, batch_size):
        images = to_signal(support[numbers // n])           # [B, K, C, H, W], each image's own support
        sees = torch.ones(len(images), targets, K, dtype=torch.bool, device=images.device)
        sees[:, 1:] = False
        views = views_of(images) if isinstance(model.encoder, ImageEncoder) else None
        draw = image_noise(seed, SAMPLING, numbers, (1, *picture), images.device)
        context_noise = None
        if draw_context:
            shape = context_noise_shape(model.config, max(targets, K * VIEWS))
            context_noise = image_noise(seed, CONTEXT, numbers, shape, images.device)()
        with autocast(images.device, dtype):
            # once, not at every step
            clear = noisy = model.read(images, sees, context_noise)
            if views is not None:
                noisy = model.read(views, sees.repeat(1, 1, VIEWS), context_noise)
            # a model without encoder does not look at the support
            colours = Colours() if model.encoder is None else colours_of(images)

            def denoise(x, t, alpha, sigma):
                if alpha > sigma:       # guidance now stains more than it helps (Kynkaanniemi et al. 2024)
                    return model.denoise(x, t, alpha, sigma, clear, colours=colours)
                return model.denoise(x, t, alpha, sigma, noisy, guidance, colours)

            x = SAMPLERS[sampler](denoise, draw(), model.alpha_bar64, steps, draw, **options)
        made.append(to_bytes(settle(x, colours)))
    return torch.cat(made).view(S, n, *picture)


# degrees, zoom, and a move along both sides, in halves of a side
TURNS = ((8, 0.95, 0.06), (-8, 1.05, -0.06))
VIEWS = 1 + len(TURNS)


def views_of(images):
    """Images [B, K, C, H, W] -> [B, VIEWS * K, C, H, W]: they, and each twice again, turned, zoomed and
    moved a little; beyond the edge its last pixels are repeated. A model that sees more views of a thing
    draws it more often."""
    flat = images.flatten(0, 1).cpu()                       # MPS has no such padding
    views = [images]
    for degrees, zoom, move in TURNS:
        cos = zoom * math.cos(math.radians(degrees))
        sin = zoom * math.sin(math.radians(degrees))
        affine = torch.tensor([[cos, -sin, move], [sin, cos, move]])
        grid = F.affine_grid(affine.expand(len(flat), 2, 3), flat.shape, align_corners=False)
        view = F.grid_sample(flat, grid, padding_mode="border", align_corners=False)
        views.append(view.view_as(images).to(images.device))
    return torch.cat(views, 1)


def image_noise(seed, stream, numbers, shape, device):
    """-> draw() -> [B, *shape], the next normal numbers of each image's own stream, whatever the
    batch and the device."""
    generators = [rng("cpu", seed, stream, number) for number in numbers.tolist()]

    def draw():
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    return draw


def best_guidance(config):
    """3: its samples are more often what was shown than those of 1 or 2, at a slightly higher KID
    (assets/RESULTS.md). It takes a model that was trained without support now and then."""
    return 3.0 if config.context_dropout and config.encoder != "none" else 1.0


def check_request(model, support, guidance, draw_context):
    """Raises ValueError when the model has no variational context to draw, no empty one to be guided
    away from, or no room for K support images."""
    if draw_context and model.posterior is None:
        raise ValueError("this model's context is deterministic: there is nothing to draw")
    if guidance != 1 and best_guidance(model.config) == 1:
        raise ValueError(f"guidance {guidance}: this model was not trained for it, only 1 works")
    K, most = support.shape[1], model.config.sample_size - 1
    if isinstance(model.encoder, StackedEncoder) and K > most:
        raise ValueError(f"{K} support images: this model was trained to read {most} at most")


# ---- Sets: one uint8 tensor of images sorted by class, on the device; a batch of sets is an index into it.
# Randomness has an address: the seed, a stream, then step and part, or an image's number. So checkpoints
# hold no state of a generator, a resumed run draws what the run that never stopped would have drawn,
# and an image does not depend on the batch that it was made in.

SAMPLING, TRAINING, VALIDATION, PICTURE, EVALUATION, SETS, CONTEXT = range(1, 8)


def rng(device, seed, *address):
    """A torch.Generator on `device`, a function of the whole numbers `seed` and `address` only."""
    # torch's CPU generator reads 32 bits of a seed; SeedSequence mixes all numbers into every bit
    state = np.random.SeedSequence(seed, spawn_key=address).generate_state(1)
    return torch.Generator(device).manual_seed(int(state[0]))


class Split(NamedTuple):
    """Some classes of a data set."""
    images: torch.Tensor        # uint8 [images, C, H, W], all of class 0, then of class 1, ...
    offsets: torch.Tensor       # int64 [classes + 1], class c is images[offsets[c]:offsets[c + 1]]
    names: list                 # [classes]
    largest: int                # images in the largest class

    def to(self, device):
        return self._replace(images=self.images.to(device), offsets=self.offsets.to(device))


def draw_classes(split, sets, generator):
    """-> int64 [sets], and for each of these classes another one (the same if there is only one)."""
    device, classes = split.offsets.device, len(split.names)
    own = torch.randint(classes, (sets,), generator=generator, device=device)
    away = torch.randint(1, max(2, classes), (sets,), generator=generator, device=device)
    return own, (own + away) % classes


def draw_sets(split, classes, size, generator):
    """classes int64 [sets] -> int64 [sets, size], `size` different images of each, indices. A
    class must have so many (check_data): a smaller one would be filled up from others."""
    first, count = split.offsets[classes, None], split.offsets.diff()[classes, None]        # [sets, 1]
    place = torch.arange(split.largest, device=first.device)
    keys = torch.rand(len(classes), split.largest, generator=generator, device=first.device)
    keys = keys.masked_fill(place >= count, -1)             # a smaller class has no such image
    return first + keys.topk(size).indices                  # the largest keys: drawn without repeats


def leave_one_out(sets, size, generator, vary=False, dropout=0.0):
    """-> bool [sets, size, size]: target i sees image j of its set, and never itself.

    vary: each sees 1 .. size - 1 of the others; dropout: the share of targets that see none."""
    where = dict(generator=generator, device=generator.device)
    own = torch.eye(size, dtype=torch.bool, device=generator.device)
    keys = torch.rand(sets, size, size, **where)
    keys = keys.masked_fill(own, 2)     # a target's own image ranks last, so it is never among the seen
    rank = keys.argsort(2).argsort(2)
    # 1 .. 2 (size - 1), cut at size - 1: more than half of the time all the others
    count = torch.randint(1, max(2, 2 * size - 1), (sets, size, 1), **where)
    count = count.clamp(max=size - 1) if vary else size - 1
    dropped = torch.rand(sets, size, 1, **where) < dropout
    return (rank < count) & ~dropped


def draw_support(split, sets, size, seed, stream):
    """`sets` sets of `size` images, from different classes as long as these last
    -> uint8 [sets, size, C, H, W], the class name of each set."""
    generator, C = rng("cpu", seed, stream), len(split.names)
    order = torch.randperm(C, generator=generator).repeat(1 + sets // C)[:sets]
    split = split._replace(offsets=split.offsets.cpu())
    index = draw_sets(split, order, size, generator)
    return split.images[index], [split.names[c] for c in order]


# ---- Data: a loader(path, size, download) says what there is, without deciding what becomes of it:
# pictures (files, arrays [H, W] or [H, W, 3], or PIL images), labels int [pictures], the names of all
# classes, and which part each is, an array of "train", "val", "test" or "none"; or raises ValueError or
# OSError with a sentence. load_data makes Splits of it.

def split_by_name(names):
    """-> the part of each class: 70/10/20 percent in the order of the names' SHA-1, at least one class
    each. Raises ValueError for fewer than three."""
    if len(names) < 3:
        raise ValueError(f"{len(names)} class(es) to split: at least 3 are needed, one each to train, "
                         "validate and test")
    names = [name.encode(errors="surrogateescape") for name in names]   # folders may have any bytes
    order = sorted(range(len(names)), key=lambda c: hashlib.sha1(names[c]).digest())
    test, val = max(1, len(names) // 5), max(1, len(names) // 10)
    parts = np.full(len(names), "train")
    parts[order[:test]] = "test"
    parts[order[test:test + val]] = "val"
    return parts


# FC100: whole superclasses of CIFAR-100 are held out (Oreshkin et al. 2018): no near relatives
FC100_TEST = """beaver dolphin otter seal whale  bee beetle butterfly caterpillar cockroach
                fox porcupine possum raccoon skunk  baby boy girl man woman""".split()
FC100_VAL = """bear leopard lion tiger wolf  camel cattle chimpanzee elephant kangaroo
               crab lobster snail spider worm  hamster mouse rabbit shrew squirrel""".split()


def split_fc100(names):
    held_out = [np.isin(names, FC100_TEST), np.isin(names, FC100_VAL)]
    return np.select(held_out, ["test", "val"], "train")


def split_background(evaluation):
    """Omniglot's rule, from bool [classes]: evaluation classes test, the last tenth of the others
    validates."""
    parts = np.where(evaluation, "test", "train")
    background = np.flatnonzero(parts == "train")
    val = math.ceil(len(background) / 10)
    parts[background[-val:]] = "val"
    return parts


def glyphs(path, size, download, classes=(1000, 100, 100), per_class=20):
    """Invented characters, nothing downloaded: every class a few curved strokes in its own ink and
    paper colours; every image of it drawn again, a little otherwise."""
    count, images = sum(classes), []
    lattice = [(x, y) for x in (-0.55, 0, 0.55) for y in (-0.6, 0, 0.6)]    # in [-1, 1] x [-1, 1]
    for c in range(count):
        g = np.random.default_rng([71, c])                  # of this class
        # two to four strokes from one node of a lattice to another, bent sideways in the middle
        ends = np.stack([g.choice(lattice, 2, replace=False) for _ in range(g.integers(2, 5))])
        ends = ends + g.uniform(-0.12, 0.12, ends.shape)
        start, end = ends[:, 0], ends[:, 1]
        across = (end - start)[:, ::-1] * (1, -1)
        middle = (start + end) / 2 + across * g.uniform(-0.6, 0.6, (len(ends), 1))
        strokes = np.stack([start, middle, end], 1)         # [strokes, 3, 2]
        ink, paper = g.random((2, 3))
        while abs((ink - paper) @ (0.30, 0.59, 0.11)) < 0.4:        # too little contrast to be read
            ink, paper = g.random((2, 3))
        images += [draw_glyph(strokes, ink, paper, size, g) for _ in range(per_class)]
    parts = np.repeat(["train", "val", "test"], classes)
    names = [f"glyph{c:04d}" for c in range(count)]
    return np.stack(images), np.arange(count).repeat(per_class), names, parts


def draw_glyph(strokes, ink, paper, size, g):
    """-> uint8 [size, size, 3]: strokes [strokes, 3, 2] drawn by an unsteady hand, g."""
    points = strokes + g.normal(0, 0.035, (len(strokes), 1, 2)) + g.normal(0, 0.025, strokes.shape)
    points = points @ (np.eye(2) + g.normal(0, 0.08, (2, 2))) + g.normal(0, 0.04, 2)        # turned, moved
    u = np.linspace(0, 1, 12)[:, None]
    bezier = np.concatenate([(1 - u) ** 2, 2 * u * (1 - u), u ** 2], 1)     # [12, 3]
    curves = (bezier @ points + 1) * (2 * size)             # [strokes, 12, 2], in pixels
    tints = (255 * (np.stack([ink, paper]) + g.normal(0, 0.025, (2, 3)))).clip(0, 255)
    ink, paper = (tuple(tint) for tint in tints.astype(int).tolist())
    canvas = Image.new("RGB", (4 * size, 4 * size), paper)
    width = round(0.42 * size * max(0.6, g.normal(1, 0.12)))
    for curve in curves:
        ImageDraw.Draw(canvas).line(curve.ravel().tolist(), ink, width)
    return np.array(canvas.reduce(4))                       # antialiased


def small_arrays(source, split, path, size, download):
    """The train and test files of `source`, a class of torchvision, together."""
    train, test = (source(path, part, download=download) for part in (True, False))
    images = np.concatenate([train.data, test.data])
    labels = np.concatenate([train.targets, test.targets])
    return images, labels, train.classes, split(train.classes)


def omniglot(path, size, download):
    """Background alphabets train and validate, evaluation alphabets test; ink is white."""
    images, characters = [], []
    for background in (True, False):
        data = datasets.Omniglot(path, background, download=download)
        for image, label in data:
            images.append(ImageOps.invert(image))
            characters.append(data._characters[label])
    names, labels = np.unique(characters, return_inverse=True)
    evaluation = np.isin(names, data._characters)           # of the second data set
    return images, labels, names.tolist(), split_background(evaluation)


def celeba(path, size, download):
    """A class is an identity with at least 20 images; identities sorted, 70/10/20 percent."""
    data = datasets.CelebA(path, "all", target_type="identity", download=download)
    names, labels, count = np.unique(data.identity, return_inverse=True, return_counts=True)
    few = count < 20
    share = np.cumsum(~few) / np.sum(~few)                  # of the classes up to here
    parts = np.select([few, share <= 0.7, share <= 0.8], ["none", "train", "val"], "test")
    images = Path(data.root, data.base_folder, "img_align_celeba")
    return [images / name for name in data.filename], labels.ravel(), names.astype(str).tolist(), parts


def folder(path, size, download):
    """A folder of class folders, or train/ val/ test/ with class folders in them, under these or
    similar names. Guesses are printed."""
    root, folders = Path(path), folders_in(path)
    while len(folders) == 1 and folders_in(folders[0]) and not folders[0].is_symlink():
        print(f"{root} holds one folder only: the classes are taken to be those in {folders[0]}")
        root, folders = folders[0], folders_in(folders[0])

    words = dict(train="train", training="train", val="val", valid="val", validation="val", test="test")
    parts = {d: words[d.name.lower()] for d in folders if d.name.lower() in words and folders_in(d)}
    if "train" not in parts.values():
        parts = {}
    elif len(parts) < len(folders):
        print(f"{root}: left out is {[d.name for d in folders if d not in parts]}, which is no part")
    classes = [c for d in parts for c in folders_in(d)] if parts else folders
    names = sorted({c.name for c in classes})
    if len(names) < 3:
        raise ValueError(f"{root} holds {len(names)} class folder(s) {names}: expected a folder for each "
                         "class, at least 3, or train/ val/ test/ with such folders in them")

    if len(names) < len(classes):
        print(f"{root}: parts share classes: these are put together, and classes split by name")
        parts = {}
    part_of = {c.name: parts.get(c.parent) for c in classes}
    which = np.array([part_of[name] for name in names])
    if not parts:
        which = split_by_name(names)
    elif "val" not in which:
        print(f"{root} has no val/: a tenth of the classes of train/ validate, chosen by name")
        train = np.flatnonzero(which == "train")
        chosen = split_by_name([names[c] for c in train]) == "val"
        which[train[chosen]] = "val"

    files, labels = [], []
    for c in classes:
        found = [f for f in sorted(c.rglob("*"))
                 if f.is_file() and not any(map(hidden, f.relative_to(c).parts))]
        files += found
        labels += [names.index(c.name)] * len(found)
    return files, np.array(labels, np.int64), names, which


def folders_in(path):
    return sorted(d for d in Path(path).iterdir() if d.is_dir() and not hidden(d.name))


def hidden(name):
    """Whether a file or folder of this name is left out: notebooks and archives leave such behind."""
    return name.startswith(".") or name == "__MACOSX"


def npz(path, size, download):
    """`images` uint8 [M, H, W] or [M, H, W, 1 or 3] and `labels`; with `class_names`, labels count in
    it; split by `class_is_evaluation`, as FC100, or by name."""
    arrays = read_npz(path, ("images", "labels", "class_names", "class_is_evaluation"))
    if not {"images", "labels"} <= set(arrays):
        raise ValueError(f"{path} holds {sorted(arrays)} of what is needed: images and labels")
    images, labels, evaluation = arrays["images"], arrays["labels"], arrays.get("class_is_evaluation")
    shape = images.shape[3:] if images.ndim in (3, 4) else None
    if images.dtype != np.uint8 or shape not in ((), (1,), (3,)) or not images.size:
        raise ValueError(f"{path}: images are {images.dtype} {images.shape}: expected uint8 "
                         "[M, H, W] or [M, H, W, 1 or 3]")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{path} has {labels.shape} labels for {images.shape} images: expected one each")

    names = arrays.get("class_names")
    if names is None:
        names, labels = np.unique(labels, return_inverse=True)
    names = names.astype(str).tolist()
    if (labels.dtype.kind not in "iu" or not np.isin(labels, np.arange(len(names))).all()
            or evaluation is not None and evaluation.shape != (len(names),)
            or np.unique(names).shape != np.shape(names)):
        raise ValueError(f"{path}: labels, class_names (no two alike) and class_is_evaluation do not "
                         "fit together")

    if evaluation is not None:
        parts = split_background(evaluation)
    elif set(FC100_TEST) <= set(names):
        parts = split_fc100(names)
    else:
        parts = split_by_name(names)
    images = images[..., 0] if shape == (1,) else images
    return images, labels.astype(int), names, parts


def read_npz(path, names):
    """-> {name: array} of those that are there. ValueError when the file is no .npz of plain arrays,
    or would unpack to more than 16 GiB."""
    try:
        with zipfile.ZipFile(path) as file:
            size = sum(member.file_size for member in file.infolist())
        if size > 2 ** 34:
            raise ValueError(f"it unpacks to {size / 2 ** 30:,.0f} GiB, more than 16")
        with np.load(path, allow_pickle=False) as file:
            return {name: np.asarray(file[name]) for name in names if name in file}
    except Exception as error:                              # numpy and zipfile fail in many ways
        raise ValueError(f"{path} cannot be read as an .npz of plain arrays: {error}") from None


DATASETS = {"glyphs": glyphs, "omniglot": omniglot, "celeba": celeba,
            "cifar100": partial(small_arrays, datasets.CIFAR100, split_fc100),
            "mnist": partial(small_arrays, datasets.MNIST, split_by_name)}


def load_data(dataset, data_dir, size, channels, download=False, parts=("train", "val", "test")):
    """-> {part: Split} on the CPU, classes disjoint; what it got is printed.

    dataset: a key of DATASETS (files under `data_dir`), a folder of class folders, or an .npz.
    Raises ValueError or OSError with a sentence when there is nothing to load."""
    path = dataset
    if dataset in DATASETS:
        loader, path = DATASETS[dataset], data_dir
    elif os.path.isdir(dataset):
        loader = folder
    elif dataset.endswith(".npz") and os.path.isfile(dataset):      # a pipe would wait for ever
        loader = npz
    else:
        raise ValueError(f"dataset '{dataset}': expected one of {sorted(DATASETS)}, a folder of "
                         "class folders, or an .npz with images and labels")
    try:
        pictures, labels, names, which = loader(path, size, download)
    except RuntimeError as error:                           # torchvision's way to say "no files"
        raise OSError(f"{dataset}: {error} (--download fetches it, --data_dir says where it is)") from None
    splits = {}
    for part in parts:
        keep = np.flatnonzero(which == part)
        split = read_split(pictures, labels, names, keep, size, channels)
        print(f"{part}: {len(split.images):,} images of {len(split.names):,} classes, the first of "
              f"them {', '.join(split.names[:3])}")
        splits[part] = split
    return splits


def say(sentence):
    """Prints, if it can: a run outlives the reader of its words, and a full disk."""
    # a RuntimeError: a signal has come in the middle of another print
    with suppress(OSError, RuntimeError):
        print(sentence, flush=True)


def watched(parts, verb, total, size=1):
    """Yields the parts of a long job, of `size` images each, and says how far it is, every ten seconds
    from the fifth on."""
    began = time.perf_counter()
    due = began + 5
    for number, part in enumerate(parts, 1):
        yield part
        now, done = time.perf_counter(), number * size
        if now > due and done < total:
            due = now + 10
            rate = done / (now - began)
            left = (total - done) / rate / 60
            say(f"{verb} {done:,} of {total:,} images, {rate:,.0f} a second, {left:.1f} min left")


def read_split(pictures, labels, names, keep, size, channels):
    """The classes `keep`, in order, of what a loader found -> Split: every picture made size x size,
    by all cores, straight into its place. Unreadable files are named and left out."""
    rows = np.flatnonzero(np.isin(labels, keep))
    rows = rows[np.argsort(labels[rows], kind="stable")]    # class by class
    try:
        images = torch.empty(len(rows), channels, size, size, dtype=torch.uint8)
    except RuntimeError:                                    # torch's way to say "no memory"
        raise OSError(f"{len(rows):,} images of {size} x {size} pixels do not fit into memory: lower "
                      "--image_size, or take fewer") from None

    def read(i):                                            # -> what is wrong with it, or None
        try:
            images[i] = torch.from_numpy(to_picture(pictures[rows[i]], size, channels))
        except ValueError as error:
            return str(error)

    with ThreadPool() as pool:
        faults = pool.imap(read, range(len(rows)), chunksize=10)
        faults = list(watched(faults, "read", len(rows)))

    unreadable = [fault for fault in faults if fault]
    if unreadable:
        print(f"{len(unreadable)} files are left out: {', '.join(unreadable[:3])}")
        good = [not fault for fault in faults]
        images, rows = images[good], rows[good]
    counts = np.bincount(labels[rows], minlength=len(names))[keep]
    offsets = torch.tensor([0, *counts.cumsum()], dtype=torch.int64)
    return Split(images, offsets, [names[c] for c in keep], int(counts.max(initial=0)))


def check_data(data, sample_size):
    """Raises ValueError when a part has no class, or a class fewer than `sample_size` images."""
    for part, split in data.items():
        if not split.names:
            raise ValueError(f"the data set has no {part} classes: it needs more, to train, validate "
                             "and test")
        fewest, c = split.offsets.diff().min(0)
        if fewest < sample_size:
            raise ValueError(f"class '{split.names[c]}' has {fewest} readable images, and a set takes "
                             f"{sample_size} different ones: add images, or ask for fewer "
                             "(--sample_size; --k of sample.py)")


# only these: a ".png" that holds PostScript would be given to Ghostscript
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TGA", "TIFF", "WEBP")


def to_picture(source, size, channels, prepare=None):
    """A file, a uint8 array or a PIL image -> uint8 [C, size, size]: upright, on white, the square in
    the middle, antialiased; prepare: a function to change the PIL image before it is cut square.
    Raises ValueError with a sentence when it cannot be read."""
    if isinstance(source, np.ndarray):
        source = Image.fromarray(source)
    if isinstance(source, Image.Image):
        return to_square(source, size, channels, prepare)
    if not os.path.isfile(source):                          # a pipe named .png would wait for ever
        raise ValueError(f"{source} is a folder: pass its files" if os.path.isdir(source)
                         else f"{source}: there is no such file")
    try:
        with Image.open(source, formats=FORMATS) as image:
            return to_square(image, size, channels, prepare)
    except Exception as error:                              # decoders fail in many ways
        raise ValueError(f"{source} cannot be read as an image: {error}") from None


def to_square(image, size, channels, prepare):
    """A PIL image of any mode and size -> uint8 [C, size, size]."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):                   # 16-bit grey: PIL would clip it, not scale it
        grey = np.asarray(image).astype(np.int64)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise ValueError("float or 32-bit pixels have no known range")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if prepare is not None:
        image = prepare(image)
    image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return np.array(image).reshape(size, size, channels).transpose(2, 0, 1)


# ---- Files and machine: what is read and written whole, and what the machine is good at.

def write_whole(path, save):
    """Calls save(file) on a temporary file and gives it the name `path` when all is in it.

    Raises OSError when it cannot be written, as on a full disk, and leaves nothing; a kill may leave
    the temporary file, path.tmp."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())                         # on the disk before it has the old one's name
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def free_name(path):
    """path, or the first of path_1, path_2, ... where there is nothing yet."""
    path = Path(os.path.abspath(path))                      # "." has no name of its own
    free, i = path, 0
    while free.exists():
        i += 1
        free = path.with_name(f"{path.name}_{i}")
    return free


def read_checkpoint(path, mmap=False):
    """What torch.save wrote, on the CPU; executes nothing in the file (weights_only). Raises OSError
    when there is no file, and other errors, of many kinds, when it is damaged or something else."""
    if not os.path.isfile(path):                            # a pipe would wait for ever
        raise FileNotFoundError(f"{path}: there is no such checkpoint; train.py leaves ckpt.pt in its "
                                "--out_dir")
    with zipfile.ZipFile(path) as file:
        if damaged := file.testzip():                       # torch does not look at the checksums
            raise zipfile.BadZipFile(f"{damaged} in it is damaged")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def load_model(path, device="cpu", weights="ema"):
    """Reads a checkpoint to generate with: path -> an FSDM in eval mode on `device`.

    weights: "ema", the moving average, or "raw", the last step's. model.about is a sentence on what it
    was trained on. Raises OSError when there is no file and ValueError when it is not one of ours."""
    try:
        saved = read_checkpoint(path, mmap=True)
        state = saved["ema" if weights == "ema" else "model"]
        if not all(tensor.is_contiguous() and tensor.isfinite().all() for tensor in state.values()):
            raise ValueError("a tensor is not finite, or larger than what is stored of it")
        with torch.device("meta"):                          # no memory before the shapes agree
            model = FSDM(Config(**saved["config"]))
        model.load_state_dict(state, strict=True, assign=True)
        about = saved.get("about") or f"trained on {saved.get('dataset')}"
        model.about = f"{about}, {saved.get('step')} steps"
    except OSError:
        raise
    except Exception as error:                              # what is no checkpoint fails in many ways
        reason = textwrap.shorten(str(error), 200)
        raise ValueError(f"{path} is not a checkpoint of this program with {weights} weights: "
                         f"{reason}") from None
    return model.to(device, torch.float32).eval().requires_grad_(False)


def choose_device(requested="auto"):
    """auto, cpu, cuda, cuda:1, mps -> torch.device. Raises ValueError when it is not here."""
    if requested == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        requested = "cuda" if torch.cuda.is_available() else mps
    try:
        device = torch.device(requested)
        torch.empty(1, device=device).item()                # meta has no numbers to give back
    except (RuntimeError, AssertionError) as error:
        reason = textwrap.shorten(str(error), 160)
        raise ValueError(f"--device {requested} cannot be used here: {reason}") from None
    if device.type == "cuda" and torch.version.cuda:        # not on ROCm
        capability = torch.cuda.get_device_capability(device)
        if not has_kernels(capability, torch.cuda.get_arch_list()):
            raise ValueError(
                f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)} "
                "(compute capability {}.{}): choose another GPU (on Kaggle T4 x2), --device cpu, or "
                "an older torch".format(*capability))
    return device


def has_kernels(capability, architectures):
    """(7, 5), ["sm_75", "sm_90a", "compute_120"] -> whether code for one of these runs on such a GPU."""
    for kind, number in re.findall(r"(sm|compute)_(\d+)", " ".join(architectures)):
        built = divmod(int(number), 10)
        # machine code runs on its own generation from its minor version on, PTX on all that is later
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def choose_precision(device, requested="auto"):
    """-> (dtype to multiply in, the reason in words). requested: auto, fp32, bf16 or fp16."""
    dtypes = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
    no_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)      # as a T4
    if no_bf16 and requested == "bf16":                     # computed in software
        return torch.bfloat16, "as asked for, but this GPU has no bf16: fp16 is several times faster"
    if requested != "auto":
        return dtypes[requested], "as asked for"
    if no_bf16:
        return torch.float16, "this GPU has no bf16"
    if device.type == "cuda":
        return torch.bfloat16, "this GPU has it"
    if device.type == "cpu":
        fp32 = matmul_rate(device, torch.float32) / 1e9
        bf16 = matmul_rate(device, torch.bfloat16) / 1e9
        choice = "bf16" if bf16 > 1.5 * fp32 else "fp32"
        return dtypes[choice], f"a CPU of {fp32:,.0f} GFLOP/s in fp32, {bf16:,.0f} in bf16"
    return torch.float32, f"the safe choice on {device.type}"


def matmul_rate(device, dtype, size=512):
    """-> FLOP/s of the best of five square matrix products, of fewer where they take long: a CPU
    without bf16 computes it a hundred times slower."""
    a, seconds = torch.ones(size, size, device=device, dtype=dtype), []
    while len(seconds) < 5 and sum(seconds) < 0.25:
        began = time.perf_counter()
        (a @ a)[0, 0].item()                                # .item() waits for the product
        seconds.append(time.perf_counter() - began)
    return 2 * size ** 3 / min(seconds)


def autocast(device, dtype):
    """The context in which matrix products are made in dtype; none for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def choose_compile(device, no_compile=False):
    """-> (whether to compile the step, the reason in words)."""
    if no_compile:
        return False, "as asked for"
    # by the usual layout: Debian's default names an empty folder
    headers = sysconfig.get_path("include", "nt" if os.name == "nt" else "posix_prefix")
    if not Path(headers, "Python.h").exists():
        return False, "no Python.h found (on Debian: python3-dev), which compiled code includes"
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:      # torch for Windows comes without
            return False, "no Triton found"
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            return False, "no C compiler found (gcc or clang), which Triton needs"
        capability = torch.cuda.get_device_capability(device)
        return capability >= (7, 0), "compute capability {}.{}".format(*capability)
    if device.type == "cpu":
        for compiler in ("g++", "clang++", "cl"):
            if shutil.which(compiler):
                return True, f"with {compiler}"
        return False, "no C++ compiler found (g++ or clang++)"
    return False, f"not on {device.type}"


def compile_in_place(model, dtype):
    """Compiles model(...) as one graph; weights keep their names. The first step then takes a while."""
    torch.compiler.config.cache_key_tag = str(dtype)        # torch 2.10's cache overlooks the dtype
    # on a CPU this one warns of a missing GPU
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    model.compile(fullgraph=True, dynamic=False)


def run(main, advice):
    """Runs a script's main(): what is wrong is one sentence and exit code 2. advice: when memory is short."""
    if sys.stdout is not None:      # a file's name may hold letters that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = f"out of memory: {advice}"
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:                               # train.py's loop ends by itself
        print(f"{Path(sys.argv[0]).name}: stopped", file=sys.stderr)
        sys.exit(130)


def make_parser(description, fields):
    """-> an ArgumentParser with a flag for every field of a dataclass."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, fields)
    return parser


def add_flags(parser, fields, owner=""):
    """A flag for every field of a dataclass: its type, its choices if it is a Literal, its comment as
    the help, with its default and whose default that is. What is left out is None."""
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(fields), re.M))
    for field in dataclasses.fields(fields):
        options = dict(type=field.type, help=comments[field.name])
        if field.default is not None:
            options["help"] += f" ({owner}{field.default})"
        if field.type is bool:
            options.update(type=parse_bool, nargs="?", const=True)
        elif choices := get_args(field.type):
            options.update(type=type(choices[0]), choices=choices)
        parser.add_argument(f"--{field.name}", **options)


def check_least(parser, args, **least):
    """Exits with a sentence when a number is below its least value, or not finite."""
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not low <= value < math.inf:
            parser.error(f"--{name} is {value}: it must be at least {low}")


def parse_bool(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"'{text}': expected True or False")
    return text.lower() in ("true", "1", "yes")
