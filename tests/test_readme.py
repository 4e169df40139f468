"""Every command in README is one that the programs understand."""
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))
import fid
import fsdm
import sample
import train

def rooms(path):
    """A script -> its text down to the first bar, and its rooms by name, which ends at the first colon or point."""
    head, *parts = re.split(r"^# ---- ", path.read_text(), flags=re.M)
    return head, {re.match(r"[^:.,]+", part).group(): "# " + part for part in parts}


TEXT = (HERE / "README.md").read_text()
COMMANDS = [line.strip() for block in re.findall(r"^```\w*\n(.*?)^```", TEXT, re.M | re.S)
            for line in block.replace("\\\n", " ").splitlines() if re.search(r"\b(train|sample|fid)\.py\b", line)]


@pytest.mark.parametrize("block", re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S))
def test_a_part_can_be_lifted_out_as_the_readme_says(block):
    file, names = re.match(r"# (\w+\.py): (.+)", block).groups()
    head, found = rooms(HERE / file)
    scope = {"__name__": "lifted"}
    exec(head + "".join(found[name] for name in names.split(", ")), scope)
    exec(block, scope)
    for result in ("out", "vector", "x", "sets"):
        assert result not in scope or scope[result].isfinite().all()
    if "training" in scope:
        assert scope["training"].history[-1][0] < scope["training"].history[0][0]


def test_there_are_commands_to_check():
    assert {name for command in COMMANDS for name in re.findall(r"(\w+)\.py", command)} >= {"train", "sample", "fid"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_parses(command):
    for part in re.split(r"&&|\|", command.split("#")[0]):
        words = shlex.split(part)
        for program in (train, sample, fid):
            name = f"{program.__name__}.py"
            if name in words:
                program.parse_args(words[words.index(name) + 1:])


def test_every_file_that_the_readme_shows_is_here():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)|\]\((?!http)([^)#]+)\)", TEXT):
        assert (HERE / (path[0] or path[1])).exists(), path


def test_the_parameters_in_the_readme_are_those_of_the_presets():
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", TEXT, re.M))
    assert rows.keys() == fsdm.PRESETS.keys()
    for name, preset in fsdm.PRESETS.items():
        with torch.device("meta"):
            model = fsdm.FSDM(fsdm.Config(**preset))
        assert f"{sum(p.numel() for p in model.parameters()):,}" == rows[name]
