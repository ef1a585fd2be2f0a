"""The Hugging Face hub: whether it has a file, asked within seconds, and downloads into its cache."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.file_download import get_hf_file_metadata

from engines.torch_files import first_line

_ANSWER_S = 4.0  # seconds for the hub's first answer, unless HF_HUB_ETAG_TIMEOUT says otherwise


def find_file(repository: str, files: tuple[str, ...]) -> str:
    """Return the first of `files` that is in the hub's cache or can be downloaded.

    Raises ValueError, within seconds, where there is none; the message says why. The hub's own client tries for a
    minute, and prints a line for each attempt.
    """
    for file in files:
        if isinstance(huggingface_hub.try_to_load_from_cache(repository, file), str):
            return file
    constants = huggingface_hub.constants
    timeout = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else _ANSWER_S
    for file in files:
        try:
            get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, file), timeout=timeout)
        except EntryNotFoundError:
            continue
        except RepositoryNotFoundError as error:
            raise ValueError(f"{constants.ENDPOINT} has no public repository {repository}") from error
        except Exception as error:  # its HTTP client raises errors of its own for refusals, time-outs, proxies, offline
            raise ValueError(f"{constants.ENDPOINT} does not answer ({first_line(error)})") from error
        return file
    raise ValueError(f"{repository} holds none of {', '.join(files)}")


def download(repository: str, file: str) -> Path:
    """Return the path of a file in the hub's cache, where it is downloaded unless it is there.

    All files of one revision share a folder. Raises OSError, which says why.
    """
    if isinstance(cached := huggingface_hub.try_to_load_from_cache(repository, file), str):
        return Path(cached)
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file))
    except Exception as error:  # as above
        raise OSError(f"could not download {file} of {repository}: {first_line(error)}") from error
