"""Turns a saved graph (UI format, what the editor writes) into the API format the server runs, without a browser.

The frontend does this in the page; the demo has no page. A test compares the result with the frontend's own for every
graph in workflows/. Graphs with subgraphs are refused.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MUTED, BYPASSED = 2, 4  # node modes
NOT_RUN = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}  # nodes that exist only in the editor
WIDGET_TYPES = {
    *("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "MARKDOWN", "BOUNDING_BOX", "CURVE"),
    "COMFY_DYNAMICCOMBO_V3",
}
UPLOADS = ("image_upload", "video_upload", "audio_upload", "file_upload", "mesh_upload", "animated_image_upload")
SEEDS = ("seed", "noise_seed")  # the frontend gives these a "control after generate" widget unasked


class WorkflowError(ValueError):
    """The graph cannot be converted. The text names the node."""


@dataclass(frozen=True)
class Widget:
    """One widget of a node as the definition orders them. ``sent`` is False for those the server is not told about."""

    name: str
    default: object = None
    sent: bool = True


def read(path: Path) -> dict:
    """Load a graph file. Raises WorkflowError when it is no UI-format graph."""
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorkflowError(f"{path} is not JSON: {error}") from None
    if not isinstance(workflow, dict) or not isinstance(workflow.get("nodes"), list):
        raise WorkflowError(f"{path} is not a graph saved by the editor (no list of nodes). API files need no conversion.")
    return workflow


def to_api(workflow: dict, definitions: dict) -> dict:
    """The API format of a graph.

    workflow: UI format. definitions: the server's /object_info. Raises WorkflowError for unknown nodes and subgraphs.
    """
    if (workflow.get("definitions") or {}).get("subgraphs"):
        raise WorkflowError("This graph has subgraphs, which are not converted here. Unpack them in the editor.")
    graph = Graph(workflow)
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOT_RUN or node.get("mode") in (MUTED, BYPASSED):
            continue
        if node["type"] not in definitions:
            raise WorkflowError(f"Node {node['id']} is a {node['type']}, which this ComfyUI does not have.")
        definition = definitions[node["type"]]
        inputs = dict(widget_values(node, definition))
        for slot in node.get("inputs") or []:
            if slot.get("link") is not None:
                source = graph.source(slot["link"])
                if source is not None:
                    inputs[slot["name"]] = source
        title = node.get("title") or definition.get("display_name") or node["type"]
        prompt[str(node["id"])] = {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}
    for node in prompt.values():  # a link from a node that is not run is no link
        dead = [k for k, v in node["inputs"].items() if isinstance(v, list) and len(v) == 2 and v[0] not in prompt]
        for name in dead:
            del node["inputs"][name]
    return prompt


def widget_values(node: dict, definition: dict) -> Iterator[tuple[str, object]]:
    """(input name, value) of a saved node's widgets, in the order in which the editor saves them."""
    saved = node.get("widgets_values") or []
    if isinstance(saved, dict):
        for widget in widgets(definition["input"], definition.get("input_order"), iter(())):
            if widget.sent:
                yield widget.name, wrap(saved.get(widget.name, widget.default))
        return
    remaining = iter(saved)
    for widget in widgets(definition["input"], definition.get("input_order"), remaining):
        value = next(remaining, widget.default)
        if isinstance(widget, DynamicCombo):
            widget.chosen = value
        if widget.sent:
            yield widget.name, wrap(value)


def wrap(value: object) -> object:
    """A list would read as a link, so the API wraps it."""
    return {"__value__": value} if isinstance(value, list) else value


class DynamicCombo(Widget):
    """A combo whose choice decides which widgets follow it; ``chosen`` is set once its value has been read."""

    chosen: object = None
    __setattr__ = object.__setattr__


def widgets(inputs: dict, order: dict | None, remaining: Iterator, prefix: str = "") -> Iterator[Widget]:
    """The widgets that a definition's inputs make, in the editor's order."""
    for kind in ("required", "optional"):
        group = inputs.get(kind) or {}
        for name in (order or {}).get(kind) or group:
            yield from widgets_of(prefix + name, group[name], remaining)
        if any(isinstance(s[-1], dict) and s[-1].get(u) for s in group.values() for u in UPLOADS):
            yield Widget(prefix + "upload", sent=False)


def widgets_of(name: str, spec: list, remaining: Iterator) -> Iterator[Widget]:
    """The widgets of one input: none for a socket, two for a seed."""
    kind, options = spec[0], (spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {})
    if options.get("forceInput") or (not isinstance(kind, list) and kind not in WIDGET_TYPES):
        return
    if kind == "COMFY_DYNAMICCOMBO_V3":
        choices = {choice["key"]: choice["inputs"] for choice in options["options"]}
        combo = DynamicCombo(name, default=next(iter(choices), None))
        yield combo
        yield from widgets(choices.get(combo.chosen) or {}, None, remaining, prefix=name + ".")
        return
    choices = kind if isinstance(kind, list) else options.get("options")
    yield Widget(name, default=options.get("default", choices[0] if choices else None))
    control = options.get("control_after_generate")
    if control or (control is None and kind == "INT" and name in SEEDS):
        yield Widget(name + " control", sent=False)
        if kind != "INT":
            yield Widget(name + " filter", sent=False)


class Graph:
    """Follows links back through the nodes that exist only in the editor."""

    def __init__(self, workflow: dict) -> None:
        self.nodes = {node["id"]: node for node in workflow["nodes"]}
        self.origins: dict[int, tuple] = {}
        for link in workflow.get("links") or []:
            if isinstance(link, dict):
                self.origins[link["id"]] = (link["origin_id"], link["origin_slot"])
            else:
                self.origins[link[0]] = (link[1], link[2])

    def source(self, link: int) -> object | None:
        """What feeds a link: [node id, slot], a primitive's value, or None for nothing."""
        if link not in self.origins:
            return None
        node_id, slot = self.origins[link]
        node = self.nodes.get(node_id)
        if node is None or node.get("mode") == MUTED:
            return None
        if node["type"] == "PrimitiveNode":
            return wrap((node.get("widgets_values") or [None])[0])
        if node["type"] == "Reroute":
            return self._through(node, 0)
        if node.get("mode") == BYPASSED:
            wanted = node["outputs"][slot]["type"]
            inputs = node.get("inputs") or []
            same = [slot] if slot < len(inputs) and inputs[slot]["type"] == wanted else []
            same += [i for i, entry in enumerate(inputs) if entry["type"] == wanted]
            return self._through(node, same[0]) if same else None
        return [str(node_id), slot]

    def _through(self, node: dict, index: int) -> object | None:
        inputs = node.get("inputs") or []
        link = inputs[index].get("link") if index < len(inputs) else None
        return None if link is None else self.source(link)


def set_inputs(prompt: dict, values: dict[str, object], title: str | None = None, class_type: str | None = None) -> dict:
    """A copy of an API-format graph with inputs changed on every node of that title or class.

    Raises WorkflowError when no node fits or a name is not among the node's inputs.
    """
    changed = copy.deepcopy(prompt)
    fitting = [
        node
        for node in changed.values()
        if (title is None or node["_meta"]["title"] == title) and (class_type is None or node["class_type"] == class_type)
    ]
    if not fitting:
        raise WorkflowError(f"The graph has no node {title or class_type}.")
    for node in fitting:
        unknown = set(values) - set(node["inputs"])
        if unknown:
            raise WorkflowError(f"{node['class_type']} has no input {', '.join(sorted(unknown))}.")
        node["inputs"].update(values)
    return changed
