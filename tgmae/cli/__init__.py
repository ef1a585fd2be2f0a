"""Console scripts: tgmae-train, tgmae-data, tgmae-caption, tgmae-engine, tgmae-viz, tgmae-info."""

import os
import signal
import sys

# Set before torch is imported, whose threads otherwise spin while they wait for each other. On two busy cores 30
# training steps took 62 s with spinning threads, and 11 s with passive ones.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Ctrl-C while a command imports its modules ends it silently, without a traceback. What follows the imports says what
# that costs. argv is "-m" while `python -m tgmae.cli.train` imports this package.
_is_command = sys.argv[0] == "-m" or os.path.basename(sys.argv[0]).startswith("tgmae-")
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# A stream that is closed, as services may start a command, is None in Python, and the next file that is opened takes
# its number: what libraries print would end up in a checkpoint.
if _is_command:
    for _name, _mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, _name) is None:
            setattr(sys, _name, os.fdopen(os.open(os.devnull, os.O_RDWR), _mode))
