"""Serving compressed-tensors models in TensorRT-LLM: `LLM`, `install()`, `prepare()`, and the code of its workers.

llm.py             LLM and SamplingParams, of TensorRT-LLM or of the CPU reference engine
installation.py    install(): makes the engine's own LLM load compressed-tensors models
prepare.py         prepare(): returns the directory to pass to the engine's LLM
hub.py             resolves the id of a Hugging Face repository to a directory
bindings.py        the checkpoint loader for TensorRT-LLM; the only file that imports it
features.py        probes what an installed engine can do
patch_switch.py    the environment variable that forbids patching the engine's modules
llm_arguments.py   the arguments to pass to the engine's LLM
sidecar.py         the small directory that the engine gets in place of a checkpoint
cache.py           the directory of sidecars, and the removal of unused ones
leases.py          file locks that mark a sidecar as in use
own_directory.py   whether a prepared directory is what this user made
listing.py         sidecars as `trtllm-ct cache list` shows them
session.py         the state that the config loader and the weight loader of a checkpoint loader share
rank_weights.py    loads all weights of one rank
completeness.py    the tensors that the engine reads in each mode, and the check that all of them were delivered
model_check.py     checks that the engine built the model that was planned
load_report.py     what was loaded for one rank, with time and memory
additive_zeros.py  the Linear method for asymmetric int4
"""
