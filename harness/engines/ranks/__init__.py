"""Engines of several processes: tensor parallel, pipeline parallel, and both, over torch.distributed.

engine.py    what a user opens: one engine that asks a team of ranks
spawned.py, worker.py    a team of processes on this machine, watched and cleaned up
wire.py, scratch.py   what goes between this process and a rank; where a team writes
outer.py     a team that an outer launcher (torchrun, deepspeed, srun, mpirun) has started
serving.py   what every rank does with a request
rank.py      the model of one rank: its stage of the blocks, its shard of each layer
plans.py, stages.py, groups.py   how layers are cut, which blocks are a stage's, and how ranks talk
evidence.py  what a rank shows of itself: its shapes, whether they hold the checkpoint, checksums of what is shared
"""
