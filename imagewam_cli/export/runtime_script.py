"""Join the modules of `imagewam_cli.runtime` into one file, `policy.py`, which runs an export on its own."""

from __future__ import annotations

import ast
from types import ModuleType

from imagewam_cli.runtime import actions, command_line, export_folder, observation, onnx_policy

MODULES: tuple[ModuleType, ...] = (observation, actions, export_folder, onnx_policy, command_line)
"""In order of use: each module may import the ones before it."""


def runtime_script() -> str:
    """Return the source of `policy.py`.

    The modules are joined as they are, but without their imports of each other. Their docstrings become
    comments, except that of `onnx_policy`, which opens the file.
    """
    parts = [f'"""{onnx_policy.__doc__}"""', "from __future__ import annotations"]
    for module in MODULES:
        comment = "" if module is onnx_policy else _comment(module.__doc__ or "") + "\n\n"
        parts.append(comment + _body(_source(module)))
    return "\n\n".join(parts) + "\n"


def _comment(text: str) -> str:
    return "\n".join(f"# {line}".rstrip() for line in text.strip().splitlines())


def _source(module: ModuleType) -> str:
    assert module.__file__ is not None
    with open(module.__file__, encoding="utf-8") as file:
        return file.read()


def _body(source: str) -> str:
    """Return a module's source without its docstring, its future imports and its imports of the runtime."""
    lines, dropped = source.splitlines(), set[int]()
    for number, node in enumerate(ast.parse(source).body):
        docstring = number == 0 and isinstance(node, ast.Expr)
        joined = isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("__future__", "imagewam_cli."))
        if docstring or joined:
            assert node.end_lineno is not None
            dropped |= set(range(node.lineno, node.end_lineno + 1))
    return "\n".join(line for i, line in enumerate(lines, start=1) if i not in dropped).strip("\n")
