"""An agent: the model calls tools until it has an answer. Any OpenAI client works; this is the `openai` package.

dgemma serve tiny &
python examples/agent.py "What time is it in Oslo?"
"""

import argparse
import inspect
import json
from collections.abc import Callable
from typing import Any

from openai import OpenAI

CLOCKS = {"Oslo": "09:30", "Lima": "03:30", "Kyoto": "17:30"}
SKIES = {"Oslo": {"temperature": 4, "sky": "cloudy"}, "Lima": {"temperature": 19, "sky": "clear"}}


def get_time(city: str) -> dict[str, Any]:
    return {"time": CLOCKS[city]}


def get_weather(city: str, day: str = "today") -> dict[str, Any]:
    return SKIES[city]


def declared(function: Callable[..., Any], description: str) -> dict[str, Any]:
    """A function as the API declares it: its arguments are texts, and those without a default are required."""
    known = inspect.signature(function).parameters
    required = [name for name, parameter in known.items() if parameter.default is inspect.Parameter.empty]
    properties = {name: {"type": "string"} for name in known}
    parameters = {"type": "object", "properties": properties, "required": required}
    told = {"name": function.__name__, "description": description, "parameters": parameters}
    return {"type": "function", "function": told}


FUNCTIONS = {function.__name__: function for function in (get_time, get_weather)}
TOOLS = [declared(get_time, "Time in a city."), declared(get_weather, "Weather in a city.")]


def called(name: str, arguments: str) -> str:
    """What a tool says, as JSON; its errors go to the model, which may do better the next time."""
    try:
        return json.dumps(FUNCTIONS[name](**json.loads(arguments)))
    except Exception as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}"})


def answer(client: OpenAI, question: str, turns: int = 4, **options: Any) -> list[dict[str, Any]]:
    """The conversation that comes of a question: it ends with an answer, or after so many turns of calls."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    for _ in range(turns):
        reply = client.chat.completions.create(model="default", messages=messages, tools=TOOLS, **options)
        message = reply.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            said = called(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": said})
    return messages


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a model that may call tools.")
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for message in answer(OpenAI(base_url=given.url, api_key="none"), given.question, seed=given.seed):
        for call in message.get("tool_calls") or []:
            print(f"calls {call['function']['name']}({call['function']['arguments']})")
        if message.get("content"):
            print(f"{message['role']}: {message['content']}")


if __name__ == "__main__":
    main()
