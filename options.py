"""The options of all scripts: one dataclass a script is the only home of its options, defaults, ranges and help."""

import argparse
import dataclasses
import numbers
import reprlib
from dataclasses import dataclass
from typing import ClassVar

from common import LARGEST, fail
from dit import DiTConfig
from vae import VAEConfig


def option(default, help="", low=None, high=None, choices=None, hidden=False):
    """A dataclass field that is also a command-line option, unless it is hidden; a tuple takes several values."""
    metadata = dict(help=help, low=low, high=high, choices=choices, hidden=hidden)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class TrainingOptions:
    """What both training scripts let a user choose, with the same defaults."""

    init: str = option("", "folder of a model to start from: weights, sizes, tokenizer; nothing: start anew")
    eval_every: int = option(200, "steps between evaluations on held-out text; the best model is kept", low=1)
    decay: float = option(0.5, "share of the steps, the last, in which the learning rate falls", low=0.0, high=1.0)
    micro_batch: int = option(0, "gradient accumulation: sequences of one pass, for less memory; 0: all at once", low=0)
    fsdp: bool = option(False, "under torchrun, shard weights and optimizer over the processes: less memory")
    checkpointing: bool = option(False, "compute activations again for the gradient: less memory, a third more time")
    compile: bool = option(False, "compile the models: faster on a GPU, after a minute or more")
    optimizer: str = option("muon", "muon (hidden matrices; AdamW for the rest) or adamw", choices=("muon", "adamw"))
    weight_decay: float = option(0.01, hidden=True)  # of matrices
    clip: float = option(1.0, "largest norm of the gradient; 0: any", low=0.0)
    resume: bool = option(False, "continue the run in that folder")
    save_every: int = option(100, "steps between checkpoints", low=1)
    seed: int = option(0, "seed of weights, batches and noise", low=0, high=2**31)
    device: str = option("auto", "auto, cpu, cuda, mps")
    precision: str = option("auto", "of matrix products; weights stay fp32", choices=("auto", "fp32", "bf16"))


VAE_PARTS = dict(all="", decoder="decoder", final_layer="decoder.final_layer")  # begin the names of parameters
PAPER = dict(  # what both stages of the paper's model share
    batch_size=1408, micro_batch=16, seq_len=512, save_every=1000, optimizer="adamw", lr=1.5e-4, final_lr=1e-5,
    warmup=5000, decay=1.0, decoder_noise=0.0, checkpointing=True,
)  # fmt: skip


PLAIN = dict(block_times=False, stagger=(0.0,))  # one time for all latents of a row


def sizes(config, *names):
    """Default values of a configuration, which are those of the released model."""
    return {name: getattr(config, name) for name in names}


@dataclass
class VAEOptions(TrainingOptions):
    """Of train_vae.py."""

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
    vae_part: str = option(
        "all", "what is trained; a prior stays valid unless the encoder is", choices=tuple(VAE_PARTS)
    )
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
    final_lr: float = option(1e-4, "learning rate at the end", low=0.0)
    warmup: int = option(30, "steps of linear warm-up", low=0)
    # run
    out: str = option("runs/vae", "folder of the run and of the trained VAE")

    PRESETS: ClassVar = {  # "small" is what stands above
        "2b": PAPER
        | sizes(VAEConfig, "vocab_size", "dim", "ffn_dim", "n_head", "n_encoder_layer", "n_decoder_layer")
        | sizes(VAEConfig, "latent_dim", "patch_size", "block_size")
        | dict(tokenizer="cl100k_base", steps=200_000),
    }

    def config(self):
        """The VAE's configuration; a small text may end up with fewer tokens than the vocab_size asked for."""
        names = [f.name for f in dataclasses.fields(VAEConfig) if hasattr(self, f.name)]
        return VAEConfig(**{name: getattr(self, name) for name in names})


@dataclass
class PriorOptions(TrainingOptions):
    """Of train_prior.py."""

    # data
    vae: str = option("runs/vae", "folder of the stage-1 run or of a released model; with --init: that one")
    data: tuple = option((), "as in train_vae.py, tokenized as the VAE was; nothing: the text of the run of --vae")
    chat: tuple = option((), "with --init, instead of --data: conversations to tune a model on (chat.py), .jsonl")
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
    stagger: tuple = option(
        (0.0, 0.5, 1.0, 1.0), "as in sample.py, drawn in each pass; held-out losses take the first", low=0.0, high=1.0
    )
    block_times: bool = option(True, hidden=True)  # a time for every block of several latents; the paper: every row
    prompt_prob: float = option(0.05, hidden=True)  # share of blocks that keep a random clean prefix, a prompt (ours)
    joint: bool = option(False, "train the VAE along, held near its stage-1 encoder")
    vae_weight: float = option(1.0, hidden=True)  # joint: of the VAE's terms; that of the flow-matching loss is 1
    ref_weight: float = option(1.0, hidden=True)  # joint: of KL(q || q_ref), per token, to the frozen encoder
    vae_lr_ratio: float = option(1.0, hidden=True)  # joint: learning rate of the VAE over that of the prior
    # optimization
    steps: int = option(1400, "training steps", low=1)
    batch_size: int = option(32, "sequences per step", low=1)
    seq_len: int = option(32, "tokens per sequence", low=1)
    lr: float = option(8e-3, "peak learning rate", low=0.0)
    final_lr: float = option(1e-5, hidden=True)  # at the end
    eval_every: int = option(350, "steps between evaluations on held-out text; the best model is kept", low=1)
    warmup: int = option(50, "steps of linear warm-up", low=0)
    ema: float = option(0.99, "decay of the moving average of the weights, which gets sampled", low=0.0, high=1.0)
    # run
    out: str = option("runs/cola", "folder of the run and of the whole model")
    # joint: the VAE's own terms, weighted as in its stage 1 (no flags)
    beta: float = option(VAEOptions.beta, hidden=True)
    mask_weight: float = option(VAEOptions.mask_weight, hidden=True)
    mask_ratio: float = option(VAEOptions.mask_ratio, hidden=True)
    decoder_noise: float = option(VAEOptions.decoder_noise, hidden=True)

    PRESETS: ClassVar = {
        "plain": PLAIN | dict(block_size=(1,), n_codes=0, self_conditioning=False, steps=2000),
        "2b": PAPER
        | sizes(DiTConfig, "dim", "n_head", "n_layer", "n_codes", "self_conditioning")
        | PLAIN
        | dict(block_size=(DiTConfig.block_size,), joint=True)
        | dict(steps=1_000_000, ema=0.0),  # the paper evaluates the weights themselves; released: step 300,000
    }

    def config(self, vae):
        """The prior's configuration, on latents of a VAEConfig.  As in the released model, the heads share the width,
        and the rotary embedding turns three quarters of a head.  Raises ValueError for sizes that do not fit."""
        if self.dim % (4 * self.n_head):
            raise ValueError(f"--dim {self.dim} must be a multiple of 4 times --n-head {self.n_head}")
        head_dim = self.dim // self.n_head
        return DiTConfig(
            latent_dim=vae.latent_dim, dim=self.dim, n_layer=self.n_layer,
            n_head=self.n_head, head_dim=head_dim, rope_dim=head_dim * 3 // 8 * 2,
            block_size=self.block_size[0],  # what sampling takes
            n_codes=self.n_codes, self_conditioning=self.self_conditioning, t_loc=self.t_loc, t_scale=self.t_scale,
        )  # fmt: skip


SOLVERS, GRIDS = ("euler", "heun", "draw"), ("uniform", "quantiles")


@dataclass
class SamplingOptions:
    """The options of `ColaDLM.stream` as the scripts have them: the only home of their ranges.  (The defaults are for
    small models; those of the library are RELEASED.)

    block_size: a prior trained with several sizes writes with each.  Where a block ends inside one of the VAE's, as in
    the released chat, the decoder sees that one unfinished.
    steps, solver, grid, eta, stagger: from noise to latent, see `flow.solve`, `flow.solver_times`, extras/stagger.py.
    "draw", for a prior with codes, draws one of them in every step: `Codebook.draw`.  With a stagger, steps are laid
    over the whole block, so those before the end of a prompt inside it move nothing.
    cfg_scale: guidance u + s (c - u), with history over without, where there is any; for "draw", in every block,
    m (w / m)^s of the codes' weights w with the context and m without.  0: see `guidance`.
    temperature: 0 takes the likeliest token at each position; otherwise top_k and top_p apply (0 and 1: off).
    repetition_penalty: as released, the ids that count are the model's own predictions of earlier blocks."""

    max_new_tokens: int = option(64, "at most so many new tokens a sample", low=1)
    block_size: int = option(0, "latents per block, one of those in training; 0: the model's own", low=0)
    steps: int = option(16, "steps of the ODE solver per block", low=1)
    solver: str = option("euler", "heun: two passes a step, for --eta 0; draw: to codes", choices=SOLVERS)
    grid: str = option("quantiles", "times of the steps; quantiles: of the times of training", choices=GRIDS)
    eta: float = option(1.0, "share of fresh noise in each step, as in DDIM; 0: the ODE", low=0.0, high=1.0)
    stagger: float = option(
        0.0, "how much later each latent of a block starts; 0: all together; 1: one by one", low=0.0, high=1.0
    )
    cfg_scale: float = option(
        0.0,
        "guidance: how strongly the context steers; 1: none; 0: 4 in blocks of one, else 7, but 2 for --solver draw",
        low=0.0,
        high=1e3,
    )
    temperature: float = option(0.0, "of the tokens; 0 takes the likeliest", low=0.0)
    top_k: int = option(0, "keep the k likeliest tokens; 0 keeps all", low=0)
    top_p: float = option(1.0, "keep the likeliest tokens of this total probability", low=0.0, high=1.0)
    repetition_penalty: float = option(1.0, "above 1: avoid tokens of earlier blocks", low=1e-6)
    seed: int = option(0, "seed of the noise", low=0, high=2**31)

    def guidance(self, block_size):
        """The cfg_scale for blocks of a size.  Larger blocks want more; blocks of one lose variety by it."""
        return self.cfg_scale or (2.0 if self.solver == "draw" else 4.0 if block_size == 1 else 7.0)

    def but(self, **options):
        """These with other values.  Raises ValueError for one that is out of range."""
        o = dataclasses.replace(self, **{key: x.item() if hasattr(x, "item") else x for key, x in options.items()})
        check_range(SamplingOptions, dataclasses.asdict(o))
        return o

    def settings(self):
        """These options alone, without what a script adds to them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(SamplingOptions)}


RELEASED = SamplingOptions(grid="uniform", eta=0.0, cfg_scale=7.0)  # where the released code differs

DTYPES = ("auto", "fp32", "bf16", "autocast")
DTYPE_HELP = "of the weights; autocast: fp32, with products in bf16, as released; auto: bf16 on CUDA, else fp32"


@dataclass
class TextOptions(SamplingOptions):
    """What the scripts that write text add."""

    device: str = option("auto", "auto, cpu, cuda, mps")
    dtype: str = option("auto", DTYPE_HELP, choices=DTYPES)
    pad_id: int = option(
        -1, "fills a prompt's last block for the encoder; -1: the last id; the released chat: 47774", low=-1
    )
    eos_id: tuple = option((-1,), "ids that end a text; -1: the tokenizer's own; released: 100257 100265", low=-1)

    def own_ids(self, tokenizer):
        """The settings pad_id and eos_id of `ColaDLM.generate`."""
        ends = [tokenizer.eot_token if i == -1 else i for i in self.eos_id]
        return dict(pad_id=None if self.pad_id == -1 else self.pad_id, eos_id=ends)


def flag(name):
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (--help lists the options)")


def parse_options(cls, description, argv=None):
    """Read the command line into an instance of the dataclass `cls`.

    cls.PRESETS: {name: {option: value}}, chosen by the option `preset` and weaker than what is given explicitly.
    Returns (options, given), given being the names that stand on the command line.  Exits with code 2 and one line if
    something is wrong."""
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS, formatter_class=style
    )
    visible = [field for field in dataclasses.fields(cls) if not field.metadata["hidden"]]
    for field in visible:
        shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        kwargs = dict(help=f"{field.metadata['help']} (default: {shown!r})".replace("%", "%%"))
        if isinstance(field.default, bool):
            kwargs["action"] = argparse.BooleanOptionalAction
        elif isinstance(field.default, tuple):
            kind = type(field.default[0]) if field.default else str
            kwargs.update(nargs="+", type=kind, metavar="TEXT" if kind is str else kind.__name__.upper())
        else:
            kwargs.update(type=type(field.default), choices=field.metadata["choices"])
            kwargs["metavar"] = None if field.metadata["choices"] else type(field.default).__name__.upper()
        parser.add_argument(flag(field.name), **kwargs)
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(parser.parse_args(argv)).items()}
    try:
        check_range(cls, {field.name: field.default for field in visible} | given, flag)
    except ValueError as error:
        parser.error(error)
    preset = getattr(cls, "PRESETS", {}).get(given.get("preset"), {})
    return cls(**(preset | given)), set(given)


KINDS = {  # of a value, by the type of its option's default
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a number"),
    bool: (bool, "true or false"),
    str: (str, "a text"),
}


def check_range(cls, values, spelt=str):
    """Raises ValueError for a value that the option of this name in the dataclass `cls` may not have; a tuple has
    several.  spelt: how the error writes the name."""
    options = {field.name: field for field in dataclasses.fields(cls)}
    for name, value in values.items():
        default, about = options[name].default, options[name].metadata
        several = isinstance(default, tuple)
        if several != isinstance(value, tuple):
            allowed = "a list of values" if several else "one value"
            raise ValueError(f"{spelt(name)} {reprlib.repr(value)} must be {allowed}")
        kind = type(default) if not several else type(default[0]) if default else str
        for number in value if several else (value,):
            where = f"{spelt(name)} {reprlib.repr(number)}"
            expected, called = KINDS[kind]
            if not isinstance(number, expected) or (isinstance(number, bool) and kind is not bool):
                raise ValueError(f"{where} must be {called}")
            if about["choices"] and number not in about["choices"]:
                raise ValueError(f"{where} is out of range: it must be one of {', '.join(about['choices'])}")
            low, high = about["low"], about["high"]
            if kind is float and not abs(number) <= LARGEST:
                raise ValueError(f"{where} is out of range: it must be a finite number of at most {LARGEST}")
            if kind is int and high is None and number > LARGEST:
                raise ValueError(f"{where} is out of range: it must be at most {LARGEST}")
            if (low is not None and number < low) or (high is not None and number > high):
                allowed = f"at least {low}" if high is None else f"between {low} and {high}"
                raise ValueError(f"{where} is out of range: it must be {allowed}")


