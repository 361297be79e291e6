"""YAML files that users write or receive: read in bounded time and memory, without losing a repeated key."""

import unicodedata
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sail_align.extract.errors import UserError
from sail_align.extract.system.files import open_regular

MOST_BYTES = 1 << 20
MOST_DEPTH = 20
MOST_VALUES = 100_000
"""Limit on the values of a file, counted again for each alias. A few lines of aliases stand for billions of them."""
TOO_MUCH = f"got more than {MOST_DEPTH} levels or {MOST_VALUES:,} values, with aliases expanded"

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values.

    Raises:
        UserError: The file cannot be read, is not YAML, exceeds a limit, or contains a repeated key, an invalid value
            or a control character. The message names the line.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"{path} is invalid: got more than {MOST_BYTES:,} bytes. Expected a manifest.")
        text = content.decode("utf-8-sig")
        loader = _Loader(text)
        check = _Check(loader, path)
        check.events(text)
        node = loader.get_single_node()
        if node is None:
            return None
        check.run(node)
        return loader.construct_document(node)
    except OSError as problem:
        raise UserError(f"{path} cannot be read ({problem.strerror}). Correct the path.") from problem
    except (yaml.YAMLError, ValueError) as problem:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(problem).split())}.") from problem


def require_few_values(text: str, path: Path) -> None:
    """Require that YAML of others, which a library reads, exceeds no limit when its aliases are expanded.

    Raises:
        UserError: It does.
        yaml.YAMLError: It is not YAML.
    """
    loader = _Loader(text)
    _Check(loader, path).events(text)
    waiting, number = [(loader.get_single_node(), 0)], 0
    while waiting:
        node, depth = waiting.pop()
        number += 1
        if depth > MOST_DEPTH or number > MOST_VALUES:
            raise UserError(f"{path} is invalid: {TOO_MUCH}. Correct the file.")
        if isinstance(node, yaml.CollectionNode):
            inner = (
                node.value if isinstance(node, yaml.SequenceNode) else [each for pair in node.value for each in pair]
            )
            waiting += [(each, depth + 1) for each in inner]


class _Check:
    """Checks of the nodes of a document, before aliases are expanded and values are constructed."""

    def __init__(self, loader: Any, path: Path):
        self._loader = loader
        self._path = path
        self._values = 0

    def events(self, text: str) -> None:
        """Check the size of a document by its events, before its nodes are composed by recursion.

        Raises:
            UserError: A limit is exceeded.
        """
        depth = 0
        for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_DEPTH or number > 2 * MOST_VALUES:
                self._reject(event, TOO_MUCH)

    def run(self, node: yaml.Node, depth: int = 0) -> None:
        """Check a node and all nodes in it, those of aliases included.

        Raises:
            UserError: A limit is exceeded, or a key or value is invalid.
        """
        self._values += 1
        if depth > MOST_DEPTH or self._values > MOST_VALUES:
            self._reject(node, TOO_MUCH)
        if isinstance(node, yaml.ScalarNode):
            self._value(node)
        elif isinstance(node, yaml.SequenceNode):
            for inner in node.value:
                self.run(inner, depth + 1)
        elif isinstance(node, yaml.MappingNode):
            keys: set[Any] = set()
            for key, value in node.value:
                self.run(value, depth + 1)
                if key.tag == "tag:yaml.org,2002:merge":  # not a key, and explicit keys replace merged ones
                    continue
                self.run(key, depth + 1)
                if isinstance(key, yaml.ScalarNode):
                    name = self._value(key)
                    if not keys.isdisjoint({name, str(name)}):  # 1 and "1" become the same number of a class
                        self._reject(key, f"got the key {key.value[:100]!r} twice, expected it once")
                    keys.update({name, str(name)})

    def _value(self, node: yaml.ScalarNode) -> Any:
        if any(unicodedata.category(character) in {"Cc", "Cs"} for character in node.value if character not in "\t\n"):
            self._reject(node, f"got control characters in {node.value[:100]!a}")
        try:
            return self._loader.construct_object(node)
        except yaml.YAMLError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as problem:
            kind = node.tag.rpartition(":")[2]
            self._reject(node, f"got {node.value[:100]!r}, which is not a valid {kind} ({problem})")

    def _reject(self, node: Any, reason: str) -> NoReturn:
        raise UserError(f"{self._path} is invalid: line {node.start_mark.line + 1}: {reason}. Correct the file.")
