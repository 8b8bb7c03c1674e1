"""Reports as one self-contained HTML page: pure functions from a document of `--json` and a plan to a string.

pages.py        the pages of inspect, convert, verify and compare
sections.py     their sections: the verdict, what to know first, parts, GPUs, releases
module_map.py   the map of layers and modules, coloured by mode
error_map.py    the map of layers and modules, coloured by the error that verify found
difference_map.py  the map of layers and modules, coloured by how far two directories are apart
state_map.py    what both have in common: states, legend, cells and their details
histogram.py    how many requantized weights have which relative error
grid.py         modules in rows of layers and columns of paths
markup.py       escaped text, numbers that scripts can read, tables
shell.py        puts a body into the template, with style and script
written.py      writes a page to a file
assets/         the template, the style and the script
"""
