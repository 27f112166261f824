"""A text of short English sentences that every installation has: what docstrings say first.

    python -m extras.docstrings --out summaries.jsonl
    python train_vae.py --data summaries.jsonl --vocab-size 1024

The model in pretrained/ was trained on it.
"""

import ast
import importlib.util
import json
import re
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

from common import option, parse_options, replacing, run_script


def docstrings(folder):
    """Yield all docstrings of the Python files in a folder, those of tests and of bundled old packages excepted."""
    skipped = {"site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "lib2to3"}
    for file in sorted(folder.rglob("*.py")):
        if skipped & set(file.relative_to(folder).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old code, not our business
                tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        for node in ast.walk(tree):
            documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            if documented and (text := ast.get_docstring(node)):
                yield text


def docstring_summaries():
    """A list of sentences like "Return a copy of the graph.": what docstrings say first, each but once.

    Of the standard library and of four packages that come with requirements.txt, two of them by way of torch."""
    packages = [importlib.util.find_spec(name) for name in ("torch", "numpy", "sympy", "networkx")]
    folders = [Path(sysconfig.get_path("stdlib"))] + [Path(spec.origin).parent for spec in packages if spec]
    return list(dict.fromkeys(summaries(text for folder in folders for text in docstrings(folder))))


def summaries(texts):
    """Yield the first paragraph of each text as one line if it is prose: from a capital to a period, not indented."""
    for text in texts:
        paragraph = text.split("\n\n")[0]
        line = " ".join(paragraph.split())
        if "\n " not in paragraph and re.fullmatch(r"[A-Z][^>]*\.", line):
            yield line


@dataclass
class Options:
    out: str = option("summaries.jsonl", "file to write, one {\"text\": ...} a line")


def main():
    o, _ = parse_options(Options, __doc__)
    texts = docstring_summaries()
    with replacing(o.out) as temporary:
        temporary.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    print(f"{len(texts):,} sentences are in {o.out}; next: python train_vae.py --data {o.out}")


if __name__ == "__main__":
    run_script(main)
