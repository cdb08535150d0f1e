"""The client the demo and the tests use, against the real server."""

import threading
import time

import pytest

from scripts.client import PromptError

SIZE = {"width": 64, "height": 64, "batch_size": 1}


def image_graph(color=255, **size):
    return {
        "1": {"class_type": "EmptyImage", "inputs": {**SIZE, **size, "color": color}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }


def test_a_run_returns_its_outputs_and_all_messages_in_order(server):
    run = server.client.queue(image_graph())
    entry = run.outputs["2"]["images"][0]
    assert server.client.view(**entry)[:8] == b"\x89PNG\r\n\x1a\n"
    kinds = [kind for kind, _ in run.messages]
    assert kinds.index("execution_start") < kinds.index("executed") < kinds.index("execution_success")
    assert [d["node"] for d in run.of("executed")] == ["2"]


def test_a_refused_graph_names_the_node_and_the_value(server):
    with pytest.raises(PromptError, match="EmptyImage .node 1.*-1.*width"):
        server.client.submit(image_graph(color=0, width=-1))


def test_a_failed_run_names_the_node_and_carries_the_servers_words(server):
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {**SIZE, "color": 1}},
        "2": {"class_type": "ImageCrop", "inputs": {"image": ["1", 0], "width": 8, "height": 8, "x": 0, "y": 0}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "../../outside"}},
    }
    with pytest.raises(PromptError, match="SaveImage .node 3.*"):
        server.client.queue(graph)


def test_an_uploaded_image_arrives_as_it_was(server, tmp_path):
    from PIL import Image

    path = tmp_path / "bild ü.png"
    Image.new("RGB", (48, 32), (10, 20, 30)).save(path)
    name = server.client.upload_image(path)
    assert (server.base / "input" / name).read_bytes() == path.read_bytes()
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    assert server.client.queue(graph).outputs["2"]["images"]


def test_two_threads_may_use_one_client(server):
    done = []
    threads = [threading.Thread(target=lambda c=c: done.append(server.client.queue(image_graph(c)))) for c in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert len({run.prompt_id for run in done}) == 2


def test_waiting_ends_when_its_time_is_over(server):
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="did not finish within"):
        server.client.wait("00000000-0000-0000-0000-000000000000", timeout=0.5)
    assert time.monotonic() - began < 30
