"""What a search searches, and from where single runs start."""

TRIALS = 50
REPEATS = 3  # of what the search chose
STARTS = (1e-6, 1e-4, 1e-2, 1.0, 10.0)
LR = (1e-5, 1.0)
# Coupled decay acts on the gradient and is wanted at smaller values. Both ranges hold the good values of every task.
WEIGHT_DECAY = {"AdamW": (1e-4, 10.0), "SGD": (1e-6, 1e-1)}
