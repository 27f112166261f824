"""Stage 2: train the latent prior by flow matching (Eq. 3.18), with the VAE frozen or, with --joint, trained along.

    python train_prior.py                            # on the VAE of runs/vae and the text it was trained on
    python train_prior.py --vae runs/mine --out runs/mine-cola
    python train_prior.py --joint                    # the paper's joint objective
    python train_prior.py --resume                   # go on where a run was interrupted; --steps 3000: longer
    python train_prior.py --init pretrained --data my_texts/           # go on from a model of any origin
    torchrun --nproc_per_node=8 train_prior.py       # on 8 devices; with --fsdp, the model is shared out over them
"""

if __name__ == "__main__":
    import extras.quiet  # noqa: F401

import copy

import torch
import torch.nn as nn

import common
import data
from chat import PADDING, PROMPT, open_chats
from dit import DiT
from extras.codebook import CODE_TOKENS, fit_codes
from extras.draws import one_of
from extras.kernels import compile_blocks
from extras.stagger import share_with_loss
from flow import flow_matching_loss, sample_times, simulated_prompts
from options import PriorOptions, parse_options
from released_format import load_dit, save_vae
from training import Run, held_out_loss, open_stage1, open_text, take_over, train, update_ema
from vae import masked_view_loss, reconstruction_loss

CODE_WEIGHT = 1.0  # of the cross-entropy of the codes, in training; what the bar and the log show is the sum


class PriorObjective(nn.Module):
    """The stage-2 objective as a forward pass, because DDP and FSDP hook into that.

    models: dit and, with o.joint, vae.  frozen: the stage-1 VAE, which encodes the text or, in joint training, is the
    reference; no submodule, so neither trained nor sharded.  answer_len: of answers, for o.chat, the mean in tokens."""

    def __init__(self, o, models, frozen, answer_len=0.0):
        super().__init__()
        self.o, self.models, self.frozen, self.answer_len = o, models, (frozen,), answer_len

    def forward(self, idx, generator, block_size=None):
        """idx (B, L) token ids, or (B, 2, L) with their parts, of conversations (`chat.open_chats`) -> (loss, terms):
        terms are detached scalars for the log.  block_size: None draws one."""
        o, dit, (reference,) = self.o, self.models.dit, self.frozen
        vae = self.models.vae if o.joint else reference
        idx, parts = idx.unbind(1) if o.chat else (idx, None)

        # Tokens to latents: samples, for the prior has to cover the posterior.  (Prompts are means, as released.)
        with torch.set_grad_enabled(o.joint and torch.is_grad_enabled()):
            posterior = vae.encode(idx)
            z = posterior.sample(generator)
        z0 = vae.to_dit(z)  # (B, n, d)
        B, n, _ = z0.shape

        # Every block of every row flows from noise to its latents, given the clean blocks before it.
        block_size = block_size or one_of(o.block_size, generator)
        stagger = one_of(o.stagger, generator) if self.training and block_size > 1 else o.stagger[0]
        shape = (B, n // block_size) if block_size > 1 and (o.block_times or stagger) else (B,)
        t = sample_times(shape, o.t_loc, o.t_scale, generator, z0.device, block_size, stagger)
        z1 = torch.randn(z0.shape, generator=generator, device=z0.device)
        if o.chat:  # the sampler encodes the prompt before there is a response
            prompt, valid = parts == PROMPT, parts != PADDING
            alone = vae.encode(idx.masked_fill(~prompt, vae.config.vocab_size - 1))
            z0 = torch.where(prompt[..., None], vae.to_dit(alone.mu), z0)
            count = B * self.answer_len * share_with_loss(block_size, stagger, 0.0)  # latents with loss, as expected
        else:
            prompt, valid = simulated_prompts(B, n, block_size, o.prompt_prob, generator, z0.device), None
            count = B * n * share_with_loss(block_size, stagger, o.prompt_prob * (block_size > 1))
        weight, count = (CODE_WEIGHT * (o.n_codes > 0), count) if self.training else (0.0, None)
        fm = flow_matching_loss(dit, z0, z1, t, prompt, valid, block_size, weight, count)
        if not o.joint:
            return fm, {}

        # Joint training (Eq. 3.18).  In the VAE's KL, the prior has taken the place of N(0, I): of the two parts of
        # KL(q || prior), the cross-entropy is what L_FM stands for, and the posterior's entropy remains: without it the
        # posterior would shrink to a point, which is the easiest to predict.
        reconstruction = reconstruction_loss(vae, z, idx, o.decoder_noise, generator)  # or z0 may forget the text
        entropy = posterior.entropy().mean() / vae.config.patch_size
        mask = masked_view_loss(vae, idx, o.mask_ratio, generator) if o.mask_weight > 0 else torch.zeros_like(fm)
        with torch.no_grad():
            old = reference.encode(idx)
        ref = posterior.kl(old).mean() / vae.config.patch_size  # without it, latents and prior would drift together
        vae_terms = reconstruction - o.beta * entropy + o.mask_weight * mask
        loss = fm + o.vae_weight * vae_terms + o.ref_weight * ref
        terms = dict(fm=fm, reconstruction=reconstruction, entropy=entropy, mask=mask, ref=ref)
        return loss, {name: value.detach() for name, value in terms.items()}


def main():
    options, given = parse_options(PriorOptions, __doc__)
    run = Run(take_over(options, given), given)
    o, device = run.options, common.join_processes(common.pick_device(options.device))

    rows = data.micro_batch_size(o.batch_size, o.micro_batch, common.n_processes())  # of one forward pass
    if o.joint and o.n_codes:
        raise ValueError(f"--joint would move the latents away from the {o.n_codes} codes of this prior: it needs none")
    if o.self_conditioning and rows < 2:
        raise ValueError("--self-conditioning takes half of the sequences of a pass: it needs 2 of them at least")
    vae, tokenizer, config = open_stage1(o, run.folder, device)
    data.check_seq_len(o.seq_len, vae.config.patch_size, vae.config.block_size, *o.block_size)
    if o.chat:
        batch, held_out, answer_len = open_chats(o, tokenizer, vae.config)
    else:
        corpus, answer_len = open_text(o, run.folder, tokenizer), 0.0
        batch, held_out = corpus.batches(o.batch_size, o.seq_len, o.seed), corpus.held_out(o.seq_len)

    # What is trained, its moving average and its optimizer; new or as they were.
    torch.manual_seed(o.seed)
    dit = (load_dit(o.init, device) if o.init and not o.resume else DiT(config)).to(device)
    dit.config = config  # its block_size and t_loc are this run's
    if o.n_codes and not o.init and not o.resume:
        idx = data.even_batch(corpus.train, max(CODE_TOKENS // o.seq_len, 1), o.seq_len)
        fit_codes(dit.codebook, vae, idx.to(device))
    trained = nn.ModuleDict(dict(dit=dit, vae=copy.deepcopy(vae)) if o.joint else dict(dit=dit))
    vae.requires_grad_(False)  # the frozen VAE, or the reference
    ema = copy.deepcopy(trained).requires_grad_(False)

    for model in (vae, *trained.children()):
        model.checkpointing = o.checkpointing
        if o.compile:
            compile_blocks(model)

    objective = common.distribute(PriorObjective(o, trained, vae, answer_len), trained.values(), device, o.fsdp)
    average = PriorObjective(o, ema, vae, answer_len)
    if o.fsdp:  # the average is kept in the same parts
        common.distribute(average, ema.values(), device, o.fsdp)
    with_ratios = [(model, o.vae_lr_ratio if name == "vae" else 1.0) for name, model in trained.items()]
    optimizer = common.make_optimizer(with_ratios, o.optimizer, o.weight_decay, common.muon_dtype(device, o.precision))
    states = dict(trained=trained, ema=ema) | (dict(reference=vae) if o.joint else {})
    if o.resume:
        run.restore(optimizer, **states)
    n_params, sizes = sum(p.numel() for p in dit.parameters()), sorted(set(o.block_size))
    print(f"prior of {n_params:,} parameters on {device}, in blocks of {' '.join(map(str, sizes))}")

    def evaluate():
        losses = {s: held_out_loss(average, held_out, o, rows, block_size=s) for s in sizes}
        return dict(held_out=sum(losses.values()) / len(losses)) | {f"held_out_{s}": v for s, v in losses.items()}

    if not o.resume and common.rank() == 0:
        save_vae(vae, run.folder)  # a frozen VAE and the tokenizer stay as they are
        data.save_tokenizer(tokenizer, run.folder / "tokenizer.json")
    train(run, objective, optimizer, batch, rows, states, evaluate, exported=dict(ema.items()),
          after_step=lambda step: update_ema(ema, trained, o.ema, step))  # fmt: skip
    print(f"the model is in {run.folder}{run.chosen()}; next: python sample.py --model {run.folder}")


if __name__ == "__main__":
    common.run_script(main)
