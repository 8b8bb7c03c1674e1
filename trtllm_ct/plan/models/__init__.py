"""Which modules a model has: by tables of model families, filled in with the sizes in a config.json, or by its files.

families.py        the tables: Linears, norms and experts of a layer, and what the engine fuses
alike_layers.py    what a checkpoint without tables has lost: layers of one kind are alike
class_defaults.py  what a config.json leaves out, by the classes of transformers
sizes.py           the sizes in a config.json, under the names that the tables use
class_row.py       how a class of the engine reads models whose sizes are in the headers
class_rows.py      one such row for each class
decoder_rows.py    those of decoders of attention, experts and Mamba layers
discovery.py       the modules of such a model, found in its files
site.py            Site: one module of a model
expert_spellings.py  how classes store routed experts: under which names, or stacked
sites.py           Model: the modules of one model, with their sizes
fused_experts.py   splits 3-D tensors that hold all experts of a layer
mistral_names.py   renames the modules of Mistral's own form
wrapper_names.py   renames the modules of a model with several parts to what the engine's class reads
"""
