"""What the two transformers of Cola DLM have in common: one mask, one cache, one attention call.

A text is cut into blocks of `block_size` latents.  Attention is bidirectional inside a block and causal across blocks
(Eq. 3.3), in the VAE (vae.py) as in the prior (dit.py).  That is what lets a model with a key/value cache go through
a text block by block.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from extras.kernels import attention, flex_mask


def block_mask(q_block, k_block, q_noisy=None, k_noisy=None):
    """Which keys a query sees: the history, clean keys of earlier blocks, and keys of its own block in the same half.
    So a noisy block never sees its own clean version, which is the answer.

    q_block, k_block: the index of the block that a position belongs to; tensors that broadcast, such as (Lq, 1) and
    (Lk,).  q_noisy, k_noisy: bool, whether it is in the noisy half of the training layout (flow.py); left out,
    everything is clean.  Returns bool, True where attention is allowed."""
    if q_noisy is None:
        return k_block <= q_block
    return (~k_noisy & (k_block < q_block)) | ((k_noisy == q_noisy) & (k_block == q_block))


class KVCache:
    """Keys (rotated) and values of the history, allocated once for `max_len` positions a row.

    Rows may have histories of different lengths (`length`, kept on the CPU, so reading it never waits for a GPU).
    A forward pass writes its own keys and values behind the history of each row; they are scratch, overwritten by the
    next pass, until `commit` makes them part of the history.  That is how the steps of an ODE solver reuse one cache.
    """

    def __init__(self, n_layer, batch_size, n_head, max_len, head_dim, device=None, dtype=None):
        shape = (batch_size, n_head, max_len, head_dim)
        self.k, self.v = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(n_layer)] for _ in range(2))
        self.length = torch.zeros(batch_size, dtype=torch.long)
        self.max_len = max_len

    @property
    def ragged(self):
        """Whether a mask has to hide what stands behind the end of a row: do histories differ in length?"""
        return bool((self.length != self.length[0]).any())

    def reach(self, end):
        """How many positions attention reads if `end` are in use (more in extras/compiled.py)."""
        return end

    def write(self, layer, layout, k, v):
        """Put k, v (B, H, n, D) behind the histories and return all keys and values, (B, H, K, D)."""
        keys, values = self.k[layer], self.v[layer]
        if layout.pos is None:  # equal histories: a plain slice
            keys[:, :, layout.start : layout.end] = k
            values[:, :, layout.start : layout.end] = v
        else:
            rows = torch.arange(len(layout.pos), device=k.device)[:, None]
            keys[rows, :, layout.pos] = k.transpose(1, 2).to(keys.dtype)
            values[rows, :, layout.pos] = v.transpose(1, 2).to(values.dtype)
        return keys[:, :, : layout.end], values[:, :, : layout.end]

    def keep(self, rows):
        """Forget all rows but these, a list, which move to the front."""
        index = torch.tensor(rows, device=self.k[0].device)
        for tensors in (self.k, self.v):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor[: len(rows)].copy_(tensor[index])
        self.length = self.length[rows]

    def commit(self, n):
        """The next n positions behind each history (an int, or a CPU tensor (B,)) are history from now on."""
        self.length = self.length + n


class Layout(NamedTuple):
    """Where the latents of a forward pass stand, and what each sees.  Made once for all layers and solver steps."""

    rope: tuple  # cosines and sines, (1 or B, 1, n, D) each
    mask: torch.Tensor | None = None  # (1 or B, 1, n, K), or of `flex_mask`; None: all is visible
    pos: torch.Tensor | None = None  # where each row writes in its cache, (B, n); None: all from `start`
    start: int = 0
    end: int = 0  # positions of the cache that are in use
    own: int = 0  # latents of the last block, all that rows without a history see (`attend`)


def make_layout(n, block_size, rope, device, cache=None, copies=1, flex=False, lengths=None):
    """The Layout of n new latents behind the histories in `cache`; rope: a function pos (.., n) -> table.

    copies: the batch holds the rows of the cache so many times.  With guidance these are 2, first all conditional rows,
    then all unconditional ones: those behind the first copy have no history (see `attend`).
    flex: with a mask for FlexAttention; only without a cache.
    lengths (B,), on the CPU: so many latents of a row are visible, counted from its beginning; for equal histories."""
    ragged, visible = cache is not None and cache.ragged, None
    start = torch.zeros(1, dtype=torch.long) if cache is None else cache.length if ragged else cache.length[:1]
    pos = start[:, None] + torch.arange(n)  # (1 or B, n)
    block, end, own = pos // block_size, int(pos.max()) + 1, min(n, block_size)
    if cache is not None and end > cache.max_len:
        raise ValueError(f"a cache of {cache.max_len} positions cannot hold position {end - 1}")
    if ragged:
        end, visible = cache.reach(end), pos[:, -1] + 1  # (B,): all from there on, behind a row's end, is hidden
    elif lengths is not None and (lengths % block_size).any():  # else they end with a block: nothing to hide
        visible = lengths.clamp(min=1)  # over no key at all, a softmax may be NaN
    if visible is None and block[0, 0] == block[0, -1]:  # one block, which sees itself and the whole history
        mask = None
    elif visible is None and flex:
        mask = flex_mask(block_mask, tuple(block[0].tolist()), (False,) * n, device)
    else:
        keys = torch.arange(end)
        mask = block_mask(block[..., None], keys // block_size)  # (1 or B, n, K)
        mask = (mask if visible is None else mask & (keys < visible[:, None, None]))[:, None].to(device)
    if ragged:
        return Layout(rope(pos.repeat(copies, 1)), mask, pos.to(device), end=end, own=own)
    return Layout(rope(pos), mask, None, int(pos[0, 0]), end, own)


def attend(q, k, v, layout, cache=None, layer=0):
    """softmax(q k^T / sqrt(D)) v, all (B, H, L, D), with the history in `cache` if there is one.

    A batch may have more rows than the cache: the unconditional branch of classifier-free guidance, in the same batch
    as the conditional one.  Those rows have no history: their last block sees itself, and what comes before it in the
    pass, the block just finished, whose outputs nobody reads, gets zeros."""
    if cache is None:
        return attention(q, k, v, layout.mask)
    n = len(cache.length)
    keys, values = cache.write(layer, layout, k[:n], v[:n])
    out = attention(q[:n], keys, values, layout.mask)
    if len(q) > n:
        alone = attention(*(x[n:, :, -layout.own :] for x in (q, k, v)))
        out = torch.cat([out, F.pad(alone, (0, 0, q.shape[2] - layout.own, 0))])
    return out


def rope_freqs(dim, theta, device=None):
    """theta^(-2i/dim), i = 0 .. dim/2-1, (dim/2,) in fp32."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, device=device).float() / dim)


def apply_rope(x, rope, rotate):
    """Rotary embedding: channels turn in pairs, x cos + rotate(x) sin.  x (B, H, L, D)

    rope: cosines and sines (1 or B, 1, L, D).  rotate: swaps the two channels of every pair; the minus sign that one of
    them gets is in the sines."""
    cos, sin = rope
    x = x.float()
    return x * cos + rotate(x) * sin
