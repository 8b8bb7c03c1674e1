"""Run the stages in order, from a directory to delivered tensors in memory. Start reading with open.py.

open.py           detects, reads, catalogs, probes and plans a directory
probing.py        reads the few stored values that decide a mode
calibration.py    reads and writes the static scales of inputs
head_probe.py     compares a stored head with the embeddings that config.json ties it to
payload.py        checks the numbers in scales, zero points and indices
mapper.py         ModuleMapper: runs the plan of one module
weight_mapper.py  CompressedTensorsWeightMapper: the same for tensors of torch
stream.py         loads and maps one module after another, on several threads
fused_scalars.py  checks the scalars that the parts of a fused Linear must share
stacking.py       stacks the plain experts of classes that read them stacked
loader.py         CompressedTensorsWeightLoader: loads the weights of a directory into memory
config_loader.py  the configuration of a checkpoint as the engine's QuantConfig
transformers_class.py  the class of transformers that config.json names, without weights
trials.py         plans of one checkpoint with other options
alternatives.py   other options with which more modules keep their codes
gpus.py           what one GPU needs at common parallel sizes, and what is left of it
inspection.py     inspect_checkpoint: reports what the headers of a directory say
"""
