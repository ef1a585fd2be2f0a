"""Data loading and training for text-guided video masked autoencoders (Fan et al., ECCV 2024)."""

from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path

__version__ = "0.1.0"


def _check_kernels() -> None:
    """Raise ImportError if tgmae's package `kernels` and Hugging Face's of the same name are in each other's way.

    Which of them Python would import is read from the source: importing theirs takes seconds and may fail for reasons
    of its own.
    """
    advice = (
        "keep tgmae in an environment of its own, or run 'pip uninstall kernels' and then install tgmae again "
        "with --force-reinstall --no-deps"
    )
    spec = _find_spec("kernels")
    init = _Path(spec.origin) if spec and spec.origin else None
    if init is None or "__tgmae__" not in init.read_text():
        found = f"another one, {init}" if init else f"one without __init__.py, {spec.name}" if spec else "none"
        raise ImportError(
            f"tgmae needs its own package `kernels`, and Python finds {found} "
            f"(Hugging Face publishes a package of that name); {advice}"
        )
    theirs = next(init.parent.parent.glob("kernels-*.dist-info"), None)
    if theirs:
        raise ImportError(
            f"tgmae's package `kernels` overwrote Hugging Face's {theirs.stem} in {init.parent}, "
            f"which transformers and others may need; {advice}"
        )


_check_kernels()
