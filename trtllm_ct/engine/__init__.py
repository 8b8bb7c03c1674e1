"""Facts about TensorRT-LLM, each with its source. The engine is never imported here.

releases.py      the lines of releases, oldest first
modes.py         one table: what the Linear of each QuantAlgo holds, and since which release
slices.py        which slice of a weight a rank gets, and whether a kernel takes it
holdings.py      which modes hold a weight exactly, and why the others do not
target.py        the targets, and the modes that each release gives them
parallel.py      tensor, pipeline and expert parallel sizes, and which rank one is
quant_config.py  the engine's QuantConfig as a frozen value
"""
