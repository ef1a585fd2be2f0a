"""tgmae-caption from videos to a manifest with captions: resuming, several processes, and what goes wrong."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.videos import write_numbered
from tests.tgmae.captions.generate.networks import save_blip2
from tests.tgmae.captions.generate.server import CaptionServer, send
from tests.tgmae.cli.test_shared_commands import REPOSITORY, srun, wait_for
from tgmae.cli import caption
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import Manifest, read_manifest

KEY = "sk-secret-5678"
COMMAND = ("-m", "tgmae.cli.caption")

Tool = Callable[..., tuple[object, str, str]]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos; frame i of number n shows 40 n + i."""
    folder = tmp_path_factory.mktemp("numbered")
    for number in range(6):
        write_numbered(folder / f"v/jump_{number % 2}/{number}.mp4", num_frames=20 + number)
    index_folder(folder / "v", folder / "m.parquet", num_workers=1)
    return folder


@pytest.fixture
def manifest(numbered: Path, tmp_path: Path) -> Path:
    shutil.copytree(numbered, tmp_path / "data")
    return tmp_path / "data" / "m.parquet"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    """Runs tgmae-caption in this process; returns (exit status or message, stdout, stderr)."""

    def run(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["tgmae-caption", *map(str, arguments)])
        status: object = 0
        try:
            caption.main()
        except SystemExit as left:
            status = left.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def flags(server: CaptionServer, *more: object) -> list[object]:
    return ["--model", "some/eyes", "--backend", "openai", "--url", server.url, "--workers", 1, *more]


def texts(path: Path, source: str) -> dict[str, list[str]]:
    found = read_manifest(path)
    return {
        name: [caption.text for caption in captions if caption.source == source]
        for name, captions in zip(found.names(), found.captions(), strict=True)
    }


def expected(found: Manifest, count: int = 3) -> dict[str, list[str]]:
    lengths = dict(zip(found.names(), found.table.column("num_frames").to_pylist(), strict=True))
    return {
        name: [f"frames {(2 * part + 1) * length // (2 * count)}" for part in range(count)]
        for name, length in lengths.items()
    }


@pytest.mark.slow
def test_three_keyframes_of_each_video_are_captioned_once(
    manifest: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with CaptionServer() as server:
        command = ["generate", manifest, *flags(server)]
        status, out, _ = tool(*command)
        assert status == 0
        assert f"{manifest}: 18 captions of source eyes for 6 videos; 6 answered, 0 known before, 0 failed; " in out
        assert texts(manifest, "eyes") == expected(read_manifest(manifest))
        first = manifest.read_bytes()

        status, out, _ = tool(*command)  # again: nothing is asked, and nothing changes
        assert "in place of 18; 0 answered, 6 known before" in out
        assert manifest.read_bytes() == first
        assert len(server.requests) == 18

        status, _, _ = tool(*command, "--prompt", "What is it?")
        assert "holds captions made in another way (prompt 'Describe this image" in str(status)
        assert tool(*command, "--prompt", "What is it?", "--source", "two", "--captions-per", "video")[0] == 0
    assert all(len(listed) == 1 for listed in texts(manifest, "two").values())
    assert texts(manifest, "two")["jump_0/0.mp4"] == ["frames 3 and 10 and 16"]
    assert texts(manifest, "eyes") == expected(read_manifest(manifest))
    kept = pq.read_table(manifest.with_name("m.captions-two.parquet")).to_pylist()
    assert kept[0] | {"digest": ""} == {
        "name": "jump_0/0.mp4", "digest": "", "text": "frames 3 and 10 and 16", "flag": "", "prompt": "What is it?",
        "frames": [3, 10, 16], "model": "some/eyes", "revision": "",
    }  # fmt: skip
    assert not list(manifest.parent.glob("*.journal"))
    assert all(KEY.encode() not in path.read_bytes() for path in manifest.parent.glob("*") if path.is_file())


@pytest.mark.slow
def test_new_videos_and_replaced_ones_are_asked_about_alone(manifest: Path, tool: Tool) -> None:
    with CaptionServer() as server:
        command = ["generate", manifest, *flags(server), "--frames", 1]
        tool(*command)
        write_numbered(manifest.parent / "v/jump_0/0.mp4", num_frames=90)
        write_numbered(manifest.parent / "v/jump_0/new.mp4", num_frames=50)
        manifest.unlink()
        index_folder(manifest.parent / "v", manifest, num_workers=1)
        before = len(server.requests)
        assert tool(*command)[0] == 0
        assert len(server.requests) == before + 2
    assert texts(manifest, "eyes") == expected(read_manifest(manifest), 1)


def test_what_cannot_be_read_is_counted_and_listed(manifest: Path, tool: Tool) -> None:
    (manifest.parent / "v/jump_1/3.mp4").write_bytes(b"not a video" * 100)
    (manifest.parent / "v/jump_1/5.mp4").unlink()

    def shrug(request: BaseHTTPRequestHandler, said: str, before: int) -> bool:
        if said == "frames 3":
            send(request, 200, b'{"choices": [{"message": {"content": " \\n"}}]}')
        elif said == "frames 11":
            send(request, 200, b'{"choices": [{"message": {"content": "a hand a hand a hand a hand"}}]}')
        return said in ("frames 3", "frames 11")

    with CaptionServer(shrug) as server:
        status, out, err = tool("generate", manifest, *flags(server))
    assert status == 0
    assert "4 answered, 0 known before, 2 failed; 3 empty, 1 repetitive" in out
    assert "no caption: jump_1/3.mp4: changed since it was indexed" in err
    assert "no caption: jump_1/5.mp4: No such file or directory" in err
    lengths = {name[-5]: len(listed) for name, listed in texts(manifest, "eyes").items()}
    assert lengths == {"0": 2, "1": 2, "2": 2, "3": 0, "4": 3, "5": 0}  # what says nothing is left out


def test_nothing_answered_leaves_the_manifest_as_it_is(manifest: Path, tool: Tool) -> None:
    def refuse(request: BaseHTTPRequestHandler, said: str, before: int) -> bool:
        send(request, 400, b'{"error": {"message": "no eyes"}}')
        return True

    before = manifest.read_bytes()
    with CaptionServer(refuse) as server:
        status, _, _ = tool("generate", manifest, *flags(server))
    assert "none of 6 videos has a caption" in str(status)
    assert "HTTP 400 Bad Request: no eyes" in str(status)
    assert manifest.read_bytes() == before


def test_a_language_model_is_asked_once_for_each_class(manifest: Path, tool: Tool) -> None:
    with CaptionServer() as server:
        llm = ["llm", manifest, "--model", "words", "--backend", "openai", "--url", server.url]
        assert tool(*llm)[0] == 0
        assert len(server.requests) == 2 * 3
        assert texts(manifest, "llm")["jump_1/3.mp4"] == [
            "about Describe the action jump 1.", "about What does a person jump 1 look like?",
            "about What does the act of jump 1 look like?",
        ]  # fmt: skip
        assert "0 answered, 2 known before" in tool(*llm)[1]
        assert len(server.requests) == 6
        assert tool(*llm, "--answers", 2, "--source", "more")[0] == 0
        assert len(server.requests) == 6 + 12
        assert len({request["seed"] for request in server.requests[6:]}) == 12


@pytest.mark.slow
def test_labels_and_people(manifest: Path, tool: Tool, tmp_path: Path) -> None:
    assert tool("oracle", manifest)[1].startswith(f"{manifest}: 6 captions of source oracle for 6 videos")
    table = tmp_path / "human.csv"
    table.write_text("path;caption\n3;“eine Tür”\n9;none\n", encoding="utf-8-sig")
    status, out, err = tool("human", manifest, table)
    assert status == 0
    assert f"{table}: 1 of 2 entries name no video, such as '9' in line 3" in err
    assert texts(manifest, "human")["jump_1/3.mp4"] == ["“eine Tür”"]
    assert texts(manifest, "oracle")["jump_1/3.mp4"] == ["jump 1"]
    sheet = tmp_path / "sheet.png"
    status, out, _ = tool("show", manifest, "--out", sheet, "--count", 2)
    assert status == 0
    assert [line.split()[:2] for line in out.splitlines() if line.split()[:1] in (["oracle"], ["human"])] == [
        ["oracle", "6"], ["human", "1"],
    ]  # fmt: skip
    assert sheet.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "m", "--model", "x", "--frames", "0"), "--frames must be at least 1, got 0"),
        (("generate", "m", "--model", "x", "--backend", "openai"), "--backend openai needs --url"),
        (("generate", "m", "--model", "x", "--source", "a,b"), "--source must be made of letters, digits"),
        (("generate", "gone.parquet", "--model", "x"), "no manifest at gone.parquet"),
        (("human", "gone.parquet", "x.csv", "--source", "a b"), "--source must be made of letters"),
        (("llm", "m", "--model", "x", "--answers", "0"), "--answers must be at least 1, got 0"),
    ],
)
def test_what_is_typed_wrongly(arguments: tuple[str, ...], message: str, tool: Tool) -> None:
    status, _, err = tool(*arguments)
    assert message in f"{status} {err}"
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_model_on_this_machine(manifest: Path, tool: Tool, tmp_path: Path) -> None:
    folder = save_blip2(tmp_path / "tiny-blip2")
    status, out, _ = tool("generate", manifest, "--model", folder, "--max-tokens", 6, "--workers", 1, "--device", "cpu")
    assert status == 0
    assert "6 answered, 0 known before, 0 failed" in out
    found = texts(manifest, "tiny-blip2")
    assert all(len(listed) == 3 for listed in found.values())
    assert len({text for listed in found.values() for text in listed}) > 3


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *COMMAND, *map(str, arguments)], cwd=REPOSITORY, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_command_loses_the_video_at_work_alone(ending: signal.Signals, manifest: Path, tool: Tool) -> None:
    """One request at a time: three videos are answered, the fourth is being asked about."""

    def hang(request: BaseHTTPRequestHandler, said: str, before: int) -> bool:
        if len(server.requests) > 10:
            server.has_ended.wait(60)
        return False

    with CaptionServer(hang) as server:
        command = ["generate", manifest, *flags(server), "--concurrency", 1]
        process = start(*command)
        deadline = time.monotonic() + 60
        while len(server.requests) < 11:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, ending)
        output = process.communicate(timeout=120)[0]
        if ending == signal.SIGINT:
            assert output.endswith("tgmae-caption: interrupted; run the same command again to continue\n")
        assert read_manifest(manifest).captions() == [[]] * 6
        journal = manifest.with_name("m.captions-eyes.journal")
        with journal.open("ab") as file:
            file.write(b'{"name": "jump_0/0.mp4", "dig')  # a line that the kill cut off
    with CaptionServer() as server:
        status, out, _ = tool("generate", manifest, *flags(server))
    assert status == 0
    assert "3 answered, 3 known before" in out
    assert len(server.requests) == 9
    assert texts(manifest, "eyes") == expected(read_manifest(manifest))
    assert not journal.exists()


@pytest.mark.slow
def test_two_processes_caption_what_one_does(manifest: Path, tool: Tool) -> None:
    with CaptionServer() as server:
        shared = srun(2, *COMMAND, "generate", manifest, *flags(server))
        codes, outputs = wait_for(*shared)
        assert codes == [0, 0], outputs
        assert max(server.asked.values()) <= 6
        assert len(server.requests) == 18
    assert "18 captions of source eyes for 6 videos; 6 answered" in outputs[0]
    assert outputs[1] == ""
    assert texts(manifest, "eyes") == expected(read_manifest(manifest))
    assert not list(manifest.parent.glob("*.journal"))
