"""Captioning models behind a server that speaks OpenAI's protocol: vLLM, SGLang, OpenAI itself.

Requests run in threads, a bounded number at once. Failed ones are repeated after a pause that doubles. The key comes
from the environment; it goes into the Authorization header and nowhere else, and no redirection is followed with it.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import io
import json
import os
import queue
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from tgmae.captions.generate.asking import Prompt, Question, Reply
from tgmae.captions.generate.config import BackendConfig

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
_QUALITY = 90  # of JPEG
_FATAL = (401, 403, 404, 405)  # HTTP status of answers that no other prompt would change
_AGAIN = (408, 409, 425, 429)  # and 5xx: of those that a later attempt may
_HOPELESS = 8  # questions in a row without a single answer, after which the server counts as gone
_CHUNK = 65536
_SILENCE_S = 30.0  # from one line about failed requests to the next


class ServerError(ValueError):
    """The server refuses everything, or never answers."""


class _Failed(Exception):
    """One attempt failed. `pause_s` is what the server asks to wait, None where it says nothing."""

    def __init__(self, reason: str, is_worth_repeating: bool, pause_s: float | None = None) -> None:
        super().__init__(reason)
        self.is_worth_repeating, self.pause_s = is_worth_repeating, pause_s


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        return None


class OpenAICaptioner:
    """Asks a server about questions, several at once."""

    def __init__(self, config: BackendConfig, first_pause_s: float = FIRST_PAUSE_S) -> None:
        assert config.url is not None
        self.config, self.first_pause_s = config, first_pause_s
        self.address = config.url.rstrip("/") + "/chat/completions"
        self._key = os.environ.get(config.key_env, "").strip()
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._has_stopped = threading.Event()
        self._speaking, self._silent_until = threading.Lock(), 0.0

    def answer(self, questions: Iterator[Question]) -> Iterator[tuple[Question, list[Reply] | str]]:
        """Yield every question with its replies, or why there are none. Raises ServerError."""
        todo: queue.Queue[tuple[int, int, Prompt]] = queue.Queue()
        done: queue.Queue[tuple[int, int, Reply | Exception]] = queue.Queue()
        # Daemons: Ctrl-C must not wait for answers.
        for _ in range(self.config.concurrency):
            threading.Thread(target=self._serve, args=(todo, done), daemon=True).start()
        open_questions: dict[int, tuple[Question, list[Reply | Exception | None]]] = {}
        under_way, failed_in_a_row, has_answered, has_more = 0, 0, False, True
        try:
            while True:
                while has_more and under_way < self.config.concurrency:
                    question = next(questions, None)
                    if question is None:
                        has_more = False
                        break
                    open_questions[question.place] = question, [None] * len(question.prompts)
                    under_way += len(question.prompts)
                    for number, prompt in enumerate(question.prompts):
                        todo.put((question.place, number, prompt))
                if not open_questions:
                    return
                place, number, reply = done.get()
                under_way -= 1
                question, replies = open_questions[place]
                replies[number] = reply
                if not isinstance(reply, Reply | _Failed):
                    raise reply
                if None in replies:
                    continue
                del open_questions[place]
                errors = [found for found in replies if isinstance(found, Exception)]
                # A question that the server refuses says nothing about the next one, once another was answered.
                if len(errors) < len(replies):
                    failed_in_a_row, has_answered = 0, True
                elif _is_worth_repeating(errors[0]) or not has_answered:
                    failed_in_a_row += 1
                if failed_in_a_row >= _HOPELESS:
                    raise ServerError(
                        f"{self.config.url} has answered none of {_HOPELESS} questions in a row: {errors[0]}"
                    )
                yield question, str(errors[0]) if errors else [found for found in replies if isinstance(found, Reply)]
        finally:
            self._has_stopped.set()
            for _ in range(self.config.concurrency):
                todo.put((-1, 0, Prompt(text="")))

    def _serve(self, todo: queue.Queue[Any], done: queue.Queue[Any]) -> None:
        while not self._has_stopped.is_set():
            place, number, prompt = todo.get()
            if self._has_stopped.is_set():
                return
            try:
                done.put((place, number, self._ask(prompt)))
            except Exception as error:  # whatever it is, somebody waits for this prompt
                done.put((place, number, error))

    def _ask(self, prompt: Prompt) -> Reply:
        """Return the reply to a prompt. Raises _Failed after the last attempt, ServerError where others would fail."""
        body = json.dumps(self._write_request(prompt)).encode()
        for attempt in range(self.config.retries + 1):
            try:
                return _read_reply(self._post(body))
            except _Failed as failed:
                if not failed.is_worth_repeating:
                    raise
                last = failed
            if attempt < self.config.retries:
                pause = self.first_pause_s * 2**attempt if last.pause_s is None else last.pause_s
                self._say(f"{last}; trying again, attempt {attempt + 2} of {self.config.retries + 1}")
                self._has_stopped.wait(min(pause, LONGEST_PAUSE_S))
        attempts = self.config.retries + 1
        raise _Failed(f"{last} ({attempts} attempt{'s' * (attempts > 1)})", True)

    def _say(self, reason: str) -> None:
        """Say on the terminal that something went wrong, for all requests together at most twice a minute."""
        with self._speaking:
            if time.monotonic() < self._silent_until or self._has_stopped.is_set():
                return
            self._silent_until = time.monotonic() + _SILENCE_S
        tqdm.write(f"{self.config.url}: {reason}", file=sys.stderr)

    def _write_request(self, prompt: Prompt) -> dict[str, Any]:
        content: Any = [*map(_picture, prompt.frames), {"type": "text", "text": prompt.text}]
        if not prompt.frames:
            content = prompt.text  # servers of language models may take nothing else
        # Without a seed the likeliest answer is wanted.
        drawing = {"temperature": 0} if prompt.seed is None else {"temperature": 1, "seed": prompt.seed % 2**31}
        return {
            "model": self.config.model, "messages": [{"role": "user", "content": content}],
            "max_tokens": self.config.max_tokens, **drawing,
        }  # fmt: skip

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "tgmae"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.address, body, headers)
        limit = time.monotonic() + self.config.timeout
        try:
            with self._opener.open(request, timeout=self.config.timeout) as answer:
                received = bytearray()
                while chunk := answer.read1(_CHUNK):
                    received += chunk
                    if time.monotonic() > limit:  # the time-out of the socket begins again with every byte
                        raise TimeoutError
                if answer.length:
                    raise http.client.IncompleteRead(bytes(received), answer.length)
                return bytes(received)
        except urllib.error.HTTPError as error:
            raise self._explain_status(error) from error
        except TimeoutError as error:
            raise _Failed(f"no answer within {self.config.timeout:g} s", True) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _Failed(f"no answer within {self.config.timeout:g} s", True) from error
            raise _Failed(f"cannot reach the server: {error.reason}", True) from error
        except (http.client.HTTPException, ConnectionError, OSError) as error:
            raise _Failed(f"half an answer ({type(error).__name__})", True) from error

    def _explain_status(self, error: urllib.error.HTTPError) -> Exception:
        """Return what to raise for an answer that is not 200."""
        try:
            said = error.read(2000).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            said = ""
        said = _find_message(said)
        if self._key:
            said = said.replace(self._key, "…")  # some servers repeat the key that they refuse
        told = f"HTTP {error.code} {error.reason}" + f": {said}" * bool(said)
        if error.code in (401, 403):
            held = "is not the one it wants" if self._key else "is not set"
            return ServerError(f"{self.config.url} refuses access: the key in {self.config.key_env} {held} ({told})")
        if error.code in _FATAL:
            return ServerError(
                f"{self.address} has no model {self.config.model!r}, or is not an address of OpenAI's protocol, which "
                f"ends in /v1 ({told})"
            )
        if 300 <= error.code < 400:
            where = error.headers.get("Location", "another address")
            return ServerError(f"{self.config.url} points to {where}; give that with --url")
        if error.code in _AGAIN or error.code >= 500:
            return _Failed(told, True, _read_pause(error.headers.get("Retry-After")))
        return _Failed(told, False)


def _is_worth_repeating(error: Exception) -> bool:
    return isinstance(error, _Failed) and error.is_worth_repeating


def _picture(frame: Any) -> dict[str, Any]:
    from PIL import Image

    coded = io.BytesIO()
    Image.fromarray(frame).save(coded, "JPEG", quality=_QUALITY)
    data = base64.b64encode(coded.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


def _read_reply(received: bytes) -> Reply:
    """Return the text of an answer. Raises _Failed where it is not one."""
    try:
        choice = json.loads(received)["choices"][0]
        text = choice["message"]["content"]
        if not isinstance(text, str):
            raise TypeError("no text")
    except (ValueError, LookupError, TypeError) as error:
        start = received[:80].decode(errors="replace")
        raise _Failed(f"not an answer of OpenAI's protocol: {start!r}", True) from error
    return Reply(text, choice.get("finish_reason") == "length")


def _find_message(said: str) -> str:
    """Return the message in the body of an error, in one line."""
    try:
        found = json.loads(said)
        found = found.get("error", found) if isinstance(found, dict) else found
        said = str(found.get("message", found) if isinstance(found, dict) else found)
    except ValueError:
        pass
    return " ".join(said.split())[:300]


def _read_pause(header: str | None) -> float | None:
    """Return the seconds that a Retry-After asks for, as a number or a date."""
    if header is None:
        return None
    try:
        return max(float(header), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
