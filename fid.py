"""FID, KID, precision and recall between two sets of images, in one file that imports nothing of its project.

    python fid.py REAL FAKE                          two folders, or .npz files of uint8 images
    python fid.py REAL --save_stats real.npz         compute one side once ...
    python fid.py real.npz FAKE                      ... and use it again (FID only: statistics have no single features)
    python fid.py REAL FAKE --dims 768 --weights fid_inception_2015_upto_mixed6e.pth

FID is the Frechet distance between Gaussians fitted to Inception features (Heusel et al. 2017, arXiv:1706.08500).
The reference is pytorch-fid, and through it TensorFlow's Inception of 2015-12-05: on the same 8-bit RGB images
features agree within 1e-4 and FID within 1e-3. Three kinds of file it reads otherwise, on purpose: transparent
pixels are shown on white, EXIF rotation is applied, and 16-bit grey is scaled to 8 bits instead of cut off at 255.

FID at few images is mostly bias, so the last line on stdout is one JSON object with every score and how it was
measured. From Python:

    model = fid.load_inception()                     # FIDError says which file to put where if it cannot
    x, y = fid.features(real, model), fid.features(fake, model)          # uint8 [N, 3, H, W] -> float32 [N, 2048]
    fid.frechet_distance(*fid.statistics(x), *fid.statistics(y)), fid.kid(x, y), fid.precision_recall(x, y)
"""

import argparse
import hashlib
import json
import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
HASH = "6726825d"                      # the file's SHA-256 starts so
RESIZE = "bilinear 299, no antialias, as pytorch-fid"
EXTENSIONS = (".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")         # only these: PostScript would run Ghostscript
KEEP = 5_000                           # features kept for KID, precision and recall: 41 MB a side at 2048 dims
ROWS = 256                             # of these that are compared with all others at a time


class FIDError(Exception):
    """One sentence that says what is wrong and what to do."""


def why(error):
    """The first line of another library's error, for a sentence of ours."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


# ---- Inception v3 of 2015-12-05 ------------------------------------------------------------------------------------
# Szegedy et al. 2015, arXiv:1512.00567, under torchvision's names, so that its state_dict keys fit. Features end before
# the classifier (1008 outputs); there is no auxiliary head.

class Conv(nn.Module):
    """Convolution, BatchNorm, ReLU (torchvision's BasicConv2d)."""
    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side, joined along the channels; then the pool branch.
    Each branch is a chain of Conv arguments, (channels, kernel, ...), that reads [B, c, H, W]; layer i is {branch}_{i},
    or has the branch's name if alone. A chain may end in a fork, two that read the same input: {branch}_{i}a and b."""
    def __init__(self, c, pool, c_pool=None, **branches):
        super().__init__()
        self.pool, self.chains = pool, []
        for branch, layers in branches.items():
            width, chain = c, []
            for i, layer in enumerate(layers, start=1):
                name = f"{branch}_{i}" if len(layers) > 1 else branch
                fork = {name + "a": layer[0], name + "b": layer[1]} if isinstance(layer, list) else {name: layer}
                for key, spec in fork.items():
                    self.add_module(key, Conv(width, *spec))
                chain.append(list(fork))
                width = spec[0]
            self.chains.append(chain)
        self.branch_pool = Conv(c, c_pool, 1) if c_pool else nn.Identity()

    def forward(self, x):
        out = []
        for chain in self.chains:
            y = [x]
            for names in chain:
                y = [getattr(self, name)(y[0]) for name in names]
            out += y
        return torch.cat([*out, self.branch_pool(self.pool(x))], dim=1)


AVERAGE = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)   # unlike torchvision: padding does not count
MAXIMUM = nn.MaxPool2d(3, stride=1, padding=1)                   # unlike torchvision: Mixed_7c pools by the maximum
REDUCE = nn.MaxPool2d(3, stride=2)
ROW7, COLUMN7, ROW3, COLUMN3 = (1, 7), (7, 1), (1, 3), (3, 1)


def block_a(c, c_pool):                                          # 35 x 35
    return Mixed(c, AVERAGE, c_pool, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                 branch3x3dbl=[(64, 1), (96, 3), (96, 3)])


def block_c(c):                                                  # 17 x 17
    return Mixed(768, AVERAGE, 192, branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, ROW7), (192, COLUMN7)],
                 branch7x7dbl=[(c, 1), (c, COLUMN7), (c, ROW7), (c, COLUMN7), (192, ROW7)])


def block_e(c, pool):                                            # 8 x 8
    fork = [(384, ROW3), (384, COLUMN3)]
    return Mixed(c, pool, 192, branch1x1=[(320, 1)], branch3x3=[(384, 1), fork],
                 branch3x3dbl=[(448, 1), (384, 3), fork])


LAYERS = dict(                                                   # [B,    3, 299, 299]
    Conv2d_1a_3x3=lambda: Conv(3, 32, 3, 2, "valid"),            # [B,   32, 149, 149]
    Conv2d_2a_3x3=lambda: Conv(32, 32, 3, 1, "valid"),           # [B,   32, 147, 147]
    Conv2d_2b_3x3=lambda: Conv(32, 64, 3),                       # [B,   64, 147, 147]
    maxpool1=lambda: nn.MaxPool2d(3, stride=2),                  # [B,   64,  73,  73]
    Conv2d_3b_1x1=lambda: Conv(64, 80, 1),                       # [B,   80,  73,  73]
    Conv2d_4a_3x3=lambda: Conv(80, 192, 3, 1, "valid"),          # [B,  192,  71,  71]
    maxpool2=lambda: nn.MaxPool2d(3, stride=2),                  # [B,  192,  35,  35]
    Mixed_5b=lambda: block_a(192, 32),                           # [B,  256,  35,  35]
    Mixed_5c=lambda: block_a(256, 64),                           # [B,  288,  35,  35]
    Mixed_5d=lambda: block_a(288, 64),                           # [B,  288,  35,  35]
    Mixed_6a=lambda: Mixed(288, REDUCE, branch3x3=[(384, 3, 2, "valid")],                   # [B,  768, 17, 17]
                           branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2, "valid")]),
    Mixed_6b=lambda: block_c(128),                               # [B,  768,  17,  17]
    Mixed_6c=lambda: block_c(160),                               # [B,  768,  17,  17]
    Mixed_6d=lambda: block_c(160),                               # [B,  768,  17,  17]
    Mixed_6e=lambda: block_c(192),                               # [B,  768,  17,  17]
    Mixed_7a=lambda: Mixed(768, REDUCE, branch3x3=[(192, 1), (320, 3, 2, "valid")],     # [B, 1280, 8, 8]
                           branch7x7x3=[(192, 1), (192, ROW7), (192, COLUMN7), (192, 3, 2, "valid")]),
    Mixed_7b=lambda: block_e(1280, AVERAGE),                     # [B, 2048,   8,   8]
    Mixed_7c=lambda: block_e(2048, MAXIMUM),                     # [B, 2048,   8,   8]
)
LAST_LAYER = {64: "maxpool1", 192: "maxpool2", 768: "Mixed_6e", 2048: "Mixed_7c"}       # --dims: where features end


class Inception(nn.Sequential):
    """float32 [B, 3, 299, 299] in [-1, 1] -> features, float32 [B, dims]; it has only the layers that dims needs."""
    def __init__(self, dims=2048):
        super().__init__()
        if dims not in LAST_LAYER:
            raise FIDError(f"dims {dims}: expected one of {sorted(LAST_LAYER)}")
        self.dims = dims
        for name, layer in LAYERS.items():
            self.add_module(name, layer())
            if name == LAST_LAYER[dims]:
                break
        self.eval().requires_grad_(False)

    def forward(self, x):
        return super().forward(x).mean((2, 3))                   # [B, dims]

    def fold(self):
        """Fold BatchNorm into the convolutions, weights channels last: the same features, twice as fast on a CPU."""
        for module in list(self.modules()):
            if isinstance(module, Conv):
                module.conv = nn.utils.fuse_conv_bn_eval(module.conv.double(), module.bn.double()).float()
                module.bn = nn.Identity()
        return self.to(memory_format=torch.channels_last)


# ---- weights -------------------------------------------------------------------------------------------------------
# A file is read with weights_only=True, so that a hostile pickle is refused and not run.

def load_inception(weights=None, dims=2048, device="cpu"):
    """The reference network, folded, on a device, ready for `features`.
    weights: a file, or None for torch's hub cache or else a download. dims: 64, 192, 768 or 2048.
    The model says what it was made of: .dims, .weights_file, .weights_sha256 (8 digits). FIDError in one sentence."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise FIDError(f"device {device} cannot be used here: {why(error)}") from error
    if weights is not None and not os.path.isfile(weights):
        raise FIDError(f"weights {weights}: there is no such file")
    model, path = Inception(dims), weights or find_weights()
    load_weights(model, path)
    model.weights_file, model.weights_sha256 = os.path.basename(path), sha256(path)[:8]
    return model.fold().to(device)


def find_weights():
    """The path of the reference weights in torch's hub cache, downloaded if absent. FIDError if they cannot be had."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(URL))
    timeout = socket.getdefaulttimeout()
    try:
        if not os.path.isfile(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            socket.setdefaulttimeout(30)         # torch.hub sets none: a firewall that drops packets would hang us
            torch.hub.download_url_to_file(URL, path, hash_prefix=HASH)
    except (OSError, RuntimeError) as error:     # RuntimeError: the hash differs
        raise FIDError(f"Inception weights are missing: no {path}, and the download failed ({error}); fetch {URL} "
                       "where there is a network and put it there, or name the file with --weights") from error
    finally:
        socket.setdefaulttimeout(timeout)
    if not sha256(path).startswith(HASH):
        raise FIDError(f"{path} is damaged (its SHA-256 does not start with {HASH}): delete it and start again")
    return path


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def load_weights(model, path):
    """Fill an Inception that is not folded from a state_dict file, which may hold more; FIDError if it cannot be."""
    expected = model.state_dict()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        wrong = [name for name in expected if name not in state or state[name].shape != expected[name].shape]
    except Exception as error:                   # torch.load fails in many ways on what is no state_dict
        raise FIDError(f"cannot read weights {path} as a plain state_dict: {why(error)}") from error
    if wrong:
        raise FIDError(f"weights {path} do not serve --dims {model.dims}: {len(wrong)} tensors are missing or of "
                       f"another shape, the first {wrong[0]}; take {os.path.basename(URL)} or smaller --dims")
    if any(name.startswith("AuxLogits") for name in state):
        raise FIDError(f"weights {path} are torchvision's ImageNet Inception, FID needs {os.path.basename(URL)}")
    model.load_state_dict({name: state[name] for name in expected})


# ---- images in -----------------------------------------------------------------------------------------------------
# A folder is read as it is measured. An .npz is read whole: 50,000 images of 64 x 64 are 614 MB.

@dataclass
class Side:
    """One side of a comparison: what `scan` measured or `open_source` found in a statistics file."""
    n: int | None              # images measured; None if a statistics file does not say
    mu: np.ndarray             # [D] float64
    sigma: np.ndarray          # [D, D] float64
    kept: np.ndarray           # [min(n, KEEP), D] float32 for KID, precision and recall; [0, D] from statistics
    unreadable: list           # one string a file that could not be read
    weights: str               # SHA-256 prefix of the network behind it


def open_source(path, dims):
    """A folder -> the list of its image files; an .npz -> its images, uint8 [N, 3, H, W], or its statistics, a Side.
    Images are 'arr_0' or 'images', [N, H, W, 3] or [N, H, W]; statistics are 'mu' and 'sigma', as pytorch-fid, EDM and
    `save_statistics` write them. FIDError if it is none of these."""
    if os.path.isdir(path):
        files = list_images(path)
        if len(files) < 2:
            raise FIDError(f"{path}: {len(files) or 'no'} image files ({', '.join(EXTENSIONS)}), FID needs at least 2 "
                           "a side, and thousands to mean something")
        return files
    if not os.path.isfile(path):                 # a pipe would wait for ever
        raise FIDError(f"{path}: expected a folder of images or an .npz file, but there is none")
    known = ("arr_0", "images", "mu", "sigma", "n", "weights_sha256")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: np.asarray(file[name]) for name in known if name in file}
    except Exception as error:                   # numpy, zipfile and zlib fail in many ways on a damaged file
        raise FIDError(f"cannot read {path} as a folder of images or an .npz of arrays: {why(error)}") from error
    if "mu" in found and "sigma" in found:
        mu, sigma, n = found["mu"], found["sigma"], found.get("n")
        if mu.shape != (dims,) or sigma.shape != (dims, dims) or {mu.dtype.kind, sigma.dtype.kind} != {"f"} \
                or n is not None and (n.size != 1 or n.dtype.kind not in "iu"):
            raise FIDError(f"{path}: mu {mu.shape} and sigma {sigma.shape} are not float statistics of --dims {dims}, "
                           "or n is no number of images")
        return Side(None if n is None else int(n.item()), mu.astype(np.float64), sigma.astype(np.float64),
                    np.empty((0, dims), np.float32), [], str(found.get("weights_sha256", "unknown")))
    pixels = found.get("arr_0", found.get("images"))
    if pixels is None or pixels.ndim < 3 or pixels.shape[3:] not in ((), (1,), (3,)):
        shapes = {name: list(array.shape) for name, array in found.items()}
        raise FIDError(f"{path}: expected images as 'arr_0' or 'images', uint8 [N, H, W, 3] or [N, H, W], or "
                       f"statistics as 'mu' and 'sigma', found {shapes or 'none of them'}")
    images = check_images(pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2), f"{path}: ")
    if len(images) < 2:
        raise FIDError(f"{path}: {len(images)} image(s), FID needs at least 2 a side, and thousands to mean something")
    return images


def check_images(images, where=""):
    """uint8 [N, 3 or 1, H, W], tensor or ndarray -> tensor [N, 3, H, W]; FIDError for any other type or shape."""
    if str(images.dtype) not in ("uint8", "torch.uint8"):
        raise FIDError(f"{where}images are {images.dtype}: give uint8, 0 to 255 (from [-1, 1]: "
                       "x.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8))")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise FIDError(f"{where}images are {list(images.shape)}: expected [N, 3, H, W] or [N, 1, H, W]")
    return torch.as_tensor(images).expand(-1, 3, -1, -1)


def choose(n, num):
    """The indices of `num` of n items, ascending: spread at random, so that sorted classes are all there, yet the same
    in every run and version (np.random.RandomState is frozen). All of them if num is None or not below n."""
    return np.arange(n) if num is None or num >= n else np.sort(np.random.RandomState(0).permutation(n)[:num])


def list_images(folder):
    """Every image file under a folder, sorted; hidden names are skipped, linked folders inside it are not entered."""
    def fail(error):
        raise FIDError(f"cannot read folder {error.filename}: {error.strerror}") from error
    found = []
    for root, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(root, f) for f in files if f.lower().endswith(EXTENSIONS) and not f.startswith(".")]
    return sorted(found)


def read_image(path):
    """An image file -> uint8 RGB [1, 3, H, W], or a string that says why not."""
    if not os.path.isfile(path):                                         # a pipe named .png would wait for ever
        return f"{path}: not a file"
    try:
        with Image.open(path, formats=FORMATS) as image:                 # Pillow itself refuses decompression bombs
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):                        # 16 bits, which Pillow also opens as 32
                grey = np.asarray(image).astype(np.int64)
                if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
                    return f"{path}: float or 32-bit pixels have no known range"
                image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            pixels = np.array(image.convert("RGB"))                      # [H, W, 3]
    except Exception as error:                   # decoders fail in many ways; the caller counts and names the file
        return f"{path}: {why(error)}"
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def read_files(files, unreadable):
    """The images of files, uint8 [1, 3, H, W], in order, decoded by threads, 16 files at a time.
    What cannot be read is added to the list `unreadable`; FIDError when that is more than 1%."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(files), 16):
            for image in pool.map(read_image, files[start:start + 16]):
                if isinstance(image, torch.Tensor):
                    yield image
                    continue
                unreadable.append(image)
                if len(unreadable) > 0.01 * len(files):
                    raise FIDError(f"more than 1% of {len(files)} images cannot be read, among them "
                                   f"{'; '.join(unreadable[:3])}: repair or remove them")


# ---- features and statistics ---------------------------------------------------------------------------------------
# 32-bit throughout: bf16 moves features by 9%, and TF32 is not 32 bits. The sums behind mean and covariance are 64-bit.

def prepare(images):
    """uint8 [B, 3, H, W] -> float32 [B, 3, 299, 299] in [-1, 1]; never resized as uint8, never antialiased."""
    x = images.to(memory_format=torch.channels_last).float() / 255
    return 2 * F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) - 1


@torch.inference_mode()
def run(model, x):
    """Prepared [B, 3, 299, 299] -> features, array [B, dims]; the caller's TF32 and autocast are off inside."""
    convs = torch.backends.cudnn.conv, torch.backends.mkldnn.conv
    before = [conv.fp32_precision for conv in convs]
    try:
        for conv in convs:
            conv.fp32_precision = "ieee"
        with torch.autocast(x.device.type, enabled=False):
            return model(x).cpu().numpy()
    finally:
        for conv, precision in zip(convs, before):
            conv.fp32_precision = precision


def batches(images, model, batch_size):
    """Features of uint8 images [1, 3, H, W] of any sizes, in order, as float32 arrays [up to batch_size, dims]."""
    images, device = iter(images), next(model.parameters()).device
    # a CPU gets small activations back from the allocator, and fresh pages for large ones, at half the speed
    batch_size = batch_size or (4 if device.type == "cpu" else 64)
    while group := list(islice(images, batch_size)):
        yield run(model, torch.cat([prepare(image.to(device)) for image in group]))


def features(images, model, batch_size=None):
    """uint8 [N, 3 or 1, H, W] (tensor or ndarray, 0 to 255) -> float32 ndarray [N, dims]. FIDError if not uint8."""
    images = (image[None] for image in check_images(images))
    return np.concatenate([np.empty((0, model.dims), np.float32), *batches(images, model, batch_size)])


class Moments:
    """Mean and covariance of rows that arrive in pieces (Chan, Golub & LeVeque 1979), float64, O(D^2) memory."""
    def __init__(self, dims):
        self.n, self.mean, self.scatter = 0, np.zeros(dims), np.zeros((dims, dims))

    def update(self, rows):                                              # [b, D]
        rows = np.asarray(rows, np.float64)
        mean, b = rows.mean(0), len(rows)
        rows, step = rows - mean, mean - self.mean
        self.scatter += rows.T @ rows
        self.scatter += np.outer(step, step * (self.n * b / (self.n + b)))
        self.mean += step * (b / (self.n + b))
        self.n += b

    def result(self):
        """(mu [D], sigma [D, D]), sigma with N - 1 as np.cov. FIDError below 2 rows: one has no covariance."""
        if self.n < 2:
            raise FIDError(f"{self.n} image(s): FID needs at least 2 a side, and thousands to mean something")
        return self.mean, self.scatter / (self.n - 1)


def statistics(features):
    """Features [N >= 2, D] -> (mu [D], sigma [D, D]), float64. FIDError if N < 2."""
    moments = Moments(np.shape(features)[1])
    for start in range(0, len(features), 1024):
        moments.update(features[start:start + 1024])
    return moments.result()


def scan(images, model, num=None, batch_size=None, progress=None):
    """One pass over image files or uint8 [N, 3, H, W], both from `open_source`, -> Side; memory does not grow with N.
    num: measure this many (`choose`). progress: a name to print on stderr beside the images a second."""
    unreadable, moments, start, chosen = [], Moments(model.dims), time.time(), choose(len(images), num)
    n = len(chosen)
    if isinstance(images, torch.Tensor):
        source = (images[i:i + 1] for i in chosen)
    else:
        source = read_files([images[i] for i in chosen], unreadable)
    keep = choose(n, KEEP)
    kept = np.empty((len(keep), model.dims), np.float32)                 # small arrays would lie between the network's

    def tell(end):
        print(f"\r{progress}: {moments.n} of {n} images, {moments.n / (time.time() - start):.1f} a second ",
              end=end, file=sys.stderr, flush=True)

    for x in batches(source, model, batch_size):
        here = np.flatnonzero((keep >= moments.n) & (keep < moments.n + len(x)))
        kept[here] = x[keep[here] - moments.n]
        moments.update(x)
        if progress and sys.stderr.isatty():
            tell("")
    if progress:
        tell("\n")
    return Side(moments.n, *moments.result(), kept[keep < moments.n], unreadable, model.weights_sha256)


def save_statistics(path, side):
    """Write mu and sigma (pytorch-fid's names), n and the weights' hash as an .npz, whole or not at all."""
    with open(f"{path}.tmp", "wb") as file:
        np.savez(file, mu=side.mu, sigma=side.sigma, n=side.n, weights_sha256=side.weights)
    os.replace(f"{path}.tmp", path)


# ---- distances -----------------------------------------------------------------------------------------------------
# All in float64 on the CPU. x and y are features [N, D]; kernels and distances are computed ROWS rows at a time.

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), Dowson & Landau 1982: mu [D], sigma [D, D] -> float.
    With S1 = A A^T, S1 S2 has the eigenvalues of the symmetric A^T S2 A: no complex square root of a matrix, nothing
    added to a diagonal, and any rank will do (fewer images than D). FIDError if one is not finite."""
    mu1, mu2, sigma1, sigma2 = (torch.as_tensor(np.asarray(v, np.float64)) for v in (mu1, mu2, sigma1, sigma2))
    if not all(v.isfinite().all() for v in (mu1, sigma1, mu2, sigma2)):
        raise FIDError("the statistics hold numbers that are not finite: were the features?")
    # Cholesky with pivoting stops where only rounding errors of zero are left, five times sooner than eigenvectors do;
    # the largest come first, and then LAPACK keeps the small eigenvalues of A^T S2 A to 1e-13, otherwise only to 1e-7
    factor, order, rank, _ = scipy.linalg.lapack.dpstrf(sigma1.numpy(), lower=1)
    a = torch.zeros(len(mu1), rank, dtype=torch.float64)                 # [D, rank]
    a[torch.from_numpy(order.astype(np.int64) - 1)] = torch.from_numpy(np.tril(factor)[:, :rank])
    root = torch.linalg.eigvalsh(a.T @ sigma2 @ a).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root)


def kid(x, y, halves=50):
    """Features [M >= 4, D], [N >= 4, D] -> (KID, its spread): the unbiased U-statistic of MMD^2 over all rows
    (Gretton et al. 2012, lemma 6) with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, arXiv:1801.01401).
    Its mean is 0 for equal distributions at any N, so it can be negative. The spread is its standard deviation over
    random halves of both sides, an estimate of the standard error of the score itself (delete-half jackknife,
    Shao & Wu 1989). FIDError below 4 rows or if D differs."""
    x, y = check_features(x, y, least=4)
    rng = np.random.RandomState(0)

    def members(n):                                                      # column 0: everyone; the others: a random half
        return np.stack([np.ones(n)] + [rng.permutation(n) < n // 2 for _ in range(halves)], axis=1)

    def mean(x, y, mx, my, same):                                        # of the kernel, by column: [1 + halves]
        total = np.zeros(1 + halves)
        for i in range(0, len(x), ROWS):
            k = x[i:i + ROWS] @ y.T / x.shape[1] + 1
            k = k * k * k                                                # [ROWS, N]; numpy's k**3 is 6 times slower
            if same:
                np.fill_diagonal(k[:, i:], 0)                            # i != j: what makes it unbiased
            total += ((k @ my) * mx[i:i + ROWS]).sum(0)
        return total / (mx.sum(0) * (my.sum(0) - same))

    mx, my = members(len(x)), members(len(y))
    score = mean(x, x, mx, mx, True) + mean(y, y, my, my, True) - 2 * mean(x, y, mx, my, False)
    return float(score[0]), float(score[1:].std(ddof=1))


def precision_recall(real, fake, k=3):
    """Features [M > k, D], [N > k, D] -> (precision, recall) in [0, 1] (Kynkaanniemi et al. 2019, arXiv:1904.06991).
    Precision is the share of fake rows within the reach of some real row, recall the share of real rows within the
    reach of some fake row; a row reaches as far as its k-th nearest neighbour on its own side."""
    real, fake = check_features(real, fake, least=k + 1)

    def distances(x, y):                                                 # squared, blocks of [ROWS, N]
        xx, yy = np.einsum("nd,nd->n", x, x), np.einsum("nd,nd->n", y, y)
        for i in range(0, len(x), ROWS):
            size = xx[i:i + ROWS, None] + yy
            d = size - 2 * x[i:i + ROWS] @ y.T
            yield np.where(d < 1e-10 * size, 0, d)                       # equal images: 0, not rounding errors

    def reach(x):                                                        # itself is the 0-th neighbour
        return np.concatenate([np.partition(d, k, axis=1)[:, k] for d in distances(x, x)])

    def covered(x, y):
        radius = reach(y)
        return float(np.mean(np.concatenate([(d <= radius).any(1) for d in distances(x, y)])))

    return covered(fake, real), covered(real, fake)


def check_features(x, y, least):
    """Two arrays [N, D] -> the same in float64; FIDError if one has fewer than `least` rows or D differs."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < least:
        raise FIDError(f"features of shapes {list(x.shape)}, {list(y.shape)}: expected two [N, D], N at least {least}")
    return x, y


# ---- command line --------------------------------------------------------------------------------------------------

def compare(real, fake):
    """Two Sides -> (scores by name, sentences that a reader of the scores must know)."""
    scores = dict(fid=frechet_distance(real.mu, real.sigma, fake.mu, fake.sigma),
                  kid=None, kid_spread=None, precision=None, recall=None)
    notes = []
    if min(len(real.kept), len(fake.kept)) >= 4:
        scores["kid"], scores["kid_spread"] = kid(real.kept, fake.kept)
        scores["precision"], scores["recall"] = precision_recall(real.kept, fake.kept)
    else:
        notes.append("KID, precision and recall need at least 4 images on each side; a statistics file holds none")
    known = [side.n for side in (real, fake) if side.n is not None]
    if known and min(known) < 2048:
        notes.append(f"FID at {min(known)} images is mostly bias: with dims 2048 a perfect generator would score about "
                     "55 at 512 images, 34 at 1000, 15 at 2000 (Gaussian model); compare only at equal n, or KID")
    if len(known) == 2 and known[0] != known[1]:
        notes.append(f"n differs ({real.n} and {fake.n}): the bias depends on both")
    if len({real.weights, fake.weights} - {"unknown"}) == 2:
        notes.append(f"the sides were measured with different weights ({real.weights}, {fake.weights})")
    return scores, notes


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="FID, KID, precision and recall between two sets of images.")
    p.add_argument("real", help="folder of images, .npz of images ('arr_0' or 'images', uint8 NHWC) or of statistics")
    p.add_argument("fake", nargs="?", help="the same, for the images to judge; left out with --save_stats")
    p.add_argument("--dims", "--fid_dims", type=int, default=2048, choices=sorted(LAST_LAYER),
                   help="features; 2048 is the standard")
    p.add_argument("--weights", "--fid_weights", help="Inception weights; default: torch's hub cache, else a download")
    p.add_argument("--num", type=int, help="measure this many images a side, spread over all; default: all")
    p.add_argument("--batch_size", type=int, help="images at once (GPU 64, CPU 4); no score depends on it")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, mps")
    p.add_argument("--save_stats", metavar="OUT.npz", help="write mean and covariance of the one side")
    args = p.parse_args(argv)
    if (args.fake is None) == (args.save_stats is None):
        p.error("give two sides to compare, or one side and --save_stats OUT.npz")
    if args.batch_size is not None and args.batch_size < 1 or args.num is not None and args.num < 2:
        p.error("--batch_size must be at least 1 and --num at least 2")
    if args.save_stats and (os.path.isdir(args.save_stats) or not Path(args.save_stats).absolute().parent.is_dir()):
        p.error(f"--save_stats {args.save_stats}: expected the name of a file, in a folder that exists")
    if args.save_stats and os.path.realpath(args.save_stats) == os.path.realpath(args.real):
        p.error(f"--save_stats {args.save_stats} would overwrite the images it is computed from")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        result = measure(args)
    except (FIDError, OSError, torch.OutOfMemoryError) as error:
        reason = "out of memory: lower --batch_size" if isinstance(error, torch.OutOfMemoryError) else error
        print(f"fid.py: {reason}", file=sys.stderr)
        sys.exit(2)
    print("  ".join(f"{name} {value:.5g}" for name, value in result.items() if isinstance(value, float)))
    for note in result["notes"]:
        print(f"note: {note}")
    print(json.dumps(result))


def measure(args):
    """What the command line asks for, as one dict: scores, notes and the whole protocol."""
    paths = dict(real=args.real) if args.save_stats else dict(real=args.real, fake=args.fake)
    sides = {name: open_source(path, args.dims) for name, path in paths.items()}         # what is wrong is said at once
    if args.save_stats and isinstance(sides["real"], Side):
        raise FIDError(f"{args.real} holds statistics already: give images to compute them from")
    model = None
    for name, side in sides.items():
        if not isinstance(side, Side):
            model = model or load_inception(args.weights, args.dims, args.device)
            sides[name] = scan(side, model, args.num, args.batch_size, progress=name)
    if args.save_stats:
        save_statistics(args.save_stats, sides["real"])
        scores, notes = dict(saved=args.save_stats), []
    else:
        scores, notes = compare(sides["real"], sides["fake"])
    for side in sides.values():
        if side.unreadable:
            notes.append(f"{len(side.unreadable)} files are unreadable: {'; '.join(side.unreadable[:3])}")
    protocol = {name: dict(path=paths[name], n=side.n, kept=len(side.kept), unreadable=len(side.unreadable),
                           weights=side.weights) for name, side in sides.items()}
    return dict(**scores, dims=args.dims, resize=RESIZE, kernel="(x.y/D + 1)^3, unbiased", k=3, **protocol,
                weights_file=model and model.weights_file, weights_sha256=model and model.weights_sha256, notes=notes)


if __name__ == "__main__":
    main()
