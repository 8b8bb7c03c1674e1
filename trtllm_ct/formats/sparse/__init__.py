"""Sparse tensors: several stored pieces make one dense tensor, whatever weight format that has.

pieces.py         which stored tensors are pieces of a sparse one, and the table of sparse formats
base.py           the contract of a sparse format
bitmask.py        `sparse-bitmask`: the values that are not zero, and one bit for each element
bitmask_24.py     `sparse-24-bitmask`: two values of each four columns, and one bit for each element
compressed_io.py  save_compressed and load_compressed: sparse files without a model
"""
