"""Loading models from the hub or a folder.

Weights are read from safetensors only, and no code that comes with a model is ever run.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from guardloop.core.errors import GuardLoopError

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft still asks by the old name

log = logging.getLogger("guardloop")
SENTENCE = "Please write a short letter to my neighbours about the garden fence."
NO_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
for _function in (torch.cos, torch.sin, torch.exp, torch.log, torch.sqrt, torch.tanh, torch.erf):
    # where several threads make a process's first call of one, MKL may give some three digits (pytorch#188792)
    _function(torch.ones(1))


def pick_device() -> torch.device:
    """The device to compute on: a GPU where there is one (CUDA_VISIBLE_DEVICES hides it)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(device: torch.device) -> torch.dtype:
    """The number format of the weights: bfloat16 where matrix products in it are native, else float16 on a GPU and
    float32 on a CPU.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice: for torch, or for CUDA and its libraries, which say so in words alone."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """The tokenizer of a located model. Raises GuardLoopError if it cannot be had.

    Warns of one that spells: a model that learnt words runs on letters, and quietly does everything worse.
    """
    tokenizer = _from_pretrained(AutoTokenizer, model, revision)
    try:
        tokens = len(tokenizer.encode(SENTENCE, add_special_tokens=False))
    except Exception as error:
        raise _explain(error, model) from error
    if tokens > 0.8 * len(SENTENCE):
        log.warning(
            "%s: its tokenizer makes %d tokens of %d characters of English, as one does that was converted badly; "
            "take the tokenizer's files from whoever made the model",
            model,
            tokens,
            len(SENTENCE),
        )
    return tokenizer


def load_causal_lm(
    model: str, revision: str | None, dtype: torch.dtype, device: torch.device, quantization: str = "none"
) -> Any:
    """A causal language model in eval mode on `device`. Raises GuardLoopError if it cannot be had."""
    _check_kernels(model, _from_pretrained(AutoConfig, model, revision))
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if in_bits := quantization in ("int8", "nf4"):
        options["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if quantization == "int8"
            else BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_use_double_quant=True,
            )
        )
        options["device_map"] = {"": device}
    loaded = _from_pretrained(AutoModelForCausalLM, model, revision, **options)
    return (loaded if in_bits else loaded.to(device)).eval()


def _from_pretrained(factory: Any, model: str, revision: str | None, **options: Any) -> Any:
    try:
        return factory.from_pretrained(model, revision=revision, trust_remote_code=False, **options)
    except Exception as error:
        raise _explain(error, model) from error


def _check_kernels(model: str, config: Any) -> None:
    """A config.json may name compiled code of the hub, which transformers would fetch and run."""
    for kind in ("attn_implementation", "experts_implementation"):
        if "/" in (named := str(getattr(config, f"_{kind}", None))):
            raise GuardLoopError(
                f"{model}: its config.json asks for the code of {named[:80]!r} as its {kind}",
                f"take {kind} out of it, after finding out who wrote it",
            )


def _explain(error: Exception, model: str) -> GuardLoopError:
    """What a failed download or load means for the person who asked for it."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < 10:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    names = {type(e).__name__ for e in chain}
    text = " ".join(str(e) for e in chain)
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if "GatedRepoError" in names or "trying to access a gated repo" in text:
        return GuardLoopError(
            f"{model}: access to this gated model was refused",
            f"accept its licence at huggingface.co/{model}, then set HF_TOKEN to a token of that account",
        )
    if names & {"RepositoryNotFoundError", "RevisionNotFoundError"} or "is not a valid model identifier" in text:
        return GuardLoopError(f"{model}: the hub has no such model or revision", "check the id and the revision")
    if Path(model).is_dir():
        return GuardLoopError(f"{model}: not a loadable model: {reason}", "check the folder's files")
    if "safetensors" in text and "no file named" in text.lower():
        return GuardLoopError(f"{model}: has no safetensors weights", "choose a revision that has them")
    return GuardLoopError(
        f"{model}: could not be loaded from the hub: {reason}",
        "check the network and the id, or give a local folder; without a hub use configs/demo.yaml",
    )


def _cpu_has_bf16() -> bool:
    """Whether bfloat16 is native here, and torch may use it (ATEN_CPU_CAPABILITY=avx2 says no)."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
