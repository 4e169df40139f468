"""Claims about the sampling program and the few-shot evaluation."""
import dataclasses
import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFilter

sys.path.insert(0, str(Path(__file__).parent.parent))
import fid
import fsdm
import release
import sample
import train
from test_fsdm import opened

HERE = Path(__file__).parent.parent
CONFIG = fsdm.Config(image_size=8, patch_size=4, encoder_patch_size=4, sample_size=4, hidden_size=24, hdim=24, depth=2,
                     num_heads=3, encoder_depth=1, encoder="image", mode_conditioning="lag", context_dropout=0.1)


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory):
    torch.manual_seed(0)
    model = opened(fsdm.FSDM(CONFIG))
    path = tmp_path_factory.mktemp("ckpt") / "ckpt.pt"
    ema = model.state_dict()
    raw = {name: 1.1 * p for name, p in ema.items()}
    state = dict(step=7, dataset="squares", config=dataclasses.asdict(CONFIG), model=raw, ema=ema)
    torch.save(state, path)
    return str(path)


@pytest.fixture
def few_glyphs(monkeypatch):
    monkeypatch.setitem(fsdm.DATASETS, "glyphs", functools.partial(fsdm.glyphs, classes=(20, 3, 12)))


def pictures(root):
    """Five files of one thing, of different sizes and modes."""
    root.mkdir(exist_ok=True)
    red = Image.new("RGB", (40, 30), (200, 30, 30))
    red.save(root / "a.png")
    red.resize((64, 64)).save(root / "b ü.JPG")
    red.convert("L").save(root / "grey.png")
    red.convert("RGBA").save(root / "alpha.png")
    exif = red.getexif()
    exif[0x0112] = 6
    red.save(root / "turned.jpg", exif=exif)
    return [str(root / name) for name in ("a.png", "b ü.JPG", "grey.png", "alpha.png", "turned.jpg")]


def test_support_files_of_any_kind_become_images(ckpt, tmp_path):
    sample.main(["--ckpt", ckpt, "--support", *pictures(tmp_path / "in"), "--num", "3", "--steps", "3",
                 "--out_dir", str(tmp_path / "out"), "--guidance", "1.5"])
    saved = np.load(tmp_path / "out" / "samples.npz", allow_pickle=False)["arr_0"]
    assert saved.shape == (3, 8, 8, 3) and saved.dtype == np.uint8
    for i in range(3):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "images" / f"{i:05d}.png")), saved[i])
    assert Image.open(tmp_path / "out" / "grid.png").size == ((5 + 3) * 18 + 8, 18)


def files(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_released_checkpoint_is_smaller_draws_the_same_and_says_what_it_knows(ckpt, tmp_path, capsys):
    released = str(tmp_path / "small.pt")
    release.main(ckpt, released, "draws squares")
    assert Path(released).stat().st_size < 0.5 * Path(ckpt).stat().st_size
    for path in (ckpt, released):
        sample.main(["--ckpt", path, "--support", str(Path(__file__).parent.parent / "assets" / "demo.png"), "--num", "2",
                     "--steps", "2", "--device", "cpu", "--precision", "fp32", "--out_dir", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "small.pt: draws squares, " in said and "ckpt.pt: trained on squares, 7 steps" in said
    first, second = (np.load(tmp_path / out / "samples.npz")["arr_0"].astype(int) for out in ("out", "out_1"))
    assert np.abs(first - second).mean() < 1 < first.std()


def test_without_arguments_the_model_draws_the_drawings_that_come_along(ckpt, tmp_path, monkeypatch, capsys):
    """Both in assets/; what is given takes their place, and --ckpt also the crop's."""
    assets = tmp_path / "assets"
    shutil.copytree(HERE / "assets" / "drawings", assets / "drawings")
    shutil.copy(ckpt, assets / "symbols.pt")
    monkeypatch.setattr(sample, "ASSETS", assets)
    monkeypatch.chdir(tmp_path)
    (assets / "drawings" / ".DS_Store").touch()                             # as a Mac leaves it
    sample.main([])
    (assets / "drawings" / ".DS_Store").unlink()
    said, saved = capsys.readouterr().out, np.load("samples/samples.npz")
    names = sorted(folder.name for folder in (assets / "drawings").iterdir())
    assert saved["labels"].tolist() == [name for name in names for _ in range(8)]
    assert "symbols.pt: trained on squares" in said and "cut to what is drawn" in said

    drawing = str(assets / "drawings" / names[0] / "1.png")
    defaults = sample.parse_args([])
    mine, whole = (sample.parse_args(["--support", drawing, *more]) for more in ([], ["--crop", "false"]))
    assert (mine.ckpt, mine.support, mine.crop, whole.crop) == (defaults.ckpt, [drawing], True, False)
    assert sample.parse_args(["--dataset", "glyphs"]).support is None
    assert sample.parse_args(["--ckpt", "my.pt", "--support", drawing]).crop is False


def test_the_model_that_comes_along_is_what_its_command_makes(tmp_path, monkeypatch):
    """It has the Config of the command in RESULTS.md and draws the picture there, but for another machine's rounding."""
    assets = HERE / "assets"
    command = re.search(r"train\.py (--dataset symbols\.npz.*)", (assets / "RESULTS.md").read_text()).group(1)
    _, config = train.parse_args(shlex.split(command))
    assert fsdm.load_model(assets / "symbols.pt").config == config
    assert (assets / "symbols.pt").stat().st_size < 14e6

    monkeypatch.chdir(tmp_path)
    first, *_ = sample.parse_args([]).support
    sample.main(["--support", first, "--precision", "fp32", "--device", "cpu"])
    made, shown = (np.array(Image.open(path), int) for path in ("samples/grid.png", assets / "drawings.png"))
    assert np.abs(made - shown[:len(made)]).mean() < 0.5 < shown[:len(made)].std()


def test_nothing_that_is_there_is_written_over_or_deleted(ckpt, tmp_path):
    """The output of an earlier run; and a folder named as FFHQ names its images, one of which is the support."""
    ds = tmp_path / "ds"
    (ds / "images").mkdir(parents=True)
    for i in range(10):
        Image.linear_gradient("L").resize((9, 9)).rotate(10 * i).save(ds / "images" / f"{i:05d}.png")
    (ds / "samples.npz").write_text("mine")
    before = files(ds)
    for seed in range(3):
        sample.main(["--ckpt", ckpt, "--support", str(ds / "images" / "00003.png"), "--num", "4", "--steps", "2",
                     "--seed", str(seed // 2), "--device", "cpu", "--precision", "fp32", "--out_dir", str(ds)])
        if seed == 0:
            made = files(tmp_path / "ds_1")
    assert files(ds) == before and sorted(path.name for path in tmp_path.iterdir()) == ["ds", "ds_1", "ds_2", "ds_3"]
    first, again, other = (files(tmp_path / f"ds_{i}") for i in (1, 2, 3))
    assert first == made and len(first) == 6
    assert all(again[path] == first[path] != other[path] for path in first if path.suffix == ".png")


def test_every_folder_of_the_support_is_a_set_and_loose_files_are_one_more(ckpt, tmp_path, capsys):
    for name, count in dict(red=3, green=2).items():
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (9, 9), name).save(tmp_path / name / f"{i}.png")
    (tmp_path / "red" / ".DS_Store").write_text("hidden")
    loose = [str(tmp_path / "green" / f"{i}.png") for i in range(2)]
    sample.main(["--ckpt", ckpt, "--support", str(tmp_path / "red"), *loose, str(tmp_path / "green"), "--num", "2",
                 "--steps", "2", "--out_dir", str(tmp_path / "out")])
    saved = np.load(tmp_path / "out" / "samples.npz")
    assert saved["labels"].tolist() == ["red"] * 2 + ["green"] * 2 + ["support"] * 2
    assert "each set uses its first 2 images" in capsys.readouterr().out
    grid = np.asarray(Image.open(tmp_path / "out" / "grid.png"))
    assert grid.shape[0] == 3 * 18 and grid[9, 9].tolist() == [255, 0, 0] and grid[27, 9].tolist() == [0, 128, 0]


@pytest.mark.parametrize("ink, paper", (("black", "white"), ("white", "black"), ("red", "silver")))
def test_a_drawing_is_cropped_to_what_is_drawn_wherever_it_lies_and_keeps_its_margin(ink, paper):
    image = Image.new("RGB", (200, 100), paper)
    image.paste(ink, (150, 10, 181, 21))                    # 31 x 11 at the edge
    cropped = sample.crop_to_drawing(image)
    assert cropped.size == (34, 34)
    drawn = (np.asarray(cropped) == np.asarray(Image.new("RGB", (34, 34), ink))).all(2)
    assert drawn[12:23, 2:33].all() and drawn.sum() == 31 * 11
    assert sample.crop_to_drawing(Image.new("L", (30, 30))).mode == "L"     # nothing drawn


@pytest.mark.parametrize("ink, paper", (("black", "white"), ("orange", "navy")))
def test_a_thin_pen_is_made_thick_and_a_thick_one_stays(ink, paper):
    def share_of_ink(width):
        image = Image.new("RGB", (300, 300), paper)
        ImageDraw.Draw(image).rectangle((60, 60, 240, 240), outline=ink, width=width)
        pixels = np.asarray(sample.crop_to_drawing(image))
        assert {tuple(p) for p in pixels.reshape(-1, 3)} == {ImageColor.getrgb(ink), ImageColor.getrgb(paper)}
        return (pixels == ImageColor.getrgb(ink)).all(2).mean()

    outlines = {width: 4 * width * (181 - width) / 201 ** 2 for width in (5, 30)}        # as drawn
    assert abs(share_of_ink(2) - 4 * 12.6 * 181 / 201 ** 2) < 0.04          # 0.07 of 180 pixels wide
    assert abs(share_of_ink(5) - share_of_ink(2)) < 0.04 and share_of_ink(5) > 2 * outlines[5]
    assert share_of_ink(30) == pytest.approx(outlines[30])


def circle(side, at, width, blur=0):
    image = Image.new("L", (side, side), 255)
    ImageDraw.Draw(image).ellipse((*at, at[0] + 180, at[1] + 180), outline=0, width=width)
    return image.filter(ImageFilter.GaussianBlur(blur))


def test_a_thickened_pen_has_the_ink_of_the_middle_of_the_stroke_and_never_touches_the_edge():
    soft = circle(300, (60, 60), 4, blur=2)                                 # the middle is 85, the edges half of that
    cropped = np.asarray(sample.crop_to_drawing(soft), int)
    assert np.asarray(soft).min() > 60 and (cropped < np.asarray(soft).min() + 10).mean() > 0.15
    for at in ((60, 60), (4, 4), (60, 115)):
        cropped = np.asarray(sample.crop_to_drawing(circle(300, at, 2)))
        assert (np.concatenate([cropped[[0, -1]], cropped[:, [0, -1]].T]) == 255).all()


def test_a_thin_pen_is_made_thick_beside_a_filled_shape_that_stays():
    image = circle(300, (60, 60), 2)
    ImageDraw.Draw(image).rectangle((110, 110, 190, 190), 0)
    cropped = np.asarray(sample.crop_to_drawing(image)) == 0                # begins at 50, 50
    assert (cropped[60:140, 60:140]).all() and not cropped[40:60, 60:140].any()
    assert 11 <= cropped[100, :50].sum() <= 14


def test_the_square_around_a_long_strip_is_small():
    strip = Image.new("RGB", (60_000, 1))
    strip.paste("white", (0, 0, 30_000, 1))
    assert max(sample.crop_to_drawing(strip).size) < 4096


def test_uneven_light_is_no_drawing():
    light = np.linspace(110, 210, 200)[:, None] * np.ones(160)              # the shadow is as dark as ink in the light
    light[120:151, 60:71] -= 60
    cropped = sample.crop_to_drawing(Image.fromarray(light.astype(np.uint8)))
    assert cropped.size == (34, 34)
    assert np.asarray(cropped)[2:33, 12:23].max() < np.asarray(cropped)[:, :10].min()


def test_sets_of_a_data_set_carry_their_labels(ckpt, tmp_path, few_glyphs):
    out = tmp_path / "out"
    sample.main(["--ckpt", ckpt, "--dataset", "glyphs", "--split", "test", "--sets", "3", "--num", "2", "--steps", "2",
                 "--sampler", "ddim", "--eta", "0.5", "--out_dir", str(out)])
    saved = np.load(out / "samples.npz", allow_pickle=False)
    assert saved["arr_0"].shape == (6, 8, 8, 3) and len(saved["labels"]) == 6
    assert saved["labels"][0] == saved["labels"][1] != saved["labels"][2]
    assert len(list((out / "images").iterdir())) == 6


def test_every_flag_of_an_image_matters_but_the_batch_size(ckpt, tmp_path, few_glyphs):
    def made(flags):
        out = tmp_path / f"out {flags}"
        sample.main(["--ckpt", ckpt, "--dataset", "glyphs", "--sets", "2", "--num", "3", "--steps", "4",
                     "--device", "cpu", "--precision", "fp32", *flags.split(), "--out_dir", str(out)])
        return np.load(out / "samples.npz")

    found = {flags: made(flags) for flags in (
        "", "--steps 5", "--sampler ddim", "--sampler ddim --eta 0.5", "--sampler ddpm", "--guidance 1.5", "--k 2",
        "--weights raw", "--seed 1", "--split train")}
    assert len({saved["arr_0"].tobytes() for saved in found.values()}) == len(found)
    assert {flags for flags in found if not np.array_equal(found[flags]["labels"], found[""]["labels"])} == {
        "--seed 1", "--split train"}
    alone = made("--batch_size 1")
    assert np.abs(alone["arr_0"].astype(int) - found[""]["arr_0"]).max() <= 1
    assert np.array_equal(alone["labels"], found[""]["labels"])


def test_the_grid_shows_the_support_left_of_the_bar():
    support = torch.full((2, 3, 1, 4, 4), 50, dtype=torch.uint8)
    samples = torch.full((2, 5, 1, 4, 4), 200, dtype=torch.uint8)
    picture = np.asarray(sample.grid(support, samples, scale=1, gap=4))
    left, bar, right = picture[:, :18], picture[:, 18:22], picture[:, 22:]
    assert picture.shape == (12, 52, 3) and (bar == (220, 50, 50)).all()
    assert set(np.unique(left)) == {50, 255} and set(np.unique(right)) == {200, 255}


def test_the_questions_are_fair():
    """No reference or other image is a support image; the same seed asks the same; each class answers in turn."""
    labels = np.repeat(np.arange(7), 20)
    split = fsdm.read_split(np.zeros((140, 8, 8), np.uint8), labels, list("abcdefg"), range(7), 8, 1)
    questions = sample.draw_questions(split, 5, 35, seed=3)
    support, reference, other = (set(q.flatten().tolist()) for q in questions)
    assert len(support) == len(reference) == len(other) == 35
    assert not support & reference and not support & other and not reference & other
    for rows in questions:
        assert all(len(set(labels[row])) == 1 for row in rows)
    assert sorted(labels[questions[0][:, 0]]) == list(range(7))             # 35 / 5 sets, every class once
    assert all(torch.equal(a, b) for a, b in zip(questions, sample.draw_questions(split, 5, 35, seed=3)))
    assert not torch.equal(questions[0], sample.draw_questions(split, 5, 35, seed=4)[0])
    support, reference, other = (set(q.flatten().tolist())
                                 for q in sample.draw_questions(split, 5, 35, seed=3, shared_pool=True))
    assert support & reference and not reference & other                    # only support and references share a pool
    assert len(sample.draw_questions(split, 2, 1000, seed=0)[0]) == 14      # as many as 20 images a class allow
    with pytest.raises(ValueError, match="for every 24"):
        sample.draw_questions(split, 6, 12, seed=0)


def random_inception(path):
    """A weights file of the right shape whose features differ from image to image."""
    torch.manual_seed(0)
    torch.save(fid.Inception(64).state_dict(), path)
    return str(path)


def test_the_unconditional_baseline_answers_the_same_questions(tmp_path, few_glyphs):
    config = dataclasses.replace(CONFIG, encoder="none", context_dropout=0.0)
    model = fsdm.FSDM(config)
    torch.save(dict(config=dataclasses.asdict(config), ema=model.state_dict()), tmp_path / "ckpt.pt")
    weights = random_inception(tmp_path / "w.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scores.json").write_text("mine")
    sample.main(["--ckpt", str(tmp_path / "ckpt.pt"), "--dataset", "glyphs", "--evaluate", "--num", "12", "--k", "3",
                 "--steps", "2", "--fid_weights", weights, "--fid_dims", "64", "--out_dir", str(tmp_path / "out")])
    assert json.load(open(tmp_path / "out_1" / "scores.json"))["test"]["generated"]["kid"] > 0
    assert (tmp_path / "out" / "scores.json").read_text() == "mine"


def test_the_right_class_is_counted_among_twenty_at_a_time():
    torch.manual_seed(0)
    centres = 10 * torch.randn(45, 16)
    classes = torch.arange(45).repeat(2)                                    # two sets of each class, 3 images a set
    near = (centres[classes].repeat_interleave(3, 0) + torch.randn(270, 16)).numpy()
    assert sample.right_class(near, near, classes) == 1
    assert 0.03 < sample.right_class(near[torch.randperm(270)], near, classes) < 0.08


def test_the_evaluation_tells_the_ends_of_the_scale_apart(ckpt, tmp_path, capsys, few_glyphs):
    weights = random_inception(tmp_path / "w.pth")
    sample.main(["--ckpt", ckpt, "--dataset", "glyphs", "--evaluate", "--num", "24", "--k", "3", "--steps", "2",
                 "--fid_weights", weights, "--fid_dims", "64", "--out_dir", str(tmp_path / "out")])
    report = json.load(open(tmp_path / "out" / "scores.json"))
    for split in ("train", "test"):
        rows = report[split]
        assert rows["recipe"]["images"] == 24 and rows["support returned"]["nearest_support"] < 1e-3
        assert rows["other real images"]["nearest_support"] > 0 and rows["generated"]["nearest_support"] > 0
        assert rows["other real images"]["kid"] < rows["generated"]["kid"]  # this model was never trained
    recipe = report["test"]["recipe"]
    assert recipe["seed"] == 0 and recipe["k"] == 3 and recipe["steps"] == "2" and recipe["guidance"] == "3.0"
    assert recipe["protocol"] == "references disjoint from the supports" and report["recipe"]["model"]["depth"] == 2
    assert "\ntest classes, K = 3, " in capsys.readouterr().out


def test_training_classes_too_small_to_score_lose_no_scores(ckpt, tmp_path, capsys):
    for part, images in dict(train=11, val=1, test=12).items():             # K = 3 needs 12
        for name in range(2):
            folder = tmp_path / "data" / part / f"{part}{name}"
            folder.mkdir(parents=True)
            for i in range(images):
                Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i}.png")
    weights = random_inception(tmp_path / "w.pth")
    sample.main(["--ckpt", ckpt, "--dataset", str(tmp_path / "data"), "--evaluate", "--num", "6", "--k", "3", "--steps",
                 "2", "--fid_weights", weights, "--fid_dims", "64", "--out_dir", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "\ntraining classes of this data set: " in said and "holds the scores" in said
    assert json.load(open(tmp_path / "out" / "scores.json")).keys() == {"test", "recipe"}


@pytest.mark.parametrize("command", (["sample.py", "--ckpt", "nothing.pt", "--support", "a.png"],
                                     ["train.py", "--dataset", "nothing", "--device", "cpu"]))
def test_the_programs_end_with_one_sentence_and_code_2(command, tmp_path):
    done = subprocess.run([sys.executable, HERE / command[0], *command[1:]], cwd=tmp_path, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 2 and "nothing" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
