"""Claims about the pictures of assets/drawings and the script that draws them."""
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import drawings

COMMITTED = Path(__file__).parent.parent / "assets" / "drawings"


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("drawings")
    drawings.main(["--out_dir", str(out)])
    return out


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))


def test_the_script_draws_the_committed_files(drawn):
    assert files(drawn) == files(COMMITTED)
    for name in files(drawn):
        here, there = (np.array(Image.open(root / name).convert("RGB"), float) for root in (drawn, COMMITTED))
        assert here.shape == there.shape
        assert np.abs(here - there).mean() < 2          # another Pillow may draw a line's edge a little otherwise


def test_five_small_files_of_every_thing():
    assert len(drawings.THINGS) >= 6
    assert files(COMMITTED) == sorted(f"{name}/{i}.png" for name in drawings.THINGS for i in range(1, 6))
    for name in files(COMMITTED):
        assert (COMMITTED / name).stat().st_size < 6000
        assert all(96 <= side <= 200 for side in Image.open(COMMITTED / name).size)


def test_no_stroke_is_cut_off_by_the_square_in_the_middle():
    for name, (_, _, _, _, photographed) in drawings.PENS.items():
        for path in sorted((COMMITTED / name).iterdir()):
            picture = np.array(Image.open(path).convert("L"), float)
            (H, W), side = picture.shape, min(picture.shape)
            top, left = (H - side) // 2, (W - side) // 2
            square = picture[top:top + side, left:left + side]
            border = np.concatenate([square[0], square[-1], square[:, 0], square[:, -1]])
            # uneven light changes slowly from pixel to pixel, and a stroke at once
            steps = np.abs(np.diff(border.reshape(4, -1)))
            assert steps.max() < (15 if photographed else 1), path


def test_the_five_drawings_of_a_thing_differ():
    for name in drawings.THINGS:
        small = [np.array(Image.open(path).convert("L").resize((32, 32)), float)
                 for path in sorted((COMMITTED / name).iterdir())]
        apart = [np.abs(a - b).mean() for i, a in enumerate(small) for b in small[:i]]
        assert min(apart) > 3, name


def test_one_pen_draws_all_things_as_often_as_asked(tmp_path):
    drawings.main(["--out_dir", str(tmp_path), "--pen", "anchor_umbrella", "--each", "2"])
    assert files(tmp_path) == sorted(f"{name}/{i}.png" for name in drawings.THINGS for i in (1, 2))
    assert all(Image.open(tmp_path / name).mode == "L" for name in files(tmp_path))
