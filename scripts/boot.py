"""The first file that runs in the host's Python: puts ComfyUI and the repository on sys.path, then runs the command.

It is used instead of PYTHONPATH alone because the working directory must not come first (ComfyUI has a top-level module
``nodes``, the repository a folder of that name) and because ComfyUI's portable Python on Windows ignores PYTHONPATH.

    boot.py COMFYUI REPOSITORY  -m MODULE ARGS | -c CODE ARGS | FILE ARGS
"""

import runpy
import sys


def main() -> None:
    """Replace this script's own folder at the head of sys.path, then act as Python itself would."""
    comfyui, repository, *arguments = sys.argv[1:]
    ours = {sys.path[0], comfyui, repository, ""}
    sys.path[:] = [comfyui, repository, *(p for p in sys.path if p not in ours)]
    kind = arguments[0]
    if kind == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *arguments[2:]]
        namespace = {"__name__": "__main__"}
        exec(compile(arguments[1], "<string>", "exec"), namespace)
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    main()
