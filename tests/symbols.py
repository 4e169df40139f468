"""Builds one .npz of symbols of three kinds for `train.py --dataset symbols.npz`, 32 x 32, the same bytes each time:

    python tests/symbols.py --omniglot omniglot_28.npz --emoji emoji_32.npz --out symbols.npz --preview symbols.png

omniglot/   characters, all of one class in one ink on one paper, a third of them in black, white or greys, a third with
            a thick pen; a character to train on is --recolour classes, each in other colours and, as is usual with
            Omniglot, a quarter turned further, which makes another character of it.
glyph/      the invented characters of fsdm.glyphs; those that validate and test there are evaluation classes here.
emoji/      five designs of a thing, and every design again and again, turned, scaled and pushed aside.

Emoji: a class has each design equally often, so two of its 15 images are of different designs six times in seven, and
versions of one design are turned, scaled and shifted apart until they differ nearly as much in pixels as designs do.
Designs 2 to 4 are one drawing in three finishes, at first pixel on pixel: in classes to train on only design 2 stays
in its place, so that no image is another one recoloured. (Six images would show a target its own design in 33% of full
sets, 15 do in 60%; but six are the same set every time, which is learned by heart.)

--shares are those of the classes to train on, which train.py draws evenly; characters say how many these are. Classes
are in the order of the SHA-1 of their symbols' names, so the tenth that validates is of all kinds, and it shares no
symbol with the others.
"""
import argparse
import hashlib
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).parent.parent))
import fsdm


SIZE, DESIGNS, PER_GLYPH = 32, 5, 20
PLAIN, THICK = 1 / 3, 1 / 3                 # shares of the characters' classes
LUMINANCE = np.array([0.30, 0.59, 0.11])


class Symbol(NamedTuple):
    """A class before it is drawn, in one pair of colours or with one jitter."""
    name: str
    copy: int               # the same symbol again is copy 1, 2, ...
    source: np.ndarray      # what it is drawn from: uint8 [images, H, W] ink, or [images, SIZE, SIZE, 3]
    evaluation: bool

    def rng(self, *address):
        """A generator that depends on the symbol and its copy only, not on what else is in the file."""
        return np.random.default_rng([*hashlib.sha1(self.name.encode()).digest(), self.copy, *address])


# ---- Characters: the share of ink in every pixel becomes a mixture of two colours.

def two_colours(g):
    """-> ink, paper, both [3] in [0, 1], light enough and dark enough to be told apart."""
    plain = g.random() < PLAIN
    if plain and g.random() < 2 / 3:
        black, white = np.zeros(3), np.ones(3)
        return (black, white) if g.random() < 0.5 else (white, black)
    channels = 1 if plain else 3
    ink, paper = np.zeros((2, 3))
    while abs((ink - paper) @ LUMINANCE) < 0.4:                             # as in fsdm.glyphs
        ink, paper = g.random((2, channels)) * np.ones(3)
    return ink, paper


def draw_character(symbol):
    """-> uint8 [images, SIZE, SIZE, 3]."""
    g = symbol.rng()
    ink, paper = two_colours(g)
    thick = g.random() < THICK
    images = []
    for pixels in np.rot90(symbol.source, symbol.copy, (1, 2)):
        picture = Image.fromarray(pixels)
        if thick:
            picture = picture.filter(ImageFilter.MaxFilter(3))
        picture = picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        share = np.array(picture)[..., None] / 255                          # of ink in every pixel
        image = share * ink + (1 - share) * paper
        images.append((255 * image).round().astype(np.uint8))
    return np.stack(images)


# ---- Emoji

def draw_emoji(symbol, count):
    """-> uint8 [count, SIZE, SIZE, 3]: the designs in turn, as they are or jittered."""
    if symbol.evaluation:
        originals = DESIGNS                         # a measurement's support can be what people drew
    else:
        originals = 3 if symbol.copy == 0 else 0    # not 3 and 4, which lie on 2
    images = []
    for i in range(count):
        design = symbol.source[i % DESIGNS]
        images.append(design if i < originals else jittered(design, symbol.rng(i)))
    return np.stack(images)


def jittered(image, g):
    """uint8 [SIZE, SIZE, 3] on white -> another such image, nothing of it cut off."""
    margin = SIZE // 4
    canvas = Image.new("RGB", (SIZE + 2 * margin, SIZE + 2 * margin), "white")
    canvas.paste(Image.fromarray(image), (margin, margin))
    while True:
        angle = math.radians(g.choice([-1, 1]) * g.uniform(3, 8))
        scale = g.uniform(0.8, 1.05)
        away, shift = g.uniform(0, 2 * math.pi), g.uniform(1, 2)            # pixels
        matrix = affine(angle, scale, shift * math.cos(away), shift * math.sin(away), canvas.width / 2)
        moved = canvas.transform(canvas.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC,
                                 fillcolor="white")
        pixels = np.array(moved)
        inside = pixels[margin:-margin, margin:-margin].copy()
        pixels[margin:-margin, margin:-margin] = 255
        if pixels.min() > 200:                                              # outside is white, or nearly
            return inside


def affine(angle, scale, dx, dy, centre):
    """-> the six numbers PIL asks for, which lead from the new place of a pixel to its old one."""
    a, b = math.cos(angle) / scale, math.sin(angle) / scale
    x, y = centre + dx, centre + dy
    return a, b, centre - a * x - b * y, -b, a, centre + b * x - a * y


# ---- The list of classes

def listed(sources, count):
    """{name: source} -> `count` Symbols: some of them, or all as often as it takes, as copy 0, 1, ..."""
    names = sorted(sources)
    order = np.random.default_rng(len(names)).permutation(len(names))
    chosen = [names[order[i % len(names)]] for i in range(count)]
    return [Symbol(name, i // len(names), sources[name], False) for i, name in enumerate(chosen)]


def read_classes(path, kind):
    """-> two dicts {name: uint8 [images, ...]}: classes to train on, evaluation classes."""
    arrays = fsdm.read_npz(path, ("images", "labels", "class_names", "class_is_evaluation"))
    if len(arrays) < 4:
        raise ValueError(f"{path} holds {sorted(arrays)} of what is needed: images, labels, class_names "
                         "and class_is_evaluation")
    parts = {}, {}
    for c, name in enumerate(arrays["class_names"].astype(str)):
        evaluation = int(arrays["class_is_evaluation"][c])
        parts[evaluation][f"{kind}/{name}"] = arrays["images"][arrays["labels"] == c]
    return parts


def read_glyphs(count, train=1000, held_out=200):
    """-> as read_classes, at least `count` glyphs to train on: those of fsdm.glyphs and, after the held out ones that
    validate and test there, as many new ones as are missing."""
    classes = (train, held_out, max(0, count - train))
    images, labels, names, which = fsdm.glyphs(None, SIZE, False, classes, PER_GLYPH)
    images = images.reshape(len(names), PER_GLYPH, SIZE, SIZE, 3)
    parts = {}, {}
    for c, name in enumerate(names):
        parts[int(which[c] == "val")][f"glyph/{name}"] = images[c]
    return parts


def in_order(symbols):
    """Symbols to train on -> the same by the SHA-1 of their names, less the few that would be on both sides of the cut
    between training and validation."""
    symbols = sorted(symbols, key=lambda s: (hashlib.sha1(s.name.encode()).digest(), s.copy))
    while True:
        cut = (fsdm.split_background(np.zeros(len(symbols))) == "train").sum()
        if symbols[cut - 1].name != symbols[cut].name:
            return symbols
        del symbols[cut]


def choose(omniglot, emoji, recolour, shares):
    """Paths of two .npz -> Symbols, those to train on first."""
    characters, emojis = read_classes(omniglot, "omniglot"), read_classes(emoji, "emoji")
    count = recolour * len(characters[0])
    per_share = count / shares[0]
    glyphs = read_glyphs(round(per_share * shares[1]))
    train = listed(characters[0], count)
    train += listed(glyphs[0], round(per_share * shares[1]))
    train += listed(emojis[0], round(per_share * shares[2]))
    held_out = {**characters[1], **glyphs[1], **emojis[1]}
    return in_order(train) + [Symbol(name, 0, source, True) for name, source in held_out.items()]


def draw(symbol, per_emoji):
    """-> uint8 [images, SIZE, SIZE, 3]."""
    kind = kind_of(symbol)
    if kind == "omniglot":
        return draw_character(symbol)
    return symbol.source if kind == "glyph" else draw_emoji(symbol, per_emoji)


def kind_of(symbol):
    return symbol.name.split("/")[0]


# ---- The program

def preview(classes, rows=8, columns=3, each=6):
    """A list of uint8 [images, SIZE, SIZE, 3] -> a picture: `each` images of rows * columns classes."""
    g = np.random.default_rng(0)
    chosen = [classes[c] for c in g.permutation(len(classes))[:rows * columns]]
    tiles = np.stack([c[g.permutation(len(c))[:each]] for c in chosen])
    tiles = np.pad(tiles, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=128)
    strips = tiles.transpose(0, 2, 1, 3, 4).reshape(len(chosen), SIZE + 2, -1, 3)
    strips = np.pad(strips, ((0, 0), (0, 0), (6, 6), (0, 0)), constant_values=128)
    picture = np.concatenate([np.concatenate(strips[i::columns]) for i in range(columns)], 1)
    return Image.fromarray(picture).resize((2 * picture.shape[1], 2 * picture.shape[0]), Image.Resampling.NEAREST)


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--omniglot", required=True, help=".npz of characters, ink 255")
    p.add_argument("--emoji", required=True, help=".npz of emoji, image 5c + d is design d of class c")
    p.add_argument("--out", required=True, help="the .npz to write")
    p.add_argument("--recolour", type=int, default=2, help="classes made of each character to train on")
    p.add_argument("--shares", type=float, nargs=3, default=(0.5, 0.15, 0.35), help="of characters, glyphs, emoji")
    p.add_argument("--per_emoji", type=int, default=15, help="images of an emoji, jittered but for the first")
    p.add_argument("--preview", help="a .png of some classes")
    args = p.parse_args(argv)
    if args.recolour < 1 or args.shares[0] <= 0 or min(args.shares) < 0:
        p.error("--recolour and the share of characters must be above 0, the other shares not below")
    return args


def main(argv=None):
    args = parse_args(argv)
    symbols = choose(args.omniglot, args.emoji, args.recolour, args.shares)
    classes = [draw(symbol, args.per_emoji) for symbol in symbols]
    counts = [len(images) for images in classes]
    evaluation = np.array([symbol.evaluation for symbol in symbols])
    arrays = dict(images=np.concatenate(classes), labels=np.arange(len(symbols)).repeat(counts),
                  class_names=np.array([f"{symbol.name}/{symbol.copy}" for symbol in symbols]),
                  class_is_evaluation=evaluation)
    np.savez_compressed(args.out, **arrays)

    for kind in ("omniglot", "glyph", "emoji"):
        of_kind = np.array([kind_of(symbol) == kind for symbol in symbols])
        train, held_out, images = (of_kind & ~evaluation).sum(), (of_kind & evaluation).sum(), of_kind @ counts
        print(f"{kind}: {train:,} classes to train on ({train / (~evaluation).sum():.1%}), {held_out:,} for "
              f"evaluation, {images:,} images, {images * SIZE * SIZE * 3 / 1e6:.0f} MB")
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.0f} MB")
    if args.preview:
        preview(classes).save(args.preview)


if __name__ == "__main__":
    main()
