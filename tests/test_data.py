"""Documents, tokenizers and token files."""

import hashlib
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
    assert loaded.encode_ordinary("<|im_start|>fox")[0] == 400
    assert data.decode_bytes(loaded, [400, 399, 65]) == b"<|im_start|>A"  # 399 is a gap


# The ids that the `tokenizers` library gives: 0.23.3, add_special_tokens=False, with encode_special_tokens and without.
MIXED = "abcd xyz bcd abcxyz,xyz<|endoftext|>quickquiz <|im|>é  12345"
MIXED_IDS = """257 100 32 120 121 122 32 98 99 100 32 257 120 121 122 44 259 60 124 101 110 100 111 102 116 101 120 116
    124 62 402 401 105 122 32 400 195 169 32 32 49 50 51 52 53"""
END_IDS = "60 124 101 110 100 111 102 116 101 120 116 124 62"


@pytest.fixture
def mixed(tmp_path):
    """A tokenizer.json with words that no merge makes, "bcd" and "xyz", and added ones that are not special."""
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256, b"abc": 257, b"bcd": 258, b"xyz": 259}
    added = {data.END_OF_TEXT: 260, "<|im|>": 400, "qu": 401, "quick": 402}
    tokenizer = data.Tokenizer(data.SPLIT, ranks, added, words=added.keys() - {data.END_OF_TEXT})
    data.save_tokenizer(tokenizer, tmp_path / "a.json")
    return tmp_path / "a.json"


def changed(file, *path, **values):
    """The tokenizer of the file, with these values in the object at the path."""
    raw = json.loads(file.read_text())
    place = raw
    for name in path:
        place = place[name]
    place.update(values)
    other = file.with_name("changed.json")
    other.write_text(json.dumps(raw))
    return data.load_tokenizer(str(other))


GPT2 = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True)
SPLIT_PLACE = ("pre_tokenizer", "pretokenizers", 0)


def test_tokens_are_those_of_the_tokenizers_library(mixed):
    """Three spellings that the library reads alike; and what is read is written as it was."""
    ids = [int(i) for i in MIXED_IDS.split()]
    for tokenizer in (
        data.load_tokenizer(str(mixed)),
        changed(mixed, *SPLIT_PLACE, behavior="Removed", invert=True),  # as converted from tiktoken
        changed(mixed, pre_tokenizer=GPT2, post_processor=GPT2, normalizer=dict(type="Sequence", normalizers=[])),
    ):
        assert tokenizer.encode_ordinary(MIXED) == ids
        special = " ".join(map(str, tokenizer.encode_ordinary(MIXED, special_tokens=True)))
        assert special == " ".join(MIXED_IDS.split()).replace(END_IDS, "260")
        assert tokenizer.decode(ids) == MIXED
    saved = json.loads(mixed.read_text())
    assert saved["model"]["merges"] == [["a", "b"], ["ab", "c"]]
    assert saved["model"]["vocab"]["<|im|>"] == 400  # or the library would take the first id that is free
    assert [token["content"] for token in saved["added_tokens"] if token["special"]] == [data.END_OF_TEXT]
    data.save_tokenizer(data.load_tokenizer(str(mixed)), mixed.with_name("again.json"))
    assert json.loads(mixed.with_name("again.json").read_text()) == saved


def test_training_text_and_prompts_have_the_same_ordinary_tokens(mixed, tmp_path):
    (tmp_path / "a.txt").write_text(MIXED, encoding="utf-8")
    corpus = data.prepare([tmp_path / "a.txt"], data.load_tokenizer(str(mixed)), tmp_path / "tokens")
    assert [*corpus.train, *corpus.val][:-1] == data.prompt_ids(corpus.tokenizer, [MIXED])[0]
    other = data.Tokenizer(data.SPLIT, corpus.tokenizer.ranks, corpus.tokenizer.added)
    with pytest.raises(ValueError, match="tokenized differently"):
        data.check_same(corpus.tokenizer, other)


def sequence(*parts):
    return dict(pre_tokenizer=dict(type="Sequence", pretokenizers=list(parts)))


SPLIT = dict(type="Split", pattern=dict(Regex=data.SPLIT), behavior="Isolated", invert=False)
BYTES = GPT2 | dict(use_regex=False)
DIGITS = dict(type="Digits", individual_digits=True)
PUNCTUATION = dict(type="Punctuation", behavior="Isolated")
ADDED, MODEL, END = ("added_tokens", 1), ("model",), dict(id=260, content=data.END_OF_TEXT)


@pytest.mark.parametrize(
    "path, values, message",
    [
        ((), sequence(PUNCTUATION, GPT2, DIGITS, SPLIT), r"Punctuation \+ ByteLevel \+ Digits \+ Split is not"),
        ((), sequence(SPLIT, SPLIT, BYTES), r"pre_tokenizer Split \+ Split \+ ByteLevel is not supported"),
        ((), sequence(SPLIT), "pre_tokenizer Split is not supported"),
        ((), sequence(SPLIT, GPT2), "ByteLevel: use_regex true is not supported, only false"),
        ((), sequence(BYTES), "ByteLevel: use_regex false is not supported, only true"),
        ((), dict(pre_tokenizer=dict(type="WhitespaceSplit")), "pre_tokenizer WhitespaceSplit is not supported"),
        ((), dict(pre_tokenizer=GPT2 | dict(add_prefix_space=True)), "ByteLevel: add_prefix_space true is not"),
        (SPLIT_PLACE, dict(behavior="Removed"), 'Split: behavior "Removed" is not supported, only "Isolated"'),
        (SPLIT_PLACE, dict(behavior="MergedWithPrevious"), 'Split: behavior "MergedWithPrevious" is not supported'),
        (SPLIT_PLACE, dict(invert=True), 'Split: behavior "Isolated" is not supported, only "Removed"'),
        (SPLIT_PLACE, dict(pattern=dict(String=" ")), "Split pattern: String"),
        (SPLIT_PLACE, dict(pattern=dict(Regex=r"\d{3}")), "passes over part of"),
        (SPLIT_PLACE, dict(pattern=dict(Regex=r"[^é]")), "passes over part of 'é'"),
        (SPLIT_PLACE, dict(pattern=dict(Regex=r"[^Ж]")), "passes over part of"),
        (SPLIT_PLACE, dict(pattern=dict(Regex=r"x*|(?s:.)")), "matches the empty string"),
        (SPLIT_PLACE, dict(pattern=dict(Regex=r"(?s:.+)|$")), "matches the empty string"),
        (SPLIT_PLACE, dict(pattern=dict(Regex="")), "the split pattern is empty"),
        (SPLIT_PLACE, dict(pattern=dict(Regex="(")), "the split pattern cannot be used"),
        ((), dict(normalizer=dict(type="NFC")), 'tokenizer: normalizer {"type": "NFC"} is not supported'),
        ((), dict(truncation=dict(max_length=8)), "tokenizer: truncation"),
        ((), dict(padding=dict(pad_id=8)), "tokenizer: padding"),
        ((), dict(decoder=dict(type="BPEDecoder", suffix="</w>")), 'decoder: type "BPEDecoder" is not supported'),
        ((), dict(something=1), "tokenizer: something 1 is not supported"),
        (MODEL, dict(type="Unigram"), 'model: type "Unigram" is not supported, only "BPE"'),
        (MODEL, dict(end_of_word_suffix="</w>"), 'model: end_of_word_suffix "</w>" is not supported'),
        (MODEL, dict(continuing_subword_prefix="##"), 'model: continuing_subword_prefix "##" is not supported'),
        (MODEL, dict(dropout=0.1), "model: dropout 0.1 is not supported"),
        (MODEL, dict(fuse_unk=True), "model: fuse_unk true is not supported"),
        (MODEL, dict(byte_fallback=True), "model: byte_fallback true is not supported"),
        (MODEL, dict(ignore_merges=False), "no merge makes the token 'bcd'"),
        (MODEL, dict(merges=["a b"]), r"merge 1 is None, where the order of the ids asks for \['ab', 'c'\]"),
        (MODEL, dict(merges=["a b", "a bc"]), r"merge 1 is \['a', 'bc'\], where the order of the ids asks for"),
        (MODEL, dict(merges=["ab c", "a b"]), "merge 0 is"),
        (MODEL, dict(merges=["a b", "ab c", "x y"]), r"merge 2 is \['x', 'y'\], where .* asks for None"),
        (ADDED, dict(content=""), "the content of an added token is empty"),
        (ADDED, dict(content=3), "the content of an added token is empty or no text"),
        (("model", "vocab"), dict(xyz=258), "two tokens have the same id, or one has two"),
        ((), dict(added_tokens=[END, dict(id=500, content="abc")]), "two tokens have the same id, or one has two"),
        ((), dict(added_tokens=[END, dict(id=500, content="new"), dict(id=501, content="new")]), "or one has two"),
        (ADDED, dict(id=-1), "an id is not a number from 0 to 2"),
        (ADDED, dict(lstrip=True), r"added token '<\|im\|>': lstrip true is not supported, only false"),
        (ADDED, dict(rstrip=True), "rstrip true is not supported"),
        (ADDED, dict(single_word=True), "single_word true is not supported"),
        (("added_tokens", 0), dict(content="<eos>"), r"there is no token <\|endoftext\|>"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(mixed, path, values, message):
    with pytest.raises(ValueError, match=message):
        changed(mixed, *path, **values)


def test_fields_that_make_no_difference(mixed):
    ids = [int(i) for i in MIXED_IDS.split()]
    assert changed(mixed, *ADDED, normalized=True).encode_ordinary(MIXED) == ids
    assert changed(mixed, *MODEL, unk_token="a", end_of_word_suffix="").encode_ordinary(MIXED) == ids


@pytest.mark.parametrize("change", ["{", "[]", '{"added_tokens": []}'])
def test_unusable_tokenizer_files(tmp_path, change):
    (tmp_path / "tokenizer.json").write_text(change)
    with pytest.raises(ValueError, match="is not a byte-level BPE tokenizer"):
        data.load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_unknown_tokenizer_name():
    with pytest.raises(ValueError, match="neither a tokenizer.json nor one of"):
        data.load_tokenizer("no-such-tokenizer")


def test_special_tokens_in_a_prompt_are_text_unless_asked_for(tokenizer):
    prompt = "fox<|endoftext|>"
    (ids,), (special,) = (data.prompt_ids(tokenizer, [prompt], asked) for asked in (False, True))
    assert tokenizer.eot_token not in ids and tokenizer.decode(ids) == prompt
    assert special == [*tokenizer.encode_ordinary("fox"), tokenizer.eot_token]


@pytest.mark.parametrize("pattern", [data.SPLIT, data.GPT2_SPLIT, r"\S+(?!\S)|\s+"])
@pytest.mark.parametrize("unit", [" ", "=", "\n", "ab"])
def test_long_runs(pattern, unit):
    """A run of a million may be too much for tiktoken's regex engine; up to PIECE, nothing is cut."""
    ranks = {bytes([b]): b for b in range(256)} | {b"  ": 256, b"==": 257, b"\n\n": 258, b"ab": 259}
    tokenizer = data.Tokenizer(pattern, ranks, {data.END_OF_TEXT: 260})
    text = unit * (1_100_000 // len(unit)) + "."
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    short = "x" + unit * (data.PIECE // len(unit) - 2) + " ."
    whole = data.tiktoken.Encoding.encode_ordinary(tokenizer, short)
    assert tokenizer.encode_ordinary(short) == whole


def test_half_a_surrogate_pair_is_replaced_where_it_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude42 \\udc00"}\n')
    assert list(data.documents([tmp_path / "a.jsonl"])) == ["a\ufffdb \U0001f642 \ufffd"]


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "real").write_text("one\n")
    (tmp_path / "link.txt").symlink_to("real")
    for name in (tmp_path / "pipe.txt", "/dev/zero", "/dev/null"):
        with pytest.raises(ValueError, match=f"{name} is not a file but a folder, a pipe or a device"):
            next(data.documents([name]))
    os.rename(tmp_path / "pipe.txt", tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="pipe.json is not a file but a folder, a pipe or a device"):
        data.load_tokenizer(str(tmp_path / "pipe.json"))
    assert list(data.documents([tmp_path])) == list(data.documents([tmp_path / "link.txt"])) == ["one\n"]


def test_another_tokenizer_in_a_token_folder_is_noticed(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    corpus = prepare([tmp_path / "a.txt"], 300, tmp_path / "tokens")
    hashed = hashlib.sha256((tmp_path / "tokens" / "tokenizer.json").read_bytes()).hexdigest()
    assert (tmp_path / "tokens" / "tokenizer.sha256").read_text() == f"{hashed}  tokenizer.json\n"
    ranks = corpus.tokenizer.ranks | {b"the": corpus.tokenizer.ranks[b"he"]}  # as many ids, other tokens
    ranks = {token: i for token, i in ranks.items() if token != b"he"}
    other = data.Tokenizer(data.SPLIT, ranks, corpus.tokenizer.added)
    data.save_tokenizer(other, tmp_path / "tokens" / "tokenizer.json")
    with pytest.raises(ValueError, match="tokenizer.json is not the one of these tokens"):
        data.open_tokens(tmp_path / "tokens")
    (tmp_path / "tokens" / "tokenizer.sha256").unlink()  # as in older folders
    assert data.open_tokens(tmp_path / "tokens").tokenizer.ranks == ranks


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
    assert len(list(data.documents([tmp_path], warn=False))) == 2 and not capsys.readouterr().err
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
