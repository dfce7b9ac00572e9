"""YAML that people wrote, or somebody else: aliases are followed, but not without bound."""

from typing import Any

import yaml

MAX_NODES = 20_000  # values, aliases followed; the largest file of ours has some hundred


def load_yaml(text: str) -> Any:
    """The plain values in a YAML text. Raises yaml.YAMLError, also where aliases make too much of it, or a circle.

    A few lines of aliases, or of `<<` merges, would otherwise stand for more values than fit into memory.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MAX_NODES:
            raise yaml.YAMLError(f"it stands for more than {MAX_NODES:,} values, its aliases followed")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values `node` stands for; each node is visited once."""
    if id(node) in sizes:
        if not (size := sizes[id(node)]):
            raise yaml.YAMLError(f"an alias leads back to itself{node.start_mark}")
        return size
    sizes[id(node)] = 0  # not known yet
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
    sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(node)]
