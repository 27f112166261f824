"""A yardstick, not a part of the project: an ordinary autoregressive transformer, as large as the default prior,
trained for so many seconds on the same tokens.  It says how fast it samples, with a cache as the prior has one, and
its samples go to a file for measure/judge.py.

    python tests/autoregressive.py --seconds 400 --out ar.jsonl --model runs/cola
    python -m measure.judge --texts ar.jsonl
"""

import functools
import json
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import data
from cola import ColaDLM
from measure.judge import text_of
from options import SamplingOptions, option, parse_options
from training import learning_rate
from transformer import KVCache, make_layout
from vae import VAEBlock, VAEConfig, half_rope


class Autoregressive(nn.Module):
    """Blocks of the VAE, pre-norm, with an ordinary causal mask."""

    def __init__(self, vocab_size, dim=192, ffn_dim=1792, n_head=2, n_layer=4):
        super().__init__()
        config = VAEConfig(vocab_size=vocab_size, dim=dim, ffn_dim=ffn_dim, n_head=n_head, post_norm=False)
        self.n_head, self.head_dim = n_head, dim // n_head
        self.embed = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(VAEBlock(config, i) for i in range(n_layer))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size)
        nn.init.normal_(self.embed.weight, std=0.02)

    def rope(self, pos):
        return half_rope(pos, self.head_dim, 10000.0, pos.device)

    def forward(self, idx, cache=None):  # (B, L) -> (B, L, V)
        layout = make_layout(idx.shape[1], 1, self.rope, idx.device, cache)
        x = self.embed(idx)
        for block in self.blocks:
            x = block(x, layout, cache)
        return self.head(self.norm(x))

    @torch.no_grad()
    def generate(self, n_rows, n_tokens, first, temperature):
        """Token ids (B, n_tokens) behind the token `first`."""
        cache = KVCache(len(self.blocks), n_rows, self.n_head, n_tokens, self.head_dim)
        idx = torch.full((n_rows, 1), first)
        for _ in range(n_tokens):
            probs = (self(idx[:, -1:], cache)[:, -1] / temperature).softmax(-1)
            cache.commit(1)
            idx = torch.cat([idx, torch.multinomial(probs, 1)], 1)
        return idx[:, 1:]


def diffusion(model, options, n_rows, n_tokens):
    """Generate with the defaults of sample.py but for some options."""
    settings = SamplingOptions(max_new_tokens=n_tokens, **options).settings()
    return model.generate([[model.tokenizer.eot_token]] * n_rows, **settings)


def timed(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


@dataclass
class Options:
    data: str = option("runs/vae/data", "folder of token files")
    seconds: float = option(400.0, "training time", low=0.0)
    batch_size: int = option(32, "sequences per step", low=1)
    seq_len: int = option(128, "tokens per sequence", low=1)
    lr: float = option(2e-3, "peak learning rate", low=0.0)
    temperature: float = option(0.8, "of the samples", low=1e-3)
    num_samples: int = option(64, "samples", low=1)
    max_new_tokens: int = option(64, "tokens per sample", low=1)
    seed: int = option(0, "seed of everything", low=0)
    out: str = option("ar.jsonl", "file of the samples")
    model: str = option("", "folder of a Cola DLM, whose sampler is timed as well")


def main():
    o, _ = parse_options(Options, __doc__)
    torch.manual_seed(o.seed)
    corpus = data.open_tokens(o.data)
    model = Autoregressive(corpus.tokenizer.n_vocab)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = common.make_optimizer([(model, 1.0)], "muon", 0.01)
    start, step = time.perf_counter(), 0
    while (done := (time.perf_counter() - start) / o.seconds) < 1:
        idx = data.random_batch(corpus.train, o.batch_size, o.seq_len + 1, o.seed, step)
        with common.autocast(idx.device):
            logits = model(idx[:, :-1])
        F.cross_entropy(logits.float().flatten(0, 1), idx[:, 1:].flatten()).backward()
        common.optimizer_step(optimizer, learning_rate(done, 1, 0, 1.0, o.lr, 0.0) * min(1, (step + 1) / 30), 1.0)
        step += 1

    with torch.no_grad():
        model.eval()
        held_out = data.even_batch(corpus.val, 64, o.seq_len + 1)
        loss = F.cross_entropy(model(held_out[:, :-1]).flatten(0, 1), held_out[:, 1:].flatten())
    print(f"{step} steps; held-out loss {loss:.3f} nats per token")
    ways = {"autoregressive": functools.partial(model.generate, first=corpus.tokenizer.eot_token, temperature=1.0)}
    if o.model:
        prior = ColaDLM.from_pretrained(o.model)
        for size in (1, 2, 4, 8, 16):
            ways[f"blocks of {size}"] = functools.partial(diffusion, prior, dict(block_size=size))
            one_by_one = dict(block_size=size, steps=size, stagger=1.0, solver="draw")
            ways[f"blocks of {size}, a draw for each latent"] = functools.partial(diffusion, prior, one_by_one)
    for n_rows, (name, generate) in product((1, 8), ways.items()):
        spent = min(timed(generate, n_rows, 256) for _ in range(3))
        print(f"{name}, {n_rows} rows of 256 tokens: {256 * n_rows / spent:.0f} tokens/s")
    idx = model.generate(o.num_samples, o.max_new_tokens, corpus.tokenizer.eot_token, o.temperature)
    rows = [text_of(corpus.tokenizer, row).decode(errors="replace") for row in idx.tolist()]
    Path(o.out).write_text("".join(json.dumps(dict(text=row)) + "\n" for row in rows))


if __name__ == "__main__":
    common.run_script(main)
