"""Pictures of samples, of their paths and of their quality, without pyplot or global state.

Every function returns a matplotlib Figure of 100 dots per inch, which notebooks show, and saves it
if it is given a path. Only :func:`animation` just writes a file, a GIF.
"""

from .curves import quality_curve
from .images import animation, image_grid, trajectory_grid
from .paths import flow_lines, trajectory_plot
from .plane import equipotentials, field_lines

__all__ = [
    "animation",
    "equipotentials",
    "field_lines",
    "flow_lines",
    "image_grid",
    "quality_curve",
    "trajectory_grid",
    "trajectory_plot",
]
