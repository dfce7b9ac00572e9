"""Strings on their way to a stage: Kubernetes and Kubeflow Pipelines replace `$(NAME)`, `$$` and `{{...}}` in them.

A string with such marks travels percent-encoded behind `%:`, all others as they are.
"""

import re
from typing import Any
from urllib.parse import unquote

MARK = "%:"


def escape(value: Any) -> Any:
    """JSON-ready `value` with every string, keys included, in the form that arrives."""
    if isinstance(value, dict):
        return {escape(name): escape(part) for name, part in value.items()}
    if isinstance(value, list):
        return [escape(part) for part in value]
    if isinstance(value, str) and (value.startswith(MARK) or re.search(r"\$|\{\{|\}\}", value)):
        return MARK + re.sub(r"[%${}]", lambda found: f"%{ord(found[0]):02X}", value)
    return value


def unescape(value: Any) -> Any:
    """What `escape` was given."""
    if isinstance(value, dict):
        return {unescape(name): unescape(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [unescape(part) for part in value]
    if isinstance(value, str) and value.startswith(MARK):
        return unquote(value.removeprefix(MARK))
    return value
