"""Claims about the CUDA path. They run on an inert GPU, where one is at hand: PyTorch's dispatcher, allocator,
compiler and attention selection are the real ones there, every value is garbage, every time meaningless."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent.parent
INERT = HERE.parent / "shared" / "fakecuda" / "run"
pytestmark = pytest.mark.skipif(not INERT.exists() or shutil.which("gcc") is None or not torch.backends.cuda.is_built(),
                                reason="needs an inert GPU (../shared/fakecuda/run), gcc and a CUDA build of torch")


def on(gpu, count, *command, **environment):
    """Runs `python command` as if the machine had `count` such GPUs -> exit code, everything it said."""
    done = subprocess.run([INERT, gpu, str(count), sys.executable, *command], cwd=HERE, capture_output=True, text=True,
                          env=os.environ | dict(PYTHON=sys.executable) | environment)
    return done.returncode, done.stdout + done.stderr


LOOP = """
import sys, torch, fsdm, train
sys.path.insert(0, "tests")
import speed
torch.backends.cudnn.enabled = False            # cuDNN does not survive a GPU that computes nothing
args, config = train.parse_args(sys.argv[1:])
device, rank, world = train.connect(args.device)
dtype, reason = fsdm.choose_precision(device, args.precision)
compiled, why = fsdm.choose_compile(device, args.no_compile)
print("precision", dtype, "compiled", compiled, "optimizer", args.optimizer)
training = train.Training(fsdm.FSDM(config).to(device), args, dtype)
split = speed.random_split(config, device)
fsdm.compile_in_place(training.model, dtype)
def step(i):
    training.step([train.draw_batch(split, args.batch_size, config, fsdm.rng(device, 0, i))], 1e-3, i)
step(0)
torch.cuda.set_sync_debug_mode("error")
for i in range(1, 21):
    step(i)
torch.cuda.set_sync_debug_mode("default")
print("peak %.2f GiB" % (torch.cuda.max_memory_allocated() / 2 ** 30))
train.validate(training.ema, split, args.batch_size, 1, 0, dtype)
fsdm.generate(training.ema, split.images[:max(1, config.sample_size - 1)][None], 2, steps=2, dtype=dtype)
step(21)
counters = torch._dynamo.utils.counters
print("graphs", counters["stats"]["unique_graphs"], "breaks", sum(counters["graph_break"].values()))
"""


@pytest.mark.parametrize("flags, most", [
    ("--preset demo", 0.3), ("--preset t4 --depth 2 --encoder_depth 1 --batch_size 4 --optimizer muon", 14),
    ("--preset reference", 14)])
def test_on_a_t4_twenty_steps_never_wait_and_are_one_graph_that_fits(flags, most):
    code, said = on("t4", 1, "-c", LOOP, *flags.split(), TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
    assert code == 0, said[-3000:]
    assert "precision torch.float16 compiled True" in said and "graphs 1 breaks 0" in said, said[-3000:]
    assert ("optimizer adamw" if "reference" in flags else "optimizer muon") in said
    assert float(re.search(r"peak (\S+) GiB", said)[1]) < most, said[-3000:]


ATTENTION = """
import math, torch, fsdm
from torch.nn.attention import SDPBackend, sdpa_kernel
for name, preset in fsdm.PRESETS.items():
    config = fsdm.Config(**preset)
    if config.denoiser != "dit":
        continue
    for total in (config.hidden_size, config.hdim):
        heads = math.gcd(total, config.num_heads)
        width = total // heads
        q = torch.randn(2, 36, heads, width, device="cuda", dtype=torch.float16, requires_grad=True)
        mask = torch.ones(2, 1, 36, 36, dtype=torch.bool, device="cuda")
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            fsdm.attend(q, q, q).sum().backward()
            fsdm.attend(q, q, q, mask).sum().backward()
        print(name, width, "efficient")
"""


def test_on_a_t4_every_preset_gets_the_memory_efficient_attention():
    code, said = on("t4", 1, "-c", ATTENTION)
    assert code == 0 and "wide 50 efficient" in said, said[-3000:]


def test_a_card_that_is_too_small_is_one_sentence(tmp_path):
    code, said = on("t4", 1, "train.py", "--preset", "reference", "--dataset", "glyphs", "--max_steps", "2",
                    "--no_compile", "--out_dir", str(tmp_path / "out"), FAKECUDA_MEM_MB="1500")
    assert code == 2 and "out of memory: lower --batch_size" in said and "Traceback" not in said, said[-3000:]


def test_a_gpu_without_kernels_is_one_sentence(tmp_path):
    code, said = on("p100", 1, "train.py", "--out_dir", str(tmp_path / "out"))
    assert code == 2 and "no kernels for" in said and "6.0" in said and "Traceback" not in said, said[-3000:]


# DDP would find at times that the ranks' models differ, since collectives deliver nothing there
TWO = """
import ctypes, sys, torch, train
import torch.nn.parallel.distributed as ddp
ddp._verify_param_shape_across_processes = lambda *_: None

def collectives():
    counters = (ctypes.c_long * 12)()
    ctypes.CDLL(None).fakecuda_counters(counters)
    return counters[11]

def step(training, batches, lr, number):
    before = collectives()
    real(training, batches, lr, number)
    print(f"rank {torch.distributed.get_rank()} on {training.device}: step {number}, "
          f"{collectives() - before} collectives", file=sys.stderr, flush=True)

real, train.Training.step = train.Training.step, step
train.main(sys.argv[1:])
"""


def test_two_gpus_are_pointed_out_and_torchrun_uses_both(tmp_path):
    flags = ["--preset", "t4", "--depth", "1", "--encoder_depth", "1", "--batch_size", "2", "--no_compile",
             "--dataset", "glyphs", "--max_steps", "2", "--log_interval", "1", "--num_eval_batches", "1",
             "--depthwise_conv", "False"]       # cuDNN does not survive a GPU that computes nothing
    # numbers are garbage there: whether the last save finds the weights finite is a matter of luck
    _, said = on("t4", 2, "train.py", *flags, "--out_dir", str(tmp_path / "one"))
    assert "torchrun --standalone --nproc_per_node=2" in said and "step       2  loss" in said, said[-3000:]
    (tmp_path / "two.py").write_text(TWO)
    _, said = on("t4", 2, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "two.py"),
                 *flags, "--out_dir", str(tmp_path / "two"), PYTHONPATH=str(HERE))
    assert said.count("preset t4, 2 x cuda:0, float16") == 1 and "2 GPUs are here" not in said, said[-3000:]
    assert said.count("step       2  loss") == 1, said[-3000:]              # one of them speaks
    steps = re.findall(r"rank (\d) on cuda:(\d): step (\d), (\d+) collectives", said)
    assert sorted(step[:3] for step in steps) == [tuple(x) for x in ("000", "001", "110", "111")], said[-3000:]
    assert all(int(step[3]) > 1 for step in steps), said[-3000:]            # one is for the loss
