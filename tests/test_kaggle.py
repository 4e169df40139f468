"""Claims about assets/kaggle.ipynb: its cells run in a folder laid out as Kaggle's."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import fsdm

HERE = Path(__file__).parent.parent
FILES = ("fsdm.py", "train.py", "sample.py", "fid.py")
# what a CPU does in seconds
SMALL = {"--nproc_per_node=gpu": "--nproc_per_node=1", "--max_hours {HOURS}": "--max_steps {STEPS}",
         "--preset t4": """--preset demo --image_size 8 --patch_size 4 --encoder_patch_size 4 --hidden_size 32 --hdim 32
             --depth 1 --num_heads 2 --encoder_depth 1 --sample_size 4 --batch_size 2 --num_eval_batches 1 --no_compile
             --save_interval 2 --precision fp32 --device cpu""".replace("\n", " "),
         "--num 2000": "--num 4 --k 1 --fid_dims 64 --fid_weights none.pth", "--sets 8": "--sets 2 --num 1"}


def run(notebook, cwd, shown, **names):
    """Runs the cells as Jupyter would, and puts the pictures that they display on the list `shown` -> what it printed."""
    ipython = ModuleType("IPython.display")
    ipython.Image, ipython.display = str, shown.append
    sys.modules["IPython.display"], said = ipython, ""
    for cell in json.loads(notebook)["cells"]:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"]).replace("\\\n", " ")
        for old, new in SMALL.items():
            source = source.replace(old, new)
        for line in re.split(r"^(!.*)$", source, flags=re.M):
            if line.startswith("!"):
                done = subprocess.run(line[1:].format(**names), shell=True, cwd=cwd, capture_output=True, text=True,
                                      env=os.environ | dict(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"))
                said += done.stdout + done.stderr
            else:
                here = os.getcwd()
                os.chdir(cwd)
                exec(line, names)
                os.chdir(here)
    return said


def test_the_notebook_finds_the_code_trains_goes_on_shows_and_scores(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython.display", raising=False)
    inputs, first, second = (tmp_path / name for name in ("kaggle/input", "first", "second"))
    code = inputs / "datasets" / "someone" / "code"
    for folder in (code, first, second):
        folder.mkdir(parents=True)
    for name in FILES:
        (code / name).write_bytes((HERE / name).read_bytes())
    images, labels, names, _ = fsdm.glyphs(None, 8, False, classes=(10, 0, 0), per_class=8)
    np.savez(inputs / "mine.npz", images=images, labels=labels, class_names=names)
    notebook = (HERE / "assets" / "kaggle.ipynb").read_text().replace("/kaggle", str(tmp_path / "kaggle"))
    notebook = notebook.replace('\\"glyphs\\"', f'\\"{inputs / "mine.npz"}\\"')

    shown = []
    said = run(notebook, first, shown, STEPS=2)
    assert "stopped at step 2" in said and "none.pth" in said and "Traceback" not in said, said
    assert shown == ["run/samples_0000002.png", "made/grid.png"] and all((first / name).exists() for name in shown)

    saved = inputs / "notebooks" / "someone" / "first"                      # this version's output, as an input
    saved.parent.mkdir(parents=True)
    first.rename(saved)
    code.rename(inputs / "code")                                            # Kaggle has two ways to mount a data set
    said = run(notebook.replace("LAST = True", "LAST = False"), second, shown, STEPS=4)
    assert "going on from" in said and "at step 2" in said and "stopped at step 4" in said, said
    records = map(json.loads, (second / "run" / "log.jsonl").read_text().splitlines())
    assert [record["args"]["cooldown"] for record in records if "args" in record] == [0.4, 0.0]
