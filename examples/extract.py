"""Texts to records: every line of standard input becomes a JSON object that keeps to a schema, in the same order.

    dgemma serve tiny &
    python examples/extract.py schema.json < texts.txt > records.jsonl

The schema always holds, whatever the weights believe: what comes out never needs to be repaired, only to be believed
or not. Requests go out side by side, and the server denoises their canvases in one batch.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openai import OpenAI


def record(client: OpenAI, text: str, schema: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """What a text says, in the schema's words."""
    names = ", ".join(schema["properties"])
    reply = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": f"Extract {names} as JSON: {text}"}],
        response_format={"type": "json_schema", "json_schema": {"name": "record", "schema": schema}},
        seed=seed,
    )
    return json.loads(reply.choices[0].message.content or "")


def records(client: OpenAI, texts: Iterable[str], schema: dict[str, Any], at_once: int) -> Iterator[dict[str, Any]]:
    """In the order of the texts, `at_once` of them on their way."""
    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(lambda text: record(client, text, schema), texts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Texts to records.")
    parser.add_argument("schema", type=Path, help="JSON schema of an object with properties")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--at-once", type=int, default=8)
    given = parser.parse_args()
    schema = json.loads(given.schema.read_text(encoding="utf-8"))
    client = OpenAI(base_url=given.url, api_key="none")
    texts = (line.strip() for line in sys.stdin if line.strip())
    for found in records(client, texts, schema, given.at_once):
        print(json.dumps(found, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
