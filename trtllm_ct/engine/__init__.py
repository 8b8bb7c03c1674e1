"""Facts about TensorRT-LLM, each with its source. The engine is never imported here.

releases.py      the supported release lines, oldest first
model_classes.py  the model classes of each release, and the names that those with several parts read
platform.py      the release and the SM of the GPUs that a plan is made for
linear_mode.py   what an entry of the table of modes says
build_mode.py    what an entry of the table of engine-build modes says
build_modes.py   the modes of an engine-build checkpoint, with every tensor of their Linears
modes.py         one table: what the Linear of each QuantAlgo holds, and since which release it exists
kernels.py       whether the kernel of a mode exists on a platform, and adds a bias there
slices.py        which slice of a weight each rank gets, and whether a kernel accepts it
holdings.py      which modes hold a weight exactly, and why the others do not
target.py        the targets, and the modes that each has by the release that it is planned for
parallel.py      sizes of tensor, pipeline and expert parallelism, and the place of one rank
quant_config.py  the engine's QuantConfig as a frozen value
calibration.py   the static scales of inputs, measured on a text
requantization.py what a weight may be rounded to on request, with its price
"""
