"""Grammars in Lark's notation into nodes: exactly where they are regular, to a depth where they are not."""

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any

from dgemma.constraints.equations import Name, either, row, solve
from dgemma.constraints.nodes import EMPTY, LAST, Chars, Choice, Node, Repeat, Sequence, complement, sequence, text
from dgemma.constraints.regex import fullmatch

if TYPE_CHECKING:
    from lark import Tree
    from lark.grammar import Symbol
    from lark.lexer import Pattern
    from lark.load_grammar import Grammar

LIMIT = 10_000  # uses of terminals in terminals
TEMPLATES = 1_000  # uses of templates with different arguments

_LAST_LETTER = 0x1FFFF  # the planes of Unicode behind it know no cases
_TIMES = {"?": (0, 1), "*": (0, None), "+": (1, None)}
_ATOMS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_LAZY = re.compile(r"[*+?}]\?")
_ANCHOR = re.compile(r"[\^$]|\\[AZ]")
_LIBRARY = {  # the same languages as in lark's library, without lookbehind and lazy repeats
    r'ESCAPED_STRING : "\"" _STRING_ESC_INNER "\""': r'ESCAPED_STRING : /"([^"\\\n]|\\.)*"/',
    r'C_COMMENT: "/*" /(.|\n)*?/ "*/"': r"C_COMMENT: /\/\*([^*]|\*+[^*\/])*\*+\//",
}


@lru_cache(maxsize=64)
def grammar(source: str, depth: int = 8) -> Node:
    r"""The texts of a grammar's rule `start`.

    Rules that are recursive only at their left or right end come out exactly, and so does everything without recursion.
    Of others, at most `depth` uses nest (the outermost counts), so that the language is then a subset.

    Terminals match all that their expressions allow, wherever the rules allow them, as in lark's Earley parser with
    lexer="dynamic_complete". The lexers that take the longest token refuse some of these texts: of NAME NAME, all but
    those with something ignored between. Two things are wider even than there: /a|ab/ is both texts, where lark takes
    the first that fits, and \d, \w, \s and their opposites are ASCII's. Text of %ignore may stand before, between and
    behind tokens. Lazy repeats, anchors, flags other than i and u, and terminals of %declare are refused.

    Raises ValueError, with line and column where lark knows them; OSError if lark is not installed.
    """
    if depth < 1:
        raise ValueError(f"the depth of a grammar is at least 1, not {depth}")
    try:
        reader = _Reader(_load(source))
        return sequence(solve(reader.body, "start", depth), reader.ignored)
    except RecursionError:
        raise ValueError("the grammar is nested too deeply; simplify it") from None


def _load(source: str) -> "Grammar":
    """lark's reading of a grammar; imports come from lark's own library only."""
    try:
        from lark.exceptions import LarkError
        from lark.load_grammar import PackageResource, _parse_grammar, load_grammar, stdlib_loader
    except ImportError as error:
        raise OSError("grammars need lark: pip install 'dgemma[constrain]'") from error

    def library(base: PackageResource | None, path: str) -> tuple[PackageResource, str]:
        place, found = stdlib_loader(base, path)
        return place, reduce(lambda found, old: found.replace(old, _LIBRARY[old]), _LIBRARY, found)

    try:
        _check_terminals(_parse_grammar(source, "the grammar"))
        loaded, files = load_grammar(source, "the grammar", [library], False)
    except OSError as error:
        raise ValueError(f"the grammar imports {error.filename}, which lark's library does not have") from None
    except (LarkError, AssertionError) as error:
        raise ValueError(f"the grammar cannot be read: {str(error).splitlines()[0].strip(' :')}") from None
    for file in files:
        if not isinstance(file, PackageResource):
            raise ValueError(f"the grammar imports {file}; only lark's own library can be imported")
    return loaded


def _check_terminals(tree: "Tree[Any]") -> None:
    """lark puts terminals into one another, and walks a shared one as often as it stands there: not too often."""
    from lark.grammar import Terminal

    uses: dict[str, list[str]] = defaultdict(list)
    for term in tree.find_data("term"):
        name: Any = term.children[0]
        uses[name.value] += [t.name for t in term.scan_values(lambda leaf: isinstance(leaf, Terminal))]
    sizes: dict[str, int] = {}

    def size(name: str) -> int:
        if name not in sizes:
            sizes[name] = 0  # while it is counted: in a cycle, which lark refuses
            sizes[name] = sum(1 + size(used) for used in uses.get(name, ()))
        return sizes[name]

    if sum(size(name) for name in list(uses)) > LIMIT:
        raise ValueError(f"the grammar's terminals use one another more than {LIMIT} times in all")


class _Reader:
    """What lark read, as nodes; rules and terminals stand in them by name. `ignored`: any run of ignored text."""

    def __init__(self, loaded: "Grammar"):
        self.terminals = {str(name): tree for name, (tree, _) in loaded.term_defs}
        self.rules: dict[str, tuple[Any, dict[str, Any]]] = {
            str(name): (tree, {}) for name, parameters, tree, _ in loaded.rule_defs if not parameters
        }
        self.templates = {str(name): (parameters, tree) for name, parameters, tree, _ in loaded.rule_defs if parameters}
        self.instances: dict[tuple[str, ...], str] = {}
        self.trees: dict[int, Node] = {}
        self.ignored: Node = EMPTY
        if loaded.ignore:
            self.ignored = Repeat(Choice(tuple(self.terminal(name) for name in loaded.ignore)))

    def body(self, name: str) -> Node:
        """What a rule stands for, or a terminal with ignored text before it."""
        if name in self.terminals:
            return self.token(self.terminal(name))
        if name not in self.rules:
            raise ValueError(f"the grammar has no rule {name!r}")
        tree, values = self.rules[name]
        if tree is None:
            raise ValueError(f"the rule {name!r} is declared, but not defined")
        return self.node(tree, values)

    def token(self, node: Node) -> Node:
        return node if self.ignored == EMPTY else Sequence((self.ignored, node))

    def terminal(self, name: str) -> Node:
        """lark has already put terminals into each other: trees share subtrees, and so do nodes."""
        if self.terminals[name] is None:
            raise ValueError(f"the terminal {name!r} is declared, but not defined")
        try:
            return self.node(self.terminals[name], None)
        except ValueError as error:
            raise ValueError(f"terminal {name!r}: {error}") from None

    def node(self, tree: "Tree[Any] | Symbol", values: Mapping[str, Any] | None) -> Node:
        """One expression of a rule, with the arguments of its template; of a terminal, with None."""
        from lark import Tree

        if not isinstance(tree, Tree):
            return self.leaf(tree, values or {})
        if values is None and id(tree) in self.trees:
            return self.trees[id(tree)]
        match tree.data:
            case "expansions":
                made = either(self.node(child, values) for child in tree.children)
            case "expansion":
                made = row(self.node(child, values) for child in tree.children)
            case "alias" | "value":
                made = self.node(tree.children[0], values)
            case "maybe":
                made = Repeat(self.node(tree.children[0], values), 0, 1)
            case "expr":
                made = Repeat(self.node(tree.children[0], values), *_times(*map(str, tree.children[1:])))
            case _ if values is None:
                made = _pattern(tree)
            case _:
                made = self.leaf(tree, values)
        if values is None:
            self.trees[id(tree)] = made
        return made

    def leaf(self, item: "Tree[Any] | Symbol", values: Mapping[str, Any]) -> Node:
        from lark import Tree

        item = self.resolve(item, values)
        return self.token(_pattern(item)) if isinstance(item, Tree) else Name(item.name)

    def resolve(self, item: Any, values: Mapping[str, Any]) -> Any:
        """A symbol, or the tree of a literal: parameters replaced, and a template's use by the rule that it makes."""
        from lark import Tree
        from lark.grammar import NonTerminal

        while isinstance(item, Tree) and item.data == "value":
            item = item.children[0]
        if not isinstance(item, Tree):
            return values.get(item.name, item)
        if item.data != "template_usage":
            return item
        template, *arguments = [self.resolve(child, values) for child in item.children]
        parameters, tree = self.templates.get(getattr(template, "name", ""), ((), None))
        if not arguments or len(parameters) != len(arguments):
            raise ValueError(f"{template} is no template of {len(arguments)} parameters")
        key = (template.name, *map(str, arguments))
        if key not in self.instances:
            if len(self.instances) == TEMPLATES:
                raise ValueError(f"the grammar uses templates with more than {TEMPLATES} different arguments")
            self.instances[key] = f"{template.name}{{{len(self.instances)}}}"
            self.rules[self.instances[key]] = (tree, dict(zip(parameters, arguments, strict=True)))
        return NonTerminal(self.instances[key])


def _times(operator: str, least: str = "", most: str = "") -> tuple[int, int | None]:
    if operator != "~":
        return _TIMES[operator]
    if not 0 <= int(least) <= int(most or least):
        raise ValueError(f"~{'..'.join(filter(None, (least, most)))} is no range of counts")
    return int(least), int(most or least)


def _pattern(tree: "Tree[Any]") -> Node:
    """A literal, a range or a regular expression."""
    from lark.exceptions import LarkError
    from lark.lexer import PatternStr
    from lark.load_grammar import PrepareLiterals

    try:
        pattern: Pattern = PrepareLiterals().transform(tree).children[0]
    except (LarkError, AssertionError):
        raise ValueError(f"{' .. '.join(map(str, tree.children))} is no literal, range or expression") from None
    if strange := set(pattern.flags) - set("iu"):
        raise ValueError(f"/{pattern.value}/: the flag {min(strange)!r} is not supported")
    if isinstance(pattern, PatternStr):
        node = text(pattern.value)
    else:
        bare = _ATOMS.sub(lambda atom: atom[0] if _ANCHOR.fullmatch(atom[0]) else ".", pattern.value)
        if _LAZY.search(bare):
            raise ValueError(
                f"/{pattern.value}/: lazy repeats are not supported; exclude the end from what is repeated"
            )
        if _ANCHOR.search(bare):
            raise ValueError(f"/{pattern.value}/: anchors are not supported in a terminal")
        node = fullmatch(pattern.value)
    return _any_case(node) if "i" in pattern.flags else node


def _any_case(node: Node) -> Node:
    """Both cases of every letter; a set that reaches the last character is one that excludes letters."""
    match node:
        case Chars(ranges):
            if any(high == LAST for _, high in ranges):
                return complement(_cases(complement(node)))
            return _cases(node)
        case Sequence(parts):
            return Sequence(tuple(map(_any_case, parts)))
        case Choice(options):
            return Choice(tuple(map(_any_case, options)))
        case Repeat(part, least, most):
            return Repeat(_any_case(part), least, most)
    return node


def _cases(node: Chars) -> Chars:
    """Its characters in both cases, where those are single characters; ranges that touch become one."""
    letters = {chr(code) for low, high in node.ranges for code in range(low, min(high, _LAST_LETTER) + 1)}
    cases = {ord(case) for letter in letters for case in (letter.lower(), letter.upper()) if len(case) == 1}
    return complement(complement(Chars((*node.ranges, *((code, code) for code in cases)))))
