"""`dgemma verify`. Importing this imports no torch."""

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from dgemma.checkpoints.source import GGUF, resolve
from dgemma.flags import Device, Model


def verify(
    model: Model,
    no_logits: Annotated[bool, typer.Option("--no-logits", help="do not load the network for its logits")] = False,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
) -> None:
    """Check a model's files: tensors, their values, tokenizer, template, and the release's logits; exit code 1 if
    something is wrong."""
    path = resolve(model)
    from rich.console import Console
    from rich.progress import Progress

    from dgemma.checkpoints.verify import verify as verify_directory
    from dgemma.checkpoints.verify_gguf import verify_gguf

    findings = []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("weights", total=None)
        update = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        check = verify_gguf if path.suffix == GGUF else verify_directory
        for finding in check(path, not no_logits, device, update):
            findings.append(finding)
            if not as_json:
                print(f"{finding.verdict:<8} {finding.check}: {finding.detail}", flush=True)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    if any(finding.verdict == "wrong" for finding in findings):
        raise typer.Exit(1)
