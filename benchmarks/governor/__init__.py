"""The governor against everything simpler: simulated worlds, small real runs, and replays of recorded ones.

    python -m benchmarks.governor --tier sim | t1 | replay

`policies` is the protocol that simulator and real runs share, `baselines` and `governed` implement it, `roster` names
every contender, `metrics` judges them. docs/governor_claims.md says what would refute the governor.
"""
