"""The block-causal DiT: the velocity field of the latent prior (stage 2 of Cola DLM).

v_psi(z_t, t) says where a partly noised latent moves (Eq. 3.2): z1 ~ N(0, I) at t = 1 flows to the data z0 at t = 0.
Attention is bidirectional inside a block of latents and causal across blocks (Eq. 3.3), so that a block is generated
as a whole, given the finished blocks before it.  Tokens never appear here.

The time enters through adaLN-Zero: every block has its LayerNorms shifted and scaled, and its two branches gated, by
linear functions of a time embedding (arXiv:2212.09748).  They are computed once per time of a row, 0 where latents are
clean and t where they are noisy: one t, one for every block or, with a stagger, for every latent.  Per position they
would be a third of all FLOPs.  (Names are the released ones: txt_ is the stream of latents.)

Two parts are ours and not the paper's, and off in released models: with n_codes above 0, a `Codebook` adds to the
velocity (extras/codebook.py); with self_conditioning, the network also sees its own last estimate of z0.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import check_sizes
from extras.codebook import Codebook
from extras.kernels import run_layer
from transformer import KVCache, apply_rope, attend, make_layout, rope_freqs

TIME_CHANNELS = 256
CLEAN, NOISY = 0, 1  # indices into the times of a row: time 0, and the (first) noisy time
ROPE_THETA = 10000.0


@dataclass
class DiTConfig:
    """Defaults are the released 1.8 B model (1,829,875,728 parameters)."""

    latent_dim: int = 16  # d, channels of one latent
    dim: int = 2048  # C, the width
    n_head: int = 16
    head_dim: int = 128  # n_head * head_dim need not equal dim
    rope_dim: int = 96  # channels of a head that the rotary embedding turns; the others carry no position
    n_layer: int = 24
    mlp_ratio: int = 4
    block_size: int = 16  # latents per block: the unit of generation, unless training or sampling names another
    qk_bias: bool = False  # bias of the query/key/value projection and of the attention's output
    norm_eps: float = 1e-5
    # Not in the released configuration, and written to files only where they differ from these defaults.
    # Times of training were sigmoid(N(t_loc, t_scale)); `flow.solver_times` can place the steps of the solver by them.
    t_loc: float = field(default=1.0, metadata=dict(above=-math.inf, ours=True))
    t_scale: float = field(default=1.0, metadata=dict(ours=True))
    n_codes: int = field(default=0, metadata=dict(low=0, ours=True))  # of the `Codebook`; 0: none
    self_conditioning: bool = field(default=False, metadata=dict(ours=True))  # see `DiT.forward`

    def __post_init__(self):
        check_sizes(self)
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: channels turn in pairs")
        if self.rope_dim % 2 or not 0 < self.rope_dim <= self.head_dim:
            raise ValueError(f"rope_dim {self.rope_dim} must be even, above 0 and at most head_dim {self.head_dim}")


def rotate_interleaved(x):
    """The pairs in the DiT (see `transformer.apply_rope`): channels 2i and 2i + 1, as in GPT-J."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


class TimeEmbedding(nn.Module):
    """t in [0, 1] -> e: 256 sines and cosines of 1000 t, then three linear layers with SiLU between.  The wavelengths
    are those of diffusion models with 1000 steps; between 0 and 1 most of them would hardly move."""

    def __init__(self, dim):
        super().__init__()
        self.proj_in = nn.Linear(TIME_CHANNELS, dim)
        self.proj_hid = nn.Linear(dim, dim)
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, t):  # (...) -> (..., C)
        half = TIME_CHANNELS // 2
        freqs = torch.exp(-math.log(10000) * torch.arange(half, device=t.device).float() / half)
        angle = 1000.0 * t.float()[..., None] * freqs
        e = torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.proj_in.weight.dtype)
        return self.proj_out(F.silu(self.proj_hid(F.silu(self.proj_in(e)))))


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        inner = config.n_head * config.head_dim
        self.head_dim, self.layer = config.head_dim, layer
        self.proj_qkv = nn.Linear(config.dim, 3 * inner, bias=config.qk_bias)
        self.proj_out = nn.Linear(inner, config.dim, bias=config.qk_bias)
        self.norm_q = nn.LayerNorm(config.head_dim, config.norm_eps)  # per head
        self.norm_k = nn.LayerNorm(config.head_dim, config.norm_eps)

    def forward(self, x, layout, cache):
        q, k, v = self.proj_qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)  # 3 x (B, H, L, D)
        q, k = (apply_rope(y, layout.rope, rotate_interleaved).to(v.dtype) for y in (self.norm_q(q), self.norm_k(k)))
        out = attend(q, k, v, layout, cache, self.layer)
        return self.proj_out(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.proj_in = nn.Linear(dim, hidden)
        self.proj_out = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.proj_out(F.gelu(self.proj_in(x), approximate="tanh"))


def modulation_layer(dim, n_out):
    """One of adaLN-Zero's linear maps from the time embedding to `n_out` vectors of width C; see `DiT.init_weights`."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, n_out * dim))


class DiTBlock(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C = config.dim
        self.norm = nn.LayerNorm(C, config.norm_eps, elementwise_affine=False)  # no parameters, so one serves twice
        self.msa = Attention(config, layer)
        self.mlp = MLP(C, config.mlp_ratio * C)
        self.ada = nn.ModuleDict(
            dict(
                msa_in=modulation_layer(C, 2),  # shift, scale
                msa_out=modulation_layer(C, 1),  # gate
                mlp_in=modulation_layer(C, 2),
                mlp_out=modulation_layer(C, 1),
            )
        )

    def modulation(self, e):  # (..., C) -> (..., 6C)
        return torch.cat([layer(e) for layer in self.ada.values()], dim=-1)

    def forward(self, x, modulation, time_index, layout, cache=None):
        """x (B, L, C); modulation (B or 1, T, 6, C); time_index as in `DiT.forward`."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = at_positions(modulation, time_index)
        x = x + gate_msa * self.msa(modulate(self.norm(x), shift_msa, scale_msa), layout, cache)
        return x + gate_mlp * self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp))


def at_positions(modulation, time_index):
    """The modulation of every position, k tensors (B or 1, L or 1, C), from that of T times (B or 1, T, k, C)."""
    if time_index is None:
        return modulation[:, -1:].unbind(2)
    # A product with one-hot rows: its backward is a product, too, where that of an index would add row by row.
    one_hot = time_index[..., None] == torch.arange(modulation.shape[1], device=modulation.device)  # (B or 1, L, T)
    return (one_hot.to(modulation.dtype) @ modulation.flatten(2)).unflatten(-1, modulation.shape[2:]).unbind(2)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class DiT(nn.Module):
    """v = DiT(z_t, t), the velocity dz/dt of the probability flow."""

    checkpointing = False  # see `extras.kernels.run_layer`

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.txt_in = nn.ModuleDict(dict(proj=nn.Linear(c.latent_dim, c.dim)))
        self.estimate_in = nn.Linear(c.latent_dim, c.dim, bias=False) if c.self_conditioning else None
        self.emb_in = TimeEmbedding(c.dim)
        self.blocks = nn.ModuleList(DiTBlock(c, i) for i in range(c.n_layer))
        self.txt_out_norm = nn.LayerNorm(c.dim, c.norm_eps)
        self.txt_out_ada = nn.ModuleDict(dict(out_in=modulation_layer(c.dim, 2)))  # shift, scale
        self.txt_out = nn.ModuleDict(dict(proj=nn.Linear(c.dim, c.latent_dim)))
        self.codebook = Codebook(c) if c.n_codes else None
        self.init_weights()

    def init_weights(self):
        """Xavier for linear layers.  Zero for every modulation layer, so that each block starts as the identity, and
        for the output layer, so that a new model predicts 0 (with codes, the velocity of the marginal).  Zero for what
        reads an estimate, too."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        modulation = [layer for block in self.blocks for layer in block.ada.values()] + [self.txt_out_ada.out_in]
        ours = [self.codebook and self.codebook.logits, self.estimate_in]
        for layer in [*(layer[-1] for layer in modulation), self.txt_out.proj, *filter(None, ours)]:
            nn.init.zeros_(layer.weight)

    def embed_times(self, t):
        """t (B or 1, T) -> t and its modulation (B or 1, T, 6 n_layer + 2, C): six vectors for every block, two for the
        output.  It depends on nothing else, so a sampler computes it once per run."""
        e = self.emb_in(t)  # (B or 1, T, C)
        parts = [block.modulation(e) for block in self.blocks] + [self.txt_out_ada.out_in(e)]
        return t, torch.cat(parts, dim=-1).unflatten(-1, (-1, self.config.dim))

    def rope(self, pos):
        """Cosines and sines for `rotate_interleaved`: pos (B, L) -> (B, 1, L, D) each, in fp32.  Only the first
        rope_dim channels turn; the others keep a cosine of 1."""
        c, device = self.config, self.txt_in.proj.weight.device
        angle = pos.to(device)[:, None, :, None].float() * rope_freqs(c.rope_dim, ROPE_THETA, device)
        angle = F.pad(angle, (0, (c.head_dim - c.rope_dim) // 2))  # (B, 1, L, D/2)
        angle = torch.stack([-angle, angle], dim=-1).flatten(-2)
        return angle.cos(), angle.sin()

    def forward(self, z, t, time_index=None, layout=None, cache=None, estimate=None, n_out=None, with_codes=False):
        """Velocity of every latent.

        z (B, n, d).
        t: the times that occur in a row, (B or 1, T) in [0, 1], or (B,) or (1,) if there is one; or of `embed_times`.
        time_index (B or 1, n), 0 .. T-1, such as CLEAN and NOISY: which of them each latent has; None: all the last.
        layout: a Layout made before, to use it again, or for other blocks (default: those of the configuration).
        cache: the history; z continues it.  Rows beyond those of the cache have no history.
        estimate (B, n, d): an earlier one of z0, for self-conditioning (arXiv:2208.04202); 0 or None: there is none.
        n_out: the velocity of the last so many latents alone; None: of all.
        Returns v (B, n_out, d) in fp32; with_codes: and the logarithms of the codes' weights, (B, n_out, n_codes).
        """
        if layout is None:
            copies = 1 if cache is None else len(z) // len(cache.length)
            layout = make_layout(z.shape[1], self.config.block_size, self.rope, z.device, cache, copies)
        t, modulation = t if isinstance(t, tuple) else self.embed_times(t.view(len(t), -1))

        x = self.txt_in.proj(z.to(self.txt_in.proj.weight.dtype))  # (B, n, C)
        if estimate is not None:
            x = x + self.estimate_in(estimate.to(x.dtype))
        for i, block in enumerate(self.blocks):
            x = run_layer(block, self.checkpointing, x, modulation[:, :, 6 * i : 6 * i + 6], time_index, layout, cache)
        if n_out is not None:
            x, z = x[:, -n_out:], z[:, -n_out:]
            time_index = time_index if time_index is None else time_index[:, -n_out:]
        shift, scale = at_positions(modulation[:, :, -2:], time_index)
        x = modulate(self.txt_out_norm(x), shift, scale)
        v = self.txt_out.proj(x).float()
        if self.codebook is None:
            return v
        t = t[:, -1:] if time_index is None else torch.take_along_dim(t, time_index, 1)  # of every position
        mixture, log_w = self.codebook(x, z, t[..., None])
        return (v + mixture, log_w) if with_codes else v + mixture

    def new_cache(self, batch_size, max_len):
        """A cache for `forward` that holds max_len latents a row."""
        c, weight = self.config, self.txt_in.proj.weight
        return KVCache(c.n_layer, batch_size, c.n_head, max_len, c.head_dim, weight.device, weight.dtype)
