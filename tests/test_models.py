"""Properties of the two networks: what sees what, caches, options, layouts."""

import functools
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import released_format
from cola import ColaDLM
from dit import Codebook, DiT, DiTConfig
from extras import kernels
from extras.kernels import compile_blocks
from extras.stagger import staggered
from flow import (
    flow_matching_loss,
    sample_times,
    simulated_prompts,
    solve,
    solver_times,
    training_layout,
    velocity_of_all_blocks,
)
from options import VAEOptions
from train_vae import VAEObjective
from transformer import Layout, block_mask, make_layout
from vae import Posterior, TextVAE, VAEConfig, half_rope, masked_view_loss

BLOCK, d, V = 4, 8, 30


def small_vae(**changes):
    sizes = dict(vocab_size=V, dim=32, ffn_dim=64, n_head=2, n_encoder_layer=2, n_decoder_layer=2, latent_dim=d)
    return randomised(TextVAE(VAEConfig(**sizes | dict(block_size=BLOCK) | changes))).eval()


def small_dit(**changes):
    sizes = dict(latent_dim=d, dim=32, n_head=2, head_dim=12, rope_dim=8, n_layer=2, block_size=BLOCK)
    dit = randomised(DiT(DiTConfig(**sizes | changes))).eval()
    if dit.codebook is not None:
        dit.codebook.codes.normal_(generator=torch.Generator().manual_seed(2))
    return dit


def randomised(model):
    """Every parameter random: a model that starts at zero would pass any comparison."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) / max(p.shape[-1], 4) ** 0.5 + (p.dim() == 1)
    return model


def naive_attention(q, k, v, attn_mask=None):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return scores.softmax(-1) @ v


# ----------------------------------------------------------------------------------------------------------------------
# The mask


def test_block_mask_by_hand():
    block = torch.tensor([0, 0, 1])
    assert block_mask(block[:, None], block).tolist() == [
        [True, True, False],
        [True, True, False],
        [True, True, True],
    ]
    # [clean block 0 | noisy block 0, noisy block 1], one latent each
    noisy = torch.tensor([False, True, True])
    assert block_mask(block[:, None], block, noisy[:, None], noisy).tolist() == [
        [True, False, False],  # clean sees clean
        [False, True, False],  # noisy block 0 sees itself, not its clean version
        [True, False, True],  # noisy block 1 sees clean block 0 and itself
    ]


def test_no_mask_where_none_is_needed():
    dit = small_dit()
    assert make_layout(BLOCK, BLOCK, dit.rope, "cpu").mask is None
    assert make_layout(BLOCK + 1, BLOCK, dit.rope, "cpu").mask is not None
    cache = dit.new_cache(2, 5 * BLOCK)
    cache.commit(2 * BLOCK)
    assert make_layout(BLOCK, BLOCK, dit.rope, "cpu", cache).mask is None
    cache.commit(torch.tensor([0, BLOCK]))
    assert make_layout(BLOCK, BLOCK, dit.rope, "cpu", cache).mask is not None


def touched(function, x, position):
    """Which positions of function(x) (B, n, ...) change if x changes at one position."""
    changed = x.clone()
    changed[:, position] = changed[:, position] + 1
    difference = (function(changed) - function(x)).abs().flatten(2).amax((0, 2))
    return (difference > 1e-6).nonzero()[:, 0].tolist()


def test_no_position_sees_a_later_block():
    vae, dit, z, n = small_vae(), small_dit(), torch.randn(2, 3 * BLOCK, d), 3 * BLOCK
    idx = torch.randint(0, V - 1, (2, n))
    t = torch.tensor([0.3, 0.9])
    for position in (0, BLOCK - 1, BLOCK, n - 1):
        later = list(range(position // BLOCK * BLOCK, n))
        assert touched(lambda x: vae.encode(x).mu, idx, position) == later
        assert touched(vae.decode, z, position) == later
        assert touched(lambda x: dit(x, t), z, position) == later


def test_training_layout_leaks_nothing():
    """A clean latent reaches the noisy blocks after its own, a noisy latent its own block only."""
    dit, n, n_clean = small_dit(), 3 * BLOCK, 2 * BLOCK
    layout = training_layout(n, BLOCK, dit.rope, torch.device("cpu"))
    time_index = F.pad(torch.zeros(1, n, dtype=torch.long), (n_clean, 0), value=1)

    def noisy_half(x):
        return dit(x, torch.tensor([[0.5, 0.0]]), time_index, layout=layout)[:, n_clean:]

    x = torch.randn(1, n_clean + n, d)
    for position in range(n_clean):
        assert touched(noisy_half, x, position) == list(range((position // BLOCK + 1) * BLOCK, n))
    for position in range(n):
        own = position // BLOCK * BLOCK
        assert touched(noisy_half, x, n_clean + position) == list(range(own, own + BLOCK))


def test_sdpa_equals_naive_attention(monkeypatch):
    vae, dit, z = small_vae().requires_grad_(False), small_dit().requires_grad_(False), torch.randn(2, 10, d)
    t, prompt = torch.tensor([0.2, 0.7]), torch.zeros(2, 10, dtype=torch.bool)

    def outputs():
        return vae.decode(z), dit(z, t), flow_matching_loss(dit, z, z.flip(0), t, prompt)

    fused = outputs()
    monkeypatch.setattr(F, "scaled_dot_product_attention", naive_attention)
    naive = outputs()
    monkeypatch.undo()
    vae.requires_grad_(True), dit.requires_grad_(True)  # then the CPU takes another path
    for a, b, c in zip(fused, naive, outputs(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a, c, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Caches and layouts


def test_cached_equals_uncached():
    vae, dit, z, t = small_vae(), small_dit(), torch.randn(2, 3 * BLOCK, d), torch.zeros(1)
    vae_cache, dit_cache = vae.new_cache(2, 3 * BLOCK), dit.new_cache(2, 3 * BLOCK)
    logits, v = [], []
    for start in range(0, 3 * BLOCK, BLOCK):
        block = z[:, start : start + BLOCK]
        dit(torch.randn_like(block), torch.ones(1), cache=dit_cache)  # a solver step leaves no trace
        logits.append(vae.decode(block, vae_cache))
        v.append(dit(block, t, cache=dit_cache))
        vae_cache.commit(BLOCK)
        dit_cache.commit(BLOCK)
    torch.testing.assert_close(torch.cat(logits, 1), vae.decode(z), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(v, 1), dit(z, t), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ours", [{}, dict(n_codes=5), dict(n_codes=5, self_conditioning=True)])
def test_noisy_half_of_the_training_layout_equals_cached_inference(ours):
    dit, n = small_dit(**ours), 4 * BLOCK
    z0, z1, t = torch.randn(3, n, d), torch.randn(3, n, d), torch.tensor([0.2, 0.5, 0.9])
    zt = torch.lerp(z0, z1, t[:, None, None])
    seen = []

    class Recorder:
        config, rope, training = dit.config, staticmethod(dit.rope), False

        def __call__(self, *args, **kwargs):
            seen.append(dit(*args, **kwargs))
            return seen[-1]

    loss = flow_matching_loss(Recorder(), z0, z1, t)
    training = seen[-1]
    torch.testing.assert_close(loss, (training - z1 + z0).square().mean())
    cache = dit.new_cache(3, n)
    for start in range(0, n, BLOCK):
        block = slice(start, start + BLOCK)
        sampling = dit(zt[:, block], t, cache=cache)
        if dit.config.self_conditioning:
            estimate = zt[:, block] - t[:, None, None] * sampling
            sampling = dit(zt[:, block], t, cache=cache, estimate=estimate)
        torch.testing.assert_close(sampling, training[:, block], atol=1e-5, rtol=0)
        dit(z0[:, block], torch.zeros(1), cache=cache)
        cache.commit(BLOCK)


def test_self_conditioning_of_half_the_rows():
    """In training the first half of the rows sees its own estimate, the rest none; latents of a prompt are known."""
    dit = small_dit(self_conditioning=True)
    z0, z1, t = torch.randn(4, 8, d), torch.randn(4, 8, d), torch.tensor([0.2, 0.5, 0.9, 0.4])
    prompt = torch.rand(4, 8) < 0.3
    zt = torch.where(prompt[..., None], z0, torch.lerp(z0, z1, t[:, None, None]))
    without = velocity_of_all_blocks(dit, z0, zt, t, prompt)
    estimate = torch.where(prompt[..., None], z0, zt - t[:, None, None] * without)
    both = velocity_of_all_blocks(dit, z0, zt, t, prompt, estimate=estimate)
    assert not torch.allclose(both, without, atol=0.1)
    for training, v in [(True, torch.cat([both[:2], without[2:]])), (False, both)]:
        wanted = (v - (z1 - z0)).square().mean(-1) * ~prompt
        found = flow_matching_loss(dit.train(training), z0, z1, t, prompt, reduce=False)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(flow_matching_loss(dit, z0, z1, t, prompt), wanted.sum() / (~prompt).sum())
    alone = flow_matching_loss(dit.train(), z0[:1], z1[:1], t[:1], prompt[:1], reduce=False)  # half of one row is none
    torch.testing.assert_close(alone, (without[:1] - (z1 - z0)[:1]).square().mean(-1) * ~prompt[:1])


def test_the_sampler_hands_on_the_last_estimate():
    """One block, two steps by hand; latents that the prompt determines are their own estimate."""
    model = ColaDLM(small_vae(), small_dit(self_conditioning=True))
    state, z1 = model.prefill([[1, 2]]), torch.randn(1, BLOCK, d)
    found = model.next_block(state, z1, [1.0, 0.6, 0.0], cfg_scale=1.0)
    known = state.is_known[..., None]
    z, estimate = torch.where(known, state.known_z, z1), torch.zeros_like(z1)
    for t, dt in [(1.0, 0.4), (0.6, 0.6)]:
        times = torch.tensor([[0.0, t]])
        v = model.dit(z, times, torch.where(state.is_known, 0, 1), estimate=estimate).masked_fill(known, 0.0)
        z, estimate = z - dt * v, z - t * v
    torch.testing.assert_close(found, z)


def test_history_changes_the_velocity_and_guidance_drops_it():
    dit, query = small_dit(), torch.randn(1, BLOCK, d)
    velocities = []
    for _ in range(2):
        cache = dit.new_cache(1, 2 * BLOCK)
        dit(torch.randn(1, BLOCK, d), torch.zeros(1), cache=cache)
        cache.commit(BLOCK)
        velocities.append(dit(query.repeat(2, 1, 1), torch.tensor([0.7]), cache=cache))
    assert (velocities[0][0] - velocities[1][0]).abs().max() > 1e-2
    torch.testing.assert_close(velocities[0][1], velocities[1][1])
    torch.testing.assert_close(velocities[0][1], dit(query, torch.tensor([0.7]))[0], atol=1e-5, rtol=1e-5)


def test_cache_refuses_to_overflow():
    dit = small_dit()
    with pytest.raises(ValueError, match="cache of 4 positions"):
        dit(torch.randn(1, 8, d), torch.zeros(1), cache=dit.new_cache(1, 4))


def test_times():
    """A time per position, a time per row with clean positions, and a precomputed modulation are one computation."""
    dit, z, t = small_dit(), torch.randn(2, 8, d), torch.tensor([0.3, 0.8])
    clean = torch.rand(2, 8) < 0.5
    per_position = dit(z, torch.where(clean, 0.0, t[:, None]), torch.arange(8)[None])
    both = torch.stack([torch.zeros(2), t], 1)
    torch.testing.assert_close(dit(z, both, 1 - clean.long()), per_position)
    torch.testing.assert_close(dit(z, dit.embed_times(both), 1 - clean.long()), per_position)
    torch.testing.assert_close(dit(z, both), dit(z, t))


def test_the_codes_know_the_time_of_every_latent():
    """A new prior does not look at the context, so each latent has the velocity that it has alone, at its own time."""
    dit = DiT(DiTConfig(d, 32, 2, 12, 8, 1, n_codes=5))
    dit.codebook.codes.normal_(generator=torch.Generator().manual_seed(0))
    z, t, index = torch.randn(2, 6, d), torch.rand(2, 3), torch.randint(3, (2, 6))
    v = dit(z, t, index)
    for row, i in product(range(2), range(6)):
        alone = dit(z[row : row + 1, i : i + 1], t[row, index[row, i]][None])
        torch.testing.assert_close(v[row, i], alone[0, 0])


def test_a_new_prior_predicts_zero():
    assert not DiT(small_dit().config)(torch.randn(2, 6, d), torch.rand(2)).any()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("head_dim", [12, 16])
def test_flex_attention_is_the_same_computation(head_dim, monkeypatch):
    """Heads below 16 channels, which it refuses on a GPU, do without it."""
    dit, n, n_clean = small_dit(head_dim=head_dim).requires_grad_(False), 10, 2 * BLOCK
    if head_dim < 16:
        monkeypatch.setattr(kernels, "flex_attention", None)
    z, t = torch.randn(2, n_clean + n, d), torch.tensor([[0.5, 0.0]])
    index = (torch.arange(n_clean + n) < n_clean)[None].long()
    layouts = [training_layout(n, BLOCK, dit.rope, z.device, flex) for flex in (False, True)]
    dense, flex = (dit(z, t, index, layout=layout) for layout in layouts)
    torch.testing.assert_close(flex, dense)
    compile_blocks(dit, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(dit(z, t, index, layout=layouts[1]), dense)
    same = training_layout(n, BLOCK, dit.rope, z.device, True)
    assert same.mask is layouts[1].mask  # made once per shape
    monkeypatch.undo()

    vae, x = small_vae().requires_grad_(False), torch.randn(2, n, 32)
    rope = functools.partial(half_rope, dim=16, theta=1e4, device="cpu")
    layouts = [make_layout(n, BLOCK, rope, "cpu", flex=flex) for flex in (False, True)]
    dense, flex = (through(vae.blocks, x, layout) for layout in layouts)
    torch.testing.assert_close(flex, dense)


def through(blocks, x, layout):
    for block in blocks:
        x = block(x, layout)
    return x


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_checkpointing_changes_no_gradient(device):
    if device == "cuda" and not torch.cuda.is_available():
        return
    print(f"on {device}")
    vae, dit = small_vae().to(device), small_dit().to(device)
    idx, t = torch.randint(0, V, (2, 8), device=device), torch.tensor([0.3, 0.6], device=device)
    z1 = torch.randn(2, 8, d, device=device)
    gradients = []
    for checkpointing in (False, True):
        vae.checkpointing = dit.checkpointing = checkpointing
        z0 = vae.encode(idx).mu
        loss = flow_matching_loss(dit, z0, z1, t) - vae.log_likelihood(z0, idx).mean()
        gradients.append(torch.autograd.grad(loss, [*vae.parameters(), *dit.parameters()], allow_unused=True))
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-6))


def test_few_logits_at_a_time_are_the_same_computation(monkeypatch):
    model, idx, z = small_vae(), torch.randint(0, V, (3, 8)), torch.randn(3, 8, d)
    where = torch.rand(3, 8) < 0.5
    by_hand = model.decode(z).log_softmax(-1).gather(-1, idx[..., None])[..., 0]
    results = []
    for limit in (kernels.MAX_LOGITS, 5 * V):
        monkeypatch.setattr(kernels, "MAX_LOGITS", limit)
        log_p = model.log_likelihood(z, idx)
        torch.testing.assert_close(log_p, by_hand)
        torch.testing.assert_close(model.log_likelihood(z, idx, where), by_hand[where])
        assert torch.equal(model.likeliest(z), model.decode(z).argmax(-1))
        results.append(torch.autograd.grad(log_p.sum(), model.parameters(), allow_unused=True))
    assert all(a is None or torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize("post_norm, qk_norm, bias, qk_bias", list(product([True, False], repeat=4)))
def test_vae_options_survive_a_round_trip(tmp_path, post_norm, qk_norm, bias, qk_bias):
    changes = dict(post_norm=post_norm, qk_norm=qk_norm, bias=bias, qk_bias=qk_bias, norm_eps=1e-4)
    vae, idx = small_vae(**changes, scaling_factor=0.5, shifting_factor=0.1), torch.randint(0, V, (2, 8))
    names = dict(vae.named_parameters())
    assert ("encoder.blocks.0.q_norm.weight" in names) == qk_norm
    assert ("encoder.blocks.0.qkv_proj.bias" in names) == qk_bias
    assert ("decoder.final_layer.bias" in names) == bias
    released_format.save_vae(vae, tmp_path)
    loaded = released_format.load_vae(tmp_path)
    assert loaded.config == vae.config
    torch.testing.assert_close(loaded.decode(loaded.encode(idx).mu), vae.decode(vae.encode(idx).mu))


def test_dit_options_survive_a_round_trip(tmp_path):
    dit, z = small_dit(qk_bias=True, norm_eps=1e-3, mlp_ratio=2), torch.randn(1, 8, d)
    released_format.save_dit(dit, tmp_path)
    torch.testing.assert_close(released_format.load_dit(tmp_path)(z, torch.tensor([0.5])), dit(z, torch.tensor([0.5])))


def test_codes_survive_a_round_trip_and_the_released_configuration_has_none(tmp_path):
    dit, z, t = small_dit(n_codes=5), torch.randn(1, 8, d), torch.tensor([0.5])
    released_format.save_dit(dit, tmp_path)
    torch.testing.assert_close(released_format.load_dit(tmp_path)(z, t), dit(z, t))
    released_format.save_dit(small_dit(), tmp_path / "plain")
    texts = [(folder / "cola_dit" / "config.json").read_text() for folder in (tmp_path, tmp_path / "plain")]
    assert ["n_codes" in text for text in texts] == [True, False]


def test_pre_norm_block_is_the_ordinary_one():
    vae = small_vae(post_norm=False)
    block, x = vae.decoder.blocks[0], torch.randn(1, 3, 32)
    layout = Layout((torch.ones(1, 1, 3, 16), torch.zeros(1, 1, 3, 16)))  # angle 0, nothing hidden
    h = x + block.attention(block.norm_attn(x), layout, None)
    torch.testing.assert_close(block(x, layout), h + block.ffn(block.norm_ffn(h)))


def test_patches():
    """Two tokens a latent: half as many latents, token order kept, and a token reaches its own latent."""
    vae = small_vae(patch_size=2)
    idx = torch.randint(0, V - 1, (2, 16))
    posterior = vae.encode(idx)
    assert posterior.mu.shape == (2, 8, d)
    logits = vae.decode(posterior.mu)
    assert logits.shape == (2, 16, V)
    x = through(vae.decoder.blocks, vae.decoder.in_layer(posterior.mu), vae.layout(8, "cpu"))
    second = vae.decoder.unpatch_layer(x)[:, 3].view(2, 32, 2)[..., 1]  # channels are laid out (c p)
    torch.testing.assert_close(logits[:, 7], vae.decoder.final_layer(vae.decoder.final_norm(second)))
    assert touched(lambda x: vae.encode(x).mu, idx, 9) == [4, 5, 6, 7]
    with pytest.raises(ValueError, match="not a multiple of patch_size 2"):
        vae.encode(idx[:, :7])


def test_posterior_shape_of_mu():
    idx = torch.randint(0, V, (2, 8))
    mu = small_vae().encode(idx).mu
    torch.testing.assert_close(mu.square().sum(-1), torch.full((2, 8), float(d)), atol=1e-3, rtol=0)
    free = small_vae(encoder_last_ln=False).encode(idx).mu
    assert (free.square().sum(-1) - d).abs().max() > 0.1
    plain = small_vae(use_variation=False).encode(idx)
    assert plain.logvar is None and torch.equal(plain.sample(), plain.mu)


def test_posterior_against_torch_distributions():
    from torch.distributions import Independent, Normal, kl_divergence

    a, b = (Posterior(torch.randn(2, 3, d), torch.randn(2, 3, d)) for _ in range(2))
    p, q = (Independent(Normal(x.mu, torch.exp(0.5 * x.logvar)), 1) for x in (a, b))
    torch.testing.assert_close(a.kl(b), kl_divergence(p, q))
    torch.testing.assert_close(a.kl(), kl_divergence(p, Independent(Normal(torch.zeros(d), torch.ones(d)), 1)))
    torch.testing.assert_close(a.entropy(), p.entropy())


def test_vae_loss_without_noise_is_the_sum_of_its_terms():
    vae, idx = small_vae(), torch.randint(0, V, (2, 8))
    options = VAEOptions(beta=0.1, mask_weight=0.5, mask_ratio=0.3, decoder_noise=0.0)
    loss, terms = VAEObjective(options, vae)(idx, torch.Generator().manual_seed(0))
    expected = terms["reconstruction"] + 0.1 * terms["kl"] + 0.5 * terms["mask"]
    torch.testing.assert_close(loss.detach(), expected)
    nothing = masked_view_loss(vae, idx, 0.0)
    assert nothing == 0 and nothing.requires_grad  # nothing is masked, but all processes must take the same steps


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("cola_dit", "emb_dim", 64),
        ("cola_dit", "patch_size", 2),
        ("cola_dit", "txt_out_channels", 9),
        ("cola_vae", "shared_heads_kv", 2),
        ("cola_vae", "act", "gelu"),
    ],
)
def test_unsupported_options_are_refused(tmp_path, part, key, value):
    import json

    ColaDLM(small_vae(), small_dit()).save_pretrained(tmp_path)
    file = tmp_path / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=f"{key} = {value!r} is not supported"):
        ColaDLM.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Flow matching


def test_sample_times_are_logit_normal():
    t = sample_times(20_000, 1.0, 0.5, torch.Generator().manual_seed(0))
    logit = torch.log(t / (1 - t))
    assert logit.mean().item() == pytest.approx(1.0, abs=0.02) and logit.std().item() == pytest.approx(0.5, abs=0.02)


def test_latents_of_a_block_start_one_after_another():
    assert staggered(torch.tensor([0.5, 0.25]), 4, 1.0).tolist() == [0, 0, 1, 1, 0, 0, 0, 1]
    assert staggered(torch.tensor([0.5]), 3, 0.5).tolist() == [0, 0.5, 1]
    assert staggered(torch.tensor([1.0, 0.0]), 2, 0.3).tolist() == [1, 1, 0, 0]
    assert staggered(torch.tensor([0.25, 0.75]), 2, 0.0).tolist() == [0.25, 0.25, 0.75, 0.75]
    times = solver_times(4, block_size=3, stagger=0.5)
    assert torch.stack(times)[..., 0].tolist() == [[1, 1, 1], [0.5, 1, 1], [0, 0.5, 1], [0, 0, 0.5], [0, 0, 0]]


def test_staggered_times_of_training():
    t = sample_times((4000, 2), 0.5, 0.8, torch.Generator().manual_seed(0), None, 4, 0.5)
    assert t.shape == (4000, 8) and (t.view(4000, 2, 4).diff(dim=-1) >= 0).all()
    moving = t[(t > 0) & (t < 1)]
    assert len(moving) / t.numel() == pytest.approx(1 / 2.5, rel=0.02)  # a block takes as long as 2.5 latents
    logit = torch.logit(moving.double())
    assert logit.mean().item() == pytest.approx(0.5, abs=0.02) and logit.std().item() == pytest.approx(0.8, abs=0.02)


def test_the_loss_of_latents_with_times_of_their_own():
    """Against the sampler's cache; what has arrived carries no loss."""
    dit, z0, z1 = small_dit(), torch.randn(3, 8, d), torch.randn(3, 8, d)
    t = torch.tensor([[0, 0.3, 1, 1, 0.2, 0.6, 1, 1], [0.5, 0.5, 0.5, 0.5, 0, 0, 0.4, 0.9], [0.3, 1, 1, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])
    zt, cache, errors = torch.lerp(z0, z1, t[..., None]), dit.new_cache(3, 8), []
    for block in (slice(0, 4), slice(4, 8)):
        v = dit(zt[:, block], t[:, block], torch.arange(4)[None], None, cache)
        errors.append((v - (z1 - z0)[:, block]).square().mean(-1))
        dit(z0[:, block], torch.zeros(1), cache=cache)
        cache.commit(4)
    wanted = (torch.cat(errors, dim=1) * counts).sum() / counts.sum()
    for prompt in (None, torch.zeros(3, 8, dtype=torch.bool)):
        torch.testing.assert_close(flow_matching_loss(dit, z0, z1, t, prompt), wanted)
    for ends in (torch.tensor([0.0, 0.5, 1.0]), torch.tensor([[0.0, 1.0], [1.0, 0.2], [0.5, 0.0]])):  # rows, blocks
        each = flow_matching_loss(dit, z0, z1, ends, reduce=False)
        assert (each > 0).all()
        torch.testing.assert_close(flow_matching_loss(dit, z0, z1, ends), each.mean())


def test_simulated_prompts_are_proper_prefixes_of_blocks():
    prompt = simulated_prompts(500, 10, BLOCK, 0.5, torch.Generator().manual_seed(0))
    assert prompt.shape == (500, 10)
    blocks = F.pad(prompt, (0, 2)).view(500, 3, BLOCK).int()
    assert (blocks.diff(dim=-1) <= 0).all() and not blocks[..., -1].any()  # prefixes, never the whole block
    share = blocks[:, :2].any(-1).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.05)
    assert blocks[:, :2].sum(-1).unique().tolist() == [0, 1, 2, 3]
    assert not simulated_prompts(5, 6, 1, 1.0).any()


def test_gradient_reaches_the_encoder_through_the_noisy_latents_only():
    """A prior that predicts 0 cannot move z0; one that predicts a multiple of z_t moves it through z_t."""
    dit, z0 = small_dit(), torch.randn(1, 2 * BLOCK, d, requires_grad=True)
    t, z1 = torch.tensor([0.25]), torch.randn(1, 2 * BLOCK, d)

    class Copy:
        config, rope = dit.config, staticmethod(dit.rope)

        def __call__(self, z, *args, n_out, **kwargs):
            return self.factor * z[:, -n_out:]

    prior = Copy()
    for factor in (0.0, 2.0):
        prior.factor = factor
        loss = flow_matching_loss(prior, z0, z1, t)
        (grad,) = torch.autograd.grad(loss, z0)
        error = factor * (0.75 * z0 + 0.25 * z1) - (z1 - z0)
        torch.testing.assert_close(grad, factor * 0.75 * 2 * error / error.numel())


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_solver_order(solver, order):
    """dz/dt = z from t = 1 to 0 ends at z/e; halving the step divides the error by 2^order."""
    errors = []
    for steps in (16, 32):
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        z = solve(lambda z, t: z, torch.ones((), dtype=torch.float64), times, solver)
        errors.append(abs(z.item() - torch.e**-1))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


def test_gaussian_data_are_generated_exactly():
    """For z0 ~ N(m, s^2) the optimal velocity is known; the solver must carry N(0, 1) to N(m, s^2)."""
    m, s = 3.0, 0.5
    times = torch.linspace(1, 0, 201).tolist()

    def velocity(z, t):  # E[z1 - z0 | z_t = z]
        variance = (1 - t) ** 2 * s**2 + t**2
        return -m + (t - (1 - t) * s**2) / variance * (z - (1 - t) * m)

    z1 = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(solve(velocity, z1, times, "heun"), m + s * z1, atol=2e-3, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_fresh_noise_leaves_the_distribution_as_it_is(eta):
    """On Gaussian data, for which the velocity is known; nothing but the latent itself tells one draw from another."""
    m, s = 1.0, 0.5
    generator = torch.Generator().manual_seed(0)

    def velocity(z, t):
        variance = (1 - t) ** 2 * s**2 + t**2
        return -m + (t - (1 - t) * s**2) / variance * (z - (1 - t) * m)

    z1, seen = torch.randn(50_000, generator=generator), []

    def noise():
        return torch.randn(z1.shape, generator=generator)

    times = solver_times(200)
    z = solve(velocity, z1, times, eta=eta, noise=noise, watch=lambda z, t: seen.append((t, z.mean(), z.std())))
    for t, mean, std in seen[99:]:
        assert mean.item() == pytest.approx((1 - t) * m, abs=0.02)
        assert std.item() == pytest.approx(((1 - t) ** 2 * s**2 + t**2) ** 0.5, abs=0.02)
    correlation = torch.corrcoef(torch.stack([z, z1]))[0, 1].item()
    assert correlation == pytest.approx(1.0, abs=1e-3) if eta == 0 else correlation < (0.9 if eta < 1 else 0.1)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_fresh_noise_is_as_much_as_in_ddim(eta):
    """sigma of Eq. 16 in arXiv:2010.02502, where z_t is scaled to variance 1: alpha_bar = (1-t)^2 / ((1-t)^2 + t^2)."""
    t, following = 0.8, 0.6
    now, then = ((1 - u) ** 2 / ((1 - u) ** 2 + u**2) for u in (t, following))
    sigma = eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then)) * math.hypot(1 - following, following)
    z, v = torch.tensor(0.3), torch.tensor(-0.7)
    ends = [solve(lambda z, t: v, z, [t, following], eta=eta, noise=lambda e=e: torch.tensor(e)) for e in (0.0, 1.0)]
    assert (ends[1] - ends[0]).item() == pytest.approx(sigma, rel=1e-5)
    kept = math.sqrt(following**2 - sigma**2)
    torch.testing.assert_close(ends[0], (1 - following) * (z - t * v) + kept * (z + (1 - t) * v))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_latents_that_wait_or_have_arrived_stay(eta):
    times = [torch.tensor(row)[:, None] for row in ([1.0, 1.0], [0.5, 1.0], [0.0, 0.5], [0.0, 0.0])]
    z1, z0, seen = torch.randn(3, 2, d), torch.randn(3, 2, d), []
    z = solve(lambda z, t: (z - z0) / t.clamp(min=1e-9), z1, times, eta=eta, watch=lambda z, t: seen.append(z))
    torch.testing.assert_close(z, z0)  # where every velocity led
    assert torch.equal(seen[0][:, 1], z1[:, 1]) and not torch.equal(seen[0][:, 0], z1[:, 0])
    assert torch.equal(seen[1][:, 0], seen[2][:, 0]) and not torch.equal(seen[1][:, 1], z1[:, 1])


def test_times_of_the_solver():
    assert solver_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    times = solver_times(4, "quantiles", loc=1.0, scale=0.5)
    normal = 0.6744897501960817  # three quarters of N(0, 1) are below
    inner = [1 / (1 + math.exp(-x)) for x in (1 + 0.5 * normal, 1, 1 - 0.5 * normal)]
    assert times == pytest.approx([1.0, *inner, 0.0])


# ----------------------------------------------------------------------------------------------------------------------
# Codes


def codebook(K=3, share=(0.5, 0.2, 0.3), variance=0.04):
    book = Codebook(DiTConfig(latent_dim=2, dim=8, n_codes=K))
    torch.nn.init.zeros_(book.logits.weight), torch.nn.init.zeros_(book.logits.bias)
    book.codes.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, 2.0]]))
    book.share.copy_(torch.tensor(share))
    book.variance.fill_(variance)
    return book


@pytest.mark.parametrize("t", [0.01, 0.4, 1.0])
def test_velocity_of_a_mixture_against_a_grid(t):
    """E[z1 - z0 | z_t] by summing over a grid of z0, of which z1 = (z_t - (1 - t) z0) / t follows."""
    book, z = codebook(), torch.tensor([[[0.3, 0.4], [-0.5, 1.2]]])
    line = torch.linspace(-3, 4, 1201, dtype=torch.float64)
    z0 = torch.cartesian_prod(line, line)  # (N, 2)
    squares = torch.cdist(z0, book.codes.double()).square()
    p0 = (torch.exp(-squares / (2 * 0.04)) * book.share).sum(1)
    for latent, found in zip(z[0], book(torch.zeros(1, 2, 8), z, torch.tensor([[[t]]]))[0][0], strict=True):
        z1 = (latent - (1 - t) * z0) / t
        weight = p0 * torch.exp(-z1.square().sum(1) / 2)
        wanted = (weight[:, None] * (z1 - z0)).sum(0) / weight.sum()
        torch.testing.assert_close(found, wanted.float(), atol=1e-3, rtol=1e-3)


def test_what_the_network_says_moves_the_weights():
    book, z, t = codebook(), torch.zeros(1, 1, 2), torch.ones(1, 1, 1)  # pure noise: the share counts
    x = torch.ones(1, 1, 8)
    log_w = book(x, z, t)[1][0, 0]
    torch.testing.assert_close(log_w.exp(), book.share)
    book.logits.bias.data.copy_(torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(book(x, z, t)[1][0, 0], (book.share.log() + book.logits.bias).log_softmax(-1))
    near = torch.tensor([[[1.0, 0.0]]])
    with torch.autocast("cpu", torch.bfloat16):  # no digits are lost
        v, log_w = book(x, near, torch.tensor([[[0.01]]]))
    assert log_w[0, 0, 0] > -1e-6 and torch.equal(v, book(x, near, torch.tensor([[[0.01]]]))[0])


@pytest.mark.parametrize("t", [0.4, 1.0])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_code_is_drawn_by_its_weight(t, scale):
    """Over all of [0, 1): with scale 1 the mean of the drawn velocities is the velocity itself."""
    book, n = codebook(), 10_000
    book.logits.bias.data.copy_(torch.tensor([0.0, 1.0, -0.5]))
    z, x = torch.tensor([[[0.3, 0.4]]]).expand(1, n, 2), torch.ones(1, n, 8)
    v, log_w = book(x, z, torch.tensor([[[t]]]))
    uniform = ((torch.arange(n) + 0.5) / n)[None]
    drawn = book.draw(v, log_w, z, t, scale, uniform)
    if scale == 1:
        torch.testing.assert_close(drawn.mean(1), v[:, 0], atol=2e-3, rtol=0)
    share = [(drawn[0] == value).all(-1).float().mean().item() for value in drawn[0].unique(dim=0)]
    weight = (log_w[0, 0] + (scale - 1) * book.logits.bias).softmax(-1)  # w_marginal exp(scale h)
    assert sorted(share) == pytest.approx(sorted(weight.tolist()), abs=2e-3)
    r = t**2 + (1 - t) ** 2 * 0.04
    wanted = ((t - (1 - t) * 0.04) * z[0, :1] - t * book.codes) / r  # that of a mixture of one code; at t = 1, z - e
    distance, which = torch.cdist(drawn[0], wanted).min(-1)
    assert distance.max() < 1e-4 and which.unique().tolist() == [0, 1, 2]


def test_the_marginal_keeps_its_digits_with_weights_in_bf16():
    book, z = codebook().bfloat16(), torch.tensor([[[0.9, 0.1], [0.2, -0.3]]])
    torch.testing.assert_close(book.marginal(z, 0.15), book.marginal(z, torch.tensor([[[0.15]]])))


def test_codes_are_found_in_latents():
    """Five points with noise, seen 1 to 5 times as often; three codes too many, and then two too few."""
    points = 3 * torch.randn(5, d)
    which = torch.arange(5).repeat_interleave(torch.arange(1, 6) * 20)[torch.randperm(300)]
    mu = points[which] + 0.01 * torch.randn(300, d)
    book = Codebook(DiTConfig(latent_dim=d, dim=8, n_codes=8))
    book.fit(mu, 0.02)
    nearest = book.nearest(points)
    assert sorted(nearest.tolist()) == [0, 1, 2, 3, 4] and torch.equal(book.nearest(mu), nearest[which])
    torch.testing.assert_close(book.codes[nearest], points, atol=0.02, rtol=0)
    torch.testing.assert_close(book.share[nearest], (torch.arange(1, 6) * 20 + 0.5) / 302.5)
    assert book.share[5:].tolist() == [0, 0, 0] and book.variance.item() == pytest.approx(0.02 + 1e-4, rel=0.2)
    few = Codebook(DiTConfig(latent_dim=d, dim=8, n_codes=3))
    few.fit(mu, 0.02)
    assert few.share.min() > 0 and few.variance > 1


def test_a_prior_with_codes_starts_at_the_marginal():
    dit, z = DiT(small_dit(n_codes=5).config), torch.randn(2, 6, d)
    dit.codebook.codes.normal_()
    t = torch.tensor([0.3, 0.8])
    wanted, _ = dit.codebook(torch.zeros(2, 6, 32), z, t[:, None, None])
    torch.testing.assert_close(dit(z, t), wanted)


def test_the_loss_of_codes_is_a_cross_entropy():
    dit, z0, z1, t = small_dit(n_codes=5), torch.randn(2, 8, d), torch.randn(2, 8, d), torch.tensor([0.3, 0.8])
    v, log_w = velocity_of_all_blocks(dit, z0, torch.lerp(z0, z1, t[:, None, None]), t, with_codes=True)
    target = torch.cdist(z0, dit.codebook.codes[None]).argmin(-1)
    nats = F.cross_entropy(log_w.flatten(0, 1), target.flatten())
    plain = flow_matching_loss(dit, z0, z1, t)
    torch.testing.assert_close(plain, (v - (z1 - z0)).square().mean())
    torch.testing.assert_close(flow_matching_loss(dit, z0, z1, t, code_weight=0.7), plain + 0.7 * nats)


def test_what_a_killed_process_left_is_removed(tmp_path):
    """safetensors writes to a file of this kind, and then renames it."""
    (tmp_path / "cola_vae").mkdir()
    (tmp_path / "cola_vae" / ".tmpAb12Cd").write_text("half")
    released_format.save_vae(small_vae(), tmp_path)
    assert sorted(file.name for file in (tmp_path / "cola_vae").iterdir()) == ["config.json", "model.safetensors"]


def test_the_last_block_may_be_shorter():
    """A time for each block: that of its own block for every latent, whatever the length of the last one."""
    dit, z0, z1, t = small_dit(), torch.randn(2, 6, d), torch.randn(2, 6, d), torch.tensor([[0.2, 0.9], [0.5, 0.3]])
    each = t[:, [0, 0, 0, 0, 1, 1]]
    found, wanted = (flow_matching_loss(dit, z0, z1, times, reduce=False) for times in (t, each))
    torch.testing.assert_close(found, wanted)
