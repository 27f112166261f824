"""What the scripts share: command line, device and precision, optimizer, files.

Nothing in here imports the model."""

import argparse
import dataclasses
import hashlib
import math
import numbers
import os
import re
import reprlib
import signal
import stat
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from processes import local_rank, rank, under_torchrun

# ----------------------------------------------------------------------------------------------------------------------
# Command line: one dataclass a script is the only home of its options, defaults, ranges and help


def option(default, help="", low=None, high=None, choices=None, hidden=False):
    """A dataclass field that is also a command-line option, unless it is hidden; a tuple takes several values."""
    metadata = dict(help=help, low=low, high=high, choices=choices, hidden=hidden)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
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
    weight_decay: float = option(0.01, "weight decay of matrices", low=0.0)
    clip: float = option(1.0, "largest norm of the gradient; 0: any", low=0.0)
    resume: bool = option(False, "continue the run in that folder")
    save_every: int = option(100, "steps between checkpoints", low=1)
    seed: int = option(0, "seed of weights, batches and noise", low=0, high=2**31)
    device: str = option("auto", "auto, cpu, cuda, mps")
    precision: str = option("auto", "of matrix products; weights stay fp32", choices=("auto", "fp32", "bf16"))


SOLVERS, GRIDS = ("euler", "heun"), ("uniform", "quantiles")  # of `flow.solve` and `flow.solver_times`


@dataclasses.dataclass
class SamplingOptions:
    """The options of `ColaDLM.stream` as the scripts have them: the only home of their ranges.  (The defaults are for
    small models; those of the library are the released ones, `cola.RELEASED`.)"""

    max_new_tokens: int = option(64, "at most so many new tokens a sample", low=1)
    block_size: int = option(0, "latents per block, one of those in training; 0: the model's own", low=0)
    steps: int = option(16, "steps of the ODE solver per block", low=1)
    solver: str = option("euler", "heun evaluates the prior twice a step, for --eta 0", choices=SOLVERS)
    grid: str = option("quantiles", "times of the steps; quantiles: of the times of training", choices=GRIDS)
    eta: float = option(1.0, "share of fresh noise in each step, as in DDIM; 0: the ODE", low=0.0, high=1.0)
    cfg_scale: float = option(
        0.0,
        "guidance: how strongly the history steers, from the second block on; 1: none; 0: 4 in blocks of one, else 7",
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
        return self.cfg_scale or (4.0 if block_size == 1 else 7.0)

    def settings(self):
        """These options alone, without what a script adds to them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplingOptions)}


DTYPES = ("auto", "fp32", "bf16", "autocast")
DTYPE_HELP = "of the weights; autocast: fp32, with products in bf16, as released; auto: bf16 on CUDA, else fp32"


@dataclasses.dataclass
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


def parse_options(cls, description, presets=None, argv=None):
    """Read the command line into an instance of the dataclass `cls`.

    presets: {name: {option: value}}, chosen by the option `preset` and weaker than what is given explicitly.
    Returns (options, given), given being the names that stand on the command line.  Exits with code 2 and one line if
    something is wrong."""
    parser = Parser(
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fields = [field for field in dataclasses.fields(cls) if not field.metadata["hidden"]]
    for field in fields:
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
        check_range(cls, {field.name: field.default for field in fields} | given, flag)
    except ValueError as error:
        parser.error(error)
    preset = (presets or {}).get(given.get("preset"), {})
    return cls(**(preset | given)), set(given)


LARGEST = 2**31  # of a number that an option or a configuration may have: greater ones overflow somewhere
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


def check_sizes(config):
    """Raises ValueError for a value that has not the type of its default, a count below what its field allows (1) or
    above LARGEST, or a float like NaN."""
    for field in dataclasses.fields(config):
        value, wanted = getattr(config, field.name), type(field.default)
        where = f"{field.name} {reprlib.repr(value)}"
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ValueError(f"{where} must be of type {wanted.__name__}")
        if wanted is int and not (low := field.metadata.get("low", 1)) <= value <= LARGEST:
            raise ValueError(f"{where} must be at least {low}" + f" and at most {LARGEST}" * (value > LARGEST))
        above = field.metadata.get("above", 0.0)
        if wanted is float and not (value > above and abs(value) <= LARGEST):
            raise ValueError(f"{where} must be a {'positive' if above == 0 else 'finite'} number of at most {LARGEST}")


def run_script(main):
    """Call main(); a user's mistake (ValueError, OSError) becomes one line on stderr and exit code 2, and a character
    that the terminal lacks its code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # of extras/quiet.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        if rank() == 0:
            print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, RecursionError) as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate|overflow", str(error)):
            wait_for_the_first_to_report()
            raise
        fail(f"not enough memory for this model, batch or length: {error}")


def wait_for_the_first_to_report():
    """Most mistakes happen in all processes, or end the others: torchrun stops this one as soon as the first ends."""
    if rank() > 0:
        time.sleep(10)


def fail(message):
    wait_for_the_first_to_report()
    print("error:", " ".join(str(message).split())[:500], file=sys.stderr)
    sys.exit(2)


# ----------------------------------------------------------------------------------------------------------------------
# Device and precision


def pick_device(name="auto"):
    """torch.device of "auto" (CUDA, then MPS, then CPU) or of a name; each process of a machine gets a GPU of its own.
    Raises ValueError if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and under_torchrun():
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise ValueError(f"device {name} is not supported, only cpu, cuda and mps")
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {name} is not available on this machine") from None


def multiplies_bf16(device):
    """Whether the hardware itself multiplies bfloat16 matrices; where it is only emulated, fp32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check is not None and check() for check in checks)  # neither is in every version of PyTorch


def autocast(device, precision="auto"):
    """Mixed precision: matrix products in bfloat16, weights in fp32.  "auto": where the hardware can."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device, precision))


def sampling_precision(name, device):
    """Of a name in DTYPES, the torch.dtype of weights for sampling, and a context to sample in.  auto: bfloat16 on CUDA
    that multiplies it."""
    bf16 = name == "bf16" or (device.type == "cuda" and uses_bf16(device, name))
    return torch.bfloat16 if bf16 else torch.float32, autocast(device, "bf16" if name == "autocast" else "fp32")


def uses_bf16(device, precision):
    return precision == "bf16" or (precision == "auto" and multiplies_bf16(device))


def muon_dtype(device, precision):
    """torch.dtype of the products in Muon: bfloat16 if training uses it and the hardware multiplies it, else fp32."""
    return torch.bfloat16 if uses_bf16(device, precision) and multiplies_bf16(device) else torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal updates for matrices (arXiv:2502.16982, Algorithm 1 and section 2.2).

    m <- 0.95 m + 0.05 g
    W <- (1 - lr decay) W - 0.2 lr sqrt(max(rows, columns)) orthogonalize(0.95 m + 0.05 g)

    The square root gives an update the size that AdamW's would have, so one learning rate serves both.  The same
    computation as torch.optim.Muon, which multiplies in bfloat16 whatever the hardware, and matrix by matrix; here
    `dtype` is that of the products, and matrices of one shape share them."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0, momentum=0.95, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):  # torch.distributed.checkpoint passes closure=None
        for group in self.param_groups:
            lr, momentum, alike = group["lr"], group["momentum"], defaultdict(list)
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                alike[p.shape].append((p, p.grad.lerp(buffer, momentum)))
            for (rows, columns), pairs in alike.items():
                # Of sharded matrices (FSDP) every process orthogonalizes the whole and keeps its own part.
                updates = torch.stack([u.full_tensor() if isinstance(u, DTensor) else u for _, u in pairs])
                updates = orthogonalize(updates.to(self.dtype)).float()
                for (p, _), u in zip(pairs, updates, strict=True):
                    if isinstance(p, DTensor):
                        u = distribute_tensor(u, p.device_mesh, p.placements, src_data_rank=None)
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(u, alpha=-lr * 0.2 * max(rows, columns) ** 0.5)


def orthogonalize(x, steps=5, coefficients=(3.4445, -4.7750, 2.0315)):
    """Replace the singular values of matrices x (N, rows, columns) by about 1: the Newton-Schulz iteration
    X <- a X + b (X X^T) X + c (X X^T)^2 X, which acts on each singular value as a s + b s^3 + c s^5.

    Muon's coefficients are steep at 0 and leave values between 0.7 and 1.2 after 5 steps; (15/8, -10/8, 3/8) converge
    to 1.  Products are in the dtype of x."""
    a, b, c = coefficients
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # now no singular value is above 1
    for _ in range(steps):
        gram = wide @ wide.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        wide = torch.baddbmm(wide, gram, wide, beta=a)
    return wide if x.shape[1] <= x.shape[2] else wide.mT


def make_optimizer(parts, name, weight_decay, dtype=torch.float32):
    """AdamW with betas (0.9, 0.95); with the name "muon", Muon for what `hidden_matrices` of a module returns.

    parts: list of (module, learning-rate ratio).  Vectors are not decayed.  dtype: of the products in Muon."""
    adamw, muon = [], []
    for module, lr_ratio in parts:
        hidden = {id(p) for p in module.hidden_matrices()} if name == "muon" else set()
        params = [p for p in module.parameters() if p.requires_grad]
        muon.append(dict(params=[p for p in params if id(p) in hidden], lr_ratio=lr_ratio))
        rest = [p for p in params if id(p) not in hidden]
        adamw.append(dict(params=[p for p in rest if p.dim() > 1], lr_ratio=lr_ratio, weight_decay=weight_decay))
        adamw.append(dict(params=[p for p in rest if p.dim() <= 1], lr_ratio=lr_ratio, weight_decay=0.0))
    fused = all(p.device.type in ("cpu", "cuda") for group in adamw for p in group["params"])
    optimizers = [torch.optim.AdamW(adamw, betas=(0.9, 0.95), fused=fused)]
    if name == "muon":
        optimizers.append(Muon(muon, weight_decay=weight_decay, dtype=dtype))
    return Optimizers(optimizers)


class Optimizers:
    """Several optimizers as one.  Prints a line if they take more than a third of a training step."""

    TIMED = slice(3, 13)  # steps; the first ones are slower

    def __init__(self, optimizers):
        self.optimizers, self.spans = optimizers, []

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self):
        timing = len(self.spans) < self.TIMED.stop
        start = self.now() if timing else None
        for optimizer in self.optimizers:
            optimizer.step()
        if timing:
            self.spans.append((start, self.now()))
        if timing and len(self.spans) == self.TIMED.stop and (share := self.share()) > 1 / 3 and rank() == 0:
            advice = "a larger --batch-size or --optimizer adamw makes more of the time"
            tqdm.write(f"the optimizer takes {share:.0%} of a training step: {advice}", file=sys.stderr)

    def share(self):
        """Of the time of the steps in TIMED."""
        whole = self.spans[-1][1] - self.spans[self.TIMED.start - 1][1]
        return sum(end - start for start, end in self.spans[self.TIMED]) / whole

    def now(self):
        if any(p.is_cuda for group in self.param_groups for p in group["params"]):
            torch.cuda.synchronize()
        return time.perf_counter()

    def zero_grad(self):
        for optimizer in self.optimizers:  # DDP keeps its gradients in buckets, to be used again
            optimizer.zero_grad(set_to_none=not under_torchrun())


def optimizer_step(optimizer, lr, clip):
    """Clip the global gradient norm (clip 0: leave it), step at lr times the ratio of each group, forget gradients.
    Returns the norm before clipping; if that is not finite, all weights stay as they are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(params, clip or math.inf)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


# ----------------------------------------------------------------------------------------------------------------------
# Files


@contextmanager
def replacing(path):
    """Write to the yielded temporary path; it takes the place of `path` only if all went well, and only when it is on
    the disk, so that not even a loss of power leaves half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner may read
        flush(temporary)
        os.replace(temporary, path)
        with suppress(OSError):  # not every system can flush the names in a folder
            flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(file):
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while chunk := f.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def check_regular(path):
    """Raises ValueError for a folder, a pipe or a device, FileNotFoundError where there is nothing.  A link counts as
    what it leads to.  Nothing is opened: that could wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is not a file but a folder, a pipe or a device")


def check_new(folder, advice):
    """Raises FileExistsError if `folder` is anything but a folder without files; ValueError without a name."""
    if not str(folder):
        raise ValueError("--out needs the name of a folder")
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(not f.is_dir() for f in path.rglob("*"))):
        raise FileExistsError(f"{path} already holds {'files' if path.is_dir() else 'a file'}: {advice}")
