"""plan reads nobody: no torch, no numpy, nothing of the pack outside plan, no comfy."""

import ast
import pathlib
import sys

import frame_memory.plan

FOLDER = pathlib.Path(frame_memory.plan.__file__).parent


def test_plan_imports_only_the_standard_library_and_itself():
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert all(name.name.split(".")[0] in sys.stdlib_module_names for name in node.names), path.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in sys.stdlib_module_names, path.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1, path.name


def test_everything_public_is_there():
    assert all(hasattr(frame_memory.plan, name) for name in frame_memory.plan.__all__)
