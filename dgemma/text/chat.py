"""The checkpoint's own chat template, rendered in jinja2's sandbox."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Self

from jinja2 import TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dgemma.text.messages import Plain, prepare_messages, prepare_tools
from dgemma.text.tokenizer import NAMES, read_config, read_names


class ChatTemplate:
    """Messages to the text of a prompt.

    `names` are special tokens that are not called `<bos>`, `<eos>` and so on; the template sees them as bos_token …
    """

    def __init__(self, source: str, names: Mapping[str, str] | None = None):
        self.source = source
        known = {name: f"<{name}>" for name in NAMES} | dict(names or {})
        self._tokens = {f"{name}_token": token for name, token in known.items()}
        environment = _environment()
        try:
            self._variables = meta.find_undeclared_variables(environment.parse(source)) - self._tokens.keys()
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ValueError(f"chat template, line {error.lineno}: {error.message}") from error

    @classmethod
    def from_directory(cls, path: str | Path) -> Self | None:
        """chat_template.jinja, else chat_template in tokenizer_config.json (a text, or a list with a "default").

        None if the checkpoint has neither: a base model takes plain text, and a guessed format would only answer badly.
        """
        file = Path(path) / "chat_template.jinja"
        if file.is_file():
            source: Any = file.read_text("utf-8")
        else:
            file = Path(path) / "tokenizer_config.json"
            source = read_config(path).get("chat_template")
            if isinstance(source, list):
                source = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise ValueError(f"{file}: chat_template is neither a text nor a list of named texts")
        try:
            return cls(source, read_names(path))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        enable_thinking: bool = False,
        add_generation_prompt: bool = True,
        plain: Plain = str,
        **variables: Any,
    ) -> str:
        """The prompt's text, to be encoded as it is: the template writes BOS itself.

        Pass `plain=tokenizer.plain` for a prompt that goes to the model: special tokens spelled by a user, by a tool or
        in its declaration then stay ordinary characters and cannot open or end a turn. The system message keeps them
        (an operator may write `<|think|>`), and so does the model's own text. The default renders exactly what the
        template says. One image or video part renders as one `<|image|>` or `<|video|>`, in the order of the parts.

        Raises ValueError for a message, tool or variable that the template cannot take.
        """
        wanted = {*variables, *(["enable_thinking"] if enable_thinking else []), *(["tools"] if tools else [])}
        unused = sorted(wanted - self._variables)
        if unused:
            raise ValueError(f"this checkpoint's chat template has no {', '.join(unused)}")
        values = {
            **variables,
            **self._tokens,
            "messages": prepare_messages(messages, plain),
            "tools": prepare_tools(tools, plain) if tools else None,
            "enable_thinking": enable_thinking,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(values)
        except Exception as error:  # whatever foreign code raises, the message did not suit it
            raise ValueError(f"chat template: {error}") from error


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that templates on the hub are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja2's own escapes for HTML


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
