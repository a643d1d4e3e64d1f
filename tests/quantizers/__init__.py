"""Tests of `cloq.quantizers`."""
