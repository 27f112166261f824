"""Cola DLM: p(x, z0) = p_theta(x | z0) p_psi(z0) (Eq. 2.1.1), a Text VAE and a block-causal DiT prior together.

Generation (section 2.2.3 of the paper): encode the prompt; then, block by block, carry Gaussian noise to latents with
an ODE solver and decode the finished block once.  The prior decides the content, the decoder the tokens.

A block costs one pass of the prior for each step of the solver (two with Heun), with and without history in one batch,
and one pass of the decoder, whatever its number of tokens.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import TextStream, check_ids, end_ids, pad_rows, prompt_ids, save_tokenizer
from dit import CLEAN, NOISY
from extras.draws import Draws, penalise, pick_tokens
from flow import solve, solver_times
from options import RELEASED
from released_format import find_tokenizer, load_dit, load_vae, save_dit, save_vae
from transformer import KVCache, make_layout

PREFILL = 1024  # latents of a prompt that are read at a time


class ColaDLM(nn.Module):
    """A TextVAE, a DiT over its latents, and the tokenizer that belongs to them (None: token ids only)."""

    def __init__(self, vae, dit, tokenizer=None):
        super().__init__()
        if vae.config.latent_dim != dit.config.latent_dim:
            channels = f"{vae.config.latent_dim} channels in the VAE and {dit.config.latent_dim} in the prior"
            raise ValueError(f"these models do not fit together: a latent has {channels}")
        self.vae, self.dit, self.tokenizer = vae, dit, tokenizer

    @property
    def device(self):
        return next(self.parameters()).device

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32, with_tokenizer=False):
        """Load a folder in the released format; with_tokenizer: only if there is a tokenizer.json.  Raises ValueError
        or FileNotFoundError, in one line, for what is missing, damaged, not expected or not supported."""
        vae, dit = load_vae(folder, device, dtype), load_dit(folder, device, dtype)
        return cls(vae, dit, find_tokenizer(folder, vae.config.vocab_size, with_tokenizer)).eval()

    def save_pretrained(self, folder, dtype=torch.float32):
        """Write weights (in `dtype`), configurations and tokenizer as released, each file complete or not at all."""
        save_vae(self.vae, folder, dtype)
        save_dit(self.dit, folder, dtype)
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, Path(folder) / "tokenizer.json")

    def generate(self, prompts, **options):
        """New tokens for every prompt: a list of id lists, with a str in place of each list whose prompt was a str.

        Takes the options of `stream`, which does the work."""
        rows = zip(*self.stream(prompts, **options), strict=True)  # of each prompt, its pieces
        return ["".join(row) if isinstance(row[0], str) else sum(row, []) for row in rows]

    def stream(self, prompts, max_new_tokens=64, eos_id=None, special_tokens=False, **options):
        """Generate block by block; after each block, yield the new tokens of every prompt (ids for ids, str for str).

        prompts: list of str or of lists of token ids, of any lengths.  An empty list asks for unconditional text; an
        empty str for a new document, after the end of another.
        max_new_tokens: at most so many for each prompt; eos_id: a row ends before this token, or before one of several.
        special_tokens: those written out in a str, such as <|endoftext|>, count as such; otherwise they are text.
        options: those of `generate_blocks`, which does the work.  Raises ValueError for options out of range, for ids
        outside the vocabulary, and for text without a tokenizer.

        Where the released code surprises a user, this does not: it ends rows one by one, at an end-of-text token that
        it is told or at max_new_tokens rather than with a full block; positions of the prompt are not new; prompts may
        be empty."""
        ids = prompt_ids(self.tokenizer, prompts, special_tokens)
        for prompt, row in zip(prompts, ids, strict=True):
            if isinstance(prompt, str) and not row:
                row.append(self.tokenizer.eot_token)
        texts = [TextStream(self.tokenizer) if isinstance(prompt, str) else None for prompt in prompts]
        for block in self.generate_blocks(ids, max_new_tokens, eos_id, **options):
            new = dict(zip(block.rows, block.new, strict=True))
            pieces = [(text, new.get(row, [])) for row, text in enumerate(texts)]
            yield [piece if text is None else text.write(piece, block.last) for text, piece in pieces]

    @torch.no_grad()
    def generate_blocks(
        self, ids, max_new_tokens=64, eos_id=None, pad_id=None, row_ids=None, noise=None, watch=None, state=None,
        **options,
    ):  # fmt: skip
        """The block generator: yield a `Block` of latents and tokens at a time, until no row needs another.

        ids: a list of token ids for every row, which may be empty.
        max_new_tokens, eos_id: a row needs no other block once it has so many new tokens, or this one.  Rows that are
        finished leave the batch together, when they are a quarter of it.
        pad_id: fills the prompt's last block for the encoder (where, in the released model, it matters); default the
        last id of the vocabulary.
        row_ids: which noise of the seed a row draws, whatever its batch; default 0, 1, 2, ...
        noise: (n_blocks, B, block_size, d), where blocks begin, instead; generation ends with the last of them.
        state: of `prefill`, for one row: a text that `ids` continue.  It is moved on, and can be given again.
        watch(z, t, new): called after every step of the solver, with the latents (B, block_size, d), their mean time,
        and of each row the likeliest tokens, those of the prompt excepted.
        options: of `options.SamplingOptions`, by default those of RELEASED.  Raises ValueError for one out of range,
        and for the solver "draw" if the prior has no codes.

        Kept as released, because the numbers depend on it: the decoder reads latents as the DiT left them, still
        shifted and scaled; and with patch_size 2 the second half of an odd prompt's last latent, which was encoded with
        padding there, is decoded like a new token (or, where it ends a block, passed over).
        """
        o = RELEASED.but(max_new_tokens=max_new_tokens, **options)
        if not ids:
            return
        c, block_size = self.vae.config, o.block_size or self.dit.config.block_size
        draws = Draws(o.seed, row_ids, len(ids), (block_size, c.latent_dim), self.device, noise)
        left = [o.max_new_tokens] * len(ids)  # new tokens that each row still needs
        ends, state = end_ids(eos_id), self.prefill(ids, o.max_new_tokens, pad_id, block_size, state=state)
        n_blocks = min(state.n_blocks, draws.n_blocks)
        times = solver_times(o.steps, o.grid, self.dit.config.t_loc, self.dit.config.t_scale, block_size, o.stagger)
        seen = torch.zeros(len(ids), c.vocab_size, dtype=torch.bool, device=self.device)  # predicted in earlier blocks

        def tell(z, t):
            watch(z, float(torch.as_tensor(t).mean()), state.new_tokens(self.vae.decode(z, state.vae_cache).argmax(-1)))

        for b in range(n_blocks):
            # Noise to latents, given the history.
            z1, guidance = draws.begin(b, state.rows), o.guidance(block_size)
            z = self.next_block(state, z1, times, guidance, o.solver, o.eta, draws.normal, watch and tell)

            # Latents to tokens, all of the block at once.
            logits = self.vae.decode(z, state.vae_cache).float()  # (B, L, V)
            logits = penalise(logits, seen, o.repetition_penalty)
            tokens = pick_tokens(logits, draws.uniform(logits.shape[1]), o.temperature, o.top_k, o.top_p)  # (B, L)
            seen.scatter_(1, tokens, True)
            new = state.add(z, tokens, ends, left)
            going = [i for i, row in enumerate(state.rows) if left[row] > 0]
            last = b == n_blocks - 1 or not going
            yield Block(z, new, last, state.rows)
            if last:
                return

            # The finished block becomes history, for the rows that go on.
            kept = self.kept_rows(going, len(state.rows))
            if len(kept) < len(state.rows):
                state.keep(kept)
                z, seen = z[kept], seen[kept]
            self.append(state, z)

    def kept_rows(self, going, n):
        """Which of n rows stay in the batch, if `going` are unfinished: all, until a quarter of them can leave."""
        return going if len(going) <= 0.75 * n else list(range(n))

    @torch.no_grad()
    def prefill(self, ids, max_new_tokens=64, pad_id=None, block_size=0, state=None):
        """The `Generation` of prompts, with room for max_new_tokens.  ids, pad_id, block_size: of `generate_blocks`.
        state: a Generation of one row, of the same block size, that they continue; what it has latents of keeps them.
        Raises ValueError for other states, for one without room, and for ids outside the vocabulary."""
        c = self.vae.config
        block_size, p = block_size or self.dit.config.block_size, c.patch_size
        pad_id = c.vocab_size - 1 if pad_id is None else pad_id
        check_ids(ids + [[pad_id]], c.vocab_size)

        if state is not None and (len(ids) != 1 or state.rows != [0] or int(state.dit_cache.length[0]) % block_size):
            raise ValueError("a state continues one text, in blocks of the size that it was made with")
        n_old = 0 if state is None else len(state.text[0]) // p  # latents, whole ones, that are there already
        ids = ids if state is None else [state.text[0] + ids[0]]

        # Whole blocks of a prompt are history; what is left over opens the first generated block.
        n_latents = torch.tensor([-(-len(row) // p) for row in ids])  # (B,)
        n_history = n_latents // block_size * block_size  # (B,)
        n_known = [max(len(row) - int(h) * p, 0) for row, h in zip(ids, n_history, strict=True)]
        n_blocks = max(-(-(known + max_new_tokens) // (block_size * p)) for known in n_known)
        max_len = (end := int(n_history.max())) + n_blocks * block_size
        if state is None:
            caches = self.new_dit_cache(len(ids), max_len), self.vae.new_cache(len(ids), max_len)
            state = Generation(list(range(len(ids))), *caches)
        elif max_len > (room := state.vae_cache.max_len):
            raise ValueError(f"this text has become too long: {max_len} latents are needed, there is room for {room}")
        # Half a latent that ends the history was encoded with padding, and keeps it.
        state.text = [row + [pad_id] * (int(h) * p - len(row)) for row, h in zip(ids, n_history, strict=True)]
        state.n_blocks, state.n_known = n_blocks, n_known
        state.is_known = state.known_z = state.unread = None
        if not any(ids):
            return state

        # The mean, not a sample: a prompt is known, and this is the likeliest latent of it.
        unit = math.lcm(c.block_size, block_size)
        padded, step = pad_rows(ids, unit * p, pad_id, self.device), -(-PREFILL // unit) * unit
        cache = self.vae.new_cache(len(ids), padded.shape[1] // p, encoder=True)
        mu = [self.vae.encode(part, cache).mu for part in padded.split(step * p, dim=1)]
        prompt_z = self.vae.to_dit(torch.cat(mu, dim=1))  # (B, n, d)
        start = int(state.dit_cache.length[0])  # 0, if this is the beginning
        state.vae_cache.length = state.dit_cache.length  # which may lack the last block, still unread
        if n_old > start:  # the last block was not finished
            prompt_z[:, start:n_old] = state.last_z[:, : n_old - start]
        while start < end:
            history = prompt_z[:, start : min(start - start % step + step, end)]
            layout = make_layout(history.shape[1], block_size, self.dit.rope, self.device, state.dit_cache)
            self.dit(history, torch.zeros(1, device=self.device), None, layout, state.dit_cache)
            self.vae.read(history, state.vae_cache, n_history)  # to fill the cache
            state.dit_cache.commit(history.shape[1])
            state.vae_cache.commit(history.shape[1])
            start += history.shape[1]
        state.dit_cache.length = state.vae_cache.length = n_history
        is_known = torch.arange(block_size) < (n_latents - n_history)[:, None]  # (B, block_size)
        if is_known.any():
            at = (n_history[:, None] + torch.arange(block_size)).clamp(max=prompt_z.shape[1] - 1)
            state.is_known, state.known_z = is_known.to(self.device), prompt_z[torch.arange(len(ids))[:, None], at]
        state.last_z = state.known_z  # of the open block, until it is generated
        return state

    @torch.no_grad()
    def next_block(self, state, z1, times, cfg_scale, solver="euler", eta=0.0, noise=None, on_step=None):
        """Carry noise z1 (B, n, d) along `times`, a list from 1 to 0, to the next block of n latents.
        eta, noise: of `flow.solve`; solver: its, or "draw" (`Codebook.draw`); on_step(z, t): called after every step.

        "Clean repaint": latents that the prompt determines are clean (time 0) and do not move.
        Rows without a history are not guided, as released (known latents could be one); "draw" guides all."""
        n, cache, is_known, codes = z1.shape[1], state.dit_cache, state.is_known, self.dit.codebook
        if (draw := solver == "draw") and codes is None:
            raise ValueError("the solver draw takes a prior with codes: this one has none")
        has_history = (cache.length > 0) | (state.unread is not None)  # an unread block is history, too
        guided = has_history & (cfg_scale != 1)
        copies = 2 if guided.any() and not draw else 1
        scale = torch.where(guided, cfg_scale, 1.0).to(self.device)[:, None, None]
        noise = noise or partial(torch.randn_like, z1)
        time_index = layout = None
        if isinstance(times[0], torch.Tensor):  # a time for every latent
            times = [t.to(self.device) for t in times]
            time_index = NOISY + torch.arange(n, device=self.device)[None]
        if is_known is not None:
            time_index = torch.where(is_known, CLEAN, NOISY if time_index is None else time_index).repeat(copies, 1)
        estimate = torch.zeros_like(z1).repeat(copies, 1, 1) if self.dit.config.self_conditioning else None

        def pinned(z):
            return z if is_known is None else torch.where(is_known[..., None], state.known_z, z)

        def guided_velocity(z, t):
            # What the solver integrates: guided, or towards a drawn code.  Both branches are in one batch; the second
            # half has no rows in the cache, hence no history, like the first block of every window in training: rotary
            # attention knows differences of positions alone, so a block without history is the same anywhere.
            nonlocal estimate, layout
            z = pinned(z).repeat(copies, 1, 1)
            if estimate is not None and isinstance(t, torch.Tensor):  # a latent that has arrived is its own
                estimate = torch.where(t == 0, z, estimate)
            x, index, guess, unread = z, time_index, estimate, state.unread
            if unread is not None:
                # The first time the block before comes along, clean, and becomes history: the keys that its own last
                # step left in the cache are those of a block that was not yet final.
                x = torch.cat([unread.repeat(copies, 1, 1), z], dim=1)
                index = torch.full((1, n), NOISY, device=self.device) if index is None else index
                index = F.pad(index, (n, 0), value=CLEAN)
                guess = None if guess is None else F.pad(guess, (0, 0, n, 0))
            layout = layout or make_layout(x.shape[1], n, self.dit.rope, self.device, cache, copies)
            key = tuple(t.flatten().tolist()) if isinstance(t, torch.Tensor) else (t,)
            if key not in state.times:
                state.times[key] = self.dit.embed_times(torch.tensor([[0.0, *key]], device=self.device))
            v = self.run_dit(x, state.times[key], index, layout, cache, guess, n, draw)
            v, log_w = v if draw else (v, None)
            if unread is not None:
                cache.commit(n)
                state.unread = layout = None
            if is_known is not None:
                v = v.masked_fill(time_index[..., None] == CLEAN, 0.0)
            if estimate is not None:  # for the next step, of each branch its own
                estimate = z - t * v
            if draw:
                return codes.draw(v, log_w, z, t, cfg_scale, torch.special.ndtr(noise()[..., 0]))  # one draw is enough
            if copies == 1:
                return v
            v, u = v.chunk(2)  # with history, and without
            return u + scale * (v - u)

        watch = on_step and (lambda z, t: on_step(pinned(z), t))
        return pinned(solve(guided_velocity, pinned(z1), times, "euler" if draw else solver, eta, noise, watch))

    def append(self, state, z):
        """Make the finished block z (B, n, d) part of the history: the next pass of the prior will read it.  Decode it
        first, with state.vae_cache: that fills this cache."""
        state.vae_cache.commit(z.shape[1])
        state.unread, state.is_known, state.known_z, state.n_known = z, None, None, [0] * len(state.rows)

    def run_dit(self, *args):
        """`DiT.forward`, as the sampler calls it (extras/compiled.py has another)."""
        return self.dit(*args)

    def new_dit_cache(self, batch_size, max_len):
        return self.dit.new_cache(batch_size, max_len)


@dataclass
class Generation:
    """A batch of texts between two blocks: made by `prefill`, moved on by `next_block` and `append`."""

    rows: list  # which of the prompts the rows of the batch are
    dit_cache: KVCache  # the finished blocks, as the prior sees them
    vae_cache: KVCache  # and as the decoder does
    n_blocks: int = 0  # that are to come, at most
    n_known: list = field(default_factory=list)  # of each row: prompt tokens inside the next block
    text: list = field(default_factory=list)  # of each row: all ids so far
    last_z: torch.Tensor | None = None  # (B, block_size, d), the last block, finished or not
    unread: torch.Tensor | None = None  # the same, if it is finished but not yet in the dit_cache
    is_known: torch.Tensor | None = None  # bool (B, block_size): latents of those tokens
    known_z: torch.Tensor | None = None  # (B, block_size, d), in the units of the DiT
    times: dict = field(default_factory=dict)  # of the solver: {t: `DiT.embed_times` of [0, *t]}

    def new_tokens(self, tokens):
        """The ids of a decoded block (B, L), those of the prompt excepted: a list for each row."""
        return [row[old:] for row, old in zip(tokens.tolist(), self.n_known, strict=True)]

    def add(self, z, tokens, ends, left):
        """Note the block z (B, block_size, d) and its tokens (B, L).  Returns what is new in each row: at most as many
        as are `left` in it, and what stands before an id in `ends`, after which none are left."""
        self.last_z, found = z, []
        for row, text, new in zip(self.rows, self.text, self.new_tokens(tokens), strict=True):
            new = new[: left[row]]
            end = next((i for i, token in enumerate(new) if token in ends), None)
            text.extend(new if end is None else new[: end + 1])
            left[row] = left[row] - len(new) if end is None else 0
            found.append(new[:end])
        return found

    def keep(self, kept):
        """Forget all rows but these, a list."""
        self.rows, self.n_known, self.text = ([x[i] for i in kept] for x in (self.rows, self.n_known, self.text))
        self.dit_cache.keep(kept)
        self.vae_cache.keep(kept)
        for name in ("last_z", "unread", "is_known", "known_z"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value[kept])


class Block(NamedTuple):  # one generated block of all rows that are in the batch
    z: torch.Tensor  # (B, block_size, d), in the units of the DiT
    new: list[list[int]]  # what each row says: no tokens of the prompt, none from its end on
    last: bool  # no block will follow
    rows: list[int]  # which of the prompts they are
