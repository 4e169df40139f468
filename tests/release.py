"""Makes a small file to hand on of a checkpoint of train.py: its averaged weights in half precision, its Config, the
step, and a sentence that sample.py says first.

    python tests/release.py runs/symbols/ckpt.pt assets/symbols.pt "draws symbols, from drawings of one"
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import fsdm


def main(ckpt, out, about):
    fsdm.load_model(ckpt)                                                   # says what is wrong with it, if anything
    saved = fsdm.read_checkpoint(ckpt)
    weights = {name: tensor.half() for name, tensor in saved["ema"].items()}
    small = dict(ema=weights, config=saved["config"], step=saved["step"], about=about)
    fsdm.write_whole(out, lambda file: torch.save(small, file))
    parameters = sum(tensor.numel() for tensor in weights.values())
    print(f"{out}: {parameters:,} parameters of step {saved['step']:,}, {Path(out).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
