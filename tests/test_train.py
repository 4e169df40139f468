"""Claims about the training program, on a model that trains in seconds."""
import copy
import importlib.util
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import fid
import fsdm
import kill
import sample
import speed
import train
from test_fsdm import opened

HERE = Path(__file__).parent.parent
SMALL = """--preset demo --image_size 8 --patch_size 4 --encoder_patch_size 4 --hidden_size 32 --hdim 32
    --depth 2 --num_heads 2 --encoder_depth 1 --sample_size 4 --diffusion_steps 50 --batch_size 4 --log_interval 2
    --save_interval 4 --num_eval_batches 2 --precision fp32 --device cpu --no_compile
    --cooldown 0 --max_steps 300000""".split()


def write_glyphs(path, classes):
    images, labels, names, _ = fsdm.glyphs(None, 8, False, classes=(classes, 0, 0), per_class=8)
    np.savez(path, images=images, labels=labels, class_names=names)
    return str(path)


@pytest.fixture(scope="session")
def glyph_file(tmp_path_factory):
    return write_glyphs(tmp_path_factory.mktemp("data") / "glyphs.npz", 20)


@pytest.fixture(scope="session")
def split(glyph_file):
    return fsdm.load_data(glyph_file, None, 8, 3)["train"]


def run(glyph_file, out, *flags):
    train.main([*SMALL, "--dataset", str(glyph_file), "--out_dir", str(out), *flags])
    return load(out)


def load(out):
    return torch.load(Path(out) / "ckpt.pt", weights_only=True)


def records(out, key="step"):
    """The lines of the log that have this key."""
    return [record for record in map(json.loads, open(Path(out) / "log.jsonl")) if key in record]


def begin(*flags, dtype=torch.float32):
    """-> a Training of a new small model, and its Config."""
    args, config = train.parse_args([*SMALL, *flags])
    torch.manual_seed(0)
    return train.Training(fsdm.FSDM(config), args, dtype), config


def state(training):
    """All that a step changes, by value."""
    return copy.deepcopy([training.model.state_dict(), training.ema.state_dict(),
                          [optimizer.state_dict() for optimizer in training.optimizers], training.totals])


class Clock:
    """Stands for train.py's: time passes in steps and saves, and a hundredth of a second at every look."""
    def __init__(self, monkeypatch, step, save=lambda: 0):
        self.now = 0.0
        self.add(monkeypatch, "step", lambda training, batches, lr, number: step(number))
        self.add(monkeypatch, "save", lambda *_: save())
        monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=self.look))

    def look(self):
        self.now += 0.01
        return self.now

    def add(self, monkeypatch, method, seconds):
        real = getattr(train.Training, method)

        def slow(*args):
            real(*args)
            self.now += seconds(*args)
        monkeypatch.setattr(train.Training, method, slow)


@pytest.mark.parametrize("optimizer, flags", (
    ("muon", "--mode_conditioning lag"), ("muon", "--mode_conditioning film --encoder none"),
    ("adamw", "--encoder stacked --precision bf16"),
    ("muon", "--mode_context variational --kl_weight 0.01 --accumulate 2")))
def test_a_resumed_run_equals_one_that_never_stopped(glyph_file, tmp_path, optimizer, flags):
    flags = [*flags.split(), "--optimizer", optimizer]
    straight = run(glyph_file, tmp_path / "a", "--max_steps", "8", *flags)
    run(glyph_file, tmp_path / "b", "--max_steps", "5", *flags)             # ends between two saves
    with open(tmp_path / "b" / "log.jsonl", "a") as log:                    # a line that outlived its checkpoint
        log.write(json.dumps(dict(step=6, loss=0.0)) + "\n" + '{"step": 4, "lo')     # and one that a full disk cut off
    resumed = run(glyph_file, tmp_path / "b", "--max_steps", "8", *flags)
    assert straight["step"] == 8 and kill.same(straight, resumed)
    momenta = [values["momentum"] for values in straight["optimizers"][-1]["state"].values() if "momentum" in values]
    assert bool(momenta) == (optimizer == "muon") and all(momentum.any() for momentum in momenta)
    losses = kill.losses(tmp_path / "a")
    assert losses == kill.losses(tmp_path / "b") and [step for step, _ in losses] == [2, 4, 6, 8]
    assert all(bool(record["kl"]) == ("variational" in flags) for record in records(tmp_path / "a", "kl"))


def test_a_run_leaves_what_it_says(glyph_file, tmp_path, capsys):
    run(glyph_file, tmp_path, "--max_steps", "4")
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == "preset demo, 1 x cpu, float32 (as asked for), eager (as asked for)"
    log = records(tmp_path)
    assert [record["step"] for record in log] == [0, 2, 4, 4] and log[-1]["context_gain"] is not None
    assert log[1]["skipped"] == 0 and log[1]["grad_norm"] > 0
    picture = Image.open(tmp_path / "samples_0000004.png")
    assert picture.size == ((3 + 8) * (8 * 2 + 2) + 8, 8 * (8 * 2 + 2))     # 3 support images | 8 samples, 8 sets
    assert fsdm.load_model(tmp_path / "ckpt.pt").config.hidden_size == 32
    before = (tmp_path / "ckpt.pt").stat().st_mtime_ns
    run(glyph_file, tmp_path, "--max_steps", "4")
    assert "4 already" in capsys.readouterr().out and (tmp_path / "ckpt.pt").stat().st_mtime_ns == before


def test_the_log_is_json_whatever_the_numbers_are(tmp_path):
    train.Log(tmp_path / "log.jsonl")("", step=1, loss=math.nan, few=[math.inf, 2.0])

    def refuse(name):
        pytest.fail(f"{name} is no JSON")
    record = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse)
    assert record == dict(step=1, loss=None, few=[None, 2.0])


def test_a_line_that_a_full_disk_cuts_off_spoils_no_other(tmp_path, monkeypatch, capsys):
    log = train.Log(tmp_path / "log.jsonl")

    def full(path, mode):
        with open(path, mode) as file:
            file.write('{"step": 2, "lo')
        raise OSError(28, "No space left on device")

    log("one", step=1)
    with monkeypatch.context() as patch:
        patch.setattr(train, "open", full, raising=False)
        log("two", step=2)
    log("three", step=3)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [train.Log.step_of(line) for line in lines] == [1, math.inf, 3]
    assert "lacks this line: No space left on device" in capsys.readouterr().out


def test_a_folder_of_grey_64_pixel_classes_trains_and_samples(tmp_path):
    for c in range(6):
        (tmp_path / "photos" / f"class {c}").mkdir(parents=True)
        for i in range(4):
            Image.new("L", (70, 64), 40 * c + i).save(tmp_path / "photos" / f"class {c}" / f"{i}.png")
    run(tmp_path / "photos", tmp_path / "run", "--max_steps", "2", "--image_size", "64", "--in_channels", "1",
        "--patch_size", "8", "--encoder_patch_size", "16")
    sample.main(["--ckpt", str(tmp_path / "run" / "ckpt.pt"), "--dataset", str(tmp_path / "photos"), "--split", "test",
                 "--num", "2", "--steps", "2", "--out_dir", str(tmp_path / "samples")])
    assert np.load(tmp_path / "samples" / "samples.npz")["arr_0"].shape == (16, 64, 64, 1)


# ---- The learning rate and the end of a run, by a clock of its own.

def test_the_learning_rate_by_hand():
    def rate(step, progress, warmup_steps=10, cooldown=0.4):
        return train.learning_rate(2.0, step, warmup_steps, progress, cooldown)
    assert [rate(step, 0.0) for step in (0, 4, 9, 10, 500)] == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0])     # warm-up
    assert [rate(500, p) for p in (0.6, 0.7, 0.8, 0.95, 1)] == pytest.approx([2.0, 1.5, 1.0, 0.25, 0.0])    # cooldown
    assert rate(4, 0.9) == pytest.approx(0.5) and rate(1, 0.9) == pytest.approx(0.4)        # the lower of the two
    assert rate(0, 0.0, warmup_steps=0) == rate(0, 0.999999, warmup_steps=0, cooldown=0.0) == 2.0


def test_a_run_warms_up_and_cools_down_by_its_steps(glyph_file, tmp_path):
    saved = run(glyph_file, tmp_path, "--max_steps", "10", "--warmup_steps", "2", "--cooldown", "0.5", "--log_interval",
                "1", "--lr", "0.01")
    by_hand = [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert [record["lr"] for record in records(tmp_path, "lr")] == pytest.approx([0.01 * share for share in by_hand])
    assert all(group["lr"] == pytest.approx(0.002) for o in saved["optimizers"] for group in o["param_groups"])


@pytest.mark.parametrize("step, save, save_interval, ends", (
    (3, 0, 1000, (340, 350)),               # twelve seconds are kept for a save that may take longer
    (20, 0, 1000, (340, 362)),              # a step takes longer than these
    (3, 40, 20, (300, 360)),
    (3, 40, 40, (300, 360))))               # the last save but one begins just before the end
def test_a_run_uses_its_hours_and_has_cooled_down(glyph_file, tmp_path, monkeypatch, step, save, save_interval, ends):
    clock = Clock(monkeypatch, lambda number: step, lambda: save)
    saved = run(glyph_file, tmp_path, "--max_hours", "0.1", "--cooldown", "0.4", "--log_interval", "1000",
                "--save_interval", str(save_interval), "--num_eval_batches", "1")
    assert ends[0] < clock.now < ends[1]
    most = 0.05 + save / 300 / 0.4                                          # but for the time that one save takes
    assert all(group["lr"] < most * 3e-3 for o in saved["optimizers"] for group in o["param_groups"])
    told = [record["seconds"] for record in records(tmp_path, "loss")]      # 1000 steps never fit: by the half minute
    assert len(told) >= 5 and all(30 < b - a < 31 + step + save for a, b in itertools.pairwise([0, *told]))


def test_a_slow_first_step_after_a_resume_does_not_end_the_run(glyph_file, tmp_path, monkeypatch):
    run(glyph_file, tmp_path, "--max_steps", "9", "--log_interval", "10")
    monkeypatch.setattr(fsdm, "choose_compile", lambda *_: (True, "as if"))
    monkeypatch.setattr(fsdm, "compile_in_place", lambda *_: None)
    clock = Clock(monkeypatch, lambda number: 100 if number == 9 else 3)    # the one before a line compiles
    saved = run(glyph_file, tmp_path, "--max_hours", "0.1", "--log_interval", "10", "--save_interval", "1000")
    assert 320 < clock.now < 360 and saved["step"] > 70
    assert all(record["images_per_second"] != 0 for record in records(tmp_path, "loss"))


def test_the_minutes_left_are_those_of_the_present_pace(glyph_file, tmp_path, monkeypatch, capsys):
    Clock(monkeypatch, lambda number: 3 if number else 1000)                # the first step is slow
    run(glyph_file, tmp_path, "--max_steps", "210", "--log_interval", "10", "--save_interval", "1000")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("left")]
    assert lines[1].startswith("step      10") and lines[1].endswith("  10 min left"), lines[:2]


def test_max_hours_alone_sets_no_end_in_steps():
    def steps(*flags):
        return train.parse_args(flags)[0].max_steps
    assert steps() == steps("--max_hours", "1", "--max_steps", "2400") == 2400
    assert steps("--max_hours", "1") > 10 ** 12


# ---- The loss, the optimizers, the average.

class Given(torch.nn.Module):
    """A model whose errors and KL are its weights."""
    def __init__(self):
        super().__init__()
        self.errors, self.kl = (torch.nn.Parameter(torch.arange(6.0).view(2, 3) + i) for i in range(2))

    def forward(self):
        return self.errors, self.kl


@pytest.mark.parametrize("accumulate", (1, 2))
def test_the_loss_is_the_mean_over_all_targets_of_error_and_weighted_kl(accumulate):
    args, _ = train.parse_args(["--kl_weight", "0.1", "--grad_clip", "100", "--accumulate", str(accumulate)])
    training = train.Training(Given(), args, torch.float32)
    training.step([()] * accumulate, 0.0, 0)
    assert torch.allclose(training.model.errors.grad, torch.full((2, 3), 1 / 6))
    assert torch.allclose(training.model.kl.grad, torch.full((2, 3), 0.1 / 6))
    norm = math.sqrt(6 / 36 + 6 * 0.01 / 36)
    assert training.totals.tolist() == pytest.approx([2.5, 3.5, norm, 1, 0])


def test_an_offset_moves_the_noise_of_a_channel_as_a_whole_and_nothing_else(split):
    config = train.parse_args(SMALL)[1]
    plain = train.draw_batch(split, 64, config, fsdm.rng("cpu", 0), 0.0)
    moved = train.draw_batch(split, 64, config, fsdm.rng("cpu", 0), 0.5)
    shift = moved[3] - plain[3]                                             # [B, K, C, H, W]
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], moved[:3]))
    assert torch.allclose(shift, shift[..., :1, :1].expand_as(shift), atol=1e-5)
    assert shift[..., 0, 0].std() == pytest.approx(0.5, rel=0.1)
    assert shift[..., 0, 0].std(2).mean() > 0.3                             # each channel has its own


@pytest.mark.parametrize("flags, offset", (([], 0.1), (["--noise_offset", "0.3"], 0.3), (["--preset", "mnist"], 0.0), (["--preset", "t4"], 0.0)))
def test_training_moves_the_noise_as_far_as_asked(glyph_file, tmp_path, monkeypatch, flags, offset):
    real, given = train.draw_batch, []
    monkeypatch.setattr(train, "draw_batch", lambda *args: given.append(args[4]) or real(*args))
    flags = [*SMALL, "--encoder", "none", "--max_steps", "1", "--dataset", glyph_file, "--out_dir", str(tmp_path), *flags]
    train.main(flags)
    assert given == [offset]


def test_a_few_hundred_steps_on_two_classes_lower_the_loss(split):
    two = split._replace(offsets=split.offsets[:3], names=split.names[:2])
    training, config = begin("--optimizer", "adamw")
    sums = [0.0]
    for step in range(300):
        training.step([train.draw_batch(two, 4, config, fsdm.rng("cpu", 0, step), 0.1)], 2e-3, step)
        sums.append(training.totals[0].item())
    losses = np.diff(sums)
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
@pytest.mark.parametrize("fault", ("a gradient is NaN", "the norm overflows"))
def test_a_step_that_is_not_finite_leaves_no_trace_but_is_counted(split, dtype, optimizer, fault):
    def step(training, number):
        training.step([train.draw_batch(split, 4, config, fsdm.rng("cpu", 0, number), 0.1)], 1e-3, number)

    def spoil(gradient):
        """A row is NaN; or all is finite, even where it is scaled, and the sum of squares is not."""
        if fault == "a gradient is NaN":
            return gradient.index_fill(0, torch.tensor([0]), math.nan)
        return torch.full_like(gradient, 1e38)

    (training, config), (twin, _) = (begin("--optimizer", optimizer, dtype=dtype) for _ in range(2))
    for each in (training, twin):                                           # at 2^16 honest gradients overflow here
        each.scaler = torch.amp.GradScaler("cpu", 2.0 ** 8, enabled=dtype == torch.float16)
    opened(training.model)
    twin.model.load_state_dict(training.model.state_dict())
    spoilt = [training.model.denoiser.blocks[0].mlp[0].weight]              # one optimizer's, if there are two
    if fault == "the norm overflows":
        spoilt = list(training.model.parameters())
    for bad in (0, 2):                                                      # the first step of all, and a later one
        before = state(training)
        hooks = [p.register_hook(spoil) for p in spoilt]
        step(training, bad)
        for hook in hooks:
            hook.remove()
        after = state(training)
        assert not training.norm.isfinite() and kill.same(before[:2], after[:2])
        assert kill.same(before[2], after[2]) or bad == 0                   # AdamW's moments begin then, at zero
        assert (after[3] - before[3]).tolist() == [0, 0, 0, 0, 1]
        step(training, bad + 1)
        step(twin, bad + 1)
        assert not kill.same(after[0], training.model.state_dict())
    assert training.totals[3:].tolist() == [2, 2]
    if dtype == torch.float16:                                              # a scale goes its own way
        assert training.scaler.get_scale() == 2.0 ** (8 if fault == "the norm overflows" else 6)
    else:
        training.totals[4] = 0
        assert training.scaler.get_scale() == 1 and kill.same(state(training), state(twin))


def test_a_gpu_of_apples_whose_adamw_does_not_listen_skips_the_step_too():
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    optimizer = train.AdamW([weight], 0.1, fused=True)
    for kept in (0.0, 1.0):
        there = MagicMock(device=torch.device("mps"))
        there.__bool__.return_value, there.__rsub__.return_value = bool(kept), torch.tensor(0.0)
        optimizer.step(there)
        assert (weight.item() != 1) == kept


def test_the_average_never_holds_on_to_the_random_initialisation():
    assert [train.average_decay(0.99, step) for step in (0, 9, 10 ** 6)] == [1 / 11, 10 / 20, 0.99]
    args, _ = train.parse_args(["--ema_decay", "0.9999"])
    training = train.Training(Given(), args, torch.float32)
    torch.nn.init.constant_(training.model.errors, 7.0)
    for step in range(200):
        training.step([()], 0.0, step)
    assert (training.ema.errors - 7).abs().max() < 1e-6


def test_every_matrix_of_the_blocks_is_muons_and_nothing_is_left_out():
    training, _ = begin("--optimizer", "muon")
    adamw, muon = ([p for group in o.param_groups for p in group["params"]] for o in training.optimizers)
    assert sorted(map(id, adamw + muon)) == sorted(map(id, training.model.parameters()))
    inside = [*training.model.denoiser.blocks.parameters(), *training.model.encoder.vit.blocks.parameters()]
    assert sorted(map(id, muon)) == sorted(id(p) for p in inside if p.ndim == 2)


def plain_newton_schulz(x):
    """Jordan et al. 2024, in float64, as it is written there: five rounds of x <- a x + (b r + c r r) x, r = x x^T."""
    x = x.double() / x.double().norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        r = x @ x.mT
        x = 3.4445 * x + (-4.7750 * r + 2.0315 * r @ r) @ x
    return x


@pytest.mark.parametrize("rows, columns", ((24, 40), (40, 24), (32, 32)))
def test_orthogonalize_keeps_the_singular_vectors_and_brings_the_values_near_one(rows, columns):
    torch.manual_seed(0)
    few = min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(3, n, few, dtype=torch.float64))[0] for n in (rows, columns))
    x = (u * torch.logspace(-2, 0, few, dtype=torch.float64) @ v.mT).float()
    out = train.orthogonalize(x, torch.float32)
    between = u.mT @ out.double() @ v                                       # the polar factor has the identity here
    values = between.diagonal(dim1=1, dim2=2)
    assert 0.68 < values.min() and values.max() < 1.22
    assert (between - torch.diag_embed(values)).abs().max() < 1e-4
    plain = plain_newton_schulz(x)
    assert (out - plain).abs().max() < 1e-4
    for dtype, tolerance in ((torch.bfloat16, 0.06), (torch.float16, 0.007)):       # r never made anew: 0.1 and 0.014
        assert (train.orthogonalize(x, dtype) - plain).norm() < tolerance * plain.norm()
    assert not train.orthogonalize(torch.zeros_like(x), torch.float32).any()


def test_muon_goes_step_by_step_where_torchs_own_goes():
    """torch's multiplies in bf16, 8 bits: its updates are within 2 percent of ours in fp32."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 40), (16, 16), (24, 40), (40, 24))]
    theirs = copy.deepcopy(ours)
    a = train.Muon(ours, 0.02, 0.1, torch.float32)
    b = torch.optim.Muon(theirs, 0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    for _ in range(10):
        before = copy.deepcopy(ours)
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.data, q.grad = p.data.clone(), p.grad.clone()                 # a step apart at most
        a.step(torch.tensor(1.0)), b.step()
        for p, q, start in zip(ours, theirs, before):
            assert (p - q).norm() < 0.02 * (q - start).norm()


# ---- VFSDDPM's own command lines, and other flags.

VFSDDPM = """--dataset cifar100 --sample_size 6 --image_size 32 --patch_size 2 --batch_size 32 --hidden_size 384
    --depth 12 --num_heads 6 --mlp_ratio 4.0 --hdim 384 --context_channels 384 --mode_conditioning film
    --diffusion_steps 250 --lr 1e-4 --max_steps 0 --log_interval 300 --save_interval 20000 --num_eval_batches 10
    --num_sample_batches 2 --compute_fid --fid_num_samples 600 --use_wandb""".split()


def test_vfsddpms_command_lines_are_the_reference_and_the_wide_model(capsys):
    args, config = train.parse_args([*VFSDDPM, "True", "--data_dir", "data"])
    assert train.parse_args(["--hidden_size", "96"])[0].preset == "demo"            # a part of a model names none
    assert config == fsdm.Config() and args.use_wandb is True and args.optimizer == "adamw" and args.ema_decay == 0.999
    train.main(VFSDDPM)
    said = capsys.readouterr().out
    assert all(number in said for number in ("43,509,900", "32,735,628", "10,774,272", "31,938,048", "147,840"))
    wide = [*VFSDDPM, "--hidden_size", "450", "--depth", "6", "--num_heads", "9", "--hdim", "450",
            "--context_channels", "450"]
    for ratio, total in (("4.0", "37,739,262"), ("3.0", "35,306,562")):
        train.main([*wide, "--mlp_ratio", ratio])
        assert total in capsys.readouterr().out


def test_one_width_has_two_names_and_a_bottleneck_is_said(capsys):
    assert train.parse_args(["--context_channels", "64"])[1].hdim == 64
    train.main(["--preset", "reference", "--hdim", "256", "--max_steps", "0"])
    said = capsys.readouterr().out
    assert "bottleneck" in said and "98,688" in said


def test_wandb_is_imported_only_when_asked_for(glyph_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)                         # as if it were not installed
    run(glyph_file, tmp_path / "a", "--max_steps", "2")
    with pytest.raises(ValueError, match="pip install wandb"):
        run(glyph_file, tmp_path / "b", "--max_steps", "2", "--use_wandb")
    assert not (tmp_path / "b").exists()
    heard = []
    fake = type(sys)("wandb")
    fake.init, fake.log = MagicMock(), lambda record, step: heard.append((step, record))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(glyph_file, tmp_path / "b", "--max_steps", "2", "--use_wandb")
    assert [step for step, record in heard if "loss" in record] == [2]
    settings = fake.init.call_args.kwargs["config"]
    assert settings["fourier_features"] is True and settings["lr"] == 3e-3          # the preset's, not typed


def test_debug_tells_whether_the_context_is_used_and_gradients_arrive(glyph_file, tmp_path):
    run(glyph_file, tmp_path, "--max_steps", "4", "--debug", "--log_interval", "1", "--lr", "0.01",
        "--grad_clip", "0.01")
    record = next(r for r in records(tmp_path) if r["step"] == 4)
    names = ["context_norm", "context_mean", "context_max", "context_std", "encoder_grad_norm", "dit_grad_norm",
             "dit_layer_0_grad_norm", "dit_layer_1_grad_norm"]
    assert sorted(k for k in record if k.startswith("debug/")) == sorted(f"debug/{name}" for name in names)
    assert record["debug/context_norm"] > 0 and record["debug/encoder_grad_norm"] > 0
    both = (record["debug/encoder_grad_norm"] ** 2 + record["debug/dit_grad_norm"] ** 2) ** 0.5
    assert both == pytest.approx(record["grad_norm"], rel=0.02) and both > 0.02        # before it was clipped
    assert record["debug/dit_layer_0_grad_norm"] > 0


def test_missing_inception_weights_are_said_once_and_training_goes_on(glyph_file, tmp_path, capsys):
    run(glyph_file, tmp_path, "--max_steps", "4", "--compute_fid", "--fid_weights", str(tmp_path / "none.pth"))
    assert capsys.readouterr().out.count("training without --compute_fid") == 1


def test_scores_of_unseen_classes_are_in_the_log_though_nobody_can_read_how_far_they_are(glyph_file, tmp_path, monkeypatch):
    torch.save(fid.Inception(64).state_dict(), tmp_path / "weights.pth")
    full = io.StringIO()
    monkeypatch.setattr(full, "write", lambda text: os.write(os.open("/dev/full", os.O_WRONLY), text.encode()))
    monkeypatch.setattr(sys, "stderr", full)
    run(glyph_file, tmp_path, "--max_steps", "1", "--compute_fid", "--fid_weights", str(tmp_path / "weights.pth"),
        "--fid_dims", "64", "--fid_num_samples", "8", "--sample_size", "2")
    record, = records(tmp_path, "few_shot")
    assert set(record["few_shot"]) == {"generated", "support returned", "other real images"}
    assert record["few_shot"]["support returned"]["nearest_support"] == 0 and record["val_loss"] > 0


# ---- Looking at the model.

class Copies(torch.nn.Module):
    """Draws the first image that a target sees."""
    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, images, sees, t, noise, support=None):
        support = images if support is None else support
        drawn = torch.stack([one[index] for one, index in zip(support, sees.byte().argmax(2))])
        return (fsdm.to_signal(drawn) - fsdm.to_signal(images)).square().mean((2, 3, 4)), torch.zeros(sees.shape[:2])


def test_the_context_gain_of_a_model_that_copies_is_the_distance_of_the_classes():
    _, config = train.parse_args(SMALL)
    images = torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(5)[:, None, None, None].expand(-1, 3, 8, 8)
    split = fsdm.Split(images, torch.tensor([0, 5, 10]), ["black", "white"], 5)
    found = train.validate(Copies(config), split, 8, 10, 0, torch.float32)
    assert found == dict(val_loss=0.0, context_gain=4.0)
    black = split._replace(images=images[:5], offsets=split.offsets[:2], names=["black"])
    assert train.validate(Copies(config), black, 8, 10, 0, torch.float32) == dict(val_loss=0.0, context_gain=None)


def test_one_class_has_no_context_gain_and_the_log_says_so(tmp_path, capsys):
    run(write_glyphs(tmp_path / "few.npz", 10), tmp_path, "--max_steps", "2")
    assert "context gain not measured, which needs two classes" in capsys.readouterr().out
    assert [record["context_gain"] for record in records(tmp_path, "context_gain")] == [None]


def test_the_context_gain_is_zero_when_the_context_is_ignored_and_not_otherwise(split):
    training, config = begin()
    model = training.model.eval()                                           # its gates are closed: nothing gets through
    assert train.validate(model, split, 4, 2, 0, torch.float32)["context_gain"] == 0
    opened(model)
    first, second = (train.validate(model, split, 4, 2, 0, torch.float32) for _ in range(2))
    assert first["context_gain"] != 0 and first == second                   # and its noise is always the same


def test_training_and_validation_take_a_part_of_the_batch_at_a_time(glyph_file, tmp_path, monkeypatch):
    forward, sets = fsdm.FSDM.forward, []

    def counted(self, images, *batch, **options):
        sets.append(len(images))
        return forward(self, images, *batch, **options)
    monkeypatch.setattr(fsdm.FSDM, "forward", counted)
    run(glyph_file, tmp_path, "--max_steps", "2", "--accumulate", "4")
    assert sets == [1] * (2 * 4 + 2 * 2)                                    # steps x parts, batches x contexts


# ---- Precision and compilation.

@pytest.mark.parametrize("capability, dtype, compiled", [
    ((7, 5), torch.float16, True), ((8, 0), torch.bfloat16, True), ((9, 0), torch.bfloat16, True),
    ((6, 0), torch.float16, False)])
def test_precision_and_compilation_follow_the_compute_capability(monkeypatch, capability, dtype, compiled):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert fsdm.choose_precision(torch.device("cuda"))[0] == dtype
    assert ("fp16 is several times faster" in fsdm.choose_precision(torch.device("cuda"), "bf16")[1]) == (capability < (8, 0))
    assert fsdm.choose_compile(torch.device("cuda"))[0] == compiled
    monkeypatch.setattr(shutil, "which", lambda name: None)                 # as in slim containers
    assert fsdm.choose_compile(torch.device("cuda")) == (False, "no C compiler found (gcc or clang), which Triton needs")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)     # as in torch for Windows
    assert fsdm.choose_compile(torch.device("cuda")) == (False, "no Triton found")
    monkeypatch.setattr(sysconfig, "get_path", lambda *names: "nowhere")    # as in Debian without python3-dev
    for device in ("cuda", "cpu"):
        assert fsdm.choose_compile(torch.device(device))[1].startswith("no Python.h found")


@pytest.mark.parametrize("cuda, mps, chosen", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_is_the_gpu_then_apples_then_the_cpu(monkeypatch, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    on_cpu = torch.zeros(1)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: on_cpu)      # launches nothing
    monkeypatch.setattr(torch.version, "cuda", None)
    assert fsdm.choose_device("auto") == torch.device(chosen)


@pytest.mark.parametrize("rates, dtype", [((100e9, 400e9), torch.bfloat16), ((100e9, 90e9), torch.float32)])
def test_a_cpu_uses_bf16_only_where_it_is_faster(monkeypatch, rates, dtype):
    rates = dict(zip((torch.float32, torch.bfloat16), rates))
    monkeypatch.setattr(fsdm, "matmul_rate", lambda device, dtype: rates[dtype])
    assert fsdm.choose_precision(torch.device("cpu"))[0] == dtype


def test_one_slow_product_tells_its_rate(monkeypatch):
    """Five of 1024 x 1024 took 15 seconds at every start on a CPU without bf16."""
    seconds = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    assert fsdm.matmul_rate(torch.device("cpu"), torch.float32, size=8) == 2 * 8 ** 3
    assert next(seconds) == 2


@pytest.mark.parametrize("capability, works", [((7, 5), True), ((6, 0), False), ((8, 9), True), ((9, 0), True),
                                               ((10, 3), True), ((12, 1), True)])
def test_a_gpu_without_kernels_is_known(capability, works):
    assert fsdm.has_kernels(capability, ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_100f", "compute_120"]) == works


def test_the_step_compiles_as_one_graph_and_agrees_with_eager(split):
    training, config = begin()
    model = training.model
    opened(model)
    batch = train.draw_batch(split, 2, config, fsdm.rng("cpu", 0), 0.1)
    eager, names = model(*batch)[0], list(model.state_dict())
    fsdm.compile_in_place(model, torch.float32)
    assert torch.allclose(model(*batch)[0], eager, rtol=1e-4, atol=1e-5) and list(model.state_dict()) == names


def test_speed_measures_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "SECONDS", 0)
    found = speed.main([*SMALL, "--out_dir", str(tmp_path / "out")])
    said = capsys.readouterr().out
    for number in (f"{found['training']['ms']:,.1f} ms", f"{found['sampling']['images_per_second']:,.1f} images/s",
                   f"{found['share_of_products']:.0%} of", f"{found['ours'] / found['usual']:.2f} times"):
        assert number in said
    for words in ("training, 4 sets of 4: ", "GFLOP an image", "matrix products", "sampling, 8 sets", "peak memory",
                  "the usual way", "ours"):
        assert words in said
    assert not (tmp_path / "out").exists()
    for flags in (["--mode_context", "variational"], ["--encoder", "none"]):        # nothing to compare with
        found = speed.main([*SMALL, *flags])
        said = capsys.readouterr().out
        assert "sampling" in said and "the usual way" not in said and found["usual"] is None


# ---- Nothing good is lost.

def test_flags_that_contradict_the_checkpoint_are_named_and_it_stays(glyph_file, tmp_path):
    run(glyph_file, tmp_path, "--max_steps", "2")
    before = (tmp_path / "ckpt.pt").read_bytes()
    with pytest.raises(ValueError, match="--depth 2 .now 3."):
        run(glyph_file, tmp_path, "--max_steps", "4", "--depth", "3")
    with pytest.raises(ValueError, match="--dataset glyphs.npz .now other.npz."):
        run(write_glyphs(tmp_path / "other.npz", 20), tmp_path, "--max_steps", "4")
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_fp16_begins_with_a_scale_of_its_own_after_a_resume_from_a_precision_that_needs_none(glyph_file, tmp_path):
    run(glyph_file, tmp_path, "--max_steps", "2")
    training, _ = begin("--dataset", glyph_file, dtype=torch.float16)
    assert training.load(tmp_path / "ckpt.pt") == 2 and training.scaler.get_scale() == 2.0 ** 16


@pytest.mark.parametrize("fused", (None, False, "absent"))
def test_a_checkpoint_of_an_optimizer_that_was_not_fused_resumes(glyph_file, tmp_path, fused):
    straight = run(glyph_file, tmp_path / "a", "--max_steps", "4")
    saved = run(glyph_file, tmp_path / "b", "--max_steps", "2")
    for group in saved["optimizers"][0]["param_groups"]:
        assert group.pop("fused") is True
        if fused != "absent":
            group["fused"] = fused
    torch.save(saved, tmp_path / "b" / "ckpt.pt")
    assert kill.same(straight, run(glyph_file, tmp_path / "b", "--max_steps", "4"))


def test_a_run_killed_before_its_last_picture_makes_it_and_then_is_done(glyph_file, tmp_path, capsys):
    run(glyph_file, tmp_path, "--max_steps", "2")
    (tmp_path / "samples_0000002.png").unlink()
    for said in ("unseen classes", "a larger one goes on"):
        capsys.readouterr()
        saved = run(glyph_file, tmp_path, "--max_steps", "2")
        assert saved["step"] == 2 and said in capsys.readouterr().out
        assert (tmp_path / "samples_0000002.png").exists() and len(records(tmp_path, "val_loss")) == 2


def test_ctrl_c_in_the_last_picture_ends_the_run_which_is_saved(glyph_file, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "look", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(glyph_file, tmp_path, "--max_steps", "2")
    assert load(tmp_path)["step"] == 2


def test_a_checkpoint_from_before_a_field_of_config_goes_on_with_its_default(tmp_path):
    training, _ = begin("--mlp_ratio", "4")
    training.save(tmp_path / "ckpt.pt", 3)
    saved = load(tmp_path)
    del saved["config"]["mlp_ratio"]
    torch.save(saved, tmp_path / "ckpt.pt")
    assert training.load(tmp_path / "ckpt.pt") == 3


def test_a_resumed_run_takes_the_weight_decay_of_its_flags(glyph_file, tmp_path):
    run(glyph_file, tmp_path, "--max_steps", "2")
    saved = run(glyph_file, tmp_path, "--max_steps", "4", "--weight_decay", "0.5")
    assert {group["weight_decay"] for o in saved["optimizers"] for group in o["param_groups"]} == {0.5}


def poison(monkeypatch, steps):
    """From now on the losses of these calls are not a number."""
    forward, calls = fsdm.FSDM.forward, []

    def poisoned(self, *batch, **options):
        calls.append(1)
        error, kl = forward(self, *batch, **options)
        return error * (math.nan if len(calls) in steps else 1), kl
    monkeypatch.setattr(fsdm.FSDM, "forward", poisoned)


def test_a_skipped_step_is_logged_and_no_part_of_the_means(glyph_file, tmp_path, monkeypatch):
    poison(monkeypatch, {1, 3, 4})
    run(glyph_file, tmp_path, "--max_steps", "6")
    log = records(tmp_path, "loss")
    assert [record["skipped"] for record in log] == [1, 2, 0]
    assert [record["loss"] is None for record in log] == [False, True, False]      # None: no step was kept


def test_a_run_that_only_skips_stops_with_a_sentence_and_keeps_its_checkpoint(glyph_file, tmp_path, monkeypatch):
    run(glyph_file, tmp_path, "--max_steps", "2")
    before = (tmp_path / "ckpt.pt").read_bytes()
    poison(monkeypatch, range(10_000))
    monkeypatch.setattr(train, "PATIENCE", 3)
    with pytest.raises(ValueError, match="lower --lr"):
        run(glyph_file, tmp_path, "--max_steps", "80", "--save_interval", "1000")
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path):
    training, _ = begin()
    training.save(tmp_path / "ckpt.pt", 1)
    before = (tmp_path / "ckpt.pt").read_bytes()
    training.model.denoiser.out.bias.data[0] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        training.save(tmp_path / "ckpt.pt", 2)
    assert (tmp_path / "ckpt.pt").read_bytes() == before


# ---- A run never loses work.

def test_killed_at_random_moments_it_ends_as_if_never_killed(tmp_path):
    done = subprocess.run([sys.executable, HERE / "tests" / "kill.py", "4"], capture_output=True, text=True)
    assert done.returncode == 0 and "equal bit for bit" in done.stdout, done.stderr


FULL_DISK = """
import resource, sys, train
limit = [int(sys.argv.pop(1)) for _ in "12"]
resource.setrlimit(resource.RLIMIT_FSIZE, limit)               # no file may grow beyond so many bytes
train.main(sys.argv[1:])
"""


def test_a_full_disk_is_said_and_keeps_the_checkpoint_while_training_goes_on(glyph_file, tmp_path):
    kept = run(glyph_file, tmp_path, "--max_steps", "2")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, "100000", "100000", *SMALL, "--max_steps", "10",
                           "--dataset", glyph_file, "--out_dir", str(tmp_path)],
                          capture_output=True, text=True, cwd=HERE)
    assert done.stdout.count("training goes on") == 2 and "step      10  loss" in done.stdout     # at 4 and at 8
    assert done.returncode and "File too large" in done.stderr                                    # the last one counts
    assert kill.same(kept, load(tmp_path))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_goes_on_when_nobody_reads_what_it_says(glyph_file, tmp_path):
    command = [sys.executable, "train.py", *SMALL, "--max_steps", "20", "--dataset", glyph_file, "--out_dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE) as process:
        while "parameters" not in process.stdout.readline():
            pass
        process.stdout.close()                              # as Ctrl-C does to the tee behind it
        assert "train.py:" not in process.stderr.read()
    assert load(tmp_path)["step"] == 20


def test_a_clock_that_is_set_back_stops_no_save(glyph_file, tmp_path, monkeypatch):
    clock = itertools.count(1e9, -86_400)                   # a day earlier whenever it is asked
    monkeypatch.setattr(train.time, "time", lambda: next(clock))
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    saved = []
    monkeypatch.setattr(train.Training, "save", lambda training, path, step: saved.append(step))
    train.main([*SMALL, "--max_steps", "3", "--max_hours", "1", "--dataset", glyph_file, "--out_dir", str(tmp_path)])
    assert saved == [1, 2, 3]


def test_a_damaged_log_keeps_no_run_from_going_on(glyph_file, tmp_path):
    run(glyph_file, tmp_path / "a", "--max_steps", "4")
    with open(tmp_path / "a" / "log.jsonl", "ab") as file:
        file.write(b'5\n{}\n\xff\0\n{"st')
    run(glyph_file, tmp_path / "a", "--max_steps", "8")
    run(glyph_file, tmp_path / "b", "--max_steps", "8")
    assert kill.losses(tmp_path / "a") == kill.losses(tmp_path / "b")


def test_a_run_says_when_another_one_begins_in_its_folder(tmp_path, capsys):
    first = train.Log(tmp_path / "log.jsonl")
    first("alone", step=1)
    assert "another run" not in capsys.readouterr().out
    train.Log(tmp_path / "log.jsonl")
    first("not alone", step=2)
    assert "another run" in capsys.readouterr().out


def test_names_that_the_terminal_cannot_show_end_no_run(glyph_file, tmp_path):
    command = [sys.executable, HERE / "train.py", *SMALL, "--max_steps", "1", "--dataset", glyph_file, "--out_dir", "ünï"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and rb"--ckpt \xfcn\xef/ckpt.pt" in done.stdout, done.stderr


def test_init_begins_with_another_models_averaged_weights_and_shape(glyph_file, tmp_path):
    first = run(glyph_file, tmp_path / "a", "--max_steps", "4")
    tuned = ["--init", str(tmp_path / "a" / "ckpt.pt"), "--dataset", str(glyph_file), "--device", "cpu", "--no_compile",
             "--precision", "fp32", "--batch_size", "4", "--save_interval", "2", "--out_dir", str(tmp_path / "b")]
    train.main([*tuned, "--max_steps", "1", "--lr", "1e-12"])
    second = load(tmp_path / "b")
    assert second["config"] == first["config"] and second["step"] == 1
    assert all(torch.allclose(second["model"][name], first["ema"][name], atol=1e-6) for name in first["ema"])
    train.main([*tuned, "--max_steps", "3"])                # and resumes as any run does
    assert load(tmp_path / "b")["step"] == 3


def test_init_with_other_shapes_is_one_sentence(glyph_file, tmp_path):
    run(glyph_file, tmp_path / "a", "--max_steps", "2")
    with pytest.raises(ValueError, match="has other shapes than these flags: size mismatch for"):
        run(glyph_file, tmp_path / "b", "--max_steps", "2", "--init", str(tmp_path / "a" / "ckpt.pt"), "--hdim", "64")


def test_restart_moves_the_old_run_aside_and_resume_goes_on_from_elsewhere(glyph_file, tmp_path, capsys):
    old = run(glyph_file, tmp_path / "a", "--max_steps", "4")
    new = run(glyph_file, tmp_path / "a", "--max_steps", "2", "--restart")
    assert "the same command without --restart with a larger --max_steps goes on" in capsys.readouterr().out
    assert new["step"] == 2 and kill.same(old, load(tmp_path / "a_1"))
    assert (tmp_path / "a_1" / "log.jsonl").exists()
    flags = ("--max_steps", "8", "--resume", str(tmp_path / "a_1" / "ckpt.pt"))
    straight = run(glyph_file, tmp_path / "b", "--max_steps", "8")
    assert kill.same(straight, run(glyph_file, tmp_path / "c", *flags))
    assert kill.losses(tmp_path / "c") == kill.losses(tmp_path / "b")       # the log came along


# ---- Several processes, parts of a batch.

@pytest.mark.parametrize("nccl, backend", ((True, "cpu:gloo,cuda:nccl"), (False, "gloo")))     # False: Windows
def test_gpus_talk_through_nccl_where_it_exists(monkeypatch, nccl, backend):
    groups = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(fsdm, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(train.dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(train.dist, "init_process_group", lambda backend, timeout: groups.append(backend))
    assert train.connect("cuda:0") == (torch.device("cuda:0"), 0, 2) and groups == [backend]


@pytest.mark.parametrize("requested, said", (("auto", True), ("cuda", True), ("cuda:1", False)))
def test_the_line_for_all_gpus_can_be_pasted(monkeypatch, capsys, requested, said):
    monkeypatch.setattr(fsdm, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(sys, "argv", ["train.py", "--dataset", "my photos"])
    train.connect(requested)
    assert ("--nproc_per_node=2 train.py --dataset 'my photos'" in capsys.readouterr().out) == said


def test_a_silent_process_takes_names_of_any_bytes(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    train.connect("cpu")
    print("class \udcff")


def torchrun(processes, *flags, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*command, "train.py", *SMALL, *flags], capture_output=True, text=True, cwd=HERE,
                          env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def far(a, b):
    """The largest difference between two state dicts of tensors."""
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


def test_two_processes_equal_one_with_the_joint_batch_and_resume_bit_for_bit(glyph_file, split, tmp_path):
    flags = ["--dataset", glyph_file, "--lr", "1e-3"]
    said = torchrun(2, *flags, "--out_dir", str(tmp_path / "two"), "--max_steps", "4")
    assert said.count("step       4  loss") == 1                            # one of them speaks and writes
    torchrun(2, *flags, "--out_dir", str(tmp_path / "stop"), "--max_steps", "3")      # between two log lines
    torchrun(2, *flags, "--out_dir", str(tmp_path / "stop"), "--max_steps", "4")
    parts = run(glyph_file, tmp_path / "parts", *flags, "--max_steps", "4", "--accumulate", "2")
    two, stop = load(tmp_path / "two"), load(tmp_path / "stop")
    assert kill.same(two, stop)
    losses = kill.losses(tmp_path / "two")
    assert losses == kill.losses(tmp_path / "stop")
    assert np.allclose(losses, kill.losses(tmp_path / "parts"), rtol=1e-5)

    joint, config = begin(*flags)                                           # and by hand, the two halves as one batch
    offset = joint.args.noise_offset
    for step in range(4):
        halves = [train.draw_batch(split, 2, config, fsdm.rng("cpu", 0, fsdm.TRAINING, step, part), offset)
                  for part in range(2)]
        both = [torch.cat(parts) for parts in zip(*(half[:4] for half in halves))]
        lr = train.learning_rate(1e-3, step, joint.args.warmup_steps, step / 4, 0.0)
        joint.step([both], lr, step)
    model, ema, optimizers, _ = state(joint)
    for other in (parts, dict(model=model, ema=ema, optimizers=optimizers)):
        assert far(two["model"], other["model"]) < 1e-5 and far(two["ema"], other["ema"]) < 1e-5
        for a, b in zip(two["optimizers"], other["optimizers"], strict=True):
            assert max(far(a["state"][i], b["state"][i]) for i in a["state"]) < 1e-5


def test_two_processes_with_a_compiled_step_equal_one_that_is_eager(glyph_file, tmp_path):
    # wide enough for two of DDP's buckets, between which the step is compiled in two
    flags = ["--dataset", glyph_file, "--max_steps", "3", "--warmup_steps", "0", "--lr", "1e-3",
             "--hidden_size", "128", "--hdim", "128"]
    said = torchrun(2, *flags, "--no_compile", "False", "--out_dir", str(tmp_path / "two"), TORCH_LOGS="ddp_graphs")
    assert "---split graph---" in said
    assert "2 x cpu, float32 (as asked for), compiled" in said and "the first step took" in said
    assert "strides do not match" not in said                               # of gradients and DDP's buckets
    one = run(glyph_file, tmp_path / "one", *flags, "--accumulate", "2")
    two = load(tmp_path / "two")
    assert far(two["model"], one["model"]) < 1e-4 and far(two["ema"], one["ema"]) < 1e-4
