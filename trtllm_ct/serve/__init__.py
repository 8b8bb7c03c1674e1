"""Inside TensorRT-LLM: `LLM`, `install()`, `prepare()`, and what runs in the engine's workers.

llm.py             LLM and SamplingParams: the engine's, or the reference engine's
installation.py    install(): the engine's own LLM loads compressed-tensors
prepare.py         prepare(): a directory to give to the engine's LLM
hub.py             Hugging Face repositories by id
bindings.py        the one file that imports TensorRT-LLM
features.py        what an installed engine can do
patch_switch.py    the switch that keeps this package out of the engine's modules
llm_arguments.py   the arguments that the engine's LLM gets
sidecar.py         the small directory that the engine is given in place of a checkpoint
cache.py           where sidecars lie, and how unused ones are removed
leases.py          locks that say which process uses a sidecar
listing.py         sidecars as `trtllm-ct cache list` shows them
session.py         what the loaders of one model share
rank_weights.py    everything that one rank is handed
completeness.py    what the engine reads in each mode, and the proof that all of it was delivered
model_check.py     whether the engine built the model that was planned
load_report.py     what one rank was given, and what that took
additive_zeros.py  the Linear for asymmetric int4
"""
