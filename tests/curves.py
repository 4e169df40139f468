"""Measures a trained model on classes it never saw: with 1, 2, 5 and 10 support images, and with every sampler
but ddpm_beta, under the model's default guidance.

    python tests/curves.py runs/omniglot/ckpt.pt omniglot_28.npz weights.pth 1000         # 1000 support: no samplers

The number: images for each row. A class gives 10 support images, of which each row uses the first K, and 5
references; 5 images are generated from each set, with the same seeds in all rows. Needs 15 images a class.
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import fid
import fsdm
import sample

STREAM = 9                                  # of randomness, its own
SAMPLERS = [("2m", 5), ("2m", 10), ("2m", 20), ("2m", 40), ("2m_sde", 10), ("2m_sde", 20), ("ddim", 20), ("ddim", 50),
            ("ddpm", 20), ("ddpm", 50), ("ddpm", 250)]


def draw(split, sets):
    """-> support int64 [sets, 10], references int64 [sets, 5], class of each set, int64 [sets]."""
    generator = fsdm.rng("cpu", 0, STREAM)
    classes = torch.randperm(len(split.names), generator=generator)[:sets]
    images = torch.stack([a + torch.randperm(int(b - a), generator=generator)[:15]
                          for a, b in zip(split.offsets[classes], split.offsets[classes + 1])])
    return images[:, :10], images[:, 10:], classes


def spread(x):
    """Features [S * 5, D] -> the mean distance between two images of the same set."""
    x = torch.from_numpy(x).unflatten(0, (-1, 5))                                   # [S, 5, D]
    return torch.cdist(x, x).sum().item() / (len(x) * 20)


def main(ckpt, dataset, weights, num=1000, only=None):
    model = fsdm.load_model(ckpt)
    config = model.config
    split = fsdm.load_data(dataset, "data", config.image_size, config.in_channels, parts=["test"])["test"]
    dtype, _ = fsdm.choose_precision(torch.device("cpu"))
    guidance = fsdm.best_guidance(config)
    support, reference, classes = draw(split, int(num) // 5)
    inception = fid.load_inception(weights, 768)
    look = lambda images: fid.features(images.flatten(0, 1), inception)
    real, shown = look(split.images[reference]), look(split.images[support[:, :5]])

    def row(name, K, **options):
        began = time.time()
        images = fsdm.generate(model, split.images[support[:, :K]], 5, dtype=dtype, guidance=guidance, **options)
        seconds, x = time.time() - began, look(images)
        near = torch.cdist(torch.from_numpy(x).unflatten(0, (-1, 5)), torch.from_numpy(shown).unflatten(0, (-1, 5)))
        print("| {} | {} | {:.5f} | {:.3f} | {:.3f} | {:.3f} | {:.3f} | {:.1f} |".format(
            name, K, fid.kid(real, x)[0], *fid.precision_recall(real, x), near.amin(2).mean().item(),
            sample.right_class(x, real, classes), len(x) / seconds), flush=True)
        return x

    print(f"{len(real):,} images, guidance {guidance:g}\n"
          "| | K | KID | precision | recall | nearest of 5 | right class | images/s |\n"
          "| --- | --- | --- | --- | --- | --- | --- | --- |")
    variety = {"real": spread(real)} | {f"generated from {K}": spread(row("support", K)) for K in (1, 2, 5, 10)}
    if model.posterior is not None:
        variety["the context drawn"] = spread(row("support, the context drawn", 5, draw_context=True))
    if only != "support":
        for sampler, steps in SAMPLERS:
            row(f"{sampler}, {steps} steps", 5, sampler=sampler, steps=steps)
    print("distance between two images of a set: " + ", ".join(f"{name} {d:.3f}" for name, d in variety.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
