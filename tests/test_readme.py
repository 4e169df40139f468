"""What README and RESULTS say can be done: their commands, the parts to lift out, the pictures."""
import dataclasses
import functools
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))
import curves
import fid
import fsdm
import pictures
import sample
import speed
import train
from test_bad_input import call

README, RESULTS = ((HERE / name).read_text() for name in ("README.md", "assets/RESULTS.md"))
FENCED = re.findall(r"^```\w*\n(.*?)^```", README + RESULTS, re.M | re.S)
IN_TABLES = re.findall(r"^\| `((?:python|torchrun) [^`]+)` \|", README, re.M)
COMMANDS = [line.strip() for block in FENCED + IN_TABLES for line in block.replace("\\\n", " ").splitlines()
            if re.search(r"\b(train|sample|fid)\.py\b", line)]
LIFTED = [block for block in FENCED if block.startswith("# ")] + [
    """# fsdm.py: Transformer parts, Set encoders, Sets
from types import SimpleNamespace
encoder = ImageEncoder(SimpleNamespace(image_size=32, in_channels=3, encoder_patch_size=8, hdim=256, encoder_depth=2,
                                       num_heads=4))
vector, tokens, mask = encoder(torch.randn(16, 6, 3, 32, 32), leave_one_out(16, 6, torch.Generator()))
""", """# fsdm.py: Sets, Data
images, labels, names, _ = glyphs(None, 24, False, classes=(9, 0, 0))   # or yours: uint8 [M, H, W, 3], int [M], a list
split = read_split(images, labels, names, range(9), 24, 3).to("cpu")
classes, _ = draw_classes(split, 16, rng("cpu", 0, 1))
sets = split.images[draw_sets(split, classes, 6, rng("cpu", 0, 2))]     # uint8 [16, 6, C, H, W], a class a set
""", """# train.py: Optimizers, One step
from contextlib import nullcontext
from types import SimpleNamespace
autocast = lambda device, dtype: nullcontext()
class Line(torch.nn.Linear):                                            # any model that returns errors and KL
    def forward(self, x, y):
        error = (super().forward(x) - y).square()
        return error, torch.zeros_like(error)
model, args = Line(3, 1), SimpleNamespace(optimizer="adamw", lr=1e-2, weight_decay=0.01, accumulate=1, grad_clip=1.0,
                                          kl_weight=0.0, ema_decay=0.99)
training, losses = Training(model, args, torch.float32), []
for step in range(99):
    training.totals.zero_()
    training.step([(torch.randn(8, 3), torch.ones(8, 1))], learning_rate(1e-2, step, 9, step / 99, 0.5), step)
    losses.append(training.totals[0].item())
"""]


def rooms(path):
    """A script -> its text down to the first bar, and its rooms by name, which ends at the first colon or point."""
    head, *parts = re.split(r"^# ---- ", path.read_text(), flags=re.M)
    return head, {re.match(r"[^:.,]+", part).group(): "# " + part for part in parts}


@pytest.mark.parametrize("block", LIFTED)
def test_a_part_can_be_lifted_out_as_the_readme_says(block):
    file, names = re.match(r"# (\w+\.py): (.+)", block).groups()
    head, found = rooms(HERE / file)
    head = re.sub(r"^(import|from) (fid|fsdm|sample)\b.*\n", "", head, flags=re.M)          # nothing of ours
    scope = {"__name__": "lifted"}
    exec(head + "".join(found[name] for name in names.split(", ")), scope)
    exec(block, scope)
    for result in ("out", "vector", "x", "sets"):
        assert result not in scope or scope[result].isfinite().all()
    if "training" in scope:
        assert scope["losses"][-1] < scope["losses"][0] / 2


def test_the_readme_can_be_read_in_ten_minutes():
    assert len(README.split()) <= 1700


TINY = """--depth 1 --encoder_depth 1 --hidden_size 24 --hdim 24 --num_heads 3 --batch_size 2 --max_steps 2
    --warmup_steps 0 --num_eval_batches 1 --num_sample_batches 1 --no_compile --device cpu"""
ADDED = {"train": TINY, "sample": "--steps 2 --device cpu", "fid": "--dims 64 --weights weights.pth --device cpu"}


def test_the_commands_of_the_readme_run_one_after_the_other(tmp_path, monkeypatch):
    """As they are written, on small data under the names that they use, with flags added that make models small."""
    monkeypatch.chdir(tmp_path)
    small = functools.partial(fsdm.glyphs, classes=(5, 3, 3))
    monkeypatch.setattr(fsdm, "DATASETS", dict.fromkeys(("glyphs", "omniglot", "cifar100"), small))
    images, labels, names, _ = fsdm.glyphs(None, 8, False, classes=(50, 0, 0))      # [1000, 8, 8, 3], 20 of a class
    np.savez("omniglot_28.npz", images=images[:280, ..., 0], labels=labels[:280],
             class_is_evaluation=[0] * 10 + [1] * 4)
    fc100 = fsdm.FC100_TEST + fsdm.FC100_VAL + names[40:]
    np.savez("cifar100_x100.npz", images=images, labels=labels, class_names=fc100)
    np.savez("symbols.npz", images=images[:400], labels=labels[:400])
    np.savez("cifar100_fc100_test.npz", images=images[:400], labels=labels[:400], class_names=fc100[:20])
    torch.save(fid.Inception(64).state_dict(), "weights.pth")
    for i, path in enumerate(["a.png", "b.jpg", "c.png"] + [
            f"my_drawings/{i}.png" for i in range(5)] + [
            f"{folder}/{c}/{i}.png" for folder in ("my_photos", "pencil", "kaggle/input/my-images", "folder_of_real_images",
                                                   "folder_of_generated_images") for c in range(20) for i in range(8)]):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(path)
    ran = []
    for command in COMMANDS:
        command = command.replace("/kaggle/", "kaggle/").replace("assets/symbols.pt", "runs/symbols/ckpt.pt")
        words = shlex.split(command.split("&&")[-1].split("#")[0])
        program = next((name for name in ADDED if any(word.endswith(f"{name}.py") for word in words)), None)
        if program is None:
            continue
        at = next(i for i, word in enumerate(words) if word.endswith(f"{program}.py"))
        flags = words[at + 1:] + ADDED[program].split()
        flags += ["--preset", "demo"] if program == "train" and "--preset" not in flags else []
        flags += "--num 10 --k 1 --fid_dims 64 --fid_weights weights.pth".split() if "--evaluate" in flags else []
        code, said = call(shlex.join([f"{program}.py", *flags]))
        assert code == 0, f"{command}: {said}"
        ran.append(program)
    assert ran.count("train") >= 8 and ran.count("sample") >= 6 and ran.count("fid") >= 1


@pytest.mark.parametrize("text, folder", [(README, HERE), (RESULTS, HERE / "assets")], ids=["README", "RESULTS"])
def test_every_file_that_is_shown_or_linked_is_here(text, folder):
    for path in re.findall(r"\]\((?!http|#)([^)#]+)\)", text):
        assert (folder / path).exists(), path


def test_the_parameters_in_the_table_are_those_of_the_presets():
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", RESULTS, re.M))
    assert rows.keys() == fsdm.PRESETS.keys()
    for name, preset in fsdm.PRESETS.items():
        with torch.device("meta"):
            model = fsdm.FSDM(fsdm.Config(**preset))
        assert f"{sum(p.numel() for p in model.parameters()):,}" == rows[name]


def test_the_predicted_speed_of_a_t4_is_its_counted_arithmetic():
    rows = re.findall(r"^\| `(\w+)` \| \d+ x \d \| ([\d.]+) \| *(\d*) *\|", RESULTS, re.M)
    assert {name for name, *_ in rows} == fsdm.PRESETS.keys()
    for name, counted, predicted in rows:
        config = fsdm.Config(**fsdm.PRESETS[name])
        K, shape = config.sample_size, (config.in_channels, config.image_size, config.image_size)
        with torch.device("meta"):
            model = fsdm.FSDM(config).to("meta")
            batch = (torch.zeros(1, K, *shape, dtype=torch.uint8), torch.ones(1, K, K, dtype=torch.bool),
                     torch.zeros(1, K, dtype=torch.long), torch.zeros(1, K, *shape))
        flops = speed.flops(model, batch)
        assert float(counted) == pytest.approx(flops / 1e9, rel=0.005)
        assert predicted == "" or int(predicted) == round(0.3 * 65e12 / flops)


def test_the_pictures_are_drawn_from_unseen_classes(tmp_path):
    config = fsdm.Config(image_size=8, patch_size=4, encoder_patch_size=4, hidden_size=24, hdim=24, num_heads=3,
                         depth=1, encoder_depth=1, encoder="image", mode_conditioning="lag", context_dropout=0.1)
    torch.save(dict(config=dataclasses.asdict(config), ema=fsdm.FSDM(config).state_dict()), tmp_path / "ckpt.pt")
    images, labels, names, _ = fsdm.glyphs(None, 8, False, classes=(20, 0, 0), per_class=16)
    np.savez(tmp_path / "a.npz", images=images, labels=labels, class_names=names)
    pictures.main(tmp_path / "ckpt.pt", str(tmp_path / "a.npz"), tmp_path)
    tile, bar = 8 * 2 + 2, 8
    assert Image.open(tmp_path / "support.png").size == (20 * tile + bar, 4 * pictures.SETS * tile)
    assert Image.open(tmp_path / "steps.png").size == (15 * tile + bar, pictures.SETS * tile)
    assert Image.open(tmp_path / "nearest.png").size == (15 * tile + bar, 2 * pictures.SETS * tile)
    pictures.main(tmp_path / "ckpt.pt", str(tmp_path / "a.npz"), tmp_path, "glyph000", "glyph001")
    assert Image.open(tmp_path / "kinds.png").size == (13 * tile + bar, 4 * tile)


def test_the_curves_compare_with_images_that_are_not_in_the_support():
    split = fsdm.Split(torch.zeros(80), torch.arange(0, 81, 16), list("abcde"), 16)
    support, reference, classes = curves.draw(split, 4)
    assert support.shape == (4, 10) and reference.shape == (4, 5) and len(set(classes.tolist())) == 4
    assert len(torch.cat([support, reference], 1).unique()) == 60
    assert (torch.cat([support, reference], 1) // 16 == classes[:, None]).all()
