"""The pack's source as syntax trees, for the tests that hold its rules."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
RUNTIME = ("__init__.py", "nodes", "frame_memory")  # what ComfyUI loads


@cache
def runtime_files() -> tuple[Path, ...]:
    """Every Python file that ComfyUI may import."""
    found: list[Path] = []
    for name in RUNTIME:
        path = REPO / name
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.exists() else []
    return tuple(found)


@cache
def all_files() -> tuple[Path, ...]:
    """Every Python file of the repository that git knows or would add."""
    return tuple(REPO / name for name in tracked() if name.endswith(".py"))


@cache
def tracked() -> tuple[str, ...]:
    """Paths of the repository's files, without ignored ones. Falls back to a walk where there is no git."""
    line = ["git", "-C", str(REPO), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(line, capture_output=True, check=True)
        names = [n for n in done.stdout.decode("utf-8").split("\0") if n and (REPO / n).is_file()]
    except (OSError, subprocess.CalledProcessError):
        skip = {".git", "__pycache__", "shared"}
        names = [p.relative_to(REPO).as_posix() for p in REPO.rglob("*") if p.is_file() and not skip & set(p.parts)]
    return tuple(sorted(names))


@cache
def tree(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_of(path: Path) -> str:
    """Dotted name inside the repository: frame_memory/plan/schedule.py is frame_memory.plan.schedule."""
    parts = list(path.relative_to(REPO).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[tuple[str, str | None, int]]:
    """(module, name or None, line) of every import, at any depth; relative ones resolved inside the repository."""
    package = list(path.relative_to(REPO).parent.parts)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            for alias in node.names:
                yield module, alias.name, node.lineno


def full_name(node: ast.expr) -> str | None:
    """`a.b.c` of a chain of attributes that starts at a name, else None."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


@cache
def names_bound_by_import(path: Path) -> dict[str, str]:
    """Local name -> dotted thing it stands for, for every import in the file."""
    bound = {}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                bound[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return bound


def resolved(path: Path, node: ast.expr) -> str | None:
    """A chain of attributes with its first name replaced by what was imported under it."""
    name = full_name(node)
    if name is None:
        return None
    first, _, rest = name.partition(".")
    origin = names_bound_by_import(path).get(first)
    return None if origin is None else origin + ("." + rest if rest else "")


HOST_MODULES = ("comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "latent_preview")
HOST_MODULES += ("node_helpers",)


def closure_of(path: Path) -> set[Path]:
    """The pack's files that importing one of them brings in, itself included; imports inside functions count."""
    seen: set[Path] = set()
    frontier = [path]
    while frontier:
        here = frontier.pop()
        if here in seen or not here.exists():
            continue
        seen.add(here)
        for module, name, _ in imports_of(here):
            base = REPO.joinpath(*module.split(".")) if module else REPO
            places = [base.with_suffix(".py"), base / "__init__.py"] if module else []
            if name:
                places += [base / f"{name}.py", base / name / "__init__.py"]
            # The pack's own __init__ imports every family; no family is reached through it.
            frontier += [p for p in places if p.is_file() and p.is_relative_to(REPO) and p != REPO / "__init__.py"]
    return seen


def host_symbols(path: Path) -> set[str]:
    """Dotted names of the host's functions, classes and values that a file refers to, modules left out.

    A chain is cut after the first class or function: `comfy.samplers.CFGGuider.sample` counts as the class.
    """
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.Attribute, ast.Name)):
            name = resolved(path, node)
            if name and name.partition(".")[0] in HOST_MODULES:
                found.add(name)
    return found
