"""Sparse tensors: a dense tensor of any weight format, stored as several pieces.

pieces.py         finds the stored tensors that are pieces of a sparse tensor; the table of sparse formats
base.py           the interface of a sparse format
bitmask.py        `sparse-bitmask`: the nonzero values, and one bit per element
bitmask_24.py     `sparse-24-bitmask`: two values of each four columns, and one bit per element
compressed_io.py  `save_compressed`, `load_compressed` and so on: read and write sparse files without a model
"""
