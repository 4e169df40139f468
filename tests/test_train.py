"""Claims about the training program, on a model that trains in seconds."""
import copy
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import fsdm
import kill
import sample
import train

HERE = Path(__file__).parent.parent
SMALL = """--preset demo --image_size 8 --patch_size 4 --encoder_patch_size 4 --hidden_size 32 --hdim 32
    --depth 2 --num_heads 2 --encoder_depth 1 --sample_size 4 --diffusion_steps 50 --batch_size 4 --log_interval 2
    --save_interval 4 --num_eval_batches 2 --precision fp32 --device cpu --no_compile
    --cooldown_steps 0 --max_steps 300000""".split()


@pytest.fixture(scope="session")
def glyph_file(tmp_path_factory):
    images, labels, names, _ = fsdm.glyphs(None, 8, 3, False, classes=(10, 3, 3), per_class=8)
    path = tmp_path_factory.mktemp("data") / "glyphs.npz"
    np.savez(path, images=images.transpose(0, 2, 3, 1), labels=labels, class_names=names)
    return str(path)


def run(glyph_file, out, *flags):
    train.main([*SMALL, "--dataset", str(glyph_file), "--out_dir", str(out), *flags])
    return torch.load(Path(out) / "ckpt.pt", weights_only=True)


@pytest.mark.parametrize("flags", (["--mode_conditioning", "lag"], ["--mode_conditioning", "film", "--encoder", "none"],
                                   ["--encoder", "stacked", "--optimizer", "adamw", "--precision", "bf16"]))
def test_a_resumed_run_equals_one_that_never_stopped(glyph_file, tmp_path, flags):
    straight = run(glyph_file, tmp_path / "a", "--max_steps", "8", *flags)
    run(glyph_file, tmp_path / "b", "--max_steps", "5", *flags)             # ends between two saves
    with open(tmp_path / "b" / "log.jsonl", "a") as log:                    # a line that outlived its checkpoint
        log.write(json.dumps(dict(step=6, loss=0.0)) + "\n" + '{"step": 4, "lo')     # and one that a full disk cut off
    resumed = run(glyph_file, tmp_path / "b", "--max_steps", "8", *flags)
    assert straight["step"] == 8 and kill.same(straight, resumed)
    losses = kill.losses(tmp_path / "a")
    assert losses == kill.losses(tmp_path / "b") and [step for step, _ in losses] == [2, 4, 6, 8]


def test_a_run_leaves_what_it_says(glyph_file, tmp_path, capsys):
    run(glyph_file, tmp_path, "--max_steps", "4")
    said = capsys.readouterr().out
    assert "fp32 (as asked for)" not in said and "float32 (as asked for), eager (as asked for)" in said
    records = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert [r["step"] for r in records] == [0, 2, 4, 4] and "context_gain" in records[-1]
    assert records[1]["skipped"] == 0 and records[1]["grad_norm"] > 0
    picture = Image.open(tmp_path / "samples_0000004.png")
    assert picture.size == ((3 + 8) * (8 * 2 + 2) + 8, 8 * (8 * 2 + 2))     # 3 support images | 8 samples, 8 sets
    assert fsdm.load_model(tmp_path / "ckpt.pt").config.hidden_size == 32
    before = (tmp_path / "ckpt.pt").stat().st_mtime_ns
    run(glyph_file, tmp_path, "--max_steps", "4")
    assert "4 already" in capsys.readouterr().out and (tmp_path / "ckpt.pt").stat().st_mtime_ns == before


def test_the_log_is_json_whatever_the_numbers_are(tmp_path):
    train.Log(tmp_path / "log.jsonl", 0, tmp_path / "none", None)("", step=1, loss=math.nan, few=[math.inf, 2.0])
    refuse = lambda name: pytest.fail(f"{name} is no JSON")
    record = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse)
    assert record == dict(step=1, loss=None, few=[None, 2.0])


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


def test_max_hours_ends_with_a_checkpoint(glyph_file, tmp_path):
    assert run(glyph_file, tmp_path, "--max_hours", "0.006")["step"] < 300_000


def test_the_cooldown_ends_with_max_hours(glyph_file, tmp_path, monkeypatch):
    seconds = itertools.count()                                             # one at every look at the clock
    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: next(seconds)))
    saved = run(glyph_file, tmp_path, "--max_hours", "0.1", "--cooldown_steps", "20", "--save_interval", "300000")
    assert 40 < saved["step"] < 360
    assert all(group["lr"] < 0.2 * 3e-3 for state in saved["optimizers"] for group in state["param_groups"])


def test_a_cooldown_takes_half_of_a_short_run(glyph_file, tmp_path):
    saved = run(glyph_file, tmp_path, "--max_steps", "4", "--warmup_steps", "0", "--cooldown_steps", "1000")
    assert saved["optimizers"][0]["param_groups"][0]["lr"] == 3e-3 / 2      # of the last step: 1, 1, 1, 1 / 2


def test_max_hours_alone_sets_no_end_in_steps():
    steps = lambda *flags: train.parse_args(flags)[0].max_steps
    assert steps() == steps("--max_hours", "1", "--max_steps", "2400") == 2400
    assert steps("--max_hours", "1") > 10 ** 12


def test_a_few_hundred_steps_on_two_classes_lower_the_loss():
    images, labels, names, _ = fsdm.glyphs(None, 8, 3, False, classes=(2, 0, 0), per_class=20)
    split = fsdm.make_split(images, labels, names, [0, 1])
    _, config = train.parse_args(SMALL)
    torch.manual_seed(0)
    model, losses = fsdm.FSDM(config), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(300):
        loss = model(*train.draw_batch(split, 4, config, fsdm.rng("cpu", 0, step)))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5])


def test_the_context_gain_is_zero_when_the_context_is_ignored_and_not_otherwise(glyph_file):
    args, config = train.parse_args([*SMALL, "--dataset", glyph_file])
    split = fsdm.load_data(glyph_file, None, 8, 3)["train"]
    torch.manual_seed(0)
    model = fsdm.FSDM(config).eval()                                        # its gates are closed: nothing gets through
    assert train.validate(model, split, args, torch.float32)["context_gain"] == 0
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    first, second = (train.validate(model, split, args, torch.float32) for _ in range(2))
    assert first["context_gain"] != 0 and first == second                   # and its noise is always the same


def test_fp16_begins_with_a_scale_of_its_own_after_a_resume_from_a_precision_that_needs_none(glyph_file, tmp_path):
    run(glyph_file, tmp_path, "--max_steps", "2")
    args, config = train.parse_args([*SMALL, "--dataset", glyph_file])
    training = train.make_training(config, args, torch.device("cpu"), torch.float16)
    assert train.load_training(tmp_path / "ckpt.pt", args, config, training) == 2
    assert training.scaler.get_scale() == 2.0 ** 16


def test_the_average_never_holds_on_to_the_random_initialisation():
    model = torch.nn.Linear(2, 2)
    ema = copy.deepcopy(model).requires_grad_(False)
    torch.nn.init.constant_(model.weight, 7.0)
    for step in range(1, 201):
        train.update_ema(ema, model, step, 0.9999)
    assert (ema.weight - 7).abs().max() < 1e-6


def test_every_matrix_of_the_blocks_is_muons_and_nothing_is_left_out():
    args, config = train.parse_args(SMALL)
    model = fsdm.FSDM(config)
    optimizers = train.make_optimizers(model, "muon", 1e-3, 0.01, torch.device("cpu"))
    ids = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert all(p.ndim == 2 for p in optimizers[0].param_groups[0]["params"])


# ---- The documents' own command lines.

DOCUMENTED = """--dataset cifar100 --sample_size 6 --image_size 32 --patch_size 2 --batch_size 32 --hidden_size 384
    --depth 12 --num_heads 6 --mlp_ratio 4.0 --hdim 384 --context_channels 384 --mode_conditioning film
    --diffusion_steps 250 --lr 1e-4 --max_steps 0 --log_interval 300 --save_interval 20000 --num_eval_batches 10
    --num_sample_batches 2 --compute_fid --fid_num_samples 600 --use_wandb""".split()


def test_the_documents_command_lines_are_the_reference_and_the_wide_model(capsys):
    args, config = train.parse_args([*DOCUMENTED, "True", "--data_dir", "data"])
    assert config == fsdm.Config() and args.use_wandb is True and args.optimizer == "adamw" and args.ema_decay == 0.999
    train.main(DOCUMENTED)
    assert "43,509,900" in capsys.readouterr().out
    wide = [*DOCUMENTED, "--hidden_size", "450", "--depth", "6", "--num_heads", "9", "--hdim", "450",
            "--context_channels", "450"]
    for ratio, total in (("4.0", "37,739,262"), ("3.0", "35,306,562")):
        train.main([*wide, "--mlp_ratio", ratio])
        assert total in capsys.readouterr().out


def test_two_names_of_one_width_may_not_contradict_and_a_bottleneck_is_said(capsys):
    assert train.parse_args(["--context_channels", "64"])[1].hdim == 64
    with pytest.raises(SystemExit):
        train.parse_args(["--context_channels", "64", "--hdim", "32"])
    assert "two names of one width" in capsys.readouterr().err
    train.main(["--preset", "reference", "--hdim", "256", "--max_steps", "0"])
    said = capsys.readouterr().out
    assert "bottleneck" in said and "98,688" in said


def test_a_variational_run_logs_its_kl_and_resumes_bit_for_bit(glyph_file, tmp_path):
    flags = ["--mode_context", "variational", "--kl_weight", "0.01"]
    straight = run(glyph_file, tmp_path / "a", "--max_steps", "4", *flags)
    run(glyph_file, tmp_path / "b", "--max_steps", "2", *flags)
    assert kill.same(straight, run(glyph_file, tmp_path / "b", "--max_steps", "4", *flags))
    records = [r for r in map(json.loads, open(tmp_path / "a" / "log.jsonl")) if "kl" in r]
    assert len(records) == 2 and all(r["kl"] > 0 for r in records)


def test_wandb_is_imported_only_when_asked_for(glyph_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)                         # as if it were not installed
    run(glyph_file, tmp_path / "a", "--max_steps", "2")
    with pytest.raises(ValueError, match="pip install wandb"):
        run(glyph_file, tmp_path / "b", "--max_steps", "2", "--use_wandb")
    assert not (tmp_path / "b").exists()
    heard = []
    fake = type(sys)("wandb")
    fake.init, fake.log, fake.Error = lambda **_: None, lambda record, step: heard.append((step, record)), OSError
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(glyph_file, tmp_path / "b", "--max_steps", "2", "--use_wandb")
    assert [step for step, record in heard if "loss" in record] == [2]


def test_debug_tells_whether_the_context_is_used_and_gradients_arrive(glyph_file, tmp_path):
    run(glyph_file, tmp_path, "--max_steps", "4", "--debug", "--log_interval", "1", "--lr", "0.01",
        "--grad_clip", "0.01")
    record = next(r for r in map(json.loads, open(tmp_path / "log.jsonl")) if r["step"] == 4)
    names = ["context_norm", "context_mean", "context_max", "context_std", "encoder_grad_norm", "dit_grad_norm",
             "dit_layer_0_grad_norm", "dit_layer_1_grad_norm"]
    assert sorted(k for k in record if k.startswith("debug/")) == sorted(f"debug/{name}" for name in names)
    assert record["debug/context_norm"] > 0 and record["debug/encoder_grad_norm"] > 0
    both = (record["debug/encoder_grad_norm"] ** 2 + record["debug/dit_grad_norm"] ** 2) ** 0.5
    assert both == pytest.approx(record["grad_norm"], rel=0.02) and both > 0.02        # before it was clipped
    assert record["debug/dit_layer_0_grad_norm"] > 0


def test_max_steps_0_prints_the_table(capsys):
    train.main(["--preset", "reference", "--max_steps", "0"])
    said = capsys.readouterr().out
    assert all(number in said for number in ("43,509,900", "32,735,628", "10,774,272", "31,938,048", "147,840"))


@pytest.mark.parametrize("capability, dtype, compiled", [
    ((7, 5), torch.float16, True), ((8, 0), torch.bfloat16, True), ((9, 0), torch.bfloat16, True),
    ((6, 0), torch.float16, False)])
def test_precision_and_compilation_follow_the_compute_capability(monkeypatch, capability, dtype, compiled):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fsdm.choose_precision(torch.device("cuda"))[0] == dtype
    assert train.choose_compile(torch.device("cuda"), False)[0] == compiled


@pytest.mark.parametrize("rates, dtype", [((100e9, 400e9), torch.bfloat16), ((100e9, 90e9), torch.float32)])
def test_a_cpu_uses_bf16_only_where_it_is_faster(monkeypatch, rates, dtype):
    rates = dict(zip((torch.float32, torch.bfloat16), rates))
    monkeypatch.setattr(fsdm, "matmul_rate", lambda device, dtype: rates[dtype])
    assert fsdm.choose_precision(torch.device("cpu"))[0] == dtype


def test_the_step_compiles_as_one_graph_and_agrees_with_eager():
    _, config = train.parse_args(SMALL)
    torch.manual_seed(0)
    model, data = fsdm.FSDM(config), fsdm.glyphs(None, 8, 3, False, classes=(3, 0, 0), per_class=8)
    split = fsdm.make_split(*data[:3], [0, 1, 2])
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    batch = train.draw_batch(split, 2, config, fsdm.rng("cpu", 0))
    eager = model(*batch)[0]
    names = list(model.state_dict())
    train.compile_in_place(model, torch.float32)
    assert torch.allclose(model(*batch)[0], eager, rtol=1e-4, atol=1e-5) and list(model.state_dict()) == names


# ---- Nothing good is lost.

def test_flags_that_contradict_the_checkpoint_are_named_and_it_stays(glyph_file, tmp_path):
    run(glyph_file, tmp_path, "--max_steps", "2")
    before = (tmp_path / "ckpt.pt").read_bytes()
    with pytest.raises(ValueError, match="--depth 2 .now 3."):
        run(glyph_file, tmp_path, "--max_steps", "4", "--depth", "3")
    with pytest.raises(ValueError, match="--dataset .*now glyphs"):
        run(glyph_file, tmp_path, "--max_steps", "4", "--dataset", "glyphs")
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def poison(monkeypatch, steps):
    """From now on the losses of these calls are not a number."""
    forward, calls = fsdm.FSDM.forward, []

    def poisoned(self, *batch, **options):
        calls.append(1)
        error, kl = forward(self, *batch, **options)
        return error * (float("nan") if len(calls) in steps else 1), kl
    monkeypatch.setattr(fsdm.FSDM, "forward", poisoned)


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_a_step_that_is_not_finite_is_skipped_and_counted(glyph_file, monkeypatch, optimizer):
    args, config = train.parse_args([*SMALL, "--optimizer", optimizer])
    torch.manual_seed(0)
    training = train.make_training(config, args, torch.device("cpu"), torch.float32)
    split = fsdm.load_data(glyph_file, None, 8, 3)["train"]
    draw = lambda: train.draw_batch(split, 4, config, fsdm.rng("cpu", 0))
    step = lambda: bool(train.train_step(training.model, training, [draw()], args, torch.float32, 0))
    assert not step()
    before = copy.deepcopy(training.state())
    poison(monkeypatch, {1})
    assert step()
    after = training.state()
    assert kill.same([before["model"], before["optimizers"]], [after["model"], after["optimizers"]])
    assert not step() and not kill.same(before["model"], training.model.state_dict())
    assert [row.isnan().any().item() for row in training.history] == [False, True, False]
    assert training.scaler.get_scale() == 1                                 # a skip leaves no trace


def test_a_run_that_only_skips_stops_with_a_sentence_and_keeps_its_checkpoint(glyph_file, tmp_path, monkeypatch):
    run(glyph_file, tmp_path, "--max_steps", "2")
    before = (tmp_path / "ckpt.pt").read_bytes()
    poison(monkeypatch, range(10_000))
    monkeypatch.setattr(train, "PATIENCE", 3)
    with pytest.raises(ValueError, match="lower --lr"):
        run(glyph_file, tmp_path, "--max_steps", "80", "--save_interval", "1000")
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_weights_that_are_not_finite_never_replace_a_checkpoint(glyph_file, tmp_path):
    args, config = train.parse_args(SMALL)
    training = train.make_training(config, args, torch.device("cpu"), torch.float32)
    train.write_checkpoint(tmp_path / "ckpt.pt", 1, training, args)
    before = (tmp_path / "ckpt.pt").read_bytes()
    training.model.denoiser.out.bias.data[0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        train.write_checkpoint(tmp_path / "ckpt.pt", 2, training, args)
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
    assert kill.same(kept, torch.load(tmp_path / "ckpt.pt", weights_only=True))
    assert not list(tmp_path.glob("*.tmp"))


def test_restart_moves_the_old_run_aside_and_resume_goes_on_from_elsewhere(glyph_file, tmp_path):
    old = run(glyph_file, tmp_path / "a", "--max_steps", "4")
    new = run(glyph_file, tmp_path / "a", "--max_steps", "2", "--restart")
    assert new["step"] == 2 and kill.same(old, torch.load(tmp_path / "a_1" / "ckpt.pt", weights_only=True))
    assert (tmp_path / "a_1" / "log.jsonl").exists()
    flags = ("--max_steps", "8", "--resume", str(tmp_path / "a_1" / "ckpt.pt"))
    straight = run(glyph_file, tmp_path / "b", "--max_steps", "8")
    assert kill.same(straight, run(glyph_file, tmp_path / "c", *flags))
    assert kill.losses(tmp_path / "c") == kill.losses(tmp_path / "b")       # the log came along
    with pytest.raises(OSError):
        run(glyph_file, tmp_path / "d", "--resume", str(tmp_path / "nothing.pt"))
    assert not (tmp_path / "d").exists()


# ---- Several processes, parts of a batch.

def torchrun(processes, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*command, "train.py", *SMALL, *flags], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def far(a, b):
    """The largest difference between two state dicts of tensors."""
    return max((a[key] - b[key]).abs().max().item() for key in a)


def test_two_processes_equal_one_with_the_joint_batch_and_resume_bit_for_bit(glyph_file, tmp_path):
    flags = ["--dataset", glyph_file, "--lr", "1e-3"]
    said = torchrun(2, *flags, "--out_dir", str(tmp_path / "two"), "--max_steps", "4")
    assert said.count("step       4  loss") == 1                            # one of them speaks and writes
    torchrun(2, *flags, "--out_dir", str(tmp_path / "stop"), "--max_steps", "3")      # between two log lines
    torchrun(2, *flags, "--out_dir", str(tmp_path / "stop"), "--max_steps", "4")
    run(glyph_file, tmp_path / "parts", *flags, "--max_steps", "4", "--accumulate", "2")
    two, stop, parts = (torch.load(tmp_path / d / "ckpt.pt", weights_only=True) for d in ("two", "stop", "parts"))
    assert kill.same(two, stop)
    assert kill.losses(tmp_path / "two") == kill.losses(tmp_path / "stop")

    args, config = train.parse_args([*SMALL, *flags, "--max_steps", "4"])   # and by hand, the two halves as one batch
    torch.manual_seed(0)
    joint, split = train.make_training(config, args, torch.device("cpu"), torch.float32), fsdm.load_data(
        glyph_file, None, 8, 3)["train"]
    for step in range(4):
        halves = [train.draw_batch(split, 2, config, fsdm.rng("cpu", 0, train.TRAINING, step, part))
                  for part in range(2)]
        both = [torch.cat(parts) for parts in zip(*(half[:4] for half in halves))]
        train.train_step(joint.model, joint, [both], args, torch.float32, step)
    for name in ("model", "ema"):
        assert max(far(two[name], other[name]) for other in (parts, joint.state())) < 1e-5
    for a, b in zip(two["optimizers"], joint.state()["optimizers"], strict=True):
        assert max(far(a["state"][i], b["state"][i]) for i in a["state"]) < 1e-5


def test_a_batch_that_cannot_be_shared_is_refused(glyph_file, tmp_path):
    with pytest.raises(ValueError, match="multiple of 3"):
        run(glyph_file, tmp_path / "out", "--max_steps", "1", "--accumulate", "3")


@pytest.mark.parametrize("capability, works", [((7, 5), True), ((6, 0), False), ((8, 9), True), ((9, 0), True),
                                               ((10, 3), True), ((12, 1), True)])
def test_a_gpu_without_kernels_is_known(capability, works):
    assert fsdm.has_kernels(capability, ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_100f", "compute_120"]) == works


def test_the_benchmark_measures_and_writes_nothing(tmp_path, capsys):
    train.main([*SMALL, "--benchmark", "--out_dir", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert all(word in said for word in ("training, 4 sets of 4:", "GFLOP an image", "sampling", "peak memory"))
    assert not (tmp_path / "out").exists()


def test_missing_inception_weights_are_said_once_and_training_goes_on(glyph_file, tmp_path, capsys):
    run(glyph_file, tmp_path, "--max_steps", "4", "--compute_fid", "--fid_weights", str(tmp_path / "none.pth"))
    assert capsys.readouterr().out.count("training without --compute_fid") == 1
