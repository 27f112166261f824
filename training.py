"""A training run: its loop, its schedule, and its folder, with the losses and all that --resume needs.

Weights and optimizer are written by torch.distributed.checkpoint: every process writes the parts that it holds, and any
number of processes can read them.  Nothing that is read can run code: tensors are in safetensors, all else in JSON."""

import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from tqdm import tqdm

import data
from common import (
    autocast,
    check_new,
    check_regular,
    file_hash,
    n_processes,
    optimizer_step,
    rank,
    replacing,
    under_torchrun,
    wait_for_all,
    whole,
)
from options import check_range, flag
from released_format import find_tokenizer, load_dit_config, load_vae, save_dit, save_vae

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

LOG_EVERY = 10  # steps between rows of log.jsonl
MAX_SKIPPED = 10  # steps in a row whose gradient was not finite
CHAT_BLOCKS = (16, 16, 16, 8, 8, 8, 4, 4, 4, 1)  # the shares of the released tuning, for models with blocks of 16
LOCKS = {}  # of this process: {folder: open descriptor}

# ----------------------------------------------------------------------------------------------------------------------
# The loop


def train(run, objective, optimizer, batch, rows, states, evaluate, exported, after_step=None):
    """Train from run.step to the last step.

    objective(idx, generator) -> (loss, terms); batch(step) -> idx (B, ...), for all processes; rows: sequences of one
    forward pass; states: what `Run.save` keeps; evaluate() -> {name: loss} on held-out text, called by all processes;
    exported: the models, vae and dit, that are written whenever the loss "held_out" is the lowest so far.
    after_step(step): called after each step."""
    o, device = run.options, next(objective.parameters()).device
    amp, tokens_per_step, skipped = autocast(device, o.precision), o.batch_size * o.seq_len, 0
    if o.warmup >= o.steps:
        print(f"warning: the learning rate still rises to --lr {o.lr} at the end: --warmup {o.warmup} is as long")
    if not o.resume:
        run.record(0, evaluate())
        export(exported, run.folder)
        run.save(0, optimizer, **states)  # from here on --resume finds all it needs
    elif run.is_best() and run.evaluations()[-1]["step"] == run.step:  # these very weights; the file may have been lost
        export(exported, run.folder)
    run.clock = run.step, time.perf_counter()
    with noting_signals() as signals, tqdm(
        initial=run.step * tokens_per_step, total=o.steps * tokens_per_step, unit="tok", unit_scale=True,
        disable=rank() > 0,
    ) as bar:  # fmt: skip
        for step in range(run.step, o.steps):
            idx = batch(step).to(device)  # (B, L)
            lr = learning_rate(step, o.steps, o.warmup, o.decay, o.lr, o.final_lr)
            parts, passes = parts_of_batch(idx, rows, o.seed, step), []
            for part, generator in parts:
                objective.require_backward_grad_sync = len(passes) == len(parts) - 1  # DDP averages once a step
                with amp:
                    loss, terms = objective(part, generator)
                (loss / len(parts)).backward()
                passes.append(dict(loss=loss.detach(), **terms))
            norm = optimizer_step(optimizer, lr, o.clip)  # or none: one gradient like NaN would ruin every weight
            skipped = 0 if math.isfinite(norm) else skipped + 1
            if skipped == MAX_SKIPPED:
                where = f"step {step + 1}, learning rate {lr:.1e}; the last good state is that of step {run.step}"
                raise ValueError(f"the gradient is not finite for the {skipped}th time in a row: {where}")
            if after_step:
                after_step(step)

            bar.update(tokens_per_step)
            done = step + 1
            last, evaluating = done == o.steps, done % o.eval_every == 0 or done == o.steps
            if evaluating or skipped or done % LOG_EVERY == 0:
                terms = dict(skipped=skipped) if skipped else mean_terms(passes) | dict(grad_norm=norm)
                run.record(done, dict(lr=lr) | terms, bar)
            pause = time.perf_counter()
            if evaluating:
                run.record(done, evaluate())
                bar.set_postfix({name: f"{value:.3f}" for name, value in run.log[-1].items() if "held_out" in name})
                if run.is_best():
                    export(exported, run.folder)
            stop = any(over_processes([len(signals)], device))
            if last or stop or done % o.save_every == 0:
                run.save(done, optimizer, **states)
            if stop and not last:
                break
            run.clock = run.clock[0], run.clock[1] + time.perf_counter() - pause  # speed is that of training alone
    if run.step < o.steps:
        start = f"{'torchrun ...' if under_torchrun() else 'python'} {Path(sys.argv[0]).name}"
        print(f"stopped after step {run.step:,}; go on with: {start} --resume --out {shlex.quote(o.out)}")
        sys.exit(128 + (signals or [signal.SIGTERM])[0])


def export(models, folder):
    """Write models, named vae and dit, in the released format.  Collective."""
    for name, model in models.items():
        complete = whole(model)
        if rank() == 0:
            dict(vae=save_vae, dit=save_dit)[name](complete, folder)


@contextmanager
def noting_signals():
    """Ctrl-C and SIGTERM, which schedulers send, go into the list that this yields, so that a step can be finished and
    saved; sent again, they end the process at once.  What a shell lets its background jobs ignore stays ignored."""
    received = []

    def note(number, _):
        received.append(number)
        signal.signal(number, before[number])

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@torch.no_grad()
def held_out_loss(objective, idx, options, rows, **choices):
    """The mean loss of an objective on held-out text idx (N, ...), always with the same noise.  Collective."""
    o, device = options, next(objective.parameters()).device
    idx = idx.to(device)
    objective.eval()
    total, parts = 0.0, idx.split(rows)
    for i in range(rank(), -(-len(parts) // n_processes()) * n_processes(), n_processes()):  # all take as many passes
        part = parts[i % len(parts)]
        with autocast(device, o.precision):
            loss, _ = objective(part, step_generator(o.seed, 0, device, i), **choices)
        total += loss.item() * len(part) * (i < len(parts))
    objective.train()
    if hasattr(objective, "reshard"):  # FSDP leaves the root's weights whole until a backward pass, which never comes
        objective.reshard()
    mean = over_processes([total], device)[0] * n_processes() / len(idx)
    if not math.isfinite(mean):
        raise ValueError("the loss on held-out text is not finite: this model is broken")
    return mean


def mean_terms(passes):
    """The means of the scalars in dicts, one for each forward pass of a step; collective."""
    row = {name: sum(terms[name].item() for terms in passes) / len(passes) for name in passes[0]}
    return dict(zip(row, over_processes(list(row.values()), passes[0]["loss"].device), strict=True))


def over_processes(numbers, device):
    """The means of a list of numbers over all processes; collective."""
    if not under_torchrun():
        return numbers
    values = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return (values / n_processes()).tolist()


def learning_rate(step, steps, warmup, decay, peak, final):
    """Linear warm-up to `peak` in `warmup` steps; in the last steps, a share `decay` of all, a cosine to `final` at
    step steps - 1; with decay 1 it begins right after the warm-up."""
    if step < warmup:
        return peak * (step + 1) / warmup
    start = max(warmup, round((1 - decay) * steps))
    progress = max(step - start, 0) / max(steps - 1 - start, 1)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * progress))


def parts_of_batch(idx, rows, seed, step):
    """Cut the global batch idx (B, L) into parts of so many rows; returns those of this process, each with its
    generator of random numbers.

    A part is known by its number alone: 2 processes with 1 part each do what 1 process with 2 parts does."""
    parts = list(enumerate(idx.split(rows)))
    n = len(parts) // n_processes()
    return [(part, step_generator(seed, step, idx.device, i)) for i, part in parts[rank() * n : (rank() + 1) * n]]


def step_generator(seed, step, device, part=0):
    """Random numbers of one part of a training step: they depend on nothing else, so a resumed run draws the same.

    On a CPU only 32 bits of a seed count; the large odd factor keeps those of steps and parts apart."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step + part * 2_654_435_761)


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay ema + (1 - decay) model, parameter by parameter, with a shorter memory during the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    for average, value in zip(ema.parameters(), model.parameters(), strict=True):
        average.lerp_(value, 1 - decay)


# ----------------------------------------------------------------------------------------------------------------------
# The start


def take_over(options, given):
    """The options of train_prior.py, completed by those of the model that it starts from (--init) and of its VAE."""
    if options.init:
        options.vae = options.vae if "vae" in given else options.init
        saved = saved_options(options.init)
        options.stagger = options.stagger if "stagger" in given else saved.get("stagger", (0.0,))
        options = adopt(options, given, load_dit_config(options.init), free=("block_size", "t_loc"))
        if "block_size" not in given:  # the configuration has the first alone
            sizes = saved.get("block_size", ())
            if sizes[:1] == options.block_size:
                options.block_size = sizes
            elif options.chat and options.block_size == (16,):
                options.block_size = CHAT_BLOCKS
    elif options.joint and "n_codes" not in given:  # the latents would move away from their codes
        options.n_codes = 0
    stage1 = {} if options.resume else saved_options(options.vae)
    names = ("beta", "mask_weight", "mask_ratio", "decoder_noise")
    return replace(options, **{name: stage1[name] for name in names if name in stage1})


def adopt(options, given, config, free=()):
    """The options with the sizes of an existing model's configuration; those in `free` only if they are not given.
    Raises ValueError if another one of `given` says otherwise."""
    names = {f.name for f in fields(options) if hasattr(config, f.name)} - (given & set(free))
    sizes = {name: getattr(config, name) for name in names}
    sizes = {name: (value,) if isinstance(getattr(options, name), tuple) else value for name, value in sizes.items()}
    for name in given & sizes.keys():
        if (named := getattr(options, name)) != sizes[name]:
            raise ValueError(f"{flag(name)} {named} contradicts --init {options.init}, which has {sizes[name]}")
    return replace(options, **sizes)


def open_stage1(o, folder, device):
    """The VAE, the tokenizer and the configuration of a prior for them; from `folder`, if the run goes on."""
    source = folder if o.resume else Path(o.vae)
    vae = load_vae(source, device)
    tokenizer = find_tokenizer(source, vae.config.vocab_size, required=True)
    if o.resume:
        return vae, tokenizer, load_dit_config(folder)
    if not o.init:
        return vae, tokenizer, o.config(vae.config)
    own = vae if o.vae == o.init else load_vae(o.init, device)
    pairs = zip(vae.encoder.parameters(), own.encoder.parameters(), strict=False)
    if not all(torch.equal(value, other) for value, other in pairs):
        raise ValueError(f"the prior in {o.init} does not know the latents of {o.vae}, of another encoder")
    return vae, tokenizer, replace(load_dit_config(o.init), block_size=o.block_size[0], t_loc=o.t_loc)


def open_text(o, folder, own):
    """The Corpus to learn from.  own: the tokenizer that the model has; None: a new one, as the options say."""
    text = o.data or (f"{o.vae}/data",)
    if not o.data and not data.is_prepared(text[0]):
        raise ValueError(f"{'--init ' * bool(o.init)}{o.vae} has no text beside it: name some with --data")

    def tokenizer():
        return own or data.make_tokenizer(o.tokenizer, o.vocab_size, o.data)

    corpus = data.open_corpus(text, folder / "data", tokenizer, o.batch_size, o.seq_len, o.resume)
    if own:
        data.check_same(corpus.tokenizer, own)
    print(f"{len(corpus.train):,} training tokens of {corpus.tokenizer.n_vocab:,} ids")
    return corpus


# ----------------------------------------------------------------------------------------------------------------------
# The folder


class Run:
    """One training run: `folder`, `options`, `step` (steps done so far).

    folder/log.jsonl     the losses
    folder/training/300  the state after 300 steps; run.json is written last, so a state without it is unfinished
                         (training/started, an empty folder, says before the first state that this is a run)

    One process, or group of processes, trains in a folder at a time."""

    # Options that may change when a run is resumed.
    FREE = ("resume", "out", "device", "steps", "save_every", "fsdp", "micro_batch", "checkpointing", "compile")

    def __init__(self, options, given):
        """With options.resume, the options come from the saved run; those given anew must agree, except FREE ones.
        A start that was interrupted before its first state can be repeated.
        Raises FileExistsError if the folder holds anything else, FileNotFoundError if there is nothing to resume."""
        self.folder = Path(options.out)
        self.step, self.log, self.options = 0, [], options
        if not options.resume and not self.is_unfinished_start():
            check_new(options.out, "add --resume, or choose another --out")
        self.lock()
        if options.resume:
            saved = self.read()
            if unknown := sorted(saved.keys() - asdict(options).keys()):
                raise ValueError(f"{self.folder} holds a run of another script or version, with {flag(unknown[0])}")
            check_range(type(options), saved, lambda name: f"{self.state_folder}/run.json: {flag(name)}")
            for name in (given - set(self.FREE)) & saved.keys():  # an older run may lack an option of today
                if getattr(options, name) != saved[name]:
                    value = " ".join(map(str, saved[name])) if isinstance(saved[name], tuple) else saved[name]
                    raise ValueError(f"{self.folder} goes on with {flag(name)} {value}: resume it without {flag(name)}")
            if "steps" in given and options.steps != saved["steps"]:
                self.plan_anew(saved, options.steps)
            kept = {name: value for name, value in saved.items() if name not in given | {"resume", "out"}}
            self.options = replace(options, **kept)
        if self.options.fsdp and not under_torchrun():
            raise ValueError("--fsdp shares a model out over processes: start it with torchrun, or add --no-fsdp")

    def is_unfinished_start(self):
        """Whether a run has begun in the folder, but has no state yet."""
        return (self.folder / "training" / "started").is_dir() and last_state(self.folder)[1] is None

    def lock(self):
        """Take the folder for this process, until it ends, in whatever way.  Raises ValueError if another has it."""
        place = self.folder / "training"
        if self.options.resume and not place.is_dir():
            raise FileNotFoundError(f"{place} does not exist: there is no run to resume, start it without --resume")
        place.mkdir(parents=True, exist_ok=True)
        if rank() == 0:
            self.take(place)
            if not self.options.resume:
                (place / "started").mkdir(exist_ok=True)

    def take(self, place):
        if fcntl is None or place.resolve() in LOCKS:
            return
        LOCKS[place.resolve()] = os.open(place, os.O_RDONLY)
        try:
            fcntl.flock(LOCKS[place.resolve()], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(LOCKS.pop(place.resolve()))
            raise ValueError(f"another process trains in {self.folder}: wait for it, or choose another --out") from None
        except OSError:  # this file system has no locks
            pass

    def plan_anew(self, saved, steps):
        """Let the run end after another number of steps, and say so."""
        if steps < self.step:
            raise ValueError(f"{self.folder} has done {self.step} steps already: --steps {steps} is less")
        self.log.append(dict(step=self.step, planned_steps=steps))
        values = [saved.get(name, getattr(self.options, name)) for name in ("warmup", "decay", "lr", "final_lr")]
        was, now = (learning_rate(self.step, n, *values) for n in (saved["steps"], steps))
        if rank() == 0:
            print(f"planned anew: {steps:,} steps, not {saved['steps']:,}; learning rate {now:.1e}, not {was:.1e}")

    @property
    def state_folder(self):
        return self.folder / "training" / str(self.step)

    def read(self):
        """Find the last complete state; returns its options."""
        self.step, content = last_state(self.folder)
        if content is None:
            advice = "start it without --resume"
            raise FileNotFoundError(f"{self.folder}/training holds nothing: there is no run to resume, {advice}")
        self.log, self.checksums = content["log"], content["checksums"]
        return content["options"]

    def record(self, step, row, bar=None):
        """Add to the log what is known of a step; of a step of training, show it on the bar, with speed and memory."""
        if bar:
            (before, start), self.clock = self.clock, (step, time.perf_counter())
            bar.set_postfix({name: f"{value:.1e}" if name == "lr" else f"{value:.3f}" for name, value in row.items()})
            speed = (step - before) * self.options.batch_size * self.options.seq_len / (self.clock[1] - start)
            row = row | dict(tokens_per_second=round(speed), memory_gb=peak_memory())
        if not self.log or self.log[-1]["step"] < step:
            self.log.append(dict(step=step))
        self.log[-1] |= row

    def evaluations(self):
        """The rows of the log that have a held-out loss."""
        return [row for row in self.log if "held_out" in row]

    def is_best(self):
        """Whether the last evaluation has the lowest held-out loss so far."""
        losses = [row["held_out"] for row in self.evaluations()]
        return losses[-1:] == [min(losses, default=None)]

    def chosen(self):
        """A text about the model that was exported, unless it is the last."""
        best = min(self.evaluations(), key=lambda row: row["held_out"], default=dict(step=self.step))["step"]
        return "" if best == self.step else f" (of step {best:,}, the best on held-out text)"

    def state(self, optimizer, trained, others):
        """The tensors of all models, by name, which are those of the models themselves, and the state of the optimizer,
        which has none before the first step."""
        tensors = {name: model.state_dict() for name, model in dict(trained=trained, **others).items()}
        if self.step == 0:
            return tensors, None
        of_optimizer = get_optimizer_state_dict(trained, tuple(optimizer.optimizers))
        return tensors | dict(optimizer=of_optimizer["state"]), of_optimizer

    def restore(self, optimizer, trained, **others):
        """Give the optimizer of the module `trained`, and all models, the state that `save` wrote.  Collective."""
        if not self.checksums:
            advice = "--init takes its model"
            raise ValueError(f"{self.state_folder} is of an older version, which cannot be resumed; {advice}")
        for name, checksum in self.checksums.items() if rank() == 0 else ():
            file = self.state_folder / name
            if not file.is_file() or file_hash(file) != checksum:
                raise ValueError(f"{file} is damaged or missing: its checksum is not the one in run.json")
        tensors, of_optimizer = self.state(optimizer, trained, others)
        with plain_errors(ValueError, f"{self.state_folder} is damaged, or does not fit this run"):
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(self.state_folder)))
        if of_optimizer:
            set_optimizer_state_dict(trained, tuple(optimizer.optimizers), of_optimizer)
        self.tidy()

    def save(self, step, optimizer, trained, **others):
        """Write the log, and the state of all after `step` steps in place of the one before; complete or not at all.
        Collective.  Raises ValueError, and keeps the state before, if a weight is not finite."""
        broken = not all(value.isfinite().all() for value in trained.state_dict().values())  # of FSDP: in our part
        if any(over_processes([float(broken)], next(trained.parameters()).device)):
            raise ValueError(f"a weight is not finite after step {step}; the last good state is of step {self.step}")
        self.step = step
        if rank() == 0:  # an unfinished state, of another number of processes
            shutil.rmtree(self.state_folder, ignore_errors=True)
        wait_for_all()
        with plain_errors(OSError, f"could not write {self.state_folder}"):
            writer = HuggingFaceStorageWriter(str(self.state_folder), save_distributed=True)
            dcp.save(self.state(optimizer, trained, others)[0], storage_writer=writer)
        if rank() > 0:
            return
        checksums = {file.name: file_hash(file) for file in sorted(self.state_folder.iterdir())}
        content = dict(options=asdict(self.options), log=self.log, checksums=checksums)
        with replacing(self.state_folder / "run.json") as temporary:
            temporary.write_text(json.dumps(content, allow_nan=False) + "\n")
        self.tidy()

    def tidy(self):
        """What follows a complete state, or was left to do by a process that was killed after it: the states before it
        go, and log.jsonl is written."""
        if rank() > 0:
            return
        for other in self.state_folder.parent.iterdir():
            if other != self.state_folder and (other.name.isdigit() or other.name == "started") and other.is_dir():
                shutil.rmtree(other)
        with replacing(self.folder / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in self.log))


def last_state(folder):
    """Step and run.json of the last complete state in the folder of a run; 0 and None if there is none."""
    names = [file.parent.name for file in Path(folder).glob("training/*/run.json")]
    steps = [int(name) for name in names if name.isascii() and name.isdigit()]
    if not steps:
        return 0, None
    file = Path(folder) / "training" / str(max(steps)) / "run.json"
    try:
        check_regular(file)
        content = json.loads(file.read_text())
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in content["options"].items()}
        log, checksums = list(content["log"]), dict(content.get("checksums", {}))
        if not all(type(row["step"]) is int and math.isfinite(row.get("held_out", 0)) for row in log):
            raise ValueError
        return max(steps), dict(options=options, log=log, checksums=checksums)
    except FileNotFoundError:  # a run that goes on has just replaced it
        return last_state(folder)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{file} is damaged or truncated") from None


def saved_options(folder):
    """The options of the run in a folder; {} if none is there, but a model from elsewhere."""
    return (last_state(folder)[1] or dict(options={}))["options"]


def beyond_training(folder, n_tokens, block_size):
    """What the model in a folder never saw, if its run tells: so many tokens, blocks of that size.  A list of texts."""
    trained, asked = saved_options(folder), []
    if n_tokens > (longest := trained.get("seq_len", n_tokens)):
        asked.append(f"prompt of {n_tokens} tokens, training had {longest}")
    if block_size and block_size not in (sizes := trained.get("block_size", [block_size])):
        asked.append(f"blocks of {block_size}, training had {', '.join(map(str, sorted(set(sizes))))}")
    return asked


def own_data(folder):
    """The token files that the model in a folder was trained on, as far as its run tells; else those of runs/vae.
    Raises FileNotFoundError if there are none."""
    options = saved_options(folder)
    named = [*options.get("data", ()), f"{options.get('vae', 'runs/vae')}/data"]
    for place in [Path(folder) / "data", *map(Path, named)]:
        if data.is_prepared(place):
            return str(place)
    raise FileNotFoundError(f"the token files that {folder} was trained on are not here: name some with --data")


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


def peak_memory():
    """Of this process, in GB: on the GPU, if one is in use; None where the system does not tell."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2) if resource else None
