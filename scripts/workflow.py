"""Turns a saved graph (UI format, what the editor writes) into the API format the server runs, without a browser.

The frontend does this in the page; the demo has no page. A test compares the result with the frontend's own for every
graph in workflows/. Graphs with subgraphs are refused.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path

MUTED, BYPASSED = 2, 4  # node modes
NOT_RUN = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}  # nodes that exist only in the editor
WIDGET_TYPES = {
    *("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "MARKDOWN", "BOUNDING_BOX", "CURVE"),
    "COMFY_DYNAMICCOMBO_V3",
}
UPLOADS = ("image_upload", "video_upload", "audio_upload", "file_upload", "mesh_upload", "animated_image_upload")
SEEDS = ("seed", "noise_seed")  # the frontend gives these a "control after generate" widget unasked

Take = Callable[[str, object], object]  # the next saved widget value, given its name and default


class WorkflowError(ValueError):
    """The graph cannot be converted. The text names the node."""


def read(path: Path) -> dict:
    """Load a graph file. Raises WorkflowError when it is no UI-format graph."""
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorkflowError(f"{path} is not JSON: {error}") from None
    if not isinstance(workflow, dict) or not isinstance(workflow.get("nodes"), list):
        raise WorkflowError(f"{path} is not a graph saved by the editor: it has no list of nodes.")
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
    """(input name, value) of a saved node's widgets."""
    saved = node.get("widgets_values") or []
    if isinstance(saved, dict):
        take = saved.get  # pyright: ignore[reportAssignmentType]
    else:
        remaining = iter(saved)

        def take(name: str, default: object) -> object:
            return next(remaining, default)

    yield from values_of_group(definition["input"], definition.get("input_order"), take)


def wrap(value: object) -> object:
    """A list would read as a link, so the API wraps it."""
    return {"__value__": value} if isinstance(value, list) else value


def values_of_group(inputs: dict, order: dict | None, take: Take, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The values of a definition's inputs, taken in the order in which the editor saves its widgets."""
    for kind in ("required", "optional"):
        group = inputs.get(kind) or {}
        for name in (order or {}).get(kind) or group:
            yield from values_of_input(prefix + name, group[name], take)
        if any(isinstance(spec[-1], dict) and spec[-1].get(upload) for spec in group.values() for upload in UPLOADS):
            take(prefix + "upload", None)  # the button's widget is saved, not sent


def values_of_input(name: str, spec: list, take: Take) -> Iterator[tuple[str, object]]:
    """The values of one input: none for a socket, several for a combo that brings inputs of its own."""
    kind, options = spec[0], (spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {})
    if options.get("forceInput") or (not isinstance(kind, list) and kind not in WIDGET_TYPES):
        return
    if kind == "COMFY_DYNAMICCOMBO_V3":
        choices = {choice["key"]: choice["inputs"] for choice in options["options"]}
        chosen = take(name, next(iter(choices), None))
        yield name, chosen
        yield from values_of_group(choices.get(chosen) or {}, None, take, prefix=name + ".")
        return
    choices = kind if isinstance(kind, list) else options.get("options")
    yield name, wrap(take(name, options.get("default", choices[0] if choices else None)))
    control = options.get("control_after_generate")
    if control or (control is None and kind == "INT" and name in SEEDS):
        take("control_after_generate", None)
        if kind != "INT":
            take("control_filter_list", None)


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


def set_inputs(prompt: dict, class_type: str, values: dict[str, object], without: str | None = None) -> dict:
    """A copy of an API-format graph with inputs changed on every node of a class; titles with ``without`` are skipped.

    Raises WorkflowError when there is no such node or a name is not among its inputs.
    """
    changed = copy.deepcopy(prompt)
    fitting = [node for node in changed.values() if node["class_type"] == class_type]
    fitting = [node for node in fitting if not (without and without in node["_meta"]["title"].lower())]
    if not fitting:
        raise WorkflowError(f"The graph has no node {class_type}.")
    for node in fitting:
        unknown = set(values) - set(node["inputs"])
        if unknown:
            raise WorkflowError(f"{node['class_type']} has no input {', '.join(sorted(unknown))}.")
        node["inputs"].update(values)
    return changed
