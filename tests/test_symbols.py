"""Claims about the .npz of symbols of three kinds, on small stand-ins for characters and emoji."""
import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
import fsdm
import symbols

LETTERS, EMOJI = 15, 40                     # characters in each of three alphabets, and emoji


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Paths of two .npz: squares of ink, the third alphabet for evaluation; blobs on white, a fifth for evaluation."""
    root, g = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    ink = np.zeros((3 * LETTERS, 8, 28, 28), np.uint8)
    for character in ink:
        for image in character:
            y, x = g.integers(2, 16, 2)
            image[y:y + 10, x:x + 10] = 255
    names = [f"Alphabet{a}__character{c:02d}" for a in range(3) for c in range(LETTERS)]
    np.savez(root / "omniglot.npz", images=ink.reshape(-1, 28, 28), labels=np.arange(len(names)).repeat(8),
             class_names=names, class_is_evaluation=np.arange(len(names)) >= 2 * LETTERS)

    designs = np.full((EMOJI, 5, 32, 32, 3), 255, np.uint8)
    designs[:, :, 4:28, 6:26] = g.integers(0, 200, (EMOJI, 5, 1, 1, 3))
    designs[:, :, 6:10, 8:20] = g.integers(0, 200, (EMOJI, 5, 1, 1, 3))
    np.savez(root / "emoji.npz", images=designs.reshape(-1, 32, 32, 3), labels=np.arange(EMOJI).repeat(5),
             class_names=[f"thing/{c}" for c in range(EMOJI)], class_is_evaluation=np.arange(EMOJI) % 5 == 0)
    return root / "omniglot.npz", root / "emoji.npz"


@pytest.fixture
def build(sources, tmp_path, monkeypatch):
    """(name, flags) -> the path of an .npz with few glyphs."""
    monkeypatch.setattr(symbols, "read_glyphs", functools.partial(symbols.read_glyphs, train=12, held_out=4))

    def build(name="symbols.npz", *flags):
        omniglot, emoji = map(str, sources)
        symbols.main(["--omniglot", omniglot, "--emoji", emoji, "--out", str(tmp_path / name), *flags])
        return str(tmp_path / name)
    return build


def symbol_of(name):
    return name.rsplit("/", 1)[0]


@pytest.mark.parametrize("shares", [("0.5", "0.15", "0.35"), ("0.3", "0.2", "0.5"), ("1", "0", "0")])
@pytest.mark.parametrize("recolour", ["1", "2", "3"])
def test_no_symbol_is_in_two_parts(build, recolour, shares):
    path = build("symbols.npz", "--recolour", recolour, "--shares", *shares)
    data = fsdm.load_data(path, None, 32, 3)
    parts = {part: {symbol_of(name) for name in split.names} for part, split in data.items()}
    assert not parts["train"] & parts["val"] and not parts["test"] & (parts["train"] | parts["val"])
    held_out = {f"omniglot/Alphabet2__character{c:02d}" for c in range(LETTERS)}
    held_out |= {f"emoji/thing/{c}" for c in range(0, EMOJI, 5)} | {f"glyph/glyph{c:04d}" for c in range(12, 16)}
    assert parts["test"] == held_out
    fsdm.check_data(data, 6)                                        # at least six images of every class


def test_the_cut_between_training_and_validation_does_fall_inside_a_symbol_unless_it_is_moved():
    symbol = functools.partial(symbols.Symbol, source=None, evaluation=False)
    cuts = []
    for count in range(10, 40):
        listed = [symbol(f"symbol{c}", copy) for c in range(count) for copy in range(3)]
        ordered = symbols.in_order(listed)
        names = [s.name for s in ordered]
        train, val = np.split(names, np.flatnonzero(fsdm.split_background(np.zeros(len(names))) == "val")[:1])
        assert not set(train) & set(val)
        assert len(listed) - len(ordered) < 3
        cuts.append(len(listed) - len(ordered))
    assert any(cuts)


def test_the_same_command_gives_the_same_bytes(build):
    first, second, other = build("a.npz"), build("b.npz"), build("c.npz", "--recolour", "3")
    assert Path(first).read_bytes() == Path(second).read_bytes() != Path(other).read_bytes()


def test_shares_are_those_of_the_classes_to_train_on(build):
    with np.load(build("symbols.npz", "--recolour", "4", "--shares", "4", "2", "4")) as file:
        names, evaluation = file["class_names"], file["class_is_evaluation"]
        assert file["images"].shape[1:] == (32, 32, 3) and file["images"].dtype == np.uint8
        assert file["labels"].dtype == np.int64
        assert len(set(names)) == len(names)
    kinds = [name.split("/")[0] for name in names[~evaluation]]
    assert np.allclose([kinds.count(kind) for kind in ("omniglot", "glyph", "emoji")], (120, 60, 120), atol=3)
    assert {name.split("/")[0] for name in names[~evaluation][-30:]} == {"omniglot", "glyph", "emoji"}


def test_ink_and_paper_can_be_told_apart_and_a_third_is_plain():
    luminance, plain = (0.30, 0.59, 0.11), []
    signs = []
    for seed in range(3000):
        ink, paper = symbols.two_colours(np.random.default_rng(seed))
        assert abs((ink - paper) @ luminance) >= 0.4
        plain.append(np.ptp(ink) == np.ptp(paper) == 0)
        signs.append((ink - paper) @ luminance > 0)
    assert abs(np.mean(plain) - 1 / 3) < 0.04 and abs(np.mean(signs) - 0.5) < 0.04


def test_a_character_is_drawn_in_its_colours_and_again_in_others(build):
    data = fsdm.load_data(build(), None, 32, 3, parts=["train", "val"])
    colours = {}
    for split in data.values():
        for c, name in enumerate(split.names):
            if name.startswith("omniglot"):
                images = split.images[split.offsets[c]:split.offsets[c + 1]].float()
                light = (images * torch.tensor([0.30, 0.59, 0.11])[:, None, None]).sum(1)
                assert (light.amax((1, 2)) - light.amin((1, 2))).min() > 255 * 0.3
                corner = images[:, :, 0, 0]
                assert (corner.amax(0) - corner.amin(0)).max() <= 1       # one paper
                colours[name] = corner.mean(0)
    pairs = [(name, name[:-1] + "1") for name in colours if name.endswith("/0") and name[:-1] + "1" in colours]
    assert len(pairs) > 20
    assert np.mean([(colours[a] - colours[b]).abs().max() > 10 for a, b in pairs]) > 0.7


def test_versions_of_an_emoji_differ_from_it_and_are_not_cut_off(sources):
    train, _ = symbols.read_classes(sources[1], "emoji")
    name, designs = next(iter(train.items()))
    draw = functools.partial(symbols.draw_emoji, count=15)
    held_out, first, again = (draw(symbols.Symbol(name, copy, designs, evaluation))
                              for copy, evaluation in ((0, True), (0, False), (1, False)))
    assert (held_out[:5] == designs).all() and (first[:3] == designs[:3]).all()
    versions = [*held_out[5:], *first[3:], *again]
    for version in versions:
        assert (np.abs(version.astype(int) - designs).mean((1, 2, 3)) > 2).all()
        border = np.concatenate([version[0], version[-1], version[:, 0], version[:, -1]])
        assert border.min() > 100 and (border < 250).mean() < 0.1
    assert len({version.tobytes() for version in [*first, *again]}) == 30


def test_the_finishes_of_one_drawing_do_not_lie_on_each_other():
    drawing = np.full((32, 32, 3), 255, np.uint8)
    drawing[6:26, 8:24] = 90
    designs = np.stack([255 - drawing, np.full_like(drawing, 120), drawing, drawing, drawing])
    images = symbols.draw_emoji(symbols.Symbol("emoji/x", 0, designs, False), 15).astype(int)
    of_drawing = [i for i in range(15) if i % 5 >= 2]
    assert min(np.abs(images[i] - images[j]).mean() for i in of_drawing for j in of_drawing if i < j) > 2


def test_glyphs_are_those_of_fsdm_and_new_ones_when_more_are_asked_for():
    few, held_out = symbols.read_glyphs(5, train=4, held_out=2)
    images = fsdm.glyphs(None, 32, False, (7, 0, 0))[0].reshape(7, 20, 32, 32, 3)
    assert list(few) == ["glyph/glyph0000", "glyph/glyph0001", "glyph/glyph0002", "glyph/glyph0003", "glyph/glyph0006"]
    assert list(held_out) == ["glyph/glyph0004", "glyph/glyph0005"]
    assert (few["glyph/glyph0006"] == images[6]).all() and (held_out["glyph/glyph0005"] == images[5]).all()


def test_a_preview_is_written_and_nonsense_is_refused(build, tmp_path, capsys):
    build("symbols.npz", "--preview", str(tmp_path / "preview.png"))
    assert (tmp_path / "preview.png").stat().st_size > 10_000
    for flags in (["--recolour", "0"], ["--shares", "0", "0.5", "0.5"], ["--shares", "1", "-1", "1"]):
        with pytest.raises(SystemExit):
            build("bad.npz", *flags)
        assert "above 0" in capsys.readouterr().err
