"""The configuration of an adapted model."""

from typing import Any, ClassVar, final

from transformers import AutoConfig, PretrainedConfig

from .cache import CACHE

CODE = "modeling_adadepth"  # what transformers loads from a folder that says so, if it is trusted to
AUTO_MAP = {"AutoConfig": f"{CODE}.AdaptiveConfig", "AutoModelForCausalLM": f"{CODE}.AdaptiveForCausalLM"}


@final
class AdaptiveConfig(PretrainedConfig):
    """The configuration of an adapted model.

    Attributes: `text_config`, the base's configuration; `steps`; `span`, the looped layers as `[start, stop]`, None if
    the whole backbone is looped; `pieces`, as they were when last saved. All other attributes are the base's.
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
        self.text_config: Any = text_config
        name = getattr(text_config, "name_or_path", None) or ""
        self.steps, self.span, self.pieces = steps, span, pieces
        super().__init__(**{"name_or_path": name, **others})
        self.auto_map = AUTO_MAP

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: every saved folder already names its classes for `trust_remote_code=True`."""

    def __getattr__(self, name: str) -> Any:
        """Other attributes are the base's: sizes, special tokens, whether weights are tied."""
        if name.startswith("_") or "text_config" not in self.__dict__:
            raise AttributeError(name)
        try:
            return getattr(self.__dict__["text_config"], name)
        except RuntimeError as error:  # of what differs from layer to layer
            raise AttributeError(str(error)) from error

    def _get_generation_parameters(self) -> dict[str, Any]:
        """What of generation's parameters the base's configuration says by mistake."""
        found: dict[str, Any] = self.text_config._get_generation_parameters()
        return found

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The base's configuration, or the part of it that is about text."""
        return self.text_config.get_text_config(*args, **kwargs)

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
