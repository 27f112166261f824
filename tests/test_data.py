"""Documents, tokenizers and token files."""

import json
import os
import unicodedata
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

import data
from extras import definitions

TEXT = "The quick brown fox jumps over the lazy dog. " * 30
ODD = "naïve 数据 🙂 x_1 = 12345\t\r\n  don't  <|endoftext|>\u00a0end "


def prepare(source, vocab_size, folder):
    return data.prepare(source, data.make_tokenizer("bpe", vocab_size, source), folder)


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_bpe([TEXT], 300)


def test_bpe_is_lossless_and_compresses(tokenizer):
    for text in (TEXT, ODD, "", " "):
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert len(tokenizer.encode_ordinary(TEXT)) < len(TEXT) / 3
    assert tokenizer.n_vocab <= 300 and tokenizer.decode([tokenizer.n_vocab - 1]) == data.PAD


def test_bpe_merges_the_most_frequent_pair_first():
    tokenizer = data.train_bpe(["abab abab abab cd"], 261)
    assert [tokenizer.decode_single_token_bytes(i) for i in (256, 257, 258)] == [b"ab", b"abab", b" abab"]


def test_bpe_counts_overlaps_correctly():
    """Against a slow trainer that recounts every pair before every merge."""
    text = "aaa aaaa banana bandana nab " * 3 + "abba baab"
    fast = data.train_bpe([text], 275)
    words = [list(w.encode()) for w in data.re.findall(data.SPLIT, text)]
    spelling = {i: bytes([i]) for i in range(256)}
    while len(spelling) < fast.n_vocab - 2:
        pairs = Counter(p for w in words for p in pairwise(w))
        best = min(pairs, key=lambda p: (-pairs[p], p))
        new = len(spelling)
        spelling[new] = spelling[best[0]] + spelling[best[1]]
        for w in words:
            i = 0
            while i < len(w) - 1:
                if (w[i], w[i + 1]) == best:
                    w[i : i + 2] = [new]
                i += 1
    assert [fast.decode_single_token_bytes(i) for i in spelling] == list(spelling.values())


def test_tokenizer_json_round_trip(tokenizer, tmp_path):
    data.save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    loaded = data.load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert loaded.encode(TEXT + ODD, allowed_special="all") == tokenizer.encode(TEXT + ODD, allowed_special="all")
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    for a, b in raw["model"]["merges"]:  # every merge makes a token from two earlier ones
        assert max(vocab[a], vocab[b]) < vocab[a + b]


def test_order_of_the_vocabulary_does_not_matter(tokenizer, tmp_path):
    file = tmp_path / "tokenizer.json"
    data.save_tokenizer(tokenizer, file)
    saved = file.read_text()
    raw = json.loads(saved)
    raw["model"]["vocab"] = dict(reversed(raw["model"]["vocab"].items()))
    file.write_text(json.dumps(raw))
    data.save_tokenizer(data.load_tokenizer(str(file)), file)
    assert file.read_text() == saved


def test_ids_must_be_unique(tokenizer, tmp_path):
    file = tmp_path / "tokenizer.json"
    data.save_tokenizer(tokenizer, file)
    raw = json.loads(file.read_text())
    raw["added_tokens"][0]["id"] = 65
    file.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="two tokens have the same id"):
        data.load_tokenizer(str(file))


def test_released_tokenizer_layout(tokenizer, tmp_path):
    """Merges as strings, added tokens with gaps between their ids, as in the OLMo 2 file."""
    data.save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["model"]["merges"] = [" ".join(merge) for merge in raw["model"]["merges"]]
    raw["added_tokens"].append(dict(id=400, content="<|im_start|>", special=False))
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    loaded = data.load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert data.encode_prompt(loaded, "<|im_start|>fox")[0] == 400
    assert data.decode_bytes(loaded, [400, 399, 65]) == b"<|im_start|>A"  # 399 is a gap


@pytest.mark.parametrize("change", ["{", "[]", '{"model": {"type": "WordPiece"}, "added_tokens": []}'])
def test_unusable_tokenizer_files(tmp_path, change):
    (tmp_path / "tokenizer.json").write_text(change)
    with pytest.raises(ValueError, match="is not a byte-level BPE tokenizer"):
        data.load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_unknown_tokenizer_name():
    with pytest.raises(ValueError, match="neither a tokenizer.json nor one of"):
        data.load_tokenizer("no-such-tokenizer")


def test_half_a_surrogate_pair_is_replaced_where_it_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude42 \\udc00"}\n')
    assert list(data.documents([tmp_path / "a.jsonl"])) == ["a\ufffdb \U0001f642 \ufffd"]


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "real").write_text("one\n")
    (tmp_path / "link.txt").symlink_to("real")
    for name in (tmp_path / "pipe.txt", "/dev/zero", "/dev/null"):
        with pytest.raises(ValueError, match=f"{name} is not a regular file"):
            next(data.documents([name]))
    assert list(data.documents([tmp_path])) == list(data.documents([tmp_path / "link.txt"])) == ["one\n"]


def test_definitions():
    """Two entries as WordNet writes them, below a line of its licence."""
    lines = [
        "  1 This software and database is being provided to you, the LICENSEE, by  \n",
        '00058743 04 n 02 flat_out 0 flight 1 010 @ 0004 | the act of escaping; a flight; "his flight was | guilt"  \n',
        "00001740 00 a 01 able(p) 0 005 = 05200169 n 0000 | having means or skill  \n",
    ]
    assert list(definitions.definitions(lines)) == [
        "flat out: the act of escaping; a flight",
        "able: having means or skill",
    ]


def test_built_in_text_is_split_by_document(tmp_path):
    corpus = prepare(["names"], 512, tmp_path)
    texts = [
        {corpus.tokenizer.decode(part.tolist()) for part in np.split(tokens, np.where(tokens == eot)[0] + 1)}
        for tokens, eot in [(corpus.train, corpus.tokenizer.eot_token), (corpus.val, corpus.tokenizer.eot_token)]
    ]
    assert not (texts[0] & texts[1]) - {""}
    assert 0.02 < len(corpus.val) / len(corpus.train) < 0.1
    everything = set(text for text in data.documents(["names"]))
    assert all(text.removesuffix(data.END_OF_TEXT) in everything for text in list(texts[1])[:50] if text)


def test_names_are_those_of_single_characters():
    names = data.unicode_names()
    assert len(names) == len(set(names)) > 24_000
    assert all(unicodedata.lookup(name) for name in names[:1000])
    assert "greek small letter alpha with tonos" in names
    assert not any(name.startswith(("cjk unified", "hangul syllable", "tangut")) for name in names)


def test_files_folders_and_jsonl(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("one\n", encoding="utf-8-sig")
    (tmp_path / "sub" / "b.md").write_text("two")
    (tmp_path / "c.jsonl").write_text('{"text": "three"}\n\n{"text": "four", "id": 4}\n')
    (tmp_path / "ignored.png").write_bytes(b"\xff")
    assert list(data.documents([tmp_path])) == ["one\n", "three", "four", "two"]
    assert list(data.documents([tmp_path / "c.jsonl", tmp_path / "a.txt"])) == ["three", "four", "one\n"]


def test_documents_of_a_text_are_separated(tmp_path, capsys):
    """By blank lines, or by lines of one's own choice; each has an end in the tokens."""
    (tmp_path / "A.TXT").write_text("one\ntwo\n\n \nthree\n***\nfour")
    (tmp_path / "b.gz").write_bytes(b"\xff")
    assert list(data.documents([tmp_path])) == ["one\ntwo\n", "three\n***\nfour"]
    assert "only .txt, .md, .jsonl are read, not b.gz" in capsys.readouterr().err
    assert list(data.documents([tmp_path / "A.TXT"], "***")) == ["one\ntwo\n\n \nthree\n", "four"]
    (tmp_path / "many.txt").write_text("\n\n".join(f"text {i}" for i in range(100)))
    corpus = prepare([tmp_path / "many.txt"], 258, tmp_path / "many")
    n_ends = sum(int((tokens == corpus.tokenizer.eot_token).sum()) for tokens in (corpus.train, corpus.val))
    shown = capsys.readouterr()
    assert n_ends == 100 and "100 documents" in shown.out and "warning" not in shown.err
    (tmp_path / "one.txt").write_text("\n".join(f"text {i}" for i in range(100)))
    prepare([tmp_path / "one.txt"], 258, tmp_path / "one")
    shown = capsys.readouterr()
    assert "1 documents" in shown.out and "warning: the training text holds no end of a document" in shown.err


def test_a_small_text_is_told_which_sizes_fit():
    data.check_length(1024, 128, 8, 128)
    for n_train, n_val, fits in [(1023, 999, "7 --seq-len 128"), (500, 30, "8 --seq-len 16"), (3, 1, "3 --seq-len 1")]:
        with pytest.raises(ValueError, match=f"use more text, or --batch-size {fits}"):
            data.check_length(n_train, n_val, 8, 128)
        batch_size, _, length = fits.split()
        data.check_length(n_train, n_val, int(batch_size), int(length))


def test_long_files_are_cut_and_nothing_is_lost(tmp_path):
    text = "".join(f"line {i}\n" for i in range(20_000)) + "x" * 200_000
    (tmp_path / "a.txt").write_text(text)
    pieces = list(data.documents([tmp_path / "a.txt"]))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= data.PIECE and len(pieces) > 4


def test_prepared_tokens_hold_the_whole_text(tmp_path):
    texts = [f"document {i} says la{i % 7 * ' la'}" for i in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in texts))
    corpus = prepare([tmp_path / "a.jsonl"], 300, tmp_path / "tokens")
    both = [corpus.tokenizer.decode(tokens.tolist()) for tokens in (corpus.train, corpus.val)]
    assert sorted("".join(both).split(data.END_OF_TEXT)[:-1]) == sorted(texts)
    assert corpus.train.dtype == np.uint32 and isinstance(corpus.train, np.memmap)
    again = data.open_tokens(tmp_path / "tokens")
    assert np.array_equal(again.train, corpus.train) and np.array_equal(again.val, corpus.val)


def test_few_documents_are_held_out_in_part(tmp_path):
    """However the hashes of a few documents fall, about one token in twenty is held out."""
    for i in range(12):
        folder = tmp_path / str(i)
        folder.mkdir()
        for k in range(i % 3 + 1):
            (folder / f"{k}.txt").write_text(f"{i} {k} " + TEXT)
        corpus = prepare([folder], 258, folder / "tokens")
        assert 0.01 < len(corpus.val) / (len(corpus.train) + len(corpus.val)) < 0.16


def test_one_short_document_is_split_inside(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    corpus = prepare([tmp_path / "a.txt"], 258, tmp_path / "tokens")
    n = len(corpus.train) + len(corpus.val)
    assert n == len(TEXT) + 1 and len(corpus.val) == int(0.05 * n)
    assert corpus.tokenizer.decode(corpus.train.tolist() + corpus.val.tolist()) == TEXT + data.END_OF_TEXT


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "there is no text"),
        ("a.txt", b" \n\n", "there is no text"),
        ("a.txt", b"fine so far \xff\xfe", "a.txt is not UTF-8 text: see line 1"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": 1}\n', "a.jsonl line 2 is not an object"),
        ("a.jsonl", b"nonsense\n", "a.jsonl line 1 is not an object"),
    ],
)
def test_unreadable_text(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare([tmp_path / name], 300, tmp_path / "tokens")
    assert not (tmp_path / "tokens" / "train.bin").exists()


def test_missing_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        list(data.documents([tmp_path / "nowhere"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no .txt, .md or .jsonl file"):
        list(data.documents([tmp_path / "empty"]))


def test_damaged_token_files(tmp_path, tokenizer):
    data.save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    good, bad = np.arange(50, dtype=np.uint32), np.array([1, 300], dtype=np.uint32)
    good.tofile(tmp_path / "train.bin")
    for content, message in [(b"abc", "truncated"), (b"", "truncated"), (bad.tobytes(), "token id 300, outside the")]:
        (tmp_path / "val.bin").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            data.open_tokens(tmp_path)
    good.tofile(tmp_path / "val.bin")
    data.open_tokens(tmp_path)


def test_long_words_take_no_longer_than_others():
    """Pieces are cut at 32 characters; as one piece, this text would take minutes."""
    text = "a" * 300_000 + " " * 300_000 + "=" * 300_000
    tokenizer = data.train_bpe([text], 300)
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_batches():
    tokens = np.arange(1000, dtype=np.uint32)
    batch = data.random_batch(tokens, 8, 10, seed=1, step=5)
    assert batch.shape == (8, 10) and batch.dtype == torch.int64
    assert ((batch - batch[:, :1]) == torch.arange(10)).all()
    assert torch.equal(batch, data.random_batch(tokens, 8, 10, seed=1, step=5))
    assert not torch.equal(batch, data.random_batch(tokens, 8, 10, seed=1, step=6))
    assert data.even_batch(tokens, 4, 10)[:, 0].tolist() == [0, 330, 660, 990]
    starts = data.random_batch(tokens[:11], 200, 10, seed=0, step=0)[:, 0]
    assert set(starts.tolist()) == {0, 1}  # the last window is reached, none runs over the end
