"""The search loop: propose, evaluate, select, commit, record."""
