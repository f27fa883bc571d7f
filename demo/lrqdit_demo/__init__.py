"""The demo model of lrqdit, in the folder ``model``: files alone, no code."""
