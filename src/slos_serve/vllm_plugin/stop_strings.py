"""Tells an answer that a ``stop`` string ended from one whose client left.

vLLM's front end finds stop strings in the text and aborts the request in the core, as it does when a client leaves. The
core knows the tokens and the stop strings, so the end of the text says which it was. Runs in the telemetry thread: the
tokenizer is loaded with the first request that has stop strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from vllm.logger import init_logger

logger = init_logger("vllm.slos_serve")
# Tokens past the stop that the core may have made before the abort reached it, drafts counted in.
OVERSHOOT_TOKENS = 32


class _Tokenizer(Protocol):
    def decode(self, token_ids: list[int]) -> str: ...


class StopStrings:
    """Looks for stop strings at the end of answers.

    Args:
        model_config: vLLM's, for its tokenizer.
    """

    def __init__(self, model_config: Any) -> None:
        self._model_config = model_config
        self._tokenizer: _Tokenizer | None = None
        self._failed = False

    def load(self) -> None:
        """Load the tokenizer, once; without one no stop string is found, and that is said."""
        if self._tokenizer is not None or self._failed:
            return
        try:
            from vllm.tokenizers import cached_tokenizer_from_config  # noqa: PLC0415

            self._tokenizer = cached_tokenizer_from_config(self._model_config)
        except Exception as error:
            self._failed = True
            logger.warning(
                "slos-serve: no tokenizer in the engine core (%s); answers cut by a stop string count as aborted.",
                error,
            )

    def ended(self, output_token_ids: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether one of the stop strings stands at the end of an answer."""
        self.load()
        if self._tokenizer is None or not stop or not output_token_ids:
            return False
        longest = max(len(text.encode()) for text in stop)
        tail = list(output_token_ids[-(longest + OVERSHOOT_TOKENS) :])
        text = self._tokenizer.decode(tail)
        return any(one in text for one in stop)


def stop_strings_of(request: Any) -> list[str]:
    """Stop strings of a vLLM request; none for pooling."""
    stop = getattr(request.sampling_params, "stop", None)
    if isinstance(stop, str):
        return [stop]
    return list(stop or ())
