"""The folder of a training run: its options, its losses, and all that --resume needs.

Weights and optimizer are written by torch.distributed.checkpoint: every process writes the parts that it holds, and any
number of processes can read them."""

import json
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from common import check_new, flag, replacing
from processes import n_processes, rank, under_torchrun

LOG_EVERY = 10  # steps between rows of log.jsonl


class Run:
    """One training run: `folder`, `options`, `step` (steps done so far).

    folder/log.jsonl     the losses
    folder/training/300  the state after 300 steps; run.json is written last, so a state without it is unfinished

    Nothing of this is written before the first `save`."""

    # Options that may change when a run is resumed.
    FREE = ("resume", "out", "device", "save_every", "fsdp", "micro_batch", "checkpointing", "compile")

    def __init__(self, options, given):
        """With options.resume, the options come from the saved run; those given anew must agree, except FREE ones.
        Raises FileExistsError if the folder holds anything else, FileNotFoundError if there is nothing to resume."""
        self.folder = Path(options.out)
        self.step, self.log, self.options = 0, [], options
        if options.resume:
            saved = self.read()
            if unknown := sorted(saved.keys() - asdict(options).keys()):
                raise ValueError(f"{self.folder} holds a run of another script or version, with {flag(unknown[0])}")
            for name in (given - set(self.FREE)) & saved.keys():  # an older run may lack an option of today
                if getattr(options, name) != saved[name]:
                    value = " ".join(map(str, saved[name])) if isinstance(saved[name], tuple) else saved[name]
                    raise ValueError(f"{self.folder} goes on with {flag(name)} {value}: resume it without {flag(name)}")
            kept = {name: value for name, value in saved.items() if name not in given | {"resume", "out"}}
            self.options = replace(options, **kept)
        else:
            check_new(options.out, "add --resume, or choose another --out")
        if self.options.fsdp and not under_torchrun():
            raise ValueError("--fsdp shares a model out over processes: start it with torchrun, or add --no-fsdp")

    @property
    def state_folder(self):
        return self.folder / "training" / str(self.step)

    def read(self):
        """Find the last complete state; returns its options."""
        self.step, content = last_state(self.folder)
        if content is None:
            advice = "start it anew with another --out"
            raise FileNotFoundError(f"{self.folder}/training holds nothing: there is no run to resume, {advice}")
        self.log = content["log"]
        return content["options"]

    def record(self, bar, step, lr, passes):
        """Add a row to the log and show it on the progress bar; collective.  passes: of each, {name: scalar tensor}."""
        row = {name: sum(terms[name].item() for terms in passes) / len(passes) for name in passes[0]}
        if under_torchrun():  # the mean over processes
            values = torch.tensor(list(row.values()), dtype=torch.float64, device=passes[0]["loss"].device)
            dist.all_reduce(values)
            row = dict(zip(row, (values / n_processes()).tolist(), strict=True))
        self.log.append(dict(step=step, lr=lr) | row)
        bar.set_postfix({name: f"{value:.3f}" for name, value in row.items()} | dict(lr=f"{lr:.1e}"))

    def state(self, optimizer, trained, others):
        """The state dicts of all, by name.  The tensors in it are those of the models and the optimizer themselves."""
        state = {name: model.state_dict() for name, model in dict(trained=trained, **others).items()}
        if self.step > 0:  # before that, an optimizer has none
            state["optimizer"] = get_optimizer_state_dict(trained, tuple(optimizer.optimizers))
        return state

    def restore(self, optimizer, trained, **others):
        """Give the optimizer of the module `trained`, and all models, the state that `save` wrote.  Collective.

        Only for runs of your own: part of the state is a pickle, which can do anything when it is read."""
        state = self.state(optimizer, trained, others)
        with plain_errors(ValueError, f"{self.state_folder} is damaged, or does not fit this run"):
            dcp.load(state, checkpoint_id=self.state_folder)
        if self.step > 0:
            set_optimizer_state_dict(trained, tuple(optimizer.optimizers), state["optimizer"])

    def save(self, step, optimizer, trained, **others):
        """Write the log, and the state of all after `step` steps in place of the one before; complete or not at all.
        Collective."""
        self.step = step
        state = self.state(optimizer, trained, others)
        with plain_errors(OSError, f"could not write {self.state_folder}"):
            dcp.save(state, checkpoint_id=self.state_folder)
        if rank() > 0:
            return
        content = dict(options=asdict(self.options), log=self.log)
        with replacing(self.state_folder / "run.json") as temporary:
            temporary.write_text(json.dumps(content) + "\n")
        for other in self.state_folder.parent.iterdir():
            if other != self.state_folder and other.name.isdigit() and other.is_dir():  # nothing that is not ours
                shutil.rmtree(other)
        with replacing(self.folder / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.log))


def last_state(folder):
    """Step and run.json of the last complete state in the folder of a run; 0 and None if there is none."""
    steps = [int(file.parent.name) for file in Path(folder).glob("training/*/run.json") if file.parent.name.isdigit()]
    if not steps:
        return 0, None
    file = Path(folder) / "training" / str(max(steps)) / "run.json"
    try:
        content = json.loads(file.read_text())
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in content["options"].items()}
        return max(steps), dict(options=options, log=list(content["log"]))
    except (LookupError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{file} is damaged or truncated") from None


def saved_options(folder):
    """The options of the run in a folder; {} if none is there, but a model from elsewhere."""
    return (last_state(folder)[1] or dict(options={}))["options"]


@contextmanager
def plain_errors(kind, message):
    """Failures of torch.distributed.checkpoint, which do not derive from Exception, as one of this kind."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is, with a single process
            warnings.filterwarnings("ignore", "Detected an existing checkpoint")  # an unfinished one
            yield
    except dcp.api.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise kind(f"{message}: {type(cause).__name__}: {cause}") from None
