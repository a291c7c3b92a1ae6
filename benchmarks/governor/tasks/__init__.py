"""Small real tasks for the governor: what is trained, on which pool, scored how, and what each of these costs."""
