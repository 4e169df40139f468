"""Generates new images of what a few images show.

    python sample.py                                        # the model and drawings that come along
    python sample.py --support mine/*.png                   # drawings of one thing, by that model
    python sample.py --ckpt runs/demo/ckpt.pt --support a.png b.jpg c.png   # images of one thing
    python sample.py --ckpt runs/demo/ckpt.pt --dataset glyphs              # classes never trained on
    python sample.py --ckpt runs/demo/ckpt.pt --dataset glyphs --evaluate   # few-shot scores

Writes to a new folder, --out_dir: grid.png (support | samples), images/00000.png and on, and
samples.npz (arr_0 uint8 NHWC); with --evaluate scores.json alone. Everything about the model comes from
the checkpoint. In every channel samples are no darker and no lighter than the images of their support.
"""
import json
import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from scipy.ndimage import distance_transform_edt, maximum_filter

import fid
import fsdm
from fsdm import EVALUATION, SETS, rng, say


# ---- The command line: every field of Request is a flag.

ASSETS = Path(__file__).parent / "assets"


@dataclass
class Request:
    ckpt: str = None                # checkpoint of train.py; left out, assets/symbols.pt: it knows symbols
    dataset: str = None             # take support sets from a data set, named as in train.py
    split: Literal["train", "val", "test"] = "test"         # classes of the data set
    data_dir: str = "data"          # where torchvision's files of a named data set lie
    download: bool = False          # fetch a named data set when it is not in data_dir
    sets: int = 8                   # support sets to take from the data set
    k: int = None                   # support images a set; one less than the model's sample_size
    crop: bool = False              # cut --support to what is drawn, thicken thin pens; True without --ckpt
    num: int = None                 # images for each support set (8); with --evaluate in all (2000)
    sampler: Literal[tuple(fsdm.SAMPLERS)] = "2m_sde"       # ddpm in 250 steps is as good, and slow
    steps: int = 20                 # evaluations of the network per image
    eta: float = None               # noise of ddim: 0 none, 1 as much as ddpm
    guidance: float = None          # 1: none; above: closer to the support; 3 where the model allows it
    draw_context: bool = False      # draw a variational context anew for every image
    seed: int = 0                   # image i is a function of (seed, i)
    weights: Literal["ema", "raw"] = "ema"                  # the averaged or the last weights
    out_dir: str = "samples"        # a new folder for the images; samples_1, ... if it is there already
    batch_size: int = 64            # images generated together: lower it to save memory
    device: str = "auto"            # auto, cpu, cuda, cuda:1 or mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"     # of matrix products
    evaluate: bool = False          # score --num images of test and training classes (scores.json)
    shared_pool: bool = False       # references may be support images, the paper's protocol
    fid_weights: str = None         # Inception weights file; torch's cache or a download if left out
    fid_dims: Literal[64, 192, 768, 2048] = 2048            # features of Inception to compare


def parse_args(argv=None):
    p = fsdm.make_parser(__doc__, Request)
    p.add_argument("--support", nargs="+",
                   help="image files of one thing: generate more of it; a folder is a set of its own")
    args = p.parse_args(argv)
    if args.dataset and args.crop:
        p.error("--crop is for the files of --support")
    if args.shared_pool and not args.evaluate:
        p.error("--shared_pool belongs to --evaluate")
    if not args.dataset and (args.k or args.sets or args.split):
        p.error("--k, --sets and --split belong to --dataset; the files of --support are the sets")
    if args.evaluate and (args.split or args.sets):
        p.error("--evaluate scores test and training classes in sets of its own: leave out --split "
                "and --sets")
    p.set_defaults(**vars(Request()))
    p.set_defaults(num=2000 if args.evaluate else 8)
    if args.ckpt is None:               # the model that comes along, and drawings that it never saw
        p.set_defaults(ckpt=str(ASSETS / "symbols.pt"), crop=True)
        if not args.dataset:
            p.set_defaults(support=sorted(str(folder) for folder in ASSETS.glob("drawings/[!.]*")))
    args = p.parse_args(argv)           # again, now with defaults
    if bool(args.support) == bool(args.dataset):
        p.error("pass either --support with image files or --dataset")
    if args.evaluate and not args.dataset:
        p.error("--evaluate needs --dataset, for classes with real images to compare with")
    if args.eta is not None and not (args.sampler == "ddim" and 0 <= args.eta <= 1):
        p.error(f"--eta is {args.eta}: expected 0, no noise, to 1, as much as ddpm, with --sampler ddim")
    fsdm.check_least(p, args, sets=1, num=1, steps=1, batch_size=1, k=1, seed=0, guidance=1)
    return args


# ---- Few-shot evaluation: the same questions for every model, between the two ends of the scale.

def draw_questions(split, K, num, seed, shared_pool=False):
    """Sets of K support images, each with K reference images and K other real images of its class,
    and no image is used twice; shared_pool, the paper's protocol: references, and other real
    images, may be support images.

    -> three int64 [S, K], indices into split.images, S = num / K or as many as the classes allow; a
    function of the seed and the split only. Raises ValueError when these are fewer than 4 images."""
    generator, questions = rng("cpu", seed, EVALUATION), []
    for c in torch.randperm(len(split.names), generator=generator).tolist():
        first, end = split.offsets[c:c + 2].tolist()
        images = first + torch.randperm(end - first, generator=generator)
        # drawn in both protocols, which so have the same supports
        again = first + torch.randperm(end - first, generator=generator)
        half, sets = len(images) // 2, len(images) // (4 * K)
        support = images[:half].split(K)
        real = (again if shared_pool else images[half:]).split(K)
        for r in range(sets):
            questions.append((r, support[r], real[r], real[sets + r]))
    questions.sort(key=lambda question: question[0])        # a set of every class, then a second, ...
    questions = questions[:max(1, num // K)]
    if len(questions) * K < 4:
        raise ValueError(f"{len(questions)} sets of {K} images are too few to score: ask for more images, for "
                         f"fewer a set (--k; a class gives a set for every {4 * K}, and the largest has "
                         f"{split.largest}), or add classes")
    _, support, reference, other = zip(*questions)
    return torch.stack(support), torch.stack(reference), torch.stack(other)


def evaluate(model, split, inception, num=2000, K=5, shared_pool=False, seed=0, **options):
    """Scores against references of the same classes, for the generated images and for both ends of
    the scale: the support images returned as they are, and other real images. options: of generate.

    -> {"generated" | "support returned" | "other real images": the numbers of fid.compare,
    nearest_support and right_class}, and the recipe. nearest_support: the mean distance to the nearest
    image of the own support, in features; near zero it copies. Raises ValueError and fid.FIDError
    as its parts do."""
    questions = draw_questions(split, K, num, seed, shared_pool)
    support, reference, other = (split.images[q] for q in questions)
    first = questions[0][:, 0].contiguous()
    classes = torch.searchsorted(split.offsets.cpu(), first, right=True)    # [S], from 1
    n = questions[0].numel()
    say(f"generating {n:,} images, {K} from each of {len(support):,} support sets")
    made = fsdm.generate(model, support, K, seed=seed, **options)

    def measure(images, name):                              # uint8 [S, K, C, H, W] -> fid.Side
        images = fid.check_images(images.flatten(0, 1).cpu()).split(1)
        return fid.scan(images, inception, keep=n, name=name)

    real = measure(reference, "references")
    shown = {"generated": made, "support returned": support, "other real images": other}
    sides = {name: measure(images, name) for name, images in shown.items()}
    near = torch.from_numpy(sides["support returned"].kept).unflatten(0, (-1, K))   # [S, K, dims]
    scores = {}
    for name, side in sides.items():
        x = torch.from_numpy(side.kept).unflatten(0, (-1, K))       # [S, K, dims]
        scores[name] = fid.compare(real, side)
        notes = scores[name].pop("notes")                   # the same for all
        scores[name]["nearest_support"] = torch.cdist(x, near).amin(2).mean().item()
        scores[name]["right_class"] = right_class(side.kept, real.kept, classes)
    protocol = "references share a pool with" if shared_pool else "references disjoint from"
    recipe = dict(notes=notes, k=K, images=n, references=n, seed=seed, protocol=f"{protocol} the supports",
                  resize=fid.RESIZE, dims=inception.dims, fid_weights=inception.weights_sha256)
    return scores, recipe | {name: str(value) for name, value in options.items()}


def right_class(x, real, classes, ways=20):
    """Features [S * K, D] of S sets, of real images of the same classes, and int64 [S], the class of
    each set -> the share of x that lies nearest to the mean of its own class's real features, among
    `ways` classes that follow each other at a time."""
    present, own = classes.unique(return_inverse=True)
    x = torch.from_numpy(x).unflatten(0, (len(own), -1))    # [S, K, D]
    real = torch.from_numpy(real).unflatten(0, (len(own), -1)).mean(1)      # [S, D]
    means = torch.stack([real[own == c].mean(0) for c in range(len(present))])      # [classes, D]
    right = []
    for first in range(0, len(present), ways):
        start = max(0, min(first, len(present) - ways))     # the last group borrows from the one before
        mine = (own >= first) & (own < first + ways)
        nearest = torch.cdist(x[mine], means[start:start + ways]).argmin(2) + start         # [sets, K]
        right.append((nearest == own[mine, None]).flatten())
    return torch.cat(right).float().mean().item()


def table(scores):
    """The scores of evaluate -> lines of text."""
    places = dict(fid=2, kid=5, kid_spread=5, precision=3, recall=3, nearest_support=3,
                  right_class=3)
    lines = [" " * 18 + "".join(f"{column:>17}" for column in places)]
    for name, row in scores.items():
        numbers = [f"{row[column]:>17.{digits}f}" for column, digits in places.items()]
        lines.append(f"{name:<18}{''.join(numbers)}")
    return "\n".join(lines)


# ---- Pictures, or with --evaluate scores.

def grid(support, samples, scale=2, gap=8):
    """support uint8 [S, K, C, H, W] | samples uint8 [S, n, C, H, W] -> PIL image, a row per set, a
    red bar between."""
    def tiles(images):                                      # [S, n, C, H, W] -> uint8 [S * H, n * W, 3]
        images = images.cpu().expand(-1, -1, 3, -1, -1)
        images = images.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
        images = torch.nn.functional.pad(images, (1, 1, 1, 1), value=255)
        return images.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)

    left, right = tiles(support), tiles(samples)
    bar = torch.tensor([220, 50, 50], dtype=torch.uint8).expand(len(left), gap, 3)
    return Image.fromarray(torch.cat([left, bar, right], 1).numpy())


def main(argv=None):
    args = parse_args(argv)
    device = fsdm.choose_device(args.device)
    dtype, reason = fsdm.choose_precision(device, args.precision)
    model = fsdm.load_model(args.ckpt, device, args.weights)
    config = model.config
    K = args.k or max(1, config.sample_size - 1)
    guidance = fsdm.best_guidance(config) if args.guidance is None else args.guidance
    options = dict(sampler=args.sampler, steps=args.steps, guidance=guidance, seed=args.seed,
                   draw_context=args.draw_context, dtype=dtype, batch_size=args.batch_size)
    if args.eta is not None:
        options["eta"] = args.eta
    print(f"{args.ckpt}: {model.about}; {config.image_size} x {config.image_size} pixels, "
          f"{'RGB' if config.in_channels == 3 else 'grey'}, {args.weights} weights")
    print(f"on {device}, {str(dtype)[6:]} ({reason}): {args.sampler} in {args.steps} steps, guidance "
          f"{guidance:g}, seed {args.seed}", flush=True)
    if args.evaluate:
        write_scores(model, K, args, options)
    else:
        write_images(model, K, args, options)


def read_support(paths, shape, prepare):
    """Image files, which are one set together, and folders of them, which are one each -> uint8
    [S, K, C, H, W] and the names of the sets; K is the number of images in the smallest. Raises
    ValueError for an empty folder or a file that is no image."""
    folders = [Path(path) for path in paths if os.path.isdir(path)]
    names = [folder.name for folder in folders]
    sets = [sorted(f for f in folder.iterdir() if not fsdm.hidden(f.name)) for folder in folders]
    files = [path for path in paths if not os.path.isdir(path)]
    if files:
        names.append("support")
        sets.append(files)
    K = min(map(len, sets))
    if K == 0:
        raise ValueError(f"{folders[sets.index([])]} is an empty folder: pass one with image files")
    if K < max(map(len, sets)):
        print(f"each set uses its first {K} images, as many as the smallest set has")
    pictures = [[fsdm.to_picture(file, *shape, prepare) for file in files[:K]] for files in sets]
    return torch.from_numpy(np.stack(pictures)), names


def crop_to_drawing(image):
    """A PIL image -> the square around what is drawn, with a margin; beyond the paper's edge its last
    pixels are repeated. Drawn is what differs from its surroundings, not from one colour: light may
    fall unevenly on the paper."""
    image.thumbnail((1024, 1024))                           # of a long strip the square would be vast
    colour = image.convert("RGB")
    pixels = np.asarray(colour)                             # [H, W, 3]
    surroundings = colour.filter(ImageFilter.GaussianBlur(max(image.size) / 8))
    contrast = np.abs(pixels.astype(int) - np.asarray(surroundings)).max(2)
    drawn = 2 * contrast >= contrast.max()                  # bool [H, W]
    y, x = np.nonzero(drawn)
    extent = max(np.ptp(y), np.ptp(x))
    side = 1 + 10 * extent // 9
    top, left = ((along.min() + along.max() - side + 1) // 2 for along in (y, x))
    rows = np.arange(top, top + side).clip(0, image.height - 1)
    columns = np.arange(left, left + side).clip(0, image.width - 1)
    pixels, contrast, drawn = (cut[rows][:, columns] for cut in (pixels, contrast, drawn))
    pixels = thicken(pixels, contrast, drawn, 0.035 * extent)
    return Image.fromarray(pixels).convert(image.mode)


def thicken(pixels, contrast, drawn, radius):
    """Strokes thinner than twice `radius` become so thick: of a hair's line little would be left at the
    model's size. pixels uint8 [H, W, 3], contrast [H, W], drawn bool [H, W] -> pixels."""
    depth = distance_transform_edt(drawn)
    strength = depth * contrast                             # largest in the middle of a stroke
    middle = drawn & (strength >= maximum_filter(strength, 3))
    away, nearest = distance_transform_edt(~middle, return_indices=True)
    nearest = tuple(nearest)
    thicker = (away < radius) & (depth[nearest] < radius)
    return np.where(thicker[..., None], pixels[nearest], pixels)


@contextmanager
def new_folder(path):
    """Makes a folder of this name, or of another if there is one: before the work, which could else be
    in vain. Removes it again if nothing has come into it."""
    out = fsdm.free_name(path)
    out.mkdir(parents=True)
    try:
        yield out
    finally:
        with suppress(OSError):                             # it is not empty
            out.rmdir()


def write_images(model, K, args, options):
    """Support from files or a data set -> grid.png, images/ and samples.npz."""
    shape = model.config.image_size, model.config.in_channels
    if args.support:
        if args.crop:
            print("each file is cut to what is drawn on it, a thin pen made thicker; --crop false shows it "
                  "whole")
        support, names = read_support(args.support, shape, crop_to_drawing if args.crop else None)
    else:
        data = fsdm.load_data(args.dataset, args.data_dir, *shape, args.download, [args.split])
        fsdm.check_data(data, K)
        support, names = fsdm.draw_support(data[args.split], args.sets, K, args.seed, SETS)
    support = support.to(model.alpha_bar.device)            # [S, K, C, H, W]
    with new_folder(args.out_dir) as out:
        samples = fsdm.generate(model, support, args.num, **options).cpu()
        flat = samples.flatten(0, 1).permute(0, 2, 3, 1)    # [S * num, H, W, C]
        (out / "images").mkdir()
        for i, image in enumerate(flat.squeeze(3).numpy()):         # grey is [H, W] to Pillow
            Image.fromarray(image).save(out / "images" / f"{i:05d}.png")
        np.savez(out / "samples.npz", arr_0=flat.numpy(), labels=np.repeat(names, args.num))
        grid(support, samples).save(out / "grid.png")
    print(f"{out / 'grid.png'} (support | samples), {len(flat)} images in {out / 'images'}, all in "
          "samples.npz")


def write_scores(model, K, args, options):
    """Scores on test classes and on training classes of a data set: a table on screen, and scores.json
    with its recipe."""
    device, config = model.alpha_bar.device, model.config
    recipe = dict(vars(args), ckpt_sha256=fid.sha256(args.ckpt)[:8], device=str(device),
                  torch=torch.__version__, model=vars(config))
    inception = fid.load_inception(args.fid_weights, args.fid_dims, str(device))
    data = fsdm.load_data(args.dataset, args.data_dir, config.image_size, config.in_channels,
                          args.download, ("test", "train"))
    report, meanings = {}, dict(test="test classes", train="training classes of this data set")
    with new_folder(args.out_dir) as out:
        for part, meaning in meanings.items():
            if not data[part].names:
                print(f"\n{meaning}: none in this data set")
                continue
            split = data[part].to(device)
            try:
                scores, how = evaluate(model, split, inception, args.num, K, args.shared_pool, **options)
            except ValueError as error:                     # too few images in a class
                if not report:
                    raise
                print(f"\n{meaning}: {error}")
                continue
            report[part], n = dict(scores, recipe=how), how["images"]
            print(f"\n{meaning}, K = {K}, {n:,} images against {n:,} references, {how['protocol']}, "
                  f"dims {args.fid_dims}\n{table(scores)}", flush=True)
            for note in how["notes"]:
                print(f"note: {note}")
            (out / "scores.json").write_text(json.dumps(dict(report, recipe=recipe), indent=1))
    if not report:
        raise ValueError(f"{args.dataset} has no class to score: neither unseen nor training ones")
    print(f"\n{out / 'scores.json'} holds the scores with their recipe")


if __name__ == "__main__":
    fsdm.run(main, "lower --batch_size")
