import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
VAE_SIZE = "--dim 32 --ffn-dim 64 --n-head 2 --n-encoder-layer 1 --n-decoder-layer 1 --latent-dim 4 --block-size 4"
PRIOR_SIZE = "--dim 32 --n-head 2 --n-layer 1"
COMMON = "--device cpu --precision fp32 --batch-size 4 --seq-len 32"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; left out unless -m says otherwise")
    config.option.markexpr = config.option.markexpr or "not slow"


@pytest.fixture
def generated_latents(monkeypatch):
    """A function (model, **options of generate) -> the latents of every block, (B, block_size, d) each."""
    import cola
    import flow

    def run(model, **options):
        latents = []
        monkeypatch.setattr(cola, "solve", lambda *args: latents.append(flow.solve(*args)) or latents[-1])
        model.generate(**options)
        return latents

    return run


@pytest.fixture(autouse=True, scope="session")
def every_step_in_the_log():
    import training

    training.LOG_EVERY = 1


@pytest.fixture(autouse=True, scope="session")
def heeding_interruptions():
    """A shell lets its background jobs ignore Ctrl-C, and so would the processes that the tests start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def one_thread():
    """Threads do not survive a fork, and whoever waits for them waits forever; nor do two threads round like one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def deterministic():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)


# ----------------------------------------------------------------------------------------------------------------------
# The scripts, run as a user runs them


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    lines = (f"Line {i}: the cat number {i * 7 % 13} sat on the mat number {i * 5 % 11}." for i in range(300))
    (folder / "cats.txt").write_text("\n".join(lines))
    (folder / "empty.txt").write_text("")
    return folder


def run(script, arguments, cwd):
    start = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    command, environment = [sys.executable, *start, *arguments.split()], os.environ | dict(PYTHONPATH=str(ROOT))
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100)


def call(main, arguments, monkeypatch, cwd):
    """As `run`, but in this process, which saves the seconds that importing torch takes."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["script", *arguments.split()])
    main()


def losses(folder):
    """The log of a run, without what depends on the machine."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "memory_gb")} for row in rows]


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory):
    """A folder in which both stages have run for a few steps."""
    import train_prior
    import train_vae

    cwd = tmp_path_factory.mktemp("trained")
    steps = "--steps 6 --save-every 3"
    with pytest.MonkeyPatch.context() as patch:
        call(train_vae.main, f"--data {text} --vocab-size 300 {VAE_SIZE} {COMMON} {steps}", patch, cwd)
        call(train_prior.main, f"{PRIOR_SIZE} {COMMON} {steps}", patch, cwd)
        call(train_prior.main, f"{PRIOR_SIZE} {COMMON} {steps} --joint --out runs/joint", patch, cwd)
    return cwd
