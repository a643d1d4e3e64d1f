"""The numerical core: tensors in, values out. It knows torch, and no file, clock, log or model.

linalg: norms and the damped Cholesky factorization. lowrank: the weighted low-rank solve. drift: what makes up for earlier layers.
packing: codes ↔ a bit stream.
"""
