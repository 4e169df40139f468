"""How fast train.py and sampling are on this machine, how much memory they take, and how much is gained over the same
mathematics written the usual way. Random images, random weights; nothing is trained and nothing is written.

    python tests/speed.py --preset reference --batch_size 4            # flags of train.py

The usual way: eager, one encoder call for every left-out image, an optimizer that is not fused, an average parameter
by parameter, `.item()` at every step. Same model, same batches, same precision; rounds alternate.
"""
import copy
import math
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import fsdm
import train


SECONDS = 20                                                                # to measure at most, after five rounds


def random_split(config, device, classes=64):
    """-> a Split of noise."""
    size, K = config.image_size, config.sample_size
    images = torch.randint(0, 256, (classes * K, config.in_channels, size, size), dtype=torch.uint8)
    offsets = torch.arange(0, classes * K + 1, K)
    return fsdm.Split(images, offsets, [f"class {c}" for c in range(classes)], K).to(device)


def peak_memory(device):
    """-> GiB: of tensors on a GPU, of the whole process on a CPU (nan on Windows, which does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def seconds(device, run):
    """-> how long run() takes, until the GPU is done with it."""
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def report(name, images, device, run):
    """Prints and returns what run(), which works on so many images, takes: {ms, images_per_second, peak_gib}."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):                                                              # compiles, fills caches
        run()
    began, times = time.time(), []
    while len(times) < 5 or len(times) < 50 and time.time() - began < SECONDS:
        times.append(seconds(device, run))
    times.sort()
    median, peak = times[len(times) // 2], peak_memory(device)
    print(f"{name}: {median * 1000:,.1f} ms (median of {len(times)}, {times[0] * 1000:,.1f} to "
          f"{times[-1] * 1000:,.1f}), {images / median:,.1f} images/s, peak memory {peak:.2f} GiB")
    return dict(ms=median * 1000, images_per_second=images / median, peak_gib=peak)


def flops(model, batch):
    """-> of an image, forward and backward."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):   # fused attention counts as none
        model(*batch)[0].mean().backward()
    return counter.get_total_flops() / batch[0].shape[:2].numel()


def usual_loss(model, images, sees, t, noise, _):
    """model(...)[0].mean() with a call of the encoder for every target."""
    def join(parts):                                                                # [B, ...] x K -> [B * K, ...]
        return None if parts[0] is None else torch.stack(parts, 1).flatten(0, 1)

    x0, K = fsdm.to_signal(images), images.shape[1]
    a = model.alpha_bar[t][..., None, None, None]
    alpha, sigma = a.sqrt(), (1 - a).sqrt()
    x_t = alpha * x0 + sigma * noise
    contexts = [model.read(x0, sees[:, i:i + 1]) for i in range(K)]
    vector, mask, kl = (join([getattr(c, name) for c in contexts]) for name in ("vector", "mask", "kl"))
    keys_values = [join(block) for block in zip(*(c.keys_values for c in contexts))]
    context = fsdm.Context(vector, keys_values, mask, kl)
    out = model.denoiser(x_t.flatten(0, 1)[:, None], t.flatten()[:, None], context).view(x0.shape).float()
    return (out - model.prediction.target(x0, noise, alpha, sigma)).square().mean()


def compare(model, args, device, dtype, compiled, draw):
    """-> images a second of the usual way and of ours, both with AdamW. AssertionError when their losses differ."""
    args.optimizer = "adamw"
    for p in model.parameters():
        if not p.any():                                                             # else both losses would be trivial
            torch.nn.init.normal_(p, std=0.05)
    usual, average, ours = copy.deepcopy(model), copy.deepcopy(model), train.Training(model, args, dtype)
    optimizer = torch.optim.AdamW(usual.parameters(), args.lr, betas=(0.9, 0.99), foreach=False, fused=False)
    with torch.no_grad():
        batch = next(draw())
        within = 1e-4 if device.type == "cpu" else 1e-3                              # TF32 has 10 bits
        assert torch.allclose(usual_loss(usual, *batch), model(*batch)[0].mean(), rtol=within)
    if compiled:
        fsdm.compile_in_place(model, dtype)

    def usual_step():
        total = 0
        optimizer.zero_grad()
        for batch in draw():
            with fsdm.autocast(device, dtype):
                loss = usual_loss(usual, *batch) / args.accumulate
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(usual.parameters(), args.grad_clip, foreach=False)
        optimizer.step()
        with torch.no_grad():
            for a, p in zip(average.parameters(), usual.parameters()):
                a.mul_(args.ema_decay).add_(p, alpha=1 - args.ema_decay)
        return total

    def our_step():
        ours.step(draw(), args.lr, 0)

    times = []
    for _ in range(8):                                                              # the first one compiles
        times.append((seconds(device, usual_step), seconds(device, our_step)))
    images = args.batch_size * model.config.sample_size
    return [images / sorted(side[1:])[3] for side in zip(*times)]


def main(argv):
    """Prints what it measures -> the same as a dict of numbers."""
    args, config = train.parse_args(argv)
    device, _, _ = train.connect(args.device)
    dtype, reason = fsdm.choose_precision(device, args.precision)
    compiled, why = fsdm.choose_compile(device, args.no_compile)
    size, split = config.sample_size, random_split(config, device)
    print(f"preset {args.preset}, {device}, {str(dtype)[6:]} ({reason}), {'compiled' if compiled else 'eager'} ({why})")

    def draw():
        for part in range(args.accumulate):
            generator = fsdm.rng(device, 0, part)
            yield train.draw_batch(split, args.batch_size // args.accumulate, config, generator, args.noise_offset)

    torch.manual_seed(0)
    model = fsdm.FSDM(config).to(device)
    eager = copy.deepcopy(model)
    training = train.Training(model, args, dtype)
    count = flops(model, train.draw_batch(split, 1, config, fsdm.rng(device, 0), args.noise_offset))
    if compiled:
        fsdm.compile_in_place(model, dtype)
    rate = fsdm.matmul_rate(device, dtype, 4096 if device.type == "cuda" else 1024)
    trained = report(f"training, {args.batch_size} sets of {size}", args.batch_size * size, device,
                     lambda: training.step(draw(), args.lr, 0))
    done = trained["images_per_second"] * count                             # FLOP/s
    print(f"  {count / 1e9:.2f} GFLOP an image, {done / 1e12:.3f} TFLOP/s: {done / rate:.0%} of this "
          f"machine's matrix products ({rate / 1e12:.2f} TFLOP/s in {str(dtype)[6:]})")

    n = 8 if device.type == "cuda" else 1                                   # a CPU needs no more to be busy
    support, _ = fsdm.draw_support(split, 8, max(1, size - 1), args.seed, fsdm.PICTURE)
    sampled = report(f"sampling, 8 sets x {n} images, 2m_sde in 20 steps, guidance 1", 8 * n, device,
                     lambda: fsdm.generate(training.ema, support, n, guidance=1.0, dtype=dtype))
    found = dict(training=trained, sampling=sampled, gflop_an_image=count / 1e9, share_of_products=done / rate,
                 products_tflops=rate / 1e12, usual=None, ours=None)

    if config.encoder != "none" and config.mode_context == "deterministic":
        del model, training                                                 # make room
        try:
            usual, ours = compare(eager, args, device, dtype, compiled, draw)
        except torch.OutOfMemoryError:
            print("training with AdamW: the usual way, beside ours, does not fit into this machine's memory")
            return found
        print(f"training with AdamW: the usual way {usual:.1f} images/s, ours {ours:.1f}, {ours / usual:.2f} times")
        found.update(usual=usual, ours=ours)                                # images/s
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
