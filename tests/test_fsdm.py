"""Claims about the method, each against an oracle: counted by hand, or a case whose answer is known."""
import dataclasses
import io
import math
import os
import pickle
import struct
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
    return opened(FSDM(Config(**{**TINY, **fields})).eval())


def opened(module):
    """What begins at zero lets nothing through, and every comparison would be one of zeros."""
    for p in module.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    return module


def pictures(*shape):
    return torch.randint(0, 256, (*shape, 3, 8, 8), dtype=torch.uint8)


def count(module):
    return sum(p.numel() for p in module.parameters())


def preset(name):
    with torch.device("meta"):
        return FSDM(Config(**fsdm.PRESETS[name]))


# ---- VFSDDPM's configurations, and ours.

def test_reference_has_the_parameters_of_vfsddpm():
    model = preset("reference")
    assert (count(model), count(model.denoiser), count(model.encoder)) == (43_509_900, 32_735_628, 10_774_272)
    dit, vit = model.denoiser, model.encoder.vit
    assert count(dit.embed) == 4_608 and dit.pos.numel() == 98_304 and count(dit.time) == 245_760
    assert count(dit.project) == 147_840 and count(dit.blocks[0]) == 2_661_504
    assert count(dit.norm) + count(dit.ada) + count(dit.out) == 301_068
    assert count(vit.embed) == 28_032 and vit.pos.numel() + vit.cls.numel() == 98_688
    assert count(vit.blocks[0]) == 1_774_464 and len(vit.blocks) == 6


def test_wide_has_the_parameters_of_vfsddpms_wide_configuration():
    model = preset("wide")
    assert (count(model), count(model.denoiser), count(model.encoder)) == (37_739_262, 22_974_762, 14_764_500)


def test_the_mnist_denoiser_is_vfsddpms_and_sees_no_context():
    model = preset("mnist")
    assert count(model) == 4_869_377 and model.encoder is None
    assert [block.dilation[0] for block in model.denoiser.blocks] == [1, 1, 3, 3, 9, 9, 27, 27]
    with pytest.raises(ValueError, match="time only"):
        Config(denoiser="conv")
    Config(**fsdm.PRESETS["mnist"] | dict(image_size=27, hidden_size=255))       # it has no patches, and no heads


@pytest.mark.parametrize("name", fsdm.PRESETS)
def test_every_preset_trains_all_of_its_weights(name):
    config = dataclasses.replace(Config(**fsdm.PRESETS[name]), depth=2, encoder_depth=1)
    images = torch.zeros(1, config.sample_size, config.in_channels, *[config.image_size] * 2, dtype=torch.uint8)
    sees = fsdm.leave_one_out(1, config.sample_size, fsdm.rng("cpu", 0), config.vary_support)
    model = FSDM(config)
    loss, kl = model(images, sees, torch.zeros(images.shape[:2], dtype=torch.long), torch.randn(images.shape))
    assert loss.shape == kl.shape == images.shape[:2] and loss.isfinite().all() and not kl.any()
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


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
    images = pictures(1, K)
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
    model, support = tiny(encoder="image", mode_conditioning=mode), pictures(1, 5)
    first, shuffled, other = (fsdm.generate(model, s, 2, steps=5).int()
                              for s in (support, support[:, [3, 1, 4, 0, 2]], 255 - support))
    assert (first - shuffled).abs().max() <= 1 and (first - other).abs().max() > 1     # and the support does matter


def test_the_vector_of_images_read_one_by_one_is_the_mean_of_theirs():
    encoder, images = tiny(encoder="image").encoder, torch.randn(1, 3, 3, 8, 8)
    vector, _, _ = encoder(images, torch.tensor([[[1, 1, 1], [1, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]]).bool())
    everyone, two, *alone = vector[0]
    assert torch.allclose(everyone, sum(alone) / 3, atol=1e-6)
    assert torch.allclose(two, (alone[0] + alone[2]) / 2, atol=1e-6)


@pytest.mark.parametrize("size", (1, 2, 5, 9))
def test_any_number_of_support_images_works(size):
    model = tiny(encoder="image", mode_conditioning="lag")
    assert fsdm.generate(model, pictures(2, size), 3, steps=2).shape == (2, 3, 3, 8, 8)


@pytest.mark.parametrize("encoder, mode", FLAVOURS)
def test_the_context_of_an_empty_support_holds_nothing_of_the_support(encoder, mode):
    model, x, t = tiny(encoder=encoder, mode_conditioning=mode), torch.randn(1, 2, 3, 8, 8), torch.full((1, 2), 20)
    sees = torch.tensor([[[True] * 3, [False] * 3]])
    images = torch.randn(2, 1, 3, 3, 8, 8)
    a, b = (model.denoiser(x, t, model.read(i, sees)) for i in images)
    assert not torch.allclose(a[:, 0], b[:, 0], atol=1e-4) and torch.equal(a[:, 1], b[:, 1])
    vector, _, mask = model.encoder(images[0], sees)
    if encoder == "image":
        assert not vector[:, 1].any() and not mask[:, 1].any()
    else:                                                                   # all slots empty, that is zero
        zeros = model.encoder(torch.zeros_like(images[0]), sees)[0]
        assert torch.allclose(vector[:, 1], zeros[:, 0], atol=1e-5)
        assert not torch.allclose(vector[:, 0], zeros[:, 0], atol=1e-2)


@pytest.mark.parametrize("encoder, mode", FLAVOURS)
def test_a_variational_context_has_a_kl_for_every_leave_one_out_context(encoder, mode):
    """That of its vector and, under lag, of every token that the target may look at."""
    model = tiny(encoder=encoder, mode_conditioning=mode, mode_context="variational")
    images, sees = torch.randn(2, 4, 3, 8, 8), (~torch.eye(4, dtype=torch.bool)).repeat(2, 1, 1)
    sees[1, 3] = False                                                      # an empty support counts like any other
    noise = torch.randn(2, *fsdm.context_noise_shape(model.config, 4))
    context = model.read(images, sees, noise)
    vector, tokens, mask = model.encoder(images, sees)
    seen = mask.sum(2) if mode == "lag" else 0 * mask.sum(2)
    assert seen[0].tolist() == ([0] * 4 if mode == "film" else [4] * 4 if encoder == "stacked" else [12] * 4)
    for b in range(2):
        for i in range(4):
            expected = 0
            for h in [vector[b, i], *(tokens[b, mask[b, i]] if mode == "lag" else [])]:
                mu, log_var = model.posterior.layers(h).chunk(2)
                q = torch.distributions.Normal(mu, (log_var / 2).exp())
                expected += torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum().item()
            assert abs(context.kl[b, i].item() - expected) < 1e-4 * expected
            mu, log_var = model.posterior.layers(vector[b, i]).chunk(2)
            assert torch.allclose(context.vector[b, i], mu + (log_var / 2).exp() * noise[b, i], atol=1e-5)
            assert torch.allclose(model.read(images, sees).vector[b, i], mu, atol=1e-5)


@pytest.mark.parametrize("encoder, mode", FLAVOURS)
def test_a_variational_context_is_its_mean_or_a_draw_of_its_own_for_every_image(encoder, mode, monkeypatch):
    model = tiny(encoder=encoder, mode_conditioning=mode, mode_context="variational", context_dropout=0.1)
    support, read, vectors = pictures(2, 3), model.read, []

    def spy(*args):
        vectors.append(read(*args).vector)
        return read(*args)

    monkeypatch.setattr(model, "read", spy)
    make = partial(fsdm.generate, model, support, 2, steps=3, guidance=2.0)
    mean, again, drawn, apart = make(), make(), make(draw_context=True), make(draw_context=True, batch_size=3)
    assert torch.equal(mean, again) and not torch.equal(mean, drawn)
    assert (apart.int() - drawn.int()).abs().max() <= 1
    assert torch.allclose(vectors[0][0], vectors[0][1], atol=1e-5)          # one set, two images
    reads = 2 if encoder == "image" else 1                  # of the support and of its views
    assert len(vectors) == 5 * reads
    for vector in vectors[2 * reads:3 * reads]:
        assert (vector[0] - vector[1]).abs().amin(1).max() > 1e-4
    with pytest.raises(ValueError, match="nothing to draw"):
        fsdm.generate(tiny(), support, 1, draw_context=True)


def test_views_are_the_support_and_the_same_turned_zoomed_and_moved():
    images = torch.full((2, 3, 1, 16, 16), 0.3)
    assert torch.allclose(fsdm.views_of(images), torch.full((2, 3 * fsdm.VIEWS, 1, 16, 16), 0.3))      # to the edge
    images[..., 7:9, 11:13] = -1                            # a dot right of the middle
    views = fsdm.views_of(images).unflatten(1, (fsdm.VIEWS, 3))
    assert torch.equal(views[:, 0], images) and (views >= -1).all() and (views <= 0.3001).all()
    place, ink = torch.arange(16) - 7.5, 0.3 - views[0, :, 0, 0]        # [VIEWS, 16, 16]
    centres = torch.stack([(ink.sum(1) @ place), (ink.sum(2) @ place)], 1) / ink.sum((1, 2))[:, None]
    for (degrees, zoom, move), found in zip(fsdm.TURNS, centres[1:]):
        wanted = centres[0] - move * 8                      # what is looked at moves the other way
        angle = math.radians(-degrees)
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        assert torch.allclose(found, turn @ wanted / zoom, atol=0.3), (degrees, found)


def test_a_sampler_sees_the_views_and_is_guided_while_there_is_more_noise_than_image(monkeypatch):
    model, seen = tiny(encoder="image", mode_conditioning="lag", context_dropout=0.1), []
    denoise = model.denoise

    def spy(x, t, alpha, sigma, context, guidance=1.0, colours=None):
        seen.append((alpha > sigma, context.mask.shape[2], guidance))
        return denoise(x, t, alpha, sigma, context, guidance, colours)

    monkeypatch.setattr(model, "denoise", spy)
    fsdm.generate(model, pictures(1, 3), 1, steps=6, guidance=2.0)
    tokens = 3 * (8 // model.config.encoder_patch_size) ** 2
    assert set(seen) == {(True, tokens, 1.0), (False, tokens * fsdm.VIEWS, 2.0)} and len(seen) == 6


def test_leave_one_out_drops_itself_always_and_others_as_asked():
    g, sets, others = fsdm.rng("cpu", 0, 1), 2000, ~torch.eye(6, dtype=torch.bool)
    assert torch.equal(fsdm.leave_one_out(sets, 6, g), others.expand(sets, 6, 6))
    sees = fsdm.leave_one_out(sets, 6, g, vary=True)
    assert not sees.diagonal(dim1=1, dim2=2).any() and set(sees.sum(2).unique().tolist()) == {1, 2, 3, 4, 5}
    assert 0.5 < (sees.sum(2) == 5).float().mean() < 0.7                    # all the others more than half the time
    share, mean = sees.float().mean(0)[others], sees.sum(2).float().mean() / 5
    spread = (mean * (1 - mean) / sets).sqrt()
    assert (share - mean).abs().max() < 4.5 * spread                        # no other image is preferred
    for vary in (False, True):
        assert 0.27 < (~fsdm.leave_one_out(sets, 6, g, vary, dropout=0.3).any(2)).float().mean() < 0.33


def test_under_lag_time_and_self_attention_reach_every_block():
    model = tiny(encoder="image", mode_conditioning="lag")
    context = model.read(torch.randn(1, 2, 3, 8, 8), torch.ones(1, 1, 2, dtype=torch.bool))
    x = torch.randn(1, 4, 24)
    early, late = (model.denoiser.time(fsdm.timestep_embedding(torch.tensor([t]))) for t in (10, 900))
    nudged = x.clone()
    nudged[0, 3] = torch.randn(24)                  # another token of the same image
    for block, keys_values in zip(model.denoiser.blocks, context.keys_values):
        before = block(x, early, keys_values, context.mask)
        assert not torch.allclose(before, block(x, late, keys_values, context.mask))
        assert (block(nudged, early, keys_values, context.mask) - before)[0, 0].abs().max() > 1e-4


# ---- Transformer parts.

def test_padded_head_dimensions_change_nothing():
    q, k, v = torch.randn(3, 2, 7, 3, 50, dtype=torch.float64)
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 50 ** 0.5).softmax(-1)
    assert torch.allclose(fsdm.attend(q, k, v), torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))


def test_joint_attention_is_attention_over_the_own_tokens_and_those_seen():
    """Two sets of three targets with four tokens each; five tokens of context a set."""
    attention = fsdm.Attention(24, 3, context_width=10).double()
    x, tokens = torch.randn(6, 4, 24).double(), torch.randn(2, 5, 10).double()
    sees = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    out = attention(x, attention.keys_values(tokens), sees)
    for b in range(2):
        for i in range(3):
            q, k, v = attention.qkv(x[3 * b + i]).unflatten(1, (3, 3, 8)).unbind(1)
            more = attention.context_kv(tokens[b, sees[b, i]]).unflatten(1, (2, 3, 8)).unbind(1)
            k, v = torch.cat([k, more[0]]), torch.cat([v, more[1]])
            weights = (torch.einsum("nhd,mhd->hnm", q, k) / 8 ** 0.5).softmax(2)
            expected = attention.out(torch.einsum("hnm,mhd->nhd", weights, v).flatten(1))
            assert torch.allclose(out[3 * b + i], expected, atol=1e-12)


def test_a_block_that_sees_no_context_token_is_the_block_without_context():
    block = opened(fsdm.DiTBlock(24, 3, 48, context_width=10))
    x, c, keys_values = torch.randn(4, 9, 24), torch.randn(4, 24), block.attention.keys_values(torch.randn(2, 5, 10))
    none, all_ = torch.zeros(2, 2, 5, dtype=torch.bool), torch.ones(2, 2, 5, dtype=torch.bool)
    assert torch.allclose(block(x, c, keys_values, none), block(x, c), atol=1e-5)
    assert not torch.allclose(block(x, c, keys_values, all_), block(x, c), atol=1e-2)


def test_the_convolution_in_front_of_a_block_mixes_the_neighbours_of_each_channel():
    block = opened(fsdm.DiTBlock(6, 3, 12, depthwise_conv=True))
    x, c = torch.randn(2, 16, 6), torch.randn(2, 6)
    grid = F.pad(x.reshape(2, 4, 4, 6), (0, 0, 1, 1, 1, 1))                         # rows and columns of tokens
    around = sum(grid[:, i:i + 4, j:j + 4] * block.local.weight[:, i, j] for i in range(3) for j in range(3))
    mixed = x + around.flatten(1, 2) + block.local.bias
    plain = fsdm.DiTBlock(6, 3, 12)
    plain.load_state_dict({name: p for name, p in block.state_dict().items() if not name.startswith("local.")})
    assert torch.allclose(block(x, c), plain(mixed, c), atol=1e-5)


def test_fourier_features_show_faint_noise_and_weigh_nothing_at_first():
    dit, seen = FSDM(Config(**TINY, fourier_features=True)).denoiser, []
    dit.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].unflatten(2, (7, 48))))
    for x in (0.3, 0.3 + 1 / 64):
        dit(torch.full((1, 1, 3, 8, 8), x), torch.zeros(1, 1, dtype=torch.long))
    first, second = (features[0, 0, :, 0] for features in seen)                     # x, then sine, cosine, sine, ...
    waves = [wave(2 ** k * math.pi * 0.3) for k in (2, 4, 6) for wave in (math.sin, math.cos)]
    assert torch.allclose(first, torch.tensor([0.3, *waves]), atol=1e-4)
    assert torch.allclose(second[5:], -first[5:], atol=1e-4)                        # two levels flip the last pair
    assert dit.embed.weight[:, :48].any() and not dit.embed.weight[:, 48:].any()


def test_a_patch_and_the_finer_patches_in_it_have_the_most_similar_positions():
    coarse, fine = fsdm.position_table(4, 64), fsdm.position_table(16, 64)
    place = (coarse @ fine.T).argmax(1)
    assert (place // 16 // 4 * 4 + place % 16 // 4).tolist() == list(range(16))


@pytest.mark.parametrize("encoder", fsdm.ENCODERS)
def test_an_encoder_knows_where_a_patch_lies(encoder):
    model, image, sees = tiny(encoder=encoder), torch.randn(1, 1, 3, 8, 8), torch.ones(1, 1, 1, dtype=torch.bool)
    turned = image.roll(4, dims=3)                                                  # the same four patches
    a, b = (model.encoder(i, sees)[0] for i in (image, turned))
    assert (a - b).abs().max() > 1e-2


def dits_own_block(x, c, weights, heads, eps):
    """models.py of Peebles and Xie with timm's Attention and Mlp; its norms have no weights."""
    B, N, D = x.shape
    linear = lambda h, name: F.linear(h, weights[f"{name}.weight"], weights[f"{name}.bias"])
    modulate = lambda h, shift, scale: h * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    norm = lambda h: F.layer_norm(h, (D,), eps=eps)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = linear(F.silu(c), "ada").chunk(6, dim=1)
    h = modulate(norm(x), shift_msa, scale_msa)
    q, k, v = linear(h, "attention.qkv").reshape(B, N, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
    h = (q * (D // heads) ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    x = x + gate_msa.unsqueeze(1) * linear(h.transpose(1, 2).reshape(B, N, D), "attention.out")
    h = modulate(norm(x), shift_mlp, scale_mlp)
    return x + gate_mlp.unsqueeze(1) * linear(F.gelu(linear(h, "mlp.0"), approximate="tanh"), "mlp.2")


def without_norm_biases(module):
    """Norms whose weights are 1 and whose biases are 0, as DiT's, which have none."""
    for norm in module.modules():
        if isinstance(norm, torch.nn.LayerNorm):
            norm.bias.data.zero_()
    return module


def test_a_block_is_dits_own():
    torch.manual_seed(0)
    block = without_norm_biases(opened(fsdm.DiTBlock(24, 3, 96))).double()
    x, c = 0.01 * torch.randn(2, 9, 24).double(), torch.randn(2, 24).double()       # so faint that eps counts
    theirs, coarser = (dits_own_block(x, c, dict(block.named_parameters()), 3, eps) for eps in (1e-6, 1e-5))
    assert (block(x, F.silu(c)) - theirs).abs().max() < 1e-9 and (theirs - coarser).abs().max() > 1e-3


def test_the_denoiser_is_dits_own_with_the_context_in_place_of_a_label():
    model = without_norm_biases(tiny(encoder="image", mode_conditioning="film", diffusion_steps=1000).denoiser)
    x, t, vector = torch.randn(1, 2, 3, 8, 8), torch.tensor([[3, 700]]), torch.randn(1, 2, 24)
    angles = t[0, :, None] * 10_000 ** (-torch.arange(128) / 128)
    c = model.time(torch.cat([angles.cos(), angles.sin()], 1)) + model.project(vector[0])
    tokens = x[0].reshape(2, 3, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(2, 4, 48)
    h = model.embed(tokens) + model.pos
    for block in model.blocks:
        h = dits_own_block(h, c, dict(block.named_parameters()), 3, 1e-6)
    shift, scale = model.ada(F.silu(c)).chunk(2, dim=1)
    h = model.out(F.layer_norm(h, (24,), eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))
    theirs = h.reshape(2, 2, 2, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(1, 2, 3, 8, 8)
    nothing = torch.zeros(1, 2, 0, dtype=torch.bool)
    assert (model(x, t, fsdm.Context(vector, [None] * 2, nothing, None)) - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("denoiser", ("dit", "conv"))
def test_times_are_shares_of_T(denoiser):
    """Of 250 steps, time t is what 4 t is of 1000: weights trained with one T mean the same with another."""
    short, long = (tiny(denoiser=denoiser, encoder="none", diffusion_steps=T).denoiser for T in (250, 1000))
    long.load_state_dict(short.state_dict())
    x, t = torch.randn(1, 3, 3, 8, 8), torch.tensor([[1, 60, 249]])
    assert torch.allclose(short(x, t), long(x, 4 * t), atol=1e-5)
    assert (short(x, t) - long(x, t)).abs().amax((0, 2, 3, 4)).min() > 1e-3


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
@pytest.mark.parametrize("steps", (1, 7, 19, 20, 40, 250))
def test_a_denoiser_that_knows_the_image_gets_it_back_in_exactly_as_many_steps(sampler, steps):
    image, alpha_bar, seen = torch.randn(4, 5).double(), fsdm.linear_schedule(250), []

    def denoise(x, *level):
        seen.append(level)
        return image

    draw = lambda: torch.randn(4, 5).double()
    assert torch.allclose(fsdm.SAMPLERS[sampler](denoise, draw(), alpha_bar, steps, draw), image, atol=1e-9)
    times, alpha, sigma = np.array(seen).T
    assert len(seen) == steps and times[0] == 249 and (np.diff(times) < 0).all() and (steps == 1 or times[-1] == 0)
    assert np.allclose(alpha ** 2 + sigma ** 2, 1)
    log_snr = alpha_bar.logit().numpy() / 2                                 # of the trained times; others lie between
    assert np.allclose(np.log(alpha / sigma), np.interp(times, np.arange(250), log_snr))


def test_levels_are_even_in_time_or_in_the_logarithm_of_alpha_over_sigma():
    alpha_bar = fsdm.cosine_schedule(250)
    assert np.diff([t for t, _, _ in fsdm.even_times(alpha_bar, 84)]).tolist() == [-3] * 83
    levels, h = fsdm.even_log_snr(alpha_bar, 84)
    assert np.allclose(np.diff([math.log(alpha / sigma) for _, alpha, sigma in levels]), h)
    assert len(fsdm.even_log_snr(alpha_bar, 400)[0]) == 400                 # which has room between the trained times
    with pytest.raises(ValueError, match="at most 250"):
        fsdm.even_times(alpha_bar, 251)


def gaussian(spread):
    """The exact denoiser of data from N(0, spread^2)."""
    return lambda x, t, alpha, sigma: alpha * spread ** 2 / (alpha ** 2 * spread ** 2 + sigma ** 2) * x


def flow_error(name, steps, alpha_bar, spread=0.5):
    """Root mean square distance of what a sampler makes from the end of the probability flow of N(0, spread^2), which
    keeps x in proportion to its own standard deviation."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).double()
    first, last = (alpha_bar[[-1, 0]] * spread ** 2 + 1 - alpha_bar[[-1, 0]]).sqrt()
    a = alpha_bar[0]
    end = gaussian(spread)(x * last / first, 0, a.sqrt(), (1 - a).sqrt())
    made = fsdm.SAMPLERS[name](gaussian(spread), x, alpha_bar, steps, None)
    return (made - end).square().mean().sqrt()


@pytest.mark.parametrize("steps, schedule", [(37, "linear"), (60, "cosine"), (110, "linear")])
def test_deterministic_samplers_follow_the_probability_flow(steps, schedule):
    """In steps that do not divide T."""
    alpha_bar = fsdm.SCHEDULES[schedule](250)
    ddim, second = (flow_error(name, steps, alpha_bar) for name in ("ddim", "2m"))
    assert ddim < 0.04 and second < ddim / 3


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("2m", 2)])
def test_the_order_of_a_sampler_is_that_of_its_paper(sampler, order):
    """Half the step leaves 1 / 2^order of the error: DDIM is Euler's method, 2M uses the denoiser's last answer too."""
    alpha_bar = fsdm.linear_schedule(4000)
    errors = [flow_error(sampler, steps, alpha_bar) for steps in (81, 161, 321)]
    for coarse, fine in zip(errors, errors[1:]):
        assert abs(math.log2(coarse / fine) - order) < 0.15


def units(count=300):
    """A draw() that gives one axis of a space after another: what a linear sampler makes of them has the standard
    deviation of its images for a norm, exactly."""
    axes = iter(torch.eye(count, dtype=torch.float64))
    return lambda: next(axes)


@pytest.mark.parametrize("steps", (100, 250))
def test_ancestral_sampling_has_the_variance_of_the_data(steps):
    alpha_bar, s, draw = fsdm.linear_schedule(250), 0.5, units()
    made = fsdm.SAMPLERS["ddpm"](gaussian(s), draw(), alpha_bar, steps, draw)
    # each step draws from q(x_next | x_t, x0) with the denoiser's x0 (DDPM eq. 6 and 7): the variance step by step
    times, variance = [t for t, _, _ in fsdm.even_times(alpha_bar, steps)], 1.0
    for t, n in zip(times, times[1:]):
        a, b = alpha_bar[t], alpha_bar[n]
        beta = 1 - a / b
        gain = a.sqrt() * s ** 2 / (a * s ** 2 + 1 - a) * b.sqrt() * beta / (1 - a) + (a / b).sqrt() * (1 - b) / (1 - a)
        variance = gain ** 2 * variance + (1 - b) / (1 - a) * beta
    a = alpha_bar[times[-1]]
    expected = variance ** 0.5 * a.sqrt() * s ** 2 / (a * s ** 2 + 1 - a)
    assert abs(made.norm() / expected - 1) < 1e-9 and abs(expected / s - 1) < 0.1


@pytest.mark.parametrize("schedule", fsdm.SCHEDULES)
def test_stochastic_2m_keeps_the_variance_of_the_data_and_in_few_steps_far_better_than_ddpm(schedule):
    alpha_bar, s = fsdm.SCHEDULES[schedule](1000), 0.5

    def off(name, steps):
        draw = units()
        return abs(fsdm.SAMPLERS[name](gaussian(s), draw(), alpha_bar, steps, draw).norm() / s - 1)

    assert off("2m_sde", 20) < off("ddpm", 20) / 3 and off("2m_sde", 40) < off("2m_sde", 20) / 2
    assert off("2m_sde", 100) < 0.003


def test_ddpm_beta_is_vfsddpms_sampler():
    """DDPM's algorithm 2 with beta for the variance."""
    alpha_bar = fsdm.linear_schedule(1000)
    alphas = alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]]).double()
    guess = lambda x, t: (x * (1 + t / 1000)).tanh()                        # any network's noise
    draws = lambda: (g := torch.Generator().manual_seed(0)) and (lambda: torch.randn(2, 3, generator=g).double())
    draw = draws()
    x = start = draw()
    for t in range(999, -1, -1):
        x = (x - (1 - alphas[t]) / (1 - alpha_bar[t]) ** 0.5 * guess(x, t)) / alphas[t] ** 0.5
        x = x + (1 - alphas[t]) ** 0.5 * draw() if t > 0 else x
    draw = draws()
    draw()
    x0 = lambda x, t, alpha, sigma: (x - sigma * guess(x, t)) / alpha
    assert torch.allclose(fsdm.SAMPLERS["ddpm_beta"](x0, start, alpha_bar, 1000, draw), x, rtol=1e-8)


@pytest.mark.parametrize("name", fsdm.PREDICTIONS)
def test_the_clean_image_of_the_right_output_is_the_clean_image(name):
    prediction, (x0, noise) = fsdm.PREDICTIONS[name], torch.randn(2, 50).double()
    for alpha_bar in (1e-4, 0.3, 0.9999):
        alpha, sigma = alpha_bar ** 0.5, (1 - alpha_bar) ** 0.5
        target = prediction.target(x0, noise, alpha, sigma)
        assert torch.allclose(prediction.to_x0(alpha * x0 + sigma * noise, target, alpha, sigma), x0, atol=1e-9)


@pytest.mark.parametrize("prediction", fsdm.PREDICTIONS)
def test_the_right_output_has_no_loss_and_gives_the_clean_image_back(prediction):
    model = tiny(prediction=prediction, encoder="none", schedule="cosine")
    images, noise, t = pictures(4, 1), torch.randn(4, 1, 3, 8, 8), torch.full((4, 1), 25)
    x0, a = fsdm.to_signal(images), model.alpha_bar[25].item()
    alpha, sigma = a ** 0.5, (1 - a) ** 0.5
    answer = noise if prediction == "noise" else alpha * noise - sigma * x0
    model.denoiser.forward = lambda x, t, context: answer
    error, kl = model(images, None, t, noise)
    assert error.max() < 1e-12 and error.shape == (4, 1) and not kl.any()
    assert torch.allclose(model.denoise(alpha * x0 + sigma * noise, 25, alpha, sigma, None), x0, atol=1e-4)


def test_the_context_of_a_loss_may_come_from_other_images():
    model, t, noise = tiny(encoder="image"), torch.full((1, 4), 20), torch.randn(1, 4, 3, 8, 8)
    images, other, sees = pictures(1, 4), pictures(1, 4), ~torch.eye(4, dtype=torch.bool)[None]
    a = model.alpha_bar[20]
    x_t = a.sqrt() * fsdm.to_signal(images) + (1 - a).sqrt() * noise
    out = model.denoiser(x_t, t, model.read(fsdm.to_signal(other), sees))
    error = model(images, sees, t, noise, support=other)[0]
    assert torch.allclose(error, (out - noise).square().mean((2, 3, 4)), rtol=1e-4)
    assert not torch.allclose(error, model(images, sees, t, noise)[0], rtol=1e-3)


def test_signals_and_bytes_are_each_others_inverse_and_what_lies_between_is_rounded():
    levels = torch.arange(256)
    signal = fsdm.to_signal(levels.byte())
    assert signal[0] == -1 and signal[255] == 1 and torch.equal(fsdm.to_bytes(signal), levels.byte())
    for off in (-0.4, 0.4):
        assert torch.equal(fsdm.to_bytes(signal + off / 127.5), levels.byte())
    assert fsdm.to_bytes(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


def test_an_image_is_the_same_at_every_batch_size_and_whatever_comes_after_it():
    model, support = tiny(encoder="image", mode_conditioning="lag", context_dropout=0.1), pictures(3, 2)
    for sampler in fsdm.SAMPLERS:
        make = partial(fsdm.generate, model, sampler=sampler, steps=6, guidance=2.0)
        together = make(support, 4, seed=5)
        assert (together.int() - make(support, 4, seed=5, batch_size=5).int()).abs().max() <= 1
        assert (together[:1, :3].int() - make(support[:1], 3, seed=5).int()).abs().max() <= 1
        assert not torch.equal(together, make(support, 4, seed=6))
        same = make(support[:1].expand(3, -1, -1, -1, -1), 4, seed=5)               # one support three times
        assert len(same.flatten(0, 1).unique(dim=0)) == 12


def test_a_model_without_encoder_minds_no_patches_of_one():
    assert Config(encoder="none", image_size=28, patch_size=4, encoder_patch_size=8).image_size == 28
    with pytest.raises(ValueError, match="encoder_patch_size 8 does not divide"):
        Config(encoder="image", image_size=28, patch_size=4, encoder_patch_size=8)


def test_guidance_leads_away_from_the_empty_support():
    model = tiny(encoder="image", mode_conditioning="lag", context_dropout=0.1)
    x, support = torch.randn(1, 1, 3, 8, 8) / 4, torch.randn(1, 3, 3, 8, 8)
    given, none = torch.ones(1, 1, 3, dtype=torch.bool), torch.zeros(1, 1, 3, dtype=torch.bool)
    a, b = (model.denoiser(x, torch.full((1, 1), 9.5), model.read(support, sees)) for sees in (given, none))
    context = model.read(support, torch.cat([given, none], 1))
    x0, empty = (((x - 0.8 * out) / 0.6) for out in (a, b))
    for guidance, wanted in ((1, x0), (1.7, fsdm.guide(x0, empty, 1.7, fsdm.Colours()))):
        made = model.denoise(x, 9.5, 0.6, 0.8, context, guidance)
        assert torch.allclose(made, wanted.clamp(-1.05, 1.05), atol=1e-5)
    for untrained in (tiny(encoder="image"), tiny(encoder="none", context_dropout=0.1)):
        with pytest.raises(ValueError, match="not trained for it"):
            fsdm.generate(untrained, pictures(1, 1), 1, guidance=2.0)


def test_what_is_guided_keeps_to_the_colours_of_the_support_and_to_a_contrast():
    given, empty, support = torch.randn(3, 2, 4, 3, 8, 8).double()
    support[1] += 0.5 - support[1].mean((2, 3), keepdim=True)                       # means that leave no room
    given, empty, colours = given[:, :1], empty[:, :1], fsdm.colours_of(support)
    means = support.mean((3, 4))
    spread = (support - means[..., None, None]).std((2, 3, 4)).mean(1, keepdim=True)
    for guidance in (2.0, 5.0):
        made, line = fsdm.guide(given, empty, guidance, colours), empty + guidance * (given - empty)
        wanted = line.mean((3, 4))[:, 0].clamp(means.amin(1), means.amax(1))
        assert torch.allclose(made.mean((3, 4))[:, 0], wanted) and (wanted[1] - 0.5).abs().max() < 1e-9
        made, line = (part - part.mean((3, 4), keepdim=True) for part in (made, line))
        assert torch.allclose(F.normalize(made, dim=(2, 3, 4)), F.normalize(line, dim=(2, 3, 4)))
        assert torch.allclose(made.std((2, 3, 4)), 1.2 * spread)


def test_samples_keep_to_the_colours_of_their_support(monkeypatch):
    model, support = tiny(encoder="image", context_dropout=0.1), pictures(3, 2) // 4 + 90          # 90 .. 153
    support[1], support[2, :, 0] = 77, 40
    asked = []
    denoise = model.denoise
    monkeypatch.setattr(model, "denoise", lambda *args, **how: asked.append(denoise(*args, **how)) or asked[-1])
    made = fsdm.generate(model, support, 4, steps=5)
    for channel, shown in zip(made.unbind(2), support.unbind(2)):
        assert (channel.amin((1, 2, 3)) >= shown.amin((1, 2, 3))).all()
        assert (channel.amax((1, 2, 3)) <= shown.amax((1, 2, 3))).all()
    assert (made[1] == 77).all() and (made[2, :, 0] == 40).all()                    # of one colour: nothing else
    beyond = torch.cat(asked).unflatten(0, (5, 3, 4))[:, 0]                         # of the first support, in signals
    assert beyond.amin() >= (90 - 2) / 127.5 - 1 and beyond.amax() <= (153 + 2) / 127.5 - 1
    assert beyond[-1].amin() < 90 / 127.5 - 1                                       # a little is left to repair
    free = tiny(encoder="none")
    assert torch.equal(fsdm.generate(free, support, 4, steps=5), fsdm.generate(free, pictures(3, 2), 4, steps=5))


def test_one_ink_on_one_paper_gives_no_third_colour():
    paper, ink, other = (torch.tensor(colour)[:, None, None] for colour in ((240.0, 235, 200), (30, 60, 160), (90, 20, 10)))
    support = (paper + torch.rand(3, 2, 1, 8, 8) * (ink - paper)).round()
    support[2, :, :, :4] = other                                                    # of a third one: a third
    across = F.normalize((ink - paper).flatten(), dim=0)

    def off(images):                                        # [2, n, C, H, W] -> the largest distance to the line, in levels
        away = (images[:2].float() - paper).movedim(2, -1)
        return (away - (away @ across)[..., None] * across).norm(dim=-1).max()

    anything = torch.randn(3, 4, 3, 8, 8)
    clipped = (fsdm.clip(anything, fsdm.colours_of(fsdm.to_signal(support))) + 1) * 127.5
    assert off(clipped) < 2 < 20 < off((anything.clamp(-1, 1) + 1) * 127.5)
    made = fsdm.generate(tiny(encoder="image", context_dropout=0.1), support.byte(), 4, steps=5)
    assert off(made) < 12 and made[:2].float().std((1, 3, 4)).min() > 10            # settled by 6 levels at most
    assert (clipped[2] - other).norm(dim=1).min() < 20


@pytest.mark.parametrize("low, high, levels, settled", (
    (100, 150, [90, 99, 100, 105, 108, 113, 125, 141, 145, 170], [100, 100, 100, 100, 104, 113, 125, 144, 150, 150]),
    (0, 255, [-3, 5, 7, 244, 248, 250, 260], [0, 0, 2, 245, 253, 255, 255]),
    (80, 84, [79, 81, 83, 90], [80, 80, 84, 84]),                                   # hardly any contrast
    (80, 80, [70, 80, 90], [80, 80, 80])))
def test_faint_stains_on_paper_and_ink_settle_and_nothing_moves_far(low, high, levels, settled):
    levels, low, high = (torch.tensor(values) / 127.5 - 1 for values in (levels, low, high))
    assert fsdm.to_bytes(fsdm.settle(levels, fsdm.Colours(low, high))).tolist() == settled
    assert fsdm.to_bytes(fsdm.settle(torch.tensor([-1.1, -0.98, 0.5, 0.98]), fsdm.Colours())).tolist() == [0, 0, 191, 255]


@pytest.mark.parametrize("fields, best", [(dict(context_dropout=0.1), 3.0), (dict(), 1.0),
                                          (dict(context_dropout=0.1, encoder="none"), 1.0)])
def test_guidance_left_out_is_3_where_the_model_was_trained_without_support_now_and_then(fields, best):
    model, support = tiny(**{"encoder": "image", **fields}), pictures(1, 2)
    made = fsdm.generate(model, support, 2, steps=4)
    assert fsdm.best_guidance(model.config) == best
    assert torch.equal(made, fsdm.generate(model, support, 2, steps=4, guidance=best))
    if best > 1:
        assert not torch.equal(made, fsdm.generate(model, support, 2, steps=4, guidance=1.0))


def test_randomness_is_a_function_of_its_whole_address():
    draws = {tuple(torch.rand(2, generator=fsdm.rng("cpu", *a)).tolist())
             for a in ((0, 1), (1, 0), (0, 1, 0), (0, 1, 1), (2 ** 40, 1), (0, 2, 1))}
    assert len(draws) == 6
    assert torch.equal(*(torch.rand(3, generator=fsdm.rng("cpu", 7, 3, 99)) for _ in range(2)))


# ---- Data.

def test_glyphs_are_what_they_promise():
    data = fsdm.load_data("glyphs", None, 8, 3)
    sizes = {part: len(split.names) for part, split in data.items()}
    assert sizes["train"] >= 500 and sizes["val"] >= 50 and sizes["test"] >= 50
    names = [name for split in data.values() for name in split.names]
    assert len(set(names)) == len(names)
    images, labels, *_ = fsdm.glyphs(None, 32, False, classes=(60, 20, 20))
    again = fsdm.glyphs(None, 32, False, classes=(20, 5, 5))[0]
    assert images.dtype == np.uint8 and images.shape == (len(labels), 32, 32, 3)
    assert np.array_equal(again, images[:len(again)])                               # a class is always the same
    images = images.reshape(100, -1, 32, 32, 3).astype(float)
    within = np.square(images - images.mean(1, keepdims=True)).mean()
    between = np.square(images.mean(1) - images.mean((0, 1))).mean()
    assert 50 < within < between                                                    # redrawn, and recognisable


def test_sets_are_of_one_class_and_hold_no_image_twice():
    labels = np.repeat(np.arange(5), [6, 9, 7, 30, 6])
    images = labels.astype(np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2)
    split = fsdm.read_split(images, labels, list("abcde"), [0, 1, 3, 4], 2, 1)
    assert split.names == list("abde") and split.largest == 30
    classes, _ = fsdm.draw_classes(split, 400, fsdm.rng("cpu", 0, 0))
    index = fsdm.draw_sets(split, classes, 6, fsdm.rng("cpu", 0, 1))
    assert all(len(set(row.tolist())) == 6 for row in index)
    drawn = split.images[index][..., 0, 0, 0]                                       # the pixel is the class
    assert torch.equal(drawn.long(), torch.tensor([0, 1, 3, 4])[classes][:, None].expand(-1, 6))
    assert len(index.unique()) == len(split.images)                                 # every image has its turn

    support, names = fsdm.draw_support(split, 6, 5, 0, fsdm.SETS)
    assert support.shape == (6, 5, 1, 2, 2) and set(names[:4]) == set("abde")       # other classes while they last
    assert all((support[s] == "abcde".index(name)).all() for s, name in enumerate(names))


@pytest.mark.parametrize("count", (2, 3, 7))
def test_a_class_is_paired_with_every_other_and_never_with_itself(count):
    split = fsdm.Split(None, torch.arange(count + 1), list(range(count)), 1)
    own, other = fsdm.draw_classes(split, 3000, fsdm.rng("cpu", 0, 0))
    pairs = torch.zeros(count, count).index_put_((own, other), torch.ones(3000), accumulate=True)
    assert not pairs.diagonal().any()
    expected = 3000 / (count * (count - 1))
    assert (pairs[~torch.eye(count, dtype=torch.bool)] - expected).abs().max() < 4.5 * expected ** 0.5


def test_the_only_class_is_its_own_other():
    split = fsdm.Split(None, torch.tensor([0, 9]), ["a"], 9)
    assert [classes.tolist() for classes in fsdm.draw_classes(split, 3, fsdm.rng("cpu", 0))] == [[0] * 3] * 2


def test_fc100_holds_whole_superclasses_out():
    assert len(set(fsdm.FC100_TEST)) == len(set(fsdm.FC100_VAL)) == 20
    assert not set(fsdm.FC100_TEST) & set(fsdm.FC100_VAL)
    held_out = {"dolphin": "test", "butterfly": "test", "skunk": "test", "woman": "test",
                "tiger": "val", "camel": "val", "lobster": "val", "squirrel": "val", "rose": "train", "bus": "train"}
    assert fsdm.split_fc100(list(held_out)).tolist() == list(held_out.values())


def test_omniglots_last_97_background_characters_validate():
    parts = fsdm.split_background(np.arange(1623) >= 964)
    assert parts.tolist() == ["train"] * 867 + ["val"] * 97 + ["test"] * 659


def test_a_split_by_name_depends_on_nothing_else():
    names = [f"class {i}" for i in range(50)]
    parts = fsdm.split_by_name(names).tolist()
    assert [parts.count(name) for name in ("train", "val", "test")] == [35, 5, 10]
    assert fsdm.split_by_name(names[::-1]).tolist() == parts[::-1]


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


def redness(name):
    return ord(name[-1]) % 12 * 20                                                  # another one for each of a .. l


def draw_folder(root, classes, images=3, size=(40, 30)):
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", size, (redness(name), i * 40, 0)).save(root / name / f"Image {i}.PNG")


def test_evaluation_classes_marked_by_numbers_are_never_trained_on(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((30, 8, 8), np.uint8),
             labels=np.arange(30, dtype=np.uint64) // 2, class_names=np.arange(15), class_is_evaluation=np.array([0] * 12 + [1] * 3))
    data = fsdm.load_data(str(tmp_path / "a.npz"), None, 8, 1)
    assert [len(split.names) for split in data.values()] == [10, 2, 3] and data["test"].names == ["12", "13", "14"]


def test_a_folder_of_class_folders_is_split_by_name(tmp_path):
    draw_folder(tmp_path, [f"Klasse {c} äö" for c in range(6)])
    (tmp_path / "Klasse 0 äö" / ".hidden").mkdir()                                  # as notebooks leave them
    Image.new("RGB", (9, 9)).save(tmp_path / "Klasse 0 äö" / ".hidden" / "again.png")
    data = fsdm.load_data(str(tmp_path), None, 16, 3)
    assert [s.images.shape for s in data.values()] == [(n, 3, 16, 16) for n in (12, 3, 3)]
    assert [len(s.names) for s in data.values()] == [4, 1, 1]
    assert list(fsdm.load_data(str(tmp_path), None, 16, 3, parts=["test"])) == ["test"]


def classes_of(root):
    """-> {part: its class names}, where every image has been checked to be of its class."""
    data = fsdm.load_data(str(root), None, 16, 3)
    for split in data.values():
        red = torch.tensor([redness(name) for name in split.names], dtype=torch.uint8)
        assert torch.equal(split.images[:, 0, 8, 8], red.repeat_interleave(split.offsets.diff()))
    return {part: split.names for part, split in data.items()}


@pytest.mark.parametrize("train, val, test", [("train", "val", "test"), ("train", "valid", "test"),
                                              ("Training", "validation", "TEST")])
@pytest.mark.parametrize("tops", ([], ["archive"], ["archive", "my data"]))
def test_a_folder_keeps_its_own_parts_under_any_number_of_folders_too_many(tmp_path, capsys, train, val, test, tops):
    draw_folder(tmp_path.joinpath(*tops), [f"{train}/a", f"{train}/b", f"{val}/c", f"{test}/d"])
    assert classes_of(tmp_path) == dict(train=["a", "b"], val=["c"], test=["d"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said[-3:]] == ["train", "val", "test"]
    guessed = [line.split(" holds one folder only: the classes are taken to be those in ")[1] for line in said[:-3]]
    assert guessed == [str(tmp_path.joinpath(*tops[:i + 1])) for i in range(len(tops))]


def test_one_folder_too_many_on_top_of_class_folders_is_said(tmp_path, capsys):
    draw_folder(tmp_path / "photos", "abcde")
    assert sorted(sum(classes_of(tmp_path).values(), [])) == list("abcde")
    assert "the classes are taken to be those in" in capsys.readouterr().out


def test_without_a_test_folder_there_are_no_test_classes(tmp_path, capsys):
    draw_folder(tmp_path, ["train/a", "train/b", "val/c", "rest/d"])
    assert classes_of(tmp_path) == dict(train=["a", "b"], val=["c"], test=[])
    said = capsys.readouterr().out
    assert "left out is ['rest']" in said and "test: 0 images of 0 classes" in said


def test_without_a_val_folder_a_tenth_of_the_training_classes_validates(tmp_path, capsys):
    draw_folder(tmp_path, [*(f"train/{c}" for c in "cdefghijkl"), "test/a", "test/b"], images=1)
    found = classes_of(tmp_path)
    assert len(found["val"]) == 1 and sorted(found["train"] + found["val"]) == list("cdefghijkl")
    assert found["test"] == ["a", "b"] and "has no val/: a tenth of the classes" in capsys.readouterr().out


def test_parts_that_share_classes_are_put_together_and_split_by_name(tmp_path, capsys):
    """The layout of ImageFolder, whose parts hold other images of the same classes."""
    draw_folder(tmp_path, [f"{part}/{c}" for part in ("train", "val") for c in "abcde"])
    by_name = fsdm.split_by_name(list("abcde"))
    assert classes_of(tmp_path) == {part: [c for c, its in zip("abcde", by_name) if its == part]
                                    for part in ("train", "val", "test")}
    data = fsdm.load_data(str(tmp_path), None, 16, 3)
    assert all((split.offsets.diff() == 6).all() for split in data.values())        # three of train, three of val
    assert "parts share classes" in capsys.readouterr().out


def test_a_class_may_be_named_train(tmp_path):
    draw_folder(tmp_path, ["train", "bus", "tram", "ship"])
    data = fsdm.load_data(str(tmp_path), None, 16, 3)
    assert sorted(name for s in data.values() for name in s.names) == ["bus", "ship", "train", "tram"]


def test_a_class_may_have_a_name_of_any_bytes(tmp_path):
    draw_folder(tmp_path, ["a", "b", "ü", os.fsdecode(b"\xff")])
    assert sum(len(split.names) for split in fsdm.load_data(str(tmp_path), None, 8, 3).values()) == 4


def test_more_images_than_memory_holds_are_one_sentence(monkeypatch):
    def empty(*shape, **_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(OSError, match="12 images of 8 x 8 pixels do not fit into memory: lower --image_size"):
        fsdm.read_split([None] * 12, np.zeros(12, int), ["a"], [0], 8, 3)


def test_unreadable_files_are_left_out_and_named(tmp_path, capsys):
    draw_folder(tmp_path, "abcde")
    (tmp_path / "b" / "Image 0.PNG").write_text("no image")
    (tmp_path / "d" / "cut.jpg").write_bytes(b"")
    found = classes_of(tmp_path)
    said = capsys.readouterr().out
    assert sorted(sum(found.values(), [])) == list("abcde")
    assert str(tmp_path / "b" / "Image 0.PNG") in said and str(tmp_path / "d" / "cut.jpg") in said
    data = fsdm.load_data(str(tmp_path), None, 16, 3)
    counts = {name: n for s in data.values() for name, n in zip(s.names, s.offsets.diff().tolist())}
    assert counts == dict(a=3, b=2, c=3, d=3, e=3)
    with pytest.raises(ValueError, match="class 'b' has 2 readable images"):
        fsdm.check_data(data, 3)


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
    assert corner(rgb.convert("L"), 1) == [76] and corner(tmp_path / "turned.png") == [0, 255, 255]


def test_16_bit_grey_is_scaled_by_257_and_rounded_whatever_the_file_holds(tmp_path):
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(deep).save(tmp_path / "all.png")
    Image.fromarray(np.full((9, 9), 250, np.uint16)).save(tmp_path / "dark.tif")    # not 250, as if it had 8 bits
    for source in (deep, tmp_path / "all.png"):
        assert np.array_equal(fsdm.to_picture(source, 256, 1)[0], np.rint(deep / 257))
    assert (fsdm.to_picture(tmp_path / "dark.tif", 8, 3) == 1).all()


@pytest.mark.parametrize("pixels", (np.full((9, 9), 0.5, np.float32), np.full((9, 9), 65536, np.int32),
                                    np.full((9, 9), -1, np.int32)))
def test_pixels_of_no_known_range_are_refused(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="a.tif cannot be read as an image: .*no known range"):
        fsdm.to_picture(tmp_path / "a.tif", 8, 1)


def test_an_array_that_claims_more_than_memory_is_refused(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_2_0(header, dict(descr="|u1", fortran_order=False, shape=(2 ** 40, 8, 8)))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("images.npy", header.getvalue() + b"few")
    with pytest.raises(ValueError, match="a.npz cannot be read"):
        fsdm.load_data(str(tmp_path / "a.npz"), None, 8, 1)


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
    for name, change in dict(deep=dict(depth=10 ** 9), words=dict(depth="6"),
                             many=dict(image_size=8192, patch_size=1, depth=512)).items():
        torch.save(dict(state, config=dict(state["config"], **change)), tmp_path / f"{name}.pt")
    for name, tensor in dict(expanded=torch.zeros(1).expand(24, 256), turned=torch.zeros(256, 24).T).items():
        wide = dict(state["ema"], **{"denoiser.time.0.weight": tensor})             # a byte could claim a terabyte
        torch.save(dict(state, ema=wide), tmp_path / f"{name}.pt")
    for name in ("shape", "code", "deep", "words", "many", "expanded", "turned"):
        with pytest.raises(ValueError, match="is not a checkpoint of this program"):
            fsdm.load_model(tmp_path / f"{name}.pt")
    with pytest.raises(OSError, match="nothing.pt"):
        fsdm.load_model(tmp_path / "nothing.pt")


def test_a_free_name_is_the_name_or_the_first_number_after_it_that_is_free(tmp_path):
    names = []
    for _ in range(3):
        free = fsdm.free_name(tmp_path / "out")
        names.append(free.name)
        free.mkdir()
    (tmp_path / "out_1").rmdir()
    assert names == ["out", "out_1", "out_2"] and fsdm.free_name(str(tmp_path / "out")) == tmp_path / "out_1"


def test_a_free_name_is_beside_what_is_there_also_for_the_folder_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert fsdm.free_name("new") == tmp_path / "here" / "new" and fsdm.free_name(".") == tmp_path / "here_1"
