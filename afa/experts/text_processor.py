"""The processor of a pipeline whose prompts may hold images, for prompts of text alone."""

from typing import Any

from transformers import ProcessorMixin


class TextProcessor(ProcessorMixin):
    """A tokenizer in the place of a processor of text and images, such as Qwen3-VL's.

    An ensemble draws from text, so it needs neither the processor's images nor the packages that read them.
    tokenizer:     of the processor
    chat_template: of the processor; None: the tokenizer's own
    """

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None, **options: Any) -> None:
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
        """Tokenize prompts. Raises NotImplementedError for images (editing)."""
        if images is not None:
            raise NotImplementedError(
                "input images (image=, editing) are not supported by an ensemble; leave them out"
            )
        return self.tokenizer([text] if isinstance(text, str) else text, **options)  # one is a batch, too
