"""What a configuration costs: parameters, FLOPs and memory, counted from the sizes alone.

    python -m measure.budget prior --preset 2b --devices 64 --micro-batch 11 --fsdp
    python -m measure.budget vae --preset 2b

The options are those of train_prior.py or train_vae.py, whatever they have to do with sizes.

One multiplication with addition is 2 FLOPs.  A training step costs three forward passes: one forward, two backward.
Element-wise work, norms and softmax are not counted, nor what activation checkpointing computes again: these are the
FLOPs of the model, as in MFU.
"""

if __name__ == "__main__":
    import extras.quiet  # noqa: F401

import sys
from dataclasses import dataclass
from itertools import product

import torch

from common import fail, run_script
from data import micro_batch_size
from dit import TIME_CHANNELS, DiT, DiTConfig
from extras.kernels import MAX_LOGITS
from flow import clean_length
from options import PriorOptions, VAEOptions, option, parse_options
from released_format import load_dit_config, load_vae_config
from training import adopt
from vae import TextVAE, VAEConfig

PEAK = 989e12  # bf16 FLOP/s of an H100, for orientation
STATE_BYTES = 16  # of one trained parameter in fp32: weight, gradient and two moments of AdamW
EMA_BYTES = 4  # its moving average, in stage 2
AUTOCAST_BYTES = 2  # the copy in bf16 of a parameter that is whole on a device, during a pass


def parameters(config):
    """How many a DiT or TextVAE of this configuration has."""
    with torch.device("meta"):
        model = DiT(config) if isinstance(config, DiTConfig) else TextVAE(config)
    return sum(p.numel() for p in model.parameters())


def dit_flops(c, keys):
    """Forward, of one latent that sees `keys` keys; without the modulation, which is `modulation_flops`.

    2 (4 C H D + 2 r C^2) for the products of a block and 4 H D keys for its attention, r the MLP's ratio."""
    inner = c.n_head * c.head_dim
    block = 2 * (4 * c.dim * inner + 2 * c.mlp_ratio * c.dim**2) + 4 * inner * keys
    return c.n_layer * block + 4 * c.dim * c.latent_dim + 2 * c.n_codes * (c.dim + 2 * c.latent_dim)


def modulation_flops(c):
    """Of one distinct time: the time embedding and six vectors for every block, two for the output."""
    return 2 * (TIME_CHANNELS * c.dim + 2 * c.dim**2 + (6 * c.n_layer + 2) * c.dim**2)


def vae_block_flops(c, keys):
    return 2 * (4 * c.dim**2 + 1.5 * c.dim * c.ffn_dim) + 4 * c.dim * keys


def encoder_flops(c, keys):
    """Forward, of one latent: patch embedding, blocks, mu and logvar."""
    return 2 * c.patch_size * c.dim**2 + c.n_encoder_layer * vae_block_flops(c, keys) + 4 * c.dim * c.latent_dim


def decoder_flops(c, keys):
    """Forward, of one latent: blocks, and the logits of its tokens."""
    head = 2 * c.patch_size * (c.dim**2 + c.dim * c.vocab_size)
    return 2 * c.latent_dim * c.dim + c.n_decoder_layer * vae_block_flops(c, keys) + head


def vae_step_flops(c, n, masked_view=True):
    """Training, of one sequence of n latents: encode and decode, and the same for the masked view, whose logits are
    counted in full."""
    keys = (n + c.block_size) / 2  # block-causal, on average
    return 3 * n * (1 + masked_view) * (encoder_flops(c, keys) + decoder_flops(c, keys))


def prior_step_flops(c, vae, n, joint=False, masked_view=True, block_sizes=None, block_times=False, staggers=(0.0,)):
    """Training, of one sequence of n latents: [clean | noisy] through the DiT, and the VAE, frozen or trained along.

    block_sizes, staggers: those of training, in equal shares; default that of c, and none; block_times: whether each
    block has its own.  Half of the rows take one more forward pass for the estimate of self-conditioning."""
    passes, block_sizes = 3.5 if c.self_conditioning else 3, block_sizes or (c.block_size,)
    prior = 0.0
    for size, stagger in product(block_sizes, staggers):
        keys = (n + size) / 2
        times = 1 + (1 if size == 1 else n if stagger else n // size if block_times else 1)
        one = (clean_length(n, size) + n) * dit_flops(c, keys) + times * modulation_flops(c)
        prior += passes * one / len(block_sizes) / len(staggers)
    encode = n * encoder_flops(vae, (n + vae.block_size) / 2)  # by the frozen VAE, or the reference
    return prior + encode + (vae_step_flops(vae, n, masked_view) if joint else 0)


def activation_bytes(dim, n_layer, positions, checkpointing):
    """Of a transformer in bf16, roughly: a block keeps some 34 numbers per position and channel for its gradient; with
    checkpointing only its input, and one block at a time is whole."""
    block = 2 * 34 * dim * positions
    return n_layer * 2 * dim * positions + block if checkpointing else n_layer * block


def report(o, vae, dit=None):
    """Print what a run with these options would need; allocates nothing.

    o: options of train_vae.py or train_prior.py; vae, dit: configurations; dit None: stage 1."""
    n = o.seq_len // vae.patch_size
    rows = micro_batch_size(o.batch_size, o.micro_batch, o.devices)  # sequences of one pass on one device
    n_vae = parameters(vae)
    trained, frozen = (n_vae, 0) if dit is None else (parameters(dit), n_vae)
    if dit is None:
        flops = vae_step_flops(vae, n, o.mask_weight > 0)
        layers = 2 * (vae.n_encoder_layer + vae.n_decoder_layer)  # twice: the masked view
        activations = activation_bytes(vae.dim, layers, rows * n, o.checkpointing)
    else:
        flops = prior_step_flops(dit, vae, n, o.joint, o.mask_weight > 0, o.block_size, o.block_times, o.stagger)
        activations = activation_bytes(dit.dim, dit.n_layer, 2 * rows * n, o.checkpointing)
        if o.joint:  # the reference is one more frozen copy
            trained, frozen = trained + n_vae, n_vae
            layers = 2 * (vae.n_encoder_layer + vae.n_decoder_layer)
            activations += activation_bytes(vae.dim, layers, rows * n, o.checkpointing)
    if dit is None or o.joint:  # logits, their softmax and their gradient in fp32
        activations += 12 * min(rows * o.seq_len * vae.vocab_size, MAX_LOGITS)
    per_token = flops / o.seq_len
    per_parameter = STATE_BYTES + (EMA_BYTES if dit else 0)
    states = per_parameter * trained / (o.devices if o.fsdp else 1) + 4 * frozen
    states += AUTOCAST_BYTES * (frozen if o.fsdp else trained + frozen)
    tokens = o.budget * 1e18 / per_token
    lines = {
        "parameters trained": f"{trained:,}",
        "parameters frozen": f"{frozen:,}",
        "FLOPs per token": f"{per_token:,.0f}",
        "tokens per step": f"{o.batch_size * o.seq_len:,}; {rows * o.seq_len:,} in a pass of one device of {o.devices}",
        "the whole run": f"{o.steps:,} steps, {o.steps * o.batch_size * o.seq_len:,} tokens, "
        f"{o.steps * o.batch_size * flops / 1e18:,.1f} EFLOPs",
        f"{o.budget:g} EFLOPs": f"{tokens:,.0f} tokens, {tokens / (o.batch_size * o.seq_len):,.0f} steps, "
        f"{o.budget * 1e18 / PEAK / 0.5 / 3600:,.0f} hours of an H100 at half its peak",
        "weights and optimizer": f"{states / 1e9:,.1f} GB on each device" + (", sharded" if o.fsdp else ""),
        "activations": f"about {activations / 1e9:,.1f} GB on each device",
    }
    for name, value in lines.items():
        print(f"{name:22} {value}")


@dataclass
class Budget:
    """What this command adds to the options of a training script."""

    devices: int = option(1, "on so many devices", low=1)
    budget: float = option(2000.0, "EFLOPs to spend", low=0.0)


@dataclass
class VAEBudget(Budget, VAEOptions):
    pass


@dataclass
class PriorBudget(Budget, PriorOptions):
    pass


def main():
    stage, argv = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if stage == "vae":
        o, given = parse_options(VAEBudget, __doc__, argv)
        o = adopt(o, given, load_vae_config(o.init)) if o.init else o
        report(o, load_vae_config(o.init) if o.init else o.config())
    elif stage == "prior":
        o, given = parse_options(PriorBudget, __doc__, argv)
        if o.chat:
            raise ValueError("--chat: conversations as long as --seq-len cost what a text does; leave it out")
        o = adopt(o, given, load_dit_config(o.init), free=("block_size", "t_loc")) if o.init else o
        o.n_codes = 0 if o.joint else o.n_codes  # as train_prior.py has it
        o.vae = o.init if o.init and "vae" not in given else o.vae
        vae = VAEConfig() if o.preset == "2b" and not given & {"vae", "init"} else load_vae_config(o.vae)
        report(o, vae, load_dit_config(o.init) if o.init else o.config(vae))
    elif stage in ("-h", "--help"):
        print(f"{__doc__}\nThe options: python -m measure.budget prior --help")
    else:
        fail("name the stage: python -m measure.budget vae, or prior, then its options")


if __name__ == "__main__":
    run_script(main)
