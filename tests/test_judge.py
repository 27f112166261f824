"""The n-gram judge: a proper distribution, right by hand, and blind neither to order nor to copies."""

import math
import random

import pytest
from conftest import call

import data
from measure import judge as script
from measure.judge import NGramJudge, bits_per_byte, describe, text_of, yardsticks

TEXT = b"the cat sat on the mat\nthe dog sat on the log\n" * 3


@pytest.mark.parametrize("context", [b"", b"the ", b"xyz", b"on the"])
def test_probabilities_sum_to_one(context):
    judge = NGramJudge(TEXT, order=4)
    assert sum(2 ** -judge.bits(bytes([b]), context) for b in range(256)) == pytest.approx(1.0)


def test_witten_bell_by_hand():
    judge = NGramJudge(b"aab", order=2)
    p_a, p_b = (2 + 2 / 256) / (3 + 2), (1 + 2 / 256) / (3 + 2)  # a is seen 2 times of 3, b once; 2 types
    assert judge.bits(b"a") == pytest.approx(-math.log2(p_a))
    assert judge.bits(b"b", b"a") == pytest.approx(-math.log2((1 + 2 * p_b) / (2 + 2)))  # after a: a once, b once
    assert judge.bits(b"a", b"b") == pytest.approx(-math.log2(p_a))  # nothing was seen after b
    assert judge.bits(b"ab") == pytest.approx(judge.bits(b"a") + judge.bits(b"b", b"a"))


def test_order_matters():
    judge, rng = NGramJudge(TEXT), random.Random(0)
    shuffled = [" ".join(rng.sample(line.split(), 6)).encode() for line in TEXT.decode().splitlines()]
    real, worse = (bits_per_byte(judge, texts, [b"\n"] * 6) for texts in (TEXT.splitlines(), shuffled))
    assert real[0] + 5 * real[1] < worse[0] - 5 * worse[1]


def test_standard_error_over_texts():
    judge = NGramJudge(TEXT)
    assert bits_per_byte(judge, [b"the cat"] * 4, [b"\n"] * 4)[1] == pytest.approx(0.0, abs=1e-12)
    mean, error = bits_per_byte(judge, [b"cat", b"xyz"], [b"\n"] * 2)
    bits = [judge.bits(text, b"\n") / 3 for text in (b"cat", b"xyz")]
    assert mean == pytest.approx(sum(bits) / 2) and error == pytest.approx(abs(bits[0] - bits[1]) / 2)


def test_description():
    texts = [b"the cat sat\nthe dog sat on the log\nthe c", b"a zebra sat on the mat"]
    distinct, words, lines, copied = describe(texts, [b"\n"] * 2, TEXT)
    triples = ["the cat sat", "cat sat the", "sat the dog", "the dog sat", "dog sat on", "sat on the", "on the log"]
    triples += ["the log the", "log the c", "a zebra sat", "zebra sat on", "sat on the", "on the mat"]
    assert distinct == len(set(triples)) / len(triples)
    assert words == 14 / 17  # but c, a and zebra
    assert lines == 1 / 2  # "the cat sat" is new, the dog's line is not; the unfinished ones do not count
    assert copied == len(b"at\nthe dog sat on the log\nthe c")  # after "mat", as after "sat"
    assert describe([b"t sat\na zebra\nthe"], [b"the ca"], TEXT)[2] == 1.0  # the end of a line is no line
    assert all(math.isnan(x) for x in describe([b""], [b"\n"], TEXT)[:3])
    assert math.isnan(bits_per_byte(NGramJudge(TEXT), [b""], [b"\n"])[0])


def test_yardsticks_are_ordered(tmp_path):
    texts = [line + "\n" for line in TEXT.decode().splitlines() * 20]
    source = tmp_path / "text.txt"
    source.write_text("".join(texts))
    corpus = data.prepare([str(source)], data.train_bpe(texts, 270), tmp_path / "tokens")
    judge = NGramJudge(TEXT)
    rows = yardsticks(corpus, 8, 12)
    score = {name: bits_per_byte(judge, *row)[0] for name, row in rows.items()}
    (texts, before), held_out = rows["held-out text"], text_of(corpus.tokenizer, corpus.val.tolist())
    assert b"".join(texts) == held_out[: sum(map(len, texts))] and before == [b"\n", *texts[:-1]]
    assert score["held-out text"] < score["bigram samples"] < score["unigram samples"]
    assert score["held-out text"] < score["words shuffled"]


def test_a_lone_surrogate_in_other_texts(text, tmp_path, monkeypatch, capsys):
    """It is no character, but it does not stop the judge."""
    call(data.main, f"--data {text} --vocab-size 280 --out tokens", monkeypatch, tmp_path)
    monkeypatch.setattr(data, "documents", lambda source: ["Line 1: the cat \ud800 sat"])
    monkeypatch.setattr("sys.argv", ["judge", "--model", "", "--data", "tokens", "--texts", "other.jsonl"])
    script.main()
    assert "other.jsonl" in capsys.readouterr().out
