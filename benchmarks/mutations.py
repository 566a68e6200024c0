"""Which mutants a module has: one change of one place each, by the operators of cosmic-ray and one of our own.

Left out is what no test could or should see: annotations, replacements that raise a TypeError wherever they run, and
all but the opposite of an operator that cosmic-ray would replace by ten others, which nearly any test sees.
"""

import ast
import random
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import parso.python.tree as parsed
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Example, Operator
from cosmic_ray.plugins import get_operator

Place = tuple[int, int]  # line from 1, column from 0


class RemoveEffect(Operator):
    """Removes a statement that is there for what it does: a call, or an assignment to an attribute or an item."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Place, Place]]:
        if _is_effect(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        return parsed.Keyword("pass", node.start_pos, node.get_first_leaf().prefix)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        return (Example("def f(a):\n    a.append(1)", "def f(a):\n    pass"),)


def _is_effect(node: Any) -> bool:
    if getattr(node.parent, "type", "") != "simple_stmt" or not _is_in_function(node):
        return False
    if node.type != "expr_stmt":
        return node.type == "atom_expr"
    target, sign = node.children[:2]
    return sign.type != "annassign" and any(mark in target.get_code() for mark in ".[")


def _is_in_function(node: Any) -> bool:
    return getattr(node.search_ancestor("funcdef", "classdef"), "type", "") == "funcdef"


#: Of the replacements of an operator those that lie nearest to it.
_NEAREST = {
    "ReplaceBinaryOperator": "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_Mul BitOr_BitAnd BitAnd_BitOr",
    "ReplaceComparisonOperator": "Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt "
    "Is_IsNot Is_Eq IsNot_Is IsNot_NotEq",
    "ReplaceUnaryOperator": "USub_UAdd Delete_Not",
}
_OTHERS = (
    "AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd ReplaceBreakWithContinue "
    "ReplaceContinueWithBreak ExceptionReplacer NumberReplacer RemoveDecorator ZeroIterationForLoop"
)
_NAMES = [*(f"{kind}_{pair}" for kind, pairs in _NEAREST.items() for pair in pairs.split()), *_OTHERS.split()]
OPERATORS: dict[str, Operator] = {name: get_operator(f"core/{name}")() for name in _NAMES}
OPERATORS["RemoveEffect"] = RemoveEffect()


class Mutant(NamedTuple):
    """One change: the operator, and which of the places in the file where it could act."""

    file: str  # from the root of the repository
    operator: str
    number: int
    line: int
    last_line: int

    def code(self, source: str) -> str:
        """The module's text with the change."""
        return mutate_code(source, OPERATORS[self.operator], self.number)


def mutants_of(file: str, source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its lines."""
    hidden = list(_annotations(ast.parse(source)))
    nodes = list(ast_nodes(get_ast(source)))
    found = []
    for name, operator in OPERATORS.items():
        places = (place for node in nodes for place in operator.mutation_positions(node))
        for number, (start, end) in enumerate(places):
            if not any(first <= start and end <= last for first, last in hidden):
                found.append(Mutant(file, name, number, start[0], end[0]))
    return sorted(found, key=lambda m: (m.line, m.operator, m.number))


def _annotations(tree: ast.AST) -> Iterator[tuple[Place, Place]]:
    for node in ast.walk(tree):
        for hint in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if hint is not None:
                yield (hint.lineno, hint.col_offset), (hint.end_lineno, hint.end_col_offset)


def sampled(mutants: dict[str, list[Mutant]], n: int | None, seed: int, beyond: int = 0) -> list[Mutant]:
    """`n` mutants by chance, of each module in proportion to what it has; the same for the same seed.

    `beyond`: those that follow in the same drawing after a sample of so many.
    """
    total = sum(map(len, mutants.values()))
    chosen = []
    for file, of_file in mutants.items():
        drawn = random.Random(f"{seed} {file}").sample(of_file, len(of_file))
        before, until = (round(k * len(drawn) / total) for k in (beyond, beyond + (total if n is None else n)))
        chosen += sorted(drawn[before:until], key=lambda m: (m.line, m.operator, m.number))
    return chosen


def changed_lines(source: str, code: str) -> tuple[str, str]:
    """The first line that differs, before and after; for a removed decorator the line that follows it."""
    pairs = zip(*([line.strip() for line in text.split("\n") if line.strip()] for text in (source, code)), strict=False)
    return next((a, b) for a, b in pairs if a != b)


def statement_lines(source: str, first: int, last: int) -> range:
    """The lines of the innermost statements that hold these lines; of a compound one, its head."""
    spans = [_head(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    around = [span for span in spans if span.start <= first and last < span.stop]
    return min(around, key=len, default=range(first, last + 1))


def _head(node: Any) -> range:
    decorators = [d.lineno for d in getattr(node, "decorator_list", ())]
    body = getattr(node, "body", None)
    end = body[0].lineno if body else node.end_lineno + 1
    return range(min([node.lineno, *decorators]), max(end, node.lineno + 1))
