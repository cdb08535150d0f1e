"""The rules of the house, read from the source: layers, sizes, what the pack may not contain."""

import ast
import re

import pytest

from .source import (
    REPO,
    all_files,
    full_name,
    imports_of,
    module_of,
    names_bound_by_import,
    resolved,
    runtime_files,
    tracked,
    tree,
)

HOST = ("comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "execution", "node_helpers", "server")
HOST += ("latent_preview", "nodes", "protocol", "app")

# Who may import whom, by room. Everybody may read plan, which reads nobody.
BELOW = {
    "frame_memory.plan": set(),
    "frame_memory.kernels": {"frame_memory.plan"},
    "frame_memory.journal": {"frame_memory.plan", "frame_memory.model"},
    "frame_memory.video": {"frame_memory.plan", "frame_memory.model", "frame_memory.kernels"},
    "frame_memory.model": {"frame_memory.plan", "frame_memory.kernels"},
    "frame_memory.sampling": {
        "frame_memory.plan",
        "frame_memory.model",
        "frame_memory.journal",
        "frame_memory.video",
        "frame_memory.kernels",
    },
    "frame_memory.forcing": {"frame_memory.plan", "frame_memory.model", "frame_memory.kernels"},
}
LIBRARY = set(BELOW)
BELOW["nodes"] = LIBRARY
BELOW["pack"] = LIBRARY | {"nodes"}
MAY_IMPORT_COMFY = {"nodes", "pack", *(f"frame_memory.{r}" for r in ("model", "sampling", "video", "forcing"))}

RUNTIME_FILES = [pytest.param(p, id=p.relative_to(REPO).as_posix()) for p in runtime_files()]


def room_of(module: str) -> str:
    parts = module.split(".")
    if parts[0] == "frame_memory":
        return ".".join(parts[:2]) if len(parts) > 1 else "frame_memory"
    return parts[0] or "pack"


@pytest.mark.parametrize("path", RUNTIME_FILES)
def test_imports_go_down_only(path):
    own = room_of(module_of(path))
    for module, name, line in imports_of(path):
        if module.split(".")[0] == "frame_memory" or (module.split(".")[0] == "nodes" and own == "pack"):
            target = room_of(f"{module}.{name}" if module == "frame_memory" and name else module)
            allowed = BELOW.get(own, set()) | {own, "frame_memory"}
            assert target in allowed, f"{path.name}:{line}: {own} may not import {target}"
        assert module.split(".")[0] not in ("scripts", "tests", "benchmarks"), f"{path.name}:{line} imports {module}"


@pytest.mark.parametrize("path", RUNTIME_FILES)
def test_comfy_is_imported_only_where_the_house_plan_allows_it(path):
    own = room_of(module_of(path))
    if own not in MAY_IMPORT_COMFY:
        found = [f"{m}:{line}" for m, _, line in imports_of(path) if m.split(".")[0] in HOST]
        assert not found, f"{own} imports {found}"


@pytest.mark.parametrize("path", [p for p in RUNTIME_FILES if "/plan/" in p.id])
def test_plan_is_pure_python(path):
    heavy = {"torch", "numpy", "PIL", "einops", "safetensors", "av", "diffusers"}
    assert not {m.split(".")[0] for m, _, _ in imports_of(path)} & heavy


@pytest.mark.parametrize("path", [p for p in RUNTIME_FILES if "/" in p.id])
def test_the_library_imports_itself_relatively(path):
    absolute = [n for n in ast.walk(tree(path)) if isinstance(n, ast.ImportFrom) and not n.level]
    found = [n.lineno for n in absolute if (n.module or "").split(".")[0] == "frame_memory"]
    plain = [a.name for n in ast.walk(tree(path)) if isinstance(n, ast.Import) for a in n.names]
    assert not found and not [n for n in plain if n.split(".")[0] == "frame_memory"]


def test_no_file_over_600_lines_and_no_function_over_60():
    problems = []
    for path in all_files():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > 600:
            problems.append(f"{path.relative_to(REPO)}: {lines} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if length > 60:
                    problems.append(f"{path.relative_to(REPO)}:{node.lineno} {node.name}: {length} lines")
    assert not problems, "\n".join(problems)


def test_no_module_is_called_utils():
    names = ("utils", "util", "helpers", "misc", "common")
    assert not [p for p in tracked() if p.endswith(".py") and p.rsplit("/", 1)[-1][:-3] in names]


NETWORK = {"requests", "urllib", "http", "socket", "aiohttp", "httpx", "ftplib", "smtplib", "huggingface_hub"}
FORBIDDEN_MODULES = NETWORK | {"websocket", "pickle", "dill", "shelve", "marshal", "subprocess", "ctypes"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_NAMES = {"torch.load", "torch.hub.load", "os.system", "os.popen", "logging.basicConfig", "torch.cuda.init"}
FORBIDDEN_NAMES |= {"os.execv", "os.spawnv", "os.startfile", "numpy.load", "torch.save"}


@pytest.mark.parametrize("path", RUNTIME_FILES)
def test_the_pack_runs_no_foreign_code_starts_no_program_and_opens_no_connection(path):
    bad = [f"{line}: import {m}" for m, _, line in imports_of(path) if m.split(".")[0] in FORBIDDEN_MODULES]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            bad.append(f"{node.lineno}: {node.func.id}()")
        if isinstance(node, (ast.Attribute, ast.Name)):
            name = resolved(path, node)
            if name in FORBIDDEN_NAMES:
                bad.append(f"{node.lineno}: {name}")
    assert not bad, f"{path.name}: {bad}"


@pytest.mark.parametrize("path", RUNTIME_FILES)
def test_the_pack_asks_comfy_for_devices_and_never_cuda(path):
    """Kernels name the kind of device that they are for; they choose none."""
    used = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Attribute)]
    bad = [f"{n.lineno}: {resolved(path, n)}" for n in used if (resolved(path, n) or "").startswith("torch.cuda.")]
    bad += [f"{n.lineno}: .cuda()" for n in used if n.attr == "cuda" and resolved(path, n) is None]
    named = r"cuda:\d+" if room_of(module_of(path)) == "frame_memory.kernels" else r"cuda(:\d+)?"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(named, node.value):
            bad.append(f'{node.lineno}: "{node.value}"')
    assert not bad, f"{path.name}: {bad}"


@pytest.mark.parametrize("path", RUNTIME_FILES)
def test_attributes_of_the_hosts_modules_are_never_assigned(path):
    """Also `setattr(comfy.x, ...)` and `comfy.x.y[...] = ...`. Registration by a list's insert is core's own way."""
    targets: list[ast.expr] = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Assign):
            targets += node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets.append(node.target)
        elif isinstance(node, ast.Delete):
            targets += node.targets
        elif isinstance(node, ast.Call) and full_name(node.func) in ("setattr", "delattr") and node.args:
            targets.append(ast.Attribute(value=node.args[0], attr="_", ctx=ast.Store()))
    flat = [t for target in targets for t in (target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target])]
    bad = []
    for target in flat:
        inner = target.value if isinstance(target, ast.Subscript) else target
        if isinstance(inner, ast.Attribute) or (isinstance(target, ast.Subscript) and isinstance(inner, ast.Name)):
            name = resolved(path, inner)
            if name and name.split(".")[0] in HOST:
                bad.append(f"{getattr(target, 'lineno', 0)}: {name}")
    assert not bad, f"{path.name}: {bad}"


@pytest.mark.parametrize("path", RUNTIME_FILES)
def test_nodes_are_v3_only(path):
    text = path.read_text(encoding="utf-8")
    assert "NODE_CLASS_MAPPINGS" not in text and "INPUT_TYPES" not in text and "RETURN_TYPES" not in text


@pytest.mark.parametrize("path", RUNTIME_FILES)
def test_no_tensor_lives_in_a_module_or_class(path):
    """A call into torch at module or class level that makes a tensor; dtypes, sizes and tables of numbers are fine."""
    makers = {"tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "randn", "rand", "eye", "load_file"}
    bodies = [tree(path).body, *(n.body for n in ast.walk(tree(path)) if isinstance(n, ast.ClassDef))]
    for body in bodies:
        for statement in body:
            if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
                for node in ast.walk(statement.value):
                    name = resolved(path, node.func) if isinstance(node, ast.Call) else None
                    assert not (name and name.startswith("torch.") and name.split(".")[1] in makers), name


def test_requirements_never_name_torch():
    names = {re.split(r"[<>=!~\[; ]", line)[0] for line in (REPO / "requirements.txt").read_text().split("\n") if line}
    assert names == {"diffusers", "einops", "safetensors", "numpy", "pillow"}
    declared = re.search(r"^dependencies = \[(.*?)\]", (REPO / "pyproject.toml").read_text(), re.M | re.S).group(1)
    assert set(re.findall(r'"([^"]+)"', declared)) == names


TEXT_FILES = (".py", ".md", ".toml", ".txt", ".json", ".lock", ".in", ".ini", ".cff", ".yml", ".js", ".csv", "run")


def test_no_machine_paths_and_no_registry_hosts_in_the_repository():
    folders = "|".join(("work", "tmp", "root", "opt/pypi", r"home/\w+", "Users/[a-z]+"))
    hosts = "|".join(("pypi" + r"\.org", "python" + "hosted", "registry" + r"\.npmjs", "download" + r"\.pytorch"))
    pattern = re.compile(rf"(?<![\w.$}}-])/({folders})/|{hosts}")
    bad = []
    for name in tracked():
        if name.endswith(TEXT_FILES):
            for number, line in enumerate((REPO / name).read_text(encoding="utf-8").splitlines(), 1):
                if pattern.search(line):
                    bad.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not bad, "\n".join(bad)


DEFINITIONS = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)


def test_every_public_thing_has_a_docstring():
    missing = []
    for path in runtime_files():
        if not ast.get_docstring(tree(path)):
            missing.append(f"{path.relative_to(REPO)}: the module")
        for node in tree(path).body:
            if isinstance(node, DEFINITIONS) and not node.name.startswith("_"):
                is_node = any("ComfyNode" in (full_name(b) or "") for b in getattr(node, "bases", []))
                if not ast.get_docstring(node) and not is_node and node.name != "comfy_entrypoint":
                    missing.append(f"{path.relative_to(REPO)}:{node.lineno} {node.name}")
    assert not missing, "\n".join(missing)


def test_constants_are_documented_in_one_way():
    """By a comment above or beside; never by `#:`, nor by a text below, which is no docstring."""
    wrong = []
    for path in runtime_files():
        name = path.relative_to(REPO).as_posix()
        lines = path.read_text(encoding="utf-8").splitlines()
        wrong += [f"{name}:{i}" for i, line in enumerate(lines, 1) if line.lstrip().startswith("#:")]
        body = tree(path).body
        for before, node in zip(body, body[1:]):
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if is_text and isinstance(before, (ast.Assign, ast.AnnAssign)):
                wrong.append(f"{name}:{node.lineno}")
    assert not wrong


BREAKS_RULES = """
import comfy.utils as u
from comfy import samplers
import torch as t

u.PROGRESS_BAR_HOOK = None
samplers.table.names["x"] = 1
TABLE = [t.zeros(3)]
t.load("x")
"""


def test_the_reader_of_the_source_sees_through_aliases(tmp_path, monkeypatch):
    from . import source

    path = tmp_path / "bad.py"
    path.write_text(BREAKS_RULES)
    monkeypatch.setattr(source, "REPO", tmp_path)
    assert names_bound_by_import(path) == {"u": "comfy.utils", "samplers": "comfy.samplers", "t": "torch"}
    for rule in (
        test_attributes_of_the_hosts_modules_are_never_assigned,
        test_no_tensor_lives_in_a_module_or_class,
        test_the_pack_runs_no_foreign_code_starts_no_program_and_opens_no_connection,
    ):
        with pytest.raises(AssertionError):
            rule(path)
