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
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn

import common
import data
from chat import PADDING, PROMPT, open_chats
from dit import DiT, DiTConfig
from extras.codebook import CODE_TOKENS, fit_codes
from extras.kernels import compile_blocks
from flow import flow_matching_loss, sample_times, simulated_prompts
from options import PriorOptions, parse_options
from released_format import find_tokenizer, load_dit, load_dit_config, load_vae, save_dit, save_vae
from training import Run, held_out_loss, take_over, train, update_ema
from vae import masked_view_loss, reconstruction_loss

CODE_WEIGHT = 1.0  # of the cross-entropy of the codes, in training; what the bar and the log show is the sum


class PriorObjective(nn.Module):
    """The stage-2 objective as a forward pass, because DDP and FSDP hook into that.

    models: what is trained, dit and, with o.joint, vae.  frozen: the stage-1 VAE, which encodes the text or, in joint
    training, is the reference; not a submodule, so that it is neither trained nor sharded.  answer_len: of
    conversations, the mean length of an answer, in latents."""

    def __init__(self, o, models, frozen, answer_len=0.0):
        super().__init__()
        self.o, self.models, self.frozen, self.answer_len = o, models, (frozen,), answer_len

    def forward(self, idx, generator, block_size=None):
        """idx (B, L) token ids, or (B, 2, L) with their parts, of conversations (`chat.open_chats`) -> (loss, terms):
        terms are detached scalars for the log.  block_size: None draws one."""
        o, dit, (reference,) = self.o, self.models.dit, self.frozen
        vae = self.models.vae if o.joint else reference
        idx, parts = idx.unbind(1) if o.chat else (idx, None)

        # Tokens to latents.  The prior has to cover the posterior, not its means, so it learns from samples.
        with torch.set_grad_enabled(o.joint and torch.is_grad_enabled()):
            posterior = vae.encode(idx)
            z = posterior.sample(generator)
        z0 = vae.to_dit(z)  # (B, n, d)
        B, n, _ = z0.shape

        # Every block of every row flows from noise to its latents, given the clean blocks before it.
        def one_of(values):
            return values[torch.randint(len(values), (), generator=generator, device=z0.device)]

        block_size = block_size or one_of(o.block_size)
        stagger = one_of(o.stagger) if self.training and block_size > 1 and len(o.stagger) > 1 else o.stagger[0]
        shape = (B, n // block_size) if block_size > 1 and (o.block_times or stagger) else (B,)
        t = sample_times(shape, o.t_loc, o.t_scale, generator, z0.device, block_size, stagger)
        z1 = torch.randn(z0.shape, generator=generator, device=z0.device)
        if o.chat:  # the sampler encodes the prompt before there is a response
            prompt, valid = parts == PROMPT, parts != PADDING
            alone = vae.encode(idx.masked_fill(~prompt, vae.config.vocab_size - 1))
            z0 = torch.where(prompt[..., None], vae.to_dit(alone.mu), z0)
            count, share = B * self.answer_len, 0.0
        else:
            prompt, valid = simulated_prompts(B, n, block_size, o.prompt_prob, generator, z0.device), None
            count, share = B * n, o.prompt_prob * (block_size > 1)  # of blocks with a prompt
        # The number of latents with loss to be expected: less those that have arrived, and those of prompts that have
        # not, half a block if there is no stagger.
        length = 1 + stagger * (block_size - 1)  # as in `staggered`
        count *= 1 - (1 - 1 / length) / 2 - share * (1 / 2 - stagger * (2 * block_size - 1) / 6 / length)
        code_weight = CODE_WEIGHT if self.training and o.n_codes else 0.0
        count = count if self.training else None
        fm = flow_matching_loss(dit, z0, z1, t, prompt, valid, block_size, code_weight, count)
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


def fsdp_groups(models):
    """For FSDP: what modulates a block is computed before all blocks, so it is gathered apart from the rest of it."""
    groups = [group for block in models.dit.blocks for group in ([*block.ada.values()], block)]
    return groups + (models.vae.blocks if "vae" in models else [])


def dit_config(o, vae):
    """The prior's configuration, on latents of a VAEConfig.  As in the released model, the heads share the width, and
    the rotary embedding turns three quarters of a head.  Raises ValueError for sizes that do not go together."""
    if o.dim % (4 * o.n_head):
        raise ValueError(f"--dim {o.dim} must be a multiple of 4 times --n-head {o.n_head}")
    head_dim = o.dim // o.n_head
    heads = dict(n_head=o.n_head, head_dim=head_dim, rope_dim=head_dim * 3 // 8 * 2)
    latents = dict(latent_dim=vae.latent_dim, block_size=o.block_size[0])  # the first is what sampling takes
    ours = dict(n_codes=o.n_codes, self_conditioning=o.self_conditioning, t_loc=o.t_loc, t_scale=o.t_scale)
    return DiTConfig(dim=o.dim, n_layer=o.n_layer, **ours, **heads, **latents)


def open_stage1(o, folder, device):
    """The VAE, the tokenizer and the configuration of a prior for them; from `folder`, if the run goes on."""
    source = folder if o.resume else Path(o.vae)
    vae = load_vae(source, device)
    tokenizer = find_tokenizer(source, vae.config.vocab_size, required=True)
    if o.resume:
        return vae, tokenizer, load_dit_config(folder)
    if not o.init:
        return vae, tokenizer, dit_config(o, vae.config)
    own = vae if o.vae == o.init else load_vae(o.init, device)
    pairs = zip(vae.encoder.parameters(), own.encoder.parameters(), strict=False)
    if not all(torch.equal(value, other) for value, other in pairs):
        raise ValueError(f"the prior in {o.init} does not know the latents of {o.vae}, of another encoder")
    return vae, tokenizer, replace(load_dit_config(o.init), block_size=o.block_size[0], t_loc=o.t_loc)


def open_text(o, folder, vae, tokenizer):
    """What to learn from: a function step -> a batch for the objective, a batch of held-out text, and all tokens."""
    text = o.data or (f"{o.vae}/data",)
    if not o.data and not data.is_prepared(text[0]):
        raise ValueError(f"{'--init ' * bool(o.init)}{o.vae} has no text beside it: name some with --data")
    corpus = data.open_corpus(text, folder / "data", lambda: tokenizer, o.batch_size, o.seq_len, o.resume)
    data.check_same(corpus.tokenizer, tokenizer)
    print(f"{len(corpus.train):,} training tokens")
    return corpus.batches(o.batch_size, o.seq_len, o.seed), corpus.held_out(o.seq_len), corpus.train


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
        (batch, held_out, answer_len), tokens = open_chats(o, tokenizer, vae.config), None
    else:
        (batch, held_out, tokens), answer_len = open_text(o, run.folder, vae, tokenizer), 0.0

    # What is trained, its moving average and its optimizer; new or as they were.
    torch.manual_seed(o.seed)
    dit = (load_dit(o.init, device) if o.init and not o.resume else DiT(config)).to(device)
    dit.config = config
    if o.n_codes and not o.init and not o.resume:
        fit_codes(dit.codebook, vae, data.even_batch(tokens, max(CODE_TOKENS // o.seq_len, 1), o.seq_len).to(device))
    trained = nn.ModuleDict(dict(dit=dit, vae=copy.deepcopy(vae)) if o.joint else dict(dit=dit))
    vae.requires_grad_(False)  # the frozen VAE, or the reference
    ema = copy.deepcopy(trained).requires_grad_(False)

    for model in (vae, *trained.children()):
        model.checkpointing = o.checkpointing
        if o.compile:
            compile_blocks(model)

    objective = common.distribute(PriorObjective(o, trained, vae, answer_len), fsdp_groups(trained), device, o.fsdp)
    average = PriorObjective(o, ema, vae, answer_len)
    if o.fsdp:  # the average is kept in the same parts
        common.distribute(average, fsdp_groups(ema), device, o.fsdp)
    lr_ratios = dict(dit=1.0, vae=o.vae_lr_ratio)
    with_ratios = [(model, lr_ratios[name]) for name, model in trained.items()]
    optimizer = common.make_optimizer(with_ratios, o.optimizer, o.weight_decay, common.muon_dtype(device, o.precision))
    states = dict(trained=trained, ema=ema) | (dict(reference=vae) if o.joint else {})
    if o.resume:
        run.restore(optimizer, **states)
    n_params = sum(p.numel() for p in dit.parameters())
    sizes = " ".join(str(s) for s in sorted(set(o.block_size)))
    print(f"prior of {n_params:,} parameters on {device}, in blocks of {sizes}")

    def evaluate():
        losses = {s: held_out_loss(average, held_out, o, rows, block_size=s) for s in sorted(set(o.block_size))}
        return dict(held_out=sum(losses.values()) / len(losses)) | {f"held_out_{s}": v for s, v in losses.items()}

    def export():
        whole = {name: common.whole(model) for name, model in ema.items()}
        if common.rank() == 0:
            save_dit(whole["dit"], run.folder)
            if o.joint:
                save_vae(whole["vae"], run.folder)

    if not o.resume and common.rank() == 0:
        save_vae(vae, run.folder)  # a frozen VAE and the tokenizer stay as they are
        data.save_tokenizer(tokenizer, run.folder / "tokenizer.json")
    train(run, objective, optimizer, batch, rows, states, evaluate, export,
          after_step=lambda step: update_ema(ema, trained, o.ema, step))  # fmt: skip
    print(f"the model is in {run.folder}{run.chosen()}; next: python sample.py --model {run.folder}")


if __name__ == "__main__":
    common.run_script(main)
