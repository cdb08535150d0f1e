"""What every test needs: ComfyUI importable and on the CPU, few threads, the real server and the real frontend."""

import importlib.util
import os
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def put_on_path():
    """ComfyUI first, then the repository: `import nodes` must be ComfyUI's. Returns ComfyUI's folder, if any."""
    ours = {"", str(REPO), str(REPO / "tests"), os.getcwd()}
    sys.path[:] = [p for p in sys.path if p not in ours]
    sys.path.insert(0, str(REPO))
    from scripts import host

    named = os.environ.get("FRAME_MEMORY_COMFYUI")
    found = None if named else host.installed_host()
    comfyui = named or (str(found.comfyui) if found else None)
    if comfyui:
        sys.path[:] = [comfyui, *(p for p in sys.path if p != comfyui)]
    return comfyui


COMFYUI = put_on_path()

import pytest
from hypothesis import HealthCheck, settings

from scripts.host import in_ci

if COMFYUI:
    from comfy.cli_args import args

    args.cpu = True  # before any other import of comfy: without a GPU, torch refuses the question for one
    args.use_pytorch_cross_attention = True

os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(4, os.cpu_count() or 1))))  # before torch is imported

settings.register_profile(
    "frame_memory",
    deadline=None,
    database=None,
    derandomize=in_ci(),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("frame_memory")


def pytest_collection_modifyitems(items):
    """Marks follow from fixtures, so that `-m "not server"` and `-m "not browser"` work."""
    for item in items:
        if "server" in getattr(item, "fixturenames", ()):
            item.add_marker("server")
        if "editor" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Show the end of the server's log beside a failure of a test that used it."""
    report = yield
    if report.failed and "server" in getattr(item, "funcargs", {}):
        report.sections.append(("ComfyUI server log", item.funcargs["server"].log_tail(80)))
    return report


@pytest.fixture(scope="session")
def running_host():
    """The host the tests run in: this Python and its ComfyUI."""
    from scripts.host import Host

    if not COMFYUI:
        pytest.fail("There is no ComfyUI here: run the tests with `python scripts/test.py`.")
    return Host(Path(sys.executable), Path(COMFYUI), installed_by_us=False)


@pytest.fixture(scope="session")
def server(running_host, tmp_path_factory):
    """The real ComfyUI server on the CPU with the pack in custom_nodes, one for the whole session.

    Its base directory has spaces, quotes and letters outside ASCII in its name, as users' folders do: every test that
    uses the server is a test of such paths too.
    """
    from scripts.server import Server

    base = tmp_path_factory.mktemp("base") / "Künstler's Ordner 画像 &co"
    base.mkdir()
    running = Server(running_host, base).start()
    running.client.listen()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def editor(server, tmp_path_factory):
    """The real frontend of that server in headless Chromium. Skipped without a Chromium; never skipped in CI."""
    from scripts import chromium

    sys.path.append(str(REPO / "tests"))
    from host.browser import Editor

    found = chromium.find()
    if not found:
        give_up = pytest.fail if in_ci() else pytest.skip
        give_up("There is no Chromium here; install one, or name one in FRAME_MEMORY_CHROMIUM.")
    opened = Editor(server.address, found, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def written():
    """tests/video/probe.py, for tests of other folders: a written video as ffprobe sees it."""
    name = "written_videos"
    spec = importlib.util.spec_from_file_location(name, REPO / "tests" / "video" / "probe.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
