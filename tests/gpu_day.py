"""Everything that is to be measured on a GPU, in parts that each end within nine minutes and leave JSON and pictures.

    python tests/gpu_day.py --out_dir day --dataset photos.npz --fid_weights weights.pth
    python tests/gpu_day.py --out_dir day --part 2          # one part, or the rest of what it had no time for
    python tests/gpu_day.py --out_dir day --part 3 --minutes 4      # of training, where the card is lent for less
    python tests/gpu_day.py --out_dir day --tiny            # small models on a CPU: does all of it run?

1: the claims of tests/test_gpu.py;  2: speed and memory of every preset;  3: seven minutes of training, scored on
classes never trained on;  4: as many more;  5: the table of predictions in RESULTS.md, filled in.
"""
import argparse
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import fid
import fsdm
import kill
import sample
import speed
import train

SECONDS = 540                               # a part, at most
LAST_START = 300                            # after so many seconds of part 2 no preset begins: it compiles
TINY = """--image_size 8 --patch_size 4 --encoder_patch_size 4 --hidden_size 32 --hdim 32 --num_heads 2 --depth 1
    --encoder_depth 1 --sample_size 3 --batch_size 2 --no_compile --device cpu --precision bf16 --log_interval 1
    --num_eval_batches 1 --num_sample_batches 1""".split()


# ---- The parts: each takes the command line and returns what its JSON will hold; "failed" is a sentence.

class Outcomes:
    """What pytest tells its plugins -> claims.json {test: outcome, why, seconds}, at once: time may run out."""
    def __init__(self, path):
        self.path, self.tests = path, {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            why = getattr(report, "wasxfail", "") or report.longreprtext[-2000:]
            name = report.nodeid.split("::")[-1]
            self.tests[name] = dict(outcome=report.outcome, why=why, seconds=report.duration)
            write(self.path, self.tests)


def claims(args):
    outcomes, chosen = Outcomes(args.out_dir / "claims.json"), "real_gpu"
    if args.tiny:
        os.environ["TEST_DEVICE"], chosen = "cpu", "real_gpu and muon"
    code = pytest.main(["-q", "-p", "no:cacheprovider", "-k", chosen, str(HERE / "test_gpu.py")], plugins=[outcomes])
    names = {word: [name for name, test in outcomes.tests.items() if test["outcome"] == word]
             for word in ("passed", "failed")}
    failed = None
    if code or not names["passed"]:                         # an inert GPU skips all, and that is no success
        failed = f"{len(names['passed'])} tests passed, pytest ended with {int(code)}: {', '.join(names['failed'])}"
    return dict(tests=outcomes.tests, failed=failed)


def speeds(args):
    """Adds to speed.json, preset by preset; what is there already is not measured again."""
    path, began, failed = args.out_dir / "speed.json", time.time(), []
    rows = json.loads(path.read_text()) if path.exists() else {}
    speed.SECONDS = 0 if args.tiny else 5
    presets = sorted(fsdm.PRESETS, key=lambda preset: preset != "t4")       # t4 first: time may run out
    wanted = [f"{preset} {half}" for preset in presets for half in ("fp16", "bf16")]
    if args.tiny:
        wanted = ["t4 bf16", "mnist bf16"]                  # a CPU multiplies fp16 a hundred times slower
    elif torch.cuda.get_device_capability() < (8, 0):
        print("bf16 is left out: a card below compute capability 8.0 computes it in software")
        wanted = [name for name in wanted if not name.endswith("bf16")]
    for name in wanted:
        if name in rows:
            continue
        if time.time() - began > LAST_START:
            failed.append(f"{name} had no time: pass --part 2 again")
            continue
        torch._dynamo.reset()                               # it compiles one function for a few models only
        gc.collect()
        torch.cuda.empty_cache()
        preset, half = name.split()
        try:
            rows[name] = speed.main(["--preset", preset, *TINY * args.tiny, "--precision", half])
            write(path, rows)
        except Exception as error:                          # the other presets still have their turn
            failed.append(f"{name}: {one_line(error)}")
    return dict(rows=rows, failed="; ".join(failed) or None)


def first_minutes(args):
    return train_and_score(args, 3, ["--restart", "--cooldown", "0"])


def more_minutes(args):
    if not (args.out_dir / "t4" / "ckpt.pt").exists():
        raise ValueError(f"there is no checkpoint in {args.out_dir / 't4'} to go on from: run part 3")
    return train_and_score(args, 4, [])


def train_and_score(args, part, flags):
    began, run = time.time(), args.out_dir / "t4"
    flags += ["--max_steps", str(4 * part), *TINY] if args.tiny else ["--max_hours", str(args.minutes / 60)]
    train.main(["--preset", "t4", "--dataset", args.dataset, "--out_dir", str(run), *flags])
    losses = kill.losses(run)
    picture, curve = (args.out_dir / f"part{part}_{name}.png" for name in ("samples", "loss"))
    max(run.glob("samples_*.png")).rename(picture)
    draw(losses).save(curve)
    found = dict(losses=losses, pictures=[str(picture), str(curve)], training_seconds=time.time() - began, failed=None)
    try:
        found["scores"], found["recipe"] = score(run / "ckpt.pt", args)
    except Exception as error:                              # what was trained stays, whatever it was
        found["failed"] = f"no scores: {one_line(error)}"
    return found


def score(ckpt, args):
    """-> scores of 500 images of unseen classes, and their recipe, as sample.evaluate returns them."""
    device = fsdm.choose_device("cpu" if args.tiny else "cuda")
    dtype = torch.bfloat16 if args.tiny else fsdm.choose_precision(device)[0]
    model, weights, dims = fsdm.load_model(ckpt, device), args.fid_weights, 64 if args.tiny else 768
    config = model.config
    if args.tiny and weights is None:                       # the scores mean nothing, but are computed
        weights = args.out_dir / "random_inception.pth"
        torch.save(fid.Inception(dims).state_dict(), weights)
    parts = fsdm.load_data(args.dataset, "data", config.image_size, config.in_channels, parts=["test"])
    return sample.evaluate(model, parts["test"].to(device), fid.load_inception(weights, dims, str(device)), 500,
                           config.sample_size - 1, dtype=dtype, guidance=fsdm.best_guidance(config))


def draw(losses, width=640, height=320):
    """[(step, loss)] -> a picture of the curve, with the ends of both axes written in its corner."""
    steps, values = np.array([row for row in losses if row[1] is not None]).T
    x = np.interp(steps, (steps.min(), steps.max()), (0, width))
    y = np.interp(values, (values.min(), values.max()), (height, 0))
    picture = Image.new("L", (width, height), 255)
    pen = ImageDraw.Draw(picture)
    pen.line(list(zip(x, y)), 0, 2)
    text = f"loss {values.max():.4f} to {values.min():.4f}, steps {steps.min():,.0f} to {steps.max():,.0f}"
    pen.text((width - 8, 8), text, 0, anchor="ra")
    return picture


def table(args):
    """Fills the empty columns of RESULTS.md's table, ready to go back there."""
    path = args.out_dir / "speed.json"
    if not path.exists():
        raise ValueError(f"there is no {path} to fill the table with: run part 2")
    rows, half = json.loads(path.read_text()), "bf16" if args.tiny else "fp16"
    text = (HERE.parent / "assets" / "RESULTS.md").read_text()
    head, *lines = re.search(r"^\| preset \| batch .*\n(\|.*\n)+", text, re.M)[0].splitlines()
    lines = [fill(line, rows.get(f"{line.split('`')[1]} {half}")) if "`" in line else line for line in lines]
    filled = "\n".join([f"{machine(args)}, torch {torch.__version__}, {half}\n", head, *lines])
    (args.out_dir / "predicted.md").write_text(filled + "\n")
    return dict(table=filled)


def fill(line, found):
    """A row of the table: each predicted figure stands left of an empty cell."""
    if found is None:
        return line
    trained, sampled, cells = found["training"], found["sampling"], line.split("|")
    cells[5:12:2] = (f" {trained['images_per_second']:,.0f} ", f" {trained['ms']:,.0f} ",
                     f" {trained['peak_gib']:.2f} GiB ", f" {sampled['images_per_second']:,.0f} ")
    return "|".join(cells)


PARTS = {1: claims, 2: speeds, 3: first_minutes, 4: more_minutes, 5: table}


# ---- One part in this process, or all of them, each in its own, which may fail or hang without the others.

def one_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]


def write(path, record):
    fsdm.write_whole(path, lambda file: file.write(json.dumps(record, indent=1).encode()))


def machine(args):
    return "a CPU, tiny models" if args.tiny else torch.cuda.get_device_name()


def run(number, args):
    """-> the sentence of what failed, or None; both are in part<number>.json, which is there from the start."""
    path, began = args.out_dir / f"part{number}.json", time.time()
    record = dict(part=number, machine=machine(args), torch=torch.__version__, failed="it did not end")
    write(path, record)
    try:
        record |= dict(failed=None) | PARTS[number](args)
    except (Exception, SystemExit) as error:                # whatever it was, the file says so
        traceback.print_exc()
        record["failed"] = one_line(error)
    write(path, record | dict(seconds=time.time() - began))
    return record["failed"]


def ends_well(number, argv):
    """Runs a part in a process of its own -> whether it did what it should, in its time."""
    part = subprocess.Popen([sys.executable, __file__, *argv, "--part", str(number)], start_new_session=True)
    try:
        return part.wait(SECONDS) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError):                  # it has ended, with all that it started
            os.killpg(part.pid, signal.SIGKILL)


def main(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out_dir", type=Path, required=True, help="for JSON, pictures and the checkpoint")
    p.add_argument("--part", type=int, choices=PARTS, help="one part only")
    p.add_argument("--dataset", help="as of train.py (data/photos.npz if it is there, else glyphs)")
    p.add_argument("--fid_weights", help="Inception weights file; torch's cache or a download if left out")
    p.add_argument("--minutes", type=float, default=7.3, help="of training in part 3, and again in part 4 (7.3)")
    p.add_argument("--tiny", action="store_true", help="small models, a few steps, on a CPU")
    args = p.parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        p.error("there is no GPU here to measure: pass --tiny to see that all parts run")
    if args.dataset is None:
        args.dataset = "data/photos.npz" if os.path.exists("data/photos.npz") else "glyphs"
    print(f"data set {args.dataset}", flush=True)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    if args.part is None:
        failed = ", ".join(str(number) for number in PARTS if not ends_well(number, argv))
        sentence = f"parts {failed} failed: see {args.out_dir}/part*.json"
    else:
        failed = run(args.part, args)
        sentence = f"part {args.part}: {failed}"
    if failed:
        print(f"gpu_day.py: {sentence}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
