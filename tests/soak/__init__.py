"""``python -m tests.soak``: flows of every kind under random faults, with a verdict at the end.

application.py  what the application is told, and what a kind of flow is
bodies.py       its steps
flows.py        its flows, and what should come of each kind
program.py      the same, as ``celery -A`` is given it
monkey.py       which fault strikes when, by a seed
stage.py        the processes: workers and beats, started again whenever they have died
brokers.py      the broker and what can be done to it
databases.py    the database
strikes.py      the faults themselves
customers.py    who starts flows, sends events and cancels
verdict.py      what is wrong, by the events and by a log of what really ran
recovery.py     how long it took until struck work moved again
report.py       what is read for that, and how it is told
run.py          one soak
"""
