"""Ours, not the paper's: a read-out for latents that gather around few points.  docs/recipe.md measures the benefit."""

import torch
import torch.nn as nn

from extras.draws import choose

CODE_TOKENS = 1 << 16  # enough of the training text to find the codes in


class Codebook(nn.Module):
    """A read-out for latents that gather around K points, the codes e_k.

    Let z0 be drawn from the mixture sum_k pi_k N(e_k, s^2 I).  Of z_t = (1 - t) z0 + t z1 everything is known then;
    with r = t^2 + (1 - t)^2 s^2, the code has the weights m_k without any context, and those of the network are w_k:

        m_k(z_t) = const pi_k exp(((1 - t) z_t.e_k - (1 - t)^2 |e_k|^2 / 2) / r),      w_k = const m_k exp(h_k)
        v = E[z1 - z0 | z_t] = ((t - (1 - t) s^2) z_t - t e) / r,                        e = sum_k w_k e_k

    The network starts with h = 0, the velocity of the marginal q(z0), which a plain prior takes most of a short
    training to find, and only has to learn what the context says.

    It assumes what is true of a small VAE: the latents of a token lie in one place, wherever the token stands.  The
    conceptual price: the codes are found in latents alone (`fit`), but they stand for tokens, so this prior does know
    something of the surface."""

    def __init__(self, config):
        super().__init__()
        self.logits = nn.Linear(config.dim, config.n_codes)
        self.register_buffer("codes", torch.zeros(config.n_codes, config.latent_dim))
        self.register_buffer("share", torch.full((config.n_codes,), 1 / config.n_codes))  # pi_k; 0 for unused codes
        self.register_buffer("variance", torch.ones(()))  # s^2

    def forward(self, x, z, t):
        """x (B, n, C) features, z (B, n, d), t (B or 1, n or 1, 1) -> velocity (B, n, d), log w_k (B, n, K)."""
        with torch.autocast(z.device.type, enabled=False):
            log_w = self.logits(x.to(self.logits.weight.dtype)).float() + self.marginal(z, t)
            log_w = log_w.log_softmax(-1)
            signal = t - (1 - t) * self.variance
            return (signal * z - t * (log_w.exp() @ self.codes.float())) / self.spread(t), log_w

    def spread(self, t):
        """r, the variance of z_t around (1 - t) e_k, per channel."""
        return t**2 + (1 - t) ** 2 * self.variance.float()  # of bf16 weights, too: the exponents need all digits

    def marginal(self, z, t):
        """log m_k(z_t), up to a constant: (B, n, K)."""
        codes, r = self.codes.float(), self.spread(t)
        with torch.autocast(z.device.type, enabled=False):
            nearness = (1 - t) / r * (z.float() @ codes.T) - (1 - t) ** 2 / (2 * r) * codes.square().sum(-1)
            return nearness + self.share.float().clamp(min=1e-30).log()  # no infinities, for guidance subtracts them

    def draw(self, v, log_w, z, t, scale, uniform):
        """The velocity v (B, n, d) towards one code, drawn from the weights w, in place of their mean.

        A step of the solver then leads towards a latent that a token can have, however long it is; the mean of many
        codes is none, and takes many steps to become one.  scale: guidance, m (w / m)^scale: it needs no second pass,
        since the marginal is known.  uniform (B, n): from 0 to 1, what to draw by."""
        with torch.autocast(z.device.type, enabled=False):
            marginal, codes = self.marginal(z, t), self.codes.float()
            drawn = choose((marginal + scale * (log_w - marginal)).softmax(-1), uniform)
            return v + t / self.spread(t) * (log_w.exp() @ codes - codes[drawn])

    def nearest(self, z0):
        """The index of the code nearest to each clean latent: (..., d) -> (...)."""
        with torch.autocast(z0.device.type, enabled=False):
            distance = self.codes.square().sum(-1) / 2 - z0.float() @ self.codes.float().T
        return distance.masked_fill(self.share == 0, float("inf")).argmin(-1)

    @torch.no_grad()
    def fit(self, mu, variance):
        """k-means of posterior means mu (N, d); variance: that of the posterior, a mean over all.

        Starts from the latent that is farthest from all codes so far (Gonzalez 1985), until none is farther than the
        posterior's own noise reaches, or all codes are in use."""
        found, distance = [mu[0]], (mu - mu[0]).square().sum(-1)
        while len(found) < len(self.codes) and distance.max() > variance * mu.shape[1]:
            found.append(mu[distance.argmax()])
            distance = torch.minimum(distance, (mu - found[-1]).square().sum(-1))
        self.codes[: len(found)] = torch.stack(found)
        self.share.copy_(torch.arange(len(self.codes)) < len(found))
        for _ in range(5):
            nearest = self.nearest(mu)
            count = nearest.bincount(minlength=len(self.codes))
            total = torch.zeros_like(self.codes).index_add_(0, nearest, mu)
            self.codes.copy_(torch.where(count[:, None] > 0, total / count[:, None].clamp(min=1), self.codes))
        self.share.copy_((count + 0.5) * (self.share > 0))  # 0.5: a code that was seen once has some weight, too
        self.share.div_(self.share.sum())
        self.variance.copy_(variance + (mu - self.codes[nearest]).square().mean())


@torch.no_grad()
def fit_codes(codebook, vae, idx):
    """Find the codes in the latents of tokens idx (N, L)."""
    mu, logvar = zip(*((q.mu, q.logvar) for q in map(vae.encode, idx.split(64))), strict=True)
    variance = 0.0 if logvar[0] is None else torch.cat(logvar).exp().mean() * vae.config.scaling_factor**2
    codebook.fit(vae.to_dit(torch.cat(mu)).flatten(0, 1), variance)
