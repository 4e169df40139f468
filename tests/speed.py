"""Training steps as train.py makes them, against the same mathematics written the usual way.

    python tests/speed.py --preset reference --batch_size 4            # flags of train.py

The usual way: eager, one encoder call for every left-out image, an optimizer that is not fused, an average parameter
by parameter, `.item()` at every step. Same model, same batches, same precision; rounds alternate.
"""
import copy
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import fsdm
import train


def usual_loss(model, images, sees, t, noise, _):
    """model(...)[0].mean() with a call of the encoder for every target."""
    x0, (B, K) = fsdm.to_signal(images), images.shape[:2]
    a = model.alpha_bar[t][..., None, None, None]
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    contexts = [model.read(x0, sees[:, i:i + 1]) for i in range(K)]
    join = lambda parts: torch.stack(parts, 1).flatten(0, 1)                        # [B, ...] x K -> [B * K, ...]
    keys_values = [tuple(join([c.keys_values[block][i] for c in contexts]) for i in (0, 1))
                   for block in range(len(contexts[0].keys_values))]
    context = fsdm.Context(join([c.vector for c in contexts]), keys_values, join([c.mask for c in contexts]))
    out = model.denoiser(x_t.flatten(0, 1)[:, None], t.flatten()[:, None], context).view(x0.shape).float()
    target = noise if model.config.prediction == "noise" else a.sqrt() * noise - (1 - a).sqrt() * x0
    return (out - target).square().mean()


def main(argv):
    args, config = train.parse_args(argv)
    if config.encoder == "none" or config.mode_context == "variational":
        raise SystemExit("speed.py: only for models with a deterministic context")
    device, _, _ = train.connect(args.device)
    dtype, reason = fsdm.choose_precision(device, args.precision)
    size, split = config.sample_size, train.random_split(config, device)
    draw = lambda: train.draw_batch(split, args.batch_size, config, fsdm.rng(device, 0))
    torch.manual_seed(0)
    args.optimizer = "adamw"                                                        # the same one on both sides
    ours = train.make_training(config, args, device, dtype)
    usual, usual_ema = copy.deepcopy(ours.model), copy.deepcopy(ours.model)
    optimizer = torch.optim.AdamW(usual.parameters(), args.lr, betas=(0.9, 0.99), foreach=False, fused=False)
    with torch.no_grad():                                                           # the same number, first of all
        batch = draw()
        for p, q, r in zip(ours.model.parameters(), usual.parameters(), usual_ema.parameters()):
            if not p.any():                                                         # else both would be zero
                r.copy_(q.copy_(p.normal_(std=0.05)))
        assert torch.allclose(usual_loss(usual, *batch), ours.model(*batch)[0].mean(), rtol=1e-4)
    if not args.no_compile:
        train.compile_in_place(ours.model, dtype)

    def usual_step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = usual_loss(usual, *draw())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(usual.parameters(), args.grad_clip, foreach=False)
        optimizer.step()
        with torch.no_grad():
            for a, p in zip(usual_ema.parameters(), usual.parameters()):
                a.mul_(args.ema_decay).add_(p, alpha=1 - args.ema_decay)
        return loss.item()

    our_step = lambda: train.train_step(ours.model, ours, [draw()], args, dtype, 0)
    sides = {"usual": usual_step, "ours": our_step}
    times = {name: [] for name in sides}
    for step in sides.values():
        step()
    for _ in range(7):
        for name, step in sides.items():
            began = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    median = {name: sorted(values)[3] for name, values in times.items()}
    usual, ours = (args.batch_size * size / median[name] for name in ("usual", "ours"))
    print(f"{args.preset}, {args.batch_size} sets of {size}, {str(dtype)[6:]} ({reason}): the usual way {usual:.1f} "
          f"images/s, ours {ours:.1f}, {ours / usual:.2f} times")


if __name__ == "__main__":
    main(sys.argv[1:])
