"""CPU inference engines side by side, each in a process of its own: what ``python -m bench.cpu`` times.

``networks`` makes the models and writes them to files, ``worker`` runs one of ``engines`` in the environment that has it,
``race`` lets all of them take turns, ``report`` says who won. What every worker imports needs Python and numpy only.
"""
