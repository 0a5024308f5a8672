"""The console script `compress`: starts the command line before the heavy imports.

`import compress` registers the checkpoint format with transformers, which takes seconds. `compress --version` need not wait
for that, and Ctrl-C meanwhile should be as quiet as later. So this module stands outside the package, and
`compress/__init__.py` leaves the registration to the commands that load models while `STARTED` is true.
"""

from __future__ import annotations

import sys

STARTED = False


def main() -> None:
    """Run the command line; Ctrl-C at any moment is one line and exit code 2."""
    global STARTED
    STARTED = True
    try:
        from compress.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        sys.stderr.write("compress: interrupted\n")
        sys.exit(2)
