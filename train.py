"""Trains a few-shot diffusion model: every image of a set is generated from the others.

    python train.py                                          # the demo: invented glyphs, 15 minutes on two CPU cores
    python train.py --max_steps 0 --preset reference         # the parameter table, nothing else
    python train.py --preset t4 --dataset cifar100 --data_dir data --download --max_hours 8.5
    python train.py --dataset my_photos/ --out_dir runs/mine              # a folder of class folders

Leaves in --out_dir: ckpt.pt, log.jsonl (every number printed), and at every save samples_<step>.png, classes never
trained on, support on the left and samples on the right. The same command again goes on from ckpt.pt.
"""
import argparse
import copy
import dataclasses
import inspect
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import fid
import fsdm
import sample
from fsdm import FSDM, Config, rng
from sample import write_whole

# what a preset trains with, unless a flag says otherwise
DOCUMENTED = dict(optimizer="adamw", batch_size=32, lr=1e-4, warmup_steps=0, cooldown_steps=0, ema_decay=0.999,
                  max_steps=300_000, log_interval=300, save_interval=20_000)
RECIPES = {
    "demo": dict(optimizer="muon", batch_size=8, lr=3e-3, warmup_steps=100, cooldown_steps=1000, ema_decay=0.998,
                 max_steps=2400, max_hours=0.24, log_interval=100, save_interval=800),
    "reference": DOCUMENTED,
    "wide": DOCUMENTED,
    "t4": dict(DOCUMENTED, batch_size=16, lr=5e-4, warmup_steps=1000, save_interval=5000),
}
TRAINING, VALIDATION, PICTURE = 2, 3, 4                 # streams of randomness, beside fsdm.SAMPLING


# ---- The command line. A shape flag that is left out takes its preset's value.

def parse_args(argv=None):
    """-> (args, Config). Exits with code 2 and one sentence when a value makes no sense."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=fsdm.PRESETS, default="demo", help="model shape and recipe to start from")
    p.add_argument("--dataset", default="glyphs", help="glyphs, cifar100, omniglot, mnist, celeba, a folder, an .npz")
    p.add_argument("--data_dir", default="data", help="where torchvision's files of a named data set lie")
    p.add_argument("--download", action="store_true", help="fetch a named data set when it is not in data_dir")
    p.add_argument("--out_dir", default="runs/demo", help="checkpoint, log and pictures go here")
    p.add_argument("--batch_size", type=int, help="sets a step; each is sample_size images")
    p.add_argument("--optimizer", choices=("muon", "adamw"), help="muon: for the blocks' matrices, AdamW for the rest")
    p.add_argument("--lr", type=float, help="peak learning rate")
    p.add_argument("--warmup_steps", type=int, help="steps over which the learning rate rises from 0")
    p.add_argument("--cooldown_steps", type=int, help="steps before --max_steps over which it falls to 0 again")
    p.add_argument("--weight_decay", type=float, default=0.01, help="share of lr by which weights shrink a step")
    p.add_argument("--grad_clip", type=float, default=1.0, help="largest norm of the whole gradient")
    p.add_argument("--ema_decay", type=float, help="of the averaged weights, after their warm-up")
    p.add_argument("--max_steps", type=int, help="0 prints the parameter table and stops")
    p.add_argument("--max_hours", type=float, help="stop in time for the last save within so many hours of this run")
    p.add_argument("--log_interval", type=int, help="steps between log lines")
    p.add_argument("--save_interval", type=int, help="steps between checkpoints, validations and pictures")
    p.add_argument("--num_eval_batches", type=int, default=10, help="batches of unseen classes in a validation")
    p.add_argument("--num_sample_batches", type=int, default=2, help="batches of 4 support sets in a picture")
    p.add_argument("--compute_fid", action="store_true", help="score generated images of unseen classes at every save")
    p.add_argument("--fid_num_samples", type=int, default=600, help="images to generate for that score")
    p.add_argument("--fid_weights", help="Inception weights file; torch's cache or a download if left out")
    p.add_argument("--fid_dims", type=int, choices=(64, 192, 768, 2048), default=2048, help="features that fid.py uses")
    p.add_argument("--seed", type=int, default=0, help="of weights, batches, noise and pictures")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of the products")
    p.add_argument("--no_compile", action="store_true", help="run the step eagerly: slower, but it starts at once")
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    for field in dataclasses.fields(Config):            # one flag per field of Config, its comment is the help
        kind = parse_bool if field.type is bool else field.type
        p.add_argument(f"--{field.name}", type=kind, help=comments[field.name])
    args = p.parse_args(argv)
    for name, value in RECIPES[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    shape = dict(fsdm.PRESETS[args.preset])
    shape |= {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if getattr(args, f.name) is not None}
    for name in ("batch_size", "log_interval", "save_interval", "num_eval_batches", "num_sample_batches"):
        if getattr(args, name) < 1:
            p.error(f"--{name} is {getattr(args, name)}: it must be at least 1")
    try:
        return args, Config(**shape)
    except ValueError as error:
        p.error(str(error))


def parse_bool(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"'{text}': expected True or False")
    return text.lower() in ("true", "1", "yes")


# ---- What the machine can do: each decision a small function that says its reason.

def choose_compile(device, no_compile):
    """-> (whether to compile the step, the reason in words)."""
    if no_compile:
        return False, "as asked for"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return capability >= (7, 0), "compute capability {}.{}".format(*capability)
    if device.type == "cpu":
        compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "cl"))), None)
        return compiler is not None, f"with {compiler}" if compiler else "no C++ compiler found (g++ or clang++)"
    return False, f"not on {device.type}"


def compile_in_place(model, device, dtype):
    """Compiles model(...) as one graph; the weights keep their plain names. The first step then takes a while."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    # torch 2.10's cache overlooks the autocast dtype: a folder for each
    name = re.sub(r"\W+", "_", f"fsdm_compiled_{torch.__version__}_{kind}_{dtype}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), name))
    model.compile(fullgraph=True, dynamic=False)


# ---- Pieces of the loop.

def parameter_table(model):
    """One line per part with its number of parameters, and the totals."""
    rows, total = [], sum(p.numel() for p in model.parameters())
    for name, part in model.named_children():
        for key in dict.fromkeys(key.split(".")[0] for key, _ in part.named_parameters()):
            count = sum(p.numel() for k, p in part.named_parameters() if k.split(".")[0] == key)
            rows.append(f"  {name}.{key:<12} {count:>12,}")
        rows.append(f"{name + ', all of it':<18} {sum(p.numel() for p in part.parameters()):>12,}")
    if hasattr(model, "null"):
        rows.append(f"{'null context':<18} {model.null.numel():>12,}")
    return "\n".join([*rows, f"{'model':<18} {total:>12,}"])


def draw_batch(split, sets, config, generator, vary, dropout):
    """-> images uint8 [B, K, C, H, W], sees bool [B, K, K], t int64 [B, K], noise float32 like the images."""
    index = fsdm.draw_sets(split, sets, config.sample_size, generator)
    images = split.images[index]
    sees = fsdm.leave_one_out(*index.shape, generator, vary, dropout)
    t = torch.randint(config.diffusion_steps, index.shape, generator=generator, device=images.device)
    return images, sees, t, torch.randn(images.shape, generator=generator, device=images.device)


def make_optimizers(model, name, lr, weight_decay, device):
    """"adamw": [AdamW] for everything; "muon": [Muon] for the matrices inside the blocks, and AdamW for the rest."""
    inside = [p for key, p in model.named_parameters() if ".blocks." in key and p.ndim == 2] if name == "muon" else []
    rest = [p for p in model.parameters() if not any(p is q for q in inside)]
    # Muon (Jordan et al. 2024) scaled to AdamW's step length (Liu et al. 2025), so that one learning rate serves both
    muon = [torch.optim.Muon(inside, lr, weight_decay, adjust_lr_fn="match_rms_adamw")] if inside else []
    return muon + [torch.optim.AdamW(rest, lr, betas=(0.9, 0.99), weight_decay=weight_decay,
                                     fused=device.type in ("cpu", "cuda"))]


@torch.no_grad()
def validate(model, split, args, dtype):
    """Loss on unseen classes with fixed sets, times and noise, and the context gain: how much larger the loss is
    when each set is generated from the context of another set; in all, and for each fifth of the times (low t first).
    -> dict of floats."""
    device, T, sets = split.images.device, model.config.diffusion_steps, max(2, args.batch_size)
    own, other, times = [], [], []
    for i in range(args.num_eval_batches):
        generator = rng(device, args.seed, VALIDATION, i)
        images, sees, t, noise = draw_batch(split, sets, model.config, generator, False, 0.0)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            own.append(model(images, sees, t, noise))
            other.append(model(images, sees, t, noise, support=images.roll(1, 0)))
        times.append(t)
    own, gain, fifth = torch.stack(own), torch.stack(other) - torch.stack(own), torch.stack(times) * 5 // T
    by_noise = [round(gain[fifth == i].mean().item(), 5) for i in range(5)]
    return {"val_loss": own.mean().item(), "context_gain": gain.mean().item(), "context_gain_by_noise": by_noise}


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """EMA with a warm-up, so that it never holds on to the random initialisation (step counts from 1)."""
    decay = min(decay, step / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


class Log:
    """Prints, and appends every record to log.jsonl; a resumed run drops what lies beyond its checkpoint."""
    def __init__(self, path, step):
        lines = path.read_text().splitlines() if step and path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        write_whole(path, lambda p: p.write_text("".join(line + "\n" for line in kept)))
        self.path = path

    def __call__(self, sentence, **record):
        print(sentence, flush=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")


def load_inception(args, device):
    """-> the network that fid.py measures with, or None, said once, when its weights are not to be had."""
    try:
        return fid.load_inception(args.fid_weights, args.fid_dims, str(device))
    except fid.FIDError as error:
        return print(f"training without --compute_fid: {error}")


def load_training(path, args, config, model, ema, optimizers, scaler):
    """Fills everything from a checkpoint -> the step it was saved at. ValueError names the flags that differ."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        now = dict(dataclasses.asdict(config), dataset=args.dataset, optimizer=args.optimizer)
        then = dict(saved["config"], dataset=saved["dataset"], optimizer=saved["optimizer"])
        differ = ", ".join(f"--{k} {then.get(k)} (now {v})" for k, v in now.items() if then.get(k) != v)
        if differ:
            raise ValueError(f"{path} was trained with {differ}: pass the same, or another --out_dir")
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        if saved["scaler"]:                                 # empty unless it was trained in fp16
            scaler.load_state_dict(saved["scaler"])
        return saved["step"]
    except (KeyError, RuntimeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be resumed: {str(error).splitlines()[0]}") from None


# ---- The run.

def main(argv=None):
    started = time.time()
    args, config = parse_args(argv)
    torch.manual_seed(args.seed)                                            # the initial weights
    if args.max_steps == 0:
        return print(parameter_table(FSDM(config)))
    device = fsdm.choose_device(args.device)
    dtype, reason = fsdm.choose_precision(device, args.precision)
    compiled, why = choose_compile(device, args.no_compile)
    print(f"device {device}, {str(dtype)[6:]} ({reason}), {'compiled' if compiled else 'eager'} ({why})")
    torch.set_float32_matmul_precision("high")                              # TF32 where it exists

    data = fsdm.load_data(args.dataset, args.data_dir, config.image_size, config.in_channels, args.download)
    fsdm.check_data(data, config.sample_size)
    data = {name: split.to(device) for name, split in data.items()}
    print(f"{args.dataset}: " + ", ".join(f"{len(s.images):,} images of {len(s.names):,} {name} classes"
                                          for name, s in data.items()))
    model = FSDM(config).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    out, step = Path(args.out_dir), 0
    ckpt = out / "ckpt.pt"
    if ckpt.exists():
        step = load_training(ckpt, args, config, model, ema, optimizers, scaler)
        print(f"going on from {ckpt} at step {step:,}")
    inception = load_inception(args, device) if args.compute_fid else None
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "log.jsonl", step)
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.batch_size} sets of {config.sample_size} "
        f"images a step{'; the first step compiles, which takes a minute or more' if compiled else ''}",
        step=step, args=vars(args), config=dataclasses.asdict(config), device=str(device), dtype=str(dtype),
        compiled=compiled, torch=torch.__version__)
    if compiled:
        compile_in_place(model, device, dtype)

    stop = []                                                               # a signal asks for the last save
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(1))
    images_per_step = args.batch_size * config.sample_size
    losses, clock, first, room = [], (time.time(), step), step, 20.0       # room: seconds the last save may need
    deadline = started + args.max_hours * 3600 if args.max_hours is not None else math.inf
    while step < args.max_steps and not stop and time.time() + room < deadline:
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = args.lr * min(1, (step + 1) / max(1, args.warmup_steps),
                                        (args.max_steps - step) / max(1, args.cooldown_steps))
        generator = rng(device, args.seed, TRAINING, step)
        batch = draw_batch(data["train"], args.batch_size, config, generator,
                           config.vary_support, config.context_dropout)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(*batch).mean()
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        if len(optimizers) == 1:
            scaler.step(optimizers[0])
        elif not scaler.is_enabled() or norm.isfinite():    # fp16: both or neither (the check waits for the GPU)
            for optimizer in optimizers:
                optimizer.step()
        scaler.update()
        model.zero_grad(set_to_none=True)
        step += 1
        update_ema(ema, model, step, args.ema_decay)
        losses.append(loss.detach())                # .item() here would wait for the GPU at every step
        if step == first + 1 and step % args.log_interval:
            clock = (time.time(), step)             # compiling is not training speed

        if step % args.log_interval == 0:
            value = torch.stack(losses).mean().item()
            if not math.isfinite(value):
                raise ValueError(f"loss is {value} at step {step}: lower --lr, or train with --precision fp32; "
                                 f"{ckpt} is as it was")
            rate = (step - clock[1]) * images_per_step / (time.time() - clock[0])
            left = min(deadline - time.time(), (args.max_steps - step) * images_per_step / rate)
            log(f"step {step:>7,}  loss {value:.4f}  {rate:,.0f} images/s  {left / 60:,.0f} min left",
                step=step, loss=value, images_per_second=rate, seconds=time.time() - started)
            losses, clock = [], (time.time(), step)
        if step % args.save_interval == 0:
            room = save(args, step, model, ema, optimizers, scaler, data["val"], dtype, inception, log)
            clock = (clock[0] + room, clock[1])
            room = max(20.0, 1.5 * room)
    if step % args.save_interval or not ckpt.exists():
        save(args, step, model, ema, optimizers, scaler, data["val"], dtype, inception, log)
    print(f"stopped at step {step:,} after {(time.time() - started) / 60:.1f} minutes; "
          f"the same command{' with a larger --max_steps' if step >= args.max_steps else ''} goes on, "
          f"python sample.py --ckpt {ckpt} --support your images generates")


def save(args, step, model, ema, optimizers, scaler, split, dtype, inception, log):
    """The checkpoint first, then validation and a picture of unseen classes. -> the seconds it took."""
    began, out = time.time(), Path(args.out_dir)
    if not torch.stack(torch._foreach_norm(list(model.parameters()))).isfinite().all():
        raise ValueError(f"the weights are not finite at step {step}: lower --lr, or train with --precision fp32; "
                         f"{out / 'ckpt.pt'} is as it was")
    state = dict(config=dataclasses.asdict(model.config), step=step, model=model.state_dict(), ema=ema.state_dict(),
                 optimizers=[o.state_dict() for o in optimizers], scaler=scaler.state_dict(), dataset=args.dataset,
                 optimizer=args.optimizer)
    write_whole(out / "ckpt.pt", lambda p: torch.save(state, p))
    scores = validate(ema, split, args, dtype)
    support, _ = sample.draw_support(split, 4 * args.num_sample_batches, model.config.sample_size - 1,
                                  args.seed, PICTURE)
    with torch.autocast(split.images.device.type, dtype, enabled=dtype != torch.float32):
        samples = fsdm.sample(ema, support, 8, guidance=2.0 if hasattr(ema, "null") else 1.0, seed=args.seed)
    write_whole(out / f"samples_{step:07d}.png", lambda p: sample.grid(support, samples).save(p, "png"))
    if inception is not None:
        try:
            scores["few_shot"], n = sample.evaluate(ema, split, inception, args.fid_num_samples, support.shape[1],
                                                    args.seed, dtype=dtype)
            scores["few_shot_recipe"] = dict(split="val", images=n, k=support.shape[1], dims=args.fid_dims,
                                             weights="ema", sampler="2m", steps=20, guidance=1, seed=args.seed)
            print(sample.table(scores["few_shot"]))
        except (ValueError, fid.FIDError) as error:
            print(f"no few-shot scores: {error}")
    log(f"step {step:>7,}  unseen classes: loss {scores['val_loss']:.4f}, context gain {scores['context_gain']:.4f}, "
        f"picture samples_{step:07d}.png", step=step, **scores)
    return time.time() - began


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = "out of memory: lower --batch_size, --hidden_size or --image_size; the last checkpoint is whole"
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
