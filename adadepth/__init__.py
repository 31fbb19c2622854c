"""adadepth: composable primitives of adaptive depth. Each token decides how often a block is applied to it."""

from . import testing as testing
from .attention import TokenView as TokenView
from .blocks import CausalEncoder as CausalEncoder
from .blocks import Pointwise as Pointwise
from .blocks import iteration as iteration
from .blocks import positions as positions
from .caches import KVReuseCache as KVReuseCache
from .criteria import ConvergenceGate as ConvergenceGate
from .criteria import EntropyGate as EntropyGate
from .criteria import KLGate as KLGate
from .criteria import MarginGate as MarginGate
from .criteria import MaxProbGate as MaxProbGate
from .gates import Gate as Gate
from .gates import LinearGate as LinearGate
from .gates import PerIterationMLPGate as PerIterationMLPGate
from .gates import SharedMLPGate as SharedMLPGate
from .masks import ACT as ACT
from .masks import Lookahead as Lookahead
from .masks import Rule as Rule
from .masks import Survival as Survival
from .masks import SurvivalThreshold as SurvivalThreshold
from .masks import Threshold as Threshold
from .masks import depth_mask as depth_mask
from .masks import geometric_depths as geometric_depths
from .masks import is_monotonic as is_monotonic
from .masks import live_share as live_share
from .masks import make_monotonic as make_monotonic
from .masks import mask_depth as mask_depth
from .masks import uniform_depths as uniform_depths
from .probe import check_block as check_block
from .selection import bottom_k as bottom_k
from .selection import top_k as top_k
from .trace import Output as Output
from .trace import Trace as Trace
from .updates import InputInjection as InputInjection
from .updates import Interpolate as Interpolate
from .updates import Ponder as Ponder
from .updates import Replace as Replace
from .updates import Residual as Residual
from .updates import ReZero as ReZero
from .updates import SurvivalScaled as SurvivalScaled
from .updates import Ungated as Ungated
from .updates import Update as Update
from .wrapper import RecurrentWrapper as RecurrentWrapper

__version__ = "0.1.0"
