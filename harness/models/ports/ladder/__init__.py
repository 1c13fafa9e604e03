"""BLOOM made faster step by step: one model whose optimizations, the rungs of a ladder, are switched one by one.

    harness check golden/bloom-tiny/core --candidate bloom:rungs=alibi+layout,dtype=bfloat16

docs/ladder.md says what each rung is worth.
"""
