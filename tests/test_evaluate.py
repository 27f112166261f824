"""Figures by hand, the benchmarks' prompts and verdicts, and the script as a user runs it."""

import json
import math

import pytest
import torch
from conftest import call, run

import common
import data
from cola import ColaDLM
from measure import benchmarks, evaluate
from measure.benchmarks import TASKS, choice_of, is_correct, prompt_of, read_lines, verdict
from measure.evaluate import bleu, energy_distance, frechet_distance, jackknife, ngram_matches, rouge_l
from measure.likelihood import conditional_log_prob

# ----------------------------------------------------------------------------------------------------------------------
# Figures


def test_jackknife():
    x = torch.randn(20, dtype=torch.float64)
    value, error = jackknife(lambda i: x[i].mean(), 20)
    assert value == pytest.approx(x.mean()) and error == pytest.approx(x.std() / 20**0.5)
    value, errors = jackknife(lambda i: torch.stack([x[i].mean(), 3 * x[i].mean()]), 20, groups=4)
    assert errors[1] == pytest.approx(3 * errors[0])
    assert math.isnan(jackknife(lambda i: x[i].mean(), 1)[1])


def test_jackknife_of_a_ratio_matches_its_spread():
    g = torch.Generator().manual_seed(0)
    ratios, errors = [], []
    for _ in range(300):
        a = torch.rand(100, generator=g) + 1
        b = a + torch.rand(100, generator=g)
        value, error = jackknife(lambda i: a[i].sum() / b[i].sum(), 100)  # noqa: B023
        ratios.append(value)
        errors.append(error)
    assert torch.stack(errors).mean().item() == pytest.approx(torch.stack(ratios).std().item(), rel=0.15)


def test_bleu_and_rouge():
    found = ["the", "cat", "sat", "on", "a", "mat", "today"]
    wanted = ["the", "cat", "sat", "on", "the", "mat"]
    counts = torch.tensor(ngram_matches(found, wanted))
    assert counts.tolist() == [5, 7, 3, 6, 2, 5, 1, 4, 7, 6]
    assert bleu(counts) == pytest.approx((5 / 7 * 3 / 6 * 2 / 5 * 1 / 4) ** 0.25)
    short = torch.tensor(ngram_matches(wanted[:5], wanted))
    assert bleu(short) == pytest.approx(math.exp(1 - 6 / 5))  # all n-grams right, but too short
    assert bleu(torch.tensor(ngram_matches(["a"], ["b"]))) == 0
    assert rouge_l(found, wanted) == pytest.approx(2 * 5 / 13)
    assert rouge_l(list("abc"), list("cab")) == pytest.approx(2 / 3)
    assert rouge_l([], []) == 0


def test_distances_between_samples():
    a, b = torch.randn(500, 4, 3), torch.randn(500, 4, 3)
    assert abs(energy_distance(a, b)) < 0.02
    assert energy_distance(a, b + 1) > 0.3
    scale, shift = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 1.0, 0.0])
    exact = 1 + (1 + 4 + 0.25) + 3 - 2 * (1 + 2 + 0.5)  # |shift|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))
    flat = a.flatten(0, 1)
    root = torch.linalg.cholesky(flat.T.cov())
    whitened = ((flat - flat.mean(0)) @ torch.linalg.inv(root).T).view_as(a)  # mean 0, covariance 1 exactly
    assert frechet_distance(whitened, whitened * scale + shift) == pytest.approx(exact, rel=1e-3)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)


def test_mutual_information_of_clusters():
    """Eight far points: log 8, whatever their posteriors' width; one point: nothing."""
    mu, eps = 100 * torch.eye(8).repeat(16, 1), torch.randn(128, 8)
    logvar = torch.full_like(mu, -1.0)
    found = evaluate.mutual_information(evaluate.log_posteriors(mu, logvar, eps))
    assert found == pytest.approx(math.log(8), abs=1e-4)
    same = evaluate.mutual_information(evaluate.log_posteriors(0 * mu, logvar, eps))
    assert same == pytest.approx(0, abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Benchmarks

LINE = dict(id=1, question="Which is red?", choices=["a tomato", "a cucumber", "the sea"], answer="a tomato")


def test_prompts():
    assert prompt_of(TASKS["lambada"], dict(context="They went to the", choices=[])) == "They went to the"
    options = "(A) a tomato\n(B) a cucumber\n(C) the sea\n"
    assert prompt_of(TASKS["mmlu"], LINE).endswith(f"\n\nQuestion: Which is red?\n{options}Answer:")
    assert prompt_of(TASKS["mmlu"], LINE | dict(prompt="Say it:")) == "Say it:"
    race = prompt_of(TASKS["race"], LINE | dict(context="On colours."))
    assert race.endswith(f"\n\nArticle: On colours. Which is red?\nOptions:\n{options}Answer:")
    assert prompt_of(TASKS["siqa"], LINE).endswith(f"\n\nQuestion: Which is red?\n{options}Answer:")
    assert "Question: Lee cooks. Which is red?" in prompt_of(TASKS["siqa"], LINE | dict(context="Lee cooks."))
    squad = prompt_of(TASKS["squad"], LINE | dict(context="Tomatoes are red.", choices=[]))
    assert squad.endswith("Context: Tomatoes are red.\nQuestion: Which is red?\nAnswer:")
    shots = {name: task.examples.count("\nAnswer:") + task.examples.count("\nEnd:") for name, task in TASKS.items()}
    assert shots == dict(lambada=0, mmlu=2, obqa=2, hellaswag=2, race=2, siqa=2, squad=1, story_cloze=2)


CHOICES = ["growing vegetables", "is very reliable in winter", "a short answer to all", "water and ice"]


@pytest.mark.parametrize(
    "generated, answer, right",
    [
        (" growing vegetables\n\nQuestion: next", "growing vegetables", True),
        ("\n\n Growing  vegetables!", "growing vegetables.", True),
        (" vegetables", "growing vegetables", False),
        (" A", "growing vegetables", True),
        (" (b).", "growing vegetables", False),
        (" E", "growing vegetables", False),  # no such choice
        (" (D) ice water", "water and ice", True),  # a bracketed letter in a short text
        (" (D) and by this I mean, more or less, all of it", "water and ice", False),  # in a long one
        (" The answer is B, since winters are cold and the engine has to start", "is very reliable in winter", True),
        (" The correct answer is: growing vegetables", "growing vegetables", True),
        (" He is growing vegetables behind the house", "growing vegetables", True),  # one choice inside
        (" growing vegetables with water and ice", "growing vegetables", False),  # two inside
        (" very reliable in winters", "is very reliable in winter", True),  # alike
        (" is reliable", "is very reliable in winter", False),
        (" growing vegetables", "A", True),  # an answer may be a letter
        ("", "growing vegetables", False),
    ],
)
def test_verdicts_by_choice(generated, answer, right):
    assert is_correct(TASKS["mmlu"], generated, answer, CHOICES) == right


def test_verdicts_of_other_tasks():
    assert is_correct(TASKS["lambada"], ' Border, they said.\n"And', "border")
    assert not is_correct(TASKS["lambada"], " the border", "border")
    for name in ("hellaswag", "squad", "story_cloze"):
        assert is_correct(TASKS[name], " Growing vegetables.\nStory:", "growing vegetables", CHOICES)
        assert not is_correct(TASKS[name], " A", "growing vegetables", CHOICES)
        assert not is_correct(TASKS[name], " he is growing vegetables", "growing vegetables", CHOICES)


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
def test_a_line_ends_where_python_splits_lines(end):
    assert is_correct(TASKS["squad"], f" mat{end}dog", "mat") and is_correct(TASKS["squad"], f"{end} mat", "mat")
    assert is_correct(TASKS["mmlu"], f"growing{end}water and ice", "D", CHOICES) is False
    assert not is_correct(TASKS["squad"], " mat\tdog", "mat")


def test_many_spaces_are_read_at_once():
    """A pattern with several runs of spaces in a row takes the cube of their number: hours for this one."""
    assert choice_of("the answer" + " " * 30_000 + "b", CHOICES) == 1
    assert choice_of("the answer" + " " * 30_000 + "!", CHOICES) is None


def test_of_ranked_choices_the_numbers_count():
    """In words "1" and "-1" are the same, without their punctuation."""
    for answer, right in [("1", False), ("-1", True), ("A", False), ("B", True)]:
        line = dict(choices=["1", "-1"], answer=answer, generate="-1", scores=[-2.5, -1.5])
        assert verdict("mmlu", line) == dict(correct=right)


@pytest.mark.parametrize(
    "task, answer, wanted",
    [
        ("hellaswag", "0", "x y"),  # labels of the public data sets
        ("hellaswag", "2", "7 w"),
        ("siqa", "1", "x y"),
        ("siqa", " 3", "7 w"),
        ("story_cloze", "2", "z"),
        ("hellaswag", "Z.", "z"),
        ("hellaswag", "b", "z"),
        ("mmlu", "b", "b"),  # by choice: letters are read when scoring
    ],
)
def test_answers_may_be_labels(tmp_path, task, answer, wanted):
    write(tmp_path / "file.jsonl", [dict(answer=answer, choices=["x y", "z", "7 w"])])
    assert read_lines(tmp_path / "file.jsonl", TASKS[task], ["answer"])[0]["answer"] == wanted
    write(tmp_path / "file.jsonl", [dict(answer="2", choices=["2", "1", "3"])])  # texts go first
    assert read_lines(tmp_path / "file.jsonl", TASKS[task], ["answer"])[0]["answer"] == "2"


# ----------------------------------------------------------------------------------------------------------------------
# The script


def write(path, lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


QUICK = "--steps 2 --device cpu"
SMALL = "--num-sequences 8 --seq-len 16 --likelihood-sequences 4 --samples 2 --ode-steps 2 --read-times 0 0.5"


def test_report(trained, monkeypatch, capsys):
    call(evaluate.main, f"{SMALL} {QUICK} --out report", monkeypatch, trained)
    printed = capsys.readouterr().out
    report = json.loads((trained / "report" / "report.json").read_text())
    assert list(report["sections"]) == ["reconstruction", "compression", "prior fit", "likelihood"]
    for section, figures in report["sections"].items():
        assert f"\n{section}\n" in printed
        for name, entry in figures.items():
            assert name in printed and entry["n"] >= 3
            values, errors = (torch.tensor(entry[key]) for key in ("value", "se"))
            assert values.isfinite().all() and errors.isfinite().all() and (errors >= 0).all()
    prior, likelihood = report["sections"]["prior fit"], report["sections"]["likelihood"]
    assert len(prior["loss by time t"]["value"]) == 10
    assert likelihood["t = 0.0: IWAE-2, no bound"]["value"] < likelihood["t = 0.0: ELBO"]["value"]
    terms = [likelihood[f"t = 0.5: log-density of {part}"]["value"] for part in ("decoder", "prior", "posterior")]
    elbo = likelihood["t = 0.5: ELBO perplexity"]["value"]
    assert math.log(elbo) == pytest.approx(-(terms[0] + terms[1] - terms[2]), rel=1e-4)


def test_generated_latents_belong_to_the_tokens(trained):
    """Also where the prompt ends inside a block: what the decoder makes of the latents are the new tokens."""
    model = ColaDLM.from_pretrained(trained / "runs/cola")
    options = dict(max_new_tokens=10, block_size=4, steps=2, cfg_scale=1.0)
    for length in (8, 6):
        prompts = [[5] * length, [7] * length]
        latents, rows = evaluate.generated(model, prompts, **options)
        assert latents.shape == (2, 10, 4)
        assert rows == model.generate(prompts, **options)
        history = model.vae.encode(torch.tensor([row + [model.vae.config.vocab_size - 1] * 2 for row in prompts])).mu
        logits = model.vae.decode(torch.cat([history[:, :length], latents], 1))
        assert logits.argmax(-1)[:, length : length + 2].tolist() == [row[:2] for row in rows]


def test_the_released_protocol(trained, tmp_path, monkeypatch):
    """One worked example of RACE, its own seed and penalty; what is named on the command line goes first."""
    write(tmp_path / "in" / "race.jsonl", [LINE | dict(context="On colours.")])
    asked = []

    def generate(self, prompts, **options):
        names = ("seed", "repetition_penalty", "max_new_tokens", "eos_id")
        asked.append((prompts[0], *(options[name] for name in names)))
        return ["the"] * len(prompts)

    monkeypatch.setattr(ColaDLM, "generate", generate)
    start = f"--model {trained}/runs/cola --tasks race --task-data in --device cpu"
    own = "--protocol released --seed 5 --eos-id 7 --pad-id 9"
    for name, more in [("paper", ""), ("released", "--protocol released"), ("own", own)]:
        call(evaluate.main, f"{start} {more} --out {name}", monkeypatch, tmp_path)
    examples = [prompt.count("Article:") - 1 for prompt, *_ in asked]
    assert examples == [2, 1, 1]
    assert [rest for _, *rest in asked] == [[0, 1.0, 32, [298]], [66, 1.1, 32, [298, 100265]], [5, 1.1, 32, [7]]]
    settings = json.loads((tmp_path / "own" / "settings.json").read_text())
    assert settings["settings"]["pad_id"] == 9 and settings["dtype"] == "auto"


def test_the_released_protocol_multiplies_in_bf16_on_cuda_alone(tmp_path, monkeypatch):
    write(tmp_path / "in" / "race.jsonl", [LINE | dict(context="On colours.")])

    def precision(name, device):
        raise ValueError(f"{name} on {device}")

    monkeypatch.setattr(evaluate, "pick_device", torch.device)
    monkeypatch.setattr(evaluate, "sampling_precision", precision)
    for more, found in [
        ("--device cuda", "auto on cuda"),
        ("--device cuda --protocol released", "autocast on cuda"),
        ("--device cuda --protocol released --dtype bf16", "bf16 on cuda"),
        ("--device cpu --protocol released", "auto on cpu"),
    ]:
        with pytest.raises(ValueError, match=found):
            call(evaluate.main, f"--tasks race --task-data in {more}", monkeypatch, tmp_path)


def test_the_answer_of_released_files_is_called_ground_truth(tmp_path, monkeypatch, capsys):
    rows = [dict(generate=text, ground_truth="mat", correct=text == "mat") for text in ("mat", "dog", "mat")]
    write(tmp_path / "lambada.jsonl", rows)
    write(tmp_path / "squad.jsonl", [dict(generate="mat", ground_truth="sea")])
    call(evaluate.main, "--score lambada.jsonl squad.jsonl", monkeypatch, tmp_path)
    shown = capsys.readouterr().out
    assert "3 of 3 verdicts" in shown and "mean           33.33           of all lines 50.00         4" in shown


def test_tasks_resume_and_do_not_depend_on_batches(trained, tmp_path, monkeypatch, capsys):
    lines = [dict(id=i, context="Line " * (i + 1), answer="the", source="kept") for i in range(5)]
    write(tmp_path / "in" / "lambada.jsonl", lines)
    write(tmp_path / "in" / "mmlu.jsonl", [LINE, LINE | dict(id="x", prompt="Line")])
    start = f"--model {trained}/runs/cola --tasks lambada,mmlu --task-data in --max-new-tokens 4 {QUICK}"
    call(evaluate.main, f"{start} --batch-size 1 --out one", monkeypatch, tmp_path)
    whole = rows_of(tmp_path / "one" / "lambada.jsonl")
    assert sorted(row["id"] for row in whole) == [0, 1, 2, 3, 4] and whole[0]["source"] == "kept"
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert [(row["task"], row["n"]) for row in summary] == [("lambada", 5), ("mmlu", 2)]
    assert (tmp_path / "one" / "summary.csv").read_text().startswith("task,accuracy,se,n\nlambada,")

    call(evaluate.main, f"{start} --batch-size 3 --out three", monkeypatch, tmp_path)
    path = tmp_path / "three" / "lambada.jsonl"
    assert rows_of(path) == whole
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:2]) + kept[2][:20])  # interrupted while writing the third row
    asked = []

    def generate(self, prompts, **options):
        asked.extend(prompts)
        return ["the"] * len(prompts)

    monkeypatch.setattr(ColaDLM, "generate", generate)
    call(evaluate.main, f"{start} --batch-size 3 --out three", monkeypatch, tmp_path)
    assert len(asked) == 3 and len(rows_of(path)) == 5 and "".join(kept[:2]) in path.read_text()

    capsys.readouterr()
    call(evaluate.main, "--score three/lambada.jsonl --out scores", monkeypatch, tmp_path)
    assert "5 of 5 verdicts in the file are the same" in capsys.readouterr().out


def test_ranking_by_likelihood(trained, tmp_path, monkeypatch):
    write(tmp_path / "in" / "story_cloze.jsonl", [dict(id=1, context="A b.", choices=["x", "y z"], answer="x")])
    arguments = f"--model {trained}/runs/cola --tasks story_cloze --task-data in --rank --samples 1 --ode-steps 2"
    call(evaluate.main, f"{arguments} {QUICK} --out ranked", monkeypatch, tmp_path)
    (row,) = rows_of(tmp_path / "ranked" / "story_cloze.jsonl")
    assert row["generate"] == ["x", "y z"][row["scores"].index(max(row["scores"]))]
    model = ColaDLM.from_pretrained(trained / "runs/cola")
    prompt = row["prompt"]
    wanted = conditional_log_prob(model, [prompt] * 2, [" x", " y z"], steps=2, row_ids=[1, 1])
    assert row["scores"] == pytest.approx(wanted.tolist(), abs=1e-3)
    assert row["correct"] == (row["generate"] == "x")
    line = dict(id=1, choices=["x", " y z"])  # one space stands between prompt and choice, wherever it comes from
    for asked in (prompt, f"{prompt} "):
        found = benchmarks.ranked(model, asked, line, 1, dict(steps=2))["scores"]
        assert found == pytest.approx(wanted.tolist(), abs=1e-3)


def test_scores_that_are_not_finite_are_an_error(trained, tmp_path, monkeypatch):
    write(tmp_path / "in" / "story_cloze.jsonl", [dict(id=1, context="A b.", choices=["x", "y z"], answer="x")])
    seen = []

    def log_prob(*_, **options):
        seen.append(options)
        return torch.tensor([0.0, math.nan])

    monkeypatch.setattr(benchmarks, "conditional_log_prob", log_prob)
    arguments = f"--model {trained}/runs/cola --tasks story_cloze --task-data in --rank --pad-id 7 --device cpu"
    with pytest.raises(ValueError, match=r"id 1 score \[0.0, nan\]: is the model damaged"):
        call(evaluate.main, arguments, monkeypatch, tmp_path)
    assert seen[0]["pad_id"] == 7


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--tasks lambada,chess", "there is no task 'chess': choose among lambada, mmlu"),
        ("--tasks obqa", "obqa.jsonl"),
        ("--tasks mmlu", "in/mmlu.jsonl line 2 has no choices"),
        ("--tasks siqa", "in/siqa.jsonl line 1 is not a JSON object"),
        ("--tasks squad", "in/squad.jsonl is empty"),
        ("--tasks race", "in/race.jsonl line 2 has the id of line 1"),
        ("--tasks lambada --rank", "lambada has no choices to rank"),
        ("--tasks lambada --out {trained}/runs/vae", "already holds files"),
        ("--tasks lambada --model nowhere", "nowhere/cola_vae/config.json does not exist"),
        ("--score in/lambada.jsonl", "in/lambada.jsonl line 1 has no generate"),
        ("--score in/other.jsonl", "there is no task 'other'"),
        ("--score in/lambada.jsonl --tasks all", "--tasks all: with --score it says which one task"),
        ("--score in --tasks mmlu", "in is not a file but a folder, a pipe or a device"),
        ("--limit 3", "--limit is for --tasks: leave it out"),
        ("--eos-id 3", "--eos-id is for --tasks: leave it out"),
        ("--tasks lambada --plot", "--plot is for the diagnostics or --rank: leave it out"),
        ("--tasks mmlu --rank-time 0.3", "--rank-time is for the diagnostics or --rank: leave it out"),
        ("--data {text}/tokens", "the text was tokenized differently"),
        ("--sections everything", "unknown section everything"),
        ("--read-times 1.5", "--read-times 1.5 is out of range"),
        ("--seq-len 30", "--seq-len 30 must be a multiple of block_size"),
        ("--seq-len 4000000", "text has"),
    ],
)
def test_mistakes(trained, text, tmp_path, monkeypatch, capsys, arguments, message):
    write(tmp_path / "in" / "lambada.jsonl", [dict(id=1, context="a", answer="b")])
    write(tmp_path / "in" / "mmlu.jsonl", [LINE, {k: v for k, v in LINE.items() if k != "choices"}])
    write(tmp_path / "in" / "race.jsonl", [LINE | dict(context="c")] * 2)
    write(tmp_path / "in" / "siqa.jsonl", ["text"])
    write(tmp_path / "in" / "squad.jsonl", [])
    if "tokens" in arguments and not (text / "tokens").exists():
        call(data.main, f"--data {text} --vocab-size 280 --out {text}/tokens", monkeypatch, tmp_path)
    place = f"--model {trained}/runs/cola --data {trained}/runs/vae/data --out out {QUICK}"
    place += " --task-data in" * ("--tasks" in arguments)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        arguments = f"{place} {arguments}".format(trained=trained, text=text)
        call(lambda: common.run_script(evaluate.main), arguments, monkeypatch, tmp_path)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


GOOD = dict(id=1, generate="x", answer="x y", choices=["x y", "z"], question="q")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(id=1.0), "line 2: id is neither an integer nor a string"),
        (dict(id=True), "line 2: id is neither an integer nor a string"),
        (dict(id=None), "line 2: id is neither an integer nor a string"),
        (dict(answer=3), "line 2: answer is not a string"),
        (dict(answer=None), "line 2: answer is not a string"),
        (dict(answer="0"), "line 2: the answer '0' is none of the 2 choices"),
        (dict(answer="3"), "line 2: the answer '3' is none of the 2 choices"),
        (dict(answer="C"), "line 2: the answer 'C' is none of the 2 choices"),
        (dict(choices="x y"), "line 2: choices is not a list of strings"),
        (dict(choices=[1, 2]), "line 2: choices is not a list of strings"),
        (dict(choices={}), "line 2 has no choices"),
        (dict(choices=["x y"] * 27), "line 2: there must be 1 to 26 choices, not 27"),
        (dict(prompt=1e30), "line 2: prompt is not a string"),
        (dict(weight=math.nan), "line 2: a number is not finite: write null, or leave it out"),
        (dict(weight=[-math.inf]), "line 2: a number is not finite"),
        (dict(generate=1), "line 2: generate is not a string"),
        (dict(correct="yes"), "line 2: correct is neither true nor false"),
        (dict(scores=[1.0]), "line 2: scores is not a list of 2 numbers, one for each choice"),
        (dict(scores=[1.0, "2"]), "line 2: scores is not a list of 2 numbers, one for each choice"),
        (dict(scores=3), "line 2: scores is not a list of 2 numbers, one for each choice"),
    ],
)
def test_odd_values_in_files(tmp_path, monkeypatch, capsys, change, message):
    """One line each, of files of tasks and of generations; what only the latter have does not matter in the former."""
    write(tmp_path / "in" / "siqa.jsonl", [GOOD, GOOD | dict(id=2) | change])
    arguments = "--tasks siqa --task-data in --model nowhere --device cpu", "--score in/siqa.jsonl"
    results = bool(change.keys() & {"generate", "correct", "scores"})
    for argument in arguments[results : 1 if "id" in change else 2]:
        with pytest.raises(SystemExit) as stop:
            call(lambda: common.run_script(evaluate.main), argument, monkeypatch, tmp_path)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1
    if results:
        jobs = benchmarks.open_tasks("siqa", tmp_path / "in", 0, ranking=False)
        assert jobs["siqa"][1] == {key: GOOD[key] for key in ("answer", "choices", "question")} | dict(id=2)


def test_no_figure_is_nan(tmp_path):
    report, good = evaluate.Report(tmp_path, {}), (torch.tensor(1.0), torch.tensor(0.1))
    report.add("fit", "loss", good, 4, "")
    for bad in [(torch.tensor(math.nan), good[1]), (good[0], torch.tensor(math.inf))]:
        with pytest.raises(ValueError, match="fit, distance: .* is not finite: is the model damaged"):
            report.add("fit", "distance", bad, 4, "")
    assert list(json.loads((tmp_path / "report.json").read_text())["sections"]["fit"]) == ["loss"]


def test_lone_surrogates_are_text(trained, tmp_path, monkeypatch):
    write(tmp_path / "in" / "squad.jsonl", [dict(id="\ud800", context="a\ud800", question="\udfff?", answer="\ud800b")])
    start = f"--model {trained}/runs/cola --tasks squad --task-data in --max-new-tokens 4 {QUICK} --out out"
    for _ in range(2):  # and so they are in the results
        call(evaluate.main, start, monkeypatch, tmp_path)
    (row,) = rows_of(tmp_path / "out" / "squad.jsonl")
    assert row["id"] == "\ud800" and row["prompt"].endswith("Context: a\ud800\nQuestion: \udfff?\nAnswer:")


def test_damaged_results_are_one_line(trained, tmp_path, monkeypatch):
    write(tmp_path / "benchmarks" / "lambada.jsonl", [dict(id=1, context="a", answer="b")])
    start = f"--model {trained}/runs/cola --tasks lambada --max-new-tokens 4 {QUICK} --out out"
    call(evaluate.main, start, monkeypatch, tmp_path)
    for damage in ("[]", "{}", "{", '{"id": 1}'):
        (tmp_path / "out" / "lambada.jsonl").write_text(damage + "\n")
        with pytest.raises(ValueError, match="out/lambada.jsonl line 1 (is not a JSON object|has no)"):
            call(evaluate.main, start, monkeypatch, tmp_path)


def test_other_lines_do_not_mix_with_earlier_results(trained, tmp_path, monkeypatch):
    start = f"--model {trained}/runs/cola --tasks lambada --max-new-tokens 4 {QUICK} --out out"
    for answer in ("b", "c"):
        write(tmp_path / "benchmarks" / "lambada.jsonl", [dict(id=1, context="a", answer=answer)])
        if answer == "b":
            call(evaluate.main, start, monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="answers another line with the id 1"):
        call(evaluate.main, start, monkeypatch, tmp_path)


def test_other_options_do_not_mix_with_earlier_results(trained, tmp_path, monkeypatch):
    write(tmp_path / "benchmarks" / "lambada.jsonl", [dict(id=1, context="a", answer="b")])
    start = f"--model {trained}/runs/cola --tasks lambada --max-new-tokens 4 {QUICK} --out out"
    call(evaluate.main, start, monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="other options: choose another --out"):
        call(evaluate.main, f"{start} --cfg-scale 2", monkeypatch, tmp_path)


def test_plots_need_matplotlib_only(trained, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        call(evaluate.main, f"{SMALL} {QUICK} --plot --out plots", monkeypatch, trained)


def test_a_terminal_of_few_characters(trained, monkeypatch):
    """The judge's table has a sign that ASCII has not."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    size = "--num-samples 2 --max-new-tokens 4 --prompt-tokens 4 --steps 1 --device cpu"
    done = run("measure.judge", size, trained)
    assert done.returncode == 0 and "\\xb1 is the standard error" in done.stdout, done.stderr
