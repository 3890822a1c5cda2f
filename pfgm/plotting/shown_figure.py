"""A figure that notebooks show. Imported only where matplotlib is needed."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A figure that notebooks show, although it belongs to no pyplot window."""

    def _repr_png_(self) -> bytes:
        """The picture, for IPython."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()
