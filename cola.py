"""Cola DLM: p(x, z0) = p_theta(x | z0) p_psi(z0) (Eq. 2.1.1), a Text VAE and a block-causal DiT prior together.

Generation (section 2.2.3 of the paper): encode the prompt; then, block by block, carry Gaussian noise to latents with
an ODE solver and decode the finished block once.  The prior decides what is said, the decoder how it is spelt.

Likelihood: the same two parts bound log p(x) from the other side, encoder first.
"""

import codecs
import math
import operator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

from checkpoint import find_tokenizer, load_dit, load_vae, save_dit, save_vae
from data import decode_bytes, encode_prompt, save_tokenizer
from flow import block_sum, guide, log_prob, solve
from transformer import STATIC_LEN, allow_recompilation
from vae import Posterior

# ----------------------------------------------------------------------------------------------------------------------
# Choosing tokens


def penalise(logits, seen, penalty):
    """Repetition penalty: divide the positive and multiply the negative logits of every id already used.

    logits (B, L, V), seen bool (B, V).  One penalty for all positions of a block, however often an id was used."""
    changed = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen[:, None], changed, logits)


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Divide by the temperature, then keep the top_k largest logits (ties included; 0: all), then the smallest set of
    tokens whose probability reaches top_p (0 or 1: all).  The others become -inf.  logits (..., V)"""
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
    filtered distribution by inverting its cumulative sum at `uniform` (B, L), numbers in [0, 1)."""
    if temperature < 1e-5:
        return logits.argmax(-1)
    cumulative = filter_logits(logits, temperature, top_k, top_p).softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform[..., None] * cumulative[..., -1:], right=True)[..., 0]
    return drawn.clamp(max=logits.shape[-1] - 1)


# ----------------------------------------------------------------------------------------------------------------------
# The model


class ColaDLM(nn.Module):
    """A TextVAE, a DiT over its latents, and the tokenizer that belongs to them (None: token ids only)."""

    def __init__(self, vae, dit, tokenizer=None):
        super().__init__()
        check_fit(vae.config, dit.config)
        self.vae, self.dit, self.tokenizer = vae, dit, tokenizer
        self.compiled_step = self.spare_cache = None  # see `compile_sampler`

    def compile_sampler(self, **options):
        """Compile a step of the sampler, with the options of torch.compile.  Without any: on CUDA as one CUDA graph; on
        a CPU with frozen weights, copies laid out as its products like them, so call this again if they have changed.

        Shapes stay the same from block to block, and so does the graph, but for the first block of all.  A new batch
        size or the next 256 positions (`transformer.STATIC_LEN`) may compile again, once, which takes up to minutes."""
        torch._dynamo.reset()  # what was compiled before may hold other weights
        allow_recompilation()
        frozen = self.device.type == "cpu" and not options
        if frozen:  # with dynamic shapes oneDNN multiplies, in fp32 on an AMD CPU twice as fast as MKL
            options = dict(dynamic=True)
        elif self.device.type == "cuda" and not options:
            options = dict(mode="reduce-overhead")
        step = torch.compile(self.dit.forward, fullgraph=True, **dict(dynamic=False) | options)
        self.compiled_step = torch._inductor.config.patch(freezing=True)(step) if frozen else step
        self.spare_cache = None

    def step(self, *args):
        """The velocity while sampling: `DiT.forward`, compiled or not."""
        return (self.compiled_step or self.dit)(*args)

    @property
    def static(self):
        return self.compiled_step is not None

    def new_dit_cache(self, batch_size, max_len):
        """An empty cache for the DiT.  For a compiled step it is that of the last generation, if that is over and was
        alike: a CUDA graph is recorded for one place in memory."""
        spare, self.spare_cache = self.spare_cache, None
        if spare is not None:
            memory = spare.memory[0][0]  # (B, H, max_len, D)
            alike = memory.device == self.device and memory.dtype == self.dit.txt_in.proj.weight.dtype
            if alike and len(memory) == batch_size and spare.max_len - STATIC_LEN < max_len <= spare.max_len:
                return spare.clear()
        return self.dit.new_cache(batch_size, max_len, self.static)

    @property
    def device(self):
        return next(self.parameters()).device

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32, with_tokenizer=False):
        """Load a folder in the released layout; with_tokenizer: only if there is a tokenizer.json.  Raises ValueError
        or FileNotFoundError, in one line, for a missing or damaged file, an option this implementation does not have,
        or tensors that are missing, extra or misshapen."""
        vae, dit = load_vae(folder, device, dtype), load_dit(folder, device, dtype)
        return cls(vae, dit, find_tokenizer(folder, vae.config.vocab_size, with_tokenizer)).eval()

    def save_pretrained(self, folder, dtype=torch.float32):
        """Write weights (in `dtype`), configurations and tokenizer in the released layout, each file complete or not at
        all."""
        save_vae(self.vae, folder, dtype)
        save_dit(self.dit, folder, dtype)
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, Path(folder) / "tokenizer.json")

    def generate(self, prompts, **options):
        """New tokens for every prompt: a list of id lists, with a str in place of each list whose prompt was a str.

        Takes the options of `stream`, which does the work."""
        results = []
        for pieces in self.stream(prompts, **options):
            results = [old + new for old, new in zip(results, pieces, strict=True)] if results else pieces
        return results

    def stream(self, prompts, max_new_tokens=64, eos_id=None, **options):
        """Generate block by block; after each block, yield the new tokens of every prompt (ids for ids, str for str).

        prompts: list of str or of lists of token ids, of any lengths; an empty one asks for unconditional text.
        max_new_tokens: at most so many for each prompt.
        eos_id: a row ends before this token; None: nothing ends it early.
        options: those of `blocks`, which does the work.  Raises ValueError for options out of range, for ids outside
        the vocabulary, and for text without a tokenizer.

        Where the released code surprises a user, this does not: it cuts at the end-of-text token if told which it is,
        ends rows one by one, never counts prompt positions as new tokens, stops at max_new_tokens rather than at the
        next full block, takes empty prompts, and makes no cache entry for a last block that nobody reads."""
        ids = prompt_ids(self.tokenizer, prompts)
        writers = [Writer(self.tokenizer if isinstance(p, str) else None, eos_id, max_new_tokens) for p in prompts]
        for block in self.blocks(ids, max_new_tokens, eos_id, **options):
            new = dict(zip(block.rows, block.new, strict=True))
            yield [writer.write(new.get(row, []), block.last) for row, writer in enumerate(writers)]

    @torch.no_grad()
    def blocks(
        self,
        ids,
        max_new_tokens=64,
        eos_id=None,
        steps=16,
        cfg_scale=7.0,
        solver="euler",
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        pad_id=None,
        seed=0,
        row_ids=None,
        noise=None,
        round_time=False,
    ):
        """The block generator: yield a `Block` of latents and tokens at a time, until no row needs another.

        ids: a list of token ids for every row.
        max_new_tokens, eos_id: a row needs no other block once it has so many new tokens, or this one.  Rows that are
        finished leave the batch together, when they are a quarter of it (with a compiled step, down to a power of two).
        steps, solver: of the ODE from noise to latent, "euler" or "heun" (two evaluations a step).
        cfg_scale: guidance u + s (c - u) of the block with its history over the block without; 1 skips the second.
        temperature: 0 takes the likeliest token at each position; otherwise top_k and top_p apply (0 and 1: off).
        repetition_penalty: as released, the ids that count are the model's own predictions of earlier blocks.
        pad_id: fills the prompt's last block for the encoder (where, in the released model, it matters); default the
        last id of the vocabulary.
        seed, row_ids: a row draws the noise of block b from a generator seeded seed + 1000 row_id + 10^7 b, as in the
        released code, so it does not depend on the rest of the batch; default 0, 1, 2, ...
        noise: (n_blocks, B, block_size, d) instead; generation ends with the last block of noise.
        round_time: round 1000 t to bfloat16, which the released code does on a GPU; only for comparisons with it.

        Kept as released, because the numbers depend on it: the decoder reads latents as the DiT left them, still
        shifted and scaled; and with patch_size 2 the second half of an odd prompt's last latent, which was encoded with
        padding there, is decoded like a new token (or, where it ends a block, passed over).
        """
        check_options(max_new_tokens, steps, cfg_scale, solver, temperature, top_k, top_p, repetition_penalty, seed)
        c, device = self.vae.config, self.device
        block_size, chunk, d = c.block_size, c.block_size * c.patch_size, c.latent_dim
        pad_id = c.vocab_size - 1 if pad_id is None else pad_id
        check_ids(ids + [[pad_id]], c.vocab_size)
        if not ids:
            return
        B = len(ids)
        rows, left = list(range(B)), [max_new_tokens] * B  # rows in the batch; new tokens that each row still needs
        row_ids = list(range(B) if row_ids is None else row_ids)

        # 1. Encode the prompts.  Whole blocks are history; what is left over opens the first generated block.  (Of a
        # prompt of 20 tokens, with blocks of 16, 16 are history and 4 are the first of the next block.)
        n_latents = torch.tensor([-(-len(row) // c.patch_size) for row in ids])  # (B,)
        n_history = n_latents // block_size * block_size  # (B,)
        n_left_over = [max(len(row) - int(h) * c.patch_size, 0) for row, h in zip(ids, n_history, strict=True)]
        n_blocks = max(-(-(old + max_new_tokens) // chunk) for old in n_left_over)
        if noise is not None:
            noise = torch.as_tensor(noise)
            if noise.dim() != 4 or len(noise) == 0 or noise.shape[1:] != (B, block_size, d):
                raise ValueError(f"noise must be (n_blocks, {B}, {block_size}, {d}), not {tuple(noise.shape)}")
            n_blocks = min(n_blocks, len(noise))
        if any(ids):
            prompt_z = self.vae.to_dit(self.vae.encode(pad_rows(ids, chunk, pad_id, device)).mu)  # (B, longest, d)

        # 2. One pass of both models over the history fills their caches.
        max_len = int(n_history.max()) + n_blocks * block_size
        vae_cache, dit_cache = self.vae.new_cache(B, max_len), self.new_dit_cache(B, max_len)
        times = torch.linspace(1.0, 0.0, steps + 1, device=device)
        network_times = (1000 * times).bfloat16().float() / 1000 if round_time else times
        both_times = torch.stack([network_times, torch.zeros_like(times)], dim=1)  # [t_i, 0] for each step i
        modulation = self.dit.modulation(both_times)[:, None]  # (steps + 1, 1, 2, ...)
        at_zero = modulation[-1]  # of [0, 0]: t ends there
        if n_history.any():
            history = prompt_z[:, : int(n_history.max())]
            self.dit(history, both_times[-1:], modulation=at_zero, cache=dit_cache)
            self.vae.decode(history, vae_cache)
            dit_cache.commit(n_history)
            vae_cache.commit(n_history)

        # "Clean repaint": latents of the first block that the prompt determines are clean (time 0) and do not move.
        is_clean = torch.arange(block_size) < (n_latents - n_history)[:, None]  # (B, block_size)
        clean_z = torch.zeros(B, block_size, d, device=device)
        for i in is_clean.any(1).nonzero()[:, 0].tolist():
            clean_z[i] = prompt_z[i, n_history[i] : n_history[i] + block_size]
        is_clean = is_clean.to(device) if is_clean.any() else None

        seen = torch.zeros(B, c.vocab_size, dtype=torch.bool, device=device)  # ids predicted in earlier blocks
        for b in range(n_blocks):
            # 3. Noise to latents, given the history.
            generators = block_generators(seed, [row_ids[row] for row in rows], b)
            z = torch.stack([torch.randn(block_size, d, generator=g) for g in generators])
            z = (z if noise is None else noise[b, rows]).to(device, torch.float32)  # (B, block_size, d)
            if is_clean is not None:
                z = torch.where(is_clean[..., None], clean_z, z)
            velocity = self.guided_velocity(both_times, modulation, dit_cache, cfg_scale, is_clean)
            z = solve(velocity, z, times, solver)

            # 4. Latents to tokens, once.
            logits = self.vae.decode(z, vae_cache).float()  # (B, chunk, V)
            if repetition_penalty != 1:
                logits = penalise(logits, seen, repetition_penalty)
            uniform = torch.stack([torch.rand(chunk, generator=g) for g in generators]).to(device)
            tokens = pick_tokens(logits, uniform, temperature, top_k, top_p)  # (B, chunk)
            seen.scatter_(1, tokens, True)
            last = b == n_blocks - 1
            new = [row[old:] for row, old in zip(tokens.tolist(), n_left_over, strict=True)]
            yield Block(z, new, last, rows)

            # 5. The finished block becomes history, at t = 0, for the rows that go on.
            for row, ids_of_row in zip(rows, new, strict=True):
                left[row] = 0 if eos_id in ids_of_row else left[row] - len(ids_of_row)
            going = [i for i, row in enumerate(rows) if left[row] > 0]
            if last or not going:
                self.spare_cache = dit_cache if self.static else None
                return
            if self.static:  # few batch sizes, powers of two, since each is compiled anew: some that are done stay
                size = 1 << (len(going) - 1).bit_length()
                going += [i for i in range(len(rows)) if i not in going][: size - len(going)]
            if len(going) <= 0.75 * len(rows):
                rows, z, seen = [rows[i] for i in going], z[going], seen[going]
                dit_cache.keep(going)
                vae_cache.keep(going)
            layout = self.dit.layout(block_size, device, dit_cache)
            self.step(z, both_times[-1:], None, at_zero, layout, dit_cache)
            dit_cache.commit(block_size)
            vae_cache.commit(block_size)
            is_clean, n_left_over = None, [0] * len(rows)

    def guided_velocity(self, times, modulation, cache, cfg_scale, is_clean):
        """The velocity of one block as a function (z (B, block_size, d), step) -> (B, block_size, d).

        Rows without a history are not guided: there both branches are one and the same, and guidance would only
        amplify rounding errors.  Latents where `is_clean` (bool (B, block_size), or None) do not move."""
        guided = (cache.length > 0) & (cfg_scale != 1)
        copies = 2 if guided.any() else 1
        scale = torch.where(guided, cfg_scale, 1.0).to(self.device)[:, None, None]
        layout = self.dit.layout(self.dit.config.block_size, self.device, cache, copies)
        # 0: the time of this step, 1: time 0
        time_index = None if is_clean is None else is_clean.long().repeat(copies, 1)

        def velocity(z, i):
            # Both branches in one batch; the second half has no rows in the cache, hence no history.
            v = self.step(z.repeat(copies, 1, 1), times[i : i + 1], time_index, modulation[i], layout, cache)
            if copies == 2:
                v = guide(*v.chunk(2), scale)
            elif self.static:
                v = v.clone()  # a CUDA graph writes its next result to the same place
            return v if is_clean is None else v.masked_fill(is_clean[..., None], 0.0)

        return velocity

    def log_prob(self, texts, n_samples=1, **options):
        """log p(x) of every text (str or ids), in nats, (B,), from n_samples samples.

        One sample is the ELBO, log p(x | z0) + log p(z0) - log q(z0 | x) with z0 ~ q(z0 | x): in expectation a lower
        bound.  More give the log of the mean weight (IWAE, arXiv:1509.00519), a tighter bound, but one only with
        exact=True: the exponential of Hutchinson's unbiased estimate of log p(z0) is too high on average.
        options: of `log_weights`."""
        log_w = self.log_weights(prompt_ids(self.tokenizer, texts), n_samples, **options).total  # (K, B)
        return log_w.logsumexp(0) - math.log(n_samples)

    def conditional_log_prob(self, prompts, responses, n_samples=1, row_ids=None, **options):
        """log p(response | prompt) = log p(prompt, response) - log p(prompt), in nats, (B,).

        Both terms are bounds, so the difference is none; but they share their random numbers, and with one sample all
        that belongs to whole blocks of the prompt cancels.  Rows to be compared, such as the answers to one question,
        should share a row_id.  A prompt or response: str or ids."""
        before, after = prompt_ids(self.tokenizer, prompts), prompt_ids(self.tokenizer, responses)
        whole = [a + b for a, b in zip(before, after, strict=True)]
        row_ids = list(range(len(whole)) if row_ids is None else row_ids)
        keys = list(zip(map(tuple, before), row_ids, strict=True))
        unique = list(dict.fromkeys(keys))  # a prompt with many responses is computed once, behind the whole texts
        rows, their_ids = [list(ids) for ids, _ in unique], [row_id for _, row_id in unique]
        log_p = self.log_prob(whole + rows, n_samples, row_ids=row_ids + their_ids, **options)
        of_prompt = dict(zip(unique, log_p[len(whole) :], strict=True))
        return log_p[: len(whole)] - torch.stack([of_prompt[key] for key in keys])

    @torch.no_grad()
    def log_weights(self, ids, n_samples=1, steps=128, read_time=0.0, exact=False, pad_id=None, seed=0, row_ids=None):
        """The terms of log p(x, z0) / q(z0 | x) for n_samples draws z0 ~ q(z0 | x): `LogWeights` of (K, B), in nats.

        ids: a list of token ids for every row.  The last block is padded for the encoder, with pad_id as in `blocks`;
        what the padding says is left open and costs nothing.
        steps, exact: of the flow's likelihood (`flow.log_prob`); exact: without Hutchinson's estimator.
        read_time: 0 is the paper's model.  Above 0 it is another reading of the same networks, not in the paper: the
        flow stops at this time, the decoder reads the latent z_t found there, and the encoder turns the tokens into the
        history of the next block.  The latent variable is z_t, and q(z_t | x) is q(z0 | x) noised to that time.  The
        bound can be far tighter, since the finest detail of the latents, which no decoder needs, is not asked for.
        seed, row_ids: of the random numbers, as in `blocks`.
        Raises ValueError for an autoencoder without variance, ids outside the vocabulary, and options out of range."""
        c, device = self.vae.config, self.device
        if not c.use_variation:
            raise ValueError("this VAE has no variance (use_variation is false), hence no likelihood")
        if n_samples < 1:
            raise ValueError(f"n_samples {n_samples} must be at least 1")
        pad_id = c.vocab_size - 1 if pad_id is None else pad_id
        check_ids(ids + [[pad_id]], c.vocab_size)
        if not any(ids):
            return LogWeights(*torch.zeros(3, n_samples, len(ids), device=device))
        shape, chunk = (c.block_size, c.latent_dim), c.block_size * c.patch_size
        idx = pad_rows(ids, chunk, pad_id, device)
        lengths = torch.tensor([len(row) for row in ids], device=device)
        is_text = torch.arange(idx.shape[1], device=device) < lengths[:, None]  # (B, L)
        is_block = is_text[:, ::chunk]  # (B, n_blocks)
        posterior = self.vae.encode(idx)
        q0 = Posterior(self.vae.to_dit(posterior.mu), posterior.logvar + 2 * math.log(c.scaling_factor))
        qt = q0.noised(read_time) if read_time > 0 else q0
        row_ids = range(len(ids)) if row_ids is None else row_ids
        generators = [block_generators(seed, row_ids, b) for b in range(is_block.shape[1])]

        def draw():  # (B, n, d) of N(0, I); the numbers of a block do not depend on what follows it
            blocks = [[torch.randn(shape, generator=g) for g in block] for block in generators]
            return torch.cat([torch.stack(block) for block in blocks], dim=1).to(device)

        probe = None if exact else draw().sign()  # one for all samples, whose weights are to be compared
        terms = []
        for _ in range(n_samples):
            z0 = q0.at(draw())
            zt = qt.at(draw()) if read_time > 0 else z0
            log_p_x = self.vae.log_likelihood(zt, idx)  # (B, L)
            log_p_z = log_prob(self.dit, z0, zt, read_time, steps, probe)  # (B, n_blocks)
            log_q = block_sum(qt.log_prob(zt), c.block_size)  # (B, n_blocks)
            terms.append([(log_p_x * is_text).sum(1), (log_p_z * is_block).sum(1), (log_q * is_block).sum(1)])
        return LogWeights(*(torch.stack(term) for term in zip(*terms, strict=True)))


class LogWeights(NamedTuple):
    """Of latents drawn from the posterior, each (K, B), in nats."""

    decoder: torch.Tensor  # log p(x | z)
    prior: torch.Tensor  # log p(z)
    posterior: torch.Tensor  # log q(z | x)

    @property
    def total(self):
        """log of p(x, z) / q(z | x)."""
        return self.decoder + self.prior - self.posterior


class Block(NamedTuple):
    """One generated block of all rows that are in the batch."""

    z: torch.Tensor  # (B, block_size, d), in the units of the DiT
    new: list[list[int]]  # the tokens of each row, those of the prompt excepted
    last: bool  # no block will follow
    rows: list[int]  # which of the prompts they are


def block_generators(seed, row_ids, block):
    """The random numbers of one block, a torch.Generator for each row."""
    return [torch.Generator().manual_seed(seed + 1000 * i + 10_000_000 * block) for i in row_ids]


class Writer:
    """What one row has said: counts its tokens, ends it at eos_id or the limit, and turns ids into text if asked."""

    def __init__(self, tokenizer, eos_id, limit):
        self.tokenizer, self.eos_id, self.left, self.done = tokenizer, eos_id, limit, False
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span two blocks

    def write(self, ids, last=False):
        """The part of a block's new ids that this row still says, as ids or text; last: no block will follow."""
        if self.done:
            return "" if self.tokenizer else []
        ids = ids[: self.left]
        self.left -= len(ids)
        self.done = last or self.left == 0
        if self.eos_id in ids:
            ids, self.done = ids[: ids.index(self.eos_id)], True
        return self.utf8.decode(decode_bytes(self.tokenizer, ids), final=self.done) if self.tokenizer else ids


def pad_rows(ids, chunk, pad_id, device):
    """Lists of ids -> (B, L), padded on the right to the longest row and to a multiple of `chunk`."""
    length = -(-max(map(len, ids)) // chunk) * chunk
    return torch.tensor([row + [pad_id] * (length - len(row)) for row in ids], device=device)


def prompt_ids(tokenizer, prompts):
    """The token ids of each prompt.  Raises ValueError if one is neither a str nor a list of ids."""
    if not isinstance(prompts, (list, tuple)):
        raise ValueError(f"prompts must be a list, not {type(prompts).__name__}; for one text write [text]")
    try:
        return [encode_prompt(tokenizer, p) if isinstance(p, str) else [operator.index(i) for i in p] for p in prompts]
    except TypeError:
        raise ValueError("every prompt must be a str or a list of token ids") from None


def check_ids(ids, vocab_size):
    for i in (i for row in ids for i in row):
        if not 0 <= i < vocab_size:
            raise ValueError(f"token id {i} is outside the vocabulary 0..{vocab_size - 1}")


def check_options(max_new_tokens, steps, cfg_scale, solver, temperature, top_k, top_p, repetition_penalty, seed):
    integers = dict(max_new_tokens=max_new_tokens, steps=steps, top_k=top_k, seed=seed)
    numbers = dict(cfg_scale=cfg_scale, temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty)
    for name, value in (integers | numbers).items():
        if not isinstance(value, int if name in integers else (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} {value!r} must be {'an integer' if name in integers else 'a finite number'}")
    for name, value, fine, allowed in [
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("steps", steps, steps >= 1, "1 or more"),
        ("cfg_scale", cfg_scale, 0 <= cfg_scale <= 1000, "between 0 and 1000"),
        ("solver", solver, solver in ("euler", "heun"), "euler or heun"),
        ("temperature", temperature, temperature >= 0, "0 or more"),
        ("top_k", top_k, top_k >= 0, "0 or more"),
        ("top_p", top_p, 0 <= top_p <= 1, "between 0 and 1"),
        ("repetition_penalty", repetition_penalty, repetition_penalty > 0, "above 0"),
    ]:
        if not fine:
            raise ValueError(f"{name} {value} is out of range: it must be {allowed}")


def check_fit(vae, dit):
    """A prior belongs to the latents it was trained on."""
    for name in ("latent_dim", "block_size"):
        if getattr(vae, name) != getattr(dit, name):
            raise ValueError(
                f"the VAE and the prior do not fit together: {name} is {getattr(vae, name)} in the VAE "
                f"and {getattr(dit, name)} in the prior"
            )
