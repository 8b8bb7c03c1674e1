"""Compiled loops over CPU memory; each has a slower equivalent made of numpy operations in the folder above.

dispatch.py      chooses between a compiled loop and numpy operations for each call
kernels.py       the loops: one pass over memory from stored bytes to delivered bytes
machine_code.py  compiles each loop once per processor type, and tries it before it is used
requantize_kernels.py  the loops that quantize weights again
requantize_int4_kernels.py  the loops that quantize int4 weights again, from their codes
requantize_int4_nvfp4_kernels.py  those of them that write NVFP4
lanes.py         operations on SIMD registers that loops call
vectors.py       what these operations are made of
code_cache.py    the object files of compiled loops, kept where only this user can write
huge_pages.py    allocates result arrays, in huge pages where the kernel provides them
"""
