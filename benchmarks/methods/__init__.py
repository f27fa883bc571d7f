"""The methods of the field as recipes of common parts, and packages, to be compared with."""
