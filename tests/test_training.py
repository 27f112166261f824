"""Training: the pipeline learns, resumes exactly, and says in one line what is wrong with its input."""

import ast
import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import pairwise

import autoregressive
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from conftest import COMMON, PRIOR_SIZE, ROOT, VAE_SIZE, call, losses, run
from safetensors.torch import load_file

import common
import data
import sample
import train_prior
import train_vae
import training
from cola import ColaDLM
from dit import DiT, DiTConfig
from extras.kernels import compile_blocks
from flow import flow_matching_loss, sample_times, simulated_prompts
from measure import judge
from options import VAE_PARTS, PriorOptions, VAEOptions, check_range, parse_options
from released_format import load_dit, load_vae
from train_vae import VAEObjective
from training import Run, saved_options
from vae import Posterior, TextVAE, VAEConfig, masked_view_loss

STATE = "shard-00001-model-00001-of-00001.safetensors"  # of a run with one process, in training/<step>


def test_one_batch_is_learned_until_sampling_gives_it_back():
    """Both stages on four random sequences; then every continuation of a prompt is right, and from noise comes one of
    the four.  (60 of 64 do; a noise that falls between two of them may end between them.)"""
    B, L, block, vocab, d = 4, 8, 4, 40, 8
    idx = torch.randint(0, vocab - 1, (B, L), generator=torch.Generator().manual_seed(0))

    vae = TextVAE(VAEConfig(vocab, 64, 128, 2, 1, 1, d, 1, block))
    optimizer = common.make_optimizer([(vae, 1.0)], "muon", 0.0)
    objective = VAEObjective(VAEOptions(beta=1e-3, mask_weight=0.1, mask_ratio=0.1, decoder_noise=0.3), vae)
    for step in range(150):
        loss, _ = objective(idx, training.step_generator(0, step, "cpu"))
        loss.backward()
        common.optimizer_step(optimizer, 3e-3, 1.0)
    assert torch.equal(vae.likeliest(vae.encode(idx).mu), idx)

    dit, steps = DiT(DiTConfig(d, 128, 2, 64, 48, 2, 4, block)), 400
    optimizer = common.make_optimizer([(dit, 1.0)], "muon", 0.0)
    copies = idx.repeat(8, 1)  # of each row
    for step in range(steps):
        generator = training.step_generator(1, step, "cpu")
        with torch.no_grad():
            z0 = vae.encode(copies).sample(generator)
        z1, t = torch.randn(z0.shape, generator=generator), sample_times(len(z0), 1.0, 1.0, generator)
        loss = flow_matching_loss(dit, z0, z1, t, simulated_prompts(len(z0), L, block, 0.3, generator))
        loss.backward()
        common.optimizer_step(optimizer, training.learning_rate(step, steps, 20, 1.0, 6e-3, 1e-5), 1.0)

    model, texts = ColaDLM(vae, dit), idx.tolist()
    for cut in (block, block + 1, 2 * block - 1):
        new = model.generate([row[:cut] for row in texts], max_new_tokens=L - cut, cfg_scale=1.0)
        assert new == [row[cut:] for row in texts]
    unconditional = model.generate([[]] * 64, max_new_tokens=L, cfg_scale=1.0)
    assert sum(row in texts for row in unconditional) >= 56
    assert all(text in unconditional for text in texts)


# ----------------------------------------------------------------------------------------------------------------------
# The scripts, run as a user runs them


def test_several_samples_of_a_jointly_trained_model(trained, monkeypatch, capsys):
    call(sample.main, "--num-samples 3 --max-new-tokens 8 --steps 2 --model runs/joint", monkeypatch, trained)
    assert capsys.readouterr().out.count("--- sample") == 3


def test_a_block_is_shown_as_it_forms(trained):
    """A line for every step; the last of each block is what comes out, whatever the block size."""
    start = "--prompt Line --num-samples 1 --max-new-tokens 8 --steps 3 --block-size 2 --no-stop-at-eos"
    done = run("sample.py", start, trained)
    assert done.returncode == 0, done.stderr
    plain = done.stdout
    shown = run("sample.py", f"{start} --show-steps", trained).stdout
    blocks = [re.findall(rf"^ *{t} .{{12}}(.*)$", shown, re.MULTILINE) for t in (r"0\.807", r"0\.639", r"0\.000")]
    assert len(blocks[0]) == len(blocks[1]) == len(blocks[2]) >= 4
    assert plain == "Line" + "".join(map(ast.literal_eval, blocks[2]))[: len(plain) - 5] + "\n"


def test_without_a_run_the_model_of_the_repository_speaks(tmp_path):
    done = run("sample.py", "--num-samples 3 --max-new-tokens 8", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--- sample") == 3 and done.stderr.strip().endswith("pretrained")


def test_judging_from_the_command_line(trained, monkeypatch, capsys):
    size = "--num-samples 4 --max-new-tokens 8"
    call(autoregressive.main, f"--seconds 0.1 {size}", monkeypatch, trained)
    call(judge.main, f"{size} --prompt-tokens 4 --steps 2 --texts ar.jsonl", monkeypatch, trained)
    rows = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if line.endswith(" bytes")]
    names = ["held-out text", "words shuffled", "bigram samples", "unigram samples", "ar.jsonl", "samples"]
    assert rows == [*names, "continuations"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_run_folders_hold_what_they_should(trained):
    for folder in ("runs/cola", "runs/joint"):
        model = ColaDLM.from_pretrained(trained / folder)
        assert model.tokenizer.n_vocab == model.vae.config.vocab_size <= 300
        rows = [json.loads(line) for line in (trained / folder / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
        saved = load_file(trained / folder / "cola_dit" / "model.safetensors")["txt_in.proj.weight"]
        assert [file.name for file in (trained / folder / "training").iterdir()] == ["6"]
        state = load_file(trained / folder / "training" / "6" / STATE)
        raw, average = (state[f"{name}.dit.txt_in.proj.weight"] for name in ("trained", "ema"))
        best = min((row for row in rows if "held_out" in row), key=lambda row: row["held_out"])["step"]
        assert torch.equal(saved, average) == (best == 6) and not torch.equal(saved, raw)


def weights(folder, part):
    return load_file(folder / part / "model.safetensors")


def test_the_vae_learns_in_joint_training_only(trained):
    stage1, frozen, joint = (weights(trained / "runs" / name, "cola_vae") for name in ("vae", "cola", "joint"))
    assert all(torch.equal(stage1[name], frozen[name]) for name in stage1)
    assert all(not torch.equal(stage1[name], joint[name]) for name in stage1 if "proj.weight" in name)


@pytest.mark.parametrize(
    "main, options, part, source",
    [
        (train_vae.main, "--data {text} --vocab-size 300 " + VAE_SIZE, "cola_vae", "runs/vae"),
        (train_prior.main, "--vae {trained}/runs/vae " + PRIOR_SIZE, "cola_dit", "runs/cola"),
        (train_prior.main, "--vae {trained}/runs/vae --joint " + PRIOR_SIZE, "cola_vae", "runs/joint"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(trained, text, tmp_path, monkeypatch, main, options, part, source):
    """Stop after the checkpoint of step 3 of 6, resume: every loss and every weight is the same to the bit."""
    steps, real_step = 0, training.optimizer_step

    def stopping_step(*args):
        nonlocal steps
        if steps == 4:
            raise KeyboardInterrupt
        steps += 1
        return real_step(*args)

    arguments = f"{options.format(text=text, trained=trained)} {COMMON} --steps 6 --save-every 3 --out out"
    monkeypatch.setattr(training, "optimizer_step", stopping_step)
    with pytest.raises(KeyboardInterrupt):
        call(main, arguments, monkeypatch, tmp_path)
    monkeypatch.setattr(training, "optimizer_step", real_step)
    call(main, "--resume --out out", monkeypatch, tmp_path)
    assert losses(tmp_path / "out") == losses(trained / source)
    resumed, whole = weights(tmp_path / "out", part), weights(trained / source, part)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_run_is_made_longer_or_shorter(trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained / "runs" / "vae", tmp_path / "runs" / "vae")
    for steps, row in [(9, dict(step=6, planned_steps=9)), (7, dict(step=6, planned_steps=7))]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(trained / "runs" / "cola", tmp_path / "out")
        call(train_prior.main, f"--resume --steps {steps} --out out", monkeypatch, tmp_path)
        assert f"planned anew: {steps} steps, not 6; learning rate" in capsys.readouterr().out
        rows = losses(tmp_path / "out")
        assert row in rows and rows[-1]["step"] == steps and saved_options(tmp_path / "out")["steps"] == steps
        lr = training.learning_rate(6, steps, 50, 0.5, 8e-3, 1e-5)
        assert next(row["lr"] for row in rows if row["step"] == 7) == lr
    with pytest.raises(ValueError, match="has done 7 steps already: --steps 3 is less"):
        call(train_prior.main, "--resume --steps 3 --out out", monkeypatch, tmp_path)


def test_a_gradient_that_is_not_finite_moves_nothing(text, tmp_path, monkeypatch):
    """One such step is skipped and counted; ten in a row end the run, whose last good state is kept."""
    real_forward, calls = VAEObjective.forward, []

    def poisoned(self, idx, generator):
        loss, terms = real_forward(self, idx, generator)
        calls.append(self.training)
        return loss * (float("nan") if self.training and sum(calls) in bad else 1.0), terms

    monkeypatch.setattr(VAEObjective, "forward", poisoned)
    start = f"--data {text} --vocab-size 300 {VAE_SIZE} {COMMON} --save-every 2 --lr 1e-3"
    bad = [3]
    call(train_vae.main, f"{start} --steps 4 --out one", monkeypatch, tmp_path)
    rows = {row["step"]: row for row in losses(tmp_path / "one")}
    assert rows[3].get("skipped") == 1 and "loss" not in rows[3] and "skipped" not in rows[4]
    assert all(value.isfinite().all() for value in weights(tmp_path / "one", "cola_vae").values())
    bad, calls[:] = range(4, 100), []
    with pytest.raises(ValueError, match="10th time in a row: step 13, .* the last good state is that of step 12"):
        call(train_vae.main, f"{start} --steps 40 --out many", monkeypatch, tmp_path)


def test_the_best_model_on_held_out_text_is_what_is_kept(text, tmp_path, monkeypatch, capsys):
    """By a held-out loss that is lowest in the middle: the model of that step is exported, not the last."""
    script = iter([3.0, 2.0, 1.0, 2.5])
    monkeypatch.setattr(train_vae, "held_out_loss", lambda *args: next(script))
    start = f"--data {text} --vocab-size 300 {VAE_SIZE} {COMMON} --lr 1e-3 --warmup 0"
    call(train_vae.main, f"{start} --steps 6 --eval-every 2 --out six", monkeypatch, tmp_path)
    assert "(of step 4, the best on held-out text)" in capsys.readouterr().out
    assert [row.get("held_out") for row in losses(tmp_path / "six")][::2] == [3.0, 2.0, 1.0, 2.5]
    script = iter([3.0, 2.0, 1.0])
    monkeypatch.setattr(training, "learning_rate", lambda step, *_: real_rate(step, 6, 0, 0.5, 1e-3, 1e-4))
    call(train_vae.main, f"{start} --steps 4 --eval-every 2 --out four", monkeypatch, tmp_path)
    best, four = (weights(tmp_path / name, "cola_vae") for name in ("six", "four"))
    assert all(torch.equal(best[name], four[name]) for name in best)


def test_a_run_resumed_between_evaluations_keeps_the_best_model(text, tmp_path, monkeypatch):
    """Stopped after step 3, when step 2 was the best: no weights are exported that were not evaluated."""
    monkeypatch.setattr(train_vae, "held_out_loss", lambda *args: next(script))
    start = f"--data {text} --vocab-size 300 {VAE_SIZE} {COMMON} --steps 6 --eval-every 2 --save-every 3"
    script = iter([3.0, 1.0, 2.0, 2.0])
    call(train_vae.main, f"{start} --out whole", monkeypatch, tmp_path)
    script, step = iter([3.0, 1.0]), training.optimizer_step
    steps = iter([step] * 3)
    monkeypatch.setattr(training, "optimizer_step", lambda *args: next(steps)(*args))
    with pytest.raises(StopIteration):
        call(train_vae.main, f"{start} --out out", monkeypatch, tmp_path)
    monkeypatch.setattr(training, "optimizer_step", step)
    script = iter([2.0, 2.0])
    call(train_vae.main, "--resume --out out", monkeypatch, tmp_path)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    ours, whole = (weights(tmp_path / name, "cola_vae") for name in ("out", "whole"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


real_rate = training.learning_rate


def test_training_starts_from_a_model(trained, text, tmp_path, monkeypatch):
    """The first losses are those of the source; its sizes need not be named; after some steps on new text it is ahead
    of a model that began anew."""
    (tmp_path / "new.txt").write_text("\n".join(f"Row {i}: the dog number {i * 3 % 7} lay down." for i in range(300)))
    source, steps = trained / "runs" / "cola", f"{COMMON} --steps 20 --warmup 2"
    for stage in (train_vae, train_prior):
        call(stage.main, f"--data new.txt --init {source} {steps} --out {stage.__name__}", monkeypatch, tmp_path)
    vae, dit = load_vae(source), load_dit(source)
    corpus = data.open_tokens(tmp_path / "train_vae" / "data")
    o = VAEOptions(batch_size=4, seq_len=32, precision="fp32")
    wanted = training.held_out_loss(VAEObjective(o, vae), corpus.held_out(32), o, 4)
    assert losses(tmp_path / "train_vae")[0]["held_out"] == pytest.approx(wanted, abs=1e-5)
    o = PriorOptions(batch_size=4, seq_len=32, precision="fp32", block_size=(dit.config.block_size,))
    objective = train_prior.PriorObjective(o, torch.nn.ModuleDict(dict(dit=dit)), vae)
    first = losses(tmp_path / "train_prior")[0]
    for size in (1, 2, 4):  # those of the source
        wanted = training.held_out_loss(objective, corpus.held_out(32), o, 4, block_size=size)
        assert first[f"held_out_{size}"] == pytest.approx(wanted, abs=1e-5)
    call(train_vae.main, f"--data new.txt {VAE_SIZE} --vocab-size 300 {steps} --out anew", monkeypatch, tmp_path)
    ours, anew = (losses(tmp_path / name)[-1]["held_out"] for name in ("train_vae", "anew"))
    assert ours < anew - 0.1
    call(train_prior.main, "--resume --out train_prior --steps 22", monkeypatch, tmp_path)
    assert load_dit(tmp_path / "train_prior").config == dit.config


@pytest.mark.parametrize(
    "main, options, message",
    [
        (train_vae.main, "--dim 64", "--dim 64 contradicts --init .*, which has 32"),
        (train_vae.main, "--vocab-size 300", "has a tokenizer already: leave out --vocab-size"),
        (train_prior.main, "--n-layer 2", "--n-layer 2 contradicts --init .*, which has 1"),
        (train_prior.main, "--no-self-conditioning", "--self-conditioning False contradicts --init .*, which has True"),
        (train_prior.main, "--joint", "away from the .* codes of this prior"),
        (train_prior.main, "--vae {trained}/runs/joint", "does not know the latents of .*runs/joint"),
    ],
)
def test_what_contradicts_the_model_to_start_from(trained, text, tmp_path, monkeypatch, main, options, message):
    options = options.format(trained=trained)
    with pytest.raises(ValueError, match=message):
        call(main, f"--init {trained}/runs/cola --data {text} {COMMON} {options} --out out", monkeypatch, tmp_path)
    assert not any(file.is_file() for file in tmp_path.rglob("*"))


@pytest.mark.parametrize("part", ["decoder", "final_layer"])
def test_a_part_of_the_vae_is_trained(trained, text, tmp_path, monkeypatch, capsys, part):
    """The encoder stays as it is, so the prior that belongs to it fits."""
    source, prefix = trained / "runs" / "cola", VAE_PARTS[part]
    start = f"--init {source} --vae-part {part} --data {text} {COMMON} --steps 3 --warmup 0 --out out"
    call(train_vae.main, start, monkeypatch, tmp_path)
    assert f"next: python train_prior.py --init {source} --vae out" in capsys.readouterr().out
    before, after = weights(source, "cola_vae"), weights(tmp_path / "out", "cola_vae")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(prefix) for name in changed)
    call(train_prior.main, f"--init {source} --vae out {COMMON} --steps 1 --out both", monkeypatch, tmp_path)
    assert torch.equal(weights(tmp_path / "both", "cola_vae")["decoder.final_layer.weight"],
                       after["decoder.final_layer.weight"])  # fmt: skip


def test_resuming_keeps_what_is_not_given_anew(tmp_path):
    def options(**given):
        return VAEOptions(out=str(tmp_path), **given), set(given)

    Run(*options(save_every=7, lr=0.5, device="cpu")).save(0, None, torch.nn.Linear(1, 1))
    resumed = Run(*options(resume=True)).options
    assert (resumed.save_every, resumed.lr, resumed.device) == (7, 0.5, "cpu")
    assert Run(*options(resume=True, save_every=9)).options.save_every == 9
    with pytest.raises(ValueError, match="goes on with --lr 0.5"):
        Run(*options(resume=True, lr=0.1))


def test_a_run_from_before_an_option_existed_is_resumed(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "runs" / "vae", tmp_path / "out")
    file = tmp_path / "out" / "training" / "6" / "run.json"
    content = json.loads(file.read_text())
    del content["options"]["clip"]
    file.write_text(json.dumps(content))
    assert Run(VAEOptions(out=str(tmp_path / "out"), resume=True), {"clip"}).options.clip == 1.0
    call(train_vae.main, "--resume --out out", monkeypatch, tmp_path)


def test_joint_training_weighs_the_terms_of_the_vae_as_its_own_run_did(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "runs" / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "training" / "6" / "run.json"
    content = json.loads(file.read_text())
    content["options"] |= dict(beta=0.123, mask_ratio=0.321)
    file.write_text(json.dumps(content))
    call(train_prior.main, f"--vae vae --joint {PRIOR_SIZE} {COMMON} --steps 1", monkeypatch, tmp_path)
    options = saved_options(tmp_path / "runs" / "cola")
    assert (options["beta"], options["mask_ratio"], options["mask_weight"]) == (0.123, 0.321, 0.5)


def test_a_model_knows_the_text_it_was_trained_on(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    assert [training.own_data(folder) for folder in ("runs/vae", "runs/cola", "elsewhere")] == ["runs/vae/data"] * 3
    shutil.copytree(trained / "runs" / "vae" / "data", tmp_path / "own" / "data")
    assert training.own_data(tmp_path / "own") == str(tmp_path / "own" / "data")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="elsewhere was trained on are not here: name some with --data"):
        training.own_data("elsewhere")


def test_resuming_needs_the_same_text(trained, text, tmp_path, monkeypatch):
    """Token files that changed under a run would give its ids another meaning."""
    for size in (280, 290):
        call(data.main, f"--data {text} --vocab-size {size} --out tokens{size}", monkeypatch, tmp_path)
    call(train_vae.main, f"--data tokens280 {VAE_SIZE} {COMMON} --steps 2 --out out", monkeypatch, tmp_path)
    (tmp_path / "tokens280").rename(tmp_path / "old")
    (tmp_path / "tokens290").rename(tmp_path / "tokens280")
    with pytest.raises(ValueError, match="tokenize"):
        call(train_vae.main, "--resume --out out", monkeypatch, tmp_path)


def test_prepared_text_through_both_stages(text, tmp_path, monkeypatch, capsys):
    call(data.main, f"--data {text} --vocab-size 280 --out tokens", monkeypatch, tmp_path)
    call(train_vae.main, f"--data tokens {VAE_SIZE} {COMMON} --steps 2", monkeypatch, tmp_path)
    following = capsys.readouterr().out.strip().rsplit("python train_prior.py ")[-1]
    assert following == "--vae runs/vae --data tokens"
    call(train_prior.main, f"{following} {PRIOR_SIZE} {COMMON} --steps 2", monkeypatch, tmp_path)


def test_a_held_out_loss_is_a_mean():
    """By the tokens that were masked, not by the number expected, as in training."""
    vae, idx = TextVAE(VAEConfig(vocab_size=20, dim=8, ffn_dim=8, n_head=2, latent_dim=2)), torch.zeros(4, 8).long()
    vae.log_likelihood = lambda z, idx, where: torch.full((int(where.sum()),), -2.0)
    for vae.training in (True, False):
        loss = masked_view_loss(vae, idx, 0.3, torch.Generator().manual_seed(0)).item()
        assert (loss == pytest.approx(2.0)) == (not vae.training)


@pytest.mark.parametrize("rows", [1, 4, 32])
def test_masked_views_count_the_same_however_a_batch_is_cut(rows):
    """Parts of 32 rows of 32 tokens, of which 2 % are masked: some parts have none, and none weighs more for it."""
    vae, idx = TextVAE(VAEConfig(vocab_size=20, dim=8, ffn_dim=8, n_head=2, latent_dim=2)), torch.zeros(32, 32).long()
    scored = []

    def log_likelihood(z, idx, where):
        scored.append(int(where.sum()))
        return torch.full((scored[-1],), -2.0)

    vae.log_likelihood = log_likelihood
    draws = [torch.Generator().manual_seed(i) for i in range(32 // rows)]
    parts = [masked_view_loss(vae, part, 0.02, g) for part, g in zip(idx.split(rows), draws, strict=True)]
    assert torch.stack(parts).mean().item() == pytest.approx(2 * sum(scored) / (0.02 * 32 * 32))
    assert sum(scored) > 8


def test_latents_count_the_same_however_a_batch_is_cut():
    dit = DiT(DiTConfig(latent_dim=3, dim=16, n_head=2, head_dim=8, rope_dim=4, n_layer=1, block_size=4))
    nn.init.normal_(dit.txt_out.proj.weight)
    z0, z1, t = torch.randn(4, 8, 3), torch.randn(4, 8, 3), torch.rand(4)
    prompt = torch.arange(8) < torch.tensor([[0], [3], [6], [7]])  # answers of different lengths
    n = int((~prompt).sum())
    whole = flow_matching_loss(dit, z0, z1, t, prompt)  # by their number
    for rows in (1, 2):
        parts = zip(*(x.split(rows) for x in (z0, z1, t, prompt)), strict=True)
        mean = torch.stack([flow_matching_loss(dit, *part, count=n * rows / 4) for part in parts]).mean()
        torch.testing.assert_close(mean, whole)


def test_a_small_text_has_a_small_vocabulary(tmp_path, monkeypatch):
    (tmp_path / "ab.txt").write_text("ab\n\n" * 400)
    arguments = f"--data ab.txt --vocab-size 300 {VAE_SIZE} {COMMON} --steps 1 --out vae"
    call(train_vae.main, arguments, monkeypatch, tmp_path)
    tokenizer = data.load_tokenizer(str(tmp_path / "vae" / "tokenizer.json"))
    assert load_vae(tmp_path / "vae").config.vocab_size == tokenizer.n_vocab < 300


@pytest.mark.parametrize("log_snr, n_warnings, often", [(0.4, 1, 1), (0.4, 1, 12), (0.6, 0, 1)])
def test_latents_that_drown_in_noise_are_reported(text, tmp_path, monkeypatch, capsys, log_snr, n_warnings, often):
    """Once, however often the log is written between evaluations."""
    monkeypatch.setattr(Posterior, "log_snr", lambda self: torch.tensor(log_snr))
    steps = f"--steps {2 * often} --eval-every {often} --warmup 1"
    arguments = f"--data {text} --vocab-size 300 {VAE_SIZE} {COMMON} {steps}"
    call(train_vae.main, arguments, monkeypatch, tmp_path)
    output = capsys.readouterr().out
    assert output.count("warning: the noise of the latents drowns them (log_snr 0.40): lower") == n_warnings


def test_passes_add_up_to_the_whole_batch(text, tmp_path, monkeypatch):
    """With a loss that draws nothing at random, one step in four passes is one step in one pass."""

    def reconstruction_of_mu(self, idx, generator):
        return -self.vae.log_likelihood(self.vae.encode(idx).mu, idx).mean(), {}

    monkeypatch.setattr(VAEObjective, "forward", reconstruction_of_mu)
    start = f"--data {text} --vocab-size 300 {VAE_SIZE} {COMMON} --steps 1 --warmup 0"
    for size in (1, 4):
        call(train_vae.main, f"{start} --micro-batch {size} --out micro{size}", monkeypatch, tmp_path)
    one, four = (weights(tmp_path / f"micro{n}", "cola_vae") for n in (1, 4))
    difference = torch.cat([(one[name] - four[name]).flatten() for name in one]).abs()
    assert difference.mean() < 1e-6  # a step moves every weight by about lr = 2e-3
    one, four = (losses(tmp_path / f"micro{n}")[-1]["loss"] for n in (1, 4))
    assert four == pytest.approx(one, rel=1e-5)  # the log has the mean over passes


def test_options_with_several_values():
    options, given = parse_options(VAEOptions, "", argv=["--data", "a", "b"])
    assert options.data == ("a", "b") and given == {"data"}


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("steps", 2**31 + 1, "steps 2147483649 is out of range: it must be at most 2147483648"),
        ("steps", True, "steps True must be an integer"),
        ("lr", "0.1", "lr '0.1' must be a number"),
        ("lr", 10**400, "is out of range: it must be a finite number of at most 2147483648"),
        ("fsdp", 1, "fsdp 1 must be true or false"),
        ("out", None, "out None must be a text"),
        ("optimizer", ["muon"], "optimizer ['muon'] must be a text"),
        ("data", "names", "data 'names' must be a list of values"),
        ("data", (1,), "data 1 must be a text"),
        ("steps", (1,), "steps (1,) must be one value"),
    ],
)
def test_values_from_a_file_are_held_to_the_ranges_of_the_command_line(name, value, message):
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        check_range(VAEOptions, {name: value})


def test_numpy_numbers_are_numbers():
    check_range(VAEOptions, dict(steps=np.int64(3), lr=np.float32(0.1)))


SCRIPTS = ["train_vae.py", "train_prior.py", "sample.py", "data.py", "measure.judge", "measure.evaluate"]
SCRIPTS += ["measure.bench", "extras.definitions"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_option_with_its_default(script, tmp_path):
    done = run(script, "--help", tmp_path)
    assert done.returncode == 0
    module = importlib.import_module(script.removesuffix(".py"))
    cls = {"train_vae.py": VAEOptions, "train_prior.py": PriorOptions}.get(script) or module.Options
    fields = [field.name for field in dataclasses.fields(cls) if not field.metadata["hidden"]]
    words = " ".join(done.stdout.split())
    for name in fields:
        assert "--" + name.replace("_", "-") in words
    assert words.count("(default:") == len(fields)


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("train_vae.py", "--steps 0", "--steps 0 is out of range: it must be at least 1"),
        ("train_vae.py", "--lr nan", "--lr nan is out of range"),
        ("train_vae.py", "--t-loc 1", "unrecognized arguments: --t-loc"),
        ("train_prior.py", "--t-loc inf", "--t-loc inf is out of range: it must be a finite number"),
        ("train_prior.py", "--ema 2", "--ema 2.0 is out of range: it must be between 0.0 and 1.0"),
        ("train_prior.py", "--vae {trained}/runs/vae --micro-batch 5", "--batch-size 32 must be a multiple of"),
        ("train_vae.py", "--out {trained}/runs/cola --resume", "holds a run of another script"),
        ("train_vae.py", "--stepz 5", "unrecognized arguments: --stepz"),
        ("train_vae.py", "--mask-ratio 1.5", "it must be between 0.0 and 1.0"),
        ("train_vae.py", "--data nowhere.txt", "nowhere.txt does not exist"),
        ("train_vae.py", "--data {text} --batch-size 4096", "the training text has"),
        ("train_vae.py", "--data {text} --device nonsense", "device nonsense is not available"),
        ("train_vae.py", "--out {trained}/runs/vae", "runs/vae already holds files: add --resume"),
        ("train_vae.py", "--out {text} --data {text}", "already holds files"),
        ("train_vae.py", "--out {text}/cats.txt --data {text}", "already holds a file"),
        ("train_vae.py", "--data {text} --dim 1200000", "not enough memory"),
        ("train_vae.py", "--out new --resume", "there is no run to resume"),
        ("train_vae.py", "--out {trained}/runs/vae --resume --lr 0.5", "goes on with --lr 0.002"),
        ("train_vae.py", "--data {text} --dim 33", "dim 33 must be a multiple of"),
        ("train_vae.py", "--data {text} --seq-len 30 --patch-size 4", "--seq-len 30 must be a multiple of block_size"),
        ("train_vae.py", "--data {text} --vae-part decoder", "leaves the rest as it is, which takes a model"),
        ("train_prior.py", "--vae nowhere", "nowhere/cola_vae/config.json does not exist"),
        ("train_prior.py", "--vae {trained}/runs/vae --out {trained}/runs/cola", "already holds files"),
        ("train_prior.py", "--vae {trained}/runs/vae --dim 36", "--dim 36 must be a multiple of 4 times --n-head 2"),
        ("train_prior.py", "--vae {trained}/runs/vae --data {text}/tokens", "the text was tokenized differently"),
        ("sample.py", "--model nowhere", "nowhere/cola_vae/config.json does not exist"),
        ("sample.py", "--model {trained}/runs/cola --top-p 2", "--top-p 2.0 is out of range"),
        ("sample.py", "--model {trained}/runs/cola --max-new-tokens 2000000000", "not enough memory"),
        ("sample.py", "--model {trained}/runs/cola --max-new-tokens 3000000000", "it must be at most 2147483648"),
        ("sample.py", "--model {trained}/runs/cola --cfg-scale 1e300", "--cfg-scale 1e+300 is out of range"),
        ("sample.py", "--model {trained}/runs/cola --device hpu", "only cpu, cuda and mps"),
        (
            "train_prior.py",
            "--out {trained}/runs/cola --resume --block-size 8",
            "goes on with --block-size 1 2 4: resume it without --block-size",
        ),
        ("train_prior.py", "--vae {trained}/runs/vae --batch-size 1 --seq-len 32", "--self-conditioning takes half of"),
        ("sample.py", "--solver rk4", "invalid choice: 'rk4'"),
        ("measure.judge", "--model nowhere --data {trained}/runs/vae/data", "nowhere/cola_vae/config.json does not"),
        ("measure.judge", "--data nowhere", "nowhere/tokenizer.json does not exist"),
        ("measure.judge", "--model {trained}/runs/cola --data {text}/tokens", "the text was tokenized differently"),
        ("measure.judge", "--data {trained}/runs/vae/data --texts {text}/empty.txt", "empty.txt holds no text"),
        ("data.py", "--data {text}/none", "none does not exist"),
        ("train_prior.py", "--init {trained}/runs/cola --chat nofile.jsonl", "error: nofile.jsonl does not exist"),
        ("data.py", "--out {text}/tokens", "already holds files"),
        ("data.py", "--tokenizer nonsense", "nonsense is neither a tokenizer.json nor one of"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(
    trained, text, tmp_path, monkeypatch, capsys, script, arguments, message
):
    module = importlib.import_module(script.removesuffix(".py"))
    if "tokens" in arguments and not (text / "tokens").exists():
        call(module.data.main, f"--data {text} --vocab-size 280 --out {text}/tokens", monkeypatch, tmp_path)
    before = snapshot(trained)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        arguments = arguments.format(trained=trained, text=text)
        call(lambda: common.run_script(module.main), arguments, monkeypatch, tmp_path)
    lines = capsys.readouterr().err.splitlines(keepends=True)
    error = "".join(line for line in lines if not line.startswith("warning: "))  # of the text
    assert stop.value.code == 2
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert snapshot(trained) == before


def snapshot(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("script", ["train_vae.py", "train_prior.py", "sample.py", "chat.py", "data.py"])
def test_an_interruption_while_pytorch_is_loaded(script, tmp_path):
    command = [sys.executable, "-X", "importtime", ROOT / script]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stderr if "quiet" in line or not line)
        assert "extras.quiet" in line
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == -signal.SIGINT


def test_a_character_that_the_terminal_lacks_ends_nothing(trained, tmp_path, monkeypatch):
    """In a real process, since this one has no such terminal."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run("sample.py", f"--model {trained}/runs/cola --prompt ✓a --num-samples 2 --max-new-tokens 4", tmp_path)
    assert done.returncode == 0 and done.stdout.count("\\u2713a") == 2, done.stderr


def test_a_mistake_in_a_real_process(tmp_path):
    done = run("sample.py", "--model nowhere", tmp_path)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr


def test_a_failed_start_leaves_no_trace(trained, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argument in ("--batch-size 4096", "--dim 33", "--device nonsense", "--data nowhere"):
        with pytest.raises((ValueError, OSError)):
            call(train_vae.main, f"--data {text} {argument} --out out", monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="--joint would move the latents"):
        arguments = f"--vae {trained}/runs/vae --data {text} --joint --n-codes 9 --out out"
        call(train_prior.main, arguments, monkeypatch, tmp_path)
    assert not any(file.is_file() for file in tmp_path.rglob("*"))


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "text"])
@pytest.mark.parametrize("name", ["run.json", STATE])
def test_resuming_from_a_damaged_file(trained, tmp_path, monkeypatch, name, damage):
    shutil.copytree(trained / "runs" / "vae", tmp_path / "out")
    file = tmp_path / "out" / "training" / "6" / name
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "text": b"something else"}[damage])
    no_run = (name, damage) == ("run.json", "missing")
    with pytest.raises(FileNotFoundError if no_run else ValueError, match="there is no run" if no_run else "damaged"):
        call(train_vae.main, "--resume --out out", monkeypatch, tmp_path)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.99])
def test_one_flipped_bit_is_noticed(trained, tmp_path, monkeypatch, place):
    shutil.copytree(trained / "runs" / "vae", tmp_path / "out")
    file = tmp_path / "out" / "training" / "6" / STATE
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{STATE} is damaged or missing: its checksum"):
        call(train_vae.main, "--resume --out out", monkeypatch, tmp_path)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("steps", "many", "--steps 'many' must be an integer"),
        ("steps", -5, "--steps -5 is out of range: it must be at least 1"),
        ("lr", 1e999, "--lr inf is out of range: it must be a finite number"),
        ("data", "names", "--data 'names' must be a list of values"),
        ("optimizer", "sgd", "--optimizer 'sgd' is out of range: it must be one of muon, adamw"),
        ("seed", True, "--seed True must be an integer"),
    ],
)
def test_a_run_edited_by_hand_is_checked_like_the_command_line(trained, tmp_path, monkeypatch, name, value, message):
    shutil.copytree(trained / "runs" / "vae", tmp_path / "out")
    file = tmp_path / "out" / "training" / "6" / "run.json"
    content = json.loads(file.read_text())
    content["options"][name] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"run.json: {re.escape(message)}"):
        call(train_vae.main, "--resume --out out", monkeypatch, tmp_path)


def test_more_layers_than_tensors_are_not_built(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "runs" / "cola", tmp_path / "out")
    file = tmp_path / "out" / "cola_dit" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(num_layers=100_000)))
    monkeypatch.setattr(train_prior, "DiT", None)
    for arguments in ("--resume --out out", f"--init out --data {trained}/runs/vae/data {COMMON}"):
        with pytest.raises(ValueError, match="out/cola_dit: n_layer 100000 is more than the .. tensors of its files"):
            call(train_prior.main, arguments, monkeypatch, tmp_path)


def test_nothing_in_a_run_is_executed(trained):
    """No pickle: JSON, safetensors and text alone."""
    files = [f for name in ("vae", "cola", "joint") for f in (trained / "runs" / name).rglob("*") if f.is_file()]
    assert {f.suffix for f in files} == {".json", ".jsonl", ".safetensors", ".bin", ".sha256"}


def test_a_folder_has_one_run_at_a_time(text, tmp_path):
    """The lock ends with its process, however that ends."""
    code = "import sys, time; sys.path.insert(0, sys.argv[1]); from options import VAEOptions; from training import Run"
    code += "; Run(VAEOptions(out=sys.argv[2]), set()); print('locked', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, ROOT, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    for resume in (False, True):
        with pytest.raises(ValueError, match="another process trains in .*out: wait for it, or choose another --out"):
            Run(VAEOptions(out=str(tmp_path / "out"), resume=resume), set())
    holder.kill()
    holder.wait()
    Run(VAEOptions(out=str(tmp_path / "out")), set())


def test_a_start_that_failed_changes_nothing_for_sampling(text, tmp_path, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError, match="runs/vae"):
        call(train_prior.main, f"--data {text}", monkeypatch, tmp_path)
    call(sample.main, "--num-samples 1 --max-new-tokens 1", monkeypatch, tmp_path)
    assert "pretrained" in capsys.readouterr().err


def test_a_run_of_an_older_version(trained, text, tmp_path, monkeypatch):
    """Its model serves as before; only its training cannot go on."""
    for name in ("vae", "cola"):
        shutil.copytree(trained / "runs" / name, tmp_path / "runs" / name)
        file = tmp_path / "runs" / name / "training" / "6" / "run.json"
        content = json.loads(file.read_text())
        del content["checksums"]
        file.write_text(json.dumps(content))
    call(sample.main, "--num-samples 1 --max-new-tokens 1", monkeypatch, tmp_path)
    call(train_prior.main, f"{PRIOR_SIZE} {COMMON} --steps 1 --out new", monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="is of an older version, which cannot be resumed"):
        call(train_vae.main, "--resume", monkeypatch, tmp_path)


def test_a_background_job_ignores_what_its_shell_lets_it_ignore(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with training.noting_signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        common.run_script(lambda: None)
        assert signals == [] and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("resumable", [False, True])
def test_what_was_killed_before_its_first_state_starts_anew(trained, text, tmp_path, monkeypatch, capsys, resumable):
    shutil.copytree(trained / "runs" / "vae", tmp_path / "out")
    (tmp_path / "out" / "log.jsonl").unlink()
    arguments = f"--data {text} --vocab-size 300 {VAE_SIZE} {COMMON} --steps 6 --save-every 3 --out out"
    if resumable:
        with pytest.raises(FileExistsError, match="already holds files: add --resume"):
            call(train_vae.main, arguments, monkeypatch, tmp_path)
        return
    (tmp_path / "out" / "training" / "6" / "run.json").unlink()
    (tmp_path / "out" / "training" / "started").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no run to resume, start it without --resume"):
        call(train_vae.main, "--resume --out out", monkeypatch, tmp_path)
    call(train_vae.main, arguments, monkeypatch, tmp_path)
    assert losses(tmp_path / "out") == losses(trained / "runs" / "vae")


def test_files_of_others_are_never_taken_for_an_unfinished_start(tmp_path):
    for names in (["cola_vae", "tokenizer.json"], ["training", "data", "train.bin"]):  # a model; a folder of one's own
        for name in names:
            (tmp_path / name).mkdir(exist_ok=True) if "." not in name else (tmp_path / name).touch()
        with pytest.raises(FileExistsError):
            Run(VAEOptions(out=str(tmp_path)), set())
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_step(trained, text, tmp_path, monkeypatch, capsys, number):
    step = training.optimizer_step
    steps = []

    def interrupted(*args):
        steps.append(step(*args))
        if len(steps) == 4:
            os.kill(os.getpid(), number)
        return steps[-1]

    monkeypatch.setattr(training, "optimizer_step", interrupted)
    arguments = f"--data {text} --vocab-size 300 {VAE_SIZE} {COMMON} --steps 6 --save-every 3 --out out"
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        call(train_vae.main, arguments, monkeypatch, tmp_path)
    assert stopped.value.code == 128 + number and signal.getsignal(number) == before
    assert "stopped after step 4; go on with: python script --resume --out out\n" in capsys.readouterr().out
    call(train_vae.main, "--resume --out out", monkeypatch, tmp_path)
    assert losses(tmp_path / "out") == losses(trained / "runs" / "vae")
    for part in ("encoder.final_layer.weight", "decoder.final_layer.weight"):
        assert torch.equal(weights(tmp_path / "out", "cola_vae")[part], weights(trained / "runs/vae", "cola_vae")[part])


def test_a_weight_that_is_not_finite_is_not_saved(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "runs" / "vae", tmp_path / "out")
    monkeypatch.setattr(training, "optimizer_step", lambda *args: next(ruined))
    vaes = []
    init = TextVAE.__init__
    monkeypatch.setattr(TextVAE, "__init__", lambda self, config: (init(self, config), vaes.append(self))[0])

    def ruin():
        vaes[0].decoder.final_layer.bias.data[0] = float("inf")
        yield 1.0

    ruined = ruin()
    with pytest.raises(ValueError, match="a weight is not finite after step 7; the last good state is of step 6"):
        call(train_vae.main, "--resume --out out --steps 9 --save-every 1", monkeypatch, tmp_path)
    assert [file.name for file in (tmp_path / "out" / "training").iterdir()] == ["6"]


def test_a_warm_up_as_long_as_the_run_is_reported(trained, capsys, monkeypatch, tmp_path):
    shutil.copytree(trained / "runs" / "vae", tmp_path / "out")
    for steps, expected in ((7, True), (31, False)):
        call(train_vae.main, f"--resume --out out --steps {steps}", monkeypatch, tmp_path)
        message = "warning: the learning rate still rises to --lr 0.002 at the end: --warmup 30 is as long"
        assert (message in capsys.readouterr().out) == expected


def test_resuming_from_the_state_of_another_model(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "runs" / "vae", tmp_path / "out")
    shutil.copytree(trained / "runs" / "cola" / "training", tmp_path / "other")
    for file in (STATE, "run.json"):
        shutil.copy(tmp_path / "other" / "6" / file, tmp_path / "out" / "training" / "6" / file)
    content = json.loads((tmp_path / "out" / "training" / "6" / "run.json").read_text())
    content["options"] = json.loads((trained / "runs" / "vae" / "training" / "6" / "run.json").read_text())["options"]
    (tmp_path / "out" / "training" / "6" / "run.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="does not fit this run: RuntimeError: Missing key"):
        call(train_vae.main, "--resume --out out", monkeypatch, tmp_path)


def test_resuming_a_finished_run_writes_its_model_again(trained, tmp_path, monkeypatch):
    """An interruption may have come between the training state and the model."""
    shutil.copytree(trained / "runs" / "vae", tmp_path / "out")
    file = tmp_path / "out" / "cola_vae" / "model.safetensors"
    whole = file.read_bytes()
    file.unlink()
    call(train_vae.main, "--resume --out out", monkeypatch, tmp_path)
    assert file.read_bytes() == whole


def test_a_full_disk_is_reported(trained, text, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(dcp.HuggingFaceStorageWriter, "write_data", fail)
    arguments = f"--data {text} --vocab-size 300 {VAE_SIZE} {COMMON} --steps 6"
    with pytest.raises(OSError, match="could not write training/0: OSError: no space left on device"):
        call(train_vae.main, f"{arguments} --out .", monkeypatch, tmp_path)


def test_an_interrupted_save_leaves_the_old_file(tmp_path):
    file = tmp_path / "a"
    file.write_text("old")
    with pytest.raises(RuntimeError), common.replacing(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    with common.replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert calls == ["fsync", "replace", "fsync"]  # the last of the folder

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"), common.replacing(tmp_path / "a") as temporary:
        temporary.write_text("newer")
    assert (tmp_path / "a").read_text() == "new"


def test_learning_rate():
    rates = [training.learning_rate(step, 101, 10, 1.0, 1.0, 0.1) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[100] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.55)  # half of the cosine
    rates = [training.learning_rate(step, 101, 10, 0.2, 1.0, 0.1) for step in range(101)]
    assert set(rates[9:82]) == {1.0} and rates[100] == pytest.approx(0.1)  # 20 steps of 101 fall
    assert all(a > b for a, b in pairwise(rates[81:])) and rates[90] == pytest.approx(0.5872, abs=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_groups(name):
    def matrices(*layers):
        return [p for layer in layers for p in layer.parameters() if p.dim() == 2]

    dit = DiT(DiTConfig(2, 8, 1, 8, 4, 2))
    of_blocks = [matrices(b.msa.proj_qkv, b.msa.proj_out, b.mlp.proj_in, b.mlp.proj_out) for b in dit.blocks]
    hidden = [group["params"] for group in common.make_optimizer([(dit, 1.0)], name, 0.1).param_groups[2:]]
    assert [id(p) for group in hidden for p in group] == [id(p) for b in of_blocks for p in b if name == "muon"]

    vae = TextVAE(VAEConfig(20, 8, 16, 1, 1, 1, 2))
    optimizer = common.make_optimizer([(vae, 0.5)], name, 0.1)
    decayed, not_decayed, *hidden = (group["params"] for group in optimizer.param_groups)
    of_blocks = matrices(*vae.encoder.blocks, *vae.decoder.blocks)
    assert [id(p) for group in hidden for p in group] == [id(p) for p in of_blocks if name == "muon"]
    assert all(p.dim() > 1 for p in decayed) and all(p.dim() == 1 for p in not_decayed)
    in_groups = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(in_groups) == sorted(id(p) for p in vae.parameters())
    loss, _ = VAEObjective(VAEOptions(mask_weight=0.0), vae)(torch.zeros(1, 4, dtype=torch.long))
    loss.backward()
    before = [p.detach().clone() for p in of_blocks]
    common.optimizer_step(optimizer, 1e-3, 1.0)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4}
    assert all(p.grad is None for p in vae.parameters())
    assert all(not torch.equal(p, old) for p, old in zip(of_blocks, before, strict=True))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float32, 0.05)])
def test_muon_against_torch(dtype, tolerance):
    """Three steps on the same gradients: equal up to the rounding of bfloat16, in which PyTorch's multiplies."""
    shapes = [(12, 20), (20, 12), (12, 20), (16, 16)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    options = dict(lr=0.01, weight_decay=0.1)
    torchs = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    optimizers = [common.Muon(ours, dtype=dtype, **options), torchs]
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn(a.shape)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        step = 3 * 0.01 * 0.2 * max(a.shape) ** 0.5  # of three orthogonal updates, in the spectral norm at most
        assert torch.linalg.matrix_norm(a - b, 2) < tolerance * step < torch.linalg.matrix_norm(a - 1, 2)


def test_orthogonalization_against_svd():
    """With coefficients that converge, the Newton-Schulz iteration arrives at U V^T of the SVD."""
    for shape in [(3, 8, 5), (2, 5, 8), (1, 6, 6)]:
        x = torch.randn(shape, dtype=torch.float64)
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        found = common.orthogonalize(x.float(), steps=40, coefficients=(15 / 8, -10 / 8, 3 / 8))
        torch.testing.assert_close(found, (u @ vh).float(), atol=1e-5, rtol=0)
        values = torch.linalg.svdvals(common.orthogonalize(x.float()))
        assert values.min() > 0.6 and values.max() < 1.3  # those of Muon only come near 1


def test_muon_multiplies_bf16_only_where_the_hardware_does(monkeypatch):
    cpu = torch.device("cpu")
    for hardware in (True, False):
        monkeypatch.setattr(common, "multiplies_bf16", lambda device: hardware)  # noqa: B023
        found = [common.muon_dtype(cpu, precision) for precision in ("auto", "bf16", "fp32")]
        assert found == [torch.bfloat16 if hardware else torch.float32] * 2 + [torch.float32]
    optimizer = common.make_optimizer([(TextVAE(VAEConfig(20, 8, 16, 1, 1, 1, 2)), 1.0)], "muon", 0.1, torch.bfloat16)
    assert optimizer.optimizers[1].dtype == torch.bfloat16


def test_a_slow_optimizer_is_reported(monkeypatch, capsys):
    """A clock that says how long the optimizer and the rest of a step took."""

    class Nothing:
        param_groups = []

        def step(self):
            pass

    for slow, rest in [(2, 1), (1, 4)]:
        optimizer, times = common.Optimizers([Nothing()]), [0]
        for _ in range(20):
            times += [times[-1] + rest, times[-1] + rest + slow]
        monkeypatch.setattr(optimizer, "now", iter(times[1:]).__next__)
        for _ in range(20):
            optimizer.step()
        assert optimizer.share() == pytest.approx(slow / (slow + rest))
        assert capsys.readouterr().err.count("the optimizer takes 67% of a training step") == (slow == 2)


def test_moving_average():
    model, ema = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    ema.weight.data.fill_(0.0)
    training.update_ema(ema, model, 0.9, step=10**6)
    assert ema.weight.item() == pytest.approx(0.1)
    training.update_ema(ema, model, 0.9, step=0)  # early on, a short memory: 1/10 of the old
    assert ema.weight.item() == pytest.approx(0.91)


def test_blocks_compile_without_breaks_and_but_once():
    vae, dit = TextVAE(VAEConfig(40, 32, 64, 2, 2, 2, 8, 1, 4)), DiT(DiTConfig(8, 32, 2, 16, 8, 3, 4, 4))
    idx = torch.randint(0, 40, (2, 16))

    def gradients(seed):
        generator = training.step_generator(seed, 0, "cpu")
        z0 = vae.encode(idx).sample(generator)
        loss = flow_matching_loss(dit, z0, torch.ones_like(z0), sample_times(2, 1.0, 1.0, generator))
        loss = loss - vae.log_likelihood(z0, idx).mean()
        return torch.autograd.grad(loss, [*dit.parameters(), *vae.parameters()], allow_unused=True)

    wanted = gradients(0)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for model in (vae, dit):
        compile_blocks(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(0), wanted, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-5))
    gradients(1)
    # One for all blocks of the DiT, one for those of the VAE, and one for its first, which gets a transposed tensor.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 3
