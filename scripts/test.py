"""Runs every check of the repository on the real ComfyUI; installs what is missing first.

    python scripts/test.py                          everything
    python scripts/test.py tests/plan -k schedule   pytest's arguments: only these tests, no other checks

With CI=true a missing Chromium or ffprobe is a failure; elsewhere their tests are then skipped, in loud words.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if sys.version_info < (3, 10):
    sys.exit("Frame Memory needs Python 3.10 or newer; this is %d.%d." % sys.version_info[:2])

import shutil
import subprocess
import time

from scripts import chromium, ffprobe, host

TOOLS = ("pytest", "hypothesis", "ruff", "playwright", "comfy_test")
REQUIREMENTS = str(host.REPO / "requirements.txt")
PIP_NAMES = ("-r", REQUIREMENTS, "pytest", "hypothesis", "ruff", "playwright", "comfy-test==0.4.15")


def steps(found: host.Host) -> list[tuple[str, list[str]]]:
    """(name, command) of the checks before the tests. pyright is among them where it would start without downloading:
    its package is there, and Node.js to run it with."""
    scan = [str(host.REPO / "scripts" / "hazards.py"), str(host.REPO)]
    checks = [
        ("ruff", host.command(found, ["-m", "ruff", "check", "--quiet", "--no-cache", str(host.REPO)])),
        ("comfy-test's hazard scan", host.command(found, scan)),
    ]
    if shutil.which("node") is None or host.missing_in(found, ("pyright",)):
        host.say("pyright: not run; it needs its Python package and Node.js.")
        return checks
    types = ["-m", "pyright", "--project", str(host.REPO), "--pythonpath", str(found.python)]
    # Not by host.command: pyproject.toml leaves ComfyUI's own types out.
    return [*checks, ("pyright", [str(found.python), *types])]


def main(arguments: list[str]) -> int:
    """Run the checks in order; the exit code is the first failure's. pytest's closing line is the last one printed."""
    try:
        found = host.ensure_host()
        host.require_in(found, (*host.PACK_MODULES, *TOOLS), "The test command", " ".join(PIP_NAMES))
    except host.HostError as error:
        host.say(f"\n{error}")
        return 1
    environment = host.environment(found)
    if not find_programs(environment) and host.in_ci():
        return 1
    if not arguments:
        for name, line in steps(found):
            began = time.monotonic()
            code = subprocess.call(line, env=None if name == "pyright" else environment)
            if code:
                host.say(f"{name} failed; the tests were not started.")
                return code
            host.say(f"{name}: passed ({time.monotonic() - began:.0f} s)")
    config = ["-c", str(host.REPO / "tests" / "pytest.ini"), "--rootdir", str(host.REPO / "tests")]
    line = ["-m", "pytest", "-q", *config, *with_places(arguments)]
    return subprocess.call(host.command(found, line), env=environment)


def find_programs(environment: dict[str, str]) -> bool:
    """Find or install what some tests need and put it into the environment; False, in loud words, where one is missing.

    In CI both are looked for before anything is given up.
    """
    complete = True
    for finder, name, tests, remedy in (
        (chromium, "CHROMIUM", "that open the graphs in the real frontend", "Chromium, Chrome or Edge"),
        (ffprobe, "FFPROBE", "that look at written videos with ffprobe", "FFmpeg"),
    ):
        found = finder.find_or_install(host.say)
        if found:
            environment[f"FRAME_MEMORY_{name}"] = found
            continue
        complete = False
        host.say(
            f"\n*** NO {name} FOUND: the tests {tests} are NOT run. ***\n"
            f"*** Install {remedy}, or name one in FRAME_MEMORY_{name}. ***\n"
        )
    return complete


def with_places(arguments: list[str]) -> list[str]:
    """pytest's arguments with paths made whole (relative to here or the repository); tests/ where none is named."""
    placed, found, value_next = [], False, False
    for argument in arguments:
        name, mark, test = argument.partition("::")
        here = next((p for p in (Path(name), host.REPO / name) if p.exists()), None)
        if value_next or argument.startswith("-") or here is None:
            placed.append(argument)
            value_next = not value_next and argument in ("-k", "-m", "-p", "-o", "-W", "-n")
        else:
            placed.append(str(here.resolve()) + mark + test)
            found, value_next = True, False
    return placed if found else [str(host.REPO / "tests"), *placed]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
