"""Generate text with a trained or released model.

    python sample.py                                  # new documents
    python sample.py --prompt "latin small letter"    # continue a prompt, block by block as it is generated
    python sample.py --model path/to/released --max-new-tokens 32 --repetition-penalty 1.1
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from cola import ColaDLM
from common import multiplies_bf16, option, parse_options, pick_device, run_script
from data import END_OF_TEXT

PRETRAINED = Path(__file__).parent / "pretrained"  # the small model that comes with the repository


@dataclass
class Options:
    model: str = option("", "folder in the released layout; nothing: runs/cola if there is one, else pretrained")
    prompt: tuple = option(("",), "one or more texts to continue; empty: a new document")
    num_samples: int = option(10, "samples of each prompt", low=1)
    max_new_tokens: int = option(64, "at most so many new tokens a sample", low=1)
    steps: int = option(16, "steps of the ODE solver per block", low=1)
    solver: str = option("euler", "ODE solver; heun evaluates the prior twice a step", choices=("euler", "heun"))
    cfg_scale: float = option(4.0, "guidance: how strongly the history steers; 1: none; 7: released", low=0.0)
    temperature: float = option(0.0, "of the tokens; 0 takes the likeliest", low=0.0)
    top_k: int = option(0, "keep the k likeliest tokens; 0 keeps all", low=0)
    top_p: float = option(1.0, "keep the likeliest tokens of this total probability", low=0.0, high=1.0)
    repetition_penalty: float = option(1.0, "above 1: avoid tokens of earlier blocks", low=1e-6)
    stop_at_eos: bool = option(True, "end a sample where the model ends its document")
    seed: int = option(0, "seed of the noise", low=0, high=2**31)
    device: str = option("auto", "auto, cpu, cuda, mps")
    dtype: str = option("auto", "of the weights; auto: bf16 on CUDA, else fp32", choices=("auto", "fp32", "bf16"))


def main():
    o, _ = parse_options(Options, __doc__)
    device = pick_device(o.device)
    bf16 = o.dtype == "bf16" or (o.dtype == "auto" and device.type == "cuda" and multiplies_bf16(device))
    folder = o.model or ("runs/cola" if Path("runs/cola").exists() else PRETRAINED)
    if not o.model:
        print(f"model: {folder}", file=sys.stderr)
    model = ColaDLM.from_pretrained(folder, device, torch.bfloat16 if bf16 else torch.float32)
    if model.tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer.json")
    settings = dict(
        max_new_tokens=o.max_new_tokens,
        steps=o.steps,
        solver=o.solver,
        cfg_scale=o.cfg_scale,
        temperature=o.temperature,
        top_k=o.top_k,
        top_p=o.top_p,
        repetition_penalty=o.repetition_penalty,
        eos_id=model.tokenizer.eot_token if o.stop_at_eos else None,
        seed=o.seed,
    )
    prompts = [prompt for prompt in o.prompt for _ in range(o.num_samples)]
    after = [prompt or END_OF_TEXT for prompt in prompts]  # after the end of a document begins a new one
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        for (piece,) in model.stream(after, **settings):
            print(piece, end="", flush=True)
        print()
    else:
        for i, (prompt, text) in enumerate(zip(prompts, model.generate(after, **settings), strict=True)):
            print(f"--- sample {i + 1}\n{prompt}{text}")


if __name__ == "__main__":
    run_script(main)
