"""Generation and checkpoints: what a user of ColaDLM relies on."""

import gc
import json
import math
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call
from safetensors.torch import load_file, save_file
from test_models import BLOCK, V, d, small_dit, small_vae
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import cola
import data
import released_format
import sample
from cola import ColaDLM
from dit import DiT, DiTConfig
from extras import compiled, draws
from extras.compiled import CompiledColaDLM
from flow import solver_times, velocity_of_all_blocks
from options import RELEASED, SamplingOptions
from transformer import make_layout

FILES = ("config.json", "model.safetensors")
PROMPTS = [[1, 2, 3], [], [4] * 9, [5] * 8]


@pytest.fixture(scope="module")
def model():
    return ColaDLM(small_vae(), small_dit())


@pytest.fixture(scope="module")
def speaking_model():
    """A model with a tokenizer, whose random weights speak in bytes."""
    tokenizer = data.train_bpe(["ab"], 258)
    return ColaDLM(small_vae(vocab_size=258), small_dit(), tokenizer)


def test_counts_and_order(model):
    for limit in (1, 5, 8):
        assert [len(row) for row in model.generate(PROMPTS, max_new_tokens=limit, steps=2)] == [limit] * 4
    assert model.generate([], steps=2) == []


@pytest.mark.parametrize("options", [{}, dict(temperature=1.0, top_k=9), dict(solver="heun", repetition_penalty=1.2)])
def test_a_row_does_not_depend_on_the_batch(model, options):
    options = dict(max_new_tokens=10, steps=3, **options)
    together = model.generate(PROMPTS, seed=5, **options)
    assert together == model.generate(PROMPTS, seed=5, **options)
    alone = [model.generate([p], seed=5, row_ids=[i], **options)[0] for i, p in enumerate(PROMPTS)]
    assert together == alone
    assert together != model.generate(PROMPTS, seed=6, **options)


def test_finished_rows_leave_the_batch(model, monkeypatch):
    """The fourth row is done after its first token; the others come out as without it."""
    options = dict(max_new_tokens=20, steps=2, seed=3)
    whole = model.generate(PROMPTS, **options)
    eos = whole[3][0]
    sizes = []
    real = model.run_dit
    monkeypatch.setattr(model, "run_dit", lambda z, *args, **kwargs: sizes.append(len(z)) or real(z, *args, **kwargs))
    wanted = [row[: row.index(eos)] if eos in row else row for row in whole]
    assert model.generate(PROMPTS, eos_id=eos, **options) == wanted and wanted[3] == []
    assert sizes[0] in (4, 8) and sizes[-1] <= 6


@pytest.mark.parametrize("ours", [{}, dict(n_codes=5, self_conditioning=True)])
@pytest.mark.parametrize("prompts", [PROMPTS, [[1, 2], [3, 4]]])
def test_a_compiled_step_is_the_same_computation(prompts, ours, monkeypatch):
    monkeypatch.setattr(compiled, "STATIC_LEN", 2 * BLOCK)  # so that the cache is read in several lengths
    model = ColaDLM(small_vae(), small_dit(**ours)).requires_grad_(False)
    options = dict(max_new_tokens=10, steps=2, seed=5, eta=1.0 if ours else 0.0)
    wanted = model.generate(prompts, **options)
    model = CompiledColaDLM(model, backend="aot_eager")  # fails at a graph break
    assert model.generate(prompts, **options) == wanted
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert model.generate(prompts, **options | dict(seed=6)) != wanted
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # nothing was compiled again


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_a_sampler_compiled_for_the_cpu(monkeypatch):
    """With frozen weights, but not with a frozen cache; compiled again, it has the new weights."""
    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", True)  # saves a compilation that only asks
    model = ColaDLM(small_vae(), small_dit(n_layer=1)).requires_grad_(False)

    def latents(model, seed):
        blocks = model.generate_blocks([[]] * 2, 2 * BLOCK, steps=2, cfg_scale=1, seed=seed)
        return torch.cat([block.z for block in blocks], dim=1)

    wanted = [latents(model, seed) for seed in (0, 1)]
    fast = CompiledColaDLM(model)
    for seed in (0, 1, 0):
        torch.testing.assert_close(latents(fast, seed), wanted[seed], atol=1e-4, rtol=1e-4)
    for p in model.dit.parameters():
        p.mul_(1.1)
    assert not torch.allclose(latents(CompiledColaDLM(model), 0), wanted[0], atol=1e-2)


def test_a_compiled_sampler_reuses_its_cache_and_few_batch_sizes(monkeypatch):
    """Also with rows that leave, and with two generations at a time, which must not share one."""
    model = ColaDLM(small_vae(), small_dit()).requires_grad_(False)
    prompts, options = [[i] * (1 + i) for i in range(6)], dict(max_new_tokens=24, steps=1)
    eos = model.generate(prompts, **options)[0][5]
    wanted = [model.generate(prompts, eos_id=eos, seed=seed, **options) for seed in (0, 1)]
    model = CompiledColaDLM(model, backend="eager")
    made, sizes, real = [], set(), model.run_dit
    real_cache = compiled.StaticKVCache
    monkeypatch.setattr(compiled, "StaticKVCache", lambda *args: made.append(args) or real_cache(*args))
    monkeypatch.setattr(model, "run_dit", lambda z, *args: sizes.add(len(z)) or real(z, *args))
    for seed in (0, 1, 0):
        assert model.generate(prompts, eos_id=eos, seed=seed, **options) == wanted[seed]
    noise = torch.full((2, 6, BLOCK, d), float("nan"))
    with pytest.raises(ValueError, match="the logits are not finite"):
        model.generate(prompts, noise=noise, **options)
    gc.collect()  # the error held its generation, which leaves nothing behind
    assert model.generate(prompts, eos_id=eos, seed=0, **options) == wanted[0]
    assert len(made) == 1 and sizes <= {1, 2, 4, 6, 8, 12} and len(sizes) > 2
    streams = [model.stream(prompts, eos_id=eos, seed=seed, **options) for seed in (0, 1)]
    for seed, pieces in enumerate(zip(*zip(*streams, strict=True), strict=True)):
        assert [sum(row, []) for row in zip(*pieces, strict=True)] == wanted[seed]
    assert len(made) == 2


def test_a_compiled_step_writes_into_the_cache_itself():
    """What is written must be an input of the graph, not a part of one, which would be copied as a whole."""
    nodes = []

    def compiler(graph, inputs):
        nodes.extend(graph.graph.nodes)
        return make_boxed_func(graph.forward)

    model = ColaDLM(small_vae(), small_dit()).requires_grad_(False)
    model = CompiledColaDLM(model, backend=aot_autograd(fw_compiler=compiler))
    model.generate([[1], [2]], max_new_tokens=2 * BLOCK, steps=1)
    writes = [node for node in nodes if "index_put" in str(node.target)]
    assert writes and all(node.args[0].op == "placeholder" for node in writes)
    assert not any("_scatter" in str(node.target) for node in nodes)


MEASURE_LOADING = """
import re, sys, torch
from pathlib import Path
import released_format
status = Path("/proc/self/status")
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1])
released_format.load_dit(sys.argv[1])  # a small one, so that all is imported
Path("/proc/self/clear_refs").write_text("5")  # forget the peak
before = peak()
dit = released_format.load_dit(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
for p in dit.parameters():
    p.sum()
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak memory of a process")
@pytest.mark.parametrize("dtype, limit", [("float32", 1.2), ("bfloat16", 0.8)])
def test_loading_holds_one_copy(tmp_path, dtype, limit):
    """Peak memory over the size of the file: of weights as stored, and of weights that are converted to half of it."""
    released_format.save_dit(small_dit(), tmp_path / "small")
    released_format.save_dit(DiT(DiTConfig(dim=512, n_head=4, n_layer=4)), tmp_path / "large")
    size = (tmp_path / "large" / "cola_dit" / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEASURE_LOADING, str(tmp_path / "small"), str(tmp_path / "large"), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert size > 5e7
    assert 0.2 * size < int(done.stdout) < limit * size


def test_stream_yields_what_generate_returns(model):
    options = dict(max_new_tokens=10, steps=2)
    blocks = list(model.stream(PROMPTS, **options))
    assert len(blocks) == 4  # the first row spends 3 of 12 positions on its prompt, so 10 new ones need 4 blocks
    assert [sum(rows, []) for rows in zip(*blocks, strict=True)] == model.generate(PROMPTS, **options)


def test_shorter_limits_are_prefixes(model):
    long, short = (model.generate(PROMPTS, max_new_tokens=n, steps=2) for n in (11, 6))
    assert [row[:6] for row in long] == short


def test_end_of_text_ends_its_own_row_only(model):
    free = model.generate(PROMPTS, max_new_tokens=12, steps=2)
    eos = free[2][3]
    cut = model.generate(PROMPTS, max_new_tokens=12, steps=2, eos_id=eos)
    assert cut == [row[: row.index(eos)] if eos in row else row for row in free]
    assert cut[2] != free[2]


def test_where_a_text_ends():
    """At a limit or before one of several ids; what stands on positions of the prompt does not count.  The text that is
    kept has the id that ended it."""
    state = cola.Generation([0, 2, 3], None, None, n_known=[1, 0, 0], text=[[8], [], []])
    left, z = [3, 0, 2, 9], torch.zeros(3, 4, d)
    tokens = torch.tensor([[7, 1, 2, 3], [1, 2, 7, 4], [1, 9, 7, 2]])
    assert state.add(z, tokens, {7, 9}, left) == [[1, 2, 3], [1, 2], [1]]
    assert left == [0, 0, 0, 0] and state.text == [[8, 1, 2, 3], [1, 2], [1, 9]] and state.last_z is z
    assert state.add(z, torch.tensor([[1] * 4] * 3), {7}, left) == [[], [], []]  # rows that wait for others
    state, left = cola.Generation([0], None, None, n_known=[0], text=[[]]), [9]
    assert state.add(z, torch.tensor([[1, 7, 9, 2]]), set(), left) == [[1, 7, 9, 2]] and left == [5]


def test_text_in_text_out(speaking_model):
    options = dict(max_new_tokens=9, steps=2)
    text, ids = speaking_model.generate(["hello", list(b"hello")], noise=same_noise(2), **options)
    assert isinstance(text, str) and isinstance(ids, list)
    assert text == data.decode_bytes(speaking_model.tokenizer, ids).decode("utf-8", errors="replace")
    pieces = list(speaking_model.stream(["hello"], noise=same_noise(1), **options))
    assert "".join(piece for (piece,) in pieces) == text


def test_special_tokens_of_a_prompt(speaking_model, trained, monkeypatch):
    """Written out they are text unless it is said that they count; an empty text follows the end of another."""
    import sample

    seen, eot = [], speaking_model.tokenizer.eot_token
    monkeypatch.setattr(ColaDLM, "generate_blocks", lambda self, ids, *rest, **options: iter([seen.append(ids)][:0]))
    list(speaking_model.stream(["", [], "a<|endoftext|>"]))
    list(speaking_model.stream(["", "a<|endoftext|>"], special_tokens=True))
    assert seen == [[[eot], [], [*b"a<|endoftext|>"]], [[eot], [97, eot]]]
    start = "--model runs/cola --prompt <|endoftext|> --num-samples 1 --device cpu"
    for more in ("", "--special-tokens"):
        call(sample.main, f"{start} {more}", monkeypatch, trained)
    text, special = seen[2:]
    tokenizer = data.load_tokenizer(str(trained / "runs" / "cola" / "tokenizer.json"))
    assert special == [[tokenizer.eot_token]] and text == [tokenizer.encode_ordinary("<|endoftext|>")]
    assert len(text[0]) > 1


def same_noise(rows):
    return torch.randn(5, 1, BLOCK, d, generator=torch.Generator().manual_seed(0)).repeat(1, rows, 1, 1)


def test_a_character_may_span_two_blocks():
    stream = data.TextStream(data.train_bpe(["ab"], 258))
    first, second = "é".encode()
    assert (stream.write([97, first]), stream.write([second, 98])) == ("a", "éb")
    assert stream.write([first], last=True) == "\ufffd"


def test_guidance(model, generated_latents):
    """Scale 1 is the conditional velocity alone; another scale moves what has a history, and only that."""
    options = dict(prompts=[[]], max_new_tokens=8, steps=4)
    plain, strong = (generated_latents(model, cfg_scale=s, **options) for s in (1.0, 9.0))
    assert torch.equal(plain[0], strong[0])
    assert (plain[1] - strong[1]).abs().max() > 0.1


def test_rows_without_history_are_not_guided(monkeypatch):
    """Beside rows that have one.  A network that answers 1 with history and 0 without."""
    model, z1 = ColaDLM(small_vae(), small_dit()), torch.zeros(2, BLOCK, d)
    monkeypatch.setattr(model, "run_dit", lambda z, *rest: torch.cat([torch.ones_like(z1), torch.zeros_like(z1)]))
    z = model.next_block(model.prefill([[1] * 8, []]), z1, [1.0, 0.0], 3.0)
    assert (z[0] == -3).all() and (z[1] == -1).all()


def test_drawn_tokens_follow_the_distribution():
    logits = torch.log(torch.tensor([0.5, 1e-30, 0.3, 0.2])).expand(1, 100_000, 4)
    uniform = torch.rand(1, 100_000, generator=torch.Generator().manual_seed(0))
    share = draws.pick_tokens(logits, uniform, 1.0, 0, 1.0)[0].bincount(minlength=4) / 100_000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.0, 0.3, 0.2]), atol=0.01, rtol=0)
    weights = torch.tensor([0.0, 2.0, 0.0, 3.0, 0.0]).expand(2, 5)
    assert draws.choose(weights, torch.tensor([0.0, 1.0])).tolist() == [1, 3]  # never one without any weight


def test_patches_of_two_tokens():
    model = ColaDLM(small_vae(patch_size=2), small_dit())
    prompts = [[1, 2, 3], [4] * 8, [], [1] * 7]  # odd ones: their last latent is half padding
    options = dict(max_new_tokens=10, steps=2)
    together = model.generate(prompts, **options)
    assert [len(row) for row in together] == [10] * 4
    assert together == [model.generate([p], row_ids=[i], **options)[0] for i, p in enumerate(prompts)]


def test_times_rounded_as_on_a_gpu_of_the_released_code(generated_latents):
    """There 1000 t is rounded to bfloat16, which moves velocities a little.  A hook does the same."""
    model, options = ColaDLM(small_vae(), small_dit()), dict(prompts=[[1, 2]], max_new_tokens=2, steps=16)
    plain = generated_latents(model, **options)[0]
    model.dit.emb_in.register_forward_pre_hook(lambda module, args: ((1000 * args[0]).bfloat16().float() / 1000,))
    rounded = generated_latents(model, **options)[0]
    assert 1e-3 < (plain - rounded).abs().max() < 0.1 * plain.abs().max()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(steps=0), "steps 0 is out of range"),
        (dict(steps=2.5), "steps 2.5 must be an integer"),
        (dict(cfg_scale=float("inf")), "cfg_scale inf is out of range: it must be a finite number"),
        (dict(max_new_tokens=0), "max_new_tokens 0 is out of range"),
        (dict(temperature=-1.0), "temperature -1.0 is out of range"),
        (dict(top_p=1.5), "top_p 1.5 is out of range"),
        (dict(solver="rk4"), "solver 'rk4' is out of range: it must be one of euler, heun"),
        (dict(pad_id=V), f"token id {V} is outside the vocabulary"),
        (dict(noise=torch.zeros(1, 2, BLOCK, d)), "noise must be"),
        (dict(noise=torch.zeros(0, 1, BLOCK, d)), "noise must be"),
        (dict(row_ids=[]), "row_ids must be 1 integers from 0 on, one for each prompt"),
        (dict(row_ids=[0, 1]), "row_ids must be 1 integers from 0 on, one for each prompt"),
        (dict(row_ids=[-1]), "row_ids must be 1 integers from 0 on, one for each prompt"),
        (dict(seed=2**32), "seed 4294967296 is out of range"),
        (dict(max_new_tokens=2.5), "max_new_tokens 2.5 must be an integer"),
        (dict(steps=np.float32(2.5)), "steps 2.5 must be an integer"),
    ],
)
def test_options_out_of_range(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate([[1]], **options)


def test_bad_prompts(model):
    with pytest.raises(ValueError, match="token id -1 is outside the vocabulary"):
        model.generate([[0, -1]])
    with pytest.raises(ValueError, match="no tokenizer.json"):
        model.generate(["text"])
    for prompts in ("text", 5, {}):
        with pytest.raises(ValueError, match="prompts must be a list"):
            model.generate(prompts)
    for prompts in ([5], [[1.5]], [None]):
        with pytest.raises(ValueError, match="every prompt must be a str or a list of token ids"):
            model.generate(prompts)


def test_numbers_of_numpy(model):
    plain = dict(max_new_tokens=5, steps=2, cfg_scale=3.0, seed=7)
    kinds = dict(max_new_tokens=np.int64(5), steps=np.int32(2), cfg_scale=np.float32(3), seed=np.uint8(7))
    assert model.generate(PROMPTS, **kinds) == model.generate(PROMPTS, **plain)


@pytest.mark.parametrize("part", ["vae.decoder.final_layer.bias", "dit.txt_out.proj.weight"])
def test_weights_that_are_not_finite(part):
    model = ColaDLM(small_vae(), small_dit()).requires_grad_(False)
    model.get_parameter(part)[0] = float("nan")
    with pytest.raises(ValueError, match="the logits are not finite: the weights are damaged"):
        model.generate([[1]], max_new_tokens=1, steps=1)


def test_top_p_stops_above_its_number():
    """At exactly top_p it takes one token more, as the released code does."""
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    counts = [int(draws.filter_logits(logits, top_p=p).isfinite().sum()) for p in (0.49, 0.5, 0.51, 0.74, 0.75)]
    assert counts == [1, 2, 2, 2, 3]


# ----------------------------------------------------------------------------------------------------------------------
# Noise


def test_no_two_blocks_have_the_same_noise():
    """The released seeds of these would be equal, in whole or in the 32 bits that PyTorch takes."""
    blocks = [(0, 0, 0), (0, 0, 1), (0, 10_000, 0), (0, 1, 0), (1000, 0, 0), (0, 2**32, 0), (0, 0, 429), (0, 0, 430)]
    blocks += [(4_290_000_000 - 2**31, 0, 0), (1000, 1, 0), (2000, 0, 0), (1000, 0, 1), (1000, 2**32, 0)]
    blocks += [(704, 5032, 0), (0, 10_000, 1), (0, 20_000, 0)]  # 5032704 = 430 * 10^7 - 2^32
    drawn = [draws.Draws(seed, [row], 1, (2, 2), "cpu").begin(b, [0]) for seed, row, b in blocks]
    assert len(set(map(str, torch.stack(drawn).tolist()))) == len(blocks)


def test_noise_is_that_of_the_released_code_while_its_seeds_differ():
    for seed, row, block in [(0, 0, 0), (999, 9_999, 0), (7, 3, 428)]:
        (generator,) = draws.block_generators(seed, [row], block)
        assert generator.initial_seed() == seed + 1000 * row + 10_000_000 * block
        expected = torch.Generator().manual_seed(generator.initial_seed())
        assert torch.equal(torch.randn(9, generator=generator), torch.randn(9, generator=expected))


def test_noise_of_other_seeds_comes_from_the_whole_state():
    """Of NumPy's Mersenne Twister with the same state: PyTorch's numbers are the low 24 bits of its words."""
    (generator,) = draws.block_generators(1000, [5], 3)
    twister = np.random.MT19937()
    words = np.random.SeedSequence([3, 1000, 5]).generate_state(624)
    twister.state = dict(bit_generator="MT19937", state=dict(key=words, pos=624))
    wanted = (twister.random_raw(2000) & 0xFFFFFF) / 2**24
    assert torch.rand(2000, generator=generator).tolist() == wanted.tolist()
    many = torch.randn(40_000, generator=generator)
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


# ----------------------------------------------------------------------------------------------------------------------
# Long prompts, and texts that go on


@pytest.mark.parametrize("sizes", [dict(), dict(patch_size=2)])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_prompt_in_pieces(sizes, size, monkeypatch):
    """Read a few latents at a time, rows of any length have the history of one pass."""
    model = ColaDLM(small_vae(**sizes), small_dit())
    prompts = [[i % V for i in range(58)], [], [3] * 4, [5] * 17, [7] * 24]
    wanted = model.prefill(prompts, block_size=size)
    monkeypatch.setattr(cola, "PREFILL", 8)
    lengths, real = [], model.vae.read
    monkeypatch.setattr(model.vae, "read", lambda z, *rest: lengths.append(z.shape[1]) or real(z, *rest))
    state = model.prefill(prompts, block_size=size)
    assert len(lengths) > 1 and max(lengths) <= 8
    assert state.n_known == wanted.n_known and state.text == wanted.text
    for name in ("dit_cache", "vae_cache"):
        ours, theirs = getattr(state, name), getattr(wanted, name)
        assert torch.equal(ours.length, theirs.length)
        for a, b in zip(ours.k + ours.v, theirs.k + theirs.v, strict=True):
            for row, n in enumerate(ours.length):
                torch.testing.assert_close(a[row, :, :n], b[row, :, :n], atol=1e-5, rtol=1e-5)
    if wanted.known_z is not None:
        known = wanted.is_known
        assert torch.equal(state.is_known, known)
        torch.testing.assert_close(state.known_z[known], wanted.known_z[known], atol=1e-5, rtol=1e-5)


def test_pieces_end_where_blocks_of_the_vae_do(model, monkeypatch):
    """Also behind a beginning that does not."""

    def read(piece):
        monkeypatch.setattr(cola, "PREFILL", piece)
        state = model.prefill([[1] * 5], 40, block_size=1)
        return model.prefill([[2] * 30], 1, block_size=1, state=state).vae_cache

    for ours, theirs in zip(read(BLOCK).v, read(100).v, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("n_prompt", [0, 2, 3, 7, 8])
@pytest.mark.parametrize("n_new", [0, 3, 5])
def test_a_text_goes_on(patch_size, n_prompt, n_new, monkeypatch):
    """From the state of its beginning, an open block or half a latent included: what has latents keeps them."""
    model = ColaDLM(small_vae(patch_size=patch_size), small_dit())
    options = dict(max_new_tokens=max(n_new, 1), steps=2)
    state = model.prefill([list(range(n_prompt))], 40)
    blocks = list(model.generate_blocks([[]], state=state, **options)) if n_new else []
    n_history = -(-n_prompt // patch_size) // BLOCK * BLOCK
    prompt = [*range(n_prompt), *[V - 1] * (2 * BLOCK * patch_size - n_prompt)]
    text = state.text[0].copy()
    said = sum((block.new[0] for block in blocks), [])[:n_new]
    assert text == prompt[: max(n_prompt, n_history * patch_size)] + said  # padding, if the history ends in half
    before = model.vae.to_dit(model.vae.encode(torch.tensor([prompt])).mu)
    if blocks:
        before = torch.cat([before[:, :n_history]] + [block.z for block in blocks], dim=1)
    kept = before[:, : len(text) // patch_size]
    again = list(model.generate_blocks([[11, 12, 13]], state=state, **options))
    real = model.vae.to_dit
    monkeypatch.setattr(model.vae, "to_dit", lambda z: torch.cat([kept, real(z)[:, kept.shape[1] :]], dim=1))
    fresh = list(model.generate_blocks([text + [11, 12, 13]], **options))
    for a, b in zip(again, fresh, strict=True):
        torch.testing.assert_close(a.z, b.z, atol=1e-4, rtol=1e-4)
        assert a.new == b.new


@pytest.mark.parametrize("compiled", [False, True])
def test_a_text_that_cannot_go_on(model, compiled):
    model = CompiledColaDLM(model, backend="eager") if compiled else model
    options = dict(max_new_tokens=BLOCK, steps=1)
    with pytest.raises(ValueError, match="12 latents are needed, there is room for 8"):
        list(model.generate_blocks([[1] * 8], state=model.prefill([[]], 8), **options))
    for state, prompts in [(model.prefill([[1], [2]]), [[3]]), (model.prefill([[1]]), [[3], [4]])]:
        with pytest.raises(ValueError, match="a state continues one text, in blocks of the size"):
            list(model.generate_blocks(prompts, state=state, **options))
    with pytest.raises(ValueError, match="a state continues one text, in blocks of the size"):
        list(model.generate_blocks([[3]], block_size=4, state=model.prefill([[1]], block_size=1), **options))


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture
def folder(speaking_model, tmp_path):
    speaking_model.save_pretrained(tmp_path)
    return tmp_path


def test_round_trip(speaking_model, folder):
    options = dict(max_new_tokens=6, steps=2)
    modes = {(folder / part / name).stat().st_mode for part in ("cola_vae", "cola_dit") for name in FILES}
    assert len(modes) == 1  # whoever may read one file may read them all
    assert ColaDLM.from_pretrained(folder).generate(["ab"], **options) == speaking_model.generate(["ab"], **options)
    half = ColaDLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dit.txt_in.proj.weight.dtype == torch.bfloat16
    assert len(half.generate(["ab"], **options)) == 1


def test_weights_in_16_bits(speaking_model, folder):
    size = (folder / "cola_dit" / "model.safetensors").stat().st_size
    speaking_model.save_pretrained(folder, torch.float16)
    assert (folder / "cola_dit" / "model.safetensors").stat().st_size < 0.7 * size
    assert json.loads((folder / "cola_dit" / "config.json").read_text())["dtype"] == "float16"
    again = ColaDLM.from_pretrained(folder)
    for p, q in zip(speaking_model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-3)


def test_sharded_files(folder):
    expected = ColaDLM.from_pretrained(folder).state_dict()
    part = folder / "cola_dit"
    tensors = load_file(part / "model.safetensors")
    (part / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, part / file)
        index |= dict.fromkeys(names[i::3], file)
    (part / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=index)))
    loaded = ColaDLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    ColaDLM.from_pretrained(folder).save_pretrained(folder)  # one file again: the index must not win over it
    assert not (part / "model.safetensors.index.json").exists()
    (part / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=index)))
    (part / file).unlink()
    with pytest.raises(FileNotFoundError, match="No such file or directory: .*00003-of-00003"):
        ColaDLM.from_pretrained(folder)


def with_index(folder, name):
    """All tensors of the prior are in the file of this name, as an index says."""
    part = folder / "cola_dit"
    weight_map = dict.fromkeys(load_file(part / "model.safetensors"), name)
    (part / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))
    return part


@pytest.mark.parametrize("name", ["../a.safetensors", "{}/a.safetensors", "", "..", ".", "b/a.safetensors", "a.json"])
def test_an_index_leads_to_no_other_folder(folder, name):
    name = name.format(folder)
    part = with_index(folder, name)
    (part / "b").mkdir()
    for place in (folder, part / "b"):
        shutil.copy(part / "model.safetensors", place / "a.safetensors")
    shutil.copy(part / "model.safetensors", part / "a.json")
    with pytest.raises(ValueError, match="must be a .safetensors file in that folder"):
        ColaDLM.from_pretrained(folder)


def test_links_to_files_are_files(folder):
    """As in the cache of Hugging Face, whose blobs lie in another folder."""
    expected = ColaDLM.from_pretrained(folder).state_dict()
    part = with_index(folder, "a.safetensors")
    (folder / "blobs").mkdir()
    for name, blob in {"a.safetensors": "model.safetensors", "config.json": "config.json"}.items():
        (part / blob).rename(folder / "blobs" / blob)
        (part / name).symlink_to(Path("..") / "blobs" / blob)
    loaded = ColaDLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a device"])
@pytest.mark.parametrize("name", [*FILES, "model.safetensors.index.json", "../tokenizer.json"])
def test_what_is_no_file_is_not_opened(folder, name, kind):
    """Opening a pipe would wait for ever."""
    file = folder / "cola_vae" / name
    file.unlink(missing_ok=True)
    {"pipe": os.mkfifo, "folder": Path.mkdir, "link to a device": lambda f: f.symlink_to("/dev/zero")}[kind](file)
    with pytest.raises(ValueError, match=f"{Path(name).name} is not a file but a folder, a pipe or a device$"):
        ColaDLM.from_pretrained(folder)


@pytest.mark.parametrize("value, dtype", [(math.nan, torch.float32), (-math.inf, torch.bfloat16), (1e5, torch.float16)])
def test_weights_that_are_not_finite_are_not_saved(folder, speaking_model, value, dtype):
    before = (folder / "cola_dit" / "model.safetensors").read_bytes()
    bias = speaking_model.dit.txt_in.proj.bias
    old = bias[0].item()
    bias.data[0] = value
    try:
        for place in (folder, folder / "new"):
            with pytest.raises(ValueError, match=f"^txt_in.proj.bias is not finite in {dtype}"):
                released_format.save_dit(speaking_model.dit, place, dtype)
    finally:
        bias.data[0] = old
    assert (folder / "cola_dit" / "model.safetensors").read_bytes() == before and not (folder / "new").exists()


def edit_weights(folder, change):
    file = folder / "cola_dit" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("txt_in.proj.bias"), "1 tensors are missing and 0 are unknown, first txt_in.proj.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "0 tensors are missing and 1 are unknown, first extra"),
        (lambda t: t.update({"txt_in.proj.bias": torch.zeros(3)}), r"txt_in.proj.bias has shape \(3,\)"),
        (lambda t: t.update({"txt_in.proj.bias": t["txt_in.proj.bias"].int()}), "bias holds I32, only F32, "),
    ],
)
def test_loading_is_strict(folder, change, message):
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        ColaDLM.from_pretrained(folder)


def test_rotary_buffers_may_be_absent(folder):
    edit_weights(folder, lambda t: [t.pop(name) for name in list(t) if "rope" in name])
    ColaDLM.from_pretrained(folder)


def test_damaged_files(folder):
    file = folder / "cola_vae" / "model.safetensors"
    whole = file.read_bytes()
    for size in (4, len(whole) // 2):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged or truncated"):
            ColaDLM.from_pretrained(folder)
    file.write_bytes(whole)
    config = folder / "cola_vae" / "config.json"
    good = json.loads(config.read_text())
    for content, message in [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        (json.dumps(good | dict(num_heads=0)), "n_head 0 must be at least 1"),
        (json.dumps(good | dict(dim=32.0)), "dim 32.0 must be of type int"),
        (json.dumps(good | dict(layer_norm_eps=float("nan"))), "norm_eps nan must be a positive number"),
        ("[" * 100_000, "not valid JSON"),
        (json.dumps(good | dict(dim=2**63)), f"dim {2**63} must be at least 1 and at most {2**31}$"),
        (json.dumps(good | dict(dim=1e30)), r"dim 1e\+30 must be of type int$"),
        (json.dumps(good | dict(rope_theta=10**400)), "rope_theta 10{17}[.]{3}0{19} must be a positive number"),
        (json.dumps(good | dict(dim=2**31, ffn_dim=2**31, num_heads=1)), "the configuration cannot be built"),
        (json.dumps(good | dict(encoder_num_blocks=100_000)), "n_encoder_layer 100000 is more than the .. tensors"),
    ]:
        config.write_text(content)
        with pytest.raises(ValueError, match=message):
            ColaDLM.from_pretrained(folder)
    shutil.rmtree(folder / "cola_vae")
    with pytest.raises(FileNotFoundError, match="is this a model folder"):
        ColaDLM.from_pretrained(folder)


def test_a_vae_and_a_prior_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit together: a latent has 4 channels in the VAE and 8 in the prior"):
        ColaDLM(small_vae(latent_dim=4), small_dit())


def test_a_tokenizer_larger_than_the_vocabulary(folder):
    data.save_tokenizer(data.train_bpe(["abcabc abab"], 300), folder / "tokenizer.json")
    with pytest.raises(ValueError, match="has 2[56][0-9] ids, the model 258"):
        ColaDLM.from_pretrained(folder)


def test_tokenizer_is_found_one_folder_up(speaking_model, tmp_path):
    inner = tmp_path / "inner"
    speaking_model.save_pretrained(inner)
    Path(inner / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert ColaDLM.from_pretrained(inner).tokenizer.n_vocab == 258


# ----------------------------------------------------------------------------------------------------------------------
# Blocks of another size than the prior's own


@pytest.mark.parametrize("vae_block", [1, BLOCK])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_any_block_size(vae_block, size):
    """Named in sampling, it is as if it stood in the configuration; and a row does not depend on its batch."""
    vae, dit = small_vae(block_size=vae_block), small_dit()
    other = small_dit(block_size=size)
    other.load_state_dict(dit.state_dict())
    options = dict(max_new_tokens=10, steps=3, seed=5)
    rows = ColaDLM(vae, dit).generate(PROMPTS, block_size=size, **options)
    wanted = ColaDLM(vae, other).generate_blocks(PROMPTS, **options)
    for block, same in zip(ColaDLM(vae, dit).generate_blocks(PROMPTS, block_size=size, **options), wanted, strict=True):
        torch.testing.assert_close(block.z, same.z)
        assert block.new == same.new
    for i, (prompt, row) in enumerate(zip(PROMPTS, rows, strict=True)):
        assert len(row) == 10
        assert ColaDLM(vae, dit).generate([prompt], block_size=size, row_ids=[i], **options) == [row]


@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_decoder_does_not_see_beyond_the_history_of_a_row(size):
    """Keys of a short prompt in a batch with a long one, where a block ends inside one of the VAE's."""
    model = ColaDLM(small_vae(), small_dit())
    together = model.prefill([[1, 2, 3], [4] * 9], block_size=size)
    for i, prompt in enumerate([[1, 2, 3], [4] * 9]):
        alone = model.prefill([prompt], block_size=size)
        n = alone.vae_cache.length[0]
        assert n == together.vae_cache.length[i] == len(prompt) // size * size
        for a, b in zip(alone.vae_cache.k, together.vae_cache.k, strict=True):
            torch.testing.assert_close(a[0, :, :n], b[i, :, :n])


def test_blocks_of_every_size_have_the_velocity_of_training():
    """The sampler's caches, with blocks other than the prior's, against all blocks at once in the training layout."""
    dit, n = small_dit(), 8
    clean, zt = torch.randn(2, n, d), torch.randn(2, n, d)
    t = torch.tensor([0.7, 0.3])
    for size in (1, 2, 8):
        wanted = velocity_of_all_blocks(dit, clean, zt, t, block_size=size)
        cache = dit.new_cache(2, n)
        for start in range(0, n, size):
            block = slice(start, start + size)
            layout = make_layout(size, size, dit.rope, "cpu", cache)
            v = dit(zt[:, block], t, None, layout, cache)
            torch.testing.assert_close(v, wanted[:, block], atol=1e-5, rtol=1e-4)
            dit(clean[:, block], torch.zeros(1), None, layout, cache)
            cache.commit(size)


@pytest.mark.parametrize("self_conditioning", [False, True])
@pytest.mark.parametrize("stagger", [0.0, 0.6])
def test_a_block_takes_the_velocities_of_training(stagger, self_conditioning):
    """Two blocks by the sampler against the training layout, step by step: the finished block is clean history, the
    other branch has none, and what has arrived is its own estimate."""
    dit, size, steps, scale = small_dit(self_conditioning=self_conditioning), 4, 5, 2.5
    model = ColaDLM(small_vae(), dit)
    noise = torch.randn(2, 1, size, d, generator=torch.Generator().manual_seed(3))
    options = dict(max_new_tokens=2 * size, steps=steps, eta=0.0, cfg_scale=scale, stagger=stagger)
    found = [block.z for block in model.generate_blocks([[]], noise=noise, **options)]
    times = [torch.as_tensor(t).expand(size, 1) for t in solver_times(steps, block_size=size, stagger=stagger)]
    for clean, z, wanted in [(noise[0][:, :0], noise[0], found[0]), (found[0], noise[1], found[1])]:
        guess = [torch.zeros_like(z), torch.zeros_like(z)]
        for t, following in pairwise(times):
            v = []
            for i, history in enumerate([clean, clean[:, :0]]):
                n = history.shape[1]
                guess[i] = torch.where(t == 0, z, guess[i])
                estimate = torch.cat([torch.zeros_like(history), guess[i]], dim=1) if self_conditioning else None
                row, whole = F.pad(t[:, 0], (n, 0))[None], torch.cat([history, z], dim=1)
                v.append(velocity_of_all_blocks(dit, whole, whole, row, row == 0, size, estimate)[:, n:])
                guess[i] = z - t * v[i]
            z = z + (following - t) * (v[1] + (scale if clean.shape[1] else 1.0) * (v[0] - v[1]))
        torch.testing.assert_close(z, wanted, atol=1e-4, rtol=1e-4)


def test_a_block_costs_one_pass_for_each_step(monkeypatch):
    model, passes = ColaDLM(small_vae(), small_dit(n_codes=5)), []
    real = ColaDLM.run_dit
    monkeypatch.setattr(ColaDLM, "run_dit", lambda self, z, *rest: passes.append(z.shape[:2]) or real(self, z, *rest))
    model.generate([[]], max_new_tokens=3 * 4, steps=2, cfg_scale=2.0)
    assert passes == [(1, 4), (1, 4), (2, 8), (2, 4), (2, 8), (2, 4)]  # the first one reads the block before
    passes.clear()
    model.generate([[]], max_new_tokens=2 * 4, steps=2, cfg_scale=2.0, solver="draw")  # the marginal needs no pass
    assert passes == [(1, 4), (1, 4), (1, 8), (1, 4)]


@pytest.mark.parametrize("stagger", [0.0, 1.0])
def test_drawn_latents_are_codes(stagger):
    """A row does not depend on its batch, nor what the prompt determines on the draws."""
    dit = small_dit(n_codes=5, self_conditioning=True)
    dit.codebook.variance.fill_(1e-6)
    dit.txt_out.requires_grad_(False).proj.weight.zero_(), dit.txt_out.proj.bias.zero_()  # it adds to the mixture
    model, options = ColaDLM(small_vae(), dit), dict(max_new_tokens=8, steps=4, solver="draw", stagger=stagger, eta=1.0)
    (one, *_), (both, *_) = ([b.z for b in model.generate_blocks(ids, **options)] for ids in ([[7]], [[7], [8, 9]]))
    torch.testing.assert_close(one, both[:1], atol=1e-4, rtol=1e-4)
    known = model.vae.to_dit(model.vae.encode(torch.tensor([[7] + [V - 1] * 3])).mu)[:, :1]
    torch.testing.assert_close(one[:, :1], known)
    assert torch.cdist(one[0, 1:], dit.codebook.codes).min(-1).values.max() < 1e-3
    seen = []  # by --show-steps
    model.generate([[7]], **options, watch=lambda z, t, new: seen.append((t, len(new[0]))))
    assert [t for t, _ in seen[:4]] == pytest.approx([0.75, 0.5, 0.25, 0.0]) and seen[0][1] == 3
    with pytest.raises(ValueError, match="takes a prior with codes"):
        ColaDLM(small_vae(), small_dit()).generate([[]], solver="draw")


def test_what_sample_hands_on(trained, monkeypatch, capsys):
    """Ids of padding and end, and fp32 weights with products in bf16, which is another text's worth of rounding."""
    seen = []
    real = ColaDLM.generate

    def generate(self, prompts, **options):
        autocast = torch.is_autocast_enabled("cpu")
        seen.append((options["pad_id"], options["eos_id"], autocast, next(self.parameters()).dtype))
        return real(self, prompts, **options)

    monkeypatch.setattr(ColaDLM, "generate", generate)
    start = "--model runs/cola --device cpu --steps 2 --max-new-tokens 4 --num-samples 2"
    for more in ("", "--pad-id 7 --eos-id 3 4 --dtype autocast", "--no-stop-at-eos --dtype bf16"):
        call(sample.main, f"{start} {more}", monkeypatch, trained)
    eos = ColaDLM.from_pretrained(trained / "runs" / "cola", with_tokenizer=True).tokenizer.eot_token
    assert seen == [
        (None, [eos], False, torch.float32),
        (7, [3, 4], True, torch.float32),
        (None, None, False, torch.bfloat16),
    ]


def test_what_training_had_not_is_reported(trained, monkeypatch, capsys):
    start = "--model runs/cola --device cpu --steps 1 --max-new-tokens 1 --num-samples 1"
    for more, wanted in [
        (f"--prompt {'x' * 33}", "prompt of 33 tokens, training had 32"),
        (f"--prompt {'x' * 32}", ""),
        ("--block-size 8", "blocks of 8, training had 1, 2, 4"),
        ("--block-size 2", ""),
    ]:
        call(sample.main, f"{start} {more}", monkeypatch, trained)
        err = capsys.readouterr().err
        assert err.startswith(wanted) and err.count("\n") == bool(wanted)


def test_the_default_guidance_of_a_block_size():
    """The scripts guide blocks of one less; the library has the released 7 for all."""
    options = SamplingOptions()
    assert [options.guidance(size) for size in (1, 2, 16)] == [4.0, 7.0, 7.0] and RELEASED.guidance(1) == 7.0
    assert SamplingOptions(cfg_scale=2.5).guidance(1) == SamplingOptions(cfg_scale=2.5).guidance(4) == 2.5


def test_guidance_is_that_of_the_blocks_in_use(model, monkeypatch):
    seen = []
    real = ColaDLM.next_block
    monkeypatch.setattr(ColaDLM, "next_block", lambda self, *args: seen.append(args[3]) or real(self, *args))
    for size in (1, 2):
        model.generate([[1]], max_new_tokens=1, steps=1, cfg_scale=0.0, block_size=size)
    assert seen == [4.0, 7.0]
