"""What the three programs say to bad input: exit code 2, one sentence that names the culprit, nothing written.

    python tests/test_bad_input.py            # prints the table of commands and sentences
"""
import contextlib
import dataclasses
import io
import os
import pickle
import re
import runpy
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))
import fid
import fsdm

SMALL = dict(image_size=8, patch_size=4, encoder_patch_size=4, hidden_size=32, hdim=32, depth=1, num_heads=2,
             encoder_depth=1, sample_size=4)
SHAPE = " ".join(f"--{name} {value}" for name, value in SMALL.items()) + " --no_compile --device cpu --precision fp32"
TRAIN = f"train.py {SHAPE} --max_steps 1 --batch_size 4 --out_dir out"
SAMPLE = "sample.py --ckpt good.pt --device cpu --precision fp32 --out_dir out"
FID = "fid.py --dims 64 --weights weights.pth --device cpu"

# a command, and a word of its sentence
ROWS = [
    (f"{TRAIN} --dataset imagenet", "imagenet"),
    (f"{TRAIN} --dataset gone.npz", "gone.npz"),
    (f"{TRAIN} --dataset text.npz", "cannot be read as an .npz"),
    (f"{TRAIN} --dataset a.png", "a folder of class folders, or an .npz"),
    (f"{TRAIN} --dataset pipe.npz", "a folder of class folders, or an .npz"),
    (f"{TRAIN} --dataset pickled.npz", "cannot be read as an .npz"),
    (f"{TRAIN} --dataset truncated.npz", "cannot be read as an .npz"),
    (f"{TRAIN} --dataset vast.npz", "unpacks to"),
    (f"{TRAIN} --dataset member.npz", "expected uint8"),
    (f"{TRAIN} --dataset odd_labels.npz", "do not fit together"),
    (f"{TRAIN} --dataset twins.npz", "no two alike"),
    (f"{TRAIN} --dataset name_table.npz", "do not fit together"),
    (f"{TRAIN} --dataset no_labels.npz", "labels"),
    (f"{TRAIN} --dataset few_labels.npz", "expected one each"),
    (f"{TRAIN} --dataset float.npz", "uint8"),
    (f"{TRAIN} --dataset empty", "0 class folder(s)"),
    (f"{TRAIN} --dataset one_class", "1 class folder(s)"),
    (f"{TRAIN} --dataset folder", "0 class folder(s)"),
    (f"{TRAIN} --dataset hollow", "0 readable images"),
    (f"{TRAIN} --dataset classes --sample_size 9", "ask for fewer"),
    (f"{TRAIN} --dataset circle", "circle"),
    (f"{TRAIN} --dataset cifar100 --data_dir empty", "--download"),
    (f"{TRAIN} --dataset omniglot --data_dir empty", "--download"),
    (f"{TRAIN} --patch_size 3", "does not divide"),
    (f"{TRAIN} --num_heads 5", "does not divide"),
    (f"{TRAIN} --sample_size 1", "at least 2"),
    (f"{TRAIN} --context_dropout 1.5", "context_dropout is 1.5"),
    (f"{TRAIN} --encoder none --mode_context variational", "not with --encoder none"),
    (f"{TRAIN} --diffusion_steps 1", "diffusion_steps is 1"),
    (f"{TRAIN} --hidden_size 999999999", "hidden_size is 999999999"),
    (f"{TRAIN} --hidden_size many", "--hidden_size"),
    (f"{TRAIN} --vary_support perhaps", "True or False"),
    (f"{TRAIN} --batch_size 0", "--batch_size is 0"),
    (f"{TRAIN} --accumulate 3", "multiple of 3"),
    (f"{TRAIN} --max_steps -1", "--max_steps is -1"),
    (f"{TRAIN} --lr 0", "--lr is 0.0"),
    (f"{TRAIN} --lr nan", "--lr is nan"),
    (f"{TRAIN} --ema_decay 2", "--ema_decay is 2.0"),
    (f"{TRAIN} --cooldown 30", "--cooldown 30.0"),
    (f"{TRAIN} --max_hours 0", "--max_hours is 0.0"),
    (f"{TRAIN} --dataset classes --seed -1", "--seed is -1"),
    (f"{TRAIN} --dataset classes --restart --resume good.pt", "pass one of them"),
    (f"{TRAIN} --dataset classes --restart --init good.pt --out_dir .", "would move the file of --init away"),
    (f"{TRAIN} --dataset classes --fid_num_samples 0", "--fid_num_samples is 0"),
    (f"{TRAIN} --optimizer sgd", "sgd"),
    (f"{TRAIN} --preset huge", "huge"),
    (f"{TRAIN} --device gpu", "--device gpu"),
    (f"{TRAIN} --device meta", "--device meta cannot be used here"),
    (f"{TRAIN} --dataset classes --resume gone.pt", "gone.pt"),
    (f"{TRAIN} --init gone.pt", "gone.pt"),
    (f"{TRAIN} --init hostile.pt", "not a checkpoint"),
    (f"{TRAIN} --dataset classes --resume text.npz", "cannot be resumed"),
    (f"{TRAIN} --dataset classes --resume hostile.pt", "cannot be resumed"),
    (f"{TRAIN} --dataset classes --resume list.pt", "cannot be resumed"),
    (f"{TRAIN} --dataset classes --resume zero.png", "cannot be resumed"),
    (f"{TRAIN} --dataset classes --resume flipped.pt", "is damaged"),
    (f"{TRAIN} --dataset classes --resume good.pt", "weights alone is for --init"),
    (f"{TRAIN} --dataset classes --resume pipe.png", "pipe.png"),
    (f"{TRAIN} --dataset classes --out_dir text.npz", "text.npz"),
    (f"{SAMPLE} --support a.png --k 3", "--dataset"),
    (f"{SAMPLE} --support a.png --split train", "--split belong to --dataset"),
    (f"{SAMPLE} --ckpt gone.pt --support a.png", "gone.pt"),
    (f"{SAMPLE} --ckpt empty --support a.png", "empty"),
    (f"{SAMPLE} --ckpt text.npz --support a.png", "not a checkpoint"),
    (f"{SAMPLE} --ckpt hostile.pt --support a.png", "not a checkpoint"),
    (f"{SAMPLE} --ckpt list.pt --support a.png", "not a checkpoint"),
    (f"{SAMPLE} --ckpt huge.pt --support a.png", "hidden_size"),
    (f"{SAMPLE} --ckpt thin.pt --support a.png", "larger than what is stored"),
    (f"{SAMPLE} --ckpt other.pt --support a.png", "Missing key"),
    (f"{SAMPLE} --ckpt flipped.pt --support a.png", "is damaged"),
    (f"{SAMPLE} --ckpt nan.pt --support a.png", "not finite"),
    (f"{SAMPLE} --ckpt good.pt --support a.png --weights raw", "with raw weights"),
    (f"{SAMPLE} --support gone.png", "gone.png"),
    (f"{SAMPLE} --support a.png zero.png", "zero.png"),
    (f"{SAMPLE} --support a.png noise.png", "noise.png"),
    (f"{SAMPLE} --support postscript.png", "cannot be read as an image"),
    (f"{SAMPLE} --support exif.png", "cannot be read as an image"),
    (f"{SAMPLE} --support cut.jpg", "cut.jpg"),
    (f"{SAMPLE} --support float.tif", "no known range"),
    (f"{SAMPLE} --support bomb.png", "bomb.png"),
    (f"{SAMPLE} --support pipe.png", "pipe.png"),
    (f"{SAMPLE} --support empty", "empty is an empty folder"),
    (f"{SAMPLE} --support a.png --dataset glyphs", "either --support"),
    (SAMPLE, "either --support"),
    (f"{SAMPLE} --support a.png --evaluate", "--dataset"),
    (f"{SAMPLE} --dataset classes --evaluate --split val", "leave out --split"),
    (f"{SAMPLE} --support a.png --eta 1", "--sampler ddim"),
    (f"{SAMPLE} --support a.png --sampler ddim --eta 2", "--eta is 2"),
    (f"{SAMPLE} --support a.png --sampler ddim --steps 300", "at most 250"),
    (f"{SAMPLE} --support a.png --num 0", "--num is 0"),
    (f"{SAMPLE} --support a.png --steps 0", "--steps is 0"),
    (f"{SAMPLE} --support a.png --seed -1", "--seed is -1"),
    (f"{SAMPLE} --support a.png --guidance 2", "guidance 2"),
    (f"{SAMPLE} --support a.png --guidance nan", "--guidance is nan"),
    (f"{SAMPLE} --support a.png --guidance 0", "--guidance is 0"),
    (f"{SAMPLE} --support a.png --shared_pool", "belongs to --evaluate"),
    (f"{SAMPLE} --dataset classes --crop", "the files of --support"),
    (f"{SAMPLE} --support a.png a.png a.png a.png", "3 at most"),
    (f"{SAMPLE} --support a.png --out_dir text.npz/out", "text.npz"),
    (f"{SAMPLE} --dataset classes --k 9", "--k"),
    (f"{SAMPLE} --dataset classes --evaluate --k 3 --fid_weights weights.pth --fid_dims 64", "fewer a set (--k"),
    (f"{SAMPLE} --dataset classes --evaluate --k 1 --num 3 --fid_weights weights.pth --fid_dims 64", "more images"),
    (f"{SAMPLE} --dataset classes --evaluate --k 1 --fid_weights gone.pth", "gone.pth"),
    (f"{FID} folder gone", "gone"),
    (f"{FID} folder empty", "no image files"),
    (f"{FID} folder one", "at least 2"),
    (f"{FID} folder broken", "more than 1%"),
    (f"{FID} folder text.npz", "text.npz"),
    (f"{FID} folder pickled.npz", "pickled.npz"),
    (f"{FID} folder float.npz", "uint8"),
    (f"{FID} folder stats.npz", "not float statistics"),
    (f"{FID} folder words.npz", "not float statistics"),
    (f"{FID} folder member.npz", "member.npz"),
    (f"{FID} folder single.npz", "single.npz: 1 image(s)"),
    (f"{FID} folder pipe.png", "pipe.png"),
    (f"{FID} folder folder --weights pipe.png", "pipe.png"),
    (f"{FID} folder --save_stats empty", "the name of a new file"),
    (f"{FID} folder", "two sides"),
    (f"{FID} folder folder --save_stats out.npz", "two sides"),
    (f"{FID} images.npz --save_stats images.npz", "new file"),
    (f"{FID} folder --save_stats moments.npz", "new file"),
    (f"{FID} folder --save_stats gone/out.npz", "gone/out.npz"),
    (f"{FID} gone --save_stats out.npz", "gone"),
    (f"{FID} moments.npz --save_stats out.npz", "holds statistics already"),
    (f"{FID} folder folder --num 1", "--num"),
    (f"{FID} folder folder --batch_size 0", "--batch_size"),
    (f"{FID} folder folder --device cuda:99", "cuda:99"),
    (f"{FID} folder folder --dims 100", "100"),
    (f"{FID} folder folder --device gpu", "gpu"),
    (f"{FID} folder folder --weights gone.pth", "gone.pth"),
    (f"{FID} folder folder --weights text.npz", "text.npz"),
    (f"{FID} folder folder --weights hostile.pt", "hostile.pt"),
    (f"{FID} folder folder --dims 768", "weights.pth"),
]


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def make_files(root):
    """Fills `root` with everything that ROWS name."""
    grey = np.random.RandomState(0).randint(0, 256, (12, 8, 8), np.uint8)
    picture = Image.fromarray(grey[0]).convert("RGB").resize((40, 30))
    picture.save(root / "a.png")
    picture.resize((400, 300)).save(root / "whole.jpg", quality=95)
    Image.fromarray(grey[0] / np.float32(255)).save(root / "float.tif")
    (root / "cut.jpg").write_bytes((root / "whole.jpg").read_bytes()[:3000])
    (root / "zero.png").write_bytes(b"")
    (root / "noise.png").write_bytes(bytes(grey.ravel()))
    picture.save(root / "postscript.eps")
    (root / "postscript.eps").rename(root / "postscript.png")
    (root / "exif.png").write_bytes((root / "a.png").read_bytes()[:33] + png_chunk(b"eXIf", b"II*\0")
                                    + (root / "a.png").read_bytes()[33:])
    (root / "bomb.png").write_bytes(                        # 3.6 thousand million pixels in a hundred bytes
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
        + png_chunk(b"IDAT", zlib.compress(b"\0" * 100)) + png_chunk(b"IEND", b""))
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "pipe.npz")
    for name in ("empty", "folder", "one", "broken", "one_class/a", "hollow/a", "hollow/b", "hollow/c", "circle"):
        (root / name).mkdir(parents=True)
    (root / "circle" / "again").symlink_to(root / "circle", target_is_directory=True)
    for i in range(4):
        picture.save(root / "folder" / f"{i} ü.PNG")
        picture.save(root / "one_class" / "a" / f"{i}.png")
    picture.save(root / "one" / "a.png")
    picture.save(root / "broken" / "a.png")
    (root / "broken" / "b.png").write_text("no image")
    for c in range(5):
        (root / "classes" / f"class {c}").mkdir(parents=True)
        for i in range(6):
            Image.fromarray(grey[i]).save(root / "classes" / f"class {c}" / f"{i}.png")
    (root / "text.npz").write_text("no array")
    np.savez(root / "pickled.npz", images=np.array([{}]), labels=np.array([{}]), arr_0=np.array([{}]))
    np.savez(root / "no_labels.npz", images=grey)
    np.savez(root / "few_labels.npz", images=grey, labels=np.arange(3))
    np.savez(root / "float.npz", images=grey / 255, labels=np.arange(12) // 4)
    np.savez(root / "images.npz", images=grey, labels=np.arange(12) // 4)
    np.savez(root / "odd_labels.npz", images=grey, labels=np.arange(12), class_names=np.arange(6))
    np.savez(root / "twins.npz", images=grey, labels=np.arange(12) // 4, class_names=["a", "b", "a"])
    np.savez(root / "name_table.npz", images=grey, labels=np.arange(12) // 4, class_names=[["a"], ["b"], ["c"]])
    np.savez(root / "moments.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(root / "stats.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(root / "words.npz", mu=np.full(64, "a"), sigma=np.full((64, 64), "b"))
    np.savez(root / "single.npz", images=grey[:1])
    with zipfile.ZipFile(root / "member.npz", "w") as file:
        file.writestr("images", "no array")
        file.writestr("labels", "no array")
    (root / "truncated.npz").write_bytes((root / "images.npz").read_bytes()[:500])
    np.savez(root / "vast.npz", images=grey, labels=np.arange(12), a=grey, b=grey, c=grey)
    parts = (root / "vast.npz").read_bytes().split(b"PK\1\2")          # the zip's directory says 4 GiB of each
    parts[1:] = [part[:20] + struct.pack("<I", 2 ** 32 - 2) + part[24:] for part in parts[1:]]
    (root / "vast.npz").write_bytes(b"PK\1\2".join(parts))
    config = fsdm.Config(**SMALL)
    good = dict(config=dataclasses.asdict(config), ema=fsdm.FSDM(config).state_dict(), model={})
    torch.save(good, root / "good.pt")
    torch.save(dict(good, config=dict(good["config"], hidden_size=2 ** 40)), root / "huge.pt")
    torch.save(dict(good, ema=dict(list(good["ema"].items())[1:])), root / "other.pt")
    thin = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in good["ema"].items()}
    torch.save(dict(good, ema=thin), root / "thin.pt")
    torch.save(dict(good, ema={name: tensor * np.nan for name, tensor in good["ema"].items()}), root / "nan.pt")
    flipped = bytearray((root / "good.pt").read_bytes())
    flipped[len(flipped) // 2] ^= 1                         # one bit, in the middle of the weights
    (root / "flipped.pt").write_bytes(flipped)
    torch.save([1, 2, 3], root / "list.pt")
    with open(root / "hostile.pt", "wb") as file:
        pickle.dump(Hostile(), file)
    torch.save(fid.Inception(64).state_dict(), root / "weights.pth")


def call(command):
    """Runs a program as `python command` would, without a new interpreter -> exit code, stderr."""
    argv, err = shlex.split(command), io.StringIO()
    before = sys.argv
    try:
        sys.argv = argv
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
            runpy.run_path(str(HERE / argv[0]), run_name="__main__")
        return 0, err.getvalue()
    except SystemExit as error:
        return error.code, err.getvalue()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    make_files(root)
    return root


@pytest.mark.parametrize("command, word", ROWS, ids=[f"{row[0].split()[0]}-{i}" for i, row in enumerate(ROWS)])
def test_bad_input_is_one_sentence_with_code_2_and_nothing_is_written(files, monkeypatch, command, word):
    monkeypatch.chdir(files)
    before = {path: path.is_file() and path.stat().st_mtime_ns for path in files.rglob("*")}
    code, said = call(command)
    last = said.rstrip().splitlines()[-1]
    assert code == 2 and word in last and last.startswith(command.split()[0]) and "Traceback" not in said, said
    assert {path: path.is_file() and path.stat().st_mtime_ns for path in files.rglob("*")} == before


def test_ctrl_c_before_the_first_step_is_one_sentence(tmp_path):
    code = ("import fsdm, runpy, sys\ndef load_data(*_): raise KeyboardInterrupt\n"
            "fsdm.load_data = load_data\nrunpy.run_path('train.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code, "--out_dir", str(tmp_path / "out")], capture_output=True, text=True,
                          cwd=HERE)
    assert done.returncode == 130 and done.stderr.splitlines()[-1] == "train.py: stopped" and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [f"{SAMPLE} --support a.png", f"{FID} folder folder"])
def test_ctrl_c_ends_sampling_and_scoring_without_a_traceback(files, monkeypatch, command):
    def interrupt(*_, **options):
        raise KeyboardInterrupt
    monkeypatch.chdir(files)
    monkeypatch.setattr(fsdm, "load_model", interrupt)
    monkeypatch.setattr(torch, "load", interrupt)
    assert call(command) == (130, "sample.py: stopped\n" if command.startswith("sample.py") else "")


def test_names_that_the_terminal_cannot_show_end_no_measurement(files, tmp_path):
    for i in range(100):
        shutil.copy(files / "a.png", tmp_path / f"{i}.png")
    (tmp_path / "ü.png").write_text("no image")
    done = subprocess.run([sys.executable, "fid.py", "--dims", "64", "--weights", files / "weights.pth", "--device", "cpu",
                           tmp_path, tmp_path], capture_output=True, cwd=HERE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and rb"\xfc.png" in done.stdout, done.stderr


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        make_files(Path(root))
        os.chdir(root)
        for command, _ in ROWS:
            code, said = call(command)
            said = said.rstrip().splitlines()[-1].replace(root, "")
            print(f"| `{re.sub(re.escape(SHAPE), '', command)}` | {code} | {said} |")
