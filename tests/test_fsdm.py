"""Claims about the method, each against an oracle: counted by hand, or a case whose answer is known."""
import dataclasses
import math
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import fsdm
from fsdm import FSDM, Config

TINY = dict(image_size=8, patch_size=4, encoder_patch_size=4, sample_size=4, hidden_size=24, hdim=24, depth=2,
            num_heads=3, encoder_depth=1, diffusion_steps=50)
FLAVOURS = [(encoder, mode) for encoder in ("stacked", "image") for mode in ("film", "lag")]


def tiny(**fields):
    """A small model whose zero-initialised branches are opened, so that everything can reach the output."""
    torch.manual_seed(0)
    model = FSDM(Config(**{**TINY, **fields})).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    return model


def count(module):
    return sum(p.numel() for p in module.parameters())


def preset(name):
    with torch.device("meta"):
        return FSDM(Config(**fsdm.PRESETS[name]))


# ---- The documents' configurations.

def test_reference_has_the_documented_parameters():
    model = preset("reference")
    assert (count(model), count(model.denoiser), count(model.encoder)) == (43_509_900, 32_735_628, 10_774_272)
    dit = model.denoiser
    assert count(dit.embed) == 4_608 and dit.pos.numel() == 98_304 and count(dit.time) == 245_760
    assert count(dit.project) == 147_840 and count(dit.blocks[0]) == 2_661_504
    assert count(dit.norm) + count(dit.ada) + count(dit.out) == 301_068
    assert count(model.encoder.embed) == 28_032 and model.encoder.pos.numel() == 98_688
    assert count(model.encoder.blocks[0]) == 1_774_464 and len(model.encoder.blocks) == 6


def test_wide_has_the_true_count_not_the_documents_claim():
    model = preset("wide")
    assert (count(model), count(model.denoiser), count(model.encoder)) == (37_739_262, 22_974_762, 14_764_500)


def test_the_mnist_denoiser_is_the_documents_and_sees_no_context():
    model = fsdm.FSDM(fsdm.Config(**fsdm.PRESETS["mnist"]))
    assert sum(p.numel() for p in model.parameters()) == 4_869_377
    assert [block.dilation[0] for block in model.denoiser.blocks] == [1, 1, 3, 3, 9, 9, 27, 27]
    with pytest.raises(ValueError, match="time only"):
        fsdm.Config(denoiser="conv")


@pytest.mark.parametrize("name", fsdm.PRESETS)
def test_every_preset_runs(name):
    config = dataclasses.replace(Config(**fsdm.PRESETS[name]), depth=2, encoder_depth=1)
    images = torch.zeros(1, config.sample_size, config.in_channels, *[config.image_size] * 2, dtype=torch.uint8)
    sees = ~torch.eye(config.sample_size, dtype=torch.bool)[None]
    sees &= fsdm.leave_one_out(1, config.sample_size, fsdm.rng("cpu", 0))
    loss, kl = FSDM(config)(images, sees, torch.zeros(images.shape[:2], dtype=torch.long), torch.randn(images.shape))
    assert kl is None and loss.shape == images.shape[:2] and loss.isfinite().all()


@pytest.mark.parametrize("change, word", [
    (dict(patch_size=5), "patch_size"), (dict(num_heads=7), "num_heads"), (dict(encoder="lstm"), "encoder"),
    (dict(schedule="magic"), "schedule"), (dict(sample_size=1), "sample_size"), (dict(depth=0), "depth"),
    (dict(mode_conditioning="concat"), "mode_conditioning"), (dict(prediction="x"), "prediction")])
def test_a_contradicting_config_is_named(change, word):
    with pytest.raises(ValueError, match=word):
        Config(**change)


# ---- Who sees whom.

@pytest.mark.parametrize("encoder, mode", FLAVOURS)
def test_a_target_never_reaches_its_own_context(encoder, mode):
    model, K = tiny(encoder=encoder, mode_conditioning=mode), 4
    images = torch.randint(0, 256, (1, K, 3, 8, 8), dtype=torch.uint8)
    changed = images.clone()
    changed[0, 2] = 255 - changed[0, 2]
    sees = ~torch.eye(K, dtype=torch.bool)[None]
    x, t = torch.randn(1, K, 3, 8, 8), torch.full((1, K), 20)
    before, after = (model.denoiser(x, t, model.read(fsdm.to_signal(i), sees)) for i in (images, changed))
    moved = (before - after).abs().amax((0, 2, 3, 4)) > 1e-4
    assert moved.tolist() == [True, True, False, True]


@pytest.mark.parametrize("encoder, mode", FLAVOURS)
def test_training_and_sampling_read_the_same_support_the_same_way(encoder, mode):
    """Five images in training and six when sampling, a timestep in one and zeros in the other: not again."""
    model, K = tiny(encoder=encoder, mode_conditioning=mode, context_dropout=0.1), 4
    images = torch.randn(1, K, 3, 8, 8)
    x, t = torch.randn(1, K, 3, 8, 8), torch.full((1, K), 20)
    trained = model.denoiser(x, t, model.read(images, ~torch.eye(K, dtype=torch.bool)[None]))
    for i in range(K):
        others = [j for j in range(K) if j != i]
        context = model.read(images[:, others], torch.ones(1, 1, K - 1, dtype=torch.bool))
        assert torch.allclose(model.denoiser(x[:, i:i + 1], t[:, :1], context), trained[:, i:i + 1], atol=1e-5)


@pytest.mark.parametrize("mode", ("film", "lag"))
def test_the_order_of_the_support_does_not_matter(mode):
    model = tiny(encoder="image", mode_conditioning=mode)
    support = torch.randint(0, 256, (1, 5, 3, 8, 8), dtype=torch.uint8)
    samples = [fsdm.sample(model, s, 2, steps=5) for s in (support, support[:, [3, 1, 4, 0, 2]])]
    assert (samples[0].int() - samples[1].int()).abs().max() <= 1
    other = fsdm.sample(model, 255 - support, 2, steps=5)
    assert (samples[0].int() - other.int()).abs().max() > 1                 # and the support does matter


@pytest.mark.parametrize("size", (1, 2, 5, 9))
def test_any_number_of_support_images_works(size):
    support = torch.randint(0, 256, (2, size, 3, 8, 8), dtype=torch.uint8)
    assert fsdm.sample(tiny(encoder="image", mode_conditioning="lag"), support, 3, steps=2).shape == (2, 3, 3, 8, 8)


def test_the_stacked_encoder_refuses_more_images_than_it_was_trained_with():
    with pytest.raises(ValueError, match="3 at most"):
        fsdm.sample(tiny(), torch.zeros(1, 4, 3, 8, 8, dtype=torch.uint8), 1, steps=2)


@pytest.mark.parametrize("encoder, mode", FLAVOURS)
def test_the_null_context_holds_nothing_of_the_support(encoder, mode):
    model = tiny(encoder=encoder, mode_conditioning=mode, context_dropout=0.5)
    x, t = torch.randn(1, 2, 3, 8, 8), torch.full((1, 2), 20)
    sees = torch.tensor([[[True] * 3, [False] * 3]])
    a, b = (model.denoiser(x, t, model.read(torch.randn(1, 3, 3, 8, 8), sees)) for _ in range(2))
    assert not torch.allclose(a[:, 0], b[:, 0], atol=1e-4) and torch.allclose(a[:, 1], b[:, 1], atol=1e-6)


@pytest.mark.parametrize("encoder, mode", FLAVOURS)
def test_a_variational_context_has_a_kl_for_every_leave_one_out_context(encoder, mode):
    model = tiny(encoder=encoder, mode_conditioning=mode, mode_context="variational", context_dropout=0.1)
    images, sees = torch.randn(2, 4, 3, 8, 8), ~torch.eye(4, dtype=torch.bool).expand(2, 4, 4)
    sees = sees.clone()
    sees[1, 3] = False                                                      # one of them is the null context
    kl = model.read(images, sees).kl
    vector, tokens, looks = model.encoder(images, sees)
    for b in range(2):
        for i in range(4):
            parts = [vector[b, i]] + ([tokens[b, g, n] for g in range(4) if looks[b, i, g] for n in range(4)]
                                      if mode == "lag" else [])
            expected = 0
            for h in parts if sees[b, i].any() else []:
                mu, log_var = model.posterior(h).chunk(2)
                q = torch.distributions.Normal(mu, (log_var / 2).exp())
                expected += torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum().item()
            assert abs(kl[b, i].item() - expected) < 1e-3 * max(1, expected)


@pytest.mark.parametrize("encoder, mode", FLAVOURS)
def test_a_variational_context_is_its_mean_or_a_draw_of_its_own_for_every_image(encoder, mode):
    model = tiny(encoder=encoder, mode_conditioning=mode, mode_context="variational", context_dropout=0.1)
    support = torch.randint(0, 256, (2, 3, 3, 8, 8), dtype=torch.uint8)
    mean, again, drawn = (fsdm.sample(model, support, 3, steps=3, guidance=2.0, draw_context=d) for d in (0, 0, True))
    assert torch.equal(mean, again) and drawn.shape == mean.shape and not torch.equal(mean, drawn)
    alone = fsdm.sample(model, support[1:], 1, steps=3, guidance=2.0, first=3, draw_context=True)
    assert (alone[0, 0].int() - drawn[1, 0].int()).abs().max() <= 1
    with pytest.raises(ValueError, match="nothing to draw"):
        fsdm.sample(tiny(), support, 1, draw_context=True)


def test_leave_one_out_drops_itself_always_and_others_as_asked():
    g = fsdm.rng("cpu", 0, 1)
    sees = fsdm.leave_one_out(500, 6, g)
    assert not sees.diagonal(dim1=1, dim2=2).any() and (sees.sum(2) == 5).all()
    sees = fsdm.leave_one_out(500, 6, g, vary=True)
    assert not sees.diagonal(dim1=1, dim2=2).any() and set(sees.sum(2).unique().tolist()) == {1, 2, 3, 4, 5}
    assert sees.float().mean((0,)).fill_diagonal_(0.5).std() < 0.2          # no other image is preferred
    assert 0.25 < (~fsdm.leave_one_out(500, 6, g, dropout=0.3).any(2)).float().mean() < 0.35


def test_under_lag_time_and_self_attention_reach_every_block():
    model = tiny(encoder="image", mode_conditioning="lag")
    context = model.read(torch.randn(1, 2, 3, 8, 8), torch.ones(1, 1, 2, dtype=torch.bool))
    x = torch.randn(1, 4, 24)
    for i, block in enumerate(model.denoiser.blocks):
        early, late = (model.denoiser.time(fsdm.timestep_embedding(torch.tensor([t]))) for t in (10, 900))
        assert not torch.allclose(block(x, early, context.keys_values[i]), block(x, late, context.keys_values[i]))
        nudged = x.clone()
        nudged[0, 3] = torch.randn(24)              # another token of the same image
        moved = block(nudged, early, context.keys_values[i]) - block(x, early, context.keys_values[i])
        assert moved[0, 0].abs().max() > 1e-4


# ---- Transformer parts.

def test_padded_head_dimensions_change_nothing():
    q, k, v = torch.randn(3, 2, 7, 3, 50, dtype=torch.float64)
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 50 ** 0.5).softmax(-1)
    assert torch.allclose(fsdm.attend(q, k, v), torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))


def test_patches_come_back_where_they_were():
    x = torch.randn(2, 3, 12, 12)
    tokens = fsdm.patchify(x, 4)
    assert tokens.shape == (2, 9, 48) and torch.equal(fsdm.unpatchify(tokens, 4), x)
    assert set(tokens[0, 5].tolist()) == set(x[0, :, 4:8, 8:12].flatten().tolist())


# ---- Diffusion and samplers, with denoisers whose answer is known.

@pytest.mark.parametrize("name", fsdm.SCHEDULES)
@pytest.mark.parametrize("T", (250, 1000))
def test_alpha_bar_falls_from_one_to_nothing(name, T):
    a = fsdm.SCHEDULES[name](T)
    assert (a.diff() < 0).all() and a[0] > 0.99 and 0 < a[-1] < 1e-4 and a.dtype == torch.float64


def test_the_linear_schedule_is_the_papers_at_1000():
    a = fsdm.linear_schedule(1000)
    assert abs(a[500] - 0.078) < 1e-3 and abs(a[999] - 4.0e-5) < 1e-6
    assert abs(math.log(fsdm.linear_schedule(250)[125] / a[500])) < 0.1     # scaled, T changes little


@pytest.mark.parametrize("sampler", fsdm.SAMPLERS)
@pytest.mark.parametrize("steps", (1, 7, 19, 250))
def test_a_denoiser_that_knows_the_image_gets_it_back(sampler, steps):
    image, alpha_bar = torch.randn(4, 5).double(), fsdm.linear_schedule(250)
    made = fsdm.SAMPLERS[sampler](lambda x, t: image, torch.randn(4, 5).double(), alpha_bar, steps,
                                  lambda: torch.randn(4, 5).double())
    assert torch.allclose(made, image, atol=1e-9)


def gaussian(spread, alpha_bar):
    """The exact denoiser of data from N(0, spread^2)."""
    def denoise(x, t):
        a = alpha_bar[t]
        return a.sqrt() * spread ** 2 / (a * spread ** 2 + 1 - a) * x
    return denoise


@pytest.mark.parametrize("steps, schedule", [(37, "linear"), (60, "cosine"), (110, "linear")])
def test_deterministic_samplers_follow_the_probability_flow(steps, schedule):
    """For N(0, s^2) the flow ends at x_T s / sqrt(alpha_bar s^2 + 1 - alpha_bar). Steps that do not divide T."""
    alpha_bar, s = fsdm.SCHEDULES[schedule](250), 0.5
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).double()
    end = x * s / (alpha_bar[-1] * s ** 2 + 1 - alpha_bar[-1]).sqrt()
    error = {name: (fsdm.SAMPLERS[name](gaussian(s, alpha_bar), x, alpha_bar, steps, None) - end).square().mean().sqrt()
             for name in ("ddim", "2m")}
    assert error["ddim"] < 0.04 and error["2m"] < error["ddim"] / 3


@pytest.mark.parametrize("steps", (100, 250))
def test_ancestral_sampling_has_the_variance_of_the_data(steps):
    alpha_bar, s, g = fsdm.linear_schedule(250), 0.5, torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(20000, generator=g).double()
    made = fsdm.ddpm(gaussian(s, alpha_bar), draw(), alpha_bar, steps, draw)
    # each step draws from q(x_next | x_t, x0) with the denoiser's x0 (DDPM eq. 6 and 7): the variance step by step
    times, variance = fsdm.spaced_times(250, steps), 1.0
    for t, n in zip(times, times[1:]):
        a, b = alpha_bar[t], alpha_bar[n]
        beta = 1 - a / b
        gain = a.sqrt() * s ** 2 / (a * s ** 2 + 1 - a) * b.sqrt() * beta / (1 - a) + (a / b).sqrt() * (1 - b) / (1 - a)
        variance = gain ** 2 * variance + (1 - b) / (1 - a) * beta
    a = alpha_bar[times[-1]]
    expected = variance ** 0.5 * a.sqrt() * s ** 2 / (a * s ** 2 + 1 - a)
    assert abs(made.std() / expected - 1) < 0.02 and abs(expected / s - 1) < 0.1


@pytest.mark.parametrize("schedule", fsdm.SCHEDULES)
def test_stochastic_2m_keeps_the_variance_of_the_data_and_in_few_steps_far_better_than_ddpm(schedule):
    alpha_bar, s, g = fsdm.SCHEDULES[schedule](1000), 0.5, torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(50_000, generator=g).double()
    made = lambda name, steps: fsdm.SAMPLERS[name](gaussian(s, alpha_bar), draw(), alpha_bar, steps, draw)
    off = lambda name, steps: abs(made(name, steps).std() / s - 1)
    assert off("2m_sde", 20) < off("ddpm", 20) / 3 and off("2m_sde", 40) < off("2m_sde", 20) / 2
    assert off("2m_sde", 100) < 0.01


def test_ddpm_beta_is_the_documents_formula():
    alpha_bar = fsdm.linear_schedule(1000)
    alpha = alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]]).double()
    guess = lambda x, t: (x * (1 + t / 1000)).tanh()                        # any network's noise
    draws = lambda: (g := torch.Generator().manual_seed(0)) and (lambda: torch.randn(2, 3, generator=g).double())
    draw = draws()
    x = start = draw()
    for t in range(999, -1, -1):
        x = (x - (1 - alpha[t]) / (1 - alpha_bar[t]) ** 0.5 * guess(x, t)) / alpha[t] ** 0.5
        x = x + (1 - alpha[t]) ** 0.5 * draw() if t > 0 else x
    draw = draws()
    draw()
    x0 = lambda x, t: (x - (1 - alpha_bar[t]) ** 0.5 * guess(x, t)) / alpha_bar[t] ** 0.5
    assert torch.allclose(fsdm.ddpm_beta(x0, start, alpha_bar, 1000, draw), x, rtol=1e-8)


def test_kept_times_start_at_the_end_and_reach_zero_without_repeats():
    for T, steps in ((250, 19), (250, 250), (1000, 20), (250, 400)):
        for times in (fsdm.spaced_times(T, steps), fsdm.log_snr_times(fsdm.linear_schedule(T), steps)):
            assert times[0] == T - 1 and times[-1] == 0 and len(times) <= steps
            assert all(a > b for a, b in zip(times, times[1:]))


@pytest.mark.parametrize("prediction", ("noise", "v"))
def test_the_right_output_has_no_loss_and_gives_the_clean_image_back(prediction):
    model = tiny(prediction=prediction, encoder="none", schedule="cosine")
    images = torch.randint(0, 256, (1, 4, 3, 8, 8), dtype=torch.uint8)
    x0, noise = fsdm.to_signal(images), torch.randn(1, 4, 3, 8, 8)
    t = torch.full((1, 4), 25)
    a = model.alpha_bar[25]
    answer = noise if prediction == "noise" else a.sqrt() * noise - (1 - a).sqrt() * x0
    model.denoiser.forward = lambda x, t, context: answer
    assert model(images, None, t, noise)[0].max() < 1e-12
    assert torch.allclose(model.denoise(a.sqrt() * x0 + (1 - a).sqrt() * noise, 25, None), x0, atol=1e-4)


def test_an_image_is_the_same_at_every_batch_size():
    model = tiny(encoder="image", mode_conditioning="lag", context_dropout=0.1)
    support = torch.randint(0, 256, (3, 2, 3, 8, 8), dtype=torch.uint8)
    for sampler in fsdm.SAMPLERS:
        options = dict(sampler=sampler, steps=6, guidance=2.0, seed=5)
        together = fsdm.sample(model, support, 4, **options)
        alone = fsdm.sample(model, support[1:2], 1, first=1 * 4 + 2, **options)
        assert (together[1, 2].int() - alone[0, 0].int()).abs().max() <= 1
        assert not torch.equal(together[1, 1], together[1, 2])


def test_guidance_is_a_line_from_null_to_context():
    model = tiny(encoder="image", mode_conditioning="lag", context_dropout=0.1)
    x, support = torch.randn(1, 1, 3, 8, 8) / 4, torch.randn(1, 3, 3, 8, 8)
    given, none = torch.ones(1, 1, 3, dtype=torch.bool), torch.zeros(1, 1, 3, dtype=torch.bool)
    t = torch.full((1, 1), 9)
    a, b = (model.denoiser(x, t, model.read(support, sees)) for sees in (given, none))
    out = b + 1.7 * (a - b)
    alpha = float(model.alpha_bar[9])
    x0 = ((x - (1 - alpha) ** 0.5 * out) / alpha ** 0.5).clamp(-1, 1)
    assert torch.allclose(model.denoise(x, 9, model.read(support, torch.cat([given, none], 1)), 1.7), x0, atol=1e-5)
    with pytest.raises(ValueError, match="without context dropout"):
        fsdm.sample(tiny(encoder="image"), torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8), 1, guidance=2.0)


def test_randomness_is_a_function_of_its_whole_address():
    draws = {tuple(torch.rand(2, generator=fsdm.rng("cpu", *a)).tolist())
             for a in ((0, 1), (1, 0), (0, 1, 0), (0, 1, 1), (2 ** 40, 1), (0, 2, 1))}
    assert len(draws) == 6
    assert torch.equal(*(torch.rand(3, generator=fsdm.rng("cpu", 7, 3, 99)) for _ in range(2)))


# ---- Data.

def test_glyphs_are_what_they_promise():
    data = fsdm.load_data("glyphs", None, 32, 3)
    sizes = {name: len(split.names) for name, split in data.items()}
    assert sizes["train"] >= 500 and sizes["val"] >= 50 and sizes["test"] >= 50
    names = [name for split in data.values() for name in split.names]
    assert len(set(names)) == len(names)
    images = data["test"].images.float().unflatten(0, (sizes["test"], -1))          # [classes, images, C, H, W]
    within = (images - images.mean(1, keepdim=True)).square().mean()
    between = (images.mean(1) - images.mean((0, 1))).square().mean()
    assert images.shape[2:] == (3, 32, 32) and 50 < within < between                # redrawn, and recognisable
    again = fsdm.load_data("glyphs", None, 32, 3)
    assert torch.equal(again["train"].images, data["train"].images)


def test_sets_are_of_one_class_and_hold_no_image_twice():
    labels = np.repeat(np.arange(5), [6, 9, 7, 30, 6])
    images = labels.astype(np.uint8)[:, None, None, None].repeat(2, 2)
    split = fsdm.make_split(images, labels, list("abcde"), [0, 1, 3, 4])
    index = fsdm.draw_sets(split, 400, 6, fsdm.rng("cpu", 0, 0))
    assert all(len(set(row.tolist())) == 6 for row in index)
    drawn = split.images[index][..., 0, 0, 0]
    assert (drawn == drawn[:, :1]).all() and set(drawn.unique().tolist()) == {0, 1, 3, 4}
    assert len(index.unique()) == len(split.images)                                 # every image has its turn


def test_fc100_holds_whole_superclasses_out():
    assert len(set(fsdm.FC100_TEST)) == len(set(fsdm.FC100_VAL)) == 20
    assert not set(fsdm.FC100_TEST) & set(fsdm.FC100_VAL)
    held_out = {"dolphin": "test", "butterfly": "test", "skunk": "test", "woman": "test",       # SPEC A6
                "tiger": "val", "camel": "val", "lobster": "val", "squirrel": "val", "rose": "train", "bus": "train"}
    keep = fsdm.split_fc100(list(held_out))
    assert {list(held_out)[c]: part for part, labels in keep.items() for c in labels} == held_out


def test_omniglots_last_97_background_characters_validate():
    keep = fsdm.split_background(np.arange(1623) >= 964)
    assert [len(keep[name]) for name in ("train", "val", "test")] == [867, 97, 659]
    assert list(keep["val"]) == list(range(867, 964))


def test_a_split_by_name_is_disjoint_and_depends_on_nothing_else():
    names = [f"class {i}" for i in range(50)]
    keep = fsdm.split_by_name(names)
    assert sorted(c for labels in keep.values() for c in labels) == list(range(50))
    assert [len(keep[name]) for name in ("train", "val", "test")] == [35, 5, 10]
    backwards = fsdm.split_by_name(names[::-1])
    assert {names[c] for c in keep["test"]} == {names[::-1][c] for c in backwards["test"]}


SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.exists(), reason="the real images are not here: ../shared/data")
@pytest.mark.parametrize("file, sizes, channels", [("omniglot_28.npz", [867, 97, 659], 1),
                                                   ("cifar100_x100.npz", [60, 20, 20], 3),
                                                   ("cifar100_fc100_test.npz", [0, 0, 20], 3)])
def test_real_arrays_load_and_split(file, sizes, channels):
    data = fsdm.load_data(str(SHARED / file), None, 28 if channels == 1 else 32, channels)
    assert [len(data[name].names) for name in ("train", "val", "test")] == sizes
    raw = np.load(SHARED / file)
    name = data["test"].names[3]
    mine = data["test"].images[data["test"].offsets[3]:data["test"].offsets[4]]
    theirs = raw["images"][raw["labels"] == list(raw["class_names"]).index(name)]
    assert np.array_equal(mine.permute(0, 2, 3, 1).numpy().squeeze(), theirs)


# ---- torchvision's own files, in their official layout, made small.

def test_cifar100_reads_both_files_and_splits_by_superclass(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    folder, names = tmp_path / "cifar-100-python", ["bus", "dolphin", "rose", "tiger"]
    folder.mkdir()
    for part, value in (("train", 10), ("test", 90)):
        data = {"data": np.full((4, 3072), value, np.uint8), "fine_labels": [0, 1, 2, 3]}
        pickle.dump(data, open(folder / part, "wb"))
    pickle.dump({"fine_label_names": names}, open(folder / "meta", "wb"))
    data = fsdm.load_data("cifar100", str(tmp_path), 32, 3)
    assert {name: split.names for name, split in data.items()} == {"train": ["bus", "rose"], "val": ["tiger"],
                                                                   "test": ["dolphin"]}
    assert data["test"].images[:, 0, 0, 0].tolist() == [10, 90]


def test_omniglot_trains_on_background_and_tests_on_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.Omniglot._check_integrity", lambda self: True)
    for part, alphabets in (("images_background", "BA"), ("images_evaluation", "C")):
        for alphabet in alphabets:
            for c in (1, 2):
                folder = tmp_path / "omniglot-py" / part / alphabet / f"character{c:02d}"
                folder.mkdir(parents=True)
                for i in range(3):
                    paper = Image.new("1", (105, 105), 1)
                    paper.paste(0, (0, 0, 105, 20 * ord(alphabet) - 1280 + 10 * c))     # ink, a share of its own
                    paper.save(folder / f"{i}.png")
    data = fsdm.load_data("omniglot", str(tmp_path), 28, 1)
    assert [split.names for split in data.values()] == [
        ["A/character01", "A/character02", "B/character01"], ["B/character02"], ["C/character01", "C/character02"]]
    ink = torch.cat([split.images for split in data.values()]).float().mean((1, 2, 3)).unflatten(0, (6, 3))
    assert (ink[:, 0].diff() > 0).all() and (ink == ink[:, :1]).all()           # images under their own names


def test_mnist_and_celeba_read_torchvisions_files(tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, M in (("train", 30), ("t10k", 10)):
        digits = (np.arange(M) % 10).astype(np.uint8)
        images = digits[:, None, None].repeat(28, 1).repeat(28, 2) * 20
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, M, 28, 28) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, M) + digits.tobytes())
    data = fsdm.load_data("mnist", str(tmp_path), 28, 1)
    assert [len(split.names) for split in data.values()] == [7, 1, 2]
    for split in data.values():
        shown = split.images[split.offsets[:-1], 0, 0, 0] // 20
        assert [int(name[0]) for name in split.names] == shown.tolist() and len(split.images) == 4 * len(split.names)

    monkeypatch.setattr("torchvision.datasets.CelebA._check_integrity", lambda self: True)
    folder, files = tmp_path / "celeba", [f"{i:06d}.jpg" for i in range(203)]
    (folder / "img_align_celeba").mkdir(parents=True)
    person = [1 + i % 10 for i in range(200)] + [11] * 3                        # the last one has too few images
    for file, identity in zip(files, person):
        Image.new("RGB", (178, 218), (identity * 20, 0, 0)).save(folder / "img_align_celeba" / file, quality=95)
    write = lambda name, rows, head="": (folder / name).write_text(
        head + "".join(f"{file} {row}\n" for file, row in zip(files, rows)))
    write("identity_CelebA.txt", person)
    write("list_eval_partition.txt", [0] * 203)
    for name in ("list_bbox_celeba.txt", "list_landmarks_align_celeba.txt", "list_attr_celeba.txt"):
        write(name, [1] * 203, "203\nx\n")
    data = fsdm.load_data("celeba", str(tmp_path), 16, 3)
    assert [split.names for split in data.values()] == [[str(i) for i in range(1, 8)], ["8"], ["9", "10"]]
    assert abs(int(data["test"].images[0, 0, 8, 8]) - 180) < 6 and len(data["train"].images) == 140


def draw_folder(root, classes, images=3, size=(40, 30)):
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", size, (c * 20, i * 40, 0)).save(root / name / f"Image {i}.PNG")


def test_evaluation_classes_marked_by_numbers_are_never_trained_on(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((30, 8, 8), np.uint8), labels=np.arange(30) // 2,
             class_names=np.arange(15), class_is_evaluation=np.array([0] * 12 + [1] * 3))
    data = fsdm.load_data(str(tmp_path / "a.npz"), None, 8, 1)
    assert [len(split.names) for split in data.values()] == [10, 2, 3] and data["test"].names == ["12", "13", "14"]


def test_a_folder_of_class_folders_is_split_by_name(tmp_path):
    draw_folder(tmp_path, [f"Klasse {c} äö" for c in range(6)])
    (tmp_path / "Klasse 0 äö" / ".hidden").mkdir()                                  # as notebooks leave them
    Image.new("RGB", (9, 9)).save(tmp_path / "Klasse 0 äö" / ".hidden" / "again.png")
    data = fsdm.load_data(str(tmp_path), None, 16, 3)
    assert [len(s.names) for s in data.values()] == [4, 1, 1] and data["train"].images.shape == (12, 3, 16, 16)


def test_a_folder_with_its_own_splits_keeps_them(tmp_path):
    draw_folder(tmp_path, ["train/a", "train/b", "val/c", "test/a"])
    data = fsdm.load_data(str(tmp_path), None, 16, 1)
    assert [s.names for s in data.values()] == [["train/a", "train/b"], ["val/c"], ["test/a"]]
    assert data["train"].images.shape == (6, 1, 16, 16)


def test_pictures_of_every_kind_become_what_a_person_sees(tmp_path):
    red = np.zeros((20, 30, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    rgb = Image.fromarray(red)
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    rotated = Image.fromarray(np.vstack([red, 255 - red]))                          # red above; stored turned
    exif = rotated.getexif()
    exif[0x0112] = 3                                                                # show it upside down
    rotated.save(tmp_path / "turned.png", exif=exif)
    corner = lambda image, C=3: fsdm.to_picture(image, 8, C)[:, 0, 0].tolist()
    assert corner(rgb) == corner(rgb.convert("P")) == corner(rgb.convert("CMYK")) == [255, 0, 0]
    assert corner(clear) == [255, 255, 255] and corner(Image.open(tmp_path / "turned.png")) == [0, 255, 255]
    deep = Image.fromarray(np.full((9, 9), 32896, np.uint16))
    assert corner(deep, 1) == [128] and corner(rgb.convert("L"), 1) == [76]


# ---- Checkpoints.

def test_a_checkpoint_comes_back_whole_and_strangers_are_refused(tmp_path):
    model = tiny(encoder="image", mode_conditioning="lag")
    state = dict(config=dataclasses.asdict(model.config), model=model.state_dict(),
                 ema={k: v + 1 for k, v in model.state_dict().items()})
    torch.save(state, tmp_path / "a.pt")
    raw, ema = (fsdm.load_model(tmp_path / "a.pt", weights=w) for w in ("raw", "ema"))
    assert raw.config == model.config and torch.equal(raw.alpha_bar, model.alpha_bar)
    assert torch.equal(raw.denoiser.pos, model.denoiser.pos) and torch.equal(ema.denoiser.pos, model.denoiser.pos + 1)
    torch.save(dict(state, config=dict(state["config"], depth=3)), tmp_path / "shape.pt")
    torch.save(dict(state, config=print), tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name, change in dict(huge=dict(hidden_size=8192 * 6, num_heads=1), deep=dict(depth=10 ** 9),
                             words=dict(depth="6"), many=dict(image_size=8192, patch_size=1, depth=512)).items():
        torch.save(dict(state, config=dict(state["config"], **change)), tmp_path / f"{name}.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("shape", "code", "text", "huge", "deep", "words", "many", "list"):
        with pytest.raises(ValueError, match="is not a checkpoint of this program"):
            fsdm.load_model(tmp_path / f"{name}.pt")
    with pytest.raises(OSError, match="nothing.pt"):
        fsdm.load_model(tmp_path / "nothing.pt")
