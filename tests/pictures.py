"""Draws the pictures of RESULTS.md from a trained model, on classes it never saw, support on the left:

    python tests/pictures.py runs/omniglot/ckpt.pt omniglot_28.npz assets
    python tests/pictures.py assets/symbols.pt symbols.npz assets emoji omniglot

support.png: the same noise under 1, 2, 5 and 10 support images;  steps.png: what the model takes for the clean image
from the first evaluation to the last;  nearest.png: samples, and under each the support image nearest to it in pixels.
With kinds of classes, what their names begin with: kinds.png alone, the first classes of each kind that seed 0 draws.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import fsdm
import sample

SETS, N, STREAM = 4, 10, 8                  # rows of classes, images a row, and a stream of randomness of its own


def growing_support(model, pictures):
    """uint8 [S, 10, C, H, W] -> the picture, four rows a class."""
    rows = [(fsdm.generate(model, pictures[:, :K], N, guidance=2.0),
             torch.cat([pictures[:, :K], torch.full_like(pictures[:, K:], 255)], 1)) for K in (1, 2, 5, 10)]
    samples, support = (torch.stack(part, 1).flatten(0, 1) for part in zip(*rows))          # [4 S, 10, C, H, W]
    return sample.grid(support, samples)


def denoising(model, pictures):
    """uint8 [S, K, C, H, W] -> the picture, a row a class, columns evenly from the first evaluation to the last."""
    seen, denoise = [], model.denoise
    model.denoise = lambda *args, **how: seen.append(denoise(*args, **how)) or seen[-1]
    fsdm.generate(model, pictures, 1, guidance=2.0)
    model.denoise = denoise
    kept = torch.linspace(0, len(seen) - 1, N).round().long()
    return sample.grid(pictures, fsdm.to_bytes(torch.cat([seen[i] for i in kept], 1)))


def nearest_support(model, pictures):
    """uint8 [S, K, C, H, W] -> the picture, two rows a class: samples over the support images nearest to them."""
    samples = fsdm.generate(model, pictures, N, guidance=2.0)
    nearest = torch.cdist(samples.flatten(2).float(), pictures.flatten(2).float()).argmin(2)            # [S, N]
    below = pictures[torch.arange(len(pictures))[:, None], nearest]
    support = torch.stack([pictures, torch.full_like(pictures, 255)], 1).flatten(0, 1)
    return sample.grid(support, torch.stack([samples, below], 1).flatten(0, 1))


def first_of_each(model, split, kinds, rows_each=6):
    """-> the picture, a row a class, the first of every kind that seed 0 draws: nobody has chosen."""
    pictures, names = fsdm.draw_support(split, len(split.names), 5, 0, STREAM)
    rows = []
    for kind in kinds:
        rows += [i for i, name in enumerate(names) if name.startswith(kind)][:rows_each]
    return sample.grid(pictures[rows], fsdm.generate(model, pictures[rows], 8))


def main(ckpt, dataset, out, *kinds):
    model = fsdm.load_model(ckpt)
    config = model.config
    split = fsdm.load_data(dataset, "data", config.image_size, config.in_channels, parts=["test"])["test"]
    if kinds:
        first_of_each(model, split, kinds).save(Path(out) / "kinds.png")
        return
    pictures, _ = fsdm.draw_support(split, SETS, 10, 0, STREAM)
    for name, picture in (("support", growing_support(model, pictures)), ("steps", denoising(model, pictures[:, :5])),
                          ("nearest", nearest_support(model, pictures[:, :5]))):
        picture.save(Path(out) / f"{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
