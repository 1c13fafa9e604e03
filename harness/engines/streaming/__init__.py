"""The engine of checkpoints that are larger than memory: one pass over the weights scores a whole suite.

engine.py     what a user opens
files.py      where each tensor lies in its safetensors files, checked before anything is read
preflight.py  what a pass needs of memory and disk, and how long it will take
grouping.py   sequences that go through a block together
skeleton.py   the model without its weights, its parts filled and emptied
reading.py    pieces of the checkpoint, each read while the one before it is computed with
passes.py     the pass: embedding, blocks, last norm, head in slices
spreading.py  prompts shared by ranks, a pass for each
hidden.py     hidden states between two blocks, in memory or in a file, and what a killed run goes on from
"""
