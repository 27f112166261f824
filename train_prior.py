"""Stage 2: train the latent prior by flow matching (Eq. 2.2.3), with the VAE frozen or, with --joint, trained along.

    python train_prior.py                            # on the VAE of runs/vae and the text it was trained on
    python train_prior.py --vae runs/mine --out runs/mine-cola
    python train_prior.py --joint                    # the paper's joint objective
    python train_prior.py --resume                   # go on where a run was interrupted
"""

import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import common
import data
from cola import check_fit, find_tokenizer, load_vae, save_dit, save_vae
from common import option
from dit import DiT, DiTConfig
from flow import flow_matching_loss, sample_times, simulated_prompts
from vae import masked_view_loss, token_cross_entropy


@dataclass
class Options:
    # data
    vae: str = option("runs/vae", "folder of the stage-1 run, or of a released model")
    data: tuple = option(("",), "as in train_vae.py, tokenized as the VAE was; nothing: the text of the VAE's own run")
    # model; the latent size and the block size are the VAE's
    preset: str = option("small", "model and recipe: small, or 2b for the paper's", choices=("small", "2b"))
    dim: int = option(256, "width", low=1)
    n_head: int = option(2, "attention heads", low=1)
    head_dim: int = option(128, "channels of a head", low=2)
    rope_dim: int = option(96, "channels of a head that carry the position", low=2)
    n_layer: int = option(6, "blocks", low=1)
    mlp_ratio: int = option(4, "width of the MLP over the width", low=1)
    # objective
    t_loc: float = option(1.0, "times are sigmoid(N(t_loc, t_scale)); the paper: 1 for d = 16, 1.7 for 64, 2.3 for 128")
    t_scale: float = option(1.0, "see t_loc", low=0.0)
    prompt_prob: float = option(0.05, "share of blocks that keep a random clean prefix, a prompt", low=0.0, high=1.0)
    joint: bool = option(False, "train the VAE along, held near its stage-1 encoder")
    vae_weight: float = option(1.0, "joint: weight of the VAE's terms", low=0.0)
    fm_weight: float = option(1.0, "joint: weight of the flow-matching loss", low=0.0)
    ref_weight: float = option(1.0, "joint: weight of KL(q || q_ref), per token, to the frozen encoder", low=0.0)
    beta: float = option(1e-2, "joint: weight of the posterior's negative entropy, per token", low=0.0)
    mask_weight: float = option(0.5, "joint: weight of the masked-view loss", low=0.0)
    mask_ratio: float = option(0.2, "joint: share of tokens masked in that view", low=0.0, high=1.0)
    vae_lr_ratio: float = option(1.0, "joint: learning rate of the VAE over that of the prior", low=0.0)
    # optimization
    steps: int = option(600, "training steps", low=1)
    batch_size: int = option(16, "sequences per step", low=1)
    seq_len: int = option(128, "tokens per sequence", low=1)
    lr: float = option(1e-3, "peak learning rate", low=0.0)
    final_lr: float = option(1e-5, "learning rate at the end of the cosine", low=0.0)
    warmup: int = option(50, "steps of linear warm-up", low=0)
    weight_decay: float = option(0.01, "AdamW weight decay of matrices", low=0.0)
    clip: float = option(1.0, "largest norm of the gradient", low=0.0)
    ema: float = option(0.99, "decay of the moving average of the weights, which is what gets sampled", high=1.0)
    # run
    out: str = option("runs/cola", "folder of the run and of the whole model")
    resume: bool = option(False, "continue the run in that folder")
    save_every: int = option(200, "steps between checkpoints", low=1)
    log_every: int = option(10, "steps between rows of log.jsonl", low=1)
    seed: int = option(0, "seed of weights, batches and noise", low=0)
    device: str = option("auto", "auto, cpu, cuda, mps")
    precision: str = option("auto", "of matrix products; weights stay fp32", choices=("auto", "fp32", "bf16"))


PRESETS = {
    "2b": dict(
        dim=2048, n_head=16, head_dim=128, rope_dim=96, n_layer=24, joint=True,
        steps=200_000, batch_size=1408, seq_len=512, lr=1.5e-4, final_lr=1e-5, warmup=5000, ema=0.9999, save_every=1000,
    ),
}  # fmt: skip


def stage2_loss(vae, reference, dit, idx, o, generator):
    """The stage-2 objective for tokens idx (B, L).  Returns (loss, terms).

    Frozen VAE: L_FM alone, latents computed without gradient.  Joint (Eq. 2.2.3): the VAE learns too, and the prior
    takes the place of N(0, I) in its KL: the cross-entropy to the prior is what L_FM bounds, the posterior's entropy
    remains, and KL(q || q_ref) to the stage-1 encoder keeps the latents from drifting away under the prior."""
    with torch.set_grad_enabled(o.joint):
        posterior = vae.encode(idx)
        z = posterior.sample(generator)
    z0 = (z - vae.config.shifting_factor) * vae.config.scaling_factor  # (B, n, d)
    B, n, _ = z0.shape
    t = sample_times(B, o.t_loc, o.t_scale, generator, z0.device)
    z1 = torch.randn(z0.shape, generator=generator, device=z0.device)
    prompt = simulated_prompts(B, n, dit.config.block_size, o.prompt_prob, generator, z0.device)
    fm = flow_matching_loss(dit, z0, z1, t, prompt)
    if not o.joint:
        return fm, dict(fm=fm.detach())
    with torch.no_grad():
        reference_posterior = reference.encode(idx)
    per_token = 1 / vae.config.patch_size
    terms = dict(
        fm=fm,
        reconstruction=token_cross_entropy(vae.decode(z), idx),
        entropy=posterior.entropy().mean() * per_token,
        mask=masked_view_loss(vae, idx, o.mask_ratio, generator) if o.mask_weight > 0 else torch.zeros_like(fm),
        ref=posterior.kl(reference_posterior).mean() * per_token,
    )
    vae_loss = terms["reconstruction"] - o.beta * terms["entropy"] + o.mask_weight * terms["mask"]
    loss = o.vae_weight * vae_loss + o.fm_weight * fm + o.ref_weight * terms["ref"]
    return loss, {name: value.detach() for name, value in terms.items()}


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay ema + (1 - decay) model, with a shorter memory during the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    for name, value in model.state_dict().items():
        ema[name].lerp_(value, 1 - decay)


def main():
    options, given = common.parse_options(Options, __doc__, PRESETS)
    run = common.Run(options, given)
    o, device = run.options, common.pick_device(options.device)
    amp = common.autocast(device, o.precision)

    # The VAE, and text in its tokens.
    source = run.folder if run.state else Path(o.vae)
    vae = load_vae(source, device)
    tokenizer = find_tokenizer(source)
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer.json")
    data.save_tokenizer(tokenizer, run.folder / "tokenizer.json")
    corpus = open_corpus(o, run, tokenizer)
    data.check_length(corpus, o.batch_size, o.seq_len, vae.config.block_size * vae.config.patch_size)

    # Prior, optimizer, moving average; new or as they were.
    torch.manual_seed(o.seed)
    shape = {name: value for name, value in asdict(o).items() if name in DiTConfig.__dataclass_fields__}
    shape |= dict(latent_dim=vae.config.latent_dim, block_size=vae.config.block_size)
    dit = DiT(DiTConfig(**shape)).to(device)
    check_fit(vae.config, dit.config)
    reference = copy.deepcopy(vae).requires_grad_(False) if o.joint else None
    vae.requires_grad_(o.joint)
    optimizer = common.make_optimizer([(dit, 1.0)] + ([(vae, o.vae_lr_ratio)] if o.joint else []), o.weight_decay)
    ema = {name: value.clone() for name, value in dit.state_dict().items()}
    first_step = 0
    if run.state:
        vae.load_state_dict(run.state["vae"])
        if o.joint:
            reference.load_state_dict(run.state["reference"])
        dit.load_state_dict(run.state["dit"])
        ema = {name: value.to(device) for name, value in run.state["ema"].items()}
        optimizer.load_state_dict(run.state["optimizer"])
        first_step = run.state["step"]
    n_params = sum(p.numel() for p in dit.parameters())
    print(f"{len(corpus.train):,} training tokens; prior of {n_params:,} parameters on {device}")

    def save(step):
        save_vae(vae, run.folder)
        save_dit(dit, run.folder, ema)
        state = dict(reference=reference.state_dict()) if o.joint else {}
        state |= dict(vae=vae.state_dict(), dit=dit.state_dict(), ema=ema, optimizer=optimizer.state_dict())
        run.save(step, **state)

    if not run.state:
        save(0)  # from here on --resume finds something
    tokens_per_step = o.batch_size * o.seq_len
    bar = tqdm(total=o.steps * tokens_per_step, initial=first_step * tokens_per_step, unit="tok", unit_scale=True)
    for step in range(first_step, o.steps):
        idx = data.random_batch(corpus.train, o.batch_size, o.seq_len, o.seed, step).to(device)  # (B, L)
        lr = common.learning_rate(step, o.steps, o.warmup, o.lr, o.final_lr)
        generator = common.step_generator(o.seed, step, device)
        with amp:
            loss, terms = stage2_loss(vae, reference, dit, idx, o, generator)
        common.optimizer_step(optimizer, loss, lr, o.clip)
        update_ema(ema, dit, o.ema, step)

        bar.update(tokens_per_step)
        if (step + 1) % o.log_every == 0 or step + 1 == o.steps:
            run.record(bar, step + 1, lr, dict(loss=loss, **terms))
        if (step + 1) % o.save_every == 0 or step + 1 == o.steps:
            save(step + 1)
    bar.close()

    dit.load_state_dict(ema)
    held_out = data.even_batch(corpus.val, 128, o.seq_len).to(device)
    with torch.no_grad():
        o.joint = False
        loss, _ = stage2_loss(vae, None, dit, held_out, o, common.step_generator(o.seed, 0, device))
    print(f"flow-matching loss on {held_out.numel():,} held-out tokens: {loss.item():.4f}")
    print(f"the model is in {run.folder}; next: python sample.py --model {run.folder}")


def open_corpus(o, run, tokenizer):
    """The corpus in the VAE's tokens: that of its own run, one made by data.py, or text tokenized now."""
    given = [path for path in o.data if path]
    folder = run.folder / "data"
    if not given:
        folder = Path(o.vae) / "data"
        if not data.is_prepared(folder):
            raise ValueError(f"{o.vae} has no text of its own: name some with --data")
    elif len(given) == 1 and data.is_prepared(given[0]):
        folder = Path(given[0])
    elif not run.state:
        data.prepare(given, str(run.folder / "tokenizer.json"), 0, folder)
    corpus = data.open_tokens(folder)
    if data.spelling(corpus.tokenizer) != data.spelling(tokenizer):
        raise ValueError(f"the text in {folder} was tokenized differently from the VAE {o.vae}")
    return corpus


if __name__ == "__main__":
    common.run_script(main)
