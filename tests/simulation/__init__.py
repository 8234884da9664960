"""A deterministic simulation of the engine: the real code of store and tasks, driven by a scheduler with a seed.

Workers, sweeps, emitters and API callers are greenlets that stop before and after every transaction; the scheduler
chooses who goes on, which message is delivered, doubled or dropped, who crashes, and how far the clock moves. After
every transaction the invariants of ``invariants.py`` must hold, and once the faults end everything must come to rest.
``mutants.py`` takes the engine's rules away one by one: each must make the simulation fail, or it could not see.

What it cannot see is a statement that is re-checked under an old snapshot: SQLite has one writer. That is tested with
two connections on PostgreSQL (tests/store/test_two_connections.py).
"""
