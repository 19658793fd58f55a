"""From what the user typed to a directory: a path as it is, a hub id through huggingface_hub's cache.

The download takes tensors, configuration and tokenizer, never code and never pickles; it shows progress, takes up a
broken connection where it broke (after a kill: at the first unfinished file), and works from the cache when the hub
cannot be reached. `HF_ENDPOINT` (a mirror), `HF_HOME` (where the
cache lies), `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean everywhere.
"""

import os
import re
from pathlib import Path

from karakoram.errors import CheckpointError

WANTED = ("*.safetensors", "*.k2experts", "*.json", "tiktoken.model", "*.jinja")
UNWANTED = ("*/*",)  # in sub-directories lie other copies of the weights; nothing this package reads
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")


def resolve(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The directory of a checkpoint. A path that exists wins over a hub id of the same spelling."""
    text = str(path_or_hub_id)
    try:
        path = Path(text).expanduser()
        is_directory, exists = path.is_dir() and bool(text), path.exists() and bool(text)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL byte, an unknown ~user
        raise CheckpointError(
            f"{text[:80]!r} is no path: {error}.", "Name a directory or a model on the hub."
        ) from error
    if is_directory:
        return path
    if exists:
        raise CheckpointError(
            f"{path} is a file.", "Name the directory that holds config.json and the safetensors files."
        )
    if isinstance(path_or_hub_id, Path) or not HUB_ID.fullmatch(text):
        raise CheckpointError(
            f"{text!r} does not exist.", "Name a directory, or a model on the hub as ORGANISATION/NAME."
        )
    return download(text, revision)


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when a transfer fails, for callers that fetch single files themselves."""
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, ValueError, HfHubHTTPError.__bases__[0]  # the last is HTTPError of httpx (hub 1) or httpx2 (hub 2)


def download(hub_id: str, revision: str | None = None) -> Path:
    """The snapshot of a hub model in the local cache, completed from the hub if it can be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=list(WANTED),
                ignore_patterns=list(UNWANTED),
                endpoint=os.environ.get("HF_ENDPOINT") or None,
            )
        )
    except GatedRepoError as error:
        fix = "Accept its terms on the hub and set HF_TOKEN."
        raise CheckpointError(f"{hub_id} is gated on the hub.", fix) from error
    except RepositoryNotFoundError as error:
        what = f"{hub_id} is neither a directory here nor a model on the hub."
        raise CheckpointError(what, "Check the spelling; a private model needs HF_TOKEN.") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{hub_id} has no revision {revision!r}.", "Name a branch, tag or commit of it."
        ) from error
    except LocalEntryNotFoundError as error:
        what = f"{hub_id} is not a directory here, not complete in the cache, and the hub cannot be reached."
        raise CheckpointError(what, "Connect and run the same command again: finished files are kept.") from error
    except hub_errors() as error:
        what = f"{hub_id} could not be downloaded: {' '.join(str(error).split())[:300]}."
        raise CheckpointError(what, "Run the same command again: finished files are kept.") from error
