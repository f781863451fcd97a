"""Tests of `torch_impl` on GPUs that are not there: `make test-cuda`."""
