#!/usr/bin/env python
"""The numbers of the house: lengths of functions and files, and how much of it has docstrings and annotations.

    python .ci/house.py            # prints them, and what lies outside the limits; exit status 1 if anything does

A function's length is that of its body without its docstring. Public are names without an underscore in front, of functions,
methods and classes of the package. A docstring tells shapes and units where a parameter or a result is a tensor, array or number
with a unit: it has a section of parameters, or names shape or unit in its text; `UNITS` are the words that count.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "stabie_ase"
LIMITS = {"median function": 10, "longest function": 60, "longest file": 350, "docstrings": 0.95, "annotations": 0.95, "entries": 11}
UNITS = re.compile(r"shape|eV|Å|\bK\b|\bfs\b|\bps\b|GPa|amu|bool|steps|fraction|seconds|\bin MB\b|scalar|dimensionless|None")
ARRAYS = re.compile(r"\bTensor\b|ndarray|\bfloat\b")


def functions(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def body_lines(node):
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return max(part.end_lineno for part in body) - body[0].lineno + 1 if body else 0


def public(tree):
    """Public functions, methods of public classes, and these classes; without what is defined inside functions."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_"))


def arguments(node):
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [a for a in every if a.arg not in ("self", "cls")]


def tells_enough(node, inherited):
    """Whether a public function has a docstring, with shapes or units where it takes or returns numbers."""
    text = ast.get_docstring(node)
    if text is None:
        return node.name in inherited
    annotations = " ".join(ast.unparse(a) for a in [*(x.annotation for x in arguments(node)), node.returns] if a is not None)
    return not ARRAYS.search(annotations) or bool(UNITS.search(text)) or "Parameters\n" in text


def annotated(node):
    return [a.annotation is not None for a in arguments(node)] + [node.returns is not None or node.name == "__init__"]


def measure():
    """All figures, and what lies outside of the limits."""
    lengths, files, told, typed, faults = {}, {}, {}, {}, []
    trees = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    documented = {n.name for tree in trees.values() for n in functions(tree) if ast.get_docstring(n)}
    for name, tree in trees.items():
        files[name] = (PACKAGE / name).read_text().count("\n")
        lengths |= {f"{name}:{node.lineno} {node.name}": body_lines(node) for node in functions(tree)}
        for node in public(tree):
            where = f"{name}:{node.lineno} {node.name}"
            if isinstance(node, ast.ClassDef):
                told[where] = ast.get_docstring(node) is not None
            elif "cli/" not in name:  # click's commands are told by their help
                told[where] = tells_enough(node, documented)
                typed |= {f"{where} {k}": flag for k, flag in enumerate(annotated(node))}
    entries = {name.split("/")[0] for name in trees if not name.startswith("__")}  # data/ holds no code
    figures = {
        "median function": statistics.median(lengths.values()),
        "longest function": max(lengths.values()),
        "longest file": max(files.values()),
        "docstrings": sum(told.values()) / len(told),
        "annotations": sum(typed.values()) / len(typed),
        "entries": len(entries),
    }
    faults += [f"{where}: {n} lines" for where, n in lengths.items() if n > LIMITS["longest function"]]
    faults += [f"{name}: {n} lines" for name, n in files.items() if n > LIMITS["longest file"]]
    return figures, faults, [w for w, ok in told.items() if not ok], [w for w, ok in typed.items() if not ok]


def outside(figures):
    return [
        name for name, limit in LIMITS.items() if (figures[name] < limit if isinstance(limit, float) else figures[name] > limit)
    ]


def main() -> int:
    figures, faults, untold, untyped = measure()
    for name, value in figures.items():
        print(f"{name:20s} {value:.3g} (limit {LIMITS[name]:g})")
    beyond = outside(figures)
    for fault in faults:
        print("too long:", fault)
    for name, places in (("docstrings", untold), ("annotations", untyped)):
        if name in beyond or "-v" in sys.argv:
            print(f"{name} missing:", *places, sep="\n  ")
    return int(bool(beyond))


if __name__ == "__main__":
    sys.exit(main())
