"""The Text VAE: tokens <-> continuous latents (stage 1 of Cola DLM).

The encoder q_phi(z0 | x) turns every patch of tokens into one diagonal Gaussian; the decoder p_theta(x | z0) reads
a block of latents and names all its tokens at once.  Whatever concerns tokens and spelling lives in this file; the
prior (dit.py) only ever sees latents.

Stage 1 minimises (Eq. 3.16)

    -log p(x | z0) + beta KL(q(z0 | x) || N(0, I)) + mask_weight L_mask          z0 ~ q(z0 | x)

(in the small recipe with a noised z0 in the first term, `reconstruction_loss`; the text x is `idx` in code).
Both halves are block-causal transformers (transformer.py), so the decoder can emit text block by block.  Parameter
names are those of the released checkpoint, so a state_dict needs no translation.
"""

import functools
import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import check_sizes
from extras.kernels import in_chunks, run_layer
from transformer import KVCache, apply_rope, attend, make_layout, rope_freqs


@dataclass
class VAEConfig:
    """Defaults are the released 0.5 B model (501,871,574 parameters)."""

    vocab_size: int = 100278
    dim: int = 1536  # C, the width
    ffn_dim: int = 6144  # SwiGLU splits it into value and gate, so the hidden width is half of this
    n_head: int = 12
    n_encoder_layer: int = 4
    n_decoder_layer: int = 4
    latent_dim: int = 16  # d, channels of one latent
    patch_size: int = 1  # p, tokens per latent
    block_size: int = 16  # latents per block of the attention mask
    post_norm: bool = True  # False: ordinary pre-norm blocks
    qk_norm: bool = True  # LayerNorm on queries and keys, over the whole width
    qk_bias: bool = False  # bias of the query/key/value projection
    bias: bool = True  # bias of every other linear layer but the two of patches, which have one
    encoder_last_ln: bool = True  # normalise mu, so that |mu|^2 = d: this fixes the scale of the latents
    use_variation: bool = True  # False: a plain autoencoder, whose posterior has no variance, and mu always normalised
    scaling_factor: float = 1.0  # the DiT sees (z - shifting_factor) * scaling_factor
    shifting_factor: float = field(default=0.0, metadata=dict(above=-math.inf))
    norm_eps: float = 1e-6
    rope_theta: float = 500000.0
    init_std: float = 0.02

    def __post_init__(self):
        check_sizes(self)
        if self.dim % (2 * self.n_head):
            raise ValueError(f"dim {self.dim} must be a multiple of 2 * n_head = {2 * self.n_head}")
        if self.ffn_dim % 2:
            raise ValueError(f"ffn_dim {self.ffn_dim} must be even: SwiGLU splits it in two")


class Posterior:
    """The diagonal Gaussian q(z0 | x).  mu and logvar (B, n, d) in fp32; a logvar of None means no variance at all."""

    def __init__(self, mu, logvar=None):
        self.mu, self.logvar = mu, logvar

    def sample(self, generator=None):
        """mu + sigma * eps, differentiable in mu and sigma.  (B, n, d)"""
        return self.at(torch.randn(self.mu.shape, generator=generator, device=self.mu.device))

    def at(self, eps):
        """mu + sigma * eps, or mu if there is no variance."""
        return self.mu if self.logvar is None else self.mu + torch.exp(0.5 * self.logvar) * eps

    def kl(self, other=None):
        """KL to another Posterior, or to N(0, I), in nats per latent; 0, a dropped term, without variance.  (B, n)"""
        if self.logvar is None:
            return torch.zeros_like(self.mu[..., 0])
        mu, logvar = (0.0, torch.zeros_like(self.logvar)) if other is None else (other.mu, other.logvar)
        ratio = torch.exp(self.logvar - logvar) + (self.mu - mu) ** 2 * torch.exp(-logvar)
        return 0.5 * (ratio - 1.0 + logvar - self.logvar).sum(-1)

    def entropy(self):
        """Differential entropy in nats per latent, -E[log q(z0 | x)]; 0, a dropped term, without variance.  (B, n)"""
        if self.logvar is None:
            return torch.zeros_like(self.mu[..., 0])
        return 0.5 * (self.logvar + math.log(2 * math.pi) + 1).sum(-1)

    def log_snr(self):
        """log(mean mu^2 / mean sigma^2) over everything: how far the latents stand out of their own noise."""
        return torch.log((self.mu**2).mean() / torch.exp(self.logvar).mean())


def rotate_half(x):
    """The pairs in the VAE (see `transformer.apply_rope`): channel i and channel i + D/2, as in GPT-NeoX."""
    return x.roll(x.shape[-1] // 2, dims=-1)


def half_rope(pos, dim, theta, device):
    """Cosines and sines for `rotate_half`: pos (B, L) -> (B, 1, L, dim) each, in fp32."""
    angle = pos.to(device)[:, None, :, None].float() * rope_freqs(dim, theta, device)  # (B, 1, L, dim/2)
    return torch.cat([angle, angle], dim=-1).cos(), torch.cat([-angle, angle], dim=-1).sin()


class VAEBlock(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, eps = config.dim, config.norm_eps
        self.n_head, self.post_norm, self.layer = config.n_head, config.post_norm, layer
        self.norm_attn = nn.LayerNorm(C, eps)
        self.qkv_proj = nn.Linear(C, 3 * C, bias=config.qk_bias)
        self.q_norm = nn.LayerNorm(C, eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(C, eps) if config.qk_norm else nn.Identity()
        self.attn_out_proj = nn.Linear(C, C, bias=config.bias)
        self.norm_ffn = nn.LayerNorm(C, eps)
        self.ffn_proj = nn.Linear(C, config.ffn_dim, bias=config.bias)
        self.ffn_out = nn.Linear(config.ffn_dim // 2, C, bias=config.bias)

    def attention(self, x, layout, cache):
        q, k, v = self.qkv_proj(x).chunk(3, dim=-1)  # 3 x (B, L, C)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q, k, v = (y.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for y in (q, k, v))  # (B, H, L, D)
        q, k = (apply_rope(y, layout.rope, rotate_half).to(v.dtype) for y in (q, k))
        out = attend(q, k, v, layout, cache, self.layer)
        return self.attn_out_proj(out.transpose(1, 2).flatten(2))

    def ffn(self, x):
        value, gate = self.ffn_proj(x).chunk(2, dim=-1)
        return self.ffn_out(F.silu(gate) * value)

    def forward(self, x, layout, cache=None):
        """x (B, L, C)

        With post_norm the two branches differ: attention reads the raw stream while the stream itself is normalised;
        the feed-forward branch has its output normalised."""
        if self.post_norm:
            x = self.norm_attn(x) + self.attention(x, layout, cache)
            return x + self.norm_ffn(self.ffn(x))
        x = x + self.attention(self.norm_attn(x), layout, cache)
        return x + self.ffn(self.norm_ffn(x))


class TextVAE(nn.Module):
    """`encode`: tokens -> Posterior.  `decode`: latents -> logits."""

    checkpointing = False  # see `extras.kernels.run_layer`

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.mask_id = c.vocab_size
        n_out = 2 * c.latent_dim if c.use_variation else c.latent_dim
        self.encoder = nn.ModuleDict(
            dict(
                wte=nn.Embedding(c.vocab_size + 1, c.dim),  # the last row is that of mask_id, [MASK]
                patch_embedder=nn.Conv1d(c.dim, c.dim, kernel_size=c.patch_size, stride=c.patch_size),
                blocks=nn.ModuleList(VAEBlock(c, i) for i in range(c.n_encoder_layer)),
                final_layer=nn.Linear(c.dim, n_out, bias=c.bias),
            )
        )
        self.decoder = nn.ModuleDict(
            dict(
                in_layer=nn.Linear(c.latent_dim, c.dim, bias=c.bias),
                blocks=nn.ModuleList(VAEBlock(c, i) for i in range(c.n_decoder_layer)),
                unpatch_layer=nn.Linear(c.dim, c.patch_size * c.dim),
                final_norm=nn.LayerNorm(c.dim, c.norm_eps),
                final_layer=nn.Linear(c.dim, c.vocab_size, bias=c.bias),
            )
        )
        self.blocks = [*self.encoder.blocks, *self.decoder.blocks]  # all layers; a list names no parameters
        self.init_weights()

    def init_weights(self):
        """Truncated normal weights (cut at 3 std), zero biases; LayerNorms start with weight 1."""
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d)):
                nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def layout(self, n, device, cache=None, lengths=None):
        """The Layout of n latents behind the histories in `cache`; lengths: see `transformer.make_layout`."""
        c = self.config
        rope = functools.partial(half_rope, dim=c.dim // c.n_head, theta=c.rope_theta, device=device)
        # In training, lengths are few, and each is worth compiling for.
        flex = self.training and torch.device(device).type == "cuda" and cache is None
        return make_layout(n, c.block_size, rope, device, cache, flex=flex, lengths=lengths)

    def encode(self, idx, cache=None):
        """idx (B, L) token ids, L a multiple of patch_size -> Posterior of mu, logvar (B, L/p, d).  With a cache, idx
        continues the text held there, and becomes part of it.

        Rows of different lengths are padded on the right.  No mask is needed for that: a block never sees later
        blocks.  Padding inside the last block of a text does change that block, as in the released model.
        """
        c = self.config
        if idx.shape[1] % c.patch_size:
            raise ValueError(f"{idx.shape[1]} tokens are not a multiple of patch_size {c.patch_size}")
        x = self.encoder.wte(idx)  # (B, L, C)
        x = self.encoder.patch_embedder(x.transpose(1, 2)).transpose(1, 2)  # (B, n, C)
        layout = self.layout(x.shape[1], x.device, cache)
        for block in self.encoder.blocks:
            x = run_layer(block, self.checkpointing, x, layout, cache)
        if cache is not None:
            cache.commit(x.shape[1])
        x = self.encoder.final_layer(x).float()  # (B, n, 2d); from here on in fp32, whatever the precision before
        if not c.use_variation:
            return Posterior(F.layer_norm(x, (c.latent_dim,), eps=c.norm_eps))
        mu, logvar = x.chunk(2, dim=-1)
        if c.encoder_last_ln:
            mu = F.layer_norm(mu, (c.latent_dim,), eps=c.norm_eps)
        return Posterior(mu, logvar.clamp(-30.0, 20.0))

    def to_dit(self, z):
        """A latent of this VAE in the units of the DiT."""
        return (z - self.config.shifting_factor) * self.config.scaling_factor

    def decode(self, z, cache=None, lengths=None):
        """z (B, n, d) latents -> logits (B, n*p, V).  With a cache, z continues the history held there, and becomes
        part of it when the caller commits it.  lengths (B,): see `transformer.make_layout`."""
        return self.decoder.final_layer(self.read(z, cache, lengths))

    def read(self, z, cache=None, lengths=None):
        """All of `decode` except its last layer: (B, n, d) -> (B, n*p, C)."""
        c = self.config
        x = self.decoder.in_layer(z.to(self.decoder.in_layer.weight.dtype))  # (B, n, C)
        layout = self.layout(z.shape[1], z.device, cache, lengths)
        for block in self.decoder.blocks:
            x = run_layer(block, self.checkpointing, x, layout, cache)
        x = self.decoder.unpatch_layer(x)  # (B, n, C*p)
        x = x.unflatten(-1, (c.dim, c.patch_size)).transpose(2, 3).flatten(1, 2)  # (B, n*p, C)
        return self.decoder.final_norm(x)

    def log_likelihood(self, z, idx, where=None):
        """log p(x | z0) of every token, in nats, with few logits at a time: z (B, n, d), idx (B, n*p) -> (B, n*p).
        where: bool (B, n*p), the tokens that are asked for; then (count,)."""

        def log_p(x, idx):  # (N, C), (N,) -> (N,)
            return -F.cross_entropy(self.decoder.final_layer(x).float(), idx, reduction="none")

        x, wanted = self.read(z).flatten(0, 1), idx.flatten()
        if where is not None:
            chosen = where.flatten().nonzero()[:, 0]  # the one thing that a GPU has to be waited for
            x, wanted = x[chosen], wanted[chosen]
        found = in_chunks(log_p, self.config.vocab_size, x, wanted)
        return found.view_as(idx) if where is None else found

    def likeliest(self, z):
        """The token of the largest logit at every position, with few logits at a time: (B, n, d) -> (B, n*p)."""
        x, width = self.read(z), self.config.vocab_size
        return in_chunks(lambda x: self.decoder.final_layer(x).argmax(-1), width, x.flatten(0, 1)).view(x.shape[:2])

    def new_cache(self, batch_size, max_len, encoder=False):
        """A cache for `decode`, or for `encode`, that holds max_len latents a row."""
        c, weight = self.config, self.decoder.in_layer.weight
        n_layer = c.n_encoder_layer if encoder else c.n_decoder_layer
        return KVCache(n_layer, batch_size, c.n_head, max_len, c.dim // c.n_head, weight.device, weight.dtype)


def reconstruction_loss(vae, z0, idx, decoder_noise=0.0, generator=None):
    """-log p(x | z0) in nats per token, for latents z0 (B, n, d) of idx (B, L).

    decoder_noise: the decoder reads latents noised like those of the prior, (1 - t) z0 + t z1, with one t a row,
    uniform between 0 and decoder_noise.  So it learns to forgive what a prior gets slightly wrong, and the encoder to
    keep the latents of different tokens apart and their variance low.  Not in the paper."""
    if decoder_noise > 0:
        t = decoder_noise * torch.rand(len(z0), 1, 1, generator=generator, device=z0.device)
        z0 = torch.lerp(z0, torch.randn(z0.shape, generator=generator, device=z0.device), t)
    return -vae.log_likelihood(z0, idx).mean()


def masked_view_loss(vae, idx, mask_ratio, generator=None):
    """L_mask: replace a share of the tokens by [MASK], encode, sample, decode, and score the masked positions only.

    It keeps the latents from becoming a mere code book of single tokens: the latent of a hidden token can only come
    from its neighbours (in blocks of one, from those before).  Returns a scalar in nats per masked token; in training,
    the sum divided by the number to be expected, which is the same however a batch is cut into passes."""
    masked = torch.rand(idx.shape, generator=generator, device=idx.device) < mask_ratio
    z = vae.encode(idx.masked_fill(masked, vae.mask_id)).sample(generator)
    log_p = vae.log_likelihood(z, idx, masked)  # (masked,), maybe none
    return -log_p.sum() / max(mask_ratio * idx.numel() if vae.training else len(log_p), 1e-9)
