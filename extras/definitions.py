"""A text of short English sentences: the definitions of WordNet, "escape: the act of escaping physically".

    apt-get install wordnet-base                                # or the database files of WordNet 3 from elsewhere
    python -m extras.definitions --out definitions.jsonl
    python train_vae.py --data definitions.jsonl --vocab-size 1024

The model in pretrained/ was trained on it.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from common import replacing, run_script
from options import option, parse_options


def definitions(lines):
    """Yield "word: definition" of every entry in the lines of a WordNet database file, wndb(5WN).

    An entry is one line, "offset file type count word ... | gloss"; the lines of the licence begin with a space.  The
    word is the first of its synonyms, the definition what stands before the examples, which are in quotes."""
    for line in lines:
        if line.startswith(" "):
            continue
        entry, gloss = line.split("|", 1)
        word = re.sub(r"\((a|p|ip)\)$", "", entry.split()[4])  # that says where an adjective can stand
        definition = gloss.split('; "')[0].strip(" ;\n")
        if definition and '"' not in definition:
            yield f"{word.replace('_', ' ')}: {definition}"


@dataclass
class Options:
    wordnet: str = option("/usr/share/wordnet", "folder with data.noun, data.verb, data.adj and data.adv")
    out: str = option("definitions.jsonl", 'file to write, one {"text": ...} a line')


def main():
    o, _ = parse_options(Options, __doc__)
    files = [Path(o.wordnet) / f"data.{kind}" for kind in ("noun", "verb", "adj", "adv")]
    texts = list(dict.fromkeys(text for file in files for text in definitions(file.open(encoding="utf-8"))))
    with replacing(o.out) as temporary:
        temporary.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    print(f"{len(texts):,} definitions are in {o.out}; next: python train_vae.py --data {o.out}")


if __name__ == "__main__":
    run_script(main)
