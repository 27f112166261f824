"""Several processes do what one does: the same losses, one checkpoint, one message."""

import json
import os
import signal
import socket
import subprocess
import sys
from functools import partialmethod

import pytest
import torch
import torch.distributed.fsdp  # here, so that no forked process has to
from conftest import COMMON, PRIOR_SIZE, ROOT, VAE_SIZE, call, losses
from safetensors.torch import load_file

import common
import data
import sample
import train_prior
import train_vae
import training
from cola import ColaDLM
from measure import evaluate

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform != "linux", reason="other systems do not fork safely"),
]
STEPS = "--steps 6 --save-every 3"
RUNS = dict(adamw="--optimizer adamw", muon="--optimizer muon", bf16="--optimizer adamw --precision bf16")
VAE = f"--vocab-size 300 {VAE_SIZE} {COMMON} {STEPS}"
PRIOR = f"--joint {PRIOR_SIZE} {COMMON} {STEPS}"


def processes(main, arguments, cwd, sabotage=None, n=2):
    """Call main() as torchrun would, in n forked processes, which saves the seconds that starting them takes.

    sabotage(rank) is called in each before.  Returns exit codes, and what each wrote to stdout and stderr."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(n):
        if not (child := os.fork()):
            code = 1
            signal.alarm(120)  # no test may wait forever
            try:
                os.environ |= dict(TORCHELASTIC_RUN_ID="test", WORLD_SIZE=str(n), RANK=str(rank), LOCAL_RANK=str(rank))
                os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT=str(port))
                sys.stdout = sys.stderr = open(cwd / f"output{rank}", "w")  # noqa: SIM115
                common.wait_for_the_first_to_report = lambda: None  # there is no torchrun that would end those who wait
                if sabotage:
                    sabotage(rank)
                os.chdir(cwd)
                sys.argv = ["script", *arguments.split()]
                common.run_script(main)
                code = 0
            except SystemExit as stop:
                code = stop.code
            except BaseException as error:
                print(repr(error), file=sys.stderr)
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes, [(cwd / f"output{rank}").read_text() for rank in range(n)]


def same_run(a, b, tolerance=1e-6):
    """Whether the losses of two runs are the same, and their weights up to rounding; a step is one of about 1e-3."""
    one, two = losses(a), losses(b)
    assert len(one) == len(two) == 7  # with step 0
    for row, other in zip(one, two, strict=True):
        norms = [r.pop("grad_norm", 0.0) for r in (row, other)]  # far less exact than a loss in bf16
        assert norms[0] == pytest.approx(norms[1], rel=100 * tolerance)
        assert row == pytest.approx(other, rel=10 * tolerance, abs=10 * tolerance)
    for file in sorted(file.relative_to(a) for file in a.glob("*/model.safetensors")):
        one, two = load_file(a / file), load_file(b / file)
        difference = torch.cat([(one[name] - two[name]).flatten() for name in one]).abs()
        assert difference.mean() < tolerance
    return True


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory, one_thread):
    """A folder in which one process has trained both stages in 2 passes."""
    cwd = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        for name, extra in RUNS.items():
            call(train_vae.main, f"--data {text} {VAE} {extra} --micro-batch 2 --out {name}-vae", patch, cwd)
            call(train_prior.main, f"--vae adamw-vae {PRIOR} {extra} --micro-batch 2 --out {name}-prior", patch, cwd)
    return cwd


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("fsdp", ["", "--fsdp"])
def test_two_processes_are_two_passes(alone, text, tmp_path, name, fsdp):
    for main, arguments, stage in [
        (train_vae.main, f"--data {text} {VAE}", "vae"),
        (train_prior.main, f"--vae {alone}/adamw-vae {PRIOR}", "prior"),
    ]:
        codes, output = processes(main, f"{arguments} {RUNS[name]} {fsdp} --out {stage}", tmp_path)
        assert codes == [0, 0] and output[1] == "", output
        tolerance = 2e-4 if name == "bf16" else 1e-6  # FSDP casts weights for each use, and adds up in fp32
        assert same_run(tmp_path / stage, alone / f"{name}-{stage}", tolerance)
        sizes = [file.stat().st_size for file in (tmp_path / stage / "training" / "6").glob("*.safetensors")]
        assert len(sizes) == 2 or not fsdp  # each process has written its half, but for what is not shared out
        assert not fsdp or max(sizes) < 0.7 * sum(sizes)


def test_compiled_and_sharded(alone, text, tmp_path):
    def without_a_compiler(rank):
        torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager", fullgraph=True)

    arguments = f"--vae {alone}/adamw-vae {PRIOR} {RUNS['bf16']} --fsdp --compile --checkpointing --out out"
    codes, output = processes(train_prior.main, arguments, tmp_path, without_a_compiler)
    assert codes == [0, 0], output
    assert same_run(tmp_path / "out", alone / "bf16-prior", 5e-4)  # compiled, bfloat16 is rounded elsewhere


def stopping(function, count, stop):
    """The function, but its call number `count` + 1 goes to stop(*args)."""
    calls = []

    def wrapped(*args):
        calls.append(None)
        return stop(*args) if len(calls) > count else function(*args)

    return wrapped


def kill_while_stepping(rank):
    if rank == 1:
        stop = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        training.optimizer_step = stopping(training.optimizer_step, 4, stop)


def kill_while_saving(rank):
    def half(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0:  # after the weights have been written
        training.replacing = stopping(training.replacing, 2, half)


@pytest.mark.parametrize("fsdp", ["", "--fsdp"])
@pytest.mark.parametrize("sabotage, step", [(kill_while_stepping, 3), (kill_while_saving, 0)])
def test_what_two_began_and_one_left_a_single_one_finishes(alone, tmp_path, monkeypatch, sabotage, step, fsdp):
    arguments = f"--vae {alone}/adamw-vae {PRIOR} --optimizer adamw --micro-batch 2 {fsdp} --out out"
    codes, _ = processes(train_prior.main, arguments, tmp_path, sabotage)
    assert -signal.SIGKILL in codes and 0 not in codes
    assert ColaDLM.from_pretrained(tmp_path / "out")
    complete = [int(file.parent.name) for file in (tmp_path / "out" / "training").glob("*/run.json")]
    assert complete == [step]
    call(train_prior.main, "--resume --no-fsdp --out out", monkeypatch, tmp_path)
    assert same_run(tmp_path / "out", alone / "adamw-prior")


def never_better_than_at_the_start(rank=0):
    training.Run.is_best = lambda self: self.log[-1]["step"] == 0


def test_sharded_training_goes_on_after_an_evaluation_that_exports_nothing(alone, tmp_path, monkeypatch):
    """Evaluation gathers weights, and nothing but training, which the average never has, or an export shares them out
    again."""
    arguments = f"--vae {alone}/adamw-vae {PRIOR} --optimizer adamw --micro-batch 2 --eval-every 1 --save-every 100"
    codes, output = processes(
        train_prior.main, f"{arguments} --fsdp --out two", tmp_path, never_better_than_at_the_start
    )
    assert codes == [0, 0], output
    monkeypatch.setattr(training.Run, "is_best", lambda self: self.log[-1]["step"] == 0)
    call(train_prior.main, f"{arguments} --out one", monkeypatch, tmp_path)
    assert same_run(tmp_path / "two", tmp_path / "one")


def signal_to_the_second(rank):
    if rank == 1:
        note = lambda *args: os.kill(os.getpid(), signal.SIGTERM) or step(*args)  # noqa: E731
        step = training.optimizer_step
        training.optimizer_step = stopping(step, 3, note)


def test_a_signal_to_one_process_stops_all_after_the_same_step(alone, tmp_path, monkeypatch):
    arguments = f"--vae {alone}/adamw-vae {PRIOR} --optimizer adamw --micro-batch 2 --out out"
    codes, output = processes(train_prior.main, arguments, tmp_path, signal_to_the_second)
    assert codes == [128 + signal.SIGTERM] * 2 and "stopped after step 4; go on with" in output[0]
    call(train_prior.main, "--resume --out out", monkeypatch, tmp_path)
    assert same_run(tmp_path / "out", alone / "adamw-prior")


@pytest.mark.parametrize("micro_batch", ["--micro-batch 2", ""])
def test_what_one_began_two_finish(alone, tmp_path, monkeypatch, micro_batch):
    """Without --micro-batch each has half of a batch at once, and other random numbers."""
    def stop(*args):
        raise KeyboardInterrupt

    arguments = f"--vae {alone}/adamw-vae {PRIOR} --optimizer adamw {micro_batch} --out out"
    monkeypatch.setattr(training, "optimizer_step", stopping(training.optimizer_step, 4, stop))
    with pytest.raises(KeyboardInterrupt):
        call(train_prior.main, arguments, monkeypatch, tmp_path)
    monkeypatch.undo()
    codes, output = processes(train_prior.main, "--resume --fsdp --out out", tmp_path)
    assert codes == [0, 0], output
    assert not micro_batch or same_run(tmp_path / "out", alone / "adamw-prior")


def as_process(monkeypatch, rank, n):
    for name, value in dict(TORCHELASTIC_RUN_ID="test", WORLD_SIZE=n, RANK=rank).items():
        monkeypatch.setenv(name, str(value))


def test_parts_of_a_batch(monkeypatch):
    """Together they are the batch, in order; the random numbers of no two are alike."""
    idx = torch.arange(24).view(12, 2)
    wanted = [training.parts_of_batch(idx, 12, 0, step)[0][1].initial_seed() for step in (7, 8)]
    found = []
    for rank in range(3):
        as_process(monkeypatch, rank, 3)
        found += training.parts_of_batch(idx, 2, 0, 7)
    parts, generators = zip(*found, strict=True)
    assert torch.equal(torch.cat(parts), idx) and len(parts) == 6
    assert generators[0].initial_seed() == wanted[0]  # what a single process draws
    draws = [torch.rand(4, generator=generator).tolist() for generator in generators]
    draws.append(torch.rand(4, generator=torch.Generator().manual_seed(wanted[1])).tolist())
    assert len({tuple(draw) for draw in draws}) == 7


def test_a_batch_splits_evenly():
    assert data.micro_batch_size(8, 0, 2) == 4 and data.micro_batch_size(8, 2, 2) == 2
    with pytest.raises(ValueError, match="--batch-size 6 must be a multiple of --micro-batch 2 times 2 devices"):
        data.micro_batch_size(6, 2, 2)
    with pytest.raises(ValueError, match="--batch-size 5 must be a multiple of 2 devices"):
        data.micro_batch_size(5, 0, 2)


def test_samples_do_not_depend_on_the_number_of_processes(alone, tmp_path, monkeypatch, capsys):
    arguments = f"--model {alone}/adamw-prior --prompt Line cat --num-samples 3 --max-new-tokens 8 --steps 2"
    call(sample.main, arguments + " --device cpu", monkeypatch, tmp_path)
    codes, output = processes(sample.main, arguments + " --device cpu", tmp_path)
    assert codes == [0, 0] and output == [capsys.readouterr().out, ""]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--micro-batch 3", "--batch-size 4 must be a multiple of --micro-batch 3 times 2 devices"),
        ("--data nowhere.txt", "nowhere.txt does not exist"),  # only the first process looks, the others wait for it
    ],
)
def test_mistakes_are_reported_once(tmp_path, arguments, message):
    """Under torchrun itself, which adds what it has to say about exit codes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *torchrun, ROOT / "train_vae.py", *VAE.split(), *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0 and done.stdout == ""
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [f"error: {message}"]
    assert "exitcode  : 2" in done.stderr and "[rank" not in done.stderr  # tracebacks have that prefix
    assert not any(file.is_file() for file in tmp_path.rglob("*"))


def test_benchmarks_are_shared_out(alone, tmp_path):
    """Two processes write what one does, and go on where it stopped."""
    lines = [dict(id=i, context="Line " * (i + 1), answer="the") for i in range(5)]
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "lambada.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = f"--model {alone}/adamw-prior --tasks lambada --max-new-tokens 4 --steps 2 --batch-size 1 --device cpu"
    written = []
    for n in (1, 2):
        codes, outputs = processes(evaluate.main, f"{start} --out out{n}", tmp_path, n=n)
        assert codes == [0] * n and "lambada" in outputs[0]
        written.append((tmp_path / f"out{n}" / "lambada.jsonl").read_text())
    assert written[0] == written[1] and written[0].count("\n") == 5
    (tmp_path / "out1" / "lambada.jsonl").write_text("".join(written[0].splitlines(keepends=True)[:2]))
    processes(evaluate.main, f"{start} --out out1", tmp_path)
    assert (tmp_path / "out1" / "lambada.jsonl").read_text() == written[0]


def test_diagnostics_do_not_depend_on_the_number_of_processes(alone, tmp_path):
    start = f"--model {alone}/adamw-prior --data {alone}/adamw-vae/data --num-sequences 20 --likelihood-sequences 20"
    options = "--seq-len 32 --ode-steps 2 --samples 1 --steps 2 --read-times 0 --device cpu"
    reports = []
    for n in (1, 2):
        codes, outputs = processes(evaluate.main, f"{start} {options} --out out{n}", tmp_path, n=n)
        assert codes == [0] * n, outputs
        reports.append(json.loads((tmp_path / f"out{n}" / "report.json").read_text())["sections"])
    for section, figures in reports[0].items():
        for name, figure in figures.items():
            assert figure["value"] == pytest.approx(reports[1][section][name]["value"], rel=1e-4, abs=1e-6), name
