"""The vLLM engine, for GPUs: requests are fed to vLLM's own scheduler as others are done, so that it never runs dry.

vLLM computes in a process of its own, so reading, tokenising and writing here cost it no time. Samples of one prompt
share its keys and values (prefix caching). Each response has its own seed; a GPU's rounding depends on what else is
in the batch, though, and can tip a token.
"""

import importlib
import logging
import os
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

import torch

from guardloop.core.errors import GuardLoopError, first_line
from guardloop.models.loading import load_tokenizer
from guardloop.responses.chat import ChatRenderer, PromptError
from guardloop.responses.engine import TOP_P, FinishReason, Reply, Request, failure
from guardloop.responses.settings import ResponderSettings

log = logging.getLogger("guardloop")
READ_AHEAD = 2  # batches handed to vLLM before the first is done: one is computed, one waits
# The older runner of vLLM 0.22 launches a kernel per seeded request and step; this one draws them all in one.
SEEDED_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


class VllmResponder:
    """Generates with vLLM on this machine's GPU. Raises GuardLoopError if it cannot serve the model."""

    def __init__(self, settings: ResponderSettings, load: str, **options: Any) -> None:
        """`options` go to vllm.LLM as they are."""
        self._vllm = _import_vllm()
        revision = None if load != settings.model else settings.revision
        self.name = settings.tag
        self.settings = settings
        self.chat = ChatRenderer(
            load_tokenizer(load, revision), settings.system_prompt, settings.max_prompt_tokens, settings.prefill
        )
        own = {
            "model": load,
            "revision": revision,
            "tokenizer_revision": revision,
            "dtype": "auto",
            "load_format": "safetensors",
            "trust_remote_code": False,
            "max_model_len": settings.max_prompt_tokens + settings.max_new_tokens,
            "enable_prefix_caching": True,
        }
        try:
            self.llm = self._start({**own, **options})
        except (ValueError, RuntimeError, OSError) as error:
            reason = first_line(error)
            raise GuardLoopError(
                f"responder {settings.tag}: vLLM cannot serve {load}: {reason}",
                "check the GPU's free memory and that vLLM knows the model, or lower its max_prompt_tokens",
            ) from error
        self._engine = self.llm.llm_engine
        self._most_pending = READ_AHEAD * self._engine.vllm_config.scheduler_config.max_num_seqs
        self._numbers = count()

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """One reply per request, as they are done. Reads ahead READ_AHEAD batches."""
        pending: dict[str, Request] = {}
        before, tokens = "", list[int]()
        try:
            for request in requests:
                number = str(next(self._numbers))
                try:
                    if request.prompt != before or not tokens:  # the samples of one prompt follow each other
                        before, tokens = request.prompt, []
                        tokens = self.chat.encode(request.prompt)
                    prompt = self._vllm.inputs.tokens_input(tokens)
                    self._engine.add_request(number, prompt, self.sampling(request.seed))
                except PromptError as error:
                    yield failure(request, str(error))
                    continue
                except ValueError as error:  # vLLM's own checks, such as of the length or the token numbers
                    yield failure(request, f"vLLM refused the prompt: {error}")
                    continue
                pending[number] = request
                while len(pending) >= self._most_pending:
                    yield from self._step(pending)
            while pending:
                yield from self._step(pending)
        finally:
            if pending:
                self._engine.abort_request(list(pending))

    def sampling(self, seed: int) -> Any:
        """vLLM's parameters of one response."""
        settings = self.settings
        return self._vllm.SamplingParams(
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=TOP_P,
            seed=seed,
            stop=[self.chat.stop] if self.chat.stop else None,
            detokenize=bool(self.chat.stop),  # only a stop text needs each token's text; else it is made at the end
            output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )

    def close(self) -> None:
        """End vLLM's process, which holds the GPU's memory."""
        self._engine.engine_core.shutdown()

    def _start(self, options: dict[str, Any]) -> Any:
        """vLLM with the runner that draws seeded samples fast, if it can run the model."""
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a forked process could not use the GPU
        if SEEDED_RUNNER in os.environ:
            return self._vllm.LLM(**options)
        os.environ[SEEDED_RUNNER] = "1"
        try:
            return self._vllm.LLM(**options)
        except (ValueError, RuntimeError):
            log.warning("vLLM did not start with its newer runner; trying the older one, which is slower with seeds")
            os.environ[SEEDED_RUNNER] = "0"
            return self._vllm.LLM(**options)
        finally:
            del os.environ[SEEDED_RUNNER]

    def _step(self, pending: dict[str, Request]) -> Iterator[Reply]:
        for output in self._take_step():
            request = pending.pop(output.request_id, None) if output.finished else None
            if request:
                yield self._reply(request, output.outputs[0])

    def _take_step(self) -> list[Any]:
        try:
            return list(self._engine.step())
        except Exception as error:
            raise GuardLoopError(
                f"responder {self.name}: vLLM stopped working: {first_line(error)}",
                "look at its log above; what was generated is kept, and a new run goes on from there",
            ) from error

    def _reply(self, request: Request, answer: Any) -> Reply:
        if answer.finish_reason not in ("stop", "length"):
            return failure(request, f"vLLM gave up on the prompt: {answer.finish_reason}")
        reason: FinishReason = answer.finish_reason
        tokens, text = list(answer.token_ids), answer.text
        if not self.chat.stop:
            tokens = tokens[:-1] if reason == "stop" else tokens  # without the token that ended it
            text = self.chat.tokenizer.decode(tokens, skip_special_tokens=True)
        return Reply(request.id, request.sample, (self.chat.prefill + text).strip(), reason, len(tokens))


def _import_vllm() -> Any:
    try:
        vllm = importlib.import_module("vllm")
        importlib.import_module("vllm.inputs")
    except ImportError as error:
        raise GuardLoopError(
            f"kind: vllm is not usable here: {error}",
            "install guardloop[gpu], or set its kind to transformers or openai",
        ) from error
    if not torch.cuda.is_available():
        raise GuardLoopError(
            "kind: vllm needs a GPU, and there is no usable one",
            "run on a GPU, or set its kind to transformers or openai",
        )
    return vllm
