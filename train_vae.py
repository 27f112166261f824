"""Stage 1: train the Text VAE (Eq. 3.16).

    python train_vae.py                              # names of Unicode characters, seconds on a CPU
    python train_vae.py --data my_texts/ --out runs/mine
    python train_vae.py --resume                     # go on where a run was interrupted; --steps 1000: longer
    python train_vae.py --init pretrained --vae-part final_layer --data my_texts/      # tune the decoder's last layer
    torchrun --nproc_per_node=8 train_vae.py         # on 8 devices; with --fsdp, the model is shared out over them
"""

if __name__ == "__main__":
    import extras.quiet  # noqa: F401

import math

import torch
import torch.nn as nn
from tqdm import tqdm

import common
import data
from extras.kernels import compile_blocks
from options import VAE_PARTS, VAEOptions, flag, parse_options
from released_format import find_tokenizer, load_vae, load_vae_config
from training import Run, adopt, held_out_loss, open_text, train
from vae import TextVAE, masked_view_loss, reconstruction_loss

LOW_SNR = 0.5  # 3.5 to 4 is usual; 0 is where a new VAE begins, and where the posterior collapses to N(mu, 1)


class VAEObjective(nn.Module):
    """The stage-1 objective (Eq. 3.16) as a forward pass, because DDP and FSDP hook into that."""

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


def main():
    options, given = parse_options(VAEOptions, __doc__)
    if options.init:
        options = adopt(options, given, load_vae_config(options.init))
    elif options.vae_part != "all" and not options.resume:
        raise ValueError(f"--vae-part {options.vae_part} leaves the rest as it is, which takes a model: add --init")
    run = Run(options, given)
    o, device = run.options, common.join_processes(common.pick_device(options.device))
    start = run.folder if o.resume else o.init  # of weights, configuration and tokenizer; "" if all is new

    # Text, tokens, tokenizer.
    config = load_vae_config(start) if start else o.config()
    rows = data.micro_batch_size(o.batch_size, o.micro_batch, common.n_processes())
    data.check_seq_len(o.seq_len, config.patch_size, config.block_size)
    if (o.init or data.is_prepared(o.data[0])) and (named := given & {"tokenizer", "vocab_size"}):
        raise ValueError(f"{o.init or o.data[0]} has a tokenizer already: leave out {flag(min(named))}")
    own = find_tokenizer(start, config.vocab_size, required=True) if start else None
    corpus = open_text(o, run.folder, own)
    batch, held_out = corpus.batches(o.batch_size, o.seq_len, o.seed), corpus.held_out(o.seq_len)
    config.vocab_size = config.vocab_size if own else corpus.tokenizer.n_vocab

    # Model and optimizer, new or as they were.
    torch.manual_seed(o.seed)
    vae = (load_vae(start, device) if o.init and not o.resume else TextVAE(config)).to(device)
    for name, p in vae.named_parameters():
        p.requires_grad_(name.startswith(VAE_PARTS[o.vae_part]))
    vae.checkpointing = o.checkpointing
    if o.compile:
        compile_blocks(vae)

    objective = common.distribute(VAEObjective(o, vae), [vae], device, o.fsdp)
    optimizer = common.make_optimizer([(vae, 1.0)], o.optimizer, o.weight_decay, common.muon_dtype(device, o.precision))
    if o.resume:
        run.restore(optimizer, vae)
    print(f"VAE of {sum(p.numel() for p in vae.parameters()):,} parameters on {device}")

    def drowns(row):
        return row.get("log_snr", math.inf) < LOW_SNR and row["step"] > o.warmup

    def evaluate():
        if run.log and drowns(run.log[-1]) and not any(map(drowns, run.evaluations())):  # once
            snr, advice = run.log[-1]["log_snr"], "lower --beta or --lr, or raise --decoder-noise"
            tqdm.write(f"warning: the noise of the latents drowns them (log_snr {snr:.2f}): {advice}")
        return dict(held_out=held_out_loss(objective, held_out, o, rows))

    if not o.resume and common.rank() == 0:
        data.save_tokenizer(corpus.tokenizer, run.folder / "tokenizer.json")
    train(run, objective, optimizer, batch, rows, dict(trained=vae), evaluate, exported=dict(vae=vae))
    if common.rank() > 0:
        return
    vae = load_vae(run.folder, device)  # the best
    with torch.no_grad():
        right = torch.cat([vae.likeliest(vae.encode(idx).mu) == idx for idx in held_out.to(device).split(rows)])
    print(f"reconstruction: {right.float().mean():.2%} of {right.numel():,} held-out tokens{run.chosen()}")
    text = "" if data.is_prepared(run.folder / "data") else f" --data {o.data[0]}"
    init = "" if o.vae_part == "all" else f" --init {o.init}"  # the latents are the same: the old prior fits
    print(f"the VAE is in {run.folder}; next: python train_prior.py{init} --vae {run.folder}{text}")


if __name__ == "__main__":
    common.run_script(main)
