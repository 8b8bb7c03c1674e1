"""The plan of an engine-build checkpoint, the directory that `trtllm-build` reads.

It has one file for each rank, with the names and layouts of the TensorRT backend.

choice.py      which mode the engine gets, which modules stay plain, and what is refused
layout.py      where a module of the model is in the engine: stage, layer, name and the Linear that it is a part of
rounding.py    which tensors are rounded to the model's dtype
tensors.py     which tensors a module delivers, and which operation makes each
ranks.py       the pieces of each module that the ranks get, and their places in the files
directory.py   plans a directory: the mode first, then the pieces of all ranks and config.json
cache.py       the scale of the KV cache of each layer
config.py      config.json
options.py     what builder and run need beside the directory
rope.py        the rotary embedding in config.json
"""
