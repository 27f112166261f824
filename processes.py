"""Training on many devices: torchrun starts one process for each and numbers them; without it there is one, number 0.

The first process alone prints, and writes all but the training state (training.py).  Where something is said to be
collective, all must take part."""

import os
import sys
import warnings
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn


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


def distribute(objective, groups, device, fsdp=False):
    """The objective as this process trains it: alone, as one of equal copies (DDP) or, with --fsdp, keeping one part of
    every parameter, gradient and optimizer state.

    groups: the modules, or lists of modules, whose weights FSDP gathers together just before their forward pass; the
    rest goes with the objective.  They travel in fp32, and autocast makes of them what it would without FSDP: in
    bfloat16 the weights of LayerNorms would be rounded, which moves the latents."""
    if not under_torchrun():
        return objective
    if not fsdp:
        return nn.parallel.DistributedDataParallel(objective, gradient_as_bucket_view=True)  # one copy of gradients
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    warnings.filterwarnings("ignore", ".*returned a view tensor")  # which matters to those who write into it
    mesh = init_device_mesh(device.type, (n_processes(),))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # positions need all their digits
    for group in [*groups, objective]:
        fully_shard(group, mesh=mesh, mp_policy=policy)
    return objective


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
