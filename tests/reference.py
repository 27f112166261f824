"""The method in its plainest form: the velocity, the loss of stage 2 and generation, without anything that makes them
fast.  All rows of a batch stand in one line, and a dense mask says what each latent sees.  The weights are those of a
`dit.DiT` and a `vae.TextVAE`, for whose ways of doing the same thing this is the yardstick: of the tests for the
numbers, of measure/bench.py for the time.  (Without codes, self-conditioning, prompts, padding, fresh noise, and
times that differ in a row.)"""

import torch

from dit import modulate, rotate_interleaved
from transformer import apply_rope


def velocity(dit, z, t, pos, mask, cache=None, kept=None):
    """v(z_t, t) of the latents of all rows, z (S, d), at times t (S,) and positions pos (S,).  mask (S, K): what each
    sees of the keys in `cache` and of z itself.  cache: a list, of each layer keys (not rotated), values, positions;
    kept: gets those of z.  H heads of D channels; the layers are those of dit.py."""
    e = dit.emb_in(t)  # (S, C)
    x = dit.txt_in.proj(z.to(dit.txt_in.proj.weight.dtype))
    for i, block in enumerate(dit.blocks):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.modulation(e).chunk(6, dim=-1)
        h = modulate(block.norm(x), shift_msa, scale_msa)
        q, k, v = block.msa.proj_qkv(h).unflatten(-1, (3, -1, block.msa.head_dim)).permute(1, 2, 0, 3)  # 3 x (H, S, D)
        q, k, k_pos = block.msa.norm_q(q).to(v.dtype), block.msa.norm_k(k).to(v.dtype), pos
        if kept is not None:
            kept.append((k, v, pos))
        if cache:
            k, v, k_pos = joined(cache[i], (k, v, pos))
        q, k = (apply_rope(y, dit.rope(p[None]), rotate_interleaved)[0].to(v.dtype) for y, p in ((q, pos), (k, k_pos)))
        scores = (q @ k.mT * block.msa.head_dim**-0.5).masked_fill(~mask, float("-inf"))  # (H, S, K)
        x = x + gate_msa * block.msa.proj_out((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        x = x + gate_mlp * block.mlp(modulate(block.norm(x), shift_mlp, scale_mlp))
    shift, scale = dit.txt_out_ada.out_in(e).chunk(2, dim=-1)
    return dit.txt_out.proj(modulate(dit.txt_out_norm(x), shift, scale)).float()


def joined(old, new):
    """Keys (H, K, D), values (H, K, D) and positions (K,) of both."""
    return tuple(torch.cat([a, b], dim=-1 if a.dim() == 1 else 1) for a, b in zip(old, new, strict=True))


def flow_matching_loss(dit, z0, z1, t):
    """Every row as [clean | noisy]: a noisy block sees the clean blocks before it, and itself."""
    B, n, _ = z0.shape
    row = torch.arange(B, device=z0.device).repeat_interleave(2 * n)
    pos = torch.arange(n, device=z0.device).repeat(2 * B)
    block, noisy = pos // dit.config.block_size, torch.arange(2 * n, device=z0.device).repeat(B) >= n
    earlier, same = block[None] < block[:, None], block[None] == block[:, None]  # of the key, for the query
    clean_keys, noisy_keys = earlier | (same & ~noisy[:, None]), same & noisy[:, None]
    mask = (row[None] == row[:, None]) & torch.where(noisy[None], noisy_keys, clean_keys)
    zt = (1 - t[:, None, None]) * z0 + t[:, None, None] * z1
    v = velocity(dit, torch.cat([z0, zt], 1).flatten(0, 1), torch.where(noisy, t[row], 0.0), pos, mask)
    return (v.view(B, 2 * n, -1)[:, n:] - (z1 - z0)).square().mean()


def generate(model, noise, steps, cfg_scale):
    """Latents (B, n, d) and tokens (B, n) from noise (B, n, d), without a prompt: block by block, from t = 1 to 0."""
    B, n, _ = noise.shape
    size, device, cache, blocks = model.dit.config.block_size, noise.device, [], []
    row = torch.arange(B, device=device).repeat_interleave(size)
    for start in range(0, n, size):
        pos = torch.arange(start, start + size, device=device).repeat(B)
        alone = row[None] == row[:, None]  # the block without its history
        mask = torch.cat([row.repeat(start // size)[None] == row[:, None], alone], dim=1)
        z = noise[:, start : start + size].flatten(0, 1)
        for i in range(steps):
            t = torch.full((B * size,), 1 - i / steps, device=device)
            v = velocity(model.dit, z, t, pos, mask, cache)
            if start > 0 and cfg_scale != 1:
                u = velocity(model.dit, z, t, pos, alone)
                v = u + cfg_scale * (v - u)
            z = z - v / steps
        # The finished block, clean, becomes history.
        velocity(model.dit, z, torch.zeros(B * size, device=device), pos, mask, cache, kept := [])
        cache = [joined(*layer) for layer in zip(cache, kept, strict=True)] if cache else kept
        blocks.append(z.view(B, size, -1))
    z = torch.cat(blocks, dim=1)
    return z, model.vae.decode(z).argmax(-1)
