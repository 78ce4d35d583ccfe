"""`dgemma conformance`. Importing this imports no torch."""

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dgemma.flags import UsageError

if TYPE_CHECKING:
    from dgemma.conformance.adapter import Adapter

OURS = "dgemma.conformance.ours:Dgemma"


def conformance(
    adapter: Annotated[str, typer.Option(help="MODULE:CLASS of the engine to check; docs/conformance.md")] = OURS,
    case: Annotated[list[str] | None, typer.Option(help="run this case only; may be given again")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
) -> None:
    """Hold an engine against golden results, case by case, and name the mistake it looks like; exit code 1 if any
    differs."""
    from dgemma.conformance.case import cases

    chosen = cases()
    names = [each.name for each in chosen]
    if unknown := set(case or ()) - set(names):
        raise UsageError(f"there is no case {min(unknown)!r}; there are {', '.join(names)}")
    engine = adapter_of(adapter)
    import torch

    from dgemma.conformance.run import check, suspects
    from dgemma.conformance.traps import TRAPS

    torch.set_num_threads(1)  # the networks are tiny: a second thread only waits
    findings = []
    width = max(map(len, case or names))
    for finding in check(engine, [each for each in chosen if not case or each.name in case]):
        findings.append(finding)
        if not as_json:
            print(f"{finding.verdict:<7} {finding.case.name:<{width}}  {finding.place} {finding.told}".rstrip())
            sys.stdout.flush()
    named = suspects(findings)
    wrong = [finding for finding in findings if finding.verdict in ("wrong", "error")]
    if as_json:
        told = [
            {"case": f.case.name, "about": f.case.about, "verdict": f.verdict, "place": f.place, "told": f.told,
             "looks_like": f.looks_like}
            for f in findings
        ]  # fmt: skip
        suspected = [{"trap": s.trap, "explains": s.cases, "but_not_in": s.missing} for s in named]
        print(json.dumps({"findings": told, "suspects": suspected}, indent=2))
    else:
        right = sum(finding.verdict == "right" for finding in findings)
        print(f"\n{right} of {len(findings)} cases are right")
        for suspect in named:
            why = f": {TRAPS[suspect.trap].__doc__}" if suspect.trap in TRAPS else ""
            but = f"; it should also show in {', '.join(suspect.missing)}" if suspect.missing else ""
            print(f"looks like {suspect.trap}{why} ({len(suspect.cases)} of {len(wrong)}{but})")
        if unexplained := [finding.case.name for finding in wrong if not finding.looks_like]:
            print(f"like no mistake that is on record: {', '.join(unexplained)}")
    if wrong:
        raise typer.Exit(1)


def adapter_of(name: str) -> "Adapter":
    """An instance of MODULE:CLASS, which may lie in the current directory."""
    module, _, kind = name.partition(":")
    if not module or not kind:
        raise UsageError(f"--adapter takes MODULE:CLASS, not {name!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module), kind)()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--adapter {name}: {error}") from None
    if lacking := [method for method in ("load", "encode", "generate") if not hasattr(made, method)]:
        raise UsageError(f"--adapter {name} has no {lacking[0]}(): see dgemma.conformance.adapter.Adapter")
    return made
