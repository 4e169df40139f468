"""How often a sample is the character that was shown, to a classifier that knows all 1,623 of Omniglot.

    python tests/likeness.py runs/a/ckpt.pt runs/b/ckpt.pt --dataset omniglot_28.npz --guidance 1 2

Trains the classifier first (five minutes on two cores with bf16, much longer without; kept in --classifier). Unseen
characters, the questions of sample.draw_questions, five samples of each. likeness: the share of samples that it takes
for their own character, among those that are asked for; distance: Frechet, between its features of samples and of real
images, comparable at one --k and --num only. It is quick, and blind to faint noise, which Inception sees: adopt nothing
before sample.py --evaluate has agreed (KID, precision, right_class).
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import fid
import fsdm
import sample


SAMPLES = 5                                 # of every set


def convolutions(channels, width):
    layers = []
    for inputs in (channels, width):
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2))


class Classifier(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(convolutions(1, 32), convolutions(32, 64), convolutions(64, 128),
                                  nn.AdaptiveAvgPool2d(3), nn.Flatten(),
                                  nn.Linear(1152, 256), nn.BatchNorm1d(256), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(256, classes))

    def forward(self, images):                                              # uint8 [B, 1, 28, 28]
        """-> features [B, 256], logits [B, classes]."""
        features = self.body(fsdm.to_signal(images))
        return features, self.head(features)


def jitter(images):
    """Turned, stretched and moved a little, uint8 as before."""
    theta = torch.eye(2, 3) + torch.randn(len(images), 2, 3) * torch.tensor([0.1, 0.1, 0.08])
    places = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images.float(), places, padding_mode="border", align_corners=False).byte()


def train(images, labels, dtype, epochs=14, batch=256):
    """dtype: to multiply in -> a Classifier, trained on nine tenths of the images; how many of the others it names is
    printed."""
    torch.manual_seed(0)
    model, held_out = Classifier(int(labels.max()) + 1), torch.rand(len(images)) < 0.1
    some, names = images[~held_out], labels[~held_out]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=epochs * (len(some) // batch))
    for _ in range(epochs):
        for index in torch.randperm(len(some)).split(batch)[:len(some) // batch]:
            with fsdm.autocast(images.device, dtype):
                logits = model(jitter(some[index]))[1].float()
            optimizer.zero_grad()
            F.cross_entropy(logits, names[index], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    right = judge(model.eval(), images[held_out])[1].argmax(1) == labels[held_out]
    print(f"the classifier names {right.float().mean():.1%} of the real images that it was not trained on")
    return model


@torch.no_grad()
def judge(model, images):
    """uint8 [N, 1, 28, 28] -> features, logits."""
    features, logits = zip(*(model(some) for some in images.split(500)))
    return torch.cat(features), torch.cat(logits)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("ckpts", nargs="+", help="checkpoints of train.py at 28 x 28, grey")
    p.add_argument("--dataset", required=True, help="omniglot_28.npz, whose last classes are the unseen ones")
    p.add_argument("--classifier", default="likeness.pth", help="where the trained classifier is kept")
    p.add_argument("--k", type=int, default=5, help="support images")
    p.add_argument("--num", type=int, default=600, help="samples")
    p.add_argument("--guidance", type=float, nargs="+", default=[1, 2])
    p.add_argument("--split", default="test", choices=("test", "train"), help="classes never trained on, or the others")
    args = p.parse_args(argv)

    dtype, _ = fsdm.choose_precision(torch.device("cpu"))
    arrays = fsdm.read_npz(args.dataset, ("images", "labels", "class_names"))
    images, labels = torch.from_numpy(arrays["images"])[:, None], torch.from_numpy(arrays["labels"]).long()
    names = arrays["class_names"].astype(str).tolist()
    if Path(args.classifier).exists():
        model = Classifier(len(names)).eval()
        model.load_state_dict(torch.load(args.classifier, weights_only=True))
    else:
        model = train(images, labels, dtype)
        fsdm.write_whole(args.classifier, lambda file: torch.save(model.state_dict(), file))

    split = fsdm.load_data(args.dataset, None, 28, 1, parts=[args.split])[args.split]
    sets = args.num // SAMPLES
    support, reference, other = sample.draw_questions(split, args.k, sets * args.k, seed=0)
    own = torch.searchsorted(split.offsets, support[:, 0].contiguous(), right=True) - 1
    own = torch.tensor([names.index(split.names[c]) for c in own])          # [S]
    asked = own.unique()
    real, _ = judge(model, split.images[reference].flatten(0, 1))
    real = fid.statistics(real.numpy())

    def score(name, made):                                                  # uint8 [S, any, 1, 28, 28]
        features, logits = judge(model, made.flatten(0, 1))
        named = asked[logits[:, asked].argmax(1)].view(made.shape[:2])      # [S, any]
        likeness = (named == own[:, None]).float().mean()
        distance = fid.frechet_distance(*real, *fid.statistics(features.numpy()))
        print(f"{name}: likeness {likeness:.3f} among {len(asked)}, distance {distance:.1f}", flush=True)

    score("other real images", split.images[other])
    for ckpt in args.ckpts:
        for guidance in args.guidance:
            generator = fsdm.load_model(ckpt)
            made = fsdm.generate(generator, split.images[support], SAMPLES, guidance=guidance, dtype=dtype)
            score(f"{ckpt}, guidance {guidance:g}", made)


if __name__ == "__main__":
    main()
