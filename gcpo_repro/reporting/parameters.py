"""The parameters of a notebook: what it declares, and what a file may set."""

from __future__ import annotations

import ast
import io
import math
from pathlib import Path
from typing import Any

import nbformat
import yaml
from papermill.iorw import load_notebook_node, read_yaml_file
from papermill.translators import PythonTranslator

from gcpo_repro.errors import UserError

from .execution import one_line, papermill_logs_to

SCALARS = (bool, int, float, str)


def declared_parameters(notebook: Path) -> dict[str, Any]:
    """Name and default of each parameter in the notebook's cell tagged `parameters`.

    Raises:
        UserError: no such cell or several, anything in it but `name = literal` of int, float, str, bool or a
            flat list, or a line that papermill itself cannot read.
    """
    nb = read_notebook(notebook)
    cells = [c for c in nb.cells if c.cell_type == "code" and "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise UserError(f"{notebook}: {len(cells)} code cells are tagged 'parameters'; tag exactly one.")
    try:
        defaults = dict(_assignment(statement) for statement in ast.parse(cells[0].source).body)
    except (SyntaxError, ValueError) as error:
        raise UserError(
            f"{notebook}: the parameters cell may hold only lines `name = value  # meaning` with an int, "
            f"float, str, bool or flat list: {error}."
        ) from None
    with papermill_logs_to(io.StringIO()):
        seen = {parameter.name for parameter in PythonTranslator.inspect(cells[0])}
    for name in defaults.keys() - seen:
        raise UserError(
            f"{notebook}: papermill does not see the parameter {name!r}: remove annotations other than int, "
            "float, str, bool and list, and any second '=' on its line (in the comment, too)."
        )
    return defaults


def _assignment(statement: ast.stmt) -> tuple[str, Any]:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=node):
            value = ast.literal_eval(node)
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as node, annotation=annotation):
            value = ast.literal_eval(node)
            if ast.unparse(annotation) == "float" and type(value) is int:
                value = float(value)
        case _:
            raise ValueError(f"not a plain assignment: {ast.unparse(statement)}")
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, SCALARS):
            raise ValueError(f"not a plain value: {ast.unparse(statement)}")
    return name, value


def read_parameters(file: Path, defaults: dict[str, Any]) -> dict[str, Any]:
    """The parameters in a YAML file, read as `papermill -f` reads them and checked against the defaults.

    Raises:
        UserError: unreadable file, not a mapping, an unknown name, or a value of another type than the
            default (an int serves as a float; True is not an int; the items of a list are compared likewise).
    """
    try:
        content = read_yaml_file(str(file)) or {}
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read as YAML: {one_line(str(error))}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds a {type(content).__name__}; write lines of `name: value`.")
    for name in content:
        if name not in defaults:
            known = ", ".join(sorted(defaults)) or "no parameters"
            raise UserError(f"{file}: unknown parameter {name!r}; the notebook {file.stem} has {known}.")
        if name == "out_dir":
            raise UserError(f"{file}: out_dir is set by the runner; remove the line.")
    return {name: _checked(f"{file}: {name}", value, defaults[name]) for name, value in content.items()}


def _checked(label: str, value: Any, default: Any) -> Any:
    """The value in the default's type."""
    items = value if isinstance(value, list) else [value]
    kinds = {type(x) for x in default} or set(SCALARS) if isinstance(default, list) else {type(default)}
    if float in kinds and int not in kinds:
        items = [float(x) if type(x) is int else x for x in items]
    allowed = kinds | {int} if float in kinds else kinds
    if isinstance(value, list) != isinstance(default, list) or any(type(x) not in allowed for x in items):
        number_as_text = any(isinstance(x, str) for x in items) and float in kinds
        hint = " YAML 1.1 takes 1e-6 for text: write 1.0e-6." if number_as_text else ""
        raise UserError(f"{label}: {value!r} is not of the same type as the default {default!r}.{hint}")
    if any(isinstance(x, float) and not math.isfinite(x) for x in items):
        raise UserError(f"{label}: {value!r} is not a finite number; give one.")
    return items if isinstance(value, list) else items[0]


def read_notebook(path: Path) -> Any:
    """The notebook in that file, in the newest format. Raises UserError: unreadable."""
    try:
        return load_notebook_node(str(path))
    except (OSError, ValueError, KeyError, AttributeError, nbformat.ValidationError) as error:
        raise UserError(f"{path}: not a readable notebook ({one_line(str(error))}); restore it.") from None
