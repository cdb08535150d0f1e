"""Writes locales/en/nodeDefs.json, the names and texts that translators start from, out of the nodes' own definitions.

    python scripts/locales.py

Asks a server for its node definitions and writes those of this pack. A test fails when the file is behind.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if sys.version_info < (3, 10):
    sys.exit("Frame Memory needs Python 3.10 or newer; this is %d.%d." % sys.version_info[:2])

import json
import tempfile

from scripts import host
from scripts.server import PACK_NAME, Server

FILE = host.REPO / "locales" / "en" / "nodeDefs.json"


def texts(definitions: dict) -> dict:
    """The pack's part of the server's /object_info in the form of a nodeDefs.json."""
    found = {}
    for name, definition in sorted(definitions.items()):
        if definition["python_module"] != f"custom_nodes.{PACK_NAME}":
            continue
        inputs = {}
        for kind in ("required", "optional"):
            for key, spec in (definition["input"].get(kind) or {}).items():
                options = spec[1] if len(spec) > 1 else {}
                inputs[key] = {"name": options.get("display_name") or key, "tooltip": options.get("tooltip")}
        outputs = zip(definition["output_name"], definition["output_tooltips"])
        found[name] = {
            "display_name": definition["display_name"],
            "description": definition["description"],
            "inputs": inputs,
            "outputs": {str(i): {"name": label, "tooltip": tip} for i, (label, tip) in enumerate(outputs)},
        }
    return found


def as_file(definitions: dict) -> str:
    """The file's whole text."""
    return json.dumps(texts(definitions), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Ask a server of our own and write the file."""
    try:
        found = host.ensure_host()
    except host.HostError as error:
        sys.exit(f"\n{error}")
    with tempfile.TemporaryDirectory() as base, Server(found, Path(base)) as server:
        FILE.parent.mkdir(parents=True, exist_ok=True)
        FILE.write_text(as_file(server.client.object_info()), encoding="utf-8", newline="\n")
    print(f"Wrote {FILE.relative_to(host.REPO)}.")


if __name__ == "__main__":
    main()
