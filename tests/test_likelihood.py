"""Likelihoods against closed forms: Gaussian priors, whose best velocity is known, and linear-Gaussian VAEs."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from test_models import small_dit, small_vae
from torch.distributions import MultivariateNormal, Normal

from cola import ColaDLM
from measure import likelihood
from measure.likelihood import flow_log_prob
from vae import Posterior, VAEConfig

# ----------------------------------------------------------------------------------------------------------------------
# The flow


class GaussianPrior:
    """In place of a DiT: the velocity E[z1 - z0 | z_t] of blocks N(history's last latent, cov) of 2 x 2 numbers."""

    def __init__(self, cov, block_size=2):
        self.cov, self.config = cov, SimpleNamespace(block_size=block_size)

    def mean(self, clean):
        """Of each block: the last latent of the block before it, for every latent; 0 for the first block."""
        blocks = clean.unflatten(1, (-1, self.config.block_size))  # (B, blocks, 2, d)
        last = torch.cat([torch.zeros_like(blocks[:, :1]), blocks[:, :-1]], 1)[:, :, -1:]
        return last.expand_as(blocks).flatten(2)  # (B, blocks, 2 d)

    def rope(self, pos):
        return pos

    def __call__(self, z, t, time_index, layout, n_out, estimate):
        n = n_out
        clean, zt = z[:, : z.shape[1] - n], z[:, -n:]
        d, block_size = z.shape[2], self.config.block_size
        mean = self.mean(torch.cat([clean, zt[:, :block_size]], 1))  # nothing reads the last block
        t = t[0, 1]
        scale = (t * torch.eye(len(self.cov)) - (1 - t) * self.cov) @ torch.linalg.inv(self.at(t))
        x = zt.unflatten(1, (-1, block_size)).flatten(2)  # (B, blocks, 2 d)
        v = -mean + (x - (1 - t) * mean) @ scale.T
        return v.flatten(1).unflatten(1, (n, d))

    def at(self, t):
        """Covariance of z_t."""
        return (1 - t) ** 2 * self.cov + t**2 * torch.eye(len(self.cov))


@pytest.fixture
def prior():
    root = torch.tensor([[0.5, 0, 0, 0], [0.3, 0.4, 0, 0], [-0.2, 0.1, 0.6, 0], [0.1, 0.2, 0.3, 0.3]])
    return GaussianPrior(root @ root.T)


def exact(prior, clean, zt, t):
    x = zt.unflatten(1, (-1, 2)).flatten(2)
    return MultivariateNormal((1 - t) * prior.mean(clean), prior.at(torch.tensor(t))).log_prob(x)


@pytest.mark.parametrize("t", [0.0, 0.3])
def test_density_of_a_gaussian_flow(prior, t):
    clean, zt = torch.randn(3, 6, 2), torch.randn(3, 6, 2)
    zt = clean if t == 0 else zt
    wanted = exact(prior, clean, zt, t)  # (3, 3)
    found = flow_log_prob(prior, clean, zt, t, steps=64)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=5e-3)
    errors = [(flow_log_prob(prior, clean, zt, t, steps=n) - wanted).abs().mean() for n in (8, 16, 32)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]  # second order: a quarter for half the step


def test_hutchinson_estimates_the_exact_divergence(prior):
    z = torch.randn(1, 6, 2)
    wanted = flow_log_prob(prior, z, steps=16)
    probes = torch.randint(0, 2, (2000, 6, 2)) * 2.0 - 1
    found = flow_log_prob(prior, z.expand(2000, -1, -1), steps=16, probe=probes)  # (2000, 3)
    assert found.std(0).min() > 0.1  # it is an estimate
    assert ((found.mean(0) - wanted[0]).abs() < 4 * found.std(0) / 2000**0.5).all()


def test_density_of_a_block_depends_on_earlier_blocks_only():
    dit, z = small_dit(), torch.randn(1, 12, 8)  # blocks of 4
    before = flow_log_prob(dit, z, steps=4)[0]
    z[:, 5] += 1
    after = flow_log_prob(dit, z, steps=4)[0]
    assert before[0] == after[0] and before[1] != after[1] and before[2] != after[2]


# ----------------------------------------------------------------------------------------------------------------------
# The whole model


class StandardNormalPrior(nn.Module):
    """The best velocity for z0 ~ N(0, I)."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(block_size=1, latent_dim=1)

    def rope(self, pos):
        return pos

    def forward(self, z, t, time_index, layout, n_out, estimate):
        t = t[0, 1]
        return z[:, -n_out:] * (2 * t - 1) / ((1 - t) ** 2 + t**2)


class LinearGaussianVAE(nn.Module):
    """z ~ N(0, 1), x | z ~ N(5 + 2 z, 1.5^2), for tokens that are read as numbers.  `excess` spoils the posterior."""

    weight, bias, std = 2.0, 5.0, 1.5

    def __init__(self, excess=0.0):
        super().__init__()
        self.config = VAEConfig(vocab_size=10, latent_dim=1, block_size=1)
        self.excess = nn.Parameter(torch.tensor(excess))

    def encode(self, idx):
        var = self.std**2 / (self.weight**2 + self.std**2)
        mu = self.weight * (idx - self.bias) / (self.weight**2 + self.std**2)
        return Posterior(mu[..., None] + self.excess, torch.full_like(mu, math.log(var))[..., None] + self.excess)

    def to_dit(self, z):
        return z

    def log_likelihood(self, z, idx):
        return Normal(self.bias + self.weight * z[..., 0], self.std).log_prob(idx.float())

    def log_marginal(self, idx, latent_var=1.0):
        return Normal(self.bias, (self.weight**2 * latent_var + self.std**2) ** 0.5).log_prob(torch.tensor(idx) * 1.0)


TEXT = [[1, 5, 9, 4], [2, 3]]


def linear_model(excess=0.0):
    return ColaDLM(LinearGaussianVAE(excess), StandardNormalPrior())


def test_true_posterior_gives_the_marginal_likelihood():
    model = linear_model()
    wanted = torch.stack([model.vae.log_marginal(row).sum() for row in TEXT])
    for n_samples in (1, 3):
        torch.testing.assert_close(likelihood.log_prob(model, TEXT, n_samples), wanted, rtol=0, atol=2e-3)
    parts = likelihood.conditional_log_prob(model, [[1, 5], []], [[9, 4], [2, 3]])
    wanted = torch.stack([model.vae.log_marginal(row).sum() for row in ([9, 4], [2, 3])])
    torch.testing.assert_close(parts, wanted, rtol=0, atol=2e-3)


@pytest.mark.parametrize("read_time", [0.0, 0.4])
def test_elbo_and_iwae_of_a_wrong_posterior(read_time):
    """ELBO = log p(x) - KL(q || p(z | x)) exactly, and the IWAE lies between it and log p(x)."""
    model, x, n = linear_model(excess=0.5), 7, 4000
    # As many rows as samples: one solve for all.
    log_w = likelihood.log_weights(model, [[x]] * n, read_time=read_time).total[0]
    var = (1 - read_time) ** 2 + read_time**2  # of z_t, under the prior
    w, s = model.vae.weight, model.vae.std
    log_p = model.vae.log_marginal(x, var).item()
    q = likelihood.noised(model.vae.encode(torch.tensor([[x]])), read_time)
    true_var = 1 / (1 / var + w**2 / s**2)
    true_mean = true_var * w * (x - model.vae.bias) / s**2
    truth = Posterior(torch.full((1, 1, 1), true_mean), torch.full((1, 1, 1), true_var).log())
    elbo = log_p - q.kl(truth).item()
    assert elbo < log_p - 0.1
    assert abs(log_w.mean().item() - elbo) < 4 * log_w.std().item() / n**0.5
    iwae = log_w.view(-1, 100).logsumexp(1) - math.log(100)  # (40,)
    error = 4 * iwae.std().item() / 40**0.5
    assert elbo + error < iwae.mean().item() < log_p + error


def test_probabilities_of_all_texts_sum_to_one():
    """A real VAE and DiT with random weights, and all texts of one token."""
    vae, dit = small_vae(vocab_size=5, latent_dim=2, block_size=1), small_dit(latent_dim=2, block_size=1)
    vae.encoder.final_layer.weight.data[2:] *= 0.1  # a wide posterior, so that no weight is huge
    vae.encoder.final_layer.bias.data[2:] = 0.8
    dit.txt_out.proj.weight.data *= 0.5
    model, n = ColaDLM(vae, dit), 1500
    texts = [[token] for token in range(5) for _ in range(n)]
    log_w = likelihood.log_weights(model, texts, steps=24, exact=True).total[0].view(5, n)
    p = log_w.exp()
    assert abs(p.mean(1).sum().item() - 1) < 4 * (p.var(1).sum() / n).sqrt().item() < 0.2


def test_rows_do_not_depend_on_the_batch_and_prefixes_share_their_noise():
    model = ColaDLM(small_vae(), small_dit())
    texts = [[1, 2, 3, 4, 5], [6] * 12, [7, 8]]
    together = likelihood.log_weights(model, texts, n_samples=2, steps=4)
    for i, text in enumerate(texts):
        alone = likelihood.log_weights(model, [text], n_samples=2, steps=4, row_ids=[i])
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a[:, 0], b[:, i], rtol=1e-4, atol=1e-3)
    assert likelihood.conditional_log_prob(model, texts, [[], [], []], steps=4).abs().max() < 1e-3
    assert likelihood.log_prob(model, [[], []], steps=4).tolist() == [0.0, 0.0]


def test_scaled_latents_have_the_same_likelihood():
    """scaling_factor changes the units in which the prior sees the latents, not what a fitting prior says of them."""
    plain = ColaDLM(small_vae(), small_dit())
    scaled = ColaDLM(small_vae(scaling_factor=2.0, shifting_factor=0.5), small_dit())
    a, b = (likelihood.log_weights(m, [[1, 2, 3, 4]], steps=8) for m in (plain, scaled))
    d, n = 8, 4
    assert abs((a.posterior - b.posterior).item() - n * d * math.log(2.0)) < 1e-3


def test_no_likelihood_without_variance():
    model = ColaDLM(small_vae(use_variation=False), small_dit())
    with pytest.raises(ValueError, match="no variance"):
        likelihood.log_prob(model, [[1, 2]])
