"""How fast is this, and how close to what the machine allows?

    python -m measure.bench                          # sizes of the default run, with blocks of 16, no codes
    python -m measure.bench --preset 2b --device cuda
    python -m measure.bench --compare before.json    # beside a run before a change: ratios of the times

The ceilings are measured first: the rate of large matrix products and the bandwidth of memory.  A training step, with
the preset's optimizer, is compared with the FLOPs of its products (budget.py) at that rate (MFU); generation with the
least time that it could take (of_possible), the larger of two: to read all weights but those of the modulation once a
step, and the cache; and to multiply.

Beside each stands the plain way of doing the same thing, tests/reference.py, with the same numbers as a result, up to
rounding: all sequences of a batch as one long one under a dense mask, plain attention, the modulation computed for
every position, keys rotated anew in every step, guidance in two passes; and each of these alone.
"""

if __name__ == "__main__":
    import extras.quiet  # noqa: F401

import json
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import common
import train_vae
from cola import ColaDLM
from dit import DiT, rotate_interleaved
from extras.compiled import CompiledColaDLM
from extras.kernels import compile_blocks
from flow import flow_matching_loss
from measure.budget import decoder_flops, dit_flops, prior_step_flops, vae_step_flops
from options import PriorOptions, VAEOptions, option, parse_options
from tests import reference
from transformer import apply_rope, make_layout
from vae import TextVAE

# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()


def seconds(function, device, repeats):
    """Median time of a call, after one that warms up."""
    times = []
    for i in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        if i > 0:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def peak_memory(function, device):
    """Bytes that a call holds at most, beyond what was there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        function()
    held = peak = 0
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def ceilings(device, dtype, repeats):
    """FLOP/s of a large product in dtype, and bytes/s of reading and writing memory."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = seconds(lambda: a @ b, device, repeats)
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        a, b = a.to_mkldnn(), b.to_mkldnn()  # oneDNN, which compiled code calls, may be faster than MKL
        product = min(product, seconds(lambda: F.linear(a, b), device, repeats))
    x = torch.zeros(1 << (30 if device.type == "cuda" else 26), device=device)  # 4 GB or 256 MB
    y = torch.empty_like(x)
    return 2 * n**3 / product, 2 * 4 * len(x) / seconds(lambda: y.copy_(x), device, repeats)


# ----------------------------------------------------------------------------------------------------------------------
# What is measured


@dataclass
class Options:
    preset: str = option("small", "sizes: of the default run, or 2b", choices=("small", "2b"))
    device: str = option("auto", "auto, cpu, cuda, mps")
    precision: str = option("auto", "of matrix products in training", choices=("auto", "fp32", "bf16"))
    block_size: int = option(16, "latents per block", low=1)
    seq_len: int = option(128, "training: tokens of a sequence", low=2)
    batch_size: int = option(16, "training: sequences of a step", low=1)
    new_tokens: int = option(256, "generation: tokens of each row", low=1)
    rows: tuple = option((1, 8, 64), "generation: rows of a batch", low=1)
    steps: int = option(16, "generation: steps of the solver", low=1)
    cfg_scale: float = option(3.0, "generation: guidance", low=0.0)
    compile: bool = option(False, "compile the blocks in training and a step of generation (on CUDA as a CUDA graph)")
    slow: bool = option(True, "measure the plain way, too")
    growth: bool = option(True, "measure how times grow with length, batch, steps and guidance")
    repeats: int = option(5, "measurements behind each median", low=1)
    out: str = option("bench.json", "file of the figures")
    compare: str = option("", "file of an earlier run, for ratios")
    seed: int = option(0, "seed of weights and noise", low=0)


SLOW_ROWS = 8  # more take too long the plain way


class Table:
    """Figures by name, printed as they come and kept in a file.  earlier: milliseconds by name; about: what else stands
    in the file."""

    def __init__(self, file, earlier, about):
        self.file, self.earlier, self.about, self.figures = file, earlier, about, {}

    def add(self, name, **values):
        self.figures[name] = values
        shown = "  ".join(f"{key} {value:,.4g}" for key, value in values.items())
        before = self.earlier.get(name) if "ms" in values else None
        print(f"{name:44} {shown}" + (f"  x {values['ms'] / before:.2f} of before" if before else ""), flush=True)
        with common.replacing(self.file) as temporary:
            content = self.about | dict(figures=self.figures)
            temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def times_of(file):
    """{name: milliseconds} of the figures in a file of an earlier run."""
    try:
        figures = json.loads(Path(file).read_text())["figures"]
        return {name: float(values["ms"]) for name, values in figures.items() if "ms" in values}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"--compare {file} is no file that this script wrote") from None


def median_time(name, function, device, repeats):
    """As `seconds`; None, and a line that says so, if the memory of a GPU does not suffice."""
    try:
        return seconds(function, device, repeats)
    except torch.OutOfMemoryError:
        print(f"{name:44} out of memory")
    torch.cuda.empty_cache()


def build(o, device):
    """A ColaDLM of the preset's sizes with random weights, none of them zero."""
    sizes = VAEOptions.PRESETS.get(o.preset, {}) | dict(preset=o.preset, block_size=o.block_size)
    vae_config = VAEOptions(**sizes).config()
    papers = PriorOptions.PRESETS["2b" if o.preset == "2b" else "plain"] | dict(block_size=(o.block_size,))
    prior = PriorOptions(**papers)
    dit_config = prior.config(vae_config)
    with device:
        models = TextVAE(vae_config), DiT(dit_config)
    for p in models[1].parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return ColaDLM(*models)


def training(o, model, device, table, rate):
    vae, dit = model.vae, model.dit
    amp = common.autocast(device, o.precision)
    if o.compile:
        for part in (vae, dit):
            compile_blocks(part)
    name = PriorOptions.PRESETS.get(o.preset, {}).get("optimizer", "muon")
    dtype = common.muon_dtype(device, o.precision)
    optimizers = [common.make_optimizer([(part, 1.0)], name, 0.01, dtype) for part in (vae, dit)]

    objective = train_vae.VAEObjective(VAEOptions(), vae)

    def stage1(L, B):
        idx = torch.randint(0, vae.config.vocab_size, (B, L), device=device)

        def step():
            with amp:
                loss, _ = objective(idx)
            loss.backward()
            common.optimizer_step(optimizers[0], 1e-4, 1.0)

        return step, B * vae_step_flops(vae.config, L // vae.config.patch_size)

    def stage2(L, B, loss_function=flow_matching_loss):
        generator = torch.Generator(device).manual_seed(o.seed)
        idx = torch.randint(0, vae.config.vocab_size, (B, L), device=device, generator=generator)
        t = torch.rand(B, device=device, generator=generator)

        def step():
            with amp:
                with torch.no_grad():
                    z0 = vae.encode(idx).mu
                loss = loss_function(dit, z0, torch.ones_like(z0), t)
            loss.backward()
            optimizer_step()
            return loss.item()

        return step, B * prior_step_flops(dit.config, vae.config, L // vae.config.patch_size)

    def optimizer_step():
        common.optimizer_step(optimizers[1], 0.0, 1.0)  # the weights stay, so both ways see the same ones

    def optimizer_alone():
        for p in dit.parameters():
            p.grad = torch.ones_like(p)
        optimizer_step()

    def measure(name, made, n_tokens):
        step, flops = made
        if (median := median_time(name, step, device, o.repeats)) is None:
            return None
        values = dict(ms=1e3 * median, tokens_per_s=n_tokens / median, TFLOPs_per_s=flops / median / 1e12)
        values["MFU"] = flops / median / rate
        table.add(name, **values, MB=peak_memory(step, device) / 1e6)
        return median

    L, B = o.seq_len, o.batch_size
    measure(f"stage 1 step, {B} x {L}", stage1(L, B), B * L)
    fast = measure(f"stage 2 step, {B} x {L}", stage2(L, B), B * L)
    alone = median_time("optimizer", optimizer_alone, device, o.repeats)
    if fast and alone:
        table.add(f"stage 2 step, {B} x {L}: {name} alone", ms=1e3 * alone, share_of_step=alone / fast)
    if o.slow:
        made = stage2(L, B, reference.flow_matching_loss)
        slow = measure(f"stage 2 step, {B} x {L}, plain way", made, B * L)
        if fast and slow:
            losses = dict(loss=stage2(L, B)[0](), slow_loss=made[0]())
            table.add("stage 2 step: gain over the plain way", ratio=slow / fast, **losses)
    if o.growth:
        for factor in (2, 4):
            measure(f"stage 2 step, {factor * B} x {L}", stage2(L, factor * B), factor * B * L)
            measure(f"stage 2 step, {B} x {factor * L}", stage2(factor * L, B), factor * B * L)
        if o.slow:
            made = stage2(L, 2 * B, reference.flow_matching_loss)
            measure(f"stage 2 step, {2 * B} x {L}, plain way", made, 2 * B * L)


@torch.no_grad()
def generation(o, model, device, table, rate, bandwidth, label):
    """label: the precision, in the names of the figures."""
    c = model.dit.config

    def run(rows, steps=o.steps, cfg_scale=o.cfg_scale, n=o.new_tokens, noise=None):
        options = dict(steps=steps, cfg_scale=cfg_scale, seed=o.seed, noise=noise)
        return torch.cat([block.z for block in model.generate_blocks([[]] * rows, n, **options)], dim=1)

    def floor(rows, steps=o.steps, cfg_scale=o.cfg_scale, n=o.new_tokens):
        """Seconds that no implementation can go below: of every pass, to read or to multiply."""
        size = torch.finfo(next(model.dit.parameters()).dtype).bits // 8
        modulation = ("ada", "emb_in", "txt_out_ada")
        weights = sum(p.numel() for name, p in model.dit.named_parameters() if not any(m in name for m in modulation))
        total = 0.0
        for history in range(0, n, c.block_size):
            keys = history + c.block_size
            cached = 2 * rows * history * c.n_layer * c.n_head * c.head_dim
            branches = 2 if history and cfg_scale != 1 else 1
            flops = rows * c.block_size * dit_flops(c, keys)
            passes = steps * max(size * (weights + cached) / bandwidth, branches * flops / rate)
            decode = rows * c.block_size * decoder_flops(model.vae.config, keys) / rate
            append = max(size * (weights + cached) / bandwidth, flops / rate) if keys < n else 0.0
            total += passes + decode + append
        return total

    def measure(name, rows, **options):
        if (median := median_time(name, lambda: run(rows, **options), device, o.repeats)) is None:
            return None
        n = options.get("n", o.new_tokens)
        values = dict(ms=1e3 * median, tokens_per_s=rows * n / median, of_possible=floor(rows, **options) / median)
        table.add(name, **values)
        return median

    for rows in o.rows:
        fast = measure(f"generation, {rows} rows, {label}", rows)
        measure(f"generation, {rows} rows, {label}, first block", rows, n=c.block_size)
        if not o.slow or rows > SLOW_ROWS:
            continue

        noise = torch.randn(o.new_tokens // c.block_size, rows, c.block_size, c.latent_dim).to(device)

        def slow_run():
            return reference.generate(model, noise.transpose(0, 1).flatten(1, 2), o.steps, o.cfg_scale)[0]  # noqa: B023

        name = f"generation, {rows} rows, {label}, plain way"
        if slow := median_time(name, slow_run, device, 1):
            table.add(name, ms=1e3 * slow)
        if fast and slow:
            values = dict(ratio=slow / fast, difference=(run(rows, noise=noise) - slow_run()).abs().mean().item())
            table.add(f"generation, {rows} rows, {label}: gain over the plain way", **values)
    if o.growth:
        for rows, steps in product(o.rows, (4, 8)):
            measure(f"generation, {rows} rows, {label}, blocks of {c.block_size}, {steps} steps", rows, steps=steps)
        rows = o.rows[0]
        measure(f"generation, {rows} rows, {label}, twice the steps", rows, steps=2 * o.steps)
        measure(f"generation, {rows} rows, {label}, no guidance", rows, cfg_scale=1.0)
        measure(f"generation, {rows} rows, {label}, twice the tokens", rows, n=2 * o.new_tokens)


@torch.no_grad()
def savings(o, model, device, table, label):
    """Each part of the plain way alone, over what takes its place: for one step in the last block of SLOW_ROWS rows."""
    dit, c, B = model.dit, model.dit.config, SLOW_ROWS
    n, K, dtype = c.block_size, o.new_tokens, dit.txt_in.proj.weight.dtype
    t, every_t = torch.ones(1, device=device), torch.ones(B * n, device=device)
    z = torch.randn(2 * B, n, c.latent_dim, device=device)
    cache = dit.new_cache(B, K)
    cache.commit(K - n)
    alone, both = (make_layout(n, dit.config.block_size, dit.rope, device, cache, copies) for copies in (1, 2))
    q, k = (torch.randn(B, c.n_head, m, c.head_dim, device=device, dtype=dtype) for m in (n, K))
    of_block, of_all = (dit.rope(torch.arange(m)[None]) for m in (n, K))
    q_line, k_line = (y.transpose(0, 1).flatten(1, 2) for y in (q, k))  # (H, B n, D) and (H, B K, D)
    q_row, k_row = (torch.arange(B, device=device).repeat_interleave(m) for m in (n, K))
    mask = (q_row[:, None] == k_row).log().to(dtype)  # 0, or -inf between rows

    def two_passes():
        dit(z[:B], t, layout=alone, cache=cache)
        dit(z[B:], t)

    for name, slow, fast in [
        ("modulation for each time", lambda: dit.embed_times(every_t[None]), lambda: dit.embed_times(t[None])),
        ("guidance in one pass", two_passes, lambda: dit(z, t, layout=both, cache=cache)),
        (
            "rotated keys in the cache",
            lambda: apply_rope(k, of_all, rotate_interleaved),
            lambda: apply_rope(k[:, :, :n], of_block, rotate_interleaved),
        ),
        (
            "attention row by row",
            lambda: (q_line @ k_line.transpose(1, 2) + mask).softmax(-1) @ k_line,
            lambda: F.scaled_dot_product_attention(q, k, k),
        ),
    ]:
        slow_ms, ms = (1e3 * seconds(function, device, o.repeats) for function in (slow, fast))
        table.add(f"saving, {label}: {name}", ratio=slow_ms / ms, slow_ms=slow_ms, ms=ms)


def main():
    o, _ = parse_options(Options, __doc__)
    device = common.pick_device(o.device)
    if o.compare == o.out:
        raise ValueError(f"--compare {o.compare} would be overwritten: choose another --out")
    earlier = times_of(o.compare) if o.compare else {}
    torch.manual_seed(o.seed)
    name = f"{device}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    table = Table(o.out, earlier, dict(device=name, options=asdict(o)))
    bf16 = common.uses_bf16(device, o.precision)
    if o.new_tokens % o.block_size or o.seq_len % o.block_size:
        raise ValueError(f"--new-tokens and --seq-len must be multiples of --block-size {o.block_size}")
    model = build(o, device)
    rate, bandwidth = ceilings(device, torch.bfloat16 if bf16 else torch.float32, o.repeats)
    table.add("ceiling: products in training", TFLOPs_per_s=rate / 1e12, GB_per_s=bandwidth / 1e9)
    training(o, model, device, table, rate)

    # Generation on a CPU: with weights in fp32 and then in bf16, if it multiplies that.  On CUDA in bf16 alone.
    model, dtypes = build(o, device).eval(), dict(fp32=torch.float32)
    if bf16:
        dtypes = dict(bf16=torch.bfloat16) if device.type == "cuda" else dtypes | dict(bf16=torch.bfloat16)
    for label, dtype in dtypes.items():
        rate, bandwidth = ceilings(device, dtype, o.repeats)
        table.add(f"ceiling: products in {label}", TFLOPs_per_s=rate / 1e12, GB_per_s=bandwidth / 1e9)
        model = model.to(dtype)
        if o.compile:
            model = CompiledColaDLM(model)
        generation(o, model, device, table, rate, bandwidth, label)
        if o.slow:
            savings(o, model, device, table, label)
    print(f"on {name}; all figures are in {o.out}")


if __name__ == "__main__":
    common.run_script(main)
