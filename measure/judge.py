"""How much does generated text resemble the training text, and how much of it is copied?

    python -m measure.judge                           # samples of runs/cola against the text of runs/vae
    python -m measure.judge --texts other.jsonl       # the same for texts from elsewhere

The judge is an n-gram model of the training text, and its bits per byte are the score.  A score means nothing alone:
the table has held-out text, the same with its words shuffled, and samples of a bigram and a unigram model of the
tokens.  Text can score well by repeating or reciting, so each row also says how varied it is and how much is new."""

if __name__ == "__main__":
    import extras.quiet  # noqa: F401

import bisect
import functools
import math
import os
import random
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

import data
from cola import ColaDLM
from common import pick_device, run_script
from options import SamplingOptions, option, parse_options
from training import own_data

JUDGED = 1 << 22  # bytes, and tokens at most, of the training text that judge and yardsticks read
START = b"\n"  # what stands before a text that begins a document; also what <|endoftext|> becomes


class NGramJudge:
    """Interpolated Witten-Bell n-gram model of bytes.

    p(b | h) = (count(h b) + types(h) p(b | h')) / (count(h) + types(h)), where h' is h without its first byte and
    types(h) the number of different bytes seen after h; below the empty history lies the uniform distribution.

    An n-gram is a number of 8 n bits, the last byte lowest; tables are sorted arrays, searched for all bytes of a text
    at once."""

    def __init__(self, text, order=7):
        """text: bytes, at least one; order: bytes of history, plus one, at most 8.  Raises ValueError for another."""
        if not 1 <= order <= 8 or not text:
            raise ValueError(f"order {order} must be between 1 and 8, and the text must not be empty")
        self.tables = []  # for every length n of a history: grams, their counts; histories, their totals and types
        for n in range(min(order, len(text))):
            grams, counts = np.unique(ngrams(text, n + 1), return_counts=True)
            first = np.flatnonzero(np.r_[True, np.diff(grams >> EIGHT) > 0])  # of the grams that share a history
            total, types = np.add.reduceat(counts, first), np.diff(np.r_[first, len(grams)])
            self.tables.append(((grams, counts), (grams[first] >> EIGHT, total), (grams[first] >> EIGHT, types)))

    def bits(self, text, context=b""):
        """-log2 p(text | context), both bytes."""
        whole, start = context + text, len(context)
        p = np.full(len(text), 1 / 256)
        for n, (counts, totals, types) in enumerate(self.tables):
            at = np.arange(max(start, n), len(whole))  # bytes of the text that have a history so long
            grams = ngrams(whole, n + 1)[at - n]
            total, kinds = look_up(totals, grams >> EIGHT), look_up(types, grams >> EIGHT)
            longer = (look_up(counts, grams) + kinds * p[at - start]) / np.maximum(total + kinds, 1)
            p[at - start] = np.where(total > 0, longer, p[at - start])
        return float(-np.log2(p).sum())


EIGHT = np.uint64(8)


def ngrams(text, n):
    """The n bytes from every place of a text on, as numbers: uint64 (len(text) - n + 1,)."""
    text = np.frombuffer(text, np.uint8)
    grams = np.zeros(max(len(text) - n + 1, 0), np.uint64)
    for i in range(n):
        grams = (grams << EIGHT) | text[i : i + len(grams)]
    return grams


def look_up(table, keys):
    """The values of keys in a table of (sorted keys, values); 0 for those that it does not have."""
    known, values = table
    place = np.searchsorted(known, keys).clip(max=len(known) - 1)
    return np.where(known[place] == keys, values[place], 0)


def bits_per_byte(judge, texts, contexts):
    """Of all texts together, with its standard error over texts (that of a ratio)."""
    bits = [judge.bits(text, context) for text, context in zip(texts, contexts, strict=True)]
    total = sum(map(len, texts))
    mean = share(sum(bits), total)  # nan if all texts are empty
    deviations = [b - mean * len(text) for b, text in zip(bits, texts, strict=True)]
    n = len(texts)
    return mean, share(math.sqrt(n / max(n - 1, 1) * sum(d * d for d in deviations)), total)


def describe(texts, contexts, known):
    """What the score does not see.  texts, and what stood before them: lists of bytes; known: the training text, bytes.
    Returns, in this order,

    distinct-3 (share of different ones among all groups of three words), the share of words that the training text has,
    the share of whole lines that it has not, and the length in bytes of the longest stretch copied from it."""
    known_words, known_lines = set(known.split()), set(known.split(b"\n"))
    words = [text.split() for text in texts]
    triples = [triple for row in words for triple in zip(row, row[1:], row[2:], strict=False)]
    lines = []
    for text, context in zip(texts, contexts, strict=True):
        first = 0 if context.endswith(b"\n") else 1  # a line that began in the context; the last one may be cut
        lines += [line for line in text.split(b"\n")[first:-1] if line]
    return (
        share(len(set(triples)), len(triples)),
        share(sum(word in known_words for row in words for word in row), sum(map(len, words))),
        share(sum(line not in known_lines for line in lines), len(lines)),
        longest_copy(texts, known),
    )


DEPTH = 1024  # bytes; a copy is not followed further


def longest_copy(texts, known):
    """The length in bytes of the longest stretch of any text that `known` has as well, DEPTH at most."""
    suffixes, longest = suffix_array(known), 0
    for text in texts:
        for i in range(len(text)):
            rest = text[i : i + DEPTH]
            place = bisect.bisect(suffixes, rest, key=lambda start: known[start : start + DEPTH])
            for start in suffixes[max(place - 1, 0) : place + 1].tolist():  # the neighbours share most with it
                longest = max(longest, len(os.path.commonprefix([rest, known[start : start + DEPTH]])))
    return longest


@functools.lru_cache(maxsize=1)
def suffix_array(text):
    """Where the suffixes of a text start, sorted by their first DEPTH bytes.  Prefix doubling: the order by the first
    2 n bytes follows from the ranks by the first n, here and n bytes further on."""
    rank, n = np.unique(ngrams(text + bytes(7), 8), return_inverse=True)[1].astype(np.int64), 8
    while n < DEPTH and rank.max() < len(text) - 1:
        further = np.zeros_like(rank)  # 0: the text ends before
        further[: len(text) - n] = rank[n:] + 1
        rank, n = np.unique(rank * (len(text) + 1) + further, return_inverse=True)[1], 2 * n
    return np.argsort(rank)


def share(part, whole):
    return part / whole if whole else math.nan


def yardsticks(corpus, n_texts, n_tokens, seed=0):
    """{name: (texts, contexts)} of held-out text, the same with its words shuffled, and samples of two simple models of
    tokens, all about as long as n_texts samples of n_tokens."""
    rng = random.Random(seed)
    train, held_out = corpus.train[:JUDGED].tolist(), corpus.val[: n_texts * n_tokens].tolist()
    rows = [held_out[i : i + n_tokens] for i in range(0, len(held_out), n_tokens)]
    real = [text_of(corpus.tokenizer, row) for row in rows]
    before = [START, *real[:-1]]
    words = [text.decode(errors="replace").split(" ") for text in real]
    shuffled = [" ".join(rng.sample(row, len(row))).encode() for row in words]
    followers = defaultdict(list)
    for a, b in pairwise(train):
        followers[a].append(b)
    bigrams = []
    for _ in range(n_texts):
        row = [corpus.tokenizer.eot_token]
        while len(row) <= n_tokens:
            row.append(rng.choice(followers[row[-1]] or train))
        bigrams.append(row[1:])
    unigrams = [rng.choices(train, k=n_tokens) for _ in range(n_texts)]
    return {
        "held-out text": (real, before),
        "words shuffled": (shuffled, before),
        "bigram samples": ([text_of(corpus.tokenizer, row) for row in bigrams], [START] * n_texts),
        "unigram samples": ([text_of(corpus.tokenizer, row) for row in unigrams], [START] * n_texts),
    }


def text_of(tokenizer, ids):
    """Bytes, with a line break where a document ends."""
    return data.decode_bytes(tokenizer, ids).replace(data.END_OF_TEXT.encode(), START)


def training_text(corpus):
    """What a judge reads."""
    return START + text_of(corpus.tokenizer, corpus.train[:JUDGED].tolist())[:JUDGED]


@dataclass
class Options(SamplingOptions):
    model: str = option("runs/cola", "folder in the released format; empty: judge --texts only")
    data: str = option("", "folder of the training and held-out tokens; nothing: those of the model's run")
    texts: tuple = option((), "more texts to judge: files as in --data of train_vae.py, each a row of the table")
    num_samples: int = option(64, "samples from the model, as many with a held-out prompt as without", low=2)
    prompt_tokens: int = option(16, "length of a held-out prompt", low=1)
    device: str = option("auto", "auto, cpu, cuda, mps")


def main():
    o, _ = parse_options(Options, __doc__)
    o.data = o.data or own_data(o.model)
    corpus = data.open_tokens(o.data)
    known = training_text(corpus)
    judge = NGramJudge(known)
    rows = yardsticks(corpus, o.num_samples, o.max_new_tokens, o.seed)
    for name in o.texts:
        texts = [text.encode(errors="replace") for text in data.documents([name]) if text]
        if not texts:
            raise ValueError(f"{name} holds no text")
        rows[name] = texts, [START] * len(texts)
    if o.model:
        model = ColaDLM.from_pretrained(o.model, pick_device(o.device), with_tokenizer=True)
        data.check_same(corpus.tokenizer, model.tokenizer)
        data.check_length(len(corpus.train), len(corpus.val), 1, o.prompt_tokens)

        def sample(prompts):
            return [text_of(corpus.tokenizer, ids) for ids in model.generate(prompts, **o.settings())]

        rows["samples"] = sample([[corpus.tokenizer.eot_token]] * o.num_samples), [START] * o.num_samples
        prompts = data.even_batch(corpus.val, o.num_samples, o.prompt_tokens).tolist()
        rows["continuations"] = sample(prompts), [text_of(corpus.tokenizer, prompt) for prompt in prompts]

    width = max(map(len, rows))
    print(f"{'':{width}}    bits/byte    distinct-3  known words  new lines  longest copy")
    for name, (texts, contexts) in rows.items():
        mean, error = bits_per_byte(judge, texts, contexts)
        distinct, words, lines, copied = describe(texts, contexts, known)
        score = f"{mean:.3f} ± {error:.3f}"
        print(f"{name:{width}}  {score}  {distinct:10.2f}  {words:11.2f}  {lines:9.2f}  {copied:6} bytes")
    files = ", but of files all texts" if o.texts else ""
    print(f"{o.num_samples} texts of {o.max_new_tokens} tokens in each row{files}; ± is the standard error over texts")


if __name__ == "__main__":
    run_script(main)
