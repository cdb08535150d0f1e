"""Help pages, texts for translators, and the README: complete, and in step with the nodes."""

import re
import urllib.error

import pytest

from scripts import locales
from scripts.server import PACK_NAME

from .tiny import GRAPHS, REPO, ui_graph

DOCS = REPO / "web" / "docs"
README = REPO / "README.md"


@pytest.fixture(scope="module")
def ours(definitions):
    """node id -> definition of this pack's nodes."""
    found = {k: v for k, v in definitions.items() if v["python_module"] == f"custom_nodes.{PACK_NAME}"}
    assert found
    return found


def inputs_of(definition):
    both = [definition["input"].get(kind) or {} for kind in ("required", "optional")]
    return {name: spec for group in both for name, spec in group.items()}


def test_every_node_has_a_help_page_and_every_page_a_node(ours):
    assert {p.stem for p in DOCS.glob("*.md")} == set(ours)


def test_help_names_every_input_and_output(ours):
    missing = []
    for node_id, definition in ours.items():
        page = (DOCS / f"{node_id}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {definition['display_name']}\n")
        names = [*inputs_of(definition), *definition["output_name"]]
        missing += [f"{node_id}: {name}" for name in names if f"**{name}**" not in page]
    assert not missing


def test_help_marks_what_is_optional_and_advanced(ours):
    wrong = []
    for node_id, definition in ours.items():
        page = (DOCS / f"{node_id}.md").read_text(encoding="utf-8")
        for name in definition["input"].get("optional") or {}:
            row = next((line for line in page.splitlines() if line.startswith("|") and f"**{name}**" in line), "")
            options = definition["input"]["optional"][name][1]
            word = "(advanced)" if options.get("advanced") else "(optional)"
            if word not in row:
                wrong.append(f"{node_id}: {name} {word}")
    assert not wrong


def test_every_input_and_output_has_a_tooltip(ours):
    bare = []
    for node_id, definition in ours.items():
        assert definition["description"]
        bare += [f"{node_id}.{k}" for k, spec in inputs_of(definition).items() if not spec[1].get("tooltip")]
        tips = definition["output_tooltips"]
        bare += [f"{node_id} -> {name}" for name, tip in zip(definition["output_name"], tips, strict=True) if not tip]
    assert not bare


def test_help_and_graphs_are_served(server):
    page = server.client.get(f"/extensions/{PACK_NAME}/docs/FrameMemoryAntiDriftSampler.md").decode("utf-8")
    assert page.startswith("# Anti-Drift Sampler")
    offered = server.client.get_json("/workflow_templates")[PACK_NAME]
    assert sorted(offered) == sorted(p.stem for p in GRAPHS)
    for path in GRAPHS:
        assert server.client.get_json(f"/api/workflow_templates/{PACK_NAME}/{path.name}") == ui_graph(path)
        thumbnail = server.client.get(f"/api/workflow_templates/{PACK_NAME}/{path.stem}.jpg")
        assert thumbnail == path.with_suffix(".jpg").read_bytes()
    with pytest.raises(urllib.error.HTTPError):
        server.client.get(f"/extensions/{PACK_NAME}/docs/NoSuchNode.md")


def test_texts_for_translators_are_in_step(server, definitions):
    assert locales.FILE.read_text(encoding="utf-8") == locales.as_file(definitions), "python scripts/locales.py"
    served = server.client.get_json("/i18n")["en"]["nodeDefs"]
    assert set(served) >= set(locales.texts(definitions))


@pytest.mark.parametrize("page", [README, *DOCS.glob("*.md")], ids=lambda p: p.stem)
def test_links_inside_the_repository_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    dead = [t for t in targets if not t.startswith("https://") and not (page.parent / t).exists()]
    assert not dead


def test_the_readme_names_every_node_and_model(ours):
    text = README.read_text(encoding="utf-8")
    assert not [d["display_name"] for d in ours.values() if d["display_name"] not in text]
    models = [m for path in GRAPHS for n in ui_graph(path)["nodes"] for m in n["properties"].get("models", [])]
    assert models and not [m["url"] for m in models if m["url"] not in text]
    assert all(place in text for place in ("European Union", "United Kingdom", "South Korea"))
    assert (REPO / "assets" / "overview.jpg").stat().st_size < 300_000
