"""How long a request's prompt is, before an engine has seen it.

Routing needs the number of prompt tokens; the model's own tokenizer gives it. Where that cannot be had, the number is
estimated from the characters. An estimate makes promises less exact, it does not fail requests: the engine counts for
itself.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

CHARACTERS_A_TOKEN = 4.0
TEMPLATE_TOKENS = 16
GUESSED_CONTEXT = 4096
_logger = logging.getLogger("slos_serve.ray_serve")


class PromptCounter:
    """Counts prompt tokens of completion and chat requests.

    Args:
        tokenizer: of the model, as ``transformers`` has it; ``None`` estimates.
    """

    def __init__(self, tokenizer: Any | None = None) -> None:
        self._tokenizer = tokenizer
        self._failed = False

    @classmethod
    def of_model(cls, model: str, trust_remote_code: bool = False) -> PromptCounter:
        """With the model's tokenizer where it can be loaded."""
        try:
            from transformers import AutoTokenizer  # noqa: PLC0415 - takes seconds, and only an ingress needs it

            return cls(AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code))
        except Exception:
            _logger.exception("slos-serve: no tokenizer for %s; prompt lengths are estimated", model)
            return cls()

    def prompt_tokens(self, body: Any) -> int:
        """Of a request as the OpenAI API has it; at least 1.

        Args:
            body: with ``messages``, or with ``prompt``: text, token ids, or a list of either.
        """
        messages = getattr(body, "messages", None)
        if messages is not None:
            return max(self._chat_tokens(messages, getattr(body, "tools", None)), 1)
        return max(self._completion_tokens(getattr(body, "prompt", None)), 1)

    def _chat_tokens(self, messages: Sequence[Any], tools: Sequence[Any] | None) -> int:
        plain = [_plain(message) for message in messages]
        if self._tokenizer is not None:
            try:
                made = self._tokenizer.apply_chat_template(
                    plain,
                    tools=None if tools is None else [_plain(tool) for tool in tools],
                    add_generation_prompt=True,
                    tokenize=True,
                )
                return len(made["input_ids"] if isinstance(made, Mapping) or hasattr(made, "input_ids") else made)
            except Exception:
                self._say_once()
        return sum(self._text_tokens(_text_of(message.get("content"))) + TEMPLATE_TOKENS for message in plain)

    def _completion_tokens(self, prompt: object) -> int:
        if isinstance(prompt, str):
            return self._text_tokens(prompt)
        if isinstance(prompt, Sequence):
            if all(isinstance(item, int) for item in prompt):
                return len(prompt)
            return sum(self._completion_tokens(item) for item in prompt)
        return 1

    def _text_tokens(self, text: str) -> int:
        if self._tokenizer is not None:
            try:
                return len(self._tokenizer.encode(text))
            except Exception:
                self._say_once()
        return int(len(text) / CHARACTERS_A_TOKEN) + 1

    def _say_once(self) -> None:
        if not self._failed:
            self._failed = True
            _logger.exception("slos-serve: a prompt could not be tokenized; its length is estimated")


def context_tokens(model: str, trust_remote_code: bool = False) -> int:
    """Longest context of a model by its configuration; a guess where that cannot be read."""
    try:
        from transformers import AutoConfig  # noqa: PLC0415 - takes seconds, and only an ingress needs it

        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        return int(config.get_text_config().max_position_embeddings)
    except Exception:
        _logger.exception("slos-serve: the context length of %s cannot be read; %d is assumed", model, GUESSED_CONTEXT)
        return GUESSED_CONTEXT


def _plain(item: Any) -> dict[str, Any]:
    return dict(item) if isinstance(item, Mapping) else dict(item.model_dump(exclude_none=True))


def _text_of(content: object) -> str:
    """The text of a message's content, which may be parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return ""
