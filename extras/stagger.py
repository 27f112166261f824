"""Ours, after AR-Diffusion (arXiv:2305.09515): the latents of a block need not set out together.

With a stagger S, each starts a share S of its way later than the one before it: with 0 all go together, as in the
paper, with 1 one by one.  docs/recipe.md measures what that brings."""

import torch


def staggered(u, block_size, stagger):
    """The share of its way that each latent has before it when a block has the share u: 1 until it starts, 0 once it
    has arrived, exactly, hence rounded.  u (..., n_blocks) -> (..., n_blocks block_size)"""
    behind = stagger * torch.arange(block_size - 1, -1, -1, dtype=u.dtype, device=u.device)
    return (u[..., None] * way(block_size, stagger) - behind).clamp(0, 1).round(decimals=6).flatten(-2)


def way(block_size, stagger):
    """How long the way of a block is, in ways of a latent."""
    return 1 + stagger * (block_size - 1)


def share_with_loss(block_size, stagger, prompts):
    """The share of latents that have a loss in training, as expected: all but those that have arrived and, in a share
    `prompts` of blocks, those of a prompt that have not, which without a stagger is half a block."""
    length = way(block_size, stagger)
    return 1 - (1 - 1 / length) / 2 - prompts * (1 / 2 - stagger * (2 * block_size - 1) / 6 / length)
