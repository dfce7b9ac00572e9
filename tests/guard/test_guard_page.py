import re

import pytest
from support.models import save_guard
from support.root import ROOT

PAGE = ROOT / "docs" / "guard.md"


def test_the_pages_example_runs(tmp_path, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert '"embedded:guard"' in example
    folder = save_guard(tmp_path / "guard")
    code = example.replace('"embedded:guard"', "GuardSettings(base=FOLDER, min_label_mass=0)")
    from guardloop.guard.settings import GuardSettings

    exec(compile(code, str(PAGE), "exec"), {"GuardSettings": GuardSettings, "FOLDER": str(folder)})
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2
    for line in lines:
        flagged, score, probability = line.split()
        assert flagged == str(float(score) > 0)
        assert float(probability) == pytest.approx(0.5) or (float(probability) > 0.5) == (float(score) > 0)
