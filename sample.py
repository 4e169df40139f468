"""Generates new images of what a few images show.

    python sample.py --ckpt runs/demo/ckpt.pt --support a.png b.jpg c.png       # your own images, any number and size
    python sample.py --ckpt runs/demo/ckpt.pt --dataset glyphs --split test     # sets of classes never trained on

Writes to --out_dir: grid.png (support | samples), images/00000.png and on, and samples.npz (arr_0 uint8 NHWC).
Everything about the model comes from the checkpoint.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import fid
import fsdm
from fsdm import EVALUATION, SETS, rng


# ---- From support to pictures; train.py shows its progress with these too.

def draw_support(split, sets, size, seed, stream):
    """`sets` sets of `size` images, from different classes as long as they last.

    -> uint8 [sets, size, C, H, W], the class name of each set."""
    generator = rng("cpu", seed, stream)
    order = torch.randperm(len(split.names), generator=generator).repeat(1 + sets // len(split.names))[:sets]
    offsets = split.offsets.cpu()
    index = torch.stack([offsets[c] + torch.randperm(int(offsets[c + 1] - offsets[c]), generator=generator)[:size]
                         for c in order])
    return split.images[index.to(split.images.device)], [split.names[c] for c in order.tolist()]


def grid(support, samples, scale=2, gap=8):
    """support uint8 [S, K, C, H, W] | samples uint8 [S, n, C, H, W] -> PIL image, a row per set, a bar between."""
    def tiles(images):                                              # [S, n, C, H, W] -> uint8 [S * H, n * W, 3]
        images = images.cpu().expand(-1, -1, 3, -1, -1).numpy().repeat(scale, 3).repeat(scale, 4)
        images = np.pad(images, ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1)), constant_values=255)
        S, n, C, H, W = images.shape
        return images.transpose(0, 3, 1, 4, 2).reshape(S * H, n * W, C)
    left, right = tiles(support), tiles(samples)
    return Image.fromarray(np.concatenate([left, np.zeros((len(left), gap, 3), np.uint8), right], 1))


def generate(model, support, n, dtype=torch.float32, batch_size=64, **options):
    """n images under each support set, `batch_size` at a time, with options of fsdm.sample -> uint8 [S, n, C, H, W]."""
    together, parts = max(1, batch_size // n), []
    with torch.autocast(support.device.type, dtype, enabled=dtype != torch.float32):
        for s in range(0, len(support), together):
            some = support[s:s + together]
            parts.append(torch.cat([fsdm.sample(model, some, min(batch_size, n - i), first=s * n + i, **options)
                                    for i in range(0, n, batch_size)], 1))
    return torch.cat(parts)


def write_whole(path, save):
    """Calls save(file) on a temporary file and gives it the name `path` when all is in it: whole or not at all.

    Raises OSError when it cannot be written, as on a full disk; then nothing is left of it."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# ---- Few-shot evaluation: the same questions for every model, between the two ends of the scale.

def draw_questions(split, K, num, seed, shared_pool=False):
    """Sets of K support images, and with each K reference and K other real images of the same class, none twice.

    shared_pool: the paper's protocol, references drawn from the whole class, support images among them.
    -> three int64 [S, K], indices into split.images, S = num / K or as many as the classes allow; a function of
    the seed and the split only. Raises ValueError when no class has 4 K images."""
    if K < 1:
        raise ValueError("few-shot scores need at least one support image: pass --k 5")
    generator, offsets, questions = rng("cpu", seed, EVALUATION), split.offsets.tolist(), []
    for c in torch.randperm(len(split.names), generator=generator).tolist():
        shuffled, again = (offsets[c] + torch.randperm(offsets[c + 1] - offsets[c], generator=generator)
                           for _ in range(2))
        half, most = len(shuffled) // 2, len(shuffled) // (4 * K)   # most: the sets that this class allows
        reference = again if shared_pool else shuffled[half:]
        questions += [(r, shuffled[r * K:][:K], reference[r * K:][:K], shuffled[half + (most + r) * K:][:K])
                      for r in range(most)]
    if not questions:
        raise ValueError(f"no class of this split has {4 * K} images, which {K} support images, references and "
                         f"other real images need: lower --k (the largest class has {split.largest})")
    questions.sort(key=lambda question: question[0])                # one set of every class, then a second one, ...
    _, *columns = zip(*questions[:max(1, num // K)])
    return [torch.stack(column) for column in columns]


def evaluate(model, split, inception, num=2000, K=5, seed=0, shared_pool=False, **options):
    """Scores against references of the same classes, for the generated images and for both ends of the scale: the
    support images returned as they are, and other real images. options: those of generate.

    -> {"generated" | "support returned" | "other real images": {fid, kid, kid_spread, precision, recall,
    nearest_support, right_class}} and the number of images. nearest_support: the mean distance to the nearest image
    of the own support, in features; near zero it copies. Raises ValueError and fid.FIDError as its parts do."""
    support, reference, other = draw_questions(split, K, num, seed, shared_pool)
    device = split.images.device
    pictures = split.images[support.to(device)]                     # [S, K, C, H, W]
    print(f"generating {support.numel():,} images, {K} from each of {len(support):,} support sets")
    sides = {"generated": generate(model, pictures, K, seed=seed, **options), "support returned": pictures,
             "other real images": split.images[other.to(device)]}
    measure = lambda images: fid.features(images.flatten(0, 1).cpu(), inception)    # [S * K, dims]
    real, found = measure(split.images[reference.to(device)]), {name: measure(x) for name, x in sides.items()}
    near = torch.from_numpy(found["support returned"]).unflatten(0, support.shape)  # [S, K, dims]
    classes = torch.searchsorted(split.offsets.cpu(), support[:, 0].contiguous(), right=True)   # [S]
    moments, scores = fid.statistics(real), {}
    for name, x in found.items():
        kid, spread = fid.kid(real, x)
        precision, recall = fid.precision_recall(real, x)
        distance = torch.cdist(torch.from_numpy(x).unflatten(0, support.shape), near).amin(2)
        scores[name] = dict(fid=fid.frechet_distance(*moments, *fid.statistics(x)), kid=kid,
                            kid_spread=spread, precision=precision, recall=recall,
                            nearest_support=distance.mean().item(), right_class=right_class(x, real, classes))
    return scores, support.numel()


def right_class(x, real, classes, ways=20):
    """Features [S * K, D] of S sets, of real images of the same classes, the class of each set, int64 [S] -> the share
    of x that lies nearest to the mean of its own class's real features, among `ways` classes at a time."""
    x, real = (torch.from_numpy(features).unflatten(0, (len(classes), -1)) for features in (x, real))   # [S, K, D]
    present, own = classes.unique(return_inverse=True)
    means = torch.stack([real[own == c].flatten(0, 1).mean(0) for c in range(len(present))])            # [classes, D]
    right = []
    for first in range(0, len(present), ways):
        start = max(0, min(first, len(present) - ways))             # the last group borrows from the one before
        mine = (own >= first) & (own < first + ways)
        nearest = torch.cdist(x[mine], means[start:start + ways]).argmin(2) + start                     # [sets, K]
        right.append((nearest == own[mine][:, None]).flatten())
    return torch.cat(right).float().mean().item()


def table(scores):
    """What evaluate returns -> lines of text."""
    digits = dict(fid=2, kid=5, kid_spread=5, precision=3, recall=3, nearest_support=3, right_class=3)
    lines = [" " * 18 + "".join(f"{column:>17}" for column in digits)]
    for name, row in scores.items():
        lines.append(f"{name:<18}" + "".join(f"{row[column]:>17.{places}f}" for column, places in digits.items()))
    return "\n".join(lines)


# ---- The command line: support from files or a data set; pictures, or with --evaluate scores.

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", required=True, help="checkpoint of train.py")
    p.add_argument("--support", nargs="+", help="image files of one thing: generate more of it")
    p.add_argument("--dataset", help="or take support sets from a data set, named as in train.py")
    p.add_argument("--split", choices=("train", "val", "test"), default="test", help="classes of the data set")
    p.add_argument("--data_dir", default="data", help="where torchvision's files of a named data set lie")
    p.add_argument("--download", action="store_true", help="fetch a named data set when it is not in data_dir")
    p.add_argument("--sets", type=int, default=8, help="support sets to take from the data set")
    p.add_argument("--k", type=int, help="support images a set; one less than the model's sample_size if left out")
    p.add_argument("--num", type=int, help="images for each support set (8); with --evaluate in all (2000)")
    p.add_argument("--sampler", choices=fsdm.SAMPLERS, default="2m_sde", help="2m_sde in 20 steps is like ddpm in 250")
    p.add_argument("--steps", type=int, default=20, help="evaluations of the network per image")
    p.add_argument("--eta", type=float, help="noise of ddim: 0 none, 1 as much as ddpm")
    p.add_argument("--guidance", type=float, default=1.0, help="1: none; above 1: closer to the support")
    p.add_argument("--draw_context", action="store_true", help="draw a variational context anew for every image")
    p.add_argument("--seed", type=int, default=0, help="image i is a function of (seed, i)")
    p.add_argument("--weights", choices=("ema", "raw"), default="ema", help="the averaged or the last weights")
    p.add_argument("--out_dir", default="samples", help="images go here")
    p.add_argument("--batch_size", type=int, default=64, help="images generated together: lower it to save memory")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of the products")
    p.add_argument("--evaluate", action="store_true", help="score --num images of train and test classes (scores.json)")
    p.add_argument("--shared_pool", action="store_true", help="references may be support images, the paper's protocol")
    p.add_argument("--fid_weights", help="Inception weights file; torch's cache or a download if left out")
    p.add_argument("--fid_dims", type=int, choices=(64, 192, 768, 2048), default=2048, help="features that fid.py uses")
    args = p.parse_args(argv)
    if bool(args.support) == bool(args.dataset):
        p.error("pass either --support with image files or --dataset")
    if args.num is None:
        args.num = 2000 if args.evaluate else 8
    if args.evaluate and not args.dataset:
        p.error("--evaluate needs --dataset, for classes with real images to compare with")
    if args.eta is not None and args.sampler != "ddim":
        p.error(f"--eta belongs to --sampler ddim, not to {args.sampler}")
    for name in ("sets", "num", "steps", "batch_size", *(["k"] if args.k is not None else [])):
        if getattr(args, name) < 1:
            p.error(f"--{name} is {getattr(args, name)}: it must be at least 1")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = fsdm.choose_device(args.device)
    dtype, reason = fsdm.choose_precision(device, args.precision)
    model = fsdm.load_model(args.ckpt, device, args.weights)
    config = model.config
    K = args.k or config.sample_size - 1
    options = dict(sampler=args.sampler, steps=args.steps, guidance=args.guidance, seed=args.seed, dtype=dtype,
                   batch_size=args.batch_size, draw_context=args.draw_context,
                   **({} if args.eta is None else {"eta": args.eta}))
    if args.support:
        pictures = [fsdm.read_picture(path, config.image_size, config.in_channels) for path in args.support]
        support, labels = torch.from_numpy(np.stack(pictures))[None], {}
    else:
        data = fsdm.load_data(args.dataset, args.data_dir, config.image_size, config.in_channels, args.download)
        if args.evaluate:
            return run_evaluation(model, data, K, args, options)
        fsdm.check_data(data, K, [args.split])
        support, names = draw_support(data[args.split], args.sets, K, args.seed, SETS)
        labels = dict(labels=np.repeat(names, args.num))
    support = support.to(device)                                    # [S, K, C, H, W]
    print(f"{args.weights} weights on {device}, {str(dtype)[6:]} ({reason}): {args.num} images for each of "
          f"{len(support)} support sets of {support.shape[1]}, {args.sampler} in {args.steps} steps, "
          f"guidance {args.guidance:g}, seed {args.seed}", flush=True)
    samples = generate(model, support, args.num, **options).cpu()
    out = Path(args.out_dir)
    (out / "images").mkdir(parents=True, exist_ok=True)
    flat = samples.flatten(0, 1).permute(0, 2, 3, 1).numpy()            # [S * num, H, W, C]
    for i, image in enumerate(flat):
        write_whole(out / "images" / f"{i:05d}.png", lambda file: Image.fromarray(image.squeeze()).save(file, "png"))
    for old in sorted((out / "images").glob("[0-9]" * 5 + ".png"))[len(flat):]:
        old.unlink()                                                # of an earlier run that made more
    write_whole(out / "samples.npz", lambda file: np.savez(file, arr_0=flat, **labels))
    write_whole(out / "grid.png", lambda file: grid(support, samples).save(file, "png"))
    print(f"{out / 'grid.png'} (support | samples), {len(flat)} images in {out / 'images'}, all in samples.npz")


def run_evaluation(model, data, K, args, options):
    """Scores on training classes and on classes never trained on: a table on screen and scores.json with its recipe."""
    inception = fid.load_inception(args.fid_weights, args.fid_dims, str(model.alpha_bar.device))
    print(f"{args.weights} weights, {args.sampler} in {args.steps} steps, guidance {args.guidance:g}, seed {args.seed}")
    out, report = Path(args.out_dir), {}
    for split, meaning in (("test", "unseen classes"), ("train", "in distribution: training classes")):
        if not data[split].names:
            print(f"\n{meaning}: none in this data set")
            continue
        scores, n = evaluate(model, data[split].to(model.alpha_bar.device), inception, args.num, K,
                             shared_pool=args.shared_pool, **options)
        report[split] = dict(scores, images=n, references=n)
        print(f"\n{meaning}, K = {K}, {n:,} images against {n:,} references"
              f"{' of a shared pool' if args.shared_pool else ''}, dims {args.fid_dims}\n{table(scores)}", flush=True)
        if n < 2048:
            print(f"FID at {n:,} images is mostly bias (fid.py says how much): compare KID, or the rows of one table")
    report["recipe"] = vars(args) | dict(
        k=K, precision=str(options["dtype"])[6:], device=str(model.alpha_bar.device), torch=torch.__version__,
        ckpt_sha256=fid.sha256(args.ckpt)[:8], fid_weights_sha256=inception.weights_sha256,
        protocol="references and supports share a pool" if args.shared_pool else "references disjoint from supports",
        features=fid.RESIZE, model=vars(model.config))
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "scores.json", lambda file: file.write(json.dumps(report, indent=1).encode()))
    print(f"\n{out / 'scores.json'} holds the scores with their recipe")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, fid.FIDError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = "out of memory: lower --batch_size"
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)
