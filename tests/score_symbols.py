"""Scores a model of symbols on characters that it never saw, in several colours.

    python tests/score_symbols.py assets/symbols.pt omniglot_28.npz weights.pth 2000 500

Black on white, K = 5, with 2,000 images: the table of sample.py --evaluate. Of the first 500 of them, how far the nearest
training character is, in any quarter turn: the root of the mean squared difference of two shares of ink, 0 to 1. Then,
with 500 images each, the table in other colours. Other numbers of support images are the business of tests/curves.py.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import fid
import fsdm
import sample

COLOURS = {                                 # ink, paper
    "black on white": ((0, 0, 0), (255, 255, 255)), "white on black": ((255, 255, 255), (0, 0, 0)),
    "blue on cream": ((30, 50, 150), (255, 250, 225)), "yellow on green": ((250, 205, 70), (20, 75, 50)),
    "red on grey": ((190, 30, 30), (215, 215, 215)),
}


def coloured(images, ink, paper):
    """uint8 [N, 3, H, W], white ink on black -> the same in two colours."""
    ink, paper = (torch.tensor(colour)[:, None, None] for colour in (ink, paper))
    share = images / 255
    return (share * ink + (1 - share) * paper).round().byte()


def share_of_ink(images, ink, paper):
    """uint8 [N, 3, H, W] in two colours -> float32 [N, H * W], 0 to 1."""
    ink, paper = (torch.tensor(colour)[:, None, None] for colour in (ink, paper))
    across = ink - paper
    share = ((images - paper) * across).sum(1) / across.square().sum()
    return share.flatten(1).clamp(0, 1)


def nearest(x, known):
    """[N, D], [M, D] -> the mean, over x, of the distance to the nearest known one."""
    least = [torch.cdist(some, known).amin(1) for some in x.split(200)]
    return (torch.cat(least).mean() / x.shape[1] ** 0.5).item()


def main(ckpt, dataset, weights, num=2000, num_of_others=500):
    model = fsdm.load_model(ckpt)
    size, guidance = model.config.image_size, fsdm.best_guidance(model.config)
    dtype, _ = fsdm.choose_precision(torch.device("cpu"))
    inception = fid.load_inception(weights, 768)
    data = fsdm.load_data(dataset, None, size, 3, parts=("train", "test"))

    def test_split(colours):
        return data["test"]._replace(images=coloured(data["test"].images, *COLOURS[colours]))

    def tell(colours, num):
        scores, _ = sample.evaluate(model, test_split(colours), inception, int(num), guidance=guidance, dtype=dtype)
        print(f"\n{colours}, guidance {guidance:g}, {num} images\n{sample.table(scores)}\n", flush=True)

    first, *others = COLOURS
    tell(first, num)
    split = test_split(first)
    support, _, other = sample.draw_questions(split, 5, int(num_of_others), seed=0)
    made = fsdm.generate(model, split.images[support], 5, guidance=guidance, dtype=dtype)
    turned = torch.cat([data["train"].images.rot90(turn, (2, 3)) for turn in range(4)])
    known = share_of_ink(turned, (255, 255, 255), (0, 0, 0))
    for name, images in (("generated", made), ("other real images", split.images[other])):
        distance = nearest(share_of_ink(images.flatten(0, 1), *COLOURS[first]), known)
        print(f"nearest training character, {name}: {distance:.3f}", flush=True)

    for colours in others:
        tell(colours, num_of_others)


if __name__ == "__main__":
    main(*sys.argv[1:])
