"""Which modules a model has, and how the engine's class reads them: one row for each class.

class_row.py       ClassRow: how a model class of the engine reads the modules of a layer, and which a layer must have
class_rows.py      the rows of all classes, and those of text models inside of larger ones
dense_rows.py      rows of decoders whose layers are attention and one MLP
mixture_rows.py    rows of decoders with routed experts
latent_rows.py     rows of decoders with multi-head latent attention
hybrid_rows.py     rows of decoders with layers of several kinds
gemma4_rows.py     the rows of Gemma 4
llama4_rows.py     the row of Llama 4
own_loader_rows.py  the rows of classes that load their weights themselves
site.py            Site: one module of a model
site_rules.py      makes sites of names and shapes, by the row of the class
sites.py           Model: what planning knows about one model
stated_modules.py  the modules that a model must have by its config.json, where its row has those of a layer
sizes.py           the sizes in a config.json, under the names that rows use
class_defaults.py  what a config.json leaves out, by the classes of transformers
row_defaults.py    what a config.json of a class leaves out whose row lists no modules
discovery.py       the modules of a model, found in its files
shared_attention.py  layers whose values are their keys, or whose keys and values are those of earlier layers
alike_layers.py    finds what such a model has lost, by comparing its layers with each other
layer_parts.py     Part: what a layer of a class has together
part_layers.py     how many layers towers and the stacks of an encoder-decoder have, by config.json
layer_kinds.py     of which kind each layer is, by config.json
model_class.py     what a model class says about the tensors of a checkpoint
plain_tensors.py   the tensors of a checkpoint as plain weights, and as a class spells them
places.py          the prefixes that text models have in checkpoints
expert_spellings.py  how classes store routed experts: under which names, or stacked
bounds.py          numbers of layers and experts, compared with what the files hold
build_classes.py   how the classes of the TensorRT backend name the modules of a model
fused_experts.py   splits 3-D tensors that hold all experts of a layer
mistral_names.py   renames the modules of Mistral's own form
wrapper_names.py   renames the modules of a model to what the engine's class reads
"""
