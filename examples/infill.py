"""Fill the gap at the cursor: an editor's client of `dgemma serve`, with nothing but Python's own library.

    python examples/infill.py FILE LINE:COLUMN [--url http://127.0.0.1:8000] [--longest 64] [--write]

prints the file with its gap filled, or with --write changes it. Lines and columns count from 1, in characters; what
lies from there on stays as it is. Vim: `:w | execute '!python infill.py % ' . line('.') . ':' . col('.') . ' --write'`.
"""

import argparse
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path


def at(text: str, place: str) -> int:
    """Where LINE:COLUMN is in a text. ValueError if it is not in it."""
    line, column = (int(part) for part in place.split(":"))
    lines = text.splitlines(keepends=True) or [""]
    if not 1 <= line <= len(lines) or not 1 <= column <= len(lines[line - 1].rstrip("\n")) + 1:
        raise ValueError(f"{place} is not in the text: it has {len(lines)} lines")
    return sum(map(len, lines[: line - 1])) + column - 1


def middle(url: str, before: str, after: str, longest: int, seed: int) -> str:
    """What the model puts between two texts: several lengths are tried at once, the likeliest one is told."""
    body = {"prompt": before, "suffix": after, "max_tokens": longest, "seed": seed}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        raise ValueError(json.load(error)["error"]["message"]) from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill the gap at the cursor.")
    parser.add_argument("file", type=Path)
    parser.add_argument("place", help="LINE:COLUMN")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--longest", type=int, default=64, help="tokens that the gap may have")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="change the file")
    given = parser.parse_args()
    text = given.file.read_text(encoding="utf-8")
    try:
        cut = at(text, given.place)
        filled = text[:cut] + middle(given.url, text[:cut], text[cut:], given.longest, given.seed) + text[cut:]
    except (ValueError, OSError) as error:
        sys.exit(f"infill: {error}")
    given.file.write_text(filled, encoding="utf-8") if given.write else print(filled, end="")


if __name__ == "__main__":
    main()
