"""Which modules a model has: by tables of model families, filled in with the sizes in a config.json, or by its files.

families.py        the tables: Linears, norms and experts of a layer, and what the engine fuses
class_defaults.py  what a config.json leaves out, by the classes of transformers
sizes.py           the sizes in a config.json, under the names that the tables use
class_row.py       ClassRow: how a model class of the engine reads the modules of a layer, whatever their sizes
class_rows.py      the rows, one for each class without tables of its family
decoder_rows.py    the rows of decoders with attention, experts and Mamba layers
row_defaults.py    what a config.json of such a class leaves out
discovery.py       the modules of a model without tables, found in its files
alike_layers.py    finds what such a model has lost, by comparing its layers with each other
site.py            Site: one module of a model
expert_spellings.py  how classes store routed experts: under which names, or stacked
sites.py           Model: the modules of one model, with their sizes
build_classes.py   how the classes of the TensorRT backend name the modules of a model
fused_experts.py   splits 3-D tensors that hold all experts of a layer
mistral_names.py   renames the modules of Mistral's own form
wrapper_names.py   renames the modules of a model with several parts to what the engine's class reads
"""
