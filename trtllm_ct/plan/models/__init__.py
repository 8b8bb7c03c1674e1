"""Which modules a model has: tables of families, filled in with the sizes of a config.json.

families.py       the tables: Linears, norms and experts of a layer, and what the engine fuses
sites.py          Model and Site: a family with the sizes of one model
fused_experts.py  experts that are stored together in 3-D tensors
mistral_names.py  Mistral's own names of modules
"""
