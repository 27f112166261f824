"""The objectives by value: every term is computed again, plainly, from the same random numbers in the same order.

The options have telling values, no two alike, so that none can be forgotten or mistaken for another."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import COMMON, PRIOR_SIZE, VAE_SIZE, call
from safetensors.torch import load_file
from test_models import BLOCK, V, small_dit, small_vae
from torch.distributions import Independent, Normal, kl_divergence

import common
import train_prior
import train_vae
import training
from chat import PROMPT, RESPONSE
from flow import flow_matching_loss
from options import PriorOptions, VAEOptions
from transformer import make_layout

B, L, P = 3, 4 * BLOCK, 2  # rows, tokens, tokens of a latent
VAE_TERMS = dict(beta=0.7, mask_weight=0.3, mask_ratio=0.4, decoder_noise=0.6)


def tokens():
    return torch.randint(0, V - 1, (B, L), generator=torch.Generator().manual_seed(5))


def patched_vae():
    return small_vae(patch_size=P, scaling_factor=0.5, shifting_factor=0.1)


def gaussian(posterior):
    return Independent(Normal(posterior.mu, torch.exp(0.5 * posterior.logvar)), 1)


def draw(posterior, generator):
    return posterior.mu + torch.exp(0.5 * posterior.logvar) * torch.randn(posterior.mu.shape, generator=generator)


def reconstruction(vae, z0, idx, generator):
    t = VAE_TERMS["decoder_noise"] * torch.rand(B, 1, 1, generator=generator)
    zt = (1 - t) * z0 + t * torch.randn(z0.shape, generator=generator)
    return F.cross_entropy(vae.decode(zt).flatten(0, 1), idx.flatten())


def masked_view(vae, idx, generator):
    masked = torch.rand(idx.shape, generator=generator) < VAE_TERMS["mask_ratio"]
    z = draw(vae.encode(torch.where(masked, V, idx)), generator)  # V: the extra row of the embedding
    n_expected = VAE_TERMS["mask_ratio"] * idx.numel()
    return F.cross_entropy(vae.decode(z)[masked], idx[masked], reduction="sum") / n_expected


def test_stage_1_by_hand():
    vae, idx = patched_vae(), tokens()
    objective = train_vae.VAEObjective(VAEOptions(**VAE_TERMS), vae).train()
    loss, terms = objective(idx, torch.Generator().manual_seed(0))

    generator = torch.Generator().manual_seed(0)
    posterior = vae.encode(idx)
    wanted = dict(reconstruction=reconstruction(vae, draw(posterior, generator), idx, generator))
    normal = Independent(Normal(torch.zeros_like(posterior.mu), torch.ones_like(posterior.mu)), 1)
    wanted["kl"] = kl_divergence(gaussian(posterior), normal).sum() / idx.numel()  # per token, not per latent
    wanted["mask"] = masked_view(vae, idx, generator)
    for name, value in wanted.items():
        torch.testing.assert_close(terms[name], value.detach(), msg=name)
    torch.testing.assert_close(loss, wanted["reconstruction"] + 0.7 * wanted["kl"] + 0.3 * wanted["mask"])


def flow_matching(dit, z, o, generator):
    """L_FM block by block, without the layout of training: each noisy block after its clean history, in the cache."""
    n = z.shape[1]
    size = o.block_size[torch.randint(len(o.block_size), (), generator=generator)]
    torch.randint(len(o.stagger), (), generator=generator)
    shape = (B, n // size) if o.block_times else (B, 1)
    t = torch.sigmoid(o.t_loc + o.t_scale * torch.randn(shape, generator=generator)).expand(B, n // size)
    z1 = torch.randn(z.shape, generator=generator)
    chosen = torch.rand(B, n // size, generator=generator) < o.prompt_prob
    length = torch.randint(1, size, chosen.shape, generator=generator)
    errors, clean = [], z.detach()
    for b in range(n // size):
        block = slice(b * size, (b + 1) * size)
        prompt = (torch.arange(size) < length[:, b, None]) & chosen[:, b, None]  # (B, size)
        now = t[:, b, None, None]
        zt = (1 - now) * z[:, block] + now * z1[:, block]
        zt = torch.where(prompt[..., None], clean[:, block], zt)
        sequence = torch.cat([clean[:, : b * size], zt], 1)
        is_clean = torch.cat([torch.ones(B, b * size, dtype=torch.bool), prompt], 1)
        each = torch.where(is_clean, 0.0, t[:, b, None])  # a time of its own for every position
        layout = make_layout(sequence.shape[1], size, dit.rope, "cpu")
        v = dit(sequence, each, torch.arange(sequence.shape[1])[None], layout)[:, b * size :]
        errors.append((v - (z1[:, block] - clean[:, block])).square().mean(-1)[~prompt])
    return torch.cat(errors).sum() / (B * n * (1 - o.prompt_prob / 2))  # by the number expected


PRIOR = dict(t_loc=-0.5, t_scale=0.8, prompt_prob=0.6, block_size=(BLOCK, 2), n_codes=0, self_conditioning=False)
PRIOR |= dict(stagger=(0.0,))


@pytest.mark.parametrize("block_times", [True, False])
def test_stage_2_by_hand(block_times):
    vae, dit, idx = patched_vae().requires_grad_(False), small_dit(), tokens()
    o = PriorOptions(block_times=block_times, **PRIOR)
    objective = train_prior.PriorObjective(o, torch.nn.ModuleDict(dict(dit=dit)), vae)
    for seed in range(4):  # which draw both block sizes
        loss, terms = objective(idx, torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed)
        z0 = (draw(vae.encode(idx), generator) - 0.1) * 0.5  # the DiT's units
        torch.testing.assert_close(loss, flow_matching(dit, z0, o, generator))
    assert terms == {} and not any(name.startswith("vae") for name, _ in objective.named_parameters())


def test_codes_count_in_training_alone():
    vae, dit, idx = small_vae().requires_grad_(False), small_dit(n_codes=5), tokens()
    o = PriorOptions(**PRIOR | dict(prompt_prob=0.0, block_size=(BLOCK,), n_codes=5))
    objective = train_prior.PriorObjective(o, torch.nn.ModuleDict(dict(dit=dit)), vae)
    for learning in (True, False):
        generator = torch.Generator().manual_seed(0)
        z0 = draw(vae.encode(idx), generator)
        for _ in range(1 + learning):  # of a block size, a stagger
            torch.randint(1, (), generator=generator)
        t = torch.sigmoid(-0.5 + 0.8 * torch.randn((B, z0.shape[1] // BLOCK), generator=generator))
        z1 = torch.randn(z0.shape, generator=generator)
        loss, _ = objective.train(learning)(idx, torch.Generator().manual_seed(0))
        torch.testing.assert_close(loss, flow_matching_loss(dit, z0, z1, t, code_weight=float(learning)))


@pytest.mark.parametrize("is_chat", [False, True])
def test_the_number_of_latents_with_loss_is_the_one_expected(is_chat, monkeypatch):
    vae, dit, idx = small_vae().requires_grad_(False), small_dit(), tokens().repeat(20, 1)
    changes = dict(prompt_prob=0.8, block_size=(BLOCK,), stagger=(0.25, 1.0), block_times=False)  # a stagger needs them
    answer_len = 0.0
    if is_chat:  # answers that begin anywhere
        changes["chat"], answer_len = ("some.jsonl",), float(BLOCK)
        begin = torch.randint(1, L - BLOCK, (len(idx), 1), generator=torch.Generator().manual_seed(1))
        is_answer = (torch.arange(L) >= begin) & (torch.arange(L) < begin + BLOCK)
        idx = torch.stack([idx, torch.where(is_answer, RESPONSE, PROMPT)], dim=1)
    o = PriorOptions(**PRIOR | changes)
    objective = train_prior.PriorObjective(o, torch.nn.ModuleDict(dict(dit=dit)), vae, answer_len).train()
    counts = {}

    def loss(dit, z0, z1, t, prompt, valid, block_size, code_weight, count):
        blocks = t.view(-1, BLOCK)
        counts.setdefault(count, []).append(((blocks > 0) & ~prompt.view(-1, BLOCK)).sum())
        return z0.sum()

    monkeypatch.setattr(train_prior, "flow_matching_loss", loss)
    for seed in range(60):
        objective(idx, torch.Generator().manual_seed(seed))
    assert len(counts) == 2  # a number for each stagger
    for count, found in counts.items():
        assert torch.stack(found).float().mean().item() == pytest.approx(count, rel=0.03)


def test_joint_training_by_hand():
    """Loss, terms, and the gradient of the encoder, which reaches it through z_t but neither history nor target."""
    vae, dit, idx = patched_vae(), small_dit(), tokens()
    reference = copy.deepcopy(vae).requires_grad_(False)
    for p in vae.parameters():  # no longer where it was
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    o = PriorOptions(joint=True, vae_weight=1.3, ref_weight=0.9, **PRIOR, **VAE_TERMS)
    objective = train_prior.PriorObjective(o, torch.nn.ModuleDict(dict(dit=dit, vae=vae)), reference).train()
    loss, terms = objective(idx, torch.Generator().manual_seed(0))

    generator = torch.Generator().manual_seed(0)
    posterior = vae.encode(idx)
    z = draw(posterior, generator)
    wanted = dict(fm=flow_matching(dit, (z - 0.1) * 0.5, o, generator))
    wanted["reconstruction"] = reconstruction(vae, z, idx, generator)
    wanted["entropy"] = gaussian(posterior).entropy().sum() / idx.numel()
    wanted["mask"] = masked_view(vae, idx, generator)
    wanted["ref"] = kl_divergence(gaussian(posterior), gaussian(reference.encode(idx))).sum() / idx.numel()
    for name, value in wanted.items():
        torch.testing.assert_close(terms[name], value.detach(), msg=name)
    vae_terms = wanted["reconstruction"] - 0.7 * wanted["entropy"] + 0.3 * wanted["mask"]
    by_hand = wanted["fm"] + 1.3 * vae_terms + 0.9 * wanted["ref"]
    torch.testing.assert_close(loss, by_hand)
    parameters = [vae.encoder.wte.weight, vae.encoder.final_layer.weight, vae.decoder.final_layer.weight]
    for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (loss, by_hand)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# The optimizer's options


def test_clipping():
    """The gradient's norm over both groups is 50; clipped to 2, plain descent moves that far."""
    for clip, wanted in [(2.0, 2.0), (0.0, 50.0), (100.0, 50.0)]:
        parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        parameters[0].grad, parameters[1].grad = torch.tensor([30.0]), torch.tensor([40.0])
        groups = [dict(params=[p], lr_ratio=1.0) for p in parameters]
        common.optimizer_step(common.Optimizers([torch.optim.SGD(groups, lr=0.0)]), 1.0, clip)
        assert torch.cat(parameters).detach().norm().item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_of_matrices_alone_at_the_rate_of_their_part(name):
    """Without a gradient, a step multiplies what is decayed by 1 - lr ratio decay."""
    fast, slow = small_vae(), small_dit()
    optimizer = common.make_optimizer([(fast, 1.0), (slow, 0.25)], name, 0.1)
    for model, ratio in [(fast, 1.0), (slow, 0.25)]:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
            p.before, p.factor = p.detach().clone(), 1 - 0.02 * ratio * 0.1 if p.dim() > 1 else 1.0
    common.optimizer_step(optimizer, 0.02, 1.0)
    for p in [*fast.parameters(), *slow.parameters()]:
        torch.testing.assert_close(p.detach(), p.before * p.factor, atol=1e-7, rtol=1e-6)


def test_a_gradient_moves_each_part_at_its_own_rate():
    for name in ("adamw", "muon"):
        models = [small_dit(), small_dit()]
        optimizer = common.make_optimizer([(models[0], 1.0), (models[1], 0.25)], name, 0.0)
        before = [p.detach().clone() for p in models[0].parameters()]
        for model in models:
            for i, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        common.optimizer_step(optimizer, 0.01, 0.0)
        for old, p, q in zip(before, *(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(4 * (q - old), p - old, atol=2e-6, rtol=1e-3)


def test_the_learning_rate_of_the_vae(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(PriorOptions.PRESETS, "plain", PriorOptions.PRESETS["plain"] | dict(vae_lr_ratio=0.0))
    start = f"--preset plain --vae {trained}/runs/vae --joint --ema 0"
    call(train_prior.main, f"{start} {PRIOR_SIZE} {COMMON} --steps 2", monkeypatch, tmp_path)
    folders = trained / "runs" / "vae", tmp_path / "runs" / "cola"
    before, after = (load_file(folder / "cola_vae" / "model.safetensors") for folder in folders)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert math.isfinite(sum(value.sum().item() for value in after.values()))
    dit = load_file(folders[1] / "cola_dit" / "model.safetensors")
    assert dit["txt_out.proj.weight"].any()  # zero at the start: the prior itself has learned


@pytest.mark.parametrize("script", ["vae", "prior"])
def test_the_scripts_hand_on_clipping_and_decay(script, trained, text, tmp_path, monkeypatch):
    seen, real_step = [], training.optimizer_step

    def watched_step(optimizer, lr, clip):
        seen.append((clip, {group["weight_decay"] for group in optimizer.param_groups}))
        return real_step(optimizer, lr, clip)

    monkeypatch.setattr(training, "optimizer_step", watched_step)
    main, source = {
        "vae": (train_vae.main, f"--data {text} --vocab-size 300 {VAE_SIZE}"),
        "prior": (train_prior.main, f"--vae {trained}/runs/vae --n-codes 0 {PRIOR_SIZE}"),
    }[script]
    call(main, f"{source} {COMMON} --steps 1 --clip 0.37", monkeypatch, tmp_path)
    assert seen == [(0.37, {0.01, 0.0})]  # the default; 0: of vectors
