"""A server is asked about the right frames, whatever it answers first; what it never answers is said."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from tests.support.videos import draw_number
from tests.tgmae.captions.generate.server import CaptionServer, answer, send
from tgmae.captions.generate.asking import Prompt, Question, Reply
from tgmae.captions.generate.config import BackendConfig
from tgmae.captions.generate.openai_backend import OpenAICaptioner, ServerError

KEY = "sk-secret-1234"


def captioner(url: str, **changes: Any) -> OpenAICaptioner:
    options = {"concurrency": 4, "timeout": 20.0, "retries": 3, "max_tokens": 50, **changes}
    return OpenAICaptioner(BackendConfig(model="m", backend="openai", url=url, **options), first_pause_s=0.01)


def question(place: int, *numbers: int) -> Question:
    frames = [draw_number(number, 64, 48) for number in numbers]
    return Question(place=place, prompts=tuple(Prompt(text="What?", frames=(frame,)) for frame in frames))


def ask(asking: OpenAICaptioner, questions: Sequence[Question]) -> dict[int, list[str] | str]:
    found = {}
    for asked, replies in asking.answer(iter(questions)):
        assert asked.place not in found
        found[asked.place] = replies if isinstance(replies, str) else [reply.text for reply in replies]
    return found


QUESTIONS = [question(place, 3 * place, 3 * place + 1, 3 * place + 2) for place in range(10)]
EXPECTED = {place: [f"frames {3 * place + number}" for number in range(3)] for place in range(10)}


def test_every_frame_gets_its_own_answer_and_few_requests_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    taken: list[int] = []

    def questions() -> Iterator[Question]:
        for asked in QUESTIONS:
            taken.append(asked.place)
            yield asked

    def slow(request: BaseHTTPRequestHandler, said: str, before: int) -> bool:
        server.has_ended.wait(0.02)
        return False

    with CaptionServer(slow) as server:
        answers = captioner(server.url).answer(questions())
        first = next(answers)
        assert len(taken) <= 4  # no more videos are decoded ahead than are asked about
        found = {place.place: replies for place, replies in (first, *answers)}
    assert found == {place: [Reply(text) for text in texts] for place, texts in EXPECTED.items()}
    assert 1 < server.most_under_way <= 4
    assert server.keys == {f"Bearer {KEY}"}
    assert {request["model"] for request in server.requests} == {"m"}
    assert {(request["temperature"], request["max_tokens"]) for request in server.requests} == {(0, 50)}


def test_several_frames_in_one_prompt_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    frames = tuple(draw_number(number, 64, 48) for number in (5, 9))
    prompts = (Prompt(text="a", frames=frames), Prompt(text="hands"), Prompt(text="hands", seed=2**40 + 7))
    with CaptionServer() as server:
        found = ask(captioner(server.url), [Question(place=0, prompts=prompts)])
    assert found == {0: ["frames 5 and 9", "about hands", "about hands"]}
    assert server.keys == {None}
    assert sorted(request.get("seed", -1) for request in server.requests) == [-1, -1, 7]


def fail_once(kind: str, server: CaptionServer, request: BaseHTTPRequestHandler, said: str) -> None:
    if kind == "429":
        send(request, 429, b'{"error": {"message": "slow down"}}', Retry_After="0")
    elif kind == "500":
        send(request, 500, b"<html>oops")
    elif kind == "garbage":
        send(request, 200, b"<html>welcome to the proxy</html>")
    elif kind == "no text":
        send(request, 200, answer(None))
    elif kind == "half":
        send(request, 200, answer(said)[:20], length=500)
    elif kind == "closed":
        request.connection.shutdown(socket.SHUT_RDWR)
    elif kind == "late":
        server.has_ended.wait(5)


FAULTS = ["429", "500", "garbage", "no text", "half", "closed", "late"]


def test_faults_are_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 21 requests fails in some way the first time, every seventh twice; every caption arrives, once."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def misbehave(request: BaseHTTPRequestHandler, said: str, before: int) -> bool:
        number = int(said.split()[1])
        if before >= 1 + (number % 7 == 0):
            return False
        fail_once(FAULTS[(number + before) % 7], server, request, said)
        return True

    with CaptionServer(misbehave) as server:
        found = ask(captioner(server.url, timeout=1.0, concurrency=8), QUESTIONS[:7])
    assert found == {place: EXPECTED[place] for place in range(7)}
    assert all(server.asked[f"frames {number}"] >= 2 + (number % 7 == 0) for number in range(21))


@pytest.mark.parametrize("kind", ["500", "late", "half", "garbage"])
def test_a_server_that_never_answers_is_given_up(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And one line says so long before, since each attempt may take minutes."""
    reasons = {
        "500": "HTTP 500 Internal Server Error: <html>oops", "late": r"no answer within 0\.1 s",
        "half": "half an answer",
        "garbage": "not an answer of OpenAI's protocol: '<html>welcome",
    }  # fmt: skip

    def misbehave(request: BaseHTTPRequestHandler, said: str, before: int) -> bool:
        fail_once(kind, server, request, said)
        return True

    with CaptionServer(misbehave) as server:
        failing = captioner(server.url, timeout=0.1 if kind == "late" else 20.0, retries=1)
        with pytest.raises(ServerError, match=f"has answered none of 8 questions in a row: {reasons[kind]}") as caught:
            ask(failing, QUESTIONS)
    assert "(2 attempts)" in str(caught.value)
    [said] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"{server.url}: {reasons[kind]}.*; trying again, attempt 2 of 2", said)
    assert "\n" not in str(caught.value)


def test_no_server() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ServerError, match=r"cannot reach the server: .*Connection refused"):
        ask(captioner(f"http://127.0.0.1:{port}/v1", retries=0), QUESTIONS)


def test_a_server_that_drips_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte restarts the socket's clock, but not ours."""

    def drip(request: BaseHTTPRequestHandler, said: str, before: int) -> bool:
        request.send_response(200)
        request.send_header("Content-Length", "100000")
        request.end_headers()
        while not server.has_ended.wait(0.02):
            request.wfile.write(b" ")
        return True

    with CaptionServer(drip) as server:
        found = ask(captioner(server.url, timeout=0.3, retries=0), [question(0, 1)])
    assert found == {0: "no answer within 0.3 s (1 attempt)"}


def test_a_refused_key_is_named_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)

    def refuse(request: BaseHTTPRequestHandler, said: str, before: int) -> bool:
        send(request, 401, json.dumps({"error": {"message": f"wrong key {KEY}"}}).encode())
        return True

    with CaptionServer(refuse) as server:
        with pytest.raises(ServerError, match=r"refuses access: the key in MY_KEY is not the one it wants") as caught:
            ask(captioner(server.url, key_env="MY_KEY"), QUESTIONS)
        assert KEY not in str(caught.value)
        monkeypatch.delenv("MY_KEY")
        with pytest.raises(ServerError, match=r"the key in MY_KEY is not set"):
            ask(captioner(server.url, key_env="MY_KEY"), QUESTIONS)


def test_redirections_are_not_followed_with_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with CaptionServer() as elsewhere:

        def redirect(request: BaseHTTPRequestHandler, said: str, before: int) -> bool:
            send(request, 302, b"", Location=elsewhere.url)
            return True

        with CaptionServer(redirect) as server, pytest.raises(ServerError, match=f"points to {elsewhere.url}; give"):
            ask(captioner(server.url), QUESTIONS)
        assert not elsewhere.requests


def test_an_unknown_model_ends_the_job() -> None:
    def refuse(request: BaseHTTPRequestHandler, said: str, before: int) -> bool:
        send(request, 404, b'{"object": "error", "message": "The model `m` does not exist."}')
        return True

    with CaptionServer(refuse) as server, pytest.raises(ServerError, match=r"has no model 'm', or .*does not exist"):
        ask(captioner(server.url), QUESTIONS)


def test_what_is_refused_for_good_fails_alone() -> None:
    """Not repeated, and not taken for a server that is gone once others were answered; alone, it is."""

    def refuse(request: BaseHTTPRequestHandler, said: str, before: int) -> bool:
        if said == "frames 0":
            return False
        send(request, 400, b'{"error": {"message": "m is not a\\nmultimodal model"}}')
        return True

    with CaptionServer(refuse) as server:
        found = ask(captioner(server.url, concurrency=1), [question(place, place) for place in range(12)])
        assert found.pop(0) == ["frames 0"]
        assert set(found.values()) == {"HTTP 400 Bad Request: m is not a multimodal model"}
        assert max(server.asked.values()) == 1
        with pytest.raises(ServerError, match=r"none of 8 questions in a row: HTTP 400 .*not a multimodal model"):
            ask(captioner(server.url), QUESTIONS[1:])


def test_an_answer_at_the_limit_is_called_cut() -> None:
    def cut(request: BaseHTTPRequestHandler, said: str, before: int) -> bool:
        send(request, 200, answer("A hand", finish="length"))
        return True

    with CaptionServer(cut) as server:
        [(_, replies)] = captioner(server.url).answer(iter([question(0, 1)]))
    assert replies == [Reply("A hand", is_cut=True)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": None}, "--backend openai needs --url"),
        ({"url": "localhost:8000"}, "--url must begin with http"),
        ({"url": "http://user:secret@host/v1"}, "--url must hold no key"),
        ({"url": "http://host/v1?key=secret"}, "--url must hold no key"),
        ({"concurrency": 0}, "--concurrency must be at least 1, got 0"),
        ({"timeout": 0}, "--timeout must be above 0"),
        ({"retries": -1}, "--retries must not be negative"),
        ({"model": " "}, "--model is empty"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        BackendConfig(**{"model": "m", "backend": "openai", "url": "http://x", **changes})
    assert "secret" not in str(caught.value)
