"""Draws the support pictures of assets/drawings: invented things in no data set, five drawings each, as by hand.

    python tests/drawings.py --out_dir assets/drawings
    python tests/drawings.py --out_dir pencil --pen anchor_umbrella --each 12     # all as the umbrella is, a data set

A thing is a few strokes in [-1, 1] x [-1, 1], y downwards. Five times a hand draws it: bends the plane a little, lets
every stroke start and end elsewhere, wobbles; then a pen goes along. Needs numpy and Pillow only.
"""
import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


# a stroke goes straight from point to point ("line") or swings through them ("curve")
THINGS = {
    "smoking_house": [
        ("line", [(-.7, .9), (-.7, 0), (.5, 0), (.5, .9), (-.72, .9)]),
        ("line", [(-.9, .06), (-.1, -.55), (.72, .04)]),
        ("line", [(-.3, .9), (-.3, .4), (.02, .4), (.02, .88)]),
        ("curve", [(.3, -.3), (.32, -.5), (.62, -.55), (.8, -.75), (.62, -1), (.36, -.85), (.5, -.66),
                   (.6, -.8)])],
    "hooked_fishbone": [
        ("curve", [(-.85, -.1), (-.3, -.12), (.35, -.1), (.8, .1), (.82, .6), (.5, .75), (.38, .45)]),
        ("curve", [(-.85, -.1), (-.98, -.45), (-.72, -.3), (-.62, -.1), (-.72, .12), (-.98, .25), (-.85, -.1)]),
        ("line", [(-.35, -.55), (-.2, -.12), (-.38, .35)]),
        ("line", [(-.02, -.6), (.1, -.12), (-.05, .38)]),
        ("line", [(.3, -.5), (.4, -.08), (.22, .28)])],
    "three_legged_kettle": [
        ("curve", [(-.55, -.3), (-.8, .15), (-.5, .5), (0, .55), (.5, .5), (.75, .15), (.5, -.32)]),
        ("line", [(-.62, -.3), (.6, -.32)]),
        ("curve", [(-.6, -.3), (-.75, -.8), (0, -1), (.75, -.8), (.55, -.32)]),
        ("line", [(.66, .15), (.85, .02), (.98, -.4)]),
        ("line", [(-.4, .5), (-.58, .98)]), ("line", [(.02, .55), (.03, 1)]),
        ("line", [(.4, .5), (.6, .95)])],
    "moon_ladder": [
        ("curve", [(.2, -.95), (-.5, -.8), (-.85, -.2), (-.65, .45), (-.1, .75), (.45, .6)]),
        ("curve", [(.2, -.95), (-.2, -.5), (-.25, .05), (.05, .45), (.45, .6)]),
        ("line", [(.3, -.5), (.62, 1)]), ("line", [(.68, -.55), (1, .9)]),
        ("line", [(.38, -.2), (.74, -.26)]), ("line", [(.44, .15), (.82, .1)]),
        ("line", [(.52, .52), (.9, .46)])],
    "anchor_umbrella": [
        ("curve", [(-.85, -.1), (-.7, -.65), (0, -.95), (.7, -.65), (.86, -.08)]),
        ("curve", [(-.85, -.1), (-.55, -.28), (-.28, -.06), (0, -.26), (.3, -.05), (.58, -.25), (.86, -.08)]),
        ("line", [(0, -.95), (.02, .92)]),
        ("curve", [(-.5, .5), (-.36, .84), (.02, .94), (.42, .82), (.54, .48)]),
        ("line", [(-.2, .22), (.24, .2)])],
    "weeping_comb": [
        ("curve", [(-.95, -.3), (-.5, -.72), (.1, -.8), (.6, -.6), (.95, -.25)]),
        ("line", [(-.95, -.3), (.95, -.25)]), ("line", [(-.65, -.28), (-.68, .3)]),
        ("line", [(-.22, -.28), (-.22, .38)]), ("line", [(.2, -.27), (.22, .36)]),
        ("line", [(.62, -.27), (.66, .25)]),
        ("curve", [(-.2, .52), (-.38, .85), (-.2, 1), (-.02, .85), (-.2, .52)])],
    "sailing_cart": [
        ("curve", [(-.9, .2), (-.7, .55), (0, .62), (.65, .52), (.92, .15)]),
        ("line", [(-.95, .2), (.95, .16)]),
        ("line", [(-.05, .18), (-.02, -.95), (.7, -.12), (0, -.1)]),
        ("curve", [(-.42, .6), (-.6, .8), (-.4, 1), (-.22, .8), (-.42, .6)]),
        ("curve", [(.42, .58), (.22, .78), (.42, .98), (.6, .78), (.42, .58)])],
}
# thing: ink, paper, width of the pen (of the picture), grain of the ink 0 .. 1, photographed
PENS = {
    "smoking_house": ((30, 50, 150), (255, 255, 255), 0.016, 0.1, False),           # a ballpoint
    "hooked_fishbone": ((15, 15, 18), (255, 255, 255), 0.06, 0.0, False),           # a thick marker
    "three_legged_kettle": ((205, 40, 35), (253, 252, 246), 0.032, 0.0, False),     # a felt pen
    "moon_ladder": ((238, 236, 228), (44, 54, 50), 0.04, 0.5, False),               # chalk
    "anchor_umbrella": ((62, 62, 66), (176, 174, 170), 0.022, 0.35, True),          # a pencil
    "weeping_comb": ((20, 130, 75), (255, 250, 225), 0.045, 0.0, False),            # a broad pen, cream paper
    "sailing_cart": ((250, 205, 70), (35, 45, 95), 0.035, 0.3, False),              # a crayon, blue paper
}
FINE = 4                                            # pixels are drawn so many times smaller


def along(kind, points, count=120):
    """A stroke of a THING -> [count, 2], evenly spaced points on it, corners a little round or very."""
    place = np.append(0, np.hypot(*np.diff(points, axis=0).T).cumsum())
    even = np.linspace(0, place[-1], count)
    p = np.stack([np.interp(even, place, x) for x in np.transpose(points)], 1)
    for _ in range(150 if kind == "curve" else 3):
        p[1:-1] = (p[:-2] + 2 * p[1:-1] + p[2:]) / 4
    return p


def waves(g, x, size, count=3):
    """Smooth noise of mean square size ** 2 at the places x [n]: a hand's unsteadiness, or pressure."""
    frequency, phase = g.uniform(0.1, 0.8, count), g.uniform(0, 2 * np.pi, count)
    return size * np.sqrt(2 / count) * np.sin(2 * np.pi * x[:, None] * frequency + phase).sum(1)


def by_hand(strokes, g):
    """-> a list of [n, 2]: the same thing drawn once, within about [-1, 1] x [-1, 1]."""
    turn, stretch = g.normal(0, 0.07), g.normal(1, 0.06, 2)
    turned = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) * stretch
    direction, phase = g.normal(0, 1.3, (2, 2)), g.uniform(0, 2 * np.pi, 2)
    drawn = []
    for kind, points in strokes:
        points = np.array(points) + g.normal(0, 0.025, (len(points), 2))
        points[[0, -1]] += g.normal(0, 0.03, (2, 2))                        # ends are hardest to hit
        p = along(kind, points)
        way = np.append(0, np.hypot(*np.diff(p, axis=0).T).cumsum())        # that the pen has gone
        p = p + 0.07 * np.sin(p @ direction + phase)                        # proportions
        p = (p + g.normal(0, 0.025, 2)) @ turned
        drawn.append(p + np.stack([waves(g, way, 0.018), waves(g, way, 0.018)], 1))
    return drawn


def with_pen(strokes, ink, paper, width, grain, photographed, g):
    """-> a PIL image, its shape and the drawing's place in it by chance."""
    H, W = g.integers(96, 112, 2) if photographed else g.integers(110, 185) + g.integers(-10, 11, 2)
    side = min(H, W)
    centre = np.array([W, H]) / 2 + g.normal(0, 0.035, 2) * side
    scale = g.uniform(0.3, 0.39) * side
    cover = Image.new("L", (W * FINE, H * FINE))
    pen = ImageDraw.Draw(cover)
    for p in strokes:
        p = (centre + scale * p) * FINE
        radius = width * side * FINE / 2 * np.exp(waves(g, np.linspace(0, 2, len(p)), 0.12))
        for before, (x, y), r in zip(p[[0, *range(len(p) - 1)]], p, radius):
            pen.line((*before, x, y), 255, round(2 * r))
            pen.ellipse((x - r, y - r, x + r, y + r), 255)
    cover = np.array(cover.reduce(FINE), float) / 255                       # [H, W], antialiased
    rough = Image.fromarray((255 * g.random((H // 2, W // 2))).astype(np.uint8)).resize((W, H))
    cover = cover * (1 - grain * (np.array(rough) / 255 * 2 - 0.6).clip(0, 1))          # what the paper leaves out
    picture = np.array(paper) + cover[..., None] * (np.array(ink) - paper)
    if photographed:                                                        # light from one side, blur, noise
        y, x = np.mgrid[-1:1:H * 1j, -1:1:W * 1j]
        light = 1 + x * g.normal(0, 0.15) + y * g.normal(0, 0.15) - 0.08 * (x ** 2 + y ** 2)
        blurred = Image.fromarray((picture * light[..., None]).clip(0, 255).astype(np.uint8))
        blurred = blurred.filter(ImageFilter.GaussianBlur(0.7)).convert("L")
        noisy = np.array(blurred) + g.normal(0, 1.3, (H, W))
        return Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))
    return Image.fromarray(picture.round().astype(np.uint8)).quantize(24)   # small files


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out_dir", required=True, help="a folder for each thing is made in it")
    p.add_argument("--each", type=int, default=5, help="drawings of a thing (5)")
    p.add_argument("--pen", choices=PENS, help="draw every thing as this one is drawn")
    args = p.parse_args(argv)
    for c, (name, strokes) in enumerate(THINGS.items()):
        folder = Path(args.out_dir, name)
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(args.each):
            g = np.random.default_rng([c, i])
            with_pen(by_hand(strokes, g), *PENS[args.pen or name], g).save(folder / f"{i + 1}.png", optimize=True)


if __name__ == "__main__":
    main()
