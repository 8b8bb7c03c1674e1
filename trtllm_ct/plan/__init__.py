"""Plan a conversion: decide, from headers alone, what happens to every stored tensor. No weight is read here.

plan.py               Plan, ModulePlan, Delivery: the result, as frozen values with a JSON form
planner.py            make_plan: takes configuration, headers, model and options, and makes every decision
options.py            PlanOptions: target, release, GPUs and everything else that is asked of a plan
stored.py             the stored tensors of each module, as views
expert_names.py       by which spelling routed experts are delivered
gathering.py          the modules of a checkpoint under Hugging Face names, with one module per expert
unlisted.py           tensors that the index does not list: read only where the model lacks them
probe.py              the few stored values that decide a mode
groups.py             which config group a quantized module belongs to
weights.py            the scheme and the format of a quantized module
model_modules.py      plans the modules that the text model's tables name
other_modules.py      plans all other modules
model_dtype.py        the dtype of the model at a target, which engines' kernels must take
assign.py             which mode each module gets, and why it gets no other
whole_model.py        what a model's class asks of all modules together
equalize.py           makes the scalars equal that the parts of a fused Linear must share
deliver.py            which tensors a module delivers, under the engine's names
ops.py                the operations that make delivered tensors
rank_ops.py           the operations that only the files of ranks need
input_scales.py       static scales of inputs that a calibration gives
requantize_ops.py     the operations of modules that are requantized on request
requantize.py         modes for modules that are requantized on request
requantize_choice.py  an option to requantize modules, with its price
requantize_choices.py the options for a model
kv_cache.py           scales of the KV cache
online_transforms.py  transforms that run with the model
tied_head.py          heads that are stored although config.json ties them
row_order.py          the row order of queries and keys in Mistral's own form
unsupported.py        refuses parts of a configuration that are not supported
lost_tensors.py       refuses checkpoints that have lost tensors, if a row does not list them
stated_check.py       refuses checkpoints that lack what their row and config.json state
row_parts_check.py    what a checkpoint lacks by the parts of a layer in its row
checks.py             which checks of completeness ran
class_reads.py        what the engine's class never reads of a delivery, and what it misses
verdict.py            one sentence about a plan, and what costs most
parts.py              the bytes of a model by kind of module
leftovers.py          refuses tensors that belong to no module
attention_output.py   which output projections get an input that attention has quantized at a fixed scale
engine_config.py      the plan as the engine's QuantConfig
engine_names.py       the names under which the engine looks a module up in its configuration
engine_class.py       whether the engine has the class of the model
gpu_warnings.py       warns of what an engine computes wrongly on some GPUs
served_gpus.py  on which GPUs a release has all modes of a plan
producers.py          writers that are known to store wrong numbers
engine_files/         engine-build checkpoints: a file for each rank, in the names of the TensorRT backend
models/               which modules a model has
ranks/                the part of a plan that one rank, or one tile of rows, needs
"""
