"""Any Hugging Face causal language model, made adaptive: `adapt(model, steps=4)`."""

from .._extras import need

need("transformers", "hf")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from .backbone import AdaptiveBackboneOutput as AdaptiveBackboneOutput  # noqa: E402
from .cache import AdaptiveCache as AdaptiveCache  # noqa: E402
from .calibration import Calibration as Calibration  # noqa: E402
from .calibration import OutOfReach as OutOfReach  # noqa: E402
from .calibration import calibrate as calibrate  # noqa: E402
from .config import AdaptiveConfig as AdaptiveConfig  # noqa: E402
from .ends import Head as Head  # noqa: E402
from .manager import AdaptiveBatchingManager as AdaptiveBatchingManager  # noqa: E402
from .manager import AdaptiveGenerationOutput as AdaptiveGenerationOutput  # noqa: E402
from .model import AdaptiveForCausalLM as AdaptiveForCausalLM  # noqa: E402
from .model import AdaptiveOutput as AdaptiveOutput  # noqa: E402
from .retrofit import adapt as adapt  # noqa: E402
from .retrofit import load_gates as load_gates  # noqa: E402
from .scoring import scorer as scorer  # noqa: E402
from .traces import traces as traces  # noqa: E402

AutoConfig.register(AdaptiveConfig.model_type, AdaptiveConfig, exist_ok=True)
AutoModelForCausalLM.register(AdaptiveConfig, AdaptiveForCausalLM, exist_ok=True)
# By this table a `Trainer` with label smoothing knows that labels are the next tokens.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[AdaptiveConfig.model_type] = AdaptiveForCausalLM.__name__
