"""Compiled loops over CPU memory, each with a slow twin among the tensor functions of the folder above.

dispatch.py      compiled loop or torch operation, chosen for each call
kernels.py       the loops: one pass from stored bytes to delivered ones
machine_code.py  loops as object files, compiled once for a kind of processor
huge_pages.py    memory for results, in huge pages where the kernel gives them
"""
