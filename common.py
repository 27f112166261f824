"""What the scripts share: the end of a script, device and precision, processes, optimizer, files.

Nothing in here imports the model."""

import dataclasses
import hashlib
import math
import os
import re
import reprlib
import signal
import stat
import sys
import time
import warnings
from collections import defaultdict
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

LARGEST = 2**31  # of a number that an option or a configuration may have: greater ones overflow somewhere


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
        missing = isinstance(error, FileNotFoundError) and error.filename
        fail(f"{missing} does not exist" if missing else error)
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
# Processes: torchrun starts one for each device and numbers them; without it there is one, number 0.
#
# The first process alone prints, and writes all but the training state (training.py).  Where something is said to be
# collective, all must take part.


def under_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank():
    """The number of this process."""
    return int(os.environ["RANK"]) if under_torchrun() else 0


def local_rank():
    """The number of this process among those of its machine."""
    return int(os.environ["LOCAL_RANK"]) if under_torchrun() else 0


def n_processes():
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1


def join_processes(device):
    """Wait until all processes are here; only the first will print.  Returns the device, for convenience.
    Raises ValueError if processes cannot work together on devices of this type."""
    if not under_torchrun():
        return device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise ValueError(f"torchrun works with cuda and cpu only: --device {device.type} takes one process")
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, timeout=timedelta(hours=2), device_id=device_id)  # tokenizing may take long
    wait_for_all()
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", errors="replace")  # noqa: SIM115
    return device


def wait_for_all():
    """Go on when all processes are here."""
    if under_torchrun():
        dist.barrier()


@contextmanager
def first_process_first():
    """The other processes enter after the first has left."""
    if rank() > 0:
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()


def distribute(objective, models, device, fsdp=False):
    """The objective as this process trains it: alone, as one of equal copies (DDP) or, with --fsdp, keeping one part of
    every parameter, gradient and optimizer state.

    models: those of the objective that are trained.  FSDP gathers the weights of a block together, just before its
    forward pass, but those of adaLN apart, for they are needed before all blocks; the rest goes with the objective.
    They travel in fp32, and autocast makes of them what it would without FSDP: in bfloat16 the weights of LayerNorms
    would be rounded, which moves the latents."""
    if not under_torchrun():
        return objective
    if not fsdp:
        return nn.parallel.DistributedDataParallel(objective, gradient_as_bucket_view=True)  # one copy of gradients
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    warnings.filterwarnings("ignore", ".*returned a view tensor")  # which matters to those who write into it
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # positions need all their digits
    shard = partial(fully_shard, mesh=init_device_mesh(device.type, (n_processes(),)), mp_policy=policy)
    for block in (block for model in models for block in model.blocks):
        if hasattr(block, "ada"):
            shard([*block.ada.values()])
        shard(block)
    return shard(objective)


def whole(model):
    """The model itself or, if it is sharded, its unsharded copy on the CPU, with weights in the first process only.
    Collective."""
    if not any(hasattr(p, "full_tensor") for p in model.parameters()):
        return model
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    with torch.device("meta"):
        copy = type(model)(model.config)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank() == 0:
        copy.load_state_dict(state, assign=True)
    return copy


def collect(items):
    """All-gather of picklable items: all of them in order, of which each process holds every n-th, from its number on.
    Collective."""
    shares = [items]
    if under_torchrun():
        shares = [None] * n_processes()
        dist.all_gather_object(shares, items)
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]


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
    """AdamW with betas (0.9, 0.95); with the name "muon", Muon for the matrices inside blocks, those of adaLN excepted.

    parts: list of (module, learning-rate ratio).  Vectors are not decayed.  dtype: of the products in Muon."""
    adamw, muon = [], []
    for module, lr_ratio in parts:
        named = {key: p for key, p in module.named_parameters() if p.requires_grad}
        hidden = [key for key, p in named.items() if p.dim() == 2 and "blocks." in key and ".ada." not in key]
        hidden = hidden if name == "muon" else []
        muon.append(dict(params=[named.pop(key) for key in hidden], lr_ratio=lr_ratio))
        rest = list(named.values())
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
