"""Generate text with a trained or released model.

    python sample.py                                  # new documents
    python sample.py --prompt "latin small letter"    # continue a prompt
    python sample.py --num-samples 1                  # one sample is shown block by block, as it is generated
    python sample.py --num-samples 1 --block-size 4 --show-steps       # and each block as it forms out of noise
    python sample.py --model path/to/released --max-new-tokens 32 --repetition-penalty 1.1
    torchrun --nproc_per_node=8 sample.py             # the same samples, shared out over 8 devices
"""

if __name__ == "__main__":
    import extras.quiet  # noqa: F401

import sys
from dataclasses import dataclass
from pathlib import Path

from cola import ColaDLM
from common import collect, join_processes, n_processes, pick_device, rank, run_script, sampling_precision
from data import decode_bytes, prompt_ids
from options import TextOptions, option, parse_options
from training import beyond_training

PRETRAINED = Path(__file__).parent / "pretrained"  # the small model that comes with the repository


@dataclass
class Options(TextOptions):
    model: str = option("", "folder in the released format; nothing: runs/cola if there is one, else pretrained")
    prompt: tuple = option(("",), "one or more texts to continue; empty: a new document")
    special_tokens: bool = option(False, "<|endoftext|> and the like, written in a prompt, are not text but tokens")
    num_samples: int = option(10, "samples of each prompt", low=1)
    show_steps: bool = option(False, "one sample: show each block as it forms out of noise, a line for every step")
    stop_at_eos: bool = option(True, "end a sample where the model ends its document")
    compile: bool = option(False, "compile a step of the solver: many samples come faster, after a minute")


def show_step(tokenizer):
    """A function for `watch` of `ColaDLM.generate_blocks`: prints the text that a block would be, and what changed."""
    before = None

    def show(z, t, new):
        nonlocal before
        (row,) = new
        changed = "" if before is None else f"{sum(a != b for a, b in zip(before, row, strict=True)):2} changed"
        before = row if t > 0 else None  # the next block begins anew
        text = decode_bytes(tokenizer, row).decode(errors="replace")
        print(f"\n{t:6.3f}  {changed:10}  {text!r}", end="" if t > 0 else "\n", flush=True)

    return show


def main():
    o, _ = parse_options(Options, __doc__)
    device = join_processes(pick_device(o.device))
    folder = o.model or ("runs/cola" if Path("runs/cola/cola_dit/config.json").exists() else PRETRAINED)
    if not o.model and rank() == 0:
        print(f"model: {folder}", file=sys.stderr)
    dtype, amp = sampling_precision(o.dtype, device)
    model = ColaDLM.from_pretrained(folder, device, dtype, with_tokenizer=True)
    if o.compile:
        from extras.compiled import CompiledColaDLM

        model = CompiledColaDLM(model)
    settings = o.settings() | o.own_ids(model.tokenizer) | dict(special_tokens=o.special_tokens)
    settings |= {} if o.stop_at_eos else dict(eos_id=None)
    prompts = [prompt for prompt in o.prompt for _ in range(o.num_samples)]
    longest = max(map(len, prompt_ids(model.tokenizer, o.prompt, o.special_tokens)))
    for asked in beyond_training(folder, longest, o.block_size) if rank() == 0 else ():
        print(f"{asked}: the text may get worse", file=sys.stderr)
    if o.show_steps:
        if len(prompts) != 1:
            raise ValueError("--show-steps shows one sample: add --num-samples 1")
        settings["watch"] = show_step(model.tokenizer)
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        with amp:
            for (piece,) in model.stream(prompts, **settings):
                print(piece, end="", flush=True)
        print()
    else:
        rows = range(rank(), len(prompts), n_processes())  # of this process; each has noise of its own
        with amp:
            texts = collect(model.generate([prompts[i] for i in rows], row_ids=rows, **settings))
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            print(f"--- sample {i + 1}\n{prompt}{text}")


if __name__ == "__main__":
    run_script(main)
