"""Makes a video with the real ComfyUI and the pack's own small models: a proof of the install in a few minutes.

    python scripts/demo.py
    python scripts/demo.py --image start.png --prompt "a red circle moves right" --seconds 12
    python scripts/demo.py --keep          leaves the server running afterwards; the editor's address is printed
    python scripts/demo.py --workflow workflows/frame_preservation_selftest.json

Another graph is given the pictures and videos that ship with the pack. The files and reports that it makes are
listed at the end. Installs ComfyUI into a cache folder first where that is needed (see scripts/host.py).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if sys.version_info < (3, 10):
    sys.exit("Frame Memory needs Python 3.10 or newer; this is %d.%d." % sys.version_info[:2])

import argparse
import os
import shutil
import signal
import subprocess
import time

from scripts import host, workflow
from scripts.client import PromptError, Run
from scripts.server import CPU_FLAGS, PACK_NAME, Server, ServerError

GRAPH = host.REPO / "workflows" / "selftest.json"
SHIPPED, VIDEOS = host.REPO / "selftest_models", host.REPO / "selftest_videos"
PREFIX = "frame_memory_"  # what graphs put before the names of pictures that ship
SAMPLER = "FrameMemoryAntiDriftSampler"
FILMS = (".mp4", ".mkv", ".webm")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
ACCELERATOR = """
import torch
xpu = getattr(torch, "xpu", None)
print(torch.cuda.is_available() or torch.backends.mps.is_available() or (xpu is not None and xpu.is_available()))
"""


class DemoError(RuntimeError):
    """The demo cannot go on. The text is for the person at the keyboard."""


def arguments(line: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="demo.py", description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--image", type=Path, help="start image (any size; it is fitted); default: the graph's own")
    parser.add_argument("--prompt", help="what happens; the small models know only their own world (see README)")
    parser.add_argument("--seconds", type=float, help="length of the video")
    parser.add_argument("--seed", type=int, help="seed of the noise; default: one from the clock, printed")
    parser.add_argument("--port", type=int, default=0, help="port of the server; 0 takes a free one")
    parser.add_argument("--keep", action="store_true", help="leave the server running for the editor until Ctrl-C")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    parser.add_argument("--workflow", type=Path, default=GRAPH, help="the graph to run")
    return parser.parse_args(line)


def main(line: list[str]) -> int:
    """Install, start, run, and say what came of it and where it is."""
    asked = arguments(line)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server is stopped then as with Ctrl-C
    try:
        if asked.image and not asked.image.is_file():
            raise DemoError(f"--image {asked.image}: there is no such file.")
        found = host.ensure_host()
        host.require_in(found, host.PACK_MODULES, "The pack", f"-r {host.REPO / 'requirements.txt'}")
        base = own_folder(host.cache_root())
        flags = CPU_FLAGS if asked.cpu or not has_accelerator(found) else ()
        server = Server(found, base, asked.port, flags)
        host.say(f"Starting ComfyUI{' on the CPU' if flags else ''} at {server.address} (log: {server.log_file})")
        with server:
            graph = workflow.read(asked.workflow)
            definitions = server.client.object_info()
            prompt = prepared(server, graph, asked, definitions)
            run, taken = run_graph(server, prompt, graph)
            print("\n".join(made(run, prompt, definitions, base)))
            print(f"Made in {taken:.0f} s.")
            stay_or_leave(server, asked)
        return 0
    except KeyboardInterrupt:
        host.say("\nStopped.")
        return 130
    except (host.HostError, ServerError, DemoError, workflow.WorkflowError, PromptError) as error:
        host.say(f"\n{error}")
        return 1


def seed_from_clock() -> int:
    """Another number for each run, short enough to type."""
    return int(time.time())


def own_folder(root: Path) -> Path:
    """The demo's base directory, kept from run to run; another one for each demo that runs beside it."""
    number = 1
    while True:
        base = root / ("demo" if number == 1 else f"demo-{number}")
        base.mkdir(parents=True, exist_ok=True)
        if host.try_lock(os.open(base / "in-use.lock", os.O_RDWR | os.O_CREAT)):  # held until this process ends
            return base
        number += 1


def has_accelerator(found: host.Host) -> bool:
    """Whether the host's torch sees a GPU."""
    done = subprocess.run([str(found.python), "-c", ACCELERATOR], capture_output=True, text=True, check=False)
    return done.stdout.strip().endswith("True")


def prepared(server: Server, graph: dict, asked: argparse.Namespace, definitions: dict) -> dict:
    """The graph in API format with what was asked for put in. definitions: the server's /object_info."""
    prompt = workflow.to_api(graph, definitions)
    give_what_ships(server.base / "input", prompt)
    if asked.image:
        prompt = workflow.set_inputs(prompt, "LoadImage", {"image": server.client.upload_image(asked.image)})
    if asked.prompt is not None:
        prompt = workflow.set_inputs(prompt, text_node(prompt), {"text": asked.prompt}, without="negative")
    if asked.seconds is not None:
        prompt = workflow.set_inputs(prompt, SAMPLER, {"seconds": asked.seconds})
    # With one seed a second run would find all its sections finished, and prove nothing.
    seed = seed_from_clock() if asked.seed is None else asked.seed
    if asked.seed is not None or any(node["class_type"] == "RandomNoise" for node in prompt.values()):
        prompt = workflow.set_inputs(prompt, "RandomNoise", {"noise_seed": seed})
        host.say(f"Seed: {seed}")
    return prompt


def give_what_ships(folder: Path, prompt: dict) -> None:
    """Put the pictures, videos and folders of videos that ship with the pack and that the graph names into `folder`."""
    for node in prompt.values():
        for name in (value for value in node["inputs"].values() if isinstance(value, str)):
            if not name.startswith(PREFIX) or set(name) & set("/\\:"):
                continue
            if (VIDEOS / name).is_dir():
                shutil.copytree(VIDEOS / name, folder / name, dirs_exist_ok=True)
            for shipped in (SHIPPED / name, SHIPPED / name.removeprefix(PREFIX)):
                if shipped.is_file():
                    shutil.copyfile(shipped, folder / name)


def text_node(prompt: dict) -> str:
    """The class of the node that takes the prompt: the timeline where the graph has one, else the stock encoder."""
    classes = {node["class_type"] for node in prompt.values()}
    return "FrameMemoryPromptTimeline" if "FrameMemoryPromptTimeline" in classes else "CLIPTextEncode"


def run_graph(server: Server, prompt: dict, graph: dict) -> tuple[Run, float]:
    """Run a graph (API format; and as it was saved) and show its progress; returns the run and the seconds it took."""
    client = server.client.listen()
    titles = {node_id: node["_meta"]["title"] for node_id, node in prompt.items()}
    progress = Progress(titles)
    client.on_message = progress
    began = time.monotonic()
    try:
        run = client.wait(client.submit(prompt, graph), timeout=24 * 3600)
    except ConnectionError as error:
        raise ServerError(f"{error}\nIts last words:\n{server.log_tail()}") from error
    finally:
        progress.end()
    return run, time.monotonic() - began


class Progress:
    """One line a node; a running line of steps and sections while one works. Plain lines where there is no terminal."""

    def __init__(self, titles: dict[str, str]) -> None:
        self.titles = titles
        self.node: str | None = None
        self.section = ""
        self.live = sys.stderr.isatty()
        self.open = False
        self.told = 0.0

    def __call__(self, kind: str, data: dict) -> None:
        """Take one message of the server."""
        if kind == "executing" and data.get("node"):
            self.end()
            self.node, self.section = str(data["node"]), ""
            host.say(f"  {self.titles.get(self.node, self.node)}")
        elif kind == "binary" and data.get("event") == 3:
            self.section = progress_text(data["data"])
        elif kind == "progress" and data.get("max", 0) > 1:
            self.show(int(data["value"]), int(data["max"]))

    def show(self, value: int, most: int) -> None:
        """The running line; without a terminal at most one line in five seconds."""
        text = f"    {100 * value // most:3d} %  step {value} of {most}  {self.section}"
        if self.live:
            sys.stderr.write("\r" + text.ljust(78)[:78])
            sys.stderr.flush()
            self.open = True
        elif time.monotonic() - self.told > 5 or value == most:
            self.told = time.monotonic()
            host.say(text.rstrip())

    def end(self) -> None:
        """Close the running line."""
        if self.open:
            sys.stderr.write("\n")
            self.open = False


def progress_text(data: bytes) -> str:
    """The text of a binary progress message: a node id with its length in front, then the text."""
    size = int.from_bytes(data[:4], "big")
    return data[4 + size :].decode("utf-8", "replace").strip()


def made(run: Run, prompt: dict, definitions: dict, base: Path) -> list[str]:
    """Lines about the files and reports of the nodes that a graph ends with. Raises DemoError when there are none.

    Previews lie in a folder that ComfyUI empties; they are copied beside what it keeps.
    """
    lines = []
    for node_id, output in run.outputs.items():
        node = prompt.get(node_id)
        if node is None or not definitions[node["class_type"]].get("output_node"):
            continue
        entries = [entry for listed in output.values() if isinstance(listed, (list, tuple)) for entry in listed]
        for entry in entries:
            if isinstance(entry, dict) and entry.get("filename"):
                lines.append(described(kept(entry, base), node["_meta"]["title"]))
        lines += [f"{node['_meta']['title']}:\n{text}" for text in output.get("text") or ()]
    if not lines:
        raise DemoError(
            "The graph ran and made nothing: none of its nodes saved or showed a video, a picture or a report. End it "
            "with 'Save Long Video', 'Preview Image' or 'Preview as Text'."
        )
    return lines


def kept(entry: dict, base: Path) -> Path:
    """Where a file that a node reported lies for good."""
    kind = entry.get("type", "output")
    path = base / kind / entry.get("subfolder", "") / entry["filename"]
    if kind != "temp":
        return path
    (base / "output" / "previews").mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(path, base / "output" / "previews" / entry["filename"]))


def described(path: Path, title: str) -> str:
    """A file for people: what it is, where, how large, and the title of the node that made it."""
    what = {**dict.fromkeys(FILMS, "Video"), **dict.fromkeys(PICTURES, "Picture")}.get(path.suffix.lower(), "File")
    size = path.stat().st_size
    return f"{what}: {path}  ({f'{size / 1e6:.1f} MB' if size >= 1e5 else f'{size / 1e3:.0f} kB'}, {title})"


def stay_or_leave(server: Server, asked: argparse.Namespace) -> None:
    """With --keep wait at the editor's address until Ctrl-C; else say how to open the editor."""
    if not asked.keep:
        print("Editor: run this again with --keep, or mount the folder in your own ComfyUI's custom_nodes.")
        return
    opens = f"?template={asked.workflow.stem}&source={PACK_NAME}" if asked.workflow == GRAPH else ""
    print(f"Editor: {server.address}/{opens}  (Ctrl-C here ends the server)", flush=True)
    while server.running():
        time.sleep(0.5)
    host.say(f"The server has stopped. Its last words:\n{server.log_tail()}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
