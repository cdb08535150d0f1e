"""Makes a video with the real ComfyUI and the pack's own small models: a proof of the install in a few minutes.

    python scripts/demo.py
    python scripts/demo.py --image start.png --prompt "a red circle moves right" --seconds 12
    python scripts/demo.py --keep          leaves the server running afterwards; the editor's address is printed

Installs ComfyUI into a cache folder first where that is needed (see scripts/host.py).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if sys.version_info < (3, 10):
    sys.exit("Frame Memory needs Python 3.10 or newer; this is %d.%d." % sys.version_info[:2])

import argparse
import os
import signal
import subprocess
import time

from scripts import host, workflow
from scripts.client import PromptError, Run
from scripts.server import CPU_FLAGS, PACK_NAME, Server, ServerError

GRAPH = host.REPO / "workflows" / "selftest.json"
PICTURES, PREFIX = host.REPO / "selftest_models", "frame_memory_"  # what ships, and what graphs put before its names
SAMPLER, SAVER = "FrameMemoryAntiDriftSampler", "FrameMemorySaveLongVideo"
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
    """Install, start, run, and say where the video is."""
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
            run, taken = make_video(server, graph, asked)
            for path in videos(run, base):
                print(f"Video: {path}  ({path.stat().st_size / 1e6:.1f} MB, made in {taken:.0f} s)")
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


def prepared(server: Server, graph: dict, asked: argparse.Namespace) -> dict:
    """The graph in API format with what was asked for put in."""
    prompt = workflow.to_api(graph, server.client.object_info())
    upload_pictures(server, prompt)
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


def upload_pictures(server: Server, prompt: dict) -> None:
    """Give the server the pictures that ship with the pack and that the graph names."""
    for node in prompt.values():
        name = str(node["inputs"].get("image", "")) if node["class_type"] == "LoadImage" else ""
        shipped = PICTURES / name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and shipped.is_file():
            server.client.upload_image(shipped, name)


def text_node(prompt: dict) -> str:
    """The class of the node that takes the prompt: the timeline where the graph has one, else the stock encoder."""
    classes = {node["class_type"] for node in prompt.values()}
    return "FrameMemoryPromptTimeline" if "FrameMemoryPromptTimeline" in classes else "CLIPTextEncode"


def make_video(server: Server, graph: dict, asked: argparse.Namespace) -> tuple[Run, float]:
    """Run the graph and show its progress; returns the run and the seconds it took."""
    client = server.client.listen()
    prompt = prepared(server, graph, asked)
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


def videos(run: Run, base: Path) -> list[Path]:
    """The video files a run has written. Raises DemoError when there are none."""
    found = []
    for output in run.outputs.values():
        for entries in output.values():
            for entry in entries if isinstance(entries, list) else []:
                if isinstance(entry, dict) and str(entry.get("filename", "")).endswith((".mp4", ".mkv", ".webm")):
                    found.append(base / entry.get("type", "output") / entry.get("subfolder", "") / entry["filename"])
    if not found:
        raise DemoError("The graph ran, but no node reported a video file.")
    return found


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
