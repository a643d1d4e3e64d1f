"""Tests of `cloq.initializers`."""
