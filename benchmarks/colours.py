"""Colours and markers of the pictures."""

# Okabe and Ito's colours, told apart by colour-blind readers too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
INK, GRID, GREY = "#1b1f24", "#d5dae0", "#9aa3ad"
