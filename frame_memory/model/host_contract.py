"""What of ComfyUI's own code the pack leans on, checked once when ComfyUI loads it (faults.md 42).

ComfyUI's internals have no stable interface. When one of them moves, the nodes that need it are left out with one line
that names it, and all others still register. A test derives the same list from the source and compares.

Imports of ComfyUI happen inside the check only, so this module loads anywhere.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Mapping

from .host_needs import FAMILIES, Family, Need


def check(families: Mapping[str, Family] = FAMILIES) -> dict[str, list[str]]:
    """What does not hold in this ComfyUI, by family; families without a problem are left out."""
    said: dict[Need, str | None] = {}
    problems: dict[str, list[str]] = {}
    for name, family in families.items():
        for need in family.needs:
            if need not in said:
                said[need] = problem(need)
            if said[need]:
                problems.setdefault(name, []).append(said[need])
    return problems


def problem(need: Need) -> str | None:
    """Why a need is not met, in words, or None."""
    try:
        thing = find(need.symbol)
    except Exception as error:  # whatever a changed module raises while it is imported is the answer
        return f"{need.symbol} is missing ({error})"
    if not need.parameters:
        return None
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return f"{need.symbol} cannot be called any more"
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "self"]
    if need.exact:
        return None if tuple(named) == need.parameters else f"{need.symbol} takes ({', '.join(named)}) now"
    gone = [p for p in need.parameters if p not in named]
    return f"{need.symbol} no longer takes {', '.join(gone)}" if gone else None


def find(symbol: str):
    """The object of a dotted name: the longest importable prefix is the module, the rest are attributes.

    Raises ImportError or AttributeError that names the first part which is not there.
    """
    parts = symbol.split(".")
    thing = importlib.import_module(parts[0])
    for count, part in enumerate(parts[1:], 2):
        if not hasattr(thing, part) and inspect.ismodule(thing) and hasattr(thing, "__path__"):
            importlib.import_module(".".join(parts[:count]))
        if not hasattr(thing, part):
            raise AttributeError(f"{'.'.join(parts[: count - 1])} has no {part}")
        thing = getattr(thing, part)
    return thing


def sound_families(families: Mapping[str, Family] = FAMILIES) -> list[str]:
    """The families whose needs are met; for each other one, a line in the log says what is missing and what to do."""
    problems = check(families)
    for name, missing in problems.items():
        logging.error(
            "Frame Memory: this ComfyUI has changed what %d of its nodes rely on, so they are not available: %s. "
            "Changed: %s. Update Frame Memory, or use the ComfyUI version its pyproject.toml names.",
            len(families[name].nodes),
            ", ".join(families[name].nodes),
            "; ".join(missing),
        )
    return [name for name in families if name not in problems]
