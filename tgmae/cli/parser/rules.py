"""Flags that have an effect only beside another one.

A flag that is typed although the rest of the configuration makes it meaningless is an error, not ignored: it shows a
misunderstanding that would otherwise be found after the run. Presets and saved configurations may hold such values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.config import HUB_PREFIX
from tgmae.cli.parser.flags import Flag, UsageError
from tgmae.config.masks import MOTION_KINDS

Values = Mapping[str, Any]  # name of a flag → its value


@dataclass(frozen=True)
class Rule:
    """Some flags have an effect only with certain values of another flag.

    flags    names of the flags, separated by spaces
    beside   name of the other flag
    holds    whether its value lets them have an effect, given the values of all flags
    reason   why they have none otherwise, for the message
    command  the only command for which this is so; "" for every command that has the flags
    """

    flags: str
    beside: str
    holds: Callable[[Values], bool]
    reason: str
    command: str = ""


def _one_of(flags: str, beside: str, values: Sequence[Any], command: str = "") -> Rule:
    """Make the rule that `beside` must have one of some values."""
    if values == [True]:
        return Rule(flags, beside, lambda v: v[beside] is True, f"it needs --{beside}", command)
    listed = " or ".join(map(str, values))
    return Rule(flags, beside, lambda v: v[beside] in values, f"it needs --{beside} {listed}", command)


_ENGINE = "clip.engine clip.precision clip.batch clip.cuda-graph"
_SCORER = f"mask.scorer mask.frames-per-tubelet mask.dense mask.scores mask.student {_ENGINE}"
_WITH_TEXT = (
    "mask.no-caption data.captions captions.sources captions.per-video "
    "clip.model clip.weights clip.tag clip.trust-code clip.cache-dir"
)
_CONTRAST = "loss.temperature loss.learn-temperature loss.duplicates loss.contrast-over"


def _contrasts(values: Values) -> bool:
    return bool(values.get("loss.contrastive") or values.get("loss.observe-contrastive"))


# The first rule that is broken makes the message, so the more general ones come first.
RULES = [
    # Frames and decoding
    _one_of("data.stride", "data.sampling", ["dense"]),
    _one_of("data.decode data.num-workers data.prefetch data.pipelines data.threads", "pipeline", ["dali"]),
    # Masks
    _one_of(_SCORER, "mask.kind", ["tgm"]),
    _one_of(f"{_SCORER} {_WITH_TEXT}", "text", [True]),  # tgmae-viz masks
    Rule(
        _WITH_TEXT, "mask.kind", lambda v: v["mask.kind"] == "tgm" or _contrasts(v),
        "it needs --mask.kind tgm, or a contrastive loss",
    ),
    _one_of("mask.dense", "mask.scorer", ["dense"]),
    Rule(
        "mask.student", "mask.scorer", lambda v: v["mask.scorer"] in ("auto", "student"),
        "it needs --mask.scorer student",
    ),
    Rule(
        "mask.scores", "mask.scorer", lambda v: v["mask.scorer"] in ("auto", "cached"),
        "it needs --mask.scorer cached",
    ),
    _one_of("mask.flow", "mask.kind", ["mgmae"]),
    _one_of("mask.motion mask.no-motion", "mask.kind", MOTION_KINDS),
    Rule(
        "mask.motion mask.no-motion", "mask.flow", lambda v: v.get("mask.kind") != "mgmae" or v["mask.flow"] is None,
        "mgmae follows the flow instead",
    ),
    # CLIP; of score maps only the CLIP that made them matters
    Rule(
        _ENGINE, "mask.scorer", lambda v: v["mask.scorer"] != "cached",
        "it needs --mask.scorer patch or dense or student",
    ),
    Rule(
        "clip.cache-dir", "mask.scorer", lambda v: v["mask.scorer"] != "cached" or _contrasts(v),
        "it needs --mask.scorer patch or dense or student",
    ),
    Rule(
        "clip.weights clip.tag clip.trust-code", "clip.model",
        lambda v: (
            v["clip.model"] != "shapes" and not v["clip.model"].startswith(HUB_PREFIX)
            and not Path(v["clip.model"]).is_dir()
        ),
        "a folder or repository has its own weights, and so has the demo's CLIP",
    ),
    _one_of("clip.cuda-graph", "clip.engine", ["torch"]),
    _one_of("clip.cuda-graph", "device", ["auto", "cuda"]),
    # Losses
    Rule(_CONTRAST, "loss.contrastive", _contrasts, "it needs a weight above 0, or --loss.observe-contrastive"),
    Rule(
        "loss.observe-contrastive", "loss.contrastive", lambda v: v["loss.contrastive"] == 0,
        "a loss with a weight is logged",
    ),
    Rule(
        "log.picture-every validation.split validation.clips validation.every", "loss.reconstruction",
        lambda v: v["loss.reconstruction"] > 0, "nothing is reconstructed",
    ),
    # Training
    Rule(
        "init-from", "resume", lambda v: v["resume"] in ("auto", "never"), "the checkpoint has weights of its own"
    ),
    Rule("optim.warmup-lr", "optim.warmup-epochs", lambda v: v["optim.warmup-epochs"] > 0, "there is no warm-up"),
    # tgmae-engine
    _one_of("last-block", "tower", ["dense"]),
    _one_of("student", "tower", ["student"]),
    _one_of("height width", "tower", ["dense"], "tgmae-engine export"),
    Rule("clip.cache-dir", "out", lambda v: v["out"] is None, "the graph goes there", "tgmae-engine export"),
    Rule(
        "clip.engine", "opset", lambda v: v["opset"] is None or v["clip.precision"] == "auto",
        "with --clip.precision it decides the graph alone", "tgmae-engine export",
    ),
    _one_of("clip.cache-dir", "clip.engine", ["onnxruntime", "tensorrt", "tensorrt_rtx"], "tgmae-engine check"),
    # tgmae-caption
    _one_of("url key-env concurrency timeout retries", "backend", ["openai"]),
    _one_of("batch device", "backend", ["transformers"]),
    Rule("seed", "answers", lambda v: v["answers"] > 1, "one answer is the likeliest one"),
    # tgmae-data compact
    Rule("grow", "short-side", lambda v: v["short-side"] is not None, "every video keeps its size"),
]  # fmt: skip


def check_effects(command: str, typed: Sequence[Flag], flags: Sequence[Flag]) -> None:
    """Raise UsageError, naming both, for a typed flag that has no effect beside another flag.

    command  such as "tgmae-data scores"
    flags    all flags of the command, with the values that were parsed
    """
    values = {flag.name: flag.value for flag in flags}
    names = [flag.name for flag in typed]
    for rule in RULES:
        useless = [name for name in names if name in rule.flags.split()]
        if not useless or rule.beside not in values or rule.command not in ("", command) or rule.holds(values):
            continue
        raise UsageError(
            f"--{useless[0]} has no effect with {_describe(rule.beside, values[rule.beside])}: {rule.reason}. "
            f"Leave out --{useless[0]} or change --{rule.beside}"
        )


def _describe(name: str, value: Any) -> str:
    """Return a flag as it would be typed."""
    if isinstance(value, bool):
        group, dot, last = name.rpartition(".")
        return f"--{name}" if value else f"--{group}{dot}no-{last}"
    return f"--{name} {value}"
