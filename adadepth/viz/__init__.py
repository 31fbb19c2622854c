"""Pictures of a trace: text coloured by depth, plots, and the page that holds them.

Texts and pages are strings of HTML that load nothing from the network and need no further package. `terminal` needs
rich, and the plots need matplotlib; both come with the extra `viz`. Depths are those of a trace: `trace.depth`, 0 at
padding.
"""

from .heat import heat_map as heat_map
from .heat import pieces as pieces
from .heat import terminal as terminal
from .pages import page as page
from .pages import table as table
from .plots import plot_curves as plot_curves
from .plots import plot_exits as plot_exits
from .plots import plot_frontier as plot_frontier
from .plots import plot_needed as plot_needed
from .vector import svg as svg
