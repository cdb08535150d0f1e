"""Run anything in the host's Python, with ComfyUI and this repository importable.

    python scripts/run.py -m benchmarks.parity      a module of this repository or of the host
    python scripts/run.py -c "import comfy"         a line of code
    python scripts/run.py path/to/file.py ARGS      a file

The working directory and the exit code stay the caller's and the command's.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if sys.version_info < (3, 10):
    sys.exit("Frame Memory needs Python 3.10 or newer; this is %d.%d." % sys.version_info[:2])

import subprocess

from scripts import host


def main(arguments: list[str]) -> int:
    """Install the host if needed, run the command, and return its exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if arguments else 2
    try:
        found = host.ensure_host()
    except host.HostError as error:
        host.say(f"\n{error}")
        return 1
    child = subprocess.Popen(host.command(found, arguments), env=host.environment(found))
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue  # the command got it too and decides


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
