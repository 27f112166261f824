"""Agreement with the released implementation, run in fp32 on a small model with random weights (tests/oracle).

case.json says how every tensor was computed.  Tolerances: 5e-5 for the DiT and the flow-matching loss (an erf in place
of the tanh in GELU shows as 2e-4), 1e-4 for the VAE and for the latents of a generation; token ids exactly."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

import cola
import flow
from dit import DiT, DiTConfig
from extras import draws
from vae import TextVAE, VAEConfig

FOLDER = Path(__file__).parent / "oracle"
CASE = json.loads((FOLDER / "case.json").read_text())
EXPECTED = load_file(FOLDER / "expected.safetensors")
BLOCK = CASE["block_size"]


@pytest.fixture(scope="module")
def model():
    return cola.ColaDLM.from_pretrained(FOLDER)


def padded(name, lens):
    """A tensor that holds samples one after the other, as (B, longest, ...)."""
    return pad_sequence(list(EXPECTED[name].split(EXPECTED[lens].tolist())), batch_first=True)


def assert_rows(actual, name, lens, atol):
    flat = torch.cat([row[:n] for row, n in zip(actual, EXPECTED[lens].tolist(), strict=True)])
    torch.testing.assert_close(flat, EXPECTED[name], atol=atol, rtol=0)


def test_posterior(model):
    posterior = model.vae.encode(padded("encode.ids", "encode.id_lens"))
    assert_rows(posterior.mu, "encode.mean", "encode.lat_lens", 1e-4)
    assert_rows(posterior.logvar, "encode.logvar", "encode.lat_lens", 1e-4)
    eps = padded("encode.sample_eps", "encode.lat_lens")
    assert_rows(posterior.mu + torch.exp(0.5 * posterior.logvar) * eps, "encode.sample", "encode.lat_lens", 1e-4)


def test_decoder(model):
    z = padded("decode.z", "decode.lens")
    assert_rows(model.vae.decode(z), "decode.logits", "decode.lens", 1e-4)
    cache, n = model.vae.new_cache(1, z.shape[1]), int(EXPECTED["decode.lens"][0])
    blocks = []
    for start in range(0, n, BLOCK):
        blocks.append(model.vae.decode(z[:1, start : start + BLOCK], cache))
        cache.commit(BLOCK)
    torch.testing.assert_close(torch.cat(blocks, 1)[0], EXPECTED["decode.logits_blockwise_s0"], atol=1e-4, rtol=0)


def test_velocity(model):
    z, t = padded("dit.z", "dit.lens"), padded("dit.t", "dit.lens") / 1000
    each = torch.arange(z.shape[1])[None]  # a time of its own for each latent
    assert_rows(model.dit(z, t, each), "dit.v", "dit.lens", 5e-5)
    assert_rows(model.dit(z, torch.tensor([0.4375])), "dit.v_scalar_t437.5", "dit.lens", 5e-5)
    assert_rows(model.dit(z, EXPECTED["dit.t_per_sample"] / 1000), "dit.v_per_sample_t", "dit.lens", 5e-5)
    torch.testing.assert_close(model.dit.emb_in(EXPECTED["dit.temb_t"] / 1000), EXPECTED["dit.temb"], atol=5e-5, rtol=0)


def test_cached_velocity(model):
    """Histories of different lengths (one empty) in one batch; the unconditional rows in the same batch."""
    z, lens = padded("dit.z", "dit.lens"), EXPECTED["dit.lens"]
    B, history = len(lens), lens - BLOCK
    cache = model.dit.new_cache(B, int(lens.max()) + BLOCK)
    model.dit(z[:, : int(history.max())], torch.zeros(1), cache=cache)
    cache.commit(history)
    query = torch.stack([row[n - BLOCK : n] for row, n in zip(z, lens, strict=True)])
    t = EXPECTED["dit.query_t"].view(B, BLOCK) / 1000
    each = torch.arange(BLOCK)[None]  # a time of its own for each latent
    v = model.dit(query.repeat(2, 1, 1), t.repeat(2, 1), each, cache=cache).flatten(0, 1)
    expected = torch.cat([EXPECTED["dit.v_query_cached"], EXPECTED["dit.v_query_uncond"]])
    torch.testing.assert_close(v, expected, atol=5e-5, rtol=0)
    model.dit(query, torch.zeros(1), cache=cache)
    cache.commit(BLOCK)
    v = model.dit(EXPECTED["dit.query2_z"].view(B, BLOCK, -1), t, each, cache=cache).flatten(0, 1)
    torch.testing.assert_close(v, EXPECTED["dit.v_query2_cached"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ["fm", "fm_prompt"])
def test_flow_matching_loss_and_gradients(model, name, monkeypatch):
    info = CASE[f"{name}_info"]
    z0, z1 = padded(f"{name}.z0", f"{name}.lens"), padded(f"{name}.z1", f"{name}.lens")
    prompt = padded(f"{name}.ts_noisy", f"{name}.lens") == 0
    t = EXPECTED[f"{name}.t"]
    valid = torch.arange(z0.shape[1]) < torch.tensor(info["unpadded_lens"])[:, None]
    loss, counts = 0, (valid & ~prompt).sum(1)
    for i, block_size in enumerate(EXPECTED[f"{name}.block_sizes"].tolist()):  # each row has a block size of its own
        monkeypatch.setattr(model.dit.config, "block_size", block_size)
        row = [x[i : i + 1, : EXPECTED[f"{name}.lens"][i]] for x in (z0, z1, prompt, valid)]
        one = flow.flow_matching_loss(model.dit, *row[:2], t[i : i + 1], *row[2:])
        loss = loss + one * counts[i] / counts.sum()
    assert loss.item() == pytest.approx(info["loss"], rel=1e-5)
    model.dit.zero_grad()
    loss.backward()
    norms = {key: p.grad.norm().item() for key, p in model.dit.named_parameters()}
    assert norms == pytest.approx(info["grad_norms"], rel=1e-4)
    for key in ("txt_in.proj.weight", "txt_out.proj.weight", "blocks.0.msa.norm_k.weight"):
        grad = model.dit.get_parameter(key).grad
        torch.testing.assert_close(grad, EXPECTED[f"{name}.grad.{key}"], atol=5e-5, rtol=0)


def generation_case(name):
    run = CASE["e2e"][name]
    noise = EXPECTED["e2e.seeded_noise" if name == "seeded" else "e2e.noise"][: run["n_blocks"]]
    rows = 1 if name == "eos" else len(CASE["prompts"])
    options = dict(steps=run["timestep_num"], cfg_scale=run["guidance_scale"])
    options |= dict(repetition_penalty=run["repetition_penalty"], max_new_tokens=12)
    return CASE["prompts"][:rows], noise[:, :rows], options, run["generated"]


@pytest.mark.parametrize("name", CASE["e2e"])
def test_generation_token_for_token(model, name):
    prompts, noise, options, expected = generation_case(name)
    assert model.generate(prompts, noise=noise, **options) == expected
    alone = [model.generate([p], noise=noise[:, i : i + 1], **options)[0] for i, p in enumerate(prompts)]
    assert alone == expected


@pytest.mark.parametrize("name", ["g7_s4", "g1_s4", "g7_s16", "g1_s16"])
def test_generated_latents(model, name, generated_latents):
    prompts, noise, options, _ = generation_case(name)
    latents = generated_latents(model, prompts=prompts, noise=noise, **options)
    torch.testing.assert_close(torch.stack(latents), EXPECTED[f"e2e.{name}.latents"], atol=1e-4, rtol=0)


def test_seeds_of_the_released_code(model):
    """seed + 1000 row + 10^7 block gives the noise that the released code draws for integer sample ids."""
    rows = {3: 0, 11: 3, 12: 4}  # sample id: row of the recorded noise
    for sample_id, row in rows.items():
        for block in range(2):
            (generator,) = draws.block_generators(123, [sample_id], block)
            drawn = torch.randn(BLOCK, CASE["latent_dim"], generator=generator)
            assert torch.equal(drawn, EXPECTED["e2e.seeded_noise"][block, row])


def test_choosing_tokens():
    logits, context = EXPECTED["sample.logits"], EXPECTED["sample.ctx"]
    for setting in CASE["sample_settings"]:
        options = {key: setting[key] for key in ("temperature", "top_k", "top_p")}
        kept = draws.filter_logits(logits, **options).isfinite()
        assert torch.equal(kept, EXPECTED[f"sample.kept_{setting['index']}"])
    seen = torch.zeros(len(logits), logits.shape[-1], dtype=torch.bool).scatter_(1, context, True)
    for i, penalty in enumerate([1.1, 1.5]):
        penalised = draws.penalise(logits, seen, penalty)
        torch.testing.assert_close(penalised, EXPECTED[f"sample.penalised_{i}"])
        assert torch.equal(draws.pick_tokens(penalised, None, 0, 0, 1), EXPECTED[f"sample.greedy_{i}"])
    kept = draws.filter_logits(draws.penalise(logits, seen, 1.1), temperature=0.8, top_k=20, top_p=0.9).isfinite()
    assert torch.equal(kept, EXPECTED["sample.kept_all"])


def test_round_trip_of_the_released_files(model, tmp_path):
    model.save_pretrained(tmp_path)
    for part in ("cola_vae", "cola_dit"):
        ours, theirs = load_file(tmp_path / part / "model.safetensors"), load_file(FOLDER / part / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        ours, theirs = (json.loads((f / part / "config.json").read_text()) for f in (tmp_path, FOLDER))
        assert ours == {key: value for key, value in theirs.items() if key != "transformers_version"}


@pytest.mark.parametrize(
    "cls, config, count, n_tensors, digest",
    [
        (DiT, DiTConfig(), 1_829_875_728, 446, "495d25441d04ca92"),
        (TextVAE, VAEConfig(), 501_871_574, 133, "9506919a8de13cf6"),
    ],
)
def test_names_and_shapes_of_the_2b_model(cls, config, count, n_tensors, digest):
    """The digest is that of the sorted lines "name (shape)" of the released checkpoint's parameters."""
    with torch.device("meta"):
        params = dict(cls(config).named_parameters())
    assert sum(p.numel() for p in params.values()) == count
    assert len(params) == n_tensors
    lines = sorted(f"{name} {tuple(p.shape)}" for name, p in params.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest
