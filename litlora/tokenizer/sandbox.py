"""Templates that others wrote: jinja2's sandbox, with a bound on the work that one rendering may do.

The sandbox keeps a template from attributes and functions that lead to code; it does not keep it from looping for
ever or from making a text of a terabyte. Here every pass of a loop, every call and every text that grows is paid for,
and containers are weighed when they are made, so that whatever walks them later ends. What it pays with is far more
than any real template needs, grows with the messages, and runs out after seconds.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sized
from datetime import datetime
from typing import Any, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

Made = TypeVar("Made")

LENGTH = 100_000  # characters of a template; real ones have up to 30,000
NODES = 8000  # of its syntax tree; real ones have up to 3,000, and the compiler takes 7 KB of memory for each
WORK = 1_000_000  # passes, calls and characters of one rendering
OUTPUT = 50_000  # characters
PER_CHARACTER = 20  # more of both for each character that is put in
SECONDS = 2.0  # of a CPU, beyond what a rendering may take (real templates take microseconds), all renderings together
RENDERING, READING = 5e-3, 1e-6  # seconds a rendering and a character that is put in
BITS = 4096  # of a whole number
WIDTH = 1000  # of a formatted field, an indentation
CONTAINERS = (list, tuple, dict, set, frozenset)


class _Purse(threading.local):
    """What the rendering of this thread has left."""

    units: float = float("inf")
    until: float = float("inf")


_purse = _Purse()


def _pay(units: int) -> None:
    _purse.units -= units
    if _purse.units < 0:
        raise _too_much()


def _tick() -> None:
    _pay(1)
    if time.thread_time() > _purse.until:
        raise _too_much()


def _too_much() -> jinja2.TemplateError:
    return jinja2.TemplateRuntimeError("the template does too much: a loop without end, or a text without bounds")


def _weigh(value: Any) -> int:
    """How many values and characters `value` shows when it is written out; raises where that is too many."""
    if isinstance(value, str):
        return len(value)
    total, todo, steps = 0, [value], 0
    while todo:
        item, steps = todo.pop(), steps + 1
        total += len(item) + 1 if isinstance(item, str) else 1
        if isinstance(item, dict):
            todo += item.keys()
            todo += item.values()
        elif isinstance(item, CONTAINERS):
            todo += item
        if total + len(todo) > _purse.units or (not steps % 1024 and time.thread_time() > _purse.until):
            raise _too_much()
    return total


class _Namespace(Namespace):
    """Does not show what it holds: that may be itself, many times over."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Generation(Extension):
    """{% generation %}…{% endgeneration %} marks the assistant's text for other tools: its content, as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own shape)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metered(NodeTransformer):
    """Puts a toll into every loop and comparison, and a scale under every container that is made."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_toll(node), lineno=node.lineno))
        if node.test is not None:  # the passes that it leaves out are passes, too
            node.test = nodes.And(_toll(node), node.test, lineno=node.lineno)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        return nodes.And(_toll(node), node, lineno=node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return node if all(isinstance(item, nodes.Const) for item in node.items) else _call("weighed", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        fixed = node.ctx != "load" or all(isinstance(item, nodes.Const) for item in node.items)
        return node if fixed else _call("weighed", node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _call("weighed", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        fixed = all(isinstance(item.value, nodes.Const) for item in node.items)
        return node if fixed else _call("weighed", node)


def _toll(node: nodes.Node) -> nodes.Expr:
    return nodes.EnvironmentAttribute("toll", lineno=node.lineno)


def _call(name: str, argument: nodes.Expr) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name, lineno=argument.lineno)
    return nodes.Call(function, [argument], [], None, None, lineno=argument.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's, set up as transformers sets it up, with `_pay` wherever work is done or memory taken."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(extensions=[_Generation, loopcontrols], finalize=_written, **options)
        self.tests = {name: _paid("", plain) for name, plain in self.tests.items()}
        self.filters = {name: _paid(name, plain) for name, plain in self.filters.items() if name not in _SLOW_FILTERS}
        self.filters["tojson"] = _to_json
        del self.globals["lipsum"]
        self.globals |= {"namespace": _Namespace, "raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        if sum(1 for _ in tree.find_all(nodes.Node)) > NODES:
            raise jinja2.TemplateError("the template is too large")
        metered: nodes.Template = _Metered().visit(tree)
        return metered

    @property
    def toll(self) -> bool:
        _tick()
        return True

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Joins what a template writes."""
        kept = []
        for piece in pieces:
            _pay(len(piece))
            kept.append(piece)
        return "".join(kept)

    @staticmethod
    def joined(parts: list[Any]) -> str:
        """a ~ b"""
        _pay(sum(map(_weigh, parts)))
        return "".join(map(str, parts))

    @staticmethod
    def weighed(value: Any) -> Any:
        return _made(value)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _SLOW_METHODS and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _tick()
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, CONTAINERS):  # a macro's varargs may make one of several
                _weigh(argument)
        text, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(text, (str, bytes)) and name in _BEFORE:
            args = _BEFORE[name](text, *args, **kwargs)
        return _made(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _formatted(value.__self__)
        return wrapped

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            return _made(left + right)
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "%" and isinstance(left, (str, bytes)):
            _formatted(left, right)
        elif operator == "*" and not numbers:
            for many, times in ((left, right), (right, left)):
                if isinstance(many, Sized) and isinstance(times, int):
                    _pay(len(many) * max(times, 0))
        elif operator in ("*", "**") and numbers:
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > BITS:
                raise jinja2.TemplateRuntimeError("the template makes too large a number")
        return _made(super().call_binop(context, operator, left, right))


def _made(value: Any) -> Any:
    """A value that was just made: a text is paid for, a container weighed."""
    if isinstance(value, (str, bytes)):
        _pay(len(value))
    elif isinstance(value, CONTAINERS):
        _weigh(value)
    return value


def _written(value: Any) -> Any:
    """What {{ value }} writes."""
    return _made(str(value)) if isinstance(value, CONTAINERS) else value


# --- what is paid for before it is made: each takes a method's text and arguments, and gives the arguments


def _padded(text: Any, *arguments: Any, **named: Any) -> tuple[Any, ...]:
    for width in (*arguments[:1], *named.values()):
        if isinstance(width, int) and not -WIDTH <= width <= WIDTH:
            raise jinja2.TemplateRuntimeError(f"the template asks for a width of {width}")
    return arguments


def _indented(text: Any, width: int | str = 4, *rest: Any, **named: Any) -> tuple[Any, ...]:
    size = len(width) if isinstance(width, str) else _padded(text, width)[0]
    _pay(size * (1 + str(text).count("\n")))
    return (width, *rest)


def _replaced(text: Any, old: Any, new: Any, *rest: Any, **named: Any) -> tuple[Any, ...]:
    found = text.count(old) if isinstance(text, bytes) else str(text).count(str(old))
    _pay(found * len(new if isinstance(new, bytes) else str(new)))
    return (old, new, *rest)


def _joined(text: Any, items: Any) -> tuple[Any, ...]:
    listed = list(items)
    _pay(len(text) * len(listed))
    return (listed,)


def _formatted(text: Any, *args: Any, **named: Any) -> tuple[Any, ...]:
    """Refuses a format with a large width, or one that is given among the arguments."""
    if re.search(r"\d{4}|\*|\{[^{}]*\{", str(text)):
        raise jinja2.TemplateRuntimeError("the template asks for too wide a field")
    return args


_BEFORE: dict[str, Callable[..., tuple[Any, ...]]] = {
    **dict.fromkeys(("ljust", "rjust", "center", "zfill", "expandtabs", "batch", "slice", "round"), _padded),
    "format": _formatted,
    "replace": _replaced,
    "indent": _indented,
    "join": _joined,
}
# they make long texts of short ones, or take long over them; no chat template needs them
_SLOW_METHODS = {"translate", "maketrans", "encode", "decode", "to_bytes", "from_bytes", "hex", "fromhex"}
_SLOW_FILTERS = {"wordwrap", "urlize", "xmlattr", "pprint"}


def _paid(name: str, plain: Any) -> Callable[..., Any]:
    """A filter or a test with its price; jinja2's marks, on what it is given beside the value, stay."""
    before = _BEFORE.get(name)
    given = hasattr(plain, "jinja_pass_arg")  # the context or such comes first

    @functools.wraps(plain)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        _tick()
        if name == "join":  # its value is the list, which may be an iterator
            listed, between = list(args[1]), str(kwargs.get("d", args[2] if len(args) > 2 else ""))
            args = (args[0], *_joined(between, listed), *args[2:])
        elif before is not None:
            before(*args[given:], **kwargs)
        return _made(plain(*args, **kwargs))

    return filtered


class Template:
    """A template's text, compiled. Raises jinja2.TemplateError, and only that, for whatever is wrong with it."""

    def __init__(self, source: str, **options: Any) -> None:
        if len(source) > LENGTH:
            raise jinja2.TemplateError(f"the template has {len(source):,} characters; at most {LENGTH:,} are read")
        self._seconds = SECONDS
        sandbox = Sandbox(**options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's own, of what a template calls or compares
            self._template = self._metered(lambda: sandbox.from_string(source), len(source))

    def render(self, **values: Any) -> str:
        size = _weigh(list(values.values()))
        text = self._metered(lambda: self._template.render(values), size)
        if len(text) > OUTPUT + PER_CHARACTER * size:
            raise jinja2.TemplateError(f"the template writes {len(text):,} characters")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise jinja2.TemplateError("the template writes broken Unicode") from None
        return text

    def _metered(self, work: Callable[[], Made], size: int) -> Made:
        free, start = RENDERING + READING * size, time.thread_time()
        _purse.units, _purse.until = WORK + PER_CHARACTER * size, start + free + self._seconds
        try:
            return work()
        except jinja2.TemplateError:
            raise
        except Exception as error:  # a template is somebody else's program: whatever it ends with is its own fault
            raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from error
        finally:
            self._seconds -= max(0.0, time.thread_time() - start - free)
            _purse.units = _purse.until = float("inf")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > WIDTH or re.search(r"%[^A-Za-z%]*\d", pattern):  # a width of its own
        raise jinja2.TemplateRuntimeError("the template asks for a date that is too long")
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own tojson escapes for HTML, which would show in the prompt.
    _padded("", indent or 0)
    _pay(_weigh(value) * (1 + (indent or 0) + sum(map(len, separators or ()))))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
