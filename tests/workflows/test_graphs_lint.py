"""The graph files themselves: links, models, notes, groups, layout, thumbnails, and the self-test's words."""

import json
import re

import comfy.model_sampling
import comfy.samplers
import numpy as np
import pytest
from PIL import Image

from benchmarks import long_world, shots
from benchmarks.ship_selftest import PAIR, START, VISITOR
from benchmarks.world import render
from scripts.workflow import NOT_RUN, WIDGET_TYPES

from .tiny import GRAPHS, REPO, SELFTEST_GRAPHS, START_PICTURE, ui_graph

by_name = pytest.mark.parametrize("path", GRAPHS, ids=lambda p: p.stem)
FOLDERS = {
    "FrameMemoryLoadFramePack": "diffusion_models",
    "DualCLIPLoader": "text_encoders",
    "VAELoader": "vae",
    "CLIPVisionLoader": "clip_vision",
    "UNETLoader": "diffusion_models",
    "CLIPLoader": "text_encoders",
    "FrameMemoryLoraLoader": "loras",
}
TITLE = 30  # height of a node's title bar, above its position


def boxes(graph):
    """node id -> (left, top, right, bottom) with the title bar."""
    found = {}
    for node in graph["nodes"]:
        (x, y), (w, h) = node["pos"], node["size"]
        found[node["id"]] = (x, y - TITLE, x + w, y + h)
    return found


@by_name
def test_every_link_joins_two_sockets_of_one_type(path):
    graph = ui_graph(path)
    nodes = {n["id"]: n for n in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) and graph["last_node_id"] >= max(nodes)
    ids = [link[0] for link in graph["links"]]
    assert len(set(ids)) == len(ids) and graph["last_link_id"] >= max(ids)
    for link_id, source, out_slot, target, in_slot, kind in graph["links"]:
        output, entry = nodes[source]["outputs"][out_slot], nodes[target]["inputs"][in_slot]
        assert output["type"] == kind and (kind in entry["type"].split(",") or entry["type"] == "*")
        assert entry["link"] == link_id and link_id in output["links"]
    used = {i["link"] for n in graph["nodes"] for i in n.get("inputs") or [] if i.get("link") is not None}
    assert used == set(ids)


@by_name
def test_every_node_exists_and_says_which_pack_it_is_from(path, definitions):
    for node in ui_graph(path)["nodes"]:
        if node["type"] in NOT_RUN:
            continue
        definition = definitions[node["type"]]
        ours = definition["python_module"].startswith("custom_nodes.")
        properties = node["properties"]
        assert properties["cnr_id"] == ("frame-memory" if ours else "comfy-core") and properties["ver"]
        assert properties["Node name for S&R"] == node["type"]
        assert not definition.get("deprecated")


@by_name
def test_required_sockets_are_connected(path, definitions):
    for node in ui_graph(path)["nodes"]:
        if node["type"] in NOT_RUN or node["mode"]:
            continue
        linked = {i["name"].split(".")[0] for i in node.get("inputs") or [] if i.get("link") is not None}
        required = definitions[node["type"]]["input"].get("required") or {}
        sockets = {k for k, spec in required.items() if isinstance(spec[0], str) and spec[0] not in WIDGET_TYPES}
        assert sockets <= linked, f"{node['type']}: {sockets - linked}"


@by_name
def test_loaders_of_real_checkpoints_carry_links(path):
    graph = ui_graph(path)
    loaders = [n for n in graph["nodes"] if n["type"] in FOLDERS]
    notes = "\n".join(n["widgets_values"][0] for n in graph["nodes"] if n["type"] == "MarkdownNote")
    for node in loaders:
        models = node["properties"].get("models", [])
        files = [v for v in node["widgets_values"] if str(v).endswith(".safetensors")]
        if path.stem in SELFTEST_GRAPHS:
            assert not models
            continue
        assert [m["name"] for m in models] == files and files, node["type"]
        for model in models:
            assert model["directory"] == FOLDERS[node["type"]]
            address = r"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/(?:[\w.-]+/)*" + re.escape(model["name"])
            assert re.fullmatch(address, model["url"])
            assert model["url"] in notes and model["directory"] + "/" in notes


@by_name
def test_notes_say_models_settings_and_licence(path):
    graph = ui_graph(path)
    notes = [n["widgets_values"][0] for n in graph["nodes"] if n["type"] == "MarkdownNote"]
    assert len(notes) >= 2
    if path.stem in SELFTEST_GRAPHS:
        assert "ship" in notes[0]
    elif any(n["type"] == "UNETLoader" for n in graph["nodes"]):
        assert "Apache 2.0" in notes[0]
    else:
        assert "European Union" in notes[0] and "United Kingdom" in notes[0] and "South Korea" in notes[0]
        assert "1.2 s" in notes[1]


@by_name
def test_nodes_stand_apart_inside_groups_from_left_to_right(path):
    graph = ui_graph(path)
    placed = boxes(graph)
    kinds = {n["id"]: n["type"] for n in graph["nodes"]}
    for a, (left, top, right, bottom) in placed.items():
        for b, other in placed.items():
            apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
            assert a == b or apart, f"{kinds[a]} lies on {kinds[b]}"
    groups = [g["bounding"] for g in graph["groups"]]
    assert len(groups) >= 4 and all(g["title"] for g in graph["groups"])
    home = {}
    for node_id, (left, top, right, bottom) in placed.items():
        inside = [
            i for i, (x, y, w, h) in enumerate(groups)
            if x <= left and y <= top and right <= x + w and bottom <= y + h
        ]  # fmt: skip
        assert len(inside) == (0 if kinds[node_id] == "MarkdownNote" else 1), kinds[node_id]
        home[node_id] = inside[0] if inside else None
    for _, source, _, target, _, _ in graph["links"]:
        assert groups[home[source]][0] <= groups[home[target]][0], f"{kinds[source]} to {kinds[target]} runs leftwards"


@by_name
def test_runs_of_one_graph_keep_their_sections_in_projects_of_their_own(path):
    """Without a name of its own a run's project is that of its start picture: the runs would replace each other's."""
    samplers = [n for n in ui_graph(path)["nodes"] if n["type"] == "FrameMemoryAntiDriftSampler"]
    projects = [node["widgets_values"][1] for node in samplers]
    assert len(samplers) < 2 or (all(projects) and len(set(projects)) == len(projects)), projects


@by_name
def test_each_has_a_thumbnail(path):
    thumbnail = path.with_suffix(".jpg")
    assert thumbnail.stat().st_size < 100_000
    with Image.open(thumbnail) as picture:
        assert picture.format == "JPEG" and min(picture.size) >= 256
        assert np.asarray(picture.convert("L"), dtype=float).std() > 10


def test_only_graphs_and_thumbnails_lie_in_the_folder():
    names = sorted(p.name for p in (REPO / "workflows").iterdir())
    assert names == sorted(f"{p.stem}{s}" for p in GRAPHS for s in (".json", ".jpg"))


OF_NO_PICTURE = ("drift_and_recall", "ffgo_selftest", "frame_preservation_selftest")


@pytest.mark.parametrize("name", [n for n in SELFTEST_GRAPHS if n not in OF_NO_PICTURE])
def test_the_selftest_asks_for_what_its_picture_shows(name):
    scene, caption, draw, picture = START, START.caption, render, START_PICTURE
    if name == "memory_selftest":
        scene, caption, draw = VISITOR, VISITOR.caption, long_world.render
        picture = REPO / "selftest_models" / "night.png"
    elif name == "wan_memory":
        scene, caption, draw, picture = PAIR, PAIR.caption(), shots.render, REPO / "selftest_models" / "pair.png"
    assert f'"{caption}"' in json.dumps(ui_graph(REPO / "workflows" / f"{name}.json"))
    truth = draw(scene, np.arange(1))[0]
    shown = np.asarray(Image.open(picture).convert("RGB"), dtype=np.float32) / 255
    assert shown.shape == truth.shape and np.abs(shown - truth).max() <= 0.51 / 255


# Steps, CFG, sampler, scheduler, first step, first step of the low noise model.
TWO_EXPERTS = {
    "ffgo_wan22": [50, 6, "uni_pc", "simple", 0, 18],
    "ffgo_wan22_fast": [4, 1, "euler", "simple", 0, 2],
    "ffgo_selftest": [20, 1, "euler", "simple", 0, 8],
}


@pytest.mark.parametrize("path", [p for p in GRAPHS if p.stem in TWO_EXPERTS], ids=lambda p: p.stem)
def test_the_high_noise_model_makes_the_steps_down_to_the_boundary(path):
    """Wan 2.2's experts meet at sigma 0.9 (reference/ffgo.md section 4), by core's schedule for the graph's shift."""
    by_type = {}
    for node in ui_graph(path)["nodes"]:
        by_type.setdefault(node["type"], []).append(node["widgets_values"])
    high, low = sorted(by_type["KSamplerAdvanced"], key=lambda w: w[7])
    assert {w[0] for w in by_type["ModelSamplingSD3"]} == {5}
    sampling = comfy.model_sampling.ModelSamplingDiscreteFlow()
    sampling.set_parameters(shift=5.0)
    sigmas = comfy.samplers.calculate_sigmas(sampling, high[6], high[3]).tolist()
    border = next(i for i, sigma in enumerate(sigmas) if sigma < 0.9)
    assert (high[0], high[7:]) == ("enable", [0, border, "enable"])
    assert (low[0], low[7:]) == ("disable", [border, 10000, "disable"]) and low[3:7] == high[3:7]
    assert high[3:9] == TWO_EXPERTS[path.stem]
