"""Whose checkpoint it is, and what its quantization block says. JSON ends here.

detect.py               FormatDetector: which quantization format, on what evidence
quant_methods.py        quantization methods by name, and what to do with each
json_file.py            a JSON file, or the fault that says why it can't be read
json_object.py          typed access to one JSON object; faults name their JSON path
quantization_config.py  QuantizationConfig: the block as frozen values
reader.py               CompressedTensorsConfigReader: JSON to QuantizationConfig
groups.py               the `config_groups` key
arguments.py            the arguments of weights, inputs and outputs
presets.py              scheme names such as W4A16
sparsity_config.py      the `sparsity_config` and `moe_sparsity_config` keys
transform_config.py     the `transform_config` key
match.py                which group a module belongs to, by the rules of the library
recipe.py               names of the modifiers in `recipe.yaml`
hf_config.py            config.json of a converted directory
mistral_params.py       params.json of Mistral's own form as a config.json
"""
