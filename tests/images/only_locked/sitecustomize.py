"""Put on PYTHONPATH, this hides from a stage's process what its image lacks: a container without Docker."""

import json
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

FUNCTION = "--function_to_execute"
HIDDEN: set[str] = set()


class WhatTheImageHas(PathFinder):
    """The ordinary finder, blind to what is hidden; who asks for it is told, as in the image, that it is not there."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)


if FUNCTION in sys.orig_argv:
    told = json.loads(Path(os.environ["HIDDEN_FROM_STAGES"]).read_text("utf-8"))
    HIDDEN.update(told[sys.orig_argv[sys.orig_argv.index(FUNCTION) + 1]])
    sys.meta_path = [WhatTheImageHas if finder is PathFinder else finder for finder in sys.meta_path]
