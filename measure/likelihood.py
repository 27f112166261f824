"""How likely is a text?  log p(x) bounded from below, and the density of the prior's flow behind it.

    log p(x)  >=  E_q [ log p(x | z0) + log p(z0) - log q(z0 | x) ]          ELBO; the paper's Eq. 3.19 to 3.21

docs/evaluation.md says how far the figures can be trusted.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import check_ids, pad_rows, prompt_ids
from extras.draws import block_generators
from flow import solve, training_layout, velocity_of_all_blocks
from vae import Posterior


def flow_log_prob(dit, clean, zt=None, start=0.0, steps=128, probe=None):
    """log p(zt | clean history) of every block at the time `start`, in nats, (B, n_blocks); no gradient.

    clean (B, n, d): the finished latents; zt (B, n, d): those whose density is asked for, default the finished ones.
    The flow is that of the velocity alone: a self-conditioned prior sees no estimate here, for its density would depend
    on the way.  Along the flow, d log p(z_t) / dt = -div v (the instantaneous change of variables, arXiv:1806.07366),
    so if zt comes from the noise z1,

        log p(zt) = log N(z1; 0, I) + integral from start to 1 of div v dt.

    All blocks are solved at once, with `steps` steps of Heun's method, shortest near `start`, where densities of data
    are narrow.  probe (B, n, d) of random signs e: Hutchinson's unbiased estimate e^T J e of the divergence, with the
    same e all along the way.  None: the exact divergence, which costs block_size * d times as much.
    Raises ValueError for steps below 1 or a start outside [0, 1)."""
    if steps < 1 or not 0 <= start < 1:
        raise ValueError(f"{steps} steps from time {start}: there must be at least 1, from a time in [0, 1)")
    block_size = dit.config.block_size
    B, n, d = clean.shape
    times = (start + (1 - start) * torch.linspace(0, 1, steps + 1) ** 2).tolist()
    if probe is None:
        place = torch.arange(n, device=clean.device)[:, None] % block_size * d + torch.arange(d, device=clean.device)
        probes = [(place == k).float().expand(B, n, d) for k in range(block_size * d)]  # one channel of every block
    else:
        probes = [probe]

    # Without FlexAttention, which would be compiled anew for every length and cannot be differentiated twice.
    layout = training_layout(n, block_size, dit.rope, clean.device, flex=False)

    def velocity(state, t):  # state (B, n, d + 1): the latents and, in the last channel, the integral so far
        with torch.enable_grad():
            z = state[..., :d].detach().requires_grad_()
            v = velocity_of_all_blocks(dit, clean, z, torch.tensor([t], device=z.device), layout=layout)
            # A block depends on no other noisy block: the Jacobian of all is made of each block's own.
            products = ((e, torch.autograd.grad(v, z, e, retain_graph=e is not probes[-1])[0]) for e in probes)
            div = sum((e * product).sum(-1) for e, product in products)  # (B, n)
        return torch.cat([v.detach(), div[..., None]], dim=-1)

    state = solve(velocity, F.pad(clean if zt is None else zt, (0, 1)), times, "heun")
    z1, integral = state[..., :d], state[..., d]
    return block_sum(integral - 0.5 * (z1.square() + math.log(2 * math.pi)).sum(-1), block_size)


def block_sum(x, block_size):
    """Sums over the latents of each block: (B, n) -> (B, n_blocks)."""
    return F.pad(x, (0, -x.shape[1] % block_size)).unflatten(1, (-1, block_size)).sum(-1)


def log_density(posterior, z):
    """log q(z | x) in nats per latent.  (B, n)"""
    squares = (z - posterior.mu).square() * torch.exp(-posterior.logvar)
    return -0.5 * (squares + posterior.logvar + math.log(2 * math.pi)).sum(-1)


def noised(posterior, t):
    """q(z_t | x), the Posterior of (1 - t) z0 + t z1 with noise z1 ~ N(0, I)."""
    return Posterior((1 - t) * posterior.mu, torch.log((1 - t) ** 2 * torch.exp(posterior.logvar) + t**2))


class LogWeights(NamedTuple):
    """Of latents drawn from the posterior, each (K, B), in nats."""

    decoder: torch.Tensor  # log p(x | z)
    prior: torch.Tensor  # log p(z)
    posterior: torch.Tensor  # log q(z | x)

    @property
    def total(self):
        """log of p(x, z) / q(z | x)."""
        return self.decoder + self.prior - self.posterior


def log_prob(model, texts, n_samples=1, **options):
    """log p(x) of every text (str or ids), in nats, (B,), from n_samples samples.

    One sample is the ELBO, log p(x | z0) + log p(z0) - log q(z0 | x) with z0 ~ q(z0 | x): in expectation a lower
    bound.  More give the log of the mean weight (IWAE, arXiv:1509.00519), a tighter bound, but one only with
    exact=True: the exponential of Hutchinson's unbiased estimate of log p(z0) is too high on average.
    options: of `log_weights`."""
    log_w = log_weights(model, prompt_ids(model.tokenizer, texts), n_samples, **options).total  # (K, B)
    return log_w.logsumexp(0) - math.log(n_samples)


def conditional_log_prob(model, prompts, responses, n_samples=1, row_ids=None, **options):
    """log p(response | prompt) = log p(prompt, response) - log p(prompt), in nats, (B,).

    Both terms are bounds, so the difference is none; but they share their random numbers, and with one sample all
    that belongs to whole blocks of the prompt cancels.  Rows to be compared, such as the answers to one question,
    should share a row_id.  A prompt or response: str or ids."""
    before, after = prompt_ids(model.tokenizer, prompts), prompt_ids(model.tokenizer, responses)
    whole = [a + b for a, b in zip(before, after, strict=True)]
    row_ids = list(range(len(whole)) if row_ids is None else row_ids)
    keys = list(zip(map(tuple, before), row_ids, strict=True))
    unique = list(dict.fromkeys(keys))  # a prompt with many responses is computed once, behind the whole texts
    rows, their_ids = [list(ids) for ids, _ in unique], [row_id for _, row_id in unique]
    log_p = log_prob(model, whole + rows, n_samples, row_ids=row_ids + their_ids, **options)
    of_prompt = dict(zip(unique, log_p[len(whole) :], strict=True))
    return log_p[: len(whole)] - torch.stack([of_prompt[key] for key in keys])


@torch.no_grad()
def log_weights(model, ids, n_samples=1, steps=128, read_time=0.0, exact=False, pad_id=None, seed=0, row_ids=None):
    """The terms of log p(x, z0) / q(z0 | x) for n_samples draws z0 ~ q(z0 | x): `LogWeights` of (K, B), in nats.

    ids: a list of token ids for every row.  The last block is padded for the encoder, with pad_id as in
    `generate_blocks`; what the padding says is left open and costs nothing.
    steps, exact: of the flow's likelihood (`flow_log_prob`); exact: without Hutchinson's estimator.
    read_time: 0 is the paper's model.  Above 0 it is another reading of the same networks, not in the paper: the
    flow stops at this time, the decoder reads the latent z_t found there, and the encoder turns the tokens into the
    history of the next block.  The latent variable is z_t, and q(z_t | x) is q(z0 | x) noised to that time.  The
    bound can be far tighter, since the finest detail of the latents, which no decoder needs, is not asked for.
    seed, row_ids: of the random numbers, as in `generate_blocks`.
    Raises ValueError for an autoencoder without variance, ids outside the vocabulary, and options out of range."""
    c, device = model.vae.config, model.device
    if not c.use_variation:
        raise ValueError("this VAE has no variance (use_variation is false), hence no likelihood")
    if n_samples < 1:
        raise ValueError(f"n_samples {n_samples} must be at least 1")
    pad_id = c.vocab_size - 1 if pad_id is None else pad_id
    check_ids(ids + [[pad_id]], c.vocab_size)
    if not any(ids):
        return LogWeights(*torch.zeros(3, n_samples, len(ids), device=device))
    block_size = model.dit.config.block_size
    shape, chunk = (block_size, c.latent_dim), block_size * c.patch_size
    idx = pad_rows(ids, math.lcm(c.block_size, block_size) * c.patch_size, pad_id, device)
    lengths = torch.tensor([len(row) for row in ids], device=device)
    is_text = torch.arange(idx.shape[1], device=device) < lengths[:, None]  # (B, L)
    is_block = is_text[:, ::chunk]  # (B, n_blocks)
    posterior = model.vae.encode(idx)
    q0 = Posterior(model.vae.to_dit(posterior.mu), posterior.logvar + 2 * math.log(c.scaling_factor))
    qt = noised(q0, read_time) if read_time > 0 else q0
    row_ids = range(len(ids)) if row_ids is None else row_ids
    generators = [block_generators(seed, row_ids, b) for b in range(is_block.shape[1])]

    def draw():  # (B, n, d) of N(0, I); the numbers of a block do not depend on what follows it
        blocks = [[torch.randn(shape, generator=g) for g in block] for block in generators]
        return torch.cat([torch.stack(block) for block in blocks], dim=1).to(device)

    probe = None if exact else draw().sign()  # one for all samples, whose weights are to be compared
    terms = []
    for _ in range(n_samples):
        z0 = q0.at(draw())
        zt = qt.at(draw()) if read_time > 0 else z0
        log_p_x = model.vae.log_likelihood(zt, idx)  # (B, L)
        log_p_z = flow_log_prob(model.dit, z0, zt, read_time, steps, probe)  # (B, n_blocks)
        log_q = block_sum(log_density(qt, zt), block_size)  # (B, n_blocks)
        terms.append([(log_p_x * is_text).sum(1), (log_p_z * is_block).sum(1), (log_q * is_block).sum(1)])
    return LogWeights(*(torch.stack(term) for term in zip(*terms, strict=True)))
