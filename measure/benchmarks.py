"""The paper's eight benchmarks: prompts, generation and scoring.

    python -m measure.evaluate --model released --tasks all --task-data benchmarks/ --out runs/benchmarks
    python -m measure.evaluate --score runs/benchmarks/mmlu.jsonl

A task is read from benchmarks/<task>.jsonl, one object a line: id, answer, and what the prompt is made of (question,
context, choices; see TASKS).  All tasks are generative, multiple choice included: the model reads worked examples and
the question with its choices, and has to write out the right choice in 32 tokens.  The form of the prompts is the
paper's, the wording of the worked examples is ours; a line with a `prompt` of its own is asked as it stands.

Scoring gives the verdicts of the released scorer, for its own files of generations, too, in which the answer is called
`ground_truth`.  --protocol released asks as the released script does: RELEASED, and RACE with one worked example."""

import csv
import difflib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from tqdm import tqdm

from common import collect, first_process_first, n_processes, rank, replacing
from data import numbered_objects
from measure.likelihood import conditional_log_prob

# ----------------------------------------------------------------------------------------------------------------------
# Prompts


# What the released script does and the paper does not say.  -1: the tokenizer's end; 100265: <|im_end|>.
# Its weights are fp32 and its products bf16, but only on CUDA (evaluate.py).
RELEASED = dict(repetition_penalty=1.1, seed=66, limit=1000, eos_id=(-1, 100265))


@dataclass
class Task:
    form: str  # of one question; the answer follows
    examples: str = ""  # what stands before it: worked examples
    by_choice: bool = False  # whether an answer counts that names the right choice by its letter or in similar words
    labels_from: int | None = None  # the first label, if the public data set numbers its choices instead of naming one

    @property
    def fields(self):
        """What a line without a prompt must have."""
        return sorted({name for _, name, _, _ in Formatter().parse(self.form) if name} - {"situation"})


QUESTION = "Question: {question}\n{choices}\nAnswer:"

TASKS = dict(
    lambada=Task("{context}"),
    mmlu=Task(
        QUESTION,
        """\
Question: Which planet is closest to the sun?
(A) Venus
(B) Mars
(C) Mercury
(D) Earth
Answer: Mercury

Question: What is the derivative of x^2?
(A) x
(B) 2x
(C) x^3
(D) 2
Answer: 2x

""",
        by_choice=True,
    ),
    obqa=Task(
        QUESTION,
        """\
Question: What does a puddle turn into on a hot day?
(A) ice
(B) sand
(C) vapor
(D) oil
Answer: vapor

Question: Which of these conducts electricity?
(A) copper wire
(B) dry wood
(C) glass
(D) wool
Answer: copper wire

""",
        by_choice=True,
    ),
    hellaswag=Task(
        "Context: {context}\n{choices}\nAnswer:",
        """\
Context: A man fills a kettle with water and sets it on the stove. He
(A) waits until the water boils.
(B) plants the kettle in the garden.
(C) paints the stove blue.
(D) reads the water a story.
Answer: waits until the water boils.

Context: Two children build a tower of wooden blocks. The tower
(A) flies out of the window.
(B) sings a quiet song.
(C) grows leaves and flowers.
(D) gets too tall and falls over.
Answer: gets too tall and falls over.

""",
        labels_from=0,
    ),
    race=Task(
        "Article: {context} {question}\nOptions:\n{choices}\nAnswer:",
        """\
Each article comes with a question; answer it.

Article: Tom missed the bus and walked to school in the rain. His shoes were wet until noon. Why were his shoes wet?
Options:
(A) He washed them.
(B) He walked in the rain.
(C) He fell into a lake.
(D) He played football.
Answer: He walked in the rain.

Article: The library opens at nine. On Sundays it stays closed. When is the library closed?
Options:
(A) On Mondays
(B) At nine
(C) In summer
(D) On Sundays
Answer: On Sundays

""",
        by_choice=True,
    ),
    siqa=Task(
        "Question: {situation}{question}\n{choices}\nAnswer:",
        """\
Question: Lena lent Max her umbrella. How will Max feel towards Lena?
(A) thankful
(B) bored
(C) jealous
Answer: thankful

Question: Omar forgot to water the plants for a month. What will happen to the plants?
(A) they will bloom
(B) they will move away
(C) they will dry out
Answer: they will dry out

""",
        by_choice=True,
        labels_from=1,
    ),
    squad=Task(
        "Context: {context}\nQuestion: {question}\nAnswer:",
        """\
Context: The Danube rises in the Black Forest and flows through ten countries to the Black Sea.
Question: Where does the Danube rise?
Answer: Black Forest

""",
    ),
    story_cloze=Task(
        "Story: {context}\n{choices}\nEnd:",
        """\
Story: Nina found a lost dog in the park. It had a tag with a phone number. She called the number.
(A) The dog wrote her a letter.
(B) The owner came and thanked her.
End: The owner came and thanked her.

Story: Paul studied every evening for the test. He slept well the night before. All the questions were easy for him.
(A) He got a good grade.
(B) He was sorry that he had not studied.
End: He got a good grade.

""",
        labels_from=1,
    ),
)


def prompt_of(task, line, one_example=False):
    """The prompt of one line: its own if it has one, else the worked examples and its question.  one_example: only the
    first of RACE, as in the released protocol."""
    if "prompt" in line:
        return line["prompt"]
    context, examples = line.get("context", ""), task.examples
    if one_example and task is TASKS["race"]:
        examples = examples[: examples.rindex("Article:")]
    return examples + task.form.format(
        context=context,
        situation=context and context + " ",  # SIQA as released asks without; then there is only the question
        question=line.get("question", ""),
        choices="\n".join(f"({chr(65 + i)}) {choice}" for i, choice in enumerate(line["choices"])),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Scoring

ALIKE = 0.9  # similarity from which a text counts as a choice misspelt
FIRST_LINE = re.compile(r"\W*\w[^\n\r\v\f\x1c-\x1e\x85\u2028\u2029]*")  # with a word; ends where str.splitlines cuts


def is_correct(task, generated, answer, choices=()):
    """Whether a generated text gives the answer; all are str.  What follows the first line with a word is ignored.

    LAMBADA: the first word is the answer's.  Tasks by_choice: the text names the same choice as the answer.  All tasks:
    the whole line is the answer.  Case, punctuation and spaces never count."""
    line = FIRST_LINE.match(generated)
    text = line[0] if line else generated
    if plain(text) == plain(answer):
        return True
    if task is TASKS["lambada"]:
        return plain(text).split()[:1] == plain(answer).split()[:1]
    if not task.by_choice or not choices:
        return False
    wanted = choice_of(answer, choices)
    # If the text announces an answer, that part counts first.
    announced = re.search(r"\b(?:final\s+)?answer\b\s*(?:is|[=:：])?\s*(.+)$", text.strip(), re.I)
    found = choice_of(announced[1] if announced else text.strip(), choices)
    return wanted is not None and wanted == (choice_of(text, choices) if found is None else found)


def plain(text):
    return " ".join(re.sub(r"[^\w\s]", "", text.lower()).split())


def choice_of(text, choices):
    """The number of the choice that a text names, by letter or in words, or None."""
    letter = r"[(\[]?\s*([A-Za-z])\s*[)\]]?"
    announced = rf"\b(?:answer|option|choice)\b\s*(?:is|[=:：])?\s*{letter}(?=\s|$|[.,;:!?])"
    stripped = text.strip()
    named = re.findall(rf"^{letter}\.?$", stripped)[-1:] + re.findall(announced, " ".join(stripped.split()), re.I)[-1:]
    if len(stripped) <= 40:
        named += re.findall(r"[(\[]\s*([A-Za-z])\s*[)\]]", stripped)[-1:]
    for name in named:
        if (number := ord(name.upper()) - 65) < len(choices):
            return number

    options = [plain(choice) for choice in choices]
    if plain(text) in options and plain(text):
        return options.index(plain(text))
    announcement = r"^(the\s+)?(correct\s+)?(final\s+)?(answer|option|choice)\b\s*(is|[=:：])?\s*"
    said = plain(re.sub(announcement, "", text, flags=re.I))
    if not said:
        return None
    if said in options:
        return options.index(said)
    inside = [i for i, option in enumerate(options) if option and option in said]
    if len(inside) == 1:
        return inside[0]
    likeness = [difflib.SequenceMatcher(None, said, option).ratio() for option in options]
    return likeness.index(max(likeness)) if max(likeness) >= ALIKE else None


def number_of(task, answer, choices):
    """The number of the choice that the answer of a task file is, or None: by its text, by its label in the public data
    set, or by its letter."""
    texts = [choice.strip() for choice in choices]
    if answer.strip() in texts:
        return texts.index(answer.strip())
    if is_label(task, answer):
        number = int(answer) - task.labels_from
        return number if 0 <= number < len(choices) else None
    return choice_of(answer, choices)


def is_label(task, answer):
    return task.labels_from is not None and re.fullmatch("[0-9]{1,2}", answer.strip())


# ----------------------------------------------------------------------------------------------------------------------
# Files

RESULTS = ("generate", "scores", "correct")  # what `run` adds to a line


def read_lines(file, task, needed, without_prompt=()):
    """The objects of a JSONL file of a task.  needed: what each must hold; without_prompt: what else, if it has no
    prompt.  An answer that is a label becomes the choice itself.  Raises ValueError that names file and line."""
    lines, first = [], {}
    for number, line in numbered_objects(file):
        where = f"{file} line {number}"
        if line is None:
            raise ValueError(f"{where} is not a JSON object")
        if "ground_truth" in line:  # in the released files
            line.setdefault("answer", line["ground_truth"])
        line["choices"] = line.get("choices") or []
        wanted = {*needed, *(() if "prompt" in line else without_prompt)}
        if missing := sorted(name for name in wanted if line.get(name, []) == []):
            raise ValueError(f"{where} has no {missing[0]}")
        try:
            check_line(line, task, wanted)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if "id" in wanted and first.setdefault(line["id"], number) != number:
            raise ValueError(f"{where} has the id of line {first[line['id']]}")
        lines.append(line)
    if not lines:
        raise ValueError(f"{file} is empty")
    return lines


def check_line(line, task, wanted):
    """Raises ValueError for odd values; an answer that is not in the words of its choice becomes that choice."""
    choices, results = line["choices"], "generate" in wanted
    for name in ("prompt", "question", "context", "answer", *["generate"] * results):
        if not isinstance(line.get(name, ""), str):
            raise ValueError(f"{name} is not a string")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("choices is not a list of strings")
    if len(choices) > 26:
        raise ValueError(f"there must be 1 to 26 choices, not {len(choices)}")
    if "id" in wanted and type(line["id"]) not in (int, str):
        raise ValueError("id is neither an integer nor a string")
    if results and not isinstance(line.get("correct", False), bool):
        raise ValueError("correct is neither true nor false")
    scores = line.get("scores", [0] * len(choices))
    kinds = [type(score) for score in scores] if isinstance(scores, list) else [None]
    if results and (len(kinds) != len(choices) or not {*kinds} <= {int, float}):
        raise ValueError(f"scores is not a list of {len(choices)} numbers, one for each choice")
    try:
        json.dumps(line, allow_nan=False)
    except ValueError:
        raise ValueError("a number is not finite: write null, or leave it out") from None

    answer = line.get("answer", "")
    if "choices" in task.fields and "answer" in wanted and (choices or is_label(task, answer)):
        number = number_of(task, answer, choices)
        if number is None:
            raise ValueError(f"the answer {answer!r} is none of the {len(choices)} choices")
        if not task.by_choice or is_label(task, answer):
            line["answer"] = choices[number]


def names_of(text):
    """Task names from "lambada,mmlu" or "all".  Raises ValueError for an unknown one."""
    names = list(TASKS) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TASKS:
            raise ValueError(f"there is no task {name!r}: choose among {', '.join(TASKS)} (--tasks)")
    return names


def open_tasks(text, folder, limit, ranking):
    """{task name: lines} of the named tasks, at most `limit` lines of each (0: all)."""
    jobs = {}
    for name in names_of(text):
        task = TASKS[name]
        if ranking and "choices" not in task.fields:
            raise ValueError(f"{name} has no choices to rank")
        needed = ["id", "answer"] + ["choices"] * (task.by_choice or ranking)
        lines = read_lines(Path(folder) / f"{name}.jsonl", task, needed, task.fields)[: limit or None]
        jobs[name] = [{key: value for key, value in line.items() if key not in RESULTS} for line in lines]
    return jobs


# ----------------------------------------------------------------------------------------------------------------------
# Running


def run(model, jobs, out, settings, batch_size, ranking=None, one_example=False):
    """Generate, or rank the choices, then score; writes `out`/<task>.jsonl and the summary, and prints it.

    jobs: of `open_tasks`; settings: options of `ColaDLM.generate`; ranking: those of `conditional_log_prob`, to take
    the likeliest choice instead.  Lines that `out` has already are not asked again.  The noise of a row belongs to
    its line, so neither batches nor processes nor interruptions change what comes out."""
    rows, n = [], n_processes()
    for name, lines in jobs.items():
        file = out / f"{name}.jsonl"
        with first_process_first():
            done = finished(file, TASKS[name])
        for line in lines:
            if any(done.get(line["id"], line).get(name) != value for name, value in line.items()):
                raise ValueError(f"{file} answers another line with the id {line['id']!r}: choose another --out")
        todo = [line for line in lines if line["id"] not in done]
        prompts = {line["id"]: prompt_of(TASKS[name], line, one_example) for line in todo}
        todo.sort(key=lambda line: len(prompts[line["id"]]))  # the rows of a batch should be about equally long
        seeds = {line["id"]: i if type(line["id"]) is str else line["id"] % 2**31 for i, line in enumerate(lines)}
        with tqdm(initial=len(lines) - len(todo), total=len(lines), desc=name, disable=rank() > 0) as bar:
            for start in range(0, len(todo), n * batch_size):
                batch = todo[start : start + n * batch_size]
                mine = batch[rank() :: n]
                asked, row_ids = [prompts[line["id"]] for line in mine], [seeds[line["id"]] for line in mine]
                if ranking is None:
                    found = [dict(generate=text) for text in model.generate(asked, row_ids=row_ids, **settings)]
                else:
                    found = [ranked(model, *row, ranking) for row in zip(asked, mine, row_ids, strict=True)]
                found = collect(found)
                if rank() == 0:
                    with open(file, "a", encoding="utf-8") as f:
                        for line, result in zip(batch, found, strict=True):
                            row = line | dict(prompt=prompts[line["id"]]) | result
                            f.write(json.dumps(row | verdict(name, row), allow_nan=False) + "\n")
                bar.update(len(batch))
        if rank() == 0:
            done = finished(file, TASKS[name])
            rows.append(summary_row(name, [done[line["id"]]["correct"] for line in lines]))
            write_summary(rows, out)
    if rank() == 0:
        print_summary(rows)


def ranked(model, prompt, line, row_id, options):
    """The likeliest choice after the prompt, and log p(choice | prompt) in nats of all.  One space stands between the
    two and belongs to the choice, as it does in the tokens of a text, even if the prompt ends in spaces.
    Raises ValueError for scores that are not finite."""
    choices = line["choices"]
    answers = [" " + choice.lstrip(" ") for choice in choices]
    prompts, same = [prompt.rstrip(" ")] * len(choices), [row_id] * len(choices)  # the same noise for all
    scores = conditional_log_prob(model, prompts, answers, row_ids=same, **options).tolist()
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"the choices of the line with the id {line['id']!r} score {scores}: is the model damaged?")
    return dict(generate=choices[scores.index(max(scores))], scores=scores)


def finished(file, task):
    """{id: row} of the rows in a file of generations; a row that an interruption cut off is removed from the file."""
    if not file.exists():
        return {}
    *whole, rest = file.read_bytes().split(b"\n")
    if rest:
        with replacing(file) as temporary:
            temporary.write_bytes(b"".join(row + b"\n" for row in whole))
    needed = ["id", "prompt", "answer", "generate", "correct"]
    return {row["id"]: row for row in read_lines(file, task, needed)} if whole else {}


def score_files(files, name, out):
    """Score files of generations, named after their tasks unless `name` says which it is; print a summary, and
    write it if there is a folder `out`."""
    rows = []
    for file in map(Path, files):
        task, *others = names_of(name or file.stem)
        if others:
            raise ValueError(f"--tasks {name}: with --score it says which one task the files are of")
        needed = ["generate", "answer"] + ["choices"] * TASKS[task].by_choice
        lines = read_lines(file, TASKS[task], needed)
        rows.append(summary_row(task, [verdict(task, line)["correct"] for line in lines]))
        known = [line["correct"] == verdict(task, line)["correct"] for line in lines if "correct" in line]
        if known:
            print(f"{file}: {sum(known)} of {len(known)} verdicts in the file are the same")
    if out:
        write_summary(rows, out)
    print_summary(rows)


def verdict(name, line):
    """Whether a line is right, as {"correct": bool}; of ranked choices the numbers are compared, not the texts."""
    task, choices, scores = TASKS[name], line["choices"], line.get("scores")
    if scores:
        return dict(correct=scores.index(max(scores)) == number_of(task, line["answer"], choices))
    return dict(correct=is_correct(task, line["generate"], line["answer"], choices))


def summary_row(name, correct):
    n, accuracy = len(correct), sum(correct) / len(correct)
    return dict(task=name, accuracy=accuracy, se=math.sqrt(accuracy * (1 - accuracy) / max(n - 1, 1)), n=n)


def write_summary(rows, out):
    with replacing(out / "summary.json") as temporary:
        temporary.write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n")
    with replacing(out / "summary.csv") as temporary, open(temporary, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def print_summary(rows):
    mean = sum(row["accuracy"] for row in rows) / len(rows)
    print(f"{'task':12}  accuracy in %     lines")
    for row in rows:
        print(f"{row['task']:12}  {100 * row['accuracy']:6.2f} ± {100 * row['se']:.2f}  {row['n']:8,}")
    n = sum(row["n"] for row in rows)
    of_lines = sum(row["accuracy"] * row["n"] for row in rows) / n
    print(f"{'mean':12}  {100 * mean:6.2f}           of all lines {100 * of_lines:.2f}  {n:8,}")
