"""Ours, after AR-Diffusion (arXiv:2305.09515): the latents of a block need not set out together.

With a stagger S, each starts a share S of its way later than the one before it: with 0 all go together, as in the
paper, with 1 one by one.  docs/recipe.md measures what that brings."""

import torch


def staggered(u, block_size, stagger):
    """The share of its way, from noise to data, that each latent j = 0 .. n-1 of a block still has before it when the
    block has the share u, with a stagger S:

        clamp(u L - S (n - 1 - j), 0, 1)        L = 1 + S (n - 1), the way of the block in ways of a latent

    1 until it starts, 0 once it has arrived, exactly, hence rounded.  u (..., n_blocks) -> (..., n_blocks n)"""
    behind = stagger * torch.arange(block_size - 1, -1, -1, dtype=u.dtype, device=u.device)
    return (u[..., None] * block_way(block_size, stagger) - behind).clamp(0, 1).round(decimals=6).flatten(-2)


def block_way(block_size, stagger):
    """The L of `staggered`."""
    return 1 + stagger * (block_size - 1)


def share_with_loss(block_size, stagger, prompts):
    """The share of latents that have a loss in training, as expected with u uniform: all but those that have arrived,
    1/2 (1 - 1/L), and, in a share `prompts` of blocks, those of a prompt (1 .. n-1 latents) that have not arrived,
    1/2 - S (2n - 1) / (6 L)."""
    length = block_way(block_size, stagger)
    return 1 - (1 - 1 / length) / 2 - prompts * (1 / 2 - stagger * (2 * block_size - 1) / 6 / length)
