"""Damaged and hostile files, made by the thousand: whatever reads them must refuse them or use them, within limits.

`targets.TARGETS` is the table: a row for each kind of file. `harness` runs inputs in a process that may die, `mutate`
changes bytes, JSON, YAML, tars, zips and records, `run.py` is the command:

    python tests/fuzz/run.py --seconds 600 --targets npz tar

No library makes the inputs. What finds faults in formats with checksums is a mutator that knows the format and repairs
its checksum; what hangs, eats memory or crashes has to run in another process, which a search inside the interpreter
(hypothesis) does not do. What is left, a seeded generator and the removal of what a failure does not need, is short.

Input `number` of a target depends on the seed and on this code alone, so a finding is repeated by its number. Half of
the inputs, until they are used up, are hand-made: known attacks, then each value of a good JSON or YAML file replaced
by each of a list of odd values. The others are good files changed at random.
"""
