"""Talks to a running ComfyUI: queue a graph, follow it, fetch what it made. Standard library only.

Used by the demo and by the tests, which read from it everything a browser would be told (progress, previews, errors).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import struct
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10  # RFC 6455 opcodes
PREVIEW_IMAGE, PREVIEW_IMAGE_WITH_METADATA = 1, 4  # ComfyUI's binary events


class PromptError(RuntimeError):
    """The server refused a graph, or running it failed. The text is the server's; ``details`` is its whole answer."""

    def __init__(self, text: str, details: dict) -> None:
        super().__init__(text)
        self.details = details


@dataclass
class Run:
    """A finished graph: what each output node reported, and all messages about it in order of arrival."""

    prompt_id: str
    outputs: dict[str, dict]
    messages: list[tuple[str, dict]] = field(default_factory=list)

    def of(self, kind: str) -> list[dict]:
        """The messages of one kind: 'progress', 'progress_state', 'executed', 'preview', ..."""
        return [data for name, data in self.messages if name == kind]


class Client:
    """One client of one server. Messages are collected from the first call of ``listen`` on."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self.id = uuid.uuid4().hex
        self.messages: list[tuple[str, dict]] = []
        self.on_message: Callable[[str, dict], None] | None = None
        self._listening: WebSocket | None = None
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # a local server, no proxy

    # --- plain requests ---

    def get(self, path: str, timeout: float = 60) -> bytes:
        """The body of a GET request."""
        with self._open(self.address + path, timeout=timeout) as answer:
            return answer.read()

    def get_json(self, path: str, timeout: float = 60):
        """The parsed body of a GET request."""
        return json.loads(self.get(path, timeout))

    def post(self, path: str, body: dict | bytes, kind: str = "application/json", timeout: float = 60):
        """POST and return the parsed answer (None where it has none)."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data=data, headers={"Content-Type": kind})
        with self._open(request, timeout=timeout) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def object_info(self, node_class: str | None = None) -> dict:
        """The definitions of all nodes, or of one."""
        return self.get_json("/object_info" + (f"/{urllib.parse.quote(node_class)}" if node_class else ""))

    def upload_image(self, path: Path, name: str | None = None) -> str:
        """Put an image into the server's input folder and return the name to give to Load Image."""
        boundary = uuid.uuid4().hex
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name or path.name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        body = head.encode() + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        got = self.post("/upload/image", body, f"multipart/form-data; boundary={boundary}")
        return f"{got['subfolder']}/{got['name']}" if got.get("subfolder") else got["name"]

    def view(self, filename: str, subfolder: str = "", type: str = "output") -> bytes:
        """The bytes of a file that an output names."""
        return self.get("/view?" + urllib.parse.urlencode({"filename": filename, "subfolder": subfolder, "type": type}))

    def interrupt(self) -> None:
        """What the Cancel button does."""
        self.post("/interrupt", {})

    def free(self) -> None:
        """Ask the server to unload its models and forget what it has cached."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    # --- graphs ---

    def submit(self, prompt: dict, workflow: dict | None = None) -> str:
        """Queue a graph in API format and return its id. Raises PromptError when validation refuses it."""
        body = {"prompt": prompt, "client_id": self.id}
        if workflow is not None:
            body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        try:
            return self.post("/prompt", body)["prompt_id"]
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            try:
                details = json.loads(text)
            except ValueError:
                details = {"error": {"message": text}}
            raise PromptError(refusal(details), details) from None

    def wait(self, prompt_id: str, timeout: float = 300) -> Run:
        """Wait for a queued graph. Raises PromptError when it failed, TimeoutError when it takes too long."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            entry = self._history(prompt_id)
            if entry and entry.get("status", {}).get("completed") is not None:
                self._settle(prompt_id)
                run = Run(prompt_id, entry.get("outputs", {}), self.about(prompt_id))
                if entry["status"].get("status_str") != "success":
                    raise PromptError(failure(entry), entry)
                return run
            time.sleep(0.1)
        raise TimeoutError(f"The graph {prompt_id} did not finish within {timeout:.0f} s.")

    def _history(self, prompt_id: str) -> dict | None:
        """The history's entry, None while there is none or while a busy server is slow to answer."""
        try:
            return self.get_json(f"/history/{prompt_id}").get(prompt_id)
        except TimeoutError:
            return None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                return None
            raise ConnectionError(f"The server at {self.address} is gone: {error.reason}") from error

    def queue(self, prompt: dict, timeout: float = 300, workflow: dict | None = None) -> Run:
        """Queue a graph, wait for it, and return what it made."""
        return self.wait(self.submit(prompt, workflow), timeout)

    def _settle(self, prompt_id: str) -> None:
        """The history may be ahead of the socket: wait a moment for the message that ends the run."""
        ends = ("execution_success", "execution_error", "execution_interrupted")
        for _ in range(30):
            if not self._listening or any(n in ends for n, d in self.about(prompt_id)):
                return
            time.sleep(0.1)

    def about(self, prompt_id: str) -> list[tuple[str, dict]]:
        """The collected messages that belong to one graph."""
        return [(n, d) for n, d in list(self.messages) if d.get("prompt_id") in (prompt_id, None) and n != "status"]

    # --- messages ---

    def listen(self) -> Client:
        """Collect messages from now on, in a thread, until ``close``."""
        if not self._listening:
            self._listening = WebSocket(self.address, f"/ws?clientId={self.id}")
            features = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
            self._listening.send(json.dumps(features))
            threading.Thread(target=self._collect, args=(self._listening,), daemon=True).start()
        return self

    def close(self) -> None:
        """Stop collecting messages."""
        if self._listening:
            self._listening.close()
            self._listening = None

    def _collect(self, socket: WebSocket) -> None:
        while True:
            try:
                kind, data = socket.receive()
            except (OSError, EOFError):
                return
            name, body = decode_text(data) if kind == TEXT else decode_binary(data)
            self.messages.append((name, body))
            if self.on_message:
                self.on_message(name, body)


def decode_text(data: bytes) -> tuple[str, dict]:
    """A JSON message of the server as (type, data)."""
    said = json.loads(data)
    return said["type"], said.get("data") or {}


def decode_binary(data: bytes) -> tuple[str, dict]:
    """A binary message of the server; previews as ('preview', {'image': bytes, ...metadata})."""
    event = struct.unpack(">I", data[:4])[0]
    if event == PREVIEW_IMAGE_WITH_METADATA:
        length = struct.unpack(">I", data[4:8])[0]
        return "preview", {**json.loads(data[8 : 8 + length]), "image": data[8 + length :]}
    if event == PREVIEW_IMAGE:
        return "preview", {"image": data[8:]}
    return "binary", {"event": event, "data": data[4:]}


def refusal(details: dict) -> str:
    """A validation answer as text: the general reason, then each node's."""
    error = details.get("error") or {}
    lines = [error.get("message", "The server refused the graph.") if isinstance(error, dict) else str(error)]
    for node_id, node in (details.get("node_errors") or {}).items():
        for one in node.get("errors", []):
            lines.append(f"{node.get('class_type')} (node {node_id}): {one.get('message')}: {one.get('details')}")
    return "\n".join(lines)


def failure(entry: dict) -> str:
    """Why a graph in the history failed, as text."""
    for name, data in reversed(entry.get("status", {}).get("messages", [])):
        if name == "execution_error":
            node = f"{data.get('node_type')} (node {data.get('node_id')})"
            return f"{node}: {data.get('exception_type')}: {data.get('exception_message')}"
        if name == "execution_interrupted":
            return f"Cancelled in {data.get('node_type')} (node {data.get('node_id')})"
    return "The graph failed without a message."


class WebSocket:
    """As much of RFC 6455 as a client of a local server needs."""

    def __init__(self, address: str, path: str) -> None:
        at = urllib.parse.urlsplit(address)
        self._socket = socket.create_connection((at.hostname, at.port), timeout=30)
        self._file = self._socket.makefile("rb")
        self._sending = threading.Lock()
        key = base64.b64encode(os.urandom(16)).decode()
        head = f"GET {path} HTTP/1.1\r\nHost: {at.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        self._socket.sendall(f"{head}Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        status = self._file.readline()
        while self._file.readline().strip():
            pass
        if b" 101 " not in status:
            raise ConnectionError(f"The server did not open a websocket: {status.decode('latin-1').strip()}")
        self._socket.settimeout(None)

    def send(self, text: str, opcode: int = TEXT) -> None:
        """Send one text message."""
        data = text.encode()
        mask = os.urandom(4)
        size = len(data)
        length = bytes([0x80 | size]) if size < 126 else struct.pack(">BH", 0x80 | 126, size)
        masked = bytes(b ^ mask[i % 4] for i, b in enumerate(data))
        with self._sending:
            self._socket.sendall(bytes([0x80 | opcode]) + length + mask + masked)

    def receive(self) -> tuple[int, bytes]:
        """The next whole message as (opcode, bytes). Raises EOFError when the other side is gone."""
        whole, kind = b"", 0
        while True:
            first, second = self._read(2)
            size = second & 0x7F
            if size > 125:
                size = int.from_bytes(self._read(2 if size == 126 else 8), "big")
            data = self._read(size)
            opcode = first & 0x0F
            if opcode == CLOSE:
                raise EOFError
            if opcode == PING:
                self.send(data.decode("latin-1"), PONG)
            elif opcode != PONG:
                kind = kind or opcode
                whole += data
                if first & 0x80:
                    return kind, whole

    def _read(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):  # the server may be faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
