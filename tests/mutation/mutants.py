"""Single-line faults of a source file: each mutant changes one node of its syntax tree."""

from __future__ import annotations

import ast
import copy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


_LEFT_ALONE = frozenset({"annotation", "returns", "decorator_list"})


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One fault: in `file`, the text from `column` to `end` of `line` becomes `after`; `text` is the whole line."""

    file: str
    line: int
    text: str
    column: int
    end: int
    before: str
    after: str

    @property
    def key(self) -> str:
        """What stays the same when lines above change."""
        return f"{self.file}: {self.text}: {self.before} -> {self.after}"

    def applied(self, source: str) -> str:
        """Return the source with the fault."""
        lines = source.splitlines(keepends=True)
        line = lines[self.line - 1].encode()
        lines[self.line - 1] = (line[: self.column] + self.after.encode() + line[self.end :]).decode()
        return "".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def mutants_of(root: Path, file: str) -> list[Mutant]:
    """Return all faults of a file that change one line; annotations and docstrings are left alone."""
    source = (root / file).read_text(encoding="utf-8")
    lines = source.encode().splitlines()
    result = []
    for node in _code(ast.parse(source)):
        if not isinstance(node, ast.expr) or node.lineno != node.end_lineno:
            continue
        before = lines[node.lineno - 1][node.col_offset : node.end_col_offset].decode()
        for changed in _changes(node):
            after = f"({ast.unparse(changed)})"
            mutant = Mutant(
                file=file,
                line=node.lineno,
                text=lines[node.lineno - 1].decode().strip(),
                column=node.col_offset,
                end=node.end_col_offset or 0,
                before=before,
                after=after,
            )
            result.append(mutant)
    return result


def _code(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a tree that run: no annotations, decorators, texts and checks for a type checker."""
    for name, value in ast.iter_fields(tree):
        if name in _LEFT_ALONE or isinstance(tree, ast.JoinedStr | ast.Import | ast.ImportFrom):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _is_typing_block(child) or _is_message(child):
                continue
            yield child
            yield from _code(child)


def _is_typing_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _is_message(node: ast.AST) -> bool:
    """Whether a node is a text that people read; tests compare only some of them."""
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_text or isinstance(node, ast.JoinedStr)


def _changes(node: ast.expr) -> Iterator[ast.expr]:
    """Yield the node with each fault that it can have."""
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            changed = copy.deepcopy(node)
            changed.ops[place] = _COMPARISONS[type(operator)]()
            yield changed
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        changed = copy.deepcopy(node)
        changed.op = _ARITHMETIC[type(node.op)]()
        yield changed
    elif isinstance(node, ast.BoolOp):
        changed = copy.deepcopy(node)
        changed.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield changed
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield ast.Constant(node.value + 1)


def parses(source: str) -> bool:
    """Whether a source with a fault is Python still: in a few places parentheses are not allowed."""
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True
