"""Which modules a model has: tables of model families, filled in with the sizes in a config.json.

families.py        the tables: Linears, norms and experts of a layer, and what the engine fuses
class_defaults.py  what a config.json leaves out, by the classes of transformers
sizes.py           the sizes in a config.json, under the names that the tables use
sites.py           Model and Site: the modules of one model, with their sizes
fused_experts.py   splits 3-D tensors that hold all experts of a layer
mistral_names.py   renames the modules of Mistral's own form
wrapper_names.py   renames the modules of a model with several parts to what the engine's class reads
"""
