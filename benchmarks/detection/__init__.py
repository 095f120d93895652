"""How well both defences do: what each repair leaves of an attack, and what each detector lets through.

`python -m benchmarks.detection CASE --data DATA` measures a case and adds it to `benchmarks/results/CASE.json`; what is
there already, with the same network, split and options, is not measured again, so a run that was broken off goes on.
`python -m benchmarks.detection tables` prints what was measured as the tables of docs/results.md and docs/detection.md,
and writes `detection.csv` beside the cases. DATA is described in CONTRIBUTING.md; faces need none.
"""
