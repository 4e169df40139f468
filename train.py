"""Trains a few-shot diffusion model: every image of a set is generated from the others.

    python train.py                                   # the demo: 12 minutes on two CPU cores
    python train.py --max_steps 0 --preset reference  # the parameter table, nothing else
    python train.py --dataset my_photos --noise_offset 0 --max_hours 2 --out_dir runs/mine
    python train.py --preset t4 --dataset cifar100 --download --max_hours 8.5
    torchrun --standalone --nproc_per_node=2 train.py --preset t4 ...     # two GPUs

Leaves in --out_dir: ckpt.pt (every five minutes, before a picture and at the end), log.jsonl (every number
printed, and more), and every --save_interval steps and at the end samples_<step>.png, classes never
trained on, support on the left and samples on the right. The same command again goes on from ckpt.pt.
A flag below without a default, or with that of the reference, takes the preset's value: PRESETS in
fsdm.py, RECIPES in train.py.
"""
import collections
import copy
import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import textwrap
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fid
import fsdm
import sample
from fsdm import FSDM, PICTURE, TRAINING, VALIDATION, Config, autocast, rng, say, write_whole


# ---- The command line: every field of Run is a flag, and so is every field of Config.
# What is None here takes its value from the recipe of the preset, if that has it.

PATIENCE = 50                           # so many steps with none kept, seen at log lines, end the run
SAVE_SECONDS = 300                      # most seconds between two checkpoints


@dataclass
class Run:
    preset: Literal[tuple(fsdm.PRESETS)] = None  # shape and recipe (demo; of a whole shape, reference)
    dataset: str = None             # glyphs, cifar100, omniglot, mnist, celeba, a folder or an .npz
    data_dir: str = "data"          # where torchvision's files of a named data set lie
    download: bool = False          # fetch a named data set when it is not in data_dir
    out_dir: str = None             # for checkpoint, log and pictures; runs/PRESET if left out
    resume: str = None              # a checkpoint to go on from when out_dir has none
    init: str = None                # a checkpoint whose weights and shape a new run begins with
    restart: bool = False           # begin anew; an old run in out_dir is moved aside
    batch_size: int = None          # sets a step, over all GPUs; each is sample_size images
    accumulate: int = 1             # parts of a batch, one after the other: less memory
    optimizer: Literal["muon", "adamw"] = None  # muon: for the blocks' matrices, AdamW for the rest
    lr: float = None                # peak learning rate
    warmup_steps: int = None        # steps over which the learning rate rises from 0
    cooldown: float = None          # share of the run, at its end, over which it falls to 0 again
    weight_decay: float = 0.01      # share of lr by which weights shrink a step
    grad_clip: float = 1.0          # largest norm of the whole gradient
    noise_offset: float = None      # size of a random shift of each channel's noise
    kl_weight: float = 1e-6         # of a variational context's KL in the loss
    ema_decay: float = None         # of the averaged weights, after their warm-up
    max_steps: int = None           # no limit with max_hours alone; 0: only print the sizes
    max_hours: float = None         # after so many hours this command has saved all and ended
    log_interval: int = None        # steps between log lines; one comes every half minute anyway
    save_interval: int = None       # steps between pictures
    num_eval_batches: int = 10      # batches of unseen classes in a validation
    num_sample_batches: int = 2     # batches of 4 support sets in a picture
    compute_fid: bool = False       # score generated images of unseen classes at every picture
    fid_num_samples: int = 600      # images to generate for that score
    fid_weights: str = None         # Inception weights file; torch's cache or a download if left out
    fid_dims: Literal[64, 192, 768, 2048] = 2048            # features of Inception to compare
    debug: bool = False             # log norms of the context and of gradients as debug/...
    use_wandb: bool = False         # log to wandb.ai too
    seed: int = 0                   # of weights, batches, noise and pictures
    device: str = "auto"            # auto, cpu, cuda, cuda:1 or mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"     # of matrix products
    no_compile: bool = False        # run the step eagerly: slower, but it starts at once


VFSDDPM = dict(dataset="glyphs", optimizer="adamw", batch_size=32, lr=1e-4, warmup_steps=0,
               cooldown=0.0, noise_offset=0.0, ema_decay=0.999, max_steps=300_000,
               log_interval=300, save_interval=20_000)
RECIPES = {
    "demo": dict(dataset="glyphs", optimizer="muon", batch_size=8, lr=3e-3, warmup_steps=100,
                 cooldown=0.4, noise_offset=0.1, ema_decay=0.998, max_steps=2400, max_hours=0.24,
                 log_interval=100, save_interval=800),
    "reference": VFSDDPM,
    "wide": VFSDDPM,
    "mnist": dict(VFSDDPM, dataset="mnist", batch_size=128, lr=2e-4, save_interval=2000),
    "t4": dict(VFSDDPM, optimizer="muon", batch_size=16, lr=2e-3, warmup_steps=1000, cooldown=0.3,
               save_interval=5000),
}


def parse_args(argv=None):
    """-> (a namespace of Run's fields, and of Config's as they were typed, None if they were not; Config).
    When a value makes no sense it exits with code 2 or raises ValueError or OSError, with one sentence."""
    p = fsdm.make_parser(__doc__, Run)
    fsdm.add_flags(p, Config, "reference: ")
    p.add_argument("--context_channels", dest="hdim", type=int,
                   help="another name of --hdim, VFSDDPM's; the last one counts")
    args = p.parse_args(argv)
    given = {name for name, value in vars(args).items() if value is not None}
    if args.restart and args.resume:
        p.error("--restart begins anew and --resume goes on: pass one of them")

    # VFSDDPM's command lines name the whole model and no preset
    whole = {"hidden_size", "depth", "hdim"} <= given
    preset = args.preset or ("reference" if whole else "demo")
    p.set_defaults(**vars(Run()))
    p.set_defaults(**RECIPES[preset], preset=preset, out_dir=f"runs/{preset}")
    if given & {"max_steps", "max_hours"}:                  # then the recipe's limits are none
        p.set_defaults(max_steps=sys.maxsize, max_hours=None)
    args = p.parse_args(argv)                               # again, now with defaults

    fsdm.check_least(
        p, args, batch_size=1, accumulate=1, log_interval=1, save_interval=1, num_eval_batches=1,
        num_sample_batches=1, fid_num_samples=4, max_steps=0, warmup_steps=0, lr=1e-12, max_hours=1e-12,
        grad_clip=1e-12, weight_decay=0, noise_offset=0, kl_weight=0, ema_decay=0, cooldown=0, seed=0)
    if max(args.ema_decay, args.cooldown) > 1:
        p.error(f"--ema_decay is {args.ema_decay}, --cooldown {args.cooldown}: each is at most 1")
    if args.init and args.restart and Path(args.out_dir).resolve() in Path(args.init).resolve().parents:
        p.error("--restart would move the file of --init away: pass another --out_dir")

    shape = {name: getattr(args, name) for name in given if hasattr(Config, name)}
    config = Config(**fsdm.PRESETS[args.preset])
    if args.init:
        config = fsdm.load_model(args.init).config
    config = dataclasses.replace(config, **shape)
    if config.hdim < config.hidden_size and config.encoder != "none":
        print(f"warning: hdim {config.hdim} below hidden_size {config.hidden_size} is a bottleneck")
    return args, config


# ---- Optimizers: Muon for the matrices inside the blocks, AdamW for all the rest.
# step(kept): kept is a tensor on the device, 1 or, for a gradient that is not finite, 0: then the step
# changes neither weights nor state, and nobody has waited for the GPU to know.

class Muon(torch.optim.Optimizer):
    """A matrix moves by its momentum, made orthogonal (Jordan et al. 2024), at AdamW's step length
    (Liu et al. 2025), so that one learning rate serves both. Matrices of one shape are one batch."""
    def __init__(self, matrices, lr, weight_decay, dtype):
        by_shape = collections.defaultdict(list)
        for p in matrices:
            by_shape[p.shape].append(p)
        super().__init__([dict(params=same) for same in by_shape.values()],
                         dict(lr=lr, weight_decay=weight_decay, momentum=0.95))
        self.dtype = dtype                                  # to multiply in

    @torch.no_grad()
    def step(self, kept):
        for group in self.param_groups:
            matrices, lr, beta = group["params"], group["lr"], group["momentum"]
            gradient = torch.stack([p.grad for p in matrices])      # [matrices, m, n]
            gradient = torch.where(kept > 0, gradient, 0)
            state = self.state[matrices[0]]                 # of all of this shape
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            momentum = state["momentum"].lerp_(gradient, (1 - beta) * kept)
            update = orthogonalize(gradient.lerp(momentum, beta), self.dtype)       # Nesterov's
            update = update * (0.2 * max(gradient.shape[1:]) ** 0.5 * lr * kept)
            for p, change in zip(matrices, update):
                p.mul_(1 - lr * group["weight_decay"] * kept).sub_(change)


def orthogonalize(x, dtype):
    """[k, m, n] -> float32, nearly U V^T of every x = U S V^T: five Newton-Schulz rounds bring the
    singular values into 0.7 .. 1.2. Each multiplies x by a polynomial p of r = x x^T; r is the
    smaller, so the products are made of it alone, and x is multiplied at the end. In half precision
    that drifts, so r is made anew after two rounds."""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT, dtype).mT
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    one = torch.eye(x.shape[1], dtype=dtype, device=x.device)

    def polynomial(r):                                      # [k, m, m]
        return 3.4445 * one - 4.7750 * r + 2.0315 * (r @ r)

    for rounds in (2, 3):
        r = x @ x.mT
        p = product = polynomial(r)
        for _ in range(rounds - 1):
            r = p @ r @ p
            p = polynomial(r)
            product = p @ product
        x = product @ x
    return x.float()


class AdamW(torch.optim.AdamW):
    def step(self, kept):
        # GradScaler's way to tell a fused optimizer, on the device, to do nothing; MPS's does not listen
        self.found_inf = 1 - kept
        if kept.device.type == "mps" and not kept:
            return
        super().step()


def make_optimizers(model, args, dtype):
    inside, rest = [], []
    for name, p in model.named_parameters():
        if args.optimizer == "muon" and ".blocks." in name and p.ndim == 2:
            inside.append(p)
        else:
            rest.append(p)
    adamw = AdamW(rest, args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay, fused=True)
    return [adamw, Muon(inside, args.lr, args.weight_decay, dtype)] if inside else [adamw]


# ---- One step: a batch of sets, the loss, the optimizers, the moving average.

def draw_batch(split, sets, config, generator, noise_offset):
    """-> images uint8 [B, K, C, H, W], sees bool [B, K, K], t int64 [B, K], noise float32 like the
    images, and noise for a variational context: what FSDM.forward takes."""
    K, device = config.sample_size, split.images.device
    classes, _ = fsdm.draw_classes(split, sets, generator)
    images = split.images[fsdm.draw_sets(split, classes, K, generator)]
    sees = fsdm.leave_one_out(sets, K, generator, config.vary_support, config.context_dropout)
    t = torch.randint(config.diffusion_steps, (sets, K), generator=generator, device=device)
    noise = torch.randn(images.shape, generator=generator, device=device)
    # offset noise (Guttenberg 2023): it moves a whole channel, as the errors of colour do that sampling
    # makes, so the model learns to trust the colours of its support, not those of its noisy input
    shift = torch.randn(*images.shape[:3], 1, 1, generator=generator, device=device)
    noise += noise_offset * shift
    context_noise = None
    if config.mode_context == "variational":
        shape = (sets, *fsdm.context_noise_shape(config, K))
        context_noise = torch.randn(shape, generator=generator, device=device)
    return images, sees, t, noise, context_noise


def learning_rate(peak, step, warmup_steps, progress, cooldown):
    """Rises to the peak over the first steps, and falls to 0 over the last share of the run. step
    counts from 0; progress, 0 .. 1, is the share of the run that is done."""
    return peak * min(1, (step + 1) / max(1, warmup_steps), (1 - progress) / max(1e-9, cooldown))


def average_decay(decay, step):
    """The moving average's decay, step counting from 0. It warms up, so as not to hold on to the random
    initial weights."""
    return min(decay, (step + 1) / (step + 11))


class Training:
    """What a run carries from step to step, for any model whose forward returns errors and KL."""
    def __init__(self, model, args, dtype):
        device = next(model.parameters()).device
        self.args, self.dtype, self.device = args, dtype, device
        self.model = self.net = model                       # net: the model, or DDP around it
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizers = make_optimizers(model, args, dtype)
        # in fp16 a scale keeps small gradients above zero
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        # since the last log line: the sums of loss, KL and gradient norm, steps kept, steps skipped
        self.totals = torch.zeros(5, device=device)

    def step(self, batches, lr, step):
        """Updates the model by the mean gradient of `args.accumulate` batches. Waits for no GPU."""
        args, parameters = self.args, list(self.model.parameters())

        # the loss and its gradient; DDP, if there is one, averages gradients with the last part
        self.model.zero_grad()
        loss = torch.zeros(2, device=self.device)
        for part, batch in enumerate(batches, 1):
            self.net.require_backward_grad_sync = part == args.accumulate
            with autocast(self.device, self.dtype):
                error, kl = self.net(*batch)
            both = torch.stack([error.mean(), kl.mean()]) / args.accumulate
            self.scaler.scale(both[0] + args.kl_weight * both[1]).backward()
            loss += both.detach()                           # .item() here would wait for the GPU

        # clip; a gradient that is not finite is counted, and nothing else comes of it: `kept` does what
        # scaler.step would wait for the GPU to do
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = self.norm = torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip)
        kept = norm.isfinite().float()

        # step
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step(kept)
        self.scaler.update()                                # a smaller scale after infinities

        # average
        weight = (1 - average_decay(args.ema_decay, step)) * kept
        with torch.no_grad():
            for average, p in zip(self.ema.parameters(), parameters):
                average.lerp_(p, weight)

        # remember
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss = loss / dist.get_world_size()
        sums = torch.cat([loss, norm[None]])
        self.totals += torch.cat([torch.where(kept > 0, sums, 0), kept[None], 1 - kept[None]])

    def save(self, path, step):
        """Replaces path whole or not at all. ValueError when the weights are not finite, OSError on a
        full disk."""
        weights = self.model.state_dict()
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise ValueError(f"the weights are not finite at step {step}: lower --lr, or train "
                             f"with --precision fp32; {path} is as it was")
        config, args = vars(self.model.config), self.args
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = dict(step=step, config=config, dataset=args.dataset, optimizer=args.optimizer,
                     model=weights, ema=self.ema.state_dict(), optimizers=optimizers,
                     scaler=self.scaler.state_dict(), totals=self.totals)

        def write(file):
            try:
                torch.save(state, file)
            except RuntimeError as error:   # torch's archive writer hides what the disk said
                raise error.__context__ if isinstance(error.__context__, OSError) else error

        write_whole(path, write)

    def load(self, path):
        """Goes on from a checkpoint -> its step. ValueError names the flags that differ, or says why the
        file cannot be resumed."""
        try:
            saved = fsdm.read_checkpoint(path)
            known = vars(Config()) | saved["config"]        # it may be older than a field
            then = dict(known, dataset=Path(saved["dataset"]).name, optimizer=saved["optimizer"])
            now = dict(vars(self.model.config), dataset=Path(self.args.dataset).name,
                       optimizer=self.args.optimizer)
            differ = [f"--{k} {then[k]} (now {now[k]})" for k in now if then[k] != now[k]]
            if differ:
                raise ValueError(f"{path} was trained with {', '.join(differ)}: pass the same, or "
                                 "begin anew, with --init in place of --resume, another --out_dir "
                                 "or --restart")
            self.model.load_state_dict(saved["model"])
            self.ema.load_state_dict(saved["ema"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                groups = optimizer.state_dict()["param_groups"]     # as asked for now, on this device
                optimizer.load_state_dict(dict(state, param_groups=groups))
            if saved["scaler"]:                             # empty: saved where none was needed
                self.scaler.load_state_dict(saved["scaler"])
            self.totals.copy_(saved["totals"])
            return saved["step"]
        except (ValueError, OSError):
            raise
        except Exception as error:      # what is no checkpoint fails in many ways
            reason = textwrap.shorten(str(error), 200)
            raise ValueError(f"{path} cannot be resumed: {reason} (a file of weights "
                             "alone is for --init)") from None

    def load_weights(self, path):
        """Begins with the averaged weights of a checkpoint. ValueError when its shapes are others."""
        weights = fsdm.load_model(path).state_dict()
        try:
            self.model.load_state_dict(weights)
            self.ema.load_state_dict(weights)
        except RuntimeError as error:                       # its first line only says that it failed
            reason = str(error).splitlines()[1].strip()
            raise ValueError(f"--init {path} has other shapes than these flags: {reason}") from None


# ---- Looking at the model: its size, what the context is worth, pictures of classes never trained on.

def parameter_table(model):
    """A line for every part with its number of parameters, and the total."""
    counts = collections.Counter()
    for key, p in model.named_parameters():
        parts = key.split(".")
        for name in {"model", parts[0], ".".join(parts[:2])}:       # a set: no part counts twice
            counts[name] += p.numel()
    return "\n".join(f"{name:<28} {count:>12,}" for name, count in sorted(counts.items()))


@torch.no_grad()
def validate(model, split, sets, batches, seed, dtype):
    """Loss on unseen classes with fixed sets, times and noise, without an offset, and the context gain:
    how much larger the loss is when each set is generated from the context of another class (None when
    there is only one)."""
    config, device = model.config, split.images.device
    K = config.sample_size
    own, other = [], []                                     # errors [B, K] of every batch
    for i in range(batches):
        generator = rng(device, seed, VALIDATION, i)
        classes, others = fsdm.draw_classes(split, sets, generator)
        images = split.images[fsdm.draw_sets(split, classes, K, generator)]
        support = split.images[fsdm.draw_sets(split, others, K, generator)]
        sees = fsdm.leave_one_out(sets, K, generator)
        t = torch.randint(config.diffusion_steps, (sets, K), generator=generator, device=device)
        noise = torch.randn(images.shape, generator=generator, device=device)
        with autocast(device, dtype):
            own.append(model(images, sees, t, noise)[0])
            other.append(model(images, sees, t, noise, support=support)[0])

    loss = torch.stack(own).mean().item()
    gain = torch.stack(other).mean().item() - loss
    return dict(val_loss=loss, context_gain=gain if len(split.names) > 1 else None)


@torch.no_grad()
def diagnostics(training, batch):
    """Is the context used, do gradients vanish? -> {"debug/...": number}: of the context vectors of a
    batch, and norms of the last gradient as it was before clipping."""
    model, (images, sees, *_) = training.model, batch
    unclip = (training.norm / training.args.grad_clip).clamp(min=1)

    def norm(part):
        return torch.nn.utils.get_total_norm([p.grad for p in part.parameters()]) * unclip

    found = {"dit_grad_norm": norm(model.denoiser)}
    for i, block in enumerate(model.denoiser.blocks[:3]):
        found[f"dit_layer_{i}_grad_norm"] = norm(block)
    if model.encoder is not None:
        found["encoder_grad_norm"] = norm(model.encoder)
        with autocast(training.device, training.dtype):
            vector = model.read(fsdm.to_signal(images), sees).vector.float()        # [B, K, hdim]
        found["context_norm"] = vector.norm(dim=2).mean()
        found["context_mean"] = vector.mean()
        found["context_max"] = vector.abs().max()
        found["context_std"] = vector.flatten(0, 1).std(0).mean()   # from one to the next
    return {f"debug/{name}": value.item() for name, value in found.items()}


def picture_of(step, out_dir):
    return Path(out_dir, f"samples_{step:07d}.png")


def look(training, split, step, sets, inception, log):
    """Shows the averaged weights on unseen classes: loss, context gain, a picture, and few-shot scores
    if asked for."""
    args, model, dtype = training.args, training.ema, training.dtype
    found = validate(model, split, sets, args.num_eval_batches, args.seed, dtype)
    K, rows = max(1, model.config.sample_size - 1), 4 * args.num_sample_batches
    support, _ = fsdm.draw_support(split, rows, K, args.seed, PICTURE)
    samples = fsdm.generate(model, support, 8, seed=args.seed, dtype=dtype)
    if inception is not None:
        options = dict(sampler="2m_sde", steps=20, guidance=fsdm.best_guidance(model.config))
        try:
            scores, recipe = sample.evaluate(model, split, inception, args.fid_num_samples, K,
                                             seed=args.seed, dtype=dtype, **options)
            found |= dict(few_shot=scores, few_shot_recipe=dict(recipe, split="val", weights="ema"))
            say(sample.table(scores))
        except ValueError as error:
            say(f"no few-shot scores: {error}")
    # last, as the sign that all this was done
    picture = picture_of(step, args.out_dir)
    write_whole(picture, lambda file: sample.grid(support, samples).save(file, "png"))
    gain = found["context_gain"]
    gain = "not measured, which needs two classes" if gain is None else f"{gain:.4f}"
    log(f"step {step:>7,}  unseen classes: loss {found['val_loss']:.4f}, context gain {gain}, "
        f"picture {picture.name}", step=step, **found)


class Log:
    """Prints, and appends every record to log.jsonl. It begins with the lines of the earlier log up
    to the step of the checkpoint that the run goes on from."""
    def __init__(self, path, step=0, earlier=None, wandb=None):
        self.path, self.wandb, self.torn = path, wandb, ""
        lines = []
        if step and earlier.exists():
            lines = earlier.read_text(errors="replace").splitlines()
        kept = "".join(f"{line}\n" for line in lines if self.step_of(line) <= step)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write(kept.encode()))
        self.inode = path.stat().st_ino

    @staticmethod
    def step_of(line):
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):           # a full disk leaves half a line
            return math.inf

    def __call__(self, sentence, **record):
        say(sentence)
        if self.wandb is not None:
            self.wandb.log(record, step=record["step"])
        # JSON has no NaN
        record = json.loads(json.dumps(record), parse_constant=lambda name: None)
        try:
            with open(self.path, "a") as file:
                if os.fstat(file.fileno()).st_ino != self.inode:
                    say(f"another run has begun {self.path} anew: give each its own --out_dir")
                file.write(f"{self.torn}{json.dumps(record)}\n")
            self.torn = ""
        except OSError as error:
            self.torn = "\n"                                # half a line may be there
            say(f"{self.path} lacks this line: {error.strerror}; training goes on")


def start_wandb(args, config):
    """-> wandb with a run begun, or None if not asked for. Raises ValueError when there is none."""
    if not args.use_wandb:
        return None
    try:
        import wandb
        wandb.init(project="fsdm", name=args.out_dir, config=vars(args) | vars(config))
        return wandb
    except Exception as error:          # not installed, not logged in, no network
        raise ValueError(f"--use_wandb: {error} (pip install wandb, wandb login, or leave the flag "
                         "out)") from None


def inception_or_none(args, device):
    """-> the network that fid.py measures with, or None, said once, when there are no weights."""
    try:
        return fid.load_inception(args.fid_weights, args.fid_dims, str(device))
    except fid.FIDError as error:
        print(f"training without --compute_fid: {error}")


# ---- The run: machine, data, a new model or its checkpoint; then the loop: step, log, save, look.

def connect(requested):
    """-> (device, rank, processes): this process alone, or one of those that torchrun started, on its
    own GPU."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    any_gpu = requested in ("auto", "cuda")
    if any_gpu and torch.cuda.is_available():
        requested = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = fsdm.choose_device(requested)
    torch.set_float32_matmul_precision("high")              # TF32 where it exists
    backend, gpus = "gloo", torch.cuda.device_count()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if dist.is_nccl_available():    # not on Windows
            backend = "cpu:gloo,cuda:nccl"      # gloo for numbers on the CPU: no wait for the GPU
        if world == 1 and gpus > 1 and any_gpu:
            print(f"{gpus} GPUs are here and this run uses one; for all of them:\n"
                  f"  torchrun --standalone --nproc_per_node={gpus} {shlex.join(sys.argv)}")
    if world > 1:
        # the first process validates and draws while the others wait
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    if rank > 0:
        # only the first one speaks; of class names, whose bytes may be any
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")
    return device, rank, world


def largest(number):
    """-> the largest of the numbers of all processes. Each waits here for all."""
    if not dist.is_initialized():
        return number
    number = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def wait_for_all():
    largest(0)


def load_data(args, config, rank):
    """-> {"train": Split, "val": Split} on the CPU; with --download the first process fetches it
    while the others wait."""
    if rank > 0 and args.download:
        wait_for_all()
    data = fsdm.load_data(args.dataset, args.data_dir, config.image_size, config.in_channels,
                          args.download, ("train", "val"))
    if rank == 0 and args.download:
        wait_for_all()
    fsdm.check_data(data, config.sample_size)
    return data


def begin(training, out, args, rank):
    """-> (the step to go on from, 0 for a new run, and the checkpoint that it was read from)."""
    source = out / "ckpt.pt"
    if args.restart and rank == 0 and source.exists():
        print(f"the run that was in {out} is now in {out.rename(fsdm.free_name(out))}")
    wait_for_all()                                          # now each sees the same out_dir
    if not source.exists() and not args.resume:
        if args.init:
            training.load_weights(args.init)
            print(f"beginning with the averaged weights of {args.init}")
        return 0, source
    if not source.exists():
        source = Path(args.resume)
    step = training.load(source)
    print(f"going on from {source} at step {step:,}")
    return step, source


def listen_for_stop():
    """-> a list that is empty until Ctrl-C or SIGTERM asks for the end."""
    stop = []

    def ask(*_):
        stop.append(True)
        say("stopping after this step; everything is saved first")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    return stop


def main(argv=None):
    started = time.perf_counter()
    args, config = parse_args(argv)
    torch.manual_seed(args.seed)                            # of the first weights
    model = FSDM(config)
    if args.max_steps == 0:
        print(parameter_table(model))
        return

    # the machine
    device, rank, world = connect(args.device)
    parts = args.accumulate * world
    sets = args.batch_size // parts
    if args.batch_size % parts:
        raise ValueError(f"--batch_size {args.batch_size} cannot be shared by {world} process(es) "
                         f"in {args.accumulate} part(s) each: choose a multiple of {parts}")
    dtype, reason = fsdm.choose_precision(device, args.precision)
    if device.type == "cpu" and largest(dtype == torch.bfloat16):
        dtype = torch.bfloat16          # in all processes: each has timed its own CPU
    compiled, why = fsdm.choose_compile(device, args.no_compile)
    print(f"preset {args.preset}, {world} x {device}, {str(dtype)[6:]} ({reason}), "
          f"{'compiled' if compiled else 'eager'} ({why})")

    # the data, on the device
    data = {part: split.to(device) for part, split in load_data(args, config, rank).items()}

    # the model, new or as its checkpoint left it
    training, out = Training(model.to(device), args, dtype), Path(args.out_dir)
    step, source = begin(training, out, args, rank)
    if step >= args.max_steps and picture_of(step, out).exists():
        print(f"that is --max_steps {args.max_steps:,} already: a larger one goes on")
        return
    if world > 1:
        training.net = DistributedDataParallel(model)
    if compiled and step < args.max_steps:
        print("the first step compiles, in silence (if that fails: --no_compile)")
        fsdm.compile_in_place(model, dtype)

    # what the run leaves behind; only the first process writes
    ckpt = out / "ckpt.pt"
    if rank == 0:
        inception = inception_or_none(args, device) if args.compute_fid else None
        log = Log(out / "log.jsonl", step, source.with_name("log.jsonl"), start_wandb(args, config))
        log(f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.batch_size} sets of "
            f"{config.sample_size} images a step",
            step=step, args=vars(args), config=vars(config), device=str(device),
            processes=world, dtype=str(dtype), compiled=compiled, torch=torch.__version__)
    stop = listen_for_stop()

    def batches(step):
        """This process's parts of a step, one by one."""
        for part in range(rank * args.accumulate, (rank + 1) * args.accumulate):
            generator = rng(device, args.seed, TRAINING, step, part)
            yield draw_batch(data["train"], sets, config, generator, args.noise_offset)

    first, progress = step, step / args.max_steps
    line_at = saved_at = time.perf_counter()
    line_step, streak = step, 0
    save_seconds = 12.0                                     # the longest save; at first a guess
    while progress < 1:
        # step
        lr = learning_rate(args.lr, step, args.warmup_steps, progress, args.cooldown)
        training.step(batches(step), lr, step)
        step += 1
        if step == first + 1 and compiled:
            say(f"the first step took {time.perf_counter() - line_at:.0f} s")
            line_at, line_step = time.perf_counter(), step  # compiling is not training speed

        # how much is done, of all steps or of this command's time, in which the last save must fit
        now = time.perf_counter()
        elapsed = now - started
        pace = (now - line_at) / max(1, step - line_step)
        limit = args.max_hours * 3600 - 1.5 * save_seconds - pace if args.max_hours else math.inf
        picture_due = step % args.save_interval == 0
        save_due = picture_due or now - saved_at > SAVE_SECONDS
        needed = save_seconds if save_due else 0
        over = stop or elapsed + needed > limit
        progress = largest(1 if over else max(step / args.max_steps, elapsed / limit))

        # log
        log_due = step % args.log_interval == 0 or now - line_at > 30
        if rank == 0 and log_due and step > line_step:
            *means, kept, skipped = training.totals.tolist()        # this waits for the GPU
            loss, kl, norm = (total / kept if kept else math.nan for total in means)
            streak = 0 if kept else streak + skipped
            pace = (time.perf_counter() - line_at) / (step - line_step)     # s a step, now that it is done
            rate = args.batch_size * config.sample_size / pace
            left = min((args.max_steps - step) * pace, limit - elapsed) / 60 if progress < 1 else 0
            said = f"step {step:>7,}  loss {loss:.4f}  {rate:,.0f} images/s  {left:,.0f} min left"
            said += f"  KL {kl:.2f}" if kl > 0 else ""
            said += f"  {skipped:.0f} steps skipped: not finite" if skipped else ""
            debug = diagnostics(training, next(batches(step - 1))) if args.debug else {}
            log(said, step=step, loss=loss, kl=kl, grad_norm=norm, skipped=skipped, lr=lr,
                images_per_second=rate, seconds=elapsed, **debug)
            training.totals.zero_()
            line_at, line_step = time.perf_counter(), step
            if streak >= PATIENCE:
                raise ValueError(f"the last {streak:.0f} gradients were not finite (step {step}): "
                                 "lower --lr, or train with --precision fp32; "
                                 f"{ckpt} is as it was")

        # save, and look
        began = time.perf_counter()
        if rank == 0 and save_due and progress < 1:
            try:
                training.save(ckpt, step)
                if picture_due:
                    look(training, data["val"], step, sets, inception, log)
            except OSError as error:
                log(f"step {step:>7,}  checkpoint or picture not written: {error}; the last {ckpt} is "
                    "whole and training goes on", step=step)
        if save_due:
            saved_at = time.perf_counter()
            save_seconds = max(save_seconds, saved_at - began)
            line_at += saved_at - began                     # saving is not training speed either

    if rank == 0:
        training.save(ckpt, step)
        signal.signal(signal.SIGINT, signal.default_int_handler)    # all is saved: Ctrl-C ends it at once
        look(training, data["val"], step, sets, inception, log)
    wait_for_all()                                          # nobody leaves before the last save
    more = " without --restart" if args.restart else ""
    more += " with a larger --max_steps" if step >= args.max_steps else ""
    say(f"stopped at step {step:,} after {(time.perf_counter() - started) / 60:.1f} minutes; the same "
        f"command{more} goes on, python sample.py --ckpt {ckpt} --support IMAGES generates")


if __name__ == "__main__":
    fsdm.run(main, "lower --batch_size or raise --accumulate; the last checkpoint is whole")
    if dist.is_initialized():
        dist.destroy_process_group()
