"""Pictures of samples, of the way they came and of how good they are; no pyplot, no global state.

Every function returns a matplotlib Figure of 100 dots per inch and saves it where it is given a
path.
"""

from .curves import quality_curve
from .flows import equipotentials, field_lines, flow_lines, trajectory_plot
from .images import image_grid, trajectory_grid

__all__ = [
    "equipotentials",
    "field_lines",
    "flow_lines",
    "image_grid",
    "quality_curve",
    "trajectory_grid",
    "trajectory_plot",
]
