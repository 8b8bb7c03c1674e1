"""Facts about TensorRT-LLM, each with its source. The engine is never imported here.

modes.py         what the Linear of each QuantAlgo holds, and which modes hold a weight
slices.py        which slice of a weight a rank gets, and whether a kernel takes it
releases.py      which modes each line of releases has
target.py        the targets, with the capabilities that each is planned for
parallel.py      tensor, pipeline and expert parallel sizes, and which rank one is
quant_config.py  the engine's QuantConfig as a frozen value
"""
