"""A run that is killed, at any moment, goes on to the very files of a run that was not.

With `-m slow`, killed before each of its operations on files, at random moments, and again while it goes on."""

import json
import os
import random
import signal
import sys
import threading
import time

import pytest
from conftest import COMMON, PRIOR_SIZE, VAE_SIZE
from safetensors.torch import load_file
from tqdm import tqdm

import common
import train_prior
import train_vae

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform != "linux", reason="other systems do not fork safely"),
]
STEPS = "--steps 4 --save-every 2 --eval-every 1 --warmup 1 --out out"
MAINS = dict(vae=train_vae.main, prior=train_prior.main, joint=train_prior.main)
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.link", "os.symlink")
SLOW = [pytest.param(i, marks=pytest.mark.slow) for i in range(20)]


def count_operations(folder, kill_at, counter):
    """Kill this process before its operation number kill_at that changes something in the folder."""
    n = 0

    def hook(event, arguments):
        nonlocal n
        if event not in CHANGES or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        if not os.path.abspath(os.fsdecode(arguments[0])).startswith(str(folder)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if n == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        n += 1
        os.pwrite(counter, n.to_bytes(4, "big"), 0)

    sys.addaudithook(hook)


def attempt(stage, arguments, cwd, kill_at=None, kill_after=None):
    """Call main() in a forked process.  kill_at: an operation; kill_after: seconds.  Returns the exit code, -SIGKILL if
    it was killed, what it wrote to stderr, and how many operations it did."""
    counter = os.memfd_create("operations")
    if not (child := os.fork()):
        signal.alarm(100)
        tqdm.set_lock(threading.RLock())  # its own is shared: who is killed while he has it would stop all others
        with open(cwd / "stderr", "w") as sys.stderr, open(os.devnull, "w") as sys.stdout:
            os.chdir(cwd)
            sys.argv = ["script", *arguments.split()]
            count_operations(cwd / "out", kill_at, counter)
            code = 1
            try:
                common.run_script(MAINS[stage])
                code = 0
            except SystemExit as stop:
                code = stop.code
            except BaseException as error:
                print(repr(error), file=sys.stderr)
            sys.stderr.flush()
            os._exit(code)
    if kill_after:
        timer = threading.Timer(kill_after, os.kill, (child, signal.SIGKILL))
        timer.start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if kill_after:
        timer.cancel()
    n = int.from_bytes(os.pread(counter, 4, 0), "big")
    os.close(counter)
    return code, (cwd / "stderr").read_text(), n


def go_on(stage, start, cwd, **kill):
    """As a user would: --resume or, where that says that there is nothing yet, the first command again."""
    code, said, _ = attempt(stage, "--resume --out out", cwd, **kill)
    if code == 2:
        assert said.startswith("error: ") and said.count("\n") == 1 and "start it without --resume" in said
        code, said, _ = attempt(stage, start, cwd, **kill)
    assert code == 0 or (code == -signal.SIGKILL and kill), said
    return code


def contents(folder):
    """{file: content} of a run's folder: the bytes, but for what tells of the machine or of the command."""
    found = {}
    for file in (f for f in folder.rglob("*") if not f.is_dir()):
        content = file.read_bytes()
        if file.name == "run.json":
            content = json.loads(content)
            del content["checksums"], content["options"]["resume"]
            content["log"] = [without_speed(row) for row in content["log"]]
        elif file.name == "log.jsonl":
            content = [without_speed(json.loads(line)) for line in content.splitlines()]
        elif file.name.startswith("shard"):  # whose header has its entries in any order
            content = {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}
        found[str(file.relative_to(folder))] = content
    return found


def without_speed(row):
    return {name: value for name, value in row.items() if name not in ("tokens_per_second", "memory_gb")}


@pytest.fixture(scope="module")
def whole(trained, text, tmp_path_factory, one_thread):
    """Of each stage: the command, the files of a run that nobody kills, its operations on files and its seconds."""
    runs = {}
    for stage, arguments in dict(
        vae=f"--data {text} --vocab-size 300 {VAE_SIZE}",
        prior=f"--vae {trained}/runs/vae {PRIOR_SIZE}",
        joint=f"--vae {trained}/runs/vae {PRIOR_SIZE} --joint",
    ).items():
        cwd, start, began = tmp_path_factory.mktemp(stage), f"{arguments} {COMMON} {STEPS}", time.monotonic()
        code, said, n = attempt(stage, start, cwd)
        assert code == 0 and n > 20, said
        runs[stage] = start, contents(cwd / "out"), n, time.monotonic() - began
    return runs


def kill_and_go_on(whole, stage, cwd, k):
    """Kill a run before its operation k on files; then it goes on, or begins anew, and ends as if nothing had been."""
    start, files, _, _ = whole[stage]
    cwd.mkdir()
    code, said, _ = attempt(stage, start, cwd, kill_at=k)
    assert code == -signal.SIGKILL, (k, said)
    assert go_on(stage, start, cwd) == 0
    assert contents(cwd / "out") == files, k


@pytest.mark.parametrize("share", [0.7])
@pytest.mark.parametrize("stage", MAINS)
def test_killed_before_an_operation(whole, tmp_path, stage, share):
    kill_and_go_on(whole, stage, tmp_path / "run", int(share * whole[stage][2]))


@pytest.mark.parametrize("part", SLOW)
@pytest.mark.parametrize("stage", MAINS)
def test_killed_before_every_operation(whole, tmp_path, stage, part):
    for k in range(part, whole[stage][2], len(SLOW)):
        kill_and_go_on(whole, stage, tmp_path / str(k), k)


@pytest.mark.parametrize("case", SLOW)
@pytest.mark.parametrize("stage", MAINS)
def test_killed_at_a_random_moment(whole, tmp_path, stage, case):
    start, files, _, seconds = whole[stage]
    attempt(stage, start, tmp_path, kill_after=random.Random(case).uniform(0.01, seconds))
    assert go_on(stage, start, tmp_path) == 0
    assert contents(tmp_path / "out") == files


@pytest.mark.parametrize("case", SLOW[:10])
@pytest.mark.parametrize("stage", MAINS)
def test_killed_again_and_again(whole, tmp_path, stage, case):
    start, files, n, _ = whole[stage]
    rng = random.Random(case)
    attempt(stage, start, tmp_path, kill_at=rng.randrange(n))
    for _ in range(10):
        if go_on(stage, start, tmp_path, kill_at=rng.randrange(n)) == 0:
            break
    else:
        assert go_on(stage, start, tmp_path) == 0
    assert contents(tmp_path / "out") == files
