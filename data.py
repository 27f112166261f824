"""Text -> tokens: documents, tokenizers, token files, batches.

    python data.py --data my_texts/ notes.jsonl --out tokens      # prepare a corpus of any size once
    python train_vae.py --data tokens

Tokenizers are byte-level BPE on top of tiktoken: trained on the corpus, read from a `tokenizer.json`, or one of
tiktoken's own.  Token files are flat uint32 arrays (100,278 ids do not fit into 16 bits), memory-mapped.
"""

if __name__ == "__main__":
    import extras.quiet  # noqa: F401

import codecs
import contextlib
import functools
import heapq
import json
import math
import numbers
import operator
import re
import reprlib
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path

import numpy as np
import tiktoken
import torch

from common import check_new, check_regular, file_hash, first_process_first, rank, replacing, run_script
from options import option, parse_options

# ----------------------------------------------------------------------------------------------------------------------
# Documents

PIECE = 1 << 16  # characters; longer documents are cut at line ends, and each piece counts as one of its own
SUFFIXES = (".txt", ".md", ".jsonl")  # that folders are searched for


def documents(source, separator="", warn=True):
    """Yield the documents of a corpus: source is a list of files, of folders, and of "names", a text that comes with
    Python (`unicode_names`).

    .jsonl files hold one {"text": ...} a line, in which half a surrogate pair becomes U+FFFD; every other file is UTF-8
    text, whose documents are separated by lines that hold nothing but the separator, so by blank lines if that is
    empty.  Nothing is held in memory but the current piece.  Other files of a folder than SUFFIXES are named on stderr,
    unless warn is False.
    Raises ValueError or FileNotFoundError for what cannot be read."""
    for name in source:
        if name in BUILT_IN:
            if Path(name).exists():
                raise ValueError(f"{name} is a text that comes with Python, and also a file or folder: write ./{name}")
            yield from BUILT_IN[name]()
            continue
        path = Path(name)
        if not str(name):
            raise ValueError("the name of a text is empty")
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        files, others = [], []
        for file in sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]:
            known = file == path or file.suffix.lower() in SUFFIXES
            files.append(file) if known else others.append(file.name)
        if warn and others:
            some = ", ".join(others[:5]) + f" and {len(others) - 5:,} more" * (len(others) > 5)
            print(f"warning: in {path} only {', '.join(SUFFIXES)} are read, not {some}", file=sys.stderr)
        if not files:
            raise ValueError(f"{path} holds no .txt, .md or .jsonl file")
        for file in files:
            yield from jsonl_documents(file) if file.suffix.lower() == ".jsonl" else text_pieces(file, separator)


@contextlib.contextmanager
def open_text(file):
    """The file as UTF-8 text, open for reading.  Raises ValueError with the number of the first line that is not, and
    for a pipe or a device, which may have no end and cannot be read twice."""
    check_regular(file)
    with open(file, encoding="utf-8-sig") as f:
        try:
            yield f
        except UnicodeDecodeError:
            with open(file, "rb") as raw:
                number = next(i for i, line in enumerate(raw, 1) if line.decode("utf-8", "ignore").encode() != line)
            raise ValueError(f"{file} is not UTF-8 text: see line {number}") from None


def text_pieces(file, separator):
    with open_text(file) as f:
        piece, size = [], 0
        while line := f.readline(PIECE):
            ends = line.strip() == separator
            if size and (ends or size + len(line) > PIECE):
                yield "".join(piece)
                piece, size = [], 0
            if not ends:
                piece.append(line)
                size += len(line)
        if size:
            yield "".join(piece)


def numbered_objects(file, kind=dict):
    """Yield number and object of every line of a JSONL file that is not blank; None in place of another kind than this,
    or these."""
    with open_text(file) as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    content = json.loads(line)
                except (ValueError, RecursionError):
                    content = None
                yield number, content if isinstance(content, kind) else None


def jsonl_documents(file):
    for number, content in numbered_objects(file):
        text = None if content is None else content.get("text")
        if not isinstance(text, str):
            raise ValueError(f'{file} line {number} is not an object with a "text" string')
        yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as tiktoken does


# Kinds of characters that are numbered, or named by a rule, hundreds or thousands at a time.
NUMBERED = ("CJK", "HANGUL SYLLABLE", "CUNEIFORM SIGN", "TANGUT", "NUSHU", "KHITAN", "EGYPTIAN", "ANATOLIAN", "LINEAR")
NUMBERED += ("BAMUM", "VAI", "YI", "MENDE", "DUPLOYAN", "BYZANTINE", "SIGNWRITING", "COMPATIBILITY", "VARIATION")


@functools.cache
def unicode_names():
    """A list of the names of Unicode characters in small letters, such as "greek small letter alpha with tonos".

    In the order of a hash: in that of the code points, neighbours are alike.  Newer versions of Python have more."""
    names = (unicodedata.name(chr(i), "") for i in range(sys.maxunicode + 1))
    names = [name.lower() for name in names if name and not name.startswith(NUMBERED)]
    return sorted(names, key=lambda name: (zlib.crc32(name.encode()), name))


BUILT_IN = dict(names=unicode_names)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
# Words with their leading space, numbers of up to three digits, punctuation, white space.  Written so that Python's re,
# tiktoken's regex engine and that of the `tokenizers` library all read it alike.
# No piece is longer than 32 characters: time grows with the square of a piece's length.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]{1,32}| ?\d{1,3}| ?(?:[^\s\w]|_){1,32}|\s{1,32}(?!\S)|\s{1,32}"
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Runs of white space, or of anything else, are cut at PIECE: tiktoken's regex engine gives up at a million.
RUN = re.compile(rf"\s{{1,{PIECE}}}|\S{{1,{PIECE}}}")


class Tokenizer(tiktoken.Encoding):
    """Byte-level BPE, with tokens of their own for certain texts: `added`, a dict of ids.

    words: which of the added are vocabulary like any other, and found wherever they are written.  The others are
    special: in a text they are text, unless it is said that they count."""

    def __init__(self, pattern, ranks, added, words=()):
        super().__init__("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=added)
        self.pattern, self.ranks, self.added, self.words = pattern, ranks, added, frozenset(words)

    def encode_ordinary(self, text, special_tokens=False):
        """Ids of a text.  special_tokens: those written out in it, such as <|endoftext|>, count as such."""
        names, ids = sorted(self.added if special_tokens else self.words, key=len, reverse=True), []
        for part in re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]:
            if part in names:
                ids.append(self.added[part])
                continue
            runs = RUN.finditer(part) if len(part) > PIECE else []
            cuts = [0, *(run.end() for run in runs if len(run[0]) == PIECE), len(part)]
            for start, end in pairwise(cuts):
                ids += super().encode_ordinary(part[start:end])
        return ids


def train_bpe(texts, vocab_size):
    """Byte-level BPE: start from the 256 bytes and merge the most frequent neighbours until the vocabulary is full.

    texts: iterable of str.  vocab_size counts the bytes, the merges and two special tokens; <|pad|> has the last id.
    Returns a Tokenizer; a small corpus may fill less than vocab_size.  Pair counts are updated in place, so 2 MB of
    text take seconds."""
    if vocab_size < 258:
        raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes and 2 special tokens need 258")
    counts = Counter(word for text in texts for word in re.findall(SPLIT, text))
    words = [list(word.encode("utf-8", errors="replace")) for word in counts]
    weight = list(counts.values())
    pair_count, pair_words = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pair_count[pair] += weight[i]
            pair_words[pair].add(i)
    token_bytes = [bytes([b]) for b in range(256)]
    queue = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(queue)
    while queue and len(token_bytes) < vocab_size - 2:
        count, pair = heapq.heappop(queue)
        if -count != pair_count[pair]:  # an entry from before a merge changed this count: put it back where it belongs
            if pair_count[pair] > 0:
                heapq.heappush(queue, (-pair_count[pair], pair))
            continue
        if -count < 2:  # a merge seen once is no regularity
            break
        new = len(token_bytes)
        token_bytes.append(token_bytes[pair[0]] + token_bytes[pair[1]])
        grown = set()
        for i in pair_words.pop(pair):
            old, merged, j = words[i], [], 0
            while j < len(old):
                if j + 1 < len(old) and (old[j], old[j + 1]) == pair:
                    merged.append(new)
                    j += 2
                else:
                    merged.append(old[j])
                    j += 1
            for p in pairwise(old):
                pair_count[p] -= weight[i]
            for p in pairwise(merged):
                pair_count[p] += weight[i]
                pair_words[p].add(i)
                if new in p:
                    grown.add(p)
            words[i] = merged
        for p in grown:
            heapq.heappush(queue, (-pair_count[p], p))
    n = len(token_bytes)
    ranks = {token: rank for rank, token in enumerate(token_bytes)}
    return Tokenizer(SPLIT, ranks, {END_OF_TEXT: n, PAD: n + 1})


# tokenizer.json spells every byte as one printable character: itself if it is printable, else 256 and up in order.
BYTE_TO_CHAR = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
BYTE_TO_CHAR |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in BYTE_TO_CHAR)}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


def load_tokenizer(name):
    """A Tokenizer from the path of a tokenizer.json, or from one of tiktoken's names, such as cl100k_base (which
    tiktoken downloads once), with <|pad|> added as the last id."""
    if Path(name).suffix == ".json":
        return read_tokenizer_json(Path(name))
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"{name} is neither a tokenizer.json nor one of {', '.join(tiktoken.list_encoding_names())}")
    try:
        base = tiktoken.get_encoding(name)
    except Exception as error:  # whatever the download raises
        raise ValueError(f"tiktoken could not get {name}: {type(error).__name__}") from None
    return Tokenizer(base._pat_str, base._mergeable_ranks, base._special_tokens | {PAD: base.n_vocab})


def read_tokenizer_json(path):
    """Byte-level BPE in the format of the `tokenizers` library, as it encodes with add_special_tokens=False: so what a
    post-processor would add makes no difference.  Raises ValueError with the name of what would make other tokens."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    with open_text(path) as f:
        text = f.read()
    try:
        raw = json.loads(text)
        model, tokens = raw["model"], raw["added_tokens"]
        check_fields(
            "tokenizer", raw, version=ANY, added_tokens=ANY, pre_tokenizer=ANY, post_processor=ANY, decoder=ANY,
            model=ANY, truncation=[None], padding=[None], normalizer=[None, dict(type="Sequence", normalizers=[])],
        )  # fmt: skip
        check_fields("decoder", raw.get("decoder") or {}, **BYTE_LEVEL)
        check_fields(
            "model", model, type=["BPE"], vocab=ANY, merges=ANY, unk_token=ANY,  # no byte is unknown
            dropout=[None, 0], continuing_subword_prefix=[None, ""], end_of_word_suffix=[None, ""],
            fuse_unk=[False], byte_fallback=[False], ignore_merges=[False, True],
        )  # fmt: skip
        for token in tokens:
            check_fields(
                f"added token {token['content']!r}", token, id=ANY, content=ANY, special=[False, True],
                single_word=[False], lstrip=[False], rstrip=[False], normalized=ANY,  # there is no normalizer
            )  # fmt: skip
        pattern = split_pattern(raw["pre_tokenizer"])
        added = {token["content"]: token["id"] for token in tokens}
        words = [token["content"] for token in tokens if not token.get("special")]
        vocab = {token: i for token, i in model["vocab"].items() if added.get(token) != i}
        ranks = {bytes(CHAR_TO_BYTE[c] for c in token): i for token, i in vocab.items()}
        ids = [*ranks.values(), *(token["id"] for token in tokens)]
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise ValueError("an id is not a number from 0 to 2^31")
        if not all(isinstance(text, str) and text for text in added):
            raise ValueError("the content of an added token is empty or no text")
        if END_OF_TEXT not in added:
            raise ValueError(f"there is no token {END_OF_TEXT}, which separates documents")
        if len(ids) > len(set(ids)) or len(added) < len(tokens) or not vocab.keys().isdisjoint(added):
            raise ValueError("two tokens have the same id, or one has two")
        if any(bytes([b]) not in ranks for b in range(256)):
            raise ValueError("the vocabulary must cover all 256 bytes")
        check_merges(ranks, [m if isinstance(m, list) else m.split(" ") for m in model["merges"]], model)
        return Tokenizer(pattern, ranks, added, words)
    except (json.JSONDecodeError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a byte-level BPE tokenizer: {type(error).__name__}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


ANY = None  # of a field that makes no difference
BYTE_LEVEL = dict(type=["ByteLevel"], add_prefix_space=ANY, trim_offsets=ANY, use_regex=ANY)


def check_fields(what, given, **allowed):
    """Raises ValueError for the first given field that has none of the allowed values, or that nobody knows."""
    for name, value in given.items():
        values = allowed.get(name, [])
        if values is not ANY and value not in values:
            only = f", only {' or '.join(map(json.dumps, values))}" if values else ""
            raise ValueError(f"{what}: {name} {json.dumps(value)[:80]} is not supported{only}")


def split_pattern(pre_tokenizer):
    """The pattern whose matches are the words.  Raises ValueError for anything else."""
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    names = [part["type"] for part in parts]
    if names not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise ValueError(f"pre_tokenizer {' + '.join(names)} is not supported, only ByteLevel or Split + ByteLevel")
    byte_level = dict(add_prefix_space=True, use_regex=True) | parts[-1]  # as the library fills them in
    check_fields("ByteLevel", byte_level, **BYTE_LEVEL | dict(add_prefix_space=[False], use_regex=[len(parts) == 1]))
    if len(parts) == 1:
        return GPT2_SPLIT
    kept = dict(behavior=["Isolated"], invert=[False])
    if parts[0]["invert"]:  # throw away what is between the matches, where there is nothing
        kept = dict(behavior=["Removed"], invert=[True])
    check_fields("Split", parts[0], type=["Split"], pattern=ANY, **kept)
    check_fields("Split pattern", parts[0]["pattern"], Regex=ANY)
    check_pattern(parts[0]["pattern"]["Regex"])
    return parts[0]["pattern"]["Regex"]


@functools.cache
def check_pattern(pattern):
    """Raises ValueError unless the matches of a pattern cover a text from end to end, and none is empty."""
    if not pattern or not isinstance(pattern, str):
        raise ValueError("the split pattern is empty")
    try:  # an empty match is token 256 here; in a vocabulary without it, tiktoken panics
        bytes_only = tiktoken.Encoding("probe", pat_str=pattern, special_tokens={}, mergeable_ranks=PROBE_RANKS)
    except ValueError as error:
        raise ValueError(f"the split pattern cannot be used: {error}") from None
    for text in probe_texts():
        ids = bytes_only.encode_ordinary(text)
        if 256 in ids:
            raise ValueError(f"the split pattern {pattern!r} matches the empty string")
        if bytes_only.decode(ids) != text:
            raise ValueError(f"the split pattern {pattern!r} passes over part of {text[:20]!r}")


PROBE_RANKS = {bytes([b]): b for b in range(256)} | {b"": 256}


def probe_texts():
    """Texts that a split pattern must cover: characters of every script, by themselves and among others."""
    letters = [chr(i) for i in (*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 997))]
    sentence = "the cat  sat on 12345 mats,\n\n\tdidn't it?!  \r\n "
    return ["", *letters[:0x250], "".join(letters), " ".join(letters), sentence]


def check_merges(ranks, merges, model):
    """Raises ValueError unless tiktoken, which knows ids but no merges, merges the same.  It finds any token that is a
    whole word; and its merges are the given ones if those are `merges_of` the ids."""
    wanted = merges_of(ranks)
    for i, (given, own) in enumerate(zip_longest(merges, ([*map(spell, pair)] for pair in wanted))):
        if given != own:
            raise ValueError(f"merge {i} is {given}, where the order of the ids asks for {own}")
    if not model.get("ignore_merges") and len(wanted) < len(ranks) - 256:
        alone = min(ranks.keys() - {a + b for a, b in wanted} - {bytes([b]) for b in range(256)}, key=ranks.get)
        raise ValueError(f"no merge makes the token {spell(alone)!r}: that is supported with ignore_merges true only")


def save_tokenizer(tokenizer, path):
    """Write tokenizer.json so that this file and the `tokenizers` library read the same tokenizer back."""
    ranks = tokenizer.ranks
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    split = dict(type="Split", pattern=dict(Regex=tokenizer.pattern), behavior="Isolated", invert=False)
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None)
    model |= dict(fuse_unk=False, byte_fallback=False, ignore_merges=True)  # a word that is a token is that token
    vocab = {spell(token): ranks[token] for token in sorted(ranks, key=ranks.get)}
    vocab |= tokenizer.added  # or the library would number those anew
    model |= dict(vocab=vocab, merges=[[*map(spell, pair)] for pair in merges_of(ranks)])
    added = [
        dict(id=i, content=text) | flags | dict(special=text not in tokenizer.words)
        for text, i in tokenizer.added.items()
    ]
    raw = dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=added,
        normalizer=None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[split, byte_level]),
        post_processor=None,
        decoder=byte_level,
        model=model,
    )
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")


def spell(token):
    return "".join(BYTE_TO_CHAR[b] for b in token)


def merges_of(ranks):
    """The merges, as pairs of bytes, that make tokens out of the tokens that their bytes become otherwise: merge the
    pair of lowest rank first, but not the whole.  Where more than two parts remain, no merge makes the token."""
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, math.inf) for a, b in pairwise(parts)]
            i = pairs.index(min(pairs))
            if pairs[i] == math.inf:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(parts)
    return merges


def check_same(of_text, of_model):
    """Raises ValueError if a text was tokenized by another tokenizer than the model's."""
    if any(getattr(of_text, part) != getattr(of_model, part) for part in ("ranks", "added", "words")):
        raise ValueError("the text was tokenized differently: this model needs text in the tokens of its VAE")


def decode_bytes(tokenizer, ids):
    """UTF-8 bytes of ids; an id that the model has but the tokenizer does not stands for nothing."""
    with contextlib.suppress(KeyError):
        return tokenizer.decode_bytes(ids)  # all at once, if the tokenizer has them all
    parts = []
    for i in ids:
        with contextlib.suppress(KeyError):
            parts.append(tokenizer.decode_single_token_bytes(i))
    return b"".join(parts)


def prompt_ids(tokenizer, prompts, special_tokens=False):
    """The token ids of each prompt.  special_tokens: see `Tokenizer.encode_ordinary`.  Raises ValueError if one is
    neither a str nor a list of ids, and for text without a tokenizer."""
    if not isinstance(prompts, (list, tuple)):
        raise ValueError(f"prompts must be a list, not {type(prompts).__name__}; for one text write [text]")
    if tokenizer is None and any(isinstance(p, str) for p in prompts):
        raise ValueError("this model has no tokenizer.json: give prompts as token ids")
    try:
        return [
            tokenizer.encode_ordinary(p, special_tokens) if isinstance(p, str) else [operator.index(i) for i in p]
            for p in prompts
        ]
    except TypeError:
        raise ValueError("every prompt must be a str or a list of token ids") from None


def check_ids(ids, vocab_size):
    for i in (i for row in ids for i in row):
        if not isinstance(i, numbers.Integral):
            raise ValueError(f"a token id must be an integer, not {reprlib.repr(i)}")
        if not 0 <= i < vocab_size:
            raise ValueError(f"token id {i} is outside the vocabulary 0..{vocab_size - 1}")


def end_ids(eos_id):
    """The set of ids that end a text: of None, of one, or of several.  Raises ValueError for anything else."""
    several = [] if eos_id is None else eos_id if isinstance(eos_id, (list, tuple, set)) else [eos_id]
    try:
        return {operator.index(i) for i in several}
    except TypeError:
        raise ValueError(f"eos_id must be a token id, or several, not {reprlib.repr(eos_id)}") from None


def pad_rows(ids, chunk, pad_id, device):
    """Lists of ids -> (B, L), padded on the right to the longest row and to a multiple of `chunk`."""
    length = -(-max(map(len, ids)) // chunk) * chunk
    return torch.tensor([row + [pad_id] * (length - len(row)) for row in ids], device=device)


class TextStream:
    """Turns the ids of a text into characters, piece by piece: a character may span two blocks."""

    def __init__(self, tokenizer):
        self.tokenizer, self.utf8 = tokenizer, codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(self, ids, last=False):
        """The characters that these ids complete; last: nothing follows."""
        return self.utf8.decode(decode_bytes(self.tokenizer, ids), final=last)


# ----------------------------------------------------------------------------------------------------------------------
# Token files

EVAL_SEQUENCES = 128  # held-out sequences behind an evaluation
HELD_OUT = 0.05  # share of the documents that no training step sees
TOKENIZER_SAMPLE = 1 << 23  # characters that a new tokenizer is trained on


def prepare(source, tokenizer, folder, batch_size=1, seq_len=1, separator=""):
    """Write folder/train.bin, val.bin, tokenizer.json and its hash; the corpus streams through, whatever its size.

    Documents are held out by a hash of their text, so the same text always falls on the same side.  Raises ValueError,
    and writes nothing, if the text is unreadable or cannot fill a batch."""
    folder, counts = Path(folder), [0, 0]  # of documents, training and held out
    with replacing(folder / "train.bin") as train, replacing(folder / "val.bin") as val:
        with open(train, "wb") as train_file, open(val, "wb") as val_file:
            for text in documents(source, separator):
                if text.strip():
                    ids = np.array(tokenizer.encode_ordinary(text) + [tokenizer.eot_token], dtype=np.uint32)
                    held_out = zlib.crc32(text.encode("utf-8", errors="replace")) < HELD_OUT * 2**32
                    ids.tofile(val_file if held_out else train_file)
                    counts[held_out] += 1
        n_val, n = (sum(file.stat().st_size // 4 for file in files) for files in ([val], [train, val]))
        if n == 0:
            raise ValueError(f"there is no text in {' '.join(map(str, source))}")
        if not HELD_OUT / 3 < n_val / n < HELD_OUT * 3:  # few documents: cut at the right place instead
            wanted = max(1, int(HELD_OUT * n))
            move_tail(train, val, wanted - n_val) if n_val < wanted else move_tail(val, train, n_val - wanted)
            n_val = wanted
        check_length(n - n_val, n_val, batch_size, seq_len)
        print(f"{sum(counts):,} documents")
        if tokenizer.eot_token not in np.memmap(train, dtype=np.uint32, mode="r")[: 1 << 24]:
            advice = "separate documents by blank lines, or choose a --separator with data.py"
            print(f"warning: the training text holds no end of a document: {advice}", file=sys.stderr)
        save_tokenizer(tokenizer, folder / "tokenizer.json")
        with replacing(folder / "tokenizer.sha256") as temporary:
            temporary.write_text(f"{file_hash(folder / 'tokenizer.json')}  tokenizer.json\n")  # for sha256sum -c
    return open_tokens(folder)


def make_tokenizer(name, vocab_size, source):
    """One of vocab_size ids, trained on the first 8 million characters of the corpus, if the name is "bpe"; any other
    name: see `load_tokenizer`."""
    return train_bpe(first(documents(source, warn=False)), vocab_size) if name == "bpe" else load_tokenizer(name)


def first(texts):
    size = 0
    for text in texts:
        yield text
        size += len(text)
        if size >= TOKENIZER_SAMPLE:
            return


def move_tail(source, target, n):
    """Move the last n tokens of one token file to the end of another."""
    keep = source.stat().st_size - 4 * n
    with open(target, "ab") as f:
        np.fromfile(source, dtype=np.uint32, offset=keep).tofile(f)
    with open(source, "rb+") as f:
        f.truncate(keep)


@dataclass
class Corpus:
    """Prepared token files: `train` and `val` are memory-mapped uint32 arrays."""

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer

    def batches(self, batch_size, seq_len, seed):
        """A function step -> windows for training, (B, L)."""
        return lambda step: random_batch(self.train, batch_size, seq_len, seed, step)

    def held_out(self, seq_len):
        """Windows for evaluation, (EVAL_SEQUENCES, L) at most."""
        return even_batch(self.val, EVAL_SEQUENCES, seq_len)


def is_prepared(folder):
    return (Path(folder) / "train.bin").exists()


def open_corpus(source, folder, tokenizer, batch_size, seq_len, resume):
    """The Corpus of a training run: source is one folder made by `prepare`, or text as in `documents`, which is
    tokenized into `folder`, or was before when resuming.  tokenizer: a function that returns one, called only if
    needed.  Raises ValueError if the corpus cannot fill a batch."""
    prepared = len(source) == 1 and is_prepared(source[0])
    with first_process_first():
        if rank() == 0 and not prepared and not resume:
            return prepare(source, tokenizer(), folder, batch_size, seq_len)
    corpus = open_tokens(source[0] if prepared else folder)
    check_length(len(corpus.train), len(corpus.val), batch_size, seq_len)
    return corpus


CHECKED = 1 << 14  # a corpus of any size opens at once


def open_tokens(folder):
    """The Corpus in a folder that `prepare` wrote.  Raises ValueError for damaged files, for a tokenizer.json that is
    not the hashed one (older folders have no hash) and, as far as CHECKED tokens tell, which are spread evenly over the
    file, for files that hold ids of another vocabulary."""
    folder = Path(folder)
    tokenizer = read_tokenizer_json(folder / "tokenizer.json")
    hashed = folder / "tokenizer.sha256"
    if hashed.exists() and hashed.read_bytes().split()[:1] != [file_hash(folder / "tokenizer.json").encode()]:
        raise ValueError(f"{folder}/tokenizer.json is not the one of these tokens: put that back, or tokenize again")
    splits = []
    for name in ("train.bin", "val.bin"):
        path = folder / name
        if not path.exists() or path.stat().st_size == 0 or path.stat().st_size % 4:
            raise ValueError(f"{path} is missing, empty or truncated: tokenize the text again")
        tokens = np.memmap(path, dtype=np.uint32, mode="r")
        largest = tokens[:: max(len(tokens) // CHECKED, 1)].max()
        if largest >= tokenizer.n_vocab:
            raise ValueError(f"{path} holds token id {largest}, outside the vocabulary 0..{tokenizer.n_vocab - 1}")
        splits.append(tokens)
    return Corpus(*splits, tokenizer)


def check_seq_len(seq_len, patch_size, *block_sizes):
    """Raises ValueError if blocks, of each size, do not fill a sequence."""
    for block_size in block_sizes:
        if seq_len % (block_size * patch_size):
            chunk = f"block_size * patch_size = {block_size * patch_size}"
            raise ValueError(f"--seq-len {seq_len} must be a multiple of {chunk}")


def micro_batch_size(batch_size, micro_batch, devices):
    """Sequences of one forward pass: micro_batch or, if that is 0, all that a process has of a batch.  Raises
    ValueError if the batch does not split evenly."""
    size = micro_batch or max(batch_size // devices, 1)
    if batch_size % (size * devices):
        factors = [f"--micro-batch {micro_batch}"] * (micro_batch > 0) + [f"{devices} devices"] * (devices > 1)
        raise ValueError(f"--batch-size {batch_size} must be a multiple of {' times '.join(factors)}")
    return size


def check_length(n_train, n_val, batch_size, seq_len):
    """Raises ValueError if a text of so many tokens cannot fill one batch."""
    for name, have, need in [("training", n_train, batch_size * seq_len), ("held-out", n_val, seq_len)]:
        if have < need:
            length = min(seq_len, 1 << (min(n_train, n_val) or 1).bit_length() - 1)
            fits = f"--batch-size {min(batch_size, max(n_train // length, 1))} --seq-len {length}"
            raise ValueError(f"the {name} text has {have} tokens, a batch takes {need}: use more text, or {fits}")


def random_batch(tokens, batch_size, seq_len, seed, step):
    """Windows at random places, (B, L) int64; a function of seed and step alone."""
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - seq_len + 1, batch_size)
    return windows(tokens, starts, seq_len)


def even_batch(tokens, batch_size, seq_len):
    """Windows at even distances over all tokens, for evaluation, (B, L) int64."""
    starts = np.linspace(0, len(tokens) - seq_len, min(batch_size, len(tokens) // seq_len), dtype=np.int64)
    return windows(tokens, starts, seq_len)


def windows(tokens, starts, seq_len):
    return torch.from_numpy(np.stack([tokens[s : s + seq_len] for s in starts]).astype(np.int64))


@dataclass
class Options:
    out: str = option("tokens", "folder for train.bin, val.bin and tokenizer.json")
    tokenizer: str = option("bpe", "bpe (trained on the text), a tokenizer.json, or a tiktoken name (cl100k_base)")
    vocab_size: int = option(512, "size of a trained vocabulary", low=258)
    data: tuple = option(("names",), "text files, folders, .jsonl; or names, which come with Python")
    separator: str = option("", "of documents in text files: a line that holds nothing else; nothing: a blank line")


def main():
    options, _ = parse_options(Options, __doc__)
    check_new(options.out, "choose another --out")
    tokenizer = make_tokenizer(options.tokenizer, options.vocab_size, options.data)
    corpus = prepare(options.data, tokenizer, options.out, separator=options.separator)
    print(f"{len(corpus.train):,} training and {len(corpus.val):,} held-out tokens of {corpus.tokenizer.n_vocab:,} ids")
    print(f"they are in {options.out}; next: python train_vae.py --data {options.out}")


if __name__ == "__main__":
    run_script(main)
