"""YAML as text with places: what a strict load starts from.

YAML's own typing turns `012` into 10, `no` into False and `22:00` into 1320, and lets a duplicate key win
silently. So scalars stay the text that was written, and the schema types them. Anchors, aliases, tags and
several documents in one file are refused: a configuration needs none of them, and an alias bomb needs them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import yaml

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 24
MAX_NODES = 100_000

Severity = Literal["error", "warning"]
Plain = str | list["Plain"] | dict[str, "Plain"]
Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a file. `line` and `column` count from 1; `path` reads `teams.search.budget`."""

    file: str
    line: int
    column: int
    path: str
    message: str
    remedy: str
    severity: Severity = "error"

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}"
        subject = f" {self.path}:" if self.path else ""
        return f"{where} {self.severity}:{subject} {self.message}; {self.remedy}"


@dataclass(slots=True)
class Node:
    """A value with its place. `keys` holds the place of each key of a mapping."""

    line: int
    column: int
    value: str | list[Node] | dict[str, Node]
    keys: dict[str, tuple[int, int]] = field(default_factory=dict)

    def plain(self) -> Plain:
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


@dataclass(frozen=True, slots=True)
class Document:
    """One parsed file. Every problem found on the way is in `problems`; `root` is None where nothing can be read."""

    file: str
    root: Node | None
    problems: tuple[Problem, ...]

    def problem(
        self, path: Sequence[str | int], message: str, remedy: str, severity: Severity = "error"
    ) -> Problem:
        """A problem at `path`, placed at the nearest node that exists."""
        line, column = self.place(path)
        return Problem(self.file, line, column, dotted(path), message, remedy, severity)

    def place(self, path: Sequence[str | int]) -> tuple[int, int]:
        """Line and column of the value at `path`; of the key where the value is a block below it."""
        node = self.root
        if node is None:
            return 1, 1
        place = (node.line, node.column)
        for step in path:
            if isinstance(node.value, dict) and isinstance(step, str) and step in node.value:
                place = node.keys[step]
                node = node.value[step]
                if isinstance(node.value, str) and node.value:
                    place = (node.line, node.column)
            elif isinstance(node.value, list) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                place = (node.line, node.column)
            else:
                break
        return place

    def key_place(self, path: Sequence[str | int]) -> tuple[int, int]:
        """Line and column of the last key of `path` itself."""
        node = self.root
        for step in path[:-1]:
            if node is None:
                break
            if isinstance(node.value, dict):
                node = node.value.get(str(step))
            elif isinstance(node.value, list) and isinstance(step, int):
                node = node.value[step]
        if node is not None and path and path[-1] in node.keys:
            return node.keys[str(path[-1])]
        return self.place(path)


def dotted(path: Sequence[str | int]) -> str:
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            # A key is the author's text: a message stays one printable line whatever it is.
            clean = "".join(c if c.isprintable() else "?" for c in step[:80])
            text += f".{clean}" if text else clean
    return text


class _Stop(Exception):
    """Nothing after this point can be read."""

    def __init__(self, line: int, column: int, message: str, remedy: str) -> None:
        super().__init__(message)
        self.problem = (line, column, message, remedy)


@dataclass(slots=True)
class _Frame:
    node: Node
    path: Path
    key: str | None = None
    skip: bool = False


def read(file: str, text: str) -> Document:
    """The document in `text`; never raises."""
    problems: list[Problem] = []
    root: Node | None = None
    try:
        if len(text) > MAX_CHARACTERS:
            raise _Stop(1, 1, f"the file is longer than {MAX_CHARACTERS} characters", "split or shorten it")
        root = _build(file, text, problems)
    except _Stop as stop:
        problems.append(_at(file, *stop.problem))
    except yaml.reader.ReaderError as error:
        before = text[: error.position] if isinstance(error.position, int) else ""
        line = before.count("\n") + 1
        column = len(before) - (before.rfind("\n") + 1) + 1
        problems.append(
            _at(
                file,
                line,
                column,
                "a control character is not allowed",
                "remove it; save the file as plain UTF-8",
            )
        )
    except yaml.MarkedYAMLError as error:
        problems.append(_syntax(file, text, error))
    return Document(file, root, tuple(problems))


def _at(file: str, line: int, column: int, message: str, remedy: str, path: str = "") -> Problem:
    return Problem(file, line, column, path, message, remedy)


def _syntax(file: str, text: str, error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line, mark.column) if mark is not None else (0, 0)
    rows = text.splitlines()
    # libyaml names the line where it gave up; the tab that caused it may stand on the line before.
    for row in (line, line - 1):
        if 0 <= row < len(rows):
            indent = rows[row][: len(rows[row]) - len(rows[row].lstrip())]
            if "\t" in indent:
                return _at(
                    file,
                    row + 1,
                    indent.index("\t") + 1,
                    "a tab is used as indentation",
                    "replace it with two spaces",
                )
    what = (error.problem or "the text is not YAML").strip()
    remedies = {
        "mapping values are not allowed in this context": "quote the value, or put the key on a line of its own",
        "did not find expected ',' or '}'": "close the brace, or add the missing comma",
        "did not find expected ',' or ']'": "close the bracket, or add the missing comma",
        "found unexpected end of stream": "close the quote that is opened on this value",
        "did not find expected key": "check the indentation and the quotes on this line and the one before",
    }
    if error.context_mark is not None and "unexpected end" in what:
        line, column = error.context_mark.line, error.context_mark.column
    return _at(
        file,
        line + 1,
        column + 1,
        f"not valid YAML: {what}",
        remedies.get(what, "check the punctuation here"),
    )


def _build(file: str, text: str, problems: list[Problem]) -> Node | None:
    root: Node | None = None
    stack: list[_Frame] = []
    documents = nodes = 0
    for event in _events(text):
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                line, column = _place(event)
                raise _Stop(
                    line, column, "a second document begins here", "keep one document; remove the `---`"
                )
            continue
        if isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            stack.pop()
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        line, column = _place(event)
        nodes += 1
        if nodes > MAX_NODES:
            raise _Stop(line, column, f"more than {MAX_NODES} values", "shorten the file")
        if isinstance(event, yaml.AliasEvent):
            raise _Stop(
                line, column, f"the alias *{str(event.anchor)[:40]} is not allowed", "write the value out"
            )
        if event.anchor is not None:
            raise _Stop(
                line,
                column,
                f"the anchor &{str(event.anchor)[:40]} is not allowed",
                "remove it; write values out",
            )
        if getattr(event, "tag", None) not in (None, "!"):
            raise _Stop(line, column, "a YAML tag (`!...`) is not allowed", "write the plain value")
        parent = stack[-1] if stack else None
        if (
            parent is not None
            and isinstance(parent.node.value, dict)
            and parent.key is None
            and not parent.skip
        ):
            _key(file, event, parent, problems)
            continue
        node = Node(line, column, _empty(event))
        path = _attach(parent, node)
        if parent is None:
            root = node
        if not isinstance(event, yaml.ScalarEvent):
            if len(stack) >= MAX_DEPTH:
                raise _Stop(line, column, f"nested deeper than {MAX_DEPTH} levels", "flatten it")
            stack.append(_Frame(node, path))
    if root is None or root.value == "":
        raise _Stop(1, 1, "the file is empty", "start with `apiVersion: farthing/v1`")
    if not isinstance(root.value, dict):
        raise _Stop(
            root.line,
            root.column,
            "the file must be a mapping of keys",
            "start with `apiVersion: farthing/v1`",
        )
    return root


def _events(text: str) -> Iterator[yaml.Event]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    yield from yaml.parse(text, Loader=loader)


def _place(event: yaml.Event) -> tuple[int, int]:
    mark = event.start_mark
    return (1, 1) if mark is None else (mark.line + 1, mark.column + 1)


def _empty(event: yaml.NodeEvent) -> str | list[Node] | dict[str, Node]:
    if isinstance(event, yaml.ScalarEvent):
        return str(event.value)
    return {} if isinstance(event, yaml.MappingStartEvent) else []


def _key(file: str, event: yaml.NodeEvent, parent: _Frame, problems: list[Problem]) -> None:
    line, column = _place(event)
    if not isinstance(event, yaml.ScalarEvent):
        raise _Stop(line, column, "a key must be text", "write `key: value`")
    key = str(event.value)
    if key in parent.node.keys:
        first = parent.node.keys[key][0]
        problems.append(
            _at(
                file,
                line,
                column,
                f"the key is already set on line {first}",
                "keep one of the two",
                dotted((*parent.path, key)),
            )
        )
        parent.skip = True
    else:
        parent.node.keys[key] = (line, column)
    parent.key = key


def _attach(parent: _Frame | None, node: Node) -> Path:
    if parent is None:
        return ()
    if isinstance(parent.node.value, list):
        parent.node.value.append(node)
        return (*parent.path, len(parent.node.value) - 1)
    key = parent.key or ""
    parent.key = None
    if parent.skip:
        parent.skip = False
    elif isinstance(parent.node.value, dict):
        parent.node.value[key] = node
    return (*parent.path, key)
