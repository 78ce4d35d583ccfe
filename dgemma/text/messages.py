"""Messages and tools as clients send them (OpenAI's shape), checked and put into the form that templates read."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Plain = Callable[[str], str]

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
MEDIA = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
FIELDS = {
    "system": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "tool_calls", "reasoning", "reasoning_content"},
    "tool": {"role", "content", "name", "tool_call_id"},
}


def prepare_messages(messages: Sequence[Mapping[str, Any]], plain: Plain = str) -> list[dict[str, Any]]:
    """Messages as templates read them: roles of the family, media parts without payload, calls with parsed arguments.

    `plain` is applied to text that others than the operator and the model wrote: of users, of tools, in arguments.
    Raises ValueError that names the message and the field.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError("messages: a list of at least one message is expected")
    prepared: list[dict[str, Any]] = []
    unanswered: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        prepared.append(_message(message, where, plain))
        last = prepared[-1]
        if last["role"] == "tool":
            # A template leaves out, without a word, a tool message that answers nothing.
            call = _answered(last, unanswered, where)
            unanswered.remove(call)
            last["tool_call_id"] = call["id"]
        else:
            unanswered = list(last.get("tool_calls", ()))
    return prepared


def prepare_tools(tools: Sequence[Mapping[str, Any]], plain: Plain = str) -> list[Any]:
    """Tool declarations, checked, with `plain` applied to every text in them."""
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise ValueError("tools: a list is expected")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping):
            raise ValueError(f'tools[{i}]: {{"type": "function", "function": {{…}}}} is expected')
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError(f"tools[{i}].function.name: a name is expected, not {function.get('name')!r}")
        for name, kind in (("description", str), ("parameters", Mapping)):
            if function.get(name) is not None and not isinstance(function[name], kind):
                raise ValueError(f"tools[{i}].function.{name}: {_kind(function[name])} is not what is expected")
    return [map_text(tool, plain) for tool in tools]


def map_text(value: Any, change: Plain) -> Any:
    """A copy of a JSON value with `change` applied to every string, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(key)): map_text(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_text(item, change) for item in value]
    return value


def _message(message: Any, where: str, plain: Plain) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: an object is expected, not {_kind(message)}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{where}.role {role!r} is not known; it is one of {', '.join(ROLES)}")
    role = ROLES[role]
    # Clients send answers back with fields such as "refusal": null; only one that says something is refused.
    unknown = [name for name, value in message.items() if name not in FIELDS[role] and value]
    if unknown:
        raise ValueError(f"{where}.{unknown[0]} is not supported in a message of role {role!r}")
    prepared: dict[str, Any] = {"role": role}
    for name in ("name", "tool_call_id", "reasoning", "reasoning_content"):
        if name in FIELDS[role] and message.get(name) is not None:
            if not isinstance(message[name], str):
                raise ValueError(f"{where}.{name}: a string is expected, not {_kind(message[name])}")
            prepared[name] = message[name]
    if message.get("tool_calls"):
        if not isinstance(message["tool_calls"], Sequence) or isinstance(message["tool_calls"], str):
            raise ValueError(f"{where}.tool_calls: a list is expected, not {_kind(message['tool_calls'])}")
        prepared["tool_calls"] = [
            _call(call, i, f"{where}.tool_calls[{i}]", plain) for i, call in enumerate(message["tool_calls"])
        ]
    content = message.get("content")
    if content is None and "tool_calls" in prepared:
        content = ""
    # The template finds and drops earlier thoughts in the model's text, so that text must keep its special tokens.
    prepared["content"] = _content(content, role, f"{where}.content", plain if role in ("user", "tool") else str)
    return prepared


def _content(content: Any, role: str, where: str, plain: Plain) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return plain(content)
    if not isinstance(content, Sequence):
        raise ValueError(f"{where}: a string or a list of parts is expected, not {_kind(content)}")
    parts: list[dict[str, str]] = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise ValueError(f"{where}[{i}].text: a string is expected, not {_kind(part.get('text'))}")
            parts.append({"type": "text", "text": plain(part["text"])})
        elif isinstance(kind, str) and kind in MEDIA and role in ("user", "tool"):
            parts.append({"type": MEDIA[kind]})
        else:
            known = ["text", *(MEDIA if role in ("user", "tool") else ())]
            raise ValueError(f"{where}[{i}].type {kind!r} is not supported for role {role!r}; use {', '.join(known)}")
    return parts


def _call(call: Any, index: int, where: str, plain: Plain) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(f'{where}: {{"type": "function", "function": {{…}}}} is expected')
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{where}.function.name: a name is expected, not {function.get('name')!r}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise ValueError(f"{where}.function.arguments: not JSON: {error}") from error
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}.function.arguments: a JSON object is expected, not {_kind(arguments)}")
    id = call.get("id") or f"call_{index}"
    return {
        "id": id,
        "type": "function",
        "function": {"name": function["name"], "arguments": map_text(arguments, plain)},
    }


def _answered(message: dict[str, Any], unanswered: list[dict[str, Any]], where: str) -> dict[str, Any]:
    """The call that a tool message answers: by id, else by function name, else the first one open."""
    id, name = message.get("tool_call_id"), message.get("name")
    for call in unanswered:
        if id == call["id"] or (id is None and name in (None, call["function"]["name"])):
            return call
    said = f"tool_call_id {id!r}" if id is not None else f"name {name!r}" if name is not None else "a tool message"
    raise ValueError(f"{where}: {said} answers no open call of the assistant message before it")


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
