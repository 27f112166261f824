"""What is drawn at random in generation: the noise that a block begins with, tokens from their logits, codes from
their weights."""

import math
import numbers

import numpy as np
import torch


class Draws:
    """All that is drawn for a batch of texts, block after block.

    seed: of all of it; row_ids: which noise of the seed each of the n_rows draws, whatever its batch; shape: (n, d), of
    a block; noise: (n_blocks, B, n, d), where blocks begin, instead.  Raises ValueError for what does not fit."""

    def __init__(self, seed, row_ids, n_rows, shape, device, noise=None):
        self.seed, self.row_ids = seed, list(range(n_rows) if row_ids is None else row_ids)
        if len(self.row_ids) != n_rows or not all(isinstance(i, numbers.Integral) and i >= 0 for i in self.row_ids):
            raise ValueError(f"row_ids must be {n_rows} integers from 0 on, one for each prompt, not {row_ids[:9]}")
        if noise is not None:
            wanted, given = (n_rows, *shape), tuple(getattr(noise, "shape", ()))
            if len(given) != 4 or given[0] == 0 or given[1:] != wanted:
                raise ValueError(f"noise must be a tensor (n_blocks, *{wanted}), not {given}")
        self.shape, self.device, self.noise = shape, device, noise
        self.n_blocks = math.inf if noise is None else len(noise)

    def begin(self, block, rows):
        """Go on to a block of these rows, a list; returns the noise that it begins with, (B, n, d)."""
        self.generators = block_generators(self.seed, [self.row_ids[row] for row in rows], block)
        if self.noise is None:
            return self.normal()
        return torch.as_tensor(self.noise[block])[rows].to(self.device, torch.float32)

    def normal(self):
        """From N(0, I), (B, n, d)."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)

    def uniform(self, n):
        """From 0 to 1, (B, n)."""
        return torch.stack([torch.rand(n, generator=g) for g in self.generators]).to(self.device)


def block_generators(seed, row_ids, block):
    """The random numbers of one block, a torch.Generator for each row.

    Seeded as in the released code, seed + 1000 row + 10^7 block, while these digits and the 32 bits that PyTorch uses
    of a seed tell the three apart; others have a state mixed from all three, so no noise is drawn twice."""
    generators = [torch.Generator().manual_seed((seed + 1000 * i + 10_000_000 * block) % 2**32) for i in row_ids]
    for generator, row in zip(generators, row_ids, strict=True):
        if seed >= 1000 or row >= 10_000 or block > 428:
            words = np.random.SeedSequence([block, seed, row]).generate_state(624).astype(np.uint64)
            state = generator.get_state()  # 24 bytes, then the 624 words of the Mersenne Twister, 8 bytes each
            state[24 : 24 + words.nbytes] = torch.from_numpy(words.view(np.uint8))
            generator.set_state(state)
    return generators


def penalise(logits, seen, penalty):
    """Repetition penalty: divide the positive and multiply the negative logits of every id already used.

    logits (B, L, V), seen bool (B, V).  One penalty for all positions of a block, however often an id was used."""
    if penalty == 1:
        return logits
    changed = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen[:, None], changed, logits)


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Divide by the temperature, then keep the top_k largest logits (ties included; 0: all), then the fewest tokens
    whose probability is above top_p, as released, where others stop at top_p itself (0 or 1: all).  The rest become
    -inf.  logits (..., V)"""
    logits = logits / temperature
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if 0 < top_p < 1:
        probs, order = logits.softmax(-1).sort(dim=-1, descending=True)
        before = torch.cat([torch.zeros_like(probs[..., :1]), probs.cumsum(-1)[..., :-1]], dim=-1)
        logits = logits.masked_fill((before > top_p).gather(-1, order.argsort(-1)), float("-inf"))
    return logits


def pick_tokens(logits, uniform, temperature, top_k, top_p):
    """Token ids (B, L) from logits (B, L, V): the largest logit at temperature 0 (below 1e-5), else a draw from the
    filtered distribution by inverting its cumulative sum at `uniform` (B, L), numbers in [0, 1).  Raises ValueError for
    logits that are not finite."""
    if not logits.isfinite().all():
        raise ValueError("the logits are not finite: the weights are damaged, or too large for this dtype")
    if temperature < 1e-5:
        return logits.argmax(-1)
    return choose(filter_logits(logits, temperature, top_k, top_p).softmax(-1), uniform)


def choose(weights, uniform):
    """An index drawn by weights (..., K), which need not add up to 1, where their cumulative sum reaches the share
    `uniform` (...), from 0 to 1, of the whole."""
    cumulative = weights.cumsum(-1)
    share = uniform.clamp(max=1 - 2**-20)[..., None]  # 1 would lead behind the last that has any weight
    return torch.searchsorted(cumulative, share * cumulative[..., -1:], right=True)[..., 0]


def one_of(values, generator):
    """One of several values, each with the same probability."""
    return values[torch.randint(len(values), (), generator=generator, device=generator.device)]
