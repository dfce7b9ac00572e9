"""Which engine answers: one branch for each kind of responder."""

from guardloop.models.locate import locate
from guardloop.responses.engine import Responder
from guardloop.responses.settings import ResponderSettings


def build_responder(settings: ResponderSettings, load: str | None = None) -> Responder:
    """The engine that `settings` asks for. Raises GuardLoopError if it cannot work here.

    `load` is the folder to load the model from, where the caller has it already; by default it is located.
    """
    if settings.kind == "openai":
        from guardloop.responses.engines.openai import OpenAIResponder  # noqa: PLC0415  (each has its own dependencies)

        return OpenAIResponder(settings)
    if settings.kind == "vllm":
        from guardloop.responses.engines.vllm import VllmResponder  # noqa: PLC0415

        return VllmResponder(settings, load or locate(settings.model))
    from guardloop.responses.engines.transformers import TransformersResponder  # noqa: PLC0415

    return TransformersResponder(settings, load or locate(settings.model))
