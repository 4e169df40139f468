"""FID, KID, precision and recall between two sets of images, in one file that imports nothing of its project.

    python fid.py REAL FAKE                          two folders, or .npz files of uint8 images
    python fid.py REAL --save_stats real.npz         compute one side once ...
    python fid.py real.npz FAKE                      ... and use it again (FID only: KID needs the features)
    python fid.py REAL FAKE --dims 768 --weights weights.pth

FID is the Frechet distance between Gaussians fitted to Inception features (Heusel et al. 2017, arXiv:1706.08500).
The reference is pytorch-fid, and through it TensorFlow's Inception of 2015-12-05: on the same 8-bit RGB images
features agree within 1e-4 and FID within 1e-3. Three kinds of file it reads otherwise, on purpose: transparent
pixels are shown on white, EXIF rotation is applied, and 16-bit grey is scaled to 8 bits instead of cut off at 255.

FID at few images is mostly bias, so the last line on stdout is one JSON object with every score and how it was
measured. From Python:

    model = fid.load_inception()                     # FIDError says which file to put where if it cannot
    x = fid.features(real, model)                    # uint8 [N, 3, H, W] -> float32 [N, 2048]
    y = fid.features(fake, model)
    fid.frechet_distance(*fid.statistics(x), *fid.statistics(y))
    fid.kid(x, y)
    fid.precision_recall(x, y)

Letters: N images, B of them at once, H x W pixels, D features of an image (--dims), C channels inside the network.
"""

import argparse
import hashlib
import json
import os
import socket
import sys
import textwrap
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torchvision.models.inception import BasicConv2d, Inception3, InceptionA, InceptionC, InceptionE

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
HASH = "6726825d"               # the file's SHA-256 starts so
RESIZE = "bilinear 299, no antialias, as pytorch-fid"
NPZ_LIMIT = 10 * 2**30          # bytes of arrays in one .npz: 50,000 images of 256 x 256 are 9.8e9


class FIDError(ValueError):
    """One sentence that says what is wrong and what to do; if another library's error is behind it, ends with that."""

    def __init__(self, sentence, error=None):
        if error is not None:
            sentence = f"{sentence}: {type(error).__name__}: {textwrap.shorten(str(error), 200)}"
        super().__init__(sentence)


# ---- Inception v3 of 2015-12-05
# Szegedy et al. 2015, arXiv:1512.00567: torchvision's network, except for how nine of its blocks pool. Features end
# before the classifier (1008 outputs); there is no auxiliary head.

def ignore_padding(branch_pool, inputs):
    """Unlike torchvision: the zeros around a picture do not count. A block averages 3 x 3 pixels, zeros too, for its
    branch_pool; this hook runs in between and divides by the share of the nine that lie inside the picture."""
    averages = inputs[0]                                    # [B, C, h, w]
    inside = torch.ones_like(averages[:1, :1])              # [1, 1, h, w]
    inside = F.avg_pool2d(inside, kernel_size=3, stride=1, padding=1)   # 1, at a side 6/9, in a corner 4/9
    return averages / inside


class LastBlock(InceptionE):
    """Unlike torchvision: the pool branch takes the maximum."""

    def forward(self, x):                                   # [B, 2048, 8, 8]
        pool = F.max_pool2d(x, kernel_size=3, stride=1, padding=1)
        pool = self.branch_pool(pool)                       # [B, 192, 8, 8]
        x = super().forward(x)                              # [B, 2048, 8, 8], the average last
        return torch.cat([x[:, :-192], pool], dim=1)


class Inception(nn.Sequential):
    """float32 [B, 3, 299, 299] in [-1, 1] -> features, float32 [B, D]; it has only the layers that `dims` needs."""
    last_layer = {
        64: "maxpool1",                                     # [B, 64, 73, 73]
        192: "maxpool2",                                    # [B, 192, 35, 35]
        768: "Mixed_6e",                                    # [B, 768, 17, 17]
        2048: "Mixed_7c"                                    # [B, 2048, 8, 8]
    }

    def __init__(self, dims=2048):
        super().__init__()
        self.dims = dims

        network = Inception3(aux_logits=False, init_weights=False)
        for block in network.children():
            if isinstance(block, (InceptionA, InceptionC, InceptionE)):
                block.branch_pool.register_forward_pre_hook(ignore_padding)
        network.Mixed_7c = LastBlock(2048)

        for name, layer in network.named_children():        # torchvision has them in order
            self.add_module(name, layer)
            if name == self.last_layer[dims]:
                break
        self.eval()

    @torch.inference_mode()
    def forward(self, x):
        """In 32 bits, whatever the caller has set: bf16 moves features by 9%, and TF32 is not 32 bits."""
        convolutions = [torch.backends.cudnn.conv, torch.backends.mkldnn.conv]
        before = [conv.fp32_precision for conv in convolutions]
        try:
            for conv in convolutions:
                conv.fp32_precision = "ieee"
            with torch.autocast(x.device.type, enabled=False):
                x = super().forward(x)                      # [B, D, h, w]
        finally:
            for conv, precision in zip(convolutions, before):
                conv.fp32_precision = precision
        return x.mean((2, 3))                               # [B, D]

    def load(self, path):
        """Fill from a state_dict file, which may hold more. A hostile pickle is refused and not run."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            missing = self.load_state_dict(state, strict=False).missing_keys
        except Exception as error:              # torch fails in many ways on what is no state_dict
            raise FIDError(f"cannot read weights {path} as a plain state_dict", error) from error
        if missing:
            raise FIDError(f"weights {path} do not serve --fid_dims {self.dims}: {missing[0]} and more "
                           f"are missing; take smaller --fid_dims, or {URL}")
        if "AuxLogits.conv0.conv.weight" in state:
            raise FIDError(f"weights {path} are torchvision's for ImageNet: take {URL}")

    def fold(self):
        """BatchNorm into the convolutions, weights channels last: the same features, a fifth faster on a CPU."""
        for module in self.modules():
            if isinstance(module, BasicConv2d):
                conv = nn.utils.fuse_conv_bn_eval(module.conv.double(), module.bn.double())
                module.conv = conv.float()
                module.bn = nn.Identity()
        self.to(memory_format=torch.channels_last)


# ---- Weights
# Found, checked and loaded, or a sentence that says which file to put where.

def load_inception(weights=None, dims=2048, device="cpu"):
    """The reference network, folded, on a device, ready for `features`.
    weights: a file, or None for torch's hub cache or else a download. dims: 64, 192, 768 or 2048.
    The model says what it was made of: .dims, .weights_file, .weights_sha256 (8 digits). FIDError in one sentence."""
    try:
        torch.ones(1, device=device).item()     # a kernel must run, too
    except (RuntimeError, AssertionError) as error:
        raise FIDError(f"device {device} cannot be used here", error) from error

    path = weights or find_weights()
    if not os.path.isfile(path):                # a pipe would wait for ever
        raise FIDError(f"weights {path}: there is no such file")
    model = Inception(dims)
    model.load(path)
    model.fold()
    model.weights_file = os.path.basename(path)
    model.weights_sha256 = sha256(path)[:8]
    return model.to(device)


def find_weights():
    """The path of the reference weights in torch's hub cache, downloaded if absent."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(URL))
    timeout = socket.getdefaulttimeout()
    try:
        if not os.path.isfile(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            socket.setdefaulttimeout(30)        # torch.hub has none: a silent firewall would hang us
            torch.hub.download_url_to_file(URL, path, hash_prefix=HASH)
    except (OSError, RuntimeError) as error:    # RuntimeError: the hash differs
        raise FIDError(f"Inception weights are missing: put {URL} at {path}, or name the file with "
                       "--fid_weights; the download failed", error) from error
    finally:
        socket.setdefaulttimeout(timeout)

    if not sha256(path).startswith(HASH):
        raise FIDError(f"{path} is damaged, its SHA-256 does not start with {HASH}: delete it")
    return path


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ---- One side of a comparison
# A folder is read as it is measured, an .npz whole: 50,000 images of 64 x 64 are 614 MB.

@dataclass
class Side:
    """What `scan` measured, or `open_source` found in a statistics file."""
    n: int | None           # images measured; None if a statistics file does not say
    mu: np.ndarray          # [D] float64
    sigma: np.ndarray       # [D, D] float64
    kept: np.ndarray        # [images kept, D] float32, for KID, precision and recall; [] of a file
    unreadable: list        # one string a file that could not be read
    weights: str            # SHA-256 prefix of the network behind it

    @classmethod
    def from_arrays(cls, arrays, dims, path):
        """The arrays of a statistics file."""
        try:
            return cls(
                n=int(arrays["n"]) if "n" in arrays else None,
                mu=arrays["mu"].astype(np.float64).reshape(dims),
                sigma=arrays["sigma"].astype(np.float64).reshape(dims, dims),
                kept=[],
                unreadable=[],
                weights=str(arrays.get("weights_sha256", "unknown")))
        except (TypeError, ValueError) as error:
            raise FIDError(f"{path}: not float statistics of --dims {dims}", error) from error

    def save(self, path):
        """Write mu and sigma (pytorch-fid's names), n and the weights' hash as an .npz, whole or not at all."""
        temporary = Path(f"{path}.tmp")
        try:
            with open(temporary, "wb") as file:
                np.savez(file, mu=self.mu, sigma=self.sigma, n=self.n, weights_sha256=self.weights)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def open_source(path, dims):
    """A folder -> the list of its image files; an .npz -> the list of its images, uint8 [1, 3, H, W] each, or its
    statistics, a Side. Images are 'arr_0' or 'images', [N, H, W, 3] or [N, H, W]; statistics are 'mu' and 'sigma', as
    pytorch-fid, EDM and `Side.save` write them. FIDError if it is none of these."""
    if os.path.isdir(path):
        images = list_images(path)
    else:
        arrays = read_npz(path)
        if "mu" in arrays and "sigma" in arrays:
            return Side.from_arrays(arrays, dims, path)

        pixels = arrays.get("arr_0", arrays.get("images", np.empty(0)))
        if pixels.ndim == 3:
            pixels = pixels[..., None]                      # [N, H, W, 1]
        if pixels.shape[3:] not in ((1,), (3,)):
            shapes = {name: array.shape for name, array in arrays.items()}
            raise FIDError(f"{path}: expected images as 'arr_0' or 'images', uint8 [N, H, W, 3] or [N, H, W], "
                           f"or statistics as 'mu' and 'sigma'; found {shapes or 'none of them'}")
        pixels = pixels.transpose(0, 3, 1, 2)               # [N, 1 or 3, H, W]
        images = list(check_images(pixels, f"{path}: ")[:, None])

    if len(images) < 2:
        raise FIDError(f"{path}: {len(images)} image(s), FID needs at least 2 and should have thousands")
    return images


def read_npz(path):
    """The arrays in an .npz that `open_source` knows, by name."""
    if not os.path.isfile(path):                # a pipe would wait for ever
        raise FIDError(f"{path}: expected a folder of images or an .npz file, but there is none")
    names = ("arr_0", "images", "mu", "sigma", "n", "weights_sha256")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist()
                       if member.filename.removesuffix(".npy") in names)
        if size > NPZ_LIMIT:
            raise MemoryError(f"{size / 1e9:.1f} GB unpacked, the most is {NPZ_LIMIT / 1e9:.1f}; give a folder, "
                              "which is read image by image")
        with np.load(path, allow_pickle=False) as file:
            return {name: np.asarray(file[name]) for name in names if name in file}
    except Exception as error:                  # a damaged file fails in many ways
        raise FIDError(f"cannot read {path} as a folder or an .npz of arrays", error) from error


def check_images(images, where=""):
    """uint8 [N, 3 or 1, H, W], tensor or ndarray -> tensor [N, 3, H, W]; FIDError for any other type or shape."""
    if str(images.dtype) not in ("uint8", "torch.uint8"):
        raise FIDError(f"{where}images are {images.dtype}: give uint8, 0 to 255 (from [-1, 1]: "
                       "x.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8))")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise FIDError(f"{where}images are {list(images.shape)}: give [N, 3, H, W] or [N, 1, H, W]")
    return torch.as_tensor(images).expand(-1, 3, -1, -1)


def list_images(folder):
    """Every image file under a folder, sorted; hidden names are skipped, linked folders inside it are not entered."""
    extensions = (".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
    found = []

    def fail(error):
        raise error

    for root, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if name[0] != "."]
        for name in files:
            if name.lower().endswith(extensions) and name[0] != ".":
                found.append(os.path.join(root, name))
    if not found:
        raise FIDError(f"{folder}: there are no image files ({', '.join(extensions)})")
    return sorted(found)


def read_image(path):
    """An image file -> uint8 RGB [1, 3, H, W], or a string that says why not."""
    if not os.path.isfile(path):                # a pipe named .png would wait for ever
        return f"{path}: not a file"
    formats = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")     # PostScript would run Ghostscript
    try:
        with Image.open(path, formats=formats) as image:    # refuses decompression bombs
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):           # 16 bits, which Pillow also opens as 32
                grey = np.asarray(image, np.int64)
                if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
                    return f"{path}: float or 32-bit pixels have no known range"
                grey = (grey + 128) // 257
                image = Image.fromarray(grey.astype(np.uint8))
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            pixels = np.array(image.convert("RGB"))         # [H, W, 3]
    except Exception as error:                  # decoders fail in many ways
        return f"{path}: {error!r}"
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def read_files(files, unreadable):
    """The images of files, uint8 [1, 3, H, W], in order, decoded by threads, 16 files at a time.
    What cannot be read is added to the list `unreadable`; FIDError when that is more than 1%."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), 16):
            for image in pool.map(read_image, files[start:start + 16]):
                if isinstance(image, str):
                    unreadable.append(image)
                else:
                    yield image
                if len(unreadable) > 0.01 * len(files):
                    raise FIDError(f"more than 1% of {len(files)} images are unreadable: {'; '.join(unreadable[:3])}")


# ---- Features and statistics
# Features are 32-bit; the sums behind mean and covariance are 64-bit.

def prepare(images):
    """uint8 [B, 3, H, W] -> float32 [B, 3, 299, 299] in [-1, 1]; never resized as uint8, never antialiased."""
    x = images.to(memory_format=torch.channels_last).float() / 255
    x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
    return 2 * x - 1


def batches(images, model, batch_size):
    """Features of uint8 images [1, 3, H, W] of any sizes, in order, as float32 arrays [up to batch_size, D]."""
    images = iter(images)
    device = next(model.parameters()).device
    # a CPU gets small activations back from the allocator, and fresh pages for large ones, at half the speed
    batch_size = batch_size or (4 if device.type == "cpu" else 64)
    while group := list(islice(images, batch_size)):
        x = [prepare(image.to(device)) for image in group]
        yield model(torch.cat(x)).cpu().numpy()


def features(images, model, batch_size=None):
    """uint8 [N, 3 or 1, H, W] (tensor or ndarray, 0 to 255) -> float32 ndarray [N, D]. FIDError if not uint8."""
    images = check_images(images).split(1)
    return np.concatenate(list(batches(images, model, batch_size)))


class Moments:
    """Mean and covariance of rows that arrive in pieces: running sums in float64, O(D^2) memory.
    They are sums of differences to the first row, so that nothing is lost far from zero."""

    def __init__(self):
        self.n = self.sum = self.outer = 0

    def update(self, rows):                                     # [B, D]
        if self.n == 0:
            self.origin = rows[0].astype(np.float64)
        rows = rows - self.origin
        self.n += len(rows)
        self.sum += rows.sum(0)                                 # [D]
        self.outer += rows.T @ rows                             # [D, D]

    def result(self):
        """(mu [D], sigma [D, D]), sigma with N - 1 as np.cov. FIDError below 2 rows: one has no covariance."""
        if self.n < 2:
            raise FIDError(f"{self.n} image(s): FID needs at least 2 and should have thousands")
        mean = self.sum / self.n
        scatter = self.outer - np.outer(self.sum, mean)
        return self.origin + mean, scatter / (self.n - 1)


def statistics(features):
    """Features [N >= 2, D] -> (mu [D], sigma [D, D]), float64. FIDError if N < 2."""
    moments = Moments()
    moments.update(features)
    return moments.result()


def choose(n, num):
    """The indices of `num` of n items, ascending: spread at random, so that sorted classes are all there, yet the same
    in every run and version (np.random.RandomState is frozen). All if num is None."""
    return np.sort(np.random.RandomState(0).permutation(n)[:num])


def scan(images, model, num=None, batch_size=None, keep=5000, name="images"):
    """One pass over a list of image files or of images, uint8 [1, 3, H, W] -> Side; memory does not grow with N.
    num: measure this many (`choose`). keep: features kept for KID, precision and recall; 5,000 are 41 MB.
    name: what stderr calls them, where it says how many are done and how fast."""
    images = [images[i] for i in choose(len(images), num)]
    n = len(images)
    wanted = np.isin(np.arange(n), choose(n, keep))             # [n] bool
    unreadable = []
    if isinstance(images[0], str):
        images = read_files(images, unreadable)

    moments = Moments()
    kept = []
    start = told = time.perf_counter()

    def tell():
        speed = moments.n / (time.perf_counter() - start)
        with suppress(OSError):                 # nobody reads it, or the disk is full
            print(f"{name}: {moments.n} of {n}, {speed:.1f} a second", file=sys.stderr, flush=True)

    for x in batches(images, model, batch_size):                # [B, D]
        kept.append(x[wanted[moments.n:moments.n + len(x)]])
        moments.update(x)
        if time.perf_counter() - told > 10:
            tell()
            told = time.perf_counter()
    tell()

    mu, sigma = moments.result()
    return Side(moments.n, mu, sigma, np.concatenate(kept), unreadable, model.weights_sha256)


# ---- Distances
# All in float64 on the CPU. x and y are features [N, D]; what is N x N is computed 256 rows at a time.

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), Dowson & Landau 1982: mu [D], sigma [D, D] -> float.
    With S1 = A A^T, S1 S2 has the eigenvalues of the symmetric A^T S2 A: no complex square root of a matrix, nothing
    added to a diagonal, and any rank will do (fewer images than D). FIDError if one is not finite."""
    arrays = [np.asarray(array, np.float64) for array in (mu1, sigma1, mu2, sigma2)]
    if not all(np.isfinite(array).all() for array in arrays):
        raise FIDError("the statistics hold numbers that are not finite: were the features?")
    mu1, sigma1, mu2, sigma2 = arrays

    w, v = np.linalg.eigh(sigma1)                               # [D] ascending, [D, D]
    real = w > w.max() * len(w) * np.finfo(float).eps           # the others are rounding errors
    a = v[:, real] * np.sqrt(w[real])                           # [D, rank]
    a = a[:, ::-1]              # the largest first: LAPACK then keeps the small ones to 1e-13, else to 1e-7
    w = np.linalg.eigvalsh(a.T @ sigma2 @ a)                    # [rank]
    root = np.sqrt(w.clip(min=0)).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root)


def kid(x, y, halves=50):
    """Features [M >= 4, D], [N >= 4, D] -> (KID, its spread): the unbiased U-statistic of MMD^2 over all rows
    (Gretton et al. 2012, lemma 6) with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, arXiv:1801.01401).
    Its mean is 0 for equal distributions at any N, so it can be negative. The spread is its standard deviation over
    random halves of both sides, an estimate of the standard error of the score itself (delete-half jackknife,
    Shao & Wu 1989). FIDError below 4 rows or if D differs."""
    x, y = check_features(x, y, least=4)
    rng = np.random.RandomState(0)

    def members(n):
        random_halves = [rng.permutation(n) < n // 2 for _ in range(halves)]
        return np.stack([np.ones(n), *random_halves], 1)        # [n, 1 + halves]; column 0: all

    def mean_kernel(x, y, in_x, in_y, same):
        total = 0
        for rows, product in blocks(x, y):
            k = product / x.shape[1] + 1
            k = k * k * k                                       # numpy's k**3 is 6 times slower
            if same:
                np.fill_diagonal(k[:, rows.start:], 0)          # i != j: what makes it unbiased
            total += (in_x[rows] * (k @ in_y)).sum(0)
        others = in_y.sum(0) - 1 if same else in_y.sum(0)
        return total / (in_x.sum(0) * others)                   # [1 + halves]

    in_x = members(len(x))
    in_y = members(len(y))
    xx = mean_kernel(x, x, in_x, in_x, same=True)
    yy = mean_kernel(y, y, in_y, in_y, same=True)
    xy = mean_kernel(x, y, in_x, in_y, same=False)
    score = xx + yy - 2 * xy
    return float(score[0]), float(score[1:].std(ddof=1))


def precision_recall(real, fake, k=3):
    """Features [M > k, D], [N > k, D] -> (precision, recall) in [0, 1] (Kynkaanniemi et al. 2019, arXiv:1904.06991).
    Precision is the share of fake rows within the reach of some real row, recall the share of real rows within the
    reach of some fake row; a row reaches as far as its k-th nearest neighbour on its own side.
    FIDError where a side has no more than k rows or D differs."""
    real, fake = check_features(real, fake, least=k + 1)

    def distances(x, y):                                        # squared, [256, len(y)] at a time
        xx = np.square(x).sum(1)
        yy = np.square(y).sum(1)
        for rows, product in blocks(x, y):
            size = xx[rows, None] + yy
            d = size - 2 * product
            yield np.where(d < 1e-10 * size, 0, d)              # no rounding errors for equal rows

    def covered(x, y):
        nearest = [np.partition(d, k)[:, k] for d in distances(y, y)]       # itself is the 0-th
        reach = np.concatenate(nearest)                         # [len(y)]
        within = [(d <= reach).any(1) for d in distances(x, y)]
        return float(np.concatenate(within).mean())

    return covered(fake, real), covered(real, fake)


def check_features(x, y, least):
    """Two arrays [N, D] -> the same in float64; FIDError if one has fewer than `least` rows or D differs."""
    x = np.asarray(x, np.float64)
    y = np.asarray(y, np.float64)
    if x.ndim != 2 or x.shape[1:] != y.shape[1:] or min(len(x), len(y)) < least:
        raise FIDError(f"features {list(x.shape)}, {list(y.shape)}: expected [N, D], N at least {least}")
    return x, y


def blocks(x, y):
    """The product x y^T, 256 rows at a time: (which rows, a slice; the product [256, N])."""
    for start in range(0, len(x), 256):
        rows = slice(start, start + 256)
        yield rows, x[rows] @ y.T


# ---- Command line
# Two sides in; sentences, notes and one line of JSON out.

def compare(real, fake):
    """Two Sides -> scores by name, None where a side has fewer than 4 images for them, and notes: sentences that a
    reader of the scores must know."""
    notes = []
    scores = dict(
        fid=frechet_distance(real.mu, real.sigma, fake.mu, fake.sigma),
        kid=None, kid_spread=None, precision=None, recall=None, notes=notes)
    if min(len(real.kept), len(fake.kept)) >= 4:
        scores["kid"], scores["kid_spread"] = kid(real.kept, fake.kept)
        scores["precision"], scores["recall"] = precision_recall(real.kept, fake.kept)
    else:
        notes.append("KID, precision and recall need 4 images a side; a statistics file holds none")

    known = {real.n, fake.n} - {None}
    if known and min(known) < 2048:
        notes.append(f"FID at {min(known)} images is mostly bias: a perfect generator would score about 55 at 512, "
                     "34 at 1000, 15 at 2000 (dims 2048, Gaussian model); compare only at equal n, or KID")
    if len(known) == 2:
        notes.append(f"n differs ({real.n} and {fake.n}): the bias depends on both")
    if len({real.weights, fake.weights} - {"unknown"}) == 2:
        notes.append(f"the sides have different weights ({real.weights}, {fake.weights})")
    return scores


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="FID, KID, precision and recall of two sets of images.")
    p.add_argument("real",
                   help="folder of images, .npz of uint8 images ('arr_0' or 'images') or of statistics")
    p.add_argument("fake", nargs="?",
                   help="the same, for the images to judge; left out with --save_stats")
    p.add_argument("--dims", "--fid_dims", type=int, default=2048, choices=Inception.last_layer,
                   help="features; 2048 is the standard")
    p.add_argument("--weights", "--fid_weights",
                   help="Inception weights; default: torch's hub cache, else a download")
    p.add_argument("--num", type=int,
                   help="measure this many images a side, spread over all; default: all")
    p.add_argument("--batch_size", type=int,
                   help="images at once (GPU 64, CPU 4); no score depends on it")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda, cuda:1, mps")
    p.add_argument("--save_stats", metavar="OUT.npz",
                   help="write mean and covariance of the one side")
    args = p.parse_args(argv)

    if args.batch_size is not None and args.batch_size < 1:
        p.error("--batch_size must be at least 1")
    if args.num is not None and args.num < 2:
        p.error("--num must be at least 2")
    if (args.fake is None) == (args.save_stats is None):
        p.error("give two sides to compare, or one side and --save_stats OUT.npz")
    if args.save_stats is not None:
        out = Path(args.save_stats).resolve()
        if out.exists() or not out.parent.is_dir():
            p.error(f"--save_stats {out}: expected the name of a new file, in a folder that exists")
    return args


def measure(args):
    """What the command line asks for, as one dict: scores, notes and the whole protocol."""
    paths = dict(real=args.real, fake=args.fake)
    sides = {name: open_source(path, args.dims) for name, path in paths.items() if path is not None}
    if args.save_stats and isinstance(sides["real"], Side):
        raise FIDError(f"{args.real} holds statistics already: give images to compute them from")

    model = None
    for name, side in sides.items():
        if not isinstance(side, Side):
            model = model or load_inception(args.weights, args.dims, args.device)
            sides[name] = scan(side, model, args.num, args.batch_size, name=name)

    if args.save_stats:
        sides["real"].save(args.save_stats)
        result = dict(saved=args.save_stats, notes=[])
    else:
        result = compare(**sides)

    for name, side in sides.items():
        result[name] = dict(
            path=paths[name],
            n=side.n,
            kept=len(side.kept),
            unreadable=len(side.unreadable),
            weights=side.weights)
        if side.unreadable:
            result["notes"].append(f"{name} has files that cannot be read: {'; '.join(side.unreadable[:3])}")
    return dict(
        **result,
        dims=args.dims,
        resize=RESIZE,
        kernel="(x.y/D + 1)^3, unbiased",
        k=3,
        weights_file=model and model.weights_file,
        weights_sha256=model and model.weights_sha256)


def main(argv=None):
    args = parse_args(argv)
    try:
        result = measure(args)
    except (FIDError, OSError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = "out of memory: lower --batch_size"
        print(f"fid.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

    scores = [f"{name} {value:.5g}" for name, value in result.items() if isinstance(value, float)]
    if scores:                                  # none with --save_stats
        print("  ".join(scores))
    for note in result["notes"]:
        print(f"note: {note}")
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.stdout is not None:                  # a file's name may hold letters that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    main()
