"""How ranks talk, how a run stays alive, what it measures."""
