"""GPU kernels, written in Triton. `cloq.quantizers.columns` says what each computes, and has the same in plain torch operations."""
