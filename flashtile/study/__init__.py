"""The study of query tiles: a sweep over problems and plans, what follows from it, tuned tables, and the cost model's fit."""
