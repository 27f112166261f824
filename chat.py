"""Talk with a model that was tuned to answer.

    python train_prior.py --init pretrained --chat dialogues.jsonl --seq-len 64 --out runs/chat
    python chat.py --model runs/chat                  # "clear" begins anew, "quit" leaves

A line of the .jsonl file is a list of messages, {"role": "user", "content": "..."} and so on, or an object with such a
list as "messages".  What the model sees is

    User: <question>\\nAssistant: <answer><end of text>User: ...

Of each turn, all up to "Assistant: " is the prompt, and the answer with its end mark is the response, which is learned.
"""

if __name__ == "__main__":
    import extras.quiet  # noqa: F401

import math
import sys
import zlib
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from cola import ColaDLM
from common import pick_device, run_script, sampling_precision
from data import EVAL_SEQUENCES, HELD_OUT, TextStream, decode_bytes, end_ids, numbered_objects
from options import TextOptions, option, parse_options
from training import saved_options

PROMPT, RESPONSE, PADDING = 0, 1, 2  # what a token of a row is


def question(text):
    return f"User: {text}\nAssistant: "


def turns(messages, where):
    """The (question, answer) pairs of a conversation, as texts.  Raises ValueError, which says where, for anything but
    user and assistant in turns, after one system message or none."""

    def content(message):
        if not isinstance(message, dict) or not isinstance(message.get("content"), (str, list)):
            raise ValueError(f'{where}: a message must have a "role" and a "content", a text or a list of parts')
        parts = message["content"]
        if isinstance(parts, str):
            return parts
        texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f'{where}: every part of a content must be {{"type": "text", "text": ...}}')
        return "".join(texts)

    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"{where} is not a list of at least two messages")
    texts = [content(message) for message in messages]
    roles = [message.get("role") for message in messages]
    if roles[0] == "system" and len(texts) > 1:
        roles, texts = roles[1:], [f"{texts[0]}\n{texts[1]}", *texts[2:]]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"{where}: after a system message or none, user and assistant must take turns; it has {roles}")
    return [(question(q), answer) for q, answer in zip(texts[::2], texts[1::2], strict=True)]


def open_chats(o, tokenizer, vae):
    """What to tune a prior on, for options o and a VAEConfig: a function step -> rows (B, 2, L) at random, rows of
    held-out conversations, and the mean length of an answer."""
    if vae.patch_size > 1 or o.joint or not o.init:
        raise ValueError("--chat tunes the prior of a model with one token per latent: add --init, without --joint")
    if o.data:
        raise ValueError("--data and --chat exclude each other: a run learns from texts or from conversations")
    rows, held_out = read_chats(o.chat, tokenizer, o.seq_len, vae.vocab_size - 1)
    print(f"{len(rows):,} answers to learn from")
    evenly = np.linspace(0, len(held_out) - 1, min(len(held_out), EVAL_SEQUENCES), dtype=np.int64)
    answer_len = float((rows[:, 1] == RESPONSE).sum() / len(rows))
    return lambda step: random_rows(rows, o.batch_size, o.seed, step), torch.from_numpy(held_out[evenly]), answer_len


def read_chats(files, tokenizer, seq_len, pad_id):
    """Rows for training and held-out rows, int64 arrays (N, 2, L): token ids, and which of PROMPT, RESPONSE, PADDING
    each is; one row for every answer, with all turns before it as the prompt.

    Conversations are held out by a hash; if that leaves none on one side, both sides have all."""
    splits, n_long = ([], []), 0
    for file in files:
        for number, messages in numbered_objects(file, (list, dict)):
            messages = messages.get("messages") if isinstance(messages, dict) else messages
            side, ids = splits[zlib.crc32(str(messages).encode(errors="replace")) < HELD_OUT * 2**32], []
            for text, answer in turns(messages, f"{file} line {number}"):
                ids += tokenizer.encode_ordinary(text)
                response = tokenizer.encode_ordinary(answer) + [tokenizer.eot_token]
                n_padding = seq_len - len(ids) - len(response)
                if n_padding >= 0:
                    parts = [PROMPT] * len(ids) + [RESPONSE] * len(response) + [PADDING] * n_padding
                    side.append([ids + response + [pad_id] * n_padding, parts])
                n_long += n_padding < 0
                ids += response
    if n_long:
        print(f"{n_long:,} answers are left out: with the turns before them they exceed --seq-len {seq_len}")
    if not any(splits):
        raise ValueError(f"there is no conversation of up to --seq-len {seq_len} tokens in {' '.join(map(str, files))}")
    train, held_out = (np.array(side or splits[0] + splits[1]) for side in splits)
    return train, held_out


def random_rows(rows, batch_size, seed, step):
    """Rows at random, (B, 2, L); a function of seed and step alone."""
    return torch.from_numpy(rows[np.random.default_rng([seed, step]).integers(0, len(rows), batch_size)])


@dataclass
class Options(TextOptions):
    model: str = option("runs/chat", "folder in the released format, of a model tuned with --chat")
    stop: tuple = option(("User:",), "an answer ends before any of these texts")
    context: int = option(2048, "latents that a conversation may have", low=1)
    # the sampling options of the released chat
    max_new_tokens: int = option(128, "at most so many new tokens an answer", low=1)
    temperature: float = option(0.8, "of the tokens; 0 takes the likeliest", low=0.0)
    top_k: int = option(50, "keep the k likeliest tokens; 0 keeps all", low=0)
    cfg_scale: float = option(7.0, "guidance by the history; 1: none; 0: as in sample.py", low=0.0, high=1e3)
    top_p: float = option(0.9, "keep the likeliest tokens of this total probability", low=0.0, high=1.0)


def answer(model, state, text, stop, settings):
    """Yield the pieces of the answer to a text; `state`, of `ColaDLM.prefill`, keeps the conversation, as far as it was
    shown.  settings: of `ColaDLM.generate_blocks`.  Raises ValueError if the state has no room for it."""
    stream, written, shown = TextStream(model.tokenizer), "", 0
    ids, told = model.tokenizer.encode_ordinary(question(text)), state.text[0]
    if told and told[-1] not in end_ids(settings["eos_id"]):  # the last answer was cut; in training each has its end
        ids = [model.tokenizer.eot_token, *ids]
    begin = len(told) + len(ids)
    for block in model.generate_blocks([ids], state=state, **settings):
        written += stream.write(block.new[0], block.last)
        ends = [written.index(s) for s in stop if s and s in written]
        # What might be the beginning of a stop text waits for the next block.
        tails = [n for s in stop for n in range(1, len(s)) if written.endswith(s[:n])]
        end = min(ends) if ends else len(written) - (0 if block.last else max(tails, default=0))
        yield written[shown:end]
        shown = max(shown, end)
        if ends:  # tokens of this block that were not shown are no history
            told, first = state.text[0], max(begin, int(state.dit_cache.length[0]) * model.vae.config.patch_size)
            while len(told) > first and len(decode_bytes(model.tokenizer, told[begin:]).decode(errors="replace")) > end:
                told.pop()
            return


def main():
    o, _ = parse_options(Options, __doc__)
    device = pick_device(o.device)
    dtype, amp = sampling_precision(o.dtype, device)
    model = ColaDLM.from_pretrained(o.model, device, dtype, with_tokenizer=True)
    settings, n_turns = o.settings() | o.own_ids(model.tokenizer), 0
    new_state = partial(model.prefill, [[]], o.context * model.vae.config.patch_size, block_size=o.block_size)
    state = new_state()
    saved = saved_options(o.model)
    if not saved.get("chat"):
        say(f"{o.model} does not say that it was tuned with --chat: it may go on with your text rather than answer")
    say('Ask something; "clear" begins anew, "quit" leaves.')
    while (line := read_line()) is not None:
        if line == "clear":
            state, n_turns = new_state(), 0
        elif line:
            n_old = len(state.text[0])
            try:
                with amp:
                    for piece in answer(model, state, line, o.stop, settings | dict(seed=(o.seed + n_turns) % 2**31)):
                        print(piece, end="", flush=True)
                print()
            except ValueError as error:
                say(f'{error}; "clear" begins anew, and a larger --context holds more')
            n_turns += 1
            if n_old <= saved.get("seq_len", math.inf) < len(state.text[0]):
                say(f"longer than the {saved['seq_len']} tokens of training: answers may get worse")


def say(text):
    print(text, file=sys.stderr)


def read_line():
    """The next line that the user types; None at the end."""
    try:
        line = input("> ").strip()
    except EOFError:
        return None
    return None if line == "quit" else line


if __name__ == "__main__":
    run_script(main)
