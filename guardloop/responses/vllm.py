"""The vLLM engine, for GPUs: requests are fed to vLLM's own scheduler as others are done, so that it never runs dry."""

import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from guardloop.errors import GuardLoopError
from guardloop.models import load_tokenizer
from guardloop.responses.chat import ChatRenderer, PromptError
from guardloop.responses.responder import FinishReason, Reply, Request, failure
from guardloop.responses.settings import ResponderSettings

READ_AHEAD = 4  # batches of requests that are handed to vLLM before the first is done


class VllmResponder:
    """Generates with vLLM on this machine's GPU; samples of one prompt share its keys and values (prefix caching)."""

    def __init__(self, settings: ResponderSettings, load: str) -> None:
        self._vllm = _import_vllm()
        revision = None if load != settings.model else settings.revision
        self.name = settings.model
        self.settings = settings
        self.chat = ChatRenderer(load_tokenizer(load, revision), settings.system_prompt, settings.max_prompt_tokens)
        try:
            self._engine = self._vllm.LLM(
                model=load,
                revision=revision,
                tokenizer_revision=revision,
                dtype=settings.dtype,
                load_format="safetensors",
                trust_remote_code=False,
                seed=settings.seed,
                max_model_len=settings.max_prompt_tokens + settings.max_new_tokens,
                max_num_seqs=settings.batch_rows,
                enable_prefix_caching=True,
            ).llm_engine
        except (ValueError, RuntimeError, OSError) as error:
            reason = (str(error) or repr(error)).splitlines()[0]
            raise GuardLoopError(
                f"responder: vLLM cannot serve {load}: {reason}",
                "check the GPU's free memory and that vLLM knows the model, or lower responder.max_prompt_tokens",
            ) from error

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """One reply per request, as they are done. Reads ahead READ_AHEAD batches."""
        pending: dict[str, Request] = {}
        for number, request in enumerate(requests):
            try:
                tokens = self.chat.encode(request.prompt)
            except PromptError as error:
                yield failure(request, str(error))
                continue
            pending[str(number)] = request
            self._engine.add_request(str(number), {"prompt_token_ids": tokens}, self._sampling(request))
            while len(pending) >= READ_AHEAD * self.settings.batch_rows:
                yield from self._step(pending)
        while pending:
            yield from self._step(pending)

    def _sampling(self, request: Request) -> Any:
        settings = self.settings
        return self._vllm.SamplingParams(
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=request.seed,
            stop=[self.chat.stop] if self.chat.stop else None,
            output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )

    def _step(self, pending: dict[str, Request]) -> Iterator[Reply]:
        for output in self._engine.step():
            if output.finished:
                request, answer = pending.pop(output.request_id), output.outputs[0]
                reason: FinishReason = "length" if answer.finish_reason == "length" else "stop"
                yield Reply(request.id, request.sample, answer.text.strip(), reason, len(answer.token_ids))


def _import_vllm() -> Any:
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:
        raise GuardLoopError(
            f"responder.kind: vllm is not usable here: {error}",
            "install guardloop[gpu], or set responder.kind to transformers or openai",
        ) from error
    if not torch.cuda.is_available():
        raise GuardLoopError(
            "responder.kind: vllm needs a GPU, and there is no usable one",
            "run on a GPU, or set responder.kind to transformers or openai",
        )
    return vllm
