"""Few-shot diffusion: give it a few images of something it has never seen, and it makes new images of that thing.

    support images --set encoder--> context;   noisy target, time, context --DiT--> its noise, or v

In training every image of a set is the target once and its context is made from the others (leave-one-out), so that
one batch of sets trains generation from a handful of images; classes are split, never images, so that what is shown
as "unseen" was never trained on. The method is that of Giannone, Nielsen and Winther, "Few-Shot Diffusion Models"
(2022), with the DiT denoiser of Peebles and Xie (2022).

This file is the whole method and has no side effects when imported:
config -> data -> transformer parts -> set encoders -> denoiser -> diffusion -> model -> samplers -> checkpoint reader.

Letters inside formulas: B sets, K images in a set, n targets per set, G groups of context tokens, M all these tokens
(in Data: images in all), C, H, W a picture, N tokens of one picture, p pixels a side of a token, D width, d width of a
head, T diffusion steps, t a time, a = alpha_bar_t, x0 a clean picture in [-1, 1], x_t a noisy one.
"""
import dataclasses
import hashlib
import math
import os
import re
import time
import zipfile
import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision import datasets


# ---- Configuration: everything that decides the shape and the meaning of the weights; saved in every checkpoint.

@dataclass(frozen=True)
class Config:
    image_size: int = 32                    # pixels a side; sources are cropped square and resized to it
    in_channels: int = 3                    # 1 grey, 3 RGB
    sample_size: int = 6                    # images per training set; each is generated from the others
    denoiser: str = "dit"                   # a key of DENOISERS: dit, or the dilated convolutions of DDPM on MNIST
    patch_size: int = 2                     # pixels a side of one token
    hidden_size: int = 384                  # width of the denoiser
    depth: int = 12                         # blocks of the DiT, or convolutions
    num_heads: int = 6                      # attention heads
    mlp_ratio: float = 4.0                  # width of the DiT's MLP over hidden_size
    fourier_features: bool = False          # show the DiT sines of its input too: the last faint noise, made visible
    depthwise_conv: bool = False            # a 3x3 depthwise convolution on the token grid before every DiT block
    encoder: str = "stacked"                # a key of ENCODERS: what reads the support
    encoder_depth: int = 6                  # blocks of the set encoder
    encoder_patch_size: int = 2             # pixels a side of one context token
    hdim: int = 384                         # width of the set encoder and of the context
    mode_conditioning: str = "film"         # film: the context is one vector; lag: blocks attend to its tokens as well
    mode_context: str = "deterministic"     # or variational: a draw from a Gaussian that a KL holds near N(0, I)
    context_dropout: float = 0.0            # share of targets trained on the null context (guidance needs some)
    vary_support: bool = False              # train each target on 1 .. sample_size - 1 of the others, not on all
    diffusion_steps: int = 250              # T
    schedule: str = "linear"                # linear | cosine: how alpha_bar falls with t
    prediction: str = "noise"               # the network's output: noise | v = sqrt(a) noise - sqrt(1 - a) x0

    def __post_init__(self):
        """Raises ValueError with one sentence that names the field when the values contradict each other."""
        def need(ok, sentence):
            if not ok:
                raise ValueError(sentence)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            need(type(value) is field.type or field.type is float and type(value) is int,
                 f"{field.name} is {value!r}: expected {field.type.__name__}")
        # the upper ends are far above any use: a checkpoint from a stranger must not take all memory
        width, layers = (1, 8192), (1, 512)
        for name, (low, high) in dict(
                image_size=width, patch_size=width, encoder_patch_size=width, hidden_size=width, num_heads=width,
                hdim=width, depth=layers, encoder_depth=(0, 512), sample_size=layers, mlp_ratio=(0.01, 64),
                context_dropout=(0, 0.99), diffusion_steps=(2, 100_000)).items():
            need(low <= getattr(self, name) <= high, f"{name} is {getattr(self, name)}: expected {low} .. {high}")
        for name, known in dict(
                in_channels=(1, 3), denoiser=DENOISERS, encoder=ENCODERS, schedule=SCHEDULES, prediction=("noise", "v"),
                mode_conditioning=("film", "lag"), mode_context=("deterministic", "variational")).items():
            need(getattr(self, name) in known, f"{name} is {getattr(self, name)!r}: expected one of {list(known)}")
        for part, whole in dict(patch_size="image_size", encoder_patch_size="image_size",
                                num_heads="hidden_size").items():
            need(getattr(self, whole) % getattr(self, part) == 0,
                 f"{part} {getattr(self, part)} does not divide {whole} {getattr(self, whole)}")
        need(self.denoiser == "dit" or self.encoder == "none",
             f"denoiser {self.denoiser} is conditioned on time only: pass --encoder none")
        need(self.encoder == "none" or self.sample_size >= 2,
             f"sample_size {self.sample_size}: at least 2, since each image is generated from the others")


# what made models use their context (README, How it differs)
FEW_SHOT = dict(encoder="image", mode_conditioning="lag", context_dropout=0.1, vary_support=True,
                depthwise_conv=True, fourier_features=True, schedule="cosine", prediction="v")
PRESETS = {
    # learns something worth seeing in 15 minutes on two CPU cores
    "demo": dict(FEW_SHOT, image_size=24, patch_size=4, hidden_size=192, depth=6, num_heads=3,
                 encoder_depth=2, encoder_patch_size=8, hdim=192),
    # what the documents on VFSDDPM (README, The size of things) call reference, exactly: 43,509,900 parameters
    "reference": dict(),
    # the documents' wide and shallow configuration: 37,739,262 parameters
    "wide": dict(hidden_size=450, depth=6, num_heads=9, hdim=450),
    # the documents' DDPM on MNIST, unconditional: 4,869,377 parameters (the digits are split by class like all data)
    "mnist": dict(image_size=28, in_channels=1, sample_size=1, denoiser="conv", hidden_size=256, depth=8, num_heads=1,
                  encoder="none", diffusion_steps=1000),
    # our recommendation for one T4
    "t4": dict(FEW_SHOT, hidden_size=384, depth=8, num_heads=6, encoder_depth=4, encoder_patch_size=4, hdim=384),
}


# ---- Randomness has an address: the seed, a stream, then step and part, or an image's number. So a resumed run repeats
# nothing and saves nothing, and an image does not depend on the batch that it was made in.

SAMPLING, TRAINING, VALIDATION, PICTURE, EVALUATION, SETS, CONTEXT, GLYPHS = *range(1, 8), 71   # the streams


def rng(device, seed, *address):
    """A torch.Generator on `device`, a function of the whole numbers `seed` and `address` only."""
    # torch's CPU generator reads 32 bits of a seed; SeedSequence mixes all the numbers into every bit
    state = np.random.SeedSequence(seed, spawn_key=address).generate_state(1)
    return torch.Generator(device).manual_seed(int(state[0]))


# ---- Data: one uint8 tensor per split on the training device, images sorted by class; a batch of sets is an index.
# A loader(path, size, channels, download) -> images uint8 [M, channels, size, size], their labels int [M], the names of
# all classes, and the labels of the classes in "train", "val" and "test". load_data chooses one.

class Split(NamedTuple):
    images: torch.Tensor                    # uint8 [M, C, H, W], all images of class 0, then of class 1, ...
    offsets: torch.Tensor                   # int64 [classes + 1], class c is images[offsets[c]:offsets[c + 1]]
    names: list                             # [classes]
    largest: int                            # images in the largest class

    def to(self, device):
        return self._replace(images=self.images.to(device), offsets=self.offsets.to(device))


def make_split(images, labels, names, keep):
    """images uint8 [M, C, H, W], int labels [M], names of all classes, keep = the labels of this split -> Split."""
    parts = [images[np.flatnonzero(labels == c)] for c in keep]
    sizes = [len(part) for part in parts]
    return Split(torch.from_numpy(np.concatenate(parts or [images[:0]])),
                 torch.tensor([0, *np.cumsum(sizes, dtype=np.int64)]), [names[c] for c in keep], max(sizes, default=0))


def draw_sets(split, sets, size, generator):
    """-> int64 [sets, size], a class drawn for each set and `size` different images of it, indices into images."""
    device, counts = split.images.device, split.offsets.diff()
    classes = torch.randint(len(counts), (sets,), generator=generator, device=device)
    keys = torch.rand(sets, split.largest, generator=generator, device=device)
    keys = keys.masked_fill(torch.arange(split.largest, device=device) >= counts[classes, None], -1)
    return split.offsets[classes, None] + keys.topk(size).indices


def split_by_name(names):
    """Class names -> {"train": labels, "val": ..., "test": ...}: 70/10/20 percent in the order of the names' SHA-1."""
    order = sorted(range(len(names)), key=lambda c: hashlib.sha1(names[c].encode()).digest())
    if len(names) < 3:
        raise ValueError(f"{len(names)} class(es) found: at least 3 are needed, one each to train, validate and test")
    test, val = max(1, len(names) // 5), max(1, len(names) // 10)
    return {"train": sorted(order[test + val:]), "val": sorted(order[test:test + val]), "test": sorted(order[:test])}


# FC100: whole superclasses of CIFAR-100 are held out (Oreshkin et al. 2018), so that no test class has a near relative
FC100_TEST = """beaver dolphin otter seal whale  bee beetle butterfly caterpillar cockroach
                fox porcupine possum raccoon skunk  baby boy girl man woman""".split()
FC100_VAL = """bear leopard lion tiger wolf  camel cattle chimpanzee elephant kangaroo
               crab lobster snail spider worm  hamster mouse rabbit shrew squirrel""".split()


def split_fc100(names):
    return {"train": [c for c, name in enumerate(names) if name not in FC100_TEST + FC100_VAL],
            "val": [c for c, name in enumerate(names) if name in FC100_VAL],
            "test": [c for c, name in enumerate(names) if name in FC100_TEST]}


def split_background(evaluation):
    """Omniglot's rule: the last 10 percent of the background classes validate, the evaluation classes test."""
    evaluation = np.asarray(evaluation, bool)                                   # ~ of 0 and 1 would be -1 and -2
    background = np.flatnonzero(~evaluation)
    val = math.ceil(len(background) / 10)
    return {"train": background[:-val], "val": background[-val:], "test": np.flatnonzero(evaluation)}


def to_picture(image, size, channels):
    """A PIL image of any mode and size -> uint8 [C, size, size]: upright, on white, centre-cropped, antialiased."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):                       # 16-bit grey: PIL would clip it, not scale it
        wide = np.asarray(image, np.float32)
        image = Image.fromarray((wide / (257 if wide.max() > 255 else 1)).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


# only these: a ".png" that holds PostScript would be given to Ghostscript
FORMATS = [name for name in ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TGA", "TIFF", "WEBP")
           if name in Image.registered_extensions().values() and name in Image.OPEN]
IMAGE_ENDINGS = tuple(ending for ending, name in Image.registered_extensions().items() if name in FORMATS)


def read_picture(path, size, channels):
    """An image file -> uint8 [C, size, size]. Raises ValueError with a sentence when it cannot be read."""
    if not os.path.isfile(path):                                                # a pipe named .png would wait for ever
        raise ValueError(f"{path} is a folder: pass its files" if os.path.isdir(path)
                         else f"{path}: there is no such file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            return to_picture(image, size, channels)
    except Exception as error:                                                  # decoders fail in many ways
        raise ValueError(f"{path} cannot be read as an image: {error}") from None


def to_size(images, size, channels):
    """uint8 array [M, H, W] or [M, H, W, C] -> uint8 [M, channels, size, size]."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)):
        raise ValueError(f"images are {images.dtype} {images.shape}: expected uint8 [M, H, W] or [M, H, W, 1 or 3]")
    images = images[..., 0] if images.shape[3:] == (1,) else images
    return np.stack([to_picture(Image.fromarray(image), size, channels) for image in images])


def glyphs(path, size, channels, download, classes=(1000, 100, 100), per_class=20):
    """Invented characters, nothing downloaded: every class a few curved strokes in its own ink and paper colours,
    every image of it drawn again with its own jitter, slant, scale, pen width and colour shift."""
    g, count = rng("cpu", 0, GLYPHS), sum(classes)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(*shape, generator=g)
    # a class: two to four strokes between the nodes of a 3 x 3 lattice, each bent sideways, in [-1, 1] x [-1, 1]
    nodes = torch.cartesian_prod(torch.tensor([-0.55, 0.0, 0.55]), torch.tensor([-0.6, 0.0, 0.6]))
    ends = torch.rand(count, 4, 9, generator=g).topk(2).indices                     # [count, strokes, 2]
    start, end = (nodes[ends] + uniform(-0.12, 0.12, count, 4, 2, 2)).unbind(2)     # [count, strokes, 2]
    aside = (end - start).flip(-1) * torch.tensor([1.0, -1.0]) * uniform(-0.6, 0.6, count, 4, 1)
    strokes = torch.stack([start, (start + end) / 2 + aside, end], 2)               # [count, strokes, 3, 2]
    missing = torch.arange(4) >= torch.randint(2, 5, (count, 1), generator=g)
    strokes = torch.where(missing[..., None, None], strokes[:, :1], strokes)        # a missing one repeats the first
    # of 128 pairs of colours, the first whose brightness differs enough to be read
    pairs = torch.rand(count, 128, 2, 3, generator=g)
    brightness = torch.tensor([0.30, 0.59, 0.11])                                   # of red, green and blue
    contrast = (pairs @ brightness).diff(dim=2).abs()[..., 0]
    ink, paper = pairs[torch.arange(count), (contrast > 0.4).int().argmax(1)].unbind(1)

    axis = torch.arange(size) + 0.5 - size / 2
    pixels = torch.cartesian_prod(axis, axis).flip(1)                               # [H * W, 2]: x, y

    def draw(c):                                                                # class -> uint8 [per_class, 3, H, W]
        m, normal = per_class, lambda scale, *shape: scale * torch.randn(*shape, generator=g)
        points = strokes[c] + normal(0.035, m, 4, 1, 2) + normal(0.025, m, 4, 3, 2)
        u = torch.linspace(0, 1, 32)[:, None]                                       # quadratic Bezier curves
        curve = torch.cat([(1 - u) ** 2, 2 * u * (1 - u), u ** 2], 1) @ points      # [m, 4, 32, 2]
        angle, slant, zoom = normal(0.07, m), normal(0.12, m), 1 + normal(0.07, m)
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        turn = torch.stack([cos, cos * slant - sin, sin, sin * slant + cos], 1).view(m, 2, 2)
        curve = (curve.view(m, -1, 2) @ turn.mT + normal(0.04, m, 1, 2)) * (size / 2)   # in pixels from the centre
        distance = torch.cdist(pixels, curve).amin(2)                               # [m, H * W]
        pen = size / 32 * 1.6 * (1 + normal(0.12, m, 1)).clamp(0.6)
        cover = (pen - distance + 0.5).clamp(0, 1)[:, None]                         # antialiased, [m, 1, H * W]
        tint = normal(0.025, m, 2, 3, 1)
        colour = cover * (ink[c, :, None] + tint[:, 0]) + (1 - cover) * (paper[c, :, None] + tint[:, 1])
        return (colour.clamp(0, 1) * 255).round().byte().view(m, 3, size, size)

    images = torch.cat([draw(c) for c in range(count)])
    if channels == 1:
        images = torch.einsum("mchw,c->mhw", images.float(), brightness)[:, None].round().byte()
    keep = dict(zip(("train", "val", "test"), np.split(np.arange(count), np.cumsum(classes[:2]))))
    return images.numpy(), np.repeat(np.arange(count), per_class), [f"glyph{c:04d}" for c in range(count)], keep


def both_files(source, split):
    """A torchvision class of small arrays -> a loader: its train and test files together, split by class."""
    def load(path, size, channels, download):
        files = [source(path, train, download=download) for train in (True, False)]
        images, labels = np.concatenate([f.data for f in files]), np.concatenate([f.targets for f in files])
        return to_size(images, size, channels), labels, files[0].classes, split(files[0].classes)
    return load


def omniglot(path, size, channels, download):
    """torchvision's Omniglot: background alphabets train (the last 97 characters validate), evaluation tests."""
    files = [datasets.Omniglot(path, background, download=download) for background in (True, False)]
    names = [name for f in files for name in sorted(f._characters)]             # torchvision lists them unsorted
    found = [(to_picture(ImageOps.invert(image), size, channels), names.index(f._characters[label]))
             for f in files for image, label in f]
    images, labels = (np.stack(column) for column in zip(*found))
    return images, labels, names, split_background(np.arange(len(names)) >= len(files[0]._characters))


def celeba(path, size, channels, download):
    """torchvision's CelebA: a class is an identity with at least 20 images; identities sorted, 70/10/20 percent."""
    data = datasets.CelebA(path, "all", target_type="identity", download=download)
    identity, found = data.identity[:, 0].numpy(), data.identity.unique(return_counts=True)
    names = [int(i) for i, count in zip(*found) if count >= 20]
    rows = np.flatnonzero(np.isin(identity, names))
    images = np.stack([to_picture(data[i][0], size, channels) for i in rows])
    a, b = int(len(names) * 0.7), int(len(names) * 0.8)
    keep = {"train": range(a), "val": range(a, b), "test": range(b, len(names))}
    return images, np.searchsorted(names, identity[rows]), [str(name) for name in names], keep


def folder(path, size, channels, download):
    """A folder of class folders, with train/ val/ test/ inside or split by class name; unreadable files are named."""
    root, parts = Path(path), ("train", "val", "test")
    split = all((root / part).is_dir() for part in parts)
    classes = [d for part in (parts if split else (".",)) for d in sorted((root / part).iterdir())
               if d.is_dir() and not d.name.startswith(".")]
    names = [f"{d.parent.name}/{d.name}" if split else d.name for d in classes]
    images, labels, bad = [], [], []
    for c, d in enumerate(classes):
        for f in sorted(d.rglob("*")):
            if f.suffix.lower() in IMAGE_ENDINGS and not any(p.startswith(".") for p in f.relative_to(d).parts):
                try:
                    images.append(read_picture(f, size, channels))
                    labels.append(c)
                except ValueError as error:
                    bad.append(str(error))
        if labels[-1:] != [c]:
            raise ValueError(f"class folder '{d}' holds no readable image: add images to it or remove it")
    if bad:
        print(f"{path}: {len(bad)} files left out: {', '.join(bad[:3])}{', ...' if bad[3:] else ''}")
    keep = ({part: [c for c, d in enumerate(classes) if d.parent.name == part] for part in parts}
            if split else split_by_name(names))
    return np.stack(images), np.array(labels), names, keep


def npz(path, size, channels, download):
    """`images` uint8 [M, H, W(, C)] and `labels`; split by `class_is_evaluation`, as FC100, or by class name."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "labels", "class_names", "class_is_evaluation")
                      if name in file}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as an .npz of plain arrays: {error}") from None
    if not {"images", "labels"} <= set(arrays):
        raise ValueError(f"{path} holds {sorted(arrays)} of what is needed: images and labels")
    images, labels, evaluation = arrays["images"], arrays["labels"], arrays.get("class_is_evaluation")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{path} has {labels.shape} labels for {images.shape} images: expected one each")
    if "class_names" in arrays:                                                 # labels count in it, gaps and all
        names = [str(name) for name in arrays["class_names"]]
    else:
        values, labels = np.unique(labels, return_inverse=True)
        names = [str(value) for value in values]
    if labels.dtype.kind not in "iu" or len(labels) and not 0 <= labels.min() <= labels.max() < len(names) \
            or evaluation is not None and evaluation.shape != (len(names),):
        raise ValueError(f"{path}: labels, class_names and class_is_evaluation do not fit together")
    keep = (split_background(evaluation) if evaluation is not None
            else split_fc100(names) if set(FC100_TEST) <= set(names) else split_by_name(names))
    return to_size(images, size, channels), labels, names, keep


DATASETS = {"glyphs": glyphs, "cifar100": both_files(datasets.CIFAR100, split_fc100), "omniglot": omniglot,
            "mnist": both_files(datasets.MNIST, split_by_name), "celeba": celeba}


def load_data(dataset, data_dir, size, channels, download=False):
    """-> {"train": Split, "val": Split, "test": Split} on the CPU, classes disjoint.

    dataset: a key of DATASETS (files under `data_dir`), a folder of class folders, or an .npz.
    Raises ValueError or OSError with a sentence when there is nothing to load."""
    source = DATASETS.get(dataset) or (folder if os.path.isdir(dataset) else npz if dataset.endswith(".npz") else None)
    if source is None:
        raise ValueError(f"dataset '{dataset}': expected one of {sorted(DATASETS)}, a folder of class folders, "
                         "or an .npz with images and labels")
    try:
        images, labels, names, keep = source(data_dir if dataset in DATASETS else dataset, size, channels, download)
    except RuntimeError as error:                                               # torchvision's way to say "no files"
        raise OSError(f"{dataset}: {error} (--download fetches it, --data_dir says where it is)") from None
    return {name: make_split(images, labels, names, keep[name]) for name in ("train", "val", "test")}


def check_data(data, sample_size, splits=("train", "val")):
    """Raises ValueError when one of `splits` has no class, or a class with fewer than `sample_size` images."""
    for name in splits:
        if not data[name].names:
            raise ValueError(f"the data set has no {name} classes: they are split by class, and it needs more of them")
        fewest, c = data[name].offsets.diff().min(0)
        if fewest < sample_size:
            raise ValueError(f"class '{data[name].names[c]}' has {fewest} images, and a set takes {sample_size} "
                             "different ones: add images, or ask for fewer (--sample_size; --k of sample.py)")


# ---- Transformer parts, up to the blocks that set encoders and denoiser are built of. Every layer begins with weights
# of its own choosing, so a model needs no pass of initialisation.

def attend(q, k, v, mask=None):
    """q [B, N, heads, d], k and v [B, M, heads, d], mask bool [B, 1, N, M] (True: may look) -> [B, N, heads * d]."""
    d = q.shape[-1]
    # in fp16 a T4 has a fast kernel for multiples of 8 only; zeros change no product, and the scale stays d^-1/2
    q, k, v = (F.pad(h, (0, -d % 8)).transpose(1, 2) if d % 8 else h.transpose(1, 2) for h in (q, k, v))
    # torch's fast kernel for CPUs is made for long rows: backward over 36 tokens takes it five times as long in bf16
    few = q.device.type == "cpu" and k.shape[2] < 128 and torch.is_grad_enabled()
    with sdpa_kernel(SDPBackend.MATH) if few else nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=d ** -0.5)
    return out[..., :d].transpose(1, 2).flatten(2)


class Linear(nn.Linear):
    """Begins with Xavier's weights and a bias of zero, as in DiT."""
    def reset_parameters(self):                                                 # nn.Linear calls it
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def zero(layer):
    """A branch or an output that begins at nothing (adaLN-Zero)."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class SelfAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x):                                                       # [B, N, D]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)      # [B, N, heads, d] each
        return self.out(attend(q, k, v))                                        # [B, N, D]


class CrossAttention(nn.Module):
    """Queries from the image being generated; keys and values, made once per set, from its context tokens."""
    def __init__(self, width, heads, context_width):
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width)
        self.kv = Linear(context_width, 2 * width)
        self.out = Linear(width, width)

    def keys_values(self, tokens):                                              # [B, M, context width]
        return self.kv(tokens).unflatten(-1, (2, self.heads, -1)).unbind(2)     # [B, M, heads, d] each

    def forward(self, x, keys_values, mask):                                    # [B, n * N, D]
        return self.out(attend(self.q(x).unflatten(-1, (self.heads, -1)), *keys_values, mask))     # [B, n * N, D]


def mlp(width, hidden):
    return nn.Sequential(Linear(width, hidden), nn.GELU(approximate="tanh"), Linear(hidden, width))


def modulate(x, shift, scale):
    """[B, N, D] by [B, 1, D]: the adaptive part of adaptive layer normalisation."""
    return x * (1 + scale) + shift


def patchify(x, p):
    """[B, C, H, W] -> [B, N, C * p * p], tokens row by row."""
    return F.pixel_unshuffle(x, p).flatten(2).mT


def unpatchify(x, p):
    """[B, N, C * p * p] -> [B, C, H, W], the inverse of patchify for square images."""
    side = math.isqrt(x.shape[1])
    return F.pixel_shuffle(x.mT.unflatten(2, (side, side)), p)


def timestep_embedding(t):
    """t [B] in 0 .. 1000 -> [B, 256]: cosines and sines at geometric frequencies (DDPM; Vaswani et al. 2017)."""
    frequency = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
    angle = t[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], 1)


def position_table(tokens, width):
    """-> [tokens, width], the start of a learned table: sines and cosines of row and column on one 16 x 16 map,
    whatever the patch size, so that a target's patch finds the same place in the support from the first step on."""
    if width % 4:                                                               # 450 wide: no room for four of each
        return torch.randn(tokens, width) * 0.02
    side = math.isqrt(tokens)
    frequency = 100.0 ** -torch.linspace(0, 1, width // 4)      # with 10,000 half of them would not move in 16 rows
    angle = (torch.arange(side) + 0.5)[:, None] * (16 / side) * frequency           # [side, width / 4]
    one = torch.cat([angle.sin(), angle.cos()], 1)                                  # [side, width / 2]
    return torch.cat([one[:, None].expand(-1, side, -1), one.expand(side, -1, -1)], 2).flatten(0, 1)


class Block(nn.Module):
    """A pre-norm transformer block, for the set encoders."""
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), SelfAttention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), mlp(width, 4 * width)

    def forward(self, x):                                                       # [B, N, D]
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DiTBlock(nn.Module):
    """A DiT block (Peebles and Xie 2022): the condition c shifts, scales and gates each branch; all gates start at
    zero (adaLN-Zero). Under lag a third branch, between the two, looks at the context tokens. A depthwise convolution
    in front (Chu et al. 2021) lets neighbouring patches meet from the first step on."""
    def __init__(self, width, heads, mlp_width, context_width=None, depthwise_conv=False):
        super().__init__()
        branches = 2 if context_width is None else 3
        self.norm1, self.attention = nn.LayerNorm(width), SelfAttention(width, heads)
        if context_width is not None:
            self.norm_cross, self.cross = nn.LayerNorm(width), CrossAttention(width, heads, context_width)
        self.norm2, self.mlp = nn.LayerNorm(width), mlp(width, mlp_width)
        self.ada = zero(Linear(width, 3 * branches * width))
        if depthwise_conv:
            self.local = zero(nn.Conv2d(width, width, 3, padding=1, groups=width))

    def forward(self, x, c, keys_values=None, mask=None):       # x [B * n, N, D], c [B * n, D], [B, 1, n * N, M]
        if hasattr(self, "local"):
            side = math.isqrt(x.shape[1])
            x = x + self.local(x.mT.unflatten(2, (side, side))).flatten(2).mT
        # one of each for every branch: 0 attention, 1 MLP, 2 context
        shift, scale, gate = self.ada(c).unflatten(1, (-1, 3, 1, x.shape[2])).unbind(2)     # [B * n, branches, 1, D]
        x = x + gate[:, 0] * self.attention(modulate(self.norm1(x), shift[:, 0], scale[:, 0]))
        if keys_values is not None:     # the targets of a set ask the same keys: one product of all their tokens
            h = modulate(self.norm_cross(x), shift[:, 2], scale[:, 2])
            h = h.reshape(len(keys_values[0]), -1, x.shape[2])                              # [B, n * N, D]
            x = x + gate[:, 2] * self.cross(h, keys_values, mask).view(x.shape)
        return x + gate[:, 1] * self.mlp(modulate(self.norm2(x), shift[:, 1], scale[:, 1]))     # [B * n, N, D]


# ---- Set encoders: the images of a set, and who sees whom, -> context. sees, bool [B, n, K]: target i is generated
# from image j. In training the targets are the images themselves (n = K), and no target sees itself. An encoder returns
# a vector for every target [B, n, D], G groups of N tokens [B, G, N, D], and looks, bool [B, n, G]: the groups that
# target i may attend to. ImageEncoder: a group is an image, looks = sees; StackedEncoder: a group is what the pass for
# a target made, and only this target looks at it.

class ImageEncoder(nn.Module):
    """Reads each image by itself, once, whoever will look at it: the order never matters, any number of images
    works, and leaving a target out is a mask. The vector is the mean over all patches of the seen images."""
    def __init__(self, config, stacked=1):
        super().__init__()
        D, self.patch = config.hdim, config.encoder_patch_size
        self.embed = Linear(self.patch ** 2 * config.in_channels * stacked, D)
        self.pos = nn.Parameter(position_table((config.image_size // self.patch) ** 2, D))
        heads = math.gcd(D, config.num_heads)                                   # num_heads need not divide hdim
        self.blocks = nn.Sequential(*(Block(D, heads) for _ in range(config.encoder_depth)))
        self.norm = nn.LayerNorm(D)

    def forward(self, images, sees):                                            # [B, K, C, H, W], bool [B, n, K]
        x = self.embed(patchify(images.flatten(0, 1), self.patch)) + self.pos   # [B * K, N, D]
        x = self.norm(self.blocks(x)).unflatten(0, images.shape[:2])            # [B, K, N, D]
        share = sees / sees.sum(2, keepdim=True).clamp(min=1)                   # [B, n, K]
        return share.to(x.dtype) @ x.mean(2), x, sees                           # [B, n, D], [B, K, N, D], [B, n, K]


class StackedEncoder(ImageEncoder):
    """The documents' sViT: the images of a set stacked on channels in `sample_size` slots, so the order matters. Every
    target needs its own pass; the images it sees fill the first slots, zeros the others (always at least one)."""
    def __init__(self, config):
        super().__init__(config, stacked=config.sample_size)
        self.slots = config.sample_size
        cls = torch.randn(1, config.hdim) * 0.02                                # the CLS token comes first
        self.pos = nn.Parameter(torch.cat([cls, self.pos.detach()]))

    def forward(self, images, sees):                                            # [B, K, C, H, W], bool [B, n, K]
        B, n, K = sees.shape
        first = sees.byte().argsort(dim=2, descending=True, stable=True)        # [B, n, K]: the seen ones come first
        chosen = images[torch.arange(B, device=images.device)[:, None, None], first]        # [B, n, K, C, H, W]
        chosen = chosen * sees.gather(2, first)[..., None, None, None]
        chosen = F.pad(chosen, (0, 0) * 3 + (0, self.slots - K))                # [B, n, slots, C, H, W]
        x = self.embed(patchify(chosen.flatten(2, 3).flatten(0, 1), self.patch))            # [B * n, N, D]
        x = torch.cat([torch.zeros_like(x[:, :1]), x], 1) + self.pos            # [B * n, 1 + N, D]
        x = self.norm(self.blocks(x)).unflatten(0, (B, n))                      # [B, n, 1 + N, D]
        only_own = torch.eye(n, dtype=torch.bool, device=sees.device) & sees.any(2, keepdim=True)
        return x[:, :, 0], x[:, :, 1:], only_own                                # [B, n, D], [B, n, N, D], [B, n, n]


ENCODERS = {"stacked": StackedEncoder, "image": ImageEncoder, "none": lambda config: None}


# ---- Denoiser: noisy targets, their times and their context -> noise or v. The DiT uses the context; the convolutions
# are the documents' unconditional DDPM on digits and know the time only.

class Context(NamedTuple):
    """What a DiT is told about the support of B sets with n targets each."""
    vector: torch.Tensor                    # [B, n, hdim]
    keys_values: list                       # for each block ([B, M, heads, d], [B, M, heads, d]); empty under film
    mask: torch.Tensor                      # bool [B, n, M]: which of the M tokens a target may look at
    kl: torch.Tensor | None = None          # [B, n] of a variational context


class DiT(nn.Module):
    """Peebles and Xie 2022: patches are tokens; time plus context steers every block. Under lag blocks look at context
    tokens too."""
    def __init__(self, config):
        super().__init__()
        D, self.patch = config.hidden_size, config.patch_size
        pixels = self.patch ** 2 * config.in_channels
        # Kingma et al. 2021 (Variational Diffusion Models), appendix C: sin and cos of 2^k pi x show what a linear
        # embedding in bf16 cannot, the last noise of a level or two: moving x by 1/64 flips the sign of both at k = 6
        self.powers = (2, 4, 6) if config.fourier_features else ()
        self.embed = Linear(pixels * (1 + 2 * len(self.powers)), D, bias=False)
        nn.init.xavier_uniform_(self.embed.weight[:, :pixels])
        nn.init.zeros_(self.embed.weight[:, pixels:])           # begin at nothing: at most times they are only noise
        self.pos = nn.Parameter(position_table((config.image_size // self.patch) ** 2, D))
        self.time = nn.Sequential(Linear(256, D, bias=False), nn.SiLU(), Linear(D, D, bias=False))
        for layer in (self.time[0], self.time[2]):
            nn.init.normal_(layer.weight, std=0.02)
        self.time_scale = 1000 / config.diffusion_steps
        self.project = Linear(config.hdim, D) if config.encoder != "none" else None
        context_width = config.hdim if config.encoder != "none" and config.mode_conditioning == "lag" else None
        self.blocks = nn.ModuleList(
            DiTBlock(D, config.num_heads, int(D * config.mlp_ratio), context_width, config.depthwise_conv)
            for _ in range(config.depth))
        self.norm, self.ada, self.out = nn.LayerNorm(D), zero(Linear(D, 2 * D)), zero(Linear(D, pixels))

    def keys_values(self, tokens):
        """Context tokens [B, M, hdim] -> the keys and values of every block, the same at every time: made once."""
        return [block.cross.keys_values(tokens) for block in self.blocks if hasattr(block, "cross")]

    def forward(self, x, t, context=None):
        """x [B, n, C, H, W] noisy images, t int [B, n], their context -> [B, n, C, H, W], noise or v."""
        B, n, N = *x.shape[:2], len(self.pos)
        c = self.time(timestep_embedding(t.flatten() * self.time_scale))        # [B * n, D]
        mask, keys_values = None, [None] * len(self.blocks)
        if context is not None:
            c = c + self.project(context.vector.flatten(0, 1))
            if context.keys_values:
                keys_values = context.keys_values
                mask = context.mask.repeat_interleave(N, dim=1)[:, None]                  # [B, 1, n * N, M]
        c = F.silu(c)                                                           # adaLN's, once for all blocks
        x = x.flatten(0, 1)                                                     # [B * n, C, H, W]
        x = torch.cat([x, *(f(2 ** k * math.pi * x) for k in self.powers for f in (torch.sin, torch.cos))], 1)
        x = self.embed(patchify(x, self.patch)) + self.pos                      # [B * n, N, D]
        for block, kv in zip(self.blocks, keys_values):
            x = block(x, c, kv, mask)
        shift, scale = self.ada(c)[:, None].chunk(2, dim=2)                     # [B * n, 1, D] each
        x = self.out(modulate(self.norm(x), shift, scale))                      # [B * n, N, C * p * p]
        return unpatchify(x, self.patch).unflatten(0, (B, n))                   # [B, n, C, H, W]


class DilatedConv(nn.Module):
    """DDPM on digits: convolutions at full resolution, dilated 1, 1, 3, 3, 9, 9, ..., conditioned on time only."""
    def __init__(self, config):
        super().__init__()
        D, dilations = config.hidden_size, [3 ** (i // 2) for i in range(config.depth)]
        self.time_scale = 1000 / config.diffusion_steps
        self.time = nn.Sequential(nn.Conv2d(256, D, 1), nn.SiLU(), nn.Conv2d(D, D, 1))
        self.embed = nn.Conv2d(config.in_channels, D, 7, padding=3)
        self.blocks = nn.ModuleList(nn.Conv2d(D, D, 3, padding=d, dilation=d) for d in dilations)
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(8, D), D) for _ in dilations)
        self.out = nn.Conv2d(D, config.in_channels, 1)

    def forward(self, x, t, context=None):
        """x [B, n, C, H, W] noisy images, t int [B, n] -> [B, n, C, H, W], noise or v. There is no context."""
        time = self.time(timestep_embedding(t.flatten() * self.time_scale)[:, :, None, None])       # [B * n, D, 1, 1]
        y = self.embed(x.flatten(0, 1))                                         # [B * n, D, H, W]
        for conv, norm in zip(self.blocks, self.norms):
            h = y + time
            y = F.silu(norm(h + conv(h)))                                       # [B * n, D, H, W]
        return self.out(y).unflatten(0, x.shape[:2])                            # [B, n, C, H, W]


DENOISERS = {"dit": DiT, "conv": DilatedConv}


# ---- Diffusion: x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise, t = 0 .. T - 1   (DDPM eq. 4)

def linear_schedule(T):
    """beta from 1e-4 to 2e-2 at T = 1000 (DDPM, section 4), scaled by 1000 / T: pure noise at the end at every T."""
    # unscaled, T = 250 would end at alpha_bar = 0.08, and sampling from N(0, I) could never be right
    beta = torch.linspace(1e-4, 2e-2, T, dtype=torch.float64, device="cpu") * (1000 / T)
    return (1 - beta.clamp(max=0.999)).cumprod(0)                               # clamps only below T = 21


def cosine_schedule(T):
    """Nichol and Dhariwal 2021, eq. 17, at the middles of T equal steps and, unlike there, not divided by its value at
    0: neither end is quite 0 or 1, and at T = 250 the last noise is 2 of 255 levels, not 1.2."""
    u = (torch.arange(T, dtype=torch.float64, device="cpu") + 0.5) / T
    return ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2


SCHEDULES = {"linear": linear_schedule, "cosine": cosine_schedule}


def leave_one_out(sets, size, generator, vary=False, dropout=0.0):
    """-> bool [sets, size, size]: target i sees image j; never itself; all False: the null context.

    vary: each target sees 1 .. size - 1 of the others, more than half the time all; dropout: the share that sees none.
    """
    device = generator.device
    order = torch.rand(sets, size, size, generator=generator, device=device) + 2 * torch.eye(size, device=device)
    rank = order.argsort(2).argsort(2)                                          # at random, the target itself last
    count = torch.randint(1, max(2, 2 * size - 1), (sets, size, 1), generator=generator, device=device)
    count = count.clamp(1 if vary else size - 1, size - 1)
    dropped = torch.rand(sets, size, 1, generator=generator, device=device) < dropout
    return (rank < count) & ~dropped


def context_noise(config, targets, images, randn):
    """Normal numbers to draw a variational context with: for the vector [B, n, D], and under lag for the tokens
    [B, G, N, D]; None where nothing is drawn. randn(*shape) adds the B in front."""
    if config.encoder == "none" or config.mode_context == "deterministic":
        return None, None
    groups = targets if config.encoder == "stacked" else images
    tokens = (config.image_size // config.encoder_patch_size) ** 2
    return (randn(targets, config.hdim),
            randn(groups, tokens, config.hdim) if config.mode_conditioning == "lag" else None)


def to_signal(images):
    """uint8 0 .. 255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(x):
    """float in [-1, 1] -> uint8, rounded (cutting off would darken every image by half a level)."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()


# ---- The model: a set encoder and a denoiser, tied together by the diffusion.

class FSDM(nn.Module):
    """forward is the training loss; read and denoise serve the samplers."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = ENCODERS[config.encoder](config)
        self.denoiser = DENOISERS[config.denoiser](config)
        if self.encoder is not None and config.context_dropout:
            self.null = nn.Parameter(torch.randn(config.hdim) * 0.02)           # the null context: no support at all
        if self.encoder is not None and config.mode_context == "variational":
            self.posterior = nn.Sequential(Linear(config.hdim, config.hdim), nn.GELU(),
                                           Linear(config.hdim, 2 * config.hdim))
        self.schedule = SCHEDULES[config.schedule](config.diffusion_steps)      # float64 [T], on the CPU, for samplers
        self.register_buffer("alpha_bar", self.schedule.float(), persistent=False)

    def infer(self, h, noise):
        """q(c | h) = N(mu, sigma^2) -> c = mu + sigma noise (mu when noise is None), and KL(q || N(0, I)), the sum over
        the last dimension (Kingma and Welling 2014, appendix B)."""
        mu, log_var = self.posterior(h).float().chunk(2, dim=-1)
        kl = (mu.square() + log_var.exp() - 1 - log_var).sum(-1) / 2
        return mu if noise is None else mu + (log_var / 2).exp() * noise, kl

    def read(self, images, sees, drawn=(None, None)):
        """Images [B, K, C, H, W] in [-1, 1] and who sees whom, bool [B, n, K] -> Context, or None without encoder.

        drawn: what context_noise returns, to draw a variational context; the default is its mean."""
        if self.encoder is None:
            return None
        vector, tokens, looks = self.encoder(images, sees)                      # [B, n, D], [B, G, N, D], [B, n, G]
        nothing, kl = ~sees.any(2, keepdim=True), None                          # [B, n, 1]
        if hasattr(self, "posterior"):
            vector, kl = self.infer(vector, drawn[0])                           # [B, n, D], [B, n]
            if self.config.mode_conditioning == "lag":
                tokens, each = self.infer(tokens, drawn[1])                     # [B, G, N, D], [B, G, N]
                kl = kl + (looks * each.sum(2)[:, None]).sum(2)                 # of the tokens that a target sees
            kl = kl.masked_fill(nothing.squeeze(2), 0)
        mask = looks.repeat_interleave(tokens.shape[2], dim=2)                  # [B, n, G * N]
        tokens = tokens.flatten(1, 2)                                           # [B, G * N, D]
        if hasattr(self, "null"):
            vector = torch.where(nothing, self.null.to(vector.dtype), vector)
            tokens = torch.cat([self.null.to(tokens.dtype).expand(len(tokens), 1, -1), tokens], 1)
            mask = torch.cat([nothing, mask], 2)
        return Context(vector, self.denoiser.keys_values(tokens), mask, kl)

    def forward(self, images, sees, t, noise, drawn=(None, None), support=None):
        """The training loss: uint8 [B, K, C, H, W], bool [B, K, K], int [B, K], noise like the images -> [B, K],
        the squared error of every image's prediction, float32, and the KL of every context [B, K], None unless it
        is variational. All randomness comes in, so it compiles whole.
        support: other images to read the context from, to see what it is worth; None: the images themselves."""
        x0 = to_signal(images)
        a = self.alpha_bar[t][..., None, None, None]                            # [B, K, 1, 1, 1]
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise                            # DDPM eq. 4
        context = self.read(x0 if support is None else to_signal(support), sees, drawn)
        out = self.denoiser(x_t, t, context).float()                            # [B, K, C, H, W]
        wanted = noise if self.config.prediction == "noise" else a.sqrt() * noise - (1 - a).sqrt() * x0
        error = (out - wanted).square().mean((2, 3, 4))                         # DDPM eq. 14; Salimans and Ho 2022
        return error, context.kl if context is not None else None

    def denoise(self, x, t, context, guidance=1.0):
        """x [B, n, C, H, W] at the time t (one int) -> the predicted x0, clipped to [-1, 1], float32.

        With guidance s != 1 the context must hold 2n targets, the second n under the null context:
        out = out_null + s (out_context - out_null)   (Ho and Salimans 2022)"""
        both = x if guidance == 1 else torch.cat([x, x], 1)
        times = torch.full(both.shape[:2], t, device=x.device)
        out = self.denoiser(both, times, context).float()
        if guidance != 1:
            given, null = out.chunk(2, dim=1)
            out = null + guidance * (given - null)
        a = float(self.schedule[t])
        x0 = ((x - (1 - a) ** 0.5 * out) / a ** 0.5 if self.config.prediction == "noise"        # DDPM eq. 15
              else a ** 0.5 * x - (1 - a) ** 0.5 * out)                         # Salimans and Ho 2022, appendix D
        return x0.clamp(-1, 1)


# ---- Samplers: from noise x, of any shape, to x0. denoise(x, t) -> the predicted x0; alpha_bar float64 [T]; draw() ->
# noise like x. Each step reads its successor from the list of kept times. The letters of DPM-Solver: alpha is
# sqrt(alpha_bar), not DDPM's 1 - beta, and sigma sqrt(1 - alpha_bar); in ddim sigma is that of its eq. 16.

def spaced_times(T, steps):
    """`steps` different times from T - 1 down to 0, evenly spaced."""
    return torch.linspace(T - 1, 0, min(steps, T)).round().long().tolist()


def log_snr_times(alpha_bar, steps):
    """At most `steps` different times from T - 1 down to 0, evenly spaced in log(alpha / sigma)."""
    log_snr = (alpha_bar / (1 - alpha_bar)).log() / 2
    wanted = torch.linspace(log_snr[-1], log_snr[0], min(steps, len(alpha_bar)), dtype=torch.float64)
    return sorted({int((log_snr - w).abs().argmin()) for w in wanted}, reverse=True)


def ddim(denoise, x, alpha_bar, steps, draw, eta=0.0, large=False):
    """DDIM (Song et al. 2021, eq. 12 and 16); eta = 1 is DDPM's ancestral sampling with its smaller variance, and
    with its larger one, beta, if `large` (their section 5)."""
    times = spaced_times(len(alpha_bar), steps)
    kept = [*alpha_bar[times].tolist(), 1.0]
    for t, a, a_next in zip(times, kept, kept[1:]):
        x0 = denoise(x, t)
        noise = (x - a ** 0.5 * x0) / (1 - a) ** 0.5                            # consistent with the clipped x0
        sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5        # eq. 16; 0 in the last step
        x = a_next ** 0.5 * x0 + max(1 - a_next - sigma ** 2, 0) ** 0.5 * noise         # eq. 12
        if sigma > 0:
            x = x + ((1 - a / a_next) ** 0.5 if large else sigma) * draw()
    return x


def dpm_solver(denoise, x, alpha_bar, steps, draw, sde=False):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), evenly spaced in log-SNR; the last step returns x0. sde: with
    fresh noise at every step, SDE-DPM-Solver++(2M) (their appendix), which repairs what earlier steps got wrong."""
    times = log_snr_times(alpha_bar, steps)
    alpha, sigma = alpha_bar[times].sqrt(), (1 - alpha_bar[times]).sqrt()
    h = (alpha / sigma).log().diff().tolist()
    alpha, sigma, before = alpha.tolist(), sigma.tolist(), None
    for i, t in enumerate(times):
        x0 = denoise(x, t)
        if i == len(times) - 1:
            return x0
        ahead = x0 if before is None else x0 + (x0 - before) * (h[i] / h[i - 1] / 2)
        x = (sigma[i + 1] / sigma[i] * math.exp(-sde * h[i]) * x
             - alpha[i + 1] * math.expm1(-(1 + sde) * h[i]) * ahead)
        if sde:
            x = x + sigma[i + 1] * (-math.expm1(-2 * h[i])) ** 0.5 * draw()
        before = x0


ddpm = partial(ddim, eta=1.0)                   # Ho et al. 2020, algorithm 2, with the posterior's variance
ddpm_beta = partial(ddim, eta=1.0, large=True)  # and as it is usually written, with sigma = sqrt(beta)
SAMPLERS = {"ddpm": ddpm, "ddpm_beta": ddpm_beta, "ddim": ddim, "2m": dpm_solver,
            "2m_sde": partial(dpm_solver, sde=True)}


@torch.no_grad()
def sample(model, support, n, sampler="2m_sde", steps=20, guidance=1.0, seed=0, first=0, draw_context=False, **options):
    """Generates n images under each of B support sets.

    support: uint8 [B, K, C, H, W], on the model's device (K = 0 works for a model without encoder)
    first: the number of the first image; image i has its own seed (seed, i), whatever the batch
    draw_context: every image has its own draw of a variational context, not the mean
    -> uint8 [B, n, C, H, W]. Raises ValueError when the model cannot read so many images or has no null context."""
    B, K = support.shape[:2]
    if draw_context and not hasattr(model, "posterior"):
        raise ValueError("this model's context is deterministic: there is nothing to draw")
    if draw_context and n > 1:                                                  # each image is a set of its own
        out = sample(model, support.repeat_interleave(n, 0), 1, sampler, steps, guidance, seed, first, True, **options)
        return out.unflatten(0, (B, n)).squeeze(2)
    if isinstance(model.encoder, StackedEncoder) and K > model.encoder.slots - 1:
        raise ValueError(f"{K} support images: this model was trained to read {model.encoder.slots - 1} at most")
    if model.encoder is not None and guidance != 1 and not hasattr(model, "null"):
        raise ValueError(f"guidance {guidance}: this model was trained without context dropout, only 1 works")
    guidance = guidance if model.encoder is not None else 1.0
    sees = torch.ones(B, 1, K, dtype=torch.bool, device=support.device)
    if guidance != 1:
        sees = torch.cat([sees, torch.zeros_like(sees)], 1)                     # [B, 2, K]: the support, and nothing

    def normal(stream):                                                         # numbers of image i's own
        generators = [rng("cpu", seed, stream, first + i) for i in range(B * n)]
        return lambda *shape: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(support.device)

    drawn = context_noise(model.config, sees.shape[1], K, normal(CONTEXT)) if draw_context else (None, None)
    context = model.read(to_signal(support), sees, drawn)                       # once per set, not once per step
    if context is not None:                                                     # the same for all n images
        context = context._replace(vector=context.vector.repeat_interleave(n, 1),
                                   mask=context.mask.repeat_interleave(n, 1))
    noise = normal(SAMPLING)
    draw = lambda: noise(*support.shape[2:]).unflatten(0, (B, n))
    denoise = lambda x, t: model.denoise(x, t, context, guidance)
    x = SAMPLERS[sampler](denoise, draw(), model.schedule, steps, draw, **options)
    return to_bytes(x)


# ---- Checkpoints, and what the machine is good at.

def load_model(path, device="cpu", weights="ema"):
    """Reads a checkpoint to generate with: path -> an FSDM in eval mode on `device`, its Config as model.config.

    weights: "ema", the moving average, or "raw", the last step's. Executes nothing in the file (weights_only).
    Raises OSError when there is no file and ValueError when it is not one of ours."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: there is no such checkpoint; train.py leaves ckpt.pt in its --out_dir")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        config = Config(**saved["config"])
        with torch.device("meta"):                                              # no memory before the shapes agree
            model = FSDM(config)
        state = saved["ema" if weights == "ema" else "model"]
        model.load_state_dict(state, strict=True, assign=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of this program: {str(error).splitlines()[0]}") from None
    return model.to(device, torch.float32).eval().requires_grad_(False)


def choose_device(requested="auto"):
    """auto, cpu, cuda, cuda:1, mps -> torch.device. Raises ValueError when it is not here."""
    try:
        device = torch.device(requested if requested != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {requested} cannot be used here: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if torch.version.cuda and not has_kernels((major, minor), torch.cuda.get_arch_list()):      # not on ROCm
            raise ValueError(f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)} "
                             f"(compute capability {major}.{minor}): choose another GPU (on Kaggle T4 x2), "
                             "--device cpu, or an older torch")
    return device


def has_kernels(capability, architectures):
    """(7, 5), ["sm_75", "sm_90a", "compute_120"] -> whether code for one of these runs on such a GPU."""
    built = [(kind, divmod(int(number), 10))
             for kind, number in re.findall(r"(sm|compute)_(\d+)", " ".join(architectures))]
    # machine code runs on its own generation from its minor version on, PTX on everything later
    return any(b <= capability and (kind == "compute" or b[0] == capability[0]) for kind, b in built)


def choose_precision(device, requested="auto"):
    """-> (dtype to multiply in, the reason in words). requested: auto, fp32, bf16 or fp16."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if requested != "auto":
        # a T4 (7.5) holds bf16 numbers but computes them in software
        slow = requested == "bf16" and 0 < major < 8
        return names[requested], "as asked for" + ", but this GPU has no bf16: fp16 is several times faster" * slow
    if device.type == "cuda":
        dtype = torch.bfloat16 if major >= 8 else torch.float16
        return dtype, f"compute capability {major}.{minor}"
    if device.type == "cpu":
        rate = {dtype: matmul_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
        return (torch.bfloat16 if rate[torch.bfloat16] > 1.5 * rate[torch.float32] else torch.float32,
                "a CPU of {:,.0f} GFLOP/s in fp32, {:,.0f} in bf16".format(*(r / 1e9 for r in rate.values())))
    return torch.float32, f"the safe choice on {device.type}"


def matmul_rate(device, dtype, size=1024):
    """-> FLOP/s of the best of five square matrix products."""
    a, best = torch.ones(size, size, device=device, dtype=dtype), math.inf
    for _ in range(5):
        began = time.perf_counter()
        (a @ a)[0, 0].item()                                                    # .item() waits for the product
        best = min(best, time.perf_counter() - began)
    return 2 * size ** 3 / best
