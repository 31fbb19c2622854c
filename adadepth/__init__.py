"""adadepth: composable primitives of adaptive depth. Each token decides how often a block is applied to it."""

from . import diagnostics as diagnostics
from . import ranks as ranks
from . import testing as testing
from .attention.adapters import CausalEncoder as CausalEncoder
from .attention.adapters import Pointwise as Pointwise
from .attention.apart import RowPerToken as RowPerToken
from .attention.context import iteration as iteration
from .attention.context import positions as positions
from .attention.context import rows as rows
from .attention.context import take as take
from .attention.view import TokenView as TokenView
from .budget import DepthBudget as DepthBudget
from .cache.kv_reuse import KVReuseCache as KVReuseCache
from .calibration import Calibration as Calibration
from .calibration import OutOfReach as OutOfReach
from .calibration import calibrate as calibrate
from .criteria import ConvergenceGate as ConvergenceGate
from .criteria import EntropyGate as EntropyGate
from .criteria import KLGate as KLGate
from .criteria import MarginGate as MarginGate
from .criteria import MaxProbGate as MaxProbGate
from .depths import geometric_depths as geometric_depths
from .depths import uniform_depths as uniform_depths
from .flops import Cost as Cost
from .flops import Flops as Flops
from .flops import TokenFlops as TokenFlops
from .gates import Gate as Gate
from .gates import LinearGate as LinearGate
from .gates import PerIterationMLPGate as PerIterationMLPGate
from .gates import SharedMLPGate as SharedMLPGate
from .loop.trace import Output as Output
from .loop.trace import Trace as Trace
from .loop.wrapper import RecurrentWrapper as RecurrentWrapper
from .losses import BottomKPenalty as BottomKPenalty
from .losses import LossGain as LossGain
from .losses import depth_prior as depth_prior
from .losses import expected_depth as expected_depth
from .losses import loss_gain as loss_gain
from .losses import per_iteration_loss as per_iteration_loss
from .losses import ponder_cost as ponder_cost
from .losses import random_depth as random_depth
from .masks import depth_mask as depth_mask
from .masks import is_monotonic as is_monotonic
from .masks import live_share as live_share
from .masks import make_monotonic as make_monotonic
from .masks import mask_depth as mask_depth
from .rules import ACT as ACT
from .rules import Lookahead as Lookahead
from .rules import NotBefore as NotBefore
from .rules import Rule as Rule
from .rules import Survival as Survival
from .rules import SurvivalThreshold as SurvivalThreshold
from .rules import Threshold as Threshold
from .rules import TrainingOnly as TrainingOnly
from .selection import bottom_k as bottom_k
from .selection import top_k as top_k
from .testing import check_block as check_block
from .testing import check_looped as check_looped
from .updates import InputInjection as InputInjection
from .updates import Interpolate as Interpolate
from .updates import Ponder as Ponder
from .updates import Replace as Replace
from .updates import Residual as Residual
from .updates import ReZero as ReZero
from .updates import SurvivalScaled as SurvivalScaled
from .updates import Ungated as Ungated
from .updates import Update as Update

__version__ = "0.1.0"

# What is public; the rooms of the machinery are not.
__all__ = [
    "ACT",
    "BottomKPenalty",
    "Calibration",
    "CausalEncoder",
    "ConvergenceGate",
    "Cost",
    "DepthBudget",
    "EntropyGate",
    "Flops",
    "Gate",
    "InputInjection",
    "Interpolate",
    "KLGate",
    "KVReuseCache",
    "LinearGate",
    "Lookahead",
    "LossGain",
    "MarginGate",
    "MaxProbGate",
    "NotBefore",
    "OutOfReach",
    "Output",
    "PerIterationMLPGate",
    "Pointwise",
    "Ponder",
    "ReZero",
    "RecurrentWrapper",
    "Replace",
    "Residual",
    "RowPerToken",
    "Rule",
    "SharedMLPGate",
    "Survival",
    "SurvivalScaled",
    "SurvivalThreshold",
    "Threshold",
    "TokenFlops",
    "TokenView",
    "Trace",
    "TrainingOnly",
    "Ungated",
    "Update",
    "bottom_k",
    "calibrate",
    "check_block",
    "check_looped",
    "depth_mask",
    "depth_prior",
    "diagnostics",
    "expected_depth",
    "geometric_depths",
    "is_monotonic",
    "iteration",
    "live_share",
    "loss_gain",
    "make_monotonic",
    "mask_depth",
    "per_iteration_loss",
    "ponder_cost",
    "positions",
    "random_depth",
    "ranks",
    "rows",
    "take",
    "testing",
    "top_k",
    "uniform_depths",
]


def __dir__() -> list[str]:
    return __all__
