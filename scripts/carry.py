"""Packs what a GPU machine that reaches no network lacks of the host: `python scripts/carry.py [--megabytes N]`.

It is for a machine that runs one command at a time on a copy of this checkout, sent with it and with a few more files,
together of a limited size (--megabytes). It has a Linux with a Python, PyTorch and much else; ComfyUI and the packages
in LACKING it does not have. They are packed into pieces under benchmarks/out/carry, each of which fits beside the
checkout, and the commands are printed: all but the last one only lay down a piece, and the last one unpacks them and
starts `benchmarks.gpu`. The machine must keep /var/tmp from one to the next.

It needs git and pip here. Packages come through pip, in the versions and with the checksums of host.lock, for the
Python of that machine. Of ComfyUI its code comes along, not its tokenizers, templates and tests.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import host

# Of what the benchmarks import, what a usual image with PyTorch has not.
LACKING = ("av", "comfy-aimdo", "comfy-kitchen", "diffusers", "importlib-metadata", "torchsde", "trampoline")
PLATFORMS = ("2_28", "2_27", "2_24", "2_17", "2_12", "2014", "2010")
MEBIBYTE = 2**20
LIMIT, SPARE = 64, 2 * MEBIBYTE  # MiB that travel with a command by default; bytes of them that are left free
LEFT_OUT = ("tests", "tests-unit", "blueprints", "models", "custom_nodes", "input", "output", "temp")
LARGEST = 128 * 1024  # of a file that is no code
PUBLISHED = "diffusers_helper"  # the published code's package
FOLDER = host.REPO / "benchmarks" / "out" / "carry"
THERE = "/var/tmp/host"  # a folder of that machine's, which nothing else uses
START = (
    f"cat {THERE}/host.* | tar x -C {THERE} && "
    f"for w in {THERE}/*.whl; do python3 -m zipfile -e $w {THERE}/site; done && "
    f"COMFYUI_PATH={THERE}/comfyui FRAME_MEMORY_PYTHON=$(python3 -c 'import sys; print(sys.executable)') "
    f"PYTHONPATH={THERE}/site "
)
GPU = "FRAME_MEMORY_COMMIT={commit} python3 scripts/run.py -m benchmarks.gpu --out $OUT {options}"


def requirements(lock: str, python: str, names: tuple[str, ...] = LACKING) -> list[str]:
    """The lock's lines of packages, `name==version --hash=...`, for a Python such as 3.12 on Linux with an x86-64."""
    try:
        from pip._vendor.packaging.requirements import Requirement
    except ImportError as error:
        raise SystemExit("This Python has no pip, which fetches the packages. Run it with one that has it.") from error
    place = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux",
             "platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython",
             "platform_python_implementation": "CPython"}  # fmt: skip
    found = []
    for block in lock.replace(" \\\n    --hash", " --hash").splitlines():
        line, *hashes = block.split(" --hash=")
        if not hashes or host.normalise(line.partition("==")[0]) not in names:
            continue
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate(place):
            found.append(" --hash=".join([f"{wanted.name}{wanted.specifier}", *hashes]))
    return found


def download(python: str, folder: Path) -> None:
    """Fetch the wheels. Raises CalledProcessError where pip fails."""
    listed = folder / "requirements.txt"
    listed.write_text("\n".join(requirements(host.read_lock().text, python)) + "\n", encoding="utf-8")
    tags = [word for tag in PLATFORMS for word in ("--platform", f"manylinux{'_' if '_' in tag else ''}{tag}_x86_64")]
    only = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python, *tags]
    line = [sys.executable, "-m", "pip", "download", "--require-hashes", *only, "-d", str(folder), "-r", str(listed)]
    subprocess.run(line, check=True)
    listed.unlink()


def code_of(comfyui: Path) -> Iterator[Path]:
    """The files of ComfyUI that running it needs."""
    for path in sorted(comfyui.rglob("*")):
        inside = path.relative_to(comfyui).parts
        left_out = inside[0] in LEFT_OUT or "__pycache__" in inside
        if path.is_file() and not left_out and (path.suffix == ".py" or path.stat().st_size < LARGEST):
            yield path


def asked_git(arguments: list[str]) -> str:
    """What git says of this checkout. Raises SystemExit in plain words without git, or where this is no checkout."""
    try:
        line = ["git", "-C", str(host.REPO), *arguments]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise SystemExit("git is not installed; it says which files travel with the checkout. Install it.") from error
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"git cannot read {host.REPO} ({error.stderr.strip()}). Run this in a clone.") from error


def checkout_bytes() -> int:
    """Of the files that travel anyway."""
    listed = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = asked_git(listed).split("\0")
    return sum(path.stat().st_size for path in (host.REPO / name for name in names if name) if path.is_file())


def cut(packed: Path, folder: Path, size: int) -> list[Path]:
    """A file in pieces of at most so many bytes, host.00 and on."""
    pieces = []
    with packed.open("rb") as file:
        while block := file.read(size):
            pieces.append(folder / f"host.{len(pieces):02}")
            pieces[-1].write_bytes(block)
    return pieces


def calls(pieces: list[Path], commit: str, options: str) -> Iterator[tuple[str, str]]:
    """(what is carried, the command) of each call. options: of benchmarks.gpu."""
    for piece in pieces:
        path = piece.relative_to(host.REPO).as_posix()
        lay = f"mkdir -p {THERE} && cp {path} {THERE}/"
        lay = f"rm -rf {THERE} && {lay}" if piece == pieces[0] else lay  # what an earlier commit left there
        yield path, lay if piece != pieces[-1] else f"{lay} && {START}{GPU.format(commit=commit, options=options)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="of that machine")
    parser.add_argument("--published", metavar="PATH", type=Path, help="a checkout of the published FramePack code")
    parser.add_argument("--minutes", type=float, default=9.0, help="of benchmarks.gpu, less than a command may take")
    parser.add_argument("--megabytes", type=int, default=LIMIT, help="MiB that travel with a command, checkout too")
    args = parser.parse_args(arguments)
    size = args.megabytes * MEBIBYTE - SPARE - checkout_bytes()
    if size < MEBIBYTE:
        raise SystemExit(
            f"The checkout leaves {max(size, 0)} bytes of {args.megabytes} MiB. Move large files that are not "
            "committed away, or raise --megabytes."
        )
    found = host.ensure_host()
    shutil.rmtree(FOLDER, ignore_errors=True)
    wheels = FOLDER / "wheels"
    wheels.mkdir(parents=True)
    download(args.python, wheels)
    packed = FOLDER / "host.tar"
    with tarfile.open(packed, "w") as tar:
        for path in sorted(wheels.glob("*.whl")):
            tar.add(path, path.name)
        for path in code_of(found.comfyui):
            tar.add(path, f"comfyui/{path.relative_to(found.comfyui).as_posix()}")
        if args.published:
            tar.add(args.published / PUBLISHED, f"published/{PUBLISHED}")
    pieces = cut(packed, FOLDER, size)
    packed.unlink()
    shutil.rmtree(wheels)
    commit = asked_git(["describe", "--always", "--dirty=+"]).strip()
    options = f"--minutes {args.minutes:g}" + (f" --published {THERE}/published" if args.published else "")
    for number, (path, command) in enumerate(calls(pieces, commit, options), start=1):
        print(f"\nCall {number} of {len(pieces)}, which carries {path}:\n{command}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
