"""Flow matching in latent space: the stage-2 loss and the ODE solvers.

Data sit at t = 0 and noise at t = 1 (several other libraries have it the other way round):

    z_t = (1 - t) z0 + t z1,    z1 ~ N(0, I),    velocity v = dz/dt = z1 - z0

That is the velocity of one pair.  The squared error is smallest for the mean E[z1 - z0 | z_t, history], whose ODE
carries N(0, I) to the data: generation integrates it from t = 1 down to t = 0 (Eq. 3.2).
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

from dit import CLEAN, NOISY
from extras.kernels import flex_mask
from extras.stagger import staggered
from transformer import Layout, block_mask


def sample_times(shape, loc, scale, generator=None, device=None, block_size=1, stagger=0.0):
    """Logit-normal times t = sigmoid(N(loc, scale)), of that shape; with a stagger, shape is (B, n_blocks), and the
    result has a time for every latent, (B, n_blocks block_size), see `staggered`.

    With loc 1 the median is 0.73: high noise decides which text appears.  The more channels a latent has, the
    longer it can be told apart in noise, and the higher loc should be."""
    x = torch.randn(shape, generator=generator, device=device)
    if stagger > 0:
        x = torch.special.ndtri(staggered(torch.special.ndtr(x), block_size, stagger))
    return torch.sigmoid(loc + scale * x)


def simulated_prompts(B, n, block_size, probability, generator=None, device=None):
    """Latents that play the part of a prompt: with `probability`, a block keeps a random proper prefix clean.

    Generation from a prompt that ends inside a block starts like that; but there the encoder saw padding in the rest of
    the block, here it saw the target text.  No effect on blocks of one latent.  Returns bool (B, n)."""
    chosen = torch.rand(B, -(-n // block_size), generator=generator, device=device) < probability  # of blocks
    length = torch.randint(1, max(block_size, 2), chosen.shape, generator=generator, device=device)
    inside = torch.arange(block_size, device=device) < length[..., None]  # (B, n_blocks, block_size)
    return (inside & chosen[..., None] & (block_size > 1)).flatten(1)[:, :n]


def flow_matching_loss(dit, z0, z1, t, prompt=None, valid=None, block_size=None, code_weight=0.0, count=None,
                       reduce=True):  # fmt: skip
    """L_FM of all blocks in one pass (stage 2, Eq. 3.7).

    z0 (B, n, d) clean latents; z1 (B, n, d) noise; t: a time for every row (B,), block (B, n_blocks) or latent (B, n);
    block_size: default that of the dit's configuration.
    Latents with times of their own that are at 0 have arrived, and carry no loss; those at 1 wait, and learn what can
    be known before their turn.
    prompt: bool (B, n), latents that stay clean; valid: bool (B, n), False on padding: no loss there, either.
    count: what the sum over latents is divided by; None: how many carry loss.  A number that does not depend on what
    was drawn, such as the one expected, makes the loss of a batch the same however it is cut into passes.
    code_weight: for a prior with a `Codebook`, adds code_weight times -log w(z_t) of the code nearest to z0, in nats
    per latent.  The true distribution of codes has the lowest of both, but the logarithm finds it faster.
    Returns the mean squared velocity error per channel, and that term; with reduce=False, of every latent, (B, n).

    History and target are constants.  In joint training the gradient reaches the encoder through z_t alone: otherwise
    it could lower the loss by moving its own target, or by writing into the history what the next block will be.

    No condition is ever dropped for guidance: the first block of every row has no history, and trains the unconditional
    velocity."""
    clean, block_size = z0.detach(), block_size or dit.config.block_size
    layout = training_layout(z0.shape[1], block_size, dit.rope, z0.device)
    is_clean = torch.zeros_like(z0[..., 0], dtype=torch.bool) if prompt is None else prompt
    has_loss = ~is_clean if valid is None else valid & ~is_clean
    if t.shape == z0.shape[:2]:  # a time for every latent
        is_clean, has_loss = is_clean | (t == 0), has_loss & (t > 0)
    zt = torch.where(is_clean[..., None], clean, torch.lerp(z0, z1, at_latents(t, z0, block_size)))
    estimate = own_estimate(dit, clean, zt, t, is_clean, block_size, layout) if dit.config.self_conditioning else None
    v = velocity_of_all_blocks(dit, clean, zt, t, is_clean, block_size, estimate, layout, with_codes=code_weight > 0)
    v, log_w = v if code_weight > 0 else (v, None)
    loss = (v - (z1 - clean)).square().mean(-1)  # (B, n)
    if code_weight > 0:
        loss = loss - code_weight * log_w.gather(-1, dit.codebook.nearest(clean)[..., None])[..., 0]
    loss = loss * has_loss
    return loss.sum() / (has_loss.sum().clamp(min=1) if count is None else count) if reduce else loss


@torch.no_grad()
def own_estimate(dit, clean, zt, t, is_clean, block_size, layout):
    """Self-conditioning: what the network itself takes z0 to be at zt, which is zt - t v.  (B, n, d)

    In training, the second half of the rows has none (0), as in the first step of a solver; the first costs a pass."""
    estimate, rows = torch.zeros_like(zt), slice(len(zt) // 2 if dit.training else None)
    if len(zt[rows]) > 0:
        v = velocity_of_all_blocks(dit, clean[rows], zt[rows], t[rows], is_clean[rows], block_size, layout=layout)
        found = zt[rows] - at_latents(t[rows], v, block_size) * v
        estimate[rows] = torch.where(is_clean[rows, :, None], clean[rows], found)
    return estimate


def time_of_latents(t, n, block_size):
    """Which of its times t (B,) or (B, T) each of a row's n latents has, (n,): its own, its block's or the only one."""
    return (torch.arange(n, device=t.device) // (1 if t[0].numel() == n else block_size)).clamp(max=t[0].numel() - 1)


def at_latents(t, z, block_size):
    """The times t, of rows, blocks or latents, at all latents of z (B, n, d): (B, n, 1)."""
    return t.view(len(t), -1)[:, time_of_latents(t, z.shape[1], block_size), None]


def velocity_of_all_blocks(dit, clean, zt, t, is_clean=None, block_size=None, estimate=None, layout=None, **options):
    """The velocity of all blocks of a sequence in one pass, each with its own clean history.  (B, n, d)

    clean (B, n, d): the finished latents; zt (B, n, d): every block on its way; t: of `flow_matching_loss`; is_clean:
    bool (B, n), which latents of zt are clean and have time 0; estimate (B, n, d): of z0, for self-conditioning;
    layout: default that of `training_layout`; options: of `DiT`.

    In one line as [clean without its last block | zt], both at the same positions, so that every noisy block is
    predicted from exactly the clean history that the sampler's cache would hold; the last clean block is no history."""
    n, block_size = zt.shape[1], block_size or dit.config.block_size
    n_clean = clean_length(n, block_size)
    time_index = NOISY + time_of_latents(t, n, block_size)[None]  # of [0, t, ...]
    if is_clean is not None:
        time_index = torch.where(is_clean, CLEAN, time_index)
    return dit(
        torch.cat([clean[:, :n_clean], zt], dim=1),  # (B, n_clean + n, d)
        t=F.pad(t.view(len(t), -1), (1, 0)),  # with time 0 in front
        time_index=F.pad(time_index, (n_clean, 0), value=CLEAN),
        estimate=None if estimate is None else F.pad(estimate, (0, 0, n_clean, 0)),
        layout=layout or training_layout(n, block_size, dit.rope, zt.device),
        n_out=n,
        **options,
    )


def clean_length(n, block_size):
    """Latents of n that are history to others: all but those of the last block."""
    return (n - 1) // block_size * block_size


def training_layout(n, block_size, rope, device, flex=None):
    """The Layout of [clean | noisy] for n latents, N in all: the clean half lacks the last block.
    rope: a function pos (1, N) -> table.  flex: with a mask for FlexAttention; default on CUDA."""
    n_clean = clean_length(n, block_size)
    pos = torch.cat([torch.arange(n_clean), torch.arange(n)])[None]
    noisy, block = torch.arange(n_clean + n) >= n_clean, pos // block_size
    if device.type == "cuda" if flex is None else flex:
        return Layout(rope(pos), flex_mask(block_mask, tuple(block[0].tolist()), tuple(noisy.tolist()), device))
    mask = block_mask(block[..., None], block[:, None], noisy[:, None], noisy)  # (1, N, N)
    return Layout(rope(pos), mask[:, None].to(device))


def solver_times(steps, grid="uniform", loc=1.0, scale=1.0, block_size=1, stagger=0.0):
    """The steps + 1 times of a solver from t = 1 to 0, a list: `uniform`, or `quantiles` of those of training,
    sigmoid(N(loc, scale)), dense where it is decided which text appears.  With a stagger: tensors (block_size, 1)."""
    u = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    if stagger > 0:
        u = staggered(u[:, None], block_size, stagger)[..., None]
    times = torch.sigmoid(loc + scale * torch.special.ndtri(u)) if grid == "quantiles" else u
    return list(times.float()) if stagger > 0 else times.tolist()


def solve(velocity, z, times, solver="euler", eta=0.0, noise=None, watch=None):
    """Integrate dz/dt = velocity(z, t) along `times`, a list, down or up.

    z any shape.  times: numbers or, going down, tensors that broadcast with z: what does not change stays where it is.
    `euler`: one evaluation a step.  `heun`: two, the mean of the slopes at both ends of the step (the last step of a
    run to t = 0 evaluates at 0 as well).  watch(z, t): called after every step.
    eta: above 0, for times that go down, every step puts fresh noise, noise() of the shape of z (default: the global
    generator's), in place of a part of the old, as much as in DDIM (arXiv:2010.02502, Eq. 16): with 1, the ancestral
    sampler of DDPM.  With many steps, all times keep the distribution that the flow gives them, and errors of earlier
    steps are forgotten."""
    if solver not in ("euler", "heun"):
        raise ValueError(f"solver {solver} must be euler or heun")
    for t, following in pairwise(times):
        dt = following - t
        v = velocity(z, t)
        if solver == "heun":
            v = (v + velocity(z + dt * v, following)) / 2
        if eta > 0:
            z0, z1 = z - t * v, z + (1 - t) * v  # the data and the noise of this velocity
            kept = (1 - t) / t * following / (1 - following)  # signal/noise now over the next; NaN for what stays
            fresh = eta * (1 - kept**2) ** 0.5
            new = noise() if noise else torch.randn_like(z)
            moved = (1 - following) * z0 + following * ((1 - fresh**2) ** 0.5 * z1 + fresh * new)
        else:
            moved = z + dt * v
        z = torch.where(dt != 0, moved, z) if isinstance(dt, torch.Tensor) else moved
        if watch is not None:
            watch(z, following)
    return z
