"""Decisions as data: what becomes of every stored tensor. Headers decide; no weight is read here.

plan.py               Plan, ModulePlan, Delivery: the result, printable and as JSON
planner.py            make_plan: configuration, headers, model and target in, every decision out
stored.py             stored tensors by module, as views
gathering.py          the modules of a checkpoint in Hugging Face's names, experts apart
probe.py              the few stored values that decide a mode
weights.py            scheme and format of a quantized module
model_modules.py      modules that the text model's tables name
other_modules.py      all other modules
assign.py             which mode each module gets, and why not another
equalize.py           one scalar for the parts of a fused Linear
deliver.py            which tensors a module delivers, under the engine's names
ops.py                the operations that make delivered tensors
kv_cache.py           scales of the KV cache
online_transforms.py  transforms that run with the model
row_order.py          rows of queries and keys in Mistral's own form
unsupported.py        what is refused by name
leftovers.py          tensors that no module owns
engine_config.py      the plan as the engine's QuantConfig
producers.py          writers that are known for wrong numbers
models/               which modules a model has
ranks/                which part of a plan one rank, or one tile, needs
"""
