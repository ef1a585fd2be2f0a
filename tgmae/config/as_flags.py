"""Settings as they are typed on a command line."""

from __future__ import annotations

from collections.abc import Sequence

from tgmae.config.run import InputConfig


def type_flags(config: InputConfig, usual: InputConfig, names: Sequence[str]) -> list[str]:
    """Return the flags, and their values, that make `usual` equal to `config` in the named settings.

    names   such as "clip.trust_code"
    """
    words: list[str] = []
    for name in names:
        group, _, setting = name.partition(".")
        value, default = (getattr(getattr(one, group), setting) for one in (config, usual))
        if value == default or value is None:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(",".join(value) if isinstance(value, tuple) else str(value))
    return words
