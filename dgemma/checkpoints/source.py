"""From what a user types as MODEL to a local directory. Needs no torch; the hub's client is imported when needed."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from dgemma import embedded
from dgemma.config import GenerationConfig, read_json

DESCRIPTIONS = ("*.json", "*.jinja")
PATTERNS = (*DESCRIPTIONS, "*.safetensors")
ADAPTER = "adapter_config.json"
GGUF = ".gguf"


def resolve(source: str | Path, weights: bool = True) -> Path:
    """The directory of an embedded model's name, a local directory, or a hub id, which is downloaded or found in cache.

    A GGUF file is its own path.

    Without `weights`, a hub id brings only what describes the model: configs, tokenizer, template.
    Raises OSError or ValueError with one line that says what to do. HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and
    HF_HUB_OFFLINE count as usual.
    """
    text = str(source)
    if not text:
        raise ValueError("the model's name is empty; give a directory, a hub id or an embedded model's name")
    if shipped := embedded.directory(text):
        return shipped
    path = Path(text).expanduser()
    if path.is_dir() or (path.suffix == GGUF and path.is_file()):
        return path
    if path.suffix == GGUF:
        raise FileNotFoundError(f"there is no file {path}; a GGUF file of the hub has to be downloaded first")
    if path.exists():
        raise NotADirectoryError(f"{path} is a file; give the directory that holds it and its config.json")
    if isinstance(source, Path) or text.startswith((".", "~", "/")) or text.count("/") > 1 or "\\" in text:
        raise FileNotFoundError(f"there is no directory {path}")
    return _from_hub(text, PATTERNS if weights else DESCRIPTIONS)


def base_of(directory: Path) -> Path | None:
    """The directory of the model that an adapter's directory changes; None for one that holds a model itself.

    Raises what `resolve` raises, naming the adapter.
    """
    if (directory / "config.json").is_file() or not (directory / ADAPTER).is_file():
        return None
    name = read_json(directory / ADAPTER).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise ValueError(f"{directory / ADAPTER} lacks base_model_name_or_path, the model that the adapter changes")
    try:
        return resolve(name)
    except (OSError, ValueError) as error:
        raise type(error)(f"{directory / ADAPTER} changes {name!r}, which is not to be had: {error}") from None


def folders_of(directory: Path) -> tuple[Path, ...]:
    """Where a model's files lie: in its directory; for an adapter in its own, and then in that of `base_of`."""
    base = base_of(directory)
    return (directory, base) if base else (directory,)


def holder(folders: Sequence[Path], file: str) -> Path:
    """The first of the folders that has the file; the last one if none has."""
    return next((folder for folder in folders if (folder / file).is_file()), folders[-1])


def defaults_of(folders: Sequence[Path]) -> GenerationConfig:
    """What a model's generation_config.json says; the release's values if there is none."""
    own = holder(folders, "generation_config.json") / "generation_config.json"
    return GenerationConfig.from_file(own) if own.exists() else GenerationConfig()


def _from_hub(name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    try:
        # The second pattern leaves out subfolders: other tools' copies of the same weights lie there.
        directory = Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except errors.HFValidationError:
        raise ValueError(f"{name!r} is neither a directory here nor a hub id, which reads owner/name") from None
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{name}"
        raise PermissionError(f"{name} is gated: accept its terms at {page} and set HF_TOKEN to your token") from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{name} is neither a directory here nor a model on {constants.ENDPOINT}: check the spelling, "
            "or set HF_TOKEN if it is private"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise OSError(_unreachable(name, error)) from None
    # The client's own errors are OSError; its HTTP library's and hf_xet's are not.
    except (OSError, errors.HTTPError, RuntimeError) as error:
        raise OSError(f"could not download {name}: {_reason(error)}") from None
    if not any((directory / file).is_file() for file in ("config.json", ADAPTER)):
        raise FileNotFoundError(f"{name} holds no config.json on the hub: it is not a model with safetensors")
    return directory


def _unreachable(name: str, error: Exception) -> str:
    """The hub gave no answer, and the cache did not help."""
    from huggingface_hub import constants, errors

    kept = "only partly" if isinstance(error, errors.IncompleteSnapshotError) else "not"
    cache = f"{name} is {kept} in the cache {constants.HF_HUB_CACHE}"
    cause = error.__cause__
    if constants.HF_HUB_OFFLINE:
        return f"{cache}, and HF_HUB_OFFLINE is set: unset it to download, or give a local directory"
    if isinstance(cause, errors.HfHubHTTPError):
        return f"{cache}, and the hub did not hand it out: {_reason(cause)}"
    return (
        f"{cache}, and {constants.ENDPOINT} cannot be reached ({type(cause or error).__name__}): "
        "check the network and HF_ENDPOINT, or give a local directory"
    )


def _reason(error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
        return "the hub answers 401; set HF_TOKEN to a valid token, or unset a wrong one"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {constants.HF_HUB_CACHE} is full; free some, or set HF_HOME to another disk"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"{error.filename or constants.HF_HUB_CACHE} cannot be written; set HF_HOME to a directory of yours"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{os.strerror(error.errno)} ({error.filename or constants.HF_HUB_CACHE})"
    return " ".join(str(error).split()) or type(error).__name__
