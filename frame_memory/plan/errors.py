"""What a refusal says: what was given, what was expected, the nearest valid value, the node to change."""

from __future__ import annotations

PACKER = "Frame Context Packer"
SAMPLER = "Anti-Drift Sampler"
TIMELINE = "Prompt Timeline"
IMAGE = "FramePack Image"


class PlanError(ValueError):
    """A video that cannot be planned. The message is a `refusal`."""


def refusal(given: str, expected: str, nearest: str, node: str) -> str:
    """One message for every refusal of the pack.

    `given`, `expected` and `nearest` are phrases without a final full stop; `node` is the node's display name.
    """
    return f'Given: {given}. Expected: {expected}. Nearest valid: {nearest}. Change it in the node "{node}".'
