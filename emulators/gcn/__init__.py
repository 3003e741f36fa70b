"""An interpreter of AMD's CDNA2 (gfx90a) and CDNA3 (gfx942) machine code, as clang writes it.

It executes the assembly of a real build on the CPU, from its registers up, and shares nothing with
the sources of the kernels: no layout, no builtin. Semantics are those of AMD's "CDNA2" and "CDNA3
Instruction Set Architecture" reference guides, whose sections the docstrings name. What it does not
know it refuses: see ``Unknown``.

- assembly.py: text into instructions, register set-up, arguments
- operands.py: what an instruction reads and writes
- wave.py: registers and transfers under way of 64 lanes
- scalar.py; vector.py, dpp.py, lanes.py, packed.py, conversions.py; matrix.py; transfers.py,
  buffers.py: the instructions
- memory.py: which bytes may be touched
- machine.py: workgroups, barriers, a launch
- ops.py: the ops of a build

Not modelled: time, and so the wait states that s_nop stands for.
"""
