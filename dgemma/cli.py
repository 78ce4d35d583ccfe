"""The command line. Thin: flags of decoding come from GenerationConfig, and torch waits until a model is loaded."""

import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dgemma import embedded
from dgemma.bench.cli import app as bench
from dgemma.checkpoints.source import GGUF, folders_of, resolve
from dgemma.checks import verify
from dgemma.commands import edit, infill
from dgemma.conformance.cli import conformance
from dgemma.evals.cli import evaluate, evaluate_formats, evaluate_spans
from dgemma.flags import (
    Device,
    Dtype,
    Format,
    Images,
    KVCache,
    Model,
    Quantize,
    UsageError,
    Videos,
    check_folders,
    checked,
    config_flags,
    constraint_of,
    load_checked,
    media_flags,
)
from dgemma.serve.cli import batch, serve
from dgemma.terminal.attach import Content, attachments, content_of
from dgemma.train.cli import teach, train

if TYPE_CHECKING:
    from dgemma.language_model import Generation, LanguageModel

OF_BOTH_MODES = {"max_new_tokens"}
PACE = 0.15
"""Seconds that a replayed step stays."""

Seed = Annotated[int | None, typer.Option(help="of all random draws", show_default="0")]
System = Annotated[str | None, typer.Option(help="system message")]
Think = Annotated[bool, typer.Option("--think", help="let the model think before it answers")]
Visual = Annotated[bool, typer.Option("--visual", help="show the denoising, on a terminal")]
Autoregressive = Annotated[bool, typer.Option("--autoregressive", help="left to right instead of by diffusion")]
Temperature = Annotated[float | None, typer.Option(help="of --autoregressive; 0 takes the likeliest", show_default="0")]


app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    epilog="Defaults of decoding options are the release's; a checkpoint's generation_config.json overrides them.",
)


app.add_typer(bench, name="bench")
app.command("train")(train)
app.command("teach")(teach)
app.command("eval")(evaluate)
app.command("eval-spans")(evaluate_spans)
app.command("eval-formats")(evaluate_formats)
app.command("serve")(serve)
app.command("batch")(batch)
app.command("infill")(infill)
app.command("edit")(edit)
app.command("verify")(verify)
app.command("conformance")(conformance)


@app.callback(invoke_without_command=True)
def _start(context: typer.Context) -> None:
    """DiffusionGemma: a canvas of tokens is denoised until it is still."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
@config_flags
@media_flags
def run(
    model: Model = "sudoku",
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="the text; - reads standard input")] = None,
    image: Images = None,
    video: Videos = None,
    system: System = None,
    think: Think = False,
    visual: Visual = False,
    pace: Annotated[float | None, typer.Option(help="seconds that --visual shows each step, at least")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result with its telemetry as JSON")] = False,
    trace: Annotated[Path | None, typer.Option(help="record each step here, for `dgemma trace`")] = None,
    schema: Annotated[str | None, typer.Option(help="JSON schema that the answer keeps to: a FILE or JSON")] = None,
    regex: Annotated[str | None, typer.Option(help="regular expression that the whole answer matches")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="an answer that is allowed; may be given again")] = None,
    grammar: Annotated[Path | None, typer.Option(help="FILE with a grammar in Lark's notation")] = None,
    seed: Seed = None,
    autoregressive: Autoregressive = False,
    temperature: Temperature = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    kv_cache: KVCache = None,
    *,
    config: dict[str, Any],
    media: dict[str, Any],
) -> None:
    """Answer one prompt, about images and videos if there are any."""
    if as_json and visual:
        raise UsageError("--json and --visual exclude each other")
    if pace is not None and not (visual and 0 <= pace <= 60):
        raise UsageError("--pace takes 0 to 60 seconds" if visual else "--pace has no effect without --visual")
    check_folders(trace)
    shown = attachments(image, video, media)
    options = _options(config, seed, visual, autoregressive, temperature)
    constraint = constraint_of(schema, regex, choice, grammar)
    if constraint is not None and autoregressive:
        raise UsageError("constraints are for diffusion: --autoregressive takes none")
    text = _prompt(prompt, needed=not shown)
    directory = checked(model, config)
    task = embedded.task(directory)
    if task:
        try:
            task.prepare(text)
        except ValueError as error:
            raise UsageError(str(error)) from None

    lm = _load(model, directory, device, dtype, quantize, kv_cache, think)
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    said = content_of(shown, text)
    whole = [*messages, {"role": "user", "content": said}] if system or shown else text
    asked = lm.read(whole, think=think, media=media)
    events = lm.stream(asked, think=think, constraint=constraint, **options)
    if trace:
        from dgemma.terminal.replay import recorded

        events = recorded(events, trace, lm, asked.tokens, options)
    if as_json:
        *_, finished = events
    else:
        from dgemma.terminal.screen import Screen
        from dgemma.terminal.view import View

        view = View(Screen(sys.stdout), lm.tokenizer, lm.defaults.eos_token_id, visual, pace=pace or 0.0)
        finished = view.show(events)
    result = lm.result(finished, options["seed"])  # type: ignore[arg-type]
    verdict = task.check(text, result.text) if task else None
    if as_json:
        _print_json({"model": model, **asdict(result), **({"verdict": asdict(verdict)} if verdict else {})})
    else:
        _tell(result, autoregressive)
        _judge(verdict)
    if verdict and not verdict.right:
        raise typer.Exit(1)


@app.command()
@config_flags
@media_flags
def chat(
    model: Annotated[
        str | None,
        typer.Argument(help="as for run; with --url a name there", show_default="tiny, or the first there"),
    ] = None,
    image: Images = None,
    video: Videos = None,
    system: System = None,
    think: Think = False,
    visual: Visual = False,
    seed: Seed = None,
    autoregressive: Autoregressive = False,
    temperature: Temperature = None,
    url: Annotated[str | None, typer.Option(help="of a server to talk with, instead of loading a model")] = None,
    api_key: Annotated[str | None, typer.Option(help="for --url", show_default="DGEMMA_API_KEY")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    kv_cache: KVCache = None,
    *,
    config: dict[str, Any],
    media: dict[str, Any],
) -> None:
    """Talk with a model over several turns; /help lists the commands. Files go along with the first message."""
    shown = attachments(image, video, media, later=True)
    options = _options(config, seed, visual, autoregressive, temperature)
    if url is not None:
        given = {"device": device, "dtype": dtype, "quantize": quantize, "kv-cache": kv_cache}
        for name, value in given.items():
            if value not in ("auto", None):
                raise UsageError(f"--{name} has no effect with --url")
        from dgemma.terminal.remote import converse

        converse(url, api_key, model, system, think, visual, options, shown, media)
        return
    if api_key is not None:
        raise UsageError("--api-key has no effect without --url")
    model = model or "tiny"
    lm = _load(model, checked(model, config), device, dtype, quantize, kv_cache, think)
    from dgemma.terminal.chat import Conversation
    from dgemma.terminal.screen import Screen
    from dgemma.terminal.view import View

    chat = lm.chat(**options, media=media)

    def answer(said: Content, think: bool) -> None:
        if lm.task:  # made for one question at a time
            chat.reset()
        view = View(Screen(sys.stdout), lm.tokenizer, lm.defaults.eos_token_id, visual)
        result = lm.result(view.show(chat.send(said, think=think)), options["seed"])
        _tell(result, autoregressive)
        _judge(lm.task.check(said, result.text) if lm.task and isinstance(said, str) else None)

    conversation = Conversation(chat, answer, think, shown)
    if system:
        conversation.set_system(system)
    conversation.run()


@app.command("trace")
def show_trace(
    file: Annotated[Path, typer.Argument(help="what `dgemma run --trace` has written")],
    pace: Annotated[float | None, typer.Option(help="seconds a step", show_default=str(PACE))] = None,
    row: Annotated[int | None, typer.Option(help="of a trace of several requests", show_default="its first")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page to step through")] = None,
    svg: Annotated[Path | None, typer.Option(help="write a moving picture")] = None,
    gif: Annotated[Path | None, typer.Option(help="write a moving picture; needs pillow")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the events, a JSON object a line")] = False,
) -> None:
    """Show a recorded generation again, without its model: here, or as a page or picture."""
    if as_json and (html or svg or gif or pace is not None):
        raise UsageError("--json goes with --row alone")
    if pace is not None and not 0 <= pace <= 60:
        raise UsageError("--pace takes 0 to 60 seconds")
    check_folders(html, svg, gif)
    from dgemma.decoding.trace import read, to_json
    from dgemma.terminal import export, replay
    from dgemma.terminal.screen import note

    trace, seconds = read(file), PACE if pace is None else pace
    shown = replay.recording(trace, row)
    if as_json:
        for event in trace.events if row is None else (event for event in trace.events if event.row == row):
            print(json.dumps(to_json(event)))
    if html:
        html.write_text(export.page(shown, seconds), "utf-8")
    if svg:
        svg.write_text(export.film(shown.header.model, export.panels(shown), seconds), "utf-8")
    if gif:
        export.write_gif(gif, export.panels(shown), seconds)
    if not (as_json or html or svg or gif):
        replay.replay(shown, seconds)
    if trace.problem:
        note(trace.problem)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="directory or hub id of a LoRA adapter")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the directory to write")],
    dtype: Dtype = "auto",
) -> None:
    """Write an adapter and the model it was made for as one checkpoint in the released format."""
    folders = folders_of(resolve(adapter))
    if folders[-1].suffix == GGUF:
        raise ValueError(f"{adapter} changes {folders[-1]}: an adapter cannot be merged into a GGUF file")
    from dgemma.checkpoints.save import save_model
    from dgemma.language_model import load
    from dgemma.model.lora import merge_lora

    lm = load(adapter, "cpu", dtype)
    merge_lora(lm.model)  # what load leaves unmerged is quantised: an error
    save_model(lm.model, out, lm.defaults, folders)


@app.command()
def quantize(
    model: Model,
    format: Annotated[Format, typer.Option(help="of the experts; beside 4 bits, attention and dense MLPs get 8")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the directory to write")],
    group: Annotated[Literal["32", "64", "128"], typer.Option(help="columns that share a scale in 4-bit ints")] = "32",
    embeddings: Annotated[bool, typer.Option("--embeddings", help="the token embeddings too, in int8")] = False,
) -> None:
    """Write a model in fewer bits, in the layout of compressed-tensors, experts one by one."""
    from dgemma.checkpoints.save import save_model
    from dgemma.language_model import load
    from dgemma.quant.quantize import Quantization

    directory = resolve(model)
    lm = load(directory, "cpu", quantize=Quantization(format, int(group), embeddings))
    save_model(lm.model, out, lm.defaults, folders_of(directory), max_shard_bytes=2_000_000_000)


@app.command()
def info(model: Annotated[str, typer.Argument(help="embedded name, directory, GGUF file or hub id")]) -> None:
    """Tell a model's sizes, what its file holds and how much memory it takes."""
    from dgemma.terminal.info import describe

    for line in describe(resolve(model, weights=False)):
        print(line)


def _options(
    config: dict[str, Any], seed: int | None, visual: bool, autoregressive: bool, temperature: float | None
) -> dict[str, Any]:
    """What `stream` takes. An option that would have no effect is an error."""
    if seed is not None and not 0 <= seed < 1 << 64:
        raise UsageError(f"--seed must lie in 0 … 2^64 - 1, not {seed}")
    if temperature is not None and not autoregressive:
        raise UsageError("--temperature needs --autoregressive; diffusion has --t-min and --t-max")
    if temperature is not None and not (math.isfinite(temperature) and temperature >= 0):
        raise UsageError(f"--temperature must be a number of at least 0, not {temperature}")
    if autoregressive:
        idle = [name for name in config if name not in OF_BOTH_MODES] + ["visual"] * visual
        if idle:
            raise UsageError(f"--{idle[0].replace('_', '-')} has no effect with --autoregressive")
        if seed is not None and not temperature:
            raise UsageError("--seed has no effect with --autoregressive at --temperature 0")
    mode = {"autoregressive": True, "temperature": temperature or 0.0} if autoregressive else {}
    return {**config, "seed": seed or 0, **mode}


def _prompt(given: str | None, needed: bool = True) -> str:
    """The text of -p; standard input for "-", and for no -p where it is not a terminal. Empty only if not needed."""
    if given is None and (sys.stdin is None or sys.stdin.isatty()):
        if not needed:
            return ""
        raise UsageError("there is no prompt: give one with -p, or pipe one in")
    try:
        text = sys.stdin.buffer.read().decode() if given in (None, "-") else str(given)
        text.encode()
    except UnicodeError:
        raise UsageError("the prompt is not UTF-8 text") from None
    if needed and not text.strip():
        raise UsageError("the prompt is empty")
    return text.removesuffix("\n")


def _load(
    model: str,
    directory: Path,
    device: str,
    dtype: str,
    quantize: str | None,
    kv_cache: str | None,
    think: bool,
) -> "LanguageModel":
    lm = load_checked(model, directory, device, dtype, quantize, kv_cache)
    if think and lm.template is None:
        raise UsageError(f"--think has no effect: {model} has no chat template")
    return lm


def _tell(result: "Generation", autoregressive: bool) -> None:
    """How the answer came about, for a person; to a pipe only that it was cut."""
    from dgemma.terminal.screen import note
    from dgemma.terminal.view import cut, summary

    told = summary(result, autoregressive) if sys.stderr.isatty() else cut(result)
    if told:
        note(" · ".join(told), faint=True)


def _judge(verdict: embedded.Verdict | None) -> None:
    from dgemma.terminal.screen import note

    if verdict:
        note(f"{'right' if verdict.right else 'wrong'}: {verdict.reason}")


def _print_json(values: dict[str, Any]) -> None:
    from dgemma.terminal.layout import Style
    from dgemma.terminal.screen import Screen

    Screen(sys.stdout).show([(json.dumps(values, indent=2, ensure_ascii=False) + "\n", Style.PLAIN)])


def main() -> None:
    """Runs a command. An error is one line on standard error: exit code 2 for a wrong call, 1 for the rest."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal of few characters is no reason to fail
    try:
        code = app(standalone_mode=False) or 0
        sys.stdout.flush()
    except (UsageError, typer.TyperException) as error:
        code = _failed(error, getattr(error, "exit_code", 2))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has no reader
        code = 1
    except (OSError, ValueError, MemoryError) as error:
        code = _failed(error, 1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which may not be imported
            raise
        code = _failed(error, 1)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _failed(error: Exception, code: int) -> int:
    message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
    print(f"dgemma: {' '.join(message.split()) or type(error).__name__}", file=sys.stderr)
    return code
