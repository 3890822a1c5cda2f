"""Pictures of samples, of their paths and of their quality, without pyplot or global state.

Every function returns a matplotlib Figure of 100 dots per inch, which belongs to no pyplot window
and which notebooks show. Each has the arguments ``path``, where to save the picture (a name ending
in .png or .jpg; None saves nothing), and ``title``, a line above it. Only :func:`animation` just
writes a file, a GIF.

All raise ImportError without matplotlib, OSError if a picture cannot be written, TypeError for a
tensor of another dtype, and ValueError for another shape, NaN or infinity, or another argument out
of range.
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
