"""Stage 1: train the Text VAE (Eq. 2.2.1).

    python train_vae.py                              # names of Unicode characters, seconds on a CPU
    python train_vae.py --data my_texts/ --out runs/mine
    python train_vae.py --resume                     # go on where a run was interrupted
    torchrun --nproc_per_node=8 train_vae.py         # on 8 devices; with --fsdp, the model is shared out over them
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn as nn

import common
import data
import processes
from common import flag, option
from extras.kernels import compile_blocks
from released_format import find_tokenizer, save_vae
from resume import LOG_EVERY, Run
from vae import TextVAE, VAEConfig, masked_view_loss, reconstruction_loss, token_accuracy


@dataclass
class Options(common.TrainingOptions):  # which adds seed, device, resume and the like
    # data
    data: tuple = option(("names",), "text files, folders, .jsonl, or what data.py made; names: of Unicode characters")
    tokenizer: str = option("bpe", "bpe (trained on the text), a tokenizer.json, or a tiktoken name (cl100k_base)")
    vocab_size: int = option(512, "size of a trained vocabulary", low=258)
    # model
    preset: str = option("small", "model and recipe: small, or 2b for the paper's", choices=("small", "2b"))
    dim: int = option(128, "width", low=2)
    ffn_dim: int = option(512, "width of the feed-forward layer before SwiGLU halves it", low=2)
    n_head: int = option(2, "attention heads", low=1)
    n_encoder_layer: int = option(1, "transformer layers of the encoder", low=1)
    n_decoder_layer: int = option(1, "transformer layers of the decoder", low=1)
    latent_dim: int = option(32, "channels of a latent", low=2)
    patch_size: int = option(1, "tokens per latent", low=1)
    block_size: int = option(1, "latents that see each other in both directions; 1: a causal VAE", low=1)
    # objective
    beta: float = option(1e-4, "weight of the KL to N(0, I), in nats per token", low=0.0)
    mask_weight: float = option(0.5, "weight of the masked-view loss", low=0.0)
    mask_ratio: float = option(0.2, "share of tokens masked in that view", low=0.0, high=1.0)
    decoder_noise: float = option(0.5, "the decoder learns from latents noised to times up to this", low=0.0, high=1.0)
    # optimization
    steps: int = option(300, "training steps", low=1)
    batch_size: int = option(16, "sequences per step", low=1)
    seq_len: int = option(128, "tokens per sequence", low=1)
    lr: float = option(2e-3, "peak learning rate", low=0.0)
    final_lr: float = option(1e-4, "learning rate at the end of the cosine", low=0.0)
    warmup: int = option(30, "steps of linear warm-up", low=0)
    # run
    out: str = option("runs/vae", "folder of the run and of the trained VAE")


PRESETS = {  # "small" is what stands above
    "2b": dict(
        tokenizer="cl100k_base", vocab_size=100278, latent_dim=16, block_size=16,
        dim=1536, ffn_dim=6144, n_head=12, n_encoder_layer=4, n_decoder_layer=4,
        batch_size=1408, micro_batch=16, seq_len=512, steps=200_000, save_every=1000,
        optimizer="adamw", lr=1.5e-4, final_lr=1e-5, warmup=5000, decoder_noise=0.0, checkpointing=True,
    ),
}  # fmt: skip
EVAL_SEQUENCES = 128  # held-out sequences behind the figure at the end


class VAEObjective(nn.Module):
    """The stage-1 objective (Eq. 2.2.1) as a forward pass, because DDP and FSDP hook into that."""

    def __init__(self, o, vae):
        super().__init__()
        self.o, self.vae = o, vae

    def forward(self, idx, generator=None):
        """idx (B, L) token ids -> (loss, terms), in nats per token; terms are detached scalars to be logged."""
        o, vae = self.o, self.vae
        posterior = vae.encode(idx)  # Gaussians of (B, n, d)
        z0 = posterior.sample(generator)
        reconstruction = reconstruction_loss(vae, z0, idx, o.decoder_noise, generator)
        kl = posterior.kl().mean() / vae.config.patch_size  # per token, as the reconstruction is
        mask = masked_view_loss(vae, idx, o.mask_ratio, generator) if o.mask_weight > 0 else torch.zeros_like(kl)
        loss = reconstruction + o.beta * kl + o.mask_weight * mask
        terms = dict(reconstruction=reconstruction, kl=kl, mask=mask)
        if posterior.logvar is not None:
            terms["log_snr"] = posterior.log_snr()
        return loss, {name: value.detach() for name, value in terms.items()}


def vae_config(o):
    """The VAE's configuration; a small text may end up with fewer tokens than the vocab_size asked for."""
    return VAEConfig(**{name: value for name, value in asdict(o).items() if name in VAEConfig.__dataclass_fields__})


def main():
    options, given = common.parse_options(Options, __doc__, PRESETS)
    run = Run(options, given)
    o, device = run.options, processes.join_processes(common.pick_device(options.device))
    amp = common.autocast(device, o.precision)

    # Text, tokens, tokenizer.
    config = vae_config(o)
    micro_batch = data.micro_batch_size(o.batch_size, o.micro_batch, processes.n_processes())
    data.check_seq_len(o.seq_len, config.patch_size, config.block_size)

    if data.is_prepared(o.data[0]) and (named := given & {"tokenizer", "vocab_size"}):
        raise ValueError(f"{o.data[0]} is tokenized already: leave out {flag(named.pop())}")

    def tokenizer():
        return data.make_tokenizer(o.tokenizer, o.vocab_size, o.data)

    corpus = data.open_corpus(o.data, run.folder / "data", tokenizer, o.batch_size, o.seq_len, o.resume)
    config.vocab_size = corpus.tokenizer.n_vocab
    if o.resume:
        data.check_same(corpus.tokenizer, find_tokenizer(run.folder, config.vocab_size, required=True))

    # Model and optimizer, new or as they were.
    torch.manual_seed(o.seed)
    vae = TextVAE(config).to(device)
    vae.checkpointing = o.checkpointing
    if o.compile:
        compile_blocks(vae)

    objective = processes.distribute(VAEObjective(o, vae), vae.blocks, device, o.fsdp)
    optimizer = common.make_optimizer([(vae, 1.0)], o.optimizer, o.weight_decay, common.muon_dtype(device, o.precision))
    if o.resume:
        run.restore(optimizer, vae)
    n_params = sum(p.numel() for p in vae.parameters())
    print(f"{len(corpus.train):,} training tokens of {vae.config.vocab_size:,} ids")
    print(f"VAE of {n_params:,} parameters on {device}")

    def export():
        whole = processes.whole(vae)
        if processes.rank() == 0:
            save_vae(whole, run.folder)

    if not o.resume:
        if processes.rank() == 0:
            data.save_tokenizer(corpus.tokenizer, run.folder / "tokenizer.json")
        run.save(0, optimizer, vae)  # from here on --resume finds all it needs
    export()
    tokens_per_step = o.batch_size * o.seq_len
    with common.progress_bar(run.step, o.steps, tokens_per_step) as bar:
        for step in range(run.step, o.steps):
            idx = data.random_batch(corpus.train, o.batch_size, o.seq_len, o.seed, step).to(device)  # (B, L)
            lr = common.learning_rate(step, o.steps, o.warmup, o.lr, o.final_lr)
            parts, passes = common.parts_of_batch(idx, micro_batch, o.seed, step), []
            for part, generator in parts:
                objective.require_backward_grad_sync = len(passes) == len(parts) - 1  # DDP averages once a step
                with amp:
                    loss, terms = objective(part, generator)
                (loss / len(parts)).backward()
                passes.append(dict(loss=loss.detach(), **terms))
            common.optimizer_step(optimizer, lr, o.clip)

            bar.update(tokens_per_step)
            if (step + 1) % LOG_EVERY == 0 or step + 1 == o.steps:
                run.record(bar, step + 1, lr, passes)
            if (step + 1) % o.save_every == 0 or step + 1 == o.steps:
                run.save(step + 1, optimizer, vae)
                export()

    vae = processes.whole(vae)
    if processes.rank() > 0:
        return
    vae = vae.to(device)
    held_out = data.even_batch(corpus.val, EVAL_SEQUENCES, o.seq_len).to(device)
    parts = held_out.split(micro_batch)
    accuracy = sum(token_accuracy(vae, part) * len(part) for part in parts) / len(held_out)
    print(f"reconstruction: {100 * accuracy:.2f} % of {held_out.numel():,} held-out tokens")
    text = "" if data.is_prepared(run.folder / "data") else f" --data {o.data[0]}"
    print(f"the VAE is in {run.folder}; next: python train_prior.py --vae {run.folder}{text}")


if __name__ == "__main__":
    common.run_script(main)
