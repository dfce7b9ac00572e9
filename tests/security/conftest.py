import sys
from pathlib import Path

import torch

for folder in (".", "feedback", "responses"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
torch.set_num_threads(1)
