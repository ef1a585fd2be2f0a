"""Which model writes captions, and what runs it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

SOURCE_NAME = re.compile(r"[\w.+-]+")


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """A model, and how it is asked."""

    model: str  # Repository on the Hugging Face hub, folder, or the name that the server has for it.
    # What runs the model.
    #   transformers  this machine: whatever AutoModelForImageTextToText loads
    #   openai        a server that speaks OpenAI's protocol (vLLM, SGLang, OpenAI): --url
    backend: Literal["transformers", "openai"] = "transformers"
    url: str | None = None  # Address of the server, such as http://localhost:8000/v1.
    key_env: str = "OPENAI_API_KEY"  # Environment variable that holds the server's key; it may be missing.
    max_tokens: int = 64  # Tokens that an answer may have.
    batch: int = 16  # Prompts in one pass of the model.
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto uses CUDA if there is a GPU.
    concurrency: int = 16  # Requests under way at once.
    timeout: float = 120.0  # Seconds that an answer may take.
    retries: int = 5  # Further attempts after a failed request, each after twice the wait.

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise ValueError("--model is empty; give a repository, a folder or the server's name for the model")
        for name in ("max_tokens", "batch", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.retries < 0:
            raise ValueError(f"--retries must not be negative, got {self.retries}")
        if self.timeout <= 0:
            raise ValueError(f"--timeout must be above 0 seconds, got {self.timeout}")
        if self.backend == "openai":
            self._check_url()

    def _check_url(self) -> None:
        if self.url is None:
            raise ValueError("--backend openai needs --url, such as http://localhost:8000/v1")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--url must begin with http:// or https:// and name a host, got {self.url!r}")
        if "@" in parts.netloc or parts.query:
            raise ValueError(f"--url must hold no key; put it into the environment variable {self.key_env}")

    def name_source(self, given: str | None) -> str:
        """Return the source of the captions: the one that was given, or the last part of the model's name."""
        name = given if given is not None else self.model.rstrip("/").rpartition("/")[2]
        if not SOURCE_NAME.fullmatch(name):
            raise ValueError(
                f"--source must be made of letters, digits and . + - _, got {name!r}"
                + " from --model; give one" * (given is None)
            )
        return name
