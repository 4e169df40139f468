"""fid.py against oracles: closed forms, brute force, scipy.linalg.sqrtm, torchvision pooled by hand. No network."""

import json
import os
import pickle
import sys
import time
import zipfile

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import fid  # noqa: E402

REAL = os.path.join(ROOT, "..", "shared", "weights", "fid_inception_2015_upto_mixed6e.pth")


def gaussian_rows(n, d, seed, scale=1.0):
    rng = np.random.RandomState(seed)
    return rng.randn(n, d) @ rng.randn(d, d) / d**0.5 * scale + rng.randn(d)


def pictures(n, size=32, seed=0):
    """uint8 [n, 3, size, size]: smooth random pictures, so that features of different images differ."""
    generator = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.rand(n, 3, 5, 5, generator=generator), size=size, mode="bicubic")
    return x.mul(255).round().clamp(0, 255).to(torch.uint8)


def write_pictures(folder, n, seed=0):
    os.makedirs(folder, exist_ok=True)
    for i, x in enumerate(pictures(n, seed=seed)):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(os.path.join(folder, f"{i:04d}.png"))
    return str(folder)


@pytest.fixture(scope="module")
def small_weights(tmp_path_factory):
    """A weights file for dims 64 and 192: random, reproducible, quick."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(fid.Inception(192).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def small(small_weights):
    return fid.load_inception(small_weights, dims=64)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No cached weights and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(fid, "URL", "http://127.0.0.1:9/" + os.path.basename(fid.URL))


def scan(path, model, **options):
    """One side, measured as the command line does."""
    return fid.scan(fid.open_source(path, model.dims), model, **options)


def cli(capsys, *argv):
    """Run main; return (exit code, stdout, stderr)."""
    code = 0
    try:
        fid.main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


# ---- distances

def test_fid_of_a_set_with_itself_is_zero():
    for n, d in ((300, 64), (20, 64), (2, 64), (10, 200)):
        mu, sigma = fid.statistics(gaussian_rows(n, d, 0))
        assert abs(fid.frechet_distance(mu, sigma, mu, sigma)) < 1e-9


def test_fid_of_a_set_with_itself_is_zero_when_variances_span_fourteen_orders():
    rng = np.random.RandomState(0)
    basis = np.linalg.qr(rng.randn(256, 256))[0]
    mu, sigma = fid.statistics(rng.randn(500, 256) * np.logspace(1, -6, 256) @ basis)
    assert abs(fid.frechet_distance(mu, sigma, mu, sigma)) < 1e-9


def test_fid_equals_sqrtm_where_sqrtm_is_stable():
    a, b = fid.statistics(gaussian_rows(500, 24, 1)), fid.statistics(gaussian_rows(400, 24, 2, scale=1.5))
    root = scipy.linalg.sqrtm(a[1] @ b[1])
    expected = ((a[0] - b[0]) ** 2).sum() + np.trace(a[1] + b[1] - 2 * root.real)
    assert abs(fid.frechet_distance(*a, *b) - expected) < 1e-9


def test_fid_of_diagonal_gaussians_is_the_closed_form():
    s1, s2, mu = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.25]), np.array([1.0, -2.0, 0.5])
    expected = (mu**2).sum() + ((np.sqrt(s1) - np.sqrt(s2)) ** 2).sum()
    assert fid.frechet_distance(mu, np.diag(s1), 0 * mu, np.diag(s2)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [(10, 12), (2, 2), (10, 200), (200, 10)])
def test_fid_of_fewer_images_than_dimensions_is_exact(n):
    x, y = gaussian_rows(n[0], 50, 3), gaussian_rows(n[1], 50, 4)
    xc, yc = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (x, y))         # tr (S1 S2)^1/2 = nuclear norm of xc yc^T
    root = np.linalg.svd(xc @ yc.T, compute_uv=False).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + (xc**2).sum() + (yc**2).sum() - 2 * root
    # an eigenvalue that is zero comes out as 1e-16, its root as 1e-8
    assert abs(fid.frechet_distance(*fid.statistics(x), *fid.statistics(y)) - expected) < 1e-5
    assert abs(fid.frechet_distance(*fid.statistics(y), *fid.statistics(x)) - expected) < 1e-5


def test_equal_images_have_no_covariance_and_a_distance():
    mu, sigma = fid.statistics(np.ones((5, 8)))
    assert fid.frechet_distance(mu, sigma, mu + 2, sigma) == pytest.approx(32)


def test_one_image_is_refused_in_a_sentence():
    with pytest.raises(fid.FIDError, match="at least 2"):
        fid.statistics(np.ones((1, 8)))


def test_statistics_that_are_not_finite_are_refused():
    mu, sigma = fid.statistics(gaussian_rows(9, 4, 0))
    with pytest.raises(fid.FIDError, match="not finite"):
        fid.frechet_distance(mu * np.nan, sigma, mu, sigma)


def test_streamed_statistics_equal_numpy_even_far_from_zero():
    x = gaussian_rows(101, 12, 5) + 1e6
    moments = fid.Moments()
    for piece in np.split(x, [1, 3, 50, 99]):
        moments.update(piece)
    mu, sigma = moments.result()
    np.testing.assert_allclose(mu, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), rtol=0, atol=1e-8)
    np.testing.assert_allclose(fid.statistics(x)[1], sigma, rtol=0, atol=1e-8)


def test_kid_is_the_mean_over_all_pairs_of_different_rows():
    x, y = gaussian_rows(300, 5, 6), gaussian_rows(270, 5, 7)    # more rows than are computed at a time

    def kernel(a, b):
        return (a @ b.T / 5 + 1) ** 3

    def mean_of_pairs(a):
        return kernel(a, a)[~np.eye(len(a), dtype=bool)].mean()

    expected = mean_of_pairs(x) + mean_of_pairs(y) - 2 * kernel(x, y).mean()
    assert fid.kid(x, y)[0] == pytest.approx(expected, rel=1e-10)


def test_kid_is_unbiased_at_few_images_and_its_spread_is_its_standard_error():
    rng = np.random.RandomState(0)
    scores = np.array([fid.kid(rng.randn(40, 4), rng.randn(40, 4) + 0.5) for _ in range(200)])
    many = fid.kid(rng.randn(4000, 4), rng.randn(4000, 4) + 0.5)[0]
    error = scores[:, 0].std()
    assert abs(scores[:, 0].mean() - many) < 4 * error / 200**0.5 + 0.03
    assert 0.6 < np.median(scores[:, 1]) / error < 1.6


def test_precision_and_recall_of_points_on_a_line_are_those_by_hand():
    real = np.array([[0.0], [1.0], [2.0], [3.0]])                # reach to the 1st neighbour: 1 each, covers [-1, 4]
    fake = np.array([[3.5], [4.5], [10.0], [30.0]])              # reaches 1, 1, 5.5, 20: covers [2.5, 15.5], [10, 50]
    assert fid.precision_recall(real, fake, k=1) == (0.25, 0.25)  # of fake only 3.5; of real only 3.0
    # k = 3 of four points: the farthest other; real covers [-3, 6], fake 3.5 + 26.5 covers everything
    assert fid.precision_recall(real, fake, k=3) == (0.5, 1.0)


def test_a_set_covers_itself_also_where_images_repeat():
    x = np.repeat(gaussian_rows(9, 700, 10) + 50, 6, axis=0).astype(np.float32)
    assert fid.precision_recall(x, x[::-1]) == (1.0, 1.0)
    assert fid.precision_recall(x, x + 1) == (0.0, 0.0)


# ---- the network

def torchvision_pooled_by_hand():
    """torchvision's network and its forward; nine pool branches once more, from the nine neighbours of each pixel."""
    def neighbours(x, beyond):                                   # [9, B, C, H, W]
        height, width = x.shape[2:]
        x = F.pad(x, (1, 1, 1, 1), value=beyond)
        return torch.stack([x[:, :, i:i + height, j:j + width] for i in range(3) for j in range(3)])

    def average(x):
        return neighbours(x, float("nan")).nanmean(0)

    def maximum(x):
        return neighbours(x, -float("inf")).amax(0)

    def pool_again(block, pool):
        def hook(block, inputs, out):
            pooled = block.branch_pool(pool(inputs[0]))
            return torch.cat([out[:, :-pooled.shape[1]], pooled], 1)
        block.register_forward_hook(hook)

    net = torchvision.models.inception_v3(weights=None, aux_logits=False, num_classes=1008, init_weights=False)
    for name in "5b 5c 5d 6b 6c 6d 6e 7b".split():
        pool_again(getattr(net, f"Mixed_{name}"), average)
    pool_again(net.Mixed_7c, maximum)
    net.fc = torch.nn.Identity()
    return net.eval()


@pytest.fixture(scope="module")
def calibrated():
    """(torchvision's network, its state with 1008 outputs): random, BatchNorm calibrated on images, in eval mode."""
    torch.manual_seed(0)
    net = torchvision_pooled_by_hand()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None                               # the statistics are a plain average
            torch.nn.init.uniform_(module.weight, 0.75, 1.25)
            torch.nn.init.normal_(module.bias, std=0.1)
            module.reset_running_stats()
    with torch.no_grad():
        net.train()(fid.prepare(torch.cat([pictures(12, size=40), noise(4)])))
    state = {**net.state_dict(), "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    return net.eval(), state


def noise(n):
    return torch.randint(0, 256, (n, 3, 40, 40), generator=torch.Generator().manual_seed(2)).to(torch.uint8)


def test_features_equal_those_of_torchvision_pooled_by_hand(calibrated, tmp_path):
    net, state = calibrated
    torch.save(state, tmp_path / "w.pth")
    images = pictures(4, size=24, seed=1)
    x = 2 * F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear", align_corners=False) - 1
    unfolded = fid.Inception(2048)
    unfolded.load(tmp_path / "w.pth")
    folded = fid.load_inception(tmp_path / "w.pth")
    with torch.no_grad():
        theirs = net(x)
        truth = net.double()(x.double())
        net.float()
        assert (truth - truth.mean(0)).abs().max() > 0.1         # else everything would agree
        assert (unfolded.double()(x.double()) - truth).abs().max() < 1e-9
    ours = torch.from_numpy(fid.features(images, folded, batch_size=3))
    assert ours.shape == (4, 2048) and ours.dtype == torch.float32
    # a random network magnifies 32-bit rounding: ours must be as near to the 64-bit features as torchvision's own
    assert (ours - truth).abs().max() < 2 * (theirs - truth).abs().max() < 1e-3


def test_the_keys_are_torchvisions(calibrated):
    _, state = calibrated
    features_only = {k: v for k, v in state.items() if not k.startswith("fc.")}
    assert len(state) == 566                                     # as many tensors as the reference file
    fid.Inception(2048).load_state_dict(features_only, strict=True)


def test_smaller_dims_are_the_layers_of_the_same_network(calibrated, tmp_path):
    net, state = calibrated
    torch.save(state, tmp_path / "w.pth")
    images, seen = pictures(2), {}
    for dims, layer in ((64, "maxpool1"), (192, "maxpool2"), (768, "Mixed_6e")):
        getattr(net, layer).register_forward_hook(lambda m, i, o, d=dims: seen.update({d: o.mean((2, 3)).numpy()}))
    with torch.no_grad():
        net(fid.prepare(images))
    for dims, expected in seen.items():
        ours = fid.features(images, fid.load_inception(tmp_path / "w.pth", dims))
        assert np.abs(ours - expected).max() < 1e-4, dims
    assert sorted(seen) == [64, 192, 768]


def test_features_do_not_depend_on_batch_size_or_the_callers_autocast_and_tf32(small):
    images, inside = pictures(5), []
    expected = fid.features(images, small, batch_size=5)
    convolutions = [torch.backends.cudnn.conv, torch.backends.mkldnn.conv]
    before = [conv.fp32_precision for conv in convolutions]

    def look(*_):                                                # few CPUs obey "bf16": see what is set inside
        inside.append([conv.fp32_precision for conv in convolutions])

    handle = small.Conv2d_2a_3x3.register_forward_pre_hook(look)
    try:
        for conv, precision in zip(convolutions, ("tf32", "bf16")):
            conv.fp32_precision = precision
        with torch.autocast("cpu", torch.bfloat16):
            np.testing.assert_allclose(fid.features(images, small, batch_size=2), expected, atol=1e-6)
        assert inside == [["ieee", "ieee"]] * 3
        assert [conv.fp32_precision for conv in convolutions] == ["tf32", "bf16"]
    finally:
        handle.remove()
        for conv, precision in zip(convolutions, before):
            conv.fp32_precision = precision


def test_images_that_are_not_uint8_are_refused_with_the_remedy(small):
    with pytest.raises(fid.FIDError, match="uint8"):
        fid.features(pictures(2).float(), small)
    with pytest.raises(fid.FIDError, match=r"\[N, 3, H, W\]"):
        fid.features(pictures(2).permute(0, 2, 3, 1), small)


def test_0_to_255_arrives_as_minus_1_to_1():
    x = fid.prepare(torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 8, 8))
    assert x.shape == (2, 3, 299, 299)
    assert (x[0] + 1).abs().max() < 1e-6 and (x[1] - 1).abs().max() < 1e-6         # two roundings of interpolation


def test_grey_is_three_equal_channels_and_arrays_equal_tensors(small):
    grey = pictures(3)[:, :1]
    rgb = grey.repeat(1, 3, 1, 1)
    np.testing.assert_allclose(fid.features(grey.numpy(), small), fid.features(rgb, small), atol=1e-6)
    assert fid.features(rgb[:0], small).shape == (0, 64)


@pytest.mark.skipif(not os.path.isfile(REAL), reason="the real weights are not here")
def test_with_real_weights_features_equal_the_oracles_and_more_noise_is_farther():
    model, net = fid.load_inception(REAL, 768), torchvision_pooled_by_hand()
    net.load_state_dict(torch.load(REAL, weights_only=True), strict=False)
    x, expected = pictures(24, seed=3), []
    net.Mixed_6e.register_forward_hook(lambda block, inputs, out: expected.append(out.mean((2, 3))))
    with torch.no_grad():
        net(fid.prepare(x[:4]))
    assert np.abs(fid.features(x[:4], model) - expected[0].numpy()).max() < 1e-5

    noisy = [(x + torch.randn(x.shape, generator=torch.Generator().manual_seed(4)) * s).clamp(0, 255).to(torch.uint8)
             for s in (0, 15, 60)]
    real = fid.statistics(fid.features(pictures(24, seed=5), model))
    scores = [fid.frechet_distance(*real, *fid.statistics(fid.features(v, model))) for v in noisy]
    assert 0 < scores[0] < scores[1] < scores[2]


# ---- weights

def test_missing_weights_are_one_sentence_and_exit_2(offline, tmp_path, capsys):
    a = write_pictures(tmp_path / "a", 3)
    code, out, err = cli(capsys, a, a)
    assert code == 2 and not out
    assert "--fid_weights" in err and "pt_inception-2015-12-05-6726825d.pth" in err and "Traceback" not in err


def test_weights_in_torchs_hub_cache_are_found_and_checked(offline, tmp_path, small_weights, monkeypatch):
    cached = tmp_path / "hub" / "hub" / "checkpoints" / os.path.basename(fid.URL)
    cached.parent.mkdir(parents=True)
    good = open(small_weights, "rb").read()
    for damaged in (b"", good):                                  # no download has this hash
        cached.write_bytes(damaged)
        with pytest.raises(fid.FIDError, match="damaged"):
            fid.load_inception(dims=64)
    monkeypatch.setattr(fid, "HASH", fid.sha256(small_weights)[:8])
    assert fid.load_inception(dims=64).weights_file == cached.name


def test_weights_that_stop_early_serve_smaller_dims_and_say_so_for_larger(small_weights):
    assert fid.load_inception(small_weights, dims=64).dims == 64
    with pytest.raises(fid.FIDError, match="dims 768.*Mixed_5b"):
        fid.load_inception(small_weights, dims=768)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_hostile_pickles_are_refused_and_not_run(tmp_path, small):
    ran = str(tmp_path / "ran")
    torch.save({"x": Bomb(ran)}, tmp_path / "w.pth")
    (tmp_path / "p.pth").write_bytes(pickle.dumps(Bomb(ran), protocol=2))
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("w.pth", "p.pth", "empty.pth"):
        with pytest.raises(fid.FIDError) as caught:
            fid.load_inception(tmp_path / name, 64)
        assert "\n" not in str(caught.value)
    np.savez(tmp_path / "images.npz", arr_0=np.array([Bomb(ran)], object))
    np.savez(tmp_path / "stats.npz", mu=np.array([Bomb(ran)], object), sigma=np.zeros((64, 64)))
    for name in ("images.npz", "stats.npz"):
        with pytest.raises(fid.FIDError, match="allow_pickle"):
            fid.open_source(tmp_path / name, 64)
    assert not os.path.exists(ran)


def test_torchvisions_imagenet_weights_are_not_taken_for_the_reference(tmp_path):
    torch.save({**fid.Inception(64).state_dict(), "AuxLogits.conv0.conv.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(fid.FIDError, match="ImageNet"):
        fid.load_inception(tmp_path / "w.pth", 64)


# ---- images in

def solid(path, mode, color, size=(4, 4), **save):
    Image.new(mode, size, color).save(path, **save)
    return fid.read_image(str(path))


@pytest.mark.parametrize("name, mode, color, expected", [
    ("grey.png", "L", 77, (77, 77, 77)), ("bit.png", "1", 1, (255, 255, 255)),
    ("deep.png", "I;16", 65535, (255, 255, 255)), ("half.tif", "I;16", 32896, (128, 128, 128)),
    ("clear.png", "RGBA", (9, 9, 9, 0), (255, 255, 255)), ("half.png", "RGBA", (0, 0, 0, 128), (127, 127, 127)),
    ("la.png", "LA", (50, 255), (50, 50, 50)), ("ink.tif", "CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ("rgb.PNG", "RGB", (1, 2, 3), (1, 2, 3)), ("rgb.bmp", "RGB", (1, 2, 3), (1, 2, 3)),
    ("rgb.ppm", "RGB", (1, 2, 3), (1, 2, 3)), ("rgb.webp", "RGB", (0, 0, 0), (0, 0, 0)),
])
def test_every_mode_becomes_rgb(tmp_path, name, mode, color, expected):
    x = solid(tmp_path / name, mode, color)
    assert x.shape == (1, 3, 4, 4) and x.dtype == torch.uint8
    assert tuple(x[0, :, 0, 0].tolist()) == expected


def test_a_palette_with_a_transparent_colour_is_shown_on_white(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=1)
    assert fid.read_image(str(tmp_path / "opaque.png"))[0, :, 0, 0].tolist() == [40, 50, 60]
    assert fid.read_image(str(tmp_path / "clear.png"))[0, :, 0, 0].tolist() == [255, 255, 255]


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert solid(tmp_path / "r.jpg", "RGB", (9, 9, 9), size=(6, 4), exif=exif).shape == (1, 3, 6, 4)


def test_a_folder_is_read_sorted_recursive_without_hidden_files_and_link_loops(tmp_path):
    write_pictures(tmp_path / "b" / "deep", 2)
    solid(tmp_path / "A.JPG", "RGB", (1, 2, 3))
    solid(tmp_path / ".hidden.png", "RGB", (1, 2, 3))
    write_pictures(tmp_path / ".git", 1)
    (tmp_path / "notes.txt").write_text("not an image")
    os.symlink(tmp_path, tmp_path / "b" / "loop")                # links to folders are not entered
    found = [os.path.relpath(f, tmp_path) for f in fid.list_images(str(tmp_path))]
    assert found == ["A.JPG", os.path.join("b", "deep", "0000.png"), os.path.join("b", "deep", "0001.png")]


def test_unreadable_files_are_counted_and_named_and_more_than_one_percent_is_refused(tmp_path, small):
    folder = tmp_path / "a"
    write_pictures(folder, 100)
    (folder / "0050.png").write_bytes((folder / "0050.png").read_bytes()[:200])
    side = scan(folder, small)
    assert side.n == 99 and len(side.kept) == 99 and len(side.unreadable) == 1 and "0050.png" in side.unreadable[0]
    (folder / "0051.png").write_bytes(b"")
    with pytest.raises(fid.FIDError, match="more than 1%.*0051.png"):
        scan(folder, small)


def test_pipes_bombs_and_float_pixels_are_unreadable_and_do_not_hang(tmp_path, monkeypatch):
    solid(tmp_path / "big.png", "L", 0, size=(40, 40))
    solid(tmp_path / "float.tif", "F", 0.5)
    os.symlink(tmp_path / "gone", tmp_path / "broken.png")
    names = ["big.png", "float.tif", "broken.png"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        names.append("pipe.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)          # Pillow refuses twice as many
    start = time.time()
    assert all(isinstance(fid.read_image(str(tmp_path / name)), str) for name in names)
    assert time.time() - start < 5


def test_mixed_sizes_equal_one_by_one(tmp_path, small):
    images = [pictures(1, size=s, seed=s)[0] for s in (20, 32, 32, 310, 57)]
    for i, x in enumerate(images):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    expected = np.concatenate([fid.features(x[None], small) for x in images])
    np.testing.assert_allclose(scan(tmp_path, small, batch_size=3).kept, expected, atol=1e-6)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["arr_0", "images"])
def test_npz_images_equal_the_same_tensor(tmp_path, small, save, name):
    images = pictures(7)
    save(tmp_path / "x.npz", **{name: images.permute(0, 2, 3, 1).contiguous().numpy(), "labels": np.arange(7)})
    side = scan(tmp_path / "x.npz", small, batch_size=4)
    np.testing.assert_allclose(side.kept, fid.features(images, small), atol=1e-6)
    save(tmp_path / "grey.npz", **{name: images[:, 0].contiguous().numpy()})
    grey = scan(tmp_path / "grey.npz", small).kept
    np.testing.assert_allclose(grey, fid.features(images[:, :1], small), atol=1e-6)


@pytest.mark.parametrize("arrays", [
    dict(arr_0=np.zeros((3, 8, 8, 3), np.float32)), dict(arr_0=np.zeros((3, 3, 8, 8), np.uint8)),
    dict(arr_0=np.zeros((3, 8), np.uint8)), dict(x=np.zeros((3, 8, 8, 3), np.uint8)),
    dict(arr_0=np.zeros((3, 0, 8, 3), np.uint8)), dict(arr_0=np.zeros((1, 8, 8, 3), np.uint8)),
    dict(arr_0=np.zeros((0, 8, 8, 3), np.uint8)),
])
def test_an_npz_of_something_else_is_refused_in_a_sentence(tmp_path, small, arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(fid.FIDError):
        scan(tmp_path / "x.npz", small)


def test_damaged_npz_files_are_refused_in_a_sentence(tmp_path, small):
    whole = tmp_path / "x.npz"
    np.savez(whole, arr_0=np.random.RandomState(0).randint(0, 256, (9, 8, 8, 3)).astype(np.uint8))
    data = whole.read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[:len(data) // 2])
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "flip.npz").write_bytes(data[:600] + bytes([data[600] ^ 1]) + data[601:])
    with zipfile.ZipFile(tmp_path / "lies.npz", "w") as z:                 # announces 900 million images
        z.writestr("arr_0.npy", b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|u1', 'fortran_order': False, "
                   b"'shape': (900000000, 32, 32, 3), }".ljust(117) + b"\n" + b"abc")
    for name in ("cut.npz", "text.npz", "flip.npz", "lies.npz"):
        with pytest.raises(fid.FIDError):
            scan(tmp_path / name, small)


def test_an_npz_that_unpacks_to_more_than_memory_is_refused_before_it_is_read(tmp_path, small):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY")
        archive.getinfo("arr_0.npy").file_size = 12 * 10**9      # what the directory says of a real one
    with pytest.raises(fid.FIDError, match="bomb.npz.* 12.0 GB unpacked.*give a folder"):
        scan(tmp_path / "bomb.npz", small)
    images = pictures(4).permute(0, 2, 3, 1).contiguous().numpy()
    np.savez(tmp_path / "good.npz", arr_0=images, labels=np.zeros(10))
    with zipfile.ZipFile(tmp_path / "good.npz", "a") as archive:
        archive.getinfo("labels.npy").file_size = 12 * 10**9
        archive.writestr("note.txt", "so that the directory is written again")
    assert scan(tmp_path / "good.npz", small).n == 4


def test_num_and_kept_features_are_spread_over_all_and_the_same_each_time(small):
    assert fid.choose(10, None).tolist() == fid.choose(10, 99).tolist() == list(range(10))
    picked = fid.choose(1000, 100)
    assert len(set(picked)) == 100 and (np.diff(picked) > 0).all() and picked[0] < 100 and picked[-1] > 900
    assert fid.choose(1000, 100).tolist() == picked.tolist()
    images = pictures(11)
    side = fid.scan(list(images[:, None]), small, batch_size=3, keep=4)
    all_features = fid.features(images, small)
    np.testing.assert_allclose(side.kept, all_features[fid.choose(11, 4)], atol=1e-6)
    np.testing.assert_allclose(side.sigma, np.cov(all_features.astype(np.float64), rowvar=False), atol=1e-6)
    assert fid.scan(list(images[:, None]), small, num=5).n == 5


# ---- command line

def test_the_last_line_is_json_with_every_score_and_the_protocol(tmp_path, small_weights, capsys):
    a, b = write_pictures(tmp_path / "a", 6), write_pictures(tmp_path / "b", 5, seed=1)
    code, out, err = cli(capsys, a, b, "--dims", 64, "--weights", small_weights, "--batch_size", 4)
    result = json.loads(out.strip().split("\n")[-1], parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert code == 0 and "a second" in err
    assert result["fid"] > 0 and result["kid"] is not None and 0 <= result["precision"] <= 1
    assert (result["real"]["n"], result["fake"]["n"], result["dims"]) == (6, 5, 64)
    assert result["real"]["path"] == a and result["real"]["kept"] == 6
    assert result["resize"] == "bilinear 299, no antialias, as pytorch-fid"
    assert result["weights_file"] == "small.pth" and result["weights_sha256"] == fid.sha256(small_weights)[:8]
    assert any("mostly bias" in note for note in result["notes"]) and "note: FID at 5 images" in out


def test_statistics_saved_and_read_give_the_same_fid_without_kid(tmp_path, small_weights, capsys):
    a, b, stats = write_pictures(tmp_path / "a", 6), write_pictures(tmp_path / "b", 5, seed=1), tmp_path / "s.npz"
    common = ("--dims", 64, "--weights", small_weights)
    direct = json.loads(cli(capsys, a, b, *common)[1].strip().split("\n")[-1])
    assert cli(capsys, a, *common, "--save_stats", stats)[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "s.npz"]   # no leftovers
    with np.load(stats) as file:
        assert file["mu"].shape == (64,) and file["sigma"].shape == (64, 64)
    result = json.loads(cli(capsys, stats, b, *common)[1].strip().split("\n")[-1])
    assert result["fid"] == pytest.approx(direct["fid"], abs=1e-9) and result["real"]["n"] == 6
    assert result["kid"] is None and result["precision"] is None and any("KID" in n for n in result["notes"])


def test_statistics_that_do_not_fit_on_the_disk_leave_nothing_behind(tmp_path, monkeypatch):
    def savez(file, **_):
        file.write(b"half of it")
        raise OSError("No space left on device")
    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(OSError):
        fid.Side(2, np.zeros(1), np.eye(1), [], [], "unknown").save(tmp_path / "s.npz")
    assert not os.listdir(tmp_path)


def test_two_statistics_files_need_no_weights(offline, tmp_path, capsys):
    np.savez(tmp_path / "s.npz", mu=np.zeros(64), sigma=np.eye(64))          # as pytorch-fid writes them: no n
    np.savez(tmp_path / "t.npz", mu=np.ones(64), sigma=np.eye(64))
    code, out, _ = cli(capsys, tmp_path / "s.npz", tmp_path / "t.npz", "--dims", 64)
    assert code == 0 and json.loads(out.strip().split("\n")[-1])["fid"] == pytest.approx(64)
    code, _, err = cli(capsys, tmp_path / "s.npz", tmp_path / "t.npz")
    assert code == 2 and "--dims 2048" in err
