"""Trains a few-shot diffusion model: every image of a set is generated from the others.

    python train.py                                          # the demo: invented glyphs, 15 minutes on two CPU cores
    python train.py --max_steps 0 --preset reference         # the parameter table, nothing else
    python train.py --preset t4 --dataset cifar100 --download --max_hours 8.5
    python train.py --dataset my_photos/ --out_dir runs/mine              # a folder of class folders
    python train.py --preset t4 --benchmark                               # how fast, how much memory; trains nothing
    torchrun --standalone --nproc_per_node=2 train.py --preset t4 ...     # two GPUs share every batch

Leaves in --out_dir: ckpt.pt, log.jsonl (every number printed), and every --save_interval steps samples_<step>.png,
classes never trained on, support on the left and samples on the right. The same command again goes on from ckpt.pt.
"""
import argparse
import collections
import copy
import dataclasses
import inspect
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import fid
import fsdm
import sample
from fsdm import FSDM, PICTURE, TRAINING, VALIDATION, Config, rng
from sample import write_whole

# what a preset trains with, unless a flag says otherwise
DOCUMENTED = dict(optimizer="adamw", batch_size=32, lr=1e-4, warmup_steps=0, cooldown_steps=0, ema_decay=0.999,
                  max_steps=300_000, log_interval=300, save_interval=20_000)
RECIPES = {
    "demo": dict(optimizer="muon", batch_size=8, lr=3e-3, warmup_steps=100, cooldown_steps=1000, ema_decay=0.998,
                 max_steps=2400, max_hours=0.24, log_interval=100, save_interval=800),
    "reference": DOCUMENTED,
    "wide": DOCUMENTED,
    "mnist": dict(DOCUMENTED, dataset="mnist", batch_size=128, lr=2e-4, save_interval=2000),
    # AdamW: Muon's own products are in bf16, which a T4 has to emulate
    "t4": dict(DOCUMENTED, batch_size=16, lr=5e-4, warmup_steps=1000, cooldown_steps=10_000, save_interval=5000),
}
PATIENCE = 50                                           # gradients in a row that may be not finite
SAVE_SECONDS = 300                                      # at most so long between two checkpoints


# ---- The command line. A shape flag that is left out takes its preset's value.

def flags():
    """-> the parser: a flag of the run a line, then one for every field of Config."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=fsdm.PRESETS,
                   help="model shape and recipe to start from: demo, or reference when --hidden_size is given")
    p.add_argument("--dataset", help="glyphs (the default), cifar100, omniglot, mnist, celeba, a folder, an .npz")
    p.add_argument("--data_dir", default="data", help="where torchvision's files of a named data set lie")
    p.add_argument("--download", action="store_true", help="fetch a named data set when it is not in data_dir")
    p.add_argument("--out_dir", help="checkpoint, log and pictures go here; runs/ and the preset's name if left out")
    p.add_argument("--resume", help="a checkpoint to go on from when out_dir has none")
    p.add_argument("--restart", action="store_true", help="begin anew; an old run in out_dir is moved aside")
    p.add_argument("--batch_size", type=int, help="sets a step, over all GPUs; each is sample_size images")
    p.add_argument("--accumulate", type=int, default=1, help="parts of a batch, one after the other: less memory")
    p.add_argument("--optimizer", choices=("muon", "adamw"), help="muon: for the blocks' matrices, AdamW for the rest")
    p.add_argument("--lr", type=float, help="peak learning rate")
    p.add_argument("--warmup_steps", type=int, help="steps over which the learning rate rises from 0")
    p.add_argument("--cooldown_steps", type=int, help="last steps (at most half) over which it falls to 0 again")
    p.add_argument("--weight_decay", type=float, default=0.01, help="share of lr by which weights shrink a step")
    p.add_argument("--grad_clip", type=float, default=1.0, help="largest norm of the whole gradient")
    p.add_argument("--kl_weight", type=float, default=1e-6, help="of a variational context's KL in the loss")
    p.add_argument("--ema_decay", type=float, help="of the averaged weights, after their warm-up")
    p.add_argument("--max_steps", type=int, help="steps to train, no limit with --max_hours alone; 0 prints the table")
    p.add_argument("--max_hours", type=float, help="stop in time for the last save within so many hours of this run")
    p.add_argument("--log_interval", type=int, help="steps between log lines")
    p.add_argument("--save_interval", type=int, help="steps between checkpoints, validations and pictures")
    p.add_argument("--num_eval_batches", type=int, default=10, help="batches of unseen classes in a validation")
    p.add_argument("--num_sample_batches", type=int, default=2, help="batches of 4 support sets in a picture")
    p.add_argument("--compute_fid", type=parse_bool, nargs="?", const=True, default=False,
                   help="score generated images of unseen classes every --save_interval steps")
    p.add_argument("--fid_num_samples", type=int, default=600, help="images to generate for that score")
    p.add_argument("--fid_weights", help="Inception weights file; torch's cache or a download if left out")
    p.add_argument("--fid_dims", type=int, choices=(64, 192, 768, 2048), default=2048, help="features that fid.py uses")
    p.add_argument("--debug", action="store_true", help="log norms of the context and of gradients as debug/...")
    p.add_argument("--use_wandb", type=parse_bool, nargs="?", const=True, default=False, help="log to wandb.ai too")
    p.add_argument("--context_channels", type=int, help="the documents' second name for --hdim")
    p.add_argument("--seed", type=int, default=0, help="of weights, batches, noise and pictures")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of the products")
    p.add_argument("--benchmark", action="store_true", help="measure speed and memory of this configuration and stop")
    p.add_argument("--no_compile", action="store_true", help="run the step eagerly: slower, but it starts at once")
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    for field in dataclasses.fields(Config):            # one flag per field of Config, its comment is the help
        kind = parse_bool if field.type is bool else field.type
        p.add_argument(f"--{field.name}", type=kind, help=comments[field.name])
    return p


def parse_args(argv=None):
    """-> (args, Config). Exits with code 2 and one sentence when a value makes no sense."""
    p = flags()
    args = p.parse_args(argv)
    if None not in (args.hdim, args.context_channels) and args.hdim != args.context_channels:
        p.error(f"--hdim {args.hdim} and --context_channels {args.context_channels} are two names of one width")
    args.hdim = args.context_channels if args.hdim is None else args.hdim
    # the documents' command lines name the whole model and no preset
    args.preset = args.preset or ("demo" if args.hidden_size is None else "reference")
    if args.max_steps is None and args.max_hours is not None:
        args.max_steps = sys.maxsize                    # the hours decide, not the preset's steps
    for name, value in {"dataset": "glyphs", "out_dir": f"runs/{args.preset}", **RECIPES[args.preset]}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    shape = dict(fsdm.PRESETS[args.preset])
    shape |= {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if getattr(args, f.name) is not None}
    for name in ("batch_size", "accumulate", "log_interval", "save_interval", "num_eval_batches", "num_sample_batches"):
        if getattr(args, name) < 1:
            p.error(f"--{name} is {getattr(args, name)}: it must be at least 1")
    for name in ("lr", "grad_clip", *(["max_hours"] if args.max_hours is not None else [])):
        if not 0 < getattr(args, name) < math.inf:
            p.error(f"--{name} is {getattr(args, name)}: it must be a number above 0")
    for name in ("max_steps", "warmup_steps", "cooldown_steps", "weight_decay", "kl_weight"):
        if not 0 <= getattr(args, name) < math.inf:
            p.error(f"--{name} is {getattr(args, name)}: it must be 0 or more")
    if not 0 <= args.ema_decay < 1:
        p.error(f"--ema_decay is {args.ema_decay}: expected 0 <= decay < 1")
    try:
        return args, Config(**shape)
    except ValueError as error:
        p.error(str(error))


def parse_bool(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"'{text}': expected True or False")
    return text.lower() in ("true", "1", "yes")


# ---- What the machine can do: each decision a small function that says its reason.

def connect(requested):
    """-> (device, rank, processes): this process alone, or one of those that torchrun started, on its own GPU."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if requested in ("auto", "cuda") and torch.cuda.is_available():
        requested = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = fsdm.choose_device(requested)
    torch.set_float32_matmul_precision("high")          # TF32 where it exists
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if world == 1 and torch.cuda.device_count() > 1:
            n = torch.cuda.device_count()
            print(f"{n} GPUs are here and this run uses one; for all of them:\n"
                  f"  torchrun --standalone --nproc_per_node={n} {' '.join(sys.argv)}")
    if world > 1:
        # rank 0 validates and draws while the others wait; gloo serves small tensors on the CPU, without the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return device, rank, world


def least(number):
    """-> the smallest of the numbers of all processes. Each waits here for all."""
    if not dist.is_initialized():
        return number
    numbers = torch.tensor(number, dtype=torch.float64)     # on the CPU: this does not wait for the GPU
    dist.all_reduce(numbers, dist.ReduceOp.MIN)
    return numbers.item()


def anyone(flag):
    """True when the flag is set on any process. Each waits here for all, so anyone(False) is a barrier."""
    return least(not flag) == 0


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


def compile_in_place(model, dtype):
    """Compiles model(...) as one graph; the weights keep their plain names. The first step then takes a while."""
    torch.compiler.config.cache_key_tag = str(dtype)    # torch 2.10's cache overlooks the autocast dtype
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)      # on a CPU it warns of a missing GPU
    model.compile(fullgraph=True, dynamic=False)


# ---- One step: a batch of sets, the loss, the optimizers, the moving average.

def draw_batch(split, sets, config, generator, training=True):
    """-> images uint8 [B, K, C, H, W], sees bool [B, K, K], t int64 [B, K], noise float32 like the images, and noise
    for a variational context. training: with dropped and varied support, if the Config says so."""
    index = fsdm.draw_sets(split, sets, config.sample_size, generator)
    images = split.images[index]
    sees = fsdm.leave_one_out(*index.shape, generator, config.vary_support and training,
                              config.context_dropout * training)
    t = torch.randint(config.diffusion_steps, index.shape, generator=generator, device=images.device)
    randn = lambda *shape: torch.randn(sets, *shape, generator=generator, device=images.device)
    drawn = fsdm.context_noise(config, config.sample_size, config.sample_size, randn)
    return images, sees, t, randn(*images.shape[1:]), drawn


def make_optimizers(model, name, lr, weight_decay, device):
    """"adamw": [AdamW] for everything; "muon": [Muon] for the matrices inside the blocks, and AdamW for the rest."""
    inside = [p for key, p in model.named_parameters() if ".blocks." in key and p.ndim == 2] if name == "muon" else []
    rest = [p for p in model.parameters() if not any(p is q for q in inside)]
    # Muon (Jordan et al. 2024) scaled to AdamW's step length (Liu et al. 2025), so that one learning rate serves both
    muon = [torch.optim.Muon(inside, lr, weight_decay, adjust_lr_fn="match_rms_adamw")] if inside else []
    return muon + [torch.optim.AdamW(rest, lr, betas=(0.9, 0.99), weight_decay=weight_decay,
                                     fused=device.type in ("cpu", "cuda"))]


class Training(NamedTuple):
    """What a checkpoint holds, beside its Config and the step."""
    model: torch.nn.Module
    ema: torch.nn.Module                        # the moving average of its weights
    optimizers: list
    scaler: torch.amp.GradScaler
    history: list                               # [loss, KL, gradient norm] of each step since the last log line

    def state(self):
        return dict(model=self.model.state_dict(), ema=self.ema.state_dict(), scaler=self.scaler.state_dict(),
                    optimizers=[optimizer.state_dict() for optimizer in self.optimizers], history=self.history)


def make_training(config, args, device, dtype):
    model = FSDM(config).to(device)
    # in fp16 the scale keeps small gradients above zero; in all precisions the scaler skips a step that is not finite
    return Training(model, copy.deepcopy(model).eval().requires_grad_(False),
                    make_optimizers(model, args.optimizer, args.lr, args.weight_decay, device),
                    torch.amp.GradScaler(device.type, init_scale=2.0 ** 16 if dtype == torch.float16 else 1.0), [])


def train_step(net, training, batches, args, dtype, step):
    """Updates the model by the mean gradient of `args.accumulate` batches; net is the model, or DDP around it. Waits
    for no GPU, unless there are two optimizers. A gradient that is not finite changes neither weights nor optimizers.

    -> bool tensor on the device: whether the step was skipped."""
    model, ema, optimizers, scaler, history = training
    cooldown = min(args.cooldown_steps, args.max_steps // 2)
    lr = args.lr * min(1, (step + 1) / max(1, args.warmup_steps), (args.max_steps - step) / max(1, cooldown))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
    model.zero_grad(set_to_none=True)
    device, sums = next(model.parameters()).device, []
    for part, batch in enumerate(batches, 1):
        net.require_backward_grad_sync = part == args.accumulate            # DDP averages gradients with the last part
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            error, kl = net(*batch)                                         # [B, K] each; kl is None if deterministic
        error, kl = error.mean(), error.new_zeros(()) if kl is None else kl.mean()
        scaler.scale((error + args.kl_weight * kl) / args.accumulate).backward()
        sums.append(torch.stack([error, kl]).detach() / args.accumulate)    # .item() here would wait for the GPU
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
    if len(optimizers) == 1:
        scaler.step(optimizers[0])
    elif norm.isfinite():                                   # both or neither; this check waits for the GPU
        for optimizer in optimizers:
            optimizer.step()
    scaler.update(None if dtype == torch.float16 else 1.0)  # only fp16 has a scale to look for
    update_ema(ema, model, step + 1, args.ema_decay)
    bad, mean = ~norm.isfinite(), torch.stack(sums).sum(0)
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean = mean / dist.get_world_size()
    history.append(torch.cat([mean, norm[None]]).masked_fill(bad, math.nan))
    return bad


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """EMA with a warm-up, so that it never holds on to the random initialisation (step counts from 1)."""
    decay = min(decay, step / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ---- Looking at the model: its size, what the context is worth, pictures of classes never trained on.

def parameter_table(model):
    """One line per part with its number of parameters, and the total."""
    counts = collections.Counter()
    for key, p in model.named_parameters():
        names = ("model", key.split(".")[0], ".".join(key.split(".")[:2]))
        counts.update(dict.fromkeys(names, p.numel()))                      # a dict: a part without parts counts once
    return "\n".join(f"{name:<28} {count:>12,}" for name, count in counts.items())


@torch.no_grad()
def validate(model, split, args, dtype):
    """Loss on unseen classes with fixed sets, times and noise, and the context gain: how much larger the loss is
    when each set is generated from the context of another set; in all, and for each fifth of the times (low t first).
    -> dict of floats, and a list of five."""
    device, T, sets = split.images.device, model.config.diffusion_steps, max(2, args.batch_size)
    own, other, times = [], [], []                          # [B, K] of every batch
    for i in range(args.num_eval_batches):
        generator = rng(device, args.seed, VALIDATION, i)
        images, sees, t, noise, _ = draw_batch(split, sets, model.config, generator, training=False)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            own.append(model(images, sees, t, noise)[0])
            other.append(model(images, sees, t, noise, support=images.roll(1, 0))[0])
        times.append(t)
    loss, fifth = torch.stack(own), torch.stack(times) * 5 // T
    gain = torch.stack(other) - loss
    by_noise = [round((torch.where(fifth == i, gain, 0).sum() / (fifth == i).sum()).item(), 5) for i in range(5)]
    return {"val_loss": loss.mean().item(), "context_gain": gain.mean().item(), "context_gain_by_noise": by_noise}


@torch.no_grad()
def diagnostics(training, batch, dtype, grad_clip):
    """Is the context used, do gradients vanish? -> {"debug/...": number}: norm, mean and largest magnitude of the
    context vectors of a batch, their deviation from one to the next; norms of the last gradient before clipping."""
    model, (images, sees, *_) = training.model, batch
    norms = lambda part: torch.stack(torch._foreach_norm([p.grad for p in part.parameters()])).norm()
    clipped = (training.history[-1][2] / grad_clip).clamp(min=1)
    found = {"dit_grad_norm": norms(model.denoiser) * clipped}
    found |= {f"dit_layer_{i}_grad_norm": norms(block) * clipped for i, block in enumerate(model.denoiser.blocks[:3])}
    if model.encoder is not None:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            vector = model.read(fsdm.to_signal(images), sees).vector.float()            # [B, K, hdim]
        found |= {"context_norm": vector.norm(dim=2).mean(), "context_mean": vector.mean(),
                  "context_max": vector.abs().max(), "context_std": vector.flatten(0, 1).std(0).mean(),
                  "encoder_grad_norm": norms(model.encoder) * clipped}
    return {f"debug/{name}": value.item() for name, value in found.items()}


def load_inception(args, device):
    """-> the network that fid.py measures with, or None, said once, when its weights are not to be had."""
    try:
        return fid.load_inception(args.fid_weights, args.fid_dims, str(device))
    except fid.FIDError as error:
        return print(f"training without --compute_fid: {error}")


def look(args, step, ema, split, dtype, inception, log):
    """Shows the averaged weights on unseen classes: loss, context gain, a picture, few-shot scores if asked for."""
    out, scores = Path(args.out_dir), validate(ema, split, args, dtype)
    support, _ = sample.draw_support(split, 4 * args.num_sample_batches, ema.config.sample_size - 1, args.seed, PICTURE)
    samples = sample.generate(ema, support, 8, dtype, guidance=2.0 if hasattr(ema, "null") else 1.0, seed=args.seed)
    write_whole(out / f"samples_{step:07d}.png", lambda file: sample.grid(support, samples).save(file, "png"))
    if inception is not None:
        options = dict(K=support.shape[1], seed=args.seed, sampler="2m_sde", steps=20, guidance=1.0)
        try:
            scores["few_shot"], n = sample.evaluate(ema, split, inception, args.fid_num_samples, dtype=dtype, **options)
            scores["few_shot_recipe"] = dict(options, split="val", images=n, dims=args.fid_dims, weights="ema")
            print(sample.table(scores["few_shot"]))
        except (ValueError, fid.FIDError) as error:
            print(f"no few-shot scores: {error}")
    log(f"step {step:>7,}  unseen classes: loss {scores['val_loss']:.4f}, context gain {scores['context_gain']:.4f}, "
        f"picture samples_{step:07d}.png", step=step, **scores)


# ---- Keeping it: the log and the checkpoint.

def start_wandb(args):
    """-> wandb with a run begun. Raises ValueError when there is none."""
    try:
        import wandb
        wandb.init(project="fsdm", name=args.out_dir, config=vars(args))
        return wandb
    except Exception as error:                              # not installed, not logged in, no network
        raise ValueError(f"--use_wandb: {error} (pip install wandb, wandb login, or leave the flag out)") from None


class Log:
    """Prints, and appends every record to log.jsonl. Begins with the lines of the earlier log up to the step of the
    checkpoint that the run goes on from."""
    def __init__(self, path, step, earlier, wandb):
        def belongs(line):                                  # a full disk leaves half a line
            try:
                return json.loads(line)["step"] <= step
            except ValueError:
                return False
        lines = earlier.read_text().splitlines() if step and earlier.exists() else []
        write_whole(path, lambda file: file.write("".join(f"{line}\n" for line in lines if belongs(line)).encode()))
        self.path, self.wandb = path, wandb

    def __call__(self, sentence, **record):
        print(sentence, flush=True)
        if self.wandb is not None:
            self.wandb.log(record, step=record["step"])
        try:
            with open(self.path, "a") as file:
                record = json.loads(json.dumps(record), parse_constant=lambda name: None)   # JSON has no NaN
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            print(f"{self.path} lacks this line: {error.strerror}; training goes on", flush=True)


def write_checkpoint(path, step, training, args):
    """Replaces path whole or not at all. Raises ValueError when the weights are not finite, OSError on a full disk."""
    if not torch.stack(torch._foreach_norm(list(training.model.parameters()))).isfinite().all():
        raise ValueError(f"the weights are not finite at step {step}: lower --lr, or train with --precision fp32; "
                         f"{path} is as it was")
    state = dict(training.state(), config=dataclasses.asdict(training.model.config), step=step, dataset=args.dataset,
                 optimizer=args.optimizer)

    def write(file):
        try:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())                         # on the disk before it has the old one's name
        except RuntimeError as error:                       # torch's archive writer hides what the disk said
            raise error.__context__ if isinstance(error.__context__, OSError) else error
    write_whole(path, write)


def load_training(path, args, config, training):
    """Fills everything from a checkpoint -> the step it was saved at. ValueError names the flags that differ."""
    model, ema, optimizers, scaler, history = training
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        now = dict(dataclasses.asdict(config), dataset=Path(args.dataset).name, optimizer=args.optimizer)
        then = dict(dataclasses.asdict(Config(**saved["config"])), dataset=Path(saved["dataset"]).name,
                    optimizer=saved["optimizer"])
        differ = ", ".join(f"--{k} {then.get(k)} (now {v})" for k, v in now.items() if then.get(k) != v)
        if differ:
            raise ValueError(f"{path} was trained with {differ}: pass the same, another --out_dir, or --restart")
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
            for group in optimizer.param_groups:
                group["weight_decay"] = args.weight_decay   # as asked for now; lr is set at every step
        if saved["scaler"]["scale"] != 1:                   # 1: saved where none was needed; fp16 starts with its own
            scaler.load_state_dict(saved["scaler"])
        history += [row.to(model.alpha_bar.device) for row in saved["history"]]
        return saved["step"]
    except (ValueError, OSError):
        raise
    except Exception as error:                              # what is no checkpoint fails in many ways
        raise ValueError(f"{path} cannot be resumed: {str(error).splitlines()[0]}") from None


def move_aside(out):
    """Renames a folder that holds a run to <out>_1, _2, ...: the first name that is free."""
    if (out / "ckpt.pt").exists():
        aside = next(path for i in range(1, 10_000) if not (path := out.with_name(f"{out.name}_{i}")).exists())
        out.rename(aside)
        print(f"the run that was in {out} is now in {aside}")


# ---- The run: machine, data, a new model or its checkpoint; then the loop: step, log, save, look.

def main(argv=None):
    started = time.time()
    args, config = parse_args(argv)
    torch.manual_seed(args.seed)                                            # the initial weights
    if config.hdim < config.hidden_size and config.encoder != "none":
        print(f"warning: hdim {config.hdim} is below hidden_size {config.hidden_size}: the context is a bottleneck")
    if args.max_steps == 0:
        return print(parameter_table(FSDM(config)))
    device, rank, world = connect(args.device)
    parts = args.accumulate * world
    if args.batch_size % parts:
        raise ValueError(f"--batch_size {args.batch_size} cannot be shared by {world} process(es) in {args.accumulate} "
                         f"part(s) each: choose a multiple of {parts}")
    say = print if rank == 0 else lambda *_, **__: None
    dtype, reason = fsdm.choose_precision(device, args.precision)
    compiled, why = choose_compile(device, args.no_compile)
    say(f"preset {args.preset}, device {device}{f' and {world - 1} more' if world > 1 else ''}, {str(dtype)[6:]} "
        f"({reason}), {'compiled' if compiled else 'eager'} ({why})")
    if args.benchmark:
        return benchmark(config, args, device, dtype, compiled)

    if rank > 0 and args.download:
        anyone(False)                                                       # waits until rank 0 has fetched it
    data = fsdm.load_data(args.dataset, args.data_dir, config.image_size, config.in_channels, args.download)
    if rank == 0 and args.download:
        anyone(False)
    fsdm.check_data(data, config.sample_size)
    data = {name: split.to(device) for name, split in data.items()}
    say(f"{args.dataset}: " + ", ".join(f"{len(s.images):,} images of {len(s.names):,} {name} classes"
                                        for name, s in data.items()))
    training, out, step = make_training(config, args, device, dtype), Path(args.out_dir), 0
    if args.restart and rank == 0:
        move_aside(out)
    anyone(False)                                                           # every process sees the same out_dir now
    ckpt = out / "ckpt.pt"
    source = ckpt if ckpt.exists() or not args.resume else Path(args.resume)
    if source.exists() or args.resume:
        step = load_training(source, args, config, training)
        say(f"going on from {source} at step {step:,}")
    if step >= args.max_steps:
        return say(f"that is --max_steps {args.max_steps:,} already: pass a larger one (and --max_hours) to go on")
    inception = load_inception(args, device) if args.compute_fid and rank == 0 else None
    wandb = start_wandb(args) if args.use_wandb and rank == 0 else None
    model, log = training.model, say
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        log = Log(out / "log.jsonl", step, source.with_name("log.jsonl"), wandb)
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.batch_size} sets of {config.sample_size} "
        f"images a step{'; the first step compiles, a silent minute or two' if compiled else ''}",
        step=step, args=vars(args), config=dataclasses.asdict(config), device=str(device), processes=world,
        dtype=str(dtype), compiled=compiled, torch=torch.__version__)
    if compiled:
        compile_in_place(model, dtype)
    net = DistributedDataParallel(model) if world > 1 else model

    def batches(step):                                                      # this process's parts, one by one
        for part in range(rank * args.accumulate, (rank + 1) * args.accumulate):
            yield draw_batch(data["train"], args.batch_size // parts, config,
                             rng(device, args.seed, TRAINING, step, part))

    stop = []                                                               # a signal asks for the last save
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(1))
    first, asked = step, args.max_steps
    origin = since = (time.time(), step)                                    # pace and images/s count from here
    skipped = in_a_row = torch.zeros((), device=device)
    deadline = started + args.max_hours * 3600 if args.max_hours is not None else math.inf
    saved_at, save_seconds, pictured = time.time(), 12.0, None              # the longest save (at first a guess) counts
    seconds_left = lambda: max(0, deadline - 1.5 * save_seconds - time.time())
    while step < args.max_steps and not anyone(bool(stop) or seconds_left() == 0):
        bad = train_step(net, training, batches(step), args, dtype, step)
        step += 1
        skipped, in_a_row = skipped + bad, (in_a_row + 1) * bad
        if step == first + 1 and step % args.log_interval:
            say(f"the first step took {time.time() - since[0]:.0f} s", flush=True)
            origin = since = (time.time(), step)                            # compiling is not training speed
        if step % args.log_interval == 0:
            value, kl, norm = torch.stack(training.history).nanmean(0).tolist()
            lost, streak = int(skipped), int(in_a_row)
            if streak >= PATIENCE:
                raise ValueError(f"the last {streak} gradients were not finite (step {step}): lower --lr, or "
                                 f"train with --precision fp32; {ckpt} is as it was")
            rate = (step - since[1]) / (time.time() - since[0]) * args.batch_size * config.sample_size
            pace = (step - origin[1]) / (time.time() - origin[0])           # of the whole run: no slow moment ends it
            args.max_steps = int(min(asked, least(step + pace * seconds_left())))       # so that lr falls in time
            left = (args.max_steps - step) / pace
            log(f"step {step:>7,}  loss {value:.4f}{f'  KL {kl:.2f}' if kl else ''}  {rate:,.0f} images/s"
                f"  {left / 60:,.0f} min left{f'  {lost} steps skipped: not finite' if lost else ''}",
                step=step, loss=value, kl=kl, grad_norm=norm, skipped=lost, images_per_second=rate,
                seconds=time.time() - started,
                **(diagnostics(training, next(batches(step - 1)), dtype, args.grad_clip) if args.debug else {}))
            training.history.clear()
            since = (time.time(), step)
        if rank == 0 and (step % args.save_interval == 0 or time.time() - saved_at > SAVE_SECONDS):
            began = time.time()
            try:
                write_checkpoint(ckpt, step, training, args)
                if step % args.save_interval == 0:
                    look(args, step, training.ema, data["val"], dtype, inception, log)
                    pictured = step
            except OSError as error:
                log(f"step {step:>7,}  not saved: {error}; {ckpt} is as it was and training goes on", step=step)
            saved_at = time.time()
            since, save_seconds = (since[0] + saved_at - began, since[1]), max(save_seconds, saved_at - began)
    if rank == 0 and pictured != step:
        write_checkpoint(ckpt, step, training, args)
        look(args, step, training.ema, data["val"], dtype, inception, log)
    anyone(False)                                                           # nobody leaves before the last save
    say(f"stopped at step {step:,} after {(time.time() - started) / 60:.1f} minutes; "
        f"the same command{' with a larger --max_steps' if step >= asked else ''} goes on, "
        f"python sample.py --ckpt {ckpt} --support IMAGES generates")


# ---- How fast: the same step on random images.

def random_split(config, device, classes=64):
    """-> a Split of noise, for measuring."""
    M, size = classes * config.sample_size, config.image_size
    images = torch.randint(0, 256, (M, config.in_channels, size, size), dtype=torch.uint8)
    return fsdm.Split(images, torch.arange(0, M + 1, config.sample_size), [""] * classes, config.sample_size).to(device)


def benchmark(config, args, device, dtype, compiled):
    """Prints time, arithmetic and memory of training steps and of sampling, on random images; trains nothing."""
    size, sets = config.sample_size, args.batch_size // args.accumulate
    split = random_split(config, device)
    training = make_training(config, args, device, dtype)
    draw = lambda sets: draw_batch(split, sets, config, rng(device, 0))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):   # fused attention counts as none
        training.model(*draw(1))[0].mean().backward()
    flops = counter.get_total_flops() / size                                # an image, forward and backward
    if compiled:
        compile_in_place(training.model, dtype)
    rate = fsdm.matmul_rate(device, dtype, 4096 if device.type == "cuda" else 1024)

    def report(name, count, run):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        run(), run()                                                        # compiles, fills caches
        began, times = time.time(), []
        while len(times) < 5 or len(times) < 50 and time.time() - began < 20:
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        times = sorted(times)
        median = times[len(times) // 2]
        print(f"{name}: {median * 1000:,.1f} ms (median of {len(times)}, {times[0] * 1000:,.1f} to "
              f"{times[-1] * 1000:,.1f}), {count / median:,.1f} images/s, peak memory {peak_memory(device):.2f} GiB")
        return count / median

    speed = report(f"training, {args.batch_size} sets of {size}", args.batch_size * size, lambda: train_step(
        training.model, training, (draw(sets) for _ in range(args.accumulate)), args, dtype, 0))
    print(f"  {flops / 1e9:.2f} GFLOP an image, {speed * flops / 1e12:.3f} TFLOP/s: {speed * flops / rate:.0%} of this "
          f"machine's matrix products ({rate / 1e12:.2f} TFLOP/s in {str(dtype)[6:]})")
    n = 8 if device.type == "cuda" else 1                                   # a CPU needs no more to be busy
    support, _ = sample.draw_support(split, 8, max(1, size - 1), args.seed, PICTURE)
    report(f"sampling, 8 sets x {n} images, 2m_sde in 20 steps", 8 * n,
           lambda: sample.generate(training.ema, support, n, dtype))


def peak_memory(device):
    """-> GiB: of tensors on a GPU, of the whole process on a CPU (nan on Windows, which does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = "out of memory: lower --batch_size, --hidden_size or --image_size; the last checkpoint is whole"
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()
