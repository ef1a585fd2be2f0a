"""A flag that has no effect beside the others is refused, and says which other flag is the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tgmae.cli.parser.test_flags import COMMANDS, parse
from tgmae.cli import train
from tgmae.cli.parser.flags import UsageError, list_flags
from tgmae.cli.parser.rules import RULES, check_effects
from tgmae.config.run import TrainConfig

PATCH = ["--mask.scorer", "patch"]
TUBE, CACHED, STUDENT = ["--mask.kind", "tube"], ["--mask.scorer", "cached", "--mask.scores", "x"], ["--student", "x"]
SERVER = ["--backend", "openai", "--url", "http://x"]
MGMAE = ["--mask.kind", "mgmae", "--mask.motion", "x"]
# Command, what is typed, the flag that has no effect, the one that is the reason.
REFUSED = [
    ("tgmae-train", ["--data.sampling", "uniform", "--data.stride", "2"], "data.stride", "data.sampling uniform"),
    *(
        ("tgmae-train", ["--pipeline", "pyav", f"--data.{name}", value], f"data.{name}", "pipeline pyav")
        for name, value in {
            "decode": "cpu", "num-workers": "2", "prefetch": "2", "pipelines": "1", "threads": "1",
        }.items()
    ),
    *(
        ("tgmae-train", [*TUBE, f"--{name}", *value.split()], name, "mask.kind tube")
        for name, value in {
            "mask.scorer": "patch", "mask.frames-per-tubelet": "1", "mask.dense": "sclip", "mask.scores": "x",
            "mask.student": "x", "mask.no-caption": "label", "clip.model": "shapes", "clip.weights": "openai",
            "clip.tag": "openai", "clip.trust-code": "",
            "clip.engine": "torch", "clip.precision": "fp32", "clip.batch": "8", "clip.cache-dir": "x",
            "mask.motion": "x", "mask.flow": "x", "mask.no-motion": "exclude", "data.captions": "first",
            "captions.sources": "blip2", "captions.per-video": "1",
        }.items()
    ),
    ("tgmae-train", [*TUBE, "--clip.no-cuda-graph"], "clip.cuda-graph", "mask.kind tube"),
    ("tgmae-train", ["--mask.motion", "x"], "mask.motion", "mask.kind tgm"),
    ("tgmae-train", ["--mask.flow", "x"], "mask.flow", "mask.kind tgm"),
    ("tgmae-train", ["--mask.kind", "mgm", "--mask.motion", "x", "--mask.flow", "y"], "mask.flow", "mask.kind mgm"),
    ("tgmae-train", [*MGMAE, "--mask.flow", "y"], "mask.motion", "mask.flow y"),
    (
        "tgmae-train", ["--mask.kind", "mgmae", "--mask.flow", "y", "--mask.no-motion", "exclude"], "mask.no-motion",
        "mask.flow y",
    ),
    ("tgmae-train", ["--mask.dense", "sclip"], "mask.dense", "mask.scorer auto"),
    ("tgmae-train", [*PATCH, "--mask.student", "x"], "mask.student", "mask.scorer patch"),
    ("tgmae-train", [*PATCH, "--mask.scores", "x"], "mask.scores", "mask.scorer patch"),
    *(
        ("tgmae-train", [*CACHED, f"--{name}", value], name, "mask.scorer cached")
        for name, value in {
            "clip.engine": "torch", "clip.precision": "fp32", "clip.batch": "8", "clip.cache-dir": "x",
        }.items()
    ),
    ("tgmae-train", ["--clip.weights", "openai"], "clip.weights", "clip.model shapes"),
    ("tgmae-train", ["--clip.tag", "openai"], "clip.tag", "clip.model shapes"),
    ("tgmae-train", ["--clip.trust-code"], "clip.trust-code", "clip.model shapes"),
    ("tgmae-train", ["ssv2", "--clip.model", "hf-hub:a/b", "--clip.weights", "x"], "clip.weights", "clip.model hf-hub"),
    ("tgmae-train", ["ssv2", "--clip.model", ".", "--clip.weights", "openai"], "clip.weights", "clip.model ."),
    ("tgmae-train", [*CACHED, "--clip.cuda-graph"], "clip.cuda-graph", "mask.scorer cached"),
    (
        "tgmae-train", ["--clip.engine", "onnxruntime", "--clip.cuda-graph"], "clip.cuda-graph",
        "clip.engine onnxruntime",
    ),
    ("tgmae-train", ["--device", "cpu", "--clip.cuda-graph"], "clip.cuda-graph", "device cpu"),
    *(
        ("tgmae-train", [f"--loss.{name}", *value.split()], f"loss.{name}", "loss.contrastive 0.0")
        for name, value in {"temperature": "0.2", "learn-temperature": "", "duplicates": "keep"}.items()
    ),
    ("tgmae-train", ["--loss.contrast-over", "step"], "loss.contrast-over", "loss.contrastive 0.0"),
    (
        "tgmae-train", ["--loss.contrastive", "1", "--loss.observe-contrastive"], "loss.observe-contrastive",
        "loss.contrastive 1.0",
    ),
    *(
        ("tgmae-train", ["--loss.contrastive", "1", "--loss.reconstruction", "0", f"--{name}", value], name,
         "loss.reconstruction 0.0")
        for name, value in {
            "log.picture-every": "5", "validation.split": "x", "validation.clips": "8", "validation.every": "2",
        }.items()
    ),
    ("tgmae-train", ["--resume", "x.pt", "--init-from", "hf"], "init-from", "resume x.pt"),
    (
        "tgmae-train", ["--optim.warmup-epochs", "0", "--optim.warmup-lr", "0"], "optim.warmup-lr",
        "optim.warmup-epochs 0.0",
    ),
    ("tgmae-data scores", ["m", "--mask.dense", "sclip"], "mask.dense", "mask.scorer patch"),
    ("tgmae-data scores", ["m", "--mask.student", "x"], "mask.student", "mask.scorer patch"),
    ("tgmae-data scores", ["m", "--clip.weights", "openai"], "clip.weights", "clip.model shapes"),
    ("tgmae-data compact", ["m", "--out", "o", "--short-side", "None", "--grow"], "grow", "short-side None"),
    *(
        ("tgmae-caption generate", ["m", "--model", "x", f"--{name}", value], name, "backend transformers")
        for name, value in {
            "url": "http://x", "key-env": "K", "concurrency": "2", "timeout": "1", "retries": "1",
        }.items()
    ),
    *(
        ("tgmae-caption llm", ["m", "--model", "x", *SERVER, f"--{name}", value], name, "backend openai")
        for name, value in {"batch": "2", "device": "cpu"}.items()
    ),
    ("tgmae-caption llm", ["m", "--model", "x", "--seed", "1"], "seed", "answers 1"),
    ("tgmae-viz masks", ["m", "--no-text", "--mask.scorer", "dense"], "mask.scorer", "no-text"),
    ("tgmae-viz masks", ["m", "--no-text", "--clip.model", "shapes"], "clip.model", "no-text"),
    ("tgmae-viz masks", ["m", "--mask.scores", "x"], "mask.scores", "mask.scorer patch"),
    ("tgmae-engine agree", ["m", "--data.sampling", "uniform", "--data.stride", "2"], "data.stride", "data.sampling"),
    ("tgmae-engine distill", ["m", "--pipeline", "pyav", "--data.threads", "2"], "data.threads", "pipeline pyav"),
    ("tgmae-engine export", ["--last-block", "sclip"], "last-block", "tower patch"),
    ("tgmae-engine export", STUDENT, "student", "tower patch"),
    ("tgmae-engine export", ["--height", "64"], "height", "tower patch"),
    ("tgmae-engine export", ["--tower", "student", *STUDENT, "--width", "64"], "width", "tower student"),
    ("tgmae-engine export", ["--out", "o", "--clip.cache-dir", "c"], "clip.cache-dir", "out o"),
    (
        "tgmae-engine export", ["--opset", "18", "--clip.precision", "fp32", "--clip.engine", "tensorrt"],
        "clip.engine", "opset 18",
    ),
    ("tgmae-engine build", ["--clip.engine", "tensorrt", "--last-block", "sclip"], "last-block", "tower patch"),
    ("tgmae-engine check", ["--clip.cache-dir", "c"], "clip.cache-dir", "clip.engine torch"),
    ("tgmae-engine check", ["--device", "cpu", "--clip.no-cuda-graph"], "clip.cuda-graph", "device cpu"),
]  # fmt: skip
ACCEPTED = [
    ("tgmae-train", ["--data.sampling", "dense", "--data.stride", "2"]),
    ("tgmae-train", ["--pipeline", "pyav", "--data.repeat", "2"]),
    ("tgmae-train", [*TUBE, "--mask.ratio", "0.9", "--mask.order", "bottom"]),
    ("tgmae-train", [*MGMAE]),
    ("tgmae-train", ["--mask.kind", "mgmae", "--mask.flow", "y"]),
    ("tgmae-train", ["--mask.scores", "x"]),
    ("tgmae-train", ["--mask.student", "x"]),
    ("tgmae-train", ["--mask.kind", "mgm"]),
    ("tgmae-train", ["--mask.scorer", "dense", "--mask.dense", "sclip"]),
    ("tgmae-train", [*CACHED, "--clip.model", "shapes", "--mask.frames-per-tubelet", "2"]),
    ("tgmae-train", ["ssv2", "--clip.weights", "laion2b", "--clip.no-cuda-graph", "--clip.batch", "64"]),
    ("tgmae-train", ["--resume", "never", "--init-from", "hf"]),
    ("tgmae-caption generate", ["m", "--model", "x", *SERVER, "--retries", "0"]),
    ("tgmae-caption llm", ["m", "--model", "x", "--answers", "3", "--seed", "1"]),
    ("tgmae-viz masks", ["m", "--mask.motion", "x", "--mask.flow", "y"]),
    ("tgmae-viz masks", ["m", "--no-text", "--mask.motion", "x", "--mask.ratio", "0.9"]),
    ("tgmae-engine agree", ["m", "--mask.student", "x", "--mask.scores", "y", "--clip.cuda-graph"]),
    ("tgmae-engine export", ["--tower", "dense", "--height", "64", "--width", "64", "--last-block", "sclip"]),
    ("tgmae-engine export", ["--opset", "18", "--clip.engine", "tensorrt"]),
    ("tgmae-engine check", ["--clip.engine", "onnxruntime", "--clip.cache-dir", "c"]),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("command", "arguments", "useless", "reason"), REFUSED)
def test_what_has_no_effect_is_refused(
    command: str, arguments: list[str], useless: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((UsageError, SystemExit)) as caught:
        parse(command, arguments)
    words = f"{capsys.readouterr().err.removeprefix(f'{command}: ')}{caught.value}"
    assert words.startswith(f"--{useless} has no effect with --{reason}"), words
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 2


@pytest.mark.parametrize(("command", "arguments"), ACCEPTED)
def test_what_has_an_effect_is_accepted(command: str, arguments: list[str]) -> None:
    parse(command, arguments)


def test_every_rule_is_tried() -> None:
    """And names flags that exist."""
    existing = {flag.name for command in COMMANDS.values() for flag in list_flags(command)}
    existing |= {flag.name for flag in list_flags(TrainConfig)}
    for rule in RULES:
        assert {rule.beside, *rule.flags.split()} <= existing, rule
        assert rule.command == "" or rule.command in COMMANDS
        tried = {
            useless for command, _, useless, reason in REFUSED
            if rule.command in ("", command) and reason.removeprefix("no-").split()[0] == rule.beside
        }  # fmt: skip
        missing = set(rule.flags.split()) - tried
        assert not missing or rule.beside == "text", (rule, missing)


def test_presets_and_saved_configurations_may_hold_what_has_no_effect() -> None:
    """Only what is typed is judged: the demo's CLIP and scorer stay in the configuration of a run with tube masks."""
    config, _ = train.parse(["ssv2", "--mask.kind", "tube"])
    assert (config.mask.scorer, config.clip.weights) == ("auto", "openai")
    check_effects("tgmae-train", [], list_flags(TrainConfig, config))


def test_the_message_says_what_to_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        train.parse(["--mask.scorer", "patch", "--mask.scores", str(tmp_path)])
    assert capsys.readouterr().err == (
        "tgmae-train: --mask.scores has no effect with --mask.scorer patch: it needs --mask.scorer cached. "
        "Leave out --mask.scores or change --mask.scorer\n"
    )
