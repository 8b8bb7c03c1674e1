"""Detect the format of a checkpoint and read its quantization block. Other folders get values, not the block's JSON.

detect.py               FormatDetector: which quantization format a directory holds, and the evidence for it
quant_methods.py        quantization methods by name, and what to do with each
json_file.py            read a JSON file, or say why it can't be read
json_object.py          typed access to one JSON object; faults name their JSON path
quantization_config.py  QuantizationConfig: the quantization block as frozen values
reader.py               CompressedTensorsConfigReader: JSON to QuantizationConfig
groups.py               the `config_groups` key
arguments.py            the quantization arguments of weights, inputs and outputs
presets.py              scheme names such as W4A16
sparsity_config.py      the `sparsity_config` and `moe_sparsity_config` keys
transform_config.py     the `transform_config` key
model_values.py         types and bounds of the values in config.json
not_finite.py           its numbers that are not finite
match.py                which group a module belongs to, by the rules of the compressed-tensors library
patterns.py             match `re:` patterns in bounded time
recipe.py               the names of the modifiers in `recipe.yaml`
hf_config.py            the config.json of a converted directory
spellings.py            the older names of keys that transformers 5 renamed
rope_spellings.py       the same for rotary embeddings
tokenizer_config.py     the tokenizer_config.json of a converted directory
mistral_params.py       convert params.json of Mistral's own form to a config.json
"""
