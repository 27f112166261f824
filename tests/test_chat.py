"""Conversations: rows by value, latents of training against those of the sampler, memory, invented answers."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import call

import chat
import cola
import data
import train_prior
import train_vae
import training
from cola import ColaDLM
from data import train_bpe
from options import PriorOptions
from training import saved_options

TURNS = [dict(role="user", content="hi"), dict(role="assistant", content="ho")]


def user(text):
    return dict(role="user", content=text)


def test_turns():
    assert chat.turns(TURNS, "here") == [("User: hi\nAssistant: ", "ho")]
    parts = dict(role="user", content=[dict(type="text", text="h"), dict(type="text", text="i")])
    assert chat.turns([parts, TURNS[1]], "here") == chat.turns(TURNS, "here")
    system = dict(role="system", content="be kind")
    assert chat.turns([system, *TURNS, *TURNS], "here")[0] == ("User: be kind\nhi\nAssistant: ", "ho")
    assert chat.turns([system, *TURNS, *TURNS], "here")[1] == ("User: hi\nAssistant: ", "ho")


@pytest.mark.parametrize(
    "messages, message",
    [
        (None, "not a list of at least two messages"),
        (dict(message=TURNS), "not a list of at least two messages"),
        (TURNS[:1], "not a list of at least two messages"),
        ([user("a"), user("b")], "user and assistant must take turns"),
        ([*TURNS, user("b")], "user and assistant must take turns"),
        ([TURNS[1], TURNS[0]], "user and assistant must take turns"),
        ([dict(role="user"), TURNS[1]], 'must have a "role" and a "content"'),
        ([user(3), TURNS[1]], 'must have a "role" and a "content"'),
        (["hi", "ho"], 'must have a "role" and a "content"'),
        ([user([dict(type="image")]), TURNS[1]], "every part of a content"),
        ([user([dict(type="text", text=3)]), TURNS[1]], "every part of a content"),
    ],
)
def test_what_is_not_a_conversation(messages, message, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps(TURNS) + "\n" + json.dumps(messages))
    with pytest.raises(ValueError, match=f"chat.jsonl line 2.*{message}"):
        chat.read_chats([file], train_bpe(["hi ho"], 258), 64, 0)


def test_rows(tmp_path, capsys):
    tokenizer = train_bpe(["hi ho"], 258)  # bytes, and two special ids
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps(TURNS + TURNS) + "\n\n" + json.dumps([user("x" * 99), TURNS[1]]))
    train, held_out = chat.read_chats([file], tokenizer, 50, 7)
    asked, eos = list(b"User: hi\nAssistant: "), tokenizer.eot_token
    once = asked + [*b"ho", eos]
    assert train.tolist() == held_out.tolist() == [
        [once + [7] * (50 - 23), [0] * 20 + [1] * 3 + [2] * 27],
        [once + once + [7] * 4, [0] * 43 + [1] * 3 + [2] * 4],
    ]  # fmt: skip
    assert "1 answers are left out" in capsys.readouterr().out
    assert torch.equal(chat.random_rows(train, 5, 0, 1), chat.random_rows(train, 5, 0, 1))


def test_a_conversation_may_stand_in_an_object(tmp_path):
    tokenizer, rows = train_bpe(["hi ho"], 258), []
    for i, line in enumerate([TURNS, dict(id=1, messages=TURNS)]):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps(line))
        rows.append(chat.read_chats([tmp_path / f"{i}.jsonl"], tokenizer, 50, 7)[0].tolist())
    assert rows[0] == rows[1]


def test_training_sees_the_latents_of_the_sampler(trained, tmp_path, monkeypatch):
    """Of a prompt that ends inside a block, to the bit; the response is not part of it."""
    model = ColaDLM.from_pretrained(trained / "runs" / "cola", with_tokenizer=True)
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps([user("the cat"), dict(role="assistant", content="sat on 12 mats")]))
    rows, _ = chat.read_chats([file], model.tokenizer, 64, model.vae.config.vocab_size - 1)
    idx = torch.from_numpy(rows)
    o = PriorOptions(chat=(str(file),), block_size=(4,), n_codes=model.dit.config.n_codes, stagger=(0.0,))
    seen = {}

    def loss(dit, z0, z1, t, *rest):
        seen.update(z0=z0, rest=rest)
        return t

    monkeypatch.setattr(train_prior, "flow_matching_loss", loss)
    objective = train_prior.PriorObjective(o, torch.nn.ModuleDict(dict(dit=model.dit)), model.vae, answer_len=2.5)
    objective(idx, torch.Generator().manual_seed(0))
    n_prompt = int((rows[0, 1] == chat.PROMPT).sum())
    known = n_prompt % 4
    assert known and n_prompt > 4
    prompt, valid, block_size, _, count = seen["rest"]
    assert prompt.sum() == n_prompt and block_size == 4 and count == 2.5  # of latents with loss, the number expected
    assert valid.sum() == (rows[0, 1] != chat.PADDING).sum() > n_prompt
    history = []
    real = model.dit.forward
    monkeypatch.setattr(model.dit, "forward", lambda z, *rest: history.append(z) or real(z, *rest))
    state = model.prefill([idx[0, 0, :n_prompt].tolist()], 8, None, 4)
    assert torch.equal(state.known_z[0, :known], seen["z0"][0, n_prompt - known : n_prompt])
    assert torch.equal(history[0][0], seen["z0"][0, : n_prompt - known])


def test_a_conversation_is_kept(trained, monkeypatch):
    """A second turn from the kept state is that of a text whose latents are the ones that were generated."""
    model = ColaDLM.from_pretrained(trained / "runs" / "cola", with_tokenizer=True)
    options = dict(max_new_tokens=6, block_size=4, steps=3, eos_id=0)
    first, second = [5, 6, 7, 8, 9, 10], [11, 12, 13]
    state = model.prefill([[]], 64, None, 4)
    blocks = list(model.generate_blocks([first], state=state, **options))
    said = [token for block in blocks for token in block.new[0]]
    old = state.text[0].copy()
    assert old == first + said and first == [5, 6, 7, 8, 9, 10]  # whole blocks: the last one, too, is remembered
    latents = torch.cat([model.vae.to_dit(model.vae.encode(torch.tensor([first + [299] * 2])).mu)[:, :4]]
                        + [block.z for block in blocks], dim=1)  # fmt: skip
    again = list(model.generate_blocks([second], state=state, **options))

    real = model.vae.to_dit
    monkeypatch.setattr(model.vae, "to_dit", lambda z: torch.cat([latents, real(z)[:, latents.shape[1] :]], dim=1))
    fresh = list(model.generate_blocks([old + second], **options))
    for kept, new in zip(again, fresh, strict=True):
        torch.testing.assert_close(kept.z, new.z, atol=1e-5, rtol=1e-5)
        assert kept.new == new.new
    with pytest.raises(ValueError, match="has become too long"):
        for _ in range(9):
            list(model.generate_blocks([second], state=state, **options))


class Model:
    """Says these texts, one a block, and keeps them in a state like that of `ColaDLM.prefill`."""

    vae = SimpleNamespace(config=SimpleNamespace(patch_size=1))

    def __init__(self, *blocks):
        self.tokenizer, self.blocks = train_bpe(["hi ho"], 258), blocks
        self.state = SimpleNamespace(text=[[]], dit_cache=SimpleNamespace(length=[0]))

    def generate_blocks(self, ids, state, **settings):
        state.text[0] += ids[0]
        for i, text in enumerate(self.blocks):
            state.dit_cache.length = [len(state.text[0])]
            new, ends = self.tokenizer.encode(text, allowed_special="all"), data.end_ids(settings["eos_id"])
            state.text[0] += new
            end = next((k for k, token in enumerate(new) if token in ends), None)
            yield cola.Block(None, [new[:end]], i == len(self.blocks) - 1, [0])

    def answer(self, text, eos_id=None):
        return "".join(chat.answer(self, self.state, text, ["User:"], dict(max_new_tokens=99, eos_id=eos_id)))


def test_stop_texts():
    """An answer ends before one, also where two blocks share it; what only looks like its beginning is said.  What was
    not said is no history, as far as it is not that of a finished block."""
    for blocks, wanted, kept in [
        (("yes Us", "er: no"), "yes ", "yes Us"),
        (("a", "yes User: no"), "ayes ", "ayes "),
        (("é", "é User: é"), "éé ", "éé "),
        (("yes Us", "ual"), "yes Usual", "yes Usual"),
        (("a", "b U"), "ab U", "ab U"),
    ]:
        model = Model(*blocks)
        assert model.answer("?") == wanted
        assert model.state.text == [list((chat.question("?") + kept).encode())]


def test_a_conversation_reads_as_in_training(tmp_path):
    """Each answer has its end mark, whether the model set one or was cut; another id that ends texts will do."""
    model = Model("ho")
    eos = model.tokenizer.eot_token
    for blocks in [("ho",), (f"ho{data.END_OF_TEXT}",), ("ho User: so",)]:
        model = Model(*blocks)
        assert [model.answer("hi", (1, eos)).strip(), model.answer("hi", (1, eos)).strip()] == ["ho", "ho"]
        file = tmp_path / "chat.jsonl"
        file.write_text(json.dumps([user("hi"), dict(role="assistant", content=blocks[0][:3].replace("<", ""))] * 2))
        row = chat.read_chats([file], model.tokenizer, 64, 0)[0][1, 0].tolist()
        assert model.state.text[0] == row[: len(model.state.text[0])] and len(model.state.text[0]) >= 44
    model = Model("ho")
    model.answer("hi")
    assert model.answer("hi", ord("o")) == "h" and eos not in model.state.text[0]


def test_a_conversation_that_becomes_too_long(trained, monkeypatch, capsys):
    """Is told, and goes on after "clear"; beyond the length of training there is one line."""
    script = iter(["x" * 16, "x" * 16, "clear", "x" * 16, "quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(script))
    call(chat.main, "--model runs/cola --context 60 --max-new-tokens 8 --steps 1 --device cpu", monkeypatch, trained)
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if "latents are needed" in line]
    assert len(lines) == 1 and 'there is room for 60; "clear" begins anew, and a larger --context' in lines[0]
    assert len(shown.out.splitlines()) >= 2
    assert shown.err.count("longer than the 32 tokens of training") == 2  # once in each conversation


def test_invented_answers_are_recalled(tmp_path, monkeypatch, capsys):
    """Eight questions, each with an answer that nothing else tells: after a short tuning all come back as they were."""
    things = ["cat", "dog", "sun", "sea", "fox", "owl", "elm", "ash"]
    colours = ["red", "blue", "grey", "pink", "gold", "teal", "jade", "plum"]
    pairs = list(zip(things, colours, strict=True))
    rows = [[user(f"the {a}?"), dict(role="assistant", content=f"{b}.")] for a, b in pairs]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [text for a, b in pairs for text in (f"User: the {a}?\nAssistant: ", f"{b}.")]  # each with an end mark
    (tmp_path / "all.jsonl").write_text("\n".join(json.dumps(dict(text=text)) for text in texts * 30))
    common = "--device cpu --precision fp32 --seq-len 16"
    vae = "--dim 48 --ffn-dim 128 --n-head 2 --latent-dim 16 --vocab-size 320 --lr 5e-3 --warmup 5"
    call(train_vae.main, f"--data all.jsonl {vae} {common} --steps 120 --batch-size 32", monkeypatch, tmp_path)
    prior = "--dim 64 --n-head 2 --n-layer 2 --block-size 2 --warmup 5"
    call(train_prior.main, f"{prior} {common} --steps 5 --batch-size 8", monkeypatch, tmp_path)
    tuning = "--init runs/cola --chat chat.jsonl --batch-size 16 --steps 250 --warmup 10 --out runs/chat"
    call(train_prior.main, f"{tuning} {common}", monkeypatch, tmp_path)
    model = ColaDLM.from_pretrained(tmp_path / "runs" / "chat", with_tokenizer=True)
    settings = dict(max_new_tokens=8, steps=16, grid="quantiles", eta=1.0, cfg_scale=1.0)
    settings["eos_id"] = model.tokenizer.eot_token
    said = ["".join(chat.answer(model, model.prefill([[]], 64), f"the {a}?", [], settings)) for a in things]
    assert said == [f"{b}." for b in colours]
    # The conversation as a user sees it.
    monkeypatch.setattr("builtins.input", lambda _: next(script))
    script = iter([f"the {things[0]}?", "clear", f"the {things[1]}?", "", "quit"])
    capsys.readouterr()
    call(chat.main, "--model runs/chat --temperature 0 --cfg-scale 1 --max-new-tokens 8", monkeypatch, tmp_path)
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [f"{b}." for b in colours[:2]] and "tuned with --chat" not in shown.err
    script = iter(["quit"])
    call(chat.main, "--model runs/cola", monkeypatch, tmp_path)
    assert "runs/cola does not say that it was tuned with --chat" in capsys.readouterr().err


def test_a_model_with_blocks_of_16_is_tuned_in_the_released_shares(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "runs" / "cola", tmp_path / "source")
    file = tmp_path / "source" / "cola_dit" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(block_size=16)))
    (tmp_path / "chat.jsonl").write_text(json.dumps(TURNS))
    start = "--init source --chat chat.jsonl --device cpu --batch-size 2 --seq-len 64 --steps 1"
    for more, wanted in [("", training.CHAT_BLOCKS), ("--block-size 4 2", (4, 2))]:
        call(train_prior.main, f"{start} {more} --out out{len(more)}", monkeypatch, tmp_path)
        assert saved_options(tmp_path / f"out{len(more)}")["block_size"] == wanted
    assert [training.CHAT_BLOCKS.count(size) for size in (1, 4, 8, 16)] == [1, 3, 3, 3]


def test_a_stagger_is_kept_in_tuning(trained, monkeypatch):
    """A model of unknown origin has none."""
    kept = dict(stagger=(0.0, 0.7))
    for saved, given, wanted in [(kept, set(), (0.0, 0.7)), (kept, {"stagger"}, (0.2,)), ({}, set(), (0.0,))]:
        monkeypatch.setattr(training, "saved_options", lambda _, saved=saved: saved)
        options = PriorOptions(init=str(trained / "runs" / "cola"), stagger=(0.2,))
        assert training.take_over(options, given).stagger == wanted
