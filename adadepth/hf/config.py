"""The configuration of an adapted model."""

from typing import Any, ClassVar, final

from transformers import AutoConfig, PretrainedConfig

from .cache import CACHE

CODE = "modeling_adadepth"  # what transformers loads from a folder that says so, if it is trusted to
AUTO_MAP = {"AutoConfig": f"{CODE}.AdaptiveConfig", "AutoModelForCausalLM": f"{CODE}.AdaptiveForCausalLM"}
# Beside what every configuration has: what this one adds, and what loading writes for the model as a whole.
_OWN = {"text_config", "steps", "span", "pieces", "auto_map", "quantization_config"}


@final
class AdaptiveConfig(PretrainedConfig):
    """The configuration of an adapted model.

    Attributes: `text_config`, the base's configuration; `steps`; `span`, the looped layers as `[start, stop]`, None if
    the whole backbone is looped; `pieces`, as they were when last saved. Attributes that only the base's configuration
    has, such as `output_router_logits`, are read and written there.
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
        name = getattr(text_config, "name_or_path", None) or ""
        of_base = {key: others.pop(key) for key in list(others) if _is_of(text_config, key)}
        # Without text_config, so that the base's attention and rotary parameters stay as they are.
        super().__init__(**{"name_or_path": name, **others})
        self.steps, self.span, self.pieces, self.auto_map = steps, span, pieces, AUTO_MAP
        self.text_config: Any = text_config
        for key in ("_attn_implementation", "_experts_implementation"):
            if (given := getattr(self, key)) is not None:
                of_base[key] = given
        for key, value in of_base.items():
            setattr(text_config, key, value)

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

    def __setattr__(self, name: str, value: Any) -> None:
        """What only the base's configuration has is written there, because the base reads it there."""
        text_config = self.__dict__.get("text_config")
        if text_config is not None and _is_of(text_config, name):
            setattr(text_config, name, value)
        else:
            super().__setattr__(name, value)

    def _get_generation_parameters(self) -> dict[str, Any]:
        """What of generation's parameters the base's configuration says by mistake."""
        found: dict[str, Any] = self.text_config._get_generation_parameters()
        return found

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The base's configuration, or the part of it that is about text."""
        if "text_config" not in self.__dict__:  # transformers asks while this one is made
            return self
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


def _is_of(text_config: PretrainedConfig, name: str) -> bool:
    """Whether an attribute is one of the base's configuration alone."""
    if name in _OWN or name.startswith("_") or hasattr(AdaptiveConfig, name):
        return False
    try:
        return hasattr(text_config, name)
    except RuntimeError:  # it differs from layer to layer
        return True
