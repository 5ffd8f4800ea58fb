"""The cells of a canvas, and what their columns and rows are called."""

CELLS = 8  # along a side of a whole canvas
COLUMNS, ROWS = tuple("ABCDEFGH"), tuple("STUVWXYZ")  # from the left and from the top
