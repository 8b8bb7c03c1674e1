"""Pure functions on tensors: bit layouts, small floats, scales. They know neither names nor configurations.

packing.py      integer codes in their containers: pack, unpack, repack
floats.py       E2M1, E2M3 and E8M0 by their bits
e4m3.py         E4M3 scales times a power of two
scales.py       scales and zero points, and the arithmetic of dequantization
rounding.py     rounding to a narrow float exactly once
folds.py        transforms folded into a weight
rotary_rows.py  the two orders of the rows of queries and keys
bitmasks.py     one bit for each element: which values are stored
marlin_24.py    the arrangement of Marlin's 2:4 sparse kernel
raw_bytes.py    the bytes of small tensors, read without torch
loops/          the same functions as compiled loops, and what makes and runs these
"""
