"""Pictures of a trace: text coloured by depth, plots, and the page that holds them.

Text and pages are strings of HTML that ask nothing of the network and need nothing installed. `terminal` needs
rich, the plots matplotlib; both come with the extra `viz`. Depths are a trace's: `trace.depth`, 0 at padding.
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
