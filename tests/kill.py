"""Kills a training run with SIGKILL at random moments, goes on each time, and compares with a run never killed.

    python tests/kill.py 50            # how many kills; the test suite does a few

Every resumed run must load its checkpoint, and at the end model, average, optimizers, the sums since the last log line
and the logged losses must be equal bit for bit to those of the run that was left alone.
"""
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import fsdm
import train

FLAGS = """--preset demo --image_size 8 --patch_size 4 --encoder_patch_size 4 --hidden_size 64
    --hdim 64 --depth 2 --num_heads 2 --encoder_depth 1 --sample_size 3 --batch_size 2 --num_eval_batches 1
    --num_sample_batches 1 --precision fp32 --device cpu --no_compile --cooldown 0 --log_interval 3
    --save_interval 2""".split()


def start(out, steps):
    """Trains in a forked process -> its number. Nothing of torch has run in this one, so that the fork is whole."""
    child = os.fork()
    if child == 0:
        with open(out / "said.txt", "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                train.main([*FLAGS, "--max_steps", str(steps), "--dataset", str(out.parent / "glyphs.npz"),
                            "--out_dir", str(out / "run")])
            except BaseException as error:
                print(f"FAILED {type(error).__name__}: {error}", flush=True)
                os._exit(1)
            os._exit(0)
    return child


def losses(run):
    """[(step, loss)] as logged, twice if it were logged twice."""
    records = [json.loads(line) for line in open(Path(run) / "log.jsonl")]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def same(a, b):
    """Bit for bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def main(kills, root, seed=0):
    """-> a sentence. Raises AssertionError when a run could not go on or ends otherwise than the one left alone."""
    chance, steps = random.Random(seed), 4 * kills + 10
    straight, killed = Path(root) / "straight", Path(root) / "killed"
    for out in (straight, killed):
        out.mkdir()
    images, labels, names, _ = fsdm.glyphs(None, 8, False, classes=(20, 0, 0), per_class=4)
    np.savez(Path(root) / "glyphs.npz", images=images, labels=labels, class_names=names)
    began = time.time()
    child = start(straight, steps)
    while not (straight / "run" / "ckpt.pt").exists() and time.time() - began < 60:
        time.sleep(0.01)
    beginning = time.time() - began
    assert os.waitpid(child, 0)[1] == 0, (straight / "said.txt").read_text()
    training, during_a_save, done = time.time() - began - beginning, 0, 0
    while done < kills:
        child = start(killed, steps)
        # now and then before it has begun, mostly within its next eight steps
        time.sleep(chance.uniform(0.7 * beginning, beginning + 8 / steps * training))
        ended, status = os.waitpid(child, os.WNOHANG)
        assert not ended or status == 0, (killed / "said.txt").read_text()
        if ended:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done += 1
        during_a_save += (killed / "run" / "ckpt.pt.tmp").exists()
    assert os.waitpid(start(killed, steps), 0)[1] == 0, (killed / "said.txt").read_text()
    a, b = (torch.load(out / "run" / "ckpt.pt", weights_only=True) for out in (straight, killed))
    differ = [key for key in a if not same(a[key], b[key])]
    assert a["step"] == b["step"] == steps and not differ, f"the checkpoints differ in {differ}"
    assert losses(straight / "run") == losses(killed / "run"), "the logged losses differ"
    resumed = (killed / "said.txt").read_text().count("going on from")
    assert resumed, "every kill came before the first checkpoint"
    return (f"{done} kills, {during_a_save} of them while a checkpoint was being written; {resumed} starts went on "
            f"from a checkpoint; after {steps} steps all is equal bit for bit")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        print(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, root))
