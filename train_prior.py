"""Stage 2: train the latent prior by flow matching (Eq. 2.2.3), with the VAE frozen or, with --joint, trained along.

    python train_prior.py                            # on the VAE of runs/vae and the text it was trained on
    python train_prior.py --vae runs/mine --out runs/mine-cola
    python train_prior.py --joint                    # the paper's joint objective
    python train_prior.py --resume                   # go on where a run was interrupted
    torchrun --nproc_per_node=8 train_prior.py       # on 8 devices; with --fsdp, the model is shared out over them
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn

import common
import data
import processes
from common import option
from dit import DiT, DiTConfig
from extras.codebook import fit_codes
from extras.kernels import compile_blocks
from flow import flow_matching_loss, sample_times, simulated_prompts
from released_format import find_tokenizer, load_vae, save_dit, save_vae
from resume import LOG_EVERY, Run, saved_options
from vae import masked_view_loss, reconstruction_loss


@dataclass
class Options(common.TrainingOptions):  # which adds seed, device, resume and the like
    # data
    vae: str = option("runs/vae", "folder of the stage-1 run, or of a released model")
    data: tuple = option((), "as in train_vae.py, tokenized as the VAE was; nothing: the text of the VAE's own run")
    # model; the latent size is the VAE's
    preset: str = option("small", "small; plain: without codes; 2b: the paper's", choices=("small", "plain", "2b"))
    dim: int = option(192, "width", low=1)
    n_head: int = option(2, "attention heads", low=1)
    n_layer: int = option(4, "transformer layers", low=1)
    block_size: tuple = option((1, 2, 4), "latents per block, drawn in each pass; the first is that of sampling", low=1)
    self_conditioning: bool = option(True, "the prior sees its last estimate of z0 (not the paper's)")
    n_codes: int = option(512, "codes of the read-out, at most (extras/codebook.py); 0: the paper's prior", low=0)
    # objective
    t_loc: float = option(1.0, "times are sigmoid(N(t_loc, t_scale)); the paper: 1 for d = 16, 1.7 for 64, 2.3 for 128")
    t_scale: float = option(1.0, hidden=True)
    block_times: bool = option(True, "a time of its own for every block of several latents; the paper: for every row")
    prompt_prob: float = option(0.05, "share of blocks that keep a random clean prefix, a prompt", low=0.0, high=1.0)
    joint: bool = option(False, "train the VAE along, held near its stage-1 encoder")
    vae_weight: float = option(1.0, hidden=True)  # joint: of the VAE's terms; that of the flow-matching loss is 1
    ref_weight: float = option(1.0, "joint: weight of KL(q || q_ref), per token, to the frozen encoder", low=0.0)
    vae_lr_ratio: float = option(1.0, "joint: learning rate of the VAE over that of the prior", low=0.0)
    # optimization
    steps: int = option(1400, "training steps", low=1)
    batch_size: int = option(32, "sequences per step", low=1)
    seq_len: int = option(32, "tokens per sequence", low=1)
    lr: float = option(8e-3, "peak learning rate", low=0.0)
    final_lr: float = option(1e-5, hidden=True)  # at the end of the cosine
    warmup: int = option(50, "steps of linear warm-up", low=0)
    ema: float = option(0.99, "decay of the moving average of the weights, which gets sampled", low=0.0, high=1.0)
    # run
    out: str = option("runs/cola", "folder of the run and of the whole model")
    # joint: the VAE's own terms, weighted as in its stage 1 (no flags)
    beta: float = option(1e-4, hidden=True)
    mask_weight: float = option(0.5, hidden=True)
    mask_ratio: float = option(0.2, hidden=True)
    decoder_noise: float = option(0.5, hidden=True)


PRESETS = {  # "small" is what stands above
    "plain": dict(block_size=(1,), n_codes=0, self_conditioning=False, block_times=False, steps=2000),
    "2b": dict(
        dim=2048, n_head=16, n_layer=24, block_size=(16,), n_codes=0, self_conditioning=False,
        block_times=False, joint=True,
        batch_size=1408, micro_batch=16, seq_len=512, steps=200_000, save_every=1000,
        optimizer="adamw", lr=1.5e-4, final_lr=1e-5, warmup=5000, decoder_noise=0.0, checkpointing=True,
        ema=0.9999,  # not the paper's, which does not mention one
    ),
}  # fmt: skip
EVAL_SEQUENCES = 128  # held-out sequences behind the figure at the end
CODE_WEIGHT = 1.0  # of the cross-entropy of the codes, in training; what the bar and the log show is the sum


class PriorObjective(nn.Module):
    """The stage-2 objective as a forward pass, because DDP and FSDP hook into that.

    models: what is trained, dit and, with o.joint, vae.  frozen: the stage-1 VAE, which encodes the text or, in joint
    training, is the reference; not a submodule, so that it is neither trained nor sharded."""

    def __init__(self, o, models, frozen):
        super().__init__()
        self.o, self.models, self.frozen = o, models, (frozen,)

    def forward(self, idx, generator):
        """idx (B, L) token ids -> (loss, terms): terms are detached scalars to be logged."""
        o, dit, (reference,) = self.o, self.models.dit, self.frozen
        vae = self.models.vae if o.joint else reference

        # Tokens to latents.  The prior has to cover the posterior, not its means, so it learns from samples.
        with torch.set_grad_enabled(o.joint and torch.is_grad_enabled()):
            posterior = vae.encode(idx)
            z = posterior.sample(generator)
        z0 = vae.to_dit(z)  # (B, n, d)
        B, n, _ = z0.shape

        # Every block of every row flows from noise to its latents, given the clean blocks before it.
        block_size = o.block_size[torch.randint(len(o.block_size), (), generator=generator, device=z0.device)]
        shape = (B, n // block_size) if o.block_times and block_size > 1 else (B,)  # not one for every latent
        t = sample_times(shape, o.t_loc, o.t_scale, generator, z0.device)
        z1 = torch.randn(z0.shape, generator=generator, device=z0.device)
        prompt = simulated_prompts(B, n, block_size, o.prompt_prob, generator, z0.device)
        code_weight = CODE_WEIGHT if self.training and o.n_codes else 0.0
        fm = flow_matching_loss(dit, z0, z1, t, prompt, block_size=block_size, code_weight=code_weight)
        if not o.joint:
            return fm, {}

        # Joint training (Eq. 2.2.3).  In the VAE's KL, the prior has taken the place of N(0, I): of the two parts of
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


@torch.no_grad()
def held_out_loss(o, dit, vae, tokens, micro_batch):
    """The flow-matching loss on EVAL_SEQUENCES of a token file, as a text, for each of the block sizes."""
    device, texts = next(dit.parameters()).device, []
    idx = data.even_batch(tokens, EVAL_SEQUENCES, o.seq_len).to(device)  # (N, L)
    for block_size in sorted(set(o.block_size)):
        of_size, generator = replace(o, joint=False, block_size=(block_size,)), common.step_generator(o.seed, 0, device)
        objective = PriorObjective(of_size, nn.ModuleDict(dict(dit=dit)), vae).eval()
        with common.autocast(device, o.precision):
            loss = sum(objective(part, generator)[0] * len(part) for part in idx.split(micro_batch)) / len(idx)
        texts.append(f"{loss.item():.4f} in blocks of {block_size}")
    return f"flow-matching loss on {idx.numel():,} held-out tokens: {', '.join(texts)}"


def fsdp_groups(models):
    """For FSDP: what modulates a block is computed before all blocks, so it is gathered apart from the rest of it."""
    groups = [group for block in models.dit.blocks for group in ([*block.ada.values()], block)]
    return groups + (models.vae.blocks if "vae" in models else [])


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay ema + (1 - decay) model, parameter by parameter, with a shorter memory during the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    for average, value in zip(ema.parameters(), model.parameters(), strict=True):
        average.lerp_(value, 1 - decay)


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
    """The VAE, the configuration of a prior for it, and a Corpus in its tokens; from `folder`, if the run goes on."""
    source = folder if o.resume else Path(o.vae)
    vae = load_vae(source, device)
    tokenizer = find_tokenizer(source, vae.config.vocab_size, required=True)
    config = dit_config(o, vae.config)
    data.check_seq_len(o.seq_len, vae.config.patch_size, vae.config.block_size, *o.block_size)
    text = o.data or (f"{o.vae}/data",)
    if not o.data and not data.is_prepared(text[0]):
        raise ValueError(f"{o.vae} has no text of its own: name some with --data")
    corpus = data.open_corpus(text, folder / "data", lambda: tokenizer, o.batch_size, o.seq_len, o.resume)
    data.check_same(corpus.tokenizer, tokenizer)
    return vae, config, corpus


def main():
    options, given = common.parse_options(Options, __doc__, PRESETS)
    if options.joint and "n_codes" not in given:  # the latents would move away from their codes
        options.n_codes = 0
    stage1 = saved_options(options.vae)
    own = {name: stage1[name] for name in ("beta", "mask_weight", "mask_ratio", "decoder_noise") if name in stage1}
    run = Run(replace(options, **own), given)
    o, device = run.options, processes.join_processes(common.pick_device(options.device))
    amp = common.autocast(device, o.precision)

    micro_batch = data.micro_batch_size(o.batch_size, o.micro_batch, processes.n_processes())
    if o.joint and o.n_codes:
        raise ValueError(f"--joint moves the latents away from their codes: leave out --n-codes {o.n_codes}")
    if o.self_conditioning and micro_batch < 2:
        raise ValueError("--self-conditioning takes half of the sequences of a pass: it needs 2 of them at least")
    vae, config, corpus = open_stage1(o, run.folder, device)

    # What is trained, its moving average and its optimizer; new or as they were.
    torch.manual_seed(o.seed)
    dit = DiT(config).to(device)
    if o.n_codes and not o.resume:
        fit_codes(dit.codebook, vae, corpus.train, o.seq_len)
        print(f"the codes alone, without context: {held_out_loss(o, dit, vae, corpus.val, micro_batch)}")
        dit.train()
    trained = nn.ModuleDict(dict(dit=dit, vae=copy.deepcopy(vae)) if o.joint else dict(dit=dit))
    vae.requires_grad_(False)  # the frozen VAE, or the reference
    ema = copy.deepcopy(trained).requires_grad_(False)

    for model in (vae, *trained.children()):
        model.checkpointing = o.checkpointing
        if o.compile:
            compile_blocks(model)

    def distributed(models):
        return processes.distribute(PriorObjective(o, models, vae), fsdp_groups(models), device, o.fsdp)

    objective = distributed(trained)
    if o.fsdp:  # the average is kept in the same parts
        distributed(ema)
    lr_ratios = dict(dit=1.0, vae=o.vae_lr_ratio)
    with_ratios = [(model, lr_ratios[name]) for name, model in trained.items()]
    optimizer = common.make_optimizer(with_ratios, o.optimizer, o.weight_decay, common.muon_dtype(device, o.precision))
    states = dict(trained=trained, ema=ema) | (dict(reference=vae) if o.joint else {})
    if o.resume:
        run.restore(optimizer, **states)
    n_params = sum(p.numel() for p in dit.parameters())
    print(f"{len(corpus.train):,} training tokens; prior of {n_params:,} parameters on {device}")

    def export():
        average = {name: processes.whole(model) for name, model in ema.items()}
        if processes.rank() == 0:
            save_dit(average["dit"], run.folder)
            if o.joint:
                save_vae(average["vae"], run.folder)

    if not o.resume:
        if processes.rank() == 0:
            save_vae(vae, run.folder)  # a frozen VAE and the tokenizer stay as they are
            data.save_tokenizer(corpus.tokenizer, run.folder / "tokenizer.json")
        run.save(0, optimizer, **states)  # from here on --resume finds all it needs
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
            update_ema(ema, trained, o.ema, step)

            bar.update(tokens_per_step)
            if (step + 1) % LOG_EVERY == 0 or step + 1 == o.steps:
                run.record(bar, step + 1, lr, passes)
            if (step + 1) % o.save_every == 0 or step + 1 == o.steps:
                run.save(step + 1, optimizer, **states)
                export()

    average = {name: processes.whole(model) for name, model in ema.items()}
    if processes.rank() > 0:
        return
    dit, vae = average["dit"].to(device), average.get("vae", vae).to(device)
    print(held_out_loss(o, dit, vae, corpus.val, micro_batch))
    print(f"the model is in {run.folder}; next: python sample.py --model {run.folder}")


if __name__ == "__main__":
    common.run_script(main)
