"""The independent reading of a source: plain numpy, apart from the code that converts.

A conversion is proved by a second reading of its source. This folder is that reading: it shares with the conversion
the headers of files (`checkpoint/`), the configuration with its matching of targets (`config/`) and the vocabulary of
`base/`. It imports nothing of `plan/`, `pipeline/`, `formats/`, `layouts/` and `convert/`; import-linter checks this.
It is written for clearness: each format is decoded as its description says, row by row, in float64.
Source of all formats: compressed-tensors 0.4 to 0.20, and the sources that are named in each file.

files.py       reads rows of tensors from safetensors files
numbers.py     the numbers that bits stand for: small floats, and codes in a stream of bits
rounding.py    rounding of float64 to a narrower float, once
sparse.py      tensors that are stored as a bitmask and the values that are not zero
names.py       the names that modules have in files, and what they mean
modules.py     the modules of a directory by what they mean, with experts apart
unlisted.py    tensors that an index does not list, which a conversion may leave out
schemes.py     the scheme of a module in the configuration
coded.py       rows as codes and scales, and when two are equal without a multiplication
weights.py     a quantized weight: its tensors, scales and zero points
decoders.py    one decoder for each format: the table `DECODERS`
marlin_24.py   the decoder of `marlin-24`
transforms.py  online transforms, applied to the weights beside them
scalars.py     the scales of inputs and of the KV cache that a source promises
"""
