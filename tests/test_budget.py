"""What budget.py counts from the sizes is what PyTorch counts in a forward pass."""

import pytest
import torch
from conftest import ROOT, call
from test_models import small_dit, small_vae
from torch.utils.flop_counter import FlopCounterMode

from dit import DiTConfig
from measure import bench, budget
from options import PriorOptions, VAEOptions, parse_options
from vae import VAEConfig


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_flops_of_a_forward_pass():
    """Under a mask PyTorch multiplies by all keys; the formulas take their number."""
    dit, vae, n, B = small_dit(), small_vae(), 8, 3
    times = B * budget.modulation_flops(dit.config)
    for p in [*dit.parameters(), *vae.parameters()]:
        p.requires_grad_(True)  # plain attention, every product of which is counted
    z, idx = torch.randn(B, n, 8), torch.randint(0, 30, (B, n))
    assert counted(lambda: dit(z, torch.rand(B))) == B * n * budget.dit_flops(dit.config, n) + times
    assert counted(lambda: vae.encode(idx)) == B * n * budget.encoder_flops(vae.config, n)
    assert counted(lambda: vae.decode(z)) == B * n * budget.decoder_flops(vae.config, n)


def test_parameters_of_the_released_model():
    assert budget.parameters(budget.DiTConfig()) == 1_829_875_728
    assert budget.parameters(VAEConfig()) == 501_871_574


def test_presets_are_the_papers():
    """One time for all latents of a row, no codes, no self-conditioning; in the 2b presets the released sizes."""
    for preset in ("plain", "2b"):
        o, _ = parse_options(PriorOptions, "", ["--preset", preset])
        assert (o.block_times, o.stagger, o.n_codes, o.self_conditioning) == (False, (0.0,), 0, False)
    assert o.config(VAEConfig()) == DiTConfig()
    assert parse_options(VAEOptions, "", ["--preset", "2b"])[0].config() == VAEConfig()


def test_the_cost_of_times():
    """Where modulation is all that counts: 2 times a row, one more than blocks, or one more than latents."""
    c, vae = DiTConfig(latent_dim=8, dim=4096, n_head=1, head_dim=8, rope_dim=8, n_layer=1, mlp_ratio=1), VAEConfig()
    ways = [{}, dict(block_times=True), dict(staggers=(0.5,)), dict(block_times=True, staggers=(0.0, 1.0))]
    cost = [budget.prior_step_flops(c, vae, 64, block_sizes=(4,), **way) for way in ways]
    one_time = 3 * budget.modulation_flops(c)
    assert [round((value - cost[0]) / one_time, 6) for value in cost] == [0, 15, 63, 39]


def test_budget_from_the_command_line(tmp_path, monkeypatch, capsys):
    call(budget.main, "prior --preset 2b --devices 64 --micro-batch 11 --fsdp", monkeypatch, tmp_path)
    lines = capsys.readouterr().out
    assert "2,331,747,302" in lines and "tokens per step        720,896; 5,632" in lines
    call(budget.main, "vae", monkeypatch, tmp_path)
    assert list(tmp_path.iterdir()) == []
    capsys.readouterr()
    for stage, n in (("prior", "4,410,528"), ("vae", "640,320")):  # the sizes of the source, not the defaults
        call(budget.main, f"{stage} --init {ROOT}/pretrained", monkeypatch, tmp_path)
        assert n in capsys.readouterr().out
    with pytest.raises(ValueError, match="--chat: .* leave it out"):
        call(budget.main, f"prior --init {ROOT}/pretrained --chat x.jsonl", monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="--batch-size 1408 must be a multiple of --micro-batch 16 times 64 devices"):
        call(budget.main, "prior --preset 2b --devices 64", monkeypatch, tmp_path)
    with pytest.raises(SystemExit):
        call(budget.main, "", monkeypatch, tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"figures": []}', '{"figures": {"a": {"ms": []}}}'])
def test_what_to_compare_with_must_be_a_file_of_figures(tmp_path, content):
    (tmp_path / "before.json").write_text('{"figures": {"a": {"ms": 2.5, "MB": 1}, "b": {"ratio": 3}}}')
    assert bench.times_of(tmp_path / "before.json") == {"a": 2.5}
    (tmp_path / "before.json").write_text(content)
    with pytest.raises(ValueError, match="before.json is no file that this script wrote"):
        bench.times_of(tmp_path / "before.json")


def test_the_plain_way_gives_the_same_numbers(tmp_path, monkeypatch):
    size = "--seq-len 32 --batch-size 2 --new-tokens 32 --rows 2 --steps 2 --repeats 1 --precision fp32 --device cpu"
    call(bench.main, f"{size} --no-growth", monkeypatch, tmp_path)
    figures = bench.json.loads((tmp_path / "bench.json").read_text())["figures"]
    training = figures["stage 2 step: gain over the plain way"]
    assert training["loss"] == pytest.approx(training["slow_loss"], rel=1e-5) and training["ratio"] > 0
    assert figures["generation, 2 rows, fp32: gain over the plain way"]["difference"] < 1e-5
    assert all(value > 0 for values in figures.values() for key, value in values.items() if key != "difference")
