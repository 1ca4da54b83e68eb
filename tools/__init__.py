"""What training never imports: programs that measure, and the one that made `tiny/`. Run them from the root.

benchmark        the sampler, the update and whole steps, compared with hardware limits and other programs; memory plans
make_tiny        makes the tiny model from nothing; --examine shows how it and its offspring think
cost_model       how long a step should take, from 0.5B to 72B and from 1 to 1,024 cards
growth           how a step's time grows with group, questions, length, model and ranks
peers_choices    the demo with the choices of other trainers in place of ours

    python -m tools.benchmark --help
"""
