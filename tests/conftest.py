"""What holds for every test."""

import os

# Models compute in float32, as on a processor without bfloat16: figures are then compared closely everywhere. Torch
# reads it when it is first imported, also in processes that tests start.
os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
