"""The configuration of an adapted model."""

from typing import Any, ClassVar, final

from transformers import AutoConfig, PretrainedConfig

from .cache import CACHE


@final
class AdaptiveConfig(PretrainedConfig):
    """What an adapted model is made of.

    Attributes: `text_config`, the base's configuration; `steps`; `span`, the looped layers as
    `[start, stop]`, None where the whole backbone is looped; `pieces`, as they were when last saved.
    Raises: `ValueError` if read from a file that holds no adapted model.
    """

    model_type = "adadepth"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [CACHE, "trace", "states"]
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        steps: int = 1,
        span: list[int] | None = None,
        pieces: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        if not isinstance(text_config, PretrainedConfig):
            text_config = AutoConfig.for_model(**(text_config or {"model_type": "gpt_neox"}))
        self.text_config, self.steps, self.span, self.pieces = text_config, steps, span, pieces
        super().__init__(**others)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration in a dictionary."""
        if (kind := config_dict.get("model_type")) != cls.model_type:
            raise ValueError(
                f"Expected the configuration of an adapted model, got one of model_type {kind!r}. Adapt that model: "
                "adapt(AutoModelForCausalLM.from_pretrained(path), steps=...)."
            )
        # Pieces are the model's business, and `update` is a method here.
        pieces = {name: kwargs.pop(name) for name in ("gate", "rule", "update") if name in kwargs}
        made = super().from_dict(config_dict, **kwargs)
        return (made[0], made[1] | pieces) if isinstance(made, tuple) else made
