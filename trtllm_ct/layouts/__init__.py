"""Pure functions on numpy arrays: bit layouts, small floats, scales. They depend on no tensor names or configurations.

packing.py      pack, unpack and repack integer codes
floats.py       convert E2M1 and E2M3 bit patterns to numbers and back
e2m1.py         round to E2M1, with the squared error
e4m3.py         multiply E4M3 scales by a power of two, and round to E4M3
scales.py       scales, zero points and dequantization
rounding.py     round to a narrow float exactly once
requantize.py   quantize weights again, with the best scales
requantize_int4.py  the same for int4 weights, without dequantizing them
requantize_int4_tables.py  what is computed once for each kind of group of int4 codes
folds.py        multiply a transform (a square matrix) into a weight
rotary_rows.py  convert between the two row orders of query and key weights
bitmasks.py     bitmasks of sparse matrices: one bit per element says whether its value is stored
mixed_gemm.py   the order of codes that the engine's kernel for narrow weights reads
marlin_24.py    the permuted layout of Marlin's 2:4 sparse kernel
stored_array.py tensors as numpy arrays, with the numbers of dtypes that numpy lacks
torch_tensors.py  tensors of torch over the memory of arrays, and arrays over that of tensors
raw_bytes.py    read the bytes of small tensors without numpy
loops/          compiled loops for repacking and dequantization, and the code that compiles and selects them
"""
