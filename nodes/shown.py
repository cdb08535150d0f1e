"""Text on a node: what it understood, made, or warns of, while it runs and afterwards."""

from __future__ import annotations

import re

from server import PromptServer


def show(node, text: str) -> None:
    """Write `text` on the running node, a node class that declares the hidden input unique_id.

    The editor's font is proportional and it swallows runs of spaces, so bars set columns apart.
    """
    server = getattr(PromptServer, "instance", None)
    if server is not None and node.hidden is not None and node.hidden.unique_id is not None:
        server.send_progress_text(re.sub(r" {2,}", " | ", text), node.hidden.unique_id)
