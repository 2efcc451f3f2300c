"""A budget in place of a scheme: what each choice costs is measured, the best are chosen, these make a plan."""
