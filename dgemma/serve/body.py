"""What all request bodies have in common."""

import json
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict

T = TypeVar("T")


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def text(value: T) -> T:
    """Whatever holds texts; JSON can spell halves of surrogate pairs, which are none."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is not text") from None
    return value


Object = Annotated[dict[str, Any], AfterValidator(text)]
Objects = Annotated[list[dict[str, Any]], AfterValidator(text)]
Text = Annotated[str, AfterValidator(text)]
