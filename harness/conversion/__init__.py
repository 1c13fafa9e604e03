"""BLOOM checkpoints between the files that Megatron-DeepSpeed trains in and those that transformers reads."""
