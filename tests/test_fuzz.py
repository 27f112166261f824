"""Damaged and absurd input, at random: whatever reads it works, or says in one line what is wrong, and soon.

    python -m pytest tests/test_fuzz.py                     # a share of the cases, seconds
    python -m pytest tests/test_fuzz.py -m slow             # all of them
    python -m pytest tests/test_fuzz.py -m slow -k "[417]"  # one; all that happens in a case follows from its number
"""

import contextlib
import copy
import dataclasses
import importlib
import json
import math
import os
import random
import shutil
import signal

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import data
import options
import training
from chat import read_chats
from cola import ColaDLM
from measure import benchmarks

SHARE, CASES, SECONDS = 60, 1320, 5
TEXT = "Line 12: the cat <|endoftext|> sat\ton 12345 mats.\r\n\n   It's ÜBER 中文 \U0001f642 a\u0301, isn't it?  "
NUMBERS = [0, 1, -1, -5, 7, 258, 2**31, 2**63, 10**400, 0.5, -0.5, 1e30, 1e-30, math.nan, math.inf, -math.inf]
STRINGS = ["", "x", "0", "\0", "\ud800", "../x", "/dev/null", "a\nb", " " * 5000, "\u2028", "<|endoftext|>"]
VALUES = [None, True, False, *NUMBERS, *STRINGS, [], {}, [[]], [1, "a", None], {"text": "a"}, {"x": {"x": []}}]
PATTERNS = ["", "a*", "(", "[0-9]", r"\p{L}+", "(?=a)", "^", r"\s+(?!\S)|.", "(a|a)*b", r"[\s\S]", r"\S+|\s+"]
PARTS = [dict(type="Split", pattern=dict(Regex=p), behavior="Isolated", invert=False) for p in PATTERNS]
PARTS += [dict(type="Split", pattern=dict(Regex=r"\S+|\s"), behavior="Removed", invert=i) for i in (False, True)]
PARTS += [dict(type="Split", pattern=dict(String=" "), behavior="MergedWithPrevious", invert=False)]
PARTS += [dict(type="ByteLevel", add_prefix_space=a, use_regex=b) for a in (False, True) for b in (False, True)]
PARTS += [dict(type=name) for name in ("Digits", "Whitespace", "WhitespaceSplit", "Punctuation", "BertPreTokenizer")]


class Hang(BaseException):
    """Not an error that anyone expects, so nothing catches it."""


# ----------------------------------------------------------------------------------------------------------------------
# Damage


def places(rng, node):
    """A way down a JSON tree: container and key of each node on it."""
    while isinstance(node, (dict, list)) and node:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        yield node, key
        node = node[key]


def damaged_json(rng, content):
    """A copy, in which some nodes are something else, or gone, or new."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if way := list(places(rng, content)):
            node, key = rng.choice(way)
            value = copy.deepcopy(rng.choice([*VALUES, node[key], [node[key]], dict(x=node[key])]))
            if rng.random() < 0.2:
                del node[key]
            elif isinstance(node, dict):
                node[rng.choice([key, key, key, key, "x", ""])] = value
            else:
                node[key:key] = [value] * rng.randrange(3)
    return content


def damaged_bytes(rng, raw):
    """Cut off, changed or filled up; near the beginning, where the headers are, as often as anywhere."""
    place = rng.randrange(rng.choice([20, 2000, len(raw) + 1])) % (len(raw) + 1)
    junk = [b"\0", b"\xff\xfe", b"\xed\xa0\x80", b" " * 70_000, b"\n", b"\r", b'"', b"[" * 9999, bytes(4), raw]
    junk = rng.choice(junk)
    return rng.choice([
        b"", raw[:place], raw[place:], raw[:place] + junk + raw[place:], raw[:place] + junk + raw[place + len(junk) :],
        raw[:place] + bytes([rng.randrange(256)]) + raw[place + 1 :],
    ])  # fmt: skip


def damage(rng, file, change=damaged_json):
    """Change a file with JSON or JSON lines, its bytes, or what kind of file it is."""
    raw, kind = file.read_bytes(), rng.random()
    if kind < 0.05:
        file.unlink()
        rng.choice([os.mkfifo, os.mkdir, lambda f: f.symlink_to("nowhere"), lambda f: None])(file)
    elif kind < 0.25 or change is None:
        file.write_bytes(damaged_bytes(rng, raw))
    elif file.suffix == ".jsonl":
        lines = raw.decode().splitlines()
        i = rng.randrange(len(lines))
        lines[i] = json.dumps(change(rng, json.loads(lines[i])))
        file.write_text("\n".join(lines) + "\n")
    else:
        file.write_text(json.dumps(change(rng, json.loads(raw)), ensure_ascii=rng.random() < 0.5), errors="ignore")


# ----------------------------------------------------------------------------------------------------------------------
# What reads


def generate(folder):
    ColaDLM.from_pretrained(folder, with_tokenizer=True).generate(["the cat"], max_new_tokens=2, steps=1)


def model_config(rng, folder):
    damage(rng, folder / rng.choice(["cola_vae", "cola_dit"]) / "config.json")
    generate(folder)


def model_weights(rng, folder):
    file = folder / rng.choice(["cola_vae", "cola_dit"]) / "model.safetensors"
    if rng.random() < 0.5:
        damage(rng, file, None)
    else:
        tensors = load_file(file)
        name = rng.choice(sorted(tensors))
        tensor = tensors.pop(name)
        changed = [tensor[None], tensor.new_empty(0), tensor.double(), tensor.half(), tensor.long(), tensor.bool()]
        changed += [tensor * math.nan, tensor * math.inf]
        if (i := rng.randrange(len(changed) + 1)) < len(changed):
            tensors[rng.choice([name, name, "x"])] = changed[i].contiguous()
        save_file(tensors, file)
    generate(folder)


def model_index(rng, folder):
    part = folder / "cola_dit"
    names = dict.fromkeys(load_file(part / "model.safetensors"), "model.safetensors")
    index = part / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(metadata=dict(total_size=1), weight_map=names)))
    damage(rng, index)
    generate(folder)


def tokenizer(rng, folder):
    def change(rng, content):
        way = rng.randrange(4)
        if way == 0:
            content["pre_tokenizer"] = rng.choice(PARTS)
        elif way == 1:
            content["pre_tokenizer"]["pretokenizers"] = rng.choices(PARTS, k=rng.randrange(4))
        elif way == 2:
            token = dict(id=rng.choice([*NUMBERS, 298, 300]), content=rng.choice([*STRINGS, "the", " cat"]))
            token |= {name: rng.random() < 0.2 for name in ("special", "lstrip", "rstrip", "single_word", "normalized")}
            content["added_tokens"].append(token)
        return damaged_json(rng, content) if way == 3 or rng.random() < 0.1 else content

    damage(rng, folder / "tokenizer.json", change)
    encoding = data.load_tokenizer(str(folder / "tokenizer.json"))
    assert encoding.decode(encoding.encode_ordinary(TEXT)) == TEXT
    data.save_tokenizer(encoding, folder / "again.json")
    assert data.load_tokenizer(str(folder / "again.json")).encode_ordinary(TEXT) == encoding.encode_ordinary(TEXT)


def tokens(rng, folder):
    name = rng.choice(["train.bin", "val.bin", "tokenizer.json"])
    damage(rng, folder / "data" / name, damaged_json if name == "tokenizer.json" else None)
    corpus = data.open_corpus([folder / "data"], folder / "data", None, 2, 8, resume=True)
    assert corpus.batches(2, 8, 0)(0).shape == (2, 8) and corpus.held_out(8).shape[1] == 8


def run_json(rng, folder):
    damage(rng, folder / "training" / "6" / "run.json")
    if rng.random() < 0.2:
        (folder / "training" / "6").rename(folder / "training" / rng.choice(["-5", "\u0666", "1e3", "9" * 50, "x"]))
    training.own_data(folder)
    run = training.Run(options.PriorOptions(out=str(folder), resume=True), {"out", "resume"})
    run.is_best(), run.chosen()


def texts(rng, folder):
    file = folder / rng.choice(["texts.jsonl", "texts.txt"])
    damage(rng, file, damaged_json if file.suffix == ".jsonl" else None)
    data.prepare([file], data.make_tokenizer("bpe", 258, [file]), folder / "new", 1, 8)
    data.open_tokens(folder / "new")


def chats(rng, folder):
    damage(rng, folder / "chats.jsonl")
    read_chats([folder / "chats.jsonl"], data.load_tokenizer(str(folder / "tokenizer.json")), 64, 299)


def tasks(rng, folder):
    damage(rng, folder / "obqa.jsonl")
    jobs = benchmarks.open_tasks("obqa", folder, 0, True)
    for line in jobs["obqa"]:
        benchmarks.prompt_of(benchmarks.TASKS["obqa"], line)
    benchmarks.score_files([folder / "obqa.jsonl"], "", folder / "scores")


def prompts(rng, folder):
    pieces = [*STRINGS, TEXT, "a" * 3000, "\u0301" * 300, "1" * 999, "<|pad|>", "<|endoftext", *VALUES[-7:]]
    some = rng.choices(pieces, k=rng.randrange(4))
    if rng.random() < 0.7:
        some = ["".join(map(str, some))]
    if rng.random() < 0.1:
        some = [" " * 1_200_000 + rng.choice(["", "a"])]
    if rng.random() < 0.5:
        content = json.loads((folder / "tokenizer.json").read_text())
        content["pre_tokenizer"] = dict(type="ByteLevel", add_prefix_space=False, use_regex=True)
        (folder / "tokenizer.json").write_text(json.dumps(content))
    encoding = data.load_tokenizer(str(folder / "tokenizer.json"))
    for ids in data.prompt_ids(encoding, some):
        data.decode_bytes(encoding, ids)
        data.TextStream(encoding).write(ids, last=True).encode()


def sampling(rng, folder):
    names = [*(f.name for f in dataclasses.fields(options.SamplingOptions)), "row_ids", "eos_id", "pad_id", "noise"]
    values = [*VALUES, 2, 3, [0], [5, 6], [2**40, 1], (1,), range(2), np.float32(2), np.int64(3), 2**32 + 1]
    settings = {name: rng.choice(values) for name in rng.choices(names, k=rng.randrange(1, 4))}
    settings |= dict(max_new_tokens=3, steps=1)
    prompt = rng.choice([*VALUES, [299], [300], [-1], np.array([1, 2]), [np.int32(4)], [1.0], [True], " " * 300])
    given = rng.choice([["the"], [[1, 2], "the"], [[1, 2], [], [3]], [prompt], ["the", prompt], prompt])
    ColaDLM.from_pretrained(folder).generate(given, **settings)


def command_line(rng, folder):
    scripts = [importlib.import_module(name).Options for name in ["sample", "chat", "data", *MEASURES]]
    cls, argv = rng.choice([options.VAEOptions, options.PriorOptions, *scripts]), []
    values = [*map(str, NUMBERS), *STRINGS, "1_000", " 1 ", "\u0661", "9" * 5000, "0x10", "--", "-", "true", "auto"]
    for name in rng.choices([*(f.name for f in dataclasses.fields(cls)), "no-resume", "x", ""], k=rng.randrange(1, 5)):
        argv += [options.flag(name), *rng.choices(values, k=rng.choice([0, 1, 1, 1, 2]))]
    stderr = (folder / "stderr").open("w", errors="backslashreplace")
    with stderr, contextlib.redirect_stderr(stderr):
        try:
            options.parse_options(cls, "", argv=argv)
        except SystemExit as stop:
            assert stop.code == 2
    said = (folder / "stderr").read_text()
    assert said == "" or (said.startswith("error: ") and said.count("\n") == 1)


MEASURES = ["measure.evaluate", "measure.judge"]
TARGETS = [model_config, model_weights, model_index, tokenizer, tokens, run_json]
TARGETS += [texts, chats, tasks, prompts, sampling, command_line]

# ----------------------------------------------------------------------------------------------------------------------
# The cases


@pytest.fixture(scope="session")
def whole(trained, text, tmp_path_factory):
    """A folder that holds all that is damaged: a model with its run, token files, and texts of every kind."""
    folder = tmp_path_factory.mktemp("fuzz") / "whole"
    shutil.copytree(trained / "runs" / "cola", folder)
    shutil.copytree(trained / "runs" / "vae" / "data", folder / "data")
    shutil.copy(text / "cats.txt", folder / "texts.txt")
    lines = (folder / "texts.txt").read_text().splitlines()[:40]
    messages = [dict(role="user", content=[dict(type="text", text="hi")]), dict(role="assistant", content="hello")]
    question = dict(question="q", choices=["a", "b"], answer="a", generate="a")
    rows = dict(
        texts=[dict(text=line) for line in lines], chats=[messages] * 4, obqa=[dict(id=i) | question for i in range(4)]
    )
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def hang(*_):
    raise Hang(f"longer than {SECONDS} s")


SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in range(SHARE, CASES)]


@pytest.mark.parametrize("case", [*range(SHARE), *SLOW])
def test_works_or_says_in_one_line_what_is_wrong(whole, case, monkeypatch):
    folder, rng = whole.with_name("damaged"), random.Random(case)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    monkeypatch.chdir(folder)
    signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_VIRTUAL, 10 * SECONDS)  # ends all tests, if this one never comes back to Python
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        TARGETS[case % len(TARGETS)](rng, folder)
    except (ValueError, OSError) as error:
        assert str(error) and "\n" not in str(error)
        assert not isinstance(error, UnicodeError), "the message does not say where"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
