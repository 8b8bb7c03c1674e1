"""Is a checkpoint sound, and does a converted directory hold the same weights?

verify.py         verify_checkpoint, and its report
converted.py      a converted directory against its source, tensor by tensor
fused_scalars.py  the scalars that the parts of one Linear share in a result
"""
